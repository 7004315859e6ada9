"""
低秩适配：冻结原有权重，只在每个线性层旁训练两个瘦矩阵；去掉它们，模型就是原来的模型。
Low-rank adaptation: the weights stay as they are, and beside each matrix two thin ones are trained. Without them the
model is the one it was.

    y = x W^T + b  +  alpha / rank * dropout(x) A^T B^T         A (rank, in), B (out, rank), in fp32

    x ---- W, b ----------------------- + -- y      frozen
      \\                                 /
       ---- A ---- alpha / rank ---- B --           trained; B begins at zero, so that at the start nothing changes

What is gained is memory. AdamW keeps 16 bytes for each weight that trains (itself, its gradient, two moments) and 4 for
one that does not. SmolLM2-135M, 30 layers of seven matrices, at rank 8, without the activations:

                    weights that train                                                      MB
    all of it       134,515,008                                                             2,152
    adapters        8 * 30 * (2 (576 + 576) + 2 (576 + 192) + 3 (576 + 1536)) = 2,442,240   577
    the same, frozen matrices of the layers in bf16 (--dtype bfloat16, the default)                         365

Time, less so: the gradient still travels through every W to the adapters below, but W's own is not worked out. Four
such layers and 512 tokens take 0.42 s forward and back in place of 0.59 (one core, without the head).

A teacher that is the model as it was before training costs nothing: the same weights, called without_lora.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, Sec. 4.1. They adapt wq and wv; that all matrices together reach what
training everything does is from QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, Sec. 4.
"""

from collections import Counter
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")    # not the router, whose choice would jump; not the words


class LoRALinear(nn.Linear):
    """Stands in for an nn.Linear, whose weight and bias it takes over with their names, frozen."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")    # draws nothing, takes no memory
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        # The paper draws A from a Gaussian without saying how wide. With this A x is as large as x.
        fp32 = dict(dtype=torch.float32, device=linear.weight.device)
        self.lora_a = nn.Parameter(torch.randn(rank, linear.in_features, **fp32) * linear.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **fp32))
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.active = True
        self.train(linear.training)

    def forward(self, x):  # (N, in) -> (N, out)
        y = F.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        low = F.linear(self.dropout(x), self.lora_a.to(x.dtype)) * self.scale       # (N, rank)
        return y + F.linear(low, self.lora_b.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain linear on the same weight and bias: W + alpha / rank * B A, summed in fp32, then rounded once."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        linear.weight.copy_(self.weight.float() + self.scale * (self.lora_b.float() @ self.lora_a.float()))
        return linear.train(self.training)


class Adapted(NamedTuple):
    """What add_lora did, to be printed."""

    linears: dict[str, int]     # how many by name: {"wq": 2, "wk": 2, ...}
    n_trained: int              # weights that train, which are the adapters
    n_weights: int              # of how many, the adapters among them

    def __str__(self):
        names = ", ".join(f"{n} {name}" for name, n in self.linears.items())
        return f"adapters beside {names}: {self.n_trained:,} of {self.n_weights:,} weights train"


def add_lora(model, rank: int, alpha: float | None = None, dropout: float = 0.0, targets=TARGETS) -> Adapted:
    """Put adapters beside the linears of these names in every layer, in place, and freeze everything else.

    rank        of each adapter's change to its matrix, from 1 to the smaller side of the smallest one
    alpha       the change is scaled by alpha / rank. None: alpha = rank. Kept when the rank is varied, it spares the
                search for another learning rate (Sec. 4.1)
    dropout     share of an adapter's inputs set to zero in training, in [0, 1)
    targets     some of TARGETS. All seven, the default, are as many of them as the model has: GPT-2 has no w3. The
                routed experts of a mixture are no linears and stay frozen; a shared expert is adapted

    Raises ValueError, before anything is changed, for a number out of its range, a target that no layer has, a model
    with adapters, and a quantised one.
    """
    if model.config.quantization:
        raise ValueError(f"the model is {model.config.quantization}, whose integers take no merged adapter; "
                         "adapt the weights it was made from, and quantise what comes out")
    linears = {f"layers.{path}": module for path, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    if any(isinstance(linear, LoRALinear) for linear in linears.values()):
        raise ValueError("the model has adapters already; merge_lora folds them in, and then it takes new ones")
    known = [name for name in TARGETS if name in map(last, linears)]
    wanted = known if set(targets) == set(TARGETS) else list(targets)
    unknown = [str(name) for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"no layer has a linear {' or '.join(unknown) or 'to adapt'}; this model has {', '.join(known)}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout} must lie in [0, 1)")
    if alpha is not None and not alpha > 0:
        raise ValueError(f"alpha {alpha} must be more than 0, or the adapters never have a say")
    linears = {path: linear for path, linear in linears.items() if last(path) in wanted}
    smallest = min(linears, key=lambda path: min(linears[path].weight.shape))
    out_features, in_features = linears[smallest].weight.shape
    if not 1 <= rank <= min(out_features, in_features):
        raise ValueError(f"rank {rank} must lie between 1 and {min(out_features, in_features)}, the smaller side of "
                         f"{smallest} ({out_features} x {in_features})")

    model.requires_grad_(False)
    for path, linear in linears.items():
        model.set_submodule(path, LoRALinear(linear, rank, rank if alpha is None else alpha, dropout))
    n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return Adapted(dict(Counter(map(last, linears))), n_trained, model.n_parameters())


def last(path: str) -> str:
    """layers.0.attention.wq -> wq"""
    return path.rpartition(".")[2]


def adapters(model) -> dict[str, LoRALinear]:
    """{path: adapter}. Raises ValueError for a model without any."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("the model has no adapters; add_lora puts them in")
    return found


