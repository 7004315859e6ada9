"""
三阶段课程的每一部分值多少：同样的更新步数，逐一拿掉或换掉一个部分，看领域与通用各剩多少。
What each part of the three stages is worth: at equal updates, one part taken away or changed at a time.

    python -m benchmarks.curriculum --seeds 3
    python -m benchmarks.curriculum --seeds 3 --domain_rows 10000 --out out/curriculum_plenty

A small student, from nothing, learns from the teacher of quickstart.sh, by train_curriculum.py. Exact match on
dataset/test.jsonl, in %, mean over its leaves:

    domain      specialist leaves
    general     general leaves
    forgotten   of the general ones, since the end of the first stage; for a student of one stage there is no such time
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.runs import ROOT, run, write_table

# Name in the table -> what is changed. A single stage takes as many steps as the three would.
THREE, ONE = "three", "one"
METHODS = {
    "specialist alone": (ONE, "--set 1.share=1:1"),
    "fixed mix, half and half": (ONE, "--set 1.share=0.5:0.5"),
    "fixed mix, shares as in the curriculum": (ONE, "--set 1.share=0.433:0.433"),
    "general, then specialist alone": (THREE, "--set 2.share=1:1 2.balance=none 3.share=1:1 3.sampling=uniform"),
    "general, then a fixed mix": (THREE, "--set 2.share=0.65:0.65 2.balance=none 3.share=0.65:0.65 3.sampling=uniform"),
    "curriculum": (THREE, ""),
    "  no balance": (THREE, "--set 2.balance=none"),
    "  GradNorm": (THREE, "--set 2.balance=gradnorm"),
    "  PCGrad": (THREE, "--set 2.balance=pcgrad"),
    "  share does not grow": (THREE, "--set 2.share=0.5:0.5"),
    "  no replay in stage 3": (THREE, "--set 3.share=1:1"),
    "  uniform sampling in stage 3": (THREE, "--set 3.sampling=uniform"),
    "  features, attention, contrast in stage 2": (THREE, "--set 2.feature_weight=0.1 2.attention_weight=0.1 "
                                                          "2.contrastive_weight=0.05"),
    "  temperatures 4, 2, 1, ending in CE": (THREE, "--set 1.temperature=4 1.alpha=0.1 2.temperature=2 2.alpha=0.3 3.alpha=0.8"),
}


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
    add("--steps", type=int, default=350, help="updates of each stage")
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
    for seed in range(1337, 1337 + args.seeds):
        weights, seconds = {}, {}
        for name in args.methods:
            stages, flags = METHODS[name]
            folder = args.out / str(seed) / name.strip().replace(" ", "_").replace(",", "")
            length = f"--max_steps {args.steps}" if stages == THREE else f"--max_steps {3 * args.steps} --end_stage 1"
            seconds[name] = run("train_curriculum.py", f"{common} {flags} {length} --seed {seed} --out_dir {folder}")
            weights[name] = folder / f"stage{3 if stages == THREE else 1}_final.pth"
            if stages == THREE:
                weights[f"{name}, stage 1"] = folder / "stage1_final.pth"
            print(f"seed {seed}  {name.strip()}: {seconds[name]:.0f} s", flush=True)
        found = scores(weights, args.out / str(seed))
        for name in args.methods:
            before = found.get(f"{name}, stage 1")
            forgotten = {"forgotten": before["general"] - found[name]["general"]} if before else {}
            results.setdefault(name.replace("  ", "&nbsp;&nbsp;"), []).append(found[name] | forgotten | {
                "steps": 3 * args.steps, "seconds": seconds[name]})
    write_table(args.out, results, ("domain", "general", "forgotten", "seconds"))


if __name__ == "__main__":
    main()
