"""
监督微调：同一个循环，只有助手说的话计入损失。
Supervised fine-tuning: the same loop as pretraining, but only the assistant's tokens count.

    loss = - sum over the assistant's tokens of log q(token | the conversation before it) / number of them

Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, Sec. 3.5 (its first step). Trained on a teacher's answers instead
of people's, this is sequence-level distillation: Kim & Rush 2016, https://arxiv.org/abs/1606.07947, Sec. 3.2.

When: answers are there, sure and right. Then a teacher's distribution adds no more than the spread of three seeds: 70.1 ± 3.4 %
exact match without it, 73.6 ± 4.1 with it (README).

one process    python train_sft.py
two processes  torchrun --nproc_per_node 2 train_sft.py --ddp
"""

import argparse

import torch
import torch.nn.functional as F

import runtime
from dataset.lm_dataset import MicroBatches, SFTDataset, in_order
from model.checkpoint import adapt, load_model, new_model, save_model
from model.config import LMConfig
from runtime import Logger


def train_epoch(epoch, wandb, run, model, tokenizer, val_data):
    args = run.args
    for step in run.steps_of(epoch):
        for batch, last in run.micro_batches(step):
            with run.forward(last):
                out = run.parallel["model"](batch.tokens, batch.lengths, at=batch.at)
            # Summed over tokens, divided once by the tokens of the whole step: every token weighs the same,
            # however the step is split over micro-batches and processes.
            ce = F.cross_entropy(out.logits.float(), batch.targets, reduction="sum") / batch.step_targets
            balance = out.balance_loss / batch.step_samples
            run.backward(ce + model.config.aux_loss_alpha * balance)
            run.log.add(len(batch.tokens), loss=ce, **({"balance": balance} if model.config.use_moe else {}))
        rates = run.update(step)

        # A save also ends a row, so that a run resumed from it writes the rows that the unbroken one wrote.
        if run.is_due(args.log_interval) or run.is_due(args.save_interval):
            run.log.row(run.steps_done, wandb, **rates)
        if val_data is not None and run.is_due(args.eval_interval):
            val_loss = evaluate(model, run.share(in_order(val_data)), run)
            run.log.row(run.steps_done, wandb, val_loss=val_loss)
            if run.is_best(val_loss):
                save_model(model, tokenizer, f"{args.out_dir}/{run.name}_best.pth")
        stopping = run.must_stop()
        if stopping or run.is_due(args.save_interval):
            save_model(model, tokenizer, f"{args.out_dir}/{run.name}.pth")
            run.save()
        if stopping:
            return


@torch.no_grad()
def evaluate(model, batches, run):
    """Mean loss per token, in nats, over the batches of all processes."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    for batch in batches:
        batch = batch.to(run.world.device)
        with runtime.autocast(run.dtype, run.world.device):
            logits = model(batch.tokens, batch.lengths, at=batch.at).logits
        sums[0] += F.cross_entropy(logits.float(), batch.targets, reduction="sum")
        sums[1] += len(batch.targets)
    model.train()
    loss, n = runtime.sum_over_processes(sums).tolist()
    return loss / n


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("lesson").add_argument
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations, in the formats of dataset/dataset.md")
    add("--weights", default=None, help="weights to start from; default: OUT_DIR/pretrain_DIM.pth; none: from nothing")
    add("--dim", type=int, default=512, help="width of the model, where --weights does not say")
    add("--n_layers", type=int, default=8, help="its depth")
    add("--n_heads", type=int, default=8, help="its query heads; half as many key/value heads")
    add("--use_moe", action="store_true", help="its FFNs are mixtures of experts")
    add("--dropout", type=float, default=0.0, help="in [0, 1)")
    add("--epochs", type=int, default=1, help="passes over the data")
    add("--batch_size", type=int, default=32, help="samples per micro-batch and process")
    add("--learning_rate", type=float, default=5e-5, help="of the cosine, which runs from 1.1 to 0.1 times this")
    runtime.add_training_args(parser)
    args = runtime.parse_args(parser)

    # 2. Processes and seeds
    world = runtime.init_distributed_mode(args)
    runtime.seed_everything(args.seed)

    with runtime.checking_input():
        # 3. Model
        weights = args.weights or f"{args.out_dir}/pretrain_{args.dim}{'_moe' if args.use_moe else ''}.pth"
        config = LMConfig(dim=args.dim, n_layers=args.n_layers, n_heads=args.n_heads, use_moe=args.use_moe,
                          dropout=args.dropout, max_seq_len=args.max_seq_len or 512)
        model, tokenizer = new_model(config, args.tokenizer) if weights == "none" else load_model(weights)
        model.train()
        Logger(f"model {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {weights}")
        if args.lora_rank:
            Logger(adapt(model, weights, args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets))

        # 4. Data
        train_data, val_data = runtime.open_data(SFTDataset, args, tokenizer, model.config, world)
        data = MicroBatches(train_data, args.batch_size, args.accumulation_steps, world.rank, world.size, args.seed)

        # 5. Optimizer, precision, and where an interrupted run stood
        name = f"full_sft_{model.config.dim}{model.config.moe_path}{'_lora' if args.lora_rank else ''}"
        run = runtime.Run(name, args, world, {"model": model}, data)

    # 6. Train
    Logger(f"loss = CE of the assistant's tokens; {run.total_steps} steps of {data.step_samples} samples")
    for epoch in run.epochs:
        train_epoch(epoch, run.wandb, run, model, tokenizer, val_data)
    run.close()


if __name__ == "__main__":
    main()
