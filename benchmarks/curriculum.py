"""
三阶段课程的每一部分值多少：同样的更新步数，逐一拿掉或换掉一个部分，看领域与通用各剩多少。
What each part of the three stages is worth: at equal updates, one part taken away or changed at a time.

    python -m benchmarks.curriculum --seeds 3

A small student learns from the teacher of quickstart.sh, by train_curriculum.py: everything from nothing in one stage; or what
is general first, once for each seed, and from there on stages 2 and 3, of which the lines of the table differ. Exact match on
dataset/test.jsonl, in %, mean over its leaves:

    domain      specialist leaves
    general     general leaves
    forgotten   of the general ones, since the end of the first stage
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.runs import ROOT, run, write_table

STEPS = (2000, 700, 500)        # of the stages; a single stage takes all of them
UNIFORM = "3.sampling=uniform"

# Name in the table -> what is changed in the table of stages, STAGES["tiny"] of train_curriculum.py.
ONE_STAGE = {
    "specialist alone": "1.share=1:1",
    "a fixed mix, 24 % of the domain": "1.share=0.24:0.24",         # as many samples of it as in all three stages
}
FROM_GENERAL = {
    "specialist alone": f"2.share=1:1 2.balance=none 3.share=1:1 {UNIFORM}",
    "a fixed mix, 62 % of the domain": f"2.share=0.62:0.62 2.balance=none 3.share=0.62:0.62 {UNIFORM}",
    "the curriculum": "",
    "uniform sampling in stage 3": UNIFORM,
    "uniform sampling, no balance": f"2.balance=none {UNIFORM}",
    "uniform sampling, GradNorm": f"2.balance=gradnorm {UNIFORM}",
    "uniform sampling, PCGrad": f"2.balance=pcgrad {UNIFORM}",
    "uniform sampling, the share does not grow": f"2.share=0.5:0.5 {UNIFORM}",
    "uniform sampling, no replay in stage 3": f"3.share=1:1 {UNIFORM}",
    "uniform sampling, cosine features": f"2.feature_weight=1 {UNIFORM} --feature_loss cosine",
    "uniform sampling, attention relations": f"2.attention_weight=1 {UNIFORM}",
    "uniform sampling, contrast": f"2.contrastive_weight=1 {UNIFORM}",
    "uniform sampling, T 2 and 1, CE 30 and 80 %": f"2.temperature=2 2.alpha=0.3 3.alpha=0.8 {UNIFORM}",
}
METHODS = {f"from nothing: {name}": flags for name, flags in ONE_STAGE.items()} | {
    f"general first: {name}": flags for name, flags in FROM_GENERAL.items()}


def scores(weights: dict[str, Path], out: Path) -> dict[str, dict[str, float]]:
    """{name: {domain, general}}, in %, of the models of these names."""
    numbered = " ".join(f"{number}={path}" for number, path in enumerate(weights.values()))
    run("scripts/evaluate.py", f"--weights {numbered} --data dataset/test.jsonl --json {out}/test.json")
    found = json.loads((ROOT / out / "test.json").read_text())
    return {name: {side: statistics.mean(score for leaf, score in found[str(number)][0]["leaves"].items()
                                         if leaf.startswith(start))
                   for side, start in (("domain", "specialist/"), ("general", "general/"))}
            for number, name in enumerate(weights)}


def write_rows(path: Path, lines: list[str]):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="lines of the table")
    add("--seeds", type=int, default=1, help="of the student and of what is drawn: mean and spread")
    add("--steps", type=int, nargs=3, default=STEPS, help="updates of each stage")
    add("--domain_rows", type=int, default=600, help="rows of dataset/specialist.jsonl that there are")
    add("--teacher", type=Path, default=Path("out/full_sft_128.pth"), help="its weights")
    add("--out", type=Path, default=Path("out/curriculum_table"), help="folder for the weights, table.md and table.json")
    args = parser.parse_args(argv)

    if not (ROOT / args.teacher).exists():
        sys.exit(f"no weights at {args.teacher}; bash quickstart.sh makes them")
    with open(ROOT / "dataset/specialist.jsonl") as file:
        write_rows(ROOT / args.out / "domain.jsonl", file.readlines()[:args.domain_rows])
    with open(ROOT / "dataset/val.jsonl") as file:
        rows = file.readlines()
    for side, start in (("domain", "specialist/"), ("general", "general/")):
        write_rows(ROOT / args.out / f"{side}_val.jsonl", [row for row in rows if json.loads(row)["leaf"].startswith(start)])
    common = (f"--teacher {args.teacher} --general_dataset dataset/general.jsonl --domain_dataset {args.out}/domain.jsonl "
              f"--val_path {args.out}/domain_val.jsonl --general_val_path {args.out}/general_val.jsonl --num_workers 0 "
              "--log_interval 1000 --save_interval 100000 --n_samples 0")

    results = {}
    first, second, third = args.steps
    for seed in range(1337, 1337 + args.seeds):
        folder = args.out / str(seed)
        general = folder / "general" / "stage1_final.pth"
        seconds = {"general": run("train_curriculum.py", f"{common} --set 1.steps={first} --end_stage 1 --seed {seed} "
                                                         f"--out_dir {general.parent}")}
        weights = {"general": general}
        for name in args.methods:
            out = folder / name.replace(" ", "_").replace(",", "").replace(":", "")
            if name.startswith("from nothing"):
                stages, last = f"--end_stage 1 --set 1.steps={first + second + third}", "stage1_final.pth"
            else:
                stages = f"--start_stage 2 --checkpoint_path {general} --set 2.steps={second} 3.steps={third}"
                last = "stage3_final.pth"
            seconds[name] = run("train_curriculum.py", f"{common} {stages} {METHODS[name]} --seed {seed} --out_dir {out}")
            weights[name] = out / last
            print(f"seed {seed}  {name}: {seconds[name]:.0f} s", flush=True)
        found = scores(weights, folder)
        for name in ("general", *args.methods):
            forgotten = {} if name.startswith("from nothing") else {"forgotten": found["general"]["general"] - found[name]["general"]}
            results.setdefault(name, []).append(found[name] | forgotten | {"seconds": seconds[name]})
    write_table(args.out, results, ("domain", "general", "forgotten", "seconds"))


if __name__ == "__main__":
    main()
