"""
三阶段课程的规律：切分与中断不改变结果，份额按计划增长，梯度得到平衡，弱的类别多练，留出的问题从不训练。
Laws of train_curriculum.py: splits and interruptions change nothing, shares grow as planned,
gradients are balanced, weak categories are sampled more often, held-out questions never train.
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
from dataset.formats import read_each, to_messages
from dataset.lm_dataset import prompts_and_answers
from distill.stages import Stage, describe_stage, edit_stages
from evaluation.domains import forgetting, weighted_loss
from evaluation.exam import read_exam
from helpers_run import ROOT, complaint, first_gradients, load, rows, run, same, succeed
from interop.checkpoint import load_model, load_tokenizer, new_model, save_model
from model.config import LMConfig
from runtime.checkpoint import Progress
from train_curriculum import DOMAIN, GENERAL, STAGES, validate

SCRIPT = "train_curriculum.py"
NAMES = ["stage1", "stage2", "stage3"]
SMALL = [f"{n}.{change}" for n in (1, 2, 3) for change in ("batch_size=8", "learning_rate=1e-3")]


@pytest.fixture(scope="module")
def choices(data, tmp_path_factory):
    """A domain of 90 multiple-choice questions on three subjects. Every option of subject a is
    right, so its accuracy is 1. The third subject has the name of the other side."""
    file = tmp_path_factory.mktemp("domain") / "choices.jsonl"
    lines = (data / "mcq_test.jsonl").read_text().splitlines()[:90]
    for i, row in enumerate(map(json.loads, lines)):
        row["subject"] = ("a", "b", GENERAL)[i % 3]
        if row["subject"] == "a":
            row["options"] = dict.fromkeys("ABCD", row["options"][row["answer_idx"]])
        lines[i] = json.dumps(row) + "\n"
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="module")
def flags(data, models, choices):
    return {"teacher": models / "teacher.pth", "student": models / "student.pth",
            "general_dataset": data / "general.jsonl", "domain_dataset": choices,
            "val_fraction": 0.3, "eval_interval": 3, "eval_samples": 8, "max_new_tokens": 3,
            "n_samples": 1, "max_steps": 6, "log_interval": 1, "num_workers": 0,
            "dtype": "float32", "set": SMALL}


@pytest.fixture(scope="module")
def second(flags, models):
    """The second stage alone, without validation."""
    return flags | {"start_stage": 2, "end_stage": 2, "student": None, "val_fraction": 0,
                    "checkpoint_path": models / "student.pth"}


def but(flags, *changes, **more):
    """The flags with more changes of the table, and other flags."""
    return flags | {"set": [*flags["set"], *changes]} | more


def train(out_dir, flags, *changes, script=SCRIPT, **more) -> str:
    """Run the script to its end. Returns what it printed."""
    return succeed(script, **but(flags, *changes, **more), out_dir=out_dir)


def training(folder, name="stage2") -> list[dict]:
    """The rows of a stage's metrics that are not of a validation."""
    return [row for row in rows(folder / f"{name}.jsonl") if "loss" in row]


def patched(folder, patch: str):
    """The script, after a patch."""
    file = folder / "patched.py"
    end = f"runpy.run_path({SCRIPT!r}, run_name='__main__')"
    file.write_text(f"import runpy\n\n{patch}\n\n{end}\n")
    return file


