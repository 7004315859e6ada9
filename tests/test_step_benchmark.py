"""
一步蒸馏的对比：所有写法的损失和梯度处处相同；被比的确实是 train_distillation.py 的那一步。
The benchmark of a whole step: all forms have the same loss and gradients, padding changes nothing,
and ours is the step of train_distillation.py.
"""

import dataclasses
import json
from argparse import Namespace

import pytest
import torch
import train_distillation
from benchmarks import measure, plain, step
from benchmarks.step import BF16, FORMS, SHAPES, TOLERANCES, Case, chats, model_of, our_form
from distill.teachers import Teacher
from model.sizes import SIZES
from runtime.checkpoint import Progress
from runtime.processes import World

LIMIT = "plain, padded to the limit"


@pytest.fixture(scope="module")
def case() -> Case:
    """Three samples and a vocabulary of 50."""
    return Case(SHAPES["test"], vocab_size=50, steps=1, device="cpu", threads=1)


def gradients(form) -> dict[str, torch.Tensor]:
    """Those of the first step, and its loss."""
    loss = form.loss(0)
    loss.backward()
    return {"loss": loss.detach()} | {name: weight.grad for name, weight
                                      in form.student.named_parameters()}


def distance(ours, theirs) -> float:
    return max(((ours[name] - theirs[name]).norm() / theirs[name].norm()).item() for name in theirs)


@pytest.fixture(scope="module")
def truth(case):
    return gradients(FORMS[LIMIT](case))


@pytest.mark.parametrize("form", [form for form in FORMS if form != LIMIT])
def test_every_form_has_the_loss_and_all_gradients_of_the_plain_one(case, truth, form):
    found = gradients(FORMS[form](case))
    assert found.keys() == truth.keys() and all(value.norm() > 0 for value in found.values())
    exact = 1e-5 if TOLERANCES[form] == measure.TOLERANCE else TOLERANCES[form]
    assert distance(found, truth) < exact


def test_models_with_the_parts_of_qwen3_have_the_same_loss(case):
    student, teacher = (dataclasses.replace(each, dim=dim, n_layers=2, n_heads=4, n_kv_heads=2,
                                            head_dim=10, rotary_dim=10, hidden_dim=48)
                        for each, dim in ((SIZES["0.6B"], 32), (SIZES["8B"], 48)))
    assert student.qk_norm and student.rope_theta == 1e6 and student.tie_embeddings and not teacher.tie_embeddings
    case = case._replace(shape=SHAPES["test"]._replace(student=student, teacher=teacher))
    assert distance(gradients(our_form(case)), gradients(FORMS[LIMIT](case))) < 1e-5


def test_another_teacher_would_be_noticed(case, truth, monkeypatch):
    # The least that is noticed in bf16: a teacher with logits smaller by a tenth.
    monkeypatch.setattr(step, "LOGIT_STD", 0.9 * step.LOGIT_STD)
    assert distance(gradients(our_form(case)), truth) > max(TOLERANCES.values())


def test_the_plain_logits_are_those_of_the_model(tiny):
    # the second has 3, and padding
    model, tokens = tiny(), torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    logits = model.output(plain.states_of(model, tokens))                               # (2, 5, V)
    assert torch.allclose(logits[0], model(tokens[0], [5]).logits, atol=1e-5)
    assert torch.allclose(logits[1, :3], model(tokens[1, :3], [3]).logits, atol=1e-5)


def test_the_plain_form_refuses_other_models(tiny):
    for sizes in ({"use_moe": True}, {"architecture": "gpt2", "n_kv_heads": None}):
        with pytest.raises(AssertionError, match="a dense Llama"):
            plain.states_of(tiny(**sizes), torch.tensor([[1]]))


def test_a_sample_is_padded_to_the_limit_or_to_the_longest(case):
    samples = chats(case, 0)
    longest = max(len(ids) for ids, _ in samples) - 1
    for limit, length in ((None, longest), (400, 400)):
        padded = plain.pad(samples, limit, "cpu")
        assert padded.tokens.shape == padded.targets.shape == padded.mask.shape == (3, length)
        for (ids, is_target), tokens, targets, mask in zip(samples, *padded):
            n = len(ids) - 1
            assert tokens[:n].tolist() == ids[:-1].tolist() and targets[:n].tolist() == ids[1:].tolist()
            assert mask[:n].tolist() == is_target[1:].tolist() and not mask[n:].any()


