"""
评测：一个或多个模型，在同一批测试题上，并排成表。
Evaluation: one or several models on the same test files, side by side in one table.

    python scripts/evaluate.py --weights out/full_sft_64.pth out/full_dist_64.pth
    python scripts/evaluate.py --weights teacher=out/full_sft_128.pth SFT=out/a.pth,out/b.pth
    python scripts/evaluate.py --weights SmolLM2-135M-Instruct/ --data alpaca.json --samples 3
    python scripts/evaluate.py --weights a.pth --data dataset/reasoning/*_test.jsonl --by_generation

interop/checkpoint.py lists the formats of models; evaluation/metrics.py says what is measured, and
evaluation/generation.py what is measured instead, of conversations alone, with --by_generation.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from evaluation.generation import measure_generation
from evaluation.metrics import measure, read_tests, tables
from evaluation.samples import sample_answers, side_by_side, spread
from evaluation.tables import interval
from interop.checkpoint import load_model
from model.generate import column_major
from runtime.args import checking_input, make_parser, parse_args
from runtime.files import write_text
from runtime.pictures import save_picture
from runtime.precision import pick_device


def named(specs: list[str]) -> dict[str, list[str]]:
    """{label: paths of its seeds} of [LABEL=]PATH[,PATH...]. Raises ValueError for equal labels."""
    models = {}
    for spec in specs:
        label, _, paths = spec.rpartition("=")
        first = Path(paths.split(",")[0])
        label = label or (first.name if first.is_dir() else first.stem)
        if label in models:
            raise ValueError(f"two models are called {label}; name them: --weights "
                             f"FIRST={','.join(models[label])} SECOND={paths}")
        models[label] = paths.split(",")
    return models


def average(seeds: list[dict]) -> dict:
    """The results of one seed, each number the mean over the seeds that have it."""
    found = {key: [seed[key] for seed in seeds if key in seed] for seed in seeds for key in seed}
    return {key: average(values) if isinstance(values[0], dict) else fmean(values)
            for key, values in found.items()}


def draw(results: dict[str, list[dict]], reference: str, path: Path) -> bool:
    """Bars of exact match per leaf and of the habits' KL; lines of the KL by position in the
    answer, without the reference's, which is 0. Lines of generated answers that are correct by
    number of steps, with intervals, and dashed p^n. False if nothing of this was measured."""
    from matplotlib.figure import Figure

    means = {label: average(seeds) for label, seeds in results.items()}
    leaves = {label: mean["leaves"] for label, mean in means.items() if "leaves" in mean}
    exact = {label: {"all": means[label]["exact_match"],
                     **({name.rsplit("/", 1)[-1]: values[name] for name in sorted(values)}
                        if len(values) > 1 else {})} for label, values in leaves.items()}
    habits = {label: {"": mean["habits_kl"]} for label, mean in means.items()
              if "habits_kl" in mean}
    curves = {label: mean["kl_by_position"] for label, mean in means.items()
              if "kl_by_position" in mean and label != reference}
    lengths = {label: mean["by_length"] for label, mean in means.items() if "steps_right" in mean}
    panels = [panel for panel in (
        ("Held-out questions", "exact match, %", exact, 4.0),
        ("Habits (less is better)", "KL(truth || model), nats", habits, 1.0),
        (f"KL to {Path(reference).name}", "nats per token, by position", curves, 1.4),
        ("Generated answers by number of steps n; dashed: p^n, p = single steps right",
         "final answer correct, %", lengths, 3.0)) if panel[2]]
    if not panels:
        return False
    ratios = [panel[-1] for panel in panels]
    figure = Figure(figsize=(2.5 * sum(ratios), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=ratios)[0]
    width, labels = 0.8 / len(results), list(results)
    for axis, (title, ylabel, values, _) in zip(axes, panels):
        axis.set(title=title, ylabel=ylabel)
        axis.spines[["top", "right"]].set_visible(False)
        for label, of_label in values.items():
            i, names = labels.index(label), list(of_label)
            if values is curves or values is lengths:
                axis.plot(names, list(of_label.values()), "o-", color=f"C{i}", label=label)
            if values is lengths:
                p, counts = means[label]["steps_right"] / 100, means[label]["questions_by_length"]
                axis.plot(names, [100 * p**int(n) for n in names], "--", color=f"C{i}", alpha=0.6)
                for n in names:
                    of_seeds = [seed["by_length"][n] for seed in results[label]]
                    axis.vlines(n, *interval(of_seeds, counts[n]), color=f"C{i}")
            elif values is not curves:
                axis.bar([x + i * width for x in range(len(names))], list(of_label.values()), width,
                         color=f"C{i}", label=label)
                axis.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names,
                                rotation=45, ha="right")
        axis.set_ylim(0, 100 if values is exact else 102 if values is lengths else None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left",
                  ncols=len(results), frameon=False)
    save_picture(figure, path)
    return True


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="[LABEL=]PATH[,PATH...]",
        help="models to compare; several paths under one label are seeds, shown as mean and spread")
    add("--data", nargs="+", help="test files", default=[
        "dataset/test.jsonl", "dataset/mcq_test.jsonl", "dataset/test_habits.jsonl"])
    add("--limit", type=int, default=0,
        help="number of rows used from the start of each file; 0: all")
    add("--samples", type=int, default=0,
        help="number of questions whose greedy answers, or texts whose continuations, are shown, "
             "spread over the files")
    add("--by_generation", action="store_true", help="score generated answers to conversations")
    add("--num_samples", type=int, default=16, help="by_generation: samples per question; 0: none")
    add("--temperature", type=float, default=1.0, help="by_generation: temperature of the samples")
    add("--seed", type=int, default=1337, help="by_generation: random seed of the samples")
    add("--max_new_tokens", type=int, default=0,
        help="maximum length of an answer, in tokens; 0: 64, with --by_generation 256")
    add("--reference", default=None,
        help="weights that agreement and KL are measured against; default: the first of --weights")
    add("--json", default=None, help="file for all results")
    add("--report", default=None,
        help="Markdown file for the tables; the picture is beside it, with the suffix .png")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parse_args(parser, max_new_tokens="[0, inf)", num_samples="[0, inf)")
    device = pick_device(args.device)

    with checking_input():
        # 2. Models and tests
        models = named(args.weights)
        path_of_reference = args.reference or next(iter(models.values()))[0]
        # Its label, if no other seed shares it.
        name = next((label for label, paths in models.items() if paths == [path_of_reference]),
                    path_of_reference)
        tests = read_tests(args.data, args.limit)
        if args.by_generation and not tests["conversations"]:
            raise ValueError(f"--by_generation: {', '.join(args.data)} has no conversations")
        samples = spread(tests, args.samples)
        reference, vocabulary = load_model(path_of_reference, device)

        # 3. Scores
        results, answers, others = {}, {}, set()
        for label, paths in models.items():
            results[label] = []
            for path in paths:
                model, tokenizer = ((reference, vocabulary) if path == path_of_reference
                                    else load_model(path, device))
                column_major(model)
                if args.by_generation:
                    results[label].append(measure_generation(
                        model, tokenizer, tests["conversations"], args.max_new_tokens or 256,
                        args.num_samples, args.temperature, args.seed))
                    continue
                comparable = tokenizer.unreadable(vocabulary.ids) is None
                others |= set() if comparable else {label}
                results[label].append(
                    measure(model, tokenizer, tests, reference if comparable else None))
            if samples:
                answers[label] = sample_answers(model, tokenizer, samples,
                                                args.max_new_tokens or 64)

    # 4. Report
    notes = (f"agreement: with {name}; KL: KL({name} || model) in nats per token; habits: KL(truth "
             "|| model) in nats, and how often the most likely answer is the true mode; tokens/s: "
             "greedy answers, 16 at a time, on this machine")
    if args.by_generation:
        notes = ("answer: the final one; trace: the whole text; steps right: after right steps; "
                 f"pass@k: at temperature {args.temperature:g}; [ ]: 95 % interval of one seed")
    text = f"{tables(results, name)}\n\n{notes}"
    if others:
        text += (f". {', '.join(sorted(others))}: another vocabulary than {name}'s, so neither "
                 "agreement nor KL, and figures per token do not compare")
    if answers:
        text += f"\n\n{side_by_side(samples, answers)}"
    print(text)
    if args.json:
        write_text(args.json, json.dumps(results, indent=2))
    if args.report:
        report, picture = Path(args.report), Path(args.report).with_suffix(".png")
        if draw(results, name, picture):
            text += f"\n\n![the same as a picture]({picture.name})"
        write_text(report, f"# Results\n\n{text}\n")


if __name__ == "__main__":
    main()
