"""
量化感知训练的规律：训练时算出的，就是量化文件算出的；梯度直通；名字、断点、进程数都照旧。
Laws of model/qat.py: training computes what the quantised file computes, the gradient passes as if nothing were rounded,
and names, resume files and processes are as without it.
"""

import copy
import signal

import pytest
import torch
import torch.nn.functional as F

from distill.fused import Dense, fused_distillation_loss
from helpers_run import TINY, complaint, first_gradients, load, rows, same, start, succeed, wait_until
from interop.checkpoint import load_model
from model.generate import generate
from model.gpt2 import GPT2
from model.lora import add_lora
from model.qat import fake_quantize, fake_quantised
from model.quantize import KINDS, quantize, round_to_grid

SIZES = dict(dim=32, hidden_dim=64)
TOKENS, LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8] * 2), [5, 7, 12]
kinds = pytest.mark.parametrize("kind", KINDS)
MODELS = {"dense": {}, "untied": dict(tie_embeddings=False), "biased": dict(attention_bias=True),
          "experts": dict(use_moe=True)}
models_of = pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -- the grid --------------------------------------------------------------------------------------

def test_two_bits_by_hand():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.4, 0.6, 1.4, 2.6] * 4], requires_grad=True)      # low 0, step 1
    assert fake_quantised(weight, "int2").tolist() == [[0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 1.0, 3.0] * 4]


@kinds
@pytest.mark.parametrize("shape", [(6, 96), (3, 6, 96)], ids=["a matrix", "experts"])
def test_a_weight_is_rounded_to_the_numbers_of_the_file(kind, shape):
    weight = normal(*shape)
    assert torch.equal(round_to_grid(weight, kind), KINDS[kind](weight).dequantised())
    assert torch.equal(fake_quantised(weight.requires_grad_(), kind), KINDS[kind](weight.detach()).dequantised())


@pytest.mark.parametrize("kind", ["int4", "int3", "int2"])
def test_a_group_has_two_to_the_bits_values_and_fewer_bits_cost_more(kind):
    weight, bits = normal(1, 32 * 200), int(kind[-1])
    groups = round_to_grid(weight, kind).view(200, 32)
    assert max(len(group.unique()) for group in groups) == 2**bits
    assert KINDS[kind](weight).weight.numel() == weight.numel() * bits // 8             # bytes, no bit of them unused


@kinds
def test_the_gradient_passes_straight_through(kind):
    weight, slope = normal(4, 64).requires_grad_(), normal(4, 64)
    (fake_quantised(weight, kind) * slope).sum().backward()
    assert torch.equal(weight.grad, slope)


# -- the model -------------------------------------------------------------------------------------

@kinds
@models_of
def test_training_computes_what_the_quantised_file_computes(tiny, kind, sizes):
    plain = tiny(**SIZES, **sizes)
    fake = fake_quantize(copy.deepcopy(plain), kind)
    exact = quantize(copy.deepcopy(plain), kind)
    found, expected = (model(TOKENS, LENGTHS).logits for model in (fake, exact))
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(found, plain(TOKENS, LENGTHS).logits, atol=1e-3)          # and not what it was
    assert torch.equal(fake.head, exact.head)


@kinds
def test_gpt2_too(tiny, kind):
    config = tiny(**SIZES).config
    config.architecture, config.n_kv_heads = "gpt2", config.n_heads
    plain = GPT2(config).eval()
    found = fake_quantize(copy.deepcopy(plain), kind)(TOKENS, LENGTHS).logits
    assert torch.allclose(found, quantize(plain, kind)(TOKENS, LENGTHS).logits, atol=1e-5)


@models_of
def test_names_weights_and_tying_stay(tiny, sizes):
    plain = tiny(**SIZES, **sizes)
    fake = fake_quantize(copy.deepcopy(plain), "int4")
    assert same(dict(fake.state_dict()), dict(plain.state_dict()))
    assert [name for name, _ in fake.named_parameters()] == [name for name, _ in plain.named_parameters()]
    other = tiny(seed=1, **SIZES, **sizes)
    fake.load_state_dict(other.state_dict())
    assert torch.equal(fake(TOKENS, LENGTHS).logits, fake_quantize(other, "int4")(TOKENS, LENGTHS).logits)


