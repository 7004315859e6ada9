"""
练习：剪掉一个注意力头。返回缩小的四个矩阵，其余各头的计算不变。
Exercise: prune one attention head. Return the four matrices without it; the other heads compute
what they did.

    y = sum over heads h of  softmax(q_h k_h^T / sqrt(K)) v_h wo_h^T        q_h = x wq_h^T, ...

头 h 的 K 个分量彼此相邻。The K components of head h are next to each other: h K, ..., h K + K - 1.

课 · lesson  docs/lessons/20_pruning.md
检查 · check  python exercises/check.py 20
"""

import torch


def remove_head(wq, wk, wv, wo, head, n_heads):  # (H K, D) three times, (D, H K) -> the same, H - 1
    """As in nn.Linear, a matrix has a row per output and a column per input.

    H = 3, K = 2, head = 1: components 2 and 3 go, 0, 1, 4 and 5 stay.
    """
    raise NotImplementedError  # your lines here
