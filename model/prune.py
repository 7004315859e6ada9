"""
结构剪枝：整层、注意力头、前馈单元、隐藏维度与专家，按激活值的重要性去掉。
Structured pruning: whole layers, attention heads, FFN units, hidden dimensions and experts are
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
from model.moe import MoEFeedForward
from model.transformer import Transformer

# The axes of each weight, by the end of its name. D: dim, Q: query heads, G: key/value heads,
# H: FFN units, E: experts, -: stays. Shapes below: N tokens, L layers, K head_dim.
AXES = {
    "q_norm.weight": "-", "k_norm.weight": "-", "norm.weight": "D", "norm.bias": "D",
    "embeddings.weight": "-D", "output.weight": "-D",
    "wq.weight": "QD", "wk.weight": "GD", "wv.weight": "GD", "wo.weight": "DQ",
    "wq.bias": "Q", "wk.bias": "G", "wv.bias": "G", "wo.bias": "D",
    "w1.weight": "HD", "w3.weight": "HD", "w2.weight": "DH", "w1.bias": "H", "w2.bias": "D",
    "router.weight": "ED", "ffn.w1": "EHD", "ffn.w3": "EHD", "ffn.w2": "EDH"}


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
    """The larger, the more is lost without it. Each layer's own, by its number."""

    layers: torch.Tensor                    # (L,)
    dim: torch.Tensor                       # (D,)
    groups: list[torch.Tensor]              # L x (G,), a key/value head with its query heads
    units: dict[str, torch.Tensor]          # name of an FFN -> (H,), of a stack of experts (E, H)
    experts: list[torch.Tensor]             # L x (E,), mean weight of each in the sum; [] if dense
    energy: dict[str, torch.Tensor]         # name of a norm -> (D,), mean square of its input


@torch.no_grad()
def measure(model: Transformer, batches, by: str = "activation", seed: int = 0) -> Importance:
    """The importance of each part.

        layer               1 - cosine of its input and output. Men et al. 2024 (block influence),
                            https://arxiv.org/abs/2403.03853, Eq. 1
        head, FFN unit      mean |activation| times the norm of the column that reads it, as in
                            Sun et al. 2023 (Wanda), https://arxiv.org/abs/2306.11695, Eq. 1
        hidden dimension    sum over the norms of the mean |output|. Minitron, Sec. 2.2
        expert              mean weight over the tokens

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
        elif re.fullmatch(r"layers\.\d+", name):
            def hook(_, args, y):
                add(name, 1 - F.cosine_similarity(args[0].float(), y[0].float(), dim=-1))
        elif name.endswith(".router"):
            def hook(_, args, y):
                gate, chosen = y.float().softmax(dim=-1).topk(model.config.num_experts_per_tok)
                if model.config.norm_topk_prob:
                    gate = gate / gate.sum(dim=-1, keepdim=True)
                add(name, torch.zeros_like(y).scatter(-1, chosen, gate))
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

    def score(name, norm):                  # norm: of the columns of the weight that reads it
        if by == "random":
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            return torch.rand(norm.shape, generator=generator)
        return norm.cpu() if by == "magnitude" else means.get(name, 1.0) * norm.cpu()

    layers, groups, units, experts = [], [], {}, []
    for i, layer in enumerate(model.layers):
        prefix, attention = f"layers.{i}", layer.attention
        whole = torch.cat([weight.flatten() for weight in layer.parameters()]).norm()
        layers.append(score(prefix, torch.ones_like(whole) if by == "activation" else whole))
        columns = score(f"{prefix}.attention.wo", attention.wo.weight.norm(dim=0))          # (H K,)
        groups.append(columns.view(attention.G, -1).sum(dim=-1))
        for name, ffn in layer.named_modules(prefix=prefix):
            if isinstance(ffn, MoEFeedForward):
                experts.append(means[f"{name}.router"])
                units[name] = score(f"{name}.w2", ffn.w2.norm(dim=1))                       # (E, H)
            elif hasattr(ffn, "w2"):
                units[name] = score(f"{name}.w2", ffn.w2.weight.norm(dim=0))                # (H,)
    columns = model.tok_embeddings.weight.norm(dim=0)
    dim = score("dim", torch.ones_like(columns) if by == "activation" else columns)
    energy = {name.removesuffix(" energy"): value for name, value in means.items()
              if name.endswith(" energy")}
    return Importance(torch.stack(layers), dim, groups, units, experts, energy)


def best(scores, n: int):  # (..., M) -> (..., n) places of the n largest, in their old order
    return scores.topk(n, dim=-1).indices.sort(dim=-1).values


def axes_of(name: str) -> str:
    return next(axes for end, axes in AXES.items() if name.endswith(end))


def resized(old: LMConfig, sizes: dict) -> LMConfig:
    per_group = old.n_heads // old.n_kv_heads
    new = vars(old) | {name: size for name, size in sizes.items() if size is not None}
    for name, size in sizes.items():
        if new[name] > getattr(old, name):
            raise ValueError(f"{name}={size} exceeds the model's {getattr(old, name)}")
    if new["n_heads"] % per_group:
        raise ValueError(f"n_heads={new['n_heads']}: {per_group} query heads share a key/value "
                         f"head, so only a multiple of {per_group} can stay")
    new["n_kv_heads"] = new["n_heads"] // per_group
    new["num_experts_per_tok"] = min(old.num_experts_per_tok, new["n_routed_experts"])
    return LMConfig(**new)


@torch.no_grad()
def prune(model: Transformer, importance: Importance, **sizes) -> Transformer:
    """A new model of the given sizes of LMConfig: n_layers, n_heads, hidden_dim, dim and
    n_routed_experts; those that are not given stay. Each layer keeps its own heads and units. Heads
    leave in groups, with their key/value head. Raises ValueError for sizes that do not fit."""
    old, new = model.config, resized(model.config, sizes)
    per_group = old.n_heads // old.n_kv_heads
    layers = best(importance.layers, new.n_layers).tolist()
    new.nope_layers = old.with_layers(layers).nope_layers
    dim, place = best(importance.dim, new.dim), {layer: i for i, layer in enumerate(layers)}

    state = {}
    for name, weight in model.state_dict().items():
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if layer not in (None, *place):
            continue
        axes, ffn = axes_of(name), name.partition(".ffn.")[0] + ".ffn"
        for axis, letter in enumerate(axes):
            if letter == "D":
                kept = dim
            elif letter in "QG":
                groups, K = best(importance.groups[layer], new.n_kv_heads), old.head_dim
                K *= per_group if letter == "Q" else 1
                kept = (groups[:, None] * K + torch.arange(K)).flatten()
            elif letter == "E":
                kept = best(importance.experts[layer], new.n_routed_experts)
            elif letter == "H" and len(axes) == 3:
                experts = best(importance.experts[layer], new.n_routed_experts)
                kept = best(importance.units[ffn][experts], new.hidden_dim)         # (E', H')
                other = 3 - axis
                shape = [*kept.shape]
                shape.insert(other, weight.shape[other])
                weight = weight.gather(axis, kept.unsqueeze(other).expand(shape).to(weight.device))
                continue
            elif letter == "H":
                shared = ".shared." in name
                n = new.hidden_dim * (old.n_shared_experts if shared else 1)
                kept = best(importance.units[f"{ffn}.shared" if shared else ffn], n)
            else:
                continue
            weight = weight.index_select(axis, kept.to(weight.device))
        if name.endswith("norm.weight") and axes == "D":
            # A norm divides by the root mean square of what is left, which is another one.
            energy = importance.energy[name.removesuffix(".weight")]
            weight = weight * (energy[dim].mean() / energy.mean()).sqrt()
        if layer is not None:
            name = name.replace(f"layers.{layer}.", f"layers.{place[layer]}.", 1)
        state[name] = weight
    smaller = type(model)(new)
    smaller.load_state_dict(state)
    smaller.n_tokens = model.n_tokens
    return smaller.eval()


@torch.no_grad()
def dense(model: Transformer, importance: Importance) -> Transformer:
    """A model without experts: each FFN has the units of the shared expert and of all others, whose
    outputs are scaled by the expert's mean weight. Measure it anew, and prune its units."""
    old = model.config
    n = old.n_shared_experts + old.n_routed_experts
    bigger = type(model)(LMConfig(**vars(old) | {"use_moe": False,
                                                 "hidden_dim": n * old.hidden_dim}))
    state = {name: weight for name, weight in model.state_dict().items() if ".ffn." not in name}
    for i, (layer, used) in enumerate(zip(model.layers, importance.experts)):
        ffn, shared = layer.ffn, layer.ffn.shared
        parts = {"w1": [*ffn.w1], "w3": [*ffn.w3], "w2": [*ffn.w2 * used[:, None, None].to(ffn.w2)]}
        for name, weights in parts.items():
            weights += [getattr(shared, name).weight] if shared else []
            state[f"layers.{i}.ffn.{name}.weight"] = torch.cat(weights, dim=int(name == "w2"))
    bigger.load_state_dict(state)
    bigger.n_tokens = model.n_tokens
    return bigger.eval()


