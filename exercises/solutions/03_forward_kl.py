"""
全在对数空间里计算：softmax 之后再取对数，小的概率会变成 log 0。
All in log space: a log after a softmax would be log 0 for small probabilities.
"""

import torch.nn.functional as F


def forward_kl(student_logits, teacher_logits):  # (N, V), (N, V) -> (N,)
    log_p = F.log_softmax(teacher_logits, dim=-1)
    log_q = F.log_softmax(student_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
