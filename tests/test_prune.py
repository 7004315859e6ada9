"""
剪枝的规律：指定的层原样留下；什么都不剪，什么都不变；剪去为零的部分，什么都不变；先打乱次序，结果相同；剪过的模型写成别人的文件还是它。
Laws of pruning: the layers that are named stay as they are; pruning nothing changes nothing, nor does pruning what is zero;
the order of the parts does not matter; a pruned model is the same in other people's files.
"""

import dataclasses

import pytest
import torch

from dataset.lm_dataset import packed_batch
from helpers_run import ROOT, complaint, same, succeed
from interop.checkpoint import build, load_model, save_model
from model.config import LMConfig
from model.generate import generate
from model.prune import axes_of, best, dense, keep_layers, measure, prune, sizes_for
from model.transformer import Transformer

SIZES = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=272, max_seq_len=64, norm_eps=1e-12)
FAMILIES = {"llama": {}, "qwen2": {"attention_bias": True, "tie_embeddings": False}, "qwen3": {"qk_norm": True, "head_dim": 16},
            "smollm3": {"nope_layers": [2]}, "phi": {"rotary_dim": 4}, "moe": {"use_moe": True}, "gpt2": {"architecture": "gpt2", "n_kv_heads": 4}}
DENSE = [family for family in FAMILIES if family != "moe"]
SMALLER = dict(n_layers=2, n_heads=2, hidden_dim=32, dim=16)


def made(family) -> torch.nn.Module:
    """Weights are drawn wide, norms and biases too, so that no part is too small to be seen in the logits."""
    model, generator = build(LMConfig(**SIZES | FAMILIES[family])).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
    return model


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(272, (42,), generator=torch.Generator().manual_seed(1)).numpy()
    return packed_batch(ids, ids >= 0, torch.tensor([21, 21]).numpy())


@torch.no_grad()
def logits(model, batch):
    return model(batch.tokens, batch.lengths).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_has_exactly_the_layers_that_are_named_in_their_order(family, byte_tokenizer, tmp_path):
    """Nothing is measured then, so the default --data_path need not exist."""
    save_model(teacher := made(family), byte_tokenizer(), tmp_path / "teacher.pth")
    succeed(ROOT / "scripts/prune.py", weights=tmp_path / "teacher.pth", layers="2,0", out=tmp_path / "student.pth", cwd=tmp_path)
    student, _ = load_model(tmp_path / "student.pth")
    nope_layers = [0] if teacher.config.nope_layers else []             # layer 2 of the teacher
    assert student.config == dataclasses.replace(teacher.config, n_layers=2, nope_layers=nope_layers)
    for new, old in ((student.layers[0], teacher.layers[2]), (student.layers[1], teacher.layers[0]),
                     (student.norm, teacher.norm), (student.output, teacher.output),
                     (student.tok_embeddings, teacher.tok_embeddings)):
        assert same(new.state_dict(), old.state_dict())


def test_a_student_generates_with_a_cache_what_the_full_pass_finds_most_likely():
    """Each layer has its own place in the cache: layer 2 of the teacher is layer 0 of the student."""
    student = keep_layers(made("llama"), [2, 0])
    assert [layer.attention.layer for layer in student.layers] == [0, 1]
    prompt = [40, 50, 60]
    answer = generate(student, [prompt], 20)[0]
    with torch.no_grad():
        most_likely = student(torch.tensor(prompt + answer), [23]).logits.argmax(dim=-1)
    assert most_likely[2:-1].tolist() == answer


