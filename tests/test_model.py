"""
模型的规律：看不见未来，样本互不相扰，打包与否结果相同。
Laws of model/transformer.py and model/config.py: no token sees the future, no sample sees another,
and a packed stream gives what each sample gives alone.
"""

import dataclasses
import inspect
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from torch.nn.attention import varlen

from model import moe, transformer
from model.config import LMConfig
from model.transformer import Transformer, has_varlen, rotate

VARIANTS = {
    "plain": {},
    "one key/value head": {"n_kv_heads": 1},
    "as many key/value heads": {"n_kv_heads": 4},
    "head_dim apart from dim": {"head_dim": 6},
    "untied": {"tie_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "attention_bias": {"attention_bias": True},
    "experts": {"use_moe": True},
}
every_variant = pytest.mark.parametrize("sizes", VARIANTS.values(), ids=VARIANTS)
dense_and_experts = pytest.mark.parametrize("sizes", [{}, {"use_moe": True}], ids=["dense", "experts"])

LENGTHS = [3, 5, 5, 2]          # neighbours of one length share an attention call; the others do not


def draw(n, seed=0, vocab_size=12):
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=1e-5):
    return torch.allclose(a, b, rtol=1e-4, atol=atol)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


# -- who sees whom ---------------------------------------------------------------------------------

@every_variant
def test_a_future_token_never_changes_the_past_and_always_the_present(tiny, sizes):
    model, tokens = tiny(**sizes), draw(6)
    changed = tokens.clone()
    changed[3] = (tokens[3] + 1) % 12
    before, after = model(tokens, [6]).logits, model(changed, [6]).logits
    assert close(before[:3], after[:3])
    assert not any(close(before[t], after[t]) for t in range(3, 6))


@every_variant
def test_a_packed_sample_has_the_logits_it_has_alone(tiny, sizes):
    model, tokens = tiny(**sizes), draw(sum(LENGTHS))
    alone = [model(sample, [len(sample)]).logits for sample in tokens.split(LENGTHS)]
    assert close(model(tokens, LENGTHS).logits, torch.cat(alone))


@dense_and_experts
def test_packed_samples_have_the_gradient_they_have_alone(tiny, sizes):
    model, tokens = tiny(**sizes), draw(sum(LENGTHS))
    packed = gradients(model, model(tokens, LENGTHS).logits.square().sum())
    alone = gradients(model, sum(model(sample, [len(sample)]).logits.square().sum()
                                 for sample in tokens.split(LENGTHS)))
    for a, b in zip(packed, alone):
        assert close(a, b, atol=1e-4 * b.abs().max().item())


def test_the_order_of_samples_does_not_matter(tiny):
    model, samples = tiny(), draw(sum(LENGTHS)).split(LENGTHS)
    logits = model(torch.cat(samples), LENGTHS).logits.split(LENGTHS)
    order = [1, 3, 0, 2]
    shuffled = model(torch.cat([samples[i] for i in order]), [LENGTHS[i] for i in order]).logits
    assert close(shuffled, torch.cat([logits[i] for i in order]))


@dense_and_experts
def test_a_sample_never_changes_another(tiny, sizes):
    model, tokens = tiny(**sizes), draw(sum(LENGTHS))
    changed = tokens.clone()
    changed[3:8] = (tokens[3:8] + 1) % 12                       # all of the second sample
    before, after = (model(t, LENGTHS).logits.split(LENGTHS) for t in (tokens, changed))
    assert [close(a, b) for a, b in zip(before, after)] == [True, False, True, True]


@dense_and_experts
def test_the_loss_of_a_sample_gives_no_gradient_to_the_embeddings_of_another(tiny, sizes):
    model = tiny(tie_embeddings=False, **sizes)                 # a tied head would give every row a gradient
    model(torch.tensor([0, 1, 2, 3, 6, 7, 8, 9]), [4, 4]).logits[:4].square().sum().backward()
    reached = model.tok_embeddings.weight.grad.abs().sum(dim=1) > 0
    assert reached.tolist() == [True] * 4 + [False] * 8


