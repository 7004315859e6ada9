"""
只数提示之后的结束符；某个词元之前一个都没有，它就是采样得到的，第一个结束符自己也算。
Count only the ends after the prompt. A token with none before it was sampled; so was the first end
itself.
"""

import torch


def rollout_mask(ids, prompt_lengths, end):  # (B, T), (B,), int -> (B, T) bool
    after_prompt = torch.arange(ids.shape[1]) >= prompt_lengths[:, None]
    is_end = (ids == end) & after_prompt
    ends_before = is_end.long().cumsum(dim=1) - is_end.long()
    return after_prompt & (ends_before == 0)
