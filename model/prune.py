"""
结构剪枝：整层、注意力头、前馈单元、隐藏维度与专家，按激活值的重要性去掉。
Structured pruning: whole layers, attention heads, FFN units or experts, and hidden dimensions are
removed, the least important first, as a few batches of data show it.

    importance = measure(model, batches)
    smaller = prune(model, importance, n_layers=18, n_heads=6, hidden_dim=768, dim=512)

The recipe is Minitron's: Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679, Sec. 2.2. It
needs forward passes only. Then the unpruned model teaches the pruned one.
"""

import copy
import re
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.config import LMConfig
from model.transformer import Transformer

# The axes of each weight, by the end of its name. D: dim, Q: query heads, G: key/value heads,
# H: FFN units, E: experts, -: stays. Shapes below: N tokens, L layers, K head_dim.
AXES = {
    "q_norm.weight": "-", "k_norm.weight": "-", "norm.weight": "D", "norm.bias": "D",
    "embeddings.weight": "-D", "output.weight": "-D",
    "wq.weight": "QD", "wk.weight": "GD", "wv.weight": "GD", "wo.weight": "DQ",
    "wq.bias": "Q", "wk.bias": "G", "wv.bias": "G", "wo.bias": "D",
    "router.weight": "ED", "ffn.w1": "E-D", "ffn.w3": "E-D", "ffn.w2": "ED-",
    "shared.w1.weight": "-D", "shared.w3.weight": "-D", "shared.w2.weight": "D-",
    "w1.weight": "HD", "w3.weight": "HD", "w2.weight": "DH", "w1.bias": "H", "w2.bias": "D"}


def keep_layers(model: Transformer, layers: list[int]) -> Transformer:
    """The model, changed in place, with these layers only, in this order. DistilBERT's student
    starts so: Sanh et al. 2019, https://arxiv.org/abs/1910.01108, Sec. 3. Raises ValueError for a
    layer that the model does not have."""
    last = model.config.n_layers - 1
    if not all(0 <= i <= last for i in layers):
        raise ValueError(f"--layers {','.join(map(str, layers))}: the model has layers 0 to {last}")

    model.config = model.config.with_layers(layers)
    model.layers = torch.nn.ModuleList(copy.deepcopy(model.layers[old]) for old in layers)
    for new, layer in enumerate(model.layers):
        layer.attention.layer = new
    return model


class Importance(NamedTuple):
    """The larger, the more is lost without it."""

    layers: torch.Tensor                    # (L,)
    dim: torch.Tensor                       # (D,)
    groups: list[torch.Tensor]              # L x (G,), a key/value head with its query heads
    units: list[torch.Tensor]               # L x (H,), of the FFN; or (E,), its experts
    energy: dict[str, torch.Tensor]         # name of a norm -> (D,), mean square of its input


