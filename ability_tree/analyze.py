"""
分析：把学生的对错记到能力树的叶子上；没有路径的题，由代理归类。
Analysis: what a student got right and wrong goes to the leaves of the ability tree; an agent finds the leaf of a question
that has no path.

    python -m ability_tree.analyze --replies out/ability/replies.jsonl --questions dataset/ability_dev.jsonl \\
        --abilities dataset/ability_paths.jsonl --tree out/ability/tree.json --round 1 --out out/ability/tree_1.json

two processes  torchrun --nproc_per_node 2 -m ability_tree.analyze --ddp ...

The tree stays as it is; what is written is the tree after this round. What an agent found lies beside it, OUT_ability.jsonl,
a file for --abilities; questions to which it named no leaf do not count, and are in OUT_rejected.jsonl with the reason.
"""

import argparse
from pathlib import Path

from ability_tree.agents import OutOfBudget, add_agent_args, make_agent
from ability_tree.inference import read_choices, write_rows
from ability_tree.prompts import PROMPTS
from ability_tree.steps import Parts, about_agent, add_step_args, beside, read_abilities, seed_of, sha256_of
from ability_tree.tree import AbilityTree, compare, spell
from dataset.formats import files_of, read_each, to_question
from runtime.args import checking_input, parse_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode, main_process_first

ASKED_AT_ONCE = 64          # questions in one call of the agent; the calls are shared among processes


# ---- 1. Replies ----------------------------------------------------------------------------------

def read_replies(paths) -> dict[str, bool]:
    """{id as text: whether it was right}. Raises what dataset.formats.read_each raises, and ValueError for an id that is
    replied to twice."""
    replies = {}
    for file in [file for path in paths for file in files_of(path)]:
        for name, correct in read_each(file, checked_reply, log=Logger):
            if name in replies:
                raise ValueError(f"{file}: {name!r} is replied to twice; give one student's replies of one round")
            replies[name] = correct
    return replies


def checked_reply(row: dict) -> tuple[str, bool]:
    if "id" not in row or not isinstance(row.get("correct"), bool):
        raise ValueError(f"not a reply {{id, correct: true or false}} (keys found: {', '.join(row)}); they are written by "
                         "python -m ability_tree.inference")
    return str(row["id"]), row["correct"]


def check_same(replies: dict, questions: dict):
    """Raises ValueError unless these are the replies to these questions."""
    for some, others, told in ((questions, replies, "questions have no reply"),
                               (replies, questions, "replies have no question")):
        alone = [name for name in some if name not in others]
        if alone:
            raise ValueError(f"{len(alone):,} of {len(some):,} {told}, the first is {alone[0]!r}. --replies and --questions "
                             "must be of the same exam")


# ---- 2. Leaves -----------------------------------------------------------------------------------

def check_leaves(tree: AbilityTree, paths, grow: bool):
    """Raises ValueError for a path that the tree has not, unless it may grow: then it is added."""
    for path in dict.fromkeys(paths):
        if grow:
            tree.add(path)
        else:
            try:
                tree.find(path)
            except ValueError as error:
                raise ValueError(f"{error}. Correct the path, or let the tree have it: --grow") from None


def classify(agent, rows: list[dict], leaves: list[tuple[str, ...]], seed: int, args) -> list[dict]:
    """{"id", "ability_path"} of each row; where the reply names no leaf, {"id", "leaf": "", "reply", "reason"}."""
    prompts = PROMPTS[args.prompts]
    asked = [row["question"] if args.hide_options else to_question(row).messages[-1]["content"] for row in rows]
    replies = agent.ask([prompts.classify(question, leaves) for question in asked], args.max_new_tokens, seed=seed)
    found = []
    for row, reply in zip(rows, replies):
        try:
            found.append({"id": row["id"], "ability_path": list(prompts.read_leaf(reply, leaves))})
        except ValueError as error:
            found.append({"id": row["id"], "leaf": "", "reply": reply, "reason": str(error)})
    return found


