"""
能力树的成绩：学生在薄弱叶子与全部叶子上的正确率，以及教师出的题有多少是对的。
Scores of the ability tree in the embedded world: {LABEL: [{weak, all, written, kept, right, ...}]}.

    python scripts/score_ability_tree.py --json s.json \\
        --weights s=out/ability/student/full_sft_64.pth

weak, all       accuracy in %, mean over the scarce and over all leaves of the exam's questions
written, kept   questions that the teacher wrote and that both agents kept, in FOLDER/workflow for
                FOLDER/models/*/*.pth; right, right_kept: % with the world's answer
"""

import json
import re
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from dataset.formats import bare_question, read_each
from dataset.miniworld import LEAVES, SCARCE, World, reverse, sort
from evaluation.exam import ExamQuestion, choose_options, grade
from interop.checkpoint import load_model
from runtime.args import checking_input, make_parser
from runtime.files import write_text


def exam(weights: str, rows: list[dict]) -> dict[str, float]:
    """{leaf: % of its questions whose most likely option is the answer}"""
    questions = [ExamQuestion(bare_question(row), row["options"][row["answer_idx"]],
                              list(row["options"].values()), row["meta_info"]) for row in rows]
    by_leaf = grade(choose_options(*load_model(weights), questions), questions).by_category
    return {leaf: 100 * share for leaf, share in by_leaf.items()}


def right_answer(question: str, known: dict[str, str]) -> str | None:
    """The world's answer; letters to sort or reverse may be any, as their answer is a rule."""
    letters = re.findall(r"(?<!\S)[a-z](?![^\s.])", question)
    spelled = SimpleNamespace(triples=[letters], letter_lists=[letters])
    answers = [fact.answers for rule in (reverse, sort) for fact in rule(spelled)]
    return next((each[question] for each in answers if question in each), known.get(question))


def share_right(rows: list[dict]) -> float:
    known = {question: answer for make in LEAVES.values() for fact in make(World(0))
             for question, answer in fact.answers.items()}
    return 100 * mean(right_answer(row["question"], known) == row["options"][row["answer_idx"]]
                      for row in rows)


def questions(workflow: Path) -> dict[str, float]:
    """Of all rounds."""
    names = "C_distill_data/distill.jsonl", "D_validated_data/valid.jsonl"
    written, kept = ([row for path in sorted(workflow.glob(f"iteration_*/{name}"))
                      for row in read_each(path, dict)] for name in names)
    return {"written": len(written), "kept": len(kept), "right": share_right(written),
            "right_kept": share_right(kept)}


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
            leaves, models = exam(path, rows), Path(path).absolute().parents[2]
            own = questions(models.parent / "workflow") if models.name == "models" else {}
            scores[label] = [{"weak": mean(leaves[leaf] for leaf in SCARCE),
                              "all": mean(leaves.values()), **own}]
    write_text(args.json, json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
