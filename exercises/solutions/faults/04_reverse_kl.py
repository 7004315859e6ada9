"""
F.kl_div(input, target) 是 KL(target || input)：参数的次序与公式相反。
F.kl_div(input, target) is KL(target || input): its arguments come in the other order than in the
formula.
"""

import torch.nn.functional as F


def reverse_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
