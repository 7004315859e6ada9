"""
融合损失：从隐藏状态直接到损失和梯度，逐块计算，从不存下完整的 [词元, 词表] 张量。
The fused loss: from hidden states to CE + divergence and their gradients, a few rows at a time, so
that no [tokens, vocabulary] tensor is ever stored. The forward pass computes the gradients, because
the loss ends the graph: backward only multiplies by one factor. The idea is that of chunked
cross-entropies: Hsu et al. 2024 (Liger), https://arxiv.org/abs/2410.10989, Sec. 3.2.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dataset.lm_dataset import Batch
from distill.losses import forward_kl

CHUNK_BYTES = 32 << 20      # of one (rows, V) buffer in fp32; CE + forward KL uses three
MAX_ROWS = 256              # more rows are no faster, and small buffers stay in the CPU's cache
MIN_LOG_P = -30.0           # log-probability of an empty tail: finite, and exp(-30) is negligible


class Dense(NamedTuple):
    """A teacher's output at S positions as final hidden states; logits = states @ head.T."""
    states: torch.Tensor            # (S, D of the teacher)
    head: torch.Tensor              # (V, D of the teacher)
    weight: float = 1.0             # several teachers act as one: p = sum of weight * p of each
    begin: int = 0                  # routed: its first position among those of the student
    batch: Batch | None = None      # with another tokenizer: states are at the teacher's positions

    @property
    def at_targets(self):  # -> (S, D)
        return self.states if self.batch is None else self.states[self.batch.match.clamp_min(0)]


class TopK(NamedTuple):
    """A teacher's output as its top-k tokens; all others, its tail, form one more bucket."""
    ids: torch.Tensor               # (S, k)
    log_p: torch.Tensor             # (S, k), at the temperature of the run
    tail: torch.Tensor              # (S,) log-probability of the tail: 1 - sum(p) would lose it


class Fused(NamedTuple):
    """Sums over the S positions, in nats."""
    loss: torch.Tensor              # alpha * ce + (1 - alpha) * kd; gradients flow
    ce: torch.Tensor
    kd: torch.Tensor                # T^2 * divergence


def fused_distillation_loss(hidden, head, targets, teacher, alpha=0.0, temperature=1.0,
                            divergence=forward_kl, kd_weight=None, ce_weight=None,
                            chunk_bytes=CHUNK_BYTES) -> Fused:
    """alpha * CE + (1 - alpha) * T^2 * D(teacher_T, student_T), summed over the S positions.

    hidden       (S, D) final hidden states of the student; gradients flow
    head         (V, D) output matrix of the student; gradients flow
    targets      (S,) ids
    teacher      a list of Dense (several at one position are mixed by their weights), or one TopK
    divergence   a function of distill/losses.py, or your own
    kd_weight    (S,) weight of the divergence at each position; 0 or False masks it. None: 1
    ce_weight    (S,) weight of the cross-entropy; negative for a policy gradient. None: 1

    Under autocast the matrix products run in its dtype; the loss is fp32. CE + forward KL has a
    closed form, softmax - one-hot and T (q - p); other divergences use autograd chunk by chunk.
    With another tokenizer they are over spans (`in_spans`).
    """
    rests = span_rests(hidden, head, targets, teacher, temperature)
    closed_form = (divergence is forward_kl and kd_weight is None and ce_weight is None
                   and not isinstance(teacher, TopK))
    chunks = Chunks(hidden, head, teacher, chunk_bytes, divide_rows=1 if closed_form else 4)
    with torch.autocast(hidden.device.type, enabled=False):     # `chunks` has the products' dtype
        return Fused(*FusedLoss.apply(hidden, head, rests, targets, chunks, closed_form, alpha,
                                      temperature, divergence, kd_weight, ce_weight))


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, rests, targets, chunks, closed_form, alpha, temperature,
                divergence, kd_weight, ce_weight):
        # In fp16 the gradients of rare tokens would underflow: these products run in fp32.
        dtype = torch.float32 if chunks.dtype == torch.float16 else chunks.dtype
        h, w = hidden.detach().to(dtype), head.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_head = (torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1]
                     else None)                                     # a frozen head
        grad_rests = []
        ce, kd = hidden.new_zeros(2, dtype=torch.float32)

        for rows in chunks:
            logits = chunks.student(rows)                                           # (C, V)
            if closed_form:
                log_p = chunks.teacher_log_p(rows, temperature)
                parts = ce_and_forward_kl(logits, log_p, targets[rows], alpha, temperature,
                                          chunks.buffer("scratch", rows, head))
            else:
                parts = by_autograd(logits, chunks, rows, targets[rows], alpha, temperature,
                                    divergence, kd_weight, ce_weight, rests)
                grad_rests += parts[3:]
            ce, kd, slope = ce + parts[0], kd + parts[1], parts[2].to(dtype)        # (), (), (C, V)
            grad_hidden[rows] = slope @ w
            if grad_head is not None and dtype == torch.float32:
                grad_head.addmm_(slope.T, h[rows])
            elif grad_head is not None:
                grad_head += slope.T @ h[rows]

        # A plain attribute: save_for_backward would keep the tensors as long as the graph.
        ctx.grads = (grad_hidden.to(hidden.dtype),
                     None if grad_head is None else grad_head.to(head.dtype),
                     torch.cat(grad_rests) if grad_rests else None)
        ctx.mark_non_differentiable(ce, kd)
        return alpha * ce + (1 - alpha) * kd, ce, kd

    @staticmethod
    def backward(ctx, factor, *_):
        grads, ctx.grads = ctx.grads, None
        return *(None if grad is None else grad.mul_(factor) for grad in grads), *[None] * 8