def test_the_chats_have_the_documented_lengths(case):
    samples = [sample for number in range(400) for sample in chats(case, number)]
    lengths = [len(ids) - 1 for ids, _ in samples]
    assert sum(lengths) / len(lengths) == pytest.approx(step.MEAN, rel=0.05)
    assert step.SHORTEST <= min(lengths) and max(lengths) == step.LONGEST
    assert sum(is_target.sum() for _, is_target
               in samples) / sum(lengths) == pytest.approx(step.ANSWERS, abs=0.01)
    # nothing precedes the first token
    assert not any(is_target[0] for _, is_target in samples)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_trains_the_student_and_never_the_teacher(case, form, monkeypatch):
    made = {}

    def kept(case, role, make=model_of):
        made[role] = make(case, role)
        return made[role]

    monkeypatch.setattr(step, "model_of", kept)
    ready = FORMS[form](case)
    before = {role: [weight.clone() for weight in model.parameters()] for role, model
              in made.items()}
    step.settle(ready.optimizer)
    # a rate of 0
    assert all(map(torch.equal, before["student"], made["student"].parameters()))
    ready.optimizer.zero_grad()
    step.run(ready, 0)
    assert not any(map(torch.equal, before["student"], made["student"].parameters()))
    for was, weight in zip(before["teacher"], made["teacher"].parameters(), strict=True):
        assert torch.equal(was, weight) and weight.grad is None and not weight.requires_grad


def test_ours_is_bit_by_bit_the_step_of_train_distillation(case):
    form = our_form(case)
    args = Namespace(learning_rate=0.0, warmup_iters=0, grad_clip=0.0, accumulation_steps=1, seed=0,
                     final_temperature=None,
                     divergence="forward_kl", beta=0.5, skew=0.1, jsd_normalised=False, plain_loss=False,
                     feature_weight=0.0, log_interval=0, save_interval=0, eval_interval=0)
    losses, grads = [], {}
    optimizer = torch.optim.SGD(form.student.parameters(), lr=0.0)
    # as they are before the next step
    optimizer.zero_grad = lambda set_to_none: grads.update(
        {name: weight.grad for name, weight in form.student.named_parameters()})
    progress = Progress({}, total_steps=10 ** 9)                    # nothing is due
    progress.steps_of = lambda epoch, steps_per_epoch: [0]
    train_distillation.train_epoch(
        0, None, step.ALPHA, step.TEMPERATURE,
        teachers=[Teacher(model_of(case, "teacher"))], args=args,
        world=World(0, 1, torch.device("cpu")), name=None, student=form.student, tokenizer=None,
        modules={"model": form.student, "intermediate": lambda batch, out,
                 teacher: (0.0, {})}, optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False), data=Namespace(steps_per_epoch=1), val_data=None,
        loader=iter(form.batches), progress=progress,
        log=Namespace(add=lambda n, loss, **_: losses.append(loss.detach()), step=lambda: None,
                      is_finite=lambda *_: True),
        stop=Namespace(agreed=lambda *_: False))
    measured = gradients(our_form(case))
    assert torch.equal(measured.pop("loss"), losses[0]) and measured.keys() == grads.keys()
    assert all(torch.equal(measured[name], grads[name]) for name in grads)


def test_every_form_is_in_the_table_and_the_json(case, tmp_path, capsys, monkeypatch):
    # In this process: only the figures need a new one.
    monkeypatch.setattr(measure, "in_new_processes", lambda calls: [call[0](*call[1:]) for call in calls])
    # no bf16 here
    monkeypatch.setattr(step, "pick_dtype", lambda name, device: torch.float32)
    step.main(["--shapes", "test", "--vocab", "50", "--steps", "1",
               "--json", str(tmp_path / "step.json")])

    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    printed = " ".join(capsys.readouterr().out.split())
    assert [row["form"] for row in rows] == [form for form in FORMS if form != BF16]
    assert f"the form '{BF16}' is left out" in printed
    assert rows[0]["speed"] == rows[0]["peak_ratio"] == 1.0 and rows[0]["deviation"] == 0.0
    positions = [row["positions"] for row in rows]
    assert positions[0] > positions[1] > positions[2] == positions[3] == 1.0
    for row in rows:
        assert row["peak_mb"] > 0 and row["tokens_per_second"] > 0
        assert row["deviation"] < TOLERANCES[row["form"]]
        assert f"| {row['form']} | {row['positions']:.2f} | {row['seconds']:.2f} |" in printed
        assert f" | {row['speed']:.2f} x |" in printed
