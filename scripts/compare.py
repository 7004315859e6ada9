"""
擂台：所有方法用同样的数据与起点，先比同样的更新步数，再比同样的 CPU 时间。
The arena: methods on the same data, from the same start, at equal updates and at equal CPU seconds.

    python scripts/compare.py --quick       one seed, nothing tuned, equal updates only
    python scripts/compare.py               everything; the same command resumes an interrupted run
    python scripts/compare.py --rows SFT "forward KL" --seeds 5
    python scripts/compare.py --config configs/compare_experience.yaml

A row of the YAML file is a command and the values to tune in it; configs/compare.yaml has the keys.

    begin      each row for a few updates: its command is right, and its start-up time is known
    tune       as many candidates for each row; the best on the validation data is chosen
    updates    the best one for the same number of updates, over the seeds, on the test data
    seconds    the same for as many updates as fit into --seconds

Seconds are CPU seconds of the updates, teacher included, and of files made for the row alone
(SeqKD's answers, a teacher assistant). Neither start-up nor the training of the teacher counts.

    OUT/table.md, table.json, table.png     written after `updates` and again after `seconds`
    OUT/trials.jsonl                        per run: {key, name, command, made, seconds, peak_mb}
    OUT/trials/NAME-KEY/                    its files and log.txt
"""

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # run as a script, Python looks for modules in scripts/ only

import yaml

from dataset.formats import category, read_each
from runtime.args import check_ranges, checking_input, did_you_mean, make_parser, resume_command
from runtime.files import file_sha256, read_lines, write_atomic
from runtime.log import Logger

OUT = "<out>"               # in a command: the folder of its own that a run writes into
FIRST_SEED = 1337           # of the reported runs; candidates are tuned with the seed before it
TEN = 10                    # steps come in tens, so that stages and rounds can share them
REFERENCES = "Reference models"

# -- 1. The YAML file: its keys (explained in configs/compare.yaml) and their defaults -------------
# ...: required

PLAN = {"title": ..., "note": ..., "out": ..., "updates": ..., "seeds": ..., "values": ...,
        "tests": ..., "columns": ..., "rows": ..., "picture": ..., "references": (), "files": {},
        "made": {}, "begin": 0, "validate": "", "tune_part": 0, "seconds": 0, "quick": {}}
MADE = {"command": ..., "writes": ..., "existing": ""}
ROW = {"command": ..., "writes": ..., "tune": {}, "charge": (), "quick": True, "note": ""}
COLUMN = {"read": ..., "form": ".1f", "spread": True, "equal_seconds": False, "lost_since": ""}


class Number(int):
    """{steps} is 1000, {steps:60-80} is 200, the steps between 60 and 80 %; {seed:+1} is the next
    seed. Adjoining parts add up to the whole."""

    def __format__(self, part: str) -> str:
        if part.startswith("+"):
            return str(self + int(part))
        begin, end = (round(self * float(each) / 100) for each in (part or "0-100").split("-"))
        return str(end - begin)


def read(path) -> Namespace:
    """A plan. Raises ValueError that names the file, the row and the nearest known key."""
    if not Path(path).exists():
        raise ValueError(f"no config file at {path}")
    plan = build(PLAN, yaml.safe_load(Path(path).read_text()), path)
    for section, keys in (("made", MADE), ("columns", COLUMN)):
        vars(plan)[section] = {name: build(keys, each, f"{path}: {name}")
                               for name, each in vars(plan)[section].items()}
    plan.rows = [Namespace(name=name, group=group, **vars(build(ROW, each, f"{path}: {name}")))
                 for group, rows in plan.rows.items() for name, each in rows.items()]
    counts = {row.name: len(candidates(row)) for row in plan.rows}
    if len(counts) < len(plan.rows):
        raise ValueError(f"{path}: two rows have the same name")
    if len(set(counts.values())) > 1:
        raise ValueError(f"{path}: all rows must have the same number of candidates: {counts}")
    return plan


def build(defaults: dict, given: dict, where: str) -> Namespace:
    for key in given:
        if key not in defaults:
            near = did_you_mean(key, defaults)
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near}?")
    values = defaults | given
    for key in values:
        if values[key] is ...:
            raise ValueError(f"{where}: has no {key!r}")
    return Namespace(**values)