@models_of
def test_every_weight_gets_the_gradient_that_its_rounded_self_would_get(tiny, sizes):
    """Through layers, embedding and head, with the fused loss and with activation checkpointing."""
    plain = tiny(**SIZES, **sizes)
    fake = fake_quantize(copy.deepcopy(plain), "int3")
    with torch.no_grad():               # the same numbers as plain weights; on a grid, rounding again changes nothing
        for name, weight in plain.named_parameters():
            module = fake.get_submodule(name.rpartition(".")[0])
            kind = "int8" if name.startswith(("tok", "out")) else "int3"
            if hasattr(module, "kind") and weight.dim() > 1:
                weight.copy_(round_to_grid(weight, kind))
    target, teacher = torch.arange(24) % 12, [Dense(normal(24, 8), normal(12, 8))]
    for model, checkpointing in ((plain, False), (fake, True)):
        model.train().grad_checkpoint = checkpointing
        out = model(TOKENS, LENGTHS, with_logits=False)
        fused_distillation_loss(out.final, model.head, target, teacher, alpha=0.5).loss.backward()
    for (name, weight), other in zip(plain.named_parameters(), fake.parameters(), strict=True):
        torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_it_writes_what_the_quantised_file_writes(tiny):
    fake = fake_quantize(tiny(**SIZES), "int4")
    floats = tiny(**SIZES)
    exact = quantize(tiny(**SIZES), "int4")
    floats.load_state_dict(floats.state_dict() | {f"{name}.weight": module.dequantised()
                                                  for name, module in exact.named_modules() if hasattr(module, "code")})
    assert generate(fake, [[3, 1, 4], [1]], 12) == generate(floats, [[3, 1, 4], [1]], 12)


def test_a_step_moves_the_fp32_weights_though_the_rounded_ones_may_stay(tiny):
    model = fake_quantize(tiny(**SIZES), "int2").train()
    weight = model.layers[0].attention.wq.weight
    before, rounded = weight.detach().clone(), model.layers[0].attention.wq.dequantised().detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    F.cross_entropy(model(TOKENS, LENGTHS).logits, torch.arange(24) % 12).backward()
    optimizer.step()
    assert (weight != before).float().mean() > 0.9
    now = model.layers[0].attention.wq.dequantised().detach()
    assert (now - rounded).abs().max() < 0.1 * (rounded.max() - rounded.min())          # the grid moves with its ends


# -- files -----------------------------------------------------------------------------------------

FLAGS = {**TINY, "size": "tiny", "max_steps": 6, "save_interval": 2, "log_interval": 1, "eval_interval": 3}


def qad(models, kind="", **more):
    """The script, and the flags of a model that learns from itself in full precision."""
    itself = models / f"teacher{kind}.pth"              # of width 48: int8 alone, whose scale is a row's
    return "train_distillation.py", {**FLAGS, "teacher": itself, "student": itself, "qat": "int8"} | more


def test_a_model_distils_itself_and_its_file_scores_as_the_run_did(data, models, tmp_path):
    """The row of the log for the validation data is what scripts/evaluate.py says of the quantised file."""
    student = models / "student.pth"
    flags = {**FLAGS, "teacher": student, "student": student, "qat": "int4", "max_steps": 2, "eval_interval": 1}
    said = succeed("train_distillation.py", **flags, data_path=data / "sft_data.jsonl", out_dir=tmp_path)
    assert "quantisation-aware training: int4 layers" in said and "the same model" not in said
    _, first, last = (row["val_kl"] for row in rows(tmp_path / "full_dist_32_qat.jsonl") if "val_kl" in row)
    assert 0 < last < 1
    succeed("scripts/convert.py", weights=tmp_path / "full_dist_32_qat.pth", quantize="int4", out=tmp_path / "small.pth")
    (trained, _), (file, _) = (load_model(tmp_path / f"{name}.pth") for name in ("full_dist_32_qat", "small"))
    assert trained.config.quantization is None and file.config.quantization == "int4"
    tokens = torch.arange(60) * 7 % trained.config.vocab_size
    found = fake_quantize(trained, "int4")(tokens, [60]).logits
    torch.testing.assert_close(found, file(tokens, [60]).logits, rtol=1e-4, atol=1e-4)


def test_without_rounding_a_model_has_nothing_to_learn_from_itself(data, models, tmp_path):
    script, flags = qad(models)
    said = succeed(script, **flags | {"qat": None, "max_steps": 1}, data_path=data / "sft_data.jsonl", out_dir=tmp_path)
    assert "the same model with the same prompts" in said


@pytest.mark.parametrize("name, kind, more", [
    ("sft", "", {"qat": "int2"}), ("distillation", "_moe", {"qat": "int3", "processes": 2})])
