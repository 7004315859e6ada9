"""
按生成打分的规律：通过率等于枚举，区间等于查到的值，第一步错在哪里可以手数。
Laws of scores by generation: pass@k is what an enumeration gives, the interval what the books say, and first wrong
steps can be counted by hand.
"""

import json
from itertools import combinations
from statistics import stdev

import pytest

from evaluation.generation import first_wrong_step, measure_generation, pass_at, steps_of
from evaluation.metrics import measure, read_tests, tables
from evaluation.tables import interval, mean_and_spread
from helpers_run import succeed
from interop.checkpoint import load_model
from scripts.evaluate import draw

GOLD = "<think>two a\none b\nzero c</think> c"


def test_pass_at_k_is_the_share_of_all_sets_of_k_answers_that_have_a_right_one():
    for n in range(1, 8):
        for n_right in range(n + 1):
            answers = [i < n_right for i in range(n)]
            for k in range(1, n + 1):
                sets = [any(chosen) for chosen in combinations(answers, k)]
                assert pass_at(k, n, n_right) == pytest.approx(sum(sets) / len(sets))


@pytest.mark.parametrize("n_right, n, low, high", [
    (81, 263, 25.5, 36.6), (15, 148, 6.2, 16.0), (0, 20, 0.0, 16.1), (1, 29, 0.6, 17.2), (29, 29, 88.3, 100.0)])
def test_the_interval_of_a_percentage_is_wilson_s(n_right, n, low, high):
    """The first four are Newcombe's examples: 1998, Statistics in Medicine 17, table I, method 3."""
    assert [round(end, 1) for end in interval([100 * n_right / n], n)] == [low, high]


def test_a_seed_has_an_interval_and_several_have_a_spread():
    assert mean_and_spread([50.0], "{:.1f}", n=100) == "50.0 [40.4, 59.6]"
    assert mean_and_spread([50.0, 52.0], "{:.1f}", n=100) == "51.0 ± 1.4"
    assert mean_and_spread([50.0], "{:.1f}") == "50.0"
    assert interval([50.0, 52.0], 100) == (51 - stdev([50, 52]), 51 + stdev([50, 52]))


@pytest.mark.parametrize("text, at", [
    (GOLD, None), ("<think>two a\none b\nzero c</think> d", None), ("<think>two a\none b\nzero c\nzero c</think> c", None),
    ("<think>two x\none b\nzero c</think> c", 1), ("<think>two a\none x\nzero c</think> c", 2),
    ("<think>two a\none b</think> c", 3), ("<think>two a\none b\nze", 3), ("c", 1), ("", 1)])
def test_the_first_wrong_step_is_the_first_line_that_is_another_or_missing(text, at):
    assert first_wrong_step(text, GOLD) == at
    assert steps_of("<think>\ntwo a\n</think>\n\nc") == ["two a"]


# A model that gives these answers, in the order of the questions: each its own, then samples.


@pytest.fixture
def scores(byte_tokenizer, tiny, monkeypatch):
    """scores(golds, texts, num_samples): measure_generation of a model that writes `texts`; one that ends in ~ is cut."""
    tokenizer, model = byte_tokenizer(), tiny(max_seq_len=200)

    def measured(golds, texts, num_samples=0):
        given = iter(texts)

        def written(_, prompts, limits, stop, **more):
            texts = [next(given) for _ in prompts]
            return [tokenizer.encode(text.removesuffix("~")) + [0] * (limit - len(text) + 1 if text[-1] == "~" else 0)
                    for text, limit in zip(texts, limits)]

        monkeypatch.setattr("evaluation.generation.generate", written)
        tests = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": gold}], "leaf": leaf}
                 for gold, leaf in golds]
        return measure_generation(model, tokenizer, tests, num_samples=num_samples)

    return measured


def test_scores_of_four_answers_by_hand(scores):
    """Steps tried after right ones: 3, 2, 1 and 1, of which 3, 1, 1 and 0 are right."""
    short = "<think>zero c</think> c"
    found = scores([(GOLD, "b"), (GOLD, "b"), (short, "a"), (short, "a")],
                   [GOLD, "<think>two a\none x\nzero c</think>  c", "<think>zero c</think> d", "<think>zero x~"])
    assert (found["answer"], found["trace"], found["finished"], found["questions"]) == (50, 25, 75, 4)
    assert found["by_length"] == {"1": 0, "3": 100} and found["questions_by_length"] == {"1": 2, "3": 2}
    assert found["by_leaf"] == {"a": 0, "b": 100} and "pass_at" not in found
    assert found["steps_right"] == pytest.approx(100 * 5 / 7)