def candidates(row) -> list[dict]:
    """tune {a: [1, 2], b: [3, 4]} -> [{a: 1, b: 3}, {a: 1, b: 4}, {a: 2, b: 3}, {a: 2, b: 4}]"""
    return [dict(zip(row.tune, values)) for values in product(*row.tune.values())]


def placeholders(text: str, plan) -> set[str]:
    """The names that a command needs, through the values and made files that it names too."""
    found, todo = set(), [text]
    while todo:
        names = {name for _, name, _, _ in string.Formatter().parse(todo.pop()) if name} - found
        found |= names
        todo += [str(plan.values[name]) for name in names & plan.values.keys()]
        todo += [plan.made[name].command for name in names & plan.made.keys()]
    return found


def filled(text: str, values: dict) -> str:
    """A command with its placeholders filled in, and those of their values."""
    for _ in range(10):
        if "{" not in text:
            return text
        text = text.format_map(values)
    raise ValueError(f"{text}: a value that contains itself")


def check(path: str, plan):
    """All placeholders are known, all files exist, and each row takes the steps, samples and seed
    at which it is compared. Raises ValueError."""
    known = plan.values | dict.fromkeys([*plan.made, *plan.files, "out", "weights"], OUT) | {
        "steps": Number(TEN), "seed": Number(0)}
    commands = {row.name: (f"{row.command} {row.writes}", candidates(row)[0]) for row in plan.rows}
    used = set().union(*(placeholders(text, plan) for text, _ in commands.values()))
    commands |= {name: (plan.made[name].command, {}) for name in used & plan.made.keys()}
    commands |= {name: (text, {}) for name, text in plan.tests.items()}
    commands["validate"] = plan.validate, {}
    for name, (text, tuned) in commands.items():
        values = known | tuned
        for word in placeholders(text, plan) - values.keys():
            raise ValueError(f"{path}: {name}: unknown {{{word}}}; "
                             f"did you mean {did_you_mean(word, values)}?")
        for word in filled(text, values).split():
            is_file = Path(word).suffix in (".py", ".pth", ".json", ".jsonl", ".yaml")
            if is_file and OUT not in word and not (ROOT / word).exists():
                raise ValueError(f"{path}: {name}: no file at {word}; bash quickstart.sh makes "
                                 "data, teacher and start, the README has the commands for others")
    for row in plan.rows:
        for word in ("steps", "seed", *plan.values.keys() & {"samples"}, *row.tune):
            if word not in placeholders(row.command, plan):
                raise ValueError(f"{path}: {row.name}: its command does not take {{{word}}}")


# -- 2. Runs, each of them once --------------------------------------------------------------------


class Job(NamedTuple):
    name: str           # in the log
    command: str        # `scripts/evaluate.py --weights out/a.pth --json <out>/scores.json`
    makes: str          # the file that it writes: <out>/scores.json


