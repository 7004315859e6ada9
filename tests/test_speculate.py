"""
推测解码的规律：无论谁来起草，写出的都是大模型的分布；接受率等于 sum min(p, q)。
Laws of scripts/speculate.py: whoever drafts, the text is the target's; the share of drafts that are
accepted is sum min(p, q).
"""

from collections import Counter
from copy import deepcopy
from itertools import product

import pytest
import torch

from helpers_run import ROOT, complaint, succeed
from interop.checkpoint import new_model, save_model
from model.config import LMConfig
from model.generate import generate
from model.transformer import Output
from scripts.speculate import speculate
from scripts.train_tokenizer import train

PROMPT = [0, 2, 1]
TARGET = [[.5, .3, .2], [.1, .6, .3], [.25, .25, .5]]       # probabilities of the next token, by the last one
DRAFTS = {"different": [[.05, .05, .9], [.8, .1, .1], [.3, .65, .05]],
          "near": [[.47, .35, .18], [.12, .55, .33], [.2, .3, .5]],
          "equal": TARGET}


class Chain:
    """A model whose next token depends on the last one alone, by the rows of a table."""

    config, n_tokens = LMConfig(dim=4, n_layers=1, n_heads=1, vocab_size=3, max_seq_len=24), 3

    def __init__(self, rows):
        self.log_p = torch.tensor(rows, dtype=torch.double).log()

    def __call__(self, tokens, lengths, at, cache):
        cache.lengths += lengths[0]
        return Output(self.log_p[tokens[at]], None, None, None, None)


def near(model):
    """The same model with a little noise on its weights."""
    other, generator = deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return other


def answers(kind, n_draft, n, **options):
    """n answers of the target, drafted by a draft of this kind, as rounds."""
    target, draft, generator = Chain(TARGET), Chain(DRAFTS[kind]), torch.Generator().manual_seed(0)
    return [[*speculate(target, draft, PROMPT, n_draft, generator=generator, **options)] for _ in range(n)]


def written(rounds) -> tuple[int, ...]:
    return tuple(token for each in rounds for token in each.tokens)


# -- the text is the target's ----------------------------------------------------------------------


@pytest.mark.parametrize("kind, n_draft, temperature", [
    ("different", 2, 1.0), ("near", 2, 1.0), ("equal", 2, 1.0), ("different", 1, 0.5), ("different", 0, 1.0)])
def test_the_text_has_the_distribution_of_the_target(kind, n_draft, temperature):
    """The 27 answers of three tokens: chi-square, whose 99.9 % quantile is 54.1 for 26 degrees of freedom. Adding the
    token after a rejection from p instead of p - q, or accepting everything, gives a hundred and more."""
    n, p = 1000, torch.tensor(TARGET) ** (1 / temperature)
    p = p / p.sum(dim=1, keepdim=True)
    means = {(a, b, c): n * float(p[PROMPT[-1], a] * p[a, b] * p[b, c]) for a, b, c in product(range(3), repeat=3)}
    found = Counter(map(written, answers(kind, n_draft, n, max_new_tokens=3, temperature=temperature)))
    assert sum(found.values()) == n and set(found) <= set(means)
    assert sum((found[answer] - mean) ** 2 / mean for answer, mean in means.items()) < 54.1


@pytest.mark.parametrize("n_draft", [0, 1, 3, 20])
@pytest.mark.parametrize("kind", ["different", "near", "equal"])
def test_greedy_text_is_the_target_s_greedy_text(kind, n_draft, tiny):
    target = tiny()
    draft = {"different": tiny(seed=7, n_layers=3), "near": near(target), "equal": target}[kind]
    for prompt in ([5], [1, 2, 3, 4, 5, 6, 7], [8, 9], [2, 7, 1]):
        rounds = [*speculate(target, draft, prompt, n_draft, 12, temperature=0.0)]
        assert [*written(rounds)] == generate(target, [prompt], 12)[0]


