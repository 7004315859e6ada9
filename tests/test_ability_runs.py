"""
考试、分析、软标签、训练的规律：最可能的选项就是回答；叶子上的数可以手算；训练只是把该给的参数交给原有脚本。
Laws of the steps around a student: its answer is the likeliest option, the counts of a leaf can be
redone by hand, and the distillation of a round is train_distillation.py with the given flags.
"""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from ability_tree import analyze, generate_logits, inference, train
from ability_tree.steps import read_choices, write_rows
from ability_tree.tree import AbilityTree
from evaluation.scores import score_answers
from helpers_run import ROOT, complaint, run, start, succeed
from interop.checkpoint import load_model

SUM, DAY = ("world", "math", "sum"), ("world", "day")


def question(name, text: str = "2 + 3 =", right: str = "A") -> dict:
    return {"id": name, "question": text, "options": {"A": "5", "B": "4", "C": "23", "D": "day 6"}, "answer_idx": right}


def write(path, rows) -> Path:
    write_rows(path, rows)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def call(main, monkeypatch, *more, **flags):
    """main() in this process, with these flags."""
    argv = [[f"--{name}", *([] if value is True else map(str, value if isinstance(value, list) else [value]))]
            for name, value in flags.items()]
    monkeypatch.setattr(sys, "argv", [main.__module__, *more, *sum(argv, [])])
    main()


# ----------------------------------------------------------------------------------------------------------- inference


@pytest.fixture(scope="module")
def exam(data, models) -> dict:
    return {"weights": models / "teacher.pth", "questions": data / "ability_test.jsonl", "dtype": "float32"}


@pytest.fixture(scope="module")
def answered(exam, tmp_path_factory):
    """(rows, replies, what was said) of the bare questions."""
    out = tmp_path_factory.mktemp("exam") / "new folder" / "replies.jsonl"
    said = succeed("ability_tree/inference.py", **exam, out=out, hide_options=True)
    return read(exam["questions"]), read(out), said


def test_the_answer_is_the_likeliest_option_and_its_letter_is_compared(answered, exam):
    rows, replies, _ = answered
    expected = score_answers(*load_model(exam["weights"]), [(row["question"], list(row["options"].values())) for row in rows])
    assert [reply["id"] for reply in replies] == [row["id"] for row in rows]
    for row, reply, log_p in zip(rows, replies, expected):
        assert list(reply["log_p"]) == list("ABCD")
        assert list(reply["log_p"].values()) == pytest.approx(log_p, abs=1e-4)
        assert reply["answer_idx"] == "ABCD"[log_p.index(max(log_p))]
        assert reply["correct"] == (reply["answer_idx"] == row["answer_idx"])


