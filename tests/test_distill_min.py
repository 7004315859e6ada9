"""
最小的蒸馏与 train_distillation.py 的梯度相同。
docs/lessons/distill_min.py computes the gradient of train_distillation.py.
"""

import importlib.util

import pytest
import torch

from dataset.lm_dataset import batch_of_answers
from distill.fused import Dense, fused_distillation_loss
from distill.losses import forward_kl
from helpers_run import ROOT
from train_distillation import plain_distillation_loss

FILE = ROOT / "docs/lessons/distill_min.py"


@pytest.fixture
def lesson():
    spec = importlib.util.spec_from_file_location("distill_min", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss_fn", [plain_distillation_loss, fused_distillation_loss])
def test_its_gradient_is_that_of_the_real_loss_on_one_batch(lesson, loss_fn, temperature, tiny, byte_tokenizer):
    """Backward passes of a sample each add up to that of a packed batch."""
    lesson.T, tokenizer = temperature, byte_tokenizer()
    teacher, student, real = (tiny(seed, vocab_size=272, max_seq_len=96) for seed in (1, 2, 2))
    samples = [lesson.encode(tokenizer, *sample) for sample in lesson.SAMPLES]
    assert [len(at) for _, at in samples] == [len(answer) + 1 for _, answer in lesson.SAMPLES]      # and <|im_end|>
    value = lesson.accumulate(teacher, student, samples)

    prompts = tokenizer.encode_chats([[{"role": "user", "content": question}] for question, _ in lesson.SAMPLES], True)
    answers = [tokenizer.encode(answer) + [tokenizer.end_of_turn] for _, answer in lesson.SAMPLES]
    batch = batch_of_answers([ids for ids, _ in prompts], answers)
    with torch.no_grad():
        states = Dense(teacher(batch.tokens, batch.lengths, at=batch.at).final, teacher.head)
    out = real(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
    loss, *_ = loss_fn(out.final, real.head, batch.targets, [states], 0.0, temperature, forward_kl)
    loss = loss / len(batch.at)
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(student.parameters(), real.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_it_has_no_flag_and_no_more_than_60_lines():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 60 and "argparse" not in text and "parse_args" not in text
