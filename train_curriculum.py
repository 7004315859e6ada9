"""
三阶段领域蒸馏：先学通用数据，再逐步增大领域数据的比例，最后专攻领域里最弱的类别。
Curriculum distillation in three stages: general data first, then a growing share of a domain, then
the domain's weakest categories.

    stage  data                         loss                           temperature
    1      general                      KL, a little CE                high: softer targets
    2      general + domain, 30 -> 70%  KL + CE + intermediate layers  lower; balanced gradients
    3      domain, general replay       CE, a little KL                1; weak categories more often

    loss = alpha * CE(student, label) + (1 - alpha) * T^2 * KL(teacher_T || student_T) + ...

The stages are rows of the table STAGES; --set changes single values, like --set 2.balance=none
3.epochs=4. Each stage is a run of its own, which starts from the student of the stage before.

When: a general student must learn a domain without forgetting. The curriculum costs 4.6 points of
general accuracy, training on the domain alone 30.7. But a fixed mix of both forgets as little, and
learns more of the domain (59.6 against 54.2 %, docs/curriculum.md).

    stage1_epoch-1.pth, ...   after each epoch
    stage1_best.pth           lowest validation CE, both sides weighted by the stage's last shares
    stage1_final.pth          at the end; the next stage starts from it
    distillation.log          everything printed; samples.md: answers of teacher and student

one process    python train_curriculum.py
two processes  torchrun --nproc_per_node 2 train_curriculum.py --ddp
"""

import math
import sys
from argparse import Namespace
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from dataset.domains import DOMAIN, GENERAL, mix_sides, open_sides
from dataset.lm_dataset import make_loader
from distill.balance import equal_norms, without_conflict
from distill.flags import add_intermediate_args, make_intermediate
from distill.fused import fused_distillation_loss
from distill.losses import DIVERGENCES, pick_divergence
from distill.stages import Stage, describe_stage, edit_stages
from distill.teachers import Teacher, share_vocabulary, teacher_outputs, teacher_side
from evaluation.domains import evaluate_sides, forgetting, log_exam, show_samples, weighted_loss
from evaluation.exam import read_exam
from interop.checkpoint import load_teacher, prepare, save_model, weight_file
from interop.sizes import init_student_model
from model.config import LMConfig
from runtime.args import (add_training_args, check_ranges, checking_input, make_parser,
                          model_options, parse_args, resume_command)
from runtime.checkpoint import end_run, load_resume, save_resume, set_aside, start_progress
from runtime.files import keep_previous
from runtime.log import LOG_FILES, Log, Logger, init_wandb
from runtime.optim import (OPTIMIZERS, give_gradient, parameter_groups, take_gradient,
                           trained_weights)
from runtime.precision import autocast, seed_everything
from runtime.processes import (StopSignal, init_distributed_mode, main_process_first, parallelize,
                               sum_over_processes, sync_gradients)
from runtime.schedules import get_lr

# Edit them in class. distill/stages.py explains the columns; the first is the domain's share.
STAGES = {
    "base": (       # for models of billions of weights
        Stage((0.0, 0.0), alpha=0.1, temperature=4.0, learning_rate=5e-5, batch_size=8, epochs=3),
        Stage((0.3, 0.7), alpha=0.3, temperature=2.0, learning_rate=3e-5, batch_size=6, epochs=3,
              balance="norm", feature_weight=0.1, attention_weight=0.1, contrastive_weight=0.05),
        Stage((1.0, 1.0), alpha=0.8, temperature=1.0, learning_rate=1e-5, batch_size=4, epochs=3,
              sampling="evaluation")),
    "tiny": (       # for the embedded data
        Stage((0.0, 0.0), alpha=0.0, temperature=1.0, learning_rate=5e-3, batch_size=12, epochs=3),
        Stage((0.3, 0.7), alpha=0.0, temperature=1.0, learning_rate=5e-3, batch_size=12, epochs=1,
              balance="norm"),
        Stage((0.8, 0.8), alpha=0.0, temperature=1.0, learning_rate=2e-3, batch_size=12, epochs=1,
              sampling="evaluation")),
}
# A randomly initialised student (--student none).
SIZES = {"base": LMConfig(dim=512, n_layers=8, max_seq_len=512),
         "tiny": LMConfig(dim=64, n_layers=2, n_heads=4, max_seq_len=128)}


