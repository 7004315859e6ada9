"""
考模型：给每个选项的文字打分，最可能的那一个就是它的回答。
A model sits an exam: the likeliest option, by the probability of its text, is its answer.

    python -m ability_tree.inference --weights out/ability/student/full_sft_64.pth --questions dataset/ability_dev.jsonl \\
        --hide_options --out out/ability/replies.jsonl

    {"id": "ability_dev-00007", "answer_idx": "B", "correct": true, "log_p": {"A": -9.21, "B": -0.04, "C": -7.9, "D": -8.3}}

two processes  torchrun --nproc_per_node 2 -m ability_tree.inference --ddp ...

log_p is that of the whole text and its end of turn, in nats. A question that is too long for the model, with its longest
option, has no answer: answer_idx and log_p are null, and it counts as wrong.
"""

import argparse
import json
from pathlib import Path

from ability_tree.steps import Parts, sha256_of
from ability_tree.tree import wilson
from dataset.formats import files_of, read_each, to_messages, to_question
from interop.checkpoint import load_model, sha256_of_model
from evaluation.scores import score_samples
from runtime.args import checking_input, parse_args
from runtime.files import write_atomic
from runtime.log import Logger
from runtime.precision import pick_dtype
from runtime.processes import init_distributed_mode, main_process_first

PART = 128          # questions that are asked together, by whichever process: a kill loses no more
DECIMALS = 4        # of log_p. Sums in another order, as on other hardware, differ from the sixth on


# ---- 1. Files ------------------------------------------------------------------------------------

def read_choices(paths, skip_bad_lines: bool = False) -> list[dict]:
    """The multiple-choice questions of files or folders, as they are written there: id, question, options, answer_idx, and
    what else they have. Raises what dataset.formats.read_each raises, also for a row without options or id, and for an id
    that an earlier row has: replies and abilities are joined on it, as text."""
    seen = {}

    def checked(row, file):
        for key in ("id", "question", "options"):
            if key not in row:
                raise ValueError(f"no {key!r} (keys found: {', '.join(row)}; read here are questions {{id, question, options, "
                                 "answer_idx}})")
        to_messages(row)                # says what else is wrong with it, if anything is
        name = str(row["id"])
        if name in seen:
            raise ValueError(f"the id {name!r:.60} is that of an earlier question in {seen[name]}: replies and abilities are "
                             "joined on ids")
        seen[name] = file
        return row

    return [row for path in paths for file in files_of(path)
            for row in read_each(file, lambda row, file=file: checked(row, file), skip_bad_lines, Logger)]


def write_rows(path, rows: list[dict]):
    """A JSONL file, whole or not at all; its folder is made if absent."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # surrogatepass: what an agent replied may hold what UTF-8 cannot, and a reject is kept as it came.
    write_atomic(Path(path), lambda file: file.write(lines.encode(errors="surrogatepass")))


# ---- 2. Replies ----------------------------------------------------------------------------------

def reply(model, tokenizer, rows: list[dict], hide_options: bool) -> list[dict]:
    """The model's reply to each row, as the file has it; of equals the first. Put the model into eval mode first."""
    samples = [tokenizer.encode_chats([*prompt(row, hide_options), {"role": "assistant", "content": option}]
                                      for option in row["options"].values()) for row in rows]
    longest = [max(len(ids) for ids, _ in of_row) for of_row in samples]
    fits = [size - 1 <= model.config.max_seq_len for size in longest]       # the last token is not read
    scores = iter(score_samples(model, [sample for of_row, fit in zip(samples, fits) if fit for sample in of_row]))
    replies = []
    for row, fit in zip(rows, fits):
        log_p = {letter: round(next(scores).log_p, DECIMALS) for letter in row["options"]} if fit else None
        answer = max(log_p, key=log_p.get) if fit else None
        replies.append({"id": row["id"], "answer_idx": answer, "correct": answer == row["answer_idx"], "log_p": log_p})
    return replies


def prompt(row: dict, hide_options: bool) -> list[dict]:
    """What the model is asked: the question and its options on lettered lines, or the bare question."""
    return [{"role": "user", "content": row["question"]}] if hide_options else to_question(row).messages


def in_words(replies: list[dict]) -> str:
    asked, correct = len(replies), sum(each["correct"] for each in replies)
    low, high = wilson(correct, asked)
    too_long = sum(each["log_p"] is None for each in replies)
    return (f"accuracy {correct / asked:.1%} ({correct:,} of {asked:,}), 95 % interval {low:.1%} to {high:.1%}"
            + (f"; {too_long:,} too long for the model, and wrong" if too_long else ""))


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--weights", required=True, help="of the model: a checkpoint, a Hugging Face folder, a GGUF file")
    add("--questions", nargs="+", required=True, help="files of multiple choice {id, question, options, answer_idx}")
    add("--out", required=True, help=".jsonl file for the replies; it must not be there yet")
    add("--hide_options", action="store_true", help="ask the bare question, without its options on lettered lines: for a "
                                                    "model that learned to answer, not to choose")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add = parser.add_argument_group("run").add_argument
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of weights and computation. bfloat16 falls back to float32 where the hardware has none")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    args = parse_args(parser)

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    dtype = pick_dtype(args.dtype, world.device)

    with checking_input():
        # 3. Model, questions, and what is answered already
        model, tokenizer = load_model(args.weights, world.device, dtype)
        rows = read_choices(args.questions, args.skip_bad_lines)
        slices = [slice(start, start + PART) for start in range(0, len(rows), PART)]
        about = {"weights": sha256_of_model(args.weights), "questions": sha256_of(args.questions),
                 "hide_options": args.hide_options, "skip_bad_lines": args.skip_bad_lines, "dtype": str(dtype)}
        parts = Parts(args.out, about, len(slices), world)
        with main_process_first(world):
            missing = parts.prepare()
    Logger(f"{model.config}, {model.n_parameters() / 1e6:.2f} M parameters, from {args.weights}: {len(rows):,} questions, "
           + ("bare" if args.hide_options else "with their options"))

    # 4. Ask
    for part in parts.mine(missing):
        parts.write(part, reply(model, tokenizer, rows[slices[part]], args.hide_options))

    # 5. Finish
    answered = parts.join()
    if world.rank != 0:
        return
    replies = [each for part in answered for each in part]
    write_rows(args.out, replies)
    parts.remove()
    Logger(f"{in_words(replies)}. Wrote {args.out}")


if __name__ == "__main__":
    main()
