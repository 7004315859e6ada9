"""
把经验装进权重的各种方法：同一个模型、同样的更新步数或同样的时间，学到多少、忘了多少。
Every way of moving experience into the weights, from one model, at equal updates or at equal time: what is learned and what is
forgotten.

    python -m benchmarks.experience --seeds 3
    python -m benchmarks.experience --seeds 3 --equal_time --out out/experience_time

A model that follows explanations ("tezum means reverse. tezum k d a") is taught to do without them (README, "Experience into
the weights", makes it). Each method starts from the same weights; a seed decides the order of the rows and what is
drawn; all of it with and without replay (dataset/experience_replay.jsonl: 30 % of what is learned are questions
that it could answer before). Exact match, in %:

    learned   the questions without the explanation, on letters never seen
    plain     "reverse k d a" still answered
    follows   explanations that contradict what was learned still followed

Seconds are those of the processor, so that they mean the same on a busy machine; what a run needs before its first step is
not among them. With --equal_time each method takes as many steps as fit into those of --steps of the slowest one.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.runs import ROOT, run, write_table

STUDENT, TEACHER, REPLAY = (f"dataset/experience_{name}.jsonl" for name in ("student", "teacher", "replay"))
SKD, ON_POLICY = ("train_distillation.py", "full_dist_96.pth"), ("train_onpolicy.py", "full_onpolicy_96.pth")
SFT = ("train_sft.py", "full_sft_96.pth")
LEARN = ("--batch_size 32 --learning_rate {rate} --warmup_iters 50 --val_path none --num_workers 0 --log_interval 1000 "
         "--save_interval 100000")

# Name in the table -> (script and the weights it writes, its flags). {base} are the weights that all start from.
METHODS = {
    "SFT on the right labels": (SFT, "--weights {base} --data_path {student}"),
    "SeqKD": (SFT, "--weights {base} --data_path {answers}"),
    "SKD, forward KL": (SKD, "--student {base} --teacher {base} --data_path {student} --teacher_data_path {teacher}"),
    "SKD, reverse KL, T 4, half labels": (SKD, "--student {base} --teacher {base} --data_path {student} --teacher_data_path "
                                               "{teacher} --divergence reverse_kl --temperature 4 --alpha 0.5"),
    **{f"on-policy, {name}": (ON_POLICY, "--student {base} --teacher {base} --data_path {student} --teacher_data_path {teacher} "
                                         f"--max_new_tokens 12 {flags}")
       for name, flags in {"forward KL": "--divergence forward_kl", "forward KL, T 2": "--divergence forward_kl --temperature 2",
                           "JSD 0.5": "--divergence jsd", "reverse KL": "--divergence reverse_kl",
                           "reverse KL, T 4": "--divergence reverse_kl --temperature 4",
                           "MiniLLM": "--objective minillm"}.items()},
}


def learn(method: str, with_replay: bool, steps: int, out: Path, seed: int, rate: float, answers: Path, **fill) -> tuple[Path, float]:
    """Train by one method: the weights, and the processor's seconds."""
    (script, weights), flags = METHODS[method]
    if with_replay:
        for name, path in (("{student}", STUDENT), ("{teacher}", TEACHER), ("{answers}", answers)):
            flags = flags.replace(f"_path {name}", f"_path {path} {REPLAY}")
    flags = f"{flags} {LEARN}".format(student=STUDENT, teacher=TEACHER, answers=answers, rate=rate, **fill)
    return out / weights, run(script, f"{flags} --max_steps {steps} --seed {seed} --out_dir {out}")


def scores(weights: dict[str, Path], out: Path) -> dict[str, dict]:
    """{name: {learned, plain, follows}}, in %, of the models of these names."""
    numbered = " ".join(f"{number}={path}" for number, path in enumerate(weights.values()))
    run("scripts/evaluate.py", f"--weights {numbered} --data dataset/experience_test.jsonl --json {out}/test.json")
    run("scripts/evaluate.py", f"--weights {numbered} --data dataset/experience_kept.jsonl --json {out}/kept.json")
    test, kept = (json.loads((ROOT / out / name).read_text()) for name in ("test.json", "kept.json"))
    return {name: {"learned": test[str(number)][0]["exact_match"],
                   "plain": kept[str(number)][0]["leaves"]["experience/plain"],
                   "follows": kept[str(number)][0]["leaves"]["experience/redefined"]} for number, name in enumerate(weights)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="lines of the table")
    add("--seeds", type=int, default=1, help="of what is learned: mean and spread")
    add("--steps", type=int, default=400, help="updates of each method")
    add("--base", type=Path, default=Path("out/experience/full_sft_96.pth"), help="the weights that all start from")
    add("--learning_rate", type=float, default=2e-3, help="of all methods")
    add("--equal_time", action="store_true", help="--steps are those of the slowest method, and the others take more")
    add("--out", type=Path, default=Path("out/experience_table"), help="folder for the weights, table.md and table.json")
    args = parser.parse_args(argv)

    if not (ROOT / args.base).exists():
        sys.exit(f"no weights at {args.base}; the first command of README's \"Experience into the weights\" makes them")
    answers = args.out / "answers.jsonl"
    if not (ROOT / answers).exists():
        run("scripts/generate_answers.py", f"--teacher {args.base} --data_path {STUDENT} --teacher_data_path {TEACHER} "
            f"--max_new_tokens 12 --keep_unfinished --out {answers}")

    results = {}
    for seed in range(1337, 1337 + args.seeds):
        folder = args.out / str(seed)
        how = {"seed": seed, "base": args.base, "answers": answers, "rate": args.learning_rate}
        first = {METHODS[method][0][0]: method for method in args.methods}           # one method of each script
        idle = {script: learn(method, False, 1, folder / "idle", **how)[1]          # what it takes to begin
                for script, method in first.items()}
        pace = {method: learn(method, True, 101, folder / "pace", **how)[1] - idle[METHODS[method][0][0]]      # of 100 steps
                for method in args.methods} if args.equal_time else {}
        weights, facts = {"the model before": args.base}, {"the model before": {"steps": 0, "seconds": 0}}
        for method, replay in [(method, replay) for method in args.methods for replay in (False, True)]:
            name, ((script, _), _), steps = f"{method}{' + replay' if replay else ''}", METHODS[method], args.steps
            if args.equal_time:
                steps = round(args.steps * max(pace.values()) / pace[method])
            weights[name], seconds = learn(method, replay, steps, folder / name.replace(" ", "_").replace(",", ""), **how)
            facts[name] = {"steps": steps, "seconds": seconds - idle[script]}
            print(f"seed {seed}  {name}: {facts[name]}", flush=True)
        for name, found in scores(weights, folder).items():
            results.setdefault(name, []).append(facts[name] | found)
    write_table(args.out, results, ("steps", "learned", "plain", "follows", "seconds"))


if __name__ == "__main__":
    main()
