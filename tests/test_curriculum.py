"""
三阶段课程的规律：怎么切分、怎么中断都一样；份额按计划增长；两方的梯度得到平衡；弱的类别多练；留出的问题从不训练。
Laws of train_curriculum.py: splits and interruptions change nothing, shares grow as planned, the gradients of both sides
are balanced, weak categories are sampled more often, and held-out questions are never trained on.
"""

import io
import json
import re
import signal
import sys
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_curriculum
from dataset import lm_dataset
from dataset.domains import is_held_out, mix_sides, open_sides
from dataset.formats import read_conversations
from dataset.lm_dataset import prompts_and_answers
from distill.balance import GradNorm
from distill.stages import Stage, describe_stage, edit_stages
from evaluation.domains import forgetting, weighted_loss
from evaluation.exam import read_exam
from helpers_run import ROOT, load, rows, run, same, succeed
from interop.checkpoint import load_model, load_tokenizer, new_model, save_model
from model.config import LMConfig
from runtime.checkpoint import Progress
from train_curriculum import DOMAIN, GENERAL, STAGES, balance_gradients, validate

SCRIPT = "train_curriculum.py"
SMALL = [f"{number}.{change}" for number in (1, 2, 3) for change in ("batch_size=8", "learning_rate=1e-3")]
NAMES = ["stage1", "stage2", "stage3"]


@pytest.fixture(scope="module")
def choices(data, tmp_path_factory):
    """A domain of 90 multiple-choice questions on three subjects. Every option of subject a is right, so its accuracy is 1.
    The third subject has the name of the other side."""
    file = tmp_path_factory.mktemp("domain") / "choices.jsonl"
    lines = [json.loads(line) for line in (data / "mcq_train.jsonl").read_text().splitlines()[:90]]
    for i, row in enumerate(lines):
        row["subject"] = ("a", "b", GENERAL)[i % 3]
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
    """The second stage alone, without validation."""
    weights = {"start_stage": 2, "end_stage": 2, "student": None, "checkpoint_path": models / "student.pth"}
    return flags | weights | {"val_fraction": 0}


def but(flags, *changes, **more):
    """The flags with more changes of the table, and other flags."""
    return flags | {"set": [*flags["set"], *changes]} | more


def training(folder, name) -> list[dict]:
    """The rows of a stage's metrics that are not of a validation."""
    return [row for row in rows(folder / f"{name}.jsonl") if "loss" in row]


def near(one, two, share) -> bool:
    """Whether two tensors differ by at most a share of their largest number."""
    return (one - two).abs().max() <= share * two.abs().max()


def patched(folder, patch: str):
    """The script, after a patch."""
    file = folder / "patched.py"
    file.write_text(f"import runpy\n\n{patch}\n\nrunpy.run_path({SCRIPT!r}, run_name='__main__')\n")
    return file


# ---- whole curricula -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The folder of a whole run, its flags, and what it printed. A loader process must get new shares too."""
    folder = tmp_path_factory.mktemp("unbroken")
    given = but(flags, "2.balance=gradnorm", "2.feature_weight=0.1", "2.contrastive_weight=0.1", save_interval=4,
                num_workers=1, warmup_ratio=0.5)
    return folder, given, succeed(SCRIPT, **given, out_dir=folder)


def test_three_stages_leave_weights_a_log_and_answers(unbroken):
    folder, _, printed = unbroken
    names = {path.name for path in folder.iterdir()}
    for stage, row in zip(NAMES, STAGES["tiny"]):
        assert {f"{stage}_{end}.pth" for end in ("best", "final", "epoch-1")} <= names
        assert same(load(folder / f"{stage}_final.pth"), load(folder / f"{stage}_epoch-{2 if stage == 'stage3' else 1}.pth"))
        assert f"stage {stage[-1]}: share {row.share}" in printed
    assert (folder / "distillation.log").read_text() == printed
    samples = (folder / "samples.md").read_text()
    assert samples.count("**teacher**") == samples.count("**student**") == samples.count("**data**")
    assert all(f"## {stage}, step" in samples for stage in NAMES)
    assert not [name for name in names if name.endswith(".tmp")]
    rates = [row["lr"] for row in training(folder, "stage2")]       # warm-up: half of the 6 steps
    assert rates[:4] == pytest.approx([1.1e-3 / 3, 2.2e-3 / 3, 1.1e-3, 1.1e-3])


