"""
在策略蒸馏：学生自己写回答，教师（可以读到更多的提示）逐词打分。
On-policy distillation: the student writes, and the teacher, who may be told more, grades every word of it.

    prompt Q      the student draws an answer A, word by word, from its own distribution q( . | Q, A so far)
    prompt Q+E    the teacher reads the same A and says at each place what it would have put, p( . | Q+E, A so far)
    loss          the mean of D(p, q) over the words of A

A student that reads only good answers has never seen where its own mistakes lead; here it learns there.
Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649, Alg. 1; --on_policy_fraction is its lambda: the share of
steps on the student's own answers, the others are on those of the data. (Ours is a mean over tokens, not first over
each answer's.) No gradient flows through the drawing, so that no word is blamed for what came of it later.
--objective minillm adds this, by policy gradient:

    gradient of KL(q || p) of whole answers  =  sum over t of  grad KL(q || p) at t  -  R[t] grad log q(A[t])
    R[t]                                     =  sum over u > t of  log p(A[u]) - log q(A[u])

Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Sec. 2.2, with its single-step decomposition (the first
term), its length normalisation (R is a mean, lest short answers pay), and answers that are drawn with the teacher's
help, for which importance weights make up. A baseline takes the place of its clipping.

When: answers are long, and a mistake leads to the next. Where they are short it ties with the cheaper ways at equal time: of an
experience 96 to 97 % is learned by each of them (NOTES.md).

one process    python train_onpolicy.py --config configs/onpolicy_tiny.yaml
two processes  torchrun --nproc_per_node 2 train_onpolicy.py --ddp --config configs/onpolicy_tiny.yaml
"""

import argparse
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import Batch, MicroBatches, SFTDataset, batch_of_answers, in_order, prompts_and_answers
from distill.fused import COMPARED, compare, fused_distillation_loss
from distill.losses import DIVERGENCES, pick_divergence
from interop.checkpoint import adapt, load_model, save_model
from model.generate import Guide, Sampled, sample
from distill.teachers import Base, Teacher, ask, check_vocabulary, only_words
from runtime.args import add_training_args, checking_input, parse_args
from runtime.log import Clock, Logger
from runtime.precision import autocast, pick_dtype, seed_everything
from runtime.processes import init_distributed_mode, sum_over_processes
from runtime.run import Run, open_data, place_frozen


COIN = 1 << 20          # the coin's own stream of random numbers, beside those of the ranks, which count from 0


class Rollout(NamedTuple):
    """What the student wrote."""

    prompt: list[int]
    teacher_prompt: list[int]       # what the teacher reads in its place
    answer: Sampled


class Graded(NamedTuple):
    """A micro-batch, and what each of its tokens weighs in the loss."""

    batch: Batch
    kd_weight: torch.Tensor | None = None       # (S,) of the divergence; None: 1
    ce_weight: torch.Tensor | None = None       # (S,) of -log q; None: 0


