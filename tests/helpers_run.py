"""
测试的助手：在预热好的子进程里运行脚本，一次只要零点几秒。
Help for the tests of whole runs: a script in a process of its own, in a few tenths of a second.

Importing torch takes longer than a tiny run. A fork server imports it once; each run is a fork of it
that executes the script's file as __main__, with the arguments, variables, folder and exit status
that a shell or torchrun would give it. `Shell` does the same for shell scripts: it puts a `python`
and a `torchrun` on the PATH whose runs are such forks.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # the repo is used in place, not installed

from dataset import lm_dataset  # noqa: E402
from runtime import log  # noqa: E402

os.environ["OMP_NUM_THREADS"] = "1"     # sums in one order: runs can be compared bit by bit
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["helpers_run", "torch._dynamo", "torch.distributed",
                              "torch.distributed.fsdp",
                              "evaluation.validation", "interop.sizes", "tiktoken", "yaml", "tqdm",
                              "matplotlib.figure", "matplotlib.backends.backend_agg"])

# What every run of these tests has in common.
TINY = {"max_seq_len": 128, "num_workers": 0, "dtype": "float32", "batch_size": 8,
        "learning_rate": 1e-2}


# ------------------------------------------------------------------------------ running scripts


class Ended(NamedTuple):
    code: int           # exit status; -9 after SIGKILL
    output: str         # stdout and stderr, of all processes


class Started:
    """A script that is running, in one process or as many as torchrun would have started."""

    def __init__(self, argv, processes, variables, stdin, cwd=None, under_torchrun=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder = tempfile.TemporaryDirectory(prefix="run-")
        self.outputs = [Path(self.folder.name) / str(rank) for rank in range(processes)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if processes == 1 and not under_torchrun:
                torchrun = {}
            output.touch()
            arguments = (argv, variables | torchrun, stdin, output,
                         Path(self.folder.name) / "cache", cwd or ROOT)
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


def execute(argv, variables, stdin, output, cache, cwd=None):
    """In the fork: become `python ARGV`, with a token cache that no other run has filled."""
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update({key: str(value) for key, value in variables.items()})
    os.chdir(cwd or ROOT)
    torch.set_num_threads(1)
    lm_dataset.CACHE = cache
    sys.stdin = io.StringIO(stdin)
    if SHELL in os.environ:             # what this run starts is a fork as well
        sys.executable = shutil.which("python")
        spawned = multiprocessing.get_context
        multiprocessing.get_context = lambda method=None: spawned("fork")
        # Modules are found where python would look for them, not in the folder of the tests.
        here = os.getcwd() if argv[0] in ("-m", "-c") else str(Path(argv[0]).resolve().parent)
        ours = str(ROOT), str(ROOT / "tests"), ""
        sys.path[:] = [here, *(path for path in sys.path if path not in ours)]
    if not os.environ.get("DRAW"):      # a picture that nobody looks at takes half a second
        log.draw_curves = lambda *arguments, **named: None

    try:
        if argv[0] == "-c":
            sys.argv = ["-c", *argv[2:]]
            exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
        elif argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
    except Exception:           # as Python does, but multiprocessing does not
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def start(script, *more, processes=1, variables=None, stdin="", cwd=None, **flags) -> Started:
    """`start("train_sft.py", max_steps=3, use_moe=True)` is `python train_sft.py --max_steps 3
    --use_moe`; with processes=2, two of them with --ddp and what torchrun sets. `start("-m",
    "ability_tree.tree", ...)` is `python -m ability_tree.tree ...`. cwd: the folder, or the repo."""
    argv = [str(script), *map(str, more)] + (["--ddp"] if processes > 1 else [])
    for name, value in flags.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None:
            several = isinstance(value, (list, tuple))
            argv += [f"--{name}", *map(str, value if several else [value])]
    return Started(argv, processes, variables or {}, stdin, cwd)


def run(script, *more, **flags) -> Ended:
    """Start it and wait for its end."""
    return start(script, *more, **flags).wait()


def succeed(script, *more, **flags) -> str:
    """Run it; it must exit with 0. Returns what it printed."""
    ended = run(script, *more, **flags)
    assert ended.code == 0, ended.output
    return ended.output


def complaint(script, *more, **flags) -> str:
    """Run it; it must end in an error message without a traceback. Returns what it printed."""
    ended = run(script, *more, **flags)
    assert ended.code not in (0, 130) and "Traceback" not in ended.output, ended.output
    return ended.output


def wait_until(condition, seconds: float = 60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"nothing happened within {seconds} s"
        time.sleep(0.002)


# -------------------------------------------------------------------------------- shell commands

SHELL = "MINIDISTILL_TEST_SHELL"            # variable that names the socket of the Shell
PROCESSES = "MINIDISTILL_TEST_PROCESSES"    # the most processes of a run

CLIENT = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["{variable}"])
stdin = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
server.sendall(json.dumps([sys.argv, os.getcwd(), dict(os.environ), stdin]).encode())
server.shutdown(socket.SHUT_WR)
code, output = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stdout.write(output)
sys.stdout.flush()
sys.exit(code)
"""


