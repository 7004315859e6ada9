"""
每个练习的规律：函数叫什么，规律就叫什么。
The laws of each exercise, in a function with the name of the student's.

A law is (sentence, number, "=", "<=" or ">=", number); a tensor stands for as many numbers. To add
an exercise, add its laws here, its file with a blank, and its solution.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def log_probs(*shape, seed=0):
    return (2 * randn(*shape, seed=seed)).log_softmax(dim=-1)


def gradient(loss_of, x):
    """Of loss_of(x), at x."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(x).sum(), x)[0]


# ------------------------------------------------------------------------ 01 pretraining


def muon_update(f):
    U, V = (torch.linalg.qr(randn(n, 6, seed=n)).Q for n in (6, 10))
    G = U @ torch.diag(torch.logspace(0, -2, 6)) @ V.T          # singular values 1 ... 0.01
    O = f(G)
    sizes = torch.linalg.svdvals(O)
    yield "no singular value of the update is large", sizes.max(), "<=", 1.25
    yield "none is small, though the gradient's go down to a hundredth", sizes.min(), ">=", 0.6
    cosine = (O * (U @ V.T)).sum() / O.norm() / math.sqrt(6)
    yield "the singular vectors stay: cosine with U V^T", cosine, ">=", 0.97
    yield "a gradient a thousand times as large has the same update", f(1000 * G), "=", O
    yield "and so has one a thousand times as small", f(G / 1000), "=", O


def next_token_loss(f):
    q = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.125, 0.125, 0.75]])
    loss = f(q.log(), torch.tensor([0, 0, 0]))
    yield "probabilities 1/2, 1/4, 1/8 cost log 4 on average", loss, "=", math.log(4)
    yield "equal logits cost log V", f(torch.zeros(4, 7), torch.arange(4)), "=", math.log(7)
    yield "being sure and right costs nothing", f(30 * torch.eye(4), torch.arange(4)), "=", 0
    yield "being sure and wrong costs 30", f(30 * torch.eye(4), torch.arange(1, 5) % 4), "=", 30


# ------------------------------------------------------------------------ 02 fine-tuning


def masked_loss(f):
    ids = torch.tensor([3, 1, 4, 0, 2, 1])
    is_answer = torch.tensor([False, False, False, True, True, False])
    logits = randn(6, 5)
    yield "equal logits cost log V", f(torch.zeros(6, 5), ids, is_answer), "=", math.log(5)
    with_gradient = gradient(lambda z: f(z, ids, is_answer), logits).norm(dim=1) > 0
    yield "positions 2 and 3 alone get a gradient", with_gradient, "=", [0, 0, 1, 1, 0, 0]
    q = torch.full((6, 5), 1 / 8)
    q[2, 0] = q[3, 2] = 1 / 2           # the answer's tokens, 0 and 2
    loss = f(q.log(), ids, is_answer)
    yield "probability 1/2 beside four of 1/8 costs log 2", loss, "=", math.log(2)
    once = f(logits, ids, is_answer)
    twice = f(*(torch.cat([x, x]) for x in (logits, ids, is_answer)))
    yield "the same conversation twice has the same mean", twice, "=", once


answer_loss = masked_loss


def accumulate(f):
    states, targets = randn(4, 3), torch.tensor([0, 2, 1, 4])
    weight = randn(5, 3, seed=1)

    def left_in_grad(*sizes):
        head = weight.clone().requires_grad_()
        f(head, list(zip(states.split(sizes), targets.split(sizes))))
        return head.grad

    whole = gradient(lambda head: F.cross_entropy(states @ head.T, targets), weight)
    yield "one micro-batch: the gradient of its mean", left_in_grad(4), "=", whole
    yield "2 + 2 tokens: the same", left_in_grad(2, 2), "=", whole
    yield "1 + 3 tokens: the same", left_in_grad(1, 3), "=", whole
    yield "a micro-batch without a token changes nothing", left_in_grad(4, 0), "=", whole


# ------------------------------------------------------------------------ 03 distillation


