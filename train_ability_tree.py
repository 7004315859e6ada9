"""
能力树蒸馏：给学生考试，找出薄弱的叶子，让教师为它们出题，两个代理验题，再蒸馏；然后进入下一轮。
Distillation guided by an ability tree: examine the student, find its weak leaves, have the teacher
write questions for them, let two agents check these, distil, and begin again.

    round n  A inference  the student answers the round's questions   iteration_n/A_student_reply/
             B analyze    its answers are counted in the tree         iteration_n/B_student_tree/
             C generate   the teacher writes questions for weak       iteration_n/C_distill_data/
                          leaves
             D validate   those that two agents answer alike stay     iteration_n/D_validated_data/
             E logits     the teacher's distributions of the answers  iteration_n/E_teacher_logits/
             F train      the student learns from answers and         iteration_n_student_model/
                          distributions                               final_model/, checkpoint-K/
    the end  A, B         the tree before and after, and a table per leaf

Each step is a command: A to D `python -m ability_tree.NAME --help`, E scripts/cache_teacher.py, F
train_distillation.py. Its log is in iteration_n/. The same command again skips finished steps and
resumes the one that was interrupted.

one process    python train_ability_tree.py --config configs/ability_tiny.yaml
two processes  python train_ability_tree.py --config configs/ability_tiny.yaml --gpus 0 1
"""

import shlex
import shutil
from pathlib import Path
from random import Random

import torch

from ability_tree.agents import make_agent
from ability_tree.generate_distill_data import (add_share_args, plan, question_text,
                                                seeds_of_leaves)
from ability_tree.prompts import PROMPTS
from ability_tree.steps import add_request_args, read_abilities, read_choices, rows_of
from ability_tree.tree import AbilityTree, compare
from ability_tree.workflow import Workflow
from dataset.formats import bare_question, to_messages
from evaluation.tables import markdown
from interop.checkpoint import load_config, load_tokenizer
from runtime.args import check_ranges, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args
from runtime.files import read_rows, write_jsonl, write_text
from runtime.log import Logger

ROLES = ("teacher", "agent_a", "agent_b")


def read_args():
    parser = make_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--student", default="out/full_sft_512.pth", help="initial weights of the first round")
    # The teacher's weights are distilled, and write the questions, unless --teacher_url names a
    # model behind an endpoint. An agent that is not given is the one that writes.
    for role in ROLES:
        add_agent_args(parser, role)
    parser.set_defaults(teacher="out/full_sft_768.pth")

    add = parser.add_argument_group("data").add_argument
    add("--dataset_files", nargs="+", default=["dataset/ability_dev.jsonl"],
        help="questions of the exams: a file per round, or one for all")
    add("--ability_files", nargs="*", default=["dataset/ability_paths.jsonl"],
        help="their ability paths, a file per round or one for all; the teacher finds missing ones")
    add("--seed_questions", nargs="+", default=["dataset/ability_seeds.jsonl"],
        help="real questions, the examples for new ones")
    add("--seed_abilities", nargs="+", default=["dataset/ability_paths.jsonl"], help="their paths")
    add("--exclude", nargs="*", default=[], help="exams whose questions must not be written")
    add("--old_data", nargs="*", default=[],
        help="rows of any format that the student knows, mixed with the new ones against "
             "forgetting, together with the rows of earlier rounds")
    add("--replay_share", type=float, default=0.5,
        help="share of old rows in the training data, in [0, 1), sampled anew in each round")
    add("--initial_tree", help="the tree before round 1; default: that of the ability files")
    add("--hide_options", action="store_true",
        help="prompt and train on the bare question, without its options")

    add = parser.add_argument_group("questions").add_argument
    add("--rounds", type=int, default=2, help="number of rounds")
    add("--n_samples", type=int, default=10000, help="questions to write in each")
    add_share_args(add)
    add("--write_temperature", type=float, default=1.0,
        help="sampling temperature of the teacher when it writes questions, above 0")
    add_request_args(parser)

    add = parser.add_argument_group("training").add_argument
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
    add("--max_seq_len", type=int,
        help="maximum length of a sample, in tokens; default: the models' context length")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=1337, help="random seed of sampling and training")
    add("--gpus", type=int, nargs="+", default=[0],
        help="GPU numbers, a process for each; on a CPU their count matters")
    add("--workflow_dir", default="output/workflow", help="folder of trees, questions and logs")
    add("--models_dir", default="output/models", help="folder of the students")
    args = parse_args(parser)

    n_files = args.rounds, 1
    n_gpus = torch.cuda.device_count() or max(args.gpus) + 1
    check_ranges(
        parser, args,
        ("gpus", all(0 <= gpu < n_gpus for gpu in args.gpus), f"be numbers below {n_gpus}"),
        ("dataset_files", len(args.dataset_files) in n_files, "be one file, or one per round"),
        ("ability_files", len(args.ability_files) in n_files or not args.ability_files
         and args.initial_tree, "be one file, or one per round; none with --initial_tree alone"))
    return args


