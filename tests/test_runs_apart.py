"""
各次运行互不覆盖：先前的成果留有备份，同一文件夹不能同时写两次，教师不能中途换人。
Runs stay apart: the files of an earlier run are kept, two runs do not write the same files, and a resumed run has the
teacher that it had.
"""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from helpers_run import ROOT, TINY, complaint, load, rows, same, start, succeed, wait_until
from interop.checkpoint import load_model
from runtime.files import lock, replace_atomic

NAME = "full_sft_32"


@pytest.fixture
def flags(data, models):
    return {**TINY, "weights": models / "student.pth", "data_path": data / "sft_data.jsonl", "log_interval": 1,
            "eval_interval": 0, "max_steps": 2}


def test_a_new_run_keeps_the_files_of_the_one_before(flags, tmp_path):
    weights = []
    for seed in (0, 1, 2):
        said = succeed("train_sft.py", **flags, seed=seed, out_dir=tmp_path)
        weights.append(load(tmp_path / f"{NAME}.pth"))
        assert (f"kept as {tmp_path / NAME}.previous.*" in said) == (seed > 0)
        if seed:
            previous = tmp_path / f"{NAME}.previous.pth"
            assert same(load(previous), weights[-2]) and not same(load(previous), weights[-1])
            load_model(previous)                        # its JSON came along
            assert rows(previous.with_suffix(".jsonl"))[0] != rows(tmp_path / f"{NAME}.jsonl")[0]
    assert "kept as" not in succeed("train_sft.py", **flags, seed=2, out_dir=tmp_path, resume=True)
    assert same(load(tmp_path / f"{NAME}.previous.pth"), weights[1])


def test_a_run_that_fails_before_it_saves_leaves_the_earlier_one_in_place(flags, tmp_path):
    succeed("train_sft.py", **flags, out_dir=tmp_path)
    before = load(tmp_path / f"{NAME}.pth")
    killed = start("train_sft.py", **flags | {"max_steps": 10_000, "save_interval": 10_000}, seed=5, out_dir=tmp_path)
    wait_until(lambda: len(rows(tmp_path / f"{NAME}.jsonl")) > 2)
    killed.send(signal.SIGKILL)
    killed.wait()
    assert same(load(tmp_path / f"{NAME}.pth"), before)


def test_a_second_run_on_the_same_files_is_refused_and_the_lock_dies_with_its_process(flags, tmp_path):
    more = flags | {"max_steps": 10_000, "save_interval": 2, "out_dir": tmp_path, "num_workers": 1}
    first = start("train_sft.py", **more)
    wait_until(lambda: (tmp_path / f"{NAME}.resume").exists())
    pid = first.processes[0].pid
    for resume in (None, True):
        said = complaint("train_sft.py", **more | {"resume": resume})
        assert f"process {pid} on " in said and f"is writing {tmp_path / NAME}.*" in said
    succeed("train_pretrain.py", **flags | {"data_path": flags["data_path"].parent / "pretrain_data.jsonl"}, out_dir=tmp_path)
    first.send(signal.SIGKILL)
    first.wait()
    stale = [tmp_path / f"{NAME}{end}" for end in (".pth.1.tmp", ".resume.1.tmp")]
    for path in stale:
        path.touch()
        os.utime(path, (1, 1))
    going_on = start("train_sft.py", **more, resume=True)
    wait_until(lambda: "loss = " in going_on.output)        # printed after the signals have handlers
    going_on.send(signal.SIGTERM)
    assert going_on.wait().code == 130 and not any(path.exists() for path in stale)


@pytest.mark.parametrize("error", [OSError(38, "no locks available"), ImportError])
def test_where_there_are_no_locks_a_run_goes_on_without(error, tmp_path, monkeypatch):
    def lockf(*_):
        raise error

    monkeypatch.setattr("fcntl.lockf", lockf)
    lock(tmp_path / "run")


def test_a_resumed_run_has_the_teacher_that_it_had(flags, models, tmp_path):
    teacher = shutil.copy(models / "teacher.pth", tmp_path / "teacher.pth")
    shutil.copy(models / "teacher.json", tmp_path / "teacher.json")
    for file in models.glob("tokenizer-*.json"):
        shutil.copy(file, tmp_path)
    flags |= {"teacher": teacher, "size": "tiny", "alpha": 0.5, "out_dir": tmp_path / "out"}
    succeed("train_distillation.py", **flags)
    assert "after step 2" in succeed("train_distillation.py", **flags, resume=True)
    state = load(teacher)
    state["norm.weight"][0] += 1
    torch.save(state, teacher)
    assert f"content of {teacher} was " in complaint("train_distillation.py", **flags, resume=True)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_process_whose_torchrun_is_killed_saves_and_ends(flags, tmp_path):
    command = [sys.executable, "train_sft.py", "--ddp", "--out_dir", str(tmp_path / "out")]
    command += [str(word) for name, value in (flags | {"max_steps": 10**6}).items() for word in (f"--{name}", value)]
    parent = "import subprocess, sys; child = subprocess.Popen(sys.argv[1:]); print(child.pid, flush=True); child.wait()"
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with open(tmp_path / "output", "w+") as output:
        torchrun = subprocess.Popen([sys.executable, "-c", parent, *command], cwd=ROOT, stdout=output, stderr=output,
                                    env=os.environ | variables)
        wait_until(lambda: len(rows(tmp_path / f"out/{NAME}.jsonl")) > 2)
        torchrun.kill()
        torchrun.wait()
        wait_until(lambda: "stopped after step" in (tmp_path / "output").read_text())
    child = int((tmp_path / "output").read_text().split()[0])
    wait_until(lambda: not os.path.exists(f"/proc/{child}") or open(f"/proc/{child}/stat").read().split()[2] == "Z")


def test_what_a_killed_process_left_half_written_is_removed_in_time(tmp_path):
    path = tmp_path / "run[1].pth"
    old, new, other = (tmp_path / name for name in ("run[1].pth.7.tmp", "run[1].pth.8.tmp", "run1.pth.7.tmp"))
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (1, 1))
    replace_atomic(path, lambda temporary: temporary.write_text("whole"))
    assert sorted(tmp_path.iterdir()) == sorted([path, new, other]) and path.read_text() == "whole"
