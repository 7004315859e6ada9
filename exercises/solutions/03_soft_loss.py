"""
对学生 logits 的梯度是 T^2 (q - p) / T；而 q - p 随 T 按 1 / T 缩小，T 于是消去。
The gradient for the student's logits is T^2 (q - p) / T, and q - p shrinks like 1 / T: T cancels.
"""

import torch.nn.functional as F


def soft_loss(student_logits, teacher_logits, temperature):  # (N, V), (N, V), float -> ()
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return temperature ** 2 * kl.mean()
