"""
在策略蒸馏：学生自己生成回答，教师（可以读到更多上下文）逐词元打分。
On-policy distillation: the student generates answers, and the teacher, which may have privileged
context E in its prompt, grades every token of them.

    prompt Q      the student samples an answer A from its own distribution q( . | Q, A so far)
    prompt Q+E    the teacher reads the same A and predicts each token, p( . | Q+E, A so far)
    loss          the mean of D(p, q) over the tokens of A

A student trained only on good answers never sees the states that its own mistakes lead to (exposure
bias); here it learns in them. Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649, Alg. 1;
--on_policy_fraction is its lambda. No gradient flows through the sampling. --objective minillm adds
this term by policy gradient:

    grad KL(q || p) of answers  =  sum over t of  grad KL(q || p) at t  -  R[t] grad log q(A[t])
    R[t]                        =  sum over u > t of  log p(A[u]) - log q(A[u])

Gu et al. 2023 (MiniLLM), https://arxiv.org/abs/2306.08543, Sec. 2.2: single-step decomposition (the
first term), length normalisation (R is a mean, or short answers win), teacher-mixed sampling with
importance weights. A baseline replaces its clipping.

When: answers are long, and one mistake leads to the next. On short answers it ties with the cheaper
methods at equal time: each of them learns 96 to 97 % of an experience (NOTES.md).

one process    python train_onpolicy.py --config configs/onpolicy_tiny.yaml
two processes  the same after torchrun --nproc_per_node 2, with --ddp
"""

import math
from collections import Counter
from functools import partial

import numpy as np
import torch

from dataset.lm_dataset import (MicroBatches, PromptDataset, in_order, make_loader, open_data,
                                prompts_and_answers)
from distill.flags import add_divergence_args, check_routed
from distill.fused import fused_distillation_loss
from distill.losses import DIVERGENCES, pick_divergence
from distill.rollouts import (Rollout, WeightedBatch, as_line, count_step, is_on_policy, mean_stats,
                              rollout_batches, rollout_stats, rounds)
from distill.teachers import (Teacher, make_teachers, share_vocabulary, teacher_outputs,
                              teacher_side)
from evaluation.validation import evaluate
from interop.checkpoint import load_model, load_teacher, prepare, run_name, save_model
from model.generate import Guide, sample
from model.lora import WithoutAdapters
from runtime.args import add_training_args, checking_input, lora_options, make_parser, parse_args
from runtime.checkpoint import end_run, load_resume, save_resume, start_progress
from runtime.log import Clock, Log, Logger, init_wandb
from runtime.optim import OPTIMIZERS, parameter_groups, trained_weights
from runtime.precision import autocast, seed_everything
from runtime.processes import (StopSignal, any_process, full_tensor, init_distributed_mode,
                               main_process_first, parallelize, release_gathered, sync_gradients)
from runtime.schedules import get_lr