def test_the_right_answer_without_its_end_is_wrong(scores):
    assert scores([("c", "a")], ["c"])["answer"] == 100
    cut = scores([("c", "a")], ["c~"])
    assert (cut["answer"], cut["trace"], cut["finished"]) == (0, 0, 0) and "steps_right" not in cut


def test_samples_of_a_question_are_counted_together(scores):
    """Two questions in turn, four rounds: one and three right answers."""
    greedy, samples = ["x", "x"], ["c", "d", "x", "d", "x", "d", "x", "x"]
    found = scores([("c", "a"), ("d", "a")], greedy + samples, num_samples=4)
    assert found["pass_at"] == {"1": pytest.approx(50), "4": 100} and found["answer"] == 0


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A model that knows some answers."""
    folder = tmp_path_factory.mktemp("trained")
    succeed("train_sft.py", data_path=data / "sft_data.jsonl", val_path="none", weights="none", dim=32, n_layers=1, n_heads=2,
            max_seq_len=128, num_workers=0, dtype="float32", batch_size=16, learning_rate=1e-2, max_steps=150, epochs=99,
            out_dir=folder)
    return folder / "full_sft_32.pth"


def test_traces_of_short_answers_are_the_exact_matches_of_teacher_forcing(trained, data):
    model, tokenizer = load_model(trained)
    tests = read_tests([data / "test.jsonl"])
    single = [test for test in tests["conversations"] if len(test["messages"]) == 2]
    found = measure_generation(model, tokenizer, single, num_samples=2, seed=1)
    assert 0 < found["trace"] < 100
    assert found["trace"] == pytest.approx(measure(model, tokenizer, tests | {"conversations": single})["exact_match"])
    assert found == measure_generation(model, tokenizer, single, num_samples=2, seed=1)
    assert found["pass_at"].keys() == {"1"}


def test_evaluate_by_generation_shows_its_scores_alone(trained, data, models, tmp_path):
    given = {"weights": [f"SFT={trained}", f"two={trained},{models}/student.pth"], "by_generation": True, "num_samples": 4,
             "limit": 20, "max_new_tokens": 16, "json": tmp_path / "scores.json", "report": tmp_path / "report.md"}
    printed = succeed("scripts/evaluate.py", **given, data=data / "test.jsonl")
    header, _, first, second = [line for line in printed.splitlines() if line.startswith("|")][:4]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["answer %", "trace %", "length", "finished %"]
    assert first.count("[") == 2 and second.count("±") == 4 and "perplexity" not in printed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["SFT"][0] == scores["two"][0] and scores["SFT"][0]["pass_at"].keys() == {"1", "4"}
    assert "temperature 1" in (tmp_path / "report.md").read_text()


def test_the_picture_has_a_line_a_model_with_its_intervals_and_the_powers_of_p(monkeypatch, tmp_path):
    figures, seed = [], {"questions": 20, "answer": 45.0, "trace": 40.0, "steps_right": 50.0, "by_length": {"2": 50.0, "3": 40.0},
                         "questions_by_length": {"2": 10, "3": 10}}
    monkeypatch.setattr("scripts.evaluate.save_picture", lambda figure, path: figures.append(figure))
    results = {"one": [seed], "two": [seed, seed | {"by_length": {"2": 70.0, "3": 40.0}}]}
    assert draw(results, "one", tmp_path / "report.png")
    axis, = figures[0].axes
    lines = [list(line.get_ydata()) for line in axis.lines]
    assert lines == [[50, 40], [25, 12.5], [60, 40], [25, 12.5]]
    (_, low), (_, high) = axis.collections[0].get_segments()[0]
    assert (low, high) == pytest.approx(interval([50.0], 10))
    table = tables(results)
    assert "| 2 " in table and "[23.7, 76.3]" in table and "60.0 ± 14.1" in table


def test_data_without_conversations_cannot_be_scored_by_generation(models, data, tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "one two three"}\n')
    argv = ["evaluate.py", "--weights", str(models / "student.pth"), "--data", str(texts), "--by_generation"]
    monkeypatch.setattr("sys.argv", argv)
    from scripts.evaluate import main
    with pytest.raises(SystemExit) as ended:
        main()
    assert f"--by_generation: {texts} has no conversations" in f"{capsys.readouterr().err}{ended.value.code}"
