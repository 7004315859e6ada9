"""
两个测速脚本：几个进程的代价、一步怎样增长；在极小的尺寸上跑一遍，梯度错的不会被计时。
Two benchmarks, what several processes cost and how a step grows: they run on a tiny size, and a wrong gradient has no speed.
"""

import json

import pytest
import torch
from helpers_run import FORKS

from benchmarks import ddp, measure, scaling
from benchmarks.measure import TOLERANCE
from benchmarks.scaling import RandomSamples
from dataset.lm_dataset import MicroBatches
from runtime.run import Run

TINY = ["--model", "16x1", "--vocab", "20", "--length", "4", "--steps", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """A process that imports torch anew takes seconds; a fork of one that has it is as good here."""
    monkeypatch.setattr(measure, "get_context", lambda _: FORKS)
    monkeypatch.setattr(ddp, "START", "forkserver")


class Halved(ddp.Ours):
    """One that forgets that DDP takes the mean."""

    def backward(self, loss):
        super().backward(loss / self.world.size)


class Silent(ddp.Ours):
    """One whose gradients never travel."""

    def forward(self, last):
        return super().forward(last=False)


def test_processes_that_speak_have_the_gradient_of_one_with_all_the_data(tmp_path, capsys):
    ddp.main([*TINY, "--tokens", "8", "--json", str(tmp_path / "ddp.json"), "--picture", str(tmp_path / "ddp.png")])
    rows = json.loads((tmp_path / "ddp.json").read_text())["rows"]
    assert {row["form"]: row["processes"] for row in rows} == {
        "not speaking": 2, "alone": 1, "plain DDP": 2, "Run": 2}
    assert rows[0]["time_ratio"] == 1.0 and all(row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert [row["deviation"] for row in rows[:2]] == [None, None]       # each has its own gradient
    assert all(0.0 < row["deviation"] < TOLERANCE for row in rows[2:])  # summed in another order, and the same
    # Of both processes, 4 micro-batches of 8 tokens each: 64 tokens a step.
    assert [row["tokens_per_s"] * row["seconds"] for row in rows] == pytest.approx([64, 32, 64, 64])

    printed = capsys.readouterr().out
    for row in rows:
        assert f"| {row['form']} | {row['processes']} | {row['seconds']:.3g} | {row['time_ratio']:.2f} |" in printed
    assert (tmp_path / "ddp.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [Halved, Silent])
def test_a_form_with_another_gradient_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(ddp, "FORMS", {"wrong": ddp.Form(several=True, speaking=True, run=wrong)})
    with pytest.raises(SystemExit, match="wrong, .* away from one process with all data"):
        ddp.main([*TINY, "--tokens", "4", "--accumulation", "2"])


def test_each_axis_has_a_table_a_panel_and_its_rows(tmp_path, capsys):
    axes = {"tokens": "4,8", "model": "16x1,32x1", "vocab": "20,40", "length": "4,2", "experts": "2,4"}
    scaling.main([*TINY, "--tokens", "8", "--axes", *(f"{axis}={values}" for axis, values in axes.items()),
                  "--json", str(tmp_path / "scaling.json"), "--picture", str(tmp_path / "scaling.png")])
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["group"], row["form"]) for row in rows] == [
        (axis, value) for axis, values in axes.items() for value in values.split(",")]
    linear = {row["group"]: row["linear"] for row in rows[1::2]}
    # Student and teacher, 16 x 1 and 32 x 2, then 32 x 1 and 64 x 2: more than twice the parameters, less than four times.
    assert 2 < linear.pop("model") < 4
    assert linear == {"tokens": 2, "vocab": 2, "length": 1 / 2, "experts": 2}
    assert all(row["ratio"] == row["linear"] == row["peak_ratio"] == 1 for row in rows[::2])

    printed = capsys.readouterr().out
    for axis in axes:
        assert f"| {scaling.AXES[axis][0]} | seconds |" in printed
    for row in rows:
        assert f" | {row['seconds']:.3g} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} | {row['linear']:.2f} |" in printed
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_of_random_samples_the_second_half_is_predicted_and_an_epoch_is_a_step():
    samples = RandomSamples(n=3, length=4, vocabulary=9)
    batches = MicroBatches(samples, batch_size=3)
    assert batches.steps_per_epoch == 1
    batch = batches[0]
    assert batch.lengths == [4, 4, 4] and batch.at.tolist() == [2, 3, 6, 7, 10, 11] and batch.step_targets == 6
    # What is predicted third is read fourth.
    assert torch.equal(batch.targets[::2], batch.tokens[batch.at[1::2]])


@pytest.mark.parametrize("main, wrong, reason", [
    (ddp.main, ["--processes", "1"], "2 or more"),
    (ddp.main, ["--steps", "0"], "1 or more"),
    (ddp.main, ["--tokens", "300"], "--tokens 300 are not whole samples of --length 256"),
    (ddp.main, ["--device", "cuda:1"], "cpu or cuda"),
    (ddp.main, ["--model", "512"], "invalid width_and_layers value"),
    (scaling.main, ["--axes", "depth"], "'depth' is none of tokens, model, vocab, length, experts"),
    (scaling.main, ["--axes", "length=64,100"], "--tokens 2048 are not whole samples of --length 100"),
    (scaling.main, ["--axes", "tokens=0,256"], "1 or more"),
    (scaling.main, ["--axes", "experts=1,2"], "n_routed_experts=1"),
    (scaling.main, ["--model", "30x2"], "dim=30 does not split"),
    (scaling.main, ["--picture", "nowhere/a.png"], "mkdir -p nowhere")])
def test_a_wrong_flag_is_refused_before_anything_is_measured(main, wrong, reason, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert reason in capsys.readouterr().err
