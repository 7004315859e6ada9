"""
练习：梯度累积。逐个对微批次反向传播，使 head.grad 等于整个批次平均损失的梯度。
Exercise: gradient accumulation. Call backward once per micro-batch, so that head.grad ends as the
gradient of the mean loss of the whole batch. Micro-batches may have different numbers of tokens.

    loss = sum over all tokens of CE / number of tokens in all micro-batches

课 · lesson  docs/lessons/02_fine_tuning.md
检查 · check  python exercises/check.py 02_accumulate
"""

import torch.nn.functional as F


def accumulate(head, micro_batches):  # (V, D), [((N, D), (N,)), ...] -> nothing
    """head requires a gradient and has none yet; each micro-batch is (states, targets). The logits
    of a micro-batch are states @ head.T, (N, V); backward() adds to head.grad.

    Two micro-batches, 3 tokens with 3 nats and 9 tokens with 27 nats: the loss is 30 / 12 = 2.5.
    """
    raise NotImplementedError  # your lines here
