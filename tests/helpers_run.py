"""
测试的助手：在预热好的子进程里运行脚本，一次只要零点几秒。
Help for the tests of whole runs: a script in a process of its own, in a few tenths of a second.

Importing torch takes longer than a tiny run. A fork server imports it once; each run is a fork of it that executes the
script's file as __main__, with the arguments, variables and exit status that a shell or torchrun would give it.
"""

import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # the repo is used in place, not installed

from runtime import log  # noqa: E402
from dataset import lm_dataset  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"     # sums in one order: runs can be compared bit by bit
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers_run", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp",
                              "torch.distributed.checkpoint", "evaluation.validation", "interop.sizes", "tiktoken",
                              "matplotlib.figure", "matplotlib.backends.backend_agg"])

# What every run of these tests has in common.
TINY = {"max_seq_len": 128, "num_workers": 0, "dtype": "float32", "batch_size": 8, "learning_rate": 1e-2}


# ----------------------------------------------------------------------------------------------------- running scripts


class Ended(NamedTuple):
    code: int           # exit status; -9 after SIGKILL
    output: str         # stdout and stderr, of all processes


class Started:
    """A script under way, in one process or as many as torchrun would have started."""

    def __init__(self, argv, processes, variables, stdin):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory(prefix="run-")
        self.outputs = [Path(self.folder.name) / str(rank) for rank in range(processes)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if processes > 1 else {}
            output.touch()
            arguments = argv, torchrun | variables, stdin, output, Path(self.folder.name) / "cache"
            self.processes.append(FORKS.Process(target=execute, args=arguments))
            self.processes[-1].start()

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in self.outputs)

    def send(self, number=signal.SIGKILL):
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self, seconds: float = 60) -> Ended:
        end = time.time() + seconds
        for process in self.processes:
            process.join(max(0, end - time.time()))
        hung = any(process.is_alive() for process in self.processes)
        if hung:
            self.send()
        assert not hung, f"still running after {seconds} s:\n{self.output}"
        return Ended(max((process.exitcode for process in self.processes), key=abs), self.output)


def execute(argv, variables, stdin, output, cache):
    """In the fork: become `python SCRIPT ...`, with a token cache that no other run has filled."""
    multiprocessing.set_start_method("fork", force=True)        # for the DataLoader's workers, as in a script
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({key: str(value) for key, value in variables.items()})
    os.chdir(ROOT)
    sys.argv, sys.stdin = argv, io.StringIO(stdin)
    torch.set_num_threads(1)
    lm_dataset.CACHE = cache
    if not os.environ.get("DRAW"):                              # half a second for a picture that no one looks at
        log.draw_curves = lambda rows, path: None
    runpy.run_path(argv[0], run_name="__main__")


def start(script, *more, processes=1, variables=None, stdin="", **flags) -> Started:
    """`start("train_sft.py", max_steps=3, use_moe=True)` is `python train_sft.py --max_steps 3 --use_moe`; with
    processes=2, two of them with --ddp and what torchrun tells them."""
    argv = [script, *map(str, more)] + (["--ddp"] if processes > 1 else [])
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return Started(argv, processes, variables or {}, stdin)


def run(script, *more, **flags) -> Ended:
    """Start it and wait for its end."""
    return start(script, *more, **flags).wait()


def succeed(script, *more, **flags) -> str:
    """Run it to a good end. Returns what it printed."""
    ended = run(script, *more, **flags)
    assert ended.code == 0, ended.output
    return ended.output


def complaint(script, *more, **flags) -> str:
    """Run it to the error that it must end in, told in words and not as a traceback. Returns what it printed."""
    ended = run(script, *more, **flags)
    assert ended.code not in (0, 130) and "Traceback" not in ended.output, ended.output
    return ended.output


def wait_until(condition, seconds: float = 60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"nothing happened within {seconds} s"
        time.sleep(0.002)


def quickstart(folder) -> str:
    ended = subprocess.run(["bash", "quickstart.sh", "--smoke"], cwd=folder, stdout=subprocess.PIPE, text=True,
                           stderr=subprocess.STDOUT)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


# ----------------------------------------------------------------------------------------------------- reading results


def rows(path: Path) -> list[dict]:
    """A metrics file, less what the clock decides; a line that is not whole yet is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in found]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def same(a, b) -> bool:
    """Whether two things that torch.load gave are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
