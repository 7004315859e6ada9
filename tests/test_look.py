"""
看分布的规律：概率、熵、KL 与不合理词元的概率，都能手算。
Laws of scripts/look.py: probabilities, entropy, KL and the mass of implausible tokens can be redone by hand.
"""

from math import log

import pytest
import torch

from helpers_run import complaint, succeed
from interop.checkpoint import load_model, new_model, save_model
from model.config import LMConfig
from model.generate import generate
from scripts.look import measures, shown, table, text
from scripts.train_tokenizer import train

P, Q = [.64, .25, .105, .005], [.25, .25, .25, .25]
LOGITS = {"teacher": torch.tensor(P).log(), "student": torch.tensor(Q).log()}
NAMES = {0: "tea", 2: "milk"}


def test_entropy_kl_and_implausible_mass_at_temperature_one():
    """Only the last token has less than 1 % in the first model."""
    teacher, student = measures(LOGITS, NAMES, 1.0).values()
    assert list(teacher) == ["tea", "milk", "implausible", "entropy, nats", "KL, nats"]
    assert [teacher["tea"], teacher["milk"], teacher["implausible"]] == pytest.approx([.64, .105, .005])
    assert [student["tea"], student["milk"], student["implausible"]] == pytest.approx([.25] * 3)
    entropy = -sum(p * log(p) for p in P)
    assert [teacher["entropy, nats"], student["entropy, nats"]] == pytest.approx([entropy, log(4)])
    assert [teacher["KL, nats"], student["KL, nats"]] == pytest.approx([0, log(4) - entropy], abs=1e-6)


def test_a_temperature_moves_probability_to_tokens_that_stay_implausible():
    """At T = 2 the probabilities are proportional to .8 .5 .324 .0707, at T = 1000 all are equal; which tokens are
    plausible does not change with T."""
    roots = [p ** 0.5 for p in P]
    for temperature, mass in (1.0, .005), (2.0, roots[3] / sum(roots)), (1000.0, .25):
        found = measures(LOGITS, NAMES, temperature)
        assert found["teacher"]["implausible"] == pytest.approx(mass, rel=0.01)
        assert found["student"]["implausible"] == pytest.approx(.25)


def test_the_tokens_shown_are_those_of_any_model_in_the_order_of_the_first():
    logits = {"a": torch.tensor([.5, .1, .3, .06, .04]).log(), "b": torch.tensor([.1, .02, .03, .05, .8]).log()}
    assert shown(logits, 3) == [0, 2, 4]
    assert shown({"a": logits["a"]}, 3) == [0, 2, 1]


def test_bars_stand_beside_probabilities_only():
    lines = table(measures(LOGITS, NAMES, 1.0)).splitlines()
    assert lines[0].split() == ["teacher", "student"]
    assert lines[1].split() == ["tea", "0.640", "█" * 13, "0.250", "█" * 5]
    assert [line.count("█") > 0 for line in lines[2:]] == [True, True, False, False]


# -- the script ------------------------------------------------------------------------------------


def titles(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("token ")]


def test_the_answer_is_the_first_model_s_greedy_one_or_the_given_one(models, tmp_path):
    weights = [f"t={models}/teacher.pth", f"s={models}/student.pth"]
    model, tokenizer = load_model(models / "teacher.pth")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "3 plus 4?"}], True)[0]
    greedy = generate(model, [prompt], 2)[0]
    options = dict(weights=weights, out=tmp_path / "look.png", top_k=3)
    printed = succeed("scripts/look.py", "3 plus 4?", max_new_tokens=2, temperature=[1, 4], **options)
    assert len(titles(printed)) == 4 and printed.count("KL, nats") == 4
    assert [title.split(", T")[0] for title in titles(printed)[::2]] == [
        f"token {i}: {text(tokenizer, token)}" for i, token in enumerate(greedy, 1)]
    assert (tmp_path / "look.png").read_bytes()[:4] == b"\x89PNG"
    printed = succeed("scripts/look.py", "3 plus 4?", answer="7 8", **options)
    assert titles(printed) == ["token 1: 7, T = 1", "token 2: ·, T = 1", "token 3: 8, T = 1",
                               "token 4: <|im_end|>, T = 1"]


def test_a_model_of_another_tokenizer_and_two_of_one_name_are_refused(models, tmp_path):
    train(["a b c d e f g"] * 9, 278).save(tmp_path / "other.json")
    save_model(*new_model(LMConfig(dim=16, n_layers=1, n_heads=2), tmp_path / "other.json"), tmp_path / "other.pth")
    weights = [models / "teacher.pth", tmp_path / "other.pth"]
    assert "--weights: the models need one tokenizer" in complaint("scripts/look.py", "a", weights=weights)
    weights = [f"a={models}/teacher.pth", f"a={models}/student.pth"]
    assert "two models have the name a, " in complaint("scripts/look.py", "a", weights=weights)