@torch.no_grad()
def measure(model: Transformer, batches, by: str = "activation", seed: int = 0) -> Importance:
    """The importance of each part.

        layer               1 - cosine of its input and output. Men et al. 2024 (block influence),
                            https://arxiv.org/abs/2403.03853, Eq. 1
        head, FFN unit      mean |activation| times the norm of the column that reads it, as in
                            Sun et al. 2023 (Wanda), https://arxiv.org/abs/2306.11695, Eq. 1
        expert              mean weight in the sum, over the tokens
        hidden dimension    sum over the norms of the mean |output|. Minitron, Sec. 2.2

    by  "activation"; or for comparison "magnitude", without the activations, or "random"
    """
    sums, n = defaultdict(float), 0
    hooks = []

    def add(name, value):                   # (N, ...) -> sum over the tokens
        sums[name] = sums[name] + value.float().sum(dim=0)

    def watch(name, module):
        if name.endswith("norm") and not name.endswith(("q_norm", "k_norm")):
            def hook(_, args, y):
                add(f"{name} energy", args[0].float() ** 2)
                add("dim", y.abs())
        elif name.endswith((".wo", ".w2")):
            def hook(_, args, y):
                add(name, args[0].abs())
        elif name.endswith(".router"):
            def hook(_, args, y):
                gate, chosen = y.float().softmax(dim=-1).topk(model.config.num_experts_per_tok)
                if model.config.norm_topk_prob:
                    gate = gate / gate.sum(dim=-1, keepdim=True)
                add(name, torch.zeros_like(y, dtype=torch.float).scatter(-1, chosen, gate))
        elif re.fullmatch(r"layers\.\d+", name):
            def hook(_, args, y):
                add(name, 1 - F.cosine_similarity(args[0].float(), y[0].float(), dim=-1))
        else:
            return
        hooks.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        watch(name, module)
    for batch in batches:
        model(batch.tokens, batch.lengths, with_logits=False)
        n += len(batch.tokens)
    for hook in hooks:
        hook.remove()
    means = {name: value.cpu() / n for name, value in sums.items()}

    def score(name, norm):                  # norm: of the weights that read or make up this part
        if by == "random":
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            return torch.rand(norm.shape, generator=generator)
        if by == "magnitude":
            return norm.cpu()
        return means[name] * (norm.cpu() if name.endswith((".wo", ".w2")) else 1)

    layers, groups, units = [], [], []
    for i, layer in enumerate(model.layers):
        whole = torch.cat([weight.flatten() for weight in layer.parameters()])
        layers.append(score(f"layers.{i}", whole.norm()))
        heads = score(f"layers.{i}.attention.wo", layer.attention.wo.weight.norm(dim=0))    # (H K,)
        groups.append(heads.view(model.config.n_kv_heads, -1).sum(dim=-1))
        part, axis = ("router", 1) if model.config.use_moe else ("w2", 0)
        norm = getattr(layer.ffn, part).weight.norm(dim=axis)
        units.append(score(f"layers.{i}.ffn.{part}", norm))                     # (H,) or (E,)
    dim = score("dim", model.tok_embeddings.weight.norm(dim=0))
    energy = {name.removesuffix(" energy"): value for name, value in means.items()
              if name.endswith(" energy")}
    return Importance(torch.stack(layers), dim, groups, units, energy)


def best(scores, n: int):  # (M,) -> (n,) places of the n largest, in their old order
    return scores.topk(n).indices.sort().values


def axes_of(name: str) -> str:
    return next(axes for end, axes in AXES.items() if name.endswith(end))


def resized(old: LMConfig, sizes: dict) -> LMConfig:
    per_group, new = old.n_heads // old.n_kv_heads, vars(old) | sizes
    for name, size in sizes.items():
        if size > getattr(old, name):
            raise ValueError(f"{name}={size} exceeds the model's {getattr(old, name)}")
    if ("hidden_dim" if old.use_moe else "n_routed_experts") in sizes:
        raise ValueError("units are removed of a dense model, experts of a mixture: see --dense")
    if new["n_heads"] % per_group:
        raise ValueError(f"n_heads={new['n_heads']}: {per_group} query heads share a key/value "
                         f"head, so only a multiple of {per_group} can stay")
    return LMConfig(**new | {
        "n_kv_heads": new["n_heads"] // per_group,
        "num_experts_per_tok": min(old.num_experts_per_tok, new["n_routed_experts"])})


