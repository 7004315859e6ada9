"""
经验配对：同一个问题写两份，给教师的那份前面多一段同类任务的示范；整组留出作测试。
Pairs for context distillation: each question twice, for the teacher after a demonstration.

    Q     what the student reads:   the row unmodified
    Q+E   what the teacher reads:   another row of the same kind as text, then the row

    python scripts/pair_experience.py --data_path alfworld.jsonl --same task_type \\
        --apart "(\\d+)/" --max_chars 1400 --train 240 --test 48 --out_dir out/alfworld
    python train_onpolicy.py --data_path out/alfworld/train_student.jsonl \\
        --teacher_data_path out/alfworld/train_teacher.jsonl ...

From a demonstration of the same room or document the answer can simply be copied, so --apart reads
a row's group from its id. A group is never split between train and test, its rows never demonstrate
each other, and all demonstrations are training rows. Writes OUT_DIR/{train,test}_{student,teacher}.

Where the rows hold an experience already, only Q is missing. --strip removes what a regular
expression matches in the turns that are read, and writes OUT_DIR/student.jsonl, row by row:

    python scripts/pair_experience.py --data_path alfworld_valid_train_1.jsonl \\
        --strip "Experience:.*?\\n\\n" --out_dir out/noexp
"""

import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from dataset.formats import read_each, to_messages, to_question
from runtime.args import checking_input, make_parser, parse_args
from runtime.files import write_jsonl

PROMPT = "Here is how such a task is done:\n\n{demonstration}\n\nNow it is your turn.\n\n{question}"
PARTS = ("train", "test")


class Row(NamedTuple):
    name: str | None        # its id
    same: str | float       # rows of one value can demonstrate each other ...
    group: str              # ... unless they are of one group
    messages: list[dict]
    text: str               # the turns but the system's: "You see a mug.\n> take mug"
    others: dict            # the other keys of the row


def to_row(row: dict, same: str, apart: re.Pattern | None) -> Row:
    """Raises ValueError if the row is no conversation, or lacks what --same and --apart need."""
    messages = to_messages(row)
    turns, answer, others = to_question(row)            # a last turn of the user shows how it ended
    if answer is not None:
        turns = [*turns, {"role": "assistant", "content": answer}]
    text = "\n".join("> " * (turn["role"] == "assistant") + turn["content"]
                     for turn in turns if turn["role"] != "system")
    if same not in row:
        raise ValueError(f"no {same!r}, the key of --same (keys found: {', '.join(row)})")
    name = row.get("id")
    found = apart and apart.search(str(name))
    if apart and (not found or found[1] is None):
        raise ValueError(f"--apart {apart.pattern!r} finds no group in the id {name!r:.60}")
    return Row(name, row[same], found[1] if apart else text, messages, text, others)


def without(row: dict, experience: re.Pattern) -> dict:
    """Q of a row of Q+E. Raises ValueError if there is no experience, or nothing but that."""
    others, messages = to_question(row).others, []
    for turn in to_messages(row):
        if turn["role"] != "assistant":
            turn = turn | {"content": experience.sub("", turn["content"])}
        if turn["content"].strip() or turn["role"] != "system":
            messages.append(turn)
    if messages == to_messages(row):
        raise ValueError(f"--strip {experience.pattern!r} finds no experience in "
                         f"{messages[0]['content']!r:.80}")
    return {**others, "conversations": to_messages({"conversations": messages})}


def hold_out(rows: list[Row], share: float, rng: random.Random) -> dict[str, list[Row]]:
    """{"train": rows, "test": rows} of whole groups. Raises ValueError for a single group."""
    groups = list(dict.fromkeys(row.group for row in rows))
    if len(groups) < 2:
        raise ValueError(f"all {len(rows):,} rows are of one group, {groups[0]!r:.60}: none can be "
                         "held out. Check --apart")
    rng.shuffle(groups)
    held_out = set(groups[:min(max(1, round(share * len(groups))), len(groups) - 1)])
    print(f"{len(rows):,} rows in {len(groups):,} groups, {len(held_out):,} of them held out")
    return {part: [row for row in rows if (row.group in held_out) == (part == "test")]
            for part in PARTS}


