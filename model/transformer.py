"""
手写的解码器：RMSNorm、RoPE、分组查询注意力、SwiGLU，可选混合专家。
A decoder by hand: RMSNorm, RoPE, grouped-query attention, SwiGLU, optionally a mixture of experts.

A batch is packed: samples of different lengths are concatenated to N tokens, without padding. All
layers but attention work on each token by itself. Attention keeps the samples apart.

Shapes:  N tokens of the batch · S selected positions · B samples · T tokens of a sample · D dim
         H query heads · G key/value heads · K head_dim · F hidden_dim · V vocab_size
         R rotary_dim, the components of a head that RoPE rotates · E experts · A active experts
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
    logits: torch.Tensor | None         # (S, n_tokens), or None with with_logits=False
    final: torch.Tensor                 # (S, D), hidden states: logits = final @ output.weight.T
    balance_loss: torch.Tensor          # (), of experts: sum over samples, mean over layers; or 0
    hidden: list[torch.Tensor]          # n_layers x (S, D), after each layer, with return_hidden
    qkv: tuple[torch.Tensor, ...]       # (N, H * K), (N, G * K) x 2, of the last layer, before RoPE


class KVCache:
    """The keys and values of up to `capacity` tokens per row; `lengths` counts the filled ones.
    Also what all steps of decoding share, as a step of a small model is mostly small operations."""

    def __init__(self, config: LMConfig, rows: int, capacity: int, device, dtype=torch.float32):
        shape = config.n_layers, 2, rows, config.n_kv_heads, capacity, config.head_dim  # 2: k and v
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.numbers = torch.arange(max(rows, capacity) + 1, device=device)         # 0, 1, 2, ...
        self.rotation = rope_rotation(config, self.numbers)

    def rows(self, first: int, last: int) -> "KVCache":
        """A view of these rows."""
        view = copy(self)
        view.kv, view.lengths = self.kv[:, :, first:last], self.lengths[first:last]
        return view

    def drop(self, row: int, n: int):
        """Replace one of the first n rows by the last of them, which becomes empty."""
        self.kv[:, :, row] = self.kv[:, :, n - 1]
        self.lengths[row] = self.lengths[n - 1]
        self.lengths[n - 1] = 0


class Layout(NamedTuple):
    """Where the samples of a packed batch lie. Computed once per forward pass, for all layers."""

    groups: list[tuple[int, int]]       # (number of consecutive samples, their common length)
    sample: torch.Tensor                # (N,), index of each token's sample
    positions: torch.Tensor             # (N,), position of each token in its sample
    offsets: torch.Tensor               # (B + 1,) int32, where samples begin and end: [0, 3, 6, 10]
    max_length: int                     # tokens of the longest sample, cached ones included
    rotation: torch.Tensor | None       # (N, 1, K/2) complex, for RoPE; None: learned positions
    cache: KVCache | None
    n_cached: int                       # tokens in the longest row of the cache before this pass
    mask: torch.Tensor | None           # (B, 1, R, max_length), positions of the cache that each of
                                        # the R = 1 or T H/G queries of a key/value head sees


# -- RoPE ------------------------------------------------------------------------------------------

def rotate(x, rotation):  # (N, H, K), (N, 1, K/2) complex -> (N, H, K)
    """RoPE: each pair (x0, x1) is a complex number, rotated by the angle position * frequency.
    Su et al. 2021, https://arxiv.org/abs/2104.09864, Sec. 3.4.2. Hugging Face pairs x0 with
    x_{K/2}: the same, up to the order of the rows of wq and wk."""
    if rotation is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)


def rope_rotation(config: LMConfig, positions):  # (N,) -> (N, 1, K/2) complex, None for GPT-2
    """The rotation of each pair at each position, in fp32; no buffer, which would follow
    .to(bfloat16), in which positions 300 and 301 are equal."""
    if config.architecture == "gpt2":
        return None                     # learned positions (model/gpt2.py)
    R, device = config.rotary_dim, positions.device
    frequency = config.rope_theta ** -(torch.arange(0, R, 2, device=device) / R)        # (R/2,)
    if config.rope_scaling:
        frequency = scale_frequencies(frequency, **config.rope_scaling)
    frequency = F.pad(frequency, (0, (config.head_dim - R) // 2))       # (K/2,), 0: not rotated
    angle = torch.outer(positions, frequency)                                       # (N, K/2)
    return torch.polar(torch.ones_like(angle), angle).unsqueeze(1)


def scale_frequencies(frequency, factor, original_max_position_embeddings=0, low_freq_factor=None,
                      high_freq_factor=None, beta_slow=None, beta_fast=None):
    # (R/2,) -> (R/2,), radians per token
    """RoPE for longer contexts: pairs that make many turns within the original one stay, those that
    make few are slowed down by `factor`, in between interpolated. Few and many are

        low_ and high_freq_factor, interpolated over the turns: Llama 3.1, Grattafiori et al. 2024,
            https://arxiv.org/abs/2407.21783, Sec. 3.4.2, and its published code
        beta_slow and beta_fast, over the number of the pair: YaRN, Peng et al. 2023,
            https://arxiv.org/abs/2309.00071, Sec. 3.2; its temperature is in the weights
        not given: all pairs are slowed down (linear scaling, or position interpolation), Chen et
            al. 2023, https://arxiv.org/abs/2306.15595
    """
    kept = torch.zeros_like(frequency)
    turns = original_max_position_embeddings * frequency / (2 * torch.pi)
    if high_freq_factor:
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    elif beta_fast:
        step = (turns[0] / turns[1]).log()          # the same from each pair to the next
        first = ((turns[0] / beta_fast).log() / step).floor().clamp(min=0)
        last = ((turns[0] / beta_slow).log() / step).ceil().clamp(max=2 * len(turns) - 1)
        pair = torch.arange(len(turns), device=turns.device)
        kept = 1 - (pair - first) / (last - first).clamp(min=0.001)
    kept = kept.clamp(0, 1)
    return frequency * (kept + (1 - kept) / factor)


# -- attention -------------------------------------------------------------------------------------

def has_varlen(device, dtype, head_dim: int) -> bool:
    """Whether varlen_attn supports these. It is FlashAttention 2, from NVIDIA's Ampere on:
    Dao 2023, https://arxiv.org/abs/2307.08691."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and head_dim % 8 == 0 and head_dim <= 256
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(device) >= (8, 0))


