"""
训练中的验证：各课共用。
Validation during training, the same for all lessons.
"""

import torch

from distill.fused import COMPARED, COMPARED_ACROSS, compare
from distill.teachers import teacher_outputs
from runtime.precision import autocast, sum_dtype
from runtime.processes import sum_over_processes


@torch.no_grad()
def evaluate(model, val_loader, device, *, teachers=(), temperature=1.0, across=False,
             dtype=torch.float32) -> dict[str, float]:
    """Means over the supervised tokens of all processes, in nats per token.

    val_loader  Batches, see dataset.lm_dataset.in_order
    teachers    none: only val_loss, the cross-entropy with the labels. Else val_ce, val_kl,
                val_entropy and val_agreement, or val_uld where vocabularies differ (`across`):
                see distill.fused.compare
    """
    names = ("loss",) if not teachers else COMPARED_ACROSS if across else COMPARED
    model.eval()
    sums = torch.zeros(len(names) + 1, dtype=sum_dtype(device), device=device)
    for batch in val_loader:
        batch = batch.to(device)
        with autocast(device, dtype):
            out = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            predictions, matched = (), None
            if teachers:
                predictions, matched, _ = teacher_outputs(teachers, batch)
            scores = compare(out.final, model.head, batch.targets, predictions, matched,
                             temperature, across)
        sums += torch.stack([*scores.values(), torch.tensor(len(batch.targets), device=device)])
    model.train()
    *sums, n = sum_over_processes(sums).tolist()
    return {f"val_{name}": value / n for name, value in zip(names, sums)}
