"""
推理世界：要走好几步才有答案的问题，步骤写在 <think> 里，全部由一个种子生成。
A world of reasoning: problems of several steps, with the steps as a thought, from one seed.

    three red kuburg      <think>two red vaburg
                          one red kiburg
                          zero red beburg</think> beburg

    three +7 48           <think>two +7 55
                          one +7 62
                          zero +7 69</think> 69

"Three red kuburg" asks for the third town after kuburg on the red road. There are two domains. On
roads, a step is looked up: the road of each colour goes round through all towns in random order.
On numbers, a step is computed: +7, of which the last two digits are kept. Each domain has old
rules, which the base model knows, and new ones, which the teacher knows too and a student learns.

    python dataset/reasoning.py         dataset.md describes the files
"""

import sys
from itertools import product
from pathlib import Path
from random import Random
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only dataset/

from dataset.formats import final_answer
from dataset.miniworld import chat, invent, random_for
from runtime.args import make_parser, parse_args
from runtime.files import write_jsonl

COUNTS = "zero one two three four five six seven eight nine".split()
RULES = {"roads": {"old": "white black grey brown", "new": "red green blue pink"},
         "numbers": {"old": "+1 +3 +4 +6", "new": "+2 +5 +7 +8"}}
N_TOWNS, N_NUMBERS = 52, 100
TEST_SHARE, VAL_SHARE = 0.2, 0.1    # of the problems with new rules
TRAINED, LONGER = range(2, 6), range(6, 10)     # steps of problems to train on, and of longer ones
N_PROMPTS = 16, 64, 256             # sizes of the prompt sets, each a part of the next
N_TEST, N_TRAIN, N_REPLAY = 240, 1024, 512      # rows of a test, of repeated prompts, of replay
SHOWN_SHARE = 0.3                   # of the base rows: a question that its context answers


class Domain(NamedTuple):
    name: str
    places: list[str]
    old: dict               # rule -> {place: next place}
    new: dict

    def rows(self, rules: dict, lengths) -> list[dict]:
        """A problem for each rule, place to start from and number of steps."""
        return [chat(*problem(rules[rule], rule, place, n_steps), f"{self.name}/{rule}")
                for rule, place, n_steps in product(rules, self.places, lengths)]


def make_domains(seed: int) -> list[Domain]:
    rng = random_for(seed, "roads")
    towns = invent(rng, N_TOWNS, "burg")
    numbers = [f"{n:02}" for n in range(N_NUMBERS)]

    def addition(rule):
        return {number: numbers[(int(number) + int(rule)) % N_NUMBERS] for number in numbers}

    steps = ("roads", towns, lambda colour: ring(towns, rng)), ("numbers", numbers, addition)
    return [Domain(name, places, *({rule: step(rule) for rule in rules.split()}
                                   for rules in RULES[name].values()))
            for name, places, step in steps]


def ring(towns: list[str], rng: Random) -> dict[str, str]:
    """{town: next town} on a road through all towns, back to the first."""
    order = rng.sample(towns, len(towns))
    return dict(zip(order, [*order[1:], order[0]]))


def problem(step: dict[str, str], rule: str, place: str, n_steps: int) -> tuple[str, str]:
    """The question and the answer, a thought with a line per step."""
    question, lines = f"{COUNTS[n_steps]} {rule} {place}", []
    for left in reversed(range(n_steps)):
        place = step[place]
        lines.append(f"{COUNTS[left]} {rule} {place}")
    return question, "<think>" + "\n".join(lines) + f"</think> {place}"


def shown_row(towns: list[str], colours, lengths, rng: Random) -> dict:
    """A question about a road that is another one in each conversation, first answered as context
    and then asked again: the model learns to use what its prompt shows."""
    rule, place, n_steps = map(rng.choice, (list(colours), towns, lengths))
    row = chat(*problem(ring(towns, rng), rule, place, n_steps), "shown")
    question, answer = row["conversations"]
    return {**row, "conversations": [question, {**answer, "train": False}, question, answer]}


def build(seed: int, n_base: int) -> dict:
    """{file: rows}. n_base: rows of base.jsonl."""
    domains, files = make_domains(seed), {}

    def sample(rows, n, purpose):
        return random_for(seed, purpose).sample(rows, min(n, len(rows)))

    for domain in domains:
        name = domain.name
        files[f"{name}_teacher"] = domain.rows(domain.new, (*TRAINED, *LONGER))
        problems = domain.rows(domain.new, TRAINED)
        problems = sample(problems, len(problems), name)
        n_val, n_test = round(VAL_SHARE * len(problems)), round(TEST_SHARE * len(problems))
        files[f"{name}_val"] = problems[:n_val]
        files[f"{name}_test"] = problems[n_val:n_val + n_test][:N_TEST]
        files[f"{name}_longer"] = sample(domain.rows(domain.new, LONGER), N_TEST, f"{name} longer")
        prompts = files[name] = problems[n_val + n_test:]
        turns = [[turn["content"] for turn in row["conversations"]] for row in prompts]
        files[f"{name}_answers"] = [chat(question, final_answer(answer), name)
                                    for question, answer in turns]
        for n in N_PROMPTS:                 # repeated, so that most rows are prompts, not replay
            files[f"{name}_{n}"] = (prompts[:n] * (1 + N_TRAIN // n))[:max(n, N_TRAIN)]

    old = {domain.name: domain.rows(domain.old, (*TRAINED, *LONGER)) for domain in domains}
    rng = random_for(seed, "base")
    files["base"] = [shown_row(domains[0].places, domains[0].new, TRAINED, rng)
                     if rng.random() < SHOWN_SHARE else rng.choice(old[rng.choice(list(old))])
                     for _ in range(n_base)]
    files["shown"] = [row for row in files["base"] if row["leaf"] == "shown"][:N_REPLAY]
    both = [row for rows in old.values() for row in rows]
    files["replay"], files["kept"] = sample(both, N_REPLAY, "replay"), sample(both, N_TEST, "kept")
    return files


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out_dir", default="dataset/reasoning", help="output folder, created if absent")
    add("--seed", type=int, default=0, help="random seed; another one gives other roads and splits")
    add("--base_size", type=int, default=20_000, help="number of rows of base.jsonl")
    args = parse_args(parser, size="[1, inf)")
    files = build(args.seed, args.base_size)
    for name, rows in files.items():
        write_jsonl(Path(args.out_dir, f"{name}.jsonl"), rows)
        question, answer = (turn["content"] for turn in rows[0]["conversations"][:2])
        print(f"{name:16} {len(rows):6d}  {question}: {answer!r}")


if __name__ == "__main__":
    main()
