"""
验题：两个代理各自作答，都与所给答案一致才留下；其余退回并记下原因。
Cross-validation: two agents answer each question independently, by greedy decoding. It is kept if
both give its answer.

    python -m ability_tree.validate --questions out/ability/distill.jsonl \\
        --abilities out/ability/distill_ability.jsonl --prompts miniworld \\
        --agent_a out/ability/teacher/full_sft_128.pth --agent_b out/full_sft_128.pth \\
        --out out/ability/valid.jsonl

With --prompts json, an agent sees the options and names a letter. With --prompts miniworld, it sees
the bare question, and its answer must be one of the options.

    OUT                   the questions that are kept, unchanged
    OUT_ability.jsonl     {"id", "ability_path"} of each of them
    OUT_rejected.jsonl    the others, with "leaf", "agent_a", "agent_b" (letters, or null), "reason"
"""

from ability_tree.agents import batches_of, make_agent
from ability_tree.prompts import PROMPTS, nonempty
from ability_tree.steps import (add_request_args, finish_questions, made_from,
                                read_abilities, read_choices, table, work_in_parts)
from ability_tree.tree import spell
from runtime.args import add_process_args, checking_input, make_parser, parse_args
from runtime.endpoint import add_agent_args
from runtime.log import Logger
from runtime.processes import init_distributed_mode

PART = 128          # questions in one part
ROLES = ("agent_a", "agent_b")


def solve(agent, prompts, rows: list[dict],
          max_new_tokens: int) -> list[tuple[str | None, str | None]]:
    """The answer to each row: (letter, None), or (None, the reason why there is none)."""
    requests, answers = [prompts.solve(row) for row in rows], []
    for row, text in zip(rows, agent.generate(requests, max_new_tokens)):
        try:
            answers.append((prompts.read_letter(nonempty(text), row), None))
        except ValueError as error:
            answers.append((None, str(error)))
    return answers


def reason_to_reject(correct: str, answers) -> str | None:
    """Why a question with this correct letter is rejected; None if it is kept. `answers` are those
    of agent_a and agent_b, from `solve`."""
    for role, (letter, problem) in zip(ROLES, answers):
        if letter is None:
            return f"{role} {problem}"
    wrong = [(role, letter) for role, (letter, _) in zip(ROLES, answers) if letter != correct]
    if wrong:
        roles, letters = map(" and ".join, zip(*wrong))
        return f"another answer of {roles}: {letters}, not {correct}"
    return None


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--questions", nargs="+", required=True,
        help="files of {id, question, options, answer_idx}")
    add("--abilities", nargs="+", required=True, help="files of {id, ability_path}, joined on id")
    add("--out", required=True, help=".jsonl file of the kept questions; must not exist yet")
    add("--skip_bad_lines", action="store_true", help="skip and count lines that cannot be used")
    add_request_args(parser)
    for role in ROLES:
        add_agent_args(parser, role)
    add_process_args(parser, dtype=False)
    args = parse_args(parser)
    world = init_distributed_mode(args.ddp, args.device, args.local_rank)

    # 2. Questions and agents
    with checking_input():
        rows = read_choices(args.questions, args.skip_bad_lines)
        abilities = read_abilities(args.abilities)
        for row in rows:
            if str(row["id"]) not in abilities:
                raise ValueError(f"the question {row['id']!r} has no row in {args.abilities}; give "
                                 "their abilities, such as the _ability.jsonl beside their file")
        about = made_from(args, ("questions", "abilities"), ROLES, ("prompts", "max_new_tokens"))
        same = about["--agent_a"] == about["--agent_b"]
        agent_a = make_agent(vars(args), "agent_a", world.device)
        agent_b = agent_a if same else make_agent(vars(args), "agent_b", world.device)
    Logger(f"{agent_a.name} and {agent_b.name} answer {len(rows):,} questions")

    # 3. Answers
    def both(_, batch):
        a = solve(agent_a, PROMPTS[args.prompts], batch, args.max_new_tokens)
        b = a if same else solve(agent_b, PROMPTS[args.prompts], batch, args.max_new_tokens)
        return list(zip(a, b))

    parts, results = work_in_parts(args.out, about, batches_of(rows, PART), both, world)
    if results is None:
        return

    # 4. Files and counts
    kept, rejected, counts, pairs = [], [], {}, sum(results, [])
    for row, pair in zip(rows, pairs, strict=True):
        leaf, reason = spell(abilities[str(row["id"])]), reason_to_reject(row["answer_idx"], pair)
        asked, n_kept = counts.get(leaf, (0, 0))
        counts[leaf] = asked + 1, n_kept + (reason is None)
        if reason is None:
            kept.append(row)
        else:
            letters = {role: letter for role, (letter, _) in zip(ROLES, pair)}
            rejected.append({**row, "leaf": leaf, **letters, "reason": reason})
    Logger(table(["asked", "kept"], [(leaf, *counts[leaf]) for leaf in sorted(counts)], rejected))
    for i, agent in enumerate((agent_a, agent_b)):              # the teacher itself, by default
        n = sum(pair[i][0] == row["answer_idx"] for row, pair in zip(rows, pairs))
        Logger(f"{ROLES[i]}, {agent.name}: {n:,} of {len(rows):,} answered as written "
               f"({n / len(rows):.1%})")
    Logger(f"kept {len(kept):,} of {len(rows):,} questions ({len(kept) / len(rows):.1%})")
    finish_questions(parts, kept, [abilities[str(row["id"])] for row in kept], rejected)


if __name__ == "__main__":
    main()