def forward_kl(f):
    student, teacher = randn(6, 11), randn(6, 11, seed=1)
    yield "equal distributions: 0 for each token", f(student, student), "=", torch.zeros(6)
    yield "and 0 if only a constant was added to the logits", f(student, student + 3), "=", 0
    yield "different ones: more than 0", f(student, teacher), ">=", 0.01
    p, q = torch.tensor([[[1 / 2, 1 / 2]], [[1 / 4, 3 / 4]]]).log()
    yield "(1/2, 1/2) and (1/4, 3/4): log(4/3) / 2", f(q, p), "=", [math.log(4 / 3) / 2]
    sure = torch.tensor([[1000.0, 0.0]])
    yield "logits of 1000", f(-sure, sure), "=", [1000.0]
    p, q = teacher.softmax(dim=-1), student.softmax(dim=-1)
    pull = gradient(lambda z: f(z, teacher), student)
    yield "the gradient for the student's logits is q - p", pull, "=", q - p


def soft_loss(f):
    teacher, student = torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([[2.0, 2.0, 0.0]])
    for T, loss in ((1, 0.34932), (2, 0.47852), (4, 0.49585)):
        yield f"the logits of lesson 03 at T = {T}", f(student, teacher, T), "=", loss
    twice = [torch.cat([x, x]) for x in (student, teacher)]
    yield "a mean over tokens: the same one twice", f(*twice, 2), "=", f(student, teacher, 2)
    at_20, at_40 = (gradient(lambda z: f(z, teacher, T), student).norm() for T in (20, 40))
    yield "the gradient at T = 40 is as large as at T = 20", at_40 / at_20, ">=", 0.95
    yield "and no larger", at_40 / at_20, "<=", 1.05


kd_loss = soft_loss


def total_loss(f):
    student, teacher, targets = randn(6, 5), randn(6, 5, seed=1), torch.arange(6) % 5
    ce = F.cross_entropy(student, targets)
    yield "alpha = 1: the cross-entropy of the labels", f(student, teacher, targets, 1.0), "=", ce
    taught_itself = f(student, student, targets, 0.0)
    yield "alpha = 0 and a teacher that is the student: 0", taught_itself, "=", 0
    at_0, at_1, quarter = (f(student, teacher, targets, alpha) for alpha in (0.0, 1.0, 0.25))
    yield "alpha = 0.25 is a quarter of the way", quarter, "=", 0.75 * at_0 + 0.25 * at_1


def teacher_probs(f):
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Embedding(7, 16), nn.Dropout(0.5), nn.Linear(16, 7)).train()
    tokens = torch.arange(7)
    once = f(teacher, tokens)
    yield "each row is a distribution", once.sum(dim=-1), "=", torch.ones(7)
    yield "asked again, it says the same", f(teacher, tokens), "=", once
    yield "no gradient reaches the teacher", float(once.requires_grad), "=", 0


# ------------------------------------------------------------------------ 04 divergences


def jsd(f):
    log_p, log_q = log_probs(6, 11), log_probs(6, 11, seed=1)
    yield "equal distributions: 0 for each token", f(log_p, log_p), "=", torch.zeros(6)
    yield "symmetric", f(log_p, log_q), "=", f(log_q, log_p)
    p, q = torch.tensor([[0.50, 0.01, 0.49]]).log(), torch.tensor([[0.34, 0.33, 0.33]]).log()
    yield "the spread student of lesson 04, by hand", f(p, q), "=", [0.1108]
    sure = 50 * torch.eye(2)
    apart = sure.log_softmax(dim=-1), sure.flip(0).log_softmax(dim=-1)
    yield "sure of different tokens: log 2", f(*apart), "=", [math.log(2)] * 2
    sharp = [(10 * randn(50, 5, seed=seed)).log_softmax(dim=-1) for seed in (2, 3)]
    yield "never more than log 2", f(*sharp), "<=", math.log(2)


def reverse_kl(f):
    log_p = torch.tensor([[0.50, 0.01, 0.49]]).log()            # two modes
    spread, mode = torch.tensor([[[0.34, 0.33, 0.33]], [[0.98, 0.01, 0.01]]]).log()
    yield "equal distributions: 0", f(log_p, log_p), "=", [0.0]
    yield "lesson 04: a student that picks one mode, by hand", f(log_p, mode), "=", [0.6206]
    yield "one that covers both is worse", f(log_p, spread) - f(log_p, mode), ">=", 0.1


# ------------------------------------------------------------------------ 07 offline distillation


