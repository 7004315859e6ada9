"""
能力树蒸馏：考学生，找出能力树上弱的叶子，让教师为它们出题，两个代理验题，蒸馏，再来一轮。
Distillation guided by a tree of abilities: examine the student, find its weak leaves, have the teacher write questions for
these, let two agents check them, distil, and begin again.

    round n     A inference    the student answers the round's questions           iteration_n/A_student_reply/
                B analyze      what was right goes to the leaves of the tree       iteration_n/B_student_tree/
                C generate     questions for leaves, drawn by how weak they are    iteration_n/C_distill_data/
                D validate     kept where two agents come to the same answer       iteration_n/D_validated_data/
                E logits       what the teacher says of them, word for word        iteration_n/E_teacher_logits/
                F train        the student learns from it                          models/iteration_n_student_model/
    at the end  A and B once more, the tree before and after, and a table per leaf

When: some leaves lack rows, and the teacher can write questions. Weak leaves then end at 64.5 ± 2.7 %, with questions for all
leaves alike at 58.0 ± 1.3, without new ones at 33.4 (README, "The ability tree").

Each step is a command of its own (`python -m ability_tree.NAME --help`) and is printed as it is run; what it prints is also in
iteration_n/NAME.log. It is skipped when the manifest.json of its folder tells that the same command has made what lies there
from the same inputs, by their hashes. Ctrl-C ends the step as it ends by itself, and the same command goes on.

    python train_ability_tree.py --config configs/ability_tiny.yaml
    python train_ability_tree.py --config configs/ability_tiny.yaml --gpus 0 1      two processes for each step
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import torch

from ability_tree.agents import add_agent_args, make_agent
from ability_tree.generate_distill_data import text_of
from ability_tree.generate_logits import bare, flags_of
from ability_tree.inference import read_choices
from ability_tree.prompts import PROMPTS
from ability_tree.steps import read_abilities
from ability_tree.tree import AbilityTree, compare
from dataset.formats import files_of, read_each
from runtime.files import file_sha256
from runtime.args import WORKFLOW, checking_input, parse_args, resume_command
from runtime.files import keep_previous, write_atomic
from runtime.log import Logger

ROOT = Path(__file__).resolve().parent
MANIFEST = "manifest.json"


class Workflow:
    """Runs commands, each into a folder of its own, unless it is done. What is in the folder tells:

    manifest.json, of this command, these inputs, these files       it is done, and skipped
    begun.json, of this command and these inputs                    it was stopped, and goes on
    anything else                                                   another command's: kept as FOLDER.previous, done anew

    gpus        their numbers: a process each, under torchrun if there are several
    """

    def __init__(self, gpus: list[int]):
        self.gpus = gpus

    def step(self, title: str, module: str, out: Path, inputs: list, flags: dict, log: Path | None = None, resumable: str = ""):
        """python -m ability_tree.MODULE FLAGS, which reads `inputs` (files and folders) and writes into `out`. What it prints
        goes to `log` too, by default MODULE.log beside `out`. One that was stopped is called again with the flag
        `resumable`."""
        command = [f"ability_tree.{module}", *flags_of(**flags)]
        # What only tells how fast it may go makes no other result; how many processes train a student does.
        told = {name: value for name, value in flags.items() if not name.endswith(("_budget", "_rpm", "_replies", "_key_env"))}
        begun = {"command": [command[0], *flags_of(**told)], "processes": len(self.gpus) if resumable else "any",
                 "inputs": {str(path): sha256_of(Path(path)) for path in inputs}}
        manifest, started = out / MANIFEST, out / "begun.json"
        if recorded(manifest) == begun | {"outputs": outputs_of(out)}:
            Logger(f"== {title}: is there, {out}")
            return
        again = started.exists() and not manifest.exists() and recorded(started) == begun
        if out.exists() and not again:
            Logger(f"{out} was made by another command, or from other inputs: it is kept as {out}.previous")
            keep_previous(out)
        if again and not resumable:         # killed after its last file: it would take that for another's. Its parts stay
            for path in out.iterdir():
                if path.is_file() and path != started:
                    path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(started, lambda file: file.write(json.dumps(begun, indent=2).encode()))
        asked = self.run(title, command + ([resumable] if again and resumable else []), log or out.parent / f"{module}.log")
        text = json.dumps(begun | {"outputs": outputs_of(out)}, indent=2)
        write_atomic(manifest, lambda file: file.write(text.encode()))
        started.unlink()
        if asked:
            self.leave(title)

    @staticmethod
    def leave(title: str):
        Logger(f"stopped at {title}; what is done stays. Go on with: {resume_command(1)}")
        sys.exit(130)

    def run(self, title: str, command: list[str], log: Path) -> bool:
        """Returns whether Ctrl-C was heard, though the step came to its end."""
        launcher = [sys.executable, "-m"]
        if len(self.gpus) > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(len(self.gpus)), "-m"]
            command = [*command, "--ddp"]
        typed = f"python {shlex.join([*launcher[1:], *command])}"
        Logger(f"\n== {title}\n{typed}")
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.gpus))} if torch.cuda.is_available() else {}
        # Ctrl-C comes here alone, and is handed on: the step saves, says how to go on, and ends.
        asked, children = [], []

        def hand_on(number, frame):
            asked.append(number)
            for child in children:
                child.send_signal(number)

        before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
        child = subprocess.Popen([*launcher, *command], cwd=ROOT,
                                 env=os.environ | visible | {WORKFLOW: resume_command(1)},
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        children.append(child)
        if asked:
            child.send_signal(asked[0])
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{typed}\n")
            for line in child.stdout:
                file.write(line)
                Logger(line.rstrip("\n"))
        code = child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        if code and asked:
            self.leave(title)
        if code:
            sys.exit(f"{title} ended with status {code}; its log is {log}. What is done stays: mend it, and the command goes on there")
        return bool(asked)


def recorded(path: Path) -> dict | None:
    """What a step wrote of itself; None if nothing, or nothing whole."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None


