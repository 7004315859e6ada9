"""
分析：把学生的对错记到能力树的叶子上；没有路径的题，由代理归类。
Analysis: the student's correct and wrong answers are counted at the leaves of the ability tree. An
agent classifies the questions that have no path.

    python -m ability_tree.analyze --replies out/ability/replies.jsonl \\
        --questions dataset/ability_dev.jsonl --abilities dataset/ability_paths.jsonl \\
        --tree out/ability/tree.json --round 1 --out out/ability/tree_1.json

    OUT                   the tree after this round; --tree stays as it is
    OUT_ability.jsonl     the agent's paths, a file for --abilities
    OUT_rejected.jsonl    the questions without a leaf, which do not count
"""

from pathlib import Path

from ability_tree.agents import divided, make_agent
from ability_tree.prompts import PROMPTS
from ability_tree.steps import (add_request_args, beside, read_abilities, read_choices,
                                rows_of)
from ability_tree.tree import AbilityTree, compare, spell
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args
from runtime.files import write_jsonl
from runtime.log import Logger
from runtime.processes import init_distributed_mode

PART = 64           # questions in one call of the agent


def read_reply(row: dict) -> tuple[str, bool]:
    """(id as text, whether the answer is correct)."""
    if "id" not in row or "correct" not in row:
        raise ValueError(f"not a reply {{id, correct}} (keys found: {', '.join(row)}); "
                         "python -m ability_tree.inference writes them")
    return str(row["id"]), row["correct"]


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--replies", nargs="+", required=True, help="files of replies, from ability_tree.inference")
    add("--questions", nargs="+", required=True, help="files of their questions")
    add("--abilities", nargs="*", default=[],
        help="files of paths {id, ability_path}; the agent classifies questions without one")
    add("--tree", required=True, help="the ability tree before this round")
    add("--round", type=int, required=True, help="its number; later counts are replaced")
    add("--out", required=True, help=".json file of the tree after this round; must not exist yet")
    add("--png", metavar="FILE.png", help="file of a picture of the tree before and after")
    add_request_args(parser)
    add_agent_args(parser, "agent")
    add_process_args(parser, dtype=False)
    args = parse_args(parser)
    if Path(args.out).exists():             # checked before any process can have written it
        parser.error(f"{args.out} exists already. Give another --out, or remove it")
    world = init_distributed_mode(args.ddp, args.device, args.local_rank)

    # 2. Replies, paths, tree
    with checking_input():
        before, tree = AbilityTree.load(args.tree), AbilityTree.load(args.tree)
        questions = {str(row["id"]): row for row in read_choices(args.questions)}
        replies = dict(rows_of(args.replies, read_reply))
        paths = read_abilities(args.abilities)
        if alone := sorted(replies.keys() ^ questions.keys()):
            raise ValueError(f"{len(alone):,} ids are in --replies or in --questions alone, the "
                             f"first is {alone[0]!r}; both must be of one exam")
        for path in dict.fromkeys(paths[name] for name in questions if name in paths):
            tree.find(path)
        unknown = [row for name, row in questions.items() if name not in paths]
        if unknown and not (args.agent or args.agent_url):
            raise ValueError(f"{len(unknown):,} of {len(questions):,} questions have no path, the "
                             f"first is {str(unknown[0]['id'])!r}. Give their --abilities, or an "
                             "--agent (or --agent_url) that classifies them")

    # 3. The agent classifies the rest
    found, rejected = [], []
    if unknown:
        leaves, prompts = list(tree.leaves()), PROMPTS[args.prompts]
        with checking_input():
            agent = make_agent(vars(args), "agent", world.device)
            generate = divided(agent, world, PART, args.max_new_tokens)
            answers = generate([prompts.classify(row, leaves) for row in unknown])
        for row, reply in zip(unknown, answers):
            try:
                paths[str(row["id"])] = leaf = prompts.read_leaf(reply, leaves)
                found.append({"id": row["id"], "ability_path": list(leaf)})
            except ValueError as error:
                rejected.append({"id": row["id"], "reply": reply, "reason": str(error)})
    if world.rank != 0:
        return
    if found:
        write_jsonl(beside(args.out, "ability"), found)
    if rejected:
        write_jsonl(beside(args.out, "rejected"), rejected)
        Logger(f"{len(rejected):,} questions have no leaf and do not count: "
               f"{beside(args.out, 'rejected')}")

    # 4. The tree after this round
    counted = [(paths[name], correct) for name, correct in replies.items() if name in paths]
    with checking_input():
        tree.update(counted, args.round)
    tree.save(args.out)
    Logger(tree.text())
    if before.asked:
        Logger(f"\n{compare(before, tree)}\n")
    if args.png:
        tree.draw(args.png, before if before.asked else None)
    Logger(f"round {args.round}: {len(counted):,} questions on {len(tree.leaves()):,} leaves, the "
           f"weakest is {spell(tree.weakest())}. Wrote {args.out}")


if __name__ == "__main__":
    main()