# ---- whole curricula -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """The folder of a whole run, its flags, and what it printed. Its loader thread must get new
    shares too."""
    folder = tmp_path_factory.mktemp("unbroken")
    given = but(flags, "2.balance=norm", "2.feature_weight=0.1", "2.contrastive_weight=0.1",
                save_interval=4, num_workers=1, warmup_ratio=0.5)
    return folder, given, train(folder, given)


def test_three_stages_leave_weights_a_log_and_answers(unbroken):
    folder, _, printed = unbroken
    names = {path.name for path in folder.iterdir()}
    for stage, row in zip(NAMES, STAGES["tiny"]):
        assert {f"{stage}_{end}.pth" for end in ("best", "final", "epoch-1")} <= names
        assert same(load(folder / f"{stage}_final.pth"), load(folder / f"{stage}_epoch-1.pth"))
        assert f"stage {stage[-1]}: share {row.share}" in printed
    assert (folder / "distillation.log").read_text() == printed
    samples = (folder / "samples.md").read_text()
    assert len({samples.count(f"**{who}**") for who in ("the file", "teacher", "student")}) == 1
    assert all(f"## {stage}, step" in samples for stage in NAMES)
    assert not [name for name in names if name.endswith(".tmp")]
    rates = [row["lr"] for row in training(folder)]         # warm-up: half of the 6 steps
    assert rates[:4] == pytest.approx([1.1e-3 / 3, 2.2e-3 / 3, 1.1e-3, 1.1e-3])


def test_a_stage_starts_from_the_student_of_the_one_before_and_nothing_else(unbroken, tmp_path):
    """Stage 3 alone, from the weights of stage 2, is stage 3 of the whole curriculum."""
    folder, given, _ = unbroken
    start = {"student": None, "start_stage": 3, "checkpoint_path": folder / "stage2_final.pth"}
    train(tmp_path, given | start)
    assert same(load(folder / "stage3_final.pth"), load(tmp_path / "stage3_final.pth"))
    assert rows(folder / "stage3.jsonl") == rows(tmp_path / "stage3.jsonl")
    assert not list(tmp_path.glob("stage[12]*"))


def test_the_best_weights_have_the_lowest_loss_at_the_last_shares_of_the_stage(second, tmp_path):
    """In stage 2: 0.7 of the domain's loss and 0.3 of the general one. A learning rate that raises
    the loss keeps the first weights."""
    train(tmp_path, second, "2.learning_rate=0.1", warmup_iters=3, val_fraction=0.3)
    losses = [0.7 * row["val_domain_loss"] + 0.3 * row["val_general_loss"]
              for row in rows(tmp_path / "stage2.jsonl") if "val_domain_loss" in row]
    assert len(losses) == 3 and losses[1] < losses[2]
    assert load(tmp_path / "stage2.resume")["progress"]["best"] == pytest.approx(losses[1])
    assert not same(load(tmp_path / "stage2_best.pth"), load(tmp_path / "stage2_final.pth"))
    assert training(tmp_path)[0]["lr"] == pytest.approx(0.11 / 3)


def test_forgetting_is_what_the_general_side_lost_since_the_start():
    start = {"general_loss": 3.0, "domain_loss": 5.0, "general_accuracy": 0.5}
    now = {"general_loss": 4.0, "domain_loss": 5.0, "general_accuracy": 0.25}
    assert forgetting(now, start) == {"forgetting_loss": 1.0, "forgetting_accuracy": 0.25}
    assert forgetting({"domain_loss": 5.0}, start) == {}
    assert weighted_loss(now, 0.7) == pytest.approx(0.3 * 4 + 0.7 * 5)
    assert weighted_loss({"domain_loss": 5.0}, 0.7) == 5.0
    assert np.isnan(weighted_loss({"general_loss": 5.0}, 1.0))


def test_a_run_started_anew_keeps_nothing_of_an_earlier_one_in_its_log(flags, tmp_path):
    """With a new student, and under the other names of the flags."""
    other = {"teacher": "teacher_model", "domain_dataset": "medical_dataset"}
    given = {other.get(name, name): value for name, value in flags.items()}
    given |= {"student": None, "student_model": "none", "max_steps": 1, "end_stage": 1}
    for _ in range(2):
        printed = succeed(SCRIPT, **given, output_dir=tmp_path)
    assert (tmp_path / "distillation.log").read_text() == printed
    assert (tmp_path / "samples.md").read_text().count("## stage1, step 1\n") == 1
    student, _ = load_model(tmp_path / "stage1_final.pth")
    assert (student.config.dim, student.config.n_layers) == (64, 2)


def test_a_loss_of_0_is_logged_and_one_of_nan_ends_the_stage(flags, models, tmp_path):
    """The student is its own teacher: its first loss is 0. A learning rate of 1e30 makes the later
    ones NaN."""
    said = complaint(SCRIPT, **but(flags, "1.learning_rate=1e30", student=models / "teacher.pth",
                                   end_stage=1, val_fraction=0, out_dir=tmp_path))
    found = rows(tmp_path / "stage1.jsonl")
    assert found[0]["kd"] == pytest.approx(0, abs=1e-6) and all("loss" not in row for row in found[1:])
    assert "of step 4 is not finite" in said and not (tmp_path / "stage1_final.pth").exists()


def test_the_loss_is_the_sum_of_its_terms(unbroken, flags, models, tmp_path):
    """With every balance, with experts and without."""
    weights = {"feature": 0.1, "attention": 0.1, "contrastive": 0.05}
    changes = [f"{n}.{change}" for n in (1, 2, 3) for change in (
        *(f"{name}_weight={weight}" for name, weight in weights.items()), "alpha=0.3",
        "temperature=2")]
    train(tmp_path, flags, *changes, "3.balance=norm", "2.balance=pcgrad", max_steps=2,
          accumulation_steps=2, student=models / "student_moe.pth",
          teacher=models / "teacher_moe.pth")
    weights |= {"ce": 0.3, "kd": 0.7, "moe": 0.01}
    for row in (row for name in NAMES for row in training(tmp_path, name)):
        assert all(row[name] > 0 for name in weights)
        total = sum(weight * row[name] for name, weight in weights.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    for row in training(unbroken[0]):
        total = row["kd"] + 0.1 * row["feature"] + 0.1 * row["contrastive"]
        assert "moe" not in row and row["loss"] == pytest.approx(total, rel=1e-5)


def test_adapters_train_through_all_stages_each_with_its_number_of_steps(flags, models, tmp_path):
    """In the first stage two epochs: a row of the table has either."""
    printed = train(tmp_path, flags, "1.batch_size=32", "1.epochs=2", "2.steps=3", "3.steps=4",
                    "3.sampling=uniform", max_steps=None, val_fraction=0, use_lora=True)
    assert "adapters beside 14 matrices" in printed
    assert [len(training(tmp_path, name)) for name in NAMES] == [6, 3, 4]
    epochs = [(tmp_path / f"stage1_epoch-{epoch}.pth").exists() for epoch in (1, 2, 3)]
    assert epochs == [True, True, False]
    base, _ = load_model(models / "student.pth")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    finals = [load(tmp_path / f"{name}_final.pth") for name in NAMES]
    for name, weights in zip(NAMES, finals):
        assert all("lora" in key for key in weights)
        assert sum(map(torch.numel, weights.values())) < base.n_parameters()
        model, _ = load_model(tmp_path / f"{name}_final.pth")
        assert not same(before, dict(model.state_dict()))
    assert not same(finals[0], finals[1])
    assert same(before, load(models / "student.pth"))
    # Stage 3 alone, from the adapters of stage 2, is the stage 3 of the whole run; .pth may be left
    # out.
    train(tmp_path / "alone", flags, "3.steps=4", "3.sampling=uniform", max_steps=None, student=None,
          val_fraction=0, use_lora=True, start_stage=3, checkpoint_path=tmp_path / "stage2_final")
    assert same(finals[2], load(tmp_path / "alone/stage3_final.pth"))


# ---- split, interrupted --------------------------------------------------------------------------


def test_a_step_split_over_processes_or_micro_batches_is_the_same_step(flags, tmp_path):
    """The third stage's steps have one general and one domain sample: each process has none of one
    side."""
    given = but(flags, "3.balance=norm", "3.share=0.5:0.5", eval_samples=9, max_steps=4,
                eval_interval=2)
    whole = tmp_path / "whole"
    train(whole, given, "3.batch_size=2")
    for split in ({"processes": 2}, {"accumulation_steps": 2}):
        parts = tmp_path / next(iter(split))
        train(parts, given, "1.batch_size=4", "2.batch_size=4", "3.batch_size=1", **split)
        for name in NAMES:
            one, two = (load(folder / f"{name}_final.pth") for folder in (whole, parts))
            assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)
            one, two = (rows(folder / f"{name}.jsonl") for folder in (whole, parts))
            for row, expected in zip(two, one, strict=True):
                assert row == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert "samples from now on" in (parts / "distillation.log").read_text()


def interrupted(folder, name, step, number):
    """The script, which receives a signal in the given step, before anything of it is logged or
    saved; with two processes, the second one receives it."""
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
    """Stage 3 samples with new shares since its first evaluation, which its resume file of step 4
    contains. A stop in the last step of a stage does not start the next one. The first run has no
    --resume: it removes an earlier run's files."""
    folder, given, _ = unbroken
    out = tmp_path / "out"
    out.mkdir()
    for file in ("stage2.resume", "stage3.resume.previous"):
        (out / file).touch()
    for resume, name, step, number in [
            (None, "stage1", 6, signal.SIGINT), (True, "stage2", 1, signal.SIGKILL),
            (True, "stage2", 5, signal.SIGINT), (True, "stage3", 5, signal.SIGKILL)]:
        script = interrupted(tmp_path, name, step, number)
        ended = run(script, **given, out_dir=out, resume=resume)
        assert ended.code == (130 if number == signal.SIGINT else -9), ended.output
        assert "Traceback" not in ended.output
        assert ("Resume with: " in ended.output) == (number == signal.SIGINT)
        assert max(path.name[:6] for path in out.glob("stage*")) == name
    assert not (out / "stage3_final.pth").exists()
    train(out, given, resume=True)
    for name in NAMES:
        assert rows(folder / f"{name}.jsonl") == rows(out / f"{name}.jsonl")
        for end in ("best", "final"):
            assert same(load(folder / f"{name}_{end}.pth"), load(out / f"{name}_{end}.pth"))