def lora_state(model) -> dict[str, torch.Tensor]:
    """{name: tensor} of the adapters alone, not copied, as in state_dict(). The rank is seen in the shapes; alpha is
    not, and belongs beside them."""
    names = [f"{path}.{name}" for path in adapters(model) for name in ("lora_a", "lora_b")]
    state = model.state_dict()
    return {name: state[name] for name in names}


def load_lora(model, state: dict[str, torch.Tensor]):
    """Copy adapters into a model that has the same ones, made by add_lora with the rank, alpha and targets of old.

    Raises ValueError, before anything is changed, that names what is missing, has no place, or has another shape.
    """
    places = lora_state(model)
    missing = [name for name in places if name not in state]
    extra = [name for name in state if name not in places]
    other = [f"{name} {tuple(state[name].shape)} in place of {tuple(place.shape)}"
             for name, place in places.items() if name in state and state[name].shape != place.shape]
    wrong = [f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
             for what, names in (("missing", missing), ("no place for", extra), ("of another shape", other)) if names]
    if wrong:
        raise ValueError(f"these adapters are not of this model. {'; '.join(wrong)}. "
                         "Rank and targets must be those they were trained with")
    for name, place in places.items():
        place.copy_(state[name])


def merge_lora(model):
    """The same model, in place, its adapters folded into plain linears; all of its weights can train again."""
    for path, adapter in adapters(model).items():
        model.set_submodule(path, adapter.merged())
    return model.requires_grad_(True)


@torch.no_grad()
def store_frozen(model, dtype):
    """Keep the matrices of the layers that do not train in the type of the products, to which autocast rounds them at each:
    the same to the last bit, in half the memory, and without the copies. What is summed or looked up stays fp32."""
    for weight in model.layers.parameters():
        if weight.dim() >= 2 and not weight.requires_grad:
            weight.data = weight.to(dtype)


@contextmanager
def without_lora(model):
    """Within, the model computes what it did before add_lora, to the last bit: a teacher without weights of its own.

        with torch.no_grad(), without_lora(model):
            taught = model(tokens, lengths)

    In train mode the model's own dropout stays on, as it would in the model before.
    """
    switched = [adapter for adapter in adapters(model).values() if adapter.active]      # none, if within another
    for adapter in switched:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in switched:
            adapter.active = True


class WithoutAdapters:
    """The model as it was before add_lora, as a teacher of its adapted self: it needs no weights of its own. With
    privileged context in its prompt it knows more than the student."""

    def __init__(self, student):
        self.student, self.config = student, student.config

    def __call__(self, *args, **kwargs):
        training = self.student.training
        self.student.eval()
        with torch.no_grad(), without_lora(self.student):
            out = self.student(*args, **kwargs)
        self.student.train(training)
        return out

    @property
    def head(self):  # -> (V, D)
        return self.student.head
