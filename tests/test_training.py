"""
训练的规律：怎么切分都一样，怎么中断都一样。
Laws of a run: however a step is split and however often a run is interrupted, the result is the same.
"""

import math
import os
import random
import signal
import subprocess
import sys

import pytest
import torch

from dataset.lm_dataset import SFTDataset, in_order
from helpers_run import ROOT, TINY, complaint, first_gradients, load, rows, same, start, succeed, wait_until
from interop.checkpoint import load_model
from distill.teachers import Teacher
from evaluation.validation import evaluate

SPLITS = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]   # batch size, micro-batches, processes: 8 samples


def lesson(name, data, models, kind="", teacher_kind=""):
    """The script of a lesson, its flags, and the name of the files it writes."""
    student = models / f"student{kind}.pth"
    flags = {**TINY, "weights": student, "data_path": data / "sft_data.jsonl"}
    if name == "pretrain":
        return "train_pretrain.py", flags | {"data_path": data / "pretrain_data.jsonl"}, f"pretrain_32{kind}"
    if name == "sft":
        return "train_sft.py", flags, f"full_sft_32{kind}"
    flags |= {"teacher": models / f"teacher{teacher_kind}.pth", "size": "tiny"}
    return "train_distillation.py", flags, f"full_dist_32{kind}"


# ------------------------------------------------------------------------------------------------ a step, split any way


@pytest.mark.parametrize("kind", ["", "_moe"])
@pytest.mark.parametrize("name, more", [
    ("pretrain", {}), ("sft", {}),
    ("distillation", {"alpha": 0.5, "temperature": 2.0, "feature_weight": 0.1, "attention_weight": 1.0, "relation_heads": 2})])
def test_eight_samples_give_one_gradient_however_they_are_split(name, more, kind, data, models, tmp_path):
    script, flags, file = lesson(name, data, models, kind)
    gradients = {}
    for batch_size, accumulation_steps, processes in SPLITS:
        folder = tmp_path / f"{batch_size}x{accumulation_steps}x{processes}"
        split = {"batch_size": batch_size, "accumulation_steps": accumulation_steps, "processes": processes}
        succeed(script, **flags | more | split, grad_clip=0, max_steps=1, eval_interval=0, out_dir=folder)
        gradients[folder.name] = first_gradients(folder / f"{file}.resume")
    whole = gradients.pop("8x1x1")
    for split in gradients.values():
        for g, expected in zip(split, whole, strict=True):      # one part in 2^23 is fp32's rounding
            assert (g - expected).abs().max() <= 4e-6 * expected.abs().max()


# ----------------------------------------------------------------------------------------- a gradient that is not finite

BREAKS = """
import os, runpy, sys, torch
sys.path.insert(0, os.getcwd())
clip, step, sys.argv = torch.nn.utils.clip_grad_norm_, 0, sys.argv[1:]
from distill import fused

def broken(weights, limit):
    global step
    step += 1
    if step in BAD_STEPS:
        weights[0].grad[0] = float("nan")
    return clip(weights, limit)

torch.nn.utils.clip_grad_norm_ = broken
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_step_without_a_finite_gradient_changes_nothing(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    code = BREAKS.replace("BAD_STEPS", "(2, 4)")
    said = succeed("-c", code, script, **flags, max_steps=4, save_interval=1, log_interval=4, out_dir=tmp_path)
    assert "step 2 is not finite: its update is skipped" in said
    before, after = (load(tmp_path / f"{file}.resume{end}") for end in (".previous", ""))
    assert (before["progress"]["steps_done"], after["progress"]["steps_done"]) == (3, 4)
    assert same([before["model"], before["optimizer"]["state"]], [after["model"], after["optimizer"]["state"]])
    written = rows(tmp_path / f"{file}.jsonl")
    assert all(math.isfinite(value) for row in written for value in row.values())
    assert [row["step"] for row in written if "skipped_steps" in row] == [2, 4]


@pytest.mark.parametrize("name, processes", [("sft", 1), ("distillation", 2)])
def test_a_run_that_diverges_ends_with_an_error_and_keeps_its_files(name, processes, data, models, tmp_path):
    script, flags, file = lesson(name, data, models)
    flags |= {"save_interval": 2, "eval_interval": 0, "out_dir": tmp_path, "processes": processes}
    succeed(script, **flags, max_steps=2)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".pth", ".resume")}
    said = complaint(script, **flags | {"learning_rate": 1e30, "save_interval": 100}, max_steps=10)
    assert "is not finite" in said and "3 steps in a row" in said and "--learning_rate" in said
    assert kept.items() <= {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in kept}.items()


def test_a_teacher_that_gives_nan_on_one_process_is_named_as_the_cause_by_all(data, models, tmp_path):
    script, flags, _ = lesson("distillation", data, models)
    code = BREAKS.replace("BAD_STEPS", "()").replace("def broken", """
