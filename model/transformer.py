"""
手写的解码器：RMSNorm、RoPE、分组查询注意力、SwiGLU，可选混合专家。
The decoder, by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU, and a mixture of experts if asked.

A batch is one flat stream of real tokens: samples lie one behind the other, N tokens in all, and no padding exists.
Everything but attention works on one token at a time and never sees where a sample ends; attention is cut at the ends.

    tokens   [ a b c | d e f | g h i j ]        lengths [3, 3, 4]        attention: two samples of 3 at once, one of 4

Alphabet:  N tokens of the stream · S positions asked for · B samples (rows) · T tokens of a sample · D dim
           H query heads · G key/value heads · K head_dim · F hidden_dim · V vocab · E experts · A active experts
"""

from copy import copy
from functools import partial
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.config import LMConfig
from model.moe import FeedForward, MoEFeedForward


class Output(NamedTuple):
    logits: torch.Tensor | None         # (S, V), if asked for
    final: torch.Tensor                 # (S, D), the final hidden states: logits = final @ output.weight.T
    balance_loss: torch.Tensor          # (), of the experts, summed over samples and averaged over layers; else 0
    hidden: list[torch.Tensor]          # n_layers x (S, D), after each layer, if asked for
    qkv: tuple[torch.Tensor, ...]       # (N, H * K), (N, G * K) x 2 of the last layer, before RoPE


