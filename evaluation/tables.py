"""
表格：Markdown 与按列对齐的文本，以及“均值 ± 标准差”。
Tables: Markdown, aligned text for a terminal, and a mean with its spread over seeds.
"""

import math
import statistics
import unicodedata

Z = 1.959964        # 95 % of a normal distribution lie within this many standard deviations


def markdown(rows: list[list[str]], align: str = "") -> str:
    """A Markdown table of cells that are text already; the first row is the header.

    align   a letter per column, l or r; default: the first column l, the others r
    """
    align = align or "l" + "r" * (len(rows[0]) - 1)
    header, *body = [f"| {' | '.join(cells)} |" for cells in padded(rows, align)]
    widths = [max(map(width_of, column)) for column in zip(*rows)]
    rule = "|".join("-" * (width + 1) + ("-" if side == "l" else ":")
                    for width, side in zip(widths, align))
    return "\n".join([header, f"|{rule}|", *body])


def aligned(rows: list[list[str]], align: str = "") -> str:
    """The same as text, two spaces between the columns."""
    align = align or "l" + "r" * (len(rows[0]) - 1)
    return "\n".join("  ".join(cells).rstrip() for cells in padded(rows, align))


def padded(rows: list[list[str]], align: str) -> list[list[str]]:
    widths = [max(map(width_of, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        spaces = [" " * (width - width_of(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append([cell + space if side == "l" else space + cell
                      for cell, space, side in zip(row, spaces, align, strict=True)])
    return lines


def width_of(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def mean_and_spread(values: list[float], form: str, spread: bool = True, n: int = 0) -> str:
    """'69.0', or '69.0 ± 2.4' over several seeds (sample standard deviation); '' for no values.
    n: a single seed's value is a % of n cases and has an interval, '69.0 [63.0, 74.4]'."""
    if not values:
        return ""
    # A KL of rounding errors alone is not negative.
    mean = form.format(statistics.fmean(values)).replace("-0.000", "0.000")
    if spread and len(values) > 1:
        return f"{mean} ± {form.format(statistics.stdev(values))}"
    return f"{mean} [{', '.join(map(form.format, interval(values, n)))}]" if spread and n else mean


def interval(values: list[float], n: int) -> tuple[float, float]:
    """Mean -+ standard deviation of several seeds; of a single % of n cases its interval."""
    mean = statistics.fmean(values)
    if len(values) > 1:
        return mean - statistics.stdev(values), mean + statistics.stdev(values)
    low, high = wilson(mean / 100 * n, n)
    return 100 * low, 100 * high


def wilson(correct: float, asked: int) -> tuple[float, float]:
    """The 95 % interval of a rate, in 0..1: all rates that `correct` of `asked` do not contradict;
    (0, 1) for 0 questions. Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953."""
    if not asked:
        return 0.0, 1.0
    rate, z2_n = correct / asked, Z * Z / asked
    centre = (rate + z2_n / 2) / (1 + z2_n)
    half = math.sqrt(rate * (1 - rate) * z2_n + z2_n * z2_n / 4) / (1 + z2_n)
    return max(0.0, centre - half), min(1.0, centre + half)