def sha256_of(path: Path) -> str:
    """Of a file; of a folder, of all its files' names and hashes."""
    if not path.exists():
        raise ValueError(f"no file at {path}")
    if path.is_file():
        return hashed(path, path.stat().st_size, path.stat().st_mtime_ns)
    return hashlib.sha256(json.dumps(outputs_of(path)).encode()).hexdigest()


@functools.cache
def hashed(path: Path, size: int, mtime: int) -> str:
    """A teacher of many gigabytes is the input of most steps, and is read for its hash once."""
    return file_sha256(path)


def outputs_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, "begun.json")}


def read_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # who
    add = parser.add_argument_group("models").add_argument
    add("--student", default="out/full_sft_512.pth", help="weights that the first round starts from")
    add("--prompts", default="json", choices=list(PROMPTS), help="how requests are worded: ability_tree/prompts.py")
    # The teacher's weights are distilled from. They write the questions too, or with --teacher_url a model behind an endpoint
    # does. The agents check them; one of which nothing is said is who writes.
    for role in ("teacher", "agent_a", "agent_b"):
        add_agent_args(parser, role)
    parser.set_defaults(teacher="out/full_sft_768.pth")
    # what
    add = parser.add_argument_group("data").add_argument
    add("--dataset_files", nargs="+", default=["dataset/ability_dev.jsonl"],
        help="the questions that find the weak leaves, a file for each round; one file serves all")
    add("--ability_files", nargs="*", default=["dataset/ability_paths.jsonl"], help="their ability paths, likewise; with none, "
        "or where one is missing, the teacher finds the leaf")
    add("--seed_questions", nargs="+", default=["dataset/ability_seeds.jsonl"],
        help="real questions, after which new ones are written")
    add("--seed_abilities", nargs="+", default=["dataset/ability_paths.jsonl"], help="their ability paths")
    add("--exclude", nargs="*", default=[], help="exams whose questions are never to be written")
    add("--old_data", nargs="*", default=[], help="rows of any format that the student knows, to be mixed with the new ones "
                                                   "against forgetting; the rows of earlier rounds are always among them")
    add("--replay_share", type=float, default=0.5, help="of old rows in what is learned, in [0, 1), drawn anew in each round")
    add("--initial_tree", default=None, help="the tree before the first round; default: that of the ability files")
    add("--hide_options", action="store_true", help="ask and teach the bare question, without its options on lettered lines")
    # how much
    add = parser.add_argument_group("rounds").add_argument
    add("--rounds", type=int, default=2, help="how often")
    add("--n_samples", type=int, default=10000, help="questions to be written in each")
    add("--power", type=float, default=1.0, help="of (1 - accuracy) in a leaf's share of them; 0: all leaves alike")
    add("--floor", type=float, default=0.02, help="part in [0, 1] that all leaves share alike")
    add("--write_temperature", type=float, default=1.0, help="of the teacher when it writes questions, above 0")
    add("--write", action="store_true", help="miniworld: agents write their answer, in place of choosing the likeliest option")
    add("--max_new_tokens", type=int, default=512, help="longest reply of an agent, in tokens")
    add("--epochs", type=int, default=3, help="passes over a round's data")
    add("--max_steps", type=int, default=0, help="optimizer steps of a round; 0: as many as --epochs make")
    add("--learning_rate", type=float, default=5e-6, help="of the cosine, which runs from 1.1 to 0.1 times this")
    add("--warmup_iters", type=int, default=0, help="steps of a linear warm-up before it")
    add("--max_seq_len", type=int, default=None, help="tokens, longer samples are cut; default: what the models were made for")
    add("--batch_size", type=int, default=2, help="samples per micro-batch and process")
    add("--accumulation_steps", type=int, default=16, help="micro-batches per optimizer step and process")
    add("--temperature", type=float, default=2.0, help="of the loss")
    add("--alpha_ce", type=float, default=0.5, help="weight of CE in [0, 1]; KL has the rest")
    add("--more", default="", help='further flags of train_distillation.py, in one text: --more="--lora_rank 8"')
    # where
    add = parser.add_argument_group("run").add_argument
    add("--gpus", type=int, nargs="+", default=[0], help="numbers of the GPUs, a process for each; on a CPU so many processes")
    add("--workflow_dir", default="output/workflow", help="folder of the trees, the questions and the logs")
    add("--models_dir", default="output/models", help="folder of the students")
    add("--seed", type=int, default=1337, help="of all that is drawn")
    args = parse_args(parser)
    if not args.ability_files and not args.initial_tree:
        parser.error("--ability_files or --initial_tree: one of them has to tell what leaves there are")
    for name in ("dataset_files", "ability_files"):
        if len(vars(args)[name]) not in (1, args.rounds) and vars(args)[name]:
            parser.error(f"--{name} has {len(vars(args)[name])} files for --rounds {args.rounds}: give one for each round, or one "
                         "for all")
    for role in ("agent_a", "agent_b"):
        idle = [f"--{key}" for key, value in vars(args).items() if key.startswith(f"{role}_") and value]
        if idle and not vars(args)[role] and not vars(args)[f"{role}_url"]:
            parser.error(f"{', '.join(idle)}: of no effect without --{role}_url")
    for name in ("rounds", "n_samples", "max_new_tokens", "batch_size", "accumulation_steps", "epochs"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]} must be 1 or more")
    for name in ("write_temperature", "temperature", "learning_rate"):
        if vars(args)[name] <= 0:
            parser.error(f"--{name} {vars(args)[name]:g} must be above 0")
    for name in ("replay_share", "floor", "alpha_ce"):
        if not 0 <= vars(args)[name] <= 1:
            parser.error(f"--{name} {vars(args)[name]:g} must lie in [0, 1]")
    if args.replay_share == 1:
        parser.error("--replay_share 1: nothing new would be learned; it must be below 1")
    if args.power < 0:
        parser.error(f"--power {args.power:g} must be 0 or more")
    if args.write and args.prompts != "miniworld":
        parser.error(f"--write is of --prompts miniworld; under {args.prompts} the agents are shown the options, and name a letter")
    return args