def test_the_accuracy_is_told_with_its_wilson_interval(answered):
    """Of n with share p right, z = 1.96: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    _, replies, said = answered
    n, p, z = len(replies), sum(reply["correct"] for reply in replies) / len(replies), 1.96
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((p + z * z / (2 * n) + side * half) / (1 + z * z / n) for side in (-1, 1))
    told = re.search(r"accuracy (.*)% \((\d+) of (\d+)\), 95 % interval (.*)% to (.*)%\.", said).groups()
    assert (int(told[1]), int(told[2])) == (round(p * n), n) and n == 102
    assert [float(told[i]) for i in (0, 3, 4)] == pytest.approx([100 * p, 100 * low, 100 * high], abs=0.06)


def test_the_options_are_shown_on_lettered_lines_unless_they_are_hidden(models):
    model, tokenizer = load_model(models / "teacher.pth")
    for hidden, asked in ((True, "2 + 3 ="), (False, "2 + 3 =\nA. 5\nB. 4\nC. 23\nD. day 6")):
        (reply,) = inference.reply(model, tokenizer, [question("q")], hidden)
        (log_p,) = score_answers(model, tokenizer, [(asked, ["5", "4", "23", "day 6"])])
        assert list(reply["log_p"].values()) == pytest.approx(log_p, abs=1e-4)


def test_two_processes_write_the_bytes_of_one(exam, data, tmp_path):
    questions = [data / "mcq_test.jsonl", data / "ability_dev.jsonl"]       # 102 + 68: two parts
    exam = exam | {"questions": questions, "hide_options": True}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.jsonl"
        assert start("ability_tree/inference.py", processes=processes, out=out, **exam).wait().code == 0
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jsonl", "2.jsonl"]
    assert "2.jsonl exists already" in complaint("ability_tree/inference.py", out=tmp_path / "2.jsonl", **exam)


def test_a_question_that_is_too_long_counts_as_wrong_and_is_told(models):
    model, tokenizer = load_model(models / "teacher.pth")
    replies = inference.reply(model, tokenizer, [question("long", "2 + 3 = " * 100), question("short")], True)
    assert replies[0] == {"id": "long", "answer_idx": None, "correct": False, "log_p": None}
    assert replies[1] == inference.reply(model, tokenizer, [question("short")], True)[0]
    assert "1 too long for the model" in inference.summary(replies)


@pytest.mark.parametrize("second, told", [
    ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "id": "b"}, "no 'question'"),
    ({"question": "a", "options": {"A": "b"}, "answer_idx": "A"}, "no 'id'"),
    (question("b", right="E"), "answer_idx is 'E'"),
    (question(7), "the id '7' belongs to an earlier question"),
])
def test_a_row_that_cannot_be_asked_is_named(second, told, tmp_path):
    path = write(tmp_path / "q.jsonl", [question("7"), second])
    with pytest.raises(ValueError, match=f"q.jsonl, line 2: .*{told}"):
        read_choices([path])
    assert [row["id"] for row in read_choices([path], skip_bad_lines=True)] == ["7"]


# ------------------------------------------------------------------------------------------------------------ analysis


@pytest.fixture
def round_0(tmp_path) -> dict:
    """Five questions: of sums 1 of 3 right, of days 2 of 2."""
    AbilityTree.from_paths([SUM, DAY]).save(tmp_path / "tree.json")
    of_day = {3, 4}
    right = {2, 3, 4}
    return {"questions": write(tmp_path / "q.jsonl", [question(i, f"question {i}") for i in range(5)]),
            "replies": write(tmp_path / "r.jsonl", [{"id": i, "correct": i in right} for i in (4, 3, 2, 1, 0)]),
            "abilities": write(tmp_path / "a.jsonl", [{"id": i, "ability_path": DAY if i in of_day else SUM}
                                                      for i in range(5)]),
            "tree": tmp_path / "tree.json", "round": 0, "out": tmp_path / "0" / "tree.json"}


def counts(path) -> dict:
    return {leaf_path: (leaf.asked, leaf.correct) for leaf_path, leaf in AbilityTree.load(path).leaves().items()}


def test_each_reply_is_counted_at_the_leaf_of_its_question(round_0, monkeypatch, capsys):
    call(analyze.main, monkeypatch, **round_0)
    assert counts(round_0["out"]) == {SUM: (3, 1), DAY: (2, 2)}
    assert counts(round_0["tree"]) == {SUM: (0, 0), DAY: (0, 0)}        # the tree before stays as it is
    assert "the weakest is world / math / sum" in capsys.readouterr().out


def test_a_later_round_replaces_the_counts_keeps_them_as_history_and_draws_both(round_0, tmp_path, monkeypatch, capsys):
    call(analyze.main, monkeypatch, **round_0)
    write(round_0["replies"], [{"id": i, "correct": True} for i in range(5)])
    later = round_0 | {"tree": round_0["out"], "out": tmp_path / "1.json", "round": 1, "png": tmp_path / "1.png"}
    call(analyze.main, monkeypatch, **later)
    leaf = AbilityTree.load(later["out"]).find(SUM)
    assert leaf.history == [{"round": 0, "asked": 3, "correct": 1}, {"round": 1, "asked": 3, "correct": 3}]
    assert "| math / sum | 3 → 3 | 33 % → 100 % |" in capsys.readouterr().out
    assert later["png"].read_bytes().startswith(b"\x89PNG")


class Librarian:
    """Knows where questions 1 and 4 belong, and of 2 nothing."""

    name = "librarian"
    leaf = {"question 1": "math/sum", "question 4": "day", "question 2": "poetry"}

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        asked = [message["content"].removeprefix("leaf of: ") for [message] in conversations]
        assert set(asked) <= set(self.leaf), "the bare questions without a path, and no others"
        return [self.leaf[text] for text in asked]


def test_an_agent_finds_the_leaf_of_a_question_without_a_path(round_0, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "make_agent", lambda flags, role, device: Librarian())
    monkeypatch.setattr(analyze, "identity_of", lambda flags, role: "librarian")
    write(round_0["abilities"], [{"id": 0, "ability_path": SUM}, {"id": 3, "ability_path": DAY}])
    call(analyze.main, monkeypatch, **round_0, agent="librarian", prompts="miniworld", hide_options=True)
    assert counts(round_0["out"]) == {SUM: (2, 0), DAY: (2, 2)}         # 0 and 1; 3 and 4; 2, though right, nowhere
    assert read(tmp_path / "0" / "tree_ability.jsonl") == [{"id": 1, "ability_path": list(SUM)},
                                                           {"id": 4, "ability_path": list(DAY)}]
    (rejected,) = read(tmp_path / "0" / "tree_rejected.jsonl")
    assert rejected["id"] == 2 and rejected["reply"] == "poetry" and rejected["reason"].startswith("no leaf of the tree")
    assert "1 questions have no leaf" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["tree.json", "tree_ability.jsonl",
                                                                        "tree_rejected.jsonl"]


@pytest.mark.parametrize("changed, told", [
    ({"abilities": [{"id": 0, "ability_path": SUM}]}, "4 of 5 questions have no path, the first is '1'"),
    ({"abilities": [{"id": i, "ability_path": ["world", "art"]} for i in range(5)]}, "no world / art.*--grow"),
    ({"replies": [{"id": i, "correct": True} for i in range(4)]}, "1 of 5 questions have no reply, the first is '4'"),
    ({"replies": [{"id": i, "correct": True} for i in range(6)]}, "1 of 6 replies have no question, the first is '5'"),
    ({"replies": [{"id": 0, "correct": True}] * 2}, "'0' has two replies"),
    ({"replies": [{"id": 0, "answer_idx": "B"}]}, "r.jsonl, line 1: not a reply"),
])
def test_files_that_do_not_belong_together_are_named(changed, told, round_0, monkeypatch):
    for name, rows in changed.items():
        write(round_0[name], rows)
    with pytest.raises(SystemExit, match=told):
        call(analyze.main, monkeypatch, **round_0)
    assert not round_0["out"].parent.exists()


def test_a_path_that_the_tree_has_not_is_added_where_it_may_grow(round_0, monkeypatch):
    new = ("world", "math", "product")
    write(round_0["abilities"], [{"id": i, "ability_path": new} for i in range(5)])
    call(analyze.main, monkeypatch, **round_0, grow=True)
    assert counts(round_0["out"]) == {SUM: (0, 0), new: (5, 3), DAY: (0, 0)}


# -------------------------------------------------------------------------------- the teacher's distributions, training


@pytest.fixture
def commands(monkeypatch) -> list:
    """What the process would go on as: [script, flag, ...], in place of doing so."""
    seen = []
    monkeypatch.setattr(os, "execv", lambda program, argv: seen.append([str(Path(argv[1]).relative_to(ROOT)), *argv[2:]]))
    return seen


def test_a_round_of_distillation_from_cached_distributions_is_that_of_the_scripts(commands, data, models, tmp_path, monkeypatch):
    """Bare questions are learned; from the teacher's outputs on disk, which have 16 bits, comes about the student that the
    teacher itself teaches."""
    learned = {"data": [data / "ability_dev.jsonl", data / "ability_sft.jsonl"], "hide_options": True}
    call(generate_logits.main, monkeypatch, teacher=models / "teacher.pth", out=tmp_path / "logits", dtype="float32",
         **learned)
    lesson = {"student": models / "student.pth", "epochs": 2, "max_steps": 3, "batch_size": 8, "accumulation_steps": 2,
              "learning_rate": 1e-2, "dtype": "float32", "more": "--num_workers 0", **learned}
    for name, teacher in (("cached", {"logits": tmp_path / "logits"}), ("asked", {"teacher": models / "teacher.pth"})):
        call(train.main, monkeypatch, **lesson, **teacher, out_dir=tmp_path / name)
    assert [command[0] for command in commands] == ["scripts/cache_teacher.py"] + 2 * ["train_distillation.py"]
    said = [succeed(*command) for command in commands]
    assert all("loss = 0.50 CE + 0.50 * 2^2 * KL" in text and "3 steps of 16 samples" in text for text in said[1:])
    start, cached, asked = (load_model(path)[0] for path in (
        models / "student.pth", tmp_path / "cached/full_dist_32.pth", tmp_path / "asked/full_dist_32.pth"))
    assert 0 < distance(cached, asked) < 0.05 * distance(start, asked)


def distance(model, other) -> float:
    """Euclidean, over all weights."""
    return sum((a - b).square().sum().item() for a, b in zip(model.parameters(), other.parameters())) ** 0.5


def test_multiple_choice_becomes_the_conversations_that_are_learned(commands, data, tmp_path, monkeypatch):
    chat = {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "leaf": "x"}
    path = write(tmp_path / "q.jsonl", [question("q", right="D"), chat])
    where = {"data": path, "student": "s.pth", "logits": "l", "out_dir": tmp_path / "out"}
    call(train.main, monkeypatch, **where, hide_options=True)
    call(train.main, monkeypatch, **where)
    bare, shown = (command[command.index("--data_path") + 1] for command in commands)
    learned = [[turn["content"] for turn in row["conversations"]] for row in read(bare)]
    assert learned == [["2 + 3 =", "day 6"], ["hi", "hello"]]
    assert shown == str(path)           # whose rows every lesson reads with their options


def test_every_flag_is_handed_on_and_those_not_given_are_the_recipe(commands, data, monkeypatch):
    where = {"data": data / "ability_sft.jsonl", "student": "s.pth", "teacher": "t.pth", "out_dir": "o"}
    call(train.main, monkeypatch, **where)
    call(train.main, monkeypatch, "--ddp", "--resume", "--skip_bad_lines", **where, alpha=0, temperature=4, warmup_iters=5,
         seed=7, more="--lora_rank 8")
    recipe, changed = ({flag: command[place + 1] for place, flag in enumerate(command[:-1]) if flag.startswith("--")}
                       for command in commands)
    assert {flag: recipe[f"--{flag}"] for flag in ("temperature", "alpha", "epochs", "learning_rate", "batch_size",
                                                   "accumulation_steps", "val_path")} == {
        "temperature": "2.0", "alpha": "0.5", "epochs": "3", "learning_rate": "5e-06", "batch_size": "2",
        "accumulation_steps": "16", "val_path": "none"}
    assert {"--ddp", "--resume", "--skip_bad_lines"} <= set(changed) and not {"--ddp", "--resume"} & set(recipe)
    assert [changed[flag] for flag in ("--alpha", "--temperature", "--warmup_iters", "--seed", "--lora_rank")] == [
        "0.0", "4.0", "5", "7", "8"]


def test_the_exit_status_and_the_output_are_those_of_the_script(tmp_path):
    script, step = tmp_path / "script.py", tmp_path / "step.py"
    script.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    step.write_text("from ability_tree.generate_logits import become\n"
                    f"become({str(script)!r}, ['--lora_rank', '8'])\n")
    ended = run(step)
    assert ended.code == 7 and "['--lora_rank', '8']" in ended.output
    assert f"python {script} --lora_rank 8" in ended.output
