"""
成绩单：学生与教师并排比较大小、速度、质量和蒸馏的开销，一页 Markdown 和一张图。
Report card: students beside their teacher, in size, speed, quality and cost of the distillation.
One page of Markdown and one picture.

    python scripts/report.py --teacher out/full_sft_128.pth --student out/full_dist_64.pth
    python scripts/report.py --teacher smollm2.gguf --student half=out/half.pth int8=out/int8.pth \\
        --data alpaca_test.json --out out/card.md

Scores are those of scripts/evaluate.py. Times are of this machine, of models that take turns.
"""

import sys
import time
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from evaluation.metrics import COLUMNS, measure, read_tests
from evaluation.samples import openings, sample_answers, side_by_side, spread
from evaluation.tables import markdown
from interop.checkpoint import load_model, weight_files
from model.generate import column_major, generate
from model.transformer import KVCache
from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.files import read_rows, write_text
from runtime.log import Logger
from runtime.pictures import new_figure, save_picture
from runtime.precision import pick_device

REPEATS, ROWS = 5, 16       # the fastest counts, as others use the machine too; answers at once
TIMING_SECONDS = 60         # no further repeat begins after these

# Row of the table -> (key of the results, how to print it). Costs are also shown as a share of the
# teacher's.
COSTS = {
    "parameters": ("parameters", "{:,.0f}"),
    "file, MB": ("file", "{:,.2f}"),
    "memory, 16 answers at once, MB": ("memory", "{:,.1f}"),
    "ms to the first token": ("first", "{:,.1f}"),
    "ms per token, one answer": ("single", "{:,.3f}"),
    "ms per token, 16 answers at once": ("batch", "{:,.3f}"),
}
EXAMS = "exact match %", "token F1 %", "chrF %", "multiple choice %"
QUALITY = {title: COLUMNS[title] for title in EXAMS} | {
    "held-out loss, nats per token": ("loss", "{:.3f}"),
    "calibration error %": ("calibration", "{:.1f}"),
    "habits KL, nats": ("habits_kl", "{:.3f}"),
    "KL to the teacher, nats per token": ("kl", "{:.3f}"),
    "agreement with the teacher %": ("agreement", "{:.1f}"),
    "accepted as drafts of the teacher %": ("acceptance", "{:.1f}"),
}
# Of these 100 % is the best.
SCORES = "exact_match", "token_f1", "chrf", "multiple_choice", "agreement", "acceptance"
TRAINING = {"optimizer steps": ("step", "{:,.0f}"),
            "CPU seconds of its training": ("total_cpu_seconds", "{:,.0f}")}


def memory(model, context: int) -> float:
    """MB of the weights, and of a KV cache for ROWS sequences of `context` tokens."""
    tensors = {weight.data_ptr(): weight for weight in model.state_dict().values()}     # tied: once
    cache = KVCache(model.config, ROWS, context, "meta")
    return sum(tensor.nbytes for tensor in [*tensors.values(), cache.kv]) / 1e6


def times(models: dict, rows: list, n_tokens: int) -> dict[str, dict[str, float]]:
    """{label: ms until the first token of an answer, ms per token of one answer, and of ROWS at
    once}. models: {label: (model, tokenizer)}"""
    found, begin = {label: {} for label in models}, time.monotonic()
    for i in range(REPEATS):
        if i and time.monotonic() - begin > TIMING_SECONDS:
            break
        for label, (model, tokenizer) in models.items():
            Logger(f"timing {label}, {i + 1} of at most {REPEATS}")
            prompts = [*islice(cycle(openings(tokenizer, rows)), ROWS)]
            for name, asked, n in (("first", prompts[:1], 1), ("single", prompts[:1], n_tokens),
                                   ("batch", prompts, n_tokens)):
                start = time.perf_counter()
                written = sum(map(len, generate(model, asked, n)))
                ms = 1000 * (time.perf_counter() - start) / written
                found[label][name] = min(ms, found[label].get(name, ms))
    return found


def training(path: Path) -> dict[str, float]:
    """Steps and CPU seconds of the run that wrote these weights; empty if its log is missing."""
    rows = read_rows(path.with_suffix(".jsonl"), "step") if path.is_file() else []
    return {key: rows[-1][key] for key, _ in TRAINING.values() if key in rows[-1]} if rows else {}


def table(results: dict[str, dict], teacher: str) -> str:
    """A row per measure that any model has, a column per model."""
    rows = [["", *results]]
    for title, (key, form) in (COSTS | QUALITY | TRAINING).items():
        cells = {label: form.format(of[key]) if key in of else "" for label, of in results.items()}
        if title in COSTS:
            for label in results.keys() - {teacher}:
                cells[label] += f" ({100 * results[label][key] / results[teacher][key]:.0f} %)"
        if any(cells.values()):
            rows.append([title, *cells.values()])
    return markdown(rows)