def pairs_of(rows: list[Row], shown: list[Row], n_pairs: int, max_chars: int,
             rng: random.Random) -> tuple[list[tuple[Row, Row]], str]:
    """(a row and a random demonstration from `shown`, shuffled; a sentence on how many). n_pairs
    and max_chars 0: no limit."""
    pairs, left_out = [], Counter()
    for row in rows:
        others = [each for each in shown if each.same == row.same and each.group != row.group]
        if max_chars and len(row.text) > max_chars:
            left_out["longer than --max_chars"] += 1
        elif others:
            pairs.append((row, rng.choice(others)))
        else:
            left_out["without a demonstration"] += 1
    rng.shuffle(pairs)
    kept = pairs[:n_pairs or None]
    left_out["more than requested"] = len(pairs) - len(kept)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items() if n)
    reasons = f"; left out: {reasons}" if reasons else ""
    return kept, f"{len(kept):,} pairs of {len(rows):,} rows{reasons}"


def teachers_line(row: Row, demonstration: Row) -> dict:
    """The student's line, with the demonstration before the first question."""
    messages = list(row.messages)
    first = [turn["role"] for turn in messages].index("user")
    prompt = PROMPT.format(demonstration=demonstration.text, question=messages[first]["content"])
    messages[first] = {"role": "user", "content": prompt}
    return {**row.others, "demonstration": demonstration.name, "conversations": messages}


def strip(args):
    """Write the rows of Q that belong to the rows of Q+E."""
    rows = read_each(args.data_path, lambda row: without(row, args.strip), args.skip_bad_lines)
    path = f"{args.out_dir}/student.jsonl"
    write_jsonl(path, rows)
    print(f"{len(rows):,} rows without the experience: {path}. The first:\n"
          f"{rows[0]['conversations'][0]['content'][:500]}")


def pair(args):
    """Write the files of Q and of Q+E, for training and test."""
    rng = random.Random(args.seed)
    rows = read_each(args.data_path, lambda row: to_row(row, args.same, args.apart),
                     args.skip_bad_lines)
    parts = hold_out(rows, args.test_share, rng)
    shown_chars = args.max_demonstration_chars
    shown_chars = args.max_chars if shown_chars is None else shown_chars
    shown = [row for row in sorted(parts["train"], key=lambda row: row.group)
             if not shown_chars or len(row.text) <= shown_chars]
    pairs = {}
    for part in PARTS:
        pairs[part], summary = pairs_of(parts[part], shown, vars(args)[part], args.max_chars, rng)
        if not pairs[part]:
            raise ValueError(f"nothing to write. {part}: {summary}")
        print(f"{part}: {summary}")

    for part in PARTS:
        path = f"{args.out_dir}/{part}"
        write_jsonl(f"{path}_student.jsonl", [{**row.others, "conversations": row.messages}
                                              for row, _ in pairs[part]])
        write_jsonl(f"{path}_teacher.jsonl", [teachers_line(*each) for each in pairs[part]])
    path = f"{args.out_dir}/train"
    print(f"Learn from them: python train_distillation.py --data_path {path}_student.jsonl "
          f"--teacher_data_path {path}_teacher.jsonl ...")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="conversations, in the formats of dataset/dataset.md")
    rows = parser.add_mutually_exclusive_group(required=True).add_argument
    rows("--same", metavar="KEY",
        help="key of the rows; a row's demonstration has the same value there")
    rows("--strip", type=lambda text: re.compile(text, re.DOTALL), metavar="REGEX",
        help="regular expression of the experience in the rows, to remove it; . is any character, "
             "line ends included")
    add("--apart", type=re.compile, default=None, metavar="REGEX",
        help="regular expression whose first group, searched in a row's id, is the row's group; "
             "default: only equal rows are of one group. With a leading dash: --apart='-(\\d+)/'")
    add("--out_dir", required=True, help="folder of the files")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add = parser.add_argument_group("size").add_argument
    add("--train", type=int, default=0, help="number of training pairs; 0: all")
    add("--test", type=int, default=0, help="number of test pairs; 0: all")
    add("--test_share", type=float, default=0.2, help="fraction of groups held out, in (0, 1)")
    add("--max_chars", type=int, default=0, help="maximum length of a row, in characters; 0: any")
    add("--max_demonstration_chars", type=int, default=None,
        help="maximum length of a demonstration, in characters; 0: any; default: --max_chars")
    add("--seed", type=int, default=1337, help="random seed of split, demonstrations and order")
    args = parse_args(parser)
    if args.apart and not args.apart.groups:
        parser.error(f"--apart {args.apart.pattern!r} has no group: put what tells rows apart in "
                     "parentheses, as in '(\\d+)/'")
    names = ["student"] if args.strip else [f"{part}_{side}" for part in PARTS
                                            for side in ("student", "teacher")]
    with checking_input():
        for path in (Path(args.out_dir, f"{name}.jsonl") for name in names):
            if path.exists():
                raise ValueError(f"{path} exists already. Give another --out_dir, or remove it")
        strip(args) if args.strip else pair(args)


if __name__ == "__main__":
    main()
