"""
教师的软标签：把题目变成学生要学的对话，交给 scripts/cache_teacher.py。
The teacher's distributions: questions become the conversations that the student will learn, and go
to scripts/cache_teacher.py.

    python -m ability_tree.generate_logits --teacher out/ability/teacher/full_sft_128.pth \\
        --data out/ability/valid.jsonl dataset/ability_sft.jsonl --hide_options \\
        --out out/ability/logits

This process becomes that script; Ctrl-C, exit status and the rest are described there. Give
ability_tree.train the same --data and --hide_options, and this --out as its --logits.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from ability_tree.steps import rows_of
from dataset.formats import CONVERSATION_KEYS, bare_question, files_of, to_messages
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.files import write_jsonl
from runtime.log import Logger

ROOT = Path(__file__).resolve().parents[1]


def add_data_args(add):
    """The flags of the training data, the same in generate_logits and train."""
    add("--data", nargs="+", required=True, help="files of multiple choice or conversations")
    add("--hide_options", action="store_true",
        help="of multiple choice, train on the answer to the bare question, without its options")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add("--max_seq_len", type=int, default=None,
        help="maximum length of a sample, in tokens; longer ones are cut; default: the context "
             "length of the model, the teacher for its outputs, the student for training")


def bare(row: dict) -> dict:
    """The row as a conversation; multiple choice as its question and the text of its answer."""
    messages = to_messages(row)
    if "options" in row and not any(key in row for key in CONVERSATION_KEYS):
        messages = [*bare_question(row), messages[-1]]
    return {"conversations": messages}


def conversations(paths, hide_options: bool, skip_bad_lines: bool, out: str) -> list[str]:
    """The files to train on: these, or with hide_options OUT with their bare conversations."""
    if not hide_options:
        return [str(file) for path in paths for file in files_of(path)]
    write_jsonl(out, rows_of(paths, bare, skip_bad_lines))      # complete, the same by each process
    return [out]


def listed(value) -> list:
    """The values of a flag: 3 -> [3], [3, 4] -> [3, 4], None -> []"""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def flags_of(**values) -> list[str]:
    """epochs=3, ddp=True, device=None -> --epochs 3 --ddp"""
    flags = []
    for name, value in values.items():
        if value is True:
            flags.append(f"--{name}")
        elif str(value).startswith("-"):        # --more=--use_moe: apart, it would be a flag itself
            flags.append(f"--{name}={value}")
        elif value is not False and listed(value):
            flags += [f"--{name}", *map(str, listed(value))]
    return flags


def become(script: str, flags: list[str]):
    """Become `python SCRIPT FLAGS`: a child would not receive Ctrl-C and torchrun's signals."""
    if os.environ.get("RANK", "0") == "0":
        Logger(f"python {script} {shlex.join(flags)}")
    command = [sys.executable, str(ROOT / script), *flags]
    if os.name == "nt":             # there, the workflow would not wait for what execv starts
        sys.exit(subprocess.call(command))
    os.execv(sys.executable, command)


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--teacher", required=True, help="a checkpoint, a Hugging Face folder, a GGUF file")
    add_data_args(add)
    add("--out", required=True, help="folder of the outputs; bare conversations go to OUT.jsonl")
    add("--tokenizer", help="the student's tokenizer: see scripts/cache_teacher.py")
    add("--more", default="", help="further flags of scripts/cache_teacher.py, as one text: "
                                   '--more="--top_k 64 --temperature 2"')
    add_process_args(parser)
    args = parse_args(parser)

    with checking_input():
        data_path = conversations(args.data, args.hide_options, args.skip_bad_lines,
                                  f"{args.out.rstrip('/')}.jsonl")
        more = shlex.split(args.more)
    given = {name: value for name, value in vars(args).items()
             if name not in ("config", "data", "hide_options", "out", "more")}
    flags = flags_of(**given, data_path=data_path, cache_dir=args.out)
    become("scripts/cache_teacher.py", flags + more)


if __name__ == "__main__":
    main()