def test_a_killed_run_ends_as_the_unbroken_one(name, kind, more, data, models, tmp_path):
    flags = FLAGS | more | {"weights": models / f"student{kind}.pth", "data_path": data / "sft_data.jsonl"}
    flags |= {"max_steps": 12, "size": None} if name == "sft" else {"max_steps": 12, "teacher": models / "teacher.pth"}
    file = f"full_{name.replace('distillation', 'dist')}_32{kind}_qat"
    succeed(f"train_{name}.py", **flags, out_dir=tmp_path / "unbroken")
    killed = start(f"train_{name}.py", **flags, out_dir=tmp_path / "broken")
    wait_until(lambda: len(rows(tmp_path / f"broken/{file}.jsonl")) >= 5)
    killed.send(signal.SIGKILL)
    killed.wait()
    said = succeed(f"train_{name}.py", **flags, out_dir=tmp_path / "broken", resume=True)
    assert f"{file}.resume after step" in said
    for end in (".pth", "_best.pth", ".resume"):
        assert same(load(tmp_path / f"unbroken/{file}{end}"), load(tmp_path / f"broken/{file}{end}"))
    changed = complaint(f"train_{name}.py", **flags | {"qat": "int4"}, out_dir=tmp_path / "broken", resume=True)
    assert "qat" in changed


@pytest.mark.parametrize("kind, shard", [("", "none"), ("_moe", "zero2"), ("", "zero3"), ("_moe", "zero3")])
def test_two_processes_take_the_step_of_one(kind, shard, data, models, tmp_path):
    flags = {**TINY, "weights": models / f"student{kind}.pth", "teacher": models / "teacher.pth", "size": "tiny", "qat": "int4",
             "data_path": data / "sft_data.jsonl", "max_steps": 1, "eval_interval": 0, "grad_clip": 0}
    succeed("train_distillation.py", **flags, out_dir=tmp_path / "one")
    succeed("train_distillation.py", **flags | {"batch_size": 4, "processes": 2}, shard=shard, out_dir=tmp_path / "two")
    one, two = (load(tmp_path / folder / f"full_dist_32{kind}_qat.pth") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:                    # Adam makes the rounding of sums larger where a gradient is near 0
        torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-4)
    if shard == "none":                 # the others keep their weights in another order
        one, two = (first_gradients(tmp_path / folder / f"full_dist_32{kind}_qat.resume") for folder in ("one", "two"))
        assert all((g - expected).abs().max() <= 1e-5 * expected.abs().max() for g, expected in zip(two, one, strict=True))


@pytest.mark.parametrize("script, rows_of, more", [
    ("train_pretrain.py", "pretrain_data", {}), ("train_onpolicy.py", "sft_data", {"max_new_tokens": 4, "teacher": "teacher.pth"})])
def test_the_other_scripts_take_the_flag(script, rows_of, more, data, models, tmp_path):
    flags = {**TINY, "qat": "int4", "max_steps": 1, "weights": "student.pth", "out_dir": tmp_path} | more
    flags |= {name: models / flags[name] for name in ("teacher", "weights") if name in flags}
    if script == "train_onpolicy.py":
        flags["student"] = flags.pop("weights")
    assert "quantisation-aware training: int4" in succeed(script, **flags, data_path=data / f"{rows_of}.jsonl")


# -- what is refused -------------------------------------------------------------------------------

def test_adapters_columns_and_quantised_weights_are_refused(tiny):
    with pytest.raises(ValueError, match="merge_lora"):
        adapted = tiny(**SIZES)
        adapted.adapted = add_lora(adapted, 2)
        fake_quantize(adapted, "int4")
    with pytest.raises(ValueError, match="int8 already"):
        fake_quantize(quantize(tiny(**SIZES), "int8"), "int4")
    model = tiny(dim=32, hidden_dim=24)
    with pytest.raises(ValueError, match=r"int2 needs columns in groups of 32, but layers\.0\.ffn\.w2 has 24; use int8"):
        fake_quantize(model, "int2")
    assert model.qat is None and type(model.output) is torch.nn.Linear


@pytest.mark.parametrize("more, says", [
    ({"lora_rank": 2}, "--qat trains the weights, --lora_rank freezes them"),
    ({"qat": "int4"}, "int4 needs columns in groups of 32, but layers.0.attention.wq has 48; use int8"),
    ({"qat": "int5"}, "invalid choice")])
def test_flags_that_cannot_work_are_refused(more, says, data, models, tmp_path):
    script, flags = qad(models, **more)
    assert says in complaint(script, **flags, data_path=data / "sft_data.jsonl", out_dir=tmp_path)
