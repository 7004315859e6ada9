"""
低秩适配的规律：起初一字不差，合并前后相同，只有适配器在学，去掉它就是原来的模型。
Laws of model/lora.py: adapters change nothing at first, the merged model is equal, only adapters
are trained, and without them the model is the base model.
"""

import copy
import shutil
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers_run import TINY, complaint, load, same, start, succeed, wait_until
from interop.checkpoint import adapt, load_model
from model.generate import generate
from model.gpt2 import GPT2
from model.lora import (LoRALinear, WithoutAdapters, add_lora, load_lora, lora_state, merge_lora,
                        store_frozen)
from model.quantize import quantize
from runtime.args import add_training_args, parse_args
from runtime.optim import parameter_groups

TOKENS, LENGTHS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]), [5, 7]
NEXT = torch.tensor([1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9])
KINDS = {"dense": {}, "biased": dict(attention_bias=True), "untied": dict(tie_embeddings=False),
         "experts": dict(use_moe=True), "no shared expert": dict(use_moe=True, n_shared_experts=0), "gpt2": None}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def make(tiny):
    """make(kind, ...) -> a model of 16 x 2 in eval mode, with large random weights."""

    def make(kind="dense", **sizes):
        if kind != "gpt2":
            return tiny(**KINDS[kind], **sizes)
        config = tiny(n_kv_heads=4, **sizes).config
        config.architecture, config.attention_bias = "gpt2", True
        model = GPT2(config).eval()
        draw(model.parameters())
        return model

    return make


@torch.no_grad()
def draw(weights, std=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)


def trained(model, rank=3, **settings):
    """The model with adapters that have learnt something, so that no part of them is zero."""
    add_lora(model, rank, **settings)
    draw(lora_state(model).values())
    return model


def logits(model):
    return model(TOKENS, LENGTHS).logits


def loss(model):
    return F.cross_entropy(logits(model), NEXT)


# -- at the start, and in between ------------------------------------------------------------------

@every_kind
def test_at_the_start_nothing_changes_to_the_last_bit(make, kind):
    model = make(kind)
    before = logits(model)
    add_lora(model, rank=3, alpha=64)
    assert torch.equal(logits(model), before)


