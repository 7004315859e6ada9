"""
三阶段领域蒸馏：先学通用，再让领域数据的份额逐步增大，最后专攻领域里答得最差的部分。
A curriculum in three stages: first what is general, then more and more of a domain, then where the domain is weakest.

    stage   data                              loss                                   temperature
    1       general                           KL, a little CE                        high: the outline of what the teacher knows
    2       general + domain, 30 -> 70 %      KL + CE + features + attention + ...   lower; the domains' gradients are balanced
    3       domain, some general replay       CE, a little KL                        1; weak categories are drawn more often

The stages are one table, STAGES, to be edited in class; --set changes a number of it: --set 2.balance=none 3.epochs=4.
Each stage is a run of its own, with its own learning rate, and begins with the student that the one before left.

When: there is a general student that must not forget. Of what is general 4.6 points go, and 30.7 where it learns the domain
alone; but a fixed mix of both does as well, and learns more of the domain (59.6 against 54.2 %, README).

    stage1_epoch-1.pth, ...   after each epoch
    stage1_best.pth           where the labels' CE on held-out data was lowest, both sides by the shares that the stage ends with
    stage1_final.pth          at its end: from there the next stage goes on
    distillation.log          all that was printed
    samples.md                answers of teacher and student side by side

one process    python train_curriculum.py
two processes  torchrun --nproc_per_node 2 train_curriculum.py --ddp
"""

import argparse
import dataclasses
import difflib
import hashlib
import json
import math
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dataset.formats import files_of, read_categories, read_conversations
from dataset.lm_dataset import dataset_of, in_order
from dataset.mixture import GROWTHS, Joined, Mixture, growth
from distill.balance import BALANCES, GradNorm, equal_norms, plain, without_conflict
from distill.features import bridges_below, losses_below
from distill.fused import compare, fused_distillation_loss
from distill.losses import DIVERGENCES, pick_divergence
from interop.checkpoint import adapt, load_model, new_model, save_model
from model.config import LMConfig
from evaluation.exam import ExamQuestion, answer, grade, read_exam
from distill.teachers import Teacher, ask, check_vocabulary, only_words
from runtime.args import add_training_args, checking_input, parse_args
from runtime.files import keep_previous
from runtime.log import LOG_FILES, Logger
from runtime.precision import autocast, pick_dtype, seed_everything
from runtime.processes import init_distributed_mode, main_process_first, sum_over_processes
from runtime.run import Run, place_frozen

