"""
经验成对：同一个问题写两遍，给教师的一遍前面多一段同类任务的示范；整组留出作测试。
Pairs with and without experience: each question twice, for the teacher with a demonstration of such a task before it.

    Q     what the student reads:   the row as it is
    Q+E   what the teacher reads:   another row of the same kind, told as text, then the row

    python scripts/pair_experience.py --data_path alfworld.jsonl --same task_type --apart "(\\d+)/" --max_chars 1400 \\
        --train 240 --test 48 --out_dir out/alfworld
    python train_onpolicy.py --data_path out/alfworld/train_student.jsonl \\
        --teacher_data_path out/alfworld/train_teacher.jsonl ...

From a demonstration that is too close, the same room or the same document, an answer can simply be copied. --apart reads
from a row's id where it belongs: such a group is never on both sides of train and test, nor do its rows demonstrate each
other. The demonstrations of both parts come from the training part. The same file and seed make the same bytes:

    OUT_DIR/train_student.jsonl  OUT_DIR/train_teacher.jsonl  OUT_DIR/test_student.jsonl  OUT_DIR/test_teacher.jsonl
"""

import argparse
import json
import random
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

# Run as `python scripts/pair_experience.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.formats import BadLine, read_rows, to_messages, to_question
from runtime.args import checking_input, parse_args
from runtime.files import write_atomic

WITH_EXPERIENCE = "Here is how such a task is done:\n\n{demonstration}\n\nNow it is your turn.\n\n{question}"
MAX_SHOWN = 20          # values of --same in the table at the end

# Why a row is left out, and how to call it.
LEFT_OUT = {"too long": "longer than --max_chars", "alone": "without a demonstration",
            "not asked for": "more than were asked for"}


# ---------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    name: str | int         # its id, or the number of its line
    same: str | float       # rows that are equal here can demonstrate each other ...
    group: str              # ... unless they are equal here
    messages: list[dict]    # as to_messages has them
    text: str               # all of it, as a demonstration
    others: dict            # what else is in the row


def read_all(path, same: str, apart: re.Pattern | None, skip_bad_lines: bool) -> list[Row]:
    """The rows of a file. Raises what read_rows raises; BadLine at the first bad line (with skip_bad_lines they are counted,
    and the first is shown); ValueError when there is no good line."""
    rows, bad = [], []
    for number, row in read_rows(path):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            rows.append(to_row(number, row, same, apart))
        except ValueError as error:
            bad.append(f"{path}, line {number}: {error}")
            if not skip_bad_lines:
                raise BadLine(f"{bad[0]}. Fix the line, or pass --skip_bad_lines to leave it out") from None
    if not rows:
        raise ValueError(f"{path} has no row to make a pair of. {bad[0] if bad else 'It is empty'}")
    if bad:
        print(f"left out {len(bad):,} of {len(rows) + len(bad):,} lines. {bad[0]}{'; ...' if len(bad) > 1 else ''}")
    return rows


def to_row(number: int, row: dict, same: str, apart: re.Pattern | None) -> Row:
    """Raises ValueError with the reason if it is no conversation, or lacks what the flags ask for."""
    messages = to_messages(row)
    whole, answer, others = to_question(row)        # with the user's last word, which shows how it ended
    if answer is not None:
        whole = [*whole, {"role": "assistant", "content": answer}]
    if same not in row:
        raise ValueError(f"no {same!r}, the key of --same (keys found: {', '.join(row)})")
    if not isinstance(row[same], (str, int, float)):
        raise ValueError(f"{same} is {row[same]!r:.60}, neither text nor number")
    text = as_text(whole)
    return Row(row.get("id", number), row[same], group_of(row, text, apart), messages, text, others)


def group_of(row: dict, text: str, apart: re.Pattern | None) -> str:
    """What --apart reads from the row's id; without it each row is its own group, and its copies with it."""
    if apart is None:
        return text
    if "id" not in row:
        raise ValueError(f"no 'id' that --apart {apart.pattern!r} could be looked for in (keys found: {', '.join(row)})")
    found = apart.search(str(row["id"]))
    if not found or found[1] is None:
        raise ValueError(f"--apart {apart.pattern!r} finds no group in the id {row['id']!r:.60}")
    return found[1]


