"""
验题：两个代理各自作答，都与所给答案一致才留下；其余退回并记下原因。
Cross-validation: two agents answer a question, neither knows of the other; it is kept when both give the answer it has.

    python -m ability_tree.validate --questions out/ability/distill.jsonl --abilities out/ability/distill_ability.jsonl \\
        --agent_a out/ability/teacher/full_sft_128.pth --agent_b out/full_sft_128.pth --prompts miniworld --write \\
        --out out/ability/valid.jsonl

two processes  torchrun --nproc_per_node 2 -m ability_tree.validate --ddp ...

An agent is shown the options, and names a letter. Under the miniworld wording it is asked the bare question: of weights the
likeliest of the options' texts is the answer, and with --write what they write, which must then be one of the options; of
an endpoint always what it writes.

    OUT             the questions that are kept, as they came
    OUT_ability     {"id", "ability_path"} of each of them
    OUT_rejected    the others, and "leaf", "agent_a", "agent_b" (the letters given, or null) and "reason"

(OUT_ability stands for OUT's name with _ability before .jsonl.) A run that was stopped goes on with the same command.
"""

import argparse
import sys

from ability_tree.agents import Agent, LocalAgent, OutOfBudget, add_agent_args, make_agent
from ability_tree.inference import read_choices, reply, write_rows
from ability_tree.prompts import PROMPTS
from ability_tree.steps import Parts, about_agent, add_step_args, beside, read_abilities, seed_of, sha256_of, table
from ability_tree.tree import spell
from runtime.args import checking_input, parse_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode, main_process_first

PART = 64               # questions, at least, if there are as many
MOST, N_PARTS = 512, 16     # questions of a part, at most; and how many parts are enough

# Flags that a run which goes on must have as before.
SAME = ("prompts", "write", "max_new_tokens", "temperature", "seed")
ROLES = ("agent_a", "agent_b")


