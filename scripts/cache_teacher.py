"""
离线蒸馏：把教师在每个监督位置上的输出写到磁盘，之后的训练不再需要教师本身。
Offline distillation: the teacher's outputs at every supervised position go to disk, and training
runs without the teacher.

    python scripts/cache_teacher.py --teacher out/full_sft_128.pth \\
        --data_path dataset/sft_data.jsonl dataset/val.jsonl --cache_dir out/teacher_cache
    python train_distillation.py --teacher_cache out/teacher_cache

two processes  torchrun --nproc_per_node 2 scripts/cache_teacher.py --ddp ...

Validation needs the teacher's outputs too, so give its file. An interrupted run loses one part at
most; the same command resumes it, on any number of processes. distill/cache.py describes the files.
"""

import dataclasses
import hashlib
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import numpy as np
import torch

from dataset.lm_dataset import by_length, dataset_of, sample_key
from dataset.mixture import Joined
from distill.cache import VERSION, CacheWriter, lay_out, pack, read_about, row_type
from distill.served import add_served_args, make_served
from interop.checkpoint import load_model, load_tokenizer, sha256_of_model
from model.config import LMConfig
from model.tokenizer import DEFAULT
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.files import file_sha256
from runtime.log import Logger
from runtime.parts import Parts
from runtime.precision import autocast
from runtime.processes import init_distributed_mode, main_process_first


def megabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.2f} MB"


def check_room(writer: CacheWriter, missing: list[int]):
    """Print the size of the cache; raise ValueError if it is more than the disk has left."""
    about = writer.about
    head = 0 if about["top_k"] or about["sampled"] else writer.head.nbytes
    needed = int(writer.part_bytes[missing].sum()) + head
    free = shutil.disk_usage(writer.path).free
    and_head = f", and {megabytes(head)} for the head" if head else ""
    Logger(f"{about['samples']:,} samples, {about['positions']:,} positions x {writer.row_bytes:,} "
           f"bytes = {megabytes(writer.part_bytes.sum())} in {len(writer.part_bytes)} parts"
           f"{and_head}; {len(missing)} parts are missing; free on that disk: {megabytes(free)}")
    if needed > free:
        raise ValueError(
            f"{megabytes(needed)} do not fit in the {megabytes(free)} that are free at "
            f"{writer.path}. Give another --cache_dir or fewer files, or store less of each "
            "position: --top_k or --sampled")


def sizes_on_record(config: LMConfig, cache_dir) -> dict:
    """The teacher's sizes as the cache in this folder has them, if it has one of this teacher. An
    older record may lack fields that LMConfig gained since; they have their defaults."""
    with suppress(FileNotFoundError, ValueError):       # CacheWriter.prepare says what is damaged
        sizes = read_about(Path(cache_dir) / "about.json")["teacher_sizes"]
        if LMConfig.from_dict(sizes) == config:
            return sizes
    return dataclasses.asdict(config)