def train_epoch(epoch, wandb, run, teacher, student, tokenizer, val_data):
    args, device = run.args, run.world.device
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    clock, facts = Clock(device), Counter()
    for steps in rounds(run.steps_of(epoch), args.sample_every):
        # The student writes, for all steps of a round at once: the more rows, the faster.
        data = {step: [batch for batch, _ in run.micro_batches(step)] for step in steps}
        with clock("sampling"):
            asking = {step: data[step] for step in steps if is_on_policy(step, args)}
            rollouts = write(asking, student, teacher, tokenizer, run)

        for step in steps:
            graded = [Graded(batch) for batch in data[step]]
            if step in rollouts:
                facts += facts_of(rollouts[step], age=step - steps[0])
                graded = micro_batches(rollouts[step], args, device)
            n_targets = torch.tensor(sum(len(each.batch.targets) for each in graded), device=device)
            n_targets = sum_over_processes(n_targets).item()
            n_samples = run.world.size * sum(len(each.batch.lengths) for each in graded)
            looking, seen = run.is_due(args.log_interval, ahead=1), {}
            seed_everything(args.seed, step, run.world.rank)
            for i, (batch, kd_weight, ce_weight) in enumerate(graded):
                # The teacher reads the same answers, under its own prompt.
                with clock("teacher"), torch.no_grad(), autocast(device, run.dtype):
                    taught = ask([teacher], batch, tokenizer, args)

                # The student learns. Sums over tokens, divided once by the tokens of the whole step.
                with clock("student"):
                    with run.forward(last=i == len(graded) - 1):
                        out = run.parallel["model"](batch.tokens, batch.lengths, at=batch.at, with_logits=False)
                        head = only_words(student.head, tokenizer, args)
                        # Of both parts in full, which are mixed as halves, or of the divergence alone.
                        alpha = 0.5 if ce_weight is not None else 0.0
                        loss, _, kd = fused_distillation_loss(
                            out.final, head, batch.targets, taught.said, alpha, args.temperature, divergence,
                            kd_weight=kd_weight, ce_weight=ce_weight)
                        loss = loss / (1 - alpha)
                    loss, parts = loss / n_targets, {"kd": kd / n_targets}
                    if student.config.use_moe:
                        parts["balance"] = out.balance_loss / n_samples
                        loss = loss + student.config.aux_loss_alpha * parts["balance"]
                    if looking:
                        with autocast(device, run.dtype):
                            now = compare(out.final, head, batch.targets, taught.said)
                        seen = {name: seen.get(name, 0.0) + now[name] / n_targets for name in ("kl", "agreement")}
                    run.backward(loss)
                    run.log.add(len(batch.tokens), loss=loss, **parts)
            with clock("student"):
                rates = run.update(step)

            if run.is_due(args.log_interval) or run.is_due(args.save_interval):
                seen = {name: sum_over_processes(value) for name, value in seen.items()}
                run.log.row(run.steps_done, wandb, **seen, **in_means(facts, device), **clock.shares(), **rates)
                facts.clear()
                if step in rollouts:
                    Logger(in_words(rollouts[step][0], tokenizer))
            if val_data is not None and run.is_due(args.eval_interval):
                scores = evaluate(student, val_data, teacher, tokenizer, run)
                run.log.row(run.steps_done, wandb, **scores)
                if run.is_best(scores["val_kl"]):
                    save_model(student, tokenizer, f"{args.out_dir}/{run.name}_best.pth")
            # What is written ahead is in no resume file: saves and stops wait for the end of a round.
            stopping = step == steps[-1] and run.must_stop(every=1)
            if stopping or run.is_due(args.save_interval):
                save_model(student, tokenizer, f"{args.out_dir}/{run.name}.pth")
                run.save()
            if stopping:
                return


def rounds(steps: range, sample_every: int) -> list[range]:
    """The steps in groups that end at multiples of sample_every: (2 ... 8, 4) -> 2 3 | 4 5 6 7 | 8"""
    firsts = [step for step in steps if step == steps[0] or step % sample_every == 0]
    return [range(first, end) for first, end in zip(firsts, [*firsts[1:], steps.stop])]


def is_on_policy(step: int, args) -> bool:
    """A coin, which falls the same way on all processes."""
    return np.random.default_rng([args.seed, step, COIN]).random() < args.on_policy_fraction


def write(data: dict[int, list[Batch]], student, teacher, tokenizer, run) -> dict[int, list[Rollout]]:
    """What the student answers to the prompts of these steps: {step: micro-batches} -> {step: rollouts}."""
    args, asked = run.args, []                                  # (step, prompt, the teacher's)
    limit, its_limit = run.data.dataset.max_seq_len, teacher.source.config.max_seq_len
    for step, batches in data.items():
        draw = np.random.default_rng([args.seed, step, run.world.rank])
        for batch in batches:
            for own, its in zip(prompts_and_answers(batch), prompts_and_answers(batch.teacher or batch)):
                # Of a conversation's turns one that leaves room for an answer, drawn anew each time.
                prompts = [(prompt, other) for (prompt, _), (other, _) in zip(own, its)
                           if len(prompt) < limit and len(other) < its_limit]
                for _ in range(args.num_samples):
                    asked.append((step, *prompts[draw.integers(len(prompts))]))
    prompts, teacher_prompts = [prompt for _, prompt, _ in asked], [other for _, _, other in asked]
    guide = Guide(teacher.source, teacher_prompts, args.teacher_share) if args.objective == "minillm" else None
    limits = [min(args.max_new_tokens, limit - len(prompt), its_limit - len(other)) for _, prompt, other in asked]

    answers = [None] * len(asked)
    student.eval()
    # Drawn from the generator that run.micro_batches has just seeded by the step: a resumed run draws the same.
    with autocast(run.world.device, run.dtype):
        for i, answer in sample(student, prompts, limits, tokenizer.end_of_turn, rows=args.rows, dtype=run.dtype,
                                guide=guide, vocab_size=tokenizer.vocab_size, any_busy=run.any_busy,
                                temperature=args.generation_temperature, top_p=args.top_p, top_k=args.top_k):
            answers[i] = answer
    student.train()
    rollouts = {step: [] for step in data}
    for (step, *both), answer in zip(asked, answers):
        rollouts[step].append(Rollout(*both, answer))
    return rollouts


