"""
量化：权重存成 8 位或 4 位整数与比例，激活仍为浮点；只用于推理。
Quantisation: weights become 8-bit or 4-bit integers with a scale; activations stay floats. For
inference only.

    int8    w ~ scale * q              q in -127 .. 127, one scale per row (output)
    int4    w ~ scale * q + low        q in 0 .. 15, a scale and a low per 32 weights of a row;
                                       two q in a byte

All matrices of the layers are quantised but the router, whose choices would jump. Norms, biases
and positions stay floats; embedding and head are int8 in both kinds. SmolLM2's perplexity on
TinyStories is 8.24 in fp32, 8.33 in int8 (8.61 with 8-bit activations); a 4-bit embedding alone
would add 0.36.
int8: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outliers.
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
        scale = nonzero(weight.float().abs().amax(dim=-1) / 127)
        q = (weight.float() / scale.unsqueeze(-1)).round().to(torch.int8)
        super().__init__(bias, weight=q, scale=scale.to(weight.dtype))

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
    """Replace the matrices by quantised ones, "int8" or "int4", in place. Raises ValueError before
    anything is changed."""
    if model.adapted:
        raise ValueError("the model has adapters; merge_lora merges them, then it can be quantised")
    if isinstance(model.output, Quantised):
        raise ValueError(f"the model is {model.config.quantization} already")
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