def check_inputs(args):
    """Read each of the user's files once: what a later step would refuse is reported before the
    first step. Without --max_seq_len, it is the context length of both models."""
    for name in ("student", *ROLES):
        if vars(args)[name] and not Path(vars(args)[name]).exists():
            raise ValueError(f"--{name} {vars(args)[name]}: there is no such file")
    student, teacher = (load_tokenizer(path) for path in (args.student, args.teacher))
    if reason := student.unreadable(teacher.ids):
        raise ValueError(f"--teacher {args.teacher} cannot read the tokens of --student "
                         f"{args.student}, {reason}: take two models of one family")
    limit = min(load_config(path).max_seq_len for path in (args.student, args.teacher))
    args.max_seq_len = args.max_seq_len or limit
    if args.max_seq_len > limit:
        raise ValueError(f"--max_seq_len {args.max_seq_len} exceeds the context length of the "
                         f"models, {limit}")
    abilities = list(map(read_abilities, ([file] for file in args.ability_files)))
    if args.initial_tree:
        tree = AbilityTree.load(args.initial_tree)
    else:
        tree = AbilityTree.from_paths(path for paths in abilities for path in paths.values())
    # Each file by itself: rounds may have the same ids.
    ids = {str(row["id"]) for file in args.dataset_files for row in read_choices([file])}
    for path in (paths[name] for paths in abilities for name in paths if name in ids):
        tree.find(path)
    leaves = dict.fromkeys(tree.leaves(), 1.0)
    seeds = seeds_of_leaves(read_choices(args.seed_questions), read_abilities(args.seed_abilities),
                            leaves)
    plan(leaves, seeds, 1, PROMPTS[args.prompts].writes_wrong_options)
    rows_of(args.exclude, question_text)
    rows_of(args.old_data, bare)
    for role in ROLES:
        flags = agent_flags(args, role)
        if flags[f"{role}_url"]:
            make_agent(flags, role, torch.device("cpu"))


def agent_flags(args, role: str) -> dict:
    """A step's flags of an agent: its own, or the teacher's where it has none."""
    who = role if vars(args).get(role) or vars(args).get(f"{role}_url") else "teacher"
    flags = {key.replace(who, role, 1): value for key, value in vars(args).items()
             if key == who or key.startswith(f"{who}_")}
    if flags[f"{role}_url"]:
        flags[f"{role}_replies"] = flags[f"{role}_replies"] or str(
            Path(args.workflow_dir, f"{who}_replies.jsonl"))
        flags[role] = flags[role] if who != "teacher" else None     # its weights are distilled
    return flags


def bare(row: dict) -> dict:
    """The row as a conversation; multiple choice as its question and the text of its answer."""
    messages = to_messages(row)
    return {"conversations": [*bare_question(row), messages[-1]] if "options" in row else messages}


def write_data(new: Path, old: list, share: float, seed: int, convert, path: Path):
    """The new rows and a sample of the old ones, which are then `share` of all."""
    rows, old = rows_of([new], dict), rows_of(old, dict)
    n = min(len(old), round(len(rows) * share / (1 - share)))
    write_jsonl(path, [convert(row) for row in [*rows, *Random(seed).sample(old, n)]])


def keep_checkpoint(student: Path):
    """Move what resumes a finished training from final_model/ to checkpoint-K/ beside it, with K
    the number of its steps."""
    if files := list(student.parent.glob("*.resume*")):
        n_steps = read_rows(student.with_suffix(".jsonl"), "step")[-1]["step"]
        folder = student.parent.with_name(f"checkpoint-{n_steps}")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file in files:
            file.replace(folder / file.name)


def report(before: AbilityTree, after: AbilityTree, n_rounds: int, folder: Path) -> str:
    """Markdown: a row per leaf, and the number of questions of each round."""
    counts = [["round", "written", "kept"]]
    for number in range(1, n_rounds + 1):
        files = (folder / f"iteration_{number}" / name for name in (
            "C_distill_data/distill.jsonl", "D_validated_data/valid.jsonl"))
        counts.append([f"{number}", *(f"{len(file.read_bytes().splitlines()):,}"
                                      for file in files)])
    return (f"# Before, and after round {n_rounds}\n\n{compare(before, after)}\n\n"
            "In parentheses: the 95 % interval of the change; bold where it excludes 0.\n\n"
            f"![the tree](report.png)\n\n{markdown(counts)}\n")


