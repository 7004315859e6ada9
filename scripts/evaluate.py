"""
评测：一个或多个模型，在同一批测试题上，并排成表。
Evaluation: one or several models on the same test files, side by side in one table.

    python scripts/evaluate.py --weights out/full_sft_64.pth out/full_dist_64.pth --data dataset/test.jsonl
    python scripts/evaluate.py --weights teacher=out/full_sft_128.pth SFT=out/a.pth,out/b.pth --json out/scores.json

    python scripts/evaluate.py --weights SmolLM2-135M-Instruct/ out/full_dist_384.pth --data alpaca.json --limit 200 --samples 3

A model is whatever model/checkpoint.py reads. What a row of a test file is decides how it is scored; a file may mix them:
    conversation             exact match (the greedy answer is the right one, word for word), perplexity, agreement with
                             the reference and KL(reference || model) in nats per token, also by position in the answer
    question with options    the likeliest option, by the probability of its text, is the right one
    prompt with distribution KL(truth || model) over the answers in nats, and whether the likeliest answer is the right one
    text                     nats per token and perplexity of all its tokens, agreement and KL; cut to 512 tokens and less
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path

# Run as `python scripts/evaluate.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.formats import BadLine, read_rows, to_messages, to_text
from dataset.lm_dataset import text_samples
from interop.checkpoint import load_model
from model.generate import column_major, generate
from evaluation.scores import score, score_answers, score_samples
from runtime.args import parse_args
from runtime.files import write_atomic
from runtime.precision import pick_device

# Column of the table -> (key of a model's results, how to print it).
COLUMNS = {
    "parameters": ("parameters", "{:,.0f}"),
    "exact match %": ("exact_match", "{:.1f}"),
    "multiple choice %": ("multiple_choice", "{:.1f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "text nats/token": ("text_loss", "{:.3f}"),
    "text perplexity": ("text_perplexity", "{:.2f}"),
    "agreement %": ("agreement", "{:.1f}"),
    "KL": ("kl", "{:.3f}"),
    "habits KL": ("habits_kl", "{:.3f}"),
    "habits mode %": ("habits_mode", "{:.1f}"),
    "tokens/s": ("tokens_per_s", "{:,.0f}"),
}


TEXT_TOKENS = 512       # of a piece of text at most, so that models of unlike max_seq_len read the same


def read_tests(paths, limit: int = 0) -> dict[str, list]:
    """Rows of all files by kind, texts as str, others as dict; the first `limit` of each file, or with 0 all. Raises
    BadLine with file, line and reason."""
    tests = {"conversations": [], "choices": [], "distributions": [], "texts": []}
    for path in paths:
        for number, row in islice(read_rows(path), limit or None):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if "distribution" in row:
                    tests["distributions"].append(checked_distribution(row))
                elif "options" in row:
                    to_messages(row)        # says what is wrong with it, if anything is
                    tests["choices"].append(row)
                elif "text" in row:
                    tests["texts"].append(to_text(row))
                else:
                    tests["conversations"].append({"messages": to_messages(row), "leaf": row.get("leaf", "all")})
            except ValueError as error:
                raise BadLine(f"{path}, line {number}: {error}") from error
    if not any(tests.values()):
        raise BadLine(f"{', '.join(paths)}: nothing to test on")
    return tests


def checked_distribution(row) -> dict:
    """{question, distribution} of a row of that kind. Raises ValueError with the reason if it is not one."""
    shares = row["distribution"]
    if not isinstance(shares, dict) or not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-3:
        raise ValueError(f"distribution {shares} must give each answer its share above 0, and 1 in all")
    answer = {"role": "assistant", "content": next(iter(shares))}
    question, *_ = to_messages({"conversations": [*row.get("conversations", []), answer]})
    return {"question": question["content"], "distribution": shares}


def evaluate(model, tokenizer, tests, reference=None) -> dict:
    """All that this model's tests give; keys as in COLUMNS, `leaves` {leaf: exact match %}, `kl_by_position`."""
    results = {"parameters": model.n_parameters()}

    scores = score(model, tokenizer, [test["messages"] for test in tests["conversations"]], reference)
    of_texts = score_samples(model, text_samples(tests["texts"], tokenizer, min(TEXT_TOKENS, model.config.max_seq_len)),
                             reference)
    if reference is not None and scores + of_texts:
        n_tokens = sum(s.n_tokens for s in scores + of_texts)
        results["agreement"] = 100 * sum(s.agree for s in scores + of_texts) / n_tokens
        results["kl"] = sum(sum(s.kl) for s in scores + of_texts) / n_tokens
    if of_texts:
        results["text_loss"] = nats_per_token(of_texts)
        results["text_perplexity"] = math.exp(results["text_loss"])
    if scores:
        results["exact_match"] = 100 * statistics.mean(s.exact for s in scores)
        results["perplexity"] = math.exp(nats_per_token(scores))
        if reference is not None:
            results["kl_by_position"] = kl_by_position(scores)
        leaves = defaultdict(list)
        for test, s in zip(tests["conversations"], scores):
            leaves[test["leaf"]].append(s.exact)
        results["leaves"] = {leaf: 100 * statistics.mean(hits) for leaf, hits in sorted(leaves.items())}
        results["tokens_per_s"] = generation_speed(model, tokenizer, tests["conversations"][:16])

    if tests["choices"]:
        answers = score_answers(model, tokenizer, [(row["question"], list(row["options"].values()))
                                                   for row in tests["choices"]])
        hits = [list(row["options"])[log_p.index(max(log_p))] == row["answer_idx"]
                for row, log_p in zip(tests["choices"], answers)]
        results["multiple_choice"] = 100 * statistics.mean(hits)

    if tests["distributions"]:
        answers = score_answers(model, tokenizer, [(row["question"], list(row["distribution"]))
                                                   for row in tests["distributions"]])
        kl, mode = [], []
        for row, log_q in zip(tests["distributions"], answers):
            p = list(row["distribution"].values())
            kl.append(sum(p_i * (math.log(p_i) - log_q_i) for p_i, log_q_i in zip(p, log_q)))
            mode.append(log_q.index(max(log_q)) == p.index(max(p)))
        results["habits_kl"], results["habits_mode"] = statistics.mean(kl), 100 * statistics.mean(mode)
    return results


