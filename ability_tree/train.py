"""
蒸馏一轮：学生学新题，教师的软标签与答案各占一份；训练交给 train_distillation.py。
A round's distillation: the student learns the new questions, from the teacher's distributions and from the answers. The
training is that of train_distillation.py.

    python -m ability_tree.train --student out/ability/student/full_sft_64.pth --logits out/ability/logits --hide_options \\
        --data out/ability/valid.jsonl dataset/ability_sft.jsonl --temperature 1 --max_steps 300 --batch_size 48 \\
        --accumulation_steps 1 --learning_rate 1e-3 --warmup_iters 30 --out_dir out/ability

    loss = alpha_ce * CE(student, answer) + (1 - alpha_ce) * T^2 * KL(teacher_T || student_T)

two processes  torchrun --nproc_per_node 2 -m ability_tree.train --ddp ...

Old rows among the new ones keep what the student knew: on new rows alone a tiny one forgot more than it learned. This process
goes on as that script: Ctrl-C, --resume, exit status and all else are as told there. The student that comes of it is
OUT_DIR/full_dist_DIM.pth.
"""

import argparse
import shlex

from ability_tree.generate_logits import add_data_args, conversations, flags_of, go_on_as
from runtime.args import checking_input, parse_args


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what")
    add, teaches = what.add_argument, what.add_mutually_exclusive_group(required=True)
    add("--student", required=True, help="weights to start from: a checkpoint, a Hugging Face folder, a GGUF file")
    teaches.add_argument("--logits", default=None, help="folder of what the teacher said, from ability_tree.generate_logits")
    teaches.add_argument("--teacher", default=None, help="or its weights: it is then asked while the student learns")
    add_data_args(add)
    add("--out_dir", "--output_dir", required=True,
        help="folder for weights, metrics and resume files, and the bare conversations")
    add = parser.add_argument_group("lesson").add_argument
    add("--temperature", type=float, default=2.0, help="softens both distributions, above 0; 1 leaves them")
    add("--alpha_ce", "--alpha", type=float, default=0.5, help="weight of CE in [0, 1]; the divergence has the rest")
    add("--epochs", type=int, default=3, help="passes over the data")
    add("--max_steps", type=int, default=0, help="optimizer steps in all; 0: as many as --epochs make")
    add("--learning_rate", type=float, default=5e-6, help="of the cosine, which runs from 1.1 to 0.1 times this")
    add("--warmup_iters", type=int, default=0, help="steps of a linear warm-up before it")
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--accumulation_steps", type=int, default=16, help="micro-batches per optimizer step and process")
    add("--val_path", default="none", help="conversations to look at on the way; none: the round's exam tells enough")
    add("--more", default="", help='further flags of train_distillation.py, in one text: --more="--lora_rank 8"')
    add = parser.add_argument_group("run").add_argument
    add("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="of the matrix products. bfloat16 falls back to float32 where the hardware has none")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--ddp", action="store_true", help="several processes, under torchrun")
    add("--local_rank", type=int, default=-1, help="GPU of this process; -1: as torchrun says")
    add("--seed", type=int, default=1337, help="of the shuffling and dropout")
    add("--resume", action="store_true", help="go on from the newest resume file of --out_dir, if there is one")
    args = parse_args(parser)

    with checking_input():
        data_path = conversations(args, f"{args.out_dir}/conversations.jsonl")
        more = shlex.split(args.more)
    go_on_as("train_distillation.py", flags_of(
        student=args.student, teacher=args.teacher, teacher_cache=args.logits, data_path=data_path, val_path=args.val_path,
        out_dir=args.out_dir, temperature=args.temperature, alpha=args.alpha_ce, epochs=args.epochs,
        max_steps=args.max_steps, learning_rate=args.learning_rate, warmup_iters=args.warmup_iters,
        batch_size=args.batch_size, accumulation_steps=args.accumulation_steps, max_seq_len=args.max_seq_len,
        skip_bad_lines=args.skip_bad_lines, dtype=args.dtype, device=args.device, ddp=args.ddp, local_rank=args.local_rank,
        seed=args.seed, resume=args.resume) + more)


if __name__ == "__main__":
    main()
