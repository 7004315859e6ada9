"""
课程的评测：每一方的损失与考试，几个进程分着答；以及教师与学生的回答对照。
The evaluation of a curriculum: losses and an exam of each side, and answers of teacher and student.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist

from dataset.domains import DOMAIN, GENERAL
from dataset.lm_dataset import in_order
from evaluation.exam import ExamQuestion, answer, grade
from evaluation.samples import side_by_side
from evaluation.validation import evaluate
from runtime.log import Logger
from runtime.precision import autocast
from runtime.processes import World


def evaluate_sides(model, teachers, tokenizer, held_out: dict, world: World,
                   max_new_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """Of each side that has something held out: SIDE_loss (CE with the labels) and SIDE_kl
    (KL(teacher || student)), nats per token; and the metrics of its exam (evaluation/exam.py), such
    as SIDE_accuracy. Second, the domain's scores: {domain: mean, domain/CATEGORY: score}.

    held_out    {side: (data, exam)}: see dataset.domains.open_sides
    """
    metrics, domain_scores = {}, {}
    for side, (data, exam) in held_out.items():
        batches = in_order(data, world.rank, world.size)
        scores = evaluate(model, batches, world.device, dtype=world.dtype, teachers=teachers)
        metrics |= {f"{side}_loss": scores["val_ce"], f"{side}_kl": scores["val_kl"]}
        if exam:
            grades = grade(exam_answers(model, tokenizer, exam, max_new_tokens, world), exam)
            metrics |= {f"{side}_{name}": value for name, value in grades.metrics.items()}
            if side == DOMAIN:
                domain_scores = {side: grades.score, **{
                    f"{side}/{name}": score for name, score in grades.by_category.items()}}
    return metrics, domain_scores


def exam_answers(model, tokenizer, exam: list[ExamQuestion], max_new_tokens: int,
                 world: World) -> list[str]:
    """The model's answers to all questions. Each process answers a part, and all call this."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), autocast(world.device, world.dtype):
        own = answer(model, tokenizer, exam[world.rank::world.size], max_new_tokens)
    model.train(was_training)
    parts = [own]
    if world.size > 1:
        parts = [None] * world.size
        dist.all_gather_object(parts, own)
    return [parts[i % world.size][i // world.size] for i in range(len(exam))]


def forgetting(metrics: dict, start: dict) -> dict[str, float]:
    """Nats, accuracy and token F1 that the general side has lost since `start`, metrics too; below
    0 it has gained."""
    lost = {}
    if "general_loss" in metrics:
        lost["forgetting_loss"] = metrics["general_loss"] - start["general_loss"]
    for name in ("accuracy", "token_f1"):
        if f"general_{name}" in metrics:
            lost[f"forgetting_{name}"] = start[f"general_{name}"] - metrics[f"general_{name}"]
    return lost


def weighted_loss(metrics: dict, domain_share: float) -> float:
    """The sides' losses, weighted by their shares. A side without a loss is left out; NaN without
    any."""
    shares = {GENERAL: 1 - domain_share, DOMAIN: domain_share}
    shares = {side: share for side, share in shares.items()
              if share > 0 and f"{side}_loss" in metrics}
    total = sum(shares.values()) or math.nan
    return sum(share * metrics[f"{side}_loss"] for side, share in shares.items()) / total


def log_exam(name: str, model, tokenizer, held_out: dict, max_new_tokens: int, world: World):
    for side, (_, exam) in held_out.items():
        if exam:
            grades = grade(exam_answers(model, tokenizer, exam, max_new_tokens, world), exam)
            shown = ", ".join(f"{metric} {grades.metrics[metric]:.1%}"
                              for metric in ("accuracy", "token_f1") if metric in grades.metrics)
            Logger(f"{name}: {shown} on {len(exam):,} {side} questions")


def show_samples(name: str, teacher, student, tokenizer, held_out: dict, n_samples: int,
                 max_new_tokens: int, world: World, wandb, progress):
    """Append the answers of both to the first questions of each side to samples.md, beside the
    files NAME.*, and to wandb; log them after the last step."""
    exam = [question for _, exam in held_out.values() for question in exam[:n_samples]]
    if not exam:
        return
    answers = {who: exam_answers(model, tokenizer, exam, max_new_tokens, world)
               for who, model in (("teacher", teacher), ("student", student))}
    rows = [{"messages": [*question.messages, {"role": "assistant", "content": question.gold}]}
            for question in exam]
    name = Path(name)
    text = f"## {name.name}, step {progress.steps_done}\n\n{side_by_side(rows, answers)}"
    if world.rank == 0:
        with open(name.with_name("samples.md"), "a", encoding="utf-8") as file:
            file.write(f"{text}\n\n")
    if wandb is not None:
        wandb.log({"samples": text}, step=progress.steps_done)
    if progress.steps_done == progress.total_steps:
        Logger(text)