@torch.no_grad()
def prune(model: Transformer, importance: Importance, **sizes) -> Transformer:
    """A new model of the given sizes of LMConfig: n_layers, n_heads, dim, and hidden_dim or
    n_routed_experts; those that are not given stay. Each layer keeps its own heads and units. Heads
    leave in groups, with their key/value head. Raises ValueError for sizes that do not fit."""
    old, new = model.config, resized(model.config, sizes)
    layers = best(importance.layers, new.n_layers).tolist()
    new.nope_layers = old.with_layers(layers).nope_layers
    dim = best(importance.dim, new.dim)
    unit, n_units = ("E", new.n_routed_experts) if new.use_moe else ("H", new.hidden_dim)

    def heads(layer, n_heads):              # -> the rows of wq, or of wk and wv, that stay
        K = old.head_dim * n_heads // old.n_kv_heads        # of one group
        groups = best(importance.groups[layer], new.n_kv_heads)
        return (groups[:, None] * K + torch.arange(K)).flatten()

    kept = {layer: {"Q": heads(layer, old.n_heads), "G": heads(layer, old.n_kv_heads),
                    unit: best(importance.units[layer], n_units), "D": dim}
            for layer in layers}
    state = {}
    for name, weight in model.state_dict().items():
        indices, new_name = {"D": dim}, name
        if name.startswith("layers."):
            layer = int(name.split(".")[1])
            if layer not in kept:
                continue
            indices = kept[layer]
            new_name = name.replace(f".{layer}.", f".{layers.index(layer)}.", 1)
        for axis, letter in enumerate(axes_of(name)):
            if letter != "-":
                weight = weight.index_select(axis, indices[letter].to(weight.device))
        if (norm := name.removesuffix(".weight")) in importance.energy:
            # A norm divides by the root mean square of what is left, which is another one.
            energy = importance.energy[norm]
            weight = weight * (energy[dim].mean() / energy.mean()).sqrt()
        state[new_name] = weight
    smaller = type(model)(new)
    smaller.load_state_dict(state)
    smaller.n_tokens = model.n_tokens
    return smaller.eval()


@torch.no_grad()
def dense(model: Transformer, importance: Importance) -> Transformer:
    """A mixture of experts as a dense model: each FFN has the units of all experts, whose outputs
    are scaled by the expert's mean weight, and of the shared one. Then its units can be pruned."""
    state = {name: weight for name, weight in model.state_dict().items() if ".ffn." not in name}
    for i, (layer, used) in enumerate(zip(model.layers, importance.units)):
        w1, w2, w3 = layer.ffn.stacks()
        for name, stack in {"w1": w1, "w2": w2 * used[:, None, None].to(w2), "w3": w3}.items():
            shared = [getattr(layer.ffn.shared, name).weight] if layer.ffn.shared else []
            whole = torch.cat([*stack, *shared], dim=1 if name == "w2" else 0)
            state[f"layers.{i}.ffn.{name}.weight"] = whole
    sizes = {"use_moe": False, "hidden_dim": len(state["layers.0.ffn.w1.weight"])}
    bigger = type(model)(LMConfig(**vars(model.config) | sizes))
    bigger.load_state_dict(state)
    bigger.n_tokens = model.n_tokens
    return bigger.eval()


def sizes_for(model: Transformer, target: float) -> dict:
    """n_layers and hidden_dim at which at most a share `target` of the parameters is left, and
    nearly as many. Of these sizes the ones that cut both by the most similar factors. Raises
    ValueError if the target is too little for one layer."""
    config, full, fitting = model.config, model.n_parameters(), []
    of_layer = sum(weight.numel() for weight in model.layers[0].parameters())
    of_unit = sum(weight.numel() for name, weight in model.layers[0].named_parameters()
                  if "H" in axes_of(name)) // config.hidden_dim
    for n_layers in range(1, config.n_layers + 1):
        for hidden_dim in (*range(32, config.hidden_dim, 32), config.hidden_dim):
            left = of_layer - of_unit * (config.hidden_dim - hidden_dim)
            n = full - config.n_layers * of_layer + n_layers * left
            if n <= target * full:
                balance = abs(n_layers / config.n_layers - hidden_dim / config.hidden_dim)
                sizes = {"n_layers": n_layers, "hidden_dim": hidden_dim}
                fitting.append((n, balance, sizes))
    if not fitting:
        raise ValueError(f"--target {target:g} is less than one layer: embedding and head have "
                         f"{model.tok_embeddings.weight.numel() / full:.0%}; give --dim")
    most = max(n for n, _, _ in fitting)
    return min((balance, -n, sizes) for n, balance, sizes in fitting if n > 0.95 * most)[2]
