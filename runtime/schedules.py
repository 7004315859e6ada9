"""
随训练步变化的量：学习率与温度。
What changes with the training step: learning rate and temperature.
"""

import math


def get_lr(current_step: int, total_steps: int, lr: float, warmup_steps: float = 0) -> float:
    """Linear warm-up, then lr/10 + lr/2 * (1 + cos(pi * step / total)): a cosine from 1.1 * lr down
    to 0.1 * lr. warmup_steps below 1: a fraction of all steps."""
    if warmup_steps < 1:
        warmup_steps = round(warmup_steps * total_steps)
    if current_step < warmup_steps:
        return 1.1 * lr * (current_step + 1) / warmup_steps
    step, total = current_step - warmup_steps, max(1, total_steps - warmup_steps)
    return lr / 10 + 0.5 * lr * (1 + math.cos(math.pi * step / total))


def get_temperature(current_step: int, total_steps: int, initial_temp: float = 5.0,
                    final_temp: float = 1.0) -> float:
    """Linear from initial_temp at step 0 to final_temp at step total_steps."""
    return initial_temp + (final_temp - initial_temp) * min(1.0, current_step / total_steps)