of = fused.Chunks.teacher_log_p
if os.environ["RANK"] == "1":                   # DDP gives its NaN to the other, which names kd too
    fused.Chunks.teacher_log_p = lambda *these: of(*these) * float("nan")

def broken""")
    said = complaint("-c", code, script, **flags, max_steps=9, out_dir=tmp_path, processes=2)
    assert "the loss, kd of step 3 is not finite" in said and "the teacher's outputs" in said


# ------------------------------------------------------------------------------------------------- interrupted, resumed

STEPS = {"max_steps": 40, "save_interval": 2, "log_interval": 3, "eval_interval": 5}


def newest_step(metrics) -> int:
    return max((row["step"] for row in rows(metrics)), default=0)


def all_that_is_left(folder, file) -> list:
    """What a run leaves behind: weights, best weights, resume file and metrics."""
    return [load(folder / f"{file}.pth"), load(folder / f"{file}_best.pth"), load(folder / f"{file}.resume"),
            rows(folder / f"{file}.jsonl")]


@pytest.mark.parametrize("name, kind, more", [
    ("pretrain", "", {"processes": 2}),
    ("sft", "", {"weights": "none", "dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.1, "num_workers": 1}),
    ("sft", "_moe", {"optimizer": "adamw"}),
    ("distillation", "_moe", {"processes": 2, "feature_weight": 0.1, "alpha": 0.5, "final_temperature": 2}),
], ids=["pretrain, 2 processes", "sft, dropout and a loader thread", "sft, adamw", "distillation, 2 processes"])
def test_a_run_killed_three_times_ends_as_the_unbroken_one(name, kind, more, data, models, tmp_path):
    script, flags, file = lesson(name, data, models, kind)
    flags = flags | STEPS | more
    succeed(script, **flags, out_dir=tmp_path / "unbroken")

    broken = tmp_path / "broken"
    for step in sorted(random.Random(0).sample(range(2, 38), 3)):
        killed = start(script, **flags, out_dir=broken, resume=True)
        wait_until(lambda: newest_step(broken / f"{file}.jsonl") >= step)
        killed.send(signal.SIGKILL)
        assert killed.wait().code == -signal.SIGKILL
    said = succeed(script, **flags, out_dir=broken, resume=True)
    assert f"resumed {broken}/{file}.resume after step" in said
    assert same(all_that_is_left(tmp_path / "unbroken", file), all_that_is_left(broken, file))


def test_a_chain_killed_at_its_second_student_goes_on_there(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    few = tmp_path / "few.jsonl"                        # so few that each teacher reads them once, for all epochs
    few.write_text("".join((data / "sft_data.jsonl").read_text().splitlines(keepends=True)[:100]))
    flags |= STEPS | {"chain": ["48x2"], "data_path": few, "val_path": data / "val.jsonl"}
    assert "reads a sample once" in succeed(script, **flags, out_dir=tmp_path / "unbroken")

    killed = start(script, **flags, out_dir=tmp_path / "broken")
    wait_until(lambda: newest_step(tmp_path / "broken" / f"{file}.jsonl") >= 10)
    killed.send(signal.SIGKILL)
    killed.wait()
    said = succeed(script, **flags, out_dir=tmp_path / "broken", resume=True)
    assert "full_dist_48.resume after step 40" in said
    for student in ("full_dist_48", file):
        assert same(all_that_is_left(tmp_path / "unbroken", student), all_that_is_left(tmp_path / "broken", student))


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGHUP, 1)])
def test_a_run_asked_to_stop_saves_and_can_go_on(number, processes, data, models, tmp_path):
    script, flags, file = lesson("sft", data, models)
    flags |= {"processes": processes, "max_steps": 60, "log_interval": 1, "save_interval": 1000, "num_workers": 1}
    succeed(script, **flags, out_dir=tmp_path / "unbroken")

    asked = start(script, **flags, out_dir=tmp_path / "stopped")
    wait_until(lambda: newest_step(tmp_path / "stopped" / f"{file}.jsonl") >= 3)
    os.kill(asked.processes[-1].pid, number)        # one process receives it; all stop at the same step
    code, said = asked.wait()
    assert code == 130 and "Traceback" not in said
    stopped_at = load(tmp_path / "stopped" / f"{file}.resume")["progress"]["steps_done"]
    assert 3 <= stopped_at < 60 and f"stopped after step {stopped_at} of 60" in said

    succeed(script, **flags, out_dir=tmp_path / "stopped", resume=True)
    assert same(load(tmp_path / "stopped" / f"{file}.pth"), load(tmp_path / "unbroken" / f"{file}.pth"))


def test_ctrl_c_in_a_terminal_stops_torchrun_and_saves(data, models, tmp_path):
    script, flags, file = lesson("sft", data, models)
    flags |= {"max_steps": 100_000, "log_interval": 1, "out_dir": tmp_path}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script, "--ddp"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    output = tmp_path / "output"
    with open(output, "w") as said:
        torchrun = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
    wait_until(lambda: newest_step(tmp_path / f"{file}.jsonl") >= 3)
    os.killpg(torchrun.pid, signal.SIGINT)      # a terminal sends Ctrl-C to all in the foreground
    torchrun.wait(60)
    assert f"stopped after step {load(tmp_path / f'{file}.resume')['progress']['steps_done']} of 100000" in output.read_text()


# What each process of a run does, and the names of its threads that are left when all of it is over.
GROUP_AND_DDP = """
import atexit, os, sys
from pathlib import Path
import torch
sys.path.insert(0, ".")
from runtime.processes import DistributedDataParallel, init_distributed_mode

