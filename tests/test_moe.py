"""
混合专家的规律：与逐词元的朴素循环相同；用得均匀时平衡损失为 1。
Laws of model/moe.py: it equals a plain loop over tokens, and the balance loss is 1 when use is even.
"""

import pytest
import torch
import torch.nn.functional as F

from model import moe
from model.config import LMConfig
from model.moe import MoEFeedForward, balance_loss
from model.quantize import Int8
from model.transformer import Transformer


def experts(E, A, n_shared_experts=0, norm_topk_prob=True, seed=0, hidden_dim=12):
    ffn = MoEFeedForward(LMConfig(
        dim=8, n_heads=2, hidden_dim=hidden_dim, use_moe=True, n_routed_experts=E, num_experts_per_tok=A,
        n_shared_experts=n_shared_experts, norm_topk_prob=norm_topk_prob))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in ffn.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return ffn


def one_sample(n):
    return torch.zeros(n, dtype=torch.long), 1


@pytest.fixture
def x():
    return torch.randn(10, 8, generator=torch.Generator().manual_seed(1))


def by_hand(w1, w2, w3, token):
    return w2 @ (F.silu(w1 @ token) * (w3 @ token))


@pytest.mark.parametrize("E, A, n_shared, norm", [(4, 2, 1, True), (4, 2, 0, False), (3, 1, 2, True), (4, 4, 0, True)])
def test_sorting_by_expert_equals_a_plain_loop_over_tokens(x, E, A, n_shared, norm):
    ffn = experts(E, A, n_shared, norm)
    y = []
    for token in x:
        score = (ffn.router.weight @ token).softmax(dim=0).tolist()
        chosen = sorted(range(E), key=lambda e: -score[e])[:A]
        total = sum(score[e] for e in chosen) if norm else 1.0
        y.append(sum(score[e] / total * by_hand(ffn.w1[e], ffn.w2[e], ffn.w3[e], token) for e in chosen))
        if n_shared:
            y[-1] = y[-1] + by_hand(ffn.shared.w1.weight, ffn.shared.w2.weight, ffn.shared.w3.weight, token)
    assert torch.allclose(ffn(x, *one_sample(10))[0], torch.stack(y), atol=1e-5)


@pytest.mark.parametrize("name, act", [("gelu", F.gelu), ("relu2", lambda x: x.clamp(min=0) ** 2)])
def test_the_activation_is_that_of_the_config_in_every_ffn(x, name, act):
    """A dense FFN; one expert beside a shared one, to which every token goes with weight 1."""
    def by_itself(w1, w2, w3):
        return (act(x @ w1.T) * (x @ w3.T)) @ w2.T

    sizes = dict(dim=8, n_heads=2, hidden_dim=16, activation=name)
    dense = Transformer(LMConfig(n_layers=1, **sizes)).layers[0].ffn
    assert torch.allclose(dense(x), by_itself(dense.w1.weight, dense.w2.weight, dense.w3.weight), atol=1e-6)
    ffn = experts(E=1, A=1, n_shared_experts=1, hidden_dim=16)
    shared = MoEFeedForward(LMConfig(use_moe=True, n_routed_experts=1, num_experts_per_tok=1, **sizes))
    shared.load_state_dict(ffn.state_dict())
    routed = by_itself(ffn.w1[0], ffn.w2[0], ffn.w3[0])
    beside = by_itself(ffn.shared.w1.weight, ffn.shared.w2.weight, ffn.shared.w3.weight)
    assert torch.allclose(shared(x, *one_sample(10))[0], routed + beside, atol=1e-5)


def test_all_experts_in_one_product_of_a_gpu_are_as_one_after_the_other(x, monkeypatch):
    """A GPU's way, which torch also goes on a CPU. Of five experts the last gets no token."""
    ffn = experts(E=5, A=2, n_shared_experts=1)
    with torch.no_grad():
        ffn.router.weight[4] = -ffn.router.weight[:4].sum(dim=0) - 100 * x.sum(dim=0)
    assert (x @ ffn.router.weight[4] < (x @ ffn.router.weight[:4].T).min(dim=1).values).sum() >= 5
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(moe, "has_grouped_products", lambda device, dtype, w1: grouped)
        y, balance = ffn(x, *one_sample(10))
        ffn.zero_grad()
        (y.square().sum() + balance).backward()
        found.append([y.detach()] + [weight.grad.clone() for weight in ffn.parameters()])
    for one_by_one, at_once in zip(*found):
        assert torch.allclose(at_once, one_by_one, rtol=1e-4, atol=1e-4)


def test_a_group_of_no_rows_changes_nothing_and_is_never_given_to_the_kernel(monkeypatch):
    product, given = F.grouped_mm, []
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: given.append((len(x), offs.tolist())) or product(x, w, offs=offs))
    generator = torch.Generator().manual_seed(0)
    x, w1, w3 = (torch.randn(*size, generator=generator) for size in ((3, 8), (4, 16, 8), (4, 16, 8)))
    w2, ends = torch.randn(4, 8, 16, generator=generator), torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    by_itself = torch.stack([by_hand(w1[e], w2[e], w3[e], token) for e, token in zip((1, 1, 3), x)])
    assert torch.allclose(moe.grouped_experts(x, ends, w1, w2, w3), by_itself, atol=1e-5)
    assert torch.allclose(moe.experts(x, ends, w1, w2, w3), by_itself, atol=1e-5)
    assert given == [(7, [1, 4, 5, 7])] * 3                             # a row of zeros for each of the four


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_under_autocast_all_experts_in_one_product_run_in_its_type(x, monkeypatch):
    ffn, seen = experts(E=4, A=2, hidden_dim=16), []
    monkeypatch.setattr(moe, "has_grouped_products", lambda device, dtype, w1: seen.append(dtype) or len(seen) > 1)
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one, at_once = (ffn(x, *one_sample(10))[0] for _ in range(2))
    assert seen == [torch.bfloat16] * 2 and at_once.dtype == one_by_one.dtype == torch.bfloat16
    assert torch.allclose(at_once, one_by_one, rtol=2 ** -6, atol=2 ** -6 * one_by_one.abs().max().item())


