"""
练习：前向 KL。学生的下一词元分布 q 与教师的 p 相差多少，每个词元一个数，单位 nats。
Exercise: the forward KL. How far the student's next-token distribution q is from the teacher's p,
in nats, one number per token.

    KL(p || q) = sum over v of p(v) (log p(v) - log q(v))       p, q = softmax(logits)

课 · lesson  docs/lessons/03_distillation.md
检查 · check  python exercises/check.py 03_forward
"""

import torch.nn.functional as F


def forward_kl(student_logits, teacher_logits):  # (N, V), (N, V) -> (N,)
    """p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3) = 0.144. Logits of 1000 must not
    give NaN."""
    raise NotImplementedError  # your lines here