class Attention(nn.Module):
    """Grouped-query attention: H query heads share G key/value heads, H / G each.
    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245"""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        D, H, G, K = config.dim, config.n_heads, config.n_kv_heads, config.head_dim
        self.H, self.G, self.K, self.layer = H, G, K, layer
        self.has_rope = layer not in config.nope_layers
        self.wq = nn.Linear(D, H * K, bias=config.attention_bias)
        self.wk = nn.Linear(D, G * K, bias=config.attention_bias)
        self.wv = nn.Linear(D, G * K, bias=config.attention_bias)
        self.wo = nn.Linear(H * K, D, bias=False)
        self.q_norm = nn.RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(K, config.norm_eps) if config.qk_norm else nn.Identity()
        self.dropout = config.dropout

    def forward(self, x, layout: Layout, at=None):  # (N, D) -> (N, D), or (S, D) at `at`; q, k, v
        N = x.shape[0]
        qkv = self.wq(x), self.wk(x), self.wv(x)
        q, k, v = (each.view(N, -1, self.K) for each in qkv)            # (N, H, K), (N, G, K) x 2
        rotation = layout.rotation if self.has_rope else None
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if layout.cache is not None:
            kv = layout.cache.kv[self.layer]                                # (2, B, G, capacity, K)
            kv[:, layout.sample, :, layout.positions] = torch.stack([k, v], dim=1).to(kv.dtype)
        if layout.n_cached:
            y = self.attend_to_cache(q, layout)
        else:
            y = self.attend_within_samples(q, k, v, layout)
        y = y.flatten(1)                                                    # (N, H * K)
        return self.wo(y if at is None else y[at]), qkv

    def attend_within_samples(self, q, k, v, layout: Layout):
        # (N, H, K), (N, G, K), (N, G, K) -> (N, H, K)
        """Causal attention within each sample. On a GPU one kernel call handles all samples;
        elsewhere consecutive samples of the same length share a call."""
        dropout = self.dropout if self.training else 0.0
        if has_varlen(v.device, v.dtype, self.K) and not dropout:
            from torch.nn.attention.varlen import varlen_attn       # takes two seconds

            ends, longest = layout.offsets, layout.max_length
            return varlen_attn(q.to(v.dtype), k.to(v.dtype), v, ends, ends, longest, longest,
                               window_size=(-1, 0), enable_gqa=True)        # all before, none after
        sizes = [n * T for n, T in layout.groups]
        ys = []
        for (n, T), *qkv in zip(layout.groups, q.split(sizes), k.split(sizes), v.split(sizes)):
            q, k, v = (each.view(n, T, -1, self.K).transpose(1, 2) for each in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True,
                                               dropout_p=dropout)           # (n, H, T, K)
            ys.append(y.transpose(1, 2).reshape(n * T, self.H, self.K))
        return torch.cat(ys)

    def attend_to_cache(self, q, layout: Layout):  # (N, H, K) -> (N, H, K), T new tokens per row
        """The H / G query heads that share a key/value head follow each other in the place of T, so
        that its keys and values are read once for all of them."""
        k, v = layout.cache.kv[self.layer, :, :, :, :layout.max_length]     # (B, G, max_length, K)
        (B, T), = layout.groups
        q = q.view(B, T, self.G, -1, self.K).transpose(1, 2).flatten(2, 3)  # (B, G, T H/G, K)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=layout.mask)
        return y.view(B, self.G, T, -1, self.K).transpose(1, 2).reshape(B * T, self.H, self.K)