# -- selected positions ------------------------------------------------------------------------------

@every_variant
def test_at_gives_those_rows_of_the_logits_and_of_the_hidden_states(tiny, sizes):
    model, tokens, at = tiny(**sizes), draw(sum(LENGTHS)), torch.tensor([0, 2, 4, 7, 8, 14])
    full, some = model(tokens, LENGTHS, return_hidden=True), model(tokens, LENGTHS, at=at, return_hidden=True)
    assert some.logits.shape == (6, 12) and len(some.hidden) == 2
    assert close(some.logits, full.logits[at])
    assert all(close(a, b[at]) for a, b in zip(some.hidden, full.hidden))


@dense_and_experts
def test_at_gives_the_gradient_of_indexing_afterwards(tiny, sizes):
    model, tokens, at = tiny(**sizes), draw(sum(LENGTHS)), torch.tensor([0, 2, 4, 7, 8, 14])
    selected = gradients(model, model(tokens, LENGTHS, at=at).logits.square().sum())
    indexed = gradients(model, model(tokens, LENGTHS).logits[at].square().sum())
    for a, b in zip(selected, indexed):
        assert close(a, b, atol=1e-4 * b.abs().max().item())


# -- attention -------------------------------------------------------------------------------------

def test_grouped_query_attention_is_full_attention_with_repeated_key_and_value_heads(tiny):
    grouped, full = tiny(n_kv_heads=2), tiny(n_kv_heads=4)
    state = grouped.state_dict()
    for name, weight in state.items():
        if name.endswith(("wk.weight", "wv.weight")):           # heads 0, 1 -> 0, 0, 1, 1, each of 4 rows
            state[name] = weight.view(2, 4, 16).repeat_interleave(2, dim=0).reshape(16, 16)
    full.load_state_dict(state)
    tokens = draw(sum(LENGTHS))
    assert close(grouped(tokens, LENGTHS).logits, full(tokens, LENGTHS).logits)


def masked_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What torch's varlen_attn says it does, by a mask: (N, H, K), (N, G, K) x 2, and where samples begin and end."""
    assert window_size == (-1, 0) and enable_gqa and cu_seq_q.dtype == torch.int32
    assert max_q == max_k == cu_seq_q.diff().max() and q.dtype == k.dtype == v.dtype
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    places = torch.arange(len(q))
    sample = torch.searchsorted(cu_seq_q, places, right=True)
    seen = (sample[:, None] == torch.searchsorted(cu_seq_k, places, right=True)) & (places[:, None] >= places)
    scores = torch.einsum("ihk,jhk->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhk->ihk", scores.masked_fill(~seen, -math.inf).softmax(dim=-1), v)


