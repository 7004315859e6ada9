"""
评测：一个或多个模型在同样的测试题上的成绩，并排成表。
Evaluation: one or several models on the same test files, side by side in one table.

    python scripts/evaluate.py --weights out/full_sft_64.pth out/full_dist_64.pth
    python scripts/evaluate.py --weights teacher=out/full_sft_128.pth SFT=out/a.pth,out/b.pth
    python scripts/evaluate.py --weights SmolLM2-135M-Instruct/ --data alpaca.json --samples 3
    python scripts/evaluate.py --weights a.pth --data dataset/reasoning/*_test.jsonl --by_generation

interop/checkpoint.py lists the formats of models; evaluation/metrics.py says what is measured, and
evaluation/generation.py what is measured instead, of conversations alone, with --by_generation.
"""

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
from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.files import write_json, write_text
from runtime.pictures import new_figure, save_picture
from runtime.precision import pick_device


def average(seeds: list[dict]) -> dict:
    """The results of one seed, each number the mean over the seeds that have it."""
    found = {key: [seed[key] for seed in seeds if key in seed] for seed in seeds for key in seed}
    return {key: average(values) if isinstance(values[0], dict) else fmean(values)
            for key, values in found.items() if not isinstance(values[0], list)}


def draw(results: dict[str, list[dict]], reference: str, path: Path) -> bool:
    """A panel for each that was measured: the models' scores; generated answers by number of steps;
    below, the habits. False if nothing of this was."""
    means = {label: average(seeds) for label, seeds in results.items()}
    panels = [of for key, of in (("exact_match", draw_scores), ("steps_right", draw_steps))
              if any(key in mean for mean in means.values())]
    habits = {name: seeds[0]["habits"] for name, seeds in results.items() if "habits" in seeds[0]}
    if not panels and not habits:
        return False
    heights = [1.6 + 0.32 * max(5, len(results))] * bool(panels) + [2.8] * bool(habits)
    figure = new_figure(max(4.5 * len(panels), 2.2 * len(habits)), sum(heights))
    rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if panels:
        for of, axis in zip(panels, rows[0].subplots(1, len(panels), squeeze=False)[0]):
            of(axis, results, means, reference)
    if habits:
        axes = rows[-1].subplots(1, len(habits), squeeze=False, sharey=True)[0]
        axes[0].set(ylim=(0, 1), ylabel="probability of an answer")
        rows[-1].supxlabel("answers about habits, from the most likely one on; bars: the truth",
                           fontsize="medium")
        for axis, (label, questions) in zip(axes, habits.items()):
            draw_habits(axis, label, questions)
    save_picture(figure, path)
    return True


def draw_scores(axis, results, means, reference):
    """A dot per model with its interval, the best on top, and a line for the reference. Arrows lead
    from SFT to what was distilled with the same data."""
    scores = {label: mean["exact_match"] for label, mean in means.items() if "exact_match" in mean}
    n = results[next(iter(scores))][0]["questions"]
    if reference in scores and len(scores) > 1:
        axis.axvline(scores.pop(reference), color="black", label=reference)
        axis.legend(loc="lower left")
    order = sorted(scores, key=scores.get, reverse=True)
    for y, label in enumerate(order):
        sft = label.replace("distilled", "SFT")
        if sft != label and sft in scores:
            axis.annotate("", (scores[label], y), (scores[sft], order.index(sft)),
                          arrowprops={"arrowstyle": "->", "color": "0.6"})
        axis.hlines(y, *interval([seed["exact_match"] for seed in results[label]], n))
        axis.plot(scores[label], y, "o", color="C0")
    axis.set(title=f"{n} held-out questions", xlabel="exact match, %", xlim=(0, 102),
             ylim=(len(order) - 0.5, -0.5))
    axis.set_yticks(range(len(order)), order)


def draw_steps(axis, results, means, reference):
    """Correct answers by number of steps n, and dashed p^n, p = single steps right."""
    for i, (label, mean) in enumerate(means.items()):
        lengths, p, color = mean["by_length"], mean["steps_right"] / 100, f"C{i}"
        axis.plot(list(lengths), list(lengths.values()), "o-", color=color, label=label)
        axis.plot(list(lengths), [100 * p**int(n) for n in lengths], "--", color=color, alpha=0.6)
        for n, count in mean["questions_by_length"].items():
            bounds = interval([seed["by_length"][n] for seed in results[label]], count)
            axis.vlines(n, *bounds, color=color)
    axis.set(title="Generated answers; dashed: p^n", xlabel="steps n", ylim=(0, 102),
             ylabel="final answer correct, %")
    axis.legend()


def draw_habits(axis, label, questions: list[list[tuple[float, float]]]):
    """A dot for the model's probability of each answer to each question, a bar for the true one."""
    for place in range(max(map(len, questions))):
        truth, given = zip(*(answers[place] for answers in questions if place < len(answers)))
        x = [place + 0.6 * i / len(given) - 0.3 for i in range(len(given))]
        axis.plot(x, given, ".", color="C0", alpha=0.4, markeredgewidth=0)
        axis.hlines(fmean(truth), place - 0.35, place + 0.35, color="black", linewidth=2)
    axis.set(title=label, xticks=range(place + 1))
    axis.set_xticklabels([f"{i + 1}." for i in range(place + 1)])


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
    add("--listed", action="store_true", help="multiple choice: the question lists its options")
    add("--per_token", action="store_true",
        help="multiple choice: the option with the largest log-probability per token is given")
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
        models = {label: paths.split(",") for label, paths in by_name(args.weights).items()}
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
                    measure(model, tokenizer, tests, reference if comparable else None,
                            args.listed, args.per_token))
            if samples:
                answers[label] = sample_answers(model, tokenizer, samples,
                                                args.max_new_tokens or 64)

    # 4. Report
    notes = (f"agreement: with {name}; KL: KL({name} || model) in nats per token; habits: KL(truth "
             "|| model) in nats, and how often the most likely answer is the true mode")
    if args.by_generation:
        notes = ("answer: the final one; trace: the whole text; steps right: after right steps; "
                 f"pass@k: at temperature {args.temperature:g}; [ ]: 95 % interval of one seed")
    text = f"{tables(results)}\n\n{notes}"
    if others:
        text += (f". {', '.join(sorted(others))}: another vocabulary than {name}'s, so neither "
                 "agreement nor KL, and figures per token do not compare")
    if answers:
        text += f"\n\n{side_by_side(samples, answers)}"
    print(text)
    if args.json:
        write_json(args.json, results)
    if args.report:
        report, picture = Path(args.report), Path(args.report).with_suffix(".png")
        if draw(results, name, picture):
            text += f"\n\n![the same as a picture]({picture.name})"
        write_text(report, f"# Results\n\n{text}\n")


if __name__ == "__main__":
    main()
