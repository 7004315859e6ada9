"""
生成的性能对比：各种写法真的写出同样的词元；表与 JSON 说的一样。
The benchmark of generation: its forms write the same tokens.
"""

import json

import pytest

from benchmarks import generate, measure

TINY = ["--prompt", "5", "--new_tokens", "6", "--dim", "32", "--n_layers", "1"]


def case_of(name, folder, **changed):
    made = generate.Case(name, prompt=5, new_tokens=12, dim=32, n_layers=2, seed=0, device="cpu",
                         threads=1,
                         weights=str(folder))._replace(**changed)
    generate.write_weights(made)
    return made


def test_every_form_of_generation_is_in_the_table_and_the_json(tmp_path, capsys, monkeypatch):
    # In this process: only the figures need a new one.
    monkeypatch.setattr(measure, "in_new_processes", lambda calls: [call[0](*call[1:]) for call in calls])
    generate.main([*TINY, "--cases", "1", "--repeats", "1", "--json", str(tmp_path / "all.json")])
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    printed = " ".join(capsys.readouterr().out.split())
    assert [row["form"] for row in rows] == list(generate.FORMS)
    assert rows[0]["speed"] == rows[0]["peak_ratio"] == 1.0
    for row in rows:
        # one prompt, six tokens
        assert row["tokens_per_s"] == pytest.approx(6 / row["seconds"])
        assert f"| 1 | {row['form']} | {row['seconds']:.2f} |" in printed
    # One byte a weight, not four, and a scale for each row of 32: less than a third.
    weights = {row["form"]: row["weights_mb"] for row in rows}
    assert weights["ours, int8"] < weights["ours"] / 3


@pytest.mark.parametrize("name", ["1", "mixed"])
def test_all_forms_write_the_same_tokens_and_as_many_as_requested(tmp_path, name):
    case = case_of(name, tmp_path)
    answers = [form(case.model(), case.prompts(), case.sizes())
               for kind, form, _ in generate.FORMS.values() if kind == "fp32"]
    assert len(answers) == 2 and answers[0] == answers[1]
    assert list(map(len, answers[0])) == case.sizes()


def test_the_answers_depend_on_the_first_token_of_the_prompt(tmp_path):
    # Otherwise a cache that loses its beginning would go unnoticed.
    case = case_of("16", tmp_path, prompt=20)
    model, prompts = case.model(), case.prompts()
    changed = [[(first + 1) % generate.VOCAB_SIZE, *others] for first, *others in prompts]
    assert all(a != b for a, b in zip(*(generate.OURS(model, texts, case.sizes()) for texts
                                        in (prompts, changed))))


def test_mixed_answers_have_from_8_tokens_to_the_longest():
    sizes = generate.Case("mixed", 64, 128, 512, 8, 0, "cpu", 1, "").sizes()
    assert len(sizes) == 64 and 8 <= min(sizes) < 20 and 120 < max(sizes) <= 128
