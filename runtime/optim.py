"""
优化器的参数组，以及把梯度取出、放回的两个函数。
Parameter groups of the optimizer, and two functions that take gradients out and put them back.
"""

import torch


def decay_groups(modules: dict, weight_decay: float) -> list[dict]:
    """Weight decay on matrices alone: a norm's gain or a bias has no reason to shrink."""
    weights = [weight for module in modules.values() for weight in module.parameters()
               if weight.requires_grad]
    return [{"params": [w for w in weights if w.dim() >= 2], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0}]


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
