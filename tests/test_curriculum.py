"""
三阶段课程的规律：怎么切分、怎么中断都一样；份额如约增长；各领域的梯度得到平衡；弱的类别多练；留出的问题从不训练。
Laws of train_curriculum.py: however it is split or interrupted the result is the same; shares grow as planned; gradients of
the domains are balanced; what is weak is drawn more often; and what is held out is never trained on.
"""

import io
import json
import re
import signal
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.formats import read_conversations
from dataset.lm_dataset import turns
from helpers_run import ROOT, complaint, load, rows, run, same, succeed
from interop.checkpoint import load_model, load_tokenizer, new_model, save_model
from model.config import LMConfig
from train_curriculum import (DOMAIN, GENERAL, STAGES, edited, give_balanced, is_held_out, learn_from, make_balance, mix,
                              open_both, stage_in_words)
from runtime.run import Run

SCRIPT = "train_curriculum.py"
SMALL = [f"{number}.{change}" for number in (1, 2, 3) for change in ("batch_size=8", "learning_rate=1e-3")]
FINALS = [f"stage{number}_final.pth" for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def choices(data, tmp_path_factory):
    """A domain of 90 questions with options, of three subjects, 30 each. Of b and c an untrained model has some right, of a
    all: each option is the right one."""
    file = tmp_path_factory.mktemp("domain") / "choices.jsonl"
    lines = [json.loads(line) for line in (data / "mcq_train.jsonl").read_text().splitlines()[:90]]
    for i, row in enumerate(lines):
        row["subject"] = "abc"[i % 3]
        if row["subject"] == "a":
            row["options"] = dict.fromkeys("ABCD", row["options"][row["answer_idx"]])
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return file


@pytest.fixture(scope="module")
def flags(data, models, choices):
    return {"teacher": models / "teacher.pth", "student": models / "student.pth", "dtype": "float32", "num_workers": 0,
            "general_dataset": data / "general.jsonl", "domain_dataset": choices, "val_fraction": 0.3, "max_steps": 6,
            "eval_interval": 3, "eval_samples": 8, "max_new_tokens": 3, "n_samples": 1, "log_interval": 1, "set": SMALL}


@pytest.fixture(scope="module")
def second(flags, models):
    """The second stage alone."""
    weights = {"start_stage": 2, "end_stage": 2, "student": None, "checkpoint_path": models / "student.pth"}
    return flags | weights | {"val_fraction": 0}


def but(flags, *changes, **more):
    """The flags with changes of the table, and others of their own."""
    return flags | {"set": [*flags["set"], *changes]} | more


def finals(folder) -> list[dict]:
    return [load(folder / name) for name in FINALS]


def trained(folder, name) -> list[dict]:
    """The rows of a stage's metrics that tell of training."""
    return [row for row in rows(folder / f"{name}.jsonl") if "loss" in row]


def near(one, two, share) -> bool:
    """Whether two tensors are the same to a share of the largest number in them."""
    return (one - two).abs().max() <= share * two.abs().max()


# ---------------------------------------------------------------------------------------------------- whole curricula


def test_three_stages_leave_weights_a_log_and_answers(flags, tmp_path):
    epochs_of = {1: 2, 2: 1, 3: 2}
    changes = [f"{number}.epochs={epochs}" for number, epochs in epochs_of.items()]
    said = succeed(SCRIPT, **but(flags, *changes, max_steps=None, eval_interval=0), out_dir=tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    for number, stage in enumerate(STAGES["tiny"], start=1):
        epochs = epochs_of[number]
        assert {f"stage{number}_{end}.pth" for end in ("best", "final", *(f"epoch-{n + 1}" for n in range(epochs)))} <= names
        assert same(load(tmp_path / f"stage{number}_final.pth"), load(tmp_path / f"stage{number}_epoch-{epochs}.pth"))
        assert f"stage{number}_epoch-{epochs + 1}.pth" not in names
        assert f"stage {number}: share {stage.share}" in said
    assert (tmp_path / "distillation.log").read_text() == said
    samples = (tmp_path / "samples.md").read_text()
    assert samples.count("**teacher**") == samples.count("**student**") == samples.count("**data**")
    assert [f"## stage{number}, step" in samples for number in (1, 2, 3)] == [True] * 3
    assert not [name for name in names if name.endswith(".tmp")]


def test_the_best_weights_are_those_of_the_lowest_loss_on_the_shares_at_the_stage_s_end(second, tmp_path):
    """Of stage 2 that is 0.7 of the domain's loss and 0.3 of the general one. A rate that makes it worse leaves the first."""
    succeed(SCRIPT, **but(second, "2.learning_rate=0.1", warmup_ratio=0.5, val_fraction=0.3), out_dir=tmp_path)
    losses = [0.7 * row["val_domain_loss"] + 0.3 * row["val_general_loss"] for row in rows(tmp_path / "stage2.jsonl")
              if "val_domain_loss" in row]
    assert len(losses) == 3 and losses[1] < losses[2]
    assert load(tmp_path / "stage2.resume")["best"] == pytest.approx(losses[1])
    assert not same(load(tmp_path / "stage2_best.pth"), load(tmp_path / "stage2_final.pth"))


def test_forgetting_is_what_the_general_side_has_lost_since_the_stage_began():
    log = []
    one = SimpleNamespace(args=Namespace(share=(0.3, 0.7), sampling="uniform"), memory={}, steps_done=0, wandb=None,
                          log=SimpleNamespace(row=lambda step, wandb, **found: log.append(found)))
    for accuracy, loss in ((0.5, 3.0), (0.75, 2.5), (0.25, 4.0)):
        learn_from({"general_loss": loss, "domain_loss": 5.0, "general_accuracy": accuracy, "domain_accuracy": 0.5}, one)
    assert [row["val_forgetting_accuracy"] for row in log] == [0.0, -0.25, 0.25]
    assert [row["val_forgetting_loss"] for row in log] == [0.0, -0.5, 1.0]
    assert one.memory["loss"] == pytest.approx(0.3 * 4 + 0.7 * 5)


def test_a_student_may_start_from_nothing(flags, tmp_path):
    succeed(SCRIPT, **but(flags, student=None, max_steps=1, end_stage=1), out_dir=tmp_path)
    student, _ = load_model(tmp_path / "stage1_final.pth")
    assert (student.config.dim, student.config.n_layers) == (64, 2)


def test_a_stage_begins_with_the_student_that_the_one_before_left_and_with_nothing_else(unbroken, tmp_path):
    """Stage 3 alone, from the weights that stage 2 left, is stage 3 of the whole curriculum."""
    whole, given = unbroken
    succeed(SCRIPT, **given | {"student": None}, start_stage=3, checkpoint_path=whole / "stage2_final.pth", out_dir=tmp_path)
    assert same(load(whole / "stage3_final.pth"), load(tmp_path / "stage3_final.pth"))
    assert rows(whole / "stage3.jsonl") == rows(tmp_path / "stage3.jsonl")
    assert not list(tmp_path.glob("stage[12]*"))


def test_the_warm_up_is_a_share_of_each_stage_s_steps_or_the_steps_that_are_asked_for(second, tmp_path):
    """Half of 6 steps: thirds of the 1.1e-3 that the cosine begins with. Two of them: halves."""
    for more, begins in (({}, [1.1e-3 / 3, 2.2e-3 / 3, 1.1e-3, 1.1e-3]), ({"warmup_iters": 2}, [0.55e-3, 1.1e-3, 1.1e-3])):
        succeed(SCRIPT, **second | more, warmup_ratio=0.5, out_dir=tmp_path)
        assert [row["lr"] for row in trained(tmp_path, "stage2")][:len(begins)] == pytest.approx(begins)


def test_a_loss_is_logged_also_where_it_is_0_or_no_number(flags, models, tmp_path):
    """A teacher that asks itself has nothing to learn; a rate of 1e30 leaves no number after its first steps."""
    for change, more in (("1.learning_rate=0", {"student": models / "teacher.pth"}), ("1.learning_rate=1e30", {})):
        succeed(SCRIPT, **but(flags, change, end_stage=1, val_fraction=0, **more), out_dir=tmp_path)
        found = rows(tmp_path / "stage1.jsonl")
        assert len(found) == 6 and all({"loss", "ce", "kd"} <= row.keys() for row in found)


@pytest.mark.parametrize("kind", ["", "_moe"])
def test_all_losses_balances_and_kinds_of_model_go_together(kind, flags, models, tmp_path):
    below = ["feature_weight=0.1", "attention_weight=0.1", "contrastive_weight=0.05", "alpha=0.3", "temperature=2"]
    changes = [f"{number}.{change}" for number in (1, 2, 3) for change in below]
    given = but(flags, *changes, "3.balance=gradnorm", "2.balance=pcgrad", max_steps=2, accumulation_steps=2,
                student=models / f"student{kind}.pth", teacher=models / f"teacher{kind}.pth")
    succeed(SCRIPT, **given, out_dir=tmp_path)
    for name in ("stage1", "stage2", "stage3"):
        for row in trained(tmp_path, name):
            assert row["feature"] > 0 and row["attention"] > 0 and row["contrastive"] > 0 and ("moe" in row) == bool(kind)
            parts = 0.3 * row["ce"] + 0.7 * row["kd"] + 0.1 * row["feature"] + 0.1 * row["attention"]
            parts += 0.05 * row["contrastive"] + (0.01 * row["moe"] if kind else 0)
            assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_adapters_go_through_all_stages(flags, models, tmp_path):
    said = succeed(SCRIPT, **flags, use_lora=True, out_dir=tmp_path)
    assert "adapters beside 2 wq" in said
    base, _ = load_model(models / "student.pth")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in FINALS:
        weights = load(tmp_path / name)
        assert all("lora" in key for key in weights) and sum(map(torch.numel, weights.values())) < base.n_parameters()
        model, _ = load_model(tmp_path / name)
        assert not same(before, dict(model.state_dict()))
    assert not same(load(tmp_path / FINALS[0]), load(tmp_path / FINALS[1]))
    assert same(before, load(models / "student.pth"))


# ------------------------------------------------------------------------------------------------- split, interrupted


def test_two_processes_take_the_steps_of_one(flags, tmp_path):
    """Of a step of 2 samples, one general and one of the domain, each process has nothing of the one or the other."""
    given = but(flags, "3.balance=gradnorm", "3.share=0.5:0.5", eval_samples=0)
    succeed(SCRIPT, **but(given, "3.batch_size=2"), out_dir=tmp_path / "one")
    halves = "1.batch_size=4", "2.batch_size=4", "3.batch_size=1"
    succeed(SCRIPT, **but(given, *halves), processes=2, out_dir=tmp_path / "two")
    for one, two in zip(finals(tmp_path / "one"), finals(tmp_path / "two")):
        assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)
    for name in ("stage1", "stage2", "stage3"):
        for one, two in zip(rows(tmp_path / f"one/{name}.jsonl"), rows(tmp_path / f"two/{name}.jsonl"), strict=True):
            assert one == pytest.approx(two, rel=2e-3, abs=1e-5)
    assert "drawn from now on" in (tmp_path / "two/distillation.log").read_text()


def test_micro_batches_change_nothing(second, tmp_path):
    given = but(second, "3.sampling=uniform", end_stage=3)
    succeed(SCRIPT, **given, out_dir=tmp_path / "one")
    succeed(SCRIPT, **but(given, "2.batch_size=4", "3.batch_size=4"), accumulation_steps=2, out_dir=tmp_path / "two")
    for final in FINALS[1:]:
        one, two = load(tmp_path / "one" / final), load(tmp_path / "two" / final)
        assert all(torch.allclose(one[name], two[name], atol=2e-4) for name in one)


def patched(folder, patch: str):
    """The script with a patch before it."""
    file = folder / "patched.py"
    file.write_text(f"import runpy\n\n{patch}\n\nrunpy.run_path({SCRIPT!r}, run_name='__main__')\n")
    return file


def interrupted(folder, name, step, number):
    """The script, to which a signal is sent in the given step, before anything of it is logged or saved; of two processes, to
    the second."""
    return patched(folder, f"""
import os

update = Run.update

def then_interrupt(run, step):
    rates = update(run, step)
    if (run.name, run.steps_done) == ({name!r}, {step}) and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), {int(number)})
    return rates

Run.update = then_interrupt""")


@pytest.mark.parametrize("name, step, number", [("stage1", 6, signal.SIGINT), ("stage2", 1, signal.SIGKILL),
                                                ("stage2", 5, signal.SIGINT), ("stage3", 5, signal.SIGKILL)])
def test_an_interrupted_curriculum_ends_as_the_unbroken_one(name, step, number, flags, unbroken, tmp_path):
    """Stage 3 draws its samples in other shares since its first evaluation; what it saves at step 4 knows of them. One who
    stops a stage at its last step does not mean the next."""
    whole, given = unbroken
    ended = run(interrupted(tmp_path, name, step, number), **given, out_dir=tmp_path)
    assert ended.code == (130 if number == signal.SIGINT else -9) and "Traceback" not in ended.output
    assert max(path.name[:6] for path in tmp_path.glob("stage*")) == name
    assert not (tmp_path / "stage3_final.pth").exists()
    succeed(SCRIPT, **given, out_dir=tmp_path, resume=True)
    assert same(finals(whole), finals(tmp_path))
    for stage in ("stage1", "stage2", "stage3"):
        assert rows(whole / f"{stage}.jsonl") == rows(tmp_path / f"{stage}.jsonl")
        assert same(load(whole / f"{stage}_best.pth"), load(tmp_path / f"{stage}_best.pth"))


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The folder of a run, and its flags. A loader process has to hear of new shares too."""
    folder = tmp_path_factory.mktemp("unbroken")
    given = but(flags, "2.balance=gradnorm", "2.feature_weight=0.1", "2.contrastive_weight=0.1", save_interval=4, num_workers=1)
    succeed(SCRIPT, **given, out_dir=folder)
    return folder, given


def test_a_finished_curriculum_that_is_resumed_trains_nothing(unbroken):
    folder, given = unbroken
    kept = ["stage?_*.pth", "stage?.jsonl", "samples.md"]
    before = {path: path.read_bytes() for pattern in kept for path in folder.glob(pattern)}
    said = succeed(SCRIPT, **given, out_dir=folder, resume=True)
    assert "step 6/6" not in said and said.count("after step 6") == 3
    for path, content in before.items():
        assert path.read_bytes() == content or same(load(path), load(io.BytesIO(content))), path


def test_two_processes_hear_of_a_stop_though_a_stage_ends_before_they_agree(flags, tmp_path):
    """They agree on it every eighth step; a stage has six here."""
    ended = run(interrupted(tmp_path, "stage1", 5, signal.SIGINT), **flags, processes=2, out_dir=tmp_path)
    assert ended.code == 130 and (tmp_path / "stage1_final.pth").exists() and not list(tmp_path.glob("stage2*"))


def test_what_is_resumed_is_the_last_run_and_not_one_before_it(flags, tmp_path):
    """The second run, in the folder of a finished first, has another stage 1 and is interrupted there: its later stages are
    still to be done."""
    succeed(SCRIPT, **but(flags, max_steps=2, val_fraction=0, end_stage=2), out_dir=tmp_path)
    given = but(flags, "1.learning_rate=0", max_steps=2, val_fraction=0, end_stage=2)
    assert run(interrupted(tmp_path, "stage1", 1, signal.SIGINT), **given, out_dir=tmp_path).code == 130
    said = succeed(SCRIPT, **given, out_dir=tmp_path, resume=True)
    assert "stage1.resume after step 1" in said and "stage2.resume after" not in said


# ------------------------------------------------------------------------------------------------- shares and balance


def test_the_share_of_the_domain_grows_as_planned(second, tmp_path):
    """A step of 8 samples is never a whole sample away from its share, so the counts of 21 steps hit the mean of a half. A row
    of the log tells the share since the row before."""
    for interval in (1, 7):
        succeed(SCRIPT, **second | {"max_steps": 21, "log_interval": interval}, out_dir=tmp_path / str(interval))
    shares, sevens = ([row["domain_share"] for row in trained(tmp_path / name, "stage2")] for name in ("1", "7"))
    assert len(shares) == 21 and sevens == pytest.approx([sum(shares[first:first + 7]) / 7 for first in (0, 7, 14)])
    for step, share in enumerate(shares):
        assert abs(share - (0.3 + 0.4 * step / 20)) < 1 / 8
    assert sum(shares) / 21 == pytest.approx(0.5, abs=0.03)


def gradient_of_the_first_step(path) -> list[torch.Tensor]:
    """Of each weight. Adam's first moment begins at 0 and becomes 0.9 * 0 + 0.1 g: the resume file tells g."""
    return [state["exp_avg"] / 0.1 for state in load(path)["optimizer"]["state"].values()]


@pytest.mark.parametrize("change", ["alpha=0.5", "feature_weight=1", "attention_weight=10"])
def test_what_is_told_apart_and_added_by_shares_is_the_gradient_of_the_whole_step(change, second, tmp_path):
    """Normed by the tokens of its group and weighed by the group's share of tokens, each token counts as before."""
    given = but(second, f"2.{change}", grad_clip=0, max_steps=1)
    succeed(SCRIPT, **but(given, "2.balance=none"), out_dir=tmp_path / "whole")
    plain = patched(tmp_path, "from distill import balance\n\nbalance.equal_norms = balance.plain")
    succeed(plain, **but(given, "2.balance=norm"), out_dir=tmp_path / "apart")
    whole, apart = (gradient_of_the_first_step(tmp_path / name / "stage2.resume") for name in ("whole", "apart"))
    assert len(whole) > 10
    for one, two in zip(apart, whole, strict=True):
        assert near(one, two, 4e-6)
    (row,), (of_whole,) = trained(tmp_path / "apart", "stage2"), trained(tmp_path / "whole", "stage2")
    assert {name: row[name] for name in of_whole} == pytest.approx(of_whole, rel=1e-5)
    assert row["grad_general"] == pytest.approx(row["grad_general_balanced"])


def one_step(balance, general, domain):
    """What give_balanced logs, and hands on, of a run that has nothing else to do; a side is (gradient, share, loss)."""
    given, sides = [], {GENERAL: general, DOMAIN: domain}
    gradients, shares, losses = ({side: values[place] for side, values in sides.items()} for place in range(3))
    one = SimpleNamespace(give_gradient=given.append, memory={}, scaler=SimpleNamespace(get_scale=lambda: 2.0),
                          world=SimpleNamespace(device="cpu"))
    norms = give_balanced(one, balance, {side: torch.tensor(gradient) for side, gradient in gradients.items()}, shares,
                          {side: Counter(loss=torch.tensor(loss)) for side, loss in losses.items()})
    return {name: float(norm) for name, norm in norms.items()}, given[0].tolist(), one.memory


def test_balanced_by_norm_a_domain_counts_by_its_share_of_tokens():
    """Gradients of length 2 and 6, shares of 3/4 and 1/4: contributions of 3/2 and 3/2, balanced of 9/4 and 3/4. A loss scale
    of 2 is not part of what is logged."""
    norms, given, _ = one_step(make_balance(Namespace(balance="norm")), ([2.0, 0.0], 0.75, 1.0), ([0.0, 6.0], 0.25, 1.0))
    assert norms == pytest.approx({"grad_general": 0.75, "grad_domain": 0.75, "grad_general_balanced": 1.125,
                                   "grad_domain_balanced": 0.375})
    assert given == pytest.approx([2.25, 0.75])


def test_conflicts_leave_a_step_and_weights_of_gradnorm_are_remembered():
    against = ([2.0, 0.0], 0.5, 3.0), ([-2.0, 2.0], 0.5, 2.0)
    _, given, _ = one_step(make_balance(Namespace(balance="pcgrad")), *against)
    assert given == pytest.approx([0.5, 1.5])                   # (1, 0) less its half along (-1, 1); (-1, 1) less (-1, 0)
    _, _, memory = one_step(make_balance(Namespace(balance="gradnorm")), *against)
    assert memory["gradnorm"]["first_losses"] == {GENERAL: 3.0, DOMAIN: 2.0}
    assert memory["gradnorm"]["weights"][GENERAL] > memory["gradnorm"]["weights"][DOMAIN]
    assert make_balance(Namespace(balance="none")) is None


def test_the_log_has_the_length_of_each_domain_s_part_before_and_after(second, tmp_path):
    """Balance by norm moves it from one to the other: together they are as long as before."""
    succeed(SCRIPT, **but(second, max_steps=4), out_dir=tmp_path)
    found = trained(tmp_path, "stage2")
    assert len(found) == 4
    for row in found:
        after = row["grad_general_balanced"] + row["grad_domain_balanced"]
        assert after == pytest.approx(row["grad_general"] + row["grad_domain"], rel=1e-4)
        assert row["grad_general_balanced"] != pytest.approx(row["grad_general"], rel=1e-3)


def test_a_step_without_the_domain_is_a_step_of_the_general_data(second, tmp_path):
    """At 8 samples and a share of 1 in 10,000 no step has anything of the domain."""
    losses = {}
    for balance in ("none", "norm", "gradnorm", "pcgrad"):
        given = but(second, "2.share=0.0001:0.0001", f"2.balance={balance}", max_steps=3)
        succeed(SCRIPT, **given, out_dir=tmp_path / balance)
        found = trained(tmp_path / balance, "stage2")
        losses[balance] = [row["loss"] for row in found]
        assert losses[balance] == pytest.approx(losses["none"], rel=1e-5)
        assert balance == "none" or [row["grad_domain"] for row in found] == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------- data


def opened(data, domain, tokenizer, **more):
    """What open_both makes of the general data and a domain."""
    args = Namespace(general_dataset=data / "general.jsonl", domain_dataset=domain, general_val_path=None, val_path=None,
                     val_fraction=0.3, eval_samples=0, max_seq_len=None, skip_bad_lines=False)
    vars(args).update(more)
    return open_both(args, tokenizer, LMConfig(dim=32, n_layers=1, n_heads=2, max_seq_len=128))


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(ROOT / "model/tokenizer.json")


def prompts(data, samples) -> list[tuple[int, ...]]:
    """What stands before the last answer of each sample."""
    return [tuple(of_sample[-1][0]) for of_sample in turns(data.batch(np.asarray(samples)))]


def all_samples(sides, side) -> np.ndarray:
    return np.concatenate(list(sides[side].values()))


def test_a_held_out_question_is_never_trained_on_however_often_it_is_there(data, words, cache, tmp_path):
    """The domain's rows three times, and those of the general data among them."""
    domain = tmp_path / "domain.jsonl"
    domain.write_text((data / "specialist.jsonl").read_text() * 3 + (data / "general.jsonl").read_text())
    joined, sides, held_out = opened(data, domain, words)
    asked = {side: prompts(joined, all_samples(sides, side)) for side in (GENERAL, DOMAIN)}
    aside = {side: prompts(of_side, range(len(of_side))) for side, (of_side, _) in held_out.items()}
    trained_on, never = {*asked[GENERAL], *asked[DOMAIN]}, {*aside[GENERAL], *aside[DOMAIN]}
    assert not trained_on & never and len(never) > 30
    assert len(asked[DOMAIN]) + len(aside[DOMAIN]) == 400 and len(asked[GENERAL]) + len(aside[GENERAL]) == 100
    for side, (of_side, exam) in held_out.items():
        assert len(exam) == len(of_side)
        written = words.encode_chats((one.messages for one in exam), add_generation_prompt=True)
        assert Counter(tuple(ids) for ids, _ in written) == Counter(aside[side])


def test_about_the_fraction_asked_for_is_held_out():
    questions = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(2000)]
    assert sum(is_held_out(question, 0.1) for question in questions) == pytest.approx(200, abs=40)      # 3 sqrt(180)
    assert not any(is_held_out(question, 0.0) for question in questions)
    for question in questions[:100]:                # who is held out at 10 % is at 30 %
        assert is_held_out(question, 0.3) >= is_held_out(question, 0.1)


