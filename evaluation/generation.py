"""
按生成打分：模型自己写出回答，再看最终答案、思路的每一步，以及采样 k 次能否答对。
Scores of generated answers: the final answer, the steps of the thought, and k samples.

Teacher forcing (evaluation/scores.py) asks for each token after a correct prefix. Here a model
continues its own text, and one wrong step spoils those after it: if each of n steps is right with
probability p, independently of the others, all of them are with p^n.
"""

from math import comb
from statistics import fmean

import torch

from dataset.formats import is_right
from model.generate import generate


def measure_generation(model, tokenizer, tests: list[dict], max_new_tokens: int = 256,
                       num_samples: int = 0, temperature: float = 1.0, seed: int = 1337) -> dict:
    """Scores of the last answers to conversations (evaluation.metrics.read_tests), in %:

    answer, finished    greedy decoding: the final answer is correct; it ends, or it is wrong
    trace               the whole text is that of the file
    steps_right         of the steps that follow right steps alone: p
    by_length, by_leaf  `answer` by the number of steps in the file's thought, and by leaf
    length, questions   mean number of tokens; number of questions, also questions_by_length, ...
    pass_at             {k: pass@k} of num_samples answers at `temperature`, unless it is 0

    The model must be in eval mode. Raises ValueError for a question that fills max_seq_len.
    """
    golds, leaves = zip(*((test["messages"][-1]["content"], test["leaf"]) for test in tests))
    prompts = [ids for ids, _ in tokenizer.encode_chats(
        (test["messages"][:-1] for test in tests), add_generation_prompt=True)]

    def write(n, **sampling):  # -> n answers to all questions: ids, texts, ends, which are right
        limits = [min(max_new_tokens, model.config.max_seq_len - len(ids)) for ids in prompts] * n
        answers = generate(model, prompts * n, limits, tokenizer.end_of_turn, rows=256, **sampling)
        texts = [tokenizer.decode(ids) for ids in answers]
        ends = [len(ids) < limit for ids, limit in zip(answers, limits)]
        right = [end and is_right(*pair) for end, *pair in zip(ends, texts, golds * n)]
        return answers, texts, ends, right

    answers, texts, ends, right = write(1)
    traces = [end and text.strip() == gold.strip() for end, text, gold in zip(ends, texts, golds)]
    results = {"questions": len(golds), "answer": 100 * fmean(right), "trace": 100 * fmean(traces),
               "length": fmean(map(len, answers)), "finished": 100 * fmean(ends)}
    n_steps = [len(steps_of(gold)) for gold in golds]
    for name, keys in (("by_length", n_steps), ("by_leaf", leaves)):
        results[name] = {str(key): 100 * fmean(hit for own, hit in zip(keys, right) if own == key)
                         for key in sorted({*keys})}
        results[f"questions_{name}"] = {str(key): keys.count(key) for key in sorted({*keys})}
    if any(n_steps):
        wrong = [first_wrong_step(*pair) for pair in zip(texts, golds)]
        n_tried = sum(at or n for at, n in zip(wrong, n_steps))
        results["steps_right"] = 100 * (1 - sum(map(bool, wrong)) / n_tried)
    if num_samples:
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        *_, right = write(num_samples, temperature=temperature, generator=generator)
        n_right = [sum(right[i::len(golds)]) for i in range(len(golds))]
        results["pass_at"] = {str(k): 100 * fmean(pass_at(k, num_samples, n) for n in n_right)
                              for k in (1, 4, 16) if k <= num_samples}
    return results


def steps_of(text: str) -> list[str]:
    """The lines of the thought, which may lack its end."""
    return text.partition("<think>")[2].partition("</think>")[0].strip().splitlines()


def first_wrong_step(text: str, gold: str) -> int | None:
    """The first step of the gold answer that the text lacks, from 1; None if it has all of them."""
    own = steps_of(text)
    return next((i for i, step in enumerate(steps_of(gold), 1) if own[i - 1:i] != [step]), None)


def pass_at(k: int, n: int, n_right: int) -> float:
    """The probability that one of k answers is right, for k of n answers of which n_right are: an
    unbiased estimate. Chen et al. 2021, https://arxiv.org/abs/2107.03374, Eq. 1."""
    return 1 - comb(n - n_right, k) / comb(n, k)
