"""
低秩适配：冻结原有权重，只在每个线性层旁训练两个瘦矩阵；去掉它们，模型就是原来的模型。
Low-rank adaptation: the weights are frozen, and two thin matrices are trained beside each matrix.

    y = x W^T + b  +  alpha / rank * dropout(x) A^T B^T     A (rank, in), B (out, rank), in fp32

B starts at zero: no change at first. SmolLM2-135M at rank 8 trains 2,442,240 of 134,515,008 weights
in 577 MB instead of 2,152, or 365 with frozen layers in bf16. It saves less time (0.42 s for 0.59),
because the gradient still passes through every W.

Hu et al. 2021, https://arxiv.org/abs/2106.09685, Sec. 4.1, adapt wq and wv; all matrices: QLoRA,
Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, Sec. 4.
"""

import torch
import torch.nn.functional as F
from torch import nn

# Not the router, whose choices would jump, and not the embeddings.
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class LoRALinear(nn.Linear):
    """Replaces an nn.Linear and takes over its weight and bias, frozen and under the same names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")    # no memory
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        # The paper leaves A's standard deviation open. With this one A x is as large as x.
        fp32 = dict(dtype=torch.float32, device=linear.weight.device)
        std = linear.in_features ** -0.5
        self.lora_a = nn.Parameter(torch.randn(rank, linear.in_features, **fp32) * std)
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
        """A plain linear with W + alpha / rank * B A, summed in fp32, then rounded once."""
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        change = self.scale * (self.lora_b.float() @ self.lora_a.float())
        linear.weight.copy_(self.weight.float() + change)
        return linear.train(self.training)


def add_lora(model, rank: int, alpha: float | None = None, dropout: float = 0.0,
             targets=TARGETS) -> str:
    """Add adapters to the linears of these names in every layer, in place, and freeze the rest.
    Returns a line for the log.

    alpha       the change is scaled by alpha / rank; None: alpha = rank
    dropout     on the adapters' inputs in training
    targets     a subset of TARGETS; all seven mean as many as the model has. Routed experts are no
                linears and stay frozen; a shared expert is adapted

    Raises ValueError, before anything is changed, for what does not fit the model.
    """
    if model.config.quantization:
        raise ValueError(f"the model is {model.config.quantization}: adapt its original")
    linears = {path: module for path, module in model.layers.named_modules()
               if isinstance(module, nn.Linear) and last(path) in TARGETS}
    if any(isinstance(linear, LoRALinear) for linear in linears.values()):
        raise ValueError("the model has adapters already; merge_lora merges them first")
    known = {last(path) for path in linears}
    wanted = known if set(targets) == set(TARGETS) else set(targets)
    if not wanted or wanted - known:
        raise ValueError(f"--lora_targets {' '.join(targets)}: this model has "
                         f"{' '.join(sorted(known))}")

    model.requires_grad_(False)
    linears = {path: linear for path, linear in linears.items() if last(path) in wanted}
    for path, linear in linears.items():
        adapter = LoRALinear(linear, rank, rank if alpha is None else alpha, dropout)
        model.layers.set_submodule(path, adapter)
    n_trained = sum(weight.numel() for weight in lora_state(model).values())
    return (f"adapters beside {len(linears)} matrices, {' '.join(sorted(wanted))}: "
            f"{n_trained:,} of {model.n_parameters():,} weights train")


def last(path: str) -> str:
    """layers.0.attention.wq -> wq"""
    return path.rpartition(".")[2]


def adapters(model) -> dict[str, LoRALinear]:
    """{path: adapter}. Raises ValueError for a model without any."""
    found = {path: module for path, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    if not found:
        raise ValueError("the model has no adapters; add_lora adds them")
    return found


def lora_state(model) -> dict[str, torch.Tensor]:
    """{name: tensor} of the adapters alone, not copied."""
    names = [f"{path}.{name}" for path in adapters(model) for name in ("lora_a", "lora_b")]
    state = model.state_dict()
    return {name: state[name] for name in names}


def load_lora(model, state: dict[str, torch.Tensor]):
    """Copy adapters into a model to which add_lora added those of the same rank, alpha and targets.
    Raises ValueError, before anything is changed, for others."""
    places = lora_state(model)
    shapes, given = ({(name, tensor.shape) for name, tensor in tensors.items()}
                     for tensors in (places, state))
    if shapes != given:
        raise ValueError(f"these adapters are not of this model: {min(shapes ^ given)[0]} is "
                         "missing, unknown or of another shape")
    for name, place in places.items():
        place.copy_(state[name])


def merge_lora(model):
    """Merge the adapters into plain linears, in place. All weights can be trained again."""
    for path, adapter in adapters(model).items():
        model.set_submodule(path, adapter.merged())
    return model.requires_grad_(True)


@torch.no_grad()
def store_frozen(model, dtype):
    """Store the frozen matrices of the layers in the dtype to which autocast rounds them for each
    product: the same result bit by bit, half the memory, no copies. All else stays fp32."""
    for weight in model.layers.parameters():
        if weight.dim() >= 2 and not weight.requires_grad:
            weight.data = weight.to(dtype)


class WithoutAdapters:
    """The model before add_lora, bit by bit, as a teacher of its adapted self; it has no weights of
    its own."""

    def __init__(self, student):
        self.student, self.config = student, student.config
        self.n_tokens = student.n_tokens

    def __call__(self, *args, **kwargs):
        training, switched = self.student.training, adapters(self.student).values()
        self.student.eval()
        for adapter in switched:
            adapter.active = False
        try:
            with torch.no_grad():
                return self.student(*args, **kwargs)
        finally:
            for adapter in switched:
                adapter.active = True
            self.student.train(training)

    @property
    def head(self):  # -> (V, D)
        return self.student.head
