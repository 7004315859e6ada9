"""
在策略蒸馏的规律：学生写，教师读同样的词；不在策略时与第三课一模一样；策略梯度的期望就是整句 KL 的梯度。
Laws of train_onpolicy.py: the student writes and the teacher reads the same words; off-policy it is lesson 3 to the bit; and
the mean of the policy gradient is the gradient of the KL of whole answers.
"""

import json
import math
import shutil
from collections import Counter
from itertools import product

import pytest
import torch

import train_onpolicy
from dataset.lm_dataset import PromptDataset, prompts_and_answers
from distill.fused import Dense, fused_distillation_loss
from distill.losses import reverse_kl
from helpers_run import TINY, complaint, load, rows, same, start, succeed, wait_until
from interop.checkpoint import load_model
from model.generate import Sampled
from distill.rollouts import (Rollout, WeightedBatch, grade, is_on_policy, load_reward, mean_stats, policy_gradient,
                              policy_loss, repetition, rollout_batches, rollout_stats, rounds, warn_of_collapse)

ANSWERS = [Sampled([7, 8, 9], True, [0.5] * 3, [-1.0] * 3, [-2.0] * 3), Sampled([5], False, [0.1], [-0.2], [-0.2])]


# -- who reads what --------------------------------------------------------------------------------------------

def test_teacher_and_student_read_the_same_answer_under_their_own_prompts():
    rollouts = [Rollout([1, 2, 3, 4], [6, 1, 2, 3, 4], ANSWERS[0]), Rollout([1], [6, 1], ANSWERS[1])]
    (graded,) = rollout_batches(rollouts, 1, "cpu", None)
    assert prompts_and_answers(graded.batch) == [[([1], [5])], [([1, 2, 3, 4], [7, 8, 9])]]                  # from short to long
    assert prompts_and_answers(graded.batch.teacher) == [[([6, 1], [5])], [([6, 1, 2, 3, 4], [7, 8, 9])]]
    assert graded.kd_weight is None and graded.ce_weight is None


def test_a_step_s_answers_are_dealt_to_its_micro_batches():
    rollouts = [Rollout([1] * n, [1] * n, ANSWERS[1]) for n in (5, 1, 4, 2, 3)]
    graded = rollout_batches(rollouts, 2, "cpu", None)
    assert [each.batch.lengths for each in graded] == [[1, 2, 3], [4, 5]]


def test_what_came_of_a_word_does_not_depend_on_the_micro_batch_it_is_in():
    answers = [Sampled([1] * n, True, [], [-1.0] * n, [-float(n)] * n) for n in (2, 3, 4, 5)]
    rollouts = [Rollout([1], [1], answer) for answer in answers]
    one, two = (rollout_batches(rollouts, n, "cpu", teacher_share=0.2) for n in (1, 2))
    for name in ("kd_weight", "ce_weight"):
        assert torch.equal(getattr(one[0], name), torch.cat([getattr(graded, name) for graded in two]))
    assert one[0].ce_weight.abs().max() > 0.1 and len(two) == 2


def test_the_coin_falls_with_its_share_and_knows_nothing_of_processes():
    heads = sum(is_on_policy(step, 0, 0.7) for step in range(1000))
    assert heads == pytest.approx(700, abs=45)                  # three standard deviations of sqrt(210)
    assert all(is_on_policy(step, 0, 1.0) for step in range(100))
    assert not any(is_on_policy(step, 0, 0.0) for step in range(100))


def test_rounds_end_at_multiples_so_that_a_resumed_run_has_the_same():
    assert rounds(range(2, 9), 4) == [range(2, 4), range(4, 8), range(8, 9)]
    assert rounds(range(3), 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert rounds(range(5, 5), 4) == []


# -- what is told of the answers -------------------------------------------------------------------------------

def test_repetition_is_the_share_of_ngrams_written_before():
    assert repetition([1, 2, 3, 4]) == 0.0 and repetition([1, 2, 3]) == 0.0
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)               # three times 1 1 1 1
    assert repetition([1, 2, 1, 2, 1], n=2) == pytest.approx(2 / 4)             # 12 21 12 21


