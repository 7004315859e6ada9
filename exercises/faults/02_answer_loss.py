"""
找错：只对助手的词元求平均的交叉熵；位置 t 预测词元 t + 1。
Find the fault: the mean cross-entropy of the assistant's tokens; position t predicts token t + 1.

课 · lesson  docs/lessons/02_fine_tuning.md
检查 · check  python exercises/check.py faults/02
"""

import torch.nn.functional as F


def answer_loss(logits, ids, is_answer):  # (T, V), (T,), (T,) bool -> ()
    nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    mask = is_answer[:-1]
    return (nll * mask).sum() / mask.sum()
