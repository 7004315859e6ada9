"""
练习：在策略蒸馏的掩码。每行是提示、学生采样的回答、填充；标出学生自己采样的词元。
Exercise: the mask of on-policy distillation. A row is a prompt, the answer that the student
sampled, and padding. Mark the tokens that the student sampled itself.

    sampled = the tokens after the prompt, up to its first end-of-turn token, which counts too

提示里也有结束符，填充用的就是结束符；在长度上限处截断的回答没有结束符。
Prompts contain end-of-turn tokens, too, and padding consists of them. An answer that was cut at the
maximum length has none.

课 · lesson  docs/lessons/08_on_policy_distillation.md
检查 · check  python exercises/check.py 08
"""

import torch


def rollout_mask(ids, prompt_lengths, end):  # (B, T), (B,), int -> (B, T) bool
    """With end = 2:

    ids      5  2  6  7  8  2  2  2         a prompt of 3 tokens, an answer of 7, 8 and its end
    sampled  0  0  0  1  1  1  0  0

    cumsum(dim=1) counts along a row.
    """
    raise NotImplementedError  # your lines here