def local_teacher(args, world):
    """(tokenizer, context length, its fields of about.json, head, read): `read` gives the rows of a
    batch."""
    teacher, own = load_model(args.teacher, is_teacher=True)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else own
    if reason := tokenizer.unreadable(own.ids):
        raise ValueError(f"the teacher cannot read the tokens of {args.tokenizer}, {reason}: "
                         "distil it without a cache")
    teacher.n_tokens = min(teacher.n_tokens, tokenizer.vocab_size)
    head = teacher.head.detach().clone()            # fp32, before the weights are cast
    dtype = torch.bfloat16 if world.dtype == torch.bfloat16 else torch.float32
    teacher = teacher.to(world.device, dtype)
    Logger(f"teacher {teacher.config} of {args.teacher}")

    @torch.no_grad()
    def read(about, batch, rng):  # -> (S,)
        with autocast(world.device, world.dtype):
            out = teacher(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
        return pack(about, out.final, teacher.head, rng)

    about = {"teacher": args.teacher, "teacher_sha256": sha256_of_model(args.teacher),
             "teacher_sizes": sizes_on_record(teacher.config, args.cache_dir),
             "vocab_size": len(head), "dim": teacher.config.dim,
             "dtype": str(world.dtype).removeprefix("torch.")}
    return tokenizer, teacher.config.max_seq_len, about, head, read


def served_teacher(args):
    """The same for a teacher behind a server."""
    args.top_k = args.teacher_top_k = args.top_k or args.teacher_top_k
    tokenizer = load_tokenizer(args.tokenizer or DEFAULT)
    teacher = make_served(args)
    teacher.check(tokenizer)
    Logger(teacher.described())

    def read(about, batch, rng):  # -> (S,)
        teacher.asked = {}              # no part has the samples of another
        return teacher.read(batch)

    name = f"{args.teacher_model} at {args.teacher_url}"
    about = {"teacher": name, "teacher_sha256": hashlib.sha256(name.encode()).hexdigest(),
             "teacher_sizes": {}, "vocab_size": tokenizer.vocab_size, "dim": 0, "dtype": "served"}
    return tokenizer, teacher.config.max_seq_len, about, None, read


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("cache").add_argument
    add("--teacher", help="its weights, in any format of interop/checkpoint.py")
    add_served_args(add)
    add("--data_path", nargs="+", required=True,
        help="files of conversations or texts: all that training and validation will read")
    add("--cache_dir", default="out/teacher_cache", help="folder of the cache, of one teacher")
    add("--top_k", type=int, default=0,
        help="number of token probabilities kept at each position; 0: the final hidden state, "
             "which gives all of them; of a served teacher --teacher_top_k")
    add("--sampled", type=int, default=0,
        help="number of token ids sampled from the distribution at each position instead, for an "
             "unbiased forward KL; 0: none")
    add("--temperature", type=float, default=1.0,
        help="softmax temperature of the top-k or the samples, above 0, as in training; hidden "
             "states serve any")
    add("--tokenizer", default=None,
        help="the student's tokenizer if its conversations have another format: its file, or a "
             "model that has one; default: the teacher's")
    add("--max_seq_len", type=int, default=None,
        help="maximum length of a sample, in tokens, as in training; default: the teacher's "
             "context length")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add("--overwrite", action="store_true", help="replace another cache in --cache_dir")
    add("--tokens_per_batch", type=int, default=8192, help="tokens per forward pass of the teacher")
    add_process_args(parser)
    args = parse_args(parser)
    if (args.teacher is None) == (args.teacher_url is None):
        parser.error("give either --teacher WEIGHTS or --teacher_url URL")
    if args.sampled and (args.top_k or args.teacher_url):
        parser.error("--sampled needs a --teacher and no --top_k: a server tells its top-k only")
    if args.temperature != 1.0 and (args.teacher_url or not (args.top_k or args.sampled)):
        parser.error(f"--temperature {args.temperature:g} needs a --top_k or --sampled of a "
                     "--teacher: states serve any temperature, and a server answers at 1")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)

    with checking_input():
        # 3. Teacher
        tokenizer, limit, of_teacher, head, read = (served_teacher(args) if args.teacher_url
                                                    else local_teacher(args, world))
        max_seq_len, n_tokens = args.max_seq_len or limit, of_teacher["vocab_size"]
        if max_seq_len > limit or args.top_k > n_tokens:
            raise ValueError(f"--max_seq_len {max_seq_len} or --top_k {args.top_k} exceeds the "
                             f"teacher's context length, {limit}, or vocabulary, {n_tokens}")

        # 4. Data, and the parts of the cache that are missing
        about = of_teacher | {
            "version": VERSION, "tokenizer": str(tokenizer.path), "ids": tokenizer.ids,
            "max_seq_len": max_seq_len, "top_k": args.top_k, "sampled": args.sampled,
            "temperature": args.temperature, "skip_bad_lines": args.skip_bad_lines}
        with main_process_first(world):
            data = Joined([dataset_of([path])([path], tokenizer, max_seq_len, args.skip_bad_lines,
                                              Logger) for path in args.data_path])
            keys = [sample_key(data.sample(i)) for i in range(len(data))]
            about["files"] = {path: file_sha256(path) for path in args.data_path}
            layout = lay_out(np.array(keys, np.uint64), data.lengths, data.n_targets,
                             row_type(about).itemsize)
            writer = CacheWriter(args.cache_dir, about, layout, head)
            missing = writer.prepare(args.overwrite)
            if missing:
                check_room(writer, missing)
            writer.begin()
    if not missing:
        Logger(f"{args.cache_dir} is complete for these files; nothing to do")
        return

    # 5. Write
    parts = Parts(writer.path, about, len(writer.part_bytes), world)
    parts.missing = writer.missing          # the folder and its parts are the writer's
    samples = [layout.samples[layout.part(part)] for part in range(parts.n_parts)]
    n_tokens = [int((data.lengths[chosen] - 1).sum()) for chosen in samples]
    for part in parts.mine(missing):
        rows, rng = [], np.random.default_rng(part)     # the same, whoever writes it
        for places in by_length(data.lengths[samples[part]], args.tokens_per_batch):
            if parts.stop.requested:
                break
            batch = data.batch(samples[part][places]).to(world.device)
            rows.append(read(about, batch, rng))
        else:
            writer.write(part, np.concatenate(rows))

    # 6. Finish
    parts.wait()
    Logger(f"wrote {len(missing)} parts, {megabytes(writer.part_bytes[missing].sum())}, in "
           f"{time.perf_counter() - parts.start:.1f} s. Use them: "
           f"python train_distillation.py --teacher_cache {args.cache_dir}")


if __name__ == "__main__":
    main()
