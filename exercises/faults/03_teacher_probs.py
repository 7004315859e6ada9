"""
找错：教师的软标签。教师刚训练完；同样的词元，它每次应当说同样的话，自己也不再学习。
Find the fault: the teacher's soft labels. The teacher comes from its own training; for the same
tokens it should say the same each time, and it learns no more.

课 · lesson  docs/lessons/03_distillation.md
检查 · check  python exercises/check.py faults/03_teacher
"""

import torch


def teacher_probs(teacher, tokens):  # a module, (N,) -> (N, V)
    with torch.no_grad():
        logits = teacher(tokens)
    return logits.softmax(dim=-1)
