"""
两种稀疏缓存的梯度与完整分布的相差多少：top-k 的偏差不会平均掉，采样的噪声会。
How far the gradients of sparse caches are from that of the whole distribution, in % of its norm, for
the output matrix of quickstart.py's student after SFT; forward KL. In one step of 24 samples, and in
the sum of 50 steps: the bias of a top-k remains, the noise of samples averages out.

    python tests/bias_and_noise.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from dataset.lm_dataset import SFTDataset
from distill.cache import pack, unpack
from distill.fused import Dense, fused_distillation_loss
from evaluation.tables import markdown
from interop.checkpoint import load_model

BATCHES, SAMPLES, KS = 50, 24, (1, 4, 12, 32)

(teacher, tokenizer), (student, _) = map(load_model, ("out/full_sft_128.pth", "out/full_sft_64.pth"))
data = SFTDataset(["dataset/sft_data.jsonl"], tokenizer, 128, log=lambda line: None)
rng = np.random.default_rng(0)
rows = [["T", "bytes", "top k", "one step", "50 steps", "samples", "one step", "50 steps"]]
order = rng.permutation(len(data))[:BATCHES * SAMPLES]
batches = [data.batch(chosen) for chosen in np.array_split(order, BATCHES)]


@torch.no_grad()
def states(model, batch):
    return model(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final


def gradient(batch, hidden, prediction, temperature):
    head = student.head.detach().requires_grad_()
    fused_distillation_loss(hidden, head, batch.targets, prediction, temperature=temperature).loss.backward()
    return head.grad


read = [(batch, states(student, batch), states(teacher, batch)) for batch in batches]
about, head = {"vocab_size": len(teacher.head)}, teacher.head.detach()
for temperature in (1.0, 2.0):
    exact = [gradient(batch, hidden, [Dense(final, head)], temperature) for batch, hidden, final in read]
    for k in KS:
        row = [f"{temperature:g}", f"{6 * k + 4}"]
        for kind, n in (("top_k", k), ("sampled", 3 * k + 2)):          # of as many bytes
            about |= {"top_k": 0, "sampled": 0, "temperature": temperature} | {kind: n}
            gaps = [gradient(batch, hidden, unpack(pack(about, final, head, rng), "cpu"), temperature) - one
                    for (batch, hidden, final), one in zip(read, exact)]
            step = np.mean([(gap.norm() / one.norm()).item() for gap, one in zip(gaps, exact)])
            row += [f"{n}", f"{100 * step:.1f}", f"{100 * sum(gaps).norm() / sum(exact).norm():.1f}"]
        rows.append(row)
print(markdown(rows))