def slices_of(n_rows: int) -> list[slice]:
    size = min(MOST, max(PART, -(-n_rows // N_PARTS)))
    return [slice(start, start + size) for start in range(0, n_rows, size)]


def solve(agent: Agent, rows: list[dict], args, seed: int) -> list[tuple[str | None, str | None]]:
    """(letter, None), or (None, why there is none) of each row: what the agent answers."""
    prompts = PROMPTS[args.prompts]
    if isinstance(agent, LocalAgent) and args.prompts == "miniworld" and not args.write:
        given = [each["answer_idx"] for each in reply(agent.model, agent.tokenizer, rows, hide_options=True)]
        return [(letter, None if letter else "no reply: the question is too long for it") for letter in given]
    replies = agent.ask([prompts.solve(row) for row in rows], args.max_new_tokens, args.temperature, seed)
    solved = []
    for row, text in zip(rows, replies):
        try:
            if not text.strip():
                raise ValueError("no reply: the question may be too long for it, or the endpoint failed")
            solved.append((prompts.read_letter(text, row), None))
        except ValueError as error:
            solved.append((None, str(error)))
    return solved


def answers(agents: list[Agent], rows: list[dict], args, part: int) -> list[list]:
    """What `solve` says, of both. One agent in both roles would say the same again, unless its words are drawn."""
    if agents[0] is agents[1] and args.temperature == 0:
        return [solve(agents[0], rows, args, 0)] * 2
    return [solve(agent, rows, args, seed_of(args.seed, number, part)) for number, agent in enumerate(agents)]


def why_not(right: str, a: tuple, b: tuple) -> str | None:
    """Why a question is rejected that has the answer `right`; None: it is not."""
    for role, (letter, problem) in zip(ROLES, (a, b)):
        if letter is None:
            return f"{role} {problem}"
    (a, _), (b, _) = a, b
    if a == b == right:
        return None
    if a == b:
        return f"both have another answer: {a}, not {right}"
    if right not in (a, b):
        return f"all three differ: agent_a {a}, agent_b {b}, not {right}"
    role, letter = ("agent_b", b) if a == right else ("agent_a", a)
    return f"{role} has another answer: {letter}, not {right}"


def main():
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--questions", nargs="+", required=True, help="files of {id, question, options, answer_idx}")
    add("--abilities", nargs="+", required=True, help="files of {id, ability_path}, joined on id")
    add("--out", required=True, help=".jsonl file for the questions that are kept; it must not be there yet")
    add("--skip_bad_lines", action="store_true", help="leave out lines that cannot be used, and count them")
    add = parser.add_argument_group("requests").add_argument
    add("--prompts", default="json", choices=list(PROMPTS), help="how they are worded: ability_tree/prompts.py")
    add("--write", action="store_true", help="miniworld: weights write their answer, where else their likeliest option counts. "
                                             "Stricter: one of the options is always the likeliest")
    add("--max_new_tokens", type=int, default=512, help="longest reply, in tokens")
    add("--temperature", type=float, default=0.0, help="of the agents; 0: their likeliest words")
    for role in ROLES:
        add_agent_args(parser, role)
    add_step_args(parser)
    args = parse_args(parser)
    if args.max_new_tokens < 1 or args.temperature < 0:
        parser.error(f"--max_new_tokens {args.max_new_tokens} must be 1 or more, --temperature {args.temperature:g} 0 or "
                     "more")
    if args.write and args.prompts != "miniworld":
        parser.error("--write is of --prompts miniworld; under json the agents are shown the options, and name a letter")

    # 2. Processes
    world = init_distributed_mode(args.ddp, args.device, args.local_rank, args.dtype)

    with checking_input():
        # 3. Questions
        rows = read_choices(args.questions, args.skip_bad_lines)
        abilities = read_abilities(args.abilities)
        without = next((row["id"] for row in rows if str(row["id"]) not in abilities), None)
        if without is not None:
            raise ValueError(f"the question {without!r} has no row in {', '.join(args.abilities)}; give the abilities of "
                             "these questions, such as the _ability.jsonl that was written beside them")
        leaves = [spell(abilities[str(row["id"])]) for row in rows]

        # 4. Agents, and what is answered already
        about = {"--questions": sha256_of(args.questions), "--abilities": sha256_of(args.abilities),
                 **{f"--{role}": about_agent(args, role) for role in ROLES},
                 **{f"--{flag}": vars(args)[flag] for flag in SAME}}
        agents = [make_agent(args, "agent_a", world.device)]
        if about["--agent_a"] == about["--agent_b"]:
            Logger("--agent_a and --agent_b are the same model" + (
                ", which is asked once: what is told is whether it comes to its answer again" if args.temperature == 0 else ""))
            agents *= 2
        else:
            agents.append(make_agent(args, "agent_b", world.device))
        slices = slices_of(len(rows))
        parts = Parts(args.out, about, len(slices), world)
        with main_process_first(world):
            missing = parts.prepare()
        Logger(f"{' and '.join(agent.name for agent in agents)} answer {len(rows):,} questions; {len(missing)} of "
               f"{len(slices)} parts are to be answered")

        # 5. Answer
        why = None
        try:
            for part in parts.mine(missing):
                parts.write(part, answers(agents, rows[slices[part]], args, part))
        except OutOfBudget as error:
            why = str(error)
    results = parts.join(why)

    # 6. Finish
    if world.rank != 0:
        return
    kept, rejected, counts = [], [], {leaf: [0, 0] for leaf in sorted(leaves)}
    pairs = [pair for of_part in results for pair in zip(*of_part)]
    for row, leaf, (a, b) in zip(rows, leaves, pairs, strict=True):
        reason = why_not(row["answer_idx"], a, b)
        counts[leaf][0] += 1
        counts[leaf][1] += reason is None
        if reason is None:
            kept.append(row)
        else:
            rejected.append({**row, "leaf": leaf, "agent_a": a[0], "agent_b": b[0], "reason": reason})
    Logger(table(["asked", "kept"], [(leaf, *numbers) for leaf, numbers in counts.items()], rejected))
    write_rows(beside(args.out, "rejected"), rejected)
    if kept:
        write_rows(beside(args.out, "ability"), [{"id": row["id"], "ability_path": list(abilities[str(row["id"])])}
                                                 for row in kept])
        write_rows(args.out, kept)      # last: where it is, all is
    parts.remove()
    if not kept:
        sys.exit(f"nothing to keep: {len(rejected):,} questions rejected. See {beside(args.out, 'rejected')}")
    Logger(f"kept {len(kept):,} of {len(rows):,} questions ({len(kept) / len(rows):.1%}): {args.out}, "
           f"{beside(args.out, 'ability')}; rejected: {beside(args.out, 'rejected')}")


if __name__ == "__main__":
    main()
