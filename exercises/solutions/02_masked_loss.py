"""
logits[t] 与 ids[t + 1] 配对，所以掩码也取 is_answer[t + 1]；最后一个位置没有目标。
logits[t] belongs to ids[t + 1], and so does the mask: is_answer[t + 1]. The last position has no
target.
"""

import torch.nn.functional as F


def masked_loss(logits, ids, is_answer):  # (T, V), (T,), (T,) bool -> ()
    learned = is_answer[1:]
    return F.cross_entropy(logits[:-1][learned], ids[1:][learned])