class KVCache:
    """Room for the keys and values of `capacity` tokens per row, taken once; `lengths` says how many are filled."""

    def __init__(self, config: LMConfig, rows: int, capacity: int, device, dtype=torch.float32):
        self.kv = torch.zeros(config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim,
                              device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def write(self, layer, k, v, rows, positions):  # (N, G, K), (N, G, K), (N,), (N,)
        self.kv[layer][:, rows, :, positions] = torch.stack([k, v], dim=1).to(self.kv.dtype)    # (N, 2, G, K)

    def rows(self, first: int, last: int) -> "KVCache":
        """A view of these rows."""
        part = copy(self)
        part.kv, part.lengths = self.kv[:, :, first:last], self.lengths[first:last]
        return part

    def drop(self, row: int, n: int):
        """Empty one of the first n rows, and put the last of them in its place."""
        self.kv[:, :, row] = self.kv[:, :, n - 1]
        self.lengths[row] = self.lengths[n - 1]
        self.lengths[n - 1] = 0

    def read(self, layer, longest: int):  # -> (B, G, longest, K) twice
        return self.kv[layer][:, :, :, :longest].unbind()


class Stream(NamedTuple):
    """What the layers must know of the flat stream: where its samples end, and how each position is turned."""

    spans: list[tuple[int, int]]        # (how many neighbours, their common length)
    sample: torch.Tensor                # (N,), the number of the sample each token belongs to
    positions: torch.Tensor             # (N,), place within the sample
    rotation: torch.Tensor | None       # (N, 1, K/2) complex; None: positions are learned (GPT-2)
    cache: KVCache | None
    past: int                           # longest row in the cache when this pass began; 0 is a fresh start
    longest: int                        # tokens of the longest sample, those in the cache among them
    seen: torch.Tensor | None           # (B, 1, 1, past + 1), which of them is there for each row; None: all
    borders: torch.Tensor               # (B + 1,) int32, where samples begin and end: [0, 3, 6, 10]


def rotate(x, rotation):  # (N, H, K), (N, 1, K/2) complex -> (N, H, K)
    """RoPE: neighbours (x0, x1) as a complex number, turned by position * frequency.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, Sec. 3.4.2. Hugging Face pairs x0 with x_{K/2} instead:
    the same up to a reordering of the rows of wq and wk.
    """
    if rotation is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def scale_frequencies(frequency, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    """Llama 3.1's RoPE for texts longer than it was first trained on: (K/2,) -> (K/2,) frequencies, in radians a token.

    A pair that turns often within the original length tells neighbours apart and stays; one that hardly turns tells
    how far away a token is, and is slowed down by the factor; in between it goes in a straight line.
    Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, Sec. 3.4.2, and the code published with it.
    """
    turns = original_max_position_embeddings * frequency / (2 * torch.pi)
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


def has_varlen(device, dtype, head_dim: int) -> bool:
    """Whether varlen_attn takes these: FlashAttention 2 (Dao 2023, https://arxiv.org/abs/2307.08691), from NVIDIA's Ampere on."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
            and torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0))


def without_waiting(numbers: list[int], device, dtype) -> torch.Tensor:
    """On a GPU. From pinned memory it fetches them itself, while Python goes on and gives it more to do."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Attention(nn.Module):
    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        D, H, G, K = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.H, self.G, self.K, self.layer = H, G, K, layer
        self.wq = nn.Linear(D, H * K, bias=config.attention_bias)
        self.wk = nn.Linear(D, G * K, bias=config.attention_bias)
        self.wv = nn.Linear(D, G * K, bias=config.attention_bias)
        self.wo = nn.Linear(H * K, D, bias=False)
        self.q_norm = nn.RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout

    def forward(self, x, stream: Stream, at=None):  # (N, D) -> (N, D), or (S, D) at the positions `at`; and q, k, v
        N = x.shape[0]
        qkv = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (each.view(N, -1, self.K) for each in qkv)                # (N, H, K), (N, G, K) x 2
        q = rotate(self.q_norm(q), stream.rotation)
        k = rotate(self.k_norm(k), stream.rotation)
        if stream.cache is not None:
            stream.cache.write(self.layer, k, v, stream.sample, stream.positions)
        mixed = self.with_the_past(q, stream) if stream.past else self.within_samples(q, k, v, stream)
        mixed = mixed.flatten(1)                                            # (N, H * K)
        return self.wo(mixed if at is None else mixed[at]), qkv

    def within_samples(self, q, k, v, stream: Stream):  # (N, H, K), (N, G, K), (N, G, K) -> (N, H, K)
        """Causal attention. No token sees another sample: a kernel that is told their borders takes all of them in one call,
        or else neighbours of one length share one."""
        dropout = self.dropout if self.training else 0.0
        if has_varlen(v.device, v.dtype, self.K) and not dropout:
            from torch.nn.attention.varlen import varlen_attn       # two seconds, which only a GPU's run need wait

            return varlen_attn(q.to(v.dtype), k.to(v.dtype), v, stream.borders, stream.borders, stream.longest, stream.longest,
                               window_size=(-1, 0), enable_gqa=True)        # a window of all before, and nothing ahead
        sizes = [n * T for n, T in stream.spans]
        mixed = []
        for (n, T), *qkv in zip(stream.spans, q.split(sizes), k.split(sizes), v.split(sizes)):
            q, k, v = (part.view(n, T, -1, self.K).transpose(1, 2) for part in qkv)     # (n, H or G, T, K)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, dropout_p=dropout)
            mixed.append(y.transpose(1, 2).reshape(n * T, self.H, self.K))
        return torch.cat(mixed)

    def with_the_past(self, q, stream: Stream):  # (B, H, K) -> (B, H, K), one new token a row
        """Heads that share keys and values stand in for the tokens of a sample: these are read once for all of them."""
        k, v = stream.cache.read(self.layer, stream.past + 1)
        q = q.unflatten(1, (self.G, -1))                                                # (B, G, H/G, K)
        return F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=stream.seen).flatten(1, 2)


class Block(nn.Module):
    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoEFeedForward(config) if config.use_moe else FeedForward(config.dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, stream: Stream, at=None):  # (N, D) -> (N, D), or (S, D) at `at`; the balance; q, k, v
        mixed, qkv = self.attention(self.attention_norm(x), stream, at)
        sample = stream.sample
        if at is not None:
            x, sample = x[at], sample[at]
        x = x + self.dropout(mixed)
        if isinstance(self.ffn, MoEFeedForward):
            y, balance = self.ffn(self.ffn_norm(x), sample, len(stream.borders) - 1)
        else:
            y, balance = self.ffn(self.ffn_norm(x)), 0.0
        return x + self.dropout(y), balance, qkv


class Transformer(nn.Module):
    """The language model of every lesson. Llama, SmolLM2, Qwen2.5, Qwen3 and MiniMind are this one with other numbers.

        logits = model(tokens, lengths).logits          # (N, V): what follows each token
        logits = model(tokens, lengths, at=at).logits   # (S, V): only where asked, so that no head runs for nothing
        states = model(tokens, lengths, at=at, with_logits=False).final     # (S, D): for a loss that runs the head
    """

    block = Block
    adapted = None          # what is told of its adapters, if it has any (interop/checkpoint.py, adapt)
    grad_checkpoint = False     # in training, keep each layer's inputs alone; the rest is worked out again for the gradient.
                                # Chen et al. 2016, https://arxiv.org/abs/1604.06174

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(self.block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

        self.init_weights()
        self.tie_weights()

    def tie_weights(self):
        if self.config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def init_weights(self):
        """GPT-2's: normal(0, 0.02), and what writes into the residual stream less, by 1 / sqrt(2 n_layers)."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() > 1:                          # the norms stay at one
                into_residual = name.endswith(("wo.weight", "w2.weight", "w2"))
                nn.init.normal_(weight, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02)

    def forward(self, tokens, lengths: list[int], at=None, cache: KVCache | None = None,
                return_hidden: bool = False, with_logits: bool = True) -> Output:
        """
        tokens   (N,) ids, samples one behind the other
        lengths  tokens of each sample, summing to N; neighbours of one length share an attention call, so sort them
        at       (S,) positions of the stream whose logits are wanted, in increasing order; None: all
        with_logits  False: the head does not run; a loss in chunks (distill/fused.py) runs it itself
        cache    empty: it is filled with these prompts. Filled: `tokens` holds one new token for each of its rows
        """
        stream = self.lay_out(tokens, lengths, cache)
        x = self.dropout(self.embed(tokens, stream))                        # (N, D)
        balance, hidden = 0.0, []
        # Compiled layers (model/compile.py) are for whole samples. _call_impl is a call of a module, hooks and all, as it is
        # without them.
        run = Block.__call__ if cache is None else Block._call_impl
        if self.grad_checkpoint and self.training:
            run = partial(checkpoint, use_reentrant=False)
        for layer in self.layers:
            # Past the last attention a position speaks for itself alone: the others are dropped there.
            is_last = layer is self.layers[-1]
            x, layer_balance, qkv = run(layer, x, stream, at if is_last else None)
            balance = balance + layer_balance / len(self.layers)
            if return_hidden:
                hidden.append(x if is_last or at is None else x[at])
        if cache is not None:
            cache.lengths += without_waiting(lengths, tokens.device, torch.long)
        final = self.norm(x)
        return Output(self.output(final) if with_logits else None, final, x.new_zeros(()) + balance, hidden, qkv)

    def embed(self, tokens, stream: Stream):  # (N,) -> (N, D)
        return self.tok_embeddings(tokens)

    def lay_out(self, tokens, lengths: list[int], cache: KVCache | None) -> Stream:
        device = tokens.device
        filled = [0] if cache is None else cache.lengths.tolist()
        past, seen = max(filled), None
        longest = past + max(lengths)
        assert longest <= self.config.max_seq_len, (
            f"a sample of {longest} tokens is longer than max_seq_len={self.config.max_seq_len}; "
            "cut it, or train with a larger --max_seq_len")
        spans = [(len(list(group)), T) for T, group in groupby(lengths)]
        if past:
            assert max(lengths) == 1, "a filled cache takes one token a row"
            sample, positions = torch.arange(len(lengths), device=device), cache.lengths
            if min(filled) < past:
                seen = (torch.arange(past + 1, device=device) <= positions[:, None])[:, None, None]
        else:
            sample = torch.arange(len(lengths), device=device).repeat_interleave(
                without_waiting(lengths, device, torch.long), output_size=tokens.shape[0])
            positions = torch.cat([torch.arange(T, device=device).repeat(n) for n, T in spans])
        borders = without_waiting([0, *accumulate(lengths)], device, torch.int32)
        return Stream(spans, sample, positions, self.rotation(positions), cache, past, longest, seen, borders)

    def rotation(self, positions):  # (N,) -> (N, 1, K/2) complex
        """The turn of each pair at each position. Worked out anew for each pass: as a buffer it would follow
        .to(bfloat16), which cannot tell 200 from 201."""
        config, device = self.config, positions.device
        frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)   # (K/2,)
        if config.rope_scaling:
            frequency = scale_frequencies(frequency, **config.rope_scaling)
        angle = torch.outer(positions, frequency)                                               # (N, K/2)
        return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)

    def context_length(self, max_seq_len: int | None) -> int:
        """max_seq_len, or the model's own; raises ValueError for one beyond it."""
        limit = self.config.max_seq_len
        if max_seq_len and max_seq_len > limit:
            raise ValueError(f"--max_seq_len {max_seq_len} exceeds the model's context length of {limit}")
        return max_seq_len or limit

    def shard_units(self) -> list[nn.Module]:
        """What ZeRO gathers at once: the attention and the FFN of each layer."""
        return [part for layer in self.layers for part in (layer.attention, layer.ffn)]

    @property
    def head(self):  # -> (V, D)
        """The matrix that turns final hidden states into logits, for losses that run it themselves."""
        return self.output.dequantised() if self.config.quantization else self.output.weight

    def n_parameters(self) -> int:
        """A matrix that is tied to another counts once; of quantised weights two may lie in a byte, and scales are none."""
        return sum(weight.numel() * (2 if weight.dtype == torch.uint8 else 1)
                   for name, weight in self.named_parameters() if not name.endswith((".scale", ".low")))
