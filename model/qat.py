"""
量化感知训练：前向用舍入后的权重，梯度直通，更新的仍是 fp32 权重。
Quantisation-aware training (QAT): each forward pass rounds the matrices as model/quantize.py will
round them in the file (fake quantisation); the optimizer moves the fp32 weights behind them.

    y = x Q(W)^T        dL/dW := dL/dQ(W)

Rounding has the gradient 0 almost everywhere, so the backward pass leaves it out: straight-through
estimator, Bengio et al. 2013, https://arxiv.org/abs/1308.3432. No weight is clipped: the grid ends
at the smallest and the largest of its group. With the forward KL to the same model in full
precision as loss: quantisation-aware distillation (QAD), https://arxiv.org/abs/2601.20088.
"""

import torch.nn.functional as F
from torch import nn

from model.moe import MoEFeedForward
from model.quantize import places, round_to_grid


def fake_quantised(weight, kind: str):  # (..., N, K) -> (..., N, K)
    """On the grid, with the gradient of the identity."""
    return round_to_grid(weight.detach(), kind) + (weight - weight.detach())    # + 0, gradient 1


class FakeLinear(nn.Linear):
    def dequantised(self):  # -> (N, K), as that of a Quantised module
        return fake_quantised(self.weight, self.kind)

    def forward(self, x):  # (n, K) -> (n, N)
        return F.linear(x, self.dequantised(), self.bias)


class FakeExperts(MoEFeedForward):
    def stacks(self):
        return [fake_quantised(stack, self.kind) for stack in super().stacks()]


class FakeEmbedding(nn.Embedding):
    def forward(self, tokens):  # (N,) -> (N, D); each row has its own scale
        return fake_quantised(super().forward(tokens), self.kind)


FAKE = {nn.Linear: FakeLinear, nn.Embedding: FakeEmbedding, MoEFeedForward: FakeExperts}


def fake_quantize(model, kind: str):
    """Round the matrices that `quantize` would replace in each forward pass, in place: modules keep
    their parameters and become ones of a subclass. Raises ValueError before anything changes."""
    kinds = {module if isinstance(module, MoEFeedForward) else module.get_submodule(name): kind
             for _, module, name, *_ in places(model, kind)}
    for module, its_kind in (kinds | {model.tok_embeddings: "int8", model.output: "int8"}).items():
        module.__class__, module.kind = FAKE[type(module)], its_kind
    model.qat = kind
    return model
