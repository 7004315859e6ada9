"""
量化：权重存成 8 位或 4 位整数与比例，激活仍为浮点；只用于推理。
Quantisation: weights become integers of 8 or 4 bits and a scale; activations stay floats. For inference alone.

    int8    w ~ scale * q              q in -127 .. 127, one scale for each row (output)
    int4    w ~ scale * q + low        q in 0 .. 15, a scale and a low for each 32 weights of a row; two q in a byte

Rounded to the nearest, no weight moves by more than scale / 2. In the layers every matrix is quantised but the experts'
router, whose choice would jump; norms, biases and positions stay as they are. The words, read and written, are int8 in
both kinds: with four bits they alone would take SmolLM2's perplexity from 8.24 to 8.60 (with eight, 8.24).

What is gained is memory. One core (AVX2) saves by reading less what it then spends on unpacking: a model of 512 x 8 answers one
prompt 1.07 times as fast in int8 as in fp32, 0.98 in int4, sixteen 0.91 and 0.87 (`python -m benchmarks.generate`).

            SmolLM2-135M, MB        student of 64 x 2: exact match %   perplexity
    fp32    538                     72.4                               1.446
    int8    135                     72.4                               1.447
    int4    108                     71.6                               1.458

Activations have outliers. SmolLM2's perplexity (4,096 tokens of TinyStories) is 8.24 in fp32 and 8.33 in int8; with the
activations in 8 bits too it is 8.61 with a scale for each token, and 15.6 with one for 512 tokens.
Without the lows, the student's weights would move 24 % further in int4 (q in -7 .. 7), or 10 % (in -8 .. 7).

int8: Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, without its outliers; groups with a low: llama.cpp's Q4_1.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from model.moe import MoEFeedForward

GROUP = 32              # weights that share a scale in int4
UNPACKED = 2 ** 20      # weights made floats at once: 4 MB, which stay in the processor's cache until they are used
FEW_ROWS = 16           # up to here the kernels that read the integers themselves are no slower than products of floats
KERNEL_SIDE = 16        # what they cut matrices into; of other sizes they would read what lies behind


class Quantised(nn.Module):
    """Base of the kinds. Each stands in for an nn.Linear, or by `unbind` for a stack of experts (E, N, K)."""

    def __init__(self, bias, **code):
        super().__init__()
        self.code = tuple(code)
        for name, tensor in {**code, "bias": bias}.items():
            # A parameter, though it never learns: it is loaded, moved, tied and counted as the others are.
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def dequantised(self):  # -> (..., N, K) in floats
        return self.unpack(*(self.get_parameter(name) for name in self.code))

    def unbind(self):  # -> E times (N, K)
        """The experts as floats, each when its turn comes."""
        return (self.unpack(*code) for code in zip(*(self.get_parameter(name) for name in self.code)))

    def suits_kernel(self, x, N: int) -> bool:
        """Whether PyTorch's kernel for few rows may be asked: it reads a weight as the integer that it is, and multiplies
        by x in bf16, sums being fp32. How many tokens are others then, `python -m benchmarks.generate` tells."""
        n, K = x.shape
        return x.device.type == "cpu" and n <= FEW_ROWS and N % KERNEL_SIDE == 0 and K % GROUP == 0

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
        one = torch.ones_like(self.scale, dtype=torch.bfloat16)         # the scales are not to be rounded
        return torch._weight_int8pack_mm(x.bfloat16(), self.weight, one).to(x.dtype) * self.scale

    def many_rows(self, x):
        pieces = self.weight.split(max(1, UNPACKED // x.shape[-1]))
        room = torch.empty_like(pieces[0], dtype=x.dtype)       # once: asking for 4 MB takes longer than filling them
        return torch.cat([F.linear(x, room[:len(piece)].copy_(piece)) for piece in pieces], dim=-1) * self.scale


class Int8Embedding(Int8):
    def forward(self, tokens):  # (n,) -> (n, K)
        return self.unpack(self.weight[tokens], self.scale[tokens])


class Int4(Quantised):
    """weight uint8 (..., G, 16, N) · scale, low (..., G, N), for G = K / 32 groups

    Outputs lie side by side, so that one scale after the other meets one weight after the other. Byte i of a group
    holds its weight i in the low half and weight i + 16 in the high one.
    """

    packed = None       # the same in the order that the kernel for few rows wants, which differs between processors: made at
                        # its first use, and never written to a file

    def __init__(self, weight, bias=None):  # (..., N, K), (N,)
        groups = weight.float().transpose(-1, -2).contiguous().unflatten(-2, (-1, GROUP))   # (..., G, 32, N)
        low, high = groups.aminmax(dim=-2)
        scale = nonzero((high - low) / 15)
        q = ((groups - low.unsqueeze(-2)) / scale.unsqueeze(-2)).round().to(torch.uint8)
        first, second = q.chunk(2, dim=-2)
        super().__init__(bias, weight=first | second << 4, scale=scale.to(weight.dtype), low=low.to(weight.dtype))

    @staticmethod
    def unpack(weight, scale, low):
        groups = torch.addcmul(low.unsqueeze(-2), integers(weight).to(scale.dtype), scale.unsqueeze(-2))
        return groups.flatten(-3, -2).transpose(-1, -2)

    def forward(self, x):  # (n, K) -> (n, N)
        y = self.few_rows(x) if self.suits_kernel(x, self.weight.shape[-1]) else self.many_rows(x)
        return y if self.bias is None else y + self.bias

    def few_rows(self, x):
        if self.packed is None:
            rows = integers(self.weight).flatten(0, 1).T.int().contiguous()         # (N, K)
            middle = self.low + 8 * self.scale                                      # which the kernel has in place of the low
            self.packed = (torch._convert_weight_to_int4pack_for_cpu(rows, 1),
                           torch.stack([self.scale, middle], dim=-1).bfloat16())    # (N, K/2), (G, N, 2)
        weight, scales = self.packed
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.bfloat16(), weight, GROUP, scales).to(x.dtype)

    def many_rows(self, x):
        at_once = max(1, UNPACKED // (GROUP * self.weight.shape[-1]))               # groups
        code = (part.split(at_once) for part in (self.weight, self.scale, self.low))
        return sum(F.linear(part, self.unpack(*its_code)) for part, *its_code in zip(x.split(GROUP * at_once, dim=1), *code))


def integers(packed):  # (..., 16, N) -> (..., 32, N) of 0 .. 15
    return torch.cat([packed & 15, packed >> 4], dim=-2)


def nonzero(scale):
    """Weights that are all the same, as in the empty rows of a padded vocabulary, still divide by their scale."""
    return torch.where(scale > 0, scale, 1.0)


KINDS = {"int8": Int8, "int4": Int4}


@torch.no_grad()
def quantize(model, kind: str):
    """The same model, its matrices replaced by quantised ones. On the meta device this makes room to load them into.

    kind    "int8" or "int4", which its config then says

    Raises ValueError for another kind, a model that is quantised already, and, before anything is changed, for a matrix
    whose columns do not split into groups of 32.
    """
    if kind not in KINDS:
        raise ValueError(f"quantization {kind!r} must be one of {', '.join(KINDS)}")
    if model.adapted:
        raise ValueError("the model has adapters; merge_lora folds them into the weights, which can then be quantised")
    if isinstance(model.output, Quantised):
        raise ValueError(f"the model is {model.config.quantization} already; quantise the weights it was made from")
    places = list(matrices(model.layers))
    for path, *_, weight, _ in places:
        if kind == "int4" and weight.shape[-1] % GROUP:
            raise ValueError(f"int4 needs columns in groups of {GROUP}, but layers.{path} has {weight.shape[-1]}; "
                             "use int8")

    for _, module, name, weight, bias in places:
        delattr(module, name)               # a stack of experts is a parameter, which no module can replace
        setattr(module, name, KINDS[kind](weight, bias))
    model.tok_embeddings, model.output = Int8Embedding(model.tok_embeddings.weight), Int8(model.output.weight)
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
