"""
缺少 T^2：T = 4 时梯度只有十六分之一，标签的交叉熵压过了教师。
T^2 was missing: at T = 4 the gradient is a sixteenth, and the labels' cross-entropy drowns the
teacher.
"""

import torch.nn.functional as F


def kd_loss(student_logits, teacher_logits, temperature):  # (N, V), (N, V), float -> ()
    log_q = F.log_softmax(student_logits / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature ** 2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
