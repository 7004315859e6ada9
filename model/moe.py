"""
混合专家：路由器为每个词元挑选少数几个专家，计算量不变而参数更多。
Mixture of experts: a router sends each token to a few of many FFNs. It adds weights, not compute.

    y(x) = shared(x) + sum over the A chosen experts e of g_e(x) * FFN_e(x),  g = softmax(router(x))

With norm_topk_prob the g of the chosen experts are scaled to sum to 1.
Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; shared experts: DeepSeekMoE,
https://arxiv.org/abs/2401.06066.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ACTIVATIONS, LMConfig


def swiglu(x, w1, w2, w3, act=F.silu):  # (n, D), (F, D), (D, F), (F, D) -> (n, D)
    """w2(act(w1 x) * w3 x): Shazeer 2020, https://arxiv.org/abs/2002.05202, Eq. 6."""
    return F.linear(act(F.linear(x, w1)) * F.linear(x, w3), w2)


def experts(x, ends, w1, w2, w3, act=F.silu):  # (n, D), (E,), (E, F, D), ... -> (n, D)
    """The rows of x are sorted by expert; those of expert e end at ends[e]. One SwiGLU per expert,
    or one for all on a GPU in bf16. w1, w2, w3: (E, F, D), (E, D, F), (E, F, D)"""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if has_grouped_products(x.device, dtype, w1):
        return grouped_experts(x.to(dtype), ends, *(w.to(dtype) for w in (w1, w2, w3)), act)
    parts = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    # unbind, not w[e], whose backward pass would write a whole stack of zeros per expert.
    each = zip(parts, w1.unbind(), w2.unbind(), w3.unbind())
    return torch.cat([swiglu(*one, act) for one in each])


def grouped_experts(x, ends, w1, w2, w3, act=F.silu):  # as `experts`
    """One grouped product for all experts. The numbers of tokens stay on the GPU: if Python read
    them, it would wait for all queued work."""
    n, E = len(x), len(ends)
    # Each expert also gets a row of zeros. For one without rows some GPUs return uninitialised
    # memory as its gradient (https://github.com/pytorch/pytorch/issues/172439) or hang
    # (https://github.com/pytorch/pytorch/issues/152668).
    rows = torch.arange(n, device=x.device)
    place = rows + torch.searchsorted(ends, rows, right=True)           # (n,), after earlier zeros
    x = x.new_zeros(n + E, x.shape[1]).index_copy(0, place, x)              # (n + E, D)
    ends = ends + torch.arange(1, E + 1, device=x.device, dtype=ends.dtype)
    w1, w2, w3 = (w.transpose(1, 2) for w in (w1, w2, w3))
    inner = act(F.grouped_mm(x, w1, offs=ends)) * F.grouped_mm(x, w3, offs=ends)    # (n + E, F)
    return F.grouped_mm(inner, w2, offs=ends)[place]


def has_grouped_products(device, dtype, w1) -> bool:
    """Needs rows of a multiple of 16 bytes, and experts that are not quantised."""
    return (device.type == "cuda" and dtype == torch.bfloat16 and isinstance(w1, torch.Tensor)
            and w1.shape[1] % 8 == w1.shape[2] % 8 == 0)


class FeedForward(nn.Module):
    """One SwiGLU network: the FFN of a dense layer, and the shared expert."""

    def __init__(self, dim: int, hidden_dim: int, activation: str = "silu"):
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):  # (N, D) -> (N, D)
        return self.w2(self.act(self.w1(x)) * self.w3(x))   # swiglu, but these may be quantised


class MoEFeedForward(nn.Module):
    """Routed experts, whose weights are stacked in three tensors, and one wide shared FFN."""

    def __init__(self, config: LMConfig):
        super().__init__()
        E, D, H = config.n_routed_experts, config.dim, config.hidden_dim
        self.config = config
        self.router = nn.Linear(D, E, bias=False)
        self.w1 = nn.Parameter(torch.empty(E, H, D))
        self.w2 = nn.Parameter(torch.empty(E, D, H))
        self.w3 = nn.Parameter(torch.empty(E, H, D))
        self.shared = None
        if config.n_shared_experts > 0:
            self.shared = FeedForward(D, H * config.n_shared_experts, config.activation)

    def stacks(self):  # -> (E, H, D), (E, D, H), (E, H, D); model/qat.py rounds them
        return self.w1, self.w2, self.w3

    def forward(self, x, sample, n_samples: int):  # (N, D), (N,) -> (N, D), () balance loss
        """sample: the index of each token's sample."""
        N, D = x.shape
        E, A = self.config.n_routed_experts, self.config.num_experts_per_tok
        scores = self.router(x).float().softmax(dim=-1)                     # (N, E)
        gate, chosen = scores.topk(A, dim=-1)                               # (N, A)
        if self.config.norm_topk_prob:
            gate = gate / gate.sum(dim=-1, keepdim=True)

        # Sorting by expert makes each expert's tokens consecutive: one matrix product per expert.
        expert, order = chosen.flatten().sort(stable=True)                  # (N * A,) twice
        experts_here = torch.arange(E, device=x.device)
        ends = torch.searchsorted(expert, experts_here, right=True, out_int32=True)         # (E,)
        y = experts(x[order // A], ends, *self.stacks(), ACTIVATIONS[self.config.activation])
        y = y[order.argsort()].view(N, A, D)                            # in the tokens' order again
        y = (y * gate.to(y.dtype).unsqueeze(-1)).sum(dim=1)                 # (N, D)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, balance_loss(scores, chosen, sample, n_samples)


def balance_loss(scores, chosen, sample, n_samples: int):  # (N, E), (N, A), (N,) -> ()
    """How unevenly the experts are used within each sample, summed over samples.

        sum over samples of  sum_e f_e * P_e
        f_e = E/A * fraction of tokens that chose e,  P_e = mean score of e

    It is 1 per sample for even use, and at most E/A. Sequence-wise as in DeepSeek-V2,
    https://arxiv.org/abs/2405.04434, Eq. 23-25: a sum over samples, so that splitting a batch
    changes nothing, unlike Switch's batch-wise form, https://arxiv.org/abs/2101.03961, Eq. 4.
    """
    E, A = scores.shape[-1], chosen.shape[-1]
    picks = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    zeros = scores.new_zeros(n_samples, E)
    sizes = zeros.index_add(0, sample, torch.ones_like(scores))             # tokens per sample
    sizes = sizes.clamp(min=1)                                              # 0 / 0 would be NaN
    f = zeros.index_add(0, sample, picks) / sizes * (E / A)                 # (samples, E)
    P = zeros.index_add(0, sample, scores) / sizes
    return (f * P).sum()
