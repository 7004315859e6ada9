"""
出题：教师参照真题出新题，越薄弱的叶子题越多；重复的、读不懂的都退回并记下原因。
New questions for weak leaves: the weaker a leaf, the larger its share (AbilityTree.weights). The
teacher writes them after the example of real ones.

    python -m ability_tree.generate_distill_data --tree out/ability/tree_1.json \\
        --questions dataset/ability_seeds.jsonl --abilities dataset/ability_paths.jsonl \\
        --teacher out/ability/teacher/full_sft_128.pth --prompts miniworld --n_samples 1000 \\
        --out out/ability/distill.jsonl

    OUT                   {"id", "question", "options", "answer_idx", "meta_info"}
    OUT_ability.jsonl     {"id", "ability_path"} of each of them
    OUT_rejected.jsonl    {"leaf", "reply", "reason"}: repetitions and replies that cannot be read
"""

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from ability_tree.agents import make_agent
from ability_tree.prompts import LETTERS, N_OPTIONS, PROMPTS, folded, name_of, nonempty
from ability_tree.steps import (add_request_args, finish_questions, made_from, read_abilities,
                                read_choices, rows_of, table, work_in_parts)
from ability_tree.tree import AbilityTree, key_of, spell
from dataset.formats import bare_question
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args
from runtime.log import Logger
from runtime.precision import seed_of
from runtime.processes import init_distributed_mode

PART = 64           # questions of a part, at least; it has whole leaves
N_SEEDS = 3         # real questions in a request
SAME = ("n_samples", "floor", "power", "prompts", "max_tries", "max_new_tokens", "temperature",
        "seed")


class Wanted(NamedTuple):
    leaf: tuple[str, ...]
    n: int                      # number of questions
    seeds: list[dict]           # real questions of this leaf
    answers: list[str]          # of the leaf: a teacher that writes no wrong options gets these


def largest_remainder(shares: dict, n: int) -> dict:
    """{"a": 0.5, "b": 0.3, "c": 0.2} of 4 -> {"a": 2, "b": 1, "c": 1}: each gets the integer part
    of its share, and the rest goes to the largest fractions, in order (Hamilton's method)."""
    total = sum(shares.values())
    exact = {key: n * share / total for key, share in shares.items()}
    counts = {key: int(value) for key, value in exact.items()}
    by_fraction = sorted(exact, key=lambda key: counts[key] - exact[key])       # stable
    for key in by_fraction[:n - sum(counts.values())]:
        counts[key] += 1
    return counts


def seeds_of_leaves(rows: list[dict], abilities: dict[str, tuple],
                    leaves: Iterable[tuple]) -> dict[tuple, list[dict]]:
    """The seed questions of each leaf. Raises ValueError if no question belongs to any."""
    seeds, n_unused = {key_of(leaf): (leaf, []) for leaf in leaves}, 0
    for row in rows:
        key = key_of(abilities.get(str(row["id"]), ()))
        if key in seeds:
            seeds[key][1].append(row)
        else:
            n_unused += 1
    unused = (f"{n_unused:,} of {len(rows):,} seed questions belong to no leaf: they have no row "
              "in --abilities, or another path")
    if n_unused == len(rows):
        raise ValueError(f"{unused}. Give the abilities of these questions")
    if n_unused:
        Logger(unused)
    return dict(seeds.values())


def question_text(row: dict) -> str:
    """The question of a row of any format, without its options."""
    return bare_question(row)[-1]["content"]