def nats_per_token(scores) -> float:
    return -sum(s.log_p for s in scores) / sum(s.n_tokens for s in scores)


def kl_by_position(scores) -> dict[str, float]:
    """Mean nats of the tokens at each span of positions: {"1": ..., "2": ..., "3-4": ..., "5-8": ..., "9-16": ...}.

    Positions count from the start of each turn of the assistant's; the end of turn has the last.
    """
    spans = defaultdict(list)
    for s in scores:
        for position, nats in zip(s.positions, s.kl):
            spans[(position - 1).bit_length()].append(nats)     # span k ends at 2^k, where the one before ended at half
    return {str(2 ** k) if k < 2 else f"{2 ** (k - 1) + 1}-{2 ** k}": statistics.fmean(spans[k]) for k in sorted(spans)}


def sample_answers(model, tokenizer, tests, n: int, max_new_tokens: int) -> list[str]:
    """Greedy answers to the first n conversations, or how the model goes on with the first n texts after 16 tokens."""
    prompts = [tokenizer.encode_chat(test["messages"][:-1], add_generation_prompt=True)[0]
               for test in tests["conversations"][:n]]
    begin = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = prompts or [begin + tokenizer.encode(text)[:16] for text in tests["texts"][:n]]
    stop = tokenizer.end_of_turn if tests["conversations"] else tokenizer.end_of_text
    return [tokenizer.decode(ids) for ids in generate(model, prompts, max_new_tokens, stop)] if prompts else []


def side_by_side(tests, answers: dict[str, list[str]]) -> str:
    """Questions, the answers of the test file, and those of each model, as Markdown."""
    shown = [(test["messages"][-2]["content"], test["messages"][-1]["content"]) for test in tests["conversations"]]
    shown = shown or [(text, "") for text in tests["texts"]]
    blocks = []
    for i, (question, gold) in enumerate(shown[:max(map(len, answers.values()))]):
        said = {"the file": gold, **{label: texts[i] for label, texts in answers.items()}}
        blocks.append("\n".join([f"> {question}".replace("\n", "\n> "), "",
                                 *(f"- **{label}**: {' '.join(text.split())}" for label, text in said.items() if text)]))
    return "\n\n".join(blocks)