@pytest.mark.parametrize("lengths", [LENGTHS, [15], [1, 1, 13]])
@pytest.mark.parametrize("sizes", [{}, {"n_kv_heads": 1}, {"qk_norm": True}], ids=["two heads", "one head", "qk_norm"])
def test_one_kernel_call_for_all_samples_gives_the_same(tiny, sizes, lengths, monkeypatch):
    model, tokens = tiny(**sizes), draw(15)
    here = model(tokens, lengths).logits
    one_by_one = gradients(model, here.square().sum())
    monkeypatch.setattr(transformer, "has_varlen", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(varlen, "varlen_attn", masked_attention)
    there = model(tokens, lengths).logits
    assert close(there, here) and not torch.equal(there, here)          # it was another way
    for a, b in zip(gradients(model, there.square().sum()), one_by_one):
        assert close(a, b, atol=1e-4 * b.abs().max().item())


def test_the_real_kernel_takes_what_is_given_to_it():
    real, ours = (inspect.signature(each).parameters for each in (varlen.varlen_attn, masked_attention))
    assert list(real)[3:7] == list(ours)[3:7]                           # by position: borders, longest
    assert {"window_size", "enable_gqa"} <= {name for name, each in real.items() if each.kind is each.KEYWORD_ONLY}


@dense_and_experts
def test_on_a_gpu_python_never_waits_for_a_value(tiny, sizes, monkeypatch):
    """On meta tensors, which have shapes without values: reading a value is an error. The real kernels of
    attention and experts run, too."""
    monkeypatch.setattr(transformer, "has_varlen", lambda device, dtype, head_dim: True)
    monkeypatch.setattr(moe, "has_grouped_products", lambda device, dtype, w1: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model, tokens, at = tiny(**sizes).bfloat16().to("meta"), draw(15).to("meta"), torch.tensor([0, 4, 14]).to("meta")
    out = model(tokens, LENGTHS, at=at)
    (out.logits.sum() + out.balance_loss).backward()
    assert out.logits.shape == (3, 12) and all(weight.grad.shape == weight.shape for weight in model.parameters())

    monkeypatch.setattr(moe, "has_grouped_products", lambda device, dtype, w1: False)
    with pytest.raises(RuntimeError) if sizes else nullcontext():       # the loop over experts reads how many tokens each has
        model(tokens, LENGTHS)


@pytest.mark.parametrize("dropout, training, calls", [(0.0, True, 2), (0.1, False, 2), (0.1, True, 0)])
def test_the_kernel_is_not_used_with_dropout_in_training(tiny, dropout, training, calls, monkeypatch):
    called = []
    monkeypatch.setattr(transformer, "has_varlen", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *given, **how: called.append(1) or masked_attention(*given, **how))
    tiny(dropout=dropout).train(training)(draw(6), [4, 2])
    assert len(called) == calls                                         # once a layer


def test_the_kernel_is_for_half_precision_on_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for device, dtype, head_dim, capability, is_supported in (
            ("cuda", torch.bfloat16, 64, (8, 0), True), ("cuda", torch.float16, 128, (9, 0), True),
            ("cuda", torch.float16, 64, (7, 5), False),             # a T4 has no FlashAttention
            ("cuda", torch.float32, 64, (9, 0), False), ("cpu", torch.bfloat16, 64, (9, 0), False),
            ("cuda", torch.bfloat16, 60, (9, 0), False), ("cuda", torch.bfloat16, 264, (9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert has_varlen(torch.device(device), dtype, head_dim) == is_supported


def rotation_of(model, length):  # -> (length, 1, K/2)
    return model.make_layout(torch.zeros(length, dtype=torch.long), [length], cache=None).rotation


def test_rope_leaves_position_0_and_turns_the_first_pair_by_one_radian_a_position(tiny):
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).expand(4, 1, 4)
    turned = rotate(x, rotation_of(tiny(), 4))
    assert close(turned[0], x[0])
    for m in range(4):                                          # the second pair: 10000 ** (-2/4) = 1/100 of that
        by_hand = [math.cos(m), math.sin(m), math.cos(m / 100), math.sin(m / 100)]
        assert close(turned[m, 0], torch.tensor(by_hand))


def test_attention_depends_on_how_far_apart_two_tokens_are_not_on_where_they_stand(tiny):
    q, k = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    rotation = rotation_of(tiny(), 24)
    q, k = (rotate(x.expand(24, 1, 4), rotation).squeeze(1) for x in (q, k))
    scores = q @ k.T                                            # (m, n)
    for apart in range(24):
        diagonal = scores.diagonal(-apart)
        assert close(diagonal, diagonal[:1].expand(24 - apart))
    assert not close(scores[3, 0], scores[2, 0])


def test_moving_a_whole_sample_leaves_its_attention_as_it_is_and_spreading_it_does_not(tiny):
    model, x = tiny(), torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    stream, rotation = model.make_layout(draw(6), [6], cache=None), rotation_of(model, 12)
    here, moved, spread = (model.layers[0].attention(x, stream._replace(rotation=turns))[0]
                           for turns in (rotation[:6], rotation[6:], rotation[::2]))
    assert close(here, moved) and not close(here, spread, atol=1e-2)


def test_samples_start_at_position_0_each(tiny):
    stream = tiny().make_layout(draw(sum(LENGTHS)), LENGTHS, cache=None)
    assert stream.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert stream.sample.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3]
    assert stream.groups == [(1, 3), (2, 5), (1, 2)]
    assert stream.offsets.tolist() == [0, 3, 8, 13, 15]


def test_a_bf16_copy_tells_position_300_from_301(tiny):
    model = tiny(max_seq_len=512)
    exact = rotation_of(model, 302)
    copy = rotation_of(model.bfloat16(), 302)
    assert torch.tensor(301.0).bfloat16().item() == 300         # a table of positions in bf16 would mix them up
    assert copy.dtype == torch.complex64 and torch.equal(copy, exact)
    assert close(copy[301, 0, 0].angle(), torch.tensor(math.remainder(301, 2 * math.pi)), atol=1e-4)


def test_a_sample_longer_than_max_seq_len_stops_with_both_numbers(tiny):
    with pytest.raises(AssertionError, match="25 tokens .* max_seq_len=24"):
        tiny()(draw(25), [25])


# -- sizes -----------------------------------------------------------------------------------------

def test_a_tied_head_is_the_embedding_and_counts_once(tiny):
    tied, untied = tiny(), tiny(tie_embeddings=False)
    assert tied.output.weight is tied.tok_embeddings.weight
    assert untied.n_parameters() - tied.n_parameters() == 12 * 16
    assert tied.bfloat16().output.weight is tied.tok_embeddings.weight


@pytest.mark.parametrize("dim, n_layers, hidden_dim, parameters", [
    (512, 8, 1376, 26_485_248),
    (768, 16, 2048, 108_749_568),
])
def test_the_sizes_of_the_document_have_the_parameters_that_a_hand_counts(dim, n_layers, hidden_dim, parameters):
    config = LMConfig(dim=dim, n_layers=n_layers)
    with torch.device("meta"):                                  # shapes only, no memory
        model = Transformer(config)
    attention = dim * dim + 2 * dim * dim // 2 + dim * dim      # wq; wk and wv of half the heads; wo
    layer = attention + 3 * dim * hidden_dim + 2 * dim          # w1, w2, w3; two norms
    assert config.hidden_dim == hidden_dim
    assert model.n_parameters() == 6400 * dim + n_layers * layer + dim == parameters


def test_a_new_model_gives_all_tokens_about_the_same_probability():
    torch.manual_seed(0)
    model = Transformer(LMConfig(dim=32, n_layers=2, n_heads=4, vocab_size=50))
    loss = F.cross_entropy(model(draw(128, 1, 50), [32] * 4).logits, draw(128, 2, 50))
    assert abs(loss - math.log(50)) < 0.05                      # 3.91


REFUSED = (
    (dict(dim=0), "dim=0 must be an integer of 1 to 16,777,216"),
    (dict(n_layers=0), "n_layers=0 must be an integer of 1 to 4,096"),
    (dict(dim=30, n_heads=4), "dim=30 does not split into n_heads=4 equal heads; try n_heads=3, or set head_dim"),
    (dict(dim=12, n_heads=4), "head_dim=3 is odd, but RoPE rotates pairs"),
    (dict(n_heads=8, n_kv_heads=3), "n_heads=8 is no multiple of n_kv_heads=3"),
    (dict(n_heads=8, n_kv_heads=0), "n_kv_heads=0"),
    (dict(use_moe=True, num_experts_per_tok=5), "num_experts_per_tok=5 exceeds n_routed_experts=4"),
    (dict(activation="swish"), "activation='swish' is none of silu, gelu, relu2"),
)


def test_sizes_that_do_not_fit_are_refused_with_the_value_and_the_way_out():
    for sizes, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            LMConfig(**sizes)


def test_a_config_comes_back_from_its_json_and_refuses_a_name_it_does_not_know():
    config = LMConfig(dim=64, n_layers=3, use_moe=True)
    assert LMConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(ValueError, match="unknown model sizes.*n_layer"):
        LMConfig.from_dict({"dim": 64, "n_layer": 3})


def test_a_config_that_was_saved_before_there_was_a_choice_of_activation_has_silu():
    values = dataclasses.asdict(LMConfig(dim=64, activation="gelu"))
    del values["activation"]
    assert LMConfig.from_dict(values).activation == "silu"