def test_facts_are_means_over_tokens_or_answers():
    rollouts = [Rollout([1], [1], answer) for answer in ANSWERS]
    stats = rollout_stats(rollouts, age=0)
    stats.update(rollout_stats(rollouts[:1], age=3))        # a sum of Counters would drop negative rewards
    assert mean_stats(stats, "cpu") == pytest.approx(
        {"length": 7 / 3, "entropy": 3.1 / 7, "repetition": 0, "finished": 2 / 3, "age": 1})
    assert mean_stats(Counter(), "cpu") == {}


@pytest.mark.parametrize("first, then, warned", [
    (2.0, [0.3, 0.19, 0.06], 0),            # above 0.05 nats
    (0.3, [0.04], 0),                       # as sure as at the start, or nearly
    (2.0, [0.04, 0.03, 0.02], 1),           # once
])
def test_a_collapse_is_said_once_with_the_way_out(first, then, warned, capsys):
    memory = {}
    for entropy in (first, *then):
        warn_of_collapse({"entropy": entropy}, memory)
        warn_of_collapse({}, memory)                                            # a row without rollouts
    assert capsys.readouterr().out.count("--generation_temperature") == warned


# -- rewards, and what the teacher is shown ----------------------------------------------------------------------

def asked(tokenizer, *answers, gold="<think>a\nb</think> 7"):
    """Rollouts of the question "2+5"; an answer that ends in "..." is cut."""
    prompt, _ = tokenizer.encode_chat([{"role": "user", "content": "2+5"}], add_generation_prompt=True)
    end = [tokenizer.end_of_turn]
    sampled = [Sampled(tokenizer.encode(text.removesuffix("...")) + end * (not text.endswith("...")),
                       not text.endswith("..."), [], [], []) for text in answers]
    return [Rollout(prompt, prompt, each, tokenizer.encode(gold) + end) for each in sampled]


def test_rewards_are_normalised_within_the_answers_to_a_prompt(byte_tokenizer):
    """Rewards 1, 0, 0, 0: the mean is 1/4, the standard deviation sqrt(3)/4."""
    group = asked(byte_tokenizer(), "<think>x</think> 7", "<think>7</think> 8", "70", "</think>")
    graded = grade(group, load_reward("answer"), byte_tokenizer(), None, 99)
    assert [each.reward for each in graded] == [1, 0, 0, 0]
    assert [each.advantage for each in graded] == pytest.approx([3 ** 0.5, *[-3 ** -0.5] * 3])
    equal = grade(group[:3], (lambda *_: 0.1, True), byte_tokenizer(), None, 99)
    assert [each.advantage for each in equal] == [0, 0, 0]          # though 0.1 three times has another mean than 0.1


