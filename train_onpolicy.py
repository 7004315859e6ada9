"""
在策略蒸馏：学生自己生成回答，教师（可以读到更多上下文）逐词元打分。
On-policy distillation: the student generates answers, and the teacher, which may have privileged
context E in its prompt, grades every token of them.

    prompt Q      the student samples an answer A from its own distribution q( . | Q, A so far)
    prompt Q+E    the teacher reads the same A and predicts each token, p( . | Q+E, A so far)
    loss          the mean of D(p, q) over the tokens of A

A student trained only on good answers never sees the states that its own mistakes lead to (exposure
bias); here it learns in them. No gradient flows through the sampling. The objectives:

gkd       D of the two distributions at each token. Agarwal et al. 2023 (GKD),
          https://arxiv.org/abs/2306.13649, Alg. 1; --on_policy_fraction is its lambda.
pg        - advantage * log q(A[t]), where advantage = log p(A[t]) - log q(A[t]) as q was when it
          sampled: the gradient of KL(q || p) at each token, from one probability of it. With
          --reward r of the whole answer, advantage = (1 - W) (log p - log q) + W r; W = 1 is GRPO,
          without a teacher. Lesson 15. q is the student at --generation_temperature.
minillm   gkd with KL(q || p), and - R[t] log q(A[t]), where R[t] is the mean of log p - log q after
          t: the gradient of the KL of whole answers. Gu et al. 2023 (MiniLLM),
          https://arxiv.org/abs/2306.08543, Sec. 2.2, with a baseline instead of clipping.

The teacher can be the student that is shown more: --privileged puts an exchange before the prompt
in which it was answered right, by the data or by another rollout. Lesson 16.

When: answers are long and prompts few. From 64 prompts it solves 93 % of a world of reasoning, and
SFT 35 (lesson 14). With many prompts, or short answers, it ties with the cheaper methods.

one process    python train_onpolicy.py --config configs/onpolicy_tiny.yaml
two processes  the same after torchrun --nproc_per_node 2, with --ddp
"""

import copy
import math
import time
from argparse import Namespace
from collections import Counter
from functools import partial

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dataset.lm_dataset import (MicroBatches, PromptDataset, in_order, make_loader, open_data,
                                prompts_and_answers)
from distill.flags import (add_divergence_args, check_onpolicy_args, check_routed,
                           describe_onpolicy)
from distill.fused import fused_distillation_loss
from distill.losses import DIVERGENCES, pick_divergence
from distill.rollouts import (Rollout, WeightedBatch, as_line, count_step, grade, is_on_policy,
                              load_reward, mean_stats, policy_loss, rollout_batches, rollout_stats,
                              rounds, warn_of_collapse)
from distill.served import add_served_args, make_served
from distill.teachers import (Teacher, make_teachers, share_vocabulary, teacher_outputs,
                              teacher_side)
from evaluation.validation import evaluate
from interop.checkpoint import load_model, load_teacher, prepare, run_name, save_model
from model.generate import Guide, sample
from model.lora import WithoutAdapters
from runtime.args import add_training_args, checking_input, make_parser, model_options, parse_args
from runtime.checkpoint import end_run, load_resume, save_resume, start_progress
from runtime.log import Log, Logger, init_wandb
from runtime.optim import OPTIMIZERS, parameter_groups, trained_weights
from runtime.precision import autocast, seed_everything
from runtime.processes import (StopSignal, any_process, full_tensor, init_distributed_mode,
                               main_process_first, parallelize, release_gathered, sync_gradients)
from runtime.schedules import get_lr