def find_leaves(rows: list[dict], leaves: list[tuple[str, ...]], args, world) -> list[dict] | None:
    """What `classify` says of all rows, on the main process; None on the others. Each has asked for a share of them."""
    with checking_input():
        agent = make_agent(args, "agent", world.device)
        slices = [slice(start, start + ASKED_AT_ONCE) for start in range(0, len(rows), ASKED_AT_ONCE)]
        about = {"agent": about_agent(args, "agent"), "questions": sha256_of(args.questions), "leaves": list(map(list, leaves)),
                 "ids": [row["id"] for row in rows], "prompts": args.prompts, "hide_options": args.hide_options,
                 "max_new_tokens": args.max_new_tokens, "seed": args.seed}
        parts = Parts(args.out, about, len(slices), world)
        with main_process_first(world):
            missing = parts.prepare()
    Logger(f"{agent.name} finds the leaves of {len(rows):,} questions")
    why = None
    for part in parts.mine(missing):
        try:
            parts.write(part, classify(agent, rows[slices[part]], leaves, seed_of(args.seed, part), args))
        except OutOfBudget as error:
            why = str(error)
            break
    found = parts.join(why)
    if found is None:
        return None
    found = [each for part in found for each in part]
    rejected = [each for each in found if "reason" in each]
    write_rows(beside(args.out, "ability"), [each for each in found if "reason" not in each])
    if rejected:
        write_rows(beside(args.out, "rejected"), rejected)
        Logger(f"{len(rejected):,} of them were given no leaf and do not count: {beside(args.out, 'rejected')}")
    parts.remove()
    return found


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--replies", nargs="+", required=True, help="files of replies, from ability_tree.inference")
    add("--questions", nargs="+", required=True, help="the questions that they reply to")
    add("--abilities", nargs="*", default=[], help="files of their paths {id, ability_path}; questions that are not in them "
                                                   "are classified by the agent")
    add("--tree", required=True, help="the ability tree before this round")
    add("--grow", action="store_true", help="paths that the tree has not are added to it; else they are an error")
    add("--round", type=int, required=True, help="which round these replies are of, 0 or more, not before the tree's last")
    add("--out", required=True, help=".json file for the tree after this round; it must not be there yet")
    add("--png", default=None, metavar="FILE.png", help="draw it there, with rings where each leaf stood before")
    add = parser.add_argument_group("questions without a path").add_argument
    add("--prompts", default="json", choices=list(PROMPTS), help="how requests are worded: ability_tree/prompts.py")
    add("--hide_options", action="store_true", help="show the agent the bare question, without its options")
    add("--max_new_tokens", type=int, default=512, help="longest reply, in tokens")
    add_agent_args(parser, "agent")
    add_step_args(parser)
    args = parse_args(parser)
    if args.round < 0 or args.max_new_tokens < 1:
        parser.error(f"--round {args.round} must be 0 or more, --max_new_tokens {args.max_new_tokens} 1 or more")
    if args.png and Path(args.png).suffix != ".png":
        parser.error(f"--png {args.png}: a picture is written as FILE.png")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)

    # 3. Replies, paths, tree
    with checking_input():
        if Path(args.out).exists():
            raise ValueError(f"{args.out} is there already. Give another --out, or remove it")
        before, tree = AbilityTree.load(args.tree), AbilityTree.load(args.tree)
        questions = {str(row["id"]): row for row in read_choices(args.questions)}
        replies, paths = read_replies(args.replies), read_abilities(args.abilities)
        check_same(replies, questions)
        check_leaves(tree, [paths[name] for name in questions if name in paths], args.grow)
        unknown = [row for name, row in questions.items() if name not in paths]
        if unknown and not (args.agent or args.agent_url):
            raise ValueError(f"{len(unknown):,} of {len(questions):,} questions have no path, the first is "
                             f"{str(unknown[0]['id'])!r}. Name the --abilities that have them, or an --agent (or --agent_url) "
                             "that is to find their leaf")

    # 4. Ask the agent for the rest
    if unknown:
        found = find_leaves(unknown, list(tree.leaves()), args, world)
        paths |= {str(each["id"]): tuple(each["ability_path"]) for each in found or [] if "ability_path" in each}
    if world.rank != 0:
        return

    # 5. Finish
    with checking_input():
        counted = [(paths[name], correct) for name, correct in replies.items() if name in paths]
        tree.update(counted, args.round)
    tree.save(args.out)
    Logger(tree.text())
    if before.root.asked:
        Logger(f"\n{compare(before, tree)}\n")
    if args.png:
        tree.draw(args.png, before if before.root.asked else None)
    Logger(f"round {args.round}: {len(counted):,} questions on {len(tree.leaves()):,} leaves, the weakest is "
           f"{spell(tree.weakest(1)[0])}. Wrote {args.out}")


if __name__ == "__main__":
    main()
