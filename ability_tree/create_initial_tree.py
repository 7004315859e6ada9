"""
建初始能力树：从领域名出发，让代理逐层细分；或直接从能力文件里读出。
The first ability tree: from the name of a domain, which an agent divides level by level; or from the paths of ability files.

    python -m ability_tree.create_initial_tree --domain "clinical medicine" --depth 3 --breadth 8 --agent_url https://... \\
        --agent_model NAME --agent_key_env MY_KEY --out out/workflow/tree.json
    python -m ability_tree.create_initial_tree --ability_files dataset/ability_paths.jsonl --out out/ability/tree.json

two processes  torchrun --nproc_per_node 2 -m ability_tree.create_initial_tree --ddp ...

The root is level 0, so that --depth 3 gives paths of four names. A reply that is no list of names is asked for again, with
another seed, --max_tries times in all; then that ability stays a leaf. What was refused is kept in OUT_rejected.jsonl.
"""

import argparse
import sys
from pathlib import Path

import torch.distributed as dist

from ability_tree.agents import Agent, OutOfBudget, add_agent_args, make_agent
from ability_tree.inference import write_rows
from ability_tree.prompts import PROMPTS
from ability_tree.steps import add_step_args, beside, kind_of, read_abilities, seed_of
from ability_tree.tree import AbilityTree, key_of, spell
from runtime.args import checking_input, parse_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode, patient_group

ASKED_AT_ONCE = 16          # abilities in one call of the agent; the calls are shared among processes


def grow(tree: AbilityTree, agent: Agent, args, world) -> list[dict]:
    """Divide each leaf, --depth times, in place. Returns what was refused: {"leaf", "reply", "reason"}.

    Of a list of names the first --breadth count, without those that stand above them in their own path: what is a part of
    itself would be divided without end.
    """
    together, rejected = patient_group(world), []
    for level in range(1, args.depth + 1):
        paths = [path for path in tree.leaves() if len(path) == level]      # a shorter one could not be divided before
        n_found = 0
        for attempt in range(args.max_tries):
            asked_again = []
            replies = ask_together(agent, paths, seed_of(args.seed, level, attempt), args, world, together)
            for path, reply in zip(paths, replies):
                try:
                    names = PROMPTS[args.prompts].read_names(reply)
                except ValueError as error:
                    rejected.append({"leaf": spell(path), "reply": reply, "reason": str(error)})
                    asked_again.append(path)
                    continue
                above = key_of(path)
                for name in [name for name in names if key_of([name])[0] not in above][:args.breadth]:
                    tree.add((*path, name))
                    n_found += 1
            n_asked, paths = len(paths), asked_again
            Logger(f"level {level}, try {attempt + 1}: {n_asked - len(paths):,} of {n_asked:,} replies read, "
                   f"{n_found:,} abilities so far")
            if not paths:
                break
    return rejected


def ask_together(agent: Agent, paths: list[tuple[str, ...]], seed: int, args, world, together) -> list[str]:
    """The replies for all paths, in their order and on every process; each has asked for a share of the groups.
    Raises OutOfBudget on all of them if one has spent its agent's."""
    prompts = PROMPTS[args.prompts]
    groups = [paths[start:start + ASKED_AT_ONCE] for start in range(0, len(paths), ASKED_AT_ONCE)]
    replies, spent = {}, None
    for group in range(world.rank, len(groups), world.size):
        conversations = [prompts.expand(path, args.breadth) for path in groups[group]]
        try:
            replies[group] = agent.ask(conversations, args.max_new_tokens, args.temperature, seed_of(seed, group))
        except OutOfBudget as error:
            spent = str(error)
            break
    if together:
        of_all = [None] * world.size
        dist.all_gather_object(of_all, (replies, spent), group=together)
        replies = {group: texts for of_one, _ in of_all for group, texts in of_one.items()}
        spent = next((why for _, why in of_all if why), None)
    if spent:
        raise OutOfBudget(spent)
    return [text for group in range(len(groups)) for text in replies[group]]


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--domain", default=None, help="name of the root, which an agent divides")
    add("--ability_files", nargs="+", default=None, help="or the tree of these files' paths; no agent is asked")
    add("--out", required=True, help=".json file for the tree; it must not be there yet")
    add = parser.add_argument_group("tree of a domain").add_argument
    add("--depth", type=int, default=2, help="levels below the root, 1 or more")
    add("--breadth", type=int, default=8, help="parts of an ability, at most; 2 or more")
    add = parser.add_argument_group("replies").add_argument
    add("--prompts", default="json", choices=list(PROMPTS), help="how requests are worded: ability_tree/prompts.py")
    add("--max_tries", type=int, default=3, help="requests for one ability, at most, until a reply can be read")
    add("--max_new_tokens", type=int, default=512, help="longest reply, in tokens")
    add("--temperature", type=float, default=0.7, help="0: the likeliest words, so that trying again is of little use")
    add_agent_args(parser, "agent")
    add_step_args(parser)
    args = parse_args(parser)
    if (args.domain is None) == (args.ability_files is None):
        parser.error("name a --domain to be divided, or --ability_files that have the paths; one of the two")
    if min(args.depth, args.max_tries, args.max_new_tokens) < 1 or args.breadth < 2 or args.temperature < 0:
        parser.error(f"--depth {args.depth}, --max_tries {args.max_tries} and --max_new_tokens {args.max_new_tokens} must be "
                     f"1 or more, --breadth {args.breadth} 2 or more, --temperature {args.temperature:g} 0 or more")
    if args.domain is not None and not args.domain.strip():
        parser.error("--domain is empty: name what the tree is about, such as \"clinical medicine\"")

    if Path(args.out).exists():             # asked before any process can have written it
        parser.error(f"{args.out} is there already. Give another --out, or remove it")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)

    # 3. Tree
    with checking_input():
        if args.ability_files:
            tree, rejected = AbilityTree.from_paths(read_abilities(args.ability_files).values()), []
        else:
            agent, tree = make_agent(args, "agent", world.device), AbilityTree.from_paths([(args.domain,)])
    if args.domain:
        Logger(f"{agent.name} divides {tree.root.name}")
        try:
            with checking_input():          # an endpoint that refuses
                rejected = grow(tree, agent, args, world)
        except OutOfBudget as error:
            sys.exit(f"stopped: {error}")
        if not tree.root.children:
            reasons = "; ".join(dict.fromkeys(reject["reason"] for reject in rejected)) or "an empty list"
            sys.exit(f"{tree.root.name} was not divided. What came: {reasons}")

    # 4. Finish
    if world.rank != 0:
        return
    if rejected:
        write_rows(beside(args.out, "rejected"), rejected)
        kinds = ", ".join(sorted({kind_of(reject["reason"]) for reject in rejected}))
        Logger(f"{len(rejected):,} replies refused ({kinds}): {beside(args.out, 'rejected')}")
    tree.save(args.out)
    Logger(tree.text())
    Logger(f"wrote {args.out}: {len(tree.leaves()):,} leaves")


if __name__ == "__main__":
    main()