def test_a_reward_of_the_user_reads_texts_and_may_be_the_advantage_itself(byte_tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text("def reward(question, answer, gold):\n    return float(question + answer + gold)\n")
    (tmp_path / "constant.py").write_text("normalise = False\n\n\ndef reward(question, answer, gold):\n    return -1\n")
    group = asked(byte_tokenizer(), "0", "2", gold="1")
    group = [each._replace(prompt=byte_tokenizer().encode_chat([{"role": "user", "content": "9"}], True)[0]) for each in group]
    mine, constant = (grade(group, load_reward(str(tmp_path / name)), byte_tokenizer(), None, 99)
                      for name in ("mine.py", "constant.py"))
    assert [(each.reward, each.advantage) for each in mine] == [(901, -1), (921, 1)]
    assert [(each.reward, each.advantage) for each in constant] == [(-1, -1)] * 2
    stats = rollout_stats([each._replace(answer=ANSWERS[1]) for each in constant], age=0)
    stats.update(rollout_stats([constant[0]._replace(answer=ANSWERS[1])], age=0))
    assert mean_stats(stats, "cpu")["reward"] == -1


def test_the_teacher_reads_an_exchange_in_which_the_prompt_was_answered(byte_tokenizer):
    """As the tokens of a conversation: question, answer, the same question."""
    tokenizer, right, wrong = byte_tokenizer(), "</think> 7", "8"

    def shown(answer):
        question = {"role": "user", "content": "2+5"}
        return tokenizer.encode_chat([question, {"role": "assistant", "content": answer}, question], True)[0]

    group = asked(tokenizer, right, wrong, right + "...", "7")
    graded = grade(group, None, tokenizer, "answer", 200)
    assert all(each.teacher_prompt == shown("<think>a\nb</think> 7") and each.kd_weight == 1 for each in graded)
    assert all(each.prompt == group[0].prompt for each in graded)
    graded = grade(group, load_reward("answer"), tokenizer, "sibling", 200)
    assert [each.teacher_prompt for each in graded] == [shown("7"), shown("7"), shown("7"), shown(right)]
    alone = grade(group[:2], load_reward("answer"), tokenizer, "sibling", 200)         # its own answer is no sibling's
    assert alone[0].teacher_prompt == group[0].prompt and [each.kd_weight for each in alone] == [0, 1]
    n = len(shown("7") + group[1].answer.tokens)
    for limit, weight in ((n, 1), (n - 1, 0)):
        assert grade(group[1::2], load_reward("answer"), tokenizer, "sibling", limit)[0].kd_weight == weight
    tokens = rollout_batches([each._replace(answer=ANSWERS[i]) for i, each in enumerate(alone)], 1, "cpu", None)[0]
    assert tokens.kd_weight.tolist() == [1, 0, 0, 0]                                   # from short to long


def test_own_accuracy_is_the_share_of_right_greedy_answers(byte_tokenizer, cache, tmp_path, monkeypatch, tiny):
    file, tokenizer = tmp_path / "val.jsonl", byte_tokenizer()
    turns = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"</think> {i}"}] for i in range(4)]
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    data = PromptDataset([file], tokenizer, 64, log=lambda *_: None)

    def sample(model, prompts, limits, stop, *, temperature, **_):
        assert temperature == 0 and len(prompts) == 4
        yield from ((i, Sampled(tokenizer.encode("3"), True, [], [], [])) for i in range(4))

    monkeypatch.setattr(train_onpolicy, "sample", sample)
    args = train_onpolicy.Namespace(objective="pg", reward="answer", num_samples=8, privileged="sibling", shard="none", seed=0,
                                    rows=4, temperature=2, generation_temperature=2, top_p=1, top_k=0, max_new_tokens=9)
    world = train_onpolicy.init_distributed_mode(False, "cpu", -1, "float32")
    assert train_onpolicy.own_accuracy(tiny(), data, tokenizer, args, world) == 0.25


# -- the policy gradient ---------------------------------------------------------------------------------------

def weighted(log_q, targets, advantage=0.0, kd_weight=None):
    batch = Rollout([1], [1], Sampled(targets, False, [], [], []))
    batch = rollout_batches([batch._replace(answer=batch.answer._replace(log_q=[0.0] * len(targets)))], 1, "cpu", None)[0].batch
    return WeightedBatch(batch, kd_weight, None, torch.tensor(log_q), torch.full([len(targets)], advantage))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_pg_is_the_gradient_of_the_reverse_kl_of_a_token(temperature):
    """Over all five tokens, each as often as the student at that temperature samples it."""
    generator = torch.Generator().manual_seed(0)
    h, head = torch.randn(1, 3, generator=generator, requires_grad=True), torch.randn(5, 3, generator=generator)
    its = Dense(torch.randn(1, 3, generator=generator), torch.randn(5, 3, generator=generator))
    log_q = (h @ head.T / temperature).log_softmax(dim=-1)[0]
    log_p = (its.states @ its.head.T / temperature).log_softmax(dim=-1)[0]
    kl = (log_q.exp() * (log_q - log_p)).sum()
    right, = torch.autograd.grad(kl, h, retain_graph=True)
    mean, mean_kd = torch.zeros_like(h), 0.0
    for token, q in enumerate(log_q.exp().tolist()):
        loss, terms = policy_loss(h, head, weighted([math.log(q)], [token]), [its], temperature, 0.0)
        mean += q * torch.autograd.grad(loss, h)[0]
        mean_kd += q * terms["kd"].item()
    assert torch.allclose(mean, right, atol=1e-6) and right.abs().max() > 0.01
    assert mean_kd == pytest.approx(kl.item(), rel=1e-5)