def check_inputs(args, folder: Path):
    """Reads each of the user's files once, so that a mistake in the last is told before the first step. Raises what their
    readers raise."""
    for name in ("student", "teacher", "agent_a", "agent_b", "dataset_files", "ability_files", "seed_questions",
                 "seed_abilities", "exclude", "old_data", "initial_tree"):
        paths = vars(args)[name] or []
        for path in paths if isinstance(paths, list) else [paths]:
            if not Path(path).exists():
                raise ValueError(f"--{name} {path}: there is no such file")
    for file in args.dataset_files:
        read_choices([file])
    for file in args.ability_files:
        read_abilities([file])
    read_choices(args.seed_questions)
    read_abilities(args.seed_abilities)
    for path in args.exclude:
        for file in files_of(path):
            read_each(file, text_of)
    for file in args.old_data:
        read_each(file, bare)
    if args.initial_tree:
        AbilityTree.load(args.initial_tree)
    for role in ("teacher", "agent_a", "agent_b"):
        flags = agent_flags(args, role, folder)
        if flags[f"{role}_url"]:
            make_agent(argparse.Namespace(**flags), role, torch.device("cpu"))


def main():
    args = read_args()
    folder, models = Path(args.workflow_dir), Path(args.models_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with checking_input():
            check_inputs(args, folder)
            before, after = rounds(args, folder, models)
    except KeyboardInterrupt:           # between two steps
        Workflow.leave("once")
    text = report(before, after, args.rounds, folder)
    Logger(f"\n{text}")
    write_atomic(folder / "report.md", lambda file: file.write(text.encode()))
    after.draw(folder / "report.png", before)
    Logger(f"{folder}/report.md, {folder}/report.png; the student: {models}/iteration_{args.rounds}_student_model")


def report(before: AbilityTree, after: AbilityTree, n_rounds: int, folder: Path) -> str:
    """Markdown: a row per leaf, and what became of the questions of each round."""
    lines = [f"# Before, and after round {n_rounds}", "", compare(before, after), "",
             "Behind each change its 95 % interval; bold where that leaves out 0.", "", "![the tree](report.png)", "",
             "| round | questions written | kept |", "|---|---:|---:|"]
    for number in range(1, n_rounds + 1):
        written, kept = (len((folder / f"iteration_{number}" / path).read_bytes().splitlines())
                         for path in ("C_distill_data/distill.jsonl", "D_validated_data/valid.jsonl"))
        lines.append(f"| {number} | {written:,} | {kept:,} |")
    return "\n".join(lines) + "\n"


def agent_flags(args, role: str, folder: Path) -> dict:
    """What a step is told of an agent: its own flags, or the teacher's where it has none."""
    who = role if vars(args).get(role) or vars(args).get(f"{role}_url") else "teacher"
    flags = {key.replace(who, role, 1): value for key, value in vars(args).items() if key == who or key.startswith(f"{who}_")}
    if flags[f"{role}_url"]:
        flags[f"{role}_replies"] = flags[f"{role}_replies"] or folder / f"{who}_replies.jsonl"
        if who == "teacher":
            flags[role] = None          # its weights are there for the distillation
    return flags


def all_placed(questions: list, abilities: list) -> bool:
    """Whether each question has a path, so that no agent need be asked for its leaf."""
    paths = read_abilities(abilities)
    return all(str(row["id"]) in paths for row in read_choices(questions))


def weights_of(agents: dict) -> list[str]:
    return [agents[role] for role in ("teacher", "agent", "agent_a", "agent_b") if agents.get(role)]


def replayed(old: list, new: Path, args, seed: int, path: Path) -> list[Path]:
    """A file of so many old rows that they are --replay_share of what is learned; [] if there are none."""
    n_new = len(new.read_bytes().splitlines())
    rows = [row for file in old for row in read_each(file, dict)]
    n = min(len(rows), round(n_new * args.replay_share / (1 - args.replay_share)))
    if n == 0:
        return []
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in Random(seed).sample(rows, n)).encode()
    if not path.exists() or path.read_bytes() != text:
        write_atomic(path, lambda file: file.write(text))
    return [path]


