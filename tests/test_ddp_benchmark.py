"""
两个测速脚本：几个进程的代价、一步怎样增长；在极小的尺寸上跑一遍，梯度错的不会被计时。
Two benchmarks, the cost of several processes and the growth of a step: they run on a tiny size, and
a wrong gradient is not timed.
"""

import json

import pytest
from helpers_run import FORKS  # noqa: F401  what its forks have imported

from benchmarks import ddp, scaling
from benchmarks.ddp import Form
from benchmarks.measure import TOLERANCE
from benchmarks.scaling import random_batch
from runtime.processes import sync_gradients

TINY = ["--model", "16x1", "--vocab", "20", "--length", "4", "--steps", "1", "--repeats", "1"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Forks of a process that has imported torch, or this process."""
    monkeypatch.setattr(ddp, "START", "forkserver")
    monkeypatch.setattr(scaling, "in_a_new_process", lambda measure, *how: measure(*how, None))


def never_sync(modules, is_last):
    return sync_gradients(modules, False)


def test_processes_of_one_model_have_the_gradient_of_one_with_all_the_data(tmp_path, capsys):
    ddp.main([*TINY, "--tokens", "8", "--json", str(tmp_path / "ddp.json")])
    rows = json.loads((tmp_path / "ddp.json").read_text())["rows"]
    assert {row["form"]: row["processes"] for row in rows} == {"independent": 2, "alone": 1,
                                                               "plain DDP": 2, "ours": 2}
    assert rows[0]["time_ratio"] == 1.0 and all(row["seconds"] > 0 and row["peak_mb"] > 0 for row
                                                in rows)
    assert [row["deviation"] for row in rows[:2]] == [None, None]       # each has its own gradient
    # summed in another order, and the same
    assert all(0.0 < row["deviation"] < TOLERANCE for row in rows[2:])
    # Of both processes, 4 micro-batches of 8 tokens each: 64 tokens per step.
    assert [row["tokens_per_s"] * row["seconds"] for row in rows] == pytest.approx([64, 32, 64, 64])

    printed = " ".join(capsys.readouterr().out.split())
    for row in rows:
        assert (f"| {row['form']} | {row['processes']} | {row['seconds']:.3g} | "
                f"{row['time_ratio']:.2f} |") in printed


@pytest.mark.parametrize("wrong", [
    Form(True, True, summed=False),             # forgets that DDP averages
    Form(True, True, sync=never_sync)])         # never communicates
def test_a_form_with_another_gradient_is_not_timed(wrong, monkeypatch):
    monkeypatch.setattr(ddp, "FORMS", {"wrong": wrong})
    with pytest.raises(SystemExit, match="wrong, .* away from one process with all data"):
        ddp.main([*TINY, "--tokens", "4", "--accumulation", "2"])


def test_each_axis_has_a_table_a_panel_and_its_rows(tmp_path, capsys):
    axes = {"tokens": "4,8", "model": "16x1,32x1", "vocab": "20,40", "length": "4,2",
            "experts": "2,4"}
    scaling.main([*TINY, "--tokens", "8", "--json", str(tmp_path / "scaling.json"),
                  "--picture", str(tmp_path / "scaling.png"),
                  "--axes", *(f"{axis}={values}" for axis, values in axes.items())])
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert [(row["group"], row["form"]) for row in rows] == [
        (axis, value) for axis, values in axes.items() for value in values.split(",")]
    linear = {row["group"]: row["linear"] for row in rows[1::2]}
    # Student and teacher, 16 x 1 and 32 x 2, then 32 x 1 and 64 x 2: two to four times the
    # parameters.
    assert 2 < linear.pop("model") < 4
    assert linear == {"tokens": 2, "vocab": 2, "length": 1 / 2, "experts": 2}
    assert all(row["ratio"] == row["linear"] == row["peak_ratio"] == 1 for row in rows[::2])

    printed = " ".join(capsys.readouterr().out.split())
    for row in rows:
        assert (f" | {row['seconds']:.3g} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} | "
                f"{row['linear']:.2f} |") in printed
    for axis in axes:
        assert f"| {scaling.AXES[axis][0]} | seconds |" in printed
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_the_second_half_of_random_samples_is_the_target():
    batch = random_batch(n=3, length=4, vocab_size=9, batches_per_step=2)
    assert batch.lengths == [4, 4, 4] and batch.at.tolist() == [2, 3, 6, 7, 10, 11]
    assert (batch.step_targets, batch.step_samples) == (12, 6)
    # The target of the third position is read at the fourth.
    assert batch.targets[::2].equal(batch.tokens[batch.at[1::2]])
