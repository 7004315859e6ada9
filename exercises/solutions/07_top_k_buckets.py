"""
尾部是其余词元概率之和，用 logsumexp 直接相加；1 - sum(p) 在 fp32 里会把 1e-11 变成 0。
合并词元只会丢失差别，所以桶之间的 KL 不超过完整的 KL。
The tail is the sum of the other tokens' probabilities, added by logsumexp; in fp32, 1 - sum(p)
turns 1e-11 into 0. Merging tokens only loses differences, so the buckets' KL is at most the whole
one.
"""

import torch


def top_k_buckets(log_p, ids):  # (N, V), (N, k) -> (N, k + 1)
    others = log_p.scatter(-1, ids, -torch.inf)
    tail = others.logsumexp(dim=-1, keepdim=True)                                   # (N, 1)
    return torch.cat([log_p.gather(-1, ids), tail], dim=-1)
