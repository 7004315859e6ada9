"""
随训练步变化的量。
What changes with the step of a run.
"""


def get_temperature(current_step: int, total_steps: int, initial_temp: float = 5.0, final_temp: float = 1.0) -> float:
    """A straight line from initial_temp at the first step to final_temp at the end: first the outline of the
    teacher's distribution, later its peak."""
    return initial_temp + (final_temp - initial_temp) * min(1.0, current_step / total_steps)
