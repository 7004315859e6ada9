"""
目标移了一位，掩码也要移：否则回答的第一个词元永远学不到，回答之后的那个却学到了。
The targets are shifted by one, and so must the mask be. Otherwise the first token of each answer is
never learned, and the one after the answer is.
"""

import torch.nn.functional as F


def answer_loss(logits, ids, is_answer):  # (T, V), (T,), (T,) bool -> ()
    nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    mask = is_answer[1:]
    return (nll * mask).sum() / mask.sum()
