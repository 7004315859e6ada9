"""
练习：Jensen-Shannon 散度。两个分布各与它们的平均比较；对称，不超过 log 2。
Exercise: the Jensen-Shannon divergence. Both distributions are compared with their mean; it is
symmetric and at most log 2.

    JSD(p, q) = 1/2 KL(p || m) + 1/2 KL(q || m)         m = (p + q) / 2

课 · lesson  docs/lessons/04_divergences_and_temperature.md
检查 · check  python exercises/check.py 04
"""

import math

import torch


def jsd(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """p = (1, 0), q = (0, 1): m = (1/2, 1/2), and both KLs are log 2.

    torch.logaddexp(a, b) is log(exp(a) + exp(b)) without leaving log space.
    """
    raise NotImplementedError  # your lines here
