"""
课程的阶段：一行超参数，怎么改、怎么检查。
The stages of a curriculum: a row of hyperparameters each, how --set changes it, and its checks.
"""

import dataclasses
import re

from distill.balance import BALANCES
from runtime.args import did_you_mean, out_of_range

SAMPLINGS = ("uniform", "evaluation")


@dataclasses.dataclass(frozen=True)
class Stage:
    """An epoch is one pass over the domain's samples, or in a stage without them over the general
    ones."""

    share: tuple[float, float]      # of the domain among the samples, at the first and last step
    alpha: float                    # weight of CE in [0, 1]; the KL has weight 1 - alpha
    temperature: float              # softmax temperature of both models
    learning_rate: float            # cosine decay from 1.1x to 0.1x of it
    batch_size: int                 # samples per micro-batch and process
    epochs: int
    balance: str = "none"           # of the domains' gradients: distill/balance.py
    sampling: str = "uniform"       # within the domain; evaluation: a category in proportion to
                                    # max(0.1, 1 - its score)
    feature_weight: float = 0.0     # of the intermediate-layer losses: distill/features.py
    attention_weight: float = 0.0
    contrastive_weight: float = 0.0
    steps: int = 0                  # optimizer steps; 0: as many as the epochs make


FIELDS = {field.name: field for field in dataclasses.fields(Stage)}


def edit_stages(stages: tuple[Stage, ...], changes: list[str], steps: int = 0) -> list[Stage]:
    """The stages with the changes of --set, such as 2.balance=none or 3.share=0.8:0.8; with
    `steps`, each of them has that many.

    Raises ValueError for a change that is not of this form, and for a value out of its range.
    """
    stages = list(stages)
    for change in changes:
        found = re.fullmatch(r"(\d+)\.(\w+)=(.+)", change)
        if not found or not 1 <= int(found[1]) <= len(stages):
            raise ValueError(f"--set {change}: write STAGE.NAME=VALUE, like 2.balance=none or "
                             f"3.share=0.8:0.8; stages are 1 to {len(stages)}")
        number, name, text = int(found[1]), found[2], found[3]
        if name not in FIELDS:
            raise ValueError(f"--set {change}: a stage has no {name!r}; did you mean "
                             f"{did_you_mean(name, FIELDS)}? It has {', '.join(FIELDS)}")
        try:
            value = share_of(text) if name == "share" else FIELDS[name].type(text)
        except ValueError:
            raise ValueError(f"--set {change}: {text!r} is not a value of {name}, like "
                             f"{getattr(stages[number - 1], name)}") from None
        stages[number - 1] = dataclasses.replace(stages[number - 1], **{name: value})
    for number, stage in enumerate(stages, start=1):
        check_stage(number, stage)
    return [dataclasses.replace(stage, steps=steps or stage.steps) for stage in stages]


def share_of(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(":")))


def check_stage(number: int, stage: Stage):
    low, high = min(stage.share), max(stage.share)
    for name, valid, needed in (
            ("share", len(stage.share) == 2 and 0 <= low <= high <= 1, "be two numbers in [0, 1]"),
            *((name, out_of_range(name, value) is None, out_of_range(name, value))
              for name, value in vars(stage).items()),
            ("balance", stage.balance in BALANCES, f"be one of {', '.join(BALANCES)}"),
            ("balance", stage.balance == "none" or 0 < low <= high < 1,
             "be none in a stage with only one side's samples"),
            ("sampling", stage.sampling in SAMPLINGS, f"be one of {', '.join(SAMPLINGS)}"),
            ("sampling", stage.sampling == "uniform" or high > 0,
             "be uniform in a stage without the domain's samples")):
        if not valid:
            raise ValueError(f"{name} {getattr(stage, name)} of stage {number} must {needed}")


def describe_stage(stage: Stage) -> str:
    """share (0.3, 0.7), alpha 0.3, ...: what has no default, and what differs from it."""
    return ", ".join(f"{name} {getattr(stage, name)}" for name, field in FIELDS.items()
                     if getattr(stage, name) != field.default)