def test_a_validation_file_takes_the_place_of_what_would_be_held_out(data, words, cache):
    joined, sides, held_out = opened(data, data / "specialist.jsonl", words, val_path=data / "val.jsonl")
    assert len(all_samples(sides, DOMAIN)) == 100 and len(held_out[DOMAIN][0]) == len(held_out[DOMAIN][1]) == 34
    assert len(all_samples(sides, GENERAL)) < 100


def test_of_what_is_held_out_as_many_are_looked_at_as_asked_for(data, words, cache):
    _, _, held_out = opened(data, data / "specialist.jsonl", words, eval_samples=5)
    assert [(len(of_side), len(exam)) for of_side, exam in held_out.values()] == [(5, 5), (5, 5)]


@pytest.mark.parametrize("more, sides", [
    ({"val_path": "none", "general_val_path": "none"}, set()), ({"val_fraction": 0}, set()),
    ({"val_path": "none"}, {GENERAL}), ({"general_val_path": "none"}, {DOMAIN})],
    ids=["none of either", "a fraction of 0", "none of the domain", "none of general"])
def test_a_curriculum_can_do_without_validation(more, sides, second, tmp_path):
    """But not draw by what is found there: the third stage is told to be uniform."""
    given = but(second, "3.sampling=uniform", max_steps=2, end_stage=3, val_fraction=0.3) | more
    said = succeed(SCRIPT, **given, out_dir=tmp_path)
    for stage in ("stage2", "stage3"):
        looked_at = {name.split("_")[1] for name in rows(tmp_path / f"{stage}.jsonl")[-1] if name.endswith("_kl")}
        assert looked_at == sides and (tmp_path / f"{stage}_final.pth").exists()
    assert said.count("held out: none") == 2 - len(sides)


