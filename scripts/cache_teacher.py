"""
教师先说一遍：把教师在每个待学位置上的输出写到磁盘，之后的训练不再需要教师本身。
The teacher speaks once: its outputs at every position to be learned go to disk, and no training needs it again.

    python scripts/cache_teacher.py --teacher out/full_sft_128.pth --data_path dataset/sft_data.jsonl dataset/val.jsonl \\
        --cache_dir out/teacher_cache
    python train_distillation.py --teacher_cache out/teacher_cache

two processes  torchrun --nproc_per_node 2 scripts/cache_teacher.py --ddp ...

Give the validation file too: it is asked about there as well. Ctrl-C or a kill loses one part at most; the same command
goes on, on any number of processes. What lies in the folder is told in distill/teacher_logits.py.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from pathlib import Path

# Run as `python scripts/cache_teacher.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataset.lm_dataset import dataset_of, packed_batch, sample_key
from distill.cache import VERSION, CacheWriter, lay_out, pack, row_type
from runtime.files import file_sha256
from interop.checkpoint import load_model, sha256_of_model
from runtime.args import checking_input, parse_args, resume_command
from runtime.log import Logger
from runtime.precision import autocast, pick_dtype
from runtime.processes import StopSignal, init_distributed_mode, main_process_first, sum_over_processes

SECONDS = 10        # between two lines of a log


class Samples:
    """The samples of several files, numbered through, in the tokens that training will have."""

    def __init__(self, paths, tokenizer, max_seq_len, skip_bad_lines):
        self.files = [dataset_of([path])([path], tokenizer, max_seq_len, skip_bad_lines, Logger) for path in paths]
        self.firsts = np.cumsum([0, *map(len, self.files)])
        self.lengths = np.concatenate([file.lengths for file in self.files])        # (n,) tokens
        self.n_targets = np.concatenate([file.n_targets for file in self.files])    # (n,)
        self.keys = np.array([sample_key(file.sample(i)) for file in self.files for i in range(len(file))], np.uint64)

    def batches(self, samples: np.ndarray, tokens_per_batch: int):
        """Batches of these, in their order."""
        flag, start = self.files[0].flag, 0
        for end in range(1, len(samples) + 1):
            if end == len(samples) or self.lengths[samples[start:end + 1]].sum() > tokens_per_batch:
                numbers = np.searchsorted(self.firsts, samples[start:end], side="right") - 1
                rows = samples[start:end] - self.firsts[numbers]
                parts = [self.files[number].sample(row) for number, row in zip(numbers, rows)]
                stream = np.concatenate(parts)
                yield packed_batch(stream & ~flag, stream & flag > 0, self.lengths[samples[start:end]])
                start = end


class Progress:
    """A bar on a terminal, a line now and then in a log; by the main process, of its own share."""

    def __init__(self, total_tokens: int, world):
        self.total, self.done, self.world = total_tokens, 0, world
        self.start = self.spoken = time.time()
        self.bar = tqdm(total=total_tokens, unit=" tokens", unit_scale=True, dynamic_ncols=True,
                        disable=world.rank != 0 or not sys.stderr.isatty())

    def add(self, tokens: int):
        self.done += tokens
        self.bar.update(tokens)
        now = time.time()
        if self.bar.disable and now - self.spoken > SECONDS:
            self.spoken, seconds = now, now - self.start
            Logger(f"{self.done / self.total:.0%}  {self.world.size * self.done / seconds:,.0f} tokens/s  "
                   f"{seconds / self.done * (self.total - self.done) / 60:.1f} min left")


@torch.no_grad()
def say(teacher, samples: Samples, numbers: np.ndarray, about, args, dtype, device, progress, stop):
    """The rows of one part, or None after Ctrl-C."""
    head = teacher.head                                            # (V, D)
    rows = []
    for batch in samples.batches(numbers, args.tokens_per_batch):
        if stop.requested:
            return None
        batch = batch.to(device)
        with autocast(device, dtype):
            states = teacher(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final     # (S, D)
        rows.append(pack(about, states, head))
        progress.add(len(batch.tokens))
    return np.concatenate(rows)


def in_words(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def check_room(writer: CacheWriter, missing: list[int]):
    """Say how much it will be; raise ValueError if that is more than the disk has left."""
    about, head = writer.about, 0 if writer.about["top_k"] else writer.head.nbytes
    needed, free = int(writer.part_bytes[missing].sum()) + head, shutil.disk_usage(writer.path).free
    and_head = f", and {in_words(head)} for the head" if head else ""
    Logger(f"{about['samples']:,} samples, {about['positions']:,} positions x {writer.row_bytes:,} bytes = "
           f"{in_words(writer.part_bytes.sum())} in {len(writer.part_bytes)} parts{and_head}; "
           f"{len(missing)} parts still to write; free on that disk: {in_words(free)}")
    if needed > free:
        raise ValueError(f"{in_words(needed)} do not fit in the {in_words(free)} that are free at {writer.path}. Give "
                         "another --cache_dir, fewer files, or --top_k K, which takes "
                         f"{row_type(about | {'top_k': 1}).itemsize} K bytes a position")


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--teacher", required=True, help="its weights: a checkpoint, a Hugging Face folder, a GGUF file")
    add("--data_path", nargs="+", required=True,
        help="files of conversations, or of texts: all that training and validation will read")
    add("--cache_dir", default="out/teacher_cache", help="folder for the outputs; one teacher, one folder")
    add("--top_k", type=int, default=0, help="keep only the log-probabilities of the k likeliest words, 1 to the size of "
                                             "the vocabulary; 0: the final hidden states, from which all of them come")
    add("--temperature", type=float, default=1.0,
        help="of the top-k, above 0: that of the training to come. States serve any")
    add("--max_seq_len", type=int, default=None, help="tokens, longer samples are cut: that of the training to come; "
                                                      "default: what the teacher was made for")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add("--overwrite", action="store_true", help="if --cache_dir holds another cache, throw that one away")
    add = parser.add_argument_group("run").add_argument
    add("--tokens_per_batch", type=int, default=8192, help="that the teacher reads at once: as many as its memory bears")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of the matrix products, as in training. bfloat16 falls back to float32 where the hardware has none")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    args = parse_args(parser)
    if args.top_k < 0 or args.tokens_per_batch < 1:
        parser.error(f"--top_k {args.top_k} must be 0 or more, --tokens_per_batch {args.tokens_per_batch} 1 or more")
    if args.temperature <= 0 or args.temperature != 1.0 and not args.top_k:
        parser.error(f"--temperature {args.temperature:g} must be above 0, and is of a --top_k: states, the default, serve "
                     "any temperature as they are")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    dtype = pick_dtype(args.dtype, world.device)

    with checking_input():
        # 3. Teacher
        teacher, tokenizer = load_model(args.teacher)
        config = teacher.config
        max_seq_len = args.max_seq_len or config.max_seq_len
        if max_seq_len > config.max_seq_len:
            raise ValueError(f"--max_seq_len {max_seq_len} is more than the teacher was made for, {config.max_seq_len}")
        if args.top_k > config.vocab_size:
            raise ValueError(f"--top_k {args.top_k} is more than the {config.vocab_size} words of the vocabulary")
        head = teacher.head.detach().clone()                       # fp32, before the weights change their type
        teacher = teacher.to(world.device, dtype if dtype == torch.bfloat16 else torch.float32)
        Logger(f"teacher {config}: {teacher.n_parameters() / 1e6:.2f} M parameters, from {args.teacher}")

        # 4. Data, and what there is already
        about = {"version": VERSION, "teacher": args.teacher, "teacher_sha256": sha256_of_model(args.teacher),
                 "teacher_sizes": dataclasses.asdict(config),
                 "tokenizer": str(tokenizer.path), "tokenizer_sha256": tokenizer.sha256,
                 "max_seq_len": max_seq_len, "top_k": args.top_k, "temperature": args.temperature,
                 "dtype": str(dtype).removeprefix("torch."), "vocab_size": config.vocab_size, "dim": config.dim,
                 "skip_bad_lines": args.skip_bad_lines}
        with main_process_first(world):
            samples = Samples(args.data_path, tokenizer, max_seq_len, args.skip_bad_lines)
            about["files"] = {path: file_sha256(path) for path in args.data_path}
            layout = lay_out(samples.keys, samples.lengths, samples.n_targets, row_type(about).itemsize)
            writer = CacheWriter(args.cache_dir, about, layout, head)
            missing = writer.prepare(args.overwrite)
            if missing:
                check_room(writer, missing)
            writer.begin()
    if world.size > 1:
        dist.barrier()                  # no part is written before all have seen which ones are missing
    if not missing and writer.finished.exists():
        Logger(f"{args.cache_dir} is complete: {about['teacher']} has said all it has to say on these files")
        return

    # 5. Write
    stop, mine = StopSignal(), missing[world.rank::world.size]
    numbers = {part: layout.samples[layout.part(part)] for part in mine}
    progress = Progress(int(sum((samples.lengths[each] - 1).sum() for each in numbers.values())), world)
    for part in mine:
        rows = say(teacher, samples, numbers[part], about, args, dtype, world.device, progress, stop)
        if rows is None:
            break
        writer.write(part, rows)
    progress.bar.close()

    # 6. Finish
    seconds = time.time() - progress.start
    done = sum_over_processes(torch.tensor(float(progress.done), device=world.device)).item()  # all are here now
    left = writer.missing()
    if left:
        Logger(f"stopped; {len(layout.cuts) - 1 - len(left)} of {len(layout.cuts) - 1} parts are written and stay. "
               f"Go on with: {resume_command(world.size)}")
        sys.exit(130)
    if world.rank == 0:
        writer.finish()
    Logger(f"wrote {len(missing)} parts, {in_words(writer.part_bytes[missing].sum())}, in {seconds:.1f} s "
           f"({done / seconds:,.0f} tokens/s). Use them: python train_distillation.py --teacher_cache {args.cache_dir}")


if __name__ == "__main__":
    main()