def test_the_advantage_mixes_teacher_and_reward_and_needs_no_teacher_for_the_reward_alone():
    h, head = torch.zeros(2, 1, requires_grad=True), torch.ones(4, 1)                  # q = 1/4 everywhere
    its = Dense(torch.ones(2, 1), torch.tensor([[0.0], [0.0], [0.0], [math.log(3)]]))  # p = 1/6, ..., 1/2
    gap = math.log(2 / 3), math.log(2)                                                 # of the tokens 0 and 3
    quarter = [math.log(1 / 4)] * 2
    for W, kd_weight, expected in ((0.0, None, sum(gap)), (0.25, None, 0.75 * sum(gap) + 0.25 * 2 * 5),
                                   (0.25, torch.tensor([0.0, 1.0]), 0.75 * gap[1] + 0.25 * 2 * 5)):
        loss, _ = policy_loss(h, head, weighted(quarter, [0, 3], 5.0, kd_weight), [its], 1.0, W)
        assert loss.item() == pytest.approx(-expected * math.log(1 / 4), rel=1e-5)
    loss, terms = policy_loss(h, head, weighted(quarter, [0, 3], 5.0), [], 1.0, 1.0)
    assert loss.item() == pytest.approx(10 * math.log(4)) and terms == {}


def test_weights_of_a_token_are_its_importance_and_what_came_of_it():
    """log p - log q is 1, -2 and 4: after the first token 1 on average, after the second 4, after the last nothing. Of an
    answer with -5 and 1 it is 1. So the baselines are 1 for the first answer, and (1 + 4) / 2 for the second."""
    answers = [Sampled([1, 2, 3], True, [], [-1.0, -1.0, -5.0], [0.0, -3.0, -1.0]),
               Sampled([1, 2], True, [], [-1.0, -1.0], [-6.0, 0.0]), Sampled([1], True, [], [-1.0], [-1.0])]
    first, second, third = zip(*policy_gradient(answers, teacher_share=0.2))
    w = [1 / (0.2 * math.exp(gap) + 0.8) for gap in (1, -2, 4, -5, 1)]
    assert first[0].tolist() == pytest.approx(w[:3]) and second[0].tolist() == pytest.approx(w[3:])
    assert first[1].tolist() == pytest.approx([0, w[1] * 3, 0])
    assert second[1].tolist() == pytest.approx([w[3] * -1.5, 0])
    assert [weight.tolist() for weight in third] == [[1], [0]]
    (alone,) = zip(*policy_gradient(answers[:1], teacher_share=0.2))                       # no others: no baseline
    assert alone[1].tolist() == pytest.approx([w[0] * 1, w[1] * 4, 0])


@pytest.mark.parametrize("n", [1, 2])
def test_the_mean_of_the_policy_gradient_is_the_gradient_of_the_kl_of_whole_answers(n):
    """All 9 answers of two words out of three, one by one or as all 81 pairs, of which each gives the other its baseline.
    After each first word the student has a distribution of its own: its four rows of logits are W. With answers drawn from
    the student alone every weight w is 1; and of two words R is the sum, too."""
    generator = torch.Generator().manual_seed(0)
    W, V = torch.randn(4, 3, generator=generator, requires_grad=True), torch.randn(4, 3, generator=generator)
    words, answers = torch.eye(3), list(product(range(3), repeat=2))

    def log_of(logits):         # -> (9,) of whole answers
        log = logits.log_softmax(dim=-1)
        return torch.stack([log[0, a] + log[1 + a, b] for a, b in answers])

    right, = torch.autograd.grad((log_of(W).exp() * (log_of(W) - log_of(V))).sum(), W)

    mean = torch.zeros_like(W)
    for chosen in product(range(9), repeat=n):
        rows = [row for a, b in (answers[i] for i in chosen) for row in (0, 1 + a)]
        drawn = [word for i in chosen for word in answers[i]]
        log_q, log_p = (x.detach().log_softmax(dim=-1)[rows, drawn].view(n, 2).tolist() for x in (W, V))
        sampled = [Sampled([], False, [], of_q, of_p) for of_q, of_p in zip(log_q, log_p)]
        kd_weight, ce_weight = map(torch.cat, policy_gradient(sampled, teacher_share=1e-9))
        loss = 2 * fused_distillation_loss(W[rows], words, torch.tensor(drawn), [Dense(V[rows], words)], alpha=0.5,
                                           divergence=reverse_kl, kd_weight=kd_weight, ce_weight=ce_weight).loss
        mean += log_of(W)[list(chosen)].sum().exp().item() / n * torch.autograd.grad(loss, W)[0]
    assert torch.allclose(mean, right, atol=1e-5) and right.abs().max() > 0.1