def test_a_finished_curriculum_that_is_resumed_trains_nothing(unbroken):
    folder, given, _ = unbroken
    kept = ["stage?_*.pth", "stage?.jsonl", "samples.md"]
    before = {path: path.read_bytes() for pattern in kept for path in folder.glob(pattern)}
    printed = train(folder, given, resume=True)
    assert "step 6/6" not in printed and printed.count("after step 6") == 3
    for path, content in before.items():
        assert path.read_bytes() == content or same(load(path), load(io.BytesIO(content))), path


def test_two_processes_agree_on_a_stop_at_the_end_of_a_stage(flags, tmp_path):
    """Within a stage they compare notes every eighth step; this stage has six."""
    script = interrupted(tmp_path, "stage1", 5, signal.SIGINT)
    ended = run(script, **flags, processes=2, out_dir=tmp_path)
    assert ended.code == 130 and not list(tmp_path.glob("stage2*"))
    assert (tmp_path / "stage1_final.pth").exists()


# ---- shares and balance --------------------------------------------------------------------------


def test_the_share_of_the_domain_grows_as_planned(second, data, choices, words, cache, tmp_path):
    """A step of 8 samples differs from its share by less than one sample, so 21 steps have their
    mean, a half. A row of the log has the share since the row before."""
    train(tmp_path, second, max_steps=21, log_interval=7)
    joined, sides, _ = opened(data, choices, words, val_fraction=0)
    stage = edit_stages(STAGES["tiny"], ["2.batch_size=8"], steps=21)[1]
    mixture = mix_sides(joined, sides, stage, 1, 0, 1, seed=1337)
    counts = [mixture.counts(step, step + 1) for step in range(21)]
    shares = [count["domain/all"] / 8 for count in counts]
    for step, share in enumerate(shares):
        assert sum(counts[step].values()) == 8 and abs(share - (0.3 + 0.4 * step / 20)) < 1 / 8
    assert sum(shares) / 21 == pytest.approx(0.5, abs=0.03)
    assert [row["domain_share"] for row in training(tmp_path)] == pytest.approx(
        [sum(shares[first:first + 7]) / 7 for first in (0, 7, 14)])


