"""
指标：一个模型在测试文件上的全部分数，以及并排比较几个模型的表。
Metrics: all scores of a model on test files, and the tables that compare several models.

    tests = read_tests(["dataset/test.jsonl", "dataset/mcq_test.jsonl"])
    results = {"student": [measure(model, tokenizer, tests)]}       # a list: one entry per seed
    print(tables(results))

What a row of a test file holds decides how it is scored; a file may mix them:

    conversation        exact match (greedy decoding gives the file's answer, token by token), or
                        token F1 and chrF of the greedy answer, where the file's has more than 10
                        words; perplexity, agreement with a reference model, and KL(reference ||
                        model) in nats per token
    with options        accuracy: the most likely option, by the probability of its text, is right;
                        the question is asked without its options, unless they are `listed`
    with distribution   KL(truth || model) over the answers in nats; whether both have the same mode
    text                nats per token and perplexity of all tokens, agreement and KL
"""

import math
from collections import defaultdict
from itertools import chain, compress, islice
from statistics import fmean

import numpy as np

from dataset.formats import BadLine, bare_question, read_rows, to_messages, to_question, to_text
from dataset.lm_dataset import text_samples
from distill.fused import BINS
from evaluation.exam import SHORT, chrf, token_f1, words, write_answers
from evaluation.scores import Score, score, score_answers, score_samples
from evaluation.tables import markdown, mean_and_spread

TEXT_TOKENS = 512       # texts are cut into pieces, so that unlike context lengths read the same