def test_one_product_for_all_is_for_bf16_on_a_gpu():
    for device, dtype, hidden_dim, dim, is_supported in (
            ("cuda", torch.bfloat16, 16, 8, True), ("cuda", torch.float32, 16, 8, False),
            ("cpu", torch.bfloat16, 16, 8, False), ("cuda", torch.bfloat16, 12, 8, False),
            ("cuda", torch.bfloat16, 16, 4, False)):
        stack = torch.empty(2, hidden_dim, dim)
        assert moe.has_grouped_products(torch.device(device), dtype, stack) == is_supported
        assert not moe.has_grouped_products(torch.device(device), dtype, Int8(stack))


def test_one_expert_is_the_dense_model(tiny):
    dense = tiny()
    one = tiny(use_moe=True, n_routed_experts=1, num_experts_per_tok=1, n_shared_experts=0)
    state = {f"layers.{layer}.ffn.router.weight": torch.ones(1, 16) for layer in (0, 1)}
    for name, weight in dense.state_dict().items():
        if ".ffn.w" in name:
            state[name.removesuffix(".weight")] = weight.unsqueeze(0)       # a stack of one expert
        else:
            state[name] = weight
    one.load_state_dict(state)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9])
    assert torch.allclose(one(tokens, [2, 4]).logits, dense(tokens, [2, 4]).logits, atol=1e-5)


def test_the_chosen_experts_weights_sum_to_one_with_norm_topk_prob(x):
    # All experts are one and the same and the router is undecided: 2 of 4 hold half of the probability.
    for norm, share in ((True, 1.0), (False, 0.5)):
        ffn = experts(E=4, A=2, norm_topk_prob=norm)
        with torch.no_grad():
            ffn.router.weight.zero_()
            for weight in (ffn.w1, ffn.w2, ffn.w3):
                weight.copy_(weight[:1].expand_as(weight))
        alone = torch.stack([by_hand(ffn.w1[0], ffn.w2[0], ffn.w3[0], token) for token in x])
        assert torch.allclose(ffn(x, *one_sample(10))[0], share * alone, atol=1e-5)


# -- the balance loss ------------------------------------------------------------------------------

def test_the_balance_loss_is_1_a_sample_when_use_is_even():
    # 4 experts, 2 a token: tokens 0 and 2 go to experts 0 and 1, tokens 1 and 3 to experts 2 and 3.
    chosen = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])
    scores = torch.tensor([[.5, .5, 0, 0], [0, 0, .5, .5]] * 2)
    assert balance_loss(scores, chosen, *one_sample(4)).item() == pytest.approx(1.0)
    assert balance_loss(scores, chosen, torch.tensor([0, 0, 1, 1]), 2).item() == pytest.approx(2.0)


def test_the_balance_loss_is_E_over_A_when_all_tokens_choose_the_same():
    chosen = torch.tensor([[0, 1]] * 5)
    scores = torch.tensor([[.7, .3, 0, 0]] * 5)
    assert balance_loss(scores, chosen, *one_sample(5)).item() == pytest.approx(4 / 2)


def test_the_balance_loss_of_a_batch_is_the_sum_of_its_samples(tiny):
    model, tokens = tiny(use_moe=True), torch.randint(12, (12,), generator=torch.Generator().manual_seed(0))
    together = model(tokens, [3, 4, 5]).balance_loss
    alone = [model(sample, [len(sample)]).balance_loss for sample in tokens.split([3, 4, 5])]
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    assert model(tokens[:7], [3, 4]).balance_loss.item() == pytest.approx((alone[0] + alone[1]).item(), rel=1e-5)


def test_a_sample_without_tokens_adds_nothing_to_the_balance_loss():
    scores, chosen = torch.tensor([[.5, .5]] * 2), torch.tensor([[0], [1]])
    assert balance_loss(scores, chosen, torch.tensor([1, 1]), 2).item() == pytest.approx(1.0)


def test_the_balance_loss_pushes_the_router_away_from_the_busy_expert():
    logits = torch.tensor([[2.0, 0.0]] * 3, requires_grad=True)
    balance_loss(logits.softmax(dim=-1), torch.tensor([[0]] * 3), *one_sample(3)).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1] < 0).all()


def test_a_dense_model_has_no_balance_loss(tiny):
    assert tiny()(torch.tensor([1, 2, 3]), [3]).balance_loss == 0


# -- gradients -------------------------------------------------------------------------------------

def test_an_expert_with_no_token_has_a_gradient_of_zero(x):
    ffn = experts(E=3, A=1)
    with torch.no_grad():
        ffn.router.weight.copy_(torch.tensor([[1.0], [-1.0], [-2.0]]).expand(3, 8))
    ffn(x.abs(), *one_sample(10))[0].square().sum().backward()          # all go to expert 0
    for weight in (ffn.w1, ffn.w2, ffn.w3):
        assert weight.grad[0].abs().sum() > 0 and weight.grad[1:].abs().sum() == 0


def test_router_experts_and_shared_expert_all_learn():
    torch.manual_seed(0)
    model = Transformer(LMConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=12, use_moe=True))
    out = model(torch.arange(12), [6, 6])
    (out.logits.square().sum() + 0.01 * out.balance_loss).backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