class Jobs:
    """Runs jobs, some at a time, each in a process of its own with one thread. A finished job never
    runs again: its key is a checksum of the command and of the contents of the files that it names.

        with Jobs(folder, processes=2, n_jobs=2) as jobs:
            jobs.run([first, second])       -> their lines of trials.jsonl; any thread may call it

    A job that fails raises ValueError with the end of its log. If the block ends early, running
    jobs get SIGTERM, and SIGKILL after twenty seconds.
    """

    def __init__(self, folder, processes: int, n_jobs: int):
        self.folder, self.n_jobs, self.n_done = Path(folder), n_jobs, 0
        self.ledger = ROOT / folder / "trials.jsonl"
        self.records = {each["key"]: each for each in map(json.loads, read_lines(self.ledger))}
        self.pool, self.lock = ThreadPoolExecutor(processes), threading.RLock()
        self.futures, self.children, self.stopping = {}, set(), False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.send(signal.SIGTERM)
        end = time.monotonic() + 20
        while self.children and time.monotonic() < end:
            time.sleep(0.02)
        self.send(signal.SIGKILL)
        self.pool.shutdown()

    def send(self, number: int):
        with self.lock:
            self.stopping = True
            for pid in self.children:
                os.kill(pid, number)

    def run(self, jobs: list[Job]) -> list[dict]:
        """Their records, in the order of `jobs`, when all are done."""
        keys = [key_of(job) for job in jobs]
        with self.lock:
            for key, job in zip(keys, jobs):
                if key not in self.futures:
                    self.futures[key] = self.pool.submit(self.once, key, job)
        return [self.futures[key].result() for key in keys]

    def once(self, key: str, job: Job) -> dict:
        record = self.records.get(key)
        if record is None or not (ROOT / record["made"]).exists():
            record = self.execute(key, job)
        with self.lock:
            self.n_done += 1
        return record

    def execute(self, key: str, job: Job) -> dict:
        name = re.sub(r"[^a-z0-9.]+", "_", job.name.lower())
        folder = self.folder / "trials" / f"{name}-{key}"
        made, command = (text.replace(OUT, str(folder)) for text in (job.makes, job.command))
        shutil.rmtree(ROOT / folder, ignore_errors=True)    # an interrupted run has too few seconds
        (ROOT / folder).mkdir(parents=True)
        with open(ROOT / folder / "log.txt", "w") as log, self.lock:
            if self.stopping:
                raise KeyboardInterrupt
            # In a session of its own, Ctrl-C on the terminal does not reach it; __exit__ ends it.
            child = subprocess.Popen(
                [sys.executable, *shlex.split(command)], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.children.add(child.pid)
        _, status, used = os.wait4(child.pid, 0)            # resources of this child alone
        child.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.children.remove(child.pid)
            if self.stopping:
                raise KeyboardInterrupt
        if child.returncode or not (ROOT / made).exists():
            log = (ROOT / folder / "log.txt").read_text().splitlines()[-15:]
            why = f"{job.name} ended with status {child.returncode} and did not make {made}:"
            raise ValueError("\n".join([why, f"python {command}", *log]))

        for path in (ROOT / folder).rglob("*.resume*"):     # most of the disk space
            path.unlink()
        unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss, in bytes
        record = {"key": key, "name": job.name, "command": job.command, "made": made,
                  "seconds": round(used.ru_utime + used.ru_stime, 2),
                  "peak_mb": round(used.ru_maxrss * unit / 2 ** 20)}
        with self.lock, open(self.ledger, "a") as file:
            file.write(json.dumps(record) + "\n")
            Logger(f"[{self.n_done + 1:3d}/{self.n_jobs}]  {job.name}: {record['seconds']:.0f} s, "
                   f"{record['peak_mb']} MB")
        return record


def key_of(job: Job) -> str:
    words = shlex.split(job.command)[1:]
    paths = {path for word in words for path in word.rpartition("=")[2].split(",")}
    contents = {path: checksum(ROOT / path, (ROOT / path).stat().st_mtime_ns)
                for path in sorted(paths) if (ROOT / path).is_file()}
    return hashlib.sha256(json.dumps([job.command, contents]).encode()).hexdigest()[:10]


@functools.cache
def checksum(path: Path, mtime: int) -> str:
    return file_sha256(path)


# -- 3. The comparison -----------------------------------------------------------------------------


def steps_within(budget: float, charged: float, took: float, updates: int) -> int:
    """Updates that fit into `budget` seconds, in tens, at least ten, where `updates` of them `took`
    these seconds; the charged seconds are part of both. Raises ValueError."""
    if took <= charged:
        raise ValueError("the updates are too few to be timed: more --updates, or --seconds 0")
    return max(TEN, int((budget - charged) / (took - charged) * updates) // TEN * TEN)


def best(scores: list[dict]) -> int:
    """The candidate with the highest exact match, then with the lowest perplexity."""
    ranks = [(each["exact_match"], -each["perplexity"]) for each in scores]
    return ranks.index(max(ranks))


class Comparison:
    """A plan, what fills in its commands, and the jobs that run them. Most methods serve one row;
    of_each calls one for all rows, side by side."""

    def __init__(self, plan, values: dict, jobs: Jobs):
        self.plan, self.values, self.jobs = plan, values, jobs
        self.begin, self.chosen = {}, {}        # {row: seconds to start}, {row: its best candidate}

    def of_each(self, do) -> dict:
        """{row: do(row)}, a thread for each row, the slowest first; the first error ends all."""
        pool = ThreadPoolExecutor(len(self.plan.rows))
        slowest_first = sorted(self.plan.rows, key=lambda row: -self.begin.get(row.name, 0.0))
        futures = {row.name: pool.submit(do, row) for row in slowest_first}
        for future in as_completed(futures.values()):
            future.result()
        return {row.name: futures[row.name].result() for row in self.plan.rows}

    def make(self, name: str, values: dict) -> dict:
        """The record of a made file; without seconds if it existed before."""
        part = self.plan.made[name]
        if part.existing and (ROOT / part.existing).exists():
            return {"made": part.existing}
        return self.jobs.run([self.job(f"make {name}", part.command, part.writes, values)])[0]

    def job(self, name: str, command: str, writes: str, values: dict) -> Job:
        """With all placeholders filled in, once the files that the command needs are made."""
        needed = placeholders(command, self.plan) & self.plan.made.keys()
        values = self.values | {each: self.make(each, values)["made"] for each in needed} | values
        return Job(name, filled(command, values), filled(writes, values))

    def train(self, phase: str, row, tuned: list[dict], steps: int, seeds) -> list[dict]:
        """A record for each candidate and seed, with the seconds of what was made for it."""
        runs = [each | {"steps": Number(steps), "seed": Number(seed)}
                for each in tuned for seed in seeds]
        records = self.jobs.run([self.job(f"{phase}, {row.name}", row.command, row.writes, values)
                                 for values in runs])
        return [record | {"charged": sum(self.make(name, values)["seconds"] for name in row.charge)}
                for record, values in zip(records, runs)]

    def scores(self, name: str, tests: dict[str, str], records: list[dict]) -> list[dict]:
        """{test: its scores} for the weights of each record."""
        weights = " ".join(f"{number}={record['made']}" for number, record in enumerate(records))
        path = f"{OUT}/scores.json"
        done = self.jobs.run([self.job(name, f"{command} --json {path}", path, {"weights": weights})
                              for command in tests.values()])
        found = [json.loads((ROOT / record["made"]).read_text()) for record in done]
        return [{test: each[str(number)][0] for test, each in zip(tests, found)}
                for number in range(len(records))]

    def prepare(self, row):
        plan, tries = self.plan, candidates(row)
        self.begin[row.name], self.chosen[row.name] = 0.0, tries[0]
        if plan.begin:
            begun, = self.train("begin", row, tries[:1], plan.begin, [FIRST_SEED - 1])
            self.begin[row.name] = begun["seconds"]
        if plan.validate:
            tried = self.train("tune", row, tries, tune_steps(plan), [FIRST_SEED - 1])
            scores = self.scores(f"validate, {row.name}", {"val": plan.validate}, tried)
            self.chosen[row.name] = tries[best([each["val"] for each in scores])]

    def measure(self, phase: str, row, steps: int) -> list[dict]:
        """Steps, seconds, memory and scores for each seed."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.plan.seeds)
        trained = self.train(phase, row, [self.chosen[row.name]], steps, seeds)
        scores = self.scores(f"test, {row.name}", self.plan.tests, trained)
        return [{"steps": steps, "peak_mb": record["peak_mb"], "charged": record["charged"],
                 "seconds": record["charged"] + record["seconds"] - self.begin[row.name]} | score
                for record, score in zip(trained, scores)]

    def references(self) -> dict[str, dict]:
        """Rows of the models that the others start or learn from, but for those of a seed."""
        needed = set().union(*(placeholders(row.command, self.plan) for row in self.plan.rows))
        found = {name: {"made": self.values[name]} for name in self.plan.references}
        made = {name: part for name, part in self.plan.made.items() if name in needed}
        found |= {name: self.make(name, {}) for name, part in made.items()
                  if "seed" not in placeholders(part.command, self.plan)}
        rows = {}
        for name, record in found.items():
            if record["made"].endswith(".pth"):
                scores, = self.scores(f"test, {name}", self.plan.tests, [record])
                scores |= {key: record[key] for key in record.keys() & {"seconds"}}
                rows[name] = {"group": REFERENCES, "note": "", "tuned": {}, "updates": [scores]}
        return rows

    def run(self, write):
        """All phases. Calls write(results), as in table.json, after each of the last two."""
        plan = self.plan
        self.of_each(self.prepare)
        results = {"updates": plan.updates, "seconds": None, "rows": self.references()}
        measured = self.of_each(lambda row: self.measure("updates", row, plan.updates))
        results["rows"] |= {
            row.name: {"group": row.group, "note": row.note, "tuned": self.chosen[row.name],
                       "updates": measured[row.name]} for row in plan.rows}
        write(results)
        if not plan.seconds:
            return

        # The fastest seed of each row: other work of the machine only adds to it.
        fastest = {name: min(seeds, key=lambda seed: seed["seconds"])
                   for name, seeds in measured.items()}
        slowest = max(each["seconds"] for each in fastest.values())
        results["seconds"] = budget = slowest if plan.seconds == "slowest" else plan.seconds

        def as_long(row):
            took, charged = (fastest[row.name][key] for key in ("seconds", "charged"))
            steps = steps_within(budget, charged, took, plan.updates - plan.begin)
            return self.measure("seconds", row, steps)

        for name, seeds in self.of_each(as_long).items():
            results["rows"][name]["seconds"] = seeds
        write(results)


def tune_steps(plan) -> int:
    return max(TEN, round(plan.updates * plan.tune_part / TEN) * TEN)


# -- 4. Results ------------------------------------------------------------------------------------


def figures(results: dict, name: str, phase: str, column) -> list[float]:
    """A row's value in a column for each seed; [] if it was not measured."""
    def value(scores):
        *keys, pattern = column.read.split()
        for key in keys:
            scores = scores.get(key, {})
        matching = [scores[key] for key in scores if fnmatch(key, pattern)]
        return [mean(matching)] if matching else []

    row = results["rows"][name]
    values = [each for seed in row.get(phase, []) for each in value(seed)]
    if not column.lost_since:
        return values
    before = results["rows"].get(column.lost_since, {"group": None})
    return [value(seed)[0] - own for seed, own in zip(before.get(phase, []), values)
            if before["group"] == row["group"]]


def cell(values: list[float], column) -> str:
    """'69.0 ± 2.4' over several seeds (sample standard deviation), '69.0' of one; '' of none."""
    if not values:
        return ""
    text = format(mean(values), column.form).replace("-0.000", "0.000")     # rounding errors
    if column.spread and len(values) > 1:
        text += f" ± {format(stdev(values), column.form)}"
    return text


def table(results: dict, plan, how: str) -> str:
    """Markdown: rows under their groups; the comparison at equal seconds on the right."""
    columns = [(title, "updates", column) for title, column in plan.columns.items()]
    if results["seconds"]:
        how += f"; then as many updates as fit into {results['seconds']:.0f} CPU seconds"
        columns += [(f"{title}, equal seconds", "seconds", column)
                    for title, column in plan.columns.items() if column.equal_seconds]
    lines = [f"| | {' | '.join(title for title, *_ in columns)} | with |",
             "|---|" + "---:|" * len(columns) + "---|"]
    group = None
    for name, row in results["rows"].items():
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** |" + " |" * (len(columns) + 1))
        cells = [cell(figures(results, name, phase, column), column)
                 for _, phase, column in columns]
        cells.append(", ".join(f"{key} {value}" for key, value in row["tuned"].items()))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    notes = [f"- {name}: {row['note']}" for name, row in results["rows"].items() if row["note"]]
    return "\n".join([f"# {plan.title}\n\n{how}.\n", *lines, f"\n{plan.note}\n", *notes]) + "\n"


def draw(results: dict, plan, path: Path):
    """A point per row with its spread and its seeds, a panel per comparison, models as lines."""
    from matplotlib.figure import Figure

    panels = {"updates": f"{results['updates']:,} updates each"}
    if results["seconds"]:
        panels["seconds"] = f"{results['seconds']:.0f} CPU seconds each"
    groups = list(dict.fromkeys(row.group for row in plan.rows))
    labels = [name for group in groups
              for name in (group, *(row.name for row in plan.rows if row.group == group))]
    size = 4.2 + 3.6 * len(panels), 1.2 + 0.27 * len(labels)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (phase, title) in zip(axes, panels.items()):
        for row in plan.rows:
            values = figures(results, row.name, phase, plan.columns[plan.picture])
            y, color = labels.index(row.name), f"C{groups.index(row.group)}"
            axis.plot(values, [y] * len(values), ".", color=color, alpha=0.35)
            spread = stdev(values) if len(values) > 1 else 0.0
            axis.errorbar(mean(values), y, xerr=spread, fmt="o", color=color)
        for name in plan.references:
            x, = figures(results, name, "updates", plan.columns[plan.picture])
            axis.axvline(x, color="0.6", linestyle=":")
            axis.text(x, 1, name, transform=axis.get_xaxis_transform(), ha="center", va="bottom")
        axis.set_title(title, pad=16)
        axis.set(xlabel=plan.picture, xlim=(0, 100), ylim=(len(labels) - 0.5, -0.7))
        axis.grid(axis="y", color="0.93")
    axes[0].set_yticks(range(len(labels)), labels)
    for tick in axes[0].get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in groups else "normal")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_parts(files: dict, folder: Path) -> dict[str, str]:
    """The plan's parts of data files: the first rows whose leaf has a prefix. {name: path}"""
    paths = {name: str(folder / f"{name}.jsonl") for name in files}
    for name, part in files.items():
        rows = [row for row in read_each(ROOT / part["of"], dict)
                if category(row, "").startswith(part.get("leaf", ""))]
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:part.get("rows")]]
        text = "".join(rows)
        write_atomic(ROOT / paths[name], lambda file: file.write(text.encode()))
    return paths


