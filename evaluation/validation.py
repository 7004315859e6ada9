"""
训练中的验证：各课共用。
Validation during training, the same for all lessons.
"""

import torch

from distill.fused import compare, fused_distillation_loss
from distill.teachers import teacher_outputs
from runtime.precision import autocast, sum_dtype
from runtime.processes import is_sharded, sum_over_processes, unwrapped


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


def gradient_norms(student, modules, weights, batch, world, teachers, alpha, temperature,
                   divergence) -> dict[str, float]:
    """{grad_NAME: L2 norm of the gradient of each weighted loss term} on a batch of each process,
    over all processes.

    weights     what trains: the gradient is taken with respect to these
    modules     "intermediate": the intermediate-layer losses, as the lesson calls them

    Empty for a sharded model, of which no process has the whole gradient.
    """
    if is_sharded(modules["model"]):
        return {}
    batch = batch.to(world.device)
    n_targets = sum_over_processes(torch.tensor(len(batch.targets), device=world.device)).item()
    batch = batch._replace(step_targets=n_targets, step_samples=world.size * len(batch.lengths))
    intermediate = unwrapped(modules["intermediate"])
    return_hidden = "feature" in intermediate.weights
    with autocast(world.device, world.dtype):
        with torch.no_grad():
            teacher = teacher_outputs(teachers, batch, return_hidden)
        out = student(batch.tokens, batch.lengths, at=batch.at, with_logits=False,
                      return_hidden=return_hidden)
        _, terms = intermediate(batch, out, teacher.out)
        terms = {name: intermediate.weights[name] * term for name, term in terms.items()}
        for name, only, weight in (("ce", 1.0, alpha), ("kd", 0.0, 1 - alpha)):
            if weight > 0:
                loss, _, _ = fused_distillation_loss(
                    out.final, student.head, batch.targets, teacher.predictions, only, temperature,
                    divergence, teacher.matched)
                terms[name] = weight * loss / n_targets
    if len(terms) == 1:                     # its norm is grad_norm
        return {}
    norms = {}
    for name, term in terms.items():
        grads = torch.autograd.grad(term, weights, retain_graph=True, materialize_grads=True)
        total = sum_over_processes(torch.cat([grad.flatten() for grad in grads]))
        norms[f"grad_{name}"] = total.norm().item()
    return norms
