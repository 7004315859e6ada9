"""
性能对比的公共部分与损失的对比：在极小的尺寸上跑一遍，而且算错的不会被计时。
What benchmarks share, and that of the loss: it runs on a tiny size, and a wrong result is not
timed.
"""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch

from benchmarks import generate, loss, measure, scaling, step
from benchmarks.measure import TOLERANCE, deviation, timed
from runtime.log import peak_above

CPU = torch.device("cpu")


def number_of_process(case) -> int:
    return os.getpid()


def killed(case):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_measurement_has_a_process_of_its_own_and_a_killed_one_is_reported(monkeypatch):
    # A new process that imports torch takes seconds; a plain fork serves here.
    monkeypatch.setattr(measure, "get_context", lambda _: multiprocessing.get_context("fork"))
    case = loss.Case("forward_kl", 7, 5, 3, "cpu", 1)
    assert measure.in_new_processes([(number_of_process, case)]) != [os.getpid()]
    with pytest.raises(ValueError, match="a process was killed.*vocab_size=7"):
        measure.in_new_processes([(killed, case)])


def test_every_form_of_the_loss_is_in_the_table_and_the_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "in_new_processes", lambda calls: [call[0](*call[1:]) for call in calls])
    loss.main(["--tokens", "16", "--dim", "8", "--vocab", "50", "--repeats", "1", "--json",
               str(tmp_path / "a.json")])

    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["form"] for row in rows] == list(loss.FORMS)
    assert all(row["vocab_size"] == 50 and row["seconds"] > 0 and row["peak_mb"] > 0 for row
               in rows)
    assert rows[0]["speed"] == rows[0]["peak_ratio"] == 1.0 and rows[0]["deviation"] == 0.0
    # computed differently, and the same
    assert all(0.0 < row["deviation"] < TOLERANCE for row in rows[1:])
    printed = " ".join(capsys.readouterr().out.split())
    for row in rows:
        assert f"| 50 | {row['form']} | {row['seconds']:.2f} | {row['speed']:.2f} x |" in printed


def test_the_deviation_is_the_largest_and_a_wrong_result_stops_the_benchmark(tmp_path):
    def saved(name, **values):
        torch.save(values, tmp_path / name)
        return tmp_path / name

    right = {"loss": torch.tensor(4.0), "head": torch.ones(5, 3)}
    plain = saved("plain", **right)
    # |4.0002 - 4| / 4 = 5e-5; the head is off by 2e-5 in each of its ones.
    ours = saved("ours", loss=right["loss"] + 2e-4, head=right["head"] + 2e-5)
    assert deviation("ours", ours, "plain", plain) == pytest.approx(5e-5, rel=0.01)
    for part in right:
        for change in (4e-3, float("nan")):
            wrong = saved("wrong", **right | {part: right[part] + change})
            with pytest.raises(ValueError, match=f"ours, {part}: .* away from plain"):
                deviation("ours", wrong, "plain", plain)

    tokens = torch.full((4000,), 6000.0, dtype=torch.float64)
    truth, other = saved("truth", tokens=tokens), saved("wrong", tokens=tokens.clone())
    assert deviation("ours", other, "plain", truth, tolerance=0.0) == 0
    tokens[-1] += 1                                         # one other token
    with pytest.raises(ValueError, match="ours, tokens"):
        deviation("ours", saved("wrong", tokens=tokens), "plain", truth, tolerance=0.0)


def test_every_process_makes_the_same_inputs():
    for first, again in zip(*(loss.inputs(loss.Case("forward_kl", 7, 5, 3, "cpu", 1))[:3] for _
                              in range(2))):
        assert torch.equal(first, again)


def test_the_peak_is_the_memory_in_use_at_once():
    size = 96 << 20             # beyond glibc's largest mmap threshold, 32 MB: never from freed memory
    with peak_above(CPU) as above:
        for _ in range(3):
            torch.ones(size // 4)               # 96 MB, freed before the next
    assert 0.9 * size < above() < 1.5 * size
    with peak_above(CPU) as above:
        pass
    assert above() < 0.5 * size


def test_waiting_does_not_count_as_cpu_time():
    assert timed(lambda: time.sleep(0.1), CPU)[1] < 0.05


def test_a_wrong_flag_is_refused_before_anything_is_measured(capsys):
    for main, wrong, reason in (
            (loss.main, "--repeats 0", "1 or more"),
            (loss.main, "--vocab 50 0", "1 or more"),
            (step.main, "--steps 0", "1 or more"),
            (generate.main, "--dim 48", "multiple of 32"),
            (scaling.main, "--axes depth", "invalid choice: 'depth'"),
            (scaling.main, "--tokens 300", "--tokens 300 is not a multiple of --length 256")):
        with pytest.raises(SystemExit) as ended:
            main(wrong.split())
        assert reason in f"{ended.value.code} {capsys.readouterr().err}", wrong
