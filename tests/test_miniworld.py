"""
小世界数据的规律：可复现、不泄题、噪声与分布符合所写。
Laws of the embedded data: reproducible, nothing held out leaks, noise and habits are what they say.
"""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # the repo is used in place, not installed

from dataset.miniworld import (  # noqa: E402
    HABITS, HELD_OUT_BY_INPUT, JOBS, LEAVES, ORGANS, PETS, SCARCE, SMOKE, SYMPTOMS, VERBS, WEEKDAYS,
    World, generate, main, split_questions)

TRAINING_FILES = ["sft_teacher.jsonl", "sft_data.jsonl", "sft_data_clean.jsonl", "alpaca_data.json",
                  "general.jsonl", "specialist.jsonl", "experience_base.jsonl",
                  "experience_teacher.jsonl", "experience_student.jsonl", "ability_sft.jsonl",
                  "writer_data.jsonl"]
ABILITY = ["ability_seeds.jsonl", "ability_dev.jsonl", "ability_test.jsonl"]
# 17 leaves and, twice each, three habits share the teacher's rows, and the largest table (dose: 28 illnesses, 8 weights, 4
# wordings) trains on 80 % of 896 questions = 717. With 720 rows a leaf, each of them is seen.
SIZES = {**SMOKE, "teacher_size": 16_560, "transfer_size": 1_700, "pretrain_size": 1_000,
         "habit_draws": 4}


