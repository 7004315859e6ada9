"""
推理世界的定律：每一步都对，留出的起点不出现，种子决定一切。
Laws of the reasoning world.
"""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from dataset.formats import final_answer, read_each
from dataset.reasoning import COUNTS, N_PROMPTS, build, make_domains, problem
from model.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files():
    return build(0, n_base=400)


def turns_of(row):
    return [turn["content"] for turn in row["conversations"]]


def start_of(row):
    """(rule, place) of "three red kuburg"."""
    return tuple(turns_of(row)[0].split()[1:])


def known(rows):
    """The rows whose roads are the same in all conversations."""
    return [row for row in rows if row["leaf"] != "shown"]


def test_three_red_roads_from_a_town_are_walked_one_by_one(files):
    roads, numbers = make_domains(0)
    for name, domain in (("roads_teacher", roads), ("numbers_longer", numbers)):
        for row in files[name]:
            question, answer = turns_of(row)
            count, rule, place = question.split()
            thought, _, final = answer.removeprefix("<think>").partition("</think>")
            for left, line in zip(reversed(range(COUNTS.index(count))), thought.split("\n"),
                                  strict=True):
                place = domain.new[rule][place]
                assert line == f"{COUNTS[left]} {rule} {place}"
            assert final.strip() == final_answer(answer) == place
    assert numbers.new["+7"]["95"] == "02"


def test_no_held_out_problem_is_in_a_training_file(files):
    for name in ("roads", "numbers"):
        held_out = {split: {turns_of(row)[0] for row in files[f"{name}_{split}"]}
                    for split in ("val", "test", "longer")}
        assert held_out["val"].isdisjoint(held_out["test"])
        for row in (*files[name], *files[f"{name}_64"], *known(files["base"]), *files["replay"]):
            assert not any(turns_of(row)[0] in questions for questions in held_out.values())


def test_the_base_knows_the_old_rules_only_and_the_teacher_all_new_steps(files):
    for domain in make_domains(0):
        steps = {(rule, place) for rule, place in product(domain.new, domain.places)}
        assert set(map(start_of, files[f"{domain.name}_teacher"])) == steps
        for row in (*known(files["base"]), *files["replay"], *files["kept"]):
            assert start_of(row) not in steps


def test_a_small_prompt_set_is_a_part_of_a_larger_one_and_repeated(files):
    distinct = {n: {turns_of(row)[0] for row in files[f"roads_{n}"]} for n in N_PROMPTS}
    assert [len(distinct[n]) for n in N_PROMPTS] == [*N_PROMPTS]
    assert distinct[16] < distinct[64] < distinct[256]
    assert len(files["roads_16"]) == len(files["roads_64"]) == 2 * len(files["replay"])


def test_a_shown_question_is_answered_by_its_context_and_by_nothing_else(files):
    assert files["shown"] == [row for row in files["base"] if row["leaf"] == "shown"][:len(files["shown"])] != []
    roads, _ = make_domains(0)
    shown = [row for row in files["base"] if row["leaf"] == "shown"]
    assert 0.2 < len(shown) / len(files["base"]) < 0.4
    right = 0
    for row in shown:
        question, answer, again, target = row["conversations"]
        assert (question, answer["content"]) == (again, target["content"])
        assert answer["train"] is False and "train" not in target
        count, rule, place = question["content"].split()
        _, gold = problem(roads.new[rule], rule, place, COUNTS.index(count))
        right += gold == answer["content"]
    assert right <= 1               # a road of its own in each conversation


def test_the_command_writes_each_file_and_the_same_seed_the_same_rows(tmp_path):
    command = [sys.executable, "dataset/reasoning.py", "--base_size", "50", "--out_dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    same, other = build(0, n_base=50), build(1, n_base=50)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(same)
    for name, rows in same.items():
        assert read_each(tmp_path / f"{name}.jsonl", dict) == rows
        assert rows != other[name] or name == "numbers_teacher"        # all sums


def test_the_marks_of_a_thought_are_single_tokens_in_a_text():
    tokenizer = Tokenizer.load()
    ids = tokenizer.encode("<think>2</think> 2")
    assert ids[0] == tokenizer.special_tokens["<think>"]
    assert ids[2] == tokenizer.special_tokens["</think>"]
    assert tokenizer.decode(ids) == "<think>2</think> 2"
    assert tokenizer.special_tokens["<|im_end|>"] not in tokenizer.encode("<|im_end|>")