# -- whole runs ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def flags(data, models):
    return {**TINY, "data_path": data / "experience_student.jsonl", "teacher_data_path": data / "experience_teacher.jsonl",
            "student": models / "student.pth", "teacher": models / "teacher.pth", "max_steps": 4, "max_new_tokens": 6,
            "log_interval": 1, "save_interval": 4}


NAME = "full_onpolicy_32"


@pytest.mark.parametrize("told, processes", [(True, 1), (False, 2)], ids=["privileged", "same prompts"])
def test_answers_are_needed_off_policy_only(told, processes, flags, tmp_path):
    """A student's file without answers, beside a teacher's with or without; three prompts, fewer than a step."""
    lines = map(json.loads, flags["data_path"].read_text().splitlines()[:3])
    asked, teacher = tmp_path / "asked.jsonl", tmp_path / "teacher.jsonl"
    asked.write_text("".join(json.dumps({"messages": row["conversations"][:-1]}) + "\n" for row in lines))
    teacher.write_text("".join(flags["teacher_data_path"].read_text().splitlines(keepends=True)[:3]))
    given = flags | {"data_path": asked, "teacher_data_path": teacher if told else None, "out_dir": tmp_path,
                     "accumulation_steps": 2, "max_steps": 2}
    said = succeed("train_onpolicy.py", **given, processes=processes)
    assert "validation: none" in said and all(row["kd"] > 0.01 for row in rows(tmp_path / f"{NAME}.jsonl"))
    if processes == 1:
        for flag in ({"on_policy_fraction": 0.5}, {"reward": "answer"}):
            assert "3 of 3 samples have no answer, which" in complaint("train_onpolicy.py", **given, **flag)


@pytest.mark.parametrize("kind, more", [
    ("_moe", {"num_samples": 2, "accumulation_steps": 2, "batch_size": 4}), ("_moe", {"objective": "minillm"}),
    ("", {"objective": "pg", "generation_temperature": 2}), ("", {"temperature": 2.0, "rows": 3, "top_p": 0.9, "top_k": 50})],
                         ids=["two answers, two micro-batches", "minillm", "pg", "few rows"])
def test_a_run_tells_of_the_answers(kind, more, flags, models, tmp_path):
    said = succeed("train_onpolicy.py", **flags | more | {"student": models / f"student{kind}.pth"}, out_dir=tmp_path)
    found = [row for row in rows(tmp_path / f"{NAME}{kind}.jsonl") if "loss" in row]
    assert len(found) == 4 and " -> '" in said
    for row in found:
        assert 1 <= row["length"] <= 6 and 0 < row["entropy"] < 8 and 0 <= row["finished"] <= 1 and row["age"] == 0
        assert row["kd"] > 0.01 and ("balance" in row) == bool(kind)
    last = rows(tmp_path / f"{NAME}{kind}.jsonl")[-1]
    assert last["val_kl"] > 0.1 and last["val_accuracy"] == 0
    n_answers = 8 * more.get("num_samples", 1) * more.get("accumulation_steps", 1) * more.get("batch_size", 8) // 8
    assert last["sampled_tokens"] == pytest.approx(sum(row["length"] for row in found) * n_answers)
    load_model(tmp_path / f"{NAME}{kind}.pth")


