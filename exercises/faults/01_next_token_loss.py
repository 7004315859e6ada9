"""
找错：下一词元的平均交叉熵。有一处错误，训练却照样进行。
Find the fault: the mean cross-entropy of the next tokens. One thing is wrong, and training runs all
the same.

    loss = mean of -log softmax(logits)[target]

课 · lesson  docs/lessons/01_pretraining.md
检查 · check  python exercises/check.py faults/01
"""

import torch.nn.functional as F


def next_token_loss(logits, targets):  # (N, V), (N,) -> ()
    q = logits.softmax(dim=-1)
    return F.cross_entropy(q, targets)