def plan(shares: dict[tuple, float], seeds: dict[tuple, list[dict]], n_samples: int,
         writes_wrong_options: bool) -> list[Wanted]:
    """The questions wanted of each leaf, by its share. If the teacher writes the correct option
    only, the wrong ones are answers to the leaf's seed questions, and a leaf with too few of them
    gets no share. Raises ValueError if that leaves none."""
    answers = {}
    for leaf, rows in seeds.items():
        answers[leaf] = distinct(row["options"][row["answer_idx"]] for row in rows)
        if len(answers[leaf]) < N_OPTIONS:
            answers[leaf] = distinct([*answers[leaf], *(
                text for row in rows for text in row["options"].values())])
    if not writes_wrong_options:
        poor = [leaf for leaf in shares if len(answers[leaf]) < N_OPTIONS]
        if len(poor) == len(shares):
            raise ValueError(f"no leaf has seed questions with {N_OPTIONS} different answers, the "
                             "options of new ones: give more --questions")
        if poor:
            Logger(f"{len(poor):,} of {len(shares):,} leaves get no share: their seed questions "
                   f"have fewer than {N_OPTIONS} answers: {', '.join(map(name_of, poor))}")
        shares = {leaf: share for leaf, share in shares.items() if leaf not in poor}
    return [Wanted(leaf, n, seeds[leaf], answers[leaf])
            for leaf, n in largest_remainder(shares, n_samples).items() if n]


def distinct(texts: Iterable[str]) -> list[str]:
    return list({folded(text): text for text in texts}.values())


def in_parts(wanted: list[Wanted]) -> list[list[Wanted]]:
    """Neighbouring leaves together, at least PART questions per part. A leaf is not divided: its
    questions must differ from each other."""
    parts = [[]]
    for each in wanted:
        if sum(other.n for other in parts[-1]) >= PART:
            parts.append([])
        parts[-1].append(each)
    return parts


def write_part(generate: Callable, prompts, wanted: list[Wanted], known: set[str], part: int,
               max_tries: int, seed: int) -> dict:
    """{"rows": {leaf: its questions}, "rejected": [...]}. Each try requests all missing questions
    of all leaves at once."""
    known = set(known)              # and those of this part; other parts are compared at the end
    rows, rejected = {spell(each.leaf): [] for each in wanted}, []
    for attempt in range(max_tries):
        todo = [each for each in wanted for _ in range(each.n - len(rows[spell(each.leaf)]))]
        if not todo:
            break
        randoms = [Random(f"{seed}/{spell(each.leaf)}/{attempt}/{n}")
                   for n, each in enumerate(todo)]
        examples = [random.sample(each.seeds, min(N_SEEDS, len(each.seeds)))
                    for each, random in zip(todo, randoms)]
        requests = [prompts.write(each.leaf, shown) for each, shown in zip(todo, examples)]
        replies = generate(requests, seed=seed_of(seed, part, attempt))
        for each, reply, random in zip(todo, replies, randoms):
            leaf = spell(each.leaf)
            try:
                row = new_question(reply, each, known, prompts, random)
            except ValueError as error:
                rejected.append({"leaf": leaf, "reply": reply, "reason": str(error)})
            else:
                known.add(folded(row["question"]))
                rows[leaf].append(row)
    return {"rows": rows, "rejected": rejected}


def new_question(reply: str, wanted: Wanted, known: set[str], prompts, random: Random) -> dict:
    """The row of a reply, its options in random order. Raises ValueError with the reason if it has
    none."""
    row = prompts.read_question(nonempty(reply))
    if folded(row["question"]) in known:
        raise ValueError(f"a repetition: {row['question']}")
    correct = row["options"].pop(row["answer_idx"])
    wrong = list(row["options"].values())[:N_OPTIONS - 1]
    if not prompts.writes_wrong_options:
        others = [text for text in wanted.answers if folded(text) != folded(correct)]
        wrong = random.sample(others, N_OPTIONS - 1)
    if len(wrong) < N_OPTIONS - 1:
        raise ValueError(f"too few options: {1 + len(wrong)} of {N_OPTIONS}")
    texts = [correct, *wrong]
    random.shuffle(texts)
    return {"question": row["question"], "options": dict(zip(LETTERS, texts)),
            "answer_idx": LETTERS[texts.index(correct)], "meta_info": name_of(wanted.leaf)}