threads = lambda: [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
say = lambda text: os.write(1, f"{text}\\n".encode())     # a line whole, whatever the other process prints
atexit.register(lambda: say(f"left behind: {[name for name in threads() if 'gloo' in name]}"))
init_distributed_mode(device="cpu")
DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
say(f"at work: {any('gloo' in name for name in threads())}")
"""


def test_the_threads_between_processes_end_before_python_does(tmp_path):
    """One that is alive while Python shuts down can end the process with an abort."""
    script = tmp_path / "group.py"
    script.write_text(GROUP_AND_DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.count("at work: True") == said.count("left behind: []") == 2, said


def cut(path, part: float):
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])


def short_run(data, models):
    """Eight steps that save after the sixth and the last."""
    script, flags, file = lesson("sft", data, models)
    return script, {**flags, "max_steps": 8, "save_interval": 2, "log_interval": 1, "eval_interval": 0}, file


def test_a_resume_file_cut_short_gives_way_to_the_one_before(data, models, tmp_path):
    script, flags, file = short_run(data, models)
    resume = tmp_path / f"{file}.resume"
    succeed(script, **flags, out_dir=tmp_path)
    weights = load(tmp_path / f"{file}.pth")
    for part in (0.0, 0.999):
        (tmp_path / f"{file}.pth").unlink()
        before = tmp_path.joinpath(f"{file}.resume.previous").read_bytes()
        cut(resume, part)
        said = succeed(script, **flags, out_dir=tmp_path, resume=True)
        assert f"{file}.resume cannot be read" in said and "after step 6" in said
        assert same(load(tmp_path / f"{file}.pth"), weights)
        tmp_path.joinpath(f"{file}.resume.previous").write_bytes(before)

    cut(resume, 0.5)
    cut(tmp_path / f"{file}.resume.previous", 0.5)
    said = complaint(script, **flags, out_dir=tmp_path, resume=True)
    assert f"no readable resume file at {resume}; start anew without --resume" in said


def test_a_run_killed_between_two_saves_finds_the_one_before(data, models, tmp_path):
    script, flags, file = short_run(data, models)
    succeed(script, **flags, out_dir=tmp_path)
    (tmp_path / f"{file}.resume").unlink()      # renamed to .previous already, the new one not yet in its place
    assert "after step 6" in succeed(script, **flags, out_dir=tmp_path, resume=True)


def test_a_finished_run_that_is_resumed_trains_nothing(data, models, tmp_path):
    script, flags, file = short_run(data, models)
    succeed(script, **flags, out_dir=tmp_path)
    before = all_that_is_left(tmp_path, file)
    assert "after step 8" in succeed(script, **flags, out_dir=tmp_path, resume=True)
    assert same(all_that_is_left(tmp_path, file), before)


def test_the_resume_file_of_another_run_is_refused(data, models, tmp_path):
    script, flags, file = short_run(data, models)
    succeed(script, **flags, out_dir=tmp_path)
    for other, reason in (({"seed": 7}, "seed was 1337, is 7"), ({"max_steps": 9}, "total steps was 8, is 9"),
                          ({"batch_size": 4}, "samples per step was 8, is 4"),
                          ({"data_path": data / "sft_data_clean.jsonl"}, "data was sft_data.jsonl-"),
                          ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001")):
        said = complaint(script, **flags | other, out_dir=tmp_path, resume=True)
        assert f"{file}.resume belongs to another run: {reason}" in said and "Start anew without --resume" in said


def test_an_interrupted_run_of_two_processes_goes_on_with_one(data, models, tmp_path):
    """What one process of 4 samples and two micro-batches learns is what two processes of 4 learn."""
    script, flags, file = lesson("sft", data, models)
    flags |= {"max_steps": 8, "batch_size": 4, "log_interval": 1}
    succeed(script, **flags, processes=2, out_dir=tmp_path / "two")
    succeed(script, **flags, processes=2, out_dir=tmp_path / "mixed", save_interval=4)
    (tmp_path / "mixed" / f"{file}.resume").unlink()
    said = succeed(script, **flags, accumulation_steps=2, out_dir=tmp_path / "mixed", resume=True)
    assert "after step 4" in said
    two, mixed = (rows(tmp_path / folder / f"{file}.jsonl") for folder in ("two", "mixed"))
    for one, other in zip(two, mixed, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ what is learned


@pytest.mark.parametrize("kind", ["", "_moe"])
def test_one_batch_can_be_learned_by_heart(kind, data, models, tmp_path):
    script, flags, file = lesson("sft", data, models, kind)
    eight = tmp_path / "eight.jsonl"
    eight.write_text("".join((data / "sft_data_clean.jsonl").read_text().splitlines(keepends=True)[:8]))
    succeed(script, **flags | {"data_path": eight, "val_path": "none"}, max_steps=80, log_interval=1,
            weight_decay=0, out_dir=tmp_path)
    losses = [row["loss"] for row in rows(tmp_path / f"{file}.jsonl")]
    assert losses[0] > 6 and losses[-1] < 0.05      # ln 1024 = 6.9: at first all words are as likely


def test_the_best_checkpoint_is_the_one_of_the_lowest_validation_loss(data, models, tmp_path, cache):
    script, flags, file = lesson("distillation", data, models)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((data / "sft_data.jsonl").read_text().splitlines(keepends=True)[:8]))
    flags |= {"data_path": few, "val_path": data / "val.jsonl", "alpha": 1.0, "max_steps": 40, "eval_interval": 1,
              "save_interval": 38, "out_dir": tmp_path}
    succeed(script, **flags)
    kl = [row["val_kl"] for row in rows(tmp_path / f"{file}.jsonl") if "val_kl" in row]
    assert len(kl) == 41 and min(kl[1:39]) < min(kl[39:])       # with step 0; eight samples by heart, and strangers to the rest

    teacher, tokenizer = load_model(models / "teacher.pth")
    best, _ = load_model(tmp_path / f"{file}_best.pth")
    val = in_order(SFTDataset([data / "val.jsonl"], tokenizer, 128))
    scores = evaluate(best, val, torch.device("cpu"), teachers=[Teacher(teacher, 1.0, tokenizer)])
    assert scores["val_kl"] == pytest.approx(min(kl), rel=1e-5)

    (tmp_path / f"{file}.resume").unlink()
    assert "after step 38" in succeed(script, **flags, resume=True)
    assert same(load(tmp_path / f"{file}_best.pth"), best.state_dict())         # a resumed run remembers what was best


def test_distillation_that_listens_to_labels_alone_is_fine_tuning(data, models, tmp_path):
    for name, more in (("sft", {}), ("distillation", {"alpha": 1.0, "plain_loss": True})):
        script, flags, file = lesson(name, data, models)
        succeed(script, **flags | more, max_steps=2, eval_interval=0, out_dir=tmp_path)
    assert same(load(tmp_path / "full_dist_32.pth"), load(tmp_path / "full_sft_32.pth"))


def test_a_teacher_equal_to_the_student_teaches_nothing(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    flags |= {"teacher": models / "student.pth", "temperature": 4.0, "max_steps": 1, "log_interval": 1}
    assert "so the KD loss is zero" in succeed(script, **flags, eval_interval=0, out_dir=tmp_path)
    (row,) = [row for row in rows(tmp_path / f"{file}.jsonl") if "kd" in row]
    assert abs(row["kd"]) < 1e-5 and row["grad_norm"] < 1e-5 and row["ce"] > 6


def test_the_first_line_of_a_distillation_says_its_loss(data, models, tmp_path):
    script, flags, _ = lesson("distillation", data, models)
    said = succeed(script, **flags, alpha=0.5, temperature=4, max_steps=1, out_dir=tmp_path / "a")
    assert "loss = 0.50 CE + 0.50 * 4^2 * KL(teacher || student) at T=4; 1 steps of 8 samples" in said
    script, flags, _ = lesson("distillation", data, models, "_moe")
    said = succeed(script, **flags, final_temperature=3, feature_weight=0.1, max_steps=1, out_dir=tmp_path / "b")
    assert ("loss = 0.00 CE + 1.00 * 1^2 * KL(teacher || student) at T=1 moving to 3 + 0.1 * feature MSE "
            "+ 0.01 * balance") in said


def test_the_logged_loss_is_the_sum_of_its_parts(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models, "_moe")
    flags |= {"alpha": 0.25, "temperature": 2.0, "final_temperature": 5.0, "feature_weight": 0.5, "max_steps": 4}
    succeed(script, **flags, log_interval=1, accumulation_steps=2, eval_interval=0, out_dir=tmp_path)
    found = rows(tmp_path / f"{file}.jsonl")[:4]
    assert [row["temperature"] for row in found] == [2.0, 3.0, 4.0, 5.0]
    for row in found:
        parts = 0.25 * row["ce"] + 0.75 * row["kd"] + 0.5 * row["feature"] + 0.01 * row["balance"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_row_has_the_means_of_all_steps_since_the_row_before_whenever_the_run_validates(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    flags |= {"alpha": 0.5, "max_steps": 4, "val_path": data / "val.jsonl"}
    for name, more in (("each", {"log_interval": 1}), ("all", {"log_interval": 4, "eval_interval": 3})):
        succeed(script, **flags | more, out_dir=tmp_path / name)
    each, means = ([row for row in rows(tmp_path / name / f"{file}.jsonl") if "kd" in row] for name in ("each", "all"))
    assert [row["step"] for row in means] == [4]
    for term in ("loss", "ce", "kd"):
        assert means[0][term] == pytest.approx(sum(row[term] for row in each) / 4, rel=1e-5)


def test_the_feature_projections_are_trained_saved_and_resumed(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    flags |= {"feature_weight": 0.1, "max_steps": 6, "save_interval": 3, "log_interval": 1, "out_dir": tmp_path}
    succeed(script, **flags)
    after_3, after_6 = (load(tmp_path / f"{file}.resume{end}")["intermediate"] for end in (".previous", ""))
    assert {name: tuple(weight.shape) for name, weight in after_3.items()} == {
        "projections.maps.0.weight": (48, 32), "projections.maps.1.weight": (48, 32)}       # one for each of the student's two layers
    assert all((after_6[name] - after_3[name]).abs().max() > 1e-3 for name in after_3)
    losses = [row["feature"] for row in rows(tmp_path / f"{file}.jsonl") if "feature" in row]
    assert losses[-1] < losses[0]

    (tmp_path / f"{file}.resume").unlink()
    succeed(script, **flags, resume=True)
    assert same(load(tmp_path / f"{file}.resume")["intermediate"], after_6)


def test_dropout_is_off_while_validating_and_on_while_training(data, models, tmp_path):
    """At a learning rate of 0, on the same eight rows in each step; each step has dropout of its own."""
    script, flags, file = lesson("sft", data, models)
    eight = tmp_path / "eight.jsonl"
    eight.write_text("".join((data / "sft_data.jsonl").read_text().splitlines(keepends=True)[:8]))
    flags |= {"weights": "none", "dim": 32, "n_layers": 1, "n_heads": 2, "learning_rate": 0.0, "max_steps": 2,
              "data_path": eight, "val_path": data / "val.jsonl"}
    found = {}
    for dropout in (0.0, 0.5):
        succeed(script, **flags, dropout=dropout, log_interval=1, eval_interval=1, out_dir=tmp_path / str(dropout))
        found[dropout] = rows(tmp_path / str(dropout) / f"{file}.jsonl")
    for step, (whole, dropped) in enumerate(zip(found[0.0], found[0.5], strict=True)):
        if step % 2 == 0:   # before and after each step of training, a validation
            assert whole["val_loss"] == dropped["val_loss"]
        else:
            assert whole["loss"] != dropped["loss"]
    first, second = ([row["loss"] for row in found[dropout] if "loss" in row] for dropout in (0.0, 0.5))
    assert first[0] == pytest.approx(first[1], rel=1e-6) and second[0] != pytest.approx(second[1], rel=1e-3)