def train_epoch(epoch, wandb, *, teachers,
                args, world, name, student, tokenizer, modules, optimizer, scaler, data, held_out,
                progress, log, stop):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    divergence, _ = pick_divergence(args.divergence)
    features, balanced = args.feature_weight > 0, args.balance != "none"
    steps = progress.steps_of(epoch, data.steps_per_epoch)
    loader = make_loader(data, steps.start, steps.stop, args.num_workers, world.device)
    for step in steps:
        # 1. Learning rate: linear warm-up, then cosine
        lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. Gradients: losses are summed over tokens and divided once by the tokens of the whole
        #    optimizer step, so any split into micro-batches and processes gives the same step.
        #    A balanced step has micro-batches of each side, divided by that side's tokens.
        seed_everything(args.seed, step, world.rank)    # resuming repeats this step's dropout
        gradients, norms, losses, n_targets, n_samples, n_tokens = {}, {}, {}, {}, {}, 0
        for side in (GENERAL, DOMAIN) if balanced else ("both",):
            losses[side] = Counter()
            for micro in range(args.accumulation_steps):
                batch = next(loader).to(world.device)
                communicate = not balanced and micro == args.accumulation_steps - 1
                n_targets[side], n_samples[side] = batch.step_targets, batch.step_samples
                if not batch.lengths:       # a small share leaves some processes without samples
                    continue
                with torch.no_grad(), autocast(world.device, world.dtype):
                    teacher = teacher_outputs(teachers, batch, return_hidden=features)
                with autocast(world.device, world.dtype), sync_gradients(modules, communicate):
                    out = modules["model"](batch.tokens, batch.lengths, at=batch.at,
                                           with_logits=False, return_hidden=features)
                    loss, ce, kd = fused_distillation_loss(out.final, student.head, batch.targets,
                                                           teacher.predictions, args.alpha,
                                                           args.temperature, divergence)
                    loss, ce, kd = (value / batch.step_targets for value in (loss, ce, kd))
                    intermediate, terms = modules["intermediate"](batch, out, teacher.out)
                    moe = out.balance_loss / batch.step_samples
                    total = loss + intermediate + student.config.aux_loss_alpha * moe
                scaler.scale(total * world.size).backward()     # the step needs the processes' sum
                n_tokens += len(batch.tokens)
                terms = {"loss": total, "ce": ce, "kd": kd, **terms,
                         **({"moe": moe} if student.config.use_moe else {})}
                losses[side].update({term: value.detach() for term, value in terms.items()})
            if balanced:
                gradients[side] = sum_over_processes(take_gradient(weights)) / world.size
        shares = {side: n / sum(n_targets.values()) for side, n in n_targets.items()}
        log.add(n_tokens, **{term: sum(share * losses[side][term] for side, share in shares.items())
                             for term in terms})
        if balanced:
            # The domain counts by its share of samples, as planned, however long its answers.
            found = (equal_norms(gradients, shares, n_samples) if args.balance == "norm" else
                     without_conflict(gradients, shares))
            give_gradient(weights, found.gradient)
            norms = found.before | {f"{side}_balanced": norm for side, norm in found.after.items()}
            norms = {f"grad_{side}": norm / scaler.get_scale() for side, norm in norms.items()}

        # 3. Update
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        if log.is_finite(grad_norm, scaler):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.steps_done = step + 1

        # 4. Log, validate, save. A save ends a row: a resumed run writes the same rows.
        log.step()
        epoch_ends = step + 1 == steps.stop
        if epoch_ends or progress.is_due(args.log_interval) or progress.is_due(args.save_interval):
            counts = data.counts(step + 1 - log.steps, step + 1)
            domain_share = 1 - counts.get(GENERAL, 0) / sum(counts.values())
            log.row(step + 1, wandb, **log.means(), lr=lr, grad_norm=grad_norm, **norms,
                    domain_share=domain_share)
        if held_out and (epoch_ends or progress.is_due(args.eval_interval)):
            loss = validate(wandb, args, world, student, teachers, tokenizer, data, held_out,
                            progress, log)
            show_samples(name, teachers[0].source, student, tokenizer, held_out, args.n_samples,
                         args.max_new_tokens, world, wandb, progress)
            if progress.is_best(loss):
                save_model(student, tokenizer, f"{name}_best.pth")
            if args.sampling == "evaluation":       # the loader has prepared the old shares
                loader = make_loader(data, step + 1, steps.stop, args.num_workers, world.device)
        if epoch_ends:
            save_model(student, tokenizer, f"{name}_epoch-{epoch + 1}.pth")
        stopping = stop.agreed(step + 1, world)
        if stopping or epoch_ends or progress.is_due(args.save_interval):
            save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        if stopping:
            return