class Shell:
    """`Shell(folder).run("bash scripts/run_skd.sh", cwd)`: a shell command in which `python` and
    `torchrun` start forks of the fork server. folder gets the two programs and a socket."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.bin = folder
        for name in ("python", "python3", "torchrun"):
            client = folder / name
            client.write_text(CLIENT.format(python=sys.executable, variable=SHELL))
            client.chmod(0o755)
        self.listener = socket.socket(socket.AF_UNIX)
        self.address = tempfile.mkdtemp(prefix="sh-") + "/socket"    # such paths must be short
        self.listener.bind(self.address)
        self.listener.listen()
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        received = b"".join(iter(lambda: connection.recv(65536), b""))
        (program, *argv), cwd, variables, stdin = json.loads(received)
        processes = 1
        launcher = Path(program).name == "torchrun"
        if argv[:2] == ["-m", "torch.distributed.run"]:
            argv, launcher = argv[2:], True
        while launcher and argv[0].startswith("--"):
            flag, *argv = argv
            if flag == "--nproc_per_node":
                processes, *argv = int(argv[0]), *argv[1:]
        try:
            processes = min(processes, int(variables.get(PROCESSES, processes)))
            code, output = Started(argv, processes, variables, stdin, cwd, launcher).wait(300)
        except AssertionError as error:
            code, output = 1, str(error)
        connection.sendall(json.dumps([code if code >= 0 else 128 - code, output]).encode())
        connection.close()

    def run(self, command, cwd, stdin="", processes=2) -> Ended:
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}",
                                    "OMP_NUM_THREADS": "1", SHELL: self.address,
                                    PROCESSES: str(processes)}
        words = ["bash", "-c", command] if isinstance(command, str) else command
        ended = subprocess.run(words, cwd=cwd, env=environment, input=stdin, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return Ended(ended.returncode, ended.stdout)


def quickstart(folder, code=0) -> str:
    """`python quickstart.py --smoke` in a copy of the repo whose environment is complete."""
    words = [sys.executable, "quickstart.py", "--smoke"]
    ended = Shell(folder / ".venv/bin").run(words, folder)
    assert ended.code == code, ended.output
    return ended.output


# ----------------------------------------------------------------------------- reading results


def rows(path: Path) -> list[dict]:
    """A metrics file, less what the clock decides; a line that is not whole yet is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in ("tokens_per_s", "cpu_seconds", "total_cpu_seconds")} for row in found]


def pad(source, out, vocab_size: int, tokenizer=None):
    """The model with more rows after its last token, of logits as large as those of tokens; with another tokenizer. Returns `out`."""
    from interop.checkpoint import build, load_model, save_model

    model, own = load_model(source)
    state, n = model.state_dict(), vocab_size - model.config.vocab_size
    for key in ("tok_embeddings.weight", "output.weight"):
        state[key] = torch.cat([state[key], state[key][:n]])
    wide = build(dataclasses.replace(model.config, vocab_size=vocab_size))
    wide.load_state_dict(state)
    save_model(wide, tokenizer or own, out)
    return out


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def first_gradients(path) -> list[torch.Tensor]:
    """The gradient g of each weight in the first step, from a resume file: Adam's first moment is then 0.1 g, Muon's
    momentum 0.05 g."""
    states = load(path)["optimizer"]["state"].values()
    return [state["momentum"] / 0.05 if "momentum" in state else state["exp_avg"] / 0.1 for state in states]


def same(a, b) -> bool:
    """Whether two things that torch.load gave are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