def test_a_domain_may_be_a_folder_of_several_kinds_of_files(data, words, cache, flags, tmp_path):
    """A spreadsheet of questions and answers, an exam without a header, and texts. A row that does not say what it is about is
    about its file."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    sums = range(10)
    (folder / "sheet.csv").write_text("Instruction,Output,Category\n" + "".join(f"take {n},{n} mg,dose\n" for n in sums))
    (folder / "exam.csv").write_text("".join(f"{n} + 3 =,{n},{n + 3},{n + 5},{n + 7},B\n" for n in sums))
    (folder / "book.txt").write_text("".join(f"Take {n} a day and rest.\n\n" for n in sums))
    (folder / "notes.md").write_text("not read")
    assert read_conversations(folder / "exam.csv")[1][1]["content"] == "4"
    joined, sides, held_out = opened(data, folder, words, val_fraction=0.2)
    assert set(sides[DOMAIN]) == {"dose", "exam", "book"} and len(sides[DOMAIN]["book"]) == 8
    assert len(joined) == len(all_samples(sides, GENERAL)) + len(all_samples(sides, DOMAIN))
    of_side, exam = held_out[DOMAIN]
    assert len(of_side) + len(all_samples(sides, DOMAIN)) == 30
    assert {one.category for one in exam} <= {"dose", "exam"} and len(exam) == len(of_side) - 2
    for name, samples in sides[DOMAIN].items():
        read = words.decode(joined.batch(samples[:1]).tokens.tolist())
        assert {"dose": "take", "exam": " + 3 =", "book": "a day and rest"}[name] in read
    succeed(SCRIPT, **flags | {"domain_dataset": folder, "max_steps": 2}, out_dir=tmp_path / "out")


# ------------------------------------------------------------------------------------------- driven by the evaluation


def test_a_category_is_drawn_by_what_it_lacks_and_a_tenth_at_least(data, words, choices, cache, capsys):
    """Of the domain's 0.8, a is perfect (0.1), b half known (0.5), c was not asked and counts as the domain's mean (0.4). A
    step's count strays by half a sample, that of 500 steps by 11."""
    joined, sides, _ = opened(data, choices, words, val_fraction=0)
    args = Namespace(share=(0.8, 0.8), growth="linear", sampling="evaluation", balance="none", epochs=1, max_steps=500,
                     batch_size=8, accumulation_steps=1, seed=0)
    mixture = mix(args, joined, sides, SimpleNamespace(rank=0, size=1))
    equal = {"general": 800, "domain/a": 1067, "domain/b": 1067, "domain/c": 1067}
    assert mixture.counts(0, 500) == pytest.approx(equal, abs=30)
    loaded = []
    one = SimpleNamespace(args=args, memory={}, steps_done=100, total_steps=500, wandb=None, data=mixture,
                          log=SimpleNamespace(row=lambda *_, **__: None), load_data=lambda: loaded.append(True))
    learn_from({"general_loss": 1.0, "domain_loss": 1.0, "domain_accuracy": 0.6, "categories": {"a": 1.0, "b": 0.5}}, one)
    by_need = {"general": 640, "domain/a": 256, "domain/b": 1280, "domain/c": 1024}
    assert mixture.counts(100, 500) == pytest.approx(by_need, abs=30)
    assert loaded == [True] and one.memory["history"] == [(100, {"domain/a": 0.1, "domain/b": 0.5, "domain/c": 0.4})]
    assert "share of what is drawn from now on: a 100% -> 10%; b 50% -> 50%; c 60% -> 40%\n" in capsys.readouterr().out
    one.steps_done = 500
    learn_from({"general_loss": 1.0, "domain_loss": 1.0, "domain_accuracy": 0.0, "categories": {"a": 0.0}}, one)
    assert len(one.memory["history"]) == 1          # after the last step nothing is drawn any more
    vars(args).update(sampling="uniform")
    assert mix(args, joined, sides, SimpleNamespace(rank=0, size=1)).names == ["general", "domain/all"]