def as_text(messages: list[dict]) -> str:
    """Line by line what the user said and, after `>`, what the assistant did; no system turn.

    [user "You see a mug.", assistant "take mug"] -> "You see a mug.\n> take mug"
    """
    marks = {"user": "", "assistant": "> "}
    return "\n".join(marks[turn["role"]] + turn["content"] for turn in messages if turn["role"] in marks)


# --------------------------------------------------------------------------------------------------------------- pairs


def hold_out(rows: list[Row], share: float, rng: random.Random) -> dict[str, list[Row]]:
    """{"train": rows, "test": rows}, whole groups, in the order of the file. Raises ValueError for a single group."""
    groups = list(dict.fromkeys(row.group for row in rows))
    if len(groups) < 2:
        raise ValueError(f"all {len(rows):,} rows are of one group, {groups[0]!r:.60}: none can be held out. Is it what "
                         "--apart should read?")
    rng.shuffle(groups)
    held_out = set(groups[:min(max(1, round(share * len(groups))), len(groups) - 1)])
    print(f"{len(rows):,} rows in {len(groups):,} groups, {len(held_out):,} of them held out")
    return {"train": [row for row in rows if row.group not in held_out],
            "test": [row for row in rows if row.group in held_out]}


def demonstrations_of(rows: list[Row], max_chars: int) -> dict[str | float, list[Row]]:
    """{value of --same: rows that may be shown, those of a group side by side}; max_chars 0: of any length."""
    found = defaultdict(list)
    for row in sorted(rows, key=attrgetter("group")):
        if not max_chars or len(row.text) <= max_chars:
            found[row.same].append(row)
    return found


def draw(row: Row, shown: list[Row], rng: random.Random) -> Row | None:
    """One of the rows of other groups, each as likely as any other; None: there is none."""
    start, stop = (bisect(shown, row.group, key=attrgetter("group")) for bisect in (bisect_left, bisect_right))
    own = stop - start
    if own == len(shown):
        return None
    place = rng.randrange(len(shown) - own)
    return shown[place + own if place >= start else place]


def pairs_of(rows: list[Row], demonstrations, n_pairs: int, max_chars: int, rng) -> tuple[list[tuple[Row, Row]], Counter]:
    """([(row, its demonstration)], how many rows were left out and why), shuffled. With 0 there is no limit."""
    pairs, left_out = [], Counter()
    for row in rows:
        if max_chars and len(row.text) > max_chars:
            left_out["too long"] += 1
            continue
        demonstration = draw(row, demonstrations.get(row.same, []), rng)
        if demonstration is None:
            left_out["alone"] += 1
            continue
        pairs.append((row, demonstration))
    rng.shuffle(pairs)
    kept = pairs[:n_pairs or None]
    left_out["not asked for"] = len(pairs) - len(kept)
    return kept, left_out


def student_line(row: Row) -> dict:
    return {**row.others, "conversations": row.messages}


def teacher_line(row: Row, demonstration: Row) -> dict:
    """The same with the demonstration before the first question, and its name."""
    messages = list(row.messages)
    first = next(i for i, turn in enumerate(messages) if turn["role"] == "user")
    told = WITH_EXPERIENCE.format(demonstration=demonstration.text, question=messages[first]["content"])
    messages[first] = {"role": "user", "content": told}
    return {**row.others, "demonstration": demonstration.name, "conversations": messages}


def write_lines(path: Path, lines: list[dict]):
    # surrogatepass: an id may hold what UTF-8 cannot, and is to go through as it came.
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(path, lambda file: file.write(text.encode(errors="surrogatepass")))


def in_words(part: str, n_rows: int, n_pairs: int, left_out: Counter) -> str:
    why = ", ".join(f"{left_out[reason]:,} {told}" for reason, told in LEFT_OUT.items() if left_out[reason])
    return f"{part}: {n_pairs:,} pairs of {n_rows:,} rows" + (f"; left out: {why}" if why else "")