def n_parameters(model: Transformer, **sizes) -> int:
    """Of the pruned model, before it is made."""
    old, new = model.config, resized(model.config, sizes)
    ratio = {"D": (new.dim, old.dim), "H": (new.hidden_dim, old.hidden_dim),
             "Q": (new.n_heads, old.n_heads), "G": (new.n_heads, old.n_heads),
             "E": (new.n_routed_experts, old.n_routed_experts), "-": (1, 1)}
    total = 0
    for name, weight in model.named_parameters():
        n = weight.numel()
        for letter in axes_of(name):
            n = n * ratio[letter][0] // ratio[letter][1]
        total += n * new.n_layers / old.n_layers if name.startswith("layers.") else n
    return round(total)


def sizes_for(model: Transformer, target: float) -> dict:
    """n_layers and hidden_dim at which at most a share `target` of the parameters is left, and
    nearly as many. Of these sizes the ones that cut both by the most similar factors. Raises
    ValueError if the target is too little for one layer."""
    config, full, fitting = model.config, n_parameters(model), []
    for n_layers in range(1, config.n_layers + 1):
        for hidden_dim in (*range(32, config.hidden_dim, 32), config.hidden_dim):
            sizes = {"n_layers": n_layers, "hidden_dim": hidden_dim}
            n = n_parameters(model, **sizes)
            if n <= target * full:
                balance = abs(n_layers / config.n_layers - hidden_dim / config.hidden_dim)
                fitting.append((n, balance, sizes))
    if not fitting:
        raise ValueError(f"--target {target:g} is less than one layer: embedding and head have "
                         f"{model.tok_embeddings.weight.numel() / full:.0%}; give --dim")
    most = max(n for n, _, _ in fitting)
    return min((balance, -n, sizes) for n, balance, sizes in fitting if n > 0.95 * most)[2]
