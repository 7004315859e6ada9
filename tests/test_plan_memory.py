"""
显存规划的规律：参数一个不差，激活逐字节等于 autograd 真正保存的，分片除以进程数。
Laws of the memory plan: weights are counted exactly, activations to the byte that autograd keeps,
and shards divide by the number of processes.
"""

import itertools
import re
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from helpers_run import ROOT
from model.config import LMConfig
from model.lora import add_lora, lora_state, store_frozen
from model.sizes import SIZES
from model.transformer import Transformer
from planned_and_measured import measured
from scripts.list_flags import parser_of
from scripts.plan_memory import (count, first_that_fits, kept_of_a_layer, label, main, n_bytes, plan,
                                 table, total)

SMALL = LMConfig(dim=32, n_layers=3, n_heads=8, n_kv_heads=2, head_dim=8, hidden_dim=80,
                 vocab_size=50, max_seq_len=64)
B8 = SIZES["8B"]
WHOLE = {"shard": "none", "processes": 1}


def by_name(config, teacher=None, **run) -> dict[str, int]:
    return {name: n_bytes(formula) for name, formula in plan(config, teacher, **run).items()}


def test_a_formula_is_computed_as_it_is_printed():
    assert n_bytes("4 B x 1,001 / 8 processes") == 500
    assert n_bytes("(2 + 4) B x one layer's 10 + 3 tokens x (2 layers x 5 + 1)") == 93


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"qk_norm": True}, {"tie_embeddings": False},
                                   {"attention_bias": True}, {"use_moe": True}])
def test_the_weights_counted_are_those_of_the_model(sizes):
    """Also with adapters, where frozen matrices are stored in bf16."""
    config = replace(SMALL, **sizes)
    model, n = Transformer(config), count(config)
    assert n.all == n.trained == model.n_parameters()
    assert n.rest + 3 * n.layer == n.all
    add_lora(model, 4)
    assert count(config, lora_rank=4).trained == sum(weight.numel() for weight in lora_state(model).values())
    store_frozen(model, torch.bfloat16)
    planned = by_name(model.config, lora_rank=4)
    assert planned["weights"] + planned["adapters"] == sum(w.nbytes for w in model.parameters())


def test_the_sizes_have_the_weights_that_are_published():
    assert {name: count(config).all for name, config in SIZES.items()} == {
        "0.6B": 596_049_920, "1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360,
        "14B": 14_768_307_200, "32B": 32_762_123_264, "70B": 70_553_706_496}


