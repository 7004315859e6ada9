"""
模型的全部尺寸，写在一处。
All sizes of a model in one place. A checkpoint has them as JSON beside the weights.
"""

import dataclasses
from dataclasses import dataclass

import torch.nn.functional as F

# Of the FFN; add your own. relu2: So et al. 2021 (Primer), https://arxiv.org/abs/2109.08668, Sec. 3
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda x: F.relu(x).square()}


@dataclass
class LMConfig:
    """Sizes of the decoder in model/transformer.py.

        LMConfig(dim=512, n_layers=8)     the base student: 26 M parameters at vocab_size 6,400
        LMConfig(dim=768, n_layers=16)    its teacher: 109 M
        LMConfig(dim=64, n_layers=2)      a student that trains on a laptop in a minute

    None means computed from the others. Raises ValueError when the sizes do not fit together.
    """

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    architecture: str = "llama"         # also Qwen's and MiniMind's; "gpt2": model/gpt2.py
    n_kv_heads: int | None = None       # None: n_heads / 2; below n_heads: grouped-query attention
    head_dim: int | None = None         # None: dim / n_heads; Qwen3 chooses it independently of dim
    hidden_dim: int | None = None       # None: 8/3 dim; 3 matrices then equal GPT-2's 2 of 4 dim
    activation: str = "silu"            # of the FFN, one of ACTIVATIONS; GPT-2 has its own
    vocab_size: int = 6400
    max_seq_len: int = 512              # tokens; longer samples are cut, longer prompts refused
    rope_theta: float = 10000.0         # Llama 1 and 2: 1e4, Qwen: 1e6; larger for longer contexts
    rope_scaling: dict | None = None    # longer contexts: see scale_frequencies (transformer.py)
    rotary_dim: int | None = None       # None: head_dim; Phi-4-mini rotates 3/4 of each head
    nope_layers: list[int] = ()         # layers without RoPE: every fourth of SmolLM3
    norm_eps: float = 1e-5
    tie_embeddings: bool = True         # embedding and head share a matrix; large models untie it
    qk_norm: bool = False               # Qwen3
    attention_bias: bool = False        # Qwen2
    dropout: float = 0.0
    quantization: str | None = None     # int8 to int2, for inference only (model/quantize.py)

    # Mixture of experts instead of the FFN, with MiniMind's names.
    use_moe: bool = False
    n_routed_experts: int = 4
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1           # experts that process every token
    norm_topk_prob: bool = True         # scale the weights of the chosen experts to sum to 1
    aux_loss_alpha: float = 0.01        # weight of the balance loss

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim",
                     "vocab_size", "max_seq_len", "rotary_dim", "n_routed_experts",
                     "num_experts_per_tok"):
            value, largest = getattr(self, name), 1 << (12 if name == "n_layers" else 24)
            is_size = type(value) is int and 1 <= value <= largest
            if value != getattr(LMConfig, name) and not is_size:        # the default may be None
                raise ValueError(f"{name}={value} must be an integer of 1 to {largest:,}")
        for name, value in {**vars(self), **(self.rope_scaling or {})}.items():
            is_number = isinstance(value, float | int) and 0 <= value < 1e30     # NaN is none
            if isinstance(getattr(LMConfig, name, 0.0), float | int) and not is_number:
                raise ValueError(f"{name}={value} must be a number of 0 or more")
        if self.architecture not in ("llama", "gpt2"):
            raise ValueError(f"architecture={self.architecture!r} is not llama or gpt2")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} is none of {', '.join(ACTIVATIONS)}")
        if self.architecture == "gpt2":
            self.n_kv_heads, self.hidden_dim = self.n_heads, self.hidden_dim or 4 * self.dim
            self.attention_bias = True
        if self.head_dim is None:
            if self.dim % self.n_heads:
                fits = [n for n in range(1, self.dim + 1) if self.dim % n == 0]
                nearest = min(fits, key=lambda n: abs(n - self.n_heads))
                raise ValueError(f"dim={self.dim} does not split into n_heads={self.n_heads} equal "
                                 f"heads; try n_heads={nearest}, or set head_dim")
            self.head_dim = self.dim // self.n_heads
        self.rotary_dim = self.rotary_dim or self.head_dim
        for name in ("head_dim", "rotary_dim"):
            if (size := getattr(self, name)) % 2:
                raise ValueError(f"{name}={size} is odd, but RoPE rotates pairs")
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} exceeds head_dim={self.head_dim}")
        self.nope_layers = [*self.nope_layers]
        self.n_kv_heads = self.n_kv_heads or max(1, self.n_heads // 2)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is no multiple of "
                             f"n_kv_heads={self.n_kv_heads}")
        self.hidden_dim = self.hidden_dim or -(-8 * self.dim // 3 // 32) * 32   # a multiple of 32
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds "
                             f"n_routed_experts={self.n_routed_experts}")

    def with_layers(self, layers: list[int]) -> "LMConfig":
        """The sizes of a model that has these layers only, in this order."""
        without = [new for new, old in enumerate(layers) if old in self.nope_layers]
        return dataclasses.replace(self, n_layers=len(layers), nope_layers=without)

    @property
    def moe_path(self) -> str:
        """Marks a mixture of experts in a weight file's name: full_sft_512_moe.pth."""
        return "_moe" if self.use_moe else ""

    def __str__(self):
        experts = f", {self.n_routed_experts} experts" if self.use_moe else ""
        activation = f", {self.activation}" if self.activation != "silu" else ""
        quantization = f", {self.quantization}" if self.quantization else ""
        return f"{self.dim} x {self.n_layers}{experts}{activation}{quantization}"

    @classmethod
    def from_dict(cls, values: dict) -> "LMConfig":
        """Raises ValueError for an unknown name."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown model sizes {sorted(unknown)}")
        return cls(**values)
