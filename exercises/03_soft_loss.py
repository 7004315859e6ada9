"""
练习：温度。软标签损失对词元求平均；因子 T^2 使梯度的大小不随 T 改变。
Exercise: the temperature. The soft-label loss, a mean over tokens; the factor T^2 keeps the size of
the gradient whatever T is.

    loss = T^2 * KL(p || q)             p, q = softmax(logits / T)

课 · lesson  docs/lessons/03_distillation.md
检查 · check  python exercises/check.py 03_soft
"""

import torch.nn.functional as F


def soft_loss(student_logits, teacher_logits, temperature):  # (N, V), (N, V), float -> ()
    """Student (2, 2, 0), teacher (4, 2, 0): 0.349 at T = 1, 4 * 0.120 = 0.479 at T = 2."""
    raise NotImplementedError  # your lines here
