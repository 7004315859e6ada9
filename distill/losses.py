"""
蒸馏损失：教师与学生的词分布相差多少。
The distillation losses: how far the student's next-token distribution is from the teacher's.

p is the teacher, q the student, both tempered: softmax(logits / temperature). Everything in fp32 log space:
a log-softmax in bf16 was seen to read a true divergence of 5e-5 as 3e-3.
"""

import torch.nn.functional as F


def token_kl(log_p, log_q):  # (N, V), (N, V) -> (N,)
    """Forward KL(p || q) = sum_v p (log p - log q) of each token: zero only where the two agree, and mean-seeking,
    for the student pays wherever the teacher has mass that it lacks."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def distillation_loss_fn(student_logits, teacher_logits, temperature=1.0, reduction="batchmean"):
    """The soft-label loss  T^2 * KL(teacher_T || student_T).

    Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. The gradient of the tempered KL shrinks
    like 1 / T^2; the factor keeps its size beside the cross-entropy.

    student_logits  (..., V), gradients flow
    teacher_logits  (..., V), none do
    reduction       'batchmean': nats per token, over all leading dimensions (in the PyTorch function of that name a
                    (B, T, V) input is divided by B alone); 'sum': nats; 'none': (...,)

    Raises ValueError when the shapes differ: two vocabularies cannot be compared column by column.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
                         "differ; both models must share one vocabulary and look at the same tokens")
    log_q = F.log_softmax(student_logits.float() / temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    loss = token_kl(log_p, log_q) * temperature ** 2
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "batchmean":
        return loss.mean() if loss.numel() else loss.sum()          # no token, no loss: 0, not NaN
    raise ValueError(f"reduction={reduction!r} is none of 'batchmean', 'sum', 'none'")
