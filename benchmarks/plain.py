"""
一步蒸馏的教科书写法：补齐成方阵，两个模型各算出全部 logits，再取该学的位置。
One step of distillation as tutorials write it: samples padded to a rectangle, all logits of both models, a loss.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T)      per token to be learned

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. It is right, it is short, and all of it is here.
The weights are those of model/transformer.py, which are read where they lie; benchmarks/step.py measures what the same
loss and gradients cost when what is not needed is not worked out:

    sample       [ how are you ? | fine . . . . . . . ]     . is padding. It is embedded, goes through all layers of both
                   not learned     learned                  models, and out into logits; then the loss leaves it out

No baseline is to be slower than people write it: attention is PyTorch's own, rotary embedding the complex product of
Llama's code, and the loss sees only the positions that it needs, though the logits of all are there.

Alphabet: B samples · L positions, padding included · S of them to be learned · D dim · H query heads · G key/value heads
          K head_dim · V vocab
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

LEARNING_RATE, LONGEST_GRADIENT = 5e-6, 1.0


# ------------------------------------------------------------------------------------------------------------- batches


class Padded(NamedTuple):
    tokens: torch.Tensor        # (B, L) ids the models read
    targets: torch.Tensor       # (B, L) the id that comes next
    mask: torch.Tensor          # (B, L), whether it is to be learned


def pad(samples, limit: int | None, device) -> Padded:
    """Samples (ids, is_target), (n + 1,) arrays each, as rows of one length: that of the limit, or of the longest sample.

    Zeros are put behind a sample. As no token looks ahead, none of the sample's own ever sees them.
    """
    L = limit or max(len(ids) for ids, _ in samples) - 1
    ids = torch.zeros(len(samples), L + 1, dtype=torch.long)
    is_target = torch.zeros(len(samples), L + 1, dtype=torch.bool)
    for row, (its_ids, its_targets) in enumerate(samples):
        ids[row, :len(its_ids)] = torch.from_numpy(its_ids)
        is_target[row, :len(its_ids)] = torch.from_numpy(its_targets)
    ids, is_target = ids.to(device), is_target.to(device)
    return Padded(ids[:, :-1], ids[:, 1:], is_target[:, 1:])


# ----------------------------------------------------------------------------------------------------------- the model


def logits_of(model, tokens):  # (B, L) -> (B, L, V)
    """The decoder, dense: RMSNorm, RoPE, grouped-query attention, SwiGLU, at every position of every row."""
    config = model.config
    assert not config.use_moe and config.architecture == "llama" and not config.rope_scaling, (
        f"{config}: the plain form knows a dense Llama without stretched RoPE, and nothing else")
    rotation = turns(tokens.shape[1], config, tokens.device)
    x = model.tok_embeddings(tokens)                                            # (B, L, D)
    for layer in model.layers:
        x = x + attention(layer.attention, rms_norm(x, layer.attention_norm), rotation)
        x = x + swiglu(layer.ffn, rms_norm(x, layer.ffn_norm))
    return model.output(rms_norm(x, model.norm))                                # (B, L, V)


def rms_norm(x, norm):  # (..., D) -> (..., D)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight


def turns(L, config, device):  # -> (L, 1, K/2) complex, of length 1
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    angle = torch.outer(torch.arange(L, device=device), frequency)
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)


def rotate(x, rotation):  # (B, L, H, K), (L, 1, K/2) -> (B, L, H, K)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def attention(part, x, rotation):  # (B, L, D) -> (B, L, D)
    B, L, _ = x.shape
    q, k, v = (linear(x).view(B, L, -1, part.K) for linear in (part.wq, part.wk, part.wv))      # H or G heads
    q, k = rotate(part.q_norm(q), rotation), rotate(part.k_norm(k), rotation)
    k, v = (each.repeat_interleave(part.H // part.G, dim=2) for each in (k, v))                 # G -> H
    # softmax(q k^T / sqrt(K)) v, a token's scores for what comes later being -inf: (B, H, L, L) of them.
    mixed = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v)), is_causal=True)
    return part.wo(mixed.transpose(1, 2).flatten(2))


def swiglu(part, x):  # (B, L, D) -> (B, L, D)
    return part.w2(F.silu(part.w1(x)) * part.w3(x))


# ------------------------------------------------------------------------------------------------------------ the step


def distillation_loss(student, teacher, batch: Padded, alpha: float, temperature: float):  # -> ()
    """Nats per token to be learned."""
    with torch.no_grad():
        teacher_logits = logits_of(teacher, batch.tokens)                       # (B, L, V)
    student_logits = logits_of(student, batch.tokens)                           # (B, L, V)

    teacher_logits, student_logits = teacher_logits[batch.mask], student_logits[batch.mask]     # (S, V)
    ce = F.cross_entropy(student_logits, batch.targets[batch.mask])
    kl = F.kl_div(F.log_softmax(student_logits / temperature, dim=-1),
                  F.softmax(teacher_logits / temperature, dim=-1), reduction="batchmean")
    return alpha * ce + (1 - alpha) * temperature ** 2 * kl


def make_optimizer(student):
    return torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)


def update(student, optimizer):
    """With the gradients that loss.backward() has left."""
    torch.nn.utils.clip_grad_norm_(student.parameters(), LONGEST_GRADIENT)
    optimizer.step()
    optimizer.zero_grad()