def test_a_stage_may_have_a_number_of_steps_of_its_own(flags, tmp_path):
    given = but(flags, "1.steps=2", "2.steps=3", "3.steps=4", "3.sampling=uniform", max_steps=None, val_fraction=0)
    succeed(SCRIPT, **given, out_dir=tmp_path)
    assert [len(trained(tmp_path, f"stage{number}")) for number in (1, 2, 3)] == [2, 3, 4]


def test_the_third_stage_asks_first_and_then_divides_by_the_answers(unbroken):
    """At its beginning and after step 3. What is right in all cases has a tenth of a weight nevertheless."""
    folder, _ = unbroken
    lines = [line for line in (folder / "distillation.log").read_text().splitlines() if "drawn from now on" in line]
    history = load(folder / "stage3.resume")["memory"]["history"]
    assert [step for step, _ in history] == [0, 3] and len(lines) == 2
    for line, (_, weights) in zip(lines, history):
        assert list(weights) == ["domain/a", "domain/b", "domain/c"] and weights["domain/a"] == 0.1
        right = {"domain/a": 1.0} | {name: 1 - weights[name] for name in ("domain/b", "domain/c")}
        assert max(right["domain/b"], right["domain/c"]) < 0.7
        assert line == "accuracy -> share of what is drawn from now on: " + "; ".join(
            f"{name[-1]} {right[name]:.0%} -> {weight / sum(weights.values()):.0%}" for name, weight in weights.items())
    assert "history" not in load(folder / "stage2.resume")["memory"]


