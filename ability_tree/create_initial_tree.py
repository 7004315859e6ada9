"""
建初始能力树：让代理从领域名逐层细分，或直接由能力文件建成。
The initial ability tree: an agent divides a domain level by level; or the paths of ability files.

    python -m ability_tree.create_initial_tree --domain "clinical medicine" --depth 3 --breadth 8 \\
        --agent_url https://... --agent_model NAME --agent_key_env MY_KEY --out tree.json
    python -m ability_tree.create_initial_tree --ability_files dataset/ability_paths.jsonl \\
        --out out/ability/tree.json

An ability whose replies are no lists of names stays a leaf. OUT_rejected.jsonl has these replies.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from ability_tree.agents import divided, make_agent
from ability_tree.prompts import PROMPTS
from ability_tree.steps import add_request_args, beside, read_abilities
from ability_tree.tree import AbilityTree, key_of, spell
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args
from runtime.files import write_jsonl
from runtime.log import Logger
from runtime.precision import seed_of
from runtime.processes import init_distributed_mode

PART = 16           # abilities in one call of the agent


def grow(tree: AbilityTree, generate: Callable, prompts, depth: int, breadth: int, max_tries: int,
         seed: int) -> list[dict]:
    """Divide each leaf, `depth` times, in place, by generate(conversations, seed). Returns the
    rejected replies, {"leaf", "reply", "reason"}.

    At most `breadth` names of a reply count, and none that stands in its own path: a part of itself
    would be divided without end."""
    rejected = []
    for level in range(1, depth + 1):
        paths = [path for path in tree.leaves() if len(path) == level]  # shorter: indivisible
        for attempt in range(max_tries):
            if not paths:
                break
            requests, failed = [prompts.expand(path, breadth) for path in paths], []
            for path, reply in zip(paths, generate(requests, seed_of(seed, level, attempt))):
                try:
                    names = prompts.read_names(reply)
                except ValueError as error:
                    rejected.append({"leaf": spell(path), "reply": reply, "reason": str(error)})
                    failed.append(path)
                    continue
                new = [name for name in names if key_of([name])[0] not in key_of(path)]
                for name in new[:breadth]:
                    tree.find((*path, name), grow=True)
            Logger(f"level {level}, try {attempt + 1}: {len(paths) - len(failed):,} of "
                   f"{len(paths):,} replies are lists; {len(tree.leaves()):,} leaves")
            paths = failed
    return rejected


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    source = parser.add_mutually_exclusive_group(required=True).add_argument
    source("--ability_files", nargs="+", help="make the tree of these files' paths")
    source("--domain", help="or the name of a root, level 0, which an agent divides")
    add("--out", required=True, help=".json file of the tree; must not exist yet")
    add = add_request_args(parser, temperature=0.7)
    add("--depth", type=int, default=2, help="levels below the root, 1 or more")
    add("--breadth", type=int, default=8, help="maximum number of parts of an ability, 2 or more")
    add("--max_tries", type=int, default=3, help="maximum number of requests per ability")
    add_agent_args(parser, "agent")
    add_process_args(parser, dtype=False)
    args = parse_args(parser, breadth="[2, inf)")
    if Path(args.out).exists():             # checked before any process can have written it
        parser.error(f"{args.out} exists already. Give another --out, or remove it")
    world = init_distributed_mode(args.ddp, args.device, args.local_rank)

    # 2. Tree
    with checking_input():
        if args.ability_files:
            tree, rejected = AbilityTree.from_paths(read_abilities(args.ability_files).values()), []
        else:
            tree = AbilityTree.from_paths([[args.domain]])
            agent = make_agent(vars(args), "agent", world.device)
            generate = divided(agent, world, PART, args.max_new_tokens, args.temperature)
            rejected = grow(tree, generate, PROMPTS[args.prompts], args.depth, args.breadth,
                            args.max_tries, args.seed)
            if not tree.children:
                reasons = "; ".join(dict.fromkeys(reject["reason"] for reject in rejected))
                sys.exit(f"{tree.name} was not divided: {reasons or 'the list of parts is empty'}")

    # 3. Files
    if world.rank == 0:
        if rejected:
            write_jsonl(beside(args.out, "rejected"), rejected)
            Logger(f"{len(rejected):,} replies rejected: {beside(args.out, 'rejected')}")
        tree.save(args.out)
        Logger(f"{tree.text()}\nwrote {args.out}: {len(tree.leaves()):,} leaves")


if __name__ == "__main__":
    main()
