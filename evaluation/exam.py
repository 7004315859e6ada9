"""
考试：带标准答案的问题，让模型作答，再打分：选项与短答案分对错，长答案算词元 F1。
Exams: a model answers questions with known answers, and its answers are graded: options and short
answers are correct or not; a text is graded by its token F1.
"""

import random
import re
from collections import Counter, defaultdict
from statistics import fmean
from typing import NamedTuple

from dataset.formats import (category, files_of, final_answer, is_right, read_each, to_question)
from evaluation.scores import score_answers
from model.generate import generate
from runtime.log import Logger

SHORT = 10      # words of the longest answer that is correct or not; a longer one is a text
# A word: one Chinese or Japanese character, or a run of other letters and digits.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class ExamQuestion(NamedTuple):
    messages: list[dict]            # as in training; the user's turn is the last
    gold: str                       # the correct answer; with options the correct option's text
    options: list[str] | None       # the choices; None: a free answer
    category: str                   # see dataset.formats.category


class Grades(NamedTuple):
    """Values from 0 to 1. Precision, recall and F1 are macro averages: see `grade`."""
    metrics: dict[str, float]           # of options and short answers accuracy, precision, recall,
                                        # f1; of texts token_f1
    score: float                        # mean over all questions: 1, 0, or a text's token F1
    by_category: dict[str, float]       # the score by category, sorted by name


def read_exam(paths, limit: int = 0, seed: int = 0, skip_bad_lines: bool = False,
              log=print) -> list[ExamQuestion]:
    """The questions of files and folders, in order: multiple choice, and the last answers of
    conversations. Rows without an answer are left out. `limit`: a random sample, chosen by `seed`.
    """
    rows = [row for path in paths for file in files_of(path)
            for row in read_each(file, lambda row: exam_question(row, file.stem), skip_bad_lines,
                                 log)]
    questions = [row for row in rows if row.gold is not None]
    if not questions:
        raise ValueError(f"{', '.join(map(str, paths))}: none of the {len(rows):,} questions has "
                         "an answer to grade by")
    if not 0 < limit < len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random(seed).sample(range(len(questions)), limit))]


def exam_question(row: dict, stem: str) -> ExamQuestion:
    """A row's question; without an answer `gold` is None."""
    messages, gold, others = to_question(row)
    # to_question reads a conversation and ignores options beside it, so they remain in `others`.
    is_choice = "options" in row and "options" not in others
    options = list(row["options"].values()) if is_choice else None
    return ExamQuestion(messages, gold, options, category(row, stem))


def answer(model, tokenizer, questions: list[ExamQuestion], max_new_tokens: int) -> list[str]:
    """The model's answers: with options the one of highest log-probability, text and end of turn;
    else the text of greedy decoding, stripped.

    The model must be in eval mode. A question that exceeds its max_seq_len, with its longest option
    or one generated token, gets the answer "", which is wrong.
    """
    chosen = iter(choose_options(model, tokenizer, [one for one in questions if one.options]))
    free = [question.messages for question in questions if not question.options]
    written = iter(write_answers(model, tokenizer, free, max_new_tokens))
    return [next(chosen if question.options else written) for question in questions]


def choose_options(model, tokenizer, questions: list[ExamQuestion]) -> list[str]:
    scores = score_answers(model, tokenizer, [(question.messages, question.options)
                                              for question in questions])
    return [question.options[log_p.index(max(log_p))] if log_p else ""
            for question, log_p in zip(questions, scores)]


def write_answers(model, tokenizer, conversations, max_new_tokens: int, **sampling) -> list[str]:
    """sampling: see model.generate.generate."""
    chats = tokenizer.encode_chats(conversations, add_generation_prompt=True)
    fits = [len(ids) < model.config.max_seq_len for ids, _ in chats]
    if not all(fits):
        Logger(f"{fits.count(False):,} of {len(fits):,} conversations are longer than "
               f"{model.config.max_seq_len - 1:,} tokens and get no reply")
    answers = iter(generate(model, [ids for (ids, _), fit in zip(chats, fits) if fit],
                            max_new_tokens, tokenizer.end_of_turn, **sampling))
    return [tokenizer.decode(next(answers)).strip() if fit else "" for fit in fits]


def words(text: str) -> list[str]:
    """"Take 2 mg, 每日。" -> take 2 mg 每 日"""
    return WORDS.findall(final_answer(text).lower())


def is_text(question: ExamQuestion) -> bool:
    return question.options is None and len(words(question.gold)) > SHORT


def token_f1(given: str, gold: str) -> float:
    """2 * words in common / (words given + words in gold), as in SQuAD (Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250, Sec. 6.1), with the words of `words`."""
    a, b = Counter(words(given)), Counter(words(gold))
    return 2 * (a & b).total() / (a.total() + b.total())


def chrf(given: str, gold: str) -> float:
    """F-score of character n-grams without white space, n = 1 to 6: with the means P and R of their
    precisions and recalls over the n that the gold answer has, 5 P R / (4 P + R). Unlike words it
    needs no word boundaries. Popovic 2015, https://aclanthology.org/W15-3049."""
    a, b = ("".join(final_answer(text).split()) for text in (given, gold))
    grams = [[Counter(text[i:i + n] for i in range(len(text) - n + 1)) for text in (a, b)]
             for n in range(1, min(6, len(b)) + 1)]
    p = fmean((own & true).total() / max(own.total(), 1) for own, true in grams)
    r = fmean((own & true).total() / true.total() for own, true in grams)
    return 5 * p * r / (4 * p + r) if p else 0.0


def grade(given: list[str], questions: list[ExamQuestion]) -> Grades:
    """Grades for the given answers, one per question."""
    scores, by_category = [], defaultdict(list)
    for text, question in zip(given, questions, strict=True):
        scores.append(token_f1(text, question.gold) if is_text(question)
                      else float(is_right(text, question.gold)))
        by_category[question.category].append(scores[-1])
    metrics, long = {}, list(map(is_text, questions))
    if not all(long):
        metrics = classes([pair for pair, text in zip(zip(given, questions), long) if not text])
    if any(long):
        metrics["token_f1"] = fmean(score for score, text in zip(scores, long) if text)
    return Grades(metrics, fmean(scores),
                  {name: fmean(own) for name, own in sorted(by_category.items())})


def classes(answered: list[tuple[str, ExamQuestion]]) -> dict[str, float]:
    """Accuracy, and macro averages over classes. A class is a gold answer: the option's index, or
    without options the final answer. With TP = how often a class was given correctly:

        precision = TP / times given     recall = TP / times gold     F1 = 2 TP / (given + gold)

    A class that was never given has precision 0. The macro average is the unweighted mean over the
    classes, as in scikit-learn's precision_recall_fscore_support(average="macro").
    """
    right = [is_right(text, question.gold) for text, question in answered]
    gold = [class_of(question.gold, question) for _, question in answered]
    n_gold, n_given = Counter(gold), Counter(class_of(*pair) for pair in answered)
    n_right = Counter(name for name, hit in zip(gold, right) if hit)
    return {"accuracy": fmean(right),
            "precision": fmean(n_right[c] / n_given[c] if n_given[c] else 0.0 for c in n_gold),
            "recall": fmean(n_right[c] / n_gold[c] for c in n_gold),
            "f1": fmean(2 * n_right[c] / (n_given[c] + n_gold[c]) for c in n_gold)}


def class_of(text: str, question: ExamQuestion) -> int | str | None:
    """The index of the option that the text equals, or None; without options the final answer."""
    if question.options is None:
        return final_answer(text)
    return next((i for i, option in enumerate(question.options) if is_right(text, option)), None)
