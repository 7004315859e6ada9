"""
各方法的对比：在自己的进程里跑脚本，计处理器时间；几个种子的结果排成一张表。
What the comparisons of methods share: a script of the repo in a process of its own, and a table over several seeds.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from runtime import write_whole

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, flags: str) -> float:
    """A script of the repo, in a process of its own. Returns the processor's seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, script, *flags.split()]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(f"{' '.join(command)}\n{ended.stdout}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def table(results: dict[str, list[dict]], columns) -> str:
    """Markdown: a line per method, of whose seeds each has these figures; mean ± standard deviation over the seeds. Steps and
    seconds are whole numbers without a spread; a figure that a method does not have is left empty."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, seeds in results.items():
        cells = []
        for column in columns:
            values = [seed[column] for seed in seeds if column in seed]
            if not values or column in ("steps", "seconds"):
                cells.append(f"{statistics.mean(values):.0f}" if values else "")
            else:
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(out: Path, results: dict[str, list[dict]], columns):
    """Print the table, and write it as table.md, with all figures in table.json."""
    text = table(results, columns)
    print(text)
    write_whole(ROOT / out / "table.md", lambda file: file.write(f"{text}\n".encode()))
    write_whole(ROOT / out / "table.json", lambda file: file.write(json.dumps(results, indent=2).encode()))
