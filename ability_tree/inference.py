"""
考试：给每个选项的文字打分，最可能的选项就是模型的回答。
Examination: the model's answer to a multiple-choice question is the option of the highest
log-probability.

    python -m ability_tree.inference --weights out/ability/student/full_sft_64.pth \\
        --questions dataset/ability_dev.jsonl --hide_options --out out/ability/replies.jsonl

    {"id": "ability_dev-00007", "answer_idx": "B", "correct": true,
     "log_p": {"A": -9.21, "B": -0.04, "C": -7.9, "D": -8.3}}

log_p is the log-probability, in nats, of the option's text and its end of turn. A question that
exceeds the context length with its longest option has null answer_idx and log_p, and is wrong.
"""

from ability_tree.agents import batches_of
from ability_tree.steps import made_from, read_choices, work_in_parts
from dataset.formats import bare_question, to_question
from evaluation.scores import score_answers
from evaluation.tables import wilson
from interop.checkpoint import load_model, sha256_of_model
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.files import write_jsonl
from runtime.log import Logger
from runtime.precision import pick_dtype
from runtime.processes import init_distributed_mode

PART = 128          # questions in one part


def reply(model, tokenizer, rows: list[dict], hide_options: bool) -> list[dict]:
    """The reply to each row, as in the file; the first of equal options. For eval mode."""
    asked = [(bare_question(row) if hide_options else to_question(row).messages,
              row["options"].values()) for row in rows]
    replies = []
    for row, values in zip(rows, score_answers(model, tokenizer, asked)):
        log_p = values and {letter: round(nats, 4) for letter, nats in zip(row["options"], values)}
        answer = log_p and max(log_p, key=log_p.get)
        replies.append({"id": row["id"], "answer_idx": answer,
                        "correct": answer == row["answer_idx"], "log_p": log_p})
    return replies


def summary(replies: list[dict]) -> str:
    n, correct = len(replies), sum(each["correct"] for each in replies)
    low, high = wilson(correct, n)
    too_long = sum(each["log_p"] is None for each in replies)
    return (f"accuracy {correct / n:.1%} ({correct:,} of {n:,}), "
            f"95 % interval {low:.1%} to {high:.1%}"
            + (f"; {too_long:,} too long for the model, counted as wrong" if too_long else ""))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--weights", required=True, help="model: a checkpoint, a Hugging Face folder, a GGUF file")
    add("--questions", nargs="+", required=True,
        help="files of multiple choice {id, question, options, answer_idx}")
    add("--out", required=True, help=".jsonl file of the replies; must not exist yet")
    add("--hide_options", action="store_true",
        help="prompt with the bare question, for a model that learned to answer, not to choose")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add_process_args(parser)
    args = parse_args(parser)
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)
    dtype = pick_dtype(args.dtype, world.device)

    with checking_input():
        model, tokenizer = load_model(args.weights, world.device, dtype)
        rows = read_choices(args.questions, args.skip_bad_lines)
        about = {"weights": sha256_of_model(args.weights), "dtype": str(dtype),
                 **made_from(args, ("questions",), flags=("hide_options", "skip_bad_lines"))}
    parts, results = work_in_parts(
        args.out, about, batches_of(rows, PART),
        lambda _, batch: reply(model, tokenizer, batch, args.hide_options), world)
    if results is not None:
        replies = sum(results, [])
        write_jsonl(args.out, replies)
        parts.remove()
        Logger(f"{summary(replies)}. Wrote {args.out}")


if __name__ == "__main__":
    main()