def test_a_stage_starts_from_the_student_of_the_one_before_and_nothing_else(unbroken, tmp_path):
    """Stage 3 alone, from the weights of stage 2, is stage 3 of the whole curriculum."""
    folder, given, _ = unbroken
    succeed(SCRIPT, **given | {"student": None}, start_stage=3, checkpoint_path=folder / "stage2_final.pth", out_dir=tmp_path)
    assert same(load(folder / "stage3_final.pth"), load(tmp_path / "stage3_final.pth"))
    assert rows(folder / "stage3.jsonl") == rows(tmp_path / "stage3.jsonl")
    assert not list(tmp_path.glob("stage[12]*"))


def test_the_best_weights_have_the_lowest_loss_at_the_shares_of_the_stages_end(second, tmp_path):
    """In stage 2: 0.7 of the domain's loss and 0.3 of the general one. A learning rate that raises it keeps the first."""
    succeed(SCRIPT, **but(second, "2.learning_rate=0.1", warmup_iters=2, val_fraction=0.3), out_dir=tmp_path)
    losses = [0.7 * row["val_domain_loss"] + 0.3 * row["val_general_loss"] for row in rows(tmp_path / "stage2.jsonl")
              if "val_domain_loss" in row]
    assert len(losses) == 3 and losses[1] < losses[2]
    assert load(tmp_path / "stage2.resume")["progress"]["best"] == pytest.approx(losses[1])
    assert not same(load(tmp_path / "stage2_best.pth"), load(tmp_path / "stage2_final.pth"))
    assert [row["lr"] for row in training(tmp_path, "stage2")][:3] == pytest.approx([0.055, 0.11, 0.11])    # --warmup_iters 2


def test_forgetting_is_what_the_general_side_lost_since_the_start():
    start, now = ({"general_loss": loss, "domain_loss": 5.0, "general_accuracy": accuracy} for loss, accuracy in
                  ((3.0, 0.5), (4.0, 0.25)))
    assert forgetting(now, start) == {"forgetting_loss": 1.0, "forgetting_accuracy": 0.25}
    assert forgetting({"domain_loss": 5.0}, start) == {}
    assert weighted_loss(now, 0.7) == pytest.approx(0.3 * 4 + 0.7 * 5)
    assert weighted_loss({"domain_loss": 5.0}, 0.7) == 5.0 and np.isnan(weighted_loss({"general_loss": 5.0}, 1.0))


def test_a_run_started_anew_keeps_nothing_of_the_one_before_in_its_answers_and_log(flags, tmp_path):
    """With a new student, and under the other names of the flags."""
    other = {"teacher": "teacher_model", "domain_dataset": "medical_dataset"}
    given = {other.get(name, name): value for name, value in flags.items()}
    for _ in range(2):
        printed = succeed(SCRIPT, **given | {"student": None, "max_steps": 1}, student_model="none", end_stage=1,
                          output_dir=tmp_path)
    assert (tmp_path / "distillation.log").read_text() == printed
    assert (tmp_path / "samples.md").read_text().count("## stage1, step 1\n") == 1
    student, _ = load_model(tmp_path / "stage1_final.pth")
    assert (student.config.dim, student.config.n_layers) == (64, 2)


def test_a_loss_is_logged_even_if_it_is_0_or_nan(flags, models, tmp_path):
    """The student is its own teacher: its first loss is 0. A learning rate of 1e30 makes the later ones NaN."""
    given = but(flags, "1.learning_rate=1e30", student=models / "teacher.pth", end_stage=1, val_fraction=0)
    succeed(SCRIPT, **given, out_dir=tmp_path)
    found = rows(tmp_path / "stage1.jsonl")
    assert len(found) == 6 and all({"loss", "ce", "kd"} <= row.keys() for row in found)
    assert found[0]["kd"] == pytest.approx(0, abs=1e-6) and np.isnan(found[-1]["loss"])


def test_the_loss_is_the_sum_of_its_terms_with_every_balance_and_with_experts(unbroken, flags, models, tmp_path):
    terms = ["feature_weight=0.1", "attention_weight=0.1", "contrastive_weight=0.05", "alpha=0.3", "temperature=2"]
    changes = [f"{number}.{change}" for number in (1, 2, 3) for change in terms]
    given = but(flags, *changes, "3.balance=gradnorm", "2.balance=pcgrad", max_steps=2, accumulation_steps=2,
                student=models / "student_moe.pth", teacher=models / "teacher_moe.pth")
    succeed(SCRIPT, **given, out_dir=tmp_path)
    for name in NAMES:
        for row in training(tmp_path, name):
            parts = 0.3 * row["ce"] + 0.7 * row["kd"] + 0.1 * row["feature"] + 0.1 * row["attention"]
            parts += 0.05 * row["contrastive"] + 0.01 * row["moe"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5) and min(row[name] for name in ("feature", "moe")) > 0
    for row in training(unbroken[0], "stage2"):
        assert "moe" not in row
        assert row["loss"] == pytest.approx(row["kd"] + 0.1 * row["feature"] + 0.1 * row["contrastive"], rel=1e-5)


