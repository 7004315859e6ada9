"""
性能对比的脚本：在极小的尺寸上跑一遍，表、JSON、图都在，而且算错的不会被计时。
The benchmark: it runs on a tiny size, its table, JSON and picture say the same, and a wrong result has no speed.
"""

import json
import os
import time

import pytest
import torch
from helpers_run import FORKS

from benchmarks import measure
from benchmarks.ability import known_answers, right_answer, share_right
from benchmarks.loss import FORMS, Case, inputs, main
from benchmarks.measure import TOLERANCE, deviation, peak, reset_peak, timed

CPU = torch.device("cpu")


def left_behind(path, **changed):
    """What a measurement leaves: a loss of 4 and gradients of ones; `changed` is added to them."""
    values = {"loss": torch.tensor(4.0), "hidden": torch.ones(2, 3), "head": torch.ones(5, 3)}
    torch.save({name: value + changed.get(name, 0.0) for name, value in values.items()}, path)
    return path


def test_every_form_stands_in_the_table_the_json_and_the_picture(tmp_path, capsys, monkeypatch):
    # A process that imports torch anew takes seconds; a fork of one that has it is as good where nothing is to be learnt
    # from the figures.
    monkeypatch.setattr(measure, "get_context", lambda _: FORKS)
    main(["--tokens", "16", "--dim", "8", "--vocab", "50", "--repeats", "1",
          "--json", str(tmp_path / "loss.json"), "--picture", str(tmp_path / "loss.png")])

    rows = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert [row["form"] for row in rows] == list(FORMS)
    assert all(row["vocabulary"] == 50 and row["seconds"] > 0 and row["peak_mb"] > 0 for row in rows)
    assert rows[0]["time_ratio"] == rows[0]["speed"] == rows[0]["peak_ratio"] == 1.0 and rows[0]["deviation"] == 0.0
    assert all(0.0 < row["deviation"] < TOLERANCE for row in rows[1:])          # computed otherwise, and the same

    printed = capsys.readouterr().out
    for row in rows:
        assert f"| 50 | {row['form']} | {row['seconds']:.2f} | {row['time_ratio']:.2f} |" in printed
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["loss.json", "loss.png"]


def test_the_deviation_is_the_largest_of_the_loss_and_both_gradients(tmp_path):
    plain = left_behind(tmp_path / "plain.pt")
    # |4.0002 - 4| / 4 = 5e-5; the head is off by 2e-5 in each of its ones.
    ours = left_behind(tmp_path / "a.pt", loss=2e-4, head=2e-5)
    assert deviation("ours", ours, "plain", plain) == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("part", ["loss", "hidden", "head"])
@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_form_that_deviates_is_refused(tmp_path, part, change):
    wrong = left_behind(tmp_path / "wrong.pt", **{part: 4 * change})
    with pytest.raises(ValueError, match=f"ours, {part}: .* away from plain"):
        deviation("ours", wrong, "plain", left_behind(tmp_path / "plain.pt"))


def test_every_process_makes_the_same_inputs():
    for first, again in zip(*(inputs(Case("forward_kl", 7, 5, 3, "cpu", 1))[:3] for _ in range(2))):
        assert torch.equal(first, again)


def test_the_peak_is_what_was_in_use_at_once_and_not_what_was_in_use_altogether():
    reset_peak(CPU)
    before, size = peak(CPU), 32 << 20
    for _ in range(3):
        torch.ones(size // 4)                   # 32 MB, freed before the next
    assert 0.9 * size < peak(CPU) - before < 1.5 * size
    reset_peak(CPU)
    assert peak(CPU) - before < 0.5 * size


def test_time_spent_waiting_does_not_count():
    assert timed(lambda: time.sleep(0.1), CPU)[1] < 0.05


@pytest.mark.parametrize("wrong, reason", [
    (["--repeats", "0"], "1 or more"), (["--vocab", "50", "0"], "1 or more"),
    (["--picture", "nowhere/loss.png"], "mkdir -p nowhere"), (["--divergence", "kl"], "invalid choice")])
def test_a_wrong_flag_is_refused_before_anything_is_measured(wrong, reason, capsys):
    with pytest.raises(SystemExit):
        main(wrong)
    assert reason in capsys.readouterr().err


def test_what_a_teacher_writes_is_judged_by_the_world_and_its_rules():
    known = known_answers()
    right = {"what is 3 plus 4?": "7", "flip c s c.": "c s c", "alphabetical order: z y y": "y y z", "home of the liver?": None}
    assert {question: right_answer(question, known) for question in right} == right
    rows = [{"question": "flip a b.", "options": {"A": "a b", "B": "b a"}, "answer_idx": letter} for letter in "AB"]
    assert share_right(rows, known) == 50