def test_the_sides_gradients_weighted_by_shares_are_that_of_the_whole_step(second, tmp_path):
    """A side's loss is divided by its tokens and weighted by its share of tokens: each token counts
    as before."""
    given = but(second, "2.alpha=0.5", "2.feature_weight=1", "2.attention_weight=10", grad_clip=0,
                max_steps=1)
    train(tmp_path / "whole", given, "2.balance=none")
    plain = patched(tmp_path, "from distill import balance\n\n"
                    "balance.equal_norms = lambda g, shares, _: balance.Balanced("
                    "sum(shares[d] * g[d] for d in g), balance.norms_of(g), balance.norms_of(g))")
    train(tmp_path / "apart", given, "2.balance=norm", script=plain)
    whole, apart = (first_gradients(tmp_path / name / "stage2.resume") for name in ("whole", "apart"))
    assert len(whole) == len(apart) > 10
    for a, b in zip(whole, apart):
        assert (a - b).abs().max() <= 4e-6 * a.abs().max()
    (row,), (of_whole,) = training(tmp_path / "apart"), training(tmp_path / "whole")
    assert {name: row[name] for name in of_whole} == pytest.approx(of_whole, rel=1e-5)
    assert row["grad_general"] == pytest.approx(row["grad_general_balanced"])