def test_adapters_train_through_all_stages_each_with_its_number_of_steps(flags, models, tmp_path):
    given = but(flags, "1.steps=2", "2.steps=3", "3.steps=4", "3.sampling=uniform", max_steps=None, val_fraction=0)
    assert "adapters beside 2 wq" in succeed(SCRIPT, **given, use_lora=True, out_dir=tmp_path)
    assert [len(training(tmp_path, name)) for name in NAMES] == [2, 3, 4]
    base, _ = load_model(models / "student.pth")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    finals = [load(tmp_path / f"{name}_final.pth") for name in NAMES]
    for name, weights in zip(NAMES, finals):
        assert all("lora" in key for key in weights) and sum(map(torch.numel, weights.values())) < base.n_parameters()
        model, _ = load_model(tmp_path / f"{name}_final.pth")
        assert not same(before, dict(model.state_dict()))
    assert not same(finals[0], finals[1])
    assert same(before, load(models / "student.pth"))


# ---- split, interrupted --------------------------------------------------------------------------


def test_a_step_split_over_processes_or_micro_batches_is_the_same_step(flags, tmp_path):
    """The third stage's steps have one general and one domain sample: each process has none of one side."""
    given = but(flags, "3.balance=gradnorm", "3.share=0.5:0.5", eval_samples=0)
    succeed(SCRIPT, **but(given, "3.batch_size=2"), out_dir=tmp_path / "one")
    halves = "1.batch_size=4", "2.batch_size=4", "3.batch_size=1"
    for split in ({"processes": 2}, {"accumulation_steps": 2}):
        folder = tmp_path / next(iter(split))
        succeed(SCRIPT, **but(given, *halves), **split, out_dir=folder)
        for name in NAMES:
            one, two = load(tmp_path / f"one/{name}_final.pth"), load(folder / f"{name}_final.pth")
            assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)
            for one, two in zip(rows(tmp_path / f"one/{name}.jsonl"), rows(folder / f"{name}.jsonl"), strict=True):
                assert one == pytest.approx(two, rel=2e-3, abs=1e-5)
        assert "samples from now on" in (folder / "distillation.log").read_text()


def interrupted(folder, name, step, number):
    """The script, which receives a signal in the given step, before anything of it is logged or saved; with two processes,
    the second one receives it."""
    return patched(folder, f"""
import os
from runtime.log import Log

log_step = Log.step

def then_interrupt(log):
    log_step(log)
    log.now = vars(log).get("now", log.first_step) + 1
    if (log.path.stem, log.now) == ({name!r}, {step}) and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), {int(number)})

Log.step = then_interrupt""")


def test_a_curriculum_interrupted_four_times_ends_like_the_unbroken_one(unbroken, tmp_path):
    """Stage 3 samples with new shares since its first evaluation, which its resume file of step 4 contains. A stop in the
    last step of a stage does not start the next one. The first run has no --resume: it removes an earlier run's files."""
    folder, given, _ = unbroken
    out = tmp_path / "out"
    out.mkdir()
    stale = [out / "stage2.resume", out / "stage3.resume.previous"]
    for file in stale:
        file.touch()
    for i, (name, step, number) in enumerate([("stage1", 6, signal.SIGINT), ("stage2", 1, signal.SIGKILL),
                                              ("stage2", 5, signal.SIGINT), ("stage3", 5, signal.SIGKILL)]):
        ended = run(interrupted(tmp_path, name, step, number), **given, out_dir=out, resume=i > 0 or None)
        assert ended.code == (130 if number == signal.SIGINT else -9) and "Traceback" not in ended.output
        assert ("Resume with: " in ended.output) == (number == signal.SIGINT)
        assert max(path.name[:6] for path in out.glob("stage*")) == name
    assert not (out / "stage3_final.pth").exists()
    succeed(SCRIPT, **given, out_dir=out, resume=True)
    for name in NAMES:
        assert rows(folder / f"{name}.jsonl") == rows(out / f"{name}.jsonl")
        for end in ("best", "final"):
            assert same(load(folder / f"{name}_{end}.pth"), load(out / f"{name}_{end}.pth"))