def test_the_weights_of_8b_by_hand():
    """36 layers of wq and wo, wk and wv, three of the FFN, two norms of 4096 and two of a head;
    embedding and head. 16 bytes for each are 131 GB, and no GPU has them."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    assert count(B8).layer == layer == 192_946_432
    assert 36 * layer + 2 * 151_936 * 4096 + 4096 == 8_190_735_360
    found = by_name(B8)
    assert found["weights"] + found["gradients"] + found["moments"] == 16 * 8_190_735_360
    checkpointed = WHOLE | {"grad_checkpoint": True}
    assert first_that_fits(B8, B8, checkpointed, 72e9)[0]["lora_rank"] > 0


# ---- activations ---------------------------------------------------------------------------------


def kept_by_autograd(config, dtype) -> int:
    """Bytes that a forward pass over two samples of 64 leaves for the backward pass, weights
    aside."""
    model = Transformer(config).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {shape for weight in model.parameters()
              for shape in (weight.shape, weight.shape[::-1])}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_copy_of_weight = tensor.dtype == torch.bfloat16 and tensor.shape in shapes
        if storage.data_ptr() not in weights and not is_copy_of_weight:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype):
            model(torch.arange(128) % 50, [64, 64], with_logits=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_activations_are_what_autograd_keeps_to_the_byte(dtype, qk_norm):
    config = replace(SMALL, qk_norm=qk_norm)
    planned = by_name(config, batch_size=2, max_seq_len=64, dtype=str(dtype)[6:])
    assert planned["activations"] == kept_by_autograd(config, dtype)


def test_with_checkpoints_the_inputs_of_the_layers_are_kept_and_one_layer_more():
    """Three layers, 128 tokens of 32 numbers; the backward pass recomputes one layer at a time.
    Beside layers: the id, 4 complex numbers of the rotation, the last norm."""
    run = {"batch_size": 2, "max_seq_len": 64, "dtype": "float32"}
    found = by_name(SMALL, **run, grad_checkpoint=True)["activations"]
    beside = 8 + 4 * 8 + 2 * 4 * 32 + 4
    assert found == 128 * (3 * 4 * 32 + kept_of_a_layer(SMALL, 4) + beside)
    assert found < by_name(SMALL, **run)["activations"]


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
@pytest.mark.parametrize("lora_rank", [0, 16])
def test_shards_divide_weights_gradients_and_moments_by_the_processes(shard, lora_rank):
    whole = by_name(B8, processes=8, lora_rank=lora_rank)
    shared = by_name(B8, processes=8, shard=shard, lora_rank=lora_rank)
    for name in ("weights", "gradients", "moments"):
        assert shared[name] == whole[name] // 8


def test_only_zero3_shards_the_teacher():
    each = {shard: by_name(B8, B8, processes=8, shard=shard)["teacher"]
            for shard in ("none", "zero2", "zero3")}
    assert each == {"none": 2 * 8_190_735_360, "zero2": 2 * 8_190_735_360,
                    "zero3": 2 * 8_190_735_360 // 8}
    assert "teacher" not in by_name(B8, lora_rank=16)       # it has no weights of its own


def test_more_processes_never_need_more_each_and_zero3_never_more_than_zero2():
    for lora_rank, grad_checkpoint in itertools.product((0, 16), (False, True)):
        needed = {shard: [total(plan(B8, B8, processes=n, shard=shard, lora_rank=lora_rank,
                                     grad_checkpoint=grad_checkpoint)) for n in (1, 2, 4, 8)]
                  for shard in ("none", "zero2", "zero3")}
        assert all(each == sorted(each, reverse=True) for each in needed.values())
        assert all(map(int.__lt__, needed["zero3"][1:], needed["zero2"][1:]))


# ---- adapters, loss, generation ------------------------------------------------------------------


def test_adapters_alone_have_gradients_and_moments():
    """8B at rank 16: 36 layers x 16 x (wq and wo 2 (4096 + 4096), wk and wv 2 (4096 + 1024), FFN
    3 (4096 + 12288)). Its matrices are stored in bf16: 18.9 GB in all instead of 32.8."""
    trained = 36 * 16 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    matrices = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    found = by_name(B8, lora_rank=16)
    assert (found["weights"], found["adapters"], found["gradients"], found["moments"]) == (
        2 * matrices + 4 * (8_190_735_360 - matrices), 4 * trained, 4 * trained, 8 * trained)
    assert found["copies for autocast"] == 2 * trained
    in_fp32 = by_name(B8, lora_rank=16, dtype="float32")
    assert in_fp32["weights"] == 4 * 8_190_735_360 and "copies for autocast" not in in_fp32


def test_generation_comes_before_the_backward_pass_so_that_only_the_larger_counts():
    """8B: 2 x 2 bytes x 36 layers x 8 x 128 are 147,456 bytes a token; 16 answers of 2,048 tokens
    take 4.8 GB."""
    training = by_name(B8, grad_checkpoint=True)
    assert by_name(B8, grad_checkpoint=True, max_new_tokens=256) == training
    generating = by_name(B8, grad_checkpoint=True, max_new_tokens=256, rows=64)
    assert generating["KV cache"] == 147_456 * 64 * 2048 and "activations" not in generating


def test_whole_logits_cost_more_than_the_fused_loss():
    fused, whole = (by_name(B8, distilled=distilled)["loss"] for distilled in (True, False))
    assert whole > 2 * fused


def test_flags_of_the_training_scripts_have_their_defaults():
    ours, training = (parser_of(script) for script in ("scripts/plan_memory.py", "train_sft.py"))
    for name in ("optimizer", "dtype", "shard"):
        assert ours.get_default(name) == training.get_default(name)


def test_muon_has_one_moment_for_the_matrices_of_the_layers_and_adapters_are_adamws():
    matrices = 36 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    found = by_name(B8, optimizer="muon")
    assert found["moments"] == 4 * matrices + 8 * (8_190_735_360 - matrices)
    assert by_name(B8, optimizer="muon", lora_rank=16) == by_name(B8, lora_rank=16)


# ---- table and command ---------------------------------------------------------------------------


def test_the_table_takes_the_simplest_flags_that_fit_and_leaves_out_what_fits_nowhere():
    """0.6B trains whole on any GPU; 8B needs shards for that, and for 32B they are not enough."""
    lines = table(WHOLE | {"grad_checkpoint": True}, 72e9).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["model", "weights", "1 GPU", "2 GPUs", "4 GPUs", "8 GPUs"]
    assert [row[-1].partition(":")[0] for row in cells[2:]] == [
        "full, none", "full, none", "full, zero2", "full, zero2", "full, zero3", "LoRA 16, zero3",
        "-"]
    assert cells[5] == ["8B", "8.19 G", *2 * ["LoRA 16, none: 43 GB"], "full, zero3: 57 GB",
                        "full, zero2: 63 GB"]
    assert label(16, "zero3") == "LoRA 16, zero3"


def test_a_remedy_is_the_cheapest_that_fits_and_adapters_come_last():
    """8B in 72 GB. One GPU: its 16 bytes a weight alone are 131 GB. Eight: 2 a weight, and 41 GB of
    activations."""
    def cheapest(name, **more):
        found = first_that_fits(SIZES[name], SIZES[name], WHOLE | more, 72e9)
        return found and found[0]

    checkpoint = {"grad_checkpoint": True}
    assert cheapest("8B") == {"lora_rank": 16} | checkpoint
    assert cheapest("8B", processes=8) == {"shard": "zero2"} | checkpoint
    assert cheapest("8B", processes=8, shard="zero3") == checkpoint
    assert cheapest("70B") is None and cheapest("70B", processes=8) is None


def test_shards_are_no_remedy_for_a_single_process():
    """Even where the copies for autocast, which shards do without, would make the difference."""
    sharded = total(plan(B8, B8, shard="zero3", grad_checkpoint=True))
    assert sharded < total(plan(B8, B8, grad_checkpoint=True))
    assert first_that_fits(B8, B8, WHOLE, sharded)[0] == {"lora_rank": 16}


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--student 8B") is the command, in this process. Returns what it printed."""
    def run_it(flags):
        monkeypatch.setattr(sys, "argv", ["scripts/plan_memory.py", *flags.split()])
        try:
            main()
        except SystemExit as ended:
            return f"{capsys.readouterr().err}{ended.code}"
        return capsys.readouterr().out

    return run_it


