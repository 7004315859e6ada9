"""
出题：哪片叶子弱，就多给哪片叶子出题，由教师参照真题来写；重复的、读不懂的都退回并记下原因。
New questions for weak leaves: each leaf has a share of them by how weak it is, and the teacher writes them after real ones.

    share of a leaf = floor / n_leaves + (1 - floor) * weakness / sum(weakness)     ability_tree/tree.py, AbilityTree.weights

    python -m ability_tree.generate_distill_data --tree out/ability/tree_1.json --questions dataset/ability_seeds.jsonl \\
        --abilities dataset/ability_paths.jsonl --teacher out/ability/teacher/full_sft_128.pth --prompts miniworld \\
        --n_samples 1000 --out out/ability/distill.jsonl

two processes  torchrun --nproc_per_node 2 -m ability_tree.generate_distill_data --ddp ...

A question that is one of the seed questions, of --exclude, or was written before is left out, and asked for again, like one
that cannot be read, --max_tries times in all. Options that are missing are other answers to seed questions of the leaf.

    OUT             {"id", "question", "options", "answer_idx", "meta_info"}
    OUT_ability     {"id", "ability_path"} of each of them
    OUT_rejected    {"leaf", "reply", "reason"} of what was left out

(OUT_ability stands for OUT's name with _ability before .jsonl.) A run that was stopped goes on with the same command.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import NamedTuple

from ability_tree.agents import Agent, OutOfBudget, add_agent_args, make_agent
from ability_tree.inference import read_choices, write_rows
from ability_tree.prompts import LETTERS, PROMPTS, folded, name_of
from ability_tree.steps import Parts, about_agent, add_step_args, beside, read_abilities, seed_of, sha256_of, table
from ability_tree.tree import AbilityTree, key_of, spell
from dataset.formats import files_of, read_each, to_question
from runtime.args import checking_input, parse_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode, main_process_first

ASKED_AT_ONCE = 64          # questions of a part, at least, if there are as many: of one leaf, or of several

# Flags that a run which goes on must have as before, or the questions would be others than those of an unbroken run.
SAME = ("n_samples", "n_options", "n_seeds", "smoothing", "floor", "power", "prompts", "max_tries", "max_new_tokens",
        "temperature", "seed")


class Wanted(NamedTuple):
    """A leaf and what is needed to ask for its questions."""

    leaf: tuple[str, ...]
    n: int                      # questions
    seeds: list[dict]           # real questions of this leaf
    answers: list[str]          # from which options are completed


# ---- 1. How many of which leaf -------------------------------------------------------------------

def largest_remainder(shares: dict, n: int) -> dict:
    """n things by shares: {"a": 0.5, "b": 0.3, "c": 0.2} of 4 -> {"a": 2, "b": 1, "c": 1}. Each gets the whole part of its
    share of n; what is left goes to the largest fractions, of equal ones to the first. (Hamilton's method.)"""
    total = sum(shares.values())
    exact = {key: n * share / total for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_fraction = sorted(exact, key=lambda key: counts[key] - exact[key])       # stable
    for key in by_fraction[:n - sum(counts.values())]:
        counts[key] += 1
    return counts


def seeds_of_leaves(rows: list[dict], abilities: dict[str, tuple], leaves: Iterable[tuple]) -> dict[tuple, list[dict]]:
    """The seed questions of each leaf. Raises ValueError if no question belongs to any."""
    known = {key_of(leaf): leaf for leaf in leaves}
    seeds = {leaf: [] for leaf in known.values()}
    without_path, elsewhere = 0, 0
    for row in rows:
        path = abilities.get(str(row["id"]))
        leaf = known.get(key_of(path)) if path else None
        if leaf:
            seeds[leaf].append(row)
        without_path += path is None
        elsewhere += path is not None and leaf is None
    if without_path + elsewhere == len(rows):
        raise ValueError(f"none of the {len(rows):,} seed questions belongs to a leaf of the tree: {without_path:,} have no "
                         f"row in --abilities, {elsewhere:,} a path that is no leaf. Give the abilities of these questions")
    if without_path or elsewhere:
        Logger(f"left aside: {without_path:,} seed questions without a row in --abilities, {elsewhere:,} whose path is no "
               "leaf of the tree")
    return seeds


def text_of(row: dict) -> str:
    """What a row of any format asks, without its options. Raises ValueError as to_question does."""
    messages = to_question(row).messages
    return row["question"] if "options" in row else messages[-1]["content"]


def plan(tree: AbilityTree, seeds: dict[tuple, list[dict]], args) -> list[Wanted]:
    """What is wanted of each leaf. Raises ValueError if no leaf can be asked for.

    Where the wording has the teacher write the right option alone, the wrong ones come from the leaf's seed questions, and
    a leaf without enough of them has no share.
    """
    shares, answers = tree.weights(args.smoothing, args.floor, args.power), {}
    for leaf, rows in seeds.items():
        right = [row["options"][row["answer_idx"]] for row in rows]
        others = [option for row in rows for option in row["options"].values()]
        answers[leaf] = first_of_each(right)
        if len(answers[leaf]) < args.n_options:
            answers[leaf] = first_of_each(right + others)
    if not PROMPTS[args.prompts].writes_wrong_options:
        poor = [leaf for leaf in shares if len(answers[leaf]) < args.n_options]
        if len(poor) == len(shares):
            raise ValueError(f"no leaf has seed questions with {args.n_options} different answers, from which options could "
                             "be completed: give more --questions, or fewer --n_options")
        if poor:
            Logger(f"{len(poor):,} of {len(shares):,} leaves have fewer than {args.n_options} different answers in their "
                   f"seed questions, and no share: {', '.join(map(name_of, poor[:3]))}{', ...' if len(poor) > 3 else ''}")
        shares = {leaf: share for leaf, share in shares.items() if leaf not in set(poor)}
    return [Wanted(leaf, n, seeds[leaf], answers[leaf])
            for leaf, n in largest_remainder(shares, args.n_samples).items() if n]


def first_of_each(texts: list[str]) -> list[str]:
    """Each text once, as it was spelled first."""
    once = {}
    for text in texts:
        once.setdefault(folded(text), text)
    return list(once.values())


def in_parts(wanted: list[Wanted]) -> list[list[Wanted]]:
    """Neighbouring leaves together, until a part has ASKED_AT_ONCE questions. A leaf is not divided: its questions must
    differ from each other."""
    parts, size = [[]], 0
    for each in wanted:
        if size >= ASKED_AT_ONCE:
            parts.append([])
            size = 0
        parts[-1].append(each)
        size += each.n
    return parts


# ---- 2. Questions --------------------------------------------------------------------------------

def write_part(agent: Agent, wanted: list[Wanted], known: set[str], part: int, args) -> dict:
    """{"asked": of each leaf, "rows": [[of each leaf]], "rejected": [...]}. In each try what is still missing is asked for,
    of all leaves at once."""
    prompts = PROMPTS[args.prompts]
    known = set(known)                  # of this part alone: what other parts write is not known before the end
    asked, rows, rejected = [0] * len(wanted), [[] for _ in wanted], []
    for attempt in range(args.max_tries):
        todo = [i for i, each in enumerate(wanted) for _ in range(each.n - len(rows[i]))]
        if not todo:
            break
        draws = [Random(f"{args.seed}/{spell(wanted[i].leaf)}/{attempt}/{n}") for n, i in enumerate(todo)]
        conversations = [prompts.write(wanted[i].leaf, shown(wanted[i].seeds, args.n_seeds, draw), args.n_options)
                         for i, draw in zip(todo, draws)]
        replies = agent.ask(conversations, args.max_new_tokens, args.temperature, seed_of(args.seed, part, attempt))
        for i, reply, draw in zip(todo, replies, draws):
            asked[i] += 1
            try:
                row = new_question(reply, wanted[i], known, prompts, args.n_options, draw)
            except ValueError as error:
                rejected.append({"leaf": spell(wanted[i].leaf), "reply": reply, "reason": str(error)})
                continue
            known.add(folded(row["question"]))
            rows[i].append(row)
    return {"asked": asked, "rows": rows, "rejected": rejected}


def shown(seeds: list[dict], n: int, draw: Random) -> list[dict]:
    return draw.sample(seeds, min(n, len(seeds)))


def new_question(reply: str, wanted: Wanted, known: set[str], prompts, n_options: int, draw: Random) -> dict:
    """The row of a reply, its options completed and in random order. Raises ValueError with the reason if it is none."""
    if not reply.strip():
        raise ValueError("no reply: the agent's prompt may be too long for it, or the endpoint failed")
    row = prompts.read_question(reply)
    if folded(row["question"]) in known:
        raise ValueError(f"there already: {row['question']}")
    right = row["options"].pop(row["answer_idx"])
    wrong = list(row["options"].values())[:n_options - 1]
    taken = {folded(text) for text in [right, *wrong]}
    others = [text for text in wanted.answers if folded(text) not in taken]
    missing = n_options - 1 - len(wrong)
    if missing > len(others):
        raise ValueError(f"too few options: {1 + len(wrong)} of {n_options}, and the seed questions of this leaf have no "
                         f"more than {len(others)} others")
    texts = [right, *wrong, *draw.sample(others, missing)]
    draw.shuffle(texts)
    return {"question": row["question"], "options": dict(zip(LETTERS, texts)), "answer_idx": LETTERS[texts.index(right)],
            "meta_info": name_of(wanted.leaf)}


def collect(parts: list[list[Wanted]], results: list[dict], prefix: str, draw: Random):
    """(questions, abilities, rejected, lines of the table) of all parts. A question that two parts wrote stays with the
    first; the order of all is random, so that a run which stops early has learned of each leaf."""
    kept, rejected, lines, known = [], [], [], set()
    for wanted, result in zip(parts, results):
        rejected += result["rejected"]
        for each, asked, rows in zip(wanted, result["asked"], result["rows"]):
            n_before = len(kept)
            for row in rows:
                if folded(row["question"]) in known:
                    rejected.append({"leaf": spell(each.leaf), "reply": row["question"],
                                     "reason": "there already: written for another leaf"})
                    continue
                known.add(folded(row["question"]))
                kept.append((each.leaf, row))
            lines.append((spell(each.leaf), each.n, asked, len(kept) - n_before))
    draw.shuffle(kept)
    rows = [{"id": f"{prefix}-{i:05d}", **row} for i, (_, row) in enumerate(kept)]
    abilities = [{"id": row["id"], "ability_path": list(leaf)} for row, (leaf, _) in zip(rows, kept)]
    return rows, abilities, rejected, lines


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--tree", required=True, help="the student's ability tree, .json")
    add("--questions", nargs="+", required=True, help="seed questions: files of {id, question, options, answer_idx}")
    add("--abilities", nargs="+", required=True, help="files of {id, ability_path}, joined on id")
    add("--exclude", nargs="+", default=[], help="files of questions not to be written, in any format: those of exams")
    add("--out", required=True, help=".jsonl file for the questions; it must not be there yet")
    add("--id_prefix", default=None, help="ids are PREFIX-00000, ...; default: the name of --out")
    add("--n_samples", type=int, default=1000, help="questions wanted, over all leaves")
    add("--n_options", type=int, default=4, help="options of each, 2 to 26")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add = parser.add_argument_group("share of a leaf").add_argument
    add("--smoothing", type=float, default=1.0, help="answers added to the right ones and to the wrong ones, above 0: the "
                                                     "more, the less a few questions decide")
    add("--floor", type=float, default=0.02, help="part in [0, 1] of all questions that leaves share alike")
    add("--power", type=float, default=1.0, help="of (1 - accuracy): 0 asks all alike, above 1 mostly the weakest")
    add = parser.add_argument_group("requests").add_argument
    add("--prompts", default="json", choices=list(PROMPTS), help="how they are worded: ability_tree/prompts.py")
    add("--n_seeds", type=int, default=3, help="real questions shown in each (json), drawn anew; 0: none")
    add("--max_tries", type=int, default=4, help="requests per wanted question, at most")
    add("--max_new_tokens", type=int, default=512, help="longest reply, in tokens")
    add("--temperature", type=float, default=1.0, help="of the teacher, above 0: at 0 it would write the same again")
    add_agent_args(parser, "teacher")
    add_step_args(parser)
    args = parse_args(parser)
    if min(args.n_samples, args.max_tries, args.max_new_tokens) < 1 or args.n_seeds < 0:
        parser.error(f"--n_samples {args.n_samples}, --max_tries {args.max_tries} and --max_new_tokens "
                     f"{args.max_new_tokens} must be 1 or more, --n_seeds {args.n_seeds} 0 or more")
    if not 2 <= args.n_options <= len(LETTERS) or args.temperature <= 0:
        parser.error(f"--n_options {args.n_options} must be 2 to {len(LETTERS)}, --temperature {args.temperature:g} above 0")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)

    with checking_input():
        # 3. Leaves and their seed questions
        tree = AbilityTree.load(args.tree)
        questions = read_choices(args.questions, args.skip_bad_lines)
        excluded = [text for path in args.exclude for file in files_of(path)
                    for text in read_each(file, text_of, args.skip_bad_lines, Logger)]
        seeds = seeds_of_leaves(questions, read_abilities(args.abilities), tree.leaves())
        wanted = in_parts(plan(tree, seeds, args))
        known = {folded(text) for text in [*map(text_of, questions), *excluded]}
        Logger(f"{args.n_samples:,} questions wanted of {sum(map(len, wanted)):,} leaves, {len(known):,} known ones barred")

        # 4. Teacher, and what is written already
        teacher = make_agent(args, "teacher", world.device)
        about = {"--tree": sha256_of([args.tree]), "--questions": sha256_of(args.questions),
                 "--abilities": sha256_of(args.abilities), "--exclude": sha256_of(args.exclude),
                 "--teacher": about_agent(args, "teacher"), **{f"--{flag}": vars(args)[flag] for flag in SAME}}
        parts = Parts(args.out, about, len(wanted), world)
        with main_process_first(world):
            missing = parts.prepare()
        Logger(f"{teacher.name} writes; {len(missing)} of {len(wanted)} parts are to be written")

        # 5. Write
        why = None
        try:
            for part in parts.mine(missing):
                parts.write(part, write_part(teacher, wanted[part], known, part, args))
        except OutOfBudget as error:
            why = str(error)
    results = parts.join(why)

    # 6. Finish
    if world.rank != 0:
        return
    rows, abilities, rejected, lines = collect(wanted, results, args.id_prefix or Path(args.out).stem, Random(args.seed))
    Logger(table(["wanted", "asked", "kept"], lines, rejected))
    write_rows(beside(args.out, "rejected"), rejected)
    if rows:
        write_rows(beside(args.out, "ability"), abilities)
        write_rows(args.out, rows)      # last: where it is, all is
    parts.remove()
    if not rows:
        sys.exit(f"nothing to write: {len(rejected):,} replies, none a new question. See {beside(args.out, 'rejected')}")
    Logger(f"wrote {len(rows):,} of {args.n_samples:,} questions: {args.out}, {beside(args.out, 'ability')}; "
           f"{len(rejected):,} refused: {beside(args.out, 'rejected')}")


if __name__ == "__main__":
    main()