def train_epoch(epoch, wandb, *, teachers, reward,
                args, world, name, student, tokenizer, modules, optimizer, scaler, data, val_data,
                loader, progress, log, stop):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    divergence, _ = pick_divergence(args.divergence, args.beta, args.skew, args.jsd_normalised)
    stats = Counter()
    spent = progress.memory.setdefault("spent", {"sampled_tokens": 0, "cpu_seconds": 0.0})
    for steps in rounds(progress.steps_of(epoch, data.steps_per_epoch), args.sample_every):
        # 0. Rollouts: the student answers the prompts of all steps of a round at once.
        started = time.process_time()
        batches = {step: [next(loader).to(world.device) for _ in range(args.accumulation_steps)]
                   for step in steps}
        seed_everything(args.seed, steps[-1], world.rank)
        on_policy = {step: batches[step] for step in steps
                     if is_on_policy(step, args.seed, args.on_policy_fraction)}
        rollouts = sample_rollouts(on_policy, student, teachers, reward, tokenizer,
                                   data.dataset.max_seq_len, args, world)
        lost = args.teacher_url and any_process(not teachers[0].source.reads(
            [each.teacher_prompt + each.answer.tokens[:-1]
             for of_step in rollouts.values() for each in of_step]), world.device)

        for step in () if lost else steps:
            # 1. Learning rate: linear warm-up, then cosine
            lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # 2. Gradients: losses are summed over tokens and divided once by the tokens of the
            #    whole optimizer step, so any split into micro-batches gives the same step.
            micro_batches = [WeightedBatch(batch) for batch in batches[step]]
            if step in rollouts:
                stats.update(rollout_stats(rollouts[step], age=step - steps[0]))
                micro_batches = count_step(rollout_batches(
                    rollouts[step], args.accumulation_steps, world.device, data.dataset,
                    args.teacher_share if args.objective == "minillm" else None), world)
                spent["sampled_tokens"] += micro_batches[0].batch.step_targets
            seed_everything(args.seed, step, world.rank)    # resuming repeats this step's dropout
            for micro, weighted in enumerate(micro_batches):
                batch, kd_weight, ce_weight, *_ = weighted
                is_last = micro == len(micro_batches) - 1
                with torch.no_grad(), autocast(world.device, world.dtype):
                    predictions, matched, _ = teacher_outputs(teachers, batch)
                    kd_weight = kd_weight if matched is None else matched
                with autocast(world.device, world.dtype), sync_gradients(modules, is_last):
                    out = modules["model"](batch.tokens, batch.lengths, at=batch.at,
                                           with_logits=False)
                    if args.objective == "pg" and step in rollouts:
                        loss, terms = policy_loss(out.final, student.head, weighted, predictions,
                                                  args.temperature, args.reward_weight)
                    else:
                        # R log q is a weighted CE. Twice the mean of both is their sum.
                        alpha = 0.5 if ce_weight is not None else 0.0
                        loss, _, kd = fused_distillation_loss(
                            out.final, student.head, batch.targets, predictions, alpha,
                            args.temperature, divergence, kd_weight=kd_weight,
                            ce_weight=ce_weight)
                        loss, terms = loss / (1 - alpha), {"kd": kd}
                    loss = loss / batch.step_targets
                    balance = out.balance_loss / batch.step_samples
                    total = loss + student.config.aux_loss_alpha * balance
                scaler.scale(total * world.size).backward()     # DDP averages, we need the sum
                log.add(len(batch.tokens), loss=total,
                        **{name: value / batch.step_targets for name, value in terms.items()},
                        **({"balance": balance} if student.config.use_moe else {}))

            # 3. Update
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
            if log.is_finite(grad_norm, scaler):
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            release_gathered(modules)
            if args.teacher_ema is not None:        # teacher <- D * teacher + (1 - D) * student
                get_ema_multi_avg_fn(args.teacher_ema)(
                    [*modules["teacher"].parameters()], [*student.parameters()], None)
            progress.steps_done = step + 1
            spent["cpu_seconds"] += time.process_time() - started

            # 4. Log, validate, save. No resume file holds rollouts: save at the end of a round.
            log.step()
            saving = step == steps[-1] and progress.is_due(args.save_interval, len(steps))
            if progress.is_due(args.log_interval) or saving:
                means = mean_stats(stats, world.device)
                sample = as_line(rollouts[step][0], tokenizer) if step in rollouts else None
                log.row(step + 1, wandb, sample, **log.means(), **means, **spent, lr=lr,
                        grad_norm=full_tensor(grad_norm))
                warn_of_collapse(means, progress.memory)
                stats.clear()
            if val_data is not None and progress.is_due(args.eval_interval):
                val_loader = in_order(val_data, world.rank, world.size)
                scores = evaluate(student, val_loader, world.device, dtype=world.dtype,
                                  teachers=teachers)
                accuracy = own_accuracy(student, val_data, tokenizer, args, world)
                log.row(step + 1, wandb, val_accuracy=accuracy, **scores, **spent)
                loss = scores["val_kl" if teachers else "val_loss"]
                if progress.is_best(1e-3 * loss / (1 + loss) - accuracy):   # the loss breaks ties
                    save_model(student, tokenizer, f"{name}_best.pth")
            stopping = step == steps[-1] and stop.agreed(step + 1, world, every=1)
            if stopping or saving:
                save_model(student, tokenizer, f"{name}.pth")
                save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
            if stopping:
                return
            started = time.process_time()
        if lost:                                # a round without its teacher is not begun
            save_model(student, tokenizer, f"{name}.pth")
            save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
            stop.stopped = True
            return


