"""
序列级蒸馏的前一半：教师回答问题，答案写成对话文件；后一半就是在这些答案上做 SFT。
The first half of sequence-level distillation: the teacher answers questions, and its answers become a file of
conversations. The second half is fine-tuning on them.

    y = argmax p(y | question)      with --temperature 0, word by word; above 0, y ~ p(y | question)

Kim & Rush 2016, https://arxiv.org/abs/1606.07947, Sec. 3.2. With --only_right, rejection sampling: Yuan et al. 2023,
https://arxiv.org/abs/2308.01825, Sec. 3.3.

    python scripts/generate_answers.py --teacher out/experience/full_sft_96.pth --data_path dataset/experience_student.jsonl \\
        --teacher_data_path dataset/experience_teacher.jsonl --out out/experience/answers.jsonl
    python train_sft.py --config configs/seqkd_tiny.yaml

two processes  torchrun --nproc_per_node 2 scripts/generate_answers.py --ddp ...

A question is a conversation up to its last answer, or to its end if that is still to be answered. With --teacher_data_path
the teacher reads the questions in another form, row by row: with a hint, or an experience. What is written is the question
of --data_path with the answer to the other.

Ctrl-C or a kill loses one part at most; the same command goes on, on any number of processes, to the same file, byte for
byte. Until all is answered, the parts lie in a folder beside it:

    OUT.parts/about.json            what they are made from
    OUT.parts/part-00000.jsonl      a line of counts, then the rows
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Run as `python scripts/generate_answers.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from dataset.formats import Question, read_questions
from runtime.files import file_sha256
from interop.checkpoint import load_model, sha256_of_model
from model.generate import column_major, generate_steps
from runtime.args import checking_input, parse_args, resume_command
from runtime.files import PartFiles, write_atomic
from runtime.log import Logger
from runtime.precision import pick_dtype
from runtime.processes import StopSignal, init_distributed_mode, main_process_first, patient_group

SECONDS = 10            # between two lines of a log
BATCHES_PER_PART = 8    # at most: the last answers of a part leave rows of the batch empty, and a kill loses a part
N_PARTS = 16            # smaller parts rather than fewer, down to one batch: few questions, too, are shared among processes

# Flags that a run which goes on must have as before, or the answers would be others than those of an unbroken run.
SAME = ("limit", "only_right", "keep_unfinished", "skip_bad_lines", "max_new_tokens", "temperature", "top_p", "top_k",
        "num_samples", "seed", "batch_size")

# Why an answer is left out, and how to call it.
LEFT_OUT = {"too long": "the question fills the teacher's max_seq_len",
            "unfinished": "no end within --max_new_tokens (--keep_unfinished keeps them)",
            "empty": "no words", "wrong": "not the right answer"}


# ----------------------------------------------------------------------------------------------------------- questions


class Asked(NamedTuple):
    """A question as the student is asked, the messages that the teacher reads in its place, and the right answer."""

    question: Question
    told: list[dict]
    right: str | None       # None: neither file has one


def read_asked(args) -> list[Asked]:
    """The questions of all files. Raises what dataset/formats.py raises, and ValueError for rows that are no pair."""
    asked = []
    for path, teacher_path in zip(args.data_path, args.teacher_data_path or args.data_path):
        questions = read_questions(path, args.skip_bad_lines, Logger)
        told = questions
        if teacher_path != path:
            told = read_questions(teacher_path, args.skip_bad_lines, Logger)
        if len(questions) != len(told):
            raise ValueError(f"{path} has {len(questions):,} rows, {teacher_path} {len(told):,}: row by row they must hold "
                             "the same questions")
        pairs = zip(questions[:args.limit or None], told[:args.limit or None])
        for row, (question, of_teacher) in enumerate(pairs, start=1):
            if question is None or of_teacher is None:          # a bad line on either side, left out
                continue
            if None not in (question.answer, of_teacher.answer) and question.answer != of_teacher.answer:
                raise ValueError(f"row {row} of {path} and of {teacher_path} are no pair: the answer is "
                                 f"{question.answer!r:.60} in the one, {of_teacher.answer!r:.60} in the other")
            right = of_teacher.answer if question.answer is None else question.answer
            if args.only_right and right is None:
                raise ValueError(f"{path}, row {row} has no answer that the teacher's can be compared with; add it, or "
                                 "leave out --only_right")
            asked.append(Asked(question, of_teacher.messages, right))
    if not asked:
        raise ValueError(f"no row of {', '.join(args.data_path)} is left to be answered")
    return asked


# --------------------------------------------------------------------------------------------------------------- parts


class Parts(PartFiles):
    """`prepare`, then `write` each part that is missing, in any process, then `join`."""

    suffix, others = ".jsonl", "other answers"

    def __init__(self, out: str, about: dict, n_questions: int, batch_size: int, num_samples: int):
        size = min(BATCHES_PER_PART * batch_size, max(batch_size, -(-n_questions * num_samples // N_PARTS)))    # answers
        size = max(1, size // num_samples)                                                                      # questions
        self.slices = [slice(start, start + size) for start in range(0, n_questions, size)]
        super().__init__(out, about, len(self.slices))

    def write(self, part: int, counts: Counter, rows: list[dict]):
        # surrogatepass: an id may hold what UTF-8 cannot, and is to go through as it came.
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [counts, *rows])
        write_atomic(self.path(part), lambda file: file.write(lines.encode(errors="surrogatepass")))

    def counts(self, parts) -> Counter:
        """The sums over these parts."""
        total = Counter()
        for part in parts:
            with open(self.path(part), encoding="utf-8") as file:
                total.update(json.loads(file.readline()))
        return total

    def join(self):
        """The rows of all parts as one file, in place of the folder; no file, if there is no row."""

        def write(out):
            for part in range(len(self.slices)):
                with open(self.path(part), "rb") as file:
                    file.readline()                                         # the counts
                    shutil.copyfileobj(file, out)

        if self.counts(range(len(self.slices)))["written"]:
            write_atomic(self.out, write)
        self.remove()


class Progress:
    """A bar on a terminal, a line now and then in a log; by the main process, of its own share."""

    def __init__(self, total_answers: int, world):
        self.total, self.answers, self.tokens, self.world = total_answers, 0, 0, world
        self.start = self.spoken = time.perf_counter()
        self.bar = tqdm(total=total_answers, unit=" answers", dynamic_ncols=True,
                        disable=world.rank != 0 or not sys.stderr.isatty())

    def add(self, answers: int, tokens: int):
        self.answers += answers
        self.tokens += tokens
        now = time.perf_counter()
        seconds = now - self.start
        pace = f"{self.world.size * self.tokens / seconds:,.0f} tokens/s"
        if not self.bar.disable:
            self.bar.set_postfix_str(pace, refresh=False)
            self.bar.update(answers)
        elif now - self.spoken > SECONDS:
            self.spoken = now
            left = seconds / self.answers * (self.total - self.answers) if self.answers else math.inf
            Logger(f"{self.answers / self.total:.0%}  {self.world.size * self.answers / seconds:,.1f} answers/s  {pace}  "
                   f"{left / 60:.1f} min left")


# ------------------------------------------------------------------------------------------------------------- answers


def answer(teacher, prompts: list[list[int]], stop_token: int, generator, args, progress, stop) -> list[list[int]] | None:
    """The tokens of one answer a prompt, the stop token with them where it was met; or None after Ctrl-C."""
    answers = [[] for _ in prompts]
    for step in generate_steps(teacher, prompts, args.max_new_tokens, stop_token, rows=args.batch_size,
                               temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator):
        if stop.requested:
            return None
        for i, token in zip(step.indices, step.tokens):
            answers[i].append(token)
        progress.add(sum(step.done), len(step.tokens))
    return answers


def generator_of(part: int, seed: int, device) -> torch.Generator:
    """Random numbers that are a matter of seed and part, whoever answers it, and when."""
    mixed = np.random.SeedSequence((seed, part)).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def answer_part(teacher, tokenizer, asked: list[Asked], generator, args, progress, stop):
    """(counts, rows) of one part, a Counter and JSON objects in the order of the questions; or None after Ctrl-C."""
    counts = Counter(asked=len(asked) * args.num_samples)
    prompts = [ids for ids, _ in tokenizer.encode_chats([each.told for each in asked], add_generation_prompt=True)]
    fits = [len(prompt) < teacher.config.max_seq_len for prompt in prompts]
    asked = [each for each, fit in zip(asked, fits) if fit for _ in range(args.num_samples)]
    prompts = [prompt for prompt, fit in zip(prompts, fits) if fit for _ in range(args.num_samples)]
    counts["too long"] = counts["asked"] - len(asked)
    answers = answer(teacher, prompts, tokenizer.end_of_turn, generator, args, progress, stop)
    if answers is None:
        return None
    progress.add(counts["too long"], 0)

    rows = []
    for (question, _, right), tokens in zip(asked, answers):
        counts["tokens"] += len(tokens)
        finished = tokens[-1] == tokenizer.end_of_turn
        words = tokens[:-1] if finished else tokens
        text = text_of(words, tokenizer)
        reason = why_not(text, finished, right, args)
        if reason:
            counts[reason] += 1
            continue
        said = {"role": "assistant", "content": text}
        rows.append({"conversations": [*question.messages, said], **question.others})
        counts["written"] += 1
        counts["endless"] += not finished
        ids, targets = tokenizer.encode_chat([said])
        counts["respelt"] += [i for i, target in zip(ids, targets) if target] != [*words, tokenizer.end_of_turn]
    return counts, rows


def text_of(words: list[int], tokenizer) -> str:
    """The answer that encodes to these tokens. Where a space is put before every text, decode leaves it there."""
    text = tokenizer.decode(words)
    return text.removeprefix(" ") if tokenizer.prefix_space else text


def why_not(text: str, finished: bool, right: str | None, args) -> str | None:
    """Why an answer is left out, as one of LEFT_OUT; None: it is not."""
    if not finished and not args.keep_unfinished:
        return "unfinished"
    if not text.strip():
        return "empty"                  # which no lesson reads
    if args.only_right and text.strip() != right.strip():
        return "wrong"
    return None


def in_words(counts: Counter) -> str:
    """What became of the answers that were asked for."""
    left_out = ", ".join(f"{counts[reason]:,} {told}" for reason, told in LEFT_OUT.items() if counts[reason])
    return f"{counts['written']:,} of {counts['asked']:,} answers" + (f"; left out: {left_out}" if left_out else "")


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--teacher", required=True, help="its weights: a checkpoint, a Hugging Face folder, a GGUF file")
    add("--data_path", nargs="+", required=True,
        help="files of questions: conversations in the formats of dataset/dataset.md, whose last answer may be missing")
    add("--teacher_data_path", nargs="+", default=None,
        help="the same questions as the teacher is to read them, file by file and row by row; default: as --data_path "
             "has them")
    add("--out", required=True, help=".jsonl file for the answers; it must not be there yet")
    add("--limit", type=int, default=0, help="answer the first so many rows of each file; 0: all")
    add("--only_right", action="store_true", help="leave out answers that are not the file's own, and count them")
    add("--keep_unfinished", action="store_true",
        help="write answers without an end, too; else they are left out and counted")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens, its end among them")
    add("--temperature", type=float, default=0.0, help="0: always the likeliest word; 1: as the teacher has it. Qwen3 "
                                                       "without thinking is meant for 0.7, --top_p 0.8, --top_k 20")
    add("--top_p", type=float, default=1.0, help="sample from the smallest set that has this probability; 1: from all")
    add("--top_k", type=int, default=0, help="sample from the k likeliest words; 0: from all")
    add("--num_samples", type=int, default=1, help="answers to each question, one row each")
    add("--seed", type=int, default=1337, help="of the sampling")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=int, default=64, help="answers under way at once, per process")
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of weights and computation. bfloat16 falls back to float32 where the hardware has none")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    args = parse_args(parser)
    if min(args.max_new_tokens, args.num_samples, args.batch_size) < 1 or args.limit < 0:
        parser.error(f"--max_new_tokens {args.max_new_tokens}, --num_samples {args.num_samples} and --batch_size "
                     f"{args.batch_size} must be 1 or more, --limit {args.limit} 0 or more")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error(f"--temperature {args.temperature:g} must be 0 or more, --top_p {args.top_p:g} in (0, 1], "
                     f"--top_k {args.top_k} 0 or more")
    if args.temperature == 0 and (args.top_p, args.top_k, args.num_samples) != (1.0, 0, 1):
        parser.error("--top_p, --top_k and --num_samples are of a --temperature above 0: at 0 there is one answer")
    if args.teacher_data_path and len(args.teacher_data_path) != len(args.data_path):
        parser.error(f"--teacher_data_path names {len(args.teacher_data_path)} files, --data_path {len(args.data_path)}; "
                     "they are pairs")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    dtype = pick_dtype(args.dtype, world.device)

    with checking_input():
        # 3. Teacher
        teacher, tokenizer = load_model(args.teacher, world.device, dtype)
        column_major(teacher)
        Logger(f"teacher {teacher.config}: {teacher.n_parameters() / 1e6:.2f} M parameters, from {args.teacher}")

        # 4. Questions, and what is answered already
        asked = read_asked(args)
        about = {"--teacher": sha256_of_model(args.teacher), "its tokenizer": tokenizer.sha256,
                 "--data_path": [file_sha256(path) for path in args.data_path],
                 "--teacher_data_path": [file_sha256(path) for path in args.teacher_data_path or []],
                 "--dtype": str(dtype).removeprefix("torch."), **{f"--{flag}": vars(args)[flag] for flag in SAME}}
        parts = Parts(args.out, about, len(asked), args.batch_size, args.num_samples)
        with main_process_first(world):
            missing = parts.prepare()
    Logger(f"questions: {len(asked):,}, answers to each: {args.num_samples}; "
           f"{len(missing)} of {len(parts.slices)} parts are to be answered")
    together = patient_group(world)
    if together:
        dist.barrier(together)          # no part is written before all have seen which ones are missing

    # 5. Answer
    stop, mine = StopSignal(), missing[world.rank::world.size]
    progress = Progress(args.num_samples * sum(len(asked[parts.slices[part]]) for part in mine), world)
    for part in mine:
        generator = generator_of(part, args.seed, world.device)
        answered = answer_part(teacher, tokenizer, asked[parts.slices[part]], generator, args, progress, stop)
        if answered is None:
            break
        parts.write(part, *answered)
    progress.bar.close()

    # 6. Finish
    if together:
        dist.barrier(together)
    if world.rank != 0:
        return
    seconds, left = time.perf_counter() - progress.start, parts.missing()
    if left:
        Logger(f"stopped; {len(parts.slices) - len(left)} of {len(parts.slices)} parts are answered and stay. "
               f"Go on with: {resume_command(world.size)}")
        sys.exit(130)
    counts, tokens = parts.counts(range(len(parts.slices))), parts.counts(missing)["tokens"]
    parts.join()
    if not counts["written"]:
        sys.exit(f"nothing to write: {in_words(counts)}")
    Logger(f"wrote {in_words(counts)}; {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    for name, told in (("endless", "have no end"), ("respelt", "are other tokens when their text is encoded again")):
        if counts[name]:
            Logger(f"{counts[name]:,} of those written {told}")
    # The student is the teacher without its hint, in a folder of its own: train_sft.py's names could be the teacher's.
    student_dir = f"{Path(args.out).with_suffix('')}_sft"
    learn = ["python", "train_sft.py", "--weights", args.teacher, "--data_path", args.out, "--out_dir", student_dir]
    Logger(f"Learn from them: {shlex.join(learn)}")


if __name__ == "__main__":
    main()