def rounds(args, workflow: Workflow, folder: Path) -> tuple[list[AbilityTree], str]:
    """The student's trees before each round and at the end, and the last student."""
    student, trees, valid = args.student, [], []
    requests = {"prompts": args.prompts, "max_new_tokens": args.max_new_tokens}
    teacher, agent_a, agent_b = (agent_flags(args, role) for role in ROLES)

    made, tree = args.initial_tree, folder / "initial_ability_tree.json"
    if made is None:
        made = folder / "initial_ability_tree/tree.json"
        workflow.step("start", "ability_tree.create_initial_tree", made.parent,
                      ability_files=args.ability_files, out=made)
    if not tree.exists() or tree.read_bytes() != Path(made).read_bytes():
        shutil.copyfile(made, tree)

    for number in range(1, args.rounds + 2):
        here, title, seed = folder / f"iteration_{number}", f"round {number}", args.seed + number
        questions, abilities = (
            files[min(number, args.rounds) - 1:][:1] if len(files) > 1 else files
            for files in (args.dataset_files, args.ability_files))

        # A. The student sits an exam
        replies = here / "A_student_reply/replies.jsonl"
        workflow.step(title, "ability_tree.inference", replies.parent, weights=student,
                      questions=questions, hide_options=args.hide_options, out=replies)

        # B. Its answers are counted in the tree. An agent finds the leaves of questions without one
        before, tree, agent = tree, here / "B_student_tree/tree.json", {}
        if {str(row["id"]) for row in read_choices(questions)} - set(read_abilities(abilities)):
            agent = {**agent_flags(args, "agent"), **requests}
        workflow.step(title, "ability_tree.analyze", tree.parent, replies=[replies],
                      questions=questions, abilities=abilities, tree=before, round=number, **agent,
                      out=tree, png=tree.with_suffix(".png"))
        trees.append(AbilityTree.load(tree))
        if number > args.rounds:
            return trees, student

        # C. The teacher writes questions, most of them for weak leaves
        written = here / "C_distill_data/distill.jsonl"
        workflow.step(title, "ability_tree.generate_distill_data", written.parent, tree=tree,
                      questions=args.seed_questions, abilities=args.seed_abilities,
                      exclude=args.exclude, **teacher, **requests, n_samples=args.n_samples,
                      power=args.power, floor=args.floor, temperature=args.write_temperature,
                      seed=seed, id_prefix=f"round{number}", out=written)

        # D. A question is kept if both agents give its answer
        kept = here / "D_validated_data/valid.jsonl"
        workflow.step(title, "ability_tree.validate", kept.parent, questions=[written],
                      abilities=[written.with_name("distill_ability.jsonl")], **agent_a, **agent_b,
                      **requests, out=kept)

        # E. The teacher's distributions: of the new rows, and of old ones against forgetting
        data, logits = here / "training.jsonl", here / "E_teacher_logits/logits"
        write_data(kept, [*args.old_data, *valid], args.replay_share, seed,
                   bare if args.hide_options else dict, data)
        valid.append(kept)
        learned = {"data_path": data, "max_seq_len": args.max_seq_len}
        workflow.step(title, "scripts.cache_teacher", logits.parent, teacher=args.teacher,
                      tokenizer=args.student, **learned, cache_dir=logits)

        # F. The student is distilled; the next round examines it
        trained = Path(args.models_dir, f"iteration_{number}_student_model/final_model")
        workflow.step(title, "train_distillation", trained, log=here / "train_distillation.log",
                      resume_flag="--resume", more=shlex.split(args.more), student=student,
                      teacher_cache=logits, **learned, out_dir=trained, alpha=args.alpha_ce,
                      temperature=args.temperature, epochs=args.epochs, max_steps=args.max_steps,
                      learning_rate=args.learning_rate, warmup_iters=args.warmup_iters,
                      batch_size=args.batch_size, accumulation_steps=args.accumulation_steps,
                      val_path="none", seed=seed)
        student = next(path for path in sorted(trained.glob("full_dist_*.pth"))
                       if not path.stem.endswith("_best"))
        keep_checkpoint(student)


def main():
    args = read_args()
    folder = Path(args.workflow_dir)
    folder.mkdir(parents=True, exist_ok=True)
    workflow = Workflow(args.gpus)
    with checking_input():
        check_inputs(args)
        trees, student = rounds(args, workflow, folder)
    text = report(trees[0], trees[-1], args.rounds, folder)
    Logger(f"\n{text}")
    write_text(folder / "report.md", text)
    trees[-1].draw(folder / "report.png", trees[0])
    Logger(f"{folder}/report.md, {folder}/report.png; the student: {student}")


if __name__ == "__main__":
    main()