def test_a_layer_that_does_not_exist_is_named_with_those_that_do():
    for layers in ([3], [0, -1], [1, 9]):
        with pytest.raises(ValueError, match=rf"--layers {','.join(map(str, layers))}: the model has layers 0 to 2"):
            keep_layers(made("llama"), layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_changes_nothing(family, batch):
    model = made(family)
    same = prune(model, measure(model, [batch]))
    assert torch.equal(logits(same, batch), logits(model, batch))


@pytest.mark.parametrize("family", DENSE)
def test_pruning_what_is_zero_changes_nothing(family, batch):
    """GPT-2's norms subtract a mean of all dimensions, so zeros matter there."""
    model = made(family)
    sizes = {size: SMALLER[size] for size in ("n_heads", "hidden_dim", "dim") if size != "dim" or family != "gpt2"}
    letters = {"Q": 2, "G": 2, "H": 2} | ({"D": 2} if "dim" in sizes else {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for axis, letter in enumerate(axes_of(name)):
                if letter in letters:       # every second unit and dimension, the second half of the heads
                    n = weight.shape[axis]
                    weight.index_fill_(axis, torch.arange(n // 2, n) if letter in "QG" else torch.arange(1, n, 2), 0)
    smaller = prune(model, measure(model, [batch]), **sizes)
    assert smaller.n_parameters() < 0.8 * model.n_parameters()
    assert torch.allclose(logits(smaller, batch), logits(model, batch), atol=1e-4, rtol=1e-4)


def test_the_order_of_units_and_heads_does_not_matter(batch):
    model, order = made("llama"), torch.randperm(64, generator=torch.Generator().manual_seed(2))
    expected = logits(prune(model, measure(model, [batch]), n_heads=2, hidden_dim=40), batch)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for axis, letter in enumerate(axes_of(name)):
                if letter == "H":
                    weight.copy_(weight.index_select(axis, order))
                elif letter in "QG":
                    weight.copy_(weight.roll(weight.shape[axis] // 2, axis))
    found = logits(prune(model, measure(model, [batch]), n_heads=2, hidden_dim=40), batch)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_a_layer_that_does_nothing_leaves_first(family, batch):
    model = made(family)
    with torch.no_grad():
        model.layers[1].attention.wo.weight.zero_()
        model.layers[1].ffn.w2.weight.zero_()
    smaller = prune(model, measure(model, [batch]), n_layers=2)
    assert torch.equal(logits(smaller, batch), logits(model, batch))


def test_the_most_used_experts_stay(batch):
    model = made("moe")
    importance = measure(model, [batch])
    for used in importance.units:
        assert used.sum() == pytest.approx(1)       # norm_topk_prob
    smaller = prune(model, importance, n_routed_experts=2)
    for layer, old, used in zip(smaller.layers, model.layers, importance.units):
        assert torch.equal(layer.ffn.router.weight, old.ffn.router.weight[best(used, 2)])
        assert torch.equal(layer.ffn.w1, old.ffn.w1[best(used, 2)])
    one = prune(model, importance, n_routed_experts=1, n_layers=2, n_heads=2, dim=16)
    assert one.config.num_experts_per_tok == 1 and logits(one, batch).isfinite().all()


def test_equal_experts_become_the_same_dense_network(batch):
    model = made("moe")
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.ffn.w1, layer.ffn.w2, layer.ffn.w3):
                weight.copy_(weight[:1].expand_as(weight))
    single = dense(model, measure(model, [batch]))
    assert not single.config.use_moe and single.config.hidden_dim == 5 * 64
    assert torch.allclose(logits(single, batch), logits(model, batch), atol=1e-4)
    smaller = prune(single, measure(single, [batch]), hidden_dim=96)
    assert logits(smaller, batch).isfinite().all()


@pytest.mark.parametrize("by", ["activation", "magnitude", "random"])
@pytest.mark.parametrize("family", DENSE)
def test_every_family_becomes_smaller(family, by, batch):
    model = made(family)
    smaller = prune(model, measure(model, [batch], by), **SMALLER)
    assert {size: getattr(smaller.config, size) for size in SMALLER} == SMALLER
    assert logits(smaller, batch).isfinite().all()


@pytest.mark.parametrize("family", DENSE)
def test_a_target_is_a_share_of_the_parameters(family, batch):
    model = made(family)
    smaller = prune(model, measure(model, [batch]), **sizes_for(model, 0.6))
    assert 0.3 < smaller.n_parameters() / model.n_parameters() <= 0.6
    with pytest.raises(ValueError, match="less than one layer"):
        sizes_for(model, 0.01)


def test_a_target_is_nearly_reached_and_cuts_layers_and_units_alike():
    teacher = Transformer(LMConfig(dim=128, n_layers=4, n_heads=8, vocab_size=1024))     # quickstart.py's
    assert sizes_for(teacher, 0.58) == {"n_layers": 3, "hidden_dim": 192}
    for target in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        smaller = Transformer(dataclasses.replace(teacher.config, **sizes_for(teacher, target)))
        assert 0.92 * target < smaller.n_parameters() / teacher.n_parameters() <= target


@pytest.mark.parametrize("sizes, said", [({"n_heads": 3}, "multiple of 2"), ({"dim": 64}, "exceeds"), ({"n_layers": 0}, "n_layers"), ({"n_routed_experts": 2}, "see --dense")])
def test_sizes_that_do_not_fit_are_refused(sizes, said, batch):
    model = made("llama")
    with pytest.raises(ValueError, match=said):
        prune(model, measure(model, [batch]), **sizes)


@pytest.mark.parametrize("family", [family for family in DENSE if family != "smollm3"])
@pytest.mark.parametrize("out", ["folder", "model.gguf"])
def test_a_pruned_model_is_the_same_in_other_files(family, out, batch, byte_tokenizer, tmp_path):
    model = made(family)
    sizes = SMALLER | ({"n_heads": 4, "dim": 32} if family in ("qwen2", "gpt2") else {})    # heads there split dim
    smaller = prune(model, measure(model, [batch]), **sizes)
    save_model(smaller, byte_tokenizer(), tmp_path / "small.pth")
    dtype = {"dtype": "float32"}
    succeed("scripts/convert.py", weights=tmp_path / "small.pth", out=tmp_path / out, **dtype)
    assert torch.allclose(logits(load_model(tmp_path / out)[0], batch), logits(smaller, batch), atol=1e-5)


def test_prune_then_distil(models, data, tmp_path):
    of = {"weights": models / "teacher.pth", "data_path": data / "sft_data.jsonl", "out": tmp_path / "half.pth", "device": "cpu"}
    assert "Teach it: python train_distillation.py" in succeed("scripts/prune.py", **of, hidden_dim=32, rows=8)
    assert load_model(tmp_path / "half.pth")[0].config.hidden_dim == 32
    succeed("scripts/prune.py", **of | {"out": tmp_path / "first.pth"}, layers=0, hidden_dim=32, rows=8)
    config = load_model(tmp_path / "first.pth")[0].config
    assert (config.n_layers, config.hidden_dim) == (1, 32)
    for flags in ({}, {"target": 0.5, "hidden_dim": 32}):
        assert "either --target or sizes" in complaint("scripts/prune.py", **of, **flags)
    assert "argument --layers: invalid numbers value: '0,two'" in complaint("scripts/prune.py", **of, layers="0,two")
    assert "exceeds" in complaint("scripts/prune.py", **of, hidden_dim=4096)
    moe = of | {"weights": models / "teacher_moe.pth"}
    assert "see --dense" in complaint("scripts/prune.py", **moe, target=0.5)
    succeed("scripts/prune.py", **moe, dense=True, target=0.5, rows=8)
    assert not load_model(tmp_path / "half.pth")[0].config.use_moe
    assert "has no experts" in complaint("scripts/prune.py", **of, dense=True)
    assert "another FILE.pth" in complaint("scripts/prune.py", **of | {"out": models / "teacher.pth"}, hidden_dim=32)