def print_table(same: str, pairs: dict[str, list], demonstrations: dict[str | float, list[Row]]):
    """How many pairs of each part there are of each value, and how many demonstrations to draw from."""
    counts = {part: Counter(row.same for row, _ in of_part) for part, of_part in pairs.items()}
    values = [value for value, _ in sum(counts.values(), Counter()).most_common()]
    print(f"{'train':>8} {'test':>8} {'demonstrations':>15}  {same}")
    for value in values[:MAX_SHOWN]:
        print(f"{counts['train'][value]:>8,} {counts['test'][value]:>8,} {len(demonstrations[value]):>15,}  {value!r:.60}")
    if len(values) > MAX_SHOWN:
        print(f"... and {len(values) - MAX_SHOWN:,} more")


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--data_path", required=True, help="file of conversations, in the formats of dataset/dataset.md")
    add("--same", required=True, metavar="KEY", help="key of the rows; a row is demonstrated by one that has the same "
                                                     "value there")
    add("--apart", default=None, metavar="REGEX", help="its first group, looked for in a row's id, says which rows are "
        "too close to demonstrate each other, or to be held out one without the other; default: only equal rows are. One "
        "that begins with a dash goes after an equals sign: --apart='-(\\d+)/'")
    add("--out_dir", required=True, help="folder for the four files")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add = parser.add_argument_group("how many, how long").add_argument
    add("--train", type=int, default=0, help="pairs to train on; 0: all")
    add("--test", type=int, default=0, help="pairs to test with; 0: all")
    add("--test_share", type=float, default=0.2, help="share in (0, 1) of the groups that is held out; at least one")
    add("--max_chars", type=int, default=0, help="leave out rows whose text is longer, in characters; 0: none")
    add("--max_demonstration_chars", type=int, default=None, help="demonstrate with rows whose text is no longer than this, "
                                                                  "in characters; 0: with any; default: --max_chars")
    add("--seed", type=int, default=1337, help="of what is held out, who demonstrates, and the order")
    args = parse_args(parser)
    max_shown_chars = args.max_chars if args.max_demonstration_chars is None else args.max_demonstration_chars
    if min(args.train, args.test, args.max_chars, max_shown_chars) < 0:
        parser.error(f"--train {args.train}, --test {args.test}, --max_chars {args.max_chars} and "
                     f"--max_demonstration_chars {max_shown_chars} must be 0 or more")
    if not 0 < args.test_share < 1:
        parser.error(f"--test_share {args.test_share:g} must be in (0, 1)")
    apart = compiled(args.apart, parser) if args.apart is not None else None
    out_dir = Path(args.out_dir)
    paths = {(part, side): out_dir / f"{part}_{side}.jsonl" for part in ("train", "test") for side in ("student", "teacher")}

    with checking_input():
        there = [str(path) for path in paths.values() if path.exists()]
        if there:
            raise ValueError(f"there already: {', '.join(there)}. Give another --out_dir, or remove them")

        # 2. Rows, whole groups of them held out
        rows = read_all(args.data_path, args.same, apart, args.skip_bad_lines)
        rng = random.Random(args.seed)
        parts = hold_out(rows, args.test_share, rng)

        # 3. A demonstration for each, from the training part
        demonstrations = demonstrations_of(parts["train"], max_shown_chars)
        pairs = {}
        for part, n_pairs in (("train", args.train), ("test", args.test)):
            pairs[part], left_out = pairs_of(parts[part], demonstrations, n_pairs, args.max_chars, rng)
            told = in_words(part, len(parts[part]), len(pairs[part]), left_out)
            if not pairs[part]:
                raise ValueError(f"nothing to write. {told}")
            print(told)

    # 4. The four files
    out_dir.mkdir(parents=True, exist_ok=True)
    for part, of_part in pairs.items():
        write_lines(paths[part, "student"], [student_line(row) for row, _ in of_part])
        write_lines(paths[part, "teacher"], [teacher_line(row, shown) for row, shown in of_part])
    print_table(args.same, pairs, demonstrations)
    print(f"Learn from them: python train_distillation.py --data_path {paths['train', 'student']} --teacher_data_path "
          f"{paths['train', 'teacher']} ...")


def compiled(regex: str, parser) -> re.Pattern:
    """Exits with a message if it is no regular expression, or has no group."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        parser.error(f"--apart {regex!r} is no regular expression: {error}")
    if not pattern.groups:
        parser.error(f"--apart {regex!r} has no group: put what tells rows apart in parentheses, as in '(\\d+)/'")
    return pattern


if __name__ == "__main__":
    main()