def main(argv=None):
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config", default="configs/compare.yaml", help="YAML file of the comparison")
    add("--rows", nargs="+", metavar="NAME", help="rows to run; default: all")
    add("--quick", action="store_true",
        help="nothing tuned, equal updates only, without the slowest rows")
    add("--processes", type=int, default=os.cpu_count(),
        help="runs at a time, each with one thread; default: one per core")
    add("--seeds", type=int, help="runs per row; default: that of the YAML")
    add("--updates", type=int, help="updates per run, a multiple of ten; default: that of the YAML")
    add("--seconds", type=lambda text: text if text == "slowest" else float(text),
        help="CPU seconds per run of the second comparison; slowest: those of the slowest row; "
             "0: no second comparison; default: that of the YAML")
    add("--out", help="folder of all files; default: that of the YAML, with --quick OUT_quick")
    args = parser.parse_args(argv)

    # 2. Plan
    with checking_input():
        plan = read(args.config)
        if args.quick:
            vars(plan).update(plan.quick, validate="", seconds=0, out=f"{plan.out}_quick")
        for name in ("seeds", "updates", "seconds", "out"):
            if vars(args)[name] is not None:
                setattr(plan, name, vars(args)[name])
        check_ranges(
            parser, Namespace(**vars(plan), processes=args.processes),
            ("processes", args.processes >= 1, "be 1 or more"),
            ("seeds", plan.seeds >= 1, "be 1 or more"),
            ("seconds", plan.seconds == "slowest" or plan.seconds >= 0, "be 0 or more"),
            ("updates", plan.updates > plan.begin and plan.updates % TEN == 0,
             f"be a multiple of {TEN} above {plan.begin}"))
        names = [row.name for row in plan.rows]
        for name in args.rows or []:
            if name not in names:
                near = did_you_mean(name, names)
                parser.error(f"--rows: {args.config} has no {name!r}; did you mean {near}?")
        wanted = [row for row in plan.rows if row.name in (args.rows or names)]
        plan.rows = [row for row in wanted if row.quick or not args.quick]
        check(args.config, plan)
        folder = Path(plan.out)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        values = plan.values | {"out": OUT} | write_parts(plan.files, folder)

    # 3. Run
    tries = len(candidates(plan.rows[0])) if plan.validate else 0
    measures = (2 if plan.seconds else 1) * (plan.seeds + len(plan.tests))
    n_jobs = (len(plan.rows) * ((plan.begin > 0) + tries + (tries > 0) + measures)
              + len(plan.references) * len(plan.tests))
    tuning = f"tuned in {tries} tries of {tune_steps(plan):,} updates" if tries else "nothing tuned"
    how = f"{plan.updates:,} updates, seeds: {plan.seeds}, {tuning}"
    if left_out := [row.name for row in wanted if row not in plan.rows]:
        how += f", left out: {', '.join(left_out)}"
    jobs = Jobs(folder, args.processes, n_jobs)

    def write(results):
        text = table(results, plan, how)
        write_atomic(ROOT / folder / "table.md", lambda file: file.write(text.encode()))
        write_atomic(ROOT / folder / "table.json",
                     lambda file: file.write(json.dumps(results, indent=2).encode()))
        draw(results, plan, ROOT / folder / "table.png")
        Logger(f"\n{text}\n{folder}/table.md, {folder}/table.png")

    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: background jobs ignore it
        signal.signal(number, signal.default_int_handler)
    try:
        with checking_input(), jobs:
            Comparison(plan, values, jobs).run(write)
    except KeyboardInterrupt:
        Logger(f"stopped after {jobs.n_done} of {n_jobs} runs. Resume with: {resume_command(1)}")
        sys.exit(130)


if __name__ == "__main__":
    main()