def test_a_finished_curriculum_that_is_resumed_trains_nothing(unbroken):
    folder, given, _ = unbroken
    kept = ["stage?_*.pth", "stage?.jsonl", "samples.md"]
    before = {path: path.read_bytes() for pattern in kept for path in folder.glob(pattern)}
    printed = succeed(SCRIPT, **given, out_dir=folder, resume=True)
    assert "step 6/6" not in printed and printed.count("after step 6") == 3
    for path, content in before.items():
        assert path.read_bytes() == content or same(load(path), load(io.BytesIO(content))), path


def test_two_processes_agree_on_a_stop_at_the_end_of_a_stage(flags, tmp_path):
    """Within a stage they compare notes every eighth step; this stage has six."""
    ended = run(interrupted(tmp_path, "stage1", 5, signal.SIGINT), **flags, processes=2, out_dir=tmp_path)
    assert ended.code == 130 and (tmp_path / "stage1_final.pth").exists() and not list(tmp_path.glob("stage2*"))


# ---- shares and balance --------------------------------------------------------------------------


def test_the_share_of_the_domain_grows_as_planned(second, data, choices, words, cache, tmp_path):
    """A step of 8 samples differs from its share by less than one sample, so 21 steps have their mean, a half. A row of the
    log has the share since the row before."""
    succeed(SCRIPT, **second | {"max_steps": 21, "log_interval": 7}, out_dir=tmp_path)
    joined, sides, _ = opened(data, choices, words, val_fraction=0)
    stage = edit_stages(STAGES["tiny"], ["2.batch_size=8"], steps=21)[1]
    mixture = mix_sides(joined, sides, stage, 1, 0, 1, seed=1337)
    counts = [mixture.counts(step, step + 1) for step in range(21)]
    shares = [count["domain/all"] / 8 for count in counts]
    for step, share in enumerate(shares):
        assert sum(counts[step].values()) == 8 and abs(share - (0.3 + 0.4 * step / 20)) < 1 / 8
    assert sum(shares) / 21 == pytest.approx(0.5, abs=0.03)
    assert [row["domain_share"] for row in training(tmp_path, "stage2")] == pytest.approx(
        [sum(shares[first:first + 7]) / 7 for first in (0, 7, 14)])


def gradient_of_the_first_step(path) -> list[torch.Tensor]:
    """Of each weight, from the resume file: Adam's first moment starts at 0 and becomes 0.9 * 0 + 0.1 g."""
    return [state["exp_avg"] / 0.1 for state in load(path)["optimizer"]["state"].values()]


def test_the_gradients_of_both_sides_weighted_by_shares_are_the_gradient_of_the_whole_step(second, tmp_path):
    """A side's loss is divided by its tokens and weighted by its share of tokens: each token counts as before."""
    given = but(second, "2.alpha=0.5", "2.feature_weight=1", "2.attention_weight=10", grad_clip=0, max_steps=1)
    succeed(SCRIPT, **but(given, "2.balance=none"), out_dir=tmp_path / "whole")
    plain = patched(tmp_path, "from distill import balance\n\nbalance.equal_norms = balance.plain")
    succeed(plain, **but(given, "2.balance=norm"), out_dir=tmp_path / "apart")
    whole, apart = (gradient_of_the_first_step(tmp_path / name / "stage2.resume") for name in ("whole", "apart"))
    assert len(whole) > 10
    for one, two in zip(apart, whole, strict=True):
        assert near(one, two, 4e-6)
    (row,), (of_whole,) = training(tmp_path / "apart", "stage2"), training(tmp_path / "whole", "stage2")
    assert {name: row[name] for name in of_whole} == pytest.approx(of_whole, rel=1e-5)
    assert row["grad_general"] == pytest.approx(row["grad_general_balanced"])


def test_balance_moves_the_gradient_between_the_sides_and_a_loss_scale_changes_nothing(second, tmp_path):
    """By norm, the contributions have the same total length as before. fp16 scales the loss; here by 1024, exactly."""
    scale = """import torch

scaler = torch.amp.GradScaler
torch.amp.GradScaler = lambda device, enabled: scaler(device, init_scale=1024.0)"""
    given = second | {"max_steps": 4}
    succeed(SCRIPT, **given, out_dir=tmp_path / "plain")
    succeed(patched(tmp_path, scale), **given, out_dir=tmp_path / "scaled")
    found = training(tmp_path / "plain", "stage2")
    assert found == training(tmp_path / "scaled", "stage2") and len(found) == 4
    for row in found:
        after = row["grad_general_balanced"] + row["grad_domain_balanced"]
        assert after == pytest.approx(row["grad_general"] + row["grad_domain"], rel=1e-4)
        assert row["grad_general_balanced"] != pytest.approx(row["grad_general"], rel=1e-3)