def top_k_buckets(f):
    by_hand = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    buckets = f(by_hand, torch.tensor([[0, 1]])).exp()
    yield "(0.5, 0.3, 0.1, 0.1) and its first two", buckets, "=", [[0.5, 0.3, 0.2]]
    log_p, log_q = log_probs(50, 9), log_probs(50, 9, seed=1)
    order = log_p.argsort(dim=-1, descending=True)

    def kl(log_p, log_q):
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)

    whole, last = kl(log_p, log_q), 0
    for k in (1, 4, 8):
        p, q = f(log_p, order[:, :k]), f(log_q, order[:, :k])
        yield f"k = {k}: the buckets sum to 1", q.exp().sum(dim=-1), "=", torch.ones(50)
        yield f"k = {k}: their KL is at most the whole one", kl(p, q), "<=", whole
        yield f"k = {k}: and no less than with fewer tokens", kl(p, q), ">=", last
        last = kl(p, q)
    yield "k = V - 1: it is the whole one", last, "=", whole
    sure = torch.tensor([[0.0, -25.0, -25.0]])
    tail = f(sure, torch.tensor([[0]]))[0, -1]
    yield "the logarithm of a tail of 2 e^-25", tail, "=", math.log(2) - 25


# ------------------------------------------------------------------------ 08 on-policy distillation


def rollout_mask(f):
    end = 2
    rows = {                            # length of the prompt, ids, which of them were sampled
        "an answer with its end of turn": (3, [1, 5, 6, 7, 8, 2, 2, 2], [0, 0, 0, 1, 1, 1, 0, 0]),
        "an end of turn within the prompt": (3, [1, 2, 6, 7, 8, 2, 2, 2], [0, 0, 0, 1, 1, 1, 0, 0]),
        "an answer cut at the limit": (4, [1, 5, 2, 6, 7, 8, 9, 9], [0, 0, 0, 0, 1, 1, 1, 1]),
        "an empty answer": (5, [1, 5, 6, 2, 6, 2, 2, 2], [0, 0, 0, 0, 0, 1, 0, 0]),
    }
    lengths, ids, wanted = map(torch.tensor, zip(*rows.values()))
    for row, mask, wanted in zip(rows, f(ids, lengths, end), wanted):
        yield row, mask, "=", wanted


# ------------------------------------------------------------------------ 18 draft models


def rejection(f):
    pairs = {"lesson 18": ([0.5, 0.3, 0.2], [0.1, 0.6, 0.3]),
             "a bad draft": ([0.01, 0.01, 0.98], [0.7, 0.2, 0.1]),
             "a token that is never drafted": ([0.2, 0.3, 0.5], [0.5, 0.5, 0.0])}
    for name, (p, q) in pairs.items():
        p, q = torch.tensor(p), torch.tensor(q)
        accept, rest = f(p, q)
        drafted = torch.where(q > 0, q * accept, 0)             # and accepted
        output = drafted + (1 - drafted.sum()) * rest
        yield f"{name}: accept is a probability", accept[q > 0], "<=", 1
        yield f"{name}: what is written has distribution p", output, "=", p
        yield f"{name}: no rule could accept more", drafted.sum(), "=", 1 - (p - q).abs().sum() / 2
    p = torch.tensor([0.5, 0.3, 0.2])
    yield "a draft model equal to the target is always accepted", f(p, p)[0], "=", torch.ones(3)


# ------------------------------------------------------------------------ 20 pruning


def attend(x, wq, wk, wv, wo, n_heads):  # (T, D) -> (T, D), causal
    q, k, v = (F.linear(x, w).view(len(x), n_heads, -1).transpose(0, 1) for w in (wq, wk, wv))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)                     # (H, T, K)
    return F.linear(y.transpose(0, 1).flatten(1), wo)


def remove_head(f):
    D, H, K = 6, 3, 2
    x = randn(5, D, seed=9)
    wq, wk, wv = (randn(H * K, D, seed=seed) for seed in range(3))
    wo = randn(D, H * K, seed=3)
    sizes = torch.tensor([weight.shape for weight in f(wq, wk, wv, wo, 0, H)])
    wanted = torch.tensor([[4, 6], [4, 6], [4, 6], [6, 4]])
    yield "from 6 x 6, two rows of wq, wk and wv and two columns of wo are gone", sizes, "=", wanted
    if not sizes.equal(wanted):
        return                                  # such matrices do not fit together
    for head in range(H):
        unread = wo.clone()
        unread[:, head * K:(head + 1) * K] = 0
        before = attend(x, wq, wk, wv, unread, H)
        after = attend(x, *f(wq, wk, wv, unread, head, H), H - 1)
        yield f"without head {head}, which nothing reads: the same output", after, "=", before