def test_balance_keeps_the_length_of_the_gradient_and_a_loss_scale_changes_nothing(
        second, tmp_path):
    """By norm, the contributions have the same total length as before. In fp16 the loss is scaled;
    here by 1024, which is exact."""
    scaled = patched(tmp_path, "import torch\n\nscaler = torch.amp.GradScaler\n"
                     "torch.amp.GradScaler = lambda device, enabled: scaler(device, 1024.0)")
    train(tmp_path / "plain", second, max_steps=4)
    train(tmp_path / "scaled", second, script=scaled, max_steps=4)
    found = training(tmp_path / "plain")
    assert found == training(tmp_path / "scaled") and len(found) == 4
    for row in found:
        after = row["grad_general_balanced"] + row["grad_domain_balanced"]
        assert after == pytest.approx(row["grad_general"] + row["grad_domain"], rel=1e-4)
        assert row["grad_general_balanced"] != pytest.approx(row["grad_general"], rel=1e-3)
        assert row["grad_domain_balanced"] / after == pytest.approx(row["domain_share"], rel=1e-4)


def test_a_step_without_the_domain_is_a_step_on_the_general_data(second, tmp_path):
    """With 8 samples and a share of 1 in 10,000 no step has a sample of the domain."""
    losses = {}
    for balance in ("none", "norm"):
        train(tmp_path / balance, second, "2.share=0.0001:0.0001", f"2.balance={balance}",
              max_steps=3)
        losses[balance] = [row["loss"] for row in training(tmp_path / balance)]
    assert losses["norm"] == pytest.approx(losses["none"], rel=1e-5)
    assert [row["grad_domain"] for row in training(tmp_path / "norm")] == [0, 0, 0]


# ---- data ----------------------------------------------------------------------------------------


def opened(data, domain, tokenizer, general_val=None, domain_val=None, val_fraction=0.3,
           eval_samples=0):
    paths = {GENERAL: (data / "general.jsonl", general_val), DOMAIN: (domain, domain_val)}
    return open_sides(paths, tokenizer, 128, val_fraction, eval_samples, read_exam)


@pytest.fixture(scope="module")
def words():
    return load_tokenizer(ROOT / "model/tokenizer.json")


def prompts(data, samples) -> list[tuple[int, ...]]:
    """The prompt of the last answer of each sample."""
    return [tuple(turns[-1][0]) for turns in prompts_and_answers(data.batch(np.asarray(samples)))]


def all_samples(sides, side) -> np.ndarray:
    return np.concatenate(list(sides[side].values()))


def test_a_held_out_question_never_trains_however_often_it_occurs(data, words, cache, tmp_path):
    """The domain's rows three times, and the general rows among them."""
    domain, general = tmp_path / "domain.jsonl", data / "general.jsonl"
    domain.write_text((data / "specialist.jsonl").read_text() * 3 + general.read_text())
    joined, sides, held_out = opened(data, domain, words)
    trained = {side: prompts(joined, all_samples(sides, side)) for side in sides}
    val = {side: prompts(held, range(len(held))) for side, (held, _) in held_out.items()}
    never = {*val[GENERAL], *val[DOMAIN]}
    assert not {*trained[GENERAL], *trained[DOMAIN]} & never and len(never) > 30
    assert len(trained[DOMAIN]) + len(val[DOMAIN]) == 400
    assert len(trained[GENERAL]) + len(val[GENERAL]) == 100
    for side, (held, exam) in held_out.items():
        written = words.encode_chats((q.messages for q in exam), add_generation_prompt=True)
        assert len(exam) == len(held)
        assert Counter(tuple(ids) for ids, _ in written) == Counter(val[side])


def test_about_the_requested_fraction_is_held_out():
    questions = [[{"role": "user", "content": f"{n} + 1 ="}] for n in range(2000)]
    held = [is_held_out(question, 0.1) for question in questions]
    assert sum(held) == pytest.approx(200, abs=40)      # 3 sqrt(180)
    assert not any(is_held_out(question, 0.0) for question in questions)
    for question in questions[:100]:                    # held out at 10 %, held out at 30 %
        assert is_held_out(question, 0.3) >= is_held_out(question, 0.1)


