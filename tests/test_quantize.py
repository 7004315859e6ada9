"""
量化的规律：误差不过半格，打包可逆，结果与还原后的权重相同，存盘再读不变。
Laws of model/quantize.py: no weight moves by more than half a step; a model computes what its unpacked weights do.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interop.checkpoint import load_model, save_model
from model.gpt2 import GPT2
from model.moe import MoEFeedForward
from model.quantize import FEW_ROWS, KINDS, Int4, Int8, Int8Embedding, Quantised, integers, pack, quantize

SIZES = dict(dim=32, hidden_dim=64)         # all but int8 need columns in groups of 32
TOKENS, LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 2), [5, 7, 12]
kinds = pytest.mark.parametrize("kind", KINDS)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantised(weight, kind, bias=None):
    return KINDS[kind](weight, bias)


def unpacked(model):
    """{name: floats} of every matrix of a quantised model."""
    return {name: module.dequantised() for name, module in model.named_modules() if isinstance(module, Quantised)}


def with_weights(model, weights):
    """The model with these in place of its own matrices: name -> tensor."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights.get(name.removesuffix(".weight"), weight))
    return model


# -- the numbers -----------------------------------------------------------------------------------

def test_int8_by_hand():
    code = Int8(torch.tensor([[-2.54, 1.0, 0.031], [0.0, 63.5, 127.0]]))
    assert code.scale.tolist() == pytest.approx([0.02, 1.0])
    assert code.weight.tolist() == [[-127, 50, 2], [0, 64, 127]]           # 63.5 goes to the even neighbour
    assert torch.allclose(code.dequantised(), torch.tensor([[-2.54, 1.0, 0.04], [0.0, 64.0, 127.0]]))


def test_int4_by_hand():
    # 32 weights from -1 to 14 in one group: the step is (14 - -1) / 15 = 1, so that each is a step of its own.
    weight = torch.tensor([[i % 16 - 1.0 for i in range(32)]])
    weight[0, 16] = 4.0
    code = Int4(weight)
    assert code.scale.item() == 1.0 and code.low.item() == -1.0
    packed = code.weight.flatten().tolist()
    assert packed[:3] == [0 + 16 * 5, 1 + 16 * 1, 2 + 16 * 2]              # weight 0 with weight 16, 1 with 17, 2 with 18
    assert torch.equal(code.dequantised(), weight)