def sample_rollouts(batches, student, teachers, reward, tokenizer, max_seq_len, args, world):
    """The student's answers to the prompts of batches: {step: [Batch]} -> {step: [Rollout]}."""
    requests, step_of = [], []                          # Rollouts without an answer
    teacher_limit = min([each.source.config.max_seq_len for each in teachers] or [max_seq_len])
    for step, micro_batches in batches.items():
        rng = np.random.default_rng([args.seed, step, world.rank])
        for batch in micro_batches:
            for route, turns, teacher_turns in zip(batch.routes, prompts_and_answers(batch),
                                                   prompts_and_answers(batch.teacher or batch)):
                # A random turn of the conversation, of those that leave room for an answer.
                turns = [Rollout(prompt, other, None, gold, route=route)
                         for (prompt, gold), (other, _) in zip(turns, teacher_turns)
                         if len(prompt) < max_seq_len and len(other) < teacher_limit]
                requests += [turns[rng.integers(len(turns))]] * args.num_samples
                step_of += [step] * args.num_samples
    limits = [min(args.max_new_tokens, max_seq_len - len(each.prompt),
                  teacher_limit - len(each.teacher_prompt)) for each in requests]
    guide = None                                        # MiniLLM: a mixture with the teacher
    if args.objective == "minillm":
        guide = Guide(teachers[0].source, [each.teacher_prompt for each in requests],
                      args.teacher_share)

    any_busy = bool if args.shard == "none" else partial(any_process, device=world.device)
    student.eval()
    with autocast(world.device, world.dtype):
        for i, answer in sample(
                student, [each.prompt for each in requests], limits, tokenizer.end_of_turn,
                rows=args.rows, dtype=world.dtype, guide=guide, any_busy=any_busy,
                log_q_temperature=args.temperature if args.objective == "pg" else 1.0,
                temperature=args.generation_temperature, top_p=args.top_p, top_k=args.top_k):
            requests[i] = requests[i]._replace(answer=answer)
    student.train()
    rollouts = {step: [] for step in batches}
    for first in range(0, len(requests), args.num_samples):
        group = requests[first:first + args.num_samples]
        rollouts[step_of[first]] += grade(group, reward, tokenizer, args.privileged, teacher_limit)
    return rollouts


