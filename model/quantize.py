"""
量化：权重存成 8、4、3 或 2 位整数与比例，激活仍为浮点；只用于推理。
Quantisation: weights become integers of 8, 4, 3 or 2 bits with a scale; activations stay floats.
For inference only; model/qat.py trains a model for it.

    int8    w ~ scale * q              q in -127 .. 127, one scale per row (output)
    int4    w ~ scale * q + low        q in 0 .. 15, a scale and a low per 32 weights of a row;
                                       two q in a byte
    int3, int2                         the same, with q in 0 .. 7 and 0 .. 3

All matrices of the layers are quantised but the router, whose choices would jump. Norms, biases
and positions stay floats; embedding and head are int8 in all kinds. SmolLM2's perplexity on
TinyStories is 8.24 in fp32, 8.33 in int8 (8.61 with 8-bit activations); a 4-bit embedding alone
would add 0.36.
int8: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outliers.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from model.moe import MoEFeedForward

GROUP = 32              # weights that share a scale, below 8 bits
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
        return (self.unpack(*code) for code in zip(*(self.get_parameter(n) for n in self.code)))

    def forward(self, x):  # (n, K) -> (n, N)
        """For few rows, PyTorch's kernel multiplies the integers by x in bf16, with fp32 sums."""
        n, K = x.shape
        suits = (x.device.type == "cpu" and n <= FEW_ROWS and K % GROUP == 0
                 and self.scale.shape[-1] % KERNEL_SIDE == 0)
        y = self.few_rows(x) if suits else self.many_rows(x)
        return y if self.bias is None else y + self.bias

    def train(self, mode: bool = True):
        if mode:
            raise ValueError("quantised weights cannot be trained. Train the model they were made "
                             "from, and quantise it afterwards")
        return super().train(mode)


