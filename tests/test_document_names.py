"""
文档里的函数名：都能从 train_distillation.py 导入，并按文档的方式调用。
The functions that readers look for in train_distillation.py, with their documented parameters.
"""

import inspect
import math

import pytest
import torch

import train_distillation as lesson
from dataset.lm_dataset import SFTDataset, in_order
from distill.teachers import Teacher
from interop.checkpoint import load_model
from model.config import LMConfig

SIGNATURES = {
    "Logger": "(content)",
    "get_lr": "(current_step, total_steps, lr)",
    "get_temperature": "(current_step, total_steps, initial_temp=5.0, final_temp=1.0)",
    "distillation_loss_fn": "(student_logits, teacher_logits, temperature=1.0, reduction='batchmean')",
    "train_epoch": "(epoch, wandb, alpha=0.0, temperature=1.0)",
    "init_student_model": "(lm_config)",
    "init_teacher_model": "(lm_config)",
    "init_distributed_mode": "()",
    "evaluate": "(model, val_loader, device)",
    "feature_distillation_loss": "(student_features, teacher_features)",
    "progressive_distillation": "(large_model, medium_model, small_model, train_loader, epochs=5)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_documented_function_has_its_parameters_order_and_defaults(name):
    """What more it takes has a default, or is passed by keyword."""
    found = inspect.signature(getattr(lesson, name)).parameters.values()
    documented = SIGNATURES[name].strip("()").split(", ") if SIGNATURES[name] != "()" else []
    positional = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found
                  if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(map(str, positional[:len(documented)])) == documented
    assert all(parameter.default is not inspect.Parameter.empty for parameter in positional[len(documented):])


def test_the_learning_rate_and_the_temperature_follow_the_documented_formulas():
    assert lesson.get_lr(3, 10, 5e-4) == pytest.approx(5e-5 + 2.5e-4 * (1 + math.cos(0.3 * math.pi)))
    assert [lesson.get_temperature(step, 4) for step in (0, 1, 4)] == [5.0, 4.0, 1.0]


def test_models_are_loaded_from_their_sft_weights(models, monkeypatch, tmp_path):
    for name, dim in (("student", 32), ("teacher", 48)):
        for end in ("pth", "json"):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / f"out/full_sft_{dim}.{end}").symlink_to(models / f"{name}.{end}")
    for tokenizer in models.glob("tokenizer-*.json"):
        (tmp_path / "out" / tokenizer.name).symlink_to(tokenizer)
    monkeypatch.chdir(tmp_path)
    model, tokenizer = lesson.init_student_model(LMConfig(dim=32, n_layers=2, n_heads=2))
    assert model.config.dim == 32 and tokenizer.vocab_size == 1024
    teacher = lesson.init_teacher_model(LMConfig(dim=48, n_layers=4, n_heads=2))
    assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())
    assert lesson.init_distributed_mode()[:2] == (0, 1)


def test_evaluate_is_the_mean_cross_entropy_per_token(data, models, cache):
    model, tokenizer = load_model(models / "student.pth")
    val_data = SFTDataset([data / "val.jsonl"], tokenizer, 128, log=str)
    scores = lesson.evaluate(model, in_order(val_data), torch.device("cpu"))
    losses = []
    with torch.no_grad():
        for i in range(len(val_data)):
            batch = val_data.batch(torch.tensor([i]).numpy())
            logits = model(batch.tokens, batch.lengths, at=batch.at).logits
            losses.append(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none"))
    assert scores == {"val_loss": pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)}


def test_validation_in_many_batches_finds_what_one_batch_does(data, models, cache):
    """A model as its own teacher; then another teacher. Of calibration the gaps of a bin add up over
    batches: the mean of the batches' errors is another number."""
    (model, tokenizer), (other, _) = (load_model(models / f"{name}.pth") for name in ("student", "teacher"))
    val_data = SFTDataset([data / "val.jsonl"], tokenizer, 128, log=str)
    for source in (model, other):
        one, many = (lesson.evaluate(model, in_order(val_data, tokens_per_batch=n), torch.device("cpu"),
                                     teachers=[Teacher(source, 1.0, tokenizer)]) for n in (1 << 20, 128))
        assert one == pytest.approx(many, rel=1e-4, abs=1e-6)
        assert all(0 <= one[f"val_{name}"] <= 1.000001 for name in ("acceptance", "overlap", "ece", "teacher_ece"))
        assert (one["val_acceptance"] > 0.9999) == (source is model)


def test_feature_loss_is_a_mean_and_pools_other_widths():
    student, teacher = torch.tensor([[1.0, 3.0, 5.0, 7.0]]), torch.tensor([[2.0, 8.0]])
    assert lesson.feature_distillation_loss([student], [teacher]).item() == 2.0     # (2 - 2)^2, (6 - 8)^2
    assert lesson.feature_distillation_loss([student] * 2, [student, student + 1]).item() == 0.5


def test_progressive_distillation_goes_from_large_to_medium_to_small():
    calls = []
    small = lesson.progressive_distillation(
        "large", "medium", "small", "data", distill=lambda **call: calls.append(call))
    assert small == "small" and calls == [
        {"teacher": "large", "student": "medium", "train_loader": "data", "epochs": 5},
        {"teacher": "medium", "student": "small", "train_loader": "data", "epochs": 5}]
