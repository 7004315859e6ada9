"""
工作流：逐步运行命令；同样的命令、同样的输入已做完的步骤跳过，中断的接着做。
The workflow: commands that run one after the other, each into a folder of its own. A step is skipped
if the same command has finished from the same inputs; an interrupted step resumes.

    manifest.json   of this command, these inputs and these outputs, by their hashes: finished
    begun.json      of this command and these inputs: interrupted
    anything else   of another command: renamed to FOLDER.previous, and the step runs anew
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

from ability_tree.generate_logits import ROOT, flags_of
from runtime.args import WORKFLOW, resume_command
from runtime.files import file_sha256, keep_previous, write_atomic
from runtime.log import Logger

MANIFEST, BEGUN = "manifest.json", "begun.json"
# A step may take other values of these flags when it resumes: they do not change its result.
FREE = ("_budget", "_rpm", "_replies", "_key_env")


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

    def step(self, title: str, module: str, folder: Path, inputs: list, log: Path | None = None,
             resume_flag: str = "", **flags):
        """python -m ability_tree.MODULE FLAGS, which reads `inputs` (files and folders), writes into
        `folder`, and prints into `log`, by default MODULE.log beside the folder. An interrupted step
        is called again with resume_flag; its result may depend on the number of processes."""
        self.exit_if_stopped(title)
        same = {name: value for name, value in flags.items() if not name.endswith(FREE)}
        begun = {"command": [f"ability_tree.{module}", *flags_of(**same)],
                 "processes": len(self.gpus) if resume_flag else "any",
                 "inputs": {str(path): sha256_of(Path(path)) for path in inputs}}
        if read_json(folder / MANIFEST) == begun | {"outputs": outputs_of(folder)}:
            Logger(f"== {title}: finished earlier, {folder}")
            return
        again = read_json(folder / BEGUN) == begun and not (folder / MANIFEST).exists()
        if folder.exists() and not again:
            Logger(f"{folder} is of another command or other inputs: renamed to {folder}.previous")
            keep_previous(folder)
        if again and not resume_flag:       # finished files, which the step would not overwrite
            for path in folder.iterdir():
                if path.is_file() and path.name != BEGUN:
                    path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BEGUN, begun)
        command = [f"ability_tree.{module}", *flags_of(**flags)]
        command += [resume_flag] if again and resume_flag else []
        self.run(title, command, log or folder.parent / f"{module}.log")
        write_json(folder / MANIFEST, begun | {"outputs": outputs_of(folder)})
        (folder / BEGUN).unlink()
        self.exit_if_stopped(title)

    def run(self, title: str, command: list[str], log: Path):
        """Run a module, print its lines, and append them to the log."""
        launcher = [sys.executable, "-m"]
        if len(self.gpus) > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(len(self.gpus)),
                         "-m"]
            command = [*command, "--ddp"]
        typed = f"python {shlex.join([*launcher[1:], *command])}"
        Logger(f"\n== {title}\n{typed}")
        variables = {WORKFLOW: resume_command(1)}
        if torch.cuda.is_available():
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        # In a session of its own, so that a terminal's Ctrl-C reaches the step once, from here.
        self.child = subprocess.Popen([*launcher, *command], cwd=ROOT, env=os.environ | variables,
                                      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                      start_new_session=True)
        if self.signal:
            self.child.send_signal(self.signal)
        with open(log, "a", encoding="utf-8") as file:
            for line in [f"{typed}\n", *()]:
                file.write(line)
            for line in self.child.stdout:
                file.write(line)
                Logger(line.rstrip("\n"))
        code, self.child = self.child.wait(), None
        if code:
            self.exit_if_stopped(title)
            sys.exit(f"{title} ended with status {code}; its log is {log}. Finished steps are kept: "
                     "correct the error, and the same command resumes")

    def exit_if_stopped(self, title: str):
        if self.signal:
            Logger(f"stopped at {title}; finished steps are kept. Resume with: {resume_command(1)}")
            sys.exit(130)


def read_json(path: Path) -> dict | None:
    """None if there is no such file, or only a part of it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_json(path: Path, value: dict):
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=2).encode()))


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
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, BEGUN)}
