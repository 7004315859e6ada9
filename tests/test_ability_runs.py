"""
考试与分析的规律：最可能的选项就是回答；叶子上的数可以手算。
Laws of exam and analysis: the answer is the likeliest option, and the counts of a leaf can be
redone by hand.
"""

import json
import sys
from pathlib import Path

import pytest

from ability_tree import analyze, inference
from ability_tree.steps import read_choices
from ability_tree.tree import AbilityTree
from ability_tree.workflow import flags_of
from dataset.formats import bare_question
from evaluation.scores import score_answers
from evaluation.tables import wilson
from helpers_run import complaint, start, succeed
from interop.checkpoint import load_model
from runtime.files import write_jsonl

SUM, DAY = ("world", "math", "sum"), ("world", "day")
INFERENCE = "ability_tree/inference.py"


def question(name, text: str = "2 + 3 =", answer: str = "A") -> dict:
    options = {"A": "5", "B": "4", "C": "23", "D": "day 6"}
    return {"id": name, "question": text, "options": options, "answer_idx": answer}


def write(path, rows) -> Path:
    write_jsonl(path, rows)
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def call(main, monkeypatch, **flags):
    """main() in this process, with these flags."""
    monkeypatch.setattr(sys, "argv", [main.__module__, *flags_of(**flags)])
    main()


# ---- inference -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exam(data, models) -> dict:
    return {"weights": models / "teacher.pth", "questions": data / "ability_test.jsonl",
            "dtype": "float32"}


@pytest.fixture(scope="module")
def answered(exam, tmp_path_factory):
    """(rows, replies, output) of the bare questions."""
    out = tmp_path_factory.mktemp("exam") / "new folder" / "replies.jsonl"
    output = succeed(INFERENCE, **exam, out=out, hide_options=True)
    return read(exam["questions"]), read(out), output


def test_the_answer_is_the_likeliest_option_and_its_letter_is_compared(answered, exam):
    rows, replies, _ = answered
    expected = score_answers(*load_model(exam["weights"]),
                             [(bare_question(row), row["options"].values()) for row in rows])
    assert [reply["id"] for reply in replies] == [row["id"] for row in rows]
    for row, reply, log_p in zip(rows, replies, expected):
        assert list(reply["log_p"]) == list("ABCD")
        assert list(reply["log_p"].values()) == pytest.approx(log_p, abs=1e-4)
        assert reply["answer_idx"] == "ABCD"[log_p.index(max(log_p))]
        assert reply["correct"] == (reply["answer_idx"] == row["answer_idx"])


def test_the_accuracy_is_printed_with_its_wilson_interval(answered):
    _, replies, output = answered
    n, correct = len(replies), sum(reply["correct"] for reply in replies)
    low, high = wilson(correct, n)
    assert (f"accuracy {correct / n:.1%} ({correct} of {n}), 95 % interval {low:.1%} to "
            f"{high:.1%}. Wrote") in output


def test_the_options_are_shown_on_lettered_lines_unless_they_are_hidden(models):
    model, tokenizer = load_model(models / "teacher.pth")
    for hidden, prompt in ((True, "2 + 3 ="), (False, "2 + 3 =\nA. 5\nB. 4\nC. 23\nD. day 6")):
        (reply,) = inference.reply(model, tokenizer, [question("q")], hidden)
        (log_p,) = score_answers(model, tokenizer, [
            ([{"role": "user", "content": prompt}], ["5", "4", "23", "day 6"])])
        assert list(reply["log_p"].values()) == pytest.approx(log_p, abs=1e-4)


def test_two_processes_write_the_bytes_of_one(exam, data, tmp_path):
    files = [data / "mcq_test.jsonl", data / "ability_dev.jsonl"]           # 102 + 68: two parts
    exam = exam | {"questions": files, "hide_options": True}
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    succeed(INFERENCE, out=one, **exam)
    assert start(INFERENCE, processes=2, out=two, **exam).wait().code == 0
    assert one.read_bytes() == two.read_bytes() and set(tmp_path.iterdir()) == {one, two}
    assert "2.jsonl exists already" in complaint(INFERENCE, out=two, **exam)


def test_a_question_that_is_too_long_counts_as_wrong_and_is_reported(models):
    model, tokenizer = load_model(models / "teacher.pth")
    rows = [question("long", "2 + 3 = " * 100), question("short")]
    replies = inference.reply(model, tokenizer, rows, True)
    assert replies[0] == {"id": "long", "answer_idx": None, "correct": False, "log_p": None}
    assert replies[1:] == inference.reply(model, tokenizer, rows[1:], True)
    assert "1 too long for the model" in inference.summary(replies)


@pytest.mark.parametrize("second, problem", [
    ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
      "id": "b"}, "no 'question'"),
    ({"question": "a", "options": {"A": "b"}, "answer_idx": "A"}, "no 'id'"),
    (question("b", answer="E"), "answer_idx is 'E'"),
    (question(7), "the id '7' belongs to an earlier question"),
])
def test_a_row_that_is_no_question_is_named(second, problem, tmp_path):
    path = write(tmp_path / "q.jsonl", [question("7"), second])
    with pytest.raises(ValueError, match=f"q.jsonl, line 2: .*{problem}"):
        read_choices([path])
    assert [row["id"] for row in read_choices([path], skip_bad_lines=True)] == ["7"]