def micro_batches(rollouts: list[Rollout], args, device) -> list[Graded]:
    """A step's rollouts as its micro-batches, those of like length together."""
    rollouts = sorted(rollouts, key=lambda rollout: len(rollout.prompt) + len(rollout.answer.tokens))
    weights = [()] * len(rollouts)
    if args.objective == "minillm":
        weights = policy_gradient([rollout.answer for rollout in rollouts], args.teacher_share)
    graded = []
    for part in np.array_split(np.arange(len(rollouts)), args.accumulation_steps):
        prompts, teacher_prompts, sampled = zip(*(rollouts[i] for i in part))
        answers = [answer.tokens for answer in sampled]
        batch = batch_of_answers(prompts, answers)._replace(teacher=batch_of_answers(teacher_prompts, answers))
        graded.append(Graded(batch.to(device), *(torch.cat(each).to(device) for each in zip(*(weights[i] for i in part)))))
    return graded


def policy_gradient(sampled: list[Sampled], teacher_share: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """MiniLLM's weights of the divergence and of -log q at each token of each answer, w and w (R - baseline): (T,), (T,).

    w[t] = q / (share p + (1 - share) q) of the token drawn, which makes up for the teacher's share in the drawing. R[t]
    is the mean of log p - log q over the tokens after t; the last has none, and 0. The baseline is the mean R of the
    other answers: it changes nothing on average, and spares each word the blame for how far all of them still are from
    the teacher.
    """
    gaps = [torch.tensor(answer.log_p) - torch.tensor(answer.log_q) for answer in sampled]
    returns = [(gap.flip(0).cumsum(0).flip(0) - gap)[:-1] / torch.arange(len(gap) - 1, 0, -1) for gap in gaps]  # (T - 1,)
    total, n = sum(R.sum() for R in returns), sum(map(len, returns))
    weights = []
    for gap, R in zip(gaps, returns):
        weight = 1 / (teacher_share * gap.exp() + 1 - teacher_share)
        baseline = (total - R.sum()) / max(1, n - len(R))
        weights.append((weight, weight * torch.cat([R - baseline, torch.zeros(1)])))
    return weights


# What tells whether a student that feeds on its own text collapses: it writes ever shorter or without an end, is ever
# surer of itself, and repeats itself.


def facts_of(rollouts: list[Rollout], age: int) -> Counter:
    """Sums over the answers of one step, on this process."""
    answers = [rollout.answer for rollout in rollouts]
    return Counter({"answers": len(answers), "tokens": sum(len(answer.tokens) for answer in answers),
                    "entropy": sum(sum(answer.entropy) for answer in answers),
                    "repetition": sum(repetition(answer.tokens) for answer in answers),
                    "finished": sum(answer.finished for answer in answers), "age": age * len(answers)})


def repetition(tokens: list[int], n: int = 4) -> float:
    """The share of an answer's n-grams that it has written before. Welleck et al. 2019, https://arxiv.org/abs/1908.04319,
    Sec. 6.1, seq-rep-n."""
    grams = [tuple(tokens[i:i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def in_means(facts: Counter, device) -> dict[str, float]:
    """Such sums of all processes as means: entropy in nats per token, length in tokens, age in steps, the others as shares.
    Nothing, if nothing was written."""
    names = ("answers", "tokens", "entropy", "repetition", "finished", "age")
    sums = sum_over_processes(torch.tensor([facts[name] for name in names], dtype=torch.float64, device=device))
    n, n_tokens, entropy, repeated, finished, age = sums.tolist()
    return {} if n == 0 else {"length": n_tokens / n, "entropy": entropy / n_tokens, "repetition": repeated / n,
                              "finished": finished / n, "age": age / n}


def in_words(rollout: Rollout, tokenizer) -> str:
    """What was asked and answered, as one line."""
    asked, said = tokenizer.decode(rollout.prompt), tokenizer.decode(rollout.answer.tokens)
    return f"    {asked[-200:]!r} -> {said[:200]!r}"


@torch.no_grad()
def evaluate(student, val_data, teacher, tokenizer, run):
    """Means over the answers' tokens of the held-out data, of what distill.fused.compare describes."""
    student.eval()
    sums = torch.zeros(len(COMPARED) + 1, dtype=torch.float64, device=run.world.device)
    for batch in run.share(in_order(val_data)):
        batch = batch.to(run.world.device)
        with autocast(run.world.device, run.dtype):
            taught = ask([teacher], batch, tokenizer, run.args)
            out = student(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            scores = compare(out.final, only_words(student.head, tokenizer, run.args), batch.targets, taught.said)
        sums += torch.stack([*scores.values(), torch.tensor(len(batch.targets), device=run.world.device)])
    student.train()
    *sums, n = sum_over_processes(sums).tolist()
    return {f"val_{name}": value / n for name, value in zip(COMPARED, sums)}


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations: the student answers their prompts, and validation reads their answers")
    add("--teacher", default="out/full_sft_768.pth", help="its weights. If they are also the student's, and --lora_rank trains "
        "adapters, the teacher is the student without them, and no second copy is in memory")
    add("--teacher_data_path", nargs="+", default=None, help="what the teacher reads in place of --data_path: the same answers, "
        "row by row, to prompts that tell more, so that the student learns to do without")
    add("--student", "--weights", default="out/full_sft_512.pth", help="weights to start from")
    add("--objective", default="gkd", choices=["gkd", "minillm"], help="a divergence at each token, or the policy gradient "
        "of MiniLLM, the reverse KL of whole answers")
    add("--divergence", default="jsd", choices=[name for name in DIVERGENCES if name != "uld"],
        help="between teacher and student, see distill/losses.py; minillm: reverse_kl")
    add("--beta", type=float, default=0.5, help="of jsd, in [0, 1]: 0 is forward KL, 1 reverse KL")
    add("--jsd_normalised", action="store_true", help="divide jsd by beta (1 - beta), so that it tends to them at its ends")
    add("--skew", type=float, default=0.1, help="of the skew KLs, in (0, 1): share of the other one that is mixed in")
    add("--temperature", type=float, default=1.0, help="of the loss: softens both distributions; 1 leaves them")
    add("--on_policy_fraction", type=float, default=1.0, help="share of steps in [0, 1] on the student's own answers; the others "
                                                              "are on those of the data")
    add("--num_samples", type=int, default=1, help="answers to each prompt")
    add("--generation_temperature", type=float, default=1.0, help="of the drawing, above 0; 1: as the student has it")
    add("--top_p", type=float, default=1.0, help="draw from the smallest set that has this probability; 1: from all")
    add("--top_k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    add("--sample_every", type=int, default=1, help="steps whose answers are written at once: faster, but the last of them are "
                                                    "of a student so many steps younger, less one")
    add("--rows", type=int, default=64, help="answers under way at once, per process")
    add("--teacher_share", type=float, default=0.2, help="minillm: of the teacher in the distribution drawn from, in (0, 1)")
    add("--pad_vocab", action="store_true", help="leave out the columns beyond the tokenizer's words, with which a model "
                                                 "family rounds its vocabulary up")
    add("--epochs", type=int, default=1, help="passes over the prompts")
    add("--batch_size", type=int, default=16, help="prompts per micro-batch and process")
    add("--learning_rate", type=float, default=2e-5, help="of the cosine, which runs from 1.1 to 0.1 times this")
    add_training_args(parser)
    args = parse_args(parser)
    check(parser, args)

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models
        student, tokenizer = load_model(args.student)
        student.train()
        Logger(f"student {student.config}: {student.n_parameters() / 1e6:.2f} M parameters, from {args.student}")
        if args.lora_rank:
            Logger(adapt(student, args.student, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets))
        teacher = init_teacher(args, student, tokenizer, world)
        check_vocabulary([teacher], student, tokenizer, args)

        # 4. Data. Of each row the prompts, and the answers for what is not on-policy.
        train_data, val_data = open_data(SFTDataset, args, tokenizer, student.config, world,
                                                 teacher if args.teacher_data_path else None, args.teacher_data_path)
        limit = teacher.source.config.max_seq_len
        if train_data.max_seq_len > limit and not args.teacher_data_path:
            raise ValueError(f"the student reads {train_data.max_seq_len} tokens, the teacher was made for {limit}: "
                             f"--max_seq_len {limit}")
        train_data = train_data.with_room(Logger)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank, world.size, args.seed)

        # 5. Optimizer, precision, and where an interrupted run stood
        name = f"full_onpolicy_{student.config.dim}{student.config.moe_path}{'_lora' if args.lora_rank else ''}"
        run = Run(name, args, world, {"model": student}, data)

    # 6. Train
    Logger(f"{teacher.source.config} teaches {student.config}; {loss_in_words(args)}; {run.total_steps} steps of "
           f"{data.step_samples} prompts, {args.num_samples} answers each")
    for epoch in run.epochs:
        train_epoch(epoch, run.wandb, run, teacher, student, tokenizer, val_data)
    run.close()


def check(parser, args):
    """Numbers out of their range, and what cannot go together."""
    if args.tokenizer:
        parser.error(f"--tokenizer {args.tokenizer} is for a model that starts from nothing; --student has its own")
    if args.objective == "minillm":
        args.divergence = "reverse_kl"
        needed = [f"--{name} {right}" for name, right in (("temperature", 1), ("generation_temperature", 1), ("top_p", 1),
                                                          ("top_k", 0), ("sample_every", 1)) if vars(args)[name] != right]
        if needed:
            parser.error("--objective minillm is the gradient for answers drawn now, from the distributions as they are: "
                         f"{' '.join(needed)}")
    if args.teacher == args.student and not args.teacher_data_path:
        Logger(f"{args.teacher} is teacher and student and reads the same prompts: it can teach itself nothing. "
               "--teacher_data_path names what it is told besides, as the teacher")
    for name, fits, needed in (
            ("beta", 0.0 <= args.beta <= 1.0, "lie in [0, 1]"),
            ("skew", 0.0 < args.skew < 1.0, "lie between 0 and 1; at 0 it is the plain KL"),
            ("temperature", args.temperature > 0, "be above 0"),
            ("on_policy_fraction", 0.0 <= args.on_policy_fraction <= 1.0, "lie in [0, 1]"),
            ("num_samples", args.num_samples >= 1, "be 1 or more"),
            ("generation_temperature", args.generation_temperature > 0, "be above 0"),
            ("top_p", 0.0 < args.top_p <= 1.0, "lie in (0, 1]"),
            ("top_k", args.top_k >= 0, "be 0 or more"),
            ("max_new_tokens", args.max_new_tokens >= 1, "be 1 or more"),
            ("sample_every", args.sample_every >= 1, "be 1 or more"),
            ("sample_every", args.save_interval % max(1, args.sample_every) == 0,
             f"divide --save_interval {args.save_interval}: what is written ahead is in no resume file"),
            ("rows", args.rows >= 1, "be 1 or more"),
            ("teacher_share", 0.0 < args.teacher_share < 1.0, "lie between 0 and 1")):
        if not fits:
            parser.error(f"--{name} {vars(args)[name]} must {needed}")


def init_teacher(args, student, tokenizer, world) -> Teacher:
    """Its own weights; or the student's, without the adapters."""
    if args.lora_rank and args.teacher == args.student:
        Logger(f"teacher: {args.teacher} too, without the adapters")
        return Teacher(Base(student), 1.0, tokenizer)
    dtype = torch.bfloat16 if pick_dtype(args.dtype, world.device) == torch.bfloat16 else torch.float32
    # What will be shared out need not fit on one device.
    model, its_tokenizer = load_model(args.teacher, "cpu" if args.shard == "zero3" else world.device, dtype)
    Logger(f"teacher {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {args.teacher}")
    return Teacher(place_frozen(model.requires_grad_(False), args, world), 1.0, its_tokenizer)


def loss_in_words(args) -> str:
    _, divergence = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    return (f"loss = {args.temperature:g}^2 * {divergence} at T={args.temperature:g}"
            + (" of whole answers, by policy gradient" if args.objective == "minillm" else "")
            + f", on the student's own answers in {args.on_policy_fraction:.0%} of the steps")


if __name__ == "__main__":
    main()
