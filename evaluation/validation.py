"""
训练中的验证：各课共用。
Validation during training, the same for all lessons.
"""

import torch

from distill.fused import compare
from distill.teachers import teacher_outputs
from runtime.precision import autocast, sum_dtype
from runtime.processes import sum_over_processes


@torch.no_grad()
def evaluate(model, val_loader, device, *, teachers=(), temperature=1.0,
             dtype=torch.float32) -> dict[str, float]:
    """Means over the supervised tokens of all processes, in nats per token.

    val_loader  Batches, see dataset.lm_dataset.in_order
    teachers    none: only val_loss, the cross-entropy with the labels. Else val_ce, and val_NAME of
                all that distill.fused.compare finds
    """
    model.eval()
    sums, dtype_of_sums = {}, sum_dtype(device)
    for batch in val_loader:
        batch = batch.to(device)
        with autocast(device, dtype):
            out = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False)
            predictions, matched = (), None
            if teachers:
                predictions, matched, _ = teacher_outputs(teachers, batch)
            found = compare(out.final, model.head, batch.targets, predictions, matched, temperature)
        found["tokens"] = torch.tensor(len(batch.targets), device=device)
        sums = {name: sums.get(name, 0) + value.to(dtype_of_sums) for name, value in found.items()}
    model.train()
    *totals, n = sum_over_processes(torch.hstack([*sums.values()])).split(
        [value.numel() for value in sums.values()])
    names = [f"val_{name}" for name in sums] if teachers else ["val_loss"]
    # abs: of the gap in each bin of a calibration error; all others are above 0.
    return {name: (total.abs().sum() / n).item() for name, total in zip(names, totals)}
