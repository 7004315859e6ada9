"""
m 是概率的平均，不是对数概率的平均：log m = log(e^log_p + e^log_q) - log 2。
m is the mean of the probabilities, not of their logarithms: log m = log(e^log_p + e^log_q) - log 2.
"""

import math

import torch


def jsd(log_p, log_q):  # (N, V), (N, V) -> (N,)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    kl_p, kl_q = ((log.exp() * (log - log_m)).sum(dim=-1) for log in (log_p, log_q))
    return (kl_p + kl_q) / 2