def test_a_stage_may_sample_by_evaluation_wherever_the_domain_has_a_share(second, tmp_path):
    """A growing one, with balance; or all of it."""
    given = but(second, "2.sampling=evaluation", "3.share=1:1", end_stage=3, max_steps=3, eval_interval=2, val_fraction=0.3)
    assert succeed(SCRIPT, **given, out_dir=tmp_path).count("drawn from now on") == 4
    assert [row["domain_share"] for row in trained(tmp_path, "stage3")] == [1, 1, 1]


def test_a_category_may_be_called_general(second, tmp_path):
    """As the rows of a file general.jsonl are, which do not say what they are about."""
    domain = tmp_path / "general.jsonl"
    domain.write_text("".join(json.dumps({"question": f"{n} + 1 =", "answer": str(n + 1)}) + "\n" for n in range(40)))
    given = but(second, "2.share=0.5:0.5", "2.sampling=evaluation", domain_dataset=domain, max_steps=2, val_fraction=0.3)
    assert "drawn from now on: general " in succeed(SCRIPT, **given, out_dir=tmp_path)
    assert [row["domain_share"] for row in trained(tmp_path, "stage2")] == pytest.approx([0.5, 0.5], abs=0.13)


# -------------------------------------------------------------------------------------------- the table, and mistakes


