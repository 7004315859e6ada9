"""
两个权重对调了：alpha 属于标签。别家的代码里 alpha 可能是教师的权重，先看它的公式。
The weights were swapped: alpha belongs to the labels. In other code it may be the teacher's weight;
look at the formula first.
"""

import torch.nn.functional as F


def total_loss(student_logits, teacher_logits, targets, alpha):  # (N, V), (N, V), (N,), float -> ()
    log_q = F.log_softmax(student_logits, dim=-1)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    ce = F.nll_loss(log_q, targets)
    kd = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * ce + (1 - alpha) * kd