@pytest.mark.parametrize("objective, share, more", [("gkd", 0.8, {}), ("minillm", 0.6, {"num_samples": 8, "max_new_tokens": 3})])
def test_the_student_comes_nearer_to_its_teacher_on_its_own_answers(objective, share, more, flags, tmp_path):
    """From about 11 nats per token, in 60 steps of 8 prompts. A policy gradient is noisier: it gets more and shorter answers."""
    succeed("train_onpolicy.py", **flags | {"max_steps": 60, "log_interval": 10, "save_interval": 60, "divergence": "forward_kl",
                                            "val_path": "none"} | more, objective=objective, out_dir=tmp_path)
    found = [row["kd"] for row in rows(tmp_path / f"{NAME}.jsonl") if "kd" in row]
    assert found[-1] < share * found[0]


def test_on_the_answers_of_the_data_it_is_lesson_3_bit_by_bit(flags, tmp_path):
    given = flags | {"out_dir": tmp_path, "divergence": "forward_kl"}
    succeed("train_onpolicy.py", **given | {"max_new_tokens": 6}, on_policy_fraction=0)
    del given["max_new_tokens"]
    succeed("train_distillation.py", **given, alpha=0, optimizer="adamw")
    assert same(load(tmp_path / f"{NAME}.pth"), load(tmp_path / "full_dist_32.pth"))
    assert "length" not in rows(tmp_path / f"{NAME}.jsonl")[0]              # nothing was written


@pytest.mark.parametrize("shard", ["none", "zero2", "zero3"])
def test_two_processes_take_the_steps_of_one(shard, flags, tmp_path):
    """The likeliest word is drawn, and the draw does not depend on who draws it. Sharded, all must go through the model
    together, though answers differ in length."""
    given = flags | {"top_k": 1, "divergence": "forward_kl", "val_path": "none", "rows": 3}
    succeed("train_onpolicy.py", **given, out_dir=tmp_path / "one")
    succeed("train_onpolicy.py", **given | {"batch_size": 4, "shard": shard}, processes=2, out_dir=tmp_path / "two")
    one, two = load(tmp_path / f"one/{NAME}.pth"), load(tmp_path / f"two/{NAME}.pth")
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    assert [row["length"] for row in rows(tmp_path / f"one/{NAME}.jsonl")] == pytest.approx(
        [row["length"] for row in rows(tmp_path / f"two/{NAME}.jsonl")])


@pytest.mark.parametrize("shard", ["zero2", "zero3"])
def test_a_sharded_policy_gradient_takes_the_steps_of_a_whole_one(shard, flags, tmp_path):
    given = flags | {"objective": "pg", "reward": "answer", "num_samples": 2, "sample_every": 2,
                     "batch_size": 4, "processes": 2}
    for each in ("none", shard):
        succeed("train_onpolicy.py", **given, shard=each, out_dir=tmp_path / each)
    one, two = load(tmp_path / f"none/{NAME}.pth"), load(tmp_path / f"{shard}/{NAME}.pth")
    assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)


def test_a_student_with_adapters_may_be_its_own_teacher(flags, tmp_path):
    """Without them it says what a second copy would say; and only they are saved."""
    given = flags | {"lora_rank": 2, "lora_dropout": 0.1}
    copy = shutil.copytree(flags["student"].parent, tmp_path / "copy") / "student.pth"
    for name, teacher in (("itself", flags["student"]), ("another", copy)):
        succeed("train_onpolicy.py", **given | {"teacher": teacher}, out_dir=tmp_path / name)
    assert same(load(tmp_path / f"itself/{NAME}_lora.pth"), load(tmp_path / f"another/{NAME}_lora.pth"))
    assert rows(tmp_path / f"itself/{NAME}_lora.jsonl") != []


def test_of_answers_of_one_word_the_policy_gradient_has_the_divergence_alone(flags, tmp_path):
    """Nothing comes after the first word: R is 0, and the whole loss is w KL(q || p)."""
    succeed("train_onpolicy.py", **flags | {"objective": "minillm", "max_new_tokens": 1}, out_dir=tmp_path)
    for row in rows(tmp_path / f"{NAME}.jsonl")[:4]:
        assert row["loss"] == pytest.approx(row["kd"]) and row["length"] == 1