def test_a_validation_file_replaces_the_held_out_fraction_of_its_side(data, words, cache, capsys):
    domain = data / "specialist.jsonl"
    _, sides, held_out = opened(data, domain, words, domain_val=data / "val.jsonl")
    assert len(all_samples(sides, DOMAIN)) == 100 and len(all_samples(sides, GENERAL)) < 100
    assert len(held_out[DOMAIN][0]) == len(held_out[DOMAIN][1]) == 34
    _, _, held_out = opened(data, domain, words, eval_samples=5)
    assert [(len(held), len(exam)) for held, exam in held_out.values()] == [(5, 5), (5, 5)]
    capsys.readouterr()
    _, sides, held_out = opened(data, domain, words, "none", "none")
    assert not held_out and len(all_samples(sides, DOMAIN)) == 100
    assert capsys.readouterr().out.count("held out: none") == 2


@pytest.mark.parametrize("missing, side", [("val_path", GENERAL), ("general_val_path", DOMAIN)])
def test_a_curriculum_can_validate_on_one_side_alone(missing, side, second, tmp_path):
    train(tmp_path, second | {missing: "none"}, max_steps=1, val_fraction=0.3)
    last = rows(tmp_path / "stage2.jsonl")[-1]
    assert {name.split("_")[1] for name in last if name.endswith("_kl")} == {side}


def test_a_domain_may_be_a_folder_of_several_kinds_of_files(data, words, cache, second, tmp_path):
    """A spreadsheet of questions and answers, an exam, and texts. The category of
    a row without one is its file's name."""
    folder = tmp_path / "clinic"
    folder.mkdir()
    for name, head, line in (("sheet.csv", "Instruction,Output,Category\n", "take {},{} mg,dose\n"),
                             ("exam.csv", "question,A,B,C,D,answer\n", "{} + 3 =,{},{},5,7,B\n"),
                             ("book.txt", "", "Take {} a day and rest.\n\n")):
        (folder / name).write_text(head + "".join(line.format(n, n, n + 3) for n in range(10)))
    (folder / "notes.md").write_text("not read")
    assert read_each(folder / "exam.csv", to_messages)[1][1]["content"] == "4"
    joined, sides, held_out = opened(data, folder, words, val_fraction=0.2)
    assert set(sides[DOMAIN]) == {"dose", "exam", "book"} and len(sides[DOMAIN]["book"]) == 8
    n_samples = {side: len(all_samples(sides, side)) for side in sides}
    held, exam = held_out[DOMAIN]
    assert len(joined) == sum(n_samples.values()) and len(held) + n_samples[DOMAIN] == 30
    assert {q.category for q in exam} <= {"dose", "exam"} and len(exam) == len(held) - 2
    for name, text in {"dose": "take", "exam": " + 3 =", "book": "a day and rest"}.items():
        assert text in words.decode(joined.batch(sides[DOMAIN][name][:1]).tokens.tolist())
    train(tmp_path / "out", second, domain_dataset=folder, max_steps=1, val_fraction=0.2)


# ---- sampling by evaluation ----------------------------------------------------------------------


def test_consultations_are_graded_by_token_f1_and_sampled_by_department(second, tmp_path):
    departments, file = ["内科", "外科"], tmp_path / "consultations.csv"
    file.write_text("department,title,ask,answer\n" + "".join(
        f"{departments[i % 2]},发热{i},发热{i}天怎么办？,多喝水并注意休息{i}天后复诊\n"
        for i in range(40)), encoding="utf-8-sig")
    printed = train(tmp_path, second, "2.sampling=evaluation", domain_dataset=file, max_steps=2,
                    val_fraction=0.3, n_samples=0)
    row = rows(tmp_path / "stage2.jsonl")[0]
    assert "val_domain_token_f1" in row and "val_domain_accuracy" not in row
    assert "val_general_accuracy" in row and "teacher itself: token_f1 0.0% on" in printed
    assert all(f"domain/{name} 0% -> " in printed for name in departments)


