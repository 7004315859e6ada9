"""
经验成对：同一个问题写两遍，给教师的一遍前面多一段同类任务的示范；整组留出作测试。
Pairs for context distillation: each question twice, for the teacher after a demonstration.

    Q     what the student reads:   the row unmodified
    Q+E   what the teacher reads:   another row of the same kind as text, then the row

    python scripts/pair_experience.py --data_path alfworld.jsonl --same task_type \\
        --apart "(\\d+)/" --max_chars 1400 --train 240 --test 48 --out_dir out/alfworld
    python train_onpolicy.py --data_path out/alfworld/train_student.jsonl \\
        --teacher_data_path out/alfworld/train_teacher.jsonl ...

If a demonstration is too close, from the same room or document, the answer can simply be copied.
--apart reads a row's group from its id. A group is never split between train and test, its rows
never demonstrate each other, and all demonstrations are training rows. The same file and seed give
the same bytes: OUT_DIR/{train,test}_{student,teacher}.jsonl.
"""

import json
import random
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

# `python scripts/pair_experience.py` looks for modules in scripts/ alone; ours are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.formats import read_each, to_messages, to_question
from evaluation.tables import aligned
from runtime.args import check_ranges, checking_input, make_parser, parse_args
from runtime.files import write_atomic

PROMPT = "Here is how such a task is done:\n\n{demonstration}\n\nNow it is your turn.\n\n{question}"
MAX_SHOWN = 20          # values of --same in the table at the end


# ---- 1. Rows -------------------------------------------------------------------------------------

class Row(NamedTuple):
    name: str | int         # its id; without one its number
    same: str | float       # rows of one value can demonstrate each other ...
    group: str              # ... unless they are of one group
    messages: list[dict]    # as in to_messages
    text: str               # all turns, as a demonstration
    others: dict            # the other keys of the row


def to_row(row: dict, same: str, apart: re.Pattern | None) -> Row:
    """Raises ValueError if the row is no conversation, or lacks what --same and --apart need."""
    messages = to_messages(row)
    turns, answer, others = to_question(row)            # a last turn of the user shows how it ended
    if answer is not None:
        turns = [*turns, {"role": "assistant", "content": answer}]
    if same not in row:
        raise ValueError(f"no {same!r}, the key of --same (keys found: {', '.join(row)})")
    if not isinstance(row[same], (str, int, float)):
        raise ValueError(f"{same} is {row[same]!r:.60}, neither text nor number")
    text = as_text(turns)
    group = group_of(row, apart) if apart else text
    return Row(row.get("id"), row[same], group, messages, text, others)


def group_of(row: dict, apart: re.Pattern) -> str:
    if "id" not in row:
        raise ValueError(f"no 'id' for --apart {apart.pattern!r} (keys found: {', '.join(row)})")
    found = apart.search(str(row["id"]))
    if not found or found[1] is None:
        raise ValueError(f"--apart {apart.pattern!r} finds no group in the id {row['id']!r:.60}")
    return found[1]


def as_text(messages: list[dict]) -> str:
    """[user "You see a mug.", assistant "take mug"] -> "You see a mug.\\n> take mug"; no system
    turn."""
    marks = {"user": "", "assistant": "> "}
    return "\n".join(marks[turn["role"]] + turn["content"]
                     for turn in messages if turn["role"] in marks)


# ---- 2. Pairs ------------------------------------------------------------------------------------

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
            for part in ("train", "test")}


def demonstrations_of(rows: list[Row], max_chars: int) -> dict[str | float, list[Row]]:
    """{value of --same: rows that may be shown, a group's rows side by side}; max_chars 0: any
    length."""
    found = defaultdict(list)
    for row in sorted(rows, key=attrgetter("group")):
        if not max_chars or len(row.text) <= max_chars:
            found[row.same].append(row)
    return found


def pick(row: Row, shown: list[Row], rng: random.Random) -> Row | None:
    """One of the rows of other groups, each with the same probability; None if there is none."""
    start = bisect_left(shown, row.group, key=attrgetter("group"))
    n_own = bisect_right(shown, row.group, key=attrgetter("group")) - start
    if n_own == len(shown):
        return None
    place = rng.randrange(len(shown) - n_own)
    return shown[place + n_own if place >= start else place]


def pairs_of(rows, demonstrations, n_pairs: int, max_chars: int, rng) -> tuple[list, str]:
    """([(row, its demonstration)] shuffled, a sentence on how many). 0: no limit."""
    pairs, left_out = [], Counter()
    for row in rows:
        if max_chars and len(row.text) > max_chars:
            left_out["longer than --max_chars"] += 1
        elif demonstration := pick(row, demonstrations.get(row.same, []), rng):
            pairs.append((row, demonstration))
        else:
            left_out["without a demonstration"] += 1
    rng.shuffle(pairs)
    kept = pairs[:n_pairs or None]
    left_out["more than requested"] = len(pairs) - len(kept)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in left_out.items() if n)
    reasons = f"; left out: {reasons}" if reasons else ""
    return kept, f"{len(kept):,} pairs of {len(rows):,} rows{reasons}"