# -- acceptance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, alpha", [("different", 0.3), ("near", 0.95), ("equal", 1.0)])
def test_the_share_of_accepted_drafts_is_the_sum_of_min_p_q(kind, alpha):
    """After the prompt's last token p is .1 .6 .3, and q .8 .1 .1: sum min(p, q) = .1 + .1 + .1. A round ends with the
    first rejection, so of all drafts that are judged the expected share is accepted, too."""
    def first_rounds(n_draft, n):
        target, draft, generator = Chain(TARGET), Chain(DRAFTS[kind]), torch.Generator().manual_seed(0)
        return [next(speculate(target, draft, PROMPT, n_draft, 5, generator=generator)) for _ in range(n)]

    rounds = first_rounds(3, 1000)
    assert sum(each.n_accepted > 0 for each in rounds) / 1000 == pytest.approx(alpha, abs=0.04)
    accepted, judged, expected = (sum(column) for column in list(zip(*rounds))[1:])
    assert accepted / judged == pytest.approx(expected / judged, abs=0.04)
    once = first_rounds(1, 5)
    assert [each.expected for each in once] == pytest.approx([alpha] * 5) and {each.n_judged for each in once} == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_the_target_is_always_accepted(temperature, tiny):
    """Rounds of 3 + 1 tokens: 4 + 4 + 4, then two drafts and the target's token, to 15."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        rounds = [*speculate(tiny(), tiny(), [5, 3], 3, 15, None, temperature, generator)]
        assert [(each.n_accepted, each.n_judged, len(each.tokens)) for each in rounds] == [(3, 3, 4)] * 3 + [(2, 2, 3)]
        assert [each.expected for each in rounds] == pytest.approx([3, 3, 3, 2], abs=1e-4)


def test_the_first_rejection_ends_a_round_and_is_the_last_draft_judged(tiny):
    rounds = [*speculate(tiny(), tiny(seed=7), [5, 3], 4, 16, None, 1.0, torch.Generator().manual_seed(0))]
    assert all(len(each.tokens) == each.n_accepted + 1 for each in rounds)
    assert all(each.n_judged - each.n_accepted in (0, 1) for each in rounds)
    assert len(written(rounds)) == 16 and any(0 < each.n_accepted < each.n_judged for each in rounds)


# -- where an answer ends --------------------------------------------------------------------------


def test_the_stop_token_is_the_last_and_nothing_is_drafted_after_it(tiny):
    target = tiny()
    greedy = generate(target, [[5]], 12)[0]
    stop = greedy[6]
    end = greedy.index(stop) + 1
    for n_draft in range(9):
        rounds = [*speculate(target, target, [5], n_draft, 12, stop, temperature=0.0)]
        assert [*written(rounds)] == greedy[:end]
        assert sum(each.n_judged for each in rounds) <= end


def test_prompt_and_answer_fit_into_both_contexts(tiny):
    short = tiny(seed=1, max_seq_len=10)
    assert len(written(speculate(tiny(), short, [1, 2, 3], 4, 99))) == 7
    assert len(written(speculate(short, tiny(), [1, 2, 3], 4, 99))) == 7
    for prompt in ([], [1] * 10):
        with pytest.raises(ValueError, match=f"a prompt of {len(prompt)} tokens: give 1 to 9"):
            next(speculate(tiny(), short, prompt, 4, 5))


# -- the script ------------------------------------------------------------------------------------


def test_the_script_compares_drafts_and_marks_what_is_accepted(models, data, tmp_path):
    printed = succeed("scripts/speculate.py", weights=models / "teacher.pth", data=data / "val.jsonl", limit=3, samples=1,
                      draft=[f"small={models}/student.pth", f"self={models}/teacher.pth"], max_new_tokens=9, n_draft=2,
                      out=tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert printed.startswith("> ") and printed.count("\n> ") == 0 and "    self: [" in printed
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0] for row in table[2:]] == ["no draft", "small", "self"]
    header = f"| {' | '.join(table[0])} |".replace("|  |", "| |")
    assert header in (ROOT / "docs/lessons/18_draft_models.md").read_text(encoding="utf-8")
    assert table[2][1:4] == ["", "", "1.00"] and table[4][1:4] == ["100.0", "100.0", "3.00"]


def test_a_draft_of_another_vocabulary_and_data_without_conversations_are_refused(models, data, tmp_path):
    train(["a b c d e f g"] * 9, 278).save(tmp_path / "other.json")
    save_model(*new_model(LMConfig(dim=16, n_layers=1, n_heads=2), tmp_path / "other.json"), tmp_path / "other.pth")
    printed = complaint("scripts/speculate.py", weights=models / "teacher.pth", data=data / "val.jsonl",
                        draft=tmp_path / "other.pth")
    assert "other.pth cannot draft for" in printed and "its tokenizer differs" in printed
    printed = complaint("scripts/speculate.py", weights=models / "teacher.pth", data=data / "mcq_test.jsonl",
                        draft=models / "student.pth")
    assert "mcq_test.jsonl: no conversations to answer" in printed


def test_two_drafts_of_one_name_are_refused(models, data):
    draft = models / "student.pth"
    assert "two models have the name a" in complaint("scripts/speculate.py", "--draft", f"a={draft}", f"a={draft}",
                                                     weights=models / "teacher.pth", data=data / "val.jsonl")
