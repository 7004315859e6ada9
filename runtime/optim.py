"""
优化器：Muon 更新各层的矩阵，AdamW 更新其余参数；另有把梯度取出、放回的两个函数。
Optimizers: AdamW for all weights, or Muon for the matrices of the layers and AdamW for the rest.
Two functions take gradients out and put them back.
"""

import math

import torch

from runtime.processes import full_tensor, sharded_like

STACK_BYTES = 256 << 20         # of matrices that Muon orthogonalises in one batched product


def parameter_groups(modules: dict, weight_decay: float) -> list[dict]:
    """What trains, in three groups: the matrices of the layers, other matrices (embeddings, head,
    adapters, projections), vectors. A norm's gain or a bias has no reason to shrink: no decay."""
    groups = [{"params": [], "weight_decay": weight_decay, "layers": True},
              {"params": [], "weight_decay": weight_decay, "layers": False},
              {"params": [], "weight_decay": 0.0, "layers": False}]
    for module in modules.values():
        for name, weight in module.named_parameters():
            in_layer = "layers." in name and "lora" not in name
            if weight.requires_grad:
                groups[2 if weight.dim() < 2 else 0 if in_layer else 1]["params"].append(weight)
    return [group for group in groups if group["params"]]


class Muon(torch.optim.AdamW):
    """Muon for the group of layer matrices, AdamW for the others.

        M <- 0.95 M + 0.05 G                        momentum, per matrix
        U  = 0.05 G + 0.95 M                        Nesterov: a look ahead
        O  = orthogonalise(U)                       all singular values become about 1
        W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) O

    A gradient's few large singular values hide the many small ones; O gives all directions the same
    length. The factor gives the update the RMS of AdamW's, so that one learning rate fits both.
    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025,
    https://arxiv.org/abs/2502.16982, Eq. 4. An expert stack is a batch of matrices.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape = {}
            for weight in group["params"] if group["layers"] else ():
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for shape, weights in by_shape.items():
                n = max(1, STACK_BYTES // (4 * math.prod(shape)))
                for first in range(0, len(weights), n):
                    self.update(weights[first:first + n], group["lr"], group["weight_decay"])
        return super().step(closure)        # AdamW passes over weights without a gradient

    def update(self, weights: list, lr: float, weight_decay: float):
        """One step of matrices of one shape. It takes their gradients, which AdamW must not see."""
        ahead = []
        for weight in weights:
            state = self.state[weight]
            if not state:       # AdamW, which reads saved states, expects a step in each
                state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(weight)}
            momentum = state["momentum"].lerp_(weight.grad, 1 - self.MOMENTUM)
            ahead.append(full_tensor(weight.grad.lerp_(momentum, self.MOMENTUM)))
            weight.grad = None
        size = 0.2 * math.sqrt(max(weights[0].shape[-2:]))
        for weight, change in zip(weights, orthogonalise(torch.stack(ahead))):
            weight.mul_(1 - lr * weight_decay).add_(sharded_like(weight, change), alpha=-lr * size)


OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}       # the choices of --optimizer


def orthogonalise(matrices):  # (..., R, C) -> (..., R, C)
    """Each U S V^T becomes about U V^T: five Newton-Schulz steps, whose polynomial takes singular
    values from 0.002 to 1 to 0.7 ... 1.2, and smaller ones to about 485 times their value. In fp32
    on a CPU, bf16 on a GPU. Jordan et al. 2024."""
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices.to(torch.bfloat16) if matrices.is_cuda else matrices
    X = X.reshape(-1, *X.shape[-2:])                                # one batch of matrices
    X = X / X.flatten(1).norm(dim=-1).clamp_min(1e-7)[:, None, None]        # the largest at most 1
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    for _ in range(5):
        gram = wide @ wide.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)     # b gram + c gram gram
        wide = torch.baddbmm(wide, gram, wide, beta=a)              # a wide + gram wide
    wide = wide if X.shape[-2] <= X.shape[-1] else wide.mT
    return wide.reshape(matrices.shape).to(matrices.dtype)


def trained_weights(optimizer) -> list:
    """Its parameters, in its order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def take_gradient(weights: list) -> torch.Tensor:  # -> (P,)
    """The accumulated gradients as one flat tensor; a weight without gradient has 0. They are
    cleared, so that the next backward pass starts from 0."""
    grads = [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in weights]
    flat = torch.cat(grads)
    for weight in weights:
        weight.grad = None
    return flat


def give_gradient(weights: list, flat: torch.Tensor):  # (P,)
    """Make a flat tensor the gradients of the weights."""
    for weight, grad in zip(weights, flat.split([weight.numel() for weight in weights])):
        weight.grad = grad.view_as(weight)