def test_prompt_and_answer_fit_into_max_seq_len(flags, tmp_path):
    """The answers of an untrained student end nowhere: of 30 tokens, some 20 are the prompt's."""
    given = {"max_seq_len": 30, "max_new_tokens": 100, "teacher_data_path": None}
    succeed("train_onpolicy.py", **flags | given, out_dir=tmp_path)
    assert all(row["length"] <= 12 for row in rows(tmp_path / f"{NAME}.jsonl") if "length" in row)


@pytest.mark.parametrize("more", [
    {"sample_every": 2, "on_policy_fraction": 0.7},
    {"sample_every": 3, "teacher_ema": 0.5},                                    # saves after 3, 6 and 8 steps
    {"objective": "pg", "reward": "answer", "reward_weight": 0.5, "num_samples": 2, "sample_every": 3},
], ids=["rounds of 2", "rounds of 3, moving teacher", "pg in rounds of 3"])
def test_a_killed_run_ends_as_the_unbroken_one(more, flags, tmp_path):
    given = flags | {"max_steps": 8, "save_interval": 2} | more
    succeed("train_onpolicy.py", **given, out_dir=tmp_path / "whole")
    broken = start("train_onpolicy.py", **given, out_dir=tmp_path / "broken")
    wait_until(lambda: len(rows(tmp_path / f"broken/{NAME}.jsonl")) >= 3)
    broken.send()
    assert broken.wait().code == -9
    succeed("train_onpolicy.py", **given, out_dir=tmp_path / "broken", resume=True)
    assert same(load(tmp_path / f"whole/{NAME}.pth"), load(tmp_path / f"broken/{NAME}.pth"))
    assert rows(tmp_path / f"whole/{NAME}.jsonl") == rows(tmp_path / f"broken/{NAME}.jsonl")
    ends = [load(tmp_path / f"{run}/{NAME}.resume") for run in ("whole", "broken")]
    assert same(*(end.get("teacher", {}) for end in ends)) and ("teacher" in ends[0]) == ("teacher_ema" in more)


def test_a_run_saves_at_the_end_of_the_round_in_which_the_interval_falls_due(flags, tmp_path):
    """Rounds end after 3, 6, 9 and 10 steps, the interval after 4 and 8: the last save but one is of step 9."""
    succeed("train_onpolicy.py", **flags | {"max_steps": 10, "sample_every": 3, "save_interval": 4, "log_interval": 100,
                                            "val_path": "none"}, out_dir=tmp_path)
    assert [row["step"] for row in rows(tmp_path / f"{NAME}.jsonl")] == [6, 9, 10]
    assert load(tmp_path / f"{NAME}.resume.previous")["progress"]["steps_done"] == 9


def test_the_teacher_follows_the_student(flags, tmp_path):
    """With decay 0 it is the student, which learns from the same prompts nothing; with 0.5 it is half-way, step by step."""
    given = flags | {"teacher_data_path": None, "max_steps": 1, "save_interval": 1}
    start_weights = load(flags["student"])
    for decay in (0.0, 0.5):
        said = succeed("train_onpolicy.py", **given | {"teacher_data_path": flags["teacher_data_path"]}, teacher_ema=decay,
                       out_dir=tmp_path / str(decay))
        state = load(tmp_path / f"{decay}/{NAME}.resume")
        for name, ours in state["model"].items():
            assert torch.allclose(state["teacher"][name], torch.lerp(ours, start_weights[name].float(), decay), atol=1e-6)
        assert "the KD loss is zero" not in said
    assert "the KD loss is zero" in succeed("train_onpolicy.py", **given, teacher_ema=0, out_dir=tmp_path / "same")
    assert all(row["kd"] < 1e-6 for row in rows(tmp_path / f"same/{NAME}.jsonl") if "kd" in row)


