"""
各步共用：参数、文件、分给多个进程的工作，以及每片叶子的统计表。
Shared by the steps: flags, files, work that is divided among processes, and a table per leaf.
"""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from ability_tree.agents import identity_of
from ability_tree.prompts import PROMPTS
from dataset.formats import files_of, read_each, to_messages
from evaluation.tables import aligned
from runtime.args import checking_input
from runtime.endpoint import OutOfBudget
from runtime.files import file_sha256, write_jsonl
from runtime.log import Logger
from runtime.parts import Parts
from runtime.processes import main_process_first


def add_request_args(parser, temperature: float | None = None):
    """The flags of requests to an agent; without a temperature, its decoding is greedy. Returns
    `add`, for more of them."""
    add = parser.add_argument_group("requests").add_argument
    add("--prompts", default="json", choices=list(PROMPTS), help="wording: ability_tree/prompts.py")
    add("--max_new_tokens", type=int, default=512, help="maximum length of a reply, in tokens")
    if temperature is not None:
        add("--temperature", type=float, default=temperature, help="of sampling, above 0")
        add("--seed", type=int, default=1337, help="random seed of sampling; same seed, same file")
    return add


def beside(out, name: str) -> Path:
    """distill.jsonl, "ability" -> distill_ability.jsonl"""
    return Path(out).with_name(f"{Path(out).stem}_{name}.jsonl")


def rows_of(paths, convert: Callable, skip_bad_lines: bool = False) -> list:
    """convert(row) of every row of files and folders; a ValueError names file and line."""
    return [row for path in paths for file in files_of(path)
            for row in read_each(file, convert, skip_bad_lines, Logger)]


def read_choices(paths, skip_bad_lines: bool = False) -> list[dict]:
    """Rows {id, question, options, answer_idx, ...} of multiple choice, each with an id of its own,
    on which replies and abilities are joined."""
    seen = set()

    def checked(row):
        if missing := [key for key in ("id", "question", "options") if key not in row]:
            raise ValueError(f"no {missing[0]!r} (keys found: {', '.join(row)}; these files have "
                             "rows {id, question, options, answer_idx})")
        to_messages(row)                # raises ValueError for an option or an answer
        if str(row["id"]) in seen:
            raise ValueError(f"the id {str(row['id'])!r:.60} belongs to an earlier question")
        seen.add(str(row["id"]))
        return row

    return rows_of(paths, checked, skip_bad_lines)


def read_abilities(paths) -> dict[str, tuple[str, ...]]:
    """{id as text: path from the root} of ability files {"id", "ability_path"}."""
    abilities = {}

    def checked(row):
        path = row.get("ability_path")
        if "id" not in row or not isinstance(path, list) or not path:
            raise ValueError('not an ability {"id", "ability_path": ["root", ...]} (keys found: '
                             f"{', '.join(row)})")
        known = abilities.setdefault(str(row["id"]), tuple(path))
        if known != tuple(path):
            raise ValueError(f"the id {row['id']!r} has two paths, {list(known)} and {path}")

    rows_of(paths, checked)
    return abilities


def sha256_of(paths: str | list[str]) -> list[str]:
    paths = [paths] if isinstance(paths, str) else paths
    return [file_sha256(file) for path in paths for file in files_of(path)]


def made_from(args, files=(), agents=(), flags=()) -> dict:
    """What an interrupted run must have in common with the one that resumes it: the contents of
    these flags' files, the identity of these agents, and the values of the other flags."""
    return {f"--{name}": value for name, value in [
        *((name, sha256_of(vars(args)[name])) for name in files),
        *((role, identity_of(vars(args), role)) for role in agents),
        *((name, vars(args)[name]) for name in flags)]}


def work_in_parts(out, about: dict, items: list, work: Callable, world):
    """(parts, [work(0, items[0]), work(1, items[1]), ...] on the main process, None on others).
    The same command resumes an interrupted run, with any number of processes (runtime/parts.py)."""
    why = None
    with checking_input():
        parts = Parts(out, about, len(items), world)
        with main_process_first(world):
            missing = parts.prepare()
        Logger(f"{len(missing)} of {len(items)} parts to do")
        try:
            for part in parts.mine(missing):
                parts.write(part, work(part, items[part]))
        except OutOfBudget as error:
            why = str(error)
    return parts, parts.join(why)


def finish_questions(parts, rows: list[dict], abilities: list, rejected: list[dict]):
    """Write OUT, OUT_ability and OUT_rejected. Ends the script if no question is left."""
    out, rejects = parts.out, beside(parts.out, "rejected")
    write_jsonl(rejects, rejected)
    if rows:
        write_jsonl(beside(out, "ability"), [{"id": row["id"], "ability_path": list(path)}
                                             for row, path in zip(rows, abilities)])
        write_jsonl(out, rows)              # last: it marks the step as finished
    parts.remove()
    if not rows:
        sys.exit(f"no question is left, {len(rejected):,} are rejected: {rejects}")
    Logger(f"wrote {len(rows):,} questions: {out}, {beside(out, 'ability')}; {len(rejected):,} "
           f"rejected: {rejects}")


def table(columns: list[str], rows: list[tuple], rejected: list[dict]) -> str:
    """A line per leaf, (name, number, number, ...), with the number of its rejected replies by
    reason (its part before a colon), then the totals. `rejected` has rows with "leaf" and "reason".
    """
    reasons = {}
    for reject in rejected:
        for leaf in (reject["leaf"], "all"):
            reasons.setdefault(leaf, Counter())[reject["reason"].partition(":")[0]] += 1
    lines = [["leaf", *columns, "rejected"]]
    for leaf, *numbers in [*rows, ("all", *map(sum, zip(*(row[1:] for row in rows))))]:
        # By frequency, then by name, so that the order of the processes does not show.
        common = sorted(reasons.get(leaf, {}).items(), key=lambda pair: (-pair[1], pair[0]))
        lines.append([leaf, *(f"{n:,}" for n in numbers),
                      ", ".join(f"{n:,} {reason}" for reason, n in common)])
    return aligned(lines, f"l{'r' * len(columns)}l")