class Int8(Quantised):
    """weight int8 (..., N, K) · scale (..., N)"""

    def __init__(self, weight, bias=None):  # (..., N, K), (N,)
        q, scale = row_grid(weight)
        super().__init__(bias, weight=q.to(torch.int8), scale=scale.squeeze(-1).to(weight.dtype))

    @staticmethod
    def unpack(weight, scale):
        return weight * scale.unsqueeze(-1)

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
    """weight uint8 (..., G, 16, N) · scale, low (..., G, N), for G = K / 32 groups. Byte i of a
    group has weight i in its low half and weight i + 16 in its high half."""

    bits = 4
    packed = None       # in the kernel's layout, which differs between CPUs; made at first use

    def __init__(self, weight, bias=None):  # (..., N, K), (N,)
        q, scale, low = group_grid(weight, self.bits)
        columns = q.to(torch.uint8).movedim(-3, -1).contiguous()            # (..., G, 32, N)
        scale, low = (part.squeeze(-1).mT.contiguous().to(weight.dtype) for part in (scale, low))
        super().__init__(bias, weight=pack(columns, self.bits), scale=scale, low=low)

    def unpack(self, weight, scale, low):
        q = integers(weight, self.bits).to(scale.dtype)
        groups = torch.addcmul(low.unsqueeze(-2), q, scale.unsqueeze(-2))
        return groups.flatten(-3, -2).transpose(-1, -2)

    def few_rows(self, x):
        if self.packed is None:
            half = 2 ** (self.bits - 1)         # the kernel subtracts 8 from each value
            rows = (integers(self.weight, self.bits) + 8 - half).flatten(0, 1).T.int().contiguous()
            middle = self.low + half * self.scale
            self.packed = (torch._convert_weight_to_int4pack_for_cpu(rows, 1),      # (N, K) to K/2
                           torch.stack([self.scale, middle], dim=-1).bfloat16())    # (G, N, 2)
        weight, scales = self.packed
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return multiply(x.bfloat16(), weight, GROUP, scales).to(x.dtype)

    def many_rows(self, x):
        n = max(1, UNPACKED // (GROUP * self.weight.shape[-1]))             # groups at a time
        code = (part.split(n) for part in (self.weight, self.scale, self.low))
        parts = zip(x.split(GROUP * n, dim=1), *code)
        return sum(F.linear(x_part, self.unpack(*code_part)) for x_part, *code_part in parts)


class Int3(Int4):
    bits = 3        # weight (..., G, 12, N): 8 bytes with two bits of 32 weights, 4 with the third


class Int2(Int4):
    bits = 2        # weight (..., G, 8, N): byte i has the weights i, i + 8, i + 16, i + 24


KINDS = {"int8": Int8, "int4": Int4, "int3": Int3, "int2": Int2}


def row_grid(weight):  # (..., N, K) -> (..., N, K) of -127 .. 127, scale (..., N, 1)
    scale = nonzero(weight.float().abs().amax(dim=-1, keepdim=True) / 127)
    return (weight.float() / scale).round(), scale


def group_grid(weight, bits):  # (..., N, K) -> (..., N, G, 32); scale, low (..., N, G, 1)
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = nonzero((high - low) / (2**bits - 1))
    return ((groups - low) / scale).round(), scale, low


def round_to_grid(weight, kind: str):  # (..., N, K) -> (..., N, K)
    """The floats KINDS[kind](weight).dequantised(), without packing them."""
    if kind == "int8":
        q, scale = row_grid(weight)
        return q * scale
    q, scale, low = group_grid(weight, KINDS[kind].bits)
    return torch.addcmul(low, q, scale).flatten(-2)


def nonzero(scale):
    """Equal weights, such as zero rows of a padded vocabulary, have a range of 0: no divisor."""
    return torch.where(scale > 0, scale, 1.0)


def pack(q, bits):  # (..., 32, N) of 0 .. 2^bits - 1 -> (..., 4 * bits, N)
    if bits == 3:       # two bits of each weight, then the third
        return torch.cat([pack(q & 3, 2), pack(q >> 2, 1)], dim=-2)
    return sum(part << bits * i for i, part in enumerate(q.chunk(8 // bits, dim=-2)))


def integers(packed, bits):  # (..., 4 * bits, N) -> (..., 32, N) of 0 .. 2^bits - 1
    if bits == 3:
        low, high = packed.split([8, 4], dim=-2)
        return integers(low, 2) | integers(high, 1) << 2
    shifted = [packed, *(packed >> bits * i for i in range(1, 8 // bits))]
    return torch.cat(shifted, dim=-2).bitwise_and_(2**bits - 1)


@torch.no_grad()
def quantize(model, kind: str):
    """Replace the matrices by quantised ones of one of KINDS, in place. Raises ValueError before
    anything is changed."""
    for _, module, name, weight, bias in places(model, kind):
        delattr(module, name)               # a stack of experts is a parameter
        setattr(module, name, KINDS[kind](weight, bias))
    model.tok_embeddings = Int8Embedding(model.tok_embeddings.weight)
    model.output = Int8(model.output.weight)
    model.tie_weights()
    model.config = dataclasses.replace(model.config, quantization=kind)
    return model.requires_grad_(False)


def places(model, kind: str) -> list:
    """(path, module, name, weight, bias) of every matrix and stack of experts of the layers. Raises
    ValueError for a model that has no such grid."""
    if model.adapted:
        raise ValueError("the model has adapters; merge_lora merges them, then it can be quantised")
    if isinstance(model.output, Quantised):
        raise ValueError(f"the model is {model.config.quantization} already")
    found = []
    for path, module in model.layers.named_modules():
        if isinstance(module, MoEFeedForward):
            found += [(f"{path}.{name}", module, name, module.get_parameter(name), None)
                      for name in ("w1", "w2", "w3")]
        found += [(f"{path}.{name}", module, name, child.weight, child.bias)
                  for name, child in module.named_children()
                  if isinstance(child, nn.Linear) and name != "router"]
    for path, *_, weight, _ in found:
        if kind != "int8" and weight.shape[-1] % GROUP:
            raise ValueError(f"{kind} needs columns in groups of {GROUP}, but layers.{path} has "
                             f"{weight.shape[-1]}; use int8")
    return found
