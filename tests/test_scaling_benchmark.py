"""
一步怎样增长：在极小的尺寸上跑一遍，一个进程与两个进程。
The growth of a step: the benchmark runs on a tiny size, in one process and in two.
"""

import json

import pytest
from helpers_run import FORKS

from benchmarks import measure, scaling
from benchmarks.scaling import random_batch

TINY = ["--dim", "16", "--n_layers", "1", "--vocab", "20", "--length", "4", "--steps", "1", "--repeats", "1",
        "--tokens", "8"]


def table_of(folder, capsys, axes) -> list[dict]:
    """The rows of the JSON, which are also printed."""
    scaling.main([*TINY, "--json", str(folder / "scaling.json"), "--axes", *axes])
    rows = json.loads((folder / "scaling.json").read_text())["rows"]
    printed = " ".join(capsys.readouterr().out.split())
    for row in rows:
        assert (f" | {row['seconds']:.3g} | {row['tokens_per_s']:,.0f} | {row['ratio']:.2f} | "
                f"{row['linear']:.2f} |") in printed
    for axis in axes:
        assert f"| {scaling.AXES[axis][0]} | seconds |" in printed
    return rows


def test_each_axis_has_a_table_and_its_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "in_new_processes", lambda calls: [call[0](*call[1:]) for call in calls])
    axes = {"tokens": [4, 8], "model": [(16, 1), (32, 1)], "vocab": [20, 40], "length": [4, 2],
            "experts": [2, 4]}
    for axis, values in axes.items():
        monkeypatch.setitem(scaling.AXES, axis, (scaling.AXES[axis][0], values))
    rows = table_of(tmp_path, capsys, axes)
    assert [(row["group"], row["name"].partition(":")[0]) for row in rows] == [
        (axis, value) for axis, values in (axes | {"model": ["16 x 1", "32 x 1"]}).items()
        for value in map(str, values)]
    linear = {row["group"]: row["linear"] for row in rows[1::2]}
    # Student and teacher, 16 x 1 and 32 x 2, then 32 x 1 and 64 x 2: two to four times the
    # parameters.
    assert 2 < linear.pop("model") < 4
    assert linear == {"tokens": 2, "vocab": 2, "length": 1 / 2, "experts": 2}
    assert all(row["ratio"] == row["linear"] == row["peak_ratio"] == 1 for row in rows[::2])


def test_two_processes_read_twice_the_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "get_context", lambda _: FORKS)     # of a process that has torch
    one, two = table_of(tmp_path, capsys, ["processes"])
    assert [row["tokens_per_s"] * row["seconds"] for row in (one, two)] == pytest.approx([8, 16])


def test_the_second_half_of_random_samples_is_the_target():
    batch = random_batch(n=3, length=4, vocab_size=9, n_batches=2)
    assert batch.lengths == [4, 4, 4] and batch.at.tolist() == [2, 3, 6, 7, 10, 11]
    assert (batch.step_targets, batch.step_samples) == (12, 6)
    # The target of the third position is read at the fourth.
    assert batch.targets[::2].equal(batch.tokens[batch.at[1::2]])