def test_a_plan_that_does_not_fit_names_what_would(run):
    printed = run("--student 8B")
    assert re.search("does not fit: 80 GB leave 72\nit fits with --lora_rank 16 --grad_checkpoint: "
                     r"[\d.]+ GB\n", printed)
    assert "\nnone of these flags makes it fit" in run("--student 70B")


def test_the_terms_that_are_printed_add_up(run):
    printed = run("--student 8B --processes 8 --shard zero3 --grad_checkpoint")
    *parts, whole = [float(number) for number in re.findall(r"([\d.]+) GB  ", printed)]
    assert sum(parts) == pytest.approx(whole, abs=0.01 * len(parts))
    assert "4 B x 8,190,735,360 / 8 processes" in printed and "fits: 80 GB leave 72" in printed


def test_a_served_teacher_takes_no_memory_here(run):
    """And the manual has the plan's figures, with 2 bytes and 4.5 bits of each weight on the server."""
    server = count(SIZES["70B"]).all
    for name, flags in (("1.7B, full", "--student 1.7B"), ("8B, LoRA 16", "--student 8B --lora_rank 16")):
        printed = run(f"{flags} --grad_checkpoint --teacher served")
        assert "teacher" not in printed
        whole = float(re.search(r"on each process +([\d.]+) GB", printed)[1])
        assert (f"| {name} | {whole:.0f} GB | 0 | {2 * server / 1e9:.0f} GB | {4.5 / 8 * server / 1e9:.0f} GB |"
                in (ROOT / "docs/memory.md").read_text(encoding="utf-8"))


def test_a_model_at_a_path_is_read(models, run):
    printed = run(f"--student {models}/student.pth --teacher {models}/teacher.pth")
    n = count(LMConfig(dim=32, n_layers=2, n_heads=2, vocab_size=1024)).all
    assert f"4 B x {n:,}" in printed


@pytest.mark.parametrize("flags, reason", [
    ("--student 9B", "9B is no path, and none of the sizes 0.6B"),
    ("--student 8B --processes 0", "--processes 0 must lie in [1, 1000]"),
    ("--student 8B --shard zero3",
     "--shard zero3 shards over processes, and there is one: --processes 2"),
])
def test_a_plan_that_cannot_be_says_why(flags, reason, run):
    assert reason in run(flags)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_real_step_takes_what_was_planned(optimizer):
    """Two steps of a pair of 2 M parameters, in a process of its own."""
    config = LMConfig(dim=256, n_layers=2, vocab_size=2000, qk_norm=True)
    run = {"batch_size": 1, "max_seq_len": 512, "dtype": "float32", "optimizer": optimizer}
    assert total(plan(config, config, **run)) == pytest.approx(measured(config, run), rel=0.2)
