"""
量化：权重存成 8 位或 4 位整数与比例，激活仍为浮点；只用于推理。
Quantisation: weights become 8-bit or 4-bit integers with a scale; activations stay floats. For
inference only.

    int8    w ~ scale * q              q in -127 .. 127, one scale per row (output)
    int4    w ~ scale * q + low        q in 0 .. 15, a scale and a low per 32 weights of a row;
                                       two q in a byte

Rounding changes a weight by at most scale / 2. All matrices of the layers are quantised but the
router, whose choices would jump. Norms, biases and positions stay floats. Embedding and head are
int8 in both kinds: in 4 bits they alone would raise SmolLM2's perplexity from 8.24 to 8.60.

Quantisation saves memory, not time: one core (AVX2) spends on unpacking what it saves on reading. A
model of 512 x 8 answers one prompt 1.07 times as fast in int8 as in fp32, 0.98 in int4; sixteen
prompts 0.91 and 0.87 (`python -m benchmarks.generate`).

            SmolLM2-135M, MB        student of 64 x 2: exact match %   perplexity
    fp32    538                     72.4                               1.446
    int8    135                     72.4                               1.447
    int4    108                     71.6                               1.458

Activations have outliers, so they are harder to quantise. SmolLM2's perplexity (4,096 tokens of
TinyStories) is 8.24 in fp32, 8.33 in int8; with 8-bit activations 8.61 with a scale per token, and
15.6 with one for 512 tokens. Without `low`, int4 would change the student's weights 24 % more (q in
-7 .. 7), or 10 % more (-8 .. 7).

int8: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outliers; groups with a
low: llama.cpp's Q4_1.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from model.moe import MoEFeedForward

GROUP = 32              # weights that share a scale in int4
UNPACKED = 2 ** 20      # weights unpacked at a time: 4 MB, which stay in the CPU's cache
FEW_ROWS = 16           # up to here, kernels that read integers are not slower than float products
KERNEL_SIDE = 16        # their block size; with other sizes they would read past the end


class Quantised(nn.Module):
    """Base class. Replaces an nn.Linear, or by `unbind` a stack of experts (E, N, K)."""

    def __init__(self, bias, **code):
        super().__init__()
        self.code = tuple(code)
        for name, tensor in {**code, "bias": bias}.items():
            # Parameters, although never trained: loaded, moved, tied and counted like all others.
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    def dequantised(self):  # -> (..., N, K) in floats
        return self.unpack(*(self.get_parameter(name) for name in self.code))

    def unbind(self):  # -> E times (N, K)
        """The experts as floats, one at a time."""
        stacks = (self.get_parameter(name) for name in self.code)
        return (self.unpack(*code) for code in zip(*stacks))

    def suits_kernel(self, x, N: int) -> bool:
        """Whether to use PyTorch's kernel for few rows, which multiplies the integers by x in bf16,
        with fp32 sums. `python -m benchmarks.generate` shows how many tokens it changes."""
        n, K = x.shape
        is_aligned = N % KERNEL_SIDE == 0 and K % GROUP == 0
        return x.device.type == "cpu" and n <= FEW_ROWS and is_aligned

    def train(self, mode: bool = True):
        if mode:
            raise ValueError("quantised weights cannot be trained: integers have no gradient. "
                             "Train the model they were made from, and quantise it afterwards")
        return super().train(mode)


class Int8(Quantised):
    """weight int8 (..., N, K) · scale (..., N)"""

    def __init__(self, weight, bias=None):  # (..., N, K), (N,)
        scale = nonzero(weight.float().abs().amax(dim=-1) / 127)
        q = (weight.float() / scale.unsqueeze(-1)).round().to(torch.int8)
        super().__init__(bias, weight=q, scale=scale.to(weight.dtype))

    @staticmethod
    def unpack(weight, scale):
        return weight * scale.unsqueeze(-1)

    def forward(self, x):  # (n, K) -> (n, N)
        y = self.few_rows(x) if self.suits_kernel(x, len(self.weight)) else self.many_rows(x)
        return y if self.bias is None else y + self.bias

    def few_rows(self, x):
        one = torch.ones_like(self.scale, dtype=torch.bfloat16)     # the scales stay fp32
        return torch._weight_int8pack_mm(x.bfloat16(), self.weight, one).to(x.dtype) * self.scale

    def many_rows(self, x):
        pieces = self.weight.split(max(1, UNPACKED // x.shape[-1]))
        buffer = torch.empty_like(pieces[0], dtype=x.dtype)     # allocating is slower than filling
        ys = [F.linear(x, buffer[:len(piece)].copy_(piece)) for piece in pieces]
        return torch.cat(ys, dim=-1) * self.scale


class Int8Embedding(Int8):
    def forward(self, tokens):  # (n,) -> (n, K)
        return self.unpack(self.weight[tokens], self.scale[tokens])


class Int4(Quantised):
    """weight uint8 (..., G, 16, N) · scale, low (..., G, N), for G = K / 32 groups

    Outputs are consecutive, so that scales and weights are read in the same order. Byte i of a
    group has weight i in its low half and weight i + 16 in its high half.
    """

    packed = None       # in the kernel's layout, which differs between CPUs; made at first use

    def __init__(self, weight, bias=None):  # (..., N, K), (N,)
        columns = weight.float().transpose(-1, -2).contiguous()             # (..., K, N)
        groups = columns.unflatten(-2, (-1, GROUP))                         # (..., G, 32, N)
        low, high = groups.aminmax(dim=-2)
        scale = nonzero((high - low) / 15)
        q = ((groups - low.unsqueeze(-2)) / scale.unsqueeze(-2)).round().to(torch.uint8)
        first, second = q.chunk(2, dim=-2)
        super().__init__(bias, weight=first | second << 4, scale=scale.to(weight.dtype),
                         low=low.to(weight.dtype))

    @staticmethod
    def unpack(weight, scale, low):
        q = integers(weight).to(scale.dtype)
        groups = torch.addcmul(low.unsqueeze(-2), q, scale.unsqueeze(-2))
        return groups.flatten(-3, -2).transpose(-1, -2)

    def forward(self, x):  # (n, K) -> (n, N)
        y = self.few_rows(x) if self.suits_kernel(x, self.weight.shape[-1]) else self.many_rows(x)
        return y if self.bias is None else y + self.bias

    def few_rows(self, x):
        if self.packed is None:
            rows = integers(self.weight).flatten(0, 1).T.int().contiguous()         # (N, K)
            middle = self.low + 8 * self.scale              # the kernel's zero point
            self.packed = (torch._convert_weight_to_int4pack_for_cpu(rows, 1),      # (N, K/2)
                           torch.stack([self.scale, middle], dim=-1).bfloat16())    # (G, N, 2)
        weight, scales = self.packed
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x.bfloat16(), weight, GROUP, scales).to(x.dtype)

    def many_rows(self, x):
        n = max(1, UNPACKED // (GROUP * self.weight.shape[-1]))             # groups at a time
        code = (part.split(n) for part in (self.weight, self.scale, self.low))
        parts = zip(x.split(GROUP * n, dim=1), *code)
        return sum(F.linear(x_part, self.unpack(*code_part)) for x_part, *code_part in parts)


def integers(packed):  # (..., 16, N) -> (..., 32, N) of 0 .. 15
    return torch.cat([packed & 15, packed >> 4], dim=-2)


def nonzero(scale):
    """Equal weights, such as zero rows of a padded vocabulary, have a range of 0: no divisor."""
    return torch.where(scale > 0, scale, 1.0)


KINDS = {"int8": Int8, "int4": Int4}


@torch.no_grad()
def quantize(model, kind: str):
    """Replace the matrices by quantised ones, in place; on the meta device, to be loaded then.

    kind    "int8" or "int4"; also set in the model's config

    Raises ValueError, before anything is changed, for another kind, a quantised model, adapters,
    and a matrix whose columns do not split into groups of 32.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization {kind!r} must be one of {', '.join(KINDS)}")
    if model.adapted:
        raise ValueError("the model has adapters; merge_lora merges them, then it can be quantised")
    if isinstance(model.output, Quantised):
        raise ValueError(f"the model is {model.config.quantization} already; quantise the one it "
                         "was made from")
    places = list(matrices(model.layers))
    for path, *_, weight, _ in places:
        if kind == "int4" and weight.shape[-1] % GROUP:
            raise ValueError(f"int4 needs columns in groups of {GROUP}, but layers.{path} has "
                             f"{weight.shape[-1]}; use int8")

    for _, module, name, weight, bias in places:
        delattr(module, name)               # a stack of experts is a parameter
        setattr(module, name, KINDS[kind](weight, bias))
    model.tok_embeddings = Int8Embedding(model.tok_embeddings.weight)
    model.output = Int8(model.output.weight)
    model.tie_weights()
    model.config = dataclasses.replace(model.config, quantization=kind)
    return model.requires_grad_(False)


def matrices(layers):
    """(path, module, name, weight, bias) of every matrix and stack of experts."""
    for path, module in layers.named_modules():
        if isinstance(module, MoEFeedForward):
            for name in ("w1", "w2", "w3"):
                yield f"{path}.{name}", module, name, module.get_parameter(name), None
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and name != "router":
                yield f"{path}.{name}", module, name, child.weight, child.bias