def test_set_changes_numbers_of_the_table():
    stages = edited(STAGES["base"], ["2.balance=none", "3.share=0.8:0.9", "1.alpha=0", "1.epochs=7"])
    assert (stages[0].alpha, stages[0].epochs) == (0.0, 7) and stages[2].share == (0.8, 0.9)
    assert stages[1].balance == "none" and STAGES["base"][1].balance == "norm"
    assert edited(STAGES["tiny"], []) == list(STAGES["tiny"])
    assert "balance" not in stage_in_words(stages[1]) and "share (0.8, 0.9)" in stage_in_words(stages[2])


@pytest.mark.parametrize("change, reason", [
    ("4.alpha=1", "--set 4.alpha=1: write STAGE.NAME=VALUE"), ("alpha=1", "write STAGE.NAME=VALUE"),
    ("1.alfa=1", "did you mean 'alpha'"), ("1.alpha", "write STAGE.NAME=VALUE"),
    ("1.alpha=much", "'much' is no value for alpha"), ("3.share=0.8", "share .* of stage 3 must be two numbers"),
    ("3.share=a:b", "'a:b' is no value for share"), ("3.share=0.8:1.2", "share .* of stage 3 must be two numbers in"),
    ("1.alpha=1.5", r"alpha 1.5 of stage 1 must lie in \[0, 1\]"), ("1.alpha=nan", "alpha nan of stage 1 must lie in"),
    ("1.temperature=0", "temperature 0.0 of stage 1 must be above 0"), ("2.batch_size=0", "batch_size 0 of stage 2 must be 1"),
    ("2.batch_size=2.5", "'2.5' is no value for batch_size"), ("2.epochs=0", "epochs 0 of stage 2 must be 1 or more"),
    ("2.growth=cubic", "growth cubic of stage 2 must be one of linear, cosine, steps"),
    ("2.balance=fair", "balance fair of stage 2 must be one of none, norm, gradnorm, pcgrad"),
    ("3.sampling=mad", "sampling mad of stage 3 must be one of uniform, evaluation"),
    ("1.balance=norm", "balance norm of stage 1 must be none where one side alone"),
    ("1.learning_rate=-1", "learning_rate -1.0 of stage 1 must"), ("1.learning_rate=nan", "learning_rate nan of stage 1 must"),
    ("2.feature_weight=-0.1", "feature_weight -0.1 of stage 2 must"), ("2.steps=-1", "steps -1 of stage 2 must be 0 or more"),
    ("1.sampling=evaluation", "sampling evaluation of stage 1 must be uniform where the domain has no share"),
])
def test_a_change_of_the_table_that_cannot_be_says_why(change, reason):
    with pytest.raises(ValueError, match=reason):
        edited(STAGES["tiny"], [change])