# -- the model -------------------------------------------------------------------------------------

class Block(nn.Module):
    """A pre-norm layer: attention, then the FFN, each added to the residual stream x."""

    def __init__(self, config: LMConfig, layer: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        if config.use_moe:
            self.ffn = MoEFeedForward(config)
        else:
            self.ffn = FeedForward(config.dim, config.hidden_dim, config.activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, layout: Layout, at=None):
        # (N, D) -> (N, D), or (S, D) at `at`; balance loss; q, k, v
        y, qkv = self.attention(self.attention_norm(x), layout, at)
        sample, balance = layout.sample, 0.0
        if at is not None:
            x, sample = x[at], sample[at]
        x = x + self.dropout(y)
        y = self.ffn_norm(x)
        if isinstance(self.ffn, MoEFeedForward):
            y, balance = self.ffn(y, sample, n_samples=len(layout.offsets) - 1)
        else:
            y = self.ffn(y)
        return x + self.dropout(y), balance, qkv


class Transformer(nn.Module):
    """The language model of every lesson. Llama, SmolLM, Qwen2.5, Qwen3, Mistral, Phi, Granite and
    MiniMind are this network with other sizes.

        logits = model(tokens, lengths).logits          # (N, V): scores of each next token
        logits = model(tokens, lengths, at=at).logits   # (S, V): at selected positions only
        final = model(tokens, lengths, at=at, with_logits=False).final      # (S, D)
    """

    block = Block
    adapted = None          # description of its adapters, if it has any (interop/checkpoint.py)
    qat = None              # the grid to which training rounds its weights (model/qat.py)
    # Activation checkpointing: in training keep only each layer's input and recompute the rest in
    # the backward pass. Chen et al. 2016, https://arxiv.org/abs/1604.06174
    grad_checkpoint = False

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        # Rows with a token. Those after them are padding, with which a model family rounds its
        # vocabulary up: they get no logits.
        self.n_tokens = config.vocab_size
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
        """GPT-2's: normal(0, 0.02). Matrices that write into the residual stream are scaled by
        1 / sqrt(2 n_layers), so that its variance does not grow with depth. Norms start at one."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() > 1:
                is_residual = name.endswith(("wo.weight", "w2.weight", "w2"))
                scale = (2 * self.config.n_layers) ** -0.5 if is_residual else 1.0
                nn.init.normal_(weight, std=0.02 * scale)

    def forward(self, tokens, lengths: list[int], at=None, cache: KVCache | None = None,
                return_hidden: bool = False, with_logits: bool = True) -> Output:
        """
        tokens          (N,) token ids of all samples, concatenated
        lengths         tokens of each sample, N in total. Sort them: consecutive samples of the
                        same length share an attention call
        at              (S,) increasing positions, from 0 to N - 1, that need logits; None: all
        cache           empty: it is filled with these prompts. Filled: `tokens` has T new tokens
                        for each of its rows. To forget the last ones, lower its `lengths`
        return_hidden   also return the hidden states after each layer
        with_logits     False skips the head, for a loss that runs it in chunks (distill/fused.py)
        """
        layout = self.make_layout(tokens, lengths, cache)
        x = self.dropout(self.embed(tokens, layout))                        # (N, D)
        balance, hidden = 0.0, []
        # Compiled layers (model/compile.py) are for whole samples. _call_impl bypasses the compiled
        # version and is otherwise the same call, hooks included.
        run = Block.__call__ if cache is None else Block._call_impl
        if self.grad_checkpoint and self.training:
            run = partial(checkpoint, use_reentrant=False)
        for layer in self.layers:
            # After the last attention, positions no longer interact: only the selected ones remain.
            is_last = layer is self.layers[-1]
            x, layer_balance, qkv = run(layer, x, layout, at if is_last else None)
            balance = balance + layer_balance / len(self.layers)
            if return_hidden:
                hidden.append(x if is_last or at is None else x[at])
        if cache is not None:
            cache.lengths += to_device(lengths, tokens.device, torch.long)
        final = self.norm(x)
        logits = self.logits(final) if with_logits else None
        return Output(logits, final, x.new_zeros(()) + balance, hidden, qkv)

    def embed(self, tokens, layout: Layout):  # (N,) -> (N, D)
        return self.tok_embeddings(tokens)

    def make_layout(self, tokens, lengths: list[int], cache: KVCache | None) -> Layout:
        device = tokens.device
        filled = [0] if cache is None else cache.lengths.tolist()
        n_cached, mask = max(filled), None
        max_length = n_cached + max(lengths)
        assert max_length <= self.config.max_seq_len, (
            f"a sample of {max_length} tokens is longer than max_seq_len={self.config.max_seq_len};"
            " cut it, or train with a larger --max_seq_len")
        if n_cached:
            B, T, positions, numbers = len(lengths), lengths[0], cache.lengths, cache.numbers
            assert lengths == [T] * B, "each row of a filled cache takes the same number of tokens"
            sample, offsets = numbers[:B], numbers[:B + 1] * T
            if T > 1:
                sample = sample.repeat_interleave(T)                            # (N,)
                positions = (positions[:, None] + numbers[:T]).flatten()        # (N,)
            if T > 1 or min(filled) < n_cached:
                mask = numbers[:max_length] <= positions.view(B, 1, T, 1)       # all up to itself
                if T > 1:
                    queries_per_key = self.config.n_heads // self.config.n_kv_heads
                    mask = mask.repeat_interleave(queries_per_key, dim=2)
            rotation = None if cache.rotation is None else cache.rotation[positions]
            return Layout([(B, T)], sample, positions, offsets, max_length, rotation, cache,
                          n_cached, mask)
        groups = [(len(list(group)), T) for T, group in groupby(lengths)]
        sample = torch.arange(len(lengths), device=device).repeat_interleave(
            to_device(lengths, device, torch.long), output_size=tokens.shape[0])
        positions = torch.cat([torch.arange(T, device=device).repeat(n) for n, T in groups])
        offsets = to_device([0, *accumulate(lengths)], device, torch.int32)
        return Layout(groups, sample, positions, offsets, max_length,
                      rope_rotation(self.config, positions), cache, n_cached, mask)

    def context_length(self, max_seq_len: int | None) -> int:
        """max_seq_len, or the model's own; raises ValueError for one beyond it."""
        limit = self.config.max_seq_len
        if max_seq_len and max_seq_len > limit:
            raise ValueError(f"--max_seq_len {max_seq_len} exceeds the model's context length of "
                             f"{limit}")
        return max_seq_len or limit

    def shard_units(self) -> list[nn.Module]:
        """What ZeRO gathers at a time: the attention or the FFN of a layer."""
        return [part for layer in self.layers for part in (layer.attention, layer.ffn)]

    def logits(self, final):  # (S, D) -> (S, n_tokens)
        logits = self.output(final)     # a slice of all of it would be copied by its backward
        return logits[:, :self.n_tokens] if self.n_tokens < logits.shape[1] else logits

    @property
    def head(self):  # -> (n_tokens, D), a view
        """The matrix that turns final hidden states into logits, for losses that run it."""
        is_rounded = self.config.quantization or self.qat
        weight = self.output.dequantised() if is_rounded else self.output.weight
        return weight[:self.n_tokens] if self.n_tokens < len(weight) else weight

    def n_parameters(self) -> int:
        """Tied weights count once, two 4-bit weights in a byte as two, and scales not at all."""
        bits = int((self.config.quantization or "int8").removeprefix("int"))
        return sum(weight.numel() * 8 // (bits if weight.dtype == torch.uint8 else 8)
                   for name, weight in self.named_parameters()
                   if not name.endswith((".scale", ".low")))


def to_device(values: list[int], device, dtype) -> torch.Tensor:
    """A GPU copies pinned memory asynchronously, while Python continues to queue work for it."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
