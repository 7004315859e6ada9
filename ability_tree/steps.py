"""
各步共用：读能力文件，把工作分给多个进程，并交代每片叶子的结果。
What the steps have in common: files of abilities, work shared among processes, and what became of each leaf.

Until a step is done, what is done of it lies in a folder beside its file (PartFiles); the same command goes on, on any
number of processes, to the same bytes.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ability_tree.tree import width_of
from dataset.formats import files_of, read_each
from runtime.files import file_sha256
from interop.checkpoint import sha256_of_model
from runtime.args import resume_command
from runtime.files import PartFiles, write_atomic
from runtime.log import Logger
from runtime.processes import StopSignal, init_distributed_mode, patient_group


# ---- 1. Flags ------------------------------------------------------------------------------------

def add_step_args(parser):
    """The flags that the steps share; `init_distributed_mode` reads some of them."""
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=1337, help="of all that is drawn; the same seed, the same file")
    add("--device", default="auto", help="of weights: auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")


def seed_of(*numbers: int) -> int:
    """A seed for an agent, that is a matter of these numbers, whoever asks, and when."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---- 2. Files ------------------------------------------------------------------------------------

def beside(out, what: str) -> Path:
    """distill.jsonl -> distill_ability.jsonl"""
    out = Path(out)
    return out.with_name(f"{out.stem}_{what}.jsonl")


def read_abilities(paths) -> dict[str, tuple[str, ...]]:
    """{id as text: path from the root} of ability files {"id", "ability_path"}. Raises what dataset.formats.read_each
    raises, and ValueError for an id with two paths."""
    abilities = {}
    for file in [file for path in paths for file in files_of(path)]:
        for name, path in read_each(file, checked_ability, log=Logger):
            if abilities.setdefault(name, path) != path:
                raise ValueError(f"{file}: the id {name!r} has two paths, {list(abilities[name])} and {list(path)}")
    return abilities


def checked_ability(row: dict) -> tuple[str, tuple[str, ...]]:
    path = row.get("ability_path")
    if "id" not in row or not isinstance(path, list) or not path:
        raise ValueError(f'not an ability {{"id", "ability_path": ["root", ...]}} (keys found: {", ".join(row)})')
    if not all(isinstance(name, str) and name.strip() for name in path):
        raise ValueError(f"ability_path {path} must be names")
    return str(row["id"]), tuple(path)


def sha256_of(paths) -> list[str]:
    return [file_sha256(file) for path in paths for file in files_of(path)]


def about_agent(args, role: str) -> str:
    """Which agent it is: the hash of its weights, or the address of its model. What weights draw is also a matter of how
    many replies are under way."""
    weights, url, model, parallel = (vars(args)[name] for name in (role, f"{role}_url", f"{role}_model", f"{role}_parallel"))
    return f"{sha256_of_model(weights)}, {parallel} at once" if weights else f"{url} {model}"


# ---- 3. Work, shared among processes -------------------------------------------------------------

class Parts(PartFiles):
    """`prepare`, then `write` each part of `mine`, in every process, then `join`, and `remove` when the file is there."""

    def __init__(self, out, about: dict, n_parts: int, world):
        super().__init__(out, about, n_parts)
        self.world, self.together = world, patient_group(world)

    def mine(self, missing: list[int]) -> Iterator[int]:
        """This process's share of the missing parts, until Ctrl-C. Write each before the next one is asked for."""
        if self.together:
            dist.barrier(self.together)         # no part is written before all have seen which ones are missing
        stop, mine, start = StopSignal(), missing[self.world.rank::self.world.size], time.perf_counter()
        for n_done, part in enumerate(mine, start=1):
            if stop.requested:
                return
            yield part
            left = (time.perf_counter() - start) / n_done * (len(mine) - n_done)
            Logger(f"{n_done}/{len(mine)} parts{' of this process' if self.together else ''}  {left / 60:.1f} min left")

    def write(self, part: int, result):
        write_atomic(self.path(part), lambda file: file.write(json.dumps(result).encode()))

    def join(self, why: str | None = None) -> list | None:
        """Waits for the other processes. Returns what all parts came to, in their order, on the main process; None on the
        others. If some are missing, ends the script and says how to go on, and why it did not (why: of this process)."""
        reasons = [why]
        if self.together:
            reasons = [None] * self.world.size
            dist.all_gather_object(reasons, why, group=self.together)
        left = self.missing()
        if self.together:
            dist.barrier(self.together)         # the folder is not removed before all have looked into it
        if left:
            because = "".join(f"; {reason}" for reason in dict.fromkeys(reasons) if reason)
            Logger(f"stopped{because}. {self.n_parts - len(left)} of {self.n_parts} parts are done and stay. "
                   f"Go on with: {resume_command(self.world.size)}")
            sys.exit(130 if because == "" else 1)
        if self.world.rank == 0:
            return [json.loads(self.path(part).read_bytes()) for part in range(self.n_parts)]


# ---- 4. What became of it ------------------------------------------------------------------------

def kind_of(reason: str) -> str:
    """The words that a reason begins with, by which it is counted."""
    return reason.partition(":")[0]


def table(columns: list[str], rows: list[tuple], rejected: list[dict]) -> str:
    """A line for each leaf: (leaf, number, number, ...), then how many of its were rejected, and why; then the sums.

    rejected    rows with "leaf" and "reason"
    """
    reasons = {}
    for reject in rejected:
        reasons.setdefault(reject["leaf"], Counter())[kind_of(reject["reason"])] += 1
    total = ("all", *(sum(numbers) for numbers in zip(*(row[1:] for row in rows))))
    reasons["all"] = sum(reasons.values(), Counter())
    width = max(width_of(row[0]) for row in [("leaf",), *rows])
    lines = ["leaf" + " " * (width - 4)+ "".join(f"{name:>10}" for name in columns) + "  rejected"]
    for row in [*rows, total]:
        # The commonest first, ties by name: the order in which processes met them does not show.
        why = ", ".join(f"{n:,} {reason}" for reason, n in sorted(reasons.get(row[0], {}).items(),
                                                                 key=lambda pair: (-pair[1], pair[0])))
        numbers = "".join(f"{number:>10,}" for number in row[1:])
        lines.append(f"{row[0]}{' ' * (width - width_of(row[0]))}{numbers}  {why}".rstrip())
    return "\n".join(lines)