def test_an_adapter_by_hand():
    linear = nn.Linear(2, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
        linear.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    adapter = LoRALinear(linear, rank=1, alpha=2.0)
    with torch.no_grad():
        adapter.lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        adapter.lora_b.copy_(torch.tensor([[1.0], [0.0], [10.0]]))
    # x = (5, 3): W x + b = (5.5, 3, 8); A x = 2; alpha / rank = 2; B (4) = (4, 0, 40)
    assert adapter(torch.tensor([[5.0, 3.0]])).tolist() == [[9.5, 3.0, 48.0]]
    assert not adapter.weight.requires_grad and not adapter.bias.requires_grad
    assert adapter.merged().weight.tolist() == [[3.0, -2.0], [0.0, 1.0], [21.0, -19.0]]


def test_alpha_is_the_rank_unless_it_is_given(make):
    plain, same, double = (trained(make(), **settings) for settings in ({}, dict(alpha=3), dict(alpha=6)))
    assert torch.equal(logits(plain), logits(same)) and not torch.allclose(logits(plain), logits(double))


def test_a_is_initialised_so_that_it_keeps_the_size_of_its_input():
    torch.manual_seed(0)
    adapter = LoRALinear(nn.Linear(400, 200), rank=100, alpha=1)
    x = torch.randn(50, 400)
    assert F.linear(x, adapter.lora_a).std().item() == pytest.approx(1.0, abs=0.05)
    kurtosis = (adapter.lora_a / adapter.lora_a.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(3.0, abs=0.1)                          # a Gaussian; of a uniform draw it is 1.8
    assert not adapter.lora_b.any()


@every_kind
def test_merged_is_as_unmerged(make, kind):
    model = trained(make(kind), alpha=5)
    before, base = logits(model), logits(make(kind))
    names = make(kind).state_dict().keys()
    assert merge_lora(model) is model
    assert torch.allclose(logits(model), before, atol=1e-5) and not torch.allclose(before, base, atol=1e-2)
    assert not any(isinstance(module, LoRALinear) or module.training for module in model.modules())
    assert model.state_dict().keys() == names and all(weight.requires_grad for weight in model.parameters())
    add_lora(model, rank=1)                                                 # it is plain: it takes new ones


def test_a_bf16_base_has_fp32_adapters_and_merges_in_fp32(make):
    model = trained(make().to(torch.bfloat16))
    assert all(tensor.dtype == torch.float32 for tensor in lora_state(model).values())
    assert logits(model).dtype == torch.bfloat16
    wq = model.layers[0].attention.wq
    expected = (wq.weight.float() + wq.lora_b.detach() @ wq.lora_a.detach()).bfloat16()
    merge_lora(model)
    assert torch.equal(model.layers[0].attention.wq.weight, expected)


def test_under_autocast_all_products_run_in_its_type(make):
    adapter, x = LoRALinear(nn.Linear(16, 8), rank=2, alpha=2), torch.randn(4, 16)
    draw([adapter.lora_b])
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    a, b, w = (weight.bfloat16() for weight in (adapter.lora_a, adapter.lora_b, adapter.weight))
    expected = F.linear(x.bfloat16(), w, adapter.bias.bfloat16()) + F.linear(F.linear(x.bfloat16(), a), b)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().sum().backward()
    assert adapter.lora_a.grad.dtype == torch.float32


@every_kind
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_frozen_matrices_in_bf16_change_nothing_under_autocast_to_the_last_bit(make, kind):
    found = []
    for is_stored in (False, True):
        model = trained(make(kind))
        if is_stored:
            store_frozen(model, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            out = logits(model)
            F.cross_entropy(out.float(), NEXT).backward()
            as_it_was = logits(WithoutAdapters(model))
        found.append([out, as_it_was] + [model.get_parameter(name).grad for name in lora_state(model)])
    assert all(map(torch.equal, *found)) and not torch.equal(*found[0][:2])


@every_kind
def test_of_the_frozen_only_the_matrices_of_the_layers_are_stored_in_bf16(make, kind):
    model = trained(make(kind), targets=["wq"])                             # the others are frozen without an adapter
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    store_frozen(model, torch.bfloat16)
    for name, weight in model.named_parameters():
        is_matrix = name.startswith("layers") and weight.dim() >= 2 and "lora_" not in name
        assert weight.dtype == (torch.bfloat16 if is_matrix else torch.float32)
        assert torch.equal(weight, before[name].to(weight.dtype)) and weight.requires_grad == ("lora_" in name)
    model = make(kind)                                                      # all of it trains
    store_frozen(model, torch.bfloat16)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_generation_with_a_cache_is_as_with_the_merged_model(make):
    model = trained(make())
    answers = generate(model, [[3, 1, 4], [1, 5]], max_new_tokens=8)
    base = generate(make(), [[3, 1, 4], [1, 5]], max_new_tokens=8)
    assert answers == generate(merge_lora(model), [[3, 1, 4], [1, 5]], max_new_tokens=8) and answers != base


# -- what trains -----------------------------------------------------------------------------------

@every_kind
def test_adapters_alone_train_and_all_of_them(make, kind):
    model = trained(make(kind))
    before = copy.deepcopy(model.state_dict())
    start = loss(model)
    optimizer = torch.optim.AdamW(parameter_groups({"model": model}, weight_decay=0.1), lr=0.01)
    for _ in range(10):
        out = model(TOKENS, LENGTHS, at=torch.arange(12), return_hidden=True)
        (F.cross_entropy(out.logits, NEXT) + 0.01 * out.balance_loss).backward()
        # None at all: neither memory for the others, nor an adapter that DDP would wait for in vain.
        assert {name for name, weight in model.named_parameters() if weight.grad is not None} == lora_state(model).keys()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == lora_state(model).keys() and loss(model) < start - 0.1


def test_the_weights_that_train_by_hand(make):
    # rank * (in + out) in each of 2 layers: wq, wo 16 + 16; wk, wv 16 + 8; w1, w2, w3 16 + 24
    model = make()
    n_weights = model.n_parameters()
    assert add_lora(model, rank=3) == ("adapters beside 14 matrices, w1 w2 w3 wk wo wq wv: "
                                       f"{3 * 2 * (2 * 32 + 2 * 24 + 3 * 40):,} of {n_weights + 1392:,} weights train")
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 1392
    assert model.n_parameters() == n_weights + 1392
    assert "4 matrices, wq wv: 336 of" in add_lora(make(), rank=3, targets=["wv", "wq"])        # 3 * 2 * (32 + 24)


@pytest.mark.parametrize("kind, names", [
    ("gpt2", "w1 w2 wk wo wq wv"), ("experts", "w1 w2 w3 wk wo wq wv"), ("no shared expert", "wk wo wq wv")])
def test_by_default_every_linear_of_a_layer_but_the_router_is_adapted(make, kind, names):
    model = make(kind)
    assert f"matrices, {names}: " in add_lora(model, rank=2)
    plain = {path for path, module in model.named_modules() if type(module) is nn.Linear}
    assert plain == {"output"} | {f"layers.{i}.ffn.router" for i in (0, 1) if "expert" in kind}


def test_dropout_acts_in_train_mode_only_and_on_adapters_only(make):
    model, plain = trained(make(), dropout=0.5), trained(make())
    assert torch.equal(logits(model), logits(plain))                        # the model came in eval mode
    model.train()
    assert not torch.allclose(logits(model), logits(plain), atol=1e-2)
    assert torch.equal(logits(WithoutAdapters(model)), logits(make()))
    torch.manual_seed(0)
    adapter = LoRALinear(nn.Linear(4, 4), rank=4, alpha=4, dropout=0.5)
    with torch.no_grad():
        adapter.lora_a.copy_(torch.eye(4))
        adapter.lora_b.copy_(torch.eye(4))
        change = adapter(torch.ones(100, 4)) - F.linear(torch.ones(100, 4), adapter.weight, adapter.bias)
    assert set(change.round(decimals=4).unique().tolist()) == {0.0, 2.0}    # half is dropped, the rest counts double


# -- the base within -------------------------------------------------------------------------------

@every_kind
def test_without_lora_the_model_is_the_base_to_the_last_bit(make, kind):
    model, base = trained(make(kind)), make(kind)
    adapted = logits(model)
    assert torch.equal(logits(WithoutAdapters(model)), logits(base))
    assert torch.equal(logits(model), adapted)


def test_without_lora_ends_with_an_exception_too(make):
    model = trained(make())
    adapted = logits(model)
    with pytest.raises(TypeError):
        WithoutAdapters(model)("no tokens")
    assert torch.equal(logits(model), adapted)


def test_a_student_learns_from_the_model_it_was(make):
    model = trained(make())
    taught = logits(WithoutAdapters(model))
    (logits(model) - taught).pow(2).mean().backward()
    assert all(module.lora_a.grad.abs().sum() > 0 for module in model.modules() if isinstance(module, LoRALinear))


# -- in and out ------------------------------------------------------------------------------------

@every_kind
def test_adapters_go_into_a_fresh_model(make, kind):
    model, fresh = trained(make(kind)), make(kind)
    add_lora(fresh, rank=3)
    load_lora(fresh, copy.deepcopy(lora_state(model)))
    assert torch.equal(logits(fresh), logits(model))
    assert all(name.endswith((".lora_a", ".lora_b")) for name in lora_state(model))


def test_the_whole_state_is_that_of_the_base_and_the_adapters(make):
    model, base = trained(make()), make().state_dict()
    state = model.state_dict()
    assert state.keys() == base.keys() | lora_state(model).keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    fresh = make(seed=1)
    add_lora(fresh, rank=3)
    fresh.load_state_dict(state)                                            # as a resumed run does
    assert torch.equal(logits(fresh), logits(model))


def test_adapters_of_another_model_are_named_and_nothing_is_changed(make):
    model = trained(make())
    before, state = logits(model), {name: tensor + 1 for name, tensor in lora_state(model).items()}
    del state["layers.0.attention.wq.lora_a"]
    state["layers.7.attention.wq.lora_a"] = torch.zeros(3, 16)
    state["layers.1.ffn.w2.lora_b"] = torch.zeros(16, 4)
    with pytest.raises(ValueError, match="not of this model") as refused:
        load_lora(model, state)
    assert "layers.0.attention.wq.lora_a is missing" in str(refused.value)
    with pytest.raises(ValueError, match="is missing"):
        load_lora(model, {})
    assert torch.equal(logits(model), before)


# -- what is refused -------------------------------------------------------------------------------

REFUSED = (
    ("dense", dict(rank=2, targets=["wq", "wz"]), "--lora_targets wq wz: this model has w1 w2 w3 wk wo wq wv"),
    ("dense", dict(rank=2, targets=[]), "--lora_targets : this model has"),
    ("dense", dict(rank=2, targets=["output"]), "--lora_targets output: "),
    ("gpt2", dict(rank=2, targets=["w1", "w3"]), "--lora_targets w1 w3: this model has w1 w2 wk wo wq wv$"),
    ("experts", dict(rank=2, targets=["router"]), "--lora_targets router: "),
    ("no shared expert", dict(rank=2, targets=["w1", "w2"]), "--lora_targets w1 w2: this model has wk wo wq wv$"),
)


def test_what_does_not_fit_is_refused_before_anything_changes(make):
    for kind, settings, message in REFUSED:
        model = make(kind)
        with pytest.raises(ValueError, match=message):
            add_lora(model, **settings)
        assert all(weight.requires_grad for weight in model.parameters())
        assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_a_model_has_one_set_of_adapters(make):
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(trained(make()), rank=1, targets=["wq"])
    model = make()
    add_lora(model, rank=1, targets=["w1"])
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(model, rank=1, targets=["wq"])


def test_a_quantised_model_takes_no_adapters(make):
    with pytest.raises(ValueError, match="the model is int8"):
        add_lora(quantize(make(), "int8"), rank=1)


def test_a_model_without_adapters_is_refused(make):
    for use in (lora_state, merge_lora, lambda model: load_lora(model, {}), lambda model: logits(WithoutAdapters(model))):
        with pytest.raises(ValueError, match="no adapters; add_lora"):
            use(make())


# -- whole runs ------------------------------------------------------------------------------------


def flags(data, **more):
    return TINY | {"data_path": data / "sft_data.jsonl", "val_path": data / "val.jsonl", "max_steps": 4,
                   "lora_rank": 4} | more


@pytest.fixture(scope="module")
def run(data, models, tmp_path_factory):
    """A folder with the base student.pth and a finished SFT run: full_sft_32_lora.*, and its output."""
    folder = shutil.copytree(models, tmp_path_factory.mktemp("run") / "models")
    printed = succeed("train_sft.py", weights=folder / "student.pth", out_dir=folder,
                      **flags(data, max_steps=8, save_interval=4, lora_dropout=0.1))
    return folder, printed


def test_a_file_of_adapters_is_the_model_with_them_merged(run, tmp_path):
    folder, printed = run
    assert "adapters beside 14 matrices, w1 w2 w3 wk wo wq wv: " in printed
    path = folder / "full_sft_32_lora.pth"
    state, base = load(path), load_model(folder / "student.pth")[0]
    assert all("lora_" in name for name in state)
    model, _ = load_model(path)
    weight = "layers.1.attention.wv.weight"
    change = state["layers.1.attention.wv.lora_b"] @ state["layers.1.attention.wv.lora_a"]
    assert change.norm() > 0
    torch.testing.assert_close(model.get_parameter(weight), base.get_parameter(weight) + change)
    assert torch.equal(model.tok_embeddings.weight, base.tok_embeddings.weight)

    for file in folder.glob("*_lora.*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds adapters to the missing weights"):
        load_model(tmp_path / path.name)


def test_adapters_know_their_base_and_are_no_base(run, data, tmp_path):
    """On weights that were trained again, or on itself, an adapter would be noise. Adapters of the same
    rank, alpha and targets are trained on, beside their base."""
    folder = shutil.copytree(run[0], tmp_path / "copy")
    adapters = folder / "full_sft_32_lora.pth"
    with pytest.raises(ValueError, match=rf"convert\.py --weights {adapters} --out NEW\.pth"):
        adapt(load_model(adapters)[0], adapters, 3, None, 0.0)
    model, base = load_model(adapters)[0], load_model(folder / "student.pth")[0]
    adapt(model, adapters, 4, None, 0.0)
    assert same(dict(lora_state(model)), load(adapters))
    assert torch.equal(model.layers[0].attention.wq.weight, base.layers[0].attention.wq.weight)
    assert Path(model.adapted["base"]).samefile(folder / "student.pth")

    state = load(folder / "student.pth")
    torch.save(state | {"norm.weight": state["norm.weight"] * 2}, folder / "student.pth")
    with pytest.raises(ValueError, match="holds adapters to other weights than those now at"):
        load_model(adapters)
    assert "sha256 of the adapted weights was " in complaint(
        "train_sft.py", weights=folder / "student.pth", out_dir=folder, resume=True,
        **flags(data, max_steps=8, save_interval=4, lora_dropout=0.1))


def test_a_resume_file_holds_the_adapters_without_the_frozen_weights(run):
    state = load(run[0] / "full_sft_32_lora.resume")
    assert same(state["model"], load(run[0] / "full_sft_32_lora.pth"))
    assert len(state["optimizer"]["state"]) == len(state["model"]) == 2 * 7 * 2


def test_a_run_with_adapters_resumes_where_it_was_killed(run, data, tmp_path):
    its = flags(data, max_steps=8, save_interval=4, lora_dropout=0.1, weights=run[0] / "student.pth")
    stopped = start("train_sft.py", out_dir=tmp_path, **its | {"log_interval": 1})
    wait_until(lambda: (tmp_path / "full_sft_32_lora.resume").exists())
    stopped.send()
    stopped.wait()
    assert "resumed" in succeed("train_sft.py", out_dir=tmp_path, resume=True, **its)
    assert same(load(tmp_path / "full_sft_32_lora.pth"), load(run[0] / "full_sft_32_lora.pth"))


@pytest.mark.parametrize("script, files", [
    ("train_distillation.py", {"teacher": "teacher.pth", "student": "student_moe.pth", "feature_weight": 0.1}),
    ("train_pretrain.py", {"weights": "student.pth", "data_path": "pretrain_data.jsonl", "val_path": "none"}),
])
def test_two_processes_train_the_adapters_as_one(script, files, data, models, tmp_path):
    its = flags(data) | {key: models / value if str(value).endswith(".pth") else data / value
                         if key == "data_path" else value for key, value in files.items()}
    for folder, processes, batch_size in (("one", 1, 8), ("two", 2, 4)):
        succeed(script, processes=processes, out_dir=tmp_path / folder, **its | {"batch_size": batch_size})
    one, two = (load(next((tmp_path / folder).glob("*_lora.pth"))) for folder in ("one", "two"))
    assert all("lora_" in name for name in one)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_base_model_runs_without_adapters_and_without_dropout(tiny, training):
    student = tiny(dropout=0.5)
    add_lora(student, rank=2)
    for name, weight in student.named_parameters():
        if name.endswith("lora_b"):
            weight.data.fill_(1.0)
    base = WithoutAdapters(student.train(training))
    tokens = torch.tensor([1, 2, 3])
    assert torch.equal(base(tokens, [3]).logits, tiny()(tokens, [3]).logits) and student.training == training
    assert base.head.data_ptr() == student.head.data_ptr() and base.config is student.config


def test_a_student_may_learn_from_itself_without_adapters(data, models, tmp_path):
    """With privileged context in the teacher's prompts: as from a second copy, bit by bit, features too."""
    twin = shutil.copytree(models, tmp_path / "twin") / "student.pth"
    its = TINY | {"student": models / "student.pth", "data_path": data / "experience_student.jsonl", "lora_rank": 2,
                  "teacher_data_path": data / "experience_teacher.jsonl", "max_steps": 3, "feature_weight": 1,
                  "lora_dropout": 0.1}
    for name, teacher in (("itself", models / "student.pth"), ("another", twin)):
        succeed("train_distillation.py", **its, teacher=teacher, out_dir=tmp_path / name)
    assert same(load(tmp_path / "itself/full_dist_32_lora.pth"), load(tmp_path / "another/full_dist_32_lora.pth"))


def test_a_flag_of_adapters_without_a_rank_is_refused(capsys):
    for flag, value in (("lora_alpha", "16"), ("lora_dropout", "0.1"), ("lora_targets", "wq")):
        parser = ArgumentParser()
        add_training_args(parser)
        with pytest.raises(SystemExit):
            parse_args(parser, [f"--{flag}", value])
        assert f"--{flag} has no effect without --lora_rank: set a rank, or leave it out" in capsys.readouterr().err


def test_a_randomly_initialised_model_is_not_adapted(make):
    with pytest.raises(ValueError, match="--lora_rank adapts pretrained weights"):
        adapt(make(), "none", 2, None, 0.0)


def test_a_model_with_adapters_is_quantised_only_when_they_are_merged(models):
    model, _ = load_model(models / "student.pth")
    adapt(model, models / "student.pth", 4, None, 0.0)
    with pytest.raises(ValueError, match="merge_lora merges them"):
        quantize(model, "int8")