class Chunks:
    """The rows in chunks, and (C, V) buffers that all chunks share, as allocating costs more.
    divide_rows: autograd needs some twenty more buffers, and a quarter of the rows is as fast."""

    def __init__(self, hidden, head, teacher, chunk_bytes=CHUNK_BYTES, divide_rows=1):
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else torch.float32
        self.hidden, self.head = hidden.detach().to(self.dtype), head.detach().to(self.dtype)
        self.teacher = teacher if isinstance(teacher, TopK) else [
            one._replace(states=one.at_targets.detach().to(self.dtype),
                         head=one.head.detach().to(self.dtype)) for one in teacher]
        fit = chunk_bytes // (4 * len(head) * divide_rows)
        self.size = max(1, min(len(hidden), MAX_ROWS // divide_rows, fit))
        self.buffers = {}

    def __iter__(self):
        # No chunk holds positions of two routed teachers.
        begins = [] if isinstance(self.teacher, TopK) else [one.begin for one in self.teacher]
        for first, end in pairwise(sorted({0, len(self.hidden), *begins})):
            for start in range(first, end, self.size):
                yield slice(start, min(start + self.size, end))

    def buffer(self, name, rows, head):  # -> (C, V)
        if name not in self.buffers:
            self.buffers[name] = self.hidden.new_empty(self.size, len(head), dtype=torch.float32)
        return self.buffers[name][:rows.stop - rows.start]

    def student(self, rows):  # -> (C, V) logits
        return product(self.hidden[rows], self.head, self.buffer("student", rows, self.head))

    def teacher_log_p(self, rows, temperature):  # -> (C, V), all teachers of these rows mixed
        here = [one for one in self.teacher
                if one.begin <= rows.start and rows.stop <= one.begin + len(one.states)]
        mixed = None
        for one in here:
            name = "teacher" if mixed is None else "another teacher"
            states = one.states[rows.start - one.begin:rows.stop - one.begin]
            log_p = product(states, one.head, self.buffer(name, rows, one.head))
            log_softmax_(log_p.div_(temperature) if temperature != 1.0 else log_p)
            if len(here) > 1:
                log_p += math.log(one.weight)
            mixed = log_p if mixed is None else torch.logaddexp(mixed, log_p, out=mixed)
        return mixed


def product(states, head, out):  # (C, D), (V, D) -> (C, V) in fp32
    if states.dtype == torch.float32:
        return torch.mm(states, head.T, out=out)
    return out.copy_(states @ head.T)


def log_softmax_(x):  # (C, V) -> (C, V), in place
    return torch.log_softmax(x, dim=-1, out=x)


def ce_and_forward_kl(logits, log_p, targets, alpha, temperature, scratch):  # -> (), (), (C, V)
    """CE, T^2 KL(p || q), and the gradient of their mix for the logits. Overwrites all buffers."""
    T, at_target = temperature, targets[:, None]
    log_q = log_softmax_(logits.div_(T) if T != 1.0 else logits)
    gap = torch.sub(log_p, log_q, out=scratch)
    p = log_p.exp_()
    kl = torch.linalg.vecdot(p, gap).sum()
    if T == 1.0:
        ce = -log_q.gather(1, at_target).sum()
        slope = log_q.exp_().sub_(p, alpha=1 - alpha)               # alpha q + (1 - alpha) (q - p)
    else:
        log_hard = log_softmax_(torch.mul(log_q, T, out=scratch))   # T log q: logits + a constant
        ce = -log_hard.gather(1, at_target).sum()
        slope = log_q.exp_().sub_(p).mul_((1 - alpha) * T).add_(log_hard.exp_(), alpha=alpha)
    slope.scatter_add_(1, at_target, torch.full_like(at_target, -alpha, dtype=slope.dtype))
    return ce, T * T * kl, slope


def by_autograd(logits, chunks, rows, targets, alpha, temperature, divergence, kd_weight,
                ce_weight, rests):  # -> (), (), (C, V)
    """The same three for any divergence; with another tokenizer also the gradient for rests."""
    with torch.enable_grad():
        logits = logits.requires_grad_()
        ce = F.cross_entropy(logits, targets, reduction="none")                     # (C,)
        ce = (ce if ce_weight is None else ce * ce_weight[rows]).sum()
        log_q = F.log_softmax(logits / temperature, dim=-1)                         # (C, V)
        if isinstance(chunks.teacher, TopK):
            log_p, log_q = in_buckets(chunks.teacher, rows, log_q)
        else:
            log_p = chunks.teacher_log_p(rows, temperature)
        wanted = [logits] if rests is None else [logits, rests[rows].detach().requires_grad_()]
        if rests is not None:
            log_p, log_q = in_spans(chunks.teacher[0], rows, log_p, log_q, targets, wanted[1])
        kd = divergence(log_p, log_q)                                               # (C,)
        kd = temperature ** 2 * (kd if kd_weight is None else kd * kd_weight[rows]).sum()
        slopes = torch.autograd.grad(alpha * ce + (1 - alpha) * kd, wanted)
    logits.requires_grad_(False)
    return ce.detach(), kd.detach(), *slopes


def in_buckets(top: TopK, rows, log_q):  # (C, V) -> (C, k + 1) twice
    """Teacher and student over the teacher's top-k tokens and one bucket for the tail."""
    ids, log_p = top.ids[rows], top.log_p[rows].float()
    tail_p = top.tail[rows, None].float().clamp_min(MIN_LOG_P)
    tail_q = log_q.scatter(-1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True).clamp_min(MIN_LOG_P)
    return torch.cat([log_p, tail_p], dim=-1), torch.cat([log_q.gather(-1, ids), tail_q], dim=-1)


def span_rests(hidden, head, targets, teacher, temperature):  # -> (S, 2), or None
    """Log-probability of each span's tokens after its first: the student's, with gradients, and the
    teacher's. None unless the teacher has another tokenizer."""
    if isinstance(teacher, TopK) or not teacher or teacher[0].batch is None:
        return None

    def rest(states, head, targets, begins):  # (S, D), (V, D), (S,), (S,) -> (S,)
        log_p = token_log_probs(states[~begins], head, targets[~begins], temperature)
        begin = torch.where(begins, torch.arange(len(begins), device=begins.device), 0)
        return log_p.new_zeros(len(begins)).index_add(0, begin.cummax(dim=0).values[~begins], log_p)

    its, batch = teacher[0], teacher[0].batch
    match = batch.match[:len(targets)]                          # of a batch without targets: none
    begins = torch.isin(torch.arange(len(its.states), device=match.device), match)
    own = rest(hidden, head, targets, match >= 0)
    theirs = rest(its.states, its.head, batch.teacher.targets, begins)
    return torch.stack([own, theirs[match.clamp_min(0)]], dim=1)


def in_spans(teacher: Dense, rows, log_p, log_q, targets, rests):  # -> (C, V + 2) twice
    """Teacher and student over V shared tokens, the tokens that count as none, and the span. Its
    probability, the product of its tokens', is taken from that of the first of them."""
    batch, tiny = teacher.batch, torch.finfo(torch.float32).tiny
    match, span = batch.match[rows].clamp_min(0), batch.span[rows, None].clamp_min(0)

    def over(log_p, shared, first, rest):  # (C, V), (V,), (C,), (C,) -> (C, V + 2)
        p, first, rest = log_p.exp(), first[:, None], rest[:, None]
        p_first = p.gather(1, first)
        p = p.scatter(1, first, p_first * -rest.expm1())
        found = p.new_zeros(len(p), len(batch.shared) + 2).scatter_add(1, shared.expand_as(p), p)
        return found.scatter_add(1, span, p_first * rest.exp()).clamp_min(tiny).log()

    return (over(log_p, batch.teacher.shared, batch.teacher.targets[match], rests[:, 1]),
            over(log_q, batch.shared, targets, rests[:, 0]))


def token_log_probs(hidden, head, targets, temperature=1.0, chunk_bytes=CHUNK_BYTES):
    # (S, D), (V, D), (S,) -> (S,)
    """Log-probabilities of the targets; gradients flow. The backward pass computes the logits of
    each chunk of rows again."""
    def of(states, ids):
        logits = (states @ head.T).float() / temperature                            # (C, V)
        return -F.cross_entropy(logits, ids, reduction="none")

    size = max(1, min(MAX_ROWS, chunk_bytes // (4 * len(head))))
    return torch.cat([checkpoint(of, *rows, use_reentrant=False, preserve_rng_state=False)
                      for rows in zip(hidden.split(size), targets.split(size))])


TOP = 10                # tokens of teacher and student whose sets are compared
BINS = 10               # of confidence


@torch.no_grad()
def compare(hidden, head, targets, teacher=(), matched=None,
            temperature=1.0) -> dict[str, torch.Tensor]:
    """Student against teacher, as sums over the S positions, in nats; without a teacher only `ce`.

    ce, teacher_ce      cross-entropy with the labels
    student_entropy     and the teacher's, `entropy`: the lowest CE on labels sampled from it
    ece, teacher_ece    (BINS,) `calibration_gaps`
    teacher_accuracy    positions where the teacher's top-1 token is the label
    kl                  KL(teacher || student)
    agreement           positions where both have the same top-1 token
    overlap             share of the TOP most likely tokens that both have in common. Li et al.
                        2026, https://arxiv.org/abs/2604.13016, there on the student's own answers
    acceptance          sum over v of min(p, q): how likely the teacher accepts a token that the
                        student drafts. Leviathan et al. 2022, https://arxiv.org/abs/2211.17192

    All at temperature 1. With another tokenizer kl is over `in_spans`, kl and entropy are of the
    `matched` positions, and the last three are missing. A TopK has only kl and entropy, over its
    k + 1 buckets at its own `temperature`, not comparable, and agreement.
    """
    rests = span_rests(hidden, head, targets, teacher, 1.0)
    sums, chunks = {}, Chunks(hidden, head, teacher)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows in [*chunks] or [slice(0, 0)]:         # zeros for a process without targets
            log_q, labels = log_softmax_(chunks.student(rows)), targets[rows, None]
            found = {"ce": -log_q.gather(1, labels).sum()}
            if teacher:
                q, top_q = log_q.exp(), log_q.topk(min(TOP, log_q.shape[-1]))
                found |= {"student_entropy": -torch.linalg.vecdot(q, log_q).sum(),
                          "ece": calibration_gaps(top_q, labels)}
            if isinstance(teacher, TopK):
                log_p, buckets = in_buckets(teacher, rows, log_softmax_(log_q / temperature))
                top_1 = teacher.ids[rows].gather(1, teacher.log_p[rows].argmax(dim=-1)[:, None])
                found |= {"kl": forward_kl(log_p, buckets).sum(),
                          "entropy": -torch.linalg.vecdot(log_p.exp(), log_p).sum(),
                          "agreement": (top_1 == top_q.indices[:, :1]).sum()}
            elif teacher:
                log_p = chunks.teacher_log_p(rows, 1.0)
                p, used = log_p.exp(), 1.0 if matched is None else matched[rows]
                found["entropy"] = -(torch.linalg.vecdot(p, log_p) * used).sum()
                if rests is not None:
                    spans = in_spans(teacher[0], rows, log_p, log_q, targets[rows], rests[rows])
                    found["kl"] = (forward_kl(*spans) * used).sum()
                else:
                    top_p = log_p.topk(top_q.indices.shape[-1])                     # (C, k)
                    same = top_p.indices[:, :, None] == top_q.indices[:, None, :]   # (C, k, k)
                    found |= {"kl": torch.linalg.vecdot(p, log_p - log_q).sum(),
                              "agreement": same[:, 0, 0].sum(),
                              "overlap": same.sum() / same.shape[-1],
                              "acceptance": torch.minimum(p, q).sum(),
                              "teacher_ce": -log_p.gather(1, labels).sum(),
                              "teacher_accuracy": (top_p.indices[:, :1] == labels).sum(),
                              "teacher_ece": calibration_gaps(top_p, labels)}
            sums = {name: sums.get(name, 0) + value for name, value in found.items()}
    return sums


def calibration_gaps(top, labels):  # topk of log-probabilities (C, k), (C, 1) -> (BINS,)
    """Probability of the top-1 token minus whether it is the label, summed per bin of probability.
    These add up; the expected calibration error of N positions is sum over bins of |gap| / N.
    Guo et al. 2017, https://arxiv.org/abs/1706.04599, Eq. 3."""
    p, right = top.values[:, 0].exp(), top.indices[:, :1] == labels
    bins = (p * BINS).long().clamp_max(BINS - 1)
    return p.new_zeros(BINS).index_add_(0, bins, p - right.squeeze(1).float())
