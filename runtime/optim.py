"""
优化器的参数组。
Parameter groups of the optimizer.
"""


def decay_groups(modules: dict, weight_decay: float) -> list[dict]:
    """Weight decay on matrices alone: a norm's gain or a bias has no reason to shrink."""
    weights = [weight for module in modules.values() for weight in module.parameters()
               if weight.requires_grad]
    return [{"params": [w for w in weights if w.dim() >= 2], "weight_decay": weight_decay},
            {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0}]


def trained_weights(optimizer) -> list:
    """Its parameters, in its order."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]