def generation_speed(model, tokenizer, tests, n_tokens: int = 32) -> float:
    """New tokens per second, greedy, for these prompts in one batch."""
    prompts = [tokenizer.encode_chat(test["messages"][:1], add_generation_prompt=True)[0] for test in tests]
    start = time.perf_counter()
    answers = generate(model, prompts, n_tokens)
    return sum(map(len, answers)) / (time.perf_counter() - start)


def mean_and_spread(results: list[dict], key: str, form: str) -> str:
    """'69.0', or '69.0 ± 2.4' over several seeds (sample standard deviation); '' if it was not measured."""
    values = [result[key] for result in results if key in result]
    if not values:
        return ""
    mean = form.format(statistics.mean(values)).replace("-0.000", "0.000")          # a KL of rounding errors
    return mean if len(values) == 1 or key == "parameters" else f"{mean} ± {form.format(statistics.stdev(values))}"


def tables(all_results: dict[str, list[dict]], reference: str) -> str:
    """The tables as Markdown: models by measure; then leaves, and positions in the answer, by model."""
    shown = {title: column for title, column in COLUMNS.items()
             if any(column[0] in result for results in all_results.values() for result in results)}
    rows = [["", *shown]]
    for label, results in all_results.items():
        rows.append([label, *(mean_and_spread(results, *column) for column in shown.values())])
    text = markdown(rows)
    leaves = sorted(names_in(all_results, "leaves"))
    if len(leaves) > 1:
        rows = [["exact match % per leaf", *all_results]]
        for leaf in leaves:
            rows.append([leaf, *(mean_and_spread([result["leaves"] for result in results], leaf, "{:.0f}")
                                 for results in all_results.values())])
        text += "\n\n" + markdown(rows)
    if spans := names_in(all_results, "kl_by_position"):
        rows = [[f"KL to {reference} by position in the answer", *all_results]]
        for span in spans:
            of_models = ([result.get("kl_by_position", {}) for result in results] for results in all_results.values())
            rows.append([span, *(mean_and_spread(of_seeds, span, "{:.3f}") for of_seeds in of_models)])
        text += "\n\n" + markdown(rows)
    return text


def names_in(all_results: dict[str, list[dict]], key: str) -> list[str]:
    """The leaves, or the spans of positions, that any of the models has, in the order met."""
    of_seeds = [result.get(key, {}) for results in all_results.values() for result in results]
    return list(dict.fromkeys(name for names in of_seeds for name in names))