@pytest.mark.parametrize("wrong, reason", [
    ({"set": ["2.balanc=none"]}, "--set 2.balanc=none: a stage has no 'balanc'; did you mean 'balance'"),
    ({"set": ["3.batch_size=1000"]}, "fewer than the 1000 of one step"),
    ({"start_stage": 2}, "--start_stage 2 goes on from a stage's weights: --checkpoint_path .*stage1_final.pth"),
    ({"start_stage": 3, "end_stage": 2, "checkpoint_path": "x.pth"}, "--start_stage 3 and --end_stage 2 must be"),
    ({"start_stage": 2, "checkpoint_path": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"teacher": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"domain_dataset": "/nowhere/clinic"}, "/nowhere/clinic"),
    ({"domain_dataset": ROOT / "tests/../configs"}, "no file in .*configs is .jsonl, .json, .csv or .txt"),
    ({"val_path": "/nowhere/val.jsonl"}, "/nowhere/val.jsonl"),
    ({"val_path": "none"}, "sampling by evaluation needs questions of the domain .* --set 3.sampling=uniform"),
    ({"set": [*SMALL, "2.sampling=evaluation"], "val_fraction": 0}, "--set 2.sampling=uniform"),
    ({"val_fraction": 1.5}, r"--val_fraction 1.5 must lie in \[0, 1\)"),
    ({"warmup_ratio": 1}, r"--warmup_ratio 1.0 must lie in \[0, 1\)"),
    ({"max_seq_len": 256}, "--max_seq_len 256 is more than the student was made for, 128"),
    ({"set": [*SMALL, "3.attention_weight=1"], "relation_heads": 5}, "relation_heads"),
    ({"set": [*SMALL, "3.feature_weight=1"], "layer_map": "1:9"}, "'1:9' is no pair student:teacher"),
    ({"student": None, "use_lora": True}, "adapters are for weights that have learned something"),
    ({"fp16": True}, "--dtype float16 needs a GPU"),
    ({"ddp": True}, "torchrun --nproc_per_node 2 train_curriculum.py"),
], ids=lambda value: "" if isinstance(value, str) else next(iter(value)))
def test_what_cannot_be_is_said_before_anything_starts(wrong, reason, flags, tmp_path):
    given = {name: value for name, value in flags.items() if name != "dtype" or "fp16" not in wrong}
    said = complaint(SCRIPT, **given | {"device": "cpu"} | wrong, out_dir=tmp_path)
    assert re.search(reason, said), said
    assert not list(tmp_path.glob("stage*"))