def lines_of(row: Row, demonstration: Row) -> dict[str, dict]:
    """{"student": its line, "teacher": the same with the demonstration before the first
    question}."""
    messages = list(row.messages)
    first = next(i for i, turn in enumerate(messages) if turn["role"] == "user")
    prompt = PROMPT.format(demonstration=demonstration.text, question=messages[first]["content"])
    messages[first] = {"role": "user", "content": prompt}
    return {"student": {**row.others, "conversations": row.messages},
            "teacher": {**row.others, "demonstration": demonstration.name,
                        "conversations": messages}}


def table(same: str, pairs: dict[str, list], demonstrations: dict[str | float, list[Row]]) -> str:
    """Pairs of each part and available demonstrations, by value of --same."""
    counts = {part: Counter(row.same for row, _ in found) for part, found in pairs.items()}
    values = [value for value, _ in sum(counts.values(), Counter()).most_common()]
    rows = [[*(f"{of_part[value]:,}" for of_part in counts.values()),
             f"{len(demonstrations[value]):,}", f"{value!r:.60}"] for value in values[:MAX_SHOWN]]
    more = f"\n... and {len(values) - MAX_SHOWN:,} more" if len(values) > MAX_SHOWN else ""
    return aligned([[*counts, "demonstrations", same], *rows], "rrrl") + more


def pattern(regex: str, parser) -> re.Pattern:
    try:
        compiled = re.compile(regex)
    except re.error as error:
        parser.error(f"--apart {regex!r} is no regular expression: {error}")
    if not compiled.groups:
        parser.error(f"--apart {regex!r} has no group: put what tells rows apart in parentheses, "
                     "as in '(\\d+)/'")
    return compiled


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", required=True, help="conversations, in the formats of dataset/dataset.md")
    add("--same", required=True, metavar="KEY",
        help="key of the rows; a row's demonstration has the same value there")
    add("--apart", default=None, metavar="REGEX",
        help="regular expression whose first group, searched in a row's id, is the row's group; "
             "default: only equal rows are of one group. With a leading dash: --apart='-(\\d+)/'")
    add("--out_dir", required=True, help="folder of the four files")
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
    if args.max_demonstration_chars is None:
        args.max_demonstration_chars = args.max_chars
    check_ranges(parser, args, ("test_share", 0 < args.test_share < 1, "lie in (0, 1)"), *(
        (name, vars(args)[name] >= 0, "be 0 or more")
        for name in ("train", "test", "max_chars", "max_demonstration_chars")))
    apart = None if args.apart is None else pattern(args.apart, parser)
    out_dir, rng = Path(args.out_dir), random.Random(args.seed)
    paths = {(part, side): out_dir / f"{part}_{side}.jsonl"
             for part in ("train", "test") for side in ("student", "teacher")}

    with checking_input():
        if exist := [str(path) for path in paths.values() if path.exists()]:
            raise ValueError(f"{', '.join(exist)} exists already. Give another --out_dir, or "
                             "remove it")

        # 2. Rows, of which whole groups are held out
        rows = read_each(args.data_path, lambda row: to_row(row, args.same, apart),
                         args.skip_bad_lines)
        rows = [row._replace(name=number) if row.name is None else row
                for number, row in enumerate(rows, start=1)]
        parts = hold_out(rows, args.test_share, rng)

        # 3. A demonstration for each, from the training part
        demonstrations, pairs = demonstrations_of(parts["train"], args.max_demonstration_chars), {}
        for part in ("train", "test"):
            pairs[part], summary = pairs_of(parts[part], demonstrations, vars(args)[part],
                                            args.max_chars, rng)
            if not pairs[part]:
                raise ValueError(f"nothing to write. {part}: {summary}")
            print(f"{part}: {summary}")

    # 4. The four files
    out_dir.mkdir(parents=True, exist_ok=True)
    for (part, side), path in paths.items():
        # surrogatepass: an id may hold half a character, which UTF-8 refuses.
        text = "".join(json.dumps(lines_of(*pair)[side], ensure_ascii=False) + "\n"
                       for pair in pairs[part])
        write_atomic(path, lambda file: file.write(text.encode(errors="surrogatepass")))
    print(table(args.same, pairs, demonstrations))
    print(f"Learn from them: python train_distillation.py --data_path {paths['train', 'student']} "
          f"--teacher_data_path {paths['train', 'teacher']} ...")


if __name__ == "__main__":
    main()