def balanced(name, general, domain, gradnorm=None):
    """(gradient, norms) of balance_gradients. A side is (gradient, share, loss)."""
    gradients, shares, losses = ({GENERAL: general[place], DOMAIN: domain[place]} for place in range(3))
    gradient, norms = balance_gradients(
        name, gradnorm, {side: torch.tensor(gradient) for side, gradient in gradients.items()}, shares,
        {side: Counter(loss=torch.tensor(loss)) for side, loss in losses.items()})
    return gradient.tolist(), {side: float(norm) for side, norm in norms.items()}


def test_balanced_by_norm_a_side_counts_by_its_share_of_tokens():
    """Gradients of length 2 and 6, shares of 3/4 and 1/4: contributions of 3/2 and 3/2 become 9/4 and 3/4."""
    gradient, norms = balanced("norm", ([2.0, 0.0], 0.75, 1.0), ([0.0, 6.0], 0.25, 1.0))
    assert gradient == pytest.approx([2.25, 0.75])
    assert norms == pytest.approx({"general": 1.5, "domain": 1.5, "general_balanced": 2.25, "domain_balanced": 0.75})


def test_pcgrad_removes_conflicts_and_gradnorm_learns_its_weights():
    against = ([2.0, 0.0], 0.5, 3.0), ([-2.0, 2.0], 0.5, 2.0)
    gradient, _ = balanced("pcgrad", *against)
    assert gradient == pytest.approx([0.5, 1.5])        # (1, 0) less its half along (-1, 1); (-1, 1) less (-1, 0)
    gradnorm = GradNorm([GENERAL, DOMAIN], rate=0.005)
    balanced("gradnorm", *against, gradnorm)
    state = gradnorm.state_dict()
    assert state["first_losses"] == {GENERAL: 3.0, DOMAIN: 2.0} and state["weights"][GENERAL] > state["weights"][DOMAIN]


def test_a_step_without_the_domain_is_a_step_on_the_general_data(second, tmp_path):
    """With 8 samples and a share of 1 in 10,000 no step has a sample of the domain."""
    losses = {}
    for balance in ("none", "gradnorm"):
        given = but(second, "2.share=0.0001:0.0001", f"2.balance={balance}", max_steps=3)
        succeed(SCRIPT, **given, out_dir=tmp_path / balance)
        losses[balance] = [row["loss"] for row in training(tmp_path / balance, "stage2")]
    assert losses["gradnorm"] == pytest.approx(losses["none"], rel=1e-5)
    assert [row["grad_domain"] for row in training(tmp_path / "gradnorm", "stage2")] == [0, 0, 0]
    for balance in ("norm", "pcgrad"):
        assert balanced(balance, ([3.0, 4.0], 1.0, 1.0), ([0.0, 0.0], 0.0, 0.0))[0] == pytest.approx([3.0, 4.0])


# ---- data ----------------------------------------------------------------------------------------


def opened(data, domain, tokenizer, general_val_path=None, val_path=None, val_fraction=0.3, eval_samples=0):
    paths = {GENERAL: (data / "general.jsonl", general_val_path), DOMAIN: (domain, val_path)}
    return open_sides(paths, tokenizer, 128, val_fraction, eval_samples, read_exam)


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(ROOT / "model/tokenizer.json")


def prompts(data, samples) -> list[tuple[int, ...]]:
    """The prompt of the last answer of each sample."""
    return [tuple(turns[-1][0]) for turns in prompts_and_answers(data.batch(np.asarray(samples)))]


def all_samples(sides, side) -> np.ndarray:
    return np.concatenate(list(sides[side].values()))


def test_a_held_out_question_is_never_trained_on_however_often_it_occurs(data, words, cache, tmp_path):
    """The domain's rows three times, and the general rows among them."""
    domain = tmp_path / "domain.jsonl"
    domain.write_text((data / "specialist.jsonl").read_text() * 3 + (data / "general.jsonl").read_text())
    joined, sides, held_out = opened(data, domain, words)
    trained = {side: prompts(joined, all_samples(sides, side)) for side in (GENERAL, DOMAIN)}
    val = {side: prompts(val_data, range(len(val_data))) for side, (val_data, _) in held_out.items()}
    seen, never = {*trained[GENERAL], *trained[DOMAIN]}, {*val[GENERAL], *val[DOMAIN]}
    assert not seen & never and len(never) > 30
    assert len(trained[DOMAIN]) + len(val[DOMAIN]) == 400 and len(trained[GENERAL]) + len(val[GENERAL]) == 100
    for side, (val_data, exam) in held_out.items():
        assert len(exam) == len(val_data)
        written = words.encode_chats((question.messages for question in exam), add_generation_prompt=True)
        assert Counter(tuple(ids) for ids, _ in written) == Counter(val[side])


