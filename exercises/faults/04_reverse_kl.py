"""
找错：反向 KL(q || p)，p 是教师，q 是学生；它应当寻找众数。
Find the fault: the reverse KL(q || p) of teacher p and student q; it should be mode-seeking.

课 · lesson  docs/lessons/04_divergences_and_temperature.md
检查 · check  python exercises/check.py faults/04
"""

import torch.nn.functional as F


def reverse_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)
