"""
序列级蒸馏的前一半：教师回答问题，答案写成对话文件；后一半就是在这些答案上做 SFT。
The first half of sequence-level distillation (SeqKD): the teacher answers questions, and its
answers become a file of conversations. The second half is fine-tuning on that file.

    y = argmax p(y | question), token by token, or y ~ p(y | question) with --temperature

Kim & Rush 2016, https://arxiv.org/abs/1606.07947, Sec. 3.2. With --only_right, rejection sampling:
Yuan et al. 2023, https://arxiv.org/abs/2308.01825, Sec. 3.3: the final answer decides, whatever the
thought, and equal answers to a question are kept once (without the flag each time they occur).

    python scripts/generate_answers.py --teacher out/experience/full_sft_96.pth \\
        --data_path dataset/experience_student.jsonl \\
        --teacher_data_path dataset/experience_teacher.jsonl --out out/experience/answers.jsonl
    python train_sft.py --config configs/seqkd_tiny.yaml

two processes  torchrun --nproc_per_node 2 scripts/generate_answers.py --ddp ...
an endpoint    ... --teacher_url http://localhost:8000/v1 --teacher_model NAME ...

--teacher_data_path gives the teacher the same questions, row by row, with a hint or privileged
context; the file holds the questions of --data_path. An interrupted run loses one part at most; the
same command resumes it, on any number of processes, to the same bytes.
"""

import shlex
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from dataset.formats import Question, is_right, read_questions
from interop.checkpoint import load_model, sha256_of_model
from model.generate import column_major, generate_steps
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args, make_endpoint
from runtime.files import file_sha256, write_jsonl
from runtime.log import Logger
from runtime.parts import Parts
from runtime.precision import pick_dtype, seed_of
from runtime.processes import init_distributed_mode, main_process_first

BATCHES_PER_PART = 8    # at most: the last answers of a part leave rows of the batch empty
N_PARTS = 16            # at least, down to one batch a part: processes share few questions, too

# Flags that change the answers: a resumed run must have them as before.
SAME = ("teacher_url", "teacher_model", "columns", "limit", "only_right", "keep_unfinished",
        "skip_bad_lines", "max_new_tokens", "temperature", "top_p", "top_k", "num_samples", "seed",
        "batch_size")

# Why an answer is left out, and how the report says it.
LEFT_OUT = {"too long": "the question fills the teacher's max_seq_len", "no reply": "no reply",
            "unfinished": "no end within --max_new_tokens (--keep_unfinished keeps them)",
            "empty": "empty", "wrong": "not the file's final answer",
            "repeated": "equal to a right answer before it to the same question"}


class Task(NamedTuple):
    question: Question      # as the student reads it
    messages: list[dict]    # as the teacher reads it
    gold: str | None        # the answer in the files, if there is one


def read_tasks(paths, teacher_paths, limit=0, only_right=False, skip_bad_lines=False) -> list[Task]:
    """The questions of all files. Raises what dataset.formats.read_questions raises, and ValueError
    for rows that are not the same question."""
    tasks = []
    for path, teacher_path in zip(paths, teacher_paths or paths):
        questions = read_questions(path, skip_bad_lines, Logger)
        others = (questions if teacher_path == path
                  else read_questions(teacher_path, skip_bad_lines, Logger))
        if len(questions) != len(others):
            raise ValueError(f"{path} has {len(questions):,} rows, {teacher_path} {len(others):,}: "
                             "row by row they must hold the same questions")
        pairs = list(zip(questions, others))[:limit or None]
        for row, (question, other) in enumerate(pairs, start=1):
            if question is None or other is None:       # a bad line on either side is left out
                continue
            answers = {each.answer: None for each in (other, question) if each.answer is not None}
            if len(answers) > 1:
                raise ValueError(
                    f"row {row} of {path} and of {teacher_path} are no pair: the answer is "
                    f"{question.answer!r:.60} in the one, {other.answer!r:.60} in the other")
            if only_right and not answers:
                raise ValueError(f"{path}, row {row} has no answer to compare the teacher's with; "
                                 "add it, or leave out --only_right")
            tasks.append(Task(question, other.messages, next(iter(answers), None)))
    if not tasks:
        raise ValueError(f"no row of {', '.join(paths)} is left to be answered")
    return tasks