def test_a_reward_alone_needs_no_teacher(flags, tmp_path):
    """The reward is the number of e's: the longer they are trained, the more there are."""
    (tmp_path / "es.py").write_text("def reward(question, answer, gold):\n    return answer.count('e')\n")
    given = flags | {"teacher": tmp_path / "none.pth", "teacher_data_path": None, "objective": "pg", "reward": tmp_path / "es.py",
                     "reward_weight": 1, "num_samples": 8, "sample_every": 2, "max_steps": 40,
                     "log_interval": 10, "save_interval": 40}
    assert "no teacher -> student" in succeed("train_onpolicy.py", **given, out_dir=tmp_path)
    found = [row for row in rows(tmp_path / f"{NAME}.jsonl") if "loss" in row]
    assert found[-1]["reward"] > 1.5 * found[0]["reward"] and "kd" not in found[0]
    assert {"val_loss", "val_accuracy"} < set(rows(tmp_path / f"{NAME}.jsonl")[-1])


@pytest.mark.parametrize("privileged", ["answer", "sibling"])
def test_a_teacher_is_shown_a_right_answer(privileged, flags, tmp_path):
    """Of a rule by which each answer is right; of one by which none is, siblings teach nothing."""
    for name, value in (("right", 1), ("wrong", 0)):
        (tmp_path / f"{name}.py").write_text(f"def reward(question, answer, gold):\n    return {value}\n")
        given = flags | {"teacher": flags["student"], "teacher_data_path": None, "privileged": privileged, "num_samples": 2,
                         "reward": tmp_path / f"{name}.py", "max_new_tokens": 40}
        succeed("train_onpolicy.py", **given, out_dir=tmp_path / name)
    right, wrong = ([row["kd"] for row in rows(tmp_path / f"{name}/{NAME}.jsonl") if "kd" in row] for name in ("right", "wrong"))
    assert max(right if privileged == "answer" else wrong) < 1e-1 and (max(wrong) == 0) == (privileged == "sibling")


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_written_ahead_have_an_age_and_a_stop_waits_for_the_last_of_them(processes, flags, tmp_path):
    given = flags | {"sample_every": 5, "max_steps": 500, "save_interval": 500, "out_dir": tmp_path}
    started = start("train_onpolicy.py", **given | {"batch_size": 8 // processes}, processes=processes)
    wait_until(lambda: len(rows(tmp_path / f"{NAME}.jsonl")) >= 5)
    started.send(2)
    assert started.wait().code == 130
    found = [row for row in rows(tmp_path / f"{NAME}.jsonl") if "age" in row]
    assert [row["age"] for row in found] == [step % 5 for step in range(len(found))] and len(found) % 5 == 0


@pytest.mark.parametrize("wrong, said", [
    ({"objective": "pg", "top_k": 5}, "--objective pg samples from the whole distribution: --top_p 1 --top_k 0"),
    ({"objective": "pg", "reward": "answer"}, "--num_samples 2, or more"),
    ({"objective": "pg", "reward": "nothing.py", "num_samples": 2}, "no file at nothing.py"),
    ({"objective": "pg", "reward": "answer", "num_samples": 2, "reward_weight": 1, "privileged": "answer"}, "--privileged is for a teacher"),
    ({"privileged": "sibling", "num_samples": 2}, "by which --reward?"),
    ({"privileged": "answer", "on_policy_fraction": 0.5}, "--on_policy_fraction 1"),
    ({"teacher_ema": 1}, "--teacher_ema 1.0 must lie in [0, 1)"),
    ({"on_policy_fraction": 1.5}, "--on_policy_fraction 1.5 must lie in"),
    ({"generation_temperature": 0}, "--generation_temperature 0.0 must be above 0"),
    ({"objective": "minillm", "sample_every": 2}, "--objective minillm needs samples of the current student"),
    ({"tokenizer": "model/tokenizer.json"}, "--student has its own"),
    ({"max_new_tokens": 0}, "--max_new_tokens 0 must be 1 or more"),
    ({"teacher": "out/nothing.pth"}, "no weights at out/nothing.pth"),
], ids=lambda value: "" if isinstance(value, str) else next(iter(value)))
def test_what_cannot_be_is_said_before_anything_starts(wrong, said, flags, tmp_path):
    assert said in complaint("train_onpolicy.py", **flags | wrong, out_dir=tmp_path)
    assert not list(tmp_path.glob("*.pth"))