# Column of the table -> (key of the results, how to print it).
COLUMNS = {
    "parameters": ("parameters", "{:,.0f}"),
    "exact match %": ("exact_match", "{:.1f}"),
    "token F1 %": ("token_f1", "{:.1f}"),
    "chrF %": ("chrf", "{:.1f}"),
    "multiple choice %": ("multiple_choice", "{:.1f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "text nats/token": ("text_loss", "{:.3f}"),
    "text perplexity": ("text_perplexity", "{:.2f}"),
    "agreement %": ("agreement", "{:.1f}"),
    "KL": ("kl", "{:.3f}"),
    "habits KL": ("habits_kl", "{:.3f}"),
    "habits mode %": ("habits_mode", "{:.1f}"),
    "answer %": ("answer", "{:.1f}"),
    "trace %": ("trace", "{:.1f}"),
    "steps right %": ("steps_right", "{:.2f}"),
    "length": ("length", "{:.1f}"),
    "finished %": ("finished", "{:.1f}"),
}


def read_tests(paths, limit: int = 0) -> dict[str, list]:
    """Rows of all files by kind, the first `limit` of each file (0: all). Raises BadLine with the
    file, the line and the reason."""
    tests = {"conversations": [], "choices": [], "distributions": [], "texts": []}
    for path in paths:
        for number, row in islice(read_rows(path), limit or None):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                if "distribution" in row:
                    tests["distributions"].append(to_distribution(row))
                elif "text" in row and "options" not in row:
                    tests["texts"].append(to_text(row))
                else:
                    messages = to_messages(row)     # raises ValueError for a bad row of choices too
                    kind, test = "conversations", {"messages": messages,
                                                   "leaf": row.get("leaf", "all")}
                    if "options" in row:
                        kind, test = "choices", row
                    tests[kind].append(test)
            except ValueError as error:
                raise BadLine(f"{path}, line {number}: {error}") from error
    if not any(tests.values()):
        raise BadLine(f"{', '.join(paths)}: nothing to test on")
    return tests


def to_distribution(row: dict) -> dict:
    """{question, distribution} of a row. Raises ValueError with the reason if it is none."""
    p = row["distribution"]
    if not (isinstance(p, dict) and all(isinstance(x, (int, float)) and x > 0 for x in p.values())
            and abs(sum(p.values()) - 1) <= 1e-3):
        raise ValueError(f"distribution {p} must give each answer a probability above 0, and 1 "
                         "in all")
    return {"question": to_question(row).messages[-1]["content"], "distribution": p}


def measure(model, tokenizer, tests: dict[str, list], reference=None, listed=False,
            per_token=False) -> dict:
    """Scores by the keys of COLUMNS; of all tokens "loss" in nats, "calibration" error in % and
    "acceptance" in %, of drafts by the reference; "leaves" {leaf: exact match %}; the
    number of "questions"; "habits", for each the true and the model's probability of each
    answer, the most likely one first. Kinds of rows that the tests do not have are left out.

    reference   a model of the same vocabulary, for agreement, KL and acceptance; None leaves them
                out
    per_token   the option with the largest log-probability per token: long ones have less in all
    """
    results = {"parameters": model.n_parameters()}
    conversations, choices, distributions, texts = tests.values()
    scores = score(model, tokenizer, [test["messages"] for test in conversations], reference)
    pieces = text_samples(texts, tokenizer, min(TEXT_TOKENS, model.config.max_seq_len))
    of_texts = score_samples(model, pieces, reference)
    if both := scores + of_texts:
        n_tokens = sum(s.n_tokens for s in both)
        results |= {"loss": nats_per_token(both), "calibration": calibration_error(both)}
        if reference is not None:
            results["agreement"] = 100 * sum(s.agree for s in both) / n_tokens
            results["kl"] = sum(s.kl for s in both) / n_tokens
            results["acceptance"] = 100 * sum(s.accepted for s in both) / n_tokens
    if of_texts:
        results["text_loss"] = nats_per_token(of_texts)
        results["text_perplexity"] = math.exp(results["text_loss"])
    if scores:
        results["perplexity"] = math.exp(nats_per_token(scores))
        leaves = defaultdict(list)
        long = [len(words(test["messages"][-1]["content"])) > SHORT for test in conversations]
        for test, s, is_long in zip(conversations, scores, long):
            if not is_long:
                leaves[test["leaf"]].append(s.exact)
        if leaves:
            results["exact_match"] = 100 * fmean(chain(*leaves.values()))
            results["questions"] = len(long) - sum(long)
            results["leaves"] = {leaf: 100 * fmean(exact) for leaf, exact in sorted(leaves.items())}
        results |= grade_texts(model, tokenizer, [*compress(conversations, long)])

    log_c = score_answers(model, tokenizer, [
        (to_question(row).messages if listed else bare_question(row), list(row["options"].values()))
        for row in choices], per_token)
    log_q = score_answers(model, tokenizer, [(bare_question(row), list(row["distribution"]))
                                             for row in distributions])
    if None in log_c + log_q:
        raise ValueError(f"question {(log_c + log_q).index(None) + 1} with options or a "
                         f"distribution exceeds max_seq_len={model.config.max_seq_len}")
    if choices:
        results["multiple_choice"] = 100 * fmean(
            list(row["options"])[np.argmax(q)] == row["answer_idx"]
            for row, q in zip(choices, log_c))
    if distributions:
        pairs = [(list(row["distribution"].values()), q)
                 for row, q in zip(distributions, log_q)]
        results["habits_kl"] = fmean(
            sum(p_i * (math.log(p_i) - log_q_i) for p_i, log_q_i in zip(*pair)) for pair in pairs)
        results["habits"] = [sorted(zip(p, np.exp(q).tolist()), reverse=True) for p, q in pairs]
        results["habits_mode"] = 100 * fmean(np.argmax(p) == np.argmax(q) for p, q in pairs)
    return results


def grade_texts(model, tokenizer, tests: list[dict]) -> dict:
    """Mean token F1 and chrF in % of greedy answers, which have at most twice the tokens of the
    file's. Empty without tests."""
    golds = [test["messages"][-1]["content"] for test in tests]
    answers = write_answers(model, tokenizer, [test["messages"][:-1] for test in tests],
                            [2 * len(tokenizer.encode(gold)) for gold in golds])
    return {name: 100 * fmean(map(of, answers, golds))
            for name, of in (("token_f1", token_f1), ("chrf", chrf)) if tests}


def nats_per_token(scores: list[Score]) -> float:
    return -sum(s.log_p for s in scores) / sum(s.n_tokens for s in scores)


def calibration_error(scores: list[Score]) -> float:
    """Expected calibration error in %: how far the probability of the top-1 token is from the share
    of these tokens that are right, in bins of probability (distill.fused.calibration_gaps)."""
    top_p, right = (np.concatenate(part) for part in zip(*((s.top_p, s.right) for s in scores)))
    bins = np.minimum(top_p * BINS, BINS - 1).astype(int)
    return 100 * np.abs(np.bincount(bins, top_p - right)).sum() / len(bins)


def tables(results: dict[str, list[dict]]) -> str:
    """Markdown of {model: results of each seed}: a table of models by measure, then tables of
    leaves and of what generated answers have, by model."""
    def cells(key, form, values, **more):
        return mean_and_spread([seed[key] for seed in values if key in seed], form, **more)

    shown = {title: column for title, column in COLUMNS.items()
             if any(column[0] in seed for seeds in results.values() for seed in seeds)}
    rows = [[label, *(cells(key, form, seeds, spread=key != "parameters",
                            n=seeds[0]["questions"] if key in ("answer", "trace") else 0)
                      for key, form in shown.values())] for label, seeds in results.items()]
    found = [markdown([["", *shown], *rows])]
    for key, title, form in (
            ("leaves", "exact match % per leaf", "{:.0f}"),
            ("by_leaf", "answer % per leaf", "{:.1f}"),
            ("by_length", "answer % by steps", "{:.1f}"),
            ("pass_at", "pass@k %, by k", "{:.1f}")):
        parts = [[seed.get(key, {}) for seed in seeds] for seeds in results.values()]
        names = list(dict.fromkeys(name for seeds in parts for seed in seeds for name in seed))
        if len(names) > (key in ("leaves", "by_leaf", "by_length")):    # one is the whole test
            counts = [seeds[0].get(f"questions_{key}", {}) for seeds in results.values()]
            rows = [[name, *(cells(name, form, seeds, n=n.get(name, 0))
                             for seeds, n in zip(parts, counts))] for name in names]
            found.append(markdown([[title, *results], *rows]))
    return "\n\n".join(found)
