"""
分析：把学生的对错记到能力树的叶子上；没有路径的题，由代理归类。
Analysis: the student's correct and wrong answers are counted at the leaves of the ability tree. An
agent classifies the questions that have no path.

    python -m ability_tree.analyze --replies out/ability/replies.jsonl \\
        --questions dataset/ability_dev.jsonl --abilities dataset/ability_paths.jsonl \\
        --tree out/ability/tree.json --round 1 --out out/ability/tree_1.json

two processes  torchrun --nproc_per_node 2 -m ability_tree.analyze --ddp ...

OUT is the tree after this round; --tree stays as it is. The agent's paths are written beside it, to
OUT_ability.jsonl, a file for --abilities. Questions for which it names no leaf do not count; they are
in OUT_rejected.jsonl with the reason.
"""

from pathlib import Path

from ability_tree.agents import Agent, add_agent_args, identity_of, make_agent
from ability_tree.inference import prompt
from ability_tree.prompts import PROMPTS
from ability_tree.steps import (add_request_args, add_run_args, beside, new_parser, read_abilities,
                                read_choices, rows_of, seed_of, sha256_of, work_in_parts, write_rows)
from ability_tree.tree import AbilityTree, compare, spell
from runtime.args import checking_input, parse_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode

PART = 64           # questions in one call of the agent


def read_replies(paths) -> dict[str, bool]:
    """{id as text: whether the answer is correct}. Raises what read_each raises, also for a second
    reply to a question."""
    replies = {}

    def checked(row):
        if "id" not in row or not isinstance(row.get("correct"), bool):
            raise ValueError(f"not a reply {{id, correct: true or false}} (keys found: {', '.join(row)})"
                             "; python -m ability_tree.inference writes them")
        if str(row["id"]) in replies:
            raise ValueError(f"{str(row['id'])!r} has two replies; give one student's replies of one "
                             "round")
        replies[str(row["id"])] = row["correct"]
        return row

    rows_of(paths, checked)
    return replies


def check_same(replies: dict, questions: dict):
    """Raises ValueError unless these are the replies to these questions."""
    for some, others, problem in ((questions, replies, "questions have no reply"),
                                  (replies, questions, "replies have no question")):
        alone = [name for name in some if name not in others]
        if alone:
            raise ValueError(f"{len(alone):,} of {len(some):,} {problem}, the first is {alone[0]!r}. "
                             "--replies and --questions must belong to the same exam")


def classify(agent: Agent, prompts, rows: list[dict], leaves: list[tuple[str, ...]],
             hide_options: bool, max_new_tokens: int, seed: int) -> list[dict]:
    """{"id", "ability_path"} of each row; or {"id", "reply", "reason"} if the reply names no leaf."""
    questions = [prompt(row, hide_options)[-1]["content"] for row in rows]
    replies = agent.generate([prompts.classify(question, leaves) for question in questions],
                             max_new_tokens, seed=seed)
    found = []
    for row, reply in zip(rows, replies):
        try:
            leaf = prompts.read_leaf(reply, leaves)
            found.append({"id": row["id"], "ability_path": list(leaf)})
        except ValueError as error:
            found.append({"id": row["id"], "leaf": "", "reply": reply, "reason": str(error)})
    return found


def main():
    # 1. Arguments
    parser = new_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--replies", nargs="+", required=True, help="files of replies, from ability_tree.inference")
    add("--questions", nargs="+", required=True, help="files of their questions")
    add("--abilities", nargs="*", default=[],
        help="files of paths {id, ability_path}; the agent classifies questions without one")
    add("--tree", required=True, help="the ability tree before this round")
    add("--grow", action="store_true", help="add paths that the tree lacks; without it, an error")
    add("--round", type=int, required=True,
        help="number of the round, 0 or more, not below the tree's last one")
    add("--out", required=True, help=".json file of the tree after this round; must not exist yet")
    add("--png", default=None, metavar="FILE.png", help="file of a picture with the tree before and after")
    add = add_request_args(parser)
    add("--hide_options", action="store_true", help="show the agent the question without its options")
    add_agent_args(parser, "agent")
    add_run_args(parser)
    args = parse_args(parser)
    world = init_distributed_mode(args.ddp, args.device, args.local_rank)

    # 2. Replies, paths, tree
    with checking_input():
        if Path(args.out).exists():
            raise ValueError(f"{args.out} exists already. Give another --out, or remove it")
        before, tree = AbilityTree.load(args.tree), AbilityTree.load(args.tree)
        questions = {str(row["id"]): row for row in read_choices(args.questions)}
        replies, paths = read_replies(args.replies), read_abilities(args.abilities)
        check_same(replies, questions)
        for path in dict.fromkeys(paths[name] for name in questions if name in paths):
            try:
                tree.add(path) if args.grow else tree.find(path)
            except ValueError as error:
                raise ValueError(f"{error}. Correct the path, or add it to the tree by --grow") from None
        unknown = [row for name, row in questions.items() if name not in paths]
        if unknown and not (args.agent or args.agent_url):
            raise ValueError(f"{len(unknown):,} of {len(questions):,} questions have no path, the first "
                             f"is {str(unknown[0]['id'])!r}. Give their --abilities, or an --agent (or "
                             "--agent_url) that classifies them")

    # 3. The agent classifies the rest
    parts = None
    if unknown:
        with checking_input():
            agent = make_agent(vars(args), "agent", world.device)
        leaves, batches = list(tree.leaves()), [unknown[i:i + PART] for i in range(0, len(unknown), PART)]
        about = {"agent": identity_of(vars(args), "agent"), "questions": sha256_of(args.questions),
                 "leaves": list(map(list, leaves)), "ids": [row["id"] for row in unknown],
                 **{name: vars(args)[name] for name in ("prompts", "hide_options", "max_new_tokens",
                                                        "seed")}}
        Logger(f"{agent.name} finds the leaves of {len(unknown):,} questions")
        parts, results = work_in_parts(args.out, about, len(batches), lambda part: classify(
            agent, PROMPTS[args.prompts], batches[part], leaves, args.hide_options,
            args.max_new_tokens, seed_of(args.seed, part)), world)
        found = sum(results or [], [])
        rejected = [each for each in found if "reason" in each]
        found = [each for each in found if "reason" not in each]
        paths |= {str(each["id"]): tuple(each["ability_path"]) for each in found}
    if world.rank != 0:
        return

    # 4. The tree after this round
    counted = [(paths[name], correct) for name, correct in replies.items() if name in paths]
    with checking_input():
        tree.update(counted, args.round)
    if parts:
        write_rows(beside(args.out, "ability"), found)
        if rejected:
            write_rows(beside(args.out, "rejected"), rejected)
            Logger(f"{len(rejected):,} questions have no leaf and do not count: "
                   f"{beside(args.out, 'rejected')}")
    tree.save(args.out)
    if parts:
        parts.remove()
    Logger(tree.text())
    if before.root.asked:
        Logger(f"\n{compare(before, tree)}\n")
    if args.png:
        tree.draw(args.png, before if before.root.asked else None)
    Logger(f"round {args.round}: {len(counted):,} questions on {len(tree.leaves()):,} leaves, the weakest "
           f"is {spell(tree.weakest(1)[0])}. Wrote {args.out}")


if __name__ == "__main__":
    main()