def test_three_bits_by_hand():
    packed = pack(torch.tensor([6, 1, *[0] * 30], dtype=torch.uint8).view(32, 1), bits=3).flatten().tolist()
    assert packed == [2, 1, *[0] * 6, 1, 0, 0, 0]                           # 6 = 110: its low bits 10 = 2, its third bit 1


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_packing_keeps_every_value_at_every_place(bits):
    q = torch.randint(2**bits, (2, 3, 32, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(q, bits)
    assert packed.shape == (2, 3, 4 * bits, 5) and torch.equal(integers(packed, bits), q)


@kinds
def test_no_weight_moves_by_more_than_half_a_step(kind):
    weight = normal(6, 96)
    code = quantised(weight, kind)
    step = code.scale[:, None] if kind == "int8" else code.scale.T.repeat_interleave(32, dim=1)     # (6, 1) or (6, 96)
    assert ((code.dequantised() - weight).abs() <= step / 2 * 1.0001).all()


@kinds
def test_the_largest_weight_of_a_row_or_group_stays(kind):
    weight = normal(6, 96)
    row, column = divmod(weight.abs().argmax().item(), 96)
    assert quantised(weight, kind).dequantised()[row, column].item() == pytest.approx(weight[row, column].item())


@kinds
def test_weights_on_the_grid_come_back_as_they_were(kind):
    weight = quantised(normal(6, 96), kind).dequantised()
    assert torch.allclose(quantised(weight, kind).dequantised(), weight, atol=1e-6)


@kinds
def test_rows_that_are_all_the_same_come_back_as_they_were(kind):
    weight = torch.stack([torch.zeros(32), torch.full((32,), -3.0)])
    code = quantised(weight, kind)
    assert torch.equal(code.dequantised(), weight) and (code.scale > 0).all()               # 0 / 0 is no integer


@kinds
@pytest.mark.parametrize("n", [1, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_equals_that_of_the_unpacked_weights(kind, n, monkeypatch):
    weight, bias, x = normal(6, 96), normal(6), normal(n, 96)
    code = quantised(weight, kind, bias)
    expected = F.linear(x, code.dequantised(), bias)
    assert torch.allclose(code(x), expected, atol=1e-5)
    monkeypatch.setattr("model.quantize.UNPACKED", 2 * 6 * 32)              # unpacked in two pieces, the second smaller
    assert torch.allclose(code(x), expected, atol=1e-5)


@kinds
def test_for_few_rows_activations_and_sums_are_rounded_to_bf16_and_weights_are_what_they_were(kind):
    weight, bias = normal(48, 96), normal(48)
    code = quantised(weight, kind, bias)
    for n in (1, FEW_ROWS):
        x = normal(n, 96)
        expected, y = F.linear(x, code.dequantised()), code(x) - bias
        assert 2 ** -11 < (y - expected).norm() / expected.norm() < 2 ** -7
    # What has no fraction in bf16 has none to lose: with x = (1, 0, 0, ...) out comes a column of integers, times their scale.
    if kind == "int8":
        assert torch.equal(code(torch.eye(96)[:1]) - bias, code.dequantised().T[:1] + bias - bias)


def test_the_sizes_in_bytes():
    size = {kind: sum(p.numel() * p.element_size() for p in quantised(normal(64, 96), kind).parameters())
            for kind in KINDS}
    assert size["int8"] == 64 * 96 + 4 * 64                                 # 8 bits, and 32 a row
    assert size["int4"] == 64 * 96 * 6 / 8                                  # 4 bits, and 64 a group of 32: 6
    assert size["int3"] == 64 * 96 * 5 / 8 and size["int2"] == 64 * 96 * 4 / 8


# -- the model -------------------------------------------------------------------------------------

MODELS = {"dense": {}, "untied": dict(tie_embeddings=False), "biased": dict(attention_bias=True),
          "experts": dict(use_moe=True)}


@kinds
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_model_computes_what_its_unpacked_weights_do(tiny, kind, sizes):
    plain = tiny(**SIZES, **sizes)
    model = quantize(copy.deepcopy(plain), kind)
    same = with_weights(plain, unpacked(model))
    assert model.config.quantization == kind
    assert torch.allclose(model(TOKENS, LENGTHS).logits, same(TOKENS, LENGTHS).logits, atol=1e-4)
    few, exact = (each(TOKENS[:3], [3]).logits for each in (model, same))       # activations in bf16: 8 bits of each
    assert 1e-4 < (few - exact).norm() / exact.norm() < 0.03


@kinds
def test_every_matrix_is_quantised_but_the_router(tiny, kind):
    model = quantize(tiny(**SIZES, use_moe=True), kind)
    floats = [name for name, weight in model.named_parameters()
              if weight.is_floating_point() and weight.dim() > 1 and not name.endswith((".scale", ".low"))]
    assert floats == ["layers.0.ffn.router.weight", "layers.1.ffn.router.weight"]
    assert type(model.tok_embeddings) is Int8Embedding and type(model.output) is Int8      # int8 in all kinds


@kinds
def test_gpt2_keeps_its_positions_and_biases(tiny, kind):
    config = tiny(**SIZES).config
    config.architecture, config.n_kv_heads = "gpt2", config.n_heads
    model = GPT2(config)
    with torch.no_grad():
        model.layers[0].ffn.w1.bias.copy_(normal(64))
    before = model.pos_embeddings.weight.clone()
    quantize(model, kind)
    assert isinstance(model.layers[0].ffn.w1, Quantised) and torch.equal(model.layers[0].ffn.w1.bias, normal(64))
    assert isinstance(model.pos_embeddings, nn.Embedding) and torch.equal(model.pos_embeddings.weight, before)


def test_the_int8_embedding_reads_the_rows_of_the_head(tiny):
    model = quantize(tiny(**SIZES), "int8")
    assert torch.equal(model.tok_embeddings(TOKENS), model.tok_embeddings.dequantised()[TOKENS])
    assert torch.equal(model.tok_embeddings.dequantised(), model.output.dequantised())


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_stays_one_tensor(tiny, tied):
    model = quantize(tiny(**SIZES, tie_embeddings=tied), "int8")
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    model.to(torch.bfloat16)
    assert (model.output.weight is model.tok_embeddings.weight) == tied and model.output.weight.dtype == torch.int8


@kinds
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_saved_model_comes_back_bit_for_bit(tiny, byte_tokenizer, tmp_path, kind, sizes):
    tokenizer = byte_tokenizer()
    model = quantize(tiny(**SIZES, **sizes, vocab_size=tokenizer.vocab_size), kind)
    save_model(model, tokenizer, tmp_path / "small.pth")
    loaded, _ = load_model(tmp_path / "small.pth")
    before, after = model.state_dict(), loaded.state_dict()
    assert loaded.config == model.config and before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded(TOKENS, LENGTHS).logits, model(TOKENS, LENGTHS).logits)
    fresh = quantize(tiny(seed=1, **SIZES, **sizes, vocab_size=tokenizer.vocab_size), kind)
    fresh.load_state_dict(before)
    assert torch.equal(fresh(TOKENS, LENGTHS).logits, model(TOKENS, LENGTHS).logits)


@kinds
def test_a_quantised_model_has_as_many_weights_as_before(tiny, kind):
    model = tiny(**SIZES, use_moe=True, attention_bias=True)
    n_parameters = model.n_parameters()
    assert quantize(model, kind).n_parameters() == n_parameters


def test_experts_are_unpacked_one_at_a_time(tiny):
    model = quantize(tiny(**SIZES, use_moe=True), "int4")
    stack = next(module for module in model.modules() if isinstance(module, MoEFeedForward)).w1
    experts = stack.unbind()
    assert iter(experts) is experts                                         # not a list: one at a time in memory
    assert torch.equal(torch.stack(list(experts)), stack.dequantised())


# -- what is refused -------------------------------------------------------------------------------

def test_a_quantised_model_is_neither_trained_nor_quantised_again(tiny):
    model = quantize(tiny(**SIZES), "int8")
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.eval().training
    with pytest.raises(ValueError, match="cannot be trained"):
        model.train()
    with pytest.raises(ValueError, match="int8 already"):
        quantize(model, "int4")


def test_columns_that_do_not_split_into_groups_are_refused_before_anything_changes(tiny):
    model = tiny(dim=32, hidden_dim=24)
    with pytest.raises(ValueError, match=r"groups of 32, but layers\.0\.ffn\.w2 has 24; use int8"):
        quantize(model, "int4")
    assert type(model.layers[0].attention.wq) is nn.Linear and model.config.quantization is None