def test_a_teacher_that_reads_less_than_the_student_is_named(flags, data, tmp_path):
    model, tokenizer = new_model(LMConfig(dim=32, n_layers=1, n_heads=2, max_seq_len=256), ROOT / "model/tokenizer.json")
    save_model(model, tokenizer, tmp_path / "long.pth")
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"question": f"{n} + 1 = " * 40, "answer": "1"}) + "\n" for n in range(20)))
    said = complaint(SCRIPT, **flags | {"student": tmp_path / "long.pth", "domain_dataset": long}, out_dir=tmp_path)
    assert "--max_seq_len 128" in said


def test_other_names_of_the_flags_are_understood(flags, tmp_path):
    other = {"teacher": "teacher_model", "student": "student_model", "domain_dataset": "medical_dataset"}
    given = {other.get(name, name): value for name, value in flags.items()}
    succeed(SCRIPT, **given | {"max_steps": 1}, end_stage=1, output_dir=tmp_path)
    assert (tmp_path / "stage1_final.pth").exists()


def test_a_run_begun_anew_leaves_nothing_of_the_one_before_in_its_answers_and_log(flags, tmp_path):
    for _ in range(2):
        said = succeed(SCRIPT, **flags | {"max_steps": 1, "end_stage": 1}, out_dir=tmp_path)
    assert (tmp_path / "distillation.log").read_text() == said
    assert (tmp_path / "samples.md").read_text().count("## stage1, step 1\n") == 1