def train_epoch(epoch, wandb, *, teachers,
                args, world, name, student, tokenizer, modules, optimizer, scaler, data, val_data,
                loader, progress, log, stop):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    clock, stats = Clock(world.device), Counter()
    for steps in rounds(progress.steps_of(epoch, data.steps_per_epoch), args.sample_every):
        # 0. Rollouts: the student answers the prompts of all steps of a round at once.
        batches = {step: [next(loader).to(world.device) for _ in range(args.accumulation_steps)]
                   for step in steps}
        seed_everything(args.seed, steps[-1], world.rank)
        with clock("sampling"):
            on_policy = {step: batches[step] for step in steps
                         if is_on_policy(step, args.seed, args.on_policy_fraction)}
            rollouts = sample_rollouts(on_policy, student, teachers, tokenizer,
                                       data.dataset.max_seq_len, args, world)

        for step in steps:
            # 1. Learning rate: linear warm-up, then cosine
            lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. Gradients: losses are summed over tokens and divided once by the tokens of the
            #    whole optimizer step, so any split into micro-batches gives the same step.
            micro_batches = [WeightedBatch(batch) for batch in batches[step]]
            if step in rollouts:
                stats += rollout_stats(rollouts[step], age=step - steps[0])
                micro_batches = count_step(rollout_batches(
                    rollouts[step], args.accumulation_steps, world.device,
                    args.teacher_share if args.objective == "minillm" else None), world)
            seed_everything(args.seed, step, world.rank)    # resuming repeats this step's dropout
            for micro, (batch, kd_weight, ce_weight) in enumerate(micro_batches):
                is_last = micro == len(micro_batches) - 1
                with clock("teacher"), torch.no_grad(), autocast(world.device, world.dtype):
                    predictions = teacher_outputs(teachers, batch).predictions
                with clock("student"):
                    with autocast(world.device, world.dtype), sync_gradients(modules, is_last):
                        out = modules["model"](batch.tokens, batch.lengths, at=batch.at,
                                               with_logits=False)
                        # The policy gradient is a weighted CE. Twice the mean of both is their sum.
                        alpha = 0.5 if ce_weight is not None else 0.0
                        loss, _, kd = fused_distillation_loss(
                            out.final, student.head, batch.targets, predictions, alpha,
                            args.temperature, divergence, kd_weight=kd_weight, ce_weight=ce_weight)
                        loss = loss / (1 - alpha) / batch.step_targets
                        balance = out.balance_loss / batch.step_samples
                        total = loss + student.config.aux_loss_alpha * balance
                    scaler.scale(total * world.size).backward()     # DDP averages, we need the sum
                log.add(len(batch.tokens), loss=total, kd=kd / batch.step_targets,
                        **({"balance": balance} if student.config.use_moe else {}))

            # 3. Update
            with clock("student"):
                scaler.unscale_(optimizer)
                grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
                if log.is_finite(grad_norm, scaler, args.max_bad_steps):
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                release_gathered(modules)
            progress.steps_done = step + 1

            # 4. Log, validate, save. No resume file holds rollouts: stop at the end of a round.
            log.step()
            if progress.is_due(args.log_interval) or progress.is_due(args.save_interval):
                log.row(step + 1, wandb, **mean_stats(stats, world.device), **clock.shares(), lr=lr,
                        grad_norm=full_tensor(grad_norm))
                stats.clear()
                if step in rollouts:
                    Logger(as_line(rollouts[step][0], tokenizer))
            if val_data is not None and progress.is_due(args.eval_interval):
                val_loader = in_order(val_data, world.rank, world.size)
                scores = evaluate(student, val_loader, world.device, dtype=world.dtype,
                                  teachers=teachers)
                log.row(step + 1, wandb, **scores)
                if progress.is_best(scores["val_kl"]):
                    save_model(student, tokenizer, f"{name}_best.pth")
            stopping = step == steps[-1] and stop.agreed(step + 1, world, every=1)
            if stopping or progress.is_due(args.save_interval):
                save_model(student, tokenizer, f"{name}.pth")
                save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
            if stopping:
                return


