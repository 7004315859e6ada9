"""
最小的蒸馏：三个样本，没有任何参数；梯度与 train_distillation.py 的相同。
Distillation at its smallest, without a flag: the gradient is that of train_distillation.py.

    loss = T^2 * KL(teacher_T || student_T), a mean over the tokens of the answers
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))    # the root of the repo

import torch

from interop.checkpoint import load_model

SAMPLES = [("where does suvuz live?", "kuburg"), ("what is 7 plus 8?", "15")]
T, LEARNING_RATE, STEPS, GRAD_CLIP = 1.0, 1e-3, 50, 1.0


def encode(tokenizer, question: str, answer: str):
    # -> (N,) tokens that both models read, (S,) positions before the tokens of the answer
    ids, is_answer = tokenizer.encode_chat([{"role": "user", "content": question},
                                            {"role": "assistant", "content": answer}])
    return torch.tensor(ids[:-1]), torch.tensor(is_answer[1:]).nonzero().squeeze(1)


def kd_loss(student_logits, teacher_logits):  # (S, V), (S, V) -> (), nats, a sum over tokens
    log_p, log_q = ((one / T).log_softmax(dim=-1) for one in (teacher_logits, student_logits))
    return T ** 2 * (log_p.exp() * (log_p - log_q)).sum()


def accumulate(teacher, student, samples) -> float:
    """One backward pass per sample; .grad adds up to the gradient of the mean over all tokens."""
    total, n_tokens = 0.0, sum(len(at) for _, at in samples)
    for ids, at in samples:
        with torch.no_grad():
            teacher_logits = teacher(ids, [len(ids)], at=at).logits
        loss = kd_loss(student(ids, [len(ids)], at=at).logits, teacher_logits) / n_tokens
        loss.backward()
        total += loss.item()
    return total


if __name__ == "__main__":
    teacher, tokenizer = load_model("out/full_sft_128.pth")
    student, _ = load_model("out/full_sft_64.pth")
    samples = [encode(tokenizer, *sample) for sample in SAMPLES]
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        loss = accumulate(teacher, student, samples)
        torch.nn.utils.clip_grad_norm_(student.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2}  {loss:.3f} nats per token")
