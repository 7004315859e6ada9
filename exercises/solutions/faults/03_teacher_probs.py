"""
no_grad 不会关掉 dropout，eval 才会；eval 也不会关掉梯度，所以两个都要。
no_grad leaves dropout on; eval turns it off. And eval leaves gradients on, so both are needed.
"""

import torch


def teacher_probs(teacher, tokens):  # a module, (N,) -> (N, V)
    teacher.eval()
    with torch.no_grad():
        logits = teacher(tokens)
    return logits.softmax(dim=-1)