def draw(results: dict[str, dict], teacher: str, path: Path):
    """Bars of the students, their values on the right, and a line for the teacher: costs in % of
    its own, and scores in %."""
    theirs, students = results[teacher], [label for label in results if label != teacher]
    costs = {title.removesuffix(", MB").replace("ms ", "time "): {
        label: 100 * of[key] / theirs[key] for label, of in results.items()}
        for title, (key, _) in COSTS.items()}
    scores = {title.removesuffix(" %"): {
        label: of[key] for label, of in results.items() if key in of}
        for title, (key, _) in QUALITY.items() if key in SCORES and theirs.get(key)}
    figure = new_figure(11, 1.6 + 0.5 * max(len(costs), len(scores)) * len(students) ** 0.5)
    height = 0.75 / len(students)
    panels = ("Costs, % of the teacher's", costs), ("Scores, %; line: the teacher", scores)
    for axis, (title, values) in zip(figure.subplots(1, 2), panels):
        for i, label in enumerate(students):
            places = [row + (i - (len(students) - 1) / 2) * height for row in range(len(values))]
            widths = [of.get(label, 0.0) for of in values.values()]
            axis.barh(places, widths, 0.9 * height, label=label)
            for place, width in zip(places, widths):        # on the right, clear of the line
                axis.text(1.02, place, f"{width:.0f}", transform=axis.get_yaxis_transform(),
                          va="center", color=f"C{i}")
        for row, of in enumerate(values.values()):
            axis.vlines(of[teacher], row - 0.42, row + 0.42, color="black", linewidth=2)
        axis.set_yticks(range(len(values)), list(values))
        axis.set(title=title, xlim=(0, None), ylim=(len(values) - 0.5, -0.5))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(students))
    save_picture(figure, path)


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--teacher", required=True, metavar="[NAME=]PATH", help="model, in any known format")
    add("--student", nargs="+", required=True, metavar="[NAME=]PATH", help="models beside it")
    add("--data", nargs="+", help="test files, as of scripts/evaluate.py", default=[
        "dataset/test.jsonl", "dataset/mcq_test.jsonl", "dataset/test_habits.jsonl"])
    add("--limit", type=int, default=0,
        help="number of rows used from the start of each file; 0: all")
    add("--samples", type=int, default=4, help="number of questions whose answers are shown")
    add("--max_new_tokens", type=int, default=64, help="maximum length of an answer, in tokens")
    add("--out", type=Path, default=Path("out/report_card.md"),
        help="Markdown file; the picture is beside it, with the suffix .png")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    args = parse_args(parser)
    device = pick_device(args.device)

    with checking_input():
        # 2. Models and tests
        paths = {name: Path(path) for name, path in by_name([args.teacher, *args.student]).items()}
        teacher = next(iter(paths))
        tests = read_tests(args.data, args.limit)
        if not (rows := spread(tests, ROWS)):
            raise ValueError(f"--data {' '.join(args.data)}: no conversations or texts")
        models = {name: load_model(path, device) for name, path in paths.items()}
        for model, _ in models.values():
            column_major(model)

        # 3. Measure
        results = times(models, rows, args.max_new_tokens)
        context = args.max_new_tokens + max(map(len, openings(models[teacher][1], rows)))
        reference, vocabulary = models[teacher]
        shown, answers = spread(tests, args.samples), {}
        for name, (model, tokenizer) in models.items():
            Logger(f"scoring {name}, {paths[name]}")
            comparable = tokenizer.unreadable(vocabulary.ids) is None
            size = sum(file.stat().st_size for file in weight_files(paths[name]))
            results[name] |= {"file": size / 1e6, "memory": memory(model, context)}
            results[name] |= measure(model, tokenizer, tests, reference if comparable else None)
            if name != teacher:
                results[name] |= training(paths[name])
            answers[name] = sample_answers(model, tokenizer, shown, args.max_new_tokens)

    # 4. Page and picture
    picture = args.out.with_suffix(".png")
    draw(results, teacher, picture)
    note = (f"Times: {device}, {torch.get_num_threads()} threads, best of up to {REPEATS}, answers "
            f"of {args.max_new_tokens} tokens; memory: weights and KV cache. Test data: "
            f"{f'the first {args.limit} rows of ' * bool(args.limit)}{', '.join(args.data)}.")
    page = [f"# Report card: {', '.join(name for name in results if name != teacher)}",
            table(results, teacher), note, f"![The same as a picture]({picture.name})"]
    if shown:
        page += ["## Answers", side_by_side(shown, answers)]
    write_text(args.out, "\n\n".join(page) + "\n")
    print(f"\n{table(results, teacher)}\n\nThe page is {args.out}, the picture {picture}.")


if __name__ == "__main__":
    main()
