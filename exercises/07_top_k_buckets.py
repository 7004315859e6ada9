"""
练习：top-k 与尾部。保留给定的 k 个词元，其余的合成一个桶，得到 k + 1 个对数概率。
Exercise: top-k and its tail. Keep k given tokens and put all others into one more bucket: k + 1
log-probabilities.

    p(v_1), ..., p(v_k), 1 - p(v_1) - ... - p(v_k)

对教师和学生用同样的 k 个词元（教师的），两者的 KL 不超过完整的 KL。
With the same k tokens (the teacher's) for teacher and student, their KL is at most the whole one.

课 · lesson  docs/lessons/07_offline_distillation.md
检查 · check  python exercises/check.py 07
"""

import torch


def top_k_buckets(log_p, ids):  # (N, V), (N, k) -> (N, k + 1)
    """log_p is normalised; the ids of a row differ, and k < V.

    p = (0.5, 0.3, 0.1, 0.1), ids = (0, 1): the logarithms of (0.5, 0.3, 0.2). A tail of 1e-11 must
    not become 0: can you do without the 1 - ...?
    """
    raise NotImplementedError  # your lines here
