"""
蒸馏一轮：学生学新题，教师的软标签与答案各占一份；训练交给 train_distillation.py。
The distillation of a round: the student learns the new questions from the teacher's distributions
and from the answers, by train_distillation.py.

    python -m ability_tree.train --student out/ability/student/full_sft_64.pth --hide_options \\
        --logits out/ability/logits --data out/ability/valid.jsonl dataset/ability_sft.jsonl \\
        --temperature 1 --max_steps 300 --batch_size 48 --accumulation_steps 1 \\
        --learning_rate 1e-3 --warmup_iters 30 --out_dir out/ability

    loss = alpha_ce * CE(student, answer) + (1 - alpha_ce) * T^2 * KL(teacher_T || student_T)

Mix old rows with the new ones: on new rows alone, a tiny student forgot more than it learned. This
process becomes that script; Ctrl-C, --resume, exit status and the rest are described there. The
student is OUT_DIR/full_dist_DIM.pth.
"""

import shlex

from ability_tree.generate_logits import add_data_args, become, conversations, flags_of
from runtime.args import add_process_args, checking_input, make_parser, parse_args


LESSON = ("temperature", "alpha_ce", "epochs", "max_steps", "learning_rate", "warmup_iters",
          "batch_size", "accumulation_steps", "more")


def add_lesson_args(add):
    """The hyperparameters of a round's training, the same in train_ability_tree.py."""
    add("--temperature", type=float, default=2.0, help="temperature of the loss, above 0")
    add("--alpha_ce", "--alpha", type=float, default=0.5,
        help="weight of CE, in [0, 1]; KL has the rest")
    add("--epochs", type=int, default=3, help="passes over the data")
    add("--max_steps", type=int, default=0,
        help="total number of optimizer steps; 0: as many as --epochs make")
    add("--learning_rate", type=float, default=5e-6,
        help="learning rate; cosine decay from 1.1x to 0.1x of it")
    add("--warmup_iters", "--warmup_ratio", type=float, default=0,
        help="linear warm-up before the cosine, in steps; below 1: a fraction of all steps")
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--accumulation_steps", type=int, default=16,
        help="micro-batches per optimizer step and process")
    add("--more", default="", help="further flags of train_distillation.py, as one text: "
                                   '--more="--lora_rank 8"')


def main():
    parser = make_parser(__doc__)
    files = parser.add_argument_group("files")
    add, teacher = files.add_argument, files.add_mutually_exclusive_group(required=True)
    add("--student", required=True,
        help="initial weights: a checkpoint, a Hugging Face folder, a GGUF file")
    teacher.add_argument("--logits", help="outputs of the teacher, from generate_logits")
    teacher.add_argument("--teacher", help="or the teacher's weights, without a cache")
    add_data_args(add)
    add("--out_dir", "--output_dir", required=True,
        help="folder of weights, metrics, resume files and the bare conversations")
    add = parser.add_argument_group("lesson").add_argument
    add_lesson_args(add)
    add("--val_path", default="none",
        help="validation conversations; none: the exam of the round is enough")
    add("--seed", type=int, default=1337, help="random seed of shuffling and dropout")
    add("--resume", action="store_true",
        help="resume from the newest resume file in --out_dir, if there is one")
    add_process_args(parser)
    args = parse_args(parser)

    with checking_input():
        data_path = conversations(args.data, args.hide_options, args.skip_bad_lines,
                                  f"{args.out_dir}/conversations.jsonl")
        more = shlex.split(args.more)
    given = {name: value for name, value in vars(args).items()
             if name not in ("config", "data", "hide_options", "logits", "alpha_ce", "more")}
    flags = flags_of(**given, teacher_cache=args.logits, alpha=args.alpha_ce, data_path=data_path)
    become("train_distillation.py", flags + more)


if __name__ == "__main__":
    main()