def test_a_category_is_sampled_by_what_it_lacks_and_a_tenth_at_least(
        data, words, choices, cache, capsys, monkeypatch):
    """Of the domain's 0.8: a is perfect (0.1), b half known (0.5), the third has no questions and
    counts as the domain's mean (0.4). A step's count differs by half a sample, that of 500 steps
    by 11."""
    joined, sides, _ = opened(data, choices, words, val_fraction=0)
    stage = Stage((0.8, 0.8), 0.0, 1.0, 0.0, 8, epochs=1, sampling="evaluation", steps=500)
    mixture = mix_sides(joined, sides, stage, 1, 0, 1, seed=0)
    equal = {"general": 800, "domain/a": 1067, "domain/b": 1067, "domain/general": 1067}
    assert mixture.counts(0, 500) == pytest.approx(equal, abs=30)
    metrics = {"general_loss": 1.0, "domain_loss": 2.0}
    found = metrics, {"domain": 0.6, "domain/a": 1.0, "domain/b": 0.5}
    monkeypatch.setattr(train_curriculum, "evaluate_sides", lambda *_: found)
    args = Namespace(share=stage.share, sampling="evaluation", max_new_tokens=1)
    log, progress = SimpleNamespace(row=lambda *_, **__: None), Progress({}, 500, steps_done=100)
    rest = None, args, None, None, [], None, mixture, {}, progress, log
    assert validate(*rest) == pytest.approx(0.2 * 1 + 0.8 * 2)
    by_need = {"general": 640, "domain/a": 256, "domain/b": 1280, "domain/general": 1024}
    assert mixture.counts(100, 500) == pytest.approx(by_need, abs=30)
    history = [(100, {"domain/a": 0.1, "domain/b": 0.5, "domain/general": 0.4})]
    assert progress.memory["history"] == history
    assert ("from now on: domain/a 100% -> 10%; domain/b 50% -> 50%; domain/general 60% -> 40%\n"
            in capsys.readouterr().out)
    progress.steps_done = 500                       # after the last step there is nothing to sample
    validate(*rest)
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
        assert list(weights) == ["domain/a", "domain/b", "domain/general"]
        assert weights["domain/a"] == 0.1 and sorted(weights.values())[1] > 0.3
        total = sum(weights.values())
        assert line.endswith("samples from now on: " + "; ".join(
            f"{name} {1 if name == 'domain/a' else 1 - weight:.0%} -> {weight / total:.0%}"
            for name, weight in weights.items()))
    assert "history" not in load(folder / "stage2.resume")["progress"]["memory"]


def test_any_stage_with_domain_samples_may_sample_by_evaluation(second, tmp_path):
    """With a growing share and balance, or with the domain alone."""
    printed = train(tmp_path, second, "2.sampling=evaluation", "3.share=1:1", end_stage=3,
                    max_steps=3, eval_interval=2, val_fraction=0.3)
    assert printed.count("samples from now on") == 4
    assert [row["domain_share"] for row in training(tmp_path, "stage3")] == [1, 1, 1]


# ---- the table, and mistakes ---------------------------------------------------------------------


def test_set_changes_values_of_the_table():
    one, two, three = edit_stages(STAGES["base"], ["2.balance=none", "3.share=0.8:0.9", "1.alpha=0",
                                                   "1.epochs=7", "1.steps=5"])
    assert (one.alpha, one.epochs, one.steps) == (0.0, 7, 5) and three.share == (0.8, 0.9)
    assert two.balance == "none" and STAGES["base"][1].balance == "norm"
    assert edit_stages(STAGES["tiny"], []) == list(STAGES["tiny"])
    assert {stage.steps for stage in edit_stages(STAGES["tiny"], ["1.steps=5"], steps=9)} == {9}
    assert "balance" not in describe_stage(two) and "share (0.8, 0.9)" in describe_stage(three)