def test_about_the_requested_fraction_is_held_out():
    questions = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(2000)]
    assert sum(is_held_out(question, 0.1) for question in questions) == pytest.approx(200, abs=40)      # 3 sqrt(180)
    assert not any(is_held_out(question, 0.0) for question in questions)
    for question in questions[:100]:                # held out at 10 %, held out at 30 %
        assert is_held_out(question, 0.3) >= is_held_out(question, 0.1)


def test_a_validation_file_replaces_the_held_out_fraction_of_its_side(data, words, cache, capsys):
    specialist = data / "specialist.jsonl"
    joined, sides, held_out = opened(data, specialist, words, val_path=data / "val.jsonl")
    assert len(all_samples(sides, DOMAIN)) == 100 and len(held_out[DOMAIN][0]) == len(held_out[DOMAIN][1]) == 34
    assert len(all_samples(sides, GENERAL)) < 100
    _, _, held_out = opened(data, specialist, words, eval_samples=5)
    assert [(len(val_data), len(exam)) for val_data, exam in held_out.values()] == [(5, 5), (5, 5)]
    capsys.readouterr()
    _, sides, held_out = opened(data, specialist, words, val_path="none", general_val_path="none")
    assert not held_out and len(all_samples(sides, DOMAIN)) == 100
    assert capsys.readouterr().out.count("held out: none") == 2


@pytest.mark.parametrize("missing, side", [("val_path", GENERAL), ("general_val_path", DOMAIN)])
def test_a_curriculum_can_validate_on_one_side_alone(missing, side, second, tmp_path):
    given = but(second, "3.sampling=uniform", max_steps=1, end_stage=3, val_fraction=0.3) | {missing: "none"}
    succeed(SCRIPT, **given, out_dir=tmp_path)
    for stage in ("stage2", "stage3"):
        validated = {name.split("_")[1] for name in rows(tmp_path / f"{stage}.jsonl")[-1] if name.endswith("_kl")}
        assert validated == {side} and (tmp_path / f"{stage}_final.pth").exists()


def test_a_domain_may_be_a_folder_of_several_kinds_of_files(data, words, cache, second, tmp_path):
    """A spreadsheet of questions and answers, an exam without a header, and texts. The category of a row without one is its
    file's name."""
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
    val_data, exam = held_out[DOMAIN]
    assert len(val_data) + len(all_samples(sides, DOMAIN)) == 30
    assert {question.category for question in exam} <= {"dose", "exam"} and len(exam) == len(val_data) - 2
    for name, samples in sides[DOMAIN].items():
        text = words.decode(joined.batch(samples[:1]).tokens.tolist())
        assert {"dose": "take", "exam": " + 3 =", "book": "a day and rest"}[name] in text
    succeed(SCRIPT, **second | {"domain_dataset": folder, "max_steps": 1, "val_fraction": 0.2}, out_dir=tmp_path / "out")


# ---- sampling by evaluation ----------------------------------------------------------------------


def test_a_category_is_sampled_by_what_it_lacks_and_a_tenth_at_least(data, words, choices, cache, capsys, monkeypatch):
    """Of the domain's 0.8: a is perfect (0.1), b half known (0.5), the third has no questions and counts as the domain's mean
    (0.4). A step's count differs by half a sample, that of 500 steps by 11."""
    joined, sides, _ = opened(data, choices, words, val_fraction=0)
    stage = Stage((0.8, 0.8), 0.0, 1.0, 0.0, batch_size=8, epochs=1, sampling="evaluation", steps=500)
    mixture = mix_sides(joined, sides, stage, 1, 0, 1, seed=0)
    equal = {"general": 800, "domain/a": 1067, "domain/b": 1067, "domain/general": 1067}
    assert mixture.counts(0, 500) == pytest.approx(equal, abs=30)
    metrics = {"general_loss": 1.0, "domain_loss": 2.0, "domain_accuracy": 0.6}
    monkeypatch.setattr(train_curriculum, "evaluate_sides", lambda *_: (metrics, {"domain/a": 1.0, "domain/b": 0.5}))
    args = Namespace(share=stage.share, sampling="evaluation", pad_vocab=False, max_new_tokens=1)
    log, progress = SimpleNamespace(row=lambda *_, **__: None), Progress({}, total_steps=500, steps_done=100)
    assert validate(None, args, None, None, [], None, mixture, {}, progress, log) == pytest.approx(1.8)
    by_need = {"general": 640, "domain/a": 256, "domain/b": 1280, "domain/general": 1024}
    assert mixture.counts(100, 500) == pytest.approx(by_need, abs=30)
    history = [(100, {"domain/a": 0.1, "domain/b": 0.5, "domain/general": 0.4})]
    assert progress.memory["history"] == history
    assert ("samples from now on: domain/a 100% -> 10%; domain/b 50% -> 50%; domain/general 60% -> 40%\n"
            in capsys.readouterr().out)
    progress.steps_done = 500                       # after the last step there is nothing to sample
    validate(None, args, None, None, [], None, mixture, {}, progress, log)
    assert progress.memory["history"] == history
    stage = Stage((0.8, 0.8), 0.0, 1.0, 0.0, batch_size=8, epochs=1)
    assert mix_sides(joined, sides, stage, 1, 0, 1, seed=0).names == ["general", "domain/all"]


