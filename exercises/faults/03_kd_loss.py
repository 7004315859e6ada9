"""
找错：软标签损失，对词元求平均；换一个温度，梯度的大小应当不变。
Find the fault: the soft-label loss, a mean over tokens; another temperature should leave the size
of its gradient as it is.

课 · lesson  docs/lessons/03_distillation.md
检查 · check  python exercises/check.py faults/03_kd
"""

import torch.nn.functional as F


def kd_loss(student_logits, teacher_logits, temperature):  # (N, V), (N, V), float -> ()
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