GENERAL, DOMAIN = "general", "domain"
SAMPLINGS = ("uniform", "evaluation")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table. An epoch is one pass over the rows of the domain; where it has no share, over the general ones."""

    share: tuple[float, float]              # of the domain among the samples, at the first step and at the last
    alpha: float                            # weight of CE in [0, 1]; KL has 1 - alpha
    temperature: float                      # of both distributions
    learning_rate: float                    # of the cosine, which runs from 1.1 to 0.1 times this
    batch_size: int                         # samples per micro-batch and process
    epochs: int
    growth: str = "linear"                  # how the share moves: dataset/mixture.py
    balance: str = "none"                   # of the domains' gradients: distill/balance.py
    sampling: str = "uniform"               # within the domain; evaluation: a category by max(0.1, 1 - its accuracy)
    feature_weight: float = 0.0             # of the losses below the words: distill/features.py
    attention_weight: float = 0.0
    contrastive_weight: float = 0.0
    steps: int = 0                          # optimizer steps; 0: as many as the epochs make


# Edit them in class. `base` are numbers for models of billions of weights, `tiny` those for the embedded world.
STAGES = {
    "base": (Stage((0.0, 0.0), alpha=0.1, temperature=4.0, learning_rate=5e-5, batch_size=8, epochs=3),
             Stage((0.3, 0.7), alpha=0.3, temperature=2.0, learning_rate=3e-5, batch_size=6, epochs=3, balance="norm",
                   feature_weight=0.1, attention_weight=0.1, contrastive_weight=0.05),
             Stage((1.0, 1.0), alpha=0.8, temperature=1.0, learning_rate=1e-5, batch_size=4, epochs=3, sampling="evaluation")),
    "tiny": (Stage((0.0, 0.0), alpha=0.0, temperature=1.0, learning_rate=5e-3, batch_size=12, epochs=3),
             Stage((0.3, 0.7), alpha=0.0, temperature=1.0, learning_rate=5e-3, batch_size=12, epochs=1, balance="norm"),
             Stage((0.8, 0.8), alpha=0.0, temperature=1.0, learning_rate=2e-3, batch_size=12, epochs=1, sampling="evaluation")),
}
# Of a student that starts from nothing (--student none).
NEW = {"base": LMConfig(dim=512, n_layers=8, max_seq_len=512), "tiny": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128)}


def train_epoch(epoch, run, teacher, student, tokenizer, held_out, balance):
    """held_out: {side: (data, exam)}, of open_both; balance: of make_balance."""
    args, data = run.args, run.data
    divergence, _ = pick_divergence(args.divergence)
    weights = {"feature": args.feature_weight, "attention": args.attention_weight, "contrastive": args.contrastive_weight,
               "moe": student.config.aux_loss_alpha}
    for step in run.steps_of(epoch):
        gradients, tokens, means, n_read = {}, {}, {GENERAL: Counter(), DOMAIN: Counter()}, 0      # by domain, if told apart
        for micro, (batch, last) in enumerate(run.micro_batches(step)):
            group = (GENERAL, DOMAIN)[micro // args.accumulation_steps]
            tokens[group] = batch.step_targets
            if batch.lengths:
                with torch.no_grad(), autocast(run.world.device, run.dtype):
                    taught = ask([teacher], batch, tokenizer, args, return_hidden=args.feature_weight > 0)
                with run.forward(last and balance is None):
                    out = run.parallel["model"](batch.tokens, batch.lengths, at=batch.at, with_logits=False,
                                                return_hidden=args.feature_weight > 0)
                    head = only_words(student.head, tokenizer, args)
                    loss, ce, kd = fused_distillation_loss(out.final, head, batch.targets, taught.said, args.alpha,
                                                           args.temperature, divergence)
                    more = losses_below(args, run.parallel, batch, out, taught.out)
                    if student.config.use_moe:
                        more["moe"] = out.balance_loss / batch.step_samples
                loss = loss / batch.step_targets + sum(weights[name] * term for name, term in more.items())
                run.backward(loss)
                for name, part in {"loss": loss, "ce": ce / batch.step_targets, "kd": kd / batch.step_targets, **more}.items():
                    means[group][name] += part.detach()
                n_read += len(batch.tokens)

            # A balanced step has its micro-batches by domain: what the one asks of the weights, then what the other does.
            if balance is not None and (micro + 1) % args.accumulation_steps == 0:
                gradients[group] = run.take_gradient()
        shares = {group: n / sum(tokens.values()) for group, n in tokens.items()}
        run.log.add(n_read, **{name: sum(share * means[group][name] for group, share in shares.items())
                               for name in {**means[GENERAL], **means[DOMAIN]}})
        norms = give_balanced(run, balance, gradients, shares, means) if balance is not None else {}
        rates = run.update(step)

        epoch_ends = (step + 1) % data.steps_per_epoch == 0 or step + 1 == run.total_steps
        if run.is_due(args.log_interval) or run.is_due(args.save_interval) or epoch_ends:
            run.log.row(run.steps_done, run.wandb, **norms, **shares_since(run), **rates)
        if held_out and (epoch_ends or run.is_due(args.eval_interval)):
            learn_from(evaluate(student, teacher, tokenizer, held_out, run), run)
            show_samples(student, teacher, tokenizer, held_out, run)
            if run.is_best(run.memory["loss"]):
                save_model(student, tokenizer, f"{args.out_dir}/{run.name}_best.pth")
        if epoch_ends:
            save_model(student, tokenizer, f"{args.out_dir}/{run.name}_epoch-{epoch + 1}.pth")
        stopping = run.must_stop()
        if stopping or epoch_ends or run.is_due(args.save_interval):
            run.save()
        if stopping:
            return


# ---------------------------------------------------------------------------------------------- balance and shares


def make_balance(args):
    """How the domains' gradients become one: (gradients, shares, losses) -> Balanced. None: they are not told apart."""
    if args.balance == "none":
        return None
    if args.balance == "gradnorm":
        return GradNorm([GENERAL, DOMAIN], rate=0.005)
    return lambda gradients, shares, losses: {"norm": equal_norms, "pcgrad": without_conflict}[args.balance](gradients, shares)