def test_the_third_stage_evaluates_first_and_then_samples_by_the_answers(unbroken):
    """At its start and after step 3. The perfect category has a tenth of a weight nevertheless."""
    folder, _, printed = unbroken
    lines = [line for line in printed.splitlines() if "samples from now on" in line]
    history = load(folder / "stage3.resume")["progress"]["memory"]["history"]
    assert [step for step, _ in history] == [0, 3] and len(lines) == 2
    for line, (_, weights) in zip(lines, history):
        assert list(weights) == ["domain/a", "domain/b", "domain/general"] and weights["domain/a"] == 0.1
        right = {"domain/a": 1.0} | {name: 1 - weights[name] for name in ("domain/b", "domain/general")}
        assert max(right["domain/b"], right["domain/general"]) < 0.7
        assert line == "accuracy -> share of the domain's samples from now on: " + "; ".join(
            f"{name} {right[name]:.0%} -> {weight / sum(weights.values()):.0%}" for name, weight in weights.items())
    assert "history" not in load(folder / "stage2.resume")["progress"]["memory"]


def test_any_stage_with_domain_samples_may_sample_by_evaluation(second, tmp_path):
    """With a growing share and balance, or with the domain alone."""
    given = but(second, "2.sampling=evaluation", "3.share=1:1", end_stage=3, max_steps=3, eval_interval=2, val_fraction=0.3)
    assert succeed(SCRIPT, **given, out_dir=tmp_path).count("samples from now on") == 4
    assert [row["domain_share"] for row in training(tmp_path, "stage3")] == [1, 1, 1]


# ---- the table, and mistakes ---------------------------------------------------------------------


def test_set_changes_values_of_the_table():
    stages = edit_stages(STAGES["base"], ["2.balance=none", "3.share=0.8:0.9", "1.alpha=0", "1.epochs=7", "1.steps=5"])
    assert (stages[0].alpha, stages[0].epochs, stages[0].steps) == (0.0, 7, 5) and stages[2].share == (0.8, 0.9)
    assert stages[1].balance == "none" and STAGES["base"][1].balance == "norm"
    assert edit_stages(STAGES["tiny"], []) == list(STAGES["tiny"])
    assert [stage.steps for stage in edit_stages(STAGES["tiny"], ["1.steps=5"], steps=9)] == [9, 9, 9]
    assert "balance" not in describe_stage(stages[1]) and "share (0.8, 0.9)" in describe_stage(stages[2])