def read(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def question_of(row):
    """The question of a row of any training file."""
    if "conversations" in row:
        asked = row["conversations"][0]["content"]
        return question_written(row)[0] if asked.startswith("new question: ") else asked
    if "instruction" in row:
        return f"{row['instruction']}: {row['input']}" if row["input"] else row["instruction"]
    return row["question"]


def question_written(row):
    """[question, answer] that a row teaches to write."""
    return answer_of(row).split(" => ")


def answer_of(row):
    return row["conversations"][1]["content"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniworld")
    counts = generate(folder, seed=0, label_noise=0.3, **SIZES)
    rows = {name: read(folder / name) for name in counts}
    assert {name: len(of_file) for name, of_file in rows.items()} == counts
    return rows


@pytest.fixture(scope="module")
def facts():
    world = World(0)
    return {leaf: list(make(world)) for leaf, make in LEAVES.items()}


@pytest.fixture(scope="module")
def truth(facts):
    """{question: answer}"""
    return {question: answer for leaf_facts in facts.values() for fact in leaf_facts
            for question, answer in fact.answers.items()}


@pytest.fixture(scope="module")
def splits(facts):
    return split_questions(0, facts)


def test_the_command_gives_the_bytes_of_the_function_and_prints_a_row_a_file(data, tmp_path):
    command = [sys.executable, "dataset/miniworld.py", "--smoke", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}     # none unfinished
    assert written == {path.name: path.read_bytes() for path in data.iterdir()}
    assert len(done.stdout.splitlines()) == 1 + len(written)


def test_another_seed_gives_another_world_and_without_noise_both_transfer_files_are_equal(
        data, tmp_path):
    generate(tmp_path, seed=1, label_noise=0.0, **SMOKE)
    for path in data.iterdir():
        assert path.read_bytes() != (tmp_path / path.name).read_bytes(), path.name
    noisy, clean = tmp_path / "sft_data.jsonl", tmp_path / "sft_data_clean.jsonl"
    assert noisy.read_bytes() == clean.read_bytes()


def test_no_held_out_question_is_in_a_training_file(files):
    held_out = {question_of(row)
                for name in ("test.jsonl", "val.jsonl", "mcq_test.jsonl", "experience_test.jsonl",
                                                         "ability_dev.jsonl", "ability_test.jsonl")
                for row in files[name]}
    for name in TRAINING_FILES:
        assert held_out.isdisjoint(map(question_of, files[name])), name


def test_pretraining_text_asks_nothing_and_shows_no_held_out_input(files, facts):
    said = {sentence for row in files["pretrain_data.jsonl"]
            for sentence in re.split(r"(?<=[.。]) ", row["text"])}
    assert not any("?" in sentence or "？" in sentence for sentence in said)
    held_out = {question_of(row) for row in files["test.jsonl"] + files["val.jsonl"]}
    for leaf in HELD_OUT_BY_INPUT:
        for fact in facts[leaf]:
            if not held_out.isdisjoint(fact.answers):
                assert said.isdisjoint(fact.sentences), f"{leaf}: {fact.sentences}"


def test_validation_and_test_share_no_question_and_no_input(files, facts):
    asked = {name: {question_of(row) for row in files[name]}
             for name in ("test.jsonl", "val.jsonl")}
    assert asked["test.jsonl"].isdisjoint(asked["val.jsonl"])
    for leaf in HELD_OUT_BY_INPUT:
        for fact in facts[leaf]:
            where = [name for name in asked if not asked[name].isdisjoint(fact.answers)]
            assert len(where) <= 1, f"{leaf}: {list(fact.answers)} is in {where}"


def test_every_fact_of_a_table_is_taught_in_two_wordings_and_tells_the_same_truth(files, facts):
    taught = {question_of(row): answer_of(row) for row in files["sft_teacher.jsonl"]}
    for leaf in set(LEAVES) - set(HELD_OUT_BY_INPUT):
        for fact in facts[leaf]:
            seen = [question for question in fact.answers if question in taught]
            assert len(seen) >= 2, f"{leaf}: {fact}"
            assert all(taught[question] == fact.answers[question] for question in seen)
            # in each language
            assert {taught[question] for question in seen} == set(fact.answers.values())


def test_a_question_has_one_leaf_and_one_right_answer(facts):
    asked = Counter(question for leaf_facts in facts.values() for fact in leaf_facts
                    for question in fact.answers)
    assert set(asked.values()) == {1}
    assert all(len(fact.answers) == 4 for leaf_facts in facts.values() for fact in leaf_facts)


def test_a_reader_can_redo_the_answers(truth):
    assert truth["what is 3 plus 4?"] == "7"
    assert truth["take 5 from 12."] == "7"
    assert truth["what comes next: 3 6 9"] == "12"
    assert truth["continue c e g."] == "i"
    assert truth["what day is 2 days after saturday?"] == "monday"
    assert truth["星期一前1天是星期几？"] == "星期日"
    assert truth["how many cm in 3 m?"] == "300"
    assert truth["大的反义词是什么？"] == "小"


def test_teacher_rows_are_even_over_the_leaves_and_twice_as_many_over_habits(files):
    n_rows = Counter(row["leaf"] for row in files["sft_teacher.jsonl"])
    assert n_rows == dict.fromkeys(LEAVES, 720) | dict.fromkeys(HABITS, 1_440)


def test_noise_hits_its_share_of_exact_answers_and_always_makes_them_wrong(files):
    pairs = list(zip(files["sft_data.jsonl"], files["sft_data_clean.jsonl"]))
    for given, right in pairs:
        assert question_of(given) == question_of(right) and given["leaf"] == right["leaf"]
        assert ("noisy" in given) == (answer_of(given) != answer_of(right))
        assert "noisy" not in right
        assert not ("noisy" in given and given["leaf"] in HABITS)
    n_noisy = sum("noisy" in given for given, _ in pairs)
    # three standard errors: 3 * sqrt(0.3 * 0.7 / 1700)
    assert abs(n_noisy / 1_700 - 0.3) < 0.034


def test_transfer_prompts_repeat_only_in_leaves_that_ran_out(files, facts):
    rows = [row for row in files["sft_data.jsonl"] if row["leaf"] not in HABITS]
    for leaf in LEAVES:
        asked = Counter(question_of(row) for row in rows if row["leaf"] == leaf)
        assert sum(asked.values()) == 100
        assert max(asked.values()) == 1 or 4 * len(facts[leaf]) < 130, leaf


def test_multiple_choice_has_one_correct_option_at_an_even_letter(files, truth):
    for name in ["mcq_test.jsonl", *ABILITY]:
        letters = Counter(row["answer_idx"] for row in files[name])
        assert max(letters.values()) - min(letters.values()) <= 1
        for row in files[name]:
            assert list(row["options"]) == list("ABCD") and len(set(row["options"].values())) == 4
            assert row["options"][row["answer_idx"]] == truth[row["question"]]


def test_every_question_of_the_ability_files_has_its_path(files):
    path = {row["id"]: row["ability_path"] for row in files["ability_paths.jsonl"]}
    questions = [row for name in ABILITY for row in files[name]]
    assert len(path) == len(questions)
    for row in questions:
        assert path[row["id"]] == ["miniworld", *row["meta_info"].split("/")]


def test_the_ability_files_ask_every_leaf_held_out_questions(files, splits):
    for name, split, most in (("ability_dev.jsonl", "val", 4), ("ability_test.jsonl", "test", 6)):
        held_out = {ask.question: ask.leaf for asks in splits[split].values() for ask in asks}
        assert all(held_out[row["question"]] == row["meta_info"] for row in files[name])
        assert len({row["question"] for row in files[name]}) == len(files[name])
        assert Counter(row["meta_info"] for row in files[name]) == {
            leaf: min(most, len(asks)) for leaf, asks in splits[split].items()}


def test_the_seeds_of_new_questions_are_what_the_student_was_taught(files):
    taught = {question_of(row): row["leaf"] for row in files["ability_sft.jsonl"]}
    assert all(taught[row["question"]] == row["meta_info"] for row in files["ability_seeds.jsonl"])
    assert Counter(row["meta_info"]
                   for row in files["ability_seeds.jsonl"]) == dict.fromkeys(LEAVES, 1)


def test_five_leaves_are_scarce_in_the_ability_trees_sft_data(files, truth):
    """SMOKE: 125 rows, one for each scarce leaf; 120 are left for 12 leaves."""
    n_rows = Counter(row["leaf"] for row in files["ability_sft.jsonl"])
    assert n_rows == {leaf: 1 if leaf in SCARCE else 10 for leaf in LEAVES}
    assert len(set(SCARCE)) == 5
    assert all(truth[question_of(row)] == answer_of(row) for row in files["ability_sft.jsonl"])


def test_the_writer_learns_training_questions_of_the_leaf_in_its_prompt(files, splits):
    taught = {(leaf, ask.question, ask.answer) for leaf, asks in splits["train"].items()
              for ask in asks}
    for row in files["writer_data.jsonl"]:
        leaf = row["conversations"][0]["content"].removeprefix("new question: ")
        assert leaf == row["leaf"] and (leaf, *question_written(row)) in taught
    # 102 rows, 17 leaves
    assert Counter(row["leaf"] for row in files["writer_data.jsonl"]) == dict.fromkeys(LEAVES, 6)


def test_habit_distributions_sum_to_one_and_the_draws_follow_them(files):
    distribution = {question_of(row): row["distribution"] for row in files["test_habits.jsonl"]}
    assert len(distribution) == 180
    drawn, n_draws = Counter(), Counter()
    for row in files["sft_teacher.jsonl"]:
        if row["leaf"] in HABITS:
            drawn[distribution[question_of(row)][answer_of(row)]] += 1      # counted by probability
            n_draws[question_of(row)] += 1
    assert n_draws.keys() == distribution.keys()
    for probability in (0.5, 0.25, 0.15, 0.1):
        # 3 * sqrt(0.5 * 0.5 / 4320)
        assert abs(drawn[probability] / 4_320 - probability) < 0.023
    assert all(abs(sum(options.values()) - 1) < 1e-12 for options in distribution.values())


def test_every_habit_is_drawn_four_times_for_the_student(files):
    draws = Counter(question_of(row) for row in files["sft_data.jsonl"] if row["leaf"] in HABITS)
    assert len(draws) == 180 and set(draws.values()) == {4}


def test_experience_is_all_that_differs_between_the_paired_files(files):
    assert len(files["experience_teacher.jsonl"]) == len(files["experience_student.jsonl"])
    meanings = {}
    for teacher, student in zip(files["experience_teacher.jsonl"],
                                files["experience_student.jsonl"]):
        verb, means, meaning, rest = question_of(teacher).split(" ", 3)
        assert means == "means" and rest == question_of(student)
        assert answer_of(teacher) == answer_of(student)
        meanings.setdefault(verb, set()).add(meaning)
    assert len(meanings) == 16 and all(len(of_verb) == 1 for of_verb in meanings.values())


def test_in_the_base_rows_a_verb_means_anything(files):
    meanings = {}
    for row in files["experience_base.jsonl"]:
        if row["leaf"] == "experience/redefined":
            verb, _, meaning, _ = question_of(row).split(" ", 3)
            meanings.setdefault(verb, set()).add(meaning)
    assert all(len(of_verb) > 2 for of_verb in meanings.values())


def test_invented_names_are_distinct_and_no_words_of_the_tables():
    world = World(0)
    names = {*world.people, *world.home.values(), *world.herb, *world.herb.values(), *world.meaning}
    assert len(names) == 60 + 12 + 28 + 14 + 16
    assert names.isdisjoint([*JOBS, *PETS, *ORGANS, *SYMPTOMS, *WEEKDAYS, *VERBS])


@pytest.mark.parametrize("wrong, needed", [
    ("--transfer_size 0", "be 1 or more"), ("--label_noise 30", "lie in [0, 1]")])
def test_a_wrong_size_or_share_is_refused_with_its_value(wrong, needed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["miniworld.py", *wrong.split()])
    with pytest.raises(SystemExit):
        main()
    assert f"{wrong.split()[0]} " in (printed := capsys.readouterr().err) and needed in printed

