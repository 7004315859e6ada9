"""
每个微批次的损失是总和，除以整个批次的词元数：每个词元的权重相同，怎样切分都一样。
没有目标的微批次，总和是 0；它的平均却是 NaN。
A micro-batch's loss is a sum, divided by the tokens of the whole batch: all tokens have the same
weight, however they are split. Without targets the sum is 0, where a mean would be NaN.
"""

import torch.nn.functional as F


def accumulate(head, micro_batches):  # (V, D), [((N, D), (N,)), ...] -> nothing
    n_tokens = sum(len(targets) for _, targets in micro_batches)
    for states, targets in micro_batches:
        logits = states @ head.T                                                    # (N, V)
        (F.cross_entropy(logits, targets, reduction="sum") / n_tokens).backward()