def validate(wandb, args, world, student, teachers, tokenizer, data, held_out, progress, log):
    """Log losses, exam grades and what was forgotten since the stage began; then sample the
    domain's weak categories more often. Returns the CE at the shares that the stage ends with."""
    metrics, found = evaluate_sides(student, teachers, tokenizer, held_out, world,
                                    args.max_new_tokens)
    metrics = metrics | forgetting(metrics, progress.memory.setdefault("start", metrics))
    log.row(progress.steps_done, wandb, **{f"val_{key}": x for key, x in metrics.items()})
    if found and args.sampling == "evaluation" and progress.steps_done < progress.total_steps:
        # A category without questions counts as the domain's mean.
        scores = {name: found.get(name, found[DOMAIN]) for name in data.names if name != GENERAL}
        weights = {name: max(0.1, 1 - score) for name, score in scores.items()}
        data.reweigh(progress.steps_done, weights)
        progress.memory["history"] = data.history
        Logger("score -> share of the domain's samples from now on: " + "; ".join(
            f"{name} {scores[name]:.0%} -> {weight / sum(weights.values()):.0%}"
            for name, weight in weights.items()))
    return weighted_loss(metrics, args.share[1])


def train_stage(name, data, *, args, world, teachers, student, tokenizer, held_out, stop):
    with checking_input():
        # 5. Optimizer, and the step at which an interrupted run stopped
        intermediate = make_intermediate(args, student.config, teachers)
        modules = {"model": parallelize(student, world),
                   "intermediate": parallelize(intermediate, world)}
        optimizer = OPTIMIZERS[args.optimizer](parameter_groups(modules, args.weight_decay),
                                               lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, name, data, args.epochs, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        data.restore(progress.memory.get("history", []))

    # 6. Train
    wandb, log = init_wandb(args, name, progress), Log(name, progress, world)
    if progress.steps_done == 0 and held_out:
        validate(wandb, args, world, student, teachers, tokenizer, data, held_out, progress, log)
    for epoch in progress.epochs(data.steps_per_epoch):
        train_epoch(epoch, wandb, teachers=teachers,
                    args=args, world=world, name=name, student=student, tokenizer=tokenizer,
                    modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    held_out=held_out, progress=progress, log=log, stop=stop)
        if stop.stopped:
            break
    if progress.steps_done == progress.total_steps:
        save_model(student, tokenizer, f"{name}_final.pth")
    end_run(log, wandb, progress, world)


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("lesson").add_argument
    add("--teacher", "--teacher_model", default="out/full_sft_128.pth",
        help="teacher weights: a checkpoint, a Hugging Face folder or a GGUF file")
    add("--student", "--student_model", default="none",
        help="initial weights of the first stage; none: random, with --recipe's row of SIZES")
    add("--general_dataset", default="dataset/general.jsonl", help="general data: a file or folder")
    add("--domain_dataset", "--medical_dataset", default="dataset/specialist.jsonl",
        help="data of the domain: a file or folder, in the formats of dataset/dataset.md")
    add("--general_val_path", help="general validation data, or none; --val_path is the domain's")
    add("--recipe", default="tiny", choices=STAGES, help="row of STAGES")
    add("--set", nargs="+", default=[], metavar="STAGE.NAME=VALUE", help="changes of that row")
    add("--start_stage", type=int, default=1, choices=[1, 2, 3], help="first stage to run")
    add("--end_stage", type=int, default=3, choices=[1, 2, 3], help="last stage to run")
    add("--checkpoint_path", type=weight_file,
        help="initial weights of --start_stage, such as out/stage1_best")
    add("--divergence", default="forward_kl",
        choices=[name for name in DIVERGENCES if name not in ("jsd", "gold")],
        help="divergence from the teacher in all stages (distill/losses.py)")
    add("--eval_samples", type=int, default=400,
        help="maximum number of held-out samples, and of questions, of each side; 0: all")
    add("--max_new_tokens", type=int, default=32, help="maximum length of an exam answer, tokens")
    add("--n_samples", type=int, default=3, help="questions of each side shown in samples.md")
    add("--use_lora", action="store_true",
        help="adapters of rank 16, alpha 32, dropout 0.05; --lora_rank sets others")
    add("--fp16", action="store_const", const="float16", dest="dtype", default="auto",
        help="the same as --dtype float16")
    add_intermediate_args(parser, weights=False)
    add_training_args(parser)
    parser.set_defaults(val_fraction=0.1, eval_interval=0, weight_decay=0.01, warmup_iters=0.1)
    args = parse_args(parser, n_samples="[0, inf)")
    check_ranges(parser, args,
                 ("end_stage", args.end_stage >= args.start_stage, "be --start_stage or later"),
                 ("start_stage", args.start_stage == 1 or args.checkpoint_path, "have weights: "
                  f"--checkpoint_path {args.out_dir}/stage{args.start_stage - 1}_final.pth"),
                 ("shard", args.shard == "none", "be none; train_distillation.py can shard"))
    if args.use_lora and not args.lora_rank:
        args.lora_rank, args.lora_alpha, args.lora_dropout = 16, 32.0, 0.05

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if world.rank == 0 and not args.resume and args.start_stage == 1:
        for name in ("distillation.log", "samples.md"):
            keep_previous(out_dir / name)
    LOG_FILES.append(out_dir / "distillation.log")

    with checking_input():
        # 3. Models
        stages = edit_stages(STAGES[args.recipe], args.set, args.max_steps)
        teacher, its_tokenizer = load_teacher(args.teacher, world, compiled=args.compile)
        teachers = [Teacher(teacher, 1.0, its_tokenizer)]
        weights = args.checkpoint_path or args.student
        student, tokenizer = init_student_model(SIZES[args.recipe], weights=weights,
                                                vocabulary=args.tokenizer or its_tokenizer)
        if share_vocabulary(teachers, [(student, tokenizer)]):
            raise ValueError("a curriculum's teacher reads the student's tokens; distil these two "
                             "by train_distillation.py")
        prepare(student, weights, world, **model_options(args))

        # 4. Data. All stages are checked before the first begins.
        max_seq_len = student.context_length(args.max_seq_len)
        paths = {GENERAL: (args.general_dataset, args.general_val_path),
                 DOMAIN: (args.domain_dataset, args.val_path)}
        teacher_side(teachers, tokenizer, paths, None, max_seq_len)     # refuses longer samples
        with main_process_first(world):
            dataset, sides, held_out = open_sides(
                paths, tokenizer, max_seq_len, args.val_fraction, args.eval_samples, read_exam,
                args.skip_bad_lines, Logger)
        runs = {}
        for number in range(args.start_stage, args.end_stage + 1):
            stage = stages[number - 1]
            if stage.sampling == "evaluation" and not held_out.get(DOMAIN, (None, None))[1]:
                raise ValueError("sampling by evaluation needs held-out questions of the domain: "
                                 f"--val_path, --val_fraction, or --set {number}.sampling=uniform")
            data = mix_sides(dataset, sides, stage, args.accumulation_steps, world.rank,
                             world.size, args.seed)
            own = Namespace(**vars(args) | asdict(stage) | {"max_steps": len(data.shares)})
            make_intermediate(own, student.config, teachers)
            runs[number] = own, data

    if not args.resume:     # a later --resume must not find the stages of an earlier run
        for number in range(args.start_stage, 4) if world.rank == 0 else ():
            set_aside(out_dir / f"stage{number}")
            for path in out_dir.glob(f"stage{number}.resume*"):
                path.unlink()
        log_exam("the teacher itself", teacher, its_tokenizer, held_out, args.max_new_tokens, world)

    # 5. and 6. Train the stages one after the other
    stop = StopSignal()
    for number, (own, data) in runs.items():
        Logger(f"stage {number}: {describe_stage(stages[number - 1])}; "
               f"{own.max_steps} steps of {data.step_samples} samples")
        seed_everything(args.seed, number)
        train_stage(f"{args.out_dir}/stage{number}", data, args=own, world=world,
                    teachers=teachers, student=student, tokenizer=tokenizer, held_out=held_out,
                    stop=stop)
        if stop.agreed(0, world, every=1) and number < args.end_stage:
            Logger(f"stopped after stage {number}. "
                   f"Resume with: {resume_command(world.size, ' --resume')}")
            sys.exit(130)


if __name__ == "__main__":
    main()