# ---- analysis ------------------------------------------------------------------------------------

@pytest.fixture
def round_0(tmp_path) -> dict:
    """Five questions: of sums 1 of 3 correct, of days 2 of 2."""
    AbilityTree.from_paths([SUM, DAY]).save(tmp_path / "tree.json")
    replies = [{"id": i, "correct": i >= 2} for i in (4, 3, 2, 1, 0)]
    paths = [{"id": i, "ability_path": DAY if i >= 3 else SUM} for i in range(5)]
    questions = [question(i, f"question {i}") for i in range(5)]
    return {"questions": write(tmp_path / "q.jsonl", questions),
            "replies": write(tmp_path / "r.jsonl", replies),
            "abilities": write(tmp_path / "a.jsonl", paths),
            "tree": tmp_path / "tree.json", "round": 0, "out": tmp_path / "0" / "tree.json"}


def counts(path) -> dict:
    leaves = AbilityTree.load(path).leaves()
    return {path: (leaf.asked, leaf.correct) for path, leaf in leaves.items()}


def test_each_reply_counts_at_the_leaf_of_its_question(round_0, monkeypatch, capsys):
    call(analyze.main, monkeypatch, **round_0)
    assert counts(round_0["out"]) == {SUM: (3, 1), DAY: (2, 2)}
    assert counts(round_0["tree"]) == {SUM: (0, 0), DAY: (0, 0)}        # stays as it is
    assert "the weakest is world / math / sum" in capsys.readouterr().out


def test_a_later_round_replaces_the_counts_keeps_them_as_history_and_draws_both(
        round_0, tmp_path, monkeypatch, capsys):
    call(analyze.main, monkeypatch, **round_0)
    write(round_0["replies"], [{"id": i, "correct": True} for i in range(5)])
    later = {"tree": round_0["out"], "out": tmp_path / "1.json", "round": 1}
    call(analyze.main, monkeypatch, **round_0 | later, png=tmp_path / "1.png")
    assert AbilityTree.load(later["out"]).find(SUM).history == [
        {"round": 0, "asked": 3, "correct": 1}, {"round": 1, "asked": 3, "correct": 3}]
    table = " ".join(capsys.readouterr().out.split())
    assert "| math / sum | 3 → 3 | 33 % → 100 % |" in table
    assert (tmp_path / "1.png").read_bytes().startswith(b"\x89PNG")


class Librarian:
    """Knows the leaves of questions 1 and 4, and not that of 2."""

    name = "librarian"
    leaf = {"question 1": "math/sum", "question 4": "day", "question 2": "poetry"}

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        texts = [message["content"].removeprefix("leaf of: ") for [message] in conversations]
        assert set(texts) <= set(self.leaf), "the bare questions without a path, and no others"
        return [self.leaf[text] for text in texts]


def test_an_agent_finds_the_leaf_of_a_question_without_a_path(
        round_0, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze, "make_agent", lambda flags, role, device: Librarian())
    write(round_0["abilities"], [{"id": 0, "ability_path": SUM}, {"id": 3, "ability_path": DAY}])
    call(analyze.main, monkeypatch, **round_0, agent="x", prompts="miniworld")
    assert counts(round_0["out"]) == {SUM: (2, 0), DAY: (2, 2)}     # 0, 1; 3, 4; 2 does not count
    assert read(tmp_path / "0/tree_ability.jsonl") == [{"id": 1, "ability_path": list(SUM)},
                                                       {"id": 4, "ability_path": list(DAY)}]
    (rejected,) = read(tmp_path / "0/tree_rejected.jsonl")
    assert rejected["id"] == 2 and rejected["reply"] == "poetry"
    assert rejected["reason"].startswith("no leaf of the tree")
    assert "1 questions have no leaf" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "0").iterdir()} == {
        "tree.json", "tree_ability.jsonl", "tree_rejected.jsonl"}


@pytest.mark.parametrize("name, rows, problem", [
    ("abilities", [{"id": 0, "ability_path": SUM}], "4 of 5 questions have no path, the first is"),
    ("abilities", [{"id": i, "ability_path": ["world", "art"]} for i in range(5)],
     "no world / art"),
    ("replies", [{"id": i, "correct": True} for i in range(4)], "1 ids are in .* the first is '4'"),
    ("replies", [{"id": i, "correct": True} for i in range(6)], "1 ids are in .* the first is '5'"),
    ("replies", [{"id": 0, "answer_idx": "B"}], "r.jsonl, line 1: not a reply"),
])
def test_files_that_do_not_belong_together_are_named(name, rows, problem, round_0, monkeypatch):
    write(round_0[name], rows)
    with pytest.raises(SystemExit, match=problem):
        call(analyze.main, monkeypatch, **round_0)
    assert not round_0["out"].parent.exists()
