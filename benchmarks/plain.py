"""
教科书写法：补齐成方阵，两个模型各算出全部 logits，再取要学的位置；生成时缓存逐个词元增长。
Distillation and generation as tutorials write them: padded samples, all logits of both models, a
loss; a cache that grows with each token.

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T), per target

Hinton, Vinyals & Dean 2015, https://arxiv.org/abs/1503.02531, Sec. 2. Correct, short, and complete.
It uses the weights of model/transformer.py. Attention is PyTorch's own, rotary embedding as in
Llama's code.

B samples · L positions, padding included · S of them targets · D dim · H query heads
G key/value heads · K head_dim · V vocab
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Padded(NamedTuple):
    tokens: torch.Tensor        # (B, L) ids that the models read
    targets: torch.Tensor       # (B, L) the next id
    mask: torch.Tensor          # (B, L) whether it is a target


def pad(samples, limit: int | None, device) -> Padded:
    """Samples (ids, is_target), arrays of (n + 1,), as rows as long as the limit, or as the longest
    sample. Zeros follow a sample; attention is causal, so its own tokens never see them."""
    L = limit or max(len(ids) for ids, _ in samples) - 1
    ids = torch.zeros(len(samples), L + 1, dtype=torch.long)
    is_target = torch.zeros(len(samples), L + 1, dtype=torch.bool)
    for row, (its_ids, its_targets) in enumerate(samples):
        ids[row, :len(its_ids)] = torch.from_numpy(its_ids)
        is_target[row, :len(its_ids)] = torch.from_numpy(its_targets)
    ids, is_target = ids.to(device), is_target.to(device)
    return Padded(ids[:, :-1], ids[:, 1:], is_target[:, 1:])


def states_of(model, tokens, cache: dict | None = None):  # (B, L) -> (B, L, D)
    """A dense decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, at every position of every
    row. cache: {layer: (k, v), each (B, G, positions read before, K)}, which grows by torch.cat, so
    that each new token copies it."""
    config = model.config
    assert not config.use_moe and config.architecture == "llama" and not config.rope_scaling, (
        f"{config}: the plain form is a dense Llama without scaled RoPE")
    before = next(iter(cache.values()))[0].shape[2] if cache else 0
    positions = torch.arange(before, before + tokens.shape[1], device=tokens.device)
    rotation = rotations(positions, config)
    x = model.tok_embeddings(tokens)                                            # (B, L, D)
    for layer in model.layers:
        x = x + attention(layer.attention, rms_norm(x, layer.attention_norm), rotation, cache)
        x = x + swiglu(layer.ffn, rms_norm(x, layer.ffn_norm))
    return rms_norm(x, model.norm)


def rms_norm(x, norm):  # (..., D) -> (..., D)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps) * norm.weight


def rotations(positions, config):  # (L,) -> (L, 1, K/2) complex, of length 1
    steps = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angle = torch.outer(positions, config.rope_theta ** -steps)
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)


def rotate(x, rotation):  # (B, L, H, K), (L, 1, K/2) -> (B, L, H, K)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)


def attention(part, x, rotation, cache):  # (B, L, D) -> (B, L, D)
    q, k, v = (linear(x).unflatten(-1, (-1, part.K)) for linear in (part.wq, part.wk, part.wv))
    q, k = rotate(part.q_norm(q), rotation), rotate(part.k_norm(k), rotation)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))                      # (B, H or G, L, K)
    is_new = bool(cache) and part in cache          # a single token, which sees all before it
    if is_new:
        k, v = (torch.cat(pair, dim=2) for pair in zip(cache[part], (k, v)))
    if cache is not None:
        cache[part] = k, v
    # softmax(q k^T / sqrt(K)) v, with scores of -inf for later tokens: (B, H, L, L) of them.
    k, v = (each.repeat_interleave(part.H // part.G, dim=1) for each in (k, v))             # G -> H
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not is_new)
    return part.wo(mixed.transpose(1, 2).flatten(2))


def swiglu(part, x):  # (B, L, D) -> (B, L, D)
    return part.w2(F.silu(part.w1(x)) * part.w3(x))


def distillation_loss(student, teacher, batch: Padded, alpha: float, temperature: float):  # -> ()
    """Nats per target."""
    with torch.no_grad():
        teacher_logits = teacher.output(states_of(teacher, batch.tokens))       # (B, L, V)
    student_logits = student.output(states_of(student, batch.tokens))           # (B, L, V)

    teacher_logits, student_logits = teacher_logits[batch.mask], student_logits[batch.mask] # (S, V)
    ce = F.cross_entropy(student_logits, batch.targets[batch.mask])
    kl = F.kl_div(F.log_softmax(student_logits / temperature, dim=-1),
                  F.softmax(teacher_logits / temperature, dim=-1), reduction="batchmean")
    return alpha * ce + (1 - alpha) * temperature ** 2 * kl


@torch.no_grad()
def generate(model, prompts, sizes, rows: int) -> list[list[int]]:
    """Greedy answers of these sizes to prompts of one length: one batch of `rows` after another,
    each until its longest answer is complete; surplus tokens are dropped."""
    answers = []
    for start in range(0, len(prompts), rows):
        newest = torch.tensor(prompts[start:start + rows], device=model.norm.weight.device)
        wanted, cache, written = sizes[start:start + rows], {}, []
        for _ in range(max(wanted)):
            states = states_of(model, newest, cache)[:, -1]                     # (B, D)
            newest = model.output(states).argmax(dim=-1, keepdim=True)          # (B, 1)
            written.append(newest)
        answers += [row[:size] for row, size in zip(torch.cat(written, dim=1).tolist(), wanted)]
    return answers
