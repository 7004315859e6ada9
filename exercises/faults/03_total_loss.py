"""
找错：蒸馏的总损失，T = 1，对词元求平均；alpha 是标签的权重。
Find the fault: the whole loss of distillation at T = 1, a mean over tokens; alpha is the weight of
the labels.

课 · lesson  docs/lessons/03_distillation.md
检查 · check  python exercises/check.py faults/03_total
"""

import torch.nn.functional as F


def total_loss(student_logits, teacher_logits, targets, alpha):  # (N, V), (N, V), (N,), float -> ()
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    ce = F.nll_loss(log_q, targets)
    kd = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return (1 - alpha) * ce + alpha * kd
