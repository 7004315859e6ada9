"""
分块完成的大文件：多个进程分担，随时可中断，同一条命令续做，结果逐字节相同。
Large files that any number of processes make in parts. An interrupted run resumes, to the same
bytes.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from runtime.args import checking_input, resume_command
from runtime.files import named_errors, write_atomic, write_json
from runtime.log import Logger
from runtime.processes import StopSignal, World, patient_group


class Parts:
    """The parts of a file, in the folder OUT.parts until all exist; about.json there says what they
    are made from.

        parts = Parts(out, about, n_parts, world)
        with main_process_first(world):
            missing = parts.prepare()
        for part in parts.mine(missing):
            parts.write(part, result)           # anything that JSON can hold
        results = parts.join()                  # on the main process, which writes OUT; else None
        parts.remove()

    The result of a part, random numbers included, must depend on its number alone. Then any number
    of processes makes the same file. All processes construct this object and call mine and join.
    """

    def __init__(self, out, about: dict, n_parts: int, world: World):
        self.out, self.folder = Path(out), Path(f"{out}.parts")
        self.removed = Path(f"{out}.parts.removed")
        self.about, self.n_parts = about, n_parts
        self.world, self.group = world, patient_group(world)
        self.stop = self.start = None           # of `mine`

    def prepare(self) -> list[int]:
        """The missing parts. Raises ValueError if the file or parts of another file exist."""
        shutil.rmtree(self.removed, ignore_errors=True)
        # With all parts there, a run was killed when it had written OUT, which is written again.
        if self.out.exists() and not (self.folder.exists() and not self.missing()):
            raise ValueError(f"{self.out} exists already. Give another --out, or remove it")
        about = self.folder / "about.json"
        if about.exists():
            with named_errors(about):
                was = dict(json.loads(about.read_bytes()))
            changed = [f"{name} was {was.get(name)}, is {value}"
                       for name, value in self.about.items() if was.get(name) != value]
            if changed:
                raise ValueError(
                    f"{self.folder} holds parts of another file: {'; '.join(changed)}. Resume with "
                    "the same settings, give another --out, or remove that folder")
        else:
            write_json(about, self.about)
        return self.missing()

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}.json"

    def missing(self) -> list[int]:
        return [part for part in range(self.n_parts) if not self.path(part).exists()]

    def mine(self, missing: list[int]) -> Iterator[int]:
        """This process's share of the missing parts, until Ctrl-C. The caller writes each part
        before it takes the next one, and looks at `stop.requested` if a part takes long."""
        if self.group:
            dist.barrier(self.group)        # all processes must see the same parts missing
        self.stop, self.start = StopSignal(), time.perf_counter()
        mine = missing[self.world.rank::self.world.size]
        for part in tqdm(mine, unit=" parts", mininterval=10, disable=self.world.rank != 0):
            if self.stop.requested:
                break
            yield part

    def write(self, part: int, result):
        write_atomic(self.path(part), lambda file: file.write(json.dumps(result).encode()))

    def wait(self, why: str | None = None):
        """Wait for the other processes. If parts are missing, end the script with `why` it stopped,
        if not by Ctrl-C, and the command that resumes it."""
        reasons = [why]
        if self.group:
            reasons = [None] * self.world.size
            dist.all_gather_object(reasons, why, group=self.group)
        n_missing = len(self.missing())
        if self.group:
            dist.barrier(self.group)        # the folder stays until all processes have looked
        if n_missing:
            because = "".join(f"; {reason}" for reason in dict.fromkeys(reasons) if reason)
            Logger(f"stopped{because}. {self.n_parts - n_missing} of {self.n_parts} parts are "
                   f"saved. Resume with: {resume_command(self.world.size)}")
            sys.exit(1 if because else 130)

    def join(self, why: str | None = None) -> list | None:
        """wait, then return the results of all parts in order; None but on the main process."""
        self.wait(why)
        if self.world.rank == 0:
            with checking_input(), named_errors(f"{self.folder} holds a damaged part, remove it"):
                return [json.loads(self.path(part).read_bytes()) for part in range(self.n_parts)]

    def remove(self):
        """Remove the folder, once the file is written: first its name, then its parts."""
        self.folder.rename(self.removed)
        shutil.rmtree(self.removed)