@pytest.mark.parametrize("change, reason", [
    ("4.alpha=1", "--set 4.alpha=1: write STAGE.NAME=VALUE"),
    ("alpha=1", "write STAGE.NAME=VALUE"), ("1.alpha", "write STAGE.NAME=VALUE"),
    ("1.alfa=1", "did you mean 'alpha'"), ("1.alpha=much", "'much' is not a value of alpha"),
    ("3.share=a:b", "'a:b' is not a value of share"), ("2.epochs=2.5", "'2.5' is not a value of e"),
    ("2.balance=fair", "balance fair of stage 2 must be one of none, norm, pcgrad"),
    ("1.balance=norm", "balance norm of stage 1 must be none in a stage with only one side"),
    ("3.sampling=mad", "sampling mad of stage 3 must be one of uniform, evaluation"),
    ("1.sampling=evaluation", "sampling evaluation of stage 1 must be uniform in a stage without"),
    *((change, f"{change[2:change.index('=')]} .* of stage {change[0]} must (be|lie) ")
      for change in ("3.share=0.8", "3.share=0.8:1.2", "1.alpha=1.5", "1.alpha=nan",
                     "1.temperature=0", "2.batch_size=0", "2.epochs=0", "2.steps=-1",
                     "1.learning_rate=-1", "1.learning_rate=nan", "2.feature_weight=-0.1"))])
def test_an_impossible_change_of_the_table_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        edit_stages(STAGES["tiny"], [change])


@pytest.fixture
def refusal(monkeypatch, capsys, choices, tmp_path):
    """refusal(**flags) -> the message with which the script exits, run in this process."""
    def refused(**flags):
        argv = [SCRIPT, "--out_dir", str(tmp_path), "--device", "cpu"]
        for name, value in flags.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [f"--{name}", *map(str, values)] if value is not None else []
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(lm_dataset, "CACHE", choices.parent / "cache")
        monkeypatch.setattr(train_curriculum, "LOG_FILES", [])
        monkeypatch.setattr(train_curriculum, "StopSignal", None)       # not reached
        with pytest.raises(SystemExit) as ended:
            train_curriculum.main()
        assert ended.value.code not in (0, 130) and not list(tmp_path.glob("stage*"))
        return f"{ended.value.code}{capsys.readouterr().err}"
    return refused


@pytest.mark.parametrize("wrong, reason", [
    ({"set": ["2.balanc=none"]}, "a stage has no 'balanc'; did you mean 'balance'"),
    ({"accumulation_steps": 1000}, "fewer than the 1000 micro-batches of one step"),
    ({"start_stage": 2}, "--start_stage 2 must have weights: --checkpoint_path .*stage1_final.pth"),
    ({"start_stage": 3, "end_stage": 2, "checkpoint_path": "x"}, "--end_stage 2 must be --start_"),
    ({"start_stage": 2, "checkpoint_path": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"teacher": "out/nothing.pth"}, "no weights at out/nothing.pth"),
    ({"domain_dataset": "/nowhere/clinic"}, "/nowhere/clinic"),
    ({"domain_dataset": ROOT / "configs"}, "no file in .*configs is one of .jsonl, .json, .csv, .tsv, .txt"),
    ({"val_path": "/nowhere/val.jsonl"}, "/nowhere/val.jsonl"),
    ({"val_path": "none"}, "needs held-out questions of the domain.* --set 3.sampling=uniform"),
    ({"set": [*SMALL, "2.sampling=evaluation"], "val_fraction": 0}, "--set 2.sampling=uniform"),
    ({"val_fraction": 1.5}, r"--val_fraction 1.5 must lie in \[0, 1\)"),
    ({"max_seq_len": 256}, "--max_seq_len 256 exceeds the model's context length of 128"),
    ({"set": [*SMALL, "3.attention_weight=1"], "relation_heads": 5}, "relation_heads"),
    ({"set": [*SMALL, "3.feature_weight=1"], "layer_map": "1:9"}, "'1:9' is no"),
    ({"student": None, "use_lora": True}, "--lora_rank adapts pretrained weights"),
    ({"fp16": True, "dtype": None}, "--dtype float16 needs a GPU"),
    ({"ddp": True}, "torchrun --nproc_per_node 2 "),
    ({"ddp": True, "shard": "zero2"}, "--shard zero2 must be none"),
], ids=lambda value: "" if isinstance(value, str) else next(iter(value)))
def test_a_mistake_in_any_stage_is_reported_before_the_first_begins(wrong, reason, flags, refusal):
    message = refusal(**flags | wrong)
    assert re.search(reason, message), message


def test_samples_beyond_the_teachers_context_length_are_refused(flags, refusal, words, tmp_path):
    save_model(*new_model(LMConfig(dim=32, n_heads=2, max_seq_len=256), words), tmp_path / "m.pth")
    message = refusal(**flags | {"student": tmp_path / "m.pth"})
    assert "exceed the teacher's context length of 128: --max_seq_len 128" in message