def own_accuracy(student, data, tokenizer, args, world) -> float:
    """The fraction of right final answers among greedy ones to at most 200 validation prompts."""
    batch = data.batch(np.linspace(0, len(data) - 1, min(200, len(data))).astype(int))
    greedy = {"objective": "gkd", "num_samples": 1, "privileged": None, "generation_temperature": 0}
    answers = sample_rollouts({0: [batch._replace(teacher=None)]}, student, [],
                              load_reward("answer"), tokenizer, data.max_seq_len,
                              Namespace(**vars(args) | greedy), world)[0]
    return float(np.mean([each.reward for each in answers]))


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations: prompts for the student; validation reads their answers")
    add("--teacher", nargs="+", metavar="PATH[=WEIGHT]|NAME=PATH",
        help="weights; several are mixed, or each teaches the rows of its NAME; with --lora_rank "
             "--student too, without its adapters; default: out/full_sft_768.pth")
    add_served_args(add)
    add("--teacher_data_path", nargs="+", default=None,
        help="context distillation: the same rows with privileged context, for the teacher")
    add("--student", "--weights", default="out/full_sft_512.pth", help="initial weights")
    add("--objective", default="gkd", choices=["gkd", "pg", "minillm"],
        help="divergence at each token, policy gradient at each token, or that of whole answers")
    add("--reward", default=None, metavar="RULE_OR_FILE",
        help="reward of a rollout, logged, and used by pg: answer (1 if the final answer is the "
             "data's), or a Python file with reward(question, answer, gold)")
    add("--reward_weight", type=float, default=0.5,
        help="pg: weight of the reward in the advantage, in [0, 1]; 1: no teacher")
    add("--privileged", default=None, choices=["answer", "sibling"],
        help="what the teacher's prompt shows: the data's answer, or a rollout with reward above 0")
    add("--teacher_ema", type=float, default=None,
        help="decay per step, in [0, 1), of a moving average of the student, which is the teacher")
    add("--divergence", default="forward_kl",
        choices=DIVERGENCES,
        help="gkd's divergence from the teacher (distill/losses.py); gold takes another tokenizer")
    add("--temperature", type=float, default=1.0,
        help="softmax temperature in the loss; pg always uses --generation_temperature")
    add("--on_policy_fraction", type=float, default=1.0,
        help="fraction of steps on rollouts, in [0, 1]; the others are on the answers of the data")
    add("--num_samples", type=int, default=1, help="rollouts per prompt")
    add("--generation_temperature", type=float, default=1.0,
        help="sampling temperature, above 0; above 1 the student explores")
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
    check_onpolicy_args(parser, args)

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Models. A student with adapters can be its own teacher: the model without them.
        student, tokenizer = load_model(args.student)
        prepare(student, args.student, world, **model_options(args))
        reward = load_reward(args.reward) if args.reward else None
        teachers = []                                   # at --reward_weight 1
        if args.teacher_ema is not None:
            teachers = [Teacher(copy.deepcopy(student).to(world.device).eval(), 1.0, tokenizer)]
        elif args.lora_rank and args.teacher == [args.student]:
            teachers = [Teacher(WithoutAdapters(student), 1.0, tokenizer)]
        elif args.teacher or args.teacher_url:
            load = partial(load_teacher, world=world, shard=args.shard, compiled=args.compile)
            teachers = make_teachers(args.teacher, None, world.device, load, make_served(args))
        if share_vocabulary(teachers, [(student, tokenizer)], args.divergence):
            args.teacher_data_path = args.teacher_data_path or args.data_path
        check_routed(teachers, args)
        if len(teachers) > 1 and (args.objective != "gkd" and not teachers[0].name
                                  or args.objective == "minillm" or args.privileged):
            raise ValueError("several teachers: --objective gkd, or pg with routed ones, and no "
                             "--privileged")

        # 4. Data: the prompts, and the answers for what is not on-policy
        max_seq_len = student.context_length(args.max_seq_len)
        other_side = teacher_side(teachers, tokenizer, args.data_path, args.teacher_data_path,
                                  max_seq_len)
        train_data, val_data = open_data(
            PromptDataset, args.data_path, tokenizer, max_seq_len, args.val_path,
            args.val_fraction, args.skip_bad_lines, main_process_first(world), Logger, other_side,
            [one.name for one in teachers])
        val_data = val_data.with_room(Logger) if val_data else None
        needed = args.on_policy_fraction < 1 or "answer" in (args.reward, args.privileged)
        if needed and (n_missing := np.count_nonzero(~train_data.answered())):
            raise ValueError(
                f"{train_data}: {n_missing:,} of {len(train_data):,} samples have no answer, which "
                "--on_policy_fraction below 1, --reward answer and --privileged answer need")
        data = MicroBatches(train_data.with_room(Logger), args.batch_size, args.accumulation_steps,
                            world.rank, world.size, args.seed)

        # 5. Optimizer, and the step at which an interrupted run stopped
        name = run_name(args.out_dir, "full_onpolicy", student)
        modules = {"model": parallelize(student, world, args.shard, student.shard_units())}
        optimizer = OPTIMIZERS[args.optimizer](parameter_groups(modules, args.weight_decay),
                                               lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        if args.teacher_ema is not None:
            modules["teacher"] = teachers[0].source         # so the resume file holds it
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, name, data, args.epochs, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)

    # 6. Train
    stop, wandb, log = StopSignal(), init_wandb(args, name, progress), Log(name, progress, world)
    Logger(f"{' + '.join(map(str, teachers)) or 'no teacher'} -> student {student.config}")
    Logger(f"loss = {describe_onpolicy(args)}; {progress.total_steps} steps of "
           f"{data.step_samples} prompts, {args.num_samples} answers each")
    loader = make_loader(data, progress.steps_done, progress.total_steps, args.num_workers,
                         world.device)
    for epoch in progress.epochs(data.steps_per_epoch):
        train_epoch(epoch, wandb, teachers=teachers, reward=reward,
                    args=args, world=world, name=name, student=student, tokenizer=tokenizer,
                    modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    val_data=val_data, loader=loader, progress=progress, log=log, stop=stop)
        if stop.stopped:
            break
    end_run(log, wandb, progress, world)


if __name__ == "__main__":
    main()
