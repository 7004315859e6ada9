"""
随训练步变化的量：学习率、温度，以及每隔多少步做一次的事。
What changes with the training step: learning rate, temperature, and what is done every so many steps.
"""

import math


def get_lr(current_step: int, total_steps: int, lr: float, warmup_steps: int = 0) -> float:
    """Linear warm-up, then lr/10 + lr/2 * (1 + cos(pi * step / total)): a cosine from 1.1 * lr down to 0.1 * lr."""
    if current_step < warmup_steps:
        return 1.1 * lr * (current_step + 1) / warmup_steps
    step, total = current_step - warmup_steps, max(1, total_steps - warmup_steps)
    return lr / 10 + 0.5 * lr * (1 + math.cos(math.pi * step / total))


def get_temperature(current_step: int, total_steps: int, initial_temp: float = 5.0,
                    final_temp: float = 1.0) -> float:
    """Linear from initial_temp at step 0 to final_temp at step total_steps."""
    return initial_temp + (final_temp - initial_temp) * min(1.0, current_step / total_steps)


def epochs_left(steps_per_epoch: int, steps_done: int, total_steps: int) -> range:
    """The epochs that have steps still to be done."""
    return range(steps_done // steps_per_epoch, math.ceil(total_steps / steps_per_epoch))


def steps_of_epoch(epoch: int, steps_per_epoch: int, steps_done: int, total_steps: int) -> range:
    """The optimizer steps of an epoch that are still to be done."""
    return range(max(epoch * steps_per_epoch, steps_done), min((epoch + 1) * steps_per_epoch, total_steps))


def is_due(interval: int, steps_done: int, total_steps: int) -> bool:
    """Whether something that happens every `interval` steps, and after the last one, is due. 0: only after the last."""
    return steps_done == total_steps or interval > 0 and steps_done % interval == 0
