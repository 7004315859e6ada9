"""
能力树值多少：同样的更新步数，针对弱叶子出题，对比均匀出题，对比不出新题；两个代理拦下了多少错题。
What the ability tree is worth: at equal updates, questions for weak leaves against questions for all alike and against none;
and how many wrong questions the two agents let through.

    python -m benchmarks.ability --seeds 3

Each line is two rounds of train_ability_tree.py with configs/ability_tiny.yaml, from the same student (README, "The ability
tree", makes it and its teacher). On dataset/ability_test.jsonl, in % of questions, mean over leaves:

    weak, all           the leaves that the student had hardly met, and all of them
    written, kept       questions that the teacher wrote, and that both agents agreed with, in both rounds
    right, right kept   % of them whose answer is the world's. (One that it does not know, such as the home of an organ, is
                        counted as wrong.)
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

from benchmarks.runs import ROOT, run, write_table
from dataset.miniworld import LEAVES, SCARCE, World, reverse, sort

CONFIG = "configs/ability_tiny.yaml"
ROUNDS = {
    "questions for weak leaves": "",
    "for the weakest above all": "--power 3",
    "for all leaves alike": "--floor 1",
}
BEFORE, NO_NEW = "the student before", "no new questions"


def read(path) -> list[dict]:
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()]


def by_leaf(student: Path, out: Path) -> dict[str, float]:
    """{leaf: % right} of the exam."""
    (ROOT / out).unlink(missing_ok=True)        # of an earlier student
    run("-m", f"ability_tree.inference --weights {student} --questions dataset/ability_test.jsonl --hide_options --out {out}")
    right = {reply["id"]: reply["correct"] for reply in read(out)}
    leaves = {}
    for row in read("dataset/ability_test.jsonl"):
        leaves.setdefault(row["meta_info"], []).append(right[row["id"]])
    return {leaf: 100 * statistics.mean(hits) for leaf, hits in leaves.items()}


def known_answers() -> dict[str, str]:
    """{question: answer} of the world."""
    world = World(0)
    return {question: answer for make in LEAVES.values() for fact in make(world) for question, answer in fact.answers.items()}


def right_answer(question: str, known: dict[str, str]) -> str | None:
    """The world's; of any letters to be sorted or reversed, those too of which the world itself makes no question."""
    letters = re.findall(r"(?<!\S)[a-z](?![^\s.])", question)
    spelled = SimpleNamespace(triples=[letters], letter_lists=[letters])
    by_rule = [fact.answers[question] for rule in (reverse, sort) for fact in rule(spelled) if question in fact.answers]
    return by_rule[0] if by_rule else known.get(question)


def share_right(rows: list[dict], known: dict[str, str]) -> float:
    return 100 * statistics.mean(right_answer(row["question"], known) == row["options"][row["answer_idx"]] for row in rows)


def practised(seed: int, folder: Path, args) -> tuple[Path, dict]:
    """(the student after two more rounds on what it has learned from before, {"seconds"})."""
    student, seconds = args.student, 0.0
    for number in (1, 2):
        trained = folder / f"iteration_{number}"
        seconds += run("-m", f"ability_tree.train --student {student} --teacher {args.teacher} --data dataset/ability_sft.jsonl "
                             f"--hide_options --temperature 1 --alpha_ce 0 --max_steps {args.steps} --learning_rate 1e-3 "
                             f"--warmup_iters 30 --batch_size {args.batch_size} --accumulation_steps 1 --seed {seed + number} "
                             f"--out_dir {trained}")
        student = trained / "full_dist_64.pth"
    return student, {"seconds": seconds}


def taught(flags: str, seed: int, folder: Path, args) -> tuple[Path, dict]:
    """(the student after two rounds of the ability tree, what is to be told of them)."""
    seconds = run("train_ability_tree.py", f"--config {CONFIG} {flags} --teacher {args.teacher} --student {args.student} "
                                           f"--n_samples {args.n_samples} --max_steps {args.steps} --batch_size {args.batch_size} "
                                           f"--seed {seed} --workflow_dir {folder}/workflow --models_dir {folder}/models")
    written, kept = ([row for number in (1, 2) for row in read(folder / f"workflow/iteration_{number}" / path)]
                     for path in ("C_distill_data/distill.jsonl", "D_validated_data/valid.jsonl"))
    known = known_answers()
    return folder / "models/iteration_2_student_model/full_dist_64.pth", {
        "written": len(written), "kept": len(kept), "right": share_right(written, known), "right kept": share_right(kept, known),
        "seconds": seconds}


def examined(student: Path, out: Path) -> dict[str, float]:
    leaves = by_leaf(student, out)
    return {"weak": statistics.mean(leaves[leaf] for leaf in SCARCE), "all": statistics.mean(leaves.values())}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=[NO_NEW, *ROUNDS], choices=[NO_NEW, *ROUNDS], help="lines of the table")
    add("--seeds", type=int, default=1, help="of all that is drawn: mean and spread")
    add("--n_samples", type=int, default=1000, help="questions wanted in each round")
    add("--steps", type=int, default=400, help="updates of each round")
    add("--batch_size", type=int, default=48, help="samples in each of them")
    add("--teacher", type=Path, default=Path("out/ability/teacher/full_sft_128.pth"), help="its weights")
    add("--student", type=Path, default=Path("out/ability/student/full_sft_64.pth"), help="the weights that all start from")
    add("--out", type=Path, default=Path("out/ability_table"), help="folder for all files, table.md and table.json")
    args = parser.parse_args(argv)

    results = {BEFORE: [examined(args.student, args.out / "before.jsonl")]}
    for seed in range(1337, 1337 + args.seeds):
        for name in args.methods:
            folder = args.out / str(seed) / name.replace(" ", "_")
            student, told = practised(seed, folder, args) if name == NO_NEW else taught(ROUNDS[name], seed, folder, args)
            results.setdefault(name, []).append(examined(student, folder / "exam.jsonl") | told)
            print(f"seed {seed}  {name}: {results[name][-1]}", flush=True)
    write_table(args.out, results, ("weak", "all", "written", "kept", "right", "right kept", "seconds"))


if __name__ == "__main__":
    main()