def part_slices(n_questions: int, batch_size: int, num_samples: int) -> list[slice]:
    n_answers = max(batch_size, -(-n_questions * num_samples // N_PARTS))
    size = max(1, min(BATCHES_PER_PART * batch_size, n_answers) // num_samples)
    return [slice(start, start + size) for start in range(0, n_questions, size)]


def generated(teacher, tokenizer, tasks, num_samples, parts, **sampling) -> list:
    """(text, number of tokens, its fault or "") of each answer, question by question. After Ctrl-C
    there are fewer. sampling: see generate_steps."""
    prompts = [ids for ids, _ in tokenizer.encode_chats([task.messages for task in tasks],
                                                        add_generation_prompt=True)
               for _ in range(num_samples)]
    answers = {i: [] for i, ids in enumerate(prompts) if len(ids) < teacher.config.max_seq_len}
    places = list(answers)
    for step in generate_steps(teacher, [prompts[i] for i in places], stop=tokenizer.end_of_turn,
                               **sampling):
        if parts.stop.requested:
            return []
        for i, token in zip(step.indices, step.tokens):
            answers[places[i]].append(token)
    return [to_answer(answers[i], tokenizer) if i in answers else ("", 0, "too long")
            for i in range(len(prompts))]


def requested(endpoint, tasks, num_samples, parts, *, max_new_tokens, temperature, generator, **_):
    """The same by an endpoint, which counts the question's tokens, too."""
    rows = endpoint.ask([task.messages for task in tasks for _ in range(num_samples)],
                        max_new_tokens, temperature, generator.initial_seed(), parts.stop)
    return [(row["reply"], row["tokens"], "unfinished" * (row.get("finish_reason") == "length"))
            if row else ("", 0, "no reply") for row in rows]


def to_rows(tasks, answers, only_right=False, keep_unfinished=False):
    """({what became of the answers: how many}, rows of the file)."""
    counts, rows, kept = Counter(asked=len(answers)), [], set()
    of_answers = [i for i in range(len(tasks)) for _ in range(len(answers) // len(tasks))]
    for i, (text, n_tokens, fault) in zip(of_answers, answers):
        question, _, gold = tasks[i]
        counts["tokens"] += n_tokens
        reason = (fault if fault and not (fault == "unfinished" and keep_unfinished) else
                  "empty" if not text.strip() else          # the training scripts refuse it
                  "wrong" if only_right and not is_right(text, gold) else
                  "repeated" if only_right and (i, text) in kept else "written")
        counts[reason] += 1
        if reason == "written":
            kept.add((i, text))
            turn = {"role": "assistant", "content": text}
            others = {key: value for key, value in question.others.items() if key != "noisy"}
            rows.append({"conversations": [*question.messages, turn], **others})
    return counts, rows


def to_answer(tokens: list[int], tokenizer) -> tuple[str, int, str]:
    """The text encodes to these tokens, without the space that some tokenizers put first."""
    finished = tokens[-1] == tokenizer.end_of_turn
    text = tokenizer.decode(tokens[:len(tokens) - finished])
    text = text.removeprefix(" ") if tokenizer.prefix_space else text
    return text, len(tokens), "" if finished else "unfinished"


def report(counts: Counter, only_right: bool) -> str:
    reasons = ", ".join(f"{counts[key]:,} {text}" for key, text in LEFT_OUT.items() if counts[key])
    right = (counts["written"] + counts["repeated"]) / counts["asked"]
    return (f"{counts['written']:,} of {counts['asked']:,} answers"
            + f", {right:.1%} right" * only_right + f"; left out: {reasons}" * bool(reasons))


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add_agent_args(parser, "teacher")
    add = parser.add_argument_group("data").add_argument
    add("--data_path", nargs="+", required=True,
        help="files of questions, in the formats of dataset/dataset.md, with or without answers")
    add("--teacher_data_path", nargs="+", default=None,
        help="the same questions as the teacher reads them, row by row; default: --data_path")
    add("--out", required=True, help=".jsonl file of the answers; must not exist")
    add("--limit", type=int, default=0, help="number of rows used from each file; 0: all")
    add("--only_right", action="store_true",
        help="rejection sampling: keep only answers whose final answer is the file's, equal ones "
             "to a question once")
    add("--keep_unfinished", action="store_true",
        help="keep answers without an end-of-turn token within --max_new_tokens")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add = parser.add_argument_group("sampling").add_argument
    add("--max_new_tokens", type=int, default=256,
        help="maximum length of an answer, in tokens, including the end of turn")
    add("--temperature", type=float, default=0.0,
        help="softmax temperature; 0: greedy decoding. Qwen3 without thinking recommends 0.7, "
             "--top_p 0.8, --top_k 20")
    add("--top_p", type=float, default=1.0,
        help="nucleus sampling: total probability of the tokens sampled from, in (0, 1]; 1: all")
    add("--top_k", type=int, default=0, help="number of tokens sampled from; 0: all")
    add("--num_samples", type=int, default=1, help="number of answers per question, one row each")
    add("--seed", type=int, default=1337, help="random seed of the sampling")
    add("--batch_size", type=int, default=64, help="sequences generated at once, per process")
    add_process_args(parser)
    args = parse_args(parser, temperature="[0, inf)")
    if args.temperature == 0 and (args.top_p, args.top_k, args.num_samples) != (1.0, 0, 1):
        parser.error("--top_p, --top_k and --num_samples need a --temperature above 0: greedy "
                     "decoding has one answer")
    if args.teacher_data_path and len(args.teacher_data_path) != len(args.data_path):
        parser.error(f"--teacher_data_path names {len(args.teacher_data_path)} files, --data_path "
                     f"{len(args.data_path)}; they are pairs")
    if args.teacher_url and (args.top_p, args.top_k) != (1.0, 0):
        parser.error("--top_p and --top_k are of a --teacher; an endpoint has its own settings")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    dtype = pick_dtype(args.dtype, world.device)

    with checking_input():
        # 3. Teacher
        endpoint, about = make_endpoint(vars(args), "teacher"), {}
        if endpoint:
            answer = partial(requested, endpoint)
            Logger(f"teacher {endpoint.name}; its replies are kept in {endpoint.path}")
        else:
            teacher, tokenizer = load_model(args.teacher, world.device, dtype)
            answer = partial(generated, column_major(teacher), tokenizer)
            args.batch_size = args.teacher_parallel or args.batch_size
            about = {"--teacher": sha256_of_model(args.teacher), "its tokenizer": tokenizer.sha256,
                     "--dtype": str(dtype).removeprefix("torch.")}
            Logger(f"teacher {teacher.config}: {teacher.n_parameters() / 1e6:.2f} M parameters, "
                   f"from {args.teacher}")

        # 4. Questions, and the parts of the file that are still missing
        tasks = read_tasks(args.data_path, args.teacher_data_path, args.limit, args.only_right,
                           args.skip_bad_lines)
        slices = part_slices(len(tasks), args.batch_size, args.num_samples)
        about |= {"--data_path": list(map(file_sha256, args.data_path)),
                  "--teacher_data_path": list(map(file_sha256, args.teacher_data_path or [])),
                  **{f"--{flag}": vars(args)[flag] for flag in SAME}}
        parts = Parts(args.out, about, len(slices), world)
        with main_process_first(world):
            missing = parts.prepare()
    Logger(f"questions: {len(tasks):,}, answers to each: {args.num_samples}; "
           f"{len(missing)} of {len(slices)} parts are missing")

    # 5. Generate
    why = None
    try:
        for part in parts.mine(missing):
            generator = torch.Generator(world.device).manual_seed(seed_of(args.seed, part))
            answers = answer(tasks[slices[part]], args.num_samples, parts,
                             max_new_tokens=args.max_new_tokens, rows=args.batch_size,
                             temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                             generator=generator)
            if parts.stop.requested:
                break
            parts.write(part, to_rows(tasks[slices[part]], answers, args.only_right,
                                      args.keep_unfinished))
    except (ValueError if endpoint else ()) as error:       # it is down, or its budget is used
        why = str(error)

    # 6. Join
    results = parts.join(why)
    if world.rank != 0:
        return
    counts = sum((Counter(of_part) for of_part, _ in results), Counter())
    if counts["written"]:
        write_jsonl(parts.out, [row for _, rows in results for row in rows])
    parts.remove()
    if not counts["written"]:
        sys.exit(f"nothing to write: {report(counts, args.only_right)}")
    new_tokens = sum(results[part][0].get("tokens", 0) for part in missing)
    seconds = time.perf_counter() - parts.start
    Logger(f"wrote {report(counts, args.only_right)}; {seconds:.1f} s, "
           f"{new_tokens / seconds:,.0f} tokens/s")
    # The student's folder is its own: train_sft.py could otherwise overwrite the teacher.
    Logger("Learn from them: " + shlex.join([
        "python", "train_sft.py", "--weights", args.teacher or "STUDENT", "--data_path", args.out,
        "--out_dir", f"{Path(args.out).with_suffix('')}_sft"]))


if __name__ == "__main__":
    main()
