"""
考试：带标准答案的问题，让模型作答，再按类打分（准确率与宏平均的精确率、召回率、F1）。
Exams: questions whose answers are known are put to a model, and what it answers is graded.

    asked = read_exam(["dataset/mcq_test.jsonl"], limit=200)
    grades = grade(answer(model, tokenizer, asked, max_new_tokens=32), asked)
    grades.accuracy, grades.f1, grades.by_category
"""

import random
from collections import Counter, defaultdict
from statistics import fmean
from typing import NamedTuple

from dataset.formats import category, files_of, final_answer, read_each, to_question
from model.generate import generate
from evaluation.scores import score_samples


class ExamQuestion(NamedTuple):
    """A question of an exam."""

    messages: list[dict]            # as in training; the user's turn is the last
    gold: str                       # the right answer; with options the text of the right one
    options: list[str] | None       # what there is to choose from; None: the answer is written freely
    category: str                   # what it is about: dataset.formats.category


class Grades(NamedTuple):
    """Shares from 0 to 1. Precision, recall and F1 are macro averages: see `grade`."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    by_category: dict[str, float]       # accuracy; the names in order
    n: int                              # questions


# ---- 1. Questions --------------------------------------------------------------------------------

def read_exam(paths, limit: int = 0, seed: int = 0, skip_bad_lines: bool = False, log=print) -> list[ExamQuestion]:
    """The questions of files, or of folders of files, in their order: conversations, of which the last answer is asked
    for, and multiple choice. Rows without an answer are left out. With a limit, that many of all, drawn by the seed.

    Raises what dataset.formats.read_conversations and files_of raise; ValueError if no row has an answer.
    """
    rows = [row for path in paths for file in files_of(path)
            for row in read_each(file, lambda row: asked_by(row, file.stem), skip_bad_lines, log)]
    asked = [row for row in rows if row.gold is not None]
    if not asked:
        raise ValueError(f"{', '.join(map(str, paths))}: none of the {len(rows):,} questions has an answer to grade by")
    if not 0 < limit < len(asked):
        return asked
    return [asked[i] for i in sorted(random.Random(seed).sample(range(len(asked)), limit))]


def asked_by(row: dict, stem: str) -> ExamQuestion:
    """The question of a row; without an answer its `gold` is None. Raises ValueError as to_question does."""
    messages, gold, others = to_question(row)
    # A row of turns may carry options of another lesson: to_question reads the turns, and so do we.
    is_choice = "options" in row and "options" not in others
    return ExamQuestion(messages, gold, list(row["options"].values()) if is_choice else None, category(row, stem))


# ---- 2. Answers ----------------------------------------------------------------------------------

def answer(model, tokenizer, asked: list[ExamQuestion], max_new_tokens: int) -> list[str]:
    """The model's answer to each question: of its options the likeliest, by the log-probability of the whole text and
    its end of turn; without options what greedy decoding writes, without the white space around it.

    Put the model into eval mode first. A question that is too long for its max_seq_len, with its longest option or with
    one token of an answer, is answered by "", which is wrong.
    """
    chosen = iter(choose_options(model, tokenizer, [one for one in asked if one.options is not None]))
    written = iter(write_answers(model, tokenizer, [one for one in asked if one.options is None], max_new_tokens))
    return [next(written if one.options is None else chosen) for one in asked]


def choose_options(model, tokenizer, asked: list[ExamQuestion]) -> list[str]:
    samples = [tokenizer.encode_chats([*one.messages, {"role": "assistant", "content": option}] for option in one.options)
               for one in asked]
    longest = [max(len(ids) for ids, _ in of_one) for of_one in samples]
    fits = [size - 1 <= model.config.max_seq_len for size in longest]       # the last token is not read
    scores = iter(score_samples(model, [sample for of_one, fit in zip(samples, fits) if fit for sample in of_one]))
    log_p = [[next(scores).log_p for _ in one.options] if fit else None for one, fit in zip(asked, fits)]
    return ["" if of_one is None else one.options[of_one.index(max(of_one))] for one, of_one in zip(asked, log_p)]


def write_answers(model, tokenizer, asked: list[ExamQuestion], max_new_tokens: int) -> list[str]:
    prompts = [ids for ids, _ in tokenizer.encode_chats((one.messages for one in asked), add_generation_prompt=True)]
    fits = [len(prompt) < model.config.max_seq_len for prompt in prompts]
    answers = iter(generate(model, [prompt for prompt, fit in zip(prompts, fits) if fit], max_new_tokens,
                            tokenizer.end_of_turn, vocab_size=tokenizer.vocab_size))
    return [tokenizer.decode(next(answers)).strip() if fit else "" for fit in fits]


# ---- 3. Grades -----------------------------------------------------------------------------------

def is_right(given: str, gold: str) -> bool:
    """Whether both come to the same final answer, whatever the white space within."""
    return plain(given) == plain(gold)


def plain(text: str) -> str:
    return " ".join(final_answer(text).split())


def grade(given: list[str], asked: list[ExamQuestion]) -> Grades:
    """Grades for the answers given, one for each question.

    The classes are what the gold answers name: the place of the option (0 is A), or the final answer where there are no
    options. Of each class, with TP = how often it was given and right:

        precision = TP / how often it was given     recall = TP / how often it is right     F1 = 2 TP / (both counts)

    and a class that was never given has precision 0. The macro average is the mean over the classes, rare and frequent
    alike: scikit-learn's precision_recall_fscore_support(gold, given, labels=set(gold), average="macro", zero_division=0).
    """
    right = [is_right(text, one.gold) for text, one in zip(given, asked, strict=True)]
    gold_classes = [class_of(one.gold, one) for one in asked]
    n_gold, n_given = Counter(gold_classes), Counter(map(class_of, given, asked))
    n_right = Counter(name for name, hit in zip(gold_classes, right) if hit)
    of_categories = defaultdict(list)
    for one, hit in zip(asked, right):
        of_categories[one.category].append(hit)
    return Grades(
        accuracy=fmean(right),
        precision=fmean(n_right[name] / n_given[name] if n_given[name] else 0.0 for name in n_gold),
        recall=fmean(n_right[name] / n_gold[name] for name in n_gold),
        f1=fmean(2 * n_right[name] / (n_given[name] + n_gold[name]) for name in n_gold),
        by_category={name: fmean(hits) for name, hits in sorted(of_categories.items())},
        n=len(asked))


def class_of(text: str, asked: ExamQuestion) -> int | str | None:
    """The place of the option that the text is, None if it is none of them; without options its final answer."""
    if asked.options is None:
        return plain(text)
    return next((place for place, option in enumerate(asked.options) if is_right(text, option)), None)