def markdown(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) + " |" for row in rows]
    rule = "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def draw(all_results: dict[str, list[dict]], reference: str, path: Path) -> bool:
    """Bars of exact match per leaf and model and of the habits' KL; lines of the KL by position in the answer, without
    the reference, whose own is 0. What was not measured has no panel; False if that is all of it, and nothing is drawn."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    def measured(key):
        """{label: one value per seed} of the models that have it."""
        found = {label: [result[key] for result in results if key in result] for label, results in all_results.items()}
        return {label: values for label, values in found.items() if values}

    exact, leaves, habits = measured("exact_match"), measured("leaves"), measured("habits_kl")
    curves = {label: values for label, values in measured("kl_by_position").items() if label != reference}
    colors = {label: f"C{i}" for i, label in enumerate(all_results)}
    panels = ({"exact": 4.0} if exact else {}) | ({"habits": 1.0} if habits else {}) | ({"kl": 1.4} if curves else {})
    if not panels:
        return False
    figure = Figure(figsize=(2.5 * sum(panels.values()), 4), layout="constrained")
    axes = figure.subplot_mosaic([list(panels)], width_ratios=list(panels.values()))

    names, width = sorted(names_in(all_results, "leaves")), 0.8 / len(all_results)
    names = names if len(names) > 1 else []                 # a single leaf is all there is
    for i, label in enumerate(exact):
        of_leaves = [statistics.mean(seed[name] for seed in leaves[label]) for name in names]
        places = [x + i * width for x in range(len(names) + 1)]
        axes["exact"].bar(places, [statistics.mean(exact[label]), *of_leaves], width, color=colors[label])
    if exact:
        axes["exact"].set_xticks([x + 0.4 - width / 2 for x in range(len(names) + 1)],
                                 ["all", *(name.rsplit("/", 1)[-1] for name in names)], rotation=45, ha="right")
        axes["exact"].set(ylabel="exact match, %", ylim=(0, 100), title="Held-out questions")
    for label, values in habits.items():
        axes["habits"].bar(label, statistics.mean(values), color=colors[label])
        axes["habits"].set_xticks([])
        axes["habits"].set(ylabel="KL(truth || model), nats", title="Habits (less is better)")
    for label, seeds in curves.items():
        kl = {span: statistics.mean(seed[span] for seed in seeds) for span in seeds[0]}
        axes["kl"].plot(list(kl), list(kl.values()), "o-", color=colors[label])
        axes["kl"].set(xlabel="position in the answer", ylabel="nats per token", ylim=(0, None),
                       title=f"KL to {Path(reference).name}")
    figure.legend([Patch(color=color) for color in colors.values()], list(colors), loc="outside lower left",
                  ncols=len(colors), frameon=False)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="[LABEL=]PATH[,PATH...]",
        help="models to compare; several paths under one label are seeds: their mean and spread is shown")
    add("--data", nargs="+", default=["dataset/test.jsonl", "dataset/mcq_test.jsonl", "dataset/test_habits.jsonl"],
        help="test files")
    add("--limit", type=int, default=0, help="read the first so many rows of each file; 0: all")
    add("--samples", type=int, default=0, help="show the models' greedy answers to so many questions, or how they go on "
                                               "with texts, side by side")
    add("--max_new_tokens", type=int, default=64, help="longest of these answers, in tokens")
    add("--reference", default=None, help="weights that agreement and KL are measured with; default: the first of "
                                          "--weights")
    add("--json", default=None, help="file for all results")
    add("--report", default=None, help="Markdown file for the tables; a picture of the same name lies beside it")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parse_args(parser)
    for name in ("limit", "samples", "max_new_tokens"):
        if vars(args)[name] < 0:
            parser.error(f"--{name} {vars(args)[name]} must be 0 or more")

    device = pick_device(args.device)
    models = {}
    for spec in args.weights:
        label, _, paths = spec.rpartition("=")
        paths = paths.split(",")
        label = label or (Path(paths[0]).name if Path(paths[0]).is_dir() else Path(paths[0]).stem)
        if label in models:
            sys.exit(f"two models are called {label}; name them: --weights FIRST={','.join(models[label])} "
                     f"SECOND={','.join(paths)}")
        models[label] = paths
    reference_path = args.reference or next(iter(models.values()))[0]
    # Its label, if it has one that no other seed shares.
    reference_name = next((label for label, paths in models.items() if paths == [reference_path]), reference_path)
    try:
        tests = read_tests(args.data, args.limit)
        reference, vocabulary = load_model(reference_path, device)
        all_results, answers, others = {}, {}, set()
        for label, paths in models.items():
            all_results[label] = []
            for path in paths:
                model, tokenizer = (reference, vocabulary) if path == reference_path else load_model(path, device)
                column_major(model)
                comparable = (tokenizer.sha256, model.config.vocab_size) == (vocabulary.sha256, reference.config.vocab_size)
                all_results[label].append(evaluate(model, tokenizer, tests, reference if comparable else None))
                if not comparable:
                    others.add(label)
            if args.samples:
                answers[label] = sample_answers(model, tokenizer, tests, args.samples, args.max_new_tokens)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))

    key = (f"agreement: with {reference_name}; KL: KL({reference_name} || model) in nats per token; "
           "habits: KL(truth || model) in nats, and how often the likeliest answer is the likeliest in truth; "
           "tokens/s: greedy answers, 16 at a time, on this machine")
    if others:
        key += (f". {', '.join(sorted(others))}: another vocabulary than {reference_name}'s, so neither agreement nor KL, and "
                "figures per token do not compare")
    text = f"{tables(all_results, reference_name)}\n\n{key}" + (f"\n\n{side_by_side(tests, answers)}" if answers else "")
    print(text)
    if args.json:
        write_atomic(Path(args.json), lambda file: file.write(json.dumps(all_results, indent=2).encode()))
    if args.report:
        report, picture = Path(args.report), Path(args.report).with_suffix(".png")
        drawn = draw(all_results, reference_name, picture)
        text = f"# Results\n\n{text}\n" + (f"\n![the same as a picture]({picture.name})\n" if drawn else "")
        write_atomic(report, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
