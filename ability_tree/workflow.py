"""
工作流：逐步运行命令；命令和输入都没变、已经做完的步骤跳过，中断的步骤接着做。
A workflow: commands that run one after the other, each into a folder of its own, with a manifest of
the command and the hashes of its inputs and outputs. A step that has finished is skipped, one that
was interrupted resumes; the folder of another command is renamed to FOLDER.previous.
"""

import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch

from runtime.args import WORKFLOW, resume_command
from runtime.files import file_sha256, keep_previous, write_text
from runtime.log import Logger

ROOT = Path(__file__).resolve().parents[1]

MANIFEST = "manifest.json"
# A step that resumes may have other values of these flags: its result does not depend on them.
FREE = ("_budget", "_replies", "_key_env")
# Flags whose values are files or folders that a step reads.
INPUTS = ("ability_files", "weights", "questions", "replies", "abilities", "tree", "exclude",
          "agent", "agent_a", "agent_b", "teacher", "student", "teacher_cache", "data_path")


class Workflow:
    """Runs steps with one process per GPU number. Ctrl-C and SIGTERM are forwarded to the running
    step, which saves and exits; then the workflow exits with the command that resumes it."""

    def __init__(self, gpus: list[int]):
        self.gpus, self.child, self.signal = gpus, None, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.forward)

    def forward(self, number, _frame):
        self.signal = number
        if self.child is not None:
            self.child.send_signal(number)

    def step(self, title: str, module: str, folder: Path, log: Path | None = None,
             resume_flag: str = "", more=(), **flags):
        """python -m MODULE FLAGS MORE, which writes into `folder` and prints into `log`, by default
        MODULE.log beside the folder. A training step resumes by resume_flag, and its result depends
        on the number of processes."""
        name = module.rpartition(".")[2]
        title = f"{title}: {name}"
        self.exit_if_stopped(title)
        same = {name: value for name, value in flags.items() if not name.endswith(FREE)}
        file = folder / MANIFEST
        inputs = [path for name in INPUTS for path in listed(flags.get(name))]
        manifest = {"command": [module, *flags_of(**same), *more],
                    "processes": len(self.gpus) if resume_flag else "any",
                    "inputs": {str(path): sha256_of(Path(path)) for path in inputs}}
        last = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        if last == manifest | {"outputs": outputs_of(folder)}:
            Logger(f"== {title}: finished earlier, {folder}")
            return
        again = last == manifest            # the same step, not finished
        if folder.exists() and not again:
            Logger(f"{folder} has other inputs or flags: renamed to {folder}.previous")
            keep_previous(folder)
        if again and not resume_flag:       # a step overwrites no file; its parts are in folders
            for path in folder.iterdir():
                if path.is_file() and path.name != MANIFEST:
                    path.unlink()
        write_text(file, json.dumps(manifest, indent=2))
        command = [module, *flags_of(**flags), *more]
        command += [resume_flag] if again and resume_flag else []
        self.run(title, command, log or folder.parent / f"{name}.log")
        write_text(file, json.dumps(manifest | {"outputs": outputs_of(folder)}, indent=2))
        self.exit_if_stopped(title)

    def run(self, title: str, command: list[str], log: Path):
        """Run a module, print its lines, and append them to the log."""
        launcher = [sys.executable, "-m"]
        if len(self.gpus) > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node",
                         str(len(self.gpus)), "-m"]
            command = [*command, "--ddp"]
        typed = f"python {shlex.join([*launcher[1:], *command])}"
        Logger(f"\n== {title}\n{typed}")
        variables = {WORKFLOW: resume_command(1)}
        if torch.cuda.is_available():
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        # In a session of its own, so that a terminal's Ctrl-C reaches the step once, from here.
        # Paths are relative to the current folder; the modules are found in the repo.
        variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.child = subprocess.Popen([*launcher, *command], env=os.environ | variables,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      start_new_session=True)
        if self.signal:
            self.child.send_signal(self.signal)
        with open(log, "a", buffering=1, encoding="utf-8") as file:
            file.write(f"{typed}\n")
            for line in self.child.stdout:
                file.write(line)
                Logger(line.rstrip("\n"))
        code, self.child = self.child.wait(), None
        if code:
            self.exit_if_stopped(title)
            sys.exit(f"{title} ended with status {code}; its log is {log}. Correct the error, and "
                     "the same command resumes")

    def exit_if_stopped(self, title: str):
        if self.signal:
            Logger(f"stopped at {title}; finished steps are kept. Resume with: {resume_command(1)}")
            sys.exit(130)


def listed(value) -> list:
    """The values of a flag: 3 -> [3], [3, 4] -> [3, 4], None -> []"""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def flags_of(**values) -> list[str]:
    """epochs=3, ddp=True, device=None -> --epochs 3 --ddp"""
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif value is not False and listed(value):
            flags += [f"--{name}", *map(str, listed(value))]
    return flags


def sha256_of(path: Path) -> str:
    """Of a file; of a folder, of the names and hashes of its files."""
    if not path.exists():
        raise ValueError(f"no file at {path}")
    if path.is_file():
        return hashed(path, path.stat().st_size, path.stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(outputs_of(path)).encode()).hexdigest()


@functools.cache
def hashed(path: Path, size: int, mtime: int) -> str:
    """A teacher of many gigabytes is an input of most steps; its hash is computed once."""
    return file_sha256(path)


def outputs_of(folder: Path) -> dict[str, str]:
    """Of what the next step may read, unlike resume files: {name in the folder: hash}"""
    return {name: sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
            and ".resume" not in (name := str(path.relative_to(folder))) and path.name != MANIFEST}
