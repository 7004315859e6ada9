"""
教师的软标签：把题目变成学生要学的对话，交给 scripts/cache_teacher.py。
The teacher's distributions: questions become the conversations that the student will learn, and go to
scripts/cache_teacher.py.

    python -m ability_tree.generate_logits --teacher out/ability/teacher/full_sft_128.pth --hide_options \\
        --data out/ability/valid.jsonl dataset/ability_sft.jsonl --out out/ability/logits

two processes  torchrun --nproc_per_node 2 -m ability_tree.generate_logits --ddp ...

This process goes on as that script: Ctrl-C, exit status and all else are as told there. Give ability_tree.train the same
--data and --hide_options, and its --logits is this --out.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from ability_tree.inference import write_rows
from dataset.formats import CONVERSATION_KEYS, files_of, read_each, to_messages
from runtime.args import checking_input, parse_args
from runtime.log import Logger

ROOT = Path(__file__).resolve().parents[1]


def add_data_args(add):
    """The flags that tell what is learned: the same ones in both scripts."""
    add("--data", nargs="+", required=True, help="files of multiple choice, or of conversations, to be learned together")
    add("--hide_options", action="store_true", help="of multiple choice, learn the answer to the bare question, without its "
                                                    "options on lettered lines")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add("--max_seq_len", type=int, default=None, help="tokens, longer samples are cut; default: what the model was made for, "
                                                      "the teacher for its outputs, the student for training")


def bare(row: dict) -> dict:
    """The row as a conversation; multiple choice becomes its question and the text of its answer."""
    messages = to_messages(row)
    if "options" in row and not any(key in row for key in CONVERSATION_KEYS):
        messages[0] = {"role": "user", "content": row["question"]}
    return {"conversations": messages}


def conversations(args, beside: str) -> list[str]:
    """The files to learn from: those of --data, or with --hide_options one of bare conversations, written `beside`."""
    files = [file for path in args.data for file in files_of(path)]
    if not args.hide_options:
        return list(map(str, files))
    rows = [row for file in files for row in read_each(file, bare, args.skip_bad_lines, tell)]
    write_rows(beside, rows)            # by each process the same, and whole
    return [beside]


def tell(line: str):
    """Once, though the processes do not know of each other yet."""
    if os.environ.get("RANK", "0") == "0":
        Logger(line)


def flags_of(**values) -> list[str]:
    """epochs=3, ddp=True, device=None -> --epochs 3 --ddp"""
    flags = []
    for name, value in values.items():
        if value is None or value is False or value in ("", []):
            continue
        if str(value).startswith("-"):          # --more=--use_moe: apart, it would be taken for a flag itself
            flags.append(f"--{name}={value}")
            continue
        given = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{name}", *map(str, given)]
    return flags


def go_on_as(script: str, flags: list[str]):
    """Become `python SCRIPT FLAGS`. A child would need to be told of Ctrl-C and of torchrun's signals, and to be waited for."""
    tell(f"python {script} {shlex.join(flags)}")
    os.execv(sys.executable, [sys.executable, str(ROOT / script), *flags])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--teacher", required=True, help="its weights: a checkpoint, a Hugging Face folder, a GGUF file")
    add_data_args(add)
    add("--out", required=True, help="folder for its outputs; bare conversations come beside it, OUT.jsonl")
    add("--top_k", type=int, default=0, help="keep only the log-probabilities of the k likeliest words; 0: hidden states, "
                                             "from which all of them come")
    add("--temperature", type=float, default=2.0, help="of the top-k: that of the training to come. States serve any")
    add("--overwrite", action="store_true", help="if --out holds other outputs, throw those away")
    add = parser.add_argument_group("run").add_argument
    add("--tokens_per_batch", type=int, default=8192, help="that the teacher reads at once: as many as its memory bears")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of the matrix products, as in training")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    args = parse_args(parser)

    with checking_input():
        data_path = conversations(args, f"{args.out.rstrip('/')}.jsonl")
    go_on_as("scripts/cache_teacher.py", flags_of(
        teacher=args.teacher, data_path=data_path, cache_dir=args.out, max_seq_len=args.max_seq_len,
        top_k=args.top_k, temperature=args.temperature if args.top_k else None,
        skip_bad_lines=args.skip_bad_lines, overwrite=args.overwrite, tokens_per_batch=args.tokens_per_batch,
        dtype=args.dtype, device=args.device, ddp=args.ddp, local_rank=args.local_rank))


if __name__ == "__main__":
    main()
