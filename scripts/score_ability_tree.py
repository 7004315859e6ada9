"""
能力树的成绩：学生在弱叶子与全部叶子上的正确率，以及教师出的题有多少是对的。
Scores of the ability tree in the embedded world: a student's exam, and the quality of the
questions.

    python scripts/score_ability_tree.py --weights start=out/ability/student/full_sft_64.pth \\
        --json scores.json

    {"start": [{"weak": 31.7, "all": 65.8, "written": 1830, "kept": 1584, "right": 86.5,
                "right_kept": 95.3}]}

weak, all      % of the exam's questions right, mean over the scarce and over all leaves; the answer
               is the option with the highest probability
written, kept  questions that the teacher wrote, and those that both agents kept; for the weights
               FOLDER/models/*/*.pth those in FOLDER/workflow
right          % of them whose proposed answer is the world's
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

# Run as a script, Python looks for modules in scripts/ only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.formats import read_each
from dataset.miniworld import LEAVES, SCARCE, World, reverse, sort
from evaluation.scores import score_answers
from interop.checkpoint import load_model
from runtime.args import checking_input, make_parser
from runtime.files import write_atomic


def exam(weights: str, rows: list[dict]) -> dict[str, float]:
    """{leaf: % of its questions right}"""
    asked = [(row["question"], list(row["options"].values())) for row in rows]
    leaves = defaultdict(list)
    for row, log_p in zip(rows, score_answers(*load_model(weights), asked)):
        answer = list(row["options"])[log_p.index(max(log_p))]
        leaves[row["meta_info"]].append(answer == row["answer_idx"])
    return {leaf: 100 * mean(hits) for leaf, hits in leaves.items()}


def known_answers() -> dict[str, str]:
    """{question: answer} of the world."""
    world = World(0)
    return {question: answer for make in LEAVES.values() for fact in make(world)
            for question, answer in fact.answers.items()}


def right_answer(question: str, known: dict[str, str]) -> str | None:
    """The world's answer; letters to sort or reverse may be any, as their answer is a rule."""
    letters = re.findall(r"(?<!\S)[a-z](?![^\s.])", question)
    spelled = SimpleNamespace(triples=[letters], letter_lists=[letters])
    by_rule = [fact.answers[question] for rule in (reverse, sort) for fact in rule(spelled)
               if question in fact.answers]
    return by_rule[0] if by_rule else known.get(question)


def share_right(rows: list[dict], known: dict[str, str]) -> float:
    return 100 * mean(right_answer(row["question"], known) == row["options"][row["answer_idx"]]
                      for row in rows)


def questions(workflow: Path) -> dict[str, float]:
    """Of all rounds; {} without a workflow."""
    names = "C_distill_data/distill.jsonl", "D_validated_data/valid.jsonl"
    written, kept = ([row for path in sorted(workflow.glob(f"iteration_*/{name}"))
                      for row in read_each(path, dict)] for name in names)
    if not kept:
        return {}
    known = known_answers()
    return {"written": len(written), "kept": len(kept), "right": share_right(written, known),
            "right_kept": share_right(kept, known)}


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="LABEL=PATH", help="students")
    add("--data", default="dataset/ability_test.jsonl", help="questions of the exam")
    add("--json", required=True, help="file of the scores")
    args = parser.parse_args()

    scores = {}
    with checking_input():
        rows = read_each(args.data, dict)
        for label, _, path in (each.partition("=") for each in args.weights):
            leaves, models = exam(path, rows), Path(path).absolute().parents[1]
            found = {"weak": mean(leaves[leaf] for leaf in SCARCE), "all": mean(leaves.values())}
            if models.name == "models":
                found |= questions(models.parent / "workflow")
            scores[label] = [found]
    print(json.dumps(scores, indent=2))
    write_atomic(Path(args.json), lambda file: file.write(json.dumps(scores, indent=2).encode()))


if __name__ == "__main__":
    main()