def rounds(args, folder: Path, models: Path) -> tuple[AbilityTree, AbilityTree]:
    """All rounds; the trees of the student before the first and after the last one."""
    workflow, student, hide = Workflow(args.gpus), args.student, args.hide_options
    initial = folder / "initial_ability_tree"
    tree = args.initial_tree
    if tree is None:
        tree = initial / "tree.json"
        workflow.step("initial tree", "create_initial_tree", initial, args.ability_files,
                      {"ability_files": args.ability_files, "out": tree})
    trees, valid = [], []
    for number in range(1, args.rounds + 2):
        here = folder / f"iteration_{number}"
        questions, abilities = (files[min(number, args.rounds) - 1:][:1] if len(files) > 1 else files
                                for files in (args.dataset_files, args.ability_files))

        replies = here / "A_student_reply" / "replies.jsonl"
        workflow.step(f"round {number}: inference", "inference", replies.parent, [student, *questions],
                      {"weights": student, "questions": questions, "hide_options": hide, "out": replies})

        before, tree = tree, here / "B_student_tree" / "tree.json"
        agent = {}
        if not all_placed(questions, abilities):
            agent = {**agent_flags(args, "agent", folder), "prompts": args.prompts, "hide_options": hide,
                     "max_new_tokens": args.max_new_tokens, "seed": args.seed}
        workflow.step(f"round {number}: analyze", "analyze", tree.parent,
                      [replies, *questions, *abilities, before, *weights_of(agent)],
                      {"replies": [replies], "questions": questions, "abilities": abilities, "tree": before, "round": number,
                       **agent, "out": tree, "png": tree.with_suffix(".png")})
        trees.append(AbilityTree.load(tree))
        if number > args.rounds:
            return trees[0], trees[-1]

        written = here / "C_distill_data" / "distill.jsonl"
        writer = agent_flags(args, "teacher", folder)
        workflow.step(f"round {number}: generate", "generate_distill_data", written.parent,
                      [tree, *args.seed_questions, *args.seed_abilities, *args.exclude, *weights_of(writer)],
                      {"tree": tree, "questions": args.seed_questions, "abilities": args.seed_abilities, "exclude": args.exclude,
                       **writer, "prompts": args.prompts, "n_samples": args.n_samples, "power": args.power,
                       "floor": args.floor, "temperature": args.write_temperature, "max_new_tokens": args.max_new_tokens,
                       "seed": args.seed + number, "id_prefix": f"round{number}", "out": written})

        kept = here / "D_validated_data" / "valid.jsonl"
        agents = agent_flags(args, "agent_a", folder) | agent_flags(args, "agent_b", folder)
        workflow.step(f"round {number}: validate", "validate", kept.parent, [written, *weights_of(agents)],
                      {"questions": [written], "abilities": [written.with_name("distill_ability.jsonl")], **agents,
                       "prompts": args.prompts, "write": args.write, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
                       "out": kept})

        data = [kept, *replayed([*args.old_data, *valid], kept, args, args.seed + number, here / "replay.jsonl")]
        valid.append(kept)
        logits = here / "E_teacher_logits" / "logits"
        workflow.step(f"round {number}: logits", "generate_logits", logits.parent, [args.teacher, *data],
                      {"teacher": args.teacher, "data": data, "hide_options": hide, "max_seq_len": args.max_seq_len,
                       "out": logits})

        trained = models / f"iteration_{number}_student_model"
        workflow.step(f"round {number}: train", "train", trained, [student, logits, *data],
                      {"student": student, "logits": logits, "data": data, "hide_options": hide, "out_dir": trained,
                       "temperature": args.temperature, "alpha_ce": args.alpha_ce, "epochs": args.epochs,
                       "max_steps": args.max_steps, "learning_rate": args.learning_rate, "warmup_iters": args.warmup_iters,
                       "batch_size": args.batch_size, "accumulation_steps": args.accumulation_steps,
                       "max_seq_len": args.max_seq_len, "more": args.more, "seed": args.seed + number},
                      log=here / "train.log", resumable="--resume")
        student = next(path for path in sorted(trained.glob("full_dist_*.pth")) if not path.stem.endswith("_best"))


if __name__ == "__main__":
    main()
