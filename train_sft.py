"""
有监督微调：同一个循环，只有助手的词元计入损失。
Supervised fine-tuning: the same loop as pretraining, but only the assistant's tokens are targets.

    loss = - mean over the assistant's tokens of log q(token | the conversation before it)

Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, Sec. 3.5. On a teacher's answers this is
sequence-level distillation (SeqKD): Kim & Rush 2016, https://arxiv.org/abs/1606.07947, Sec. 3.2.

When: the labels are clean. Then a teacher's distribution adds no more than the spread of three
seeds: 70.1 ± 3.4 % exact match without it, 73.6 ± 4.1 with it.

one process    python train_sft.py
two processes  torchrun --nproc_per_node 2 train_sft.py --ddp
"""

import math

import torch
import torch.nn.functional as F

from dataset.lm_dataset import MicroBatches, SFTDataset, in_order, make_loader, open_data
from evaluation.validation import evaluate
from interop.checkpoint import prepare, run_name, save_model
from interop.sizes import init_student_model
from model.config import LMConfig
from runtime.args import add_training_args, checking_input, make_parser, model_options, parse_args
from runtime.checkpoint import end_run, load_resume, save_resume, start_progress
from runtime.log import Log, Logger, init_wandb
from runtime.optim import OPTIMIZERS, parameter_groups, trained_weights
from runtime.precision import autocast, seed_everything
from runtime.processes import (StopSignal, full_tensor, init_distributed_mode, main_process_first,
                               parallelize, release_gathered, sync_gradients)
from runtime.schedules import get_lr


def train_epoch(epoch, wandb, *,
                args, world, name, student, tokenizer, modules, optimizer, scaler, data, val_data,
                loader, progress, log, stop):
    total_steps, weights = progress.total_steps, trained_weights(optimizer)
    for step in progress.steps_of(epoch, data.steps_per_epoch):
        # 1. Learning rate: linear warm-up, then cosine
        lr = get_lr(step, total_steps, args.learning_rate, args.warmup_iters)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 2. Gradients: losses are summed over tokens and divided once by the tokens of the whole
        #    optimizer step, so any split into micro-batches and processes gives the same step.
        seed_everything(args.seed, step, world.rank)    # resuming repeats this step's dropout
        for micro in range(args.accumulation_steps):
            batch, is_last = next(loader).to(world.device), micro == args.accumulation_steps - 1
            with autocast(world.device, world.dtype), sync_gradients(modules, is_last):
                out = modules["model"](batch.tokens, batch.lengths, at=batch.at)
                ce = F.cross_entropy(out.logits.float(), batch.targets, reduction="sum")
                loss = ce / batch.step_targets
                balance = out.balance_loss / batch.step_samples
                total = loss + student.config.aux_loss_alpha * balance
            scaler.scale(total * world.size).backward()     # DDP averages, the step needs the sum
            log.add(len(batch.tokens), loss=loss,
                    **({"balance": balance} if student.config.use_moe else {}))

        # 3. Update
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, args.grad_clip or math.inf)
        if log.is_finite(grad_norm, scaler):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        release_gathered(modules)
        progress.steps_done = step + 1

        # 4. Log, validate, save. A save ends a row: a resumed run writes the same rows.
        log.step()
        if progress.is_due(args.log_interval) or progress.is_due(args.save_interval):
            log.row(step + 1, wandb, **log.means(), lr=lr, grad_norm=full_tensor(grad_norm))
        if val_data is not None and progress.is_due(args.eval_interval):
            val_loader = in_order(val_data, world.rank, world.size)
            scores = evaluate(student, val_loader, world.device, dtype=world.dtype)
            log.row(step + 1, wandb, **scores)
            if progress.is_best(scores["val_loss"]):
                save_model(student, tokenizer, f"{name}_best.pth")
        stopping = stop.agreed(step + 1, world)
        if stopping or progress.is_due(args.save_interval):
            save_model(student, tokenizer, f"{name}.pth")
            save_resume(f"{name}.resume", modules, optimizer, scaler, progress)
        if stopping:
            return


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations, in the formats of dataset/dataset.md")
    add("--weights", default=None,
        help="initial weights; default: OUT_DIR/pretrain_DIM.pth; none: random")
    add("--dim", type=int, default=512, help="width of a randomly initialised model")
    add("--n_layers", type=int, default=8, help="layers of a randomly initialised model")
    add("--n_heads", type=int, default=8, help="query heads of it; half as many KV heads")
    add("--use_moe", action="store_true", help="mixtures of experts as its FFNs")
    add("--dropout", type=float, default=0.0, help="dropout probability, in [0, 1)")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--batch_size", type=int, default=32, help="samples per micro-batch and process")
    add("--learning_rate", type=float, default=5e-5,
        help="learning rate; cosine decay from 1.1x to 0.1x of it")
    add_training_args(parser)
    args = parse_args(parser)

    # 2. Processes and seeds
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    seed_everything(args.seed)

    with checking_input():
        # 3. Model
        config = LMConfig(dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads,
                          use_moe=args.use_moe, dropout=args.dropout,
                          max_seq_len=args.max_seq_len or 512)
        weights = args.weights or f"{args.out_dir}/pretrain_{config.dim}{config.moe_path}.pth"
        student, tokenizer = init_student_model(config, weights=weights, vocabulary=args.tokenizer)
        prepare(student, weights, world, **model_options(args))

        # 4. Data
        max_seq_len = student.context_length(args.max_seq_len)
        train_data, val_data = open_data(
            SFTDataset, args.data_path, tokenizer, max_seq_len, args.val_path,
            args.val_fraction, args.skip_bad_lines, main_process_first(world), Logger)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank,
                            world.size, args.seed)

        # 5. Optimizer, and the step at which an interrupted run stopped
        name = run_name(args.out_dir, "full_sft", student)
        modules = {"model": parallelize(student, world, args.shard, student.shard_units())}
        optimizer = OPTIMIZERS[args.optimizer](parameter_groups(modules, args.weight_decay),
                                               lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
        scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
        progress = start_progress(args, name, data, args.epochs, student.adapted)
        if args.resume:
            progress = load_resume(f"{name}.resume", modules, optimizer, scaler, progress)

    # 6. Train
    stop, wandb, log = StopSignal(), init_wandb(args, name, progress), Log(name, progress, world)
    Logger(f"loss = CE of the assistant's tokens; "
           f"{progress.total_steps} steps of {data.step_samples} samples")
    loader = make_loader(data, progress.steps_done, progress.total_steps, args.num_workers,
                         world.device)
    if val_data is not None and args.eval_interval and progress.steps_done == 0:
        scores = evaluate(student, in_order(val_data, world.rank, world.size), world.device,
                          dtype=world.dtype)
        log.row(0, wandb, **scores)         # where the student starts
    for epoch in progress.epochs(data.steps_per_epoch):
        train_epoch(epoch, wandb,
                    args=args, world=world, name=name, student=student, tokenizer=tokenizer,
                    modules=modules, optimizer=optimizer, scaler=scaler, data=data,
                    val_data=val_data, loader=loader, progress=progress, log=log, stop=stop)
        if stop.stopped:
            break
    end_run(log, wandb, progress, world)


if __name__ == "__main__":
    main()