def sample_rollouts(batches, student, teachers, tokenizer, max_seq_len, args, world):
    """The student's answers to the prompts of batches: {step: [Batch]} -> {step: [Rollout]}."""
    requests = []                                       # (step, teacher, prompt, its prompt)
    teacher_limit = min(each.source.config.max_seq_len for each in teachers)
    for step, micro_batches in batches.items():
        rng = np.random.default_rng([args.seed, step, world.rank])
        for batch in micro_batches:
            for route, turns, teacher_turns in zip(batch.routes, prompts_and_answers(batch),
                                                   prompts_and_answers(batch.teacher or batch)):
                # A random turn of the conversation, of those that leave room for an answer.
                prompts = [(prompt, other) for (prompt, _), (other, _) in zip(turns, teacher_turns)
                           if len(prompt) < max_seq_len and len(other) < teacher_limit]
                for _ in range(args.num_samples):
                    requests.append((step, route, *prompts[rng.integers(len(prompts))]))
    prompts = [prompt for _, _, prompt, _ in requests]
    limits = [min(args.max_new_tokens, max_seq_len - len(prompt), teacher_limit - len(other))
              for _, _, prompt, other in requests]
    guide = None                                        # MiniLLM: a mixture with the teacher
    if args.objective == "minillm":
        guide = Guide(teachers[0].source, [other for *_, other in requests], args.teacher_share)

    answers = [None] * len(requests)
    any_busy = bool if args.shard == "none" else partial(any_process, device=world.device)
    student.eval()
    with autocast(world.device, world.dtype):
        for i, answer in sample(
                student, prompts, limits, tokenizer.end_of_turn, rows=args.rows, dtype=world.dtype,
                guide=guide, any_busy=any_busy,
                temperature=args.generation_temperature, top_p=args.top_p, top_k=args.top_k):
            answers[i] = answer
    student.train()
    rollouts = {step: [] for step in batches}
    for (step, route, prompt, other), answer in zip(requests, answers):
        rollouts[step].append(Rollout(prompt, other, answer, route))
    return rollouts


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations: prompts for the student; validation reads their answers")
    add("--teacher", nargs="+", action="extend", metavar="PATH[=WEIGHT]|NAME=PATH",
        help="teacher weights; those of --student with --lora_rank: it without its adapters")
    add("--teacher_data_path", nargs="+", default=None,
        help="context distillation: files with the same answers, row by row, to prompts with "
             "privileged context, which the teacher reads instead of --data_path")
    add("--student", "--weights", default="out/full_sft_512.pth", help="initial weights")
    add("--objective", default="gkd", choices=["gkd", "minillm"],
        help="a divergence at each token, or MiniLLM's policy gradient of the sequence-level "
             "reverse KL")
    add("--divergence", default="jsd", choices=[name for name in DIVERGENCES if name != "uld"],
        help="divergence from the teacher (distill/losses.py); minillm always uses reverse_kl")
    add("--temperature", type=float, default=1.0, help="softmax temperature in the loss")
    add("--on_policy_fraction", type=float, default=1.0,
        help="fraction of steps on rollouts, in [0, 1]; the others are on the answers of the data")
    add("--num_samples", type=int, default=1, help="rollouts per prompt")
    add("--generation_temperature", type=float, default=1.0, help="sampling temperature, above 0")
    add("--top_p", type=float, default=1.0, help="nucleus sampling: probability mass kept; 1: all")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0: from all")
    add("--max_new_tokens", type=int, default=256, help="maximum length of an answer, in tokens")
    add("--sample_every", type=int, default=1,
        help="steps per rollout phase; samples are stale by up to this value - 1 steps")
    add("--rows", type=int, default=64, help="rollouts generated at once, per process")
    add("--teacher_share", type=float, default=0.2,
        help="minillm: weight of the teacher in the sampling mixture, in (0, 1)")
    add("--epochs", type=int, default=1, help="passes over the prompts")
    add("--batch_size", type=int, default=16, help="prompts per micro-batch and process")
    add("--learning_rate", type=float, default=2e-5,
        help="learning rate; cosine decay from 1.1x to 0.1x of it")
    add_divergence_args(parser)
    add_training_args(parser)
    parser.set_defaults(optimizer="adamw")      # Muon also evens out the noise of few rollouts
    args = parse_args(parser)
    check(parser, args)

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models. A student with adapters can be its own teacher: the model without them.
        student, tokenizer = load_model(args.student)
        prepare(student, args.student, world, lora_options(args), args.grad_checkpoint,
                args.compile)
        if args.lora_rank and args.teacher == [args.student]:
            teachers = [Teacher(WithoutAdapters(student), 1.0, tokenizer)]
        else:
            load = partial(load_teacher, world=world, shard=args.shard, compiled=args.compile)
            teachers = make_teachers(args.teacher or ["out/full_sft_768.pth"], None, world.device,
                                     load)
        if share_vocabulary(teachers, [(student, tokenizer)]):
            args.teacher_data_path = args.teacher_data_path or args.data_path
        check_routed(teachers, args)
        if len(teachers) > 1 and args.objective == "minillm":
            raise ValueError("--objective minillm samples from one --teacher")

        # 4. Data: the prompts, and the answers for what is not on-policy
        max_seq_len = student.context_length(args.max_seq_len)
        other_side = teacher_side(teachers, tokenizer, args.data_path, args.teacher_data_path,
                                  max_seq_len)
        train_data, val_data = open_data(
            PromptDataset, args.data_path, tokenizer, max_seq_len, args.val_path,
            args.val_fraction, args.skip_bad_lines, main_process_first(world), Logger, other_side,
            [one.name for one in teachers])
        n_missing = np.count_nonzero(~train_data.answered())
        if n_missing and args.on_policy_fraction < 1:
            raise ValueError(f"{train_data}: {n_missing:,} of {len(train_data):,} samples have no "
                             f"answer, which {1 - args.on_policy_fraction:.0%} of the steps learn: "
                             "--on_policy_fraction 1")
        data = MicroBatches(train_data.with_room(Logger), args.batch_size, args.accumulation_steps,
                            world.rank, world.size, args.seed)

        # 5. Optimizer, and the step at which an interrupted run stopped
        name = run_name(args.out_dir, "full_onpolicy", student)
        modules = {"model": parallelize(student, world, args.shard, student.shard_units())}
        optimizer = OPTIMIZERS[args.optimizer](parameter_groups(modules, args.weight_decay),
                                               lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, name, data, args.epochs, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)

    # 6. Train
    stop, wandb, log = StopSignal(), init_wandb(args, name, progress), Log(name, progress, world)
    Logger(f"{' + '.join(map(str, teachers))} -> student {student.config}")
    Logger(f"loss = {describe(args)}; {progress.total_steps} steps of {data.step_samples} prompts, "
           f"{args.num_samples} answers each")
    loader = make_loader(data, progress.steps_done, progress.total_steps, args.num_workers,
                         world.device)
    for epoch in progress.epochs(data.steps_per_epoch):
        train_epoch(epoch, wandb, teachers=teachers,
                    args=args, world=world, name=name, student=student, tokenizer=tokenizer,
                    modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    val_data=val_data, loader=loader, progress=progress, log=log, stop=stop)
        if stop.stopped:
            break
    end_run(log, wandb, progress, world)


