"""
画图：几次训练的曲线画在同一张图里。
Plot: the curves of several runs in one picture, from the .jsonl log beside each run's weights.

    python scripts/plot.py --logs distilled=out/a.jsonl alone=out/b.jsonl --out out/curves.png
    python scripts/plot.py --logs a.jsonl --only loss --against step sampled_tokens --out c.png
"""

import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.files import read_rows
from runtime.pictures import new_figure, save_picture


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """{quantity: {step: value}} of a log."""
    if not path.exists() or path.suffix != ".jsonl":
        problem = f"{path} is no log" if path.exists() else f"no log at {path}"
        raise ValueError(f"{problem}; a run writes NAME.jsonl beside its NAME.pth")
    curves = {}
    for row in read_rows(path, "step"):
        for name in row.keys() - {"step", "sample"}:
            curves.setdefault(name, {})[row["step"]] = row[name]
    return curves


def draw(runs: dict[str, dict], names: list[str], against: list[str], path: Path):
    """A panel per quantity and axis that it is drawn against, a line per run."""
    panels = list(product(names, against))
    figure = new_figure(4 * len(panels), 3.2)
    for axis, (name, x) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, curves in runs.items():
            curve = curves.get(name, {})
            places = curves.get(x, {}) if x != "step" else {step: step for step in curve}
            steps = [step for step in curve if step in places]
            axis.plot([places[step] for step in steps], [curve[step] for step in steps], ".-",
                      label=label)
        axis.set(title=name, xlabel=x)
    axis.legend()
    save_picture(figure, path)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--logs", nargs="+", required=True, metavar="[LABEL=]FILE", help="logs of the runs")
    add("--only", nargs="+", default=None, metavar="NAME",
        help="quantities to draw; default: validation quantities that all runs have")
    add("--against", nargs="+", default=["step"], metavar="NAME",
        help="horizontal axes, a panel each: step, or quantities of the same rows, such as "
             "sampled_tokens and cpu_seconds")
    add("--out", type=Path, required=True, help="picture to write, FILE.png")
    args = parse_args(parser)
    if args.out.suffix != ".png":
        parser.error(f"--out {args.out}: a picture is written as FILE.png")

    with checking_input():
        runs = {label: read_curves(Path(path)) for label, path in by_name(args.logs).items()}
        common = set.intersection(*(set(curves) for curves in runs.values()))
        names = args.only or sorted(name for name in common if name.startswith("val_"))
        known = sorted(set().union(*runs.values()))
        missing = [name for name in (*names, *args.against) if name not in (*known, "step")]
        if missing or not names:
            problem = (f"none of these logs has {', '.join(missing)}" if missing
                       else "these logs have no validation quantity in common")
            raise ValueError(f"{problem}; name some of these with --only: {', '.join(known)}")
    draw(runs, names, args.against, args.out)
    print(f"{args.out}: {', '.join(names)} of {', '.join(runs)}")


if __name__ == "__main__":
    main()