@pytest.mark.parametrize("change, reason", [
    ("4.alpha=1", "--set 4.alpha=1: write STAGE.NAME=VALUE"), ("alpha=1", "write STAGE.NAME=VALUE"),
    ("1.alfa=1", "did you mean 'alpha'"), ("1.alpha", "write STAGE.NAME=VALUE"),
    ("1.alpha=much", "'much' is not a value of alpha"), ("3.share=0.8", "share .* of stage 3 must be two numbers"),
    ("3.share=a:b", "'a:b' is not a value of share"), ("3.share=0.8:1.2", "share .* of stage 3 must be two numbers in"),
    ("1.alpha=1.5", r"alpha 1.5 of stage 1 must lie in \[0, 1\]"), ("1.alpha=nan", "alpha nan of stage 1 must lie in"),
    ("1.temperature=0", "temperature 0.0 of stage 1 must be above 0"), ("2.batch_size=0", "batch_size 0 of stage 2 must be 1"),
    ("2.batch_size=2.5", "'2.5' is not a value of batch_size"), ("2.epochs=0", "epochs 0 of stage 2 must be 1 or more"),
    ("2.growth=cubic", "growth cubic of stage 2 must be one of linear, cosine, steps"),
    ("2.balance=fair", "balance fair of stage 2 must be one of none, norm, gradnorm, pcgrad"),
    ("3.sampling=mad", "sampling mad of stage 3 must be one of uniform, evaluation"),
    ("1.balance=norm", "balance norm of stage 1 must be none in a stage with only one side"),
    ("1.learning_rate=-1", "learning_rate -1.0 of stage 1 must"), ("1.learning_rate=nan", "learning_rate nan of stage 1 must"),
    ("2.feature_weight=-0.1", "feature_weight -0.1 of stage 2 must"), ("2.steps=-1", "steps -1 of stage 2 must be 0 or more"),
    ("1.sampling=evaluation", "sampling evaluation of stage 1 must be uniform in a stage without"),
])
def test_an_impossible_change_of_the_table_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        edit_stages(STAGES["tiny"], [change])


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def refusal(monkeypatch, capsys, warm_cache, tmp_path):
    """refusal(**flags) -> the message with which the script exits, run in this process."""
    def refused(**flags):
        argv = [SCRIPT, "--out_dir", str(tmp_path), "--device", "cpu"]
        for name, value in flags.items():
            if value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                argv += [f"--{name}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(lm_dataset, "CACHE", warm_cache)
        monkeypatch.setattr(train_curriculum, "LOG_FILES", [])
        monkeypatch.setattr(train_curriculum, "StopSignal", None)       # not reached
        with pytest.raises(SystemExit) as ended:
            train_curriculum.main()
        assert ended.value.code not in (0, 130)
        assert not list(tmp_path.glob("stage*"))
        return f"{ended.value.code}{capsys.readouterr().err}"
    return refused


@pytest.mark.parametrize("wrong, reason", [
    ({"set": ["2.balanc=none"]}, "--set 2.balanc=none: a stage has no 'balanc'; did you mean 'balance'"),
    ({"set": ["3.batch_size=1000"]}, "fewer than the 1000 of one step"),
    ({"start_stage": 2}, "--start_stage 2 must have weights: --checkpoint_path .*stage1_final.pth"),
    ({"start_stage": 3, "end_stage": 2, "checkpoint_path": "x.pth"}, "--end_stage 2 must be --start_stage or later"),
    ({"start_stage": 2, "checkpoint_path": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"teacher": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"domain_dataset": "/nowhere/clinic"}, "/nowhere/clinic"),
    ({"domain_dataset": ROOT / "tests/../configs"}, "no file in .*configs is .jsonl, .json, .csv or .txt"),
    ({"val_path": "/nowhere/val.jsonl"}, "/nowhere/val.jsonl"),
    ({"val_path": "none"}, "sampling by evaluation needs held-out questions of the domain.* --set 3.sampling=uniform"),
    ({"set": [*SMALL, "2.sampling=evaluation"], "val_fraction": 0}, "--set 2.sampling=uniform"),
    ({"val_fraction": 1.5}, r"--val_fraction 1.5 must lie in \[0, 1\)"),
    ({"warmup_ratio": 1}, r"--warmup_ratio 1.0 must lie in \[0, 1\)"),
    ({"max_seq_len": 256}, "--max_seq_len 256 exceeds the model's context length of 128"),
    ({"set": [*SMALL, "3.attention_weight=1"], "relation_heads": 5}, "relation_heads"),
    ({"set": [*SMALL, "3.feature_weight=1"], "layer_map": "1:9"}, "'1:9' is no pair student:teacher"),
    ({"student": None, "use_lora": True}, "--lora_rank adapts pretrained weights"),
    ({"fp16": True}, "--dtype float16 needs a GPU"),
    ({"ddp": True}, "torchrun --nproc_per_node 2 "),
], ids=lambda value: "" if isinstance(value, str) else next(iter(value)))
def test_what_is_wrong_with_any_stage_is_reported_before_the_first_begins(wrong, reason, flags, refusal):
    given = {name: value for name, value in flags.items() if name != "dtype" or "fp16" not in wrong}
    message = refusal(**given | wrong)
    assert re.search(reason, message), message


def test_samples_beyond_the_teachers_context_length_are_refused(flags, refusal, tmp_path):
    model, tokenizer = new_model(LMConfig(dim=32, n_layers=1, n_heads=2, max_seq_len=256), ROOT / "model/tokenizer.json")
    save_model(model, tokenizer, tmp_path / "long.pth")
    message = refusal(**flags | {"student": tmp_path / "long.pth"})
    assert "exceed the teacher's context length of 128: --max_seq_len 128" in message
