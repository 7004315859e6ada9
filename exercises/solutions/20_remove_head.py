"""
头的输出是 wq、wk、wv 的行，却是 wo 的列：wo 读取各头的输出。
A head owns rows of wq, wk and wv, which write it, and columns of wo, which reads it.
"""

import torch


def remove_head(wq, wk, wv, wo, head, n_heads):  # (H K, D) three times, (D, H K) -> the same, H - 1
    K = len(wq) // n_heads
    kept = torch.arange(n_heads * K) // K != head
    return wq[kept], wk[kept], wv[kept], wo[:, kept]