def collect(parts: list[list[Wanted]], results: list[dict], prefix: str, random: Random):
    """(rows, their paths, rejected, lines of the table) of all parts. Of a question that two parts
    wrote, the first is kept. The order is random: any beginning of the file has all leaves."""
    kept, rejected, known = [], [], set()
    for wanted, result in zip(parts, results):
        rejected += result["rejected"]
        for each in wanted:
            for row in result["rows"][spell(each.leaf)]:
                if folded(row["question"]) in known:
                    rejected.append({"leaf": spell(each.leaf), "reply": row["question"],
                                     "reason": "a repetition: of another leaf"})
                else:
                    known.add(folded(row["question"]))
                    kept.append((each.leaf, row))
    n_kept = Counter(leaf for leaf, _ in kept)
    lines = [(spell(each.leaf), each.n, n_kept[each.leaf]) for wanted in parts for each in wanted]
    random.shuffle(kept)
    rows = [{"id": f"{prefix}-{i:05d}", **row} for i, (_, row) in enumerate(kept)]
    return rows, [leaf for leaf, _ in kept], rejected, lines


def add_share_args(add):
    """The flags of a leaf's share, the same in train_ability_tree.py."""
    add("--floor", type=float, default=0.02, help="share, in [0, 1], in equal parts for all leaves")
    add("--power", type=float, default=1.0,
        help="exponent of (1 - accuracy); 0: equal shares, above 1: mostly the weakest leaves")


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--tree", required=True, help="the student's ability tree, .json")
    add("--questions", nargs="+", required=True,
        help="seed questions: files of {id, question, options, answer_idx}")
    add("--abilities", nargs="+", required=True, help="files of {id, ability_path}, joined on id")
    add("--exclude", nargs="+", default=[], help="exams, in any format, whose questions are barred")
    add("--out", required=True, help=".jsonl file of the questions; must not exist yet")
    add("--id_prefix", help="ids are PREFIX-00000, ...; default: the name of --out")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add = parser.add_argument_group("share of a leaf").add_argument
    add("--n_samples", type=int, default=1000, help="number of questions, over all leaves")
    add_share_args(add)
    add = add_request_args(parser, temperature=1.0)
    add("--max_tries", type=int, default=4, help="maximum number of requests per question")
    add_agent_args(parser, "teacher")
    add_process_args(parser, dtype=False)
    # A temperature of 0 is out of range: a retry would give the same.
    args = parse_args(parser)
    world = init_distributed_mode(args.ddp, args.device, args.local_rank)

    # 2. Leaves, their seed questions, and the teacher
    with checking_input():
        tree, prompts = AbilityTree.load(args.tree), PROMPTS[args.prompts]
        questions = read_choices(args.questions, args.skip_bad_lines)
        excluded = rows_of(args.exclude, question_text, args.skip_bad_lines)
        known = {folded(text) for text in [*map(question_text, questions), *excluded]}
        seeds = seeds_of_leaves(questions, read_abilities(args.abilities), tree.leaves())
        wanted = in_parts(plan(tree.weights(floor=args.floor, power=args.power), seeds,
                               args.n_samples, prompts.writes_wrong_options))
        teacher = make_agent(vars(args), "teacher", world.device)
        about = made_from(args, ("tree", "questions", "abilities", "exclude"), ("teacher",), SAME)

    # 3. Questions, files and counts
    Logger(f"{teacher.name} writes {args.n_samples:,} questions for {sum(map(len, wanted)):,} "
           f"leaves; {len(known):,} known questions are excluded")
    generate = partial(teacher.generate, max_new_tokens=args.max_new_tokens,
                       temperature=args.temperature)
    parts, results = work_in_parts(
        args.out, about, wanted, lambda part, leaves: write_part(
            generate, prompts, leaves, known, part, args.max_tries, args.seed), world)
    if results is not None:
        prefix = args.id_prefix or Path(args.out).stem
        rows, paths, rejected, lines = collect(wanted, results, prefix, Random(args.seed))
        Logger(table(["wanted", "kept"], lines, rejected))
        finish_questions(parts, rows, paths, rejected)


if __name__ == "__main__":
    main()