def give_balanced(run, balance, gradients, shares, means) -> dict:
    """Hand the optimizer one gradient. Returns the length of each domain's part before and after."""
    losses = {}
    if isinstance(balance, GradNorm):
        for group in gradients:
            loss = torch.as_tensor(means[group]["loss"], dtype=torch.float32, device=run.world.device)
            losses[group] = sum_over_processes(loss.clone()).item()
    balanced = balance(gradients, shares, losses)
    run.give_gradient(balanced.gradient)
    if isinstance(balance, GradNorm):
        run.memory["gradnorm"] = balance.state_dict()
    scale = run.scaler.get_scale()
    return {f"grad_{group}{when}": norm / scale for when, norms in (("", balanced.before), ("_balanced", balanced.after))
            for group, norm in norms.items()}


def shares_since(run) -> dict[str, float]:
    """The share of the domain, as it came out, in the steps since it was last asked for."""
    counts = run.data.counts(run.memory.get("counted", 0), run.steps_done)
    run.memory["counted"] = run.steps_done
    total = sum(counts.values())
    return {"domain_share": 1 - counts.get(GENERAL, 0) / total} if total else {}


# ------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(student, teacher, tokenizer, held_out, run) -> dict:
    """Of each side of `held_out`: nats per token of the answers (loss) and KL(teacher || student), and how the student does in
    the exam: accuracy, and macro precision, recall and F1. With the categories' accuracies as `categories`."""
    args, device, found = run.args, run.world.device, {}
    student.eval()
    for side, (data, exam) in held_out.items():
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in run.share(in_order(data)):
            batch = batch.to(device)
            with autocast(device, run.dtype):
                taught = ask([teacher], batch, tokenizer, args)
                out = student(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
                scores = compare(out.final, only_words(student.head, tokenizer, args), batch.targets, taught.said)
            sums += torch.stack([scores["ce"], scores["kl"], torch.tensor(len(batch.targets), device=device)])
        ce, kl, n = sum_over_processes(sums).tolist()
        found |= {f"{side}_loss": ce / n, f"{side}_kl": kl / n}
        if exam:
            grades = grade(answers(student, tokenizer, exam, run), exam)
            found |= {f"{side}_{name}": getattr(grades, name) for name in ("accuracy", "precision", "recall", "f1")}
            if side == DOMAIN:
                found["categories"] = grades.by_category
    student.train()
    return found


def answers(model, tokenizer, exam: list[ExamQuestion], run) -> list[str]:
    """To all questions; each process answers its share of them."""
    rank, size = run.world.rank, run.world.size
    with autocast(run.world.device, run.dtype):
        own = answer(model, tokenizer, exam[rank::size], run.args.max_new_tokens)
    parts = [own]
    if dist.is_initialized():
        parts = [None] * size
        dist.all_gather_object(parts, own)
    return [parts[i % size][i // size] for i in range(len(exam))]


def learn_from(found: dict, run):
    """Log an evaluation, compare it with the stage's first, and draw weak categories more often from now on."""
    args, categories = run.args, found.pop("categories", {})
    start = run.memory.setdefault("start", found)
    # The stage's own aim, by the shares that it ends with, as far as it is held out.
    aims = {side: share for side, share in ((GENERAL, 1 - args.share[1]), (DOMAIN, args.share[1]))
            if f"{side}_loss" in found and share > 0}
    run.memory["loss"] = sum(share * found[f"{side}_loss"] for side, share in aims.items()) / (sum(aims.values()) or math.nan)
    for name in ("accuracy", "loss"):
        if f"general_{name}" in start:
            then, now = start[f"general_{name}"], found[f"general_{name}"]
            found = found | {f"forgetting_{name}": then - now if name == "accuracy" else now - then}
    run.log.row(run.steps_done, run.wandb, **{f"val_{name}": value for name, value in found.items()})
    if categories and args.sampling == "evaluation" and run.steps_done < run.total_steps:
        scores = {name: categories.get(name.removeprefix(f"{DOMAIN}/"), found["domain_accuracy"])
                  for name in run.data.names if name != GENERAL}
        weights = {name: max(0.1, 1 - score) for name, score in scores.items()}
        run.data.reweigh(run.steps_done, weights)
        run.memory["history"] = run.data.history
        run.load_data()
        total = sum(weights.values())
        Logger("accuracy -> share of what is drawn from now on: " + "; ".join(
            f"{name.removeprefix(f'{DOMAIN}/')} {scores[name]:.0%} -> {weight / total:.0%}" for name, weight in weights.items()))


def show_samples(student, teacher, tokenizer, held_out, run):
    """The first questions of each side, and what the data, the teacher and the student say: samples.md and wandb, and at the
    stage's end the log too."""
    exam = [asked for _, exam in held_out.values() for asked in exam[:run.args.n_samples]]
    if not (exam and run.is_main):
        return
    student.eval()
    said = [[asked.gold for asked in exam], *(answer(model, tokenizer, exam, run.args.max_new_tokens)
                                             for model in (teacher.source, student))]
    student.train()
    blocks = [f"## {run.name}, step {run.steps_done}"]
    for asked, *texts in zip(exam, *said):
        blocks.append(f"> {asked.messages[-1]['content'][-500:]}".replace("\n", "\n> "))
        blocks.append("\n".join(f"- **{who}**: {' '.join(text.split())[:300]}"
                                for who, text in zip(("data", "teacher", "student"), texts)))
    text = "\n\n".join(blocks)
    with open(Path(run.args.out_dir) / "samples.md", "a", encoding="utf-8") as file:
        file.write(f"{text}\n\n")
    if run.wandb is not None:
        run.wandb.log({"samples": text}, step=run.steps_done)
    if run.steps_done == run.total_steps:
        Logger(text)


# ------------------------------------------------------------------------------------------------------------ data


def is_held_out(messages: list[dict], fraction: float) -> bool:
    """By the question, so that it is never on both sides, however often its row is there."""
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2 ** 64


def open_side(path, val_path, args, tokenizer, max_seq_len):
    """A file or folder: [(its data, the category of each sample), ...], and what is held out of it, or lies at `val_path`:
    its data and its exam, or None."""
    read, aside, exam = [], [], []
    holds_out = args.val_fraction > 0 and not val_path
    for file in files_of(path):
        kind = dataset_of([file])
        data = kind([file], tokenizer, max_seq_len, args.skip_bad_lines, Logger)
        if kind.validated_on is None:                               # texts: no questions, pieces of a text are samples
            names = np.full(len(data), file.stem)
            data, rest = data.split(args.val_fraction if holds_out else 0.0, seed=0)
            names = names[:len(data)]
        else:
            conversations = read_conversations(file, args.skip_bad_lines, str)
            names = np.array(read_categories(file, args.skip_bad_lines))[data.rows]
            out = np.array([holds_out and is_held_out(messages[:-1], args.val_fraction) for messages in conversations])[data.rows]
            data, rest, names = data.view(np.flatnonzero(~out)), data.view(np.flatnonzero(out)), names[~out]
            if holds_out:
                exam += [asked for asked in read_exam([file], skip_bad_lines=args.skip_bad_lines, log=str)
                         if is_held_out(asked.messages, args.val_fraction)]
        read.append((data, names))
        aside += [rest] if len(rest) else []
    if val_path and val_path != "none":
        files = files_of(val_path)
        aside = [dataset_of([file])([file], tokenizer, max_seq_len, args.skip_bad_lines, Logger) for file in files]
        exam = read_exam([file for file in files if dataset_of([file]).validated_on], skip_bad_lines=args.skip_bad_lines, log=str)
    data = Joined(aside) if aside else None
    limit, draw = args.eval_samples, np.random.default_rng(0)
    if data and limit and len(data) > limit:
        data = data.view(np.sort(draw.choice(len(data), limit, replace=False)))
    if limit and len(exam) > limit:
        exam = [exam[i] for i in sorted(draw.choice(len(exam), limit, replace=False))]
    return read, (data, exam) if data else None


def open_both(args, tokenizer, student_config):
    """All data as one: (Joined, {side: {category: samples}}, {side: (data, exam)} held out)."""
    max_seq_len = args.max_seq_len or student_config.max_seq_len
    if max_seq_len > student_config.max_seq_len:
        raise ValueError(f"--max_seq_len {max_seq_len} is more than the student was made for, {student_config.max_seq_len}")
    if not 0.0 <= args.val_fraction < 1.0:
        raise ValueError(f"--val_fraction {args.val_fraction} must lie in [0, 1)")
    read, sides, held_out, first = [], {}, {}, 0
    for side, path, val_path in ((GENERAL, args.general_dataset, args.general_val_path),
                                 (DOMAIN, args.domain_dataset, args.val_path)):
        of_side, aside = open_side(path, val_path, args, tokenizer, max_seq_len)
        read += [data for data, _ in of_side]
        names = np.concatenate([names for _, names in of_side])
        samples = first + np.arange(len(names))
        sides[side] = {str(name): samples[names == name] for name in np.unique(names)}
        first += len(names)
        if aside is not None:
            held_out[side] = aside
        Logger(f"{side}: {len(names):,} samples of {path}, {len(sides[side])} categories; held out: "
               + (f"{len(aside[0]):,} samples, {len(aside[1]):,} questions" if aside else "none"))
    return Joined(read), sides, held_out


def mix(args, data, sides, world) -> Mixture:
    """The samples of a stage, step by step."""
    total = {side: sum(map(len, categories.values())) for side, categories in sides.items()}
    step_samples = args.batch_size * args.accumulation_steps * world.size
    mean = sum(args.share) / 2
    steps_per_epoch = max(1, round((total[DOMAIN] / mean if mean else total[GENERAL]) / step_samples))
    n_steps = args.max_steps or args.epochs * steps_per_epoch
    of_domain = growth(args.growth, *args.share, n_steps)                                       # (n_steps,)
    parts, shares = {}, []
    if of_domain.min() < 1:
        parts[GENERAL] = np.concatenate(list(sides[GENERAL].values()))
        shares.append(1 - of_domain)
    if mean:
        split = args.sampling == "evaluation"
        for name, samples in sides[DOMAIN].items() if split else [("all", np.concatenate(list(sides[DOMAIN].values())))]:
            parts[f"{DOMAIN}/{name}"] = samples
            shares.append(of_domain * len(samples) / total[DOMAIN])
    groups = [[GENERAL], [name for name in parts if name != GENERAL]] if args.balance != "none" else None
    return Mixture(data, parts, np.stack(shares, axis=1), args.batch_size, args.accumulation_steps, world.rank, world.size,
                   args.seed, steps_per_epoch, groups)


# ------------------------------------------------------------------------------------------------------- the stages


def args_of(stage: Stage, args) -> Namespace:
    """The flags, with the stage's row among them."""
    return Namespace(**vars(args) | dataclasses.asdict(stage) | {"max_steps": args.max_steps or stage.steps})


def train_stage(number: int, stage: Stage, args, teacher, student, tokenizer, data, sides, held_out, world):
    """One row of the table, from where it stood, if it was interrupted, to its end; whether it was asked to be the last."""
    name, args = f"stage{number}", args_of(stage, args)
    seed_everything(args.seed, number)
    with checking_input():
        mixture = mix(args, data, sides, world)
        args.warmup_iters = args.warmup_iters or round(args.warmup_ratio * len(mixture.shares))
        bridges = bridges_below(args, student.config, teacher.source.config)
        run = Run(name, args, world, {"model": student, **bridges}, mixture)
    balance = make_balance(args)
    if "gradnorm" in run.memory:
        balance.load_state_dict(run.memory["gradnorm"])
    if "history" in run.memory:
        mixture.restore(run.memory["history"])
        run.load_data()
    Logger(f"stage {number}: {stage_in_words(stage)}; {run.total_steps} steps of {mixture.step_samples} samples")
    if run.steps_done == 0 and held_out:
        learn_from(evaluate(student, teacher, tokenizer, held_out, run), run)
    for epoch in run.epochs:
        train_epoch(epoch, run, teacher, student, tokenizer, held_out, balance)
    if run.steps_done == run.total_steps:
        save_model(student, tokenizer, f"{args.out_dir}/{name}_final.pth")
    run.close()
    return run.stop.agreed(0, world, every=1)


def stage_in_words(stage: Stage) -> str:
    return ", ".join(f"{field.name} {getattr(stage, field.name)}" for field in dataclasses.fields(stage)
                     if field.default is dataclasses.MISSING or getattr(stage, field.name) != field.default)


def edited(stages: tuple[Stage, ...], changes: list[str]) -> list[Stage]:
    """The table with the changes of --set. Raises ValueError for a change that is none, and numbers out of their range."""
    stages, fields = list(stages), {field.name: field for field in dataclasses.fields(Stage)}
    for change in changes:
        place, _, value = change.partition("=")
        number, _, name = place.partition(".")
        if number.isdigit() and name not in fields:
            nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"--set {change}: a stage has no {name!r}; did you mean {nearest!r}? It has {', '.join(fields)}")
        if not number.isdigit() or not 1 <= int(number) <= len(stages) or not value:
            raise ValueError(f"--set {change}: write STAGE.NAME=VALUE, as 2.balance=none or 3.share=0.8:0.8; stages are 1 to "
                             f"{len(stages)}")
        kinds = {"share": lambda text: tuple(map(float, text.split(":"))), "batch_size": int, "epochs": int, "steps": int,
                 "growth": str, "balance": str, "sampling": str}
        try:
            value = kinds.get(name, float)(value)
        except ValueError:
            form = "FROM:TO, as 0.3:0.7" if name == "share" else "a number"
            raise ValueError(f"--set {change}: {value!r} is no value for {name}; write {form}") from None
        stages[int(number) - 1] = dataclasses.replace(stages[int(number) - 1], **{name: value})
    for number, stage in enumerate(stages, start=1):
        for name, fits, needed in (
                ("share", len(stage.share) == 2 and 0 <= min(stage.share) <= max(stage.share) <= 1, "be two numbers in [0, 1]"),
                ("alpha", 0 <= stage.alpha <= 1, "lie in [0, 1]"),
                ("temperature", stage.temperature > 0, "be above 0"), ("learning_rate", stage.learning_rate >= 0, "be 0 or more"),
                *((name, getattr(stage, name) >= 0, "be 0 or more")
                  for name in ("feature_weight", "attention_weight", "contrastive_weight")),
                ("batch_size", stage.batch_size >= 1, "be 1 or more"), ("epochs", stage.epochs >= 1, "be 1 or more"),
                ("steps", stage.steps >= 0, "be 0 or more"),
                ("growth", stage.growth in GROWTHS, f"be one of {', '.join(GROWTHS)}"),
                ("balance", stage.balance in BALANCES, f"be one of {', '.join(BALANCES)}"),
                ("balance", stage.balance == "none" or 0 < min(stage.share) <= max(stage.share) < 1,
                 "be none where one side alone has all of the share"),
                ("sampling", stage.sampling in SAMPLINGS, f"be one of {', '.join(SAMPLINGS)}"),
                ("sampling", stage.sampling == "uniform" or max(stage.share) > 0, "be uniform where the domain has no share")):
            if not fits:
                raise ValueError(f"{name} {getattr(stage, name)} of stage {number} must {needed}")
    return stages


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--teacher", "--teacher_model", default="out/full_sft_128.pth", help="its weights: a checkpoint, a Hugging Face folder, "
                                                                             "a GGUF file")
    add("--student", "--student_model", default="none", help="weights that the first stage starts from; none: a new model of "
                                                             "the sizes NEW in the script")
    add("--general_dataset", default="dataset/general.jsonl", help="a file or folder in the formats of dataset/dataset.md")
    add("--domain_dataset", "--medical_dataset", default="dataset/specialist.jsonl", help="that of the domain, whatever it is")
    add("--general_val_path", default=None, help="questions to be evaluated on, like --val_path, which is the domain's")
    add("--recipe", default="tiny", choices=STAGES, help="table of stages in the script")
    add("--set", nargs="+", default=[], metavar="STAGE.NAME=VALUE", help="changes of that table")
    add("--start_stage", type=int, default=1, help="first stage to be done")
    add("--end_stage", type=int, default=3, help="last one")
    add("--checkpoint_path", default=None, help="weights that --start_stage starts from, such as stage1_best.pth")
    add("--divergence", default="forward_kl", choices=[name for name in DIVERGENCES if name not in ("jsd", "uld")],
        help="what stands for KL in all stages, see distill/losses.py")
    add("--warmup_ratio", type=float, default=0.1, help="share of each stage's steps in [0, 1) that warm up")
    add("--feature_loss", default="mse", choices=["mse", "cosine"], help="how hidden states are compared")
    add("--layer_map", default="uniform", help="which layers: uniform, last, or by hand, STUDENT:TEACHER like 1:2,2:4")
    add("--relation_heads", type=int, default=4, help="heads of the attention relations; must divide the widths of q, k and v")
    add("--contrastive_temperature", type=float, default=0.1, help="of InfoNCE's similarities")
    add("--pad_vocab", action="store_true", help="leave out the columns beyond the tokenizer's words, with which a model "
                                                 "family rounds its vocabulary up")
    add("--eval_samples", type=int, default=400, help="held-out samples of each side that are looked at, and questions asked; "
                                                      "0: all")
    add("--max_new_tokens", type=int, default=32, help="longest answer in the exam, in tokens")
    add("--n_samples", type=int, default=3, help="questions of each side that teacher and student answer side by side")
    add("--use_lora", action="store_true", help="adapters of rank 16, alpha 32, dropout 0.05, unless --lora_rank says otherwise")
    add("--fp16", action="store_const", const="float16", dest="dtype", default=argparse.SUPPRESS, help="the same as --dtype float16")
    add_training_args(parser)
    parser.set_defaults(val_fraction=0.1, eval_interval=0, weight_decay=0.01)
    args = parse_args(parser)
    if not 1 <= args.start_stage <= args.end_stage <= 3:
        parser.error(f"--start_stage {args.start_stage} and --end_stage {args.end_stage} must be 1, 2 or 3, in this order")
    if args.start_stage > 1 and not args.checkpoint_path:
        parser.error(f"--start_stage {args.start_stage} goes on from a stage's weights: --checkpoint_path "
                     f"{args.out_dir}/stage{args.start_stage - 1}_final.pth")
    if args.shard != "none":
        parser.error(f"--shard {args.shard} is for train_distillation.py; a curriculum's model is whole on each process")
    if not 0.0 <= args.warmup_ratio < 1.0:
        parser.error(f"--warmup_ratio {args.warmup_ratio} must lie in [0, 1)")
    if (args.use_lora or args.lora_rank) and args.student == "none" and not args.checkpoint_path:
        parser.error("adapters are for weights that have learned something: name them with --student or --checkpoint_path")
    if args.use_lora and not args.lora_rank:
        args.lora_rank, args.lora_alpha, args.lora_dropout = 16, 32.0, 0.05

    # 2. Processes, seeds, the log
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if world.rank == 0 and not args.resume and args.start_stage == 1:
        for name in ("distillation.log", "samples.md"):                 # of an earlier run: NAME.previous
            keep_previous(out_dir / name)
    LOG_FILES.append(out_dir / "distillation.log")

    with checking_input():
        stages = edited(STAGES[args.recipe], args.set)

        # 3. Models
        dtype = torch.bfloat16 if pick_dtype(args.dtype, world.device) == torch.bfloat16 else torch.float32
        model, its_tokenizer = load_model(args.teacher, world.device, dtype)
        teacher = Teacher(place_frozen(model.requires_grad_(False), args, world), 1.0, its_tokenizer)
        Logger(f"teacher {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {args.teacher}")
        weights = args.checkpoint_path or args.student
        student, tokenizer = load_model(weights) if weights != "none" else new_model(NEW[args.recipe],
                                                                                    args.tokenizer or its_tokenizer)
        Logger(f"student {student.config}: {student.n_parameters() / 1e6:.2f} M parameters, from {weights}")
        check_vocabulary([teacher], student, tokenizer, args)
        if args.lora_rank:
            Logger(adapt(student, weights, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets))
        student.train()

        # 4. Data
        with main_process_first(world):
            data, sides, held_out = open_both(args, tokenizer, student.config)
        if data.max_seq_len > model.config.max_seq_len:
            raise ValueError(f"the student reads {data.max_seq_len} tokens, the teacher was made for {model.config.max_seq_len}: "
                             f"--max_seq_len {model.config.max_seq_len}")
        numbers = range(args.start_stage, args.end_stage + 1)
        for number in numbers:                              # what is wrong with the last is said before the first begins
            stage = stages[number - 1]
            mix(args_of(stage, args), data, sides, world)
            bridges_below(args_of(stage, args), student.config, model.config)
            if stage.sampling == "evaluation" and not held_out.get(DOMAIN, (None, None))[1]:
                raise ValueError("sampling by evaluation needs questions of the domain that are held out (--val_path, or "
                                 f"--val_fraction above 0); or let it be uniform: --set {number}.sampling=uniform")

    if world.rank == 0 and not args.resume:
        # A later stage of an earlier run must not be taken for one of this run, when it is resumed.
        for number in range(args.start_stage, len(stages) + 1):
            for end in ("", ".previous"):
                (out_dir / f"stage{number}.resume{end}").unlink(missing_ok=True)
        # A teacher that fails the exam has nothing to give for it.
        for side, exam in ((side, exam) for side, (_, exam) in held_out.items() if exam):
            with autocast(world.device, dtype):
                said = answer(model, its_tokenizer, exam, args.max_new_tokens)
            Logger(f"the teacher itself: {grade(said, exam).accuracy:.1%} of {len(exam):,} {side} questions")

    # 5. The stages, one after the other
    for number in numbers:
        stop = train_stage(number, stages[number - 1], args, teacher, student, tokenizer, data, sides, held_out, world)
        if stop and number < args.end_stage:
            Logger(f"stopped after stage {number}; go on with the same command and --resume")
            sys.exit(130)


if __name__ == "__main__":
    main()