def describe(args) -> str:
    _, divergence = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    whole = " of whole answers, by policy gradient" if args.objective == "minillm" else ""
    return (f"{args.temperature:g}^2 * {divergence} at T={args.temperature:g}{whole}, "
            f"on the student's own answers in {args.on_policy_fraction:.0%} of the steps")


def check(parser, args):
    """Values out of their range, and flags that do not go together."""
    if args.tokenizer:
        parser.error(f"--tokenizer {args.tokenizer} is for a randomly initialised model; "
                     "--student has its own")
    if args.objective == "minillm":
        args.divergence = "reverse_kl"
        needed = {"temperature": 1, "generation_temperature": 1, "top_p": 1, "top_k": 0,
                  "sample_every": 1}
        wrong = [f"--{flag} {value}" for flag, value in needed.items() if vars(args)[flag] != value]
        if wrong:
            parser.error("--objective minillm needs samples of the current step from the "
                         f"unmodified distributions: {' '.join(wrong)}")
    if args.teacher == [args.student] and not args.teacher_data_path:
        Logger("teacher and student are the same model with the same prompts, so the KD loss is "
               "zero. --teacher_data_path gives the teacher prompts with privileged context")
    if args.save_interval % args.sample_every:
        parser.error(f"--sample_every {args.sample_every} must divide --save_interval "
                     f"{args.save_interval}: no resume file holds rollouts")


if __name__ == "__main__":
    main()
