"""
擂台：所有方法用同样的数据与起点，先比同样的更新步数，再比同样的 CPU 时间。
The arena: methods on the same data, from the same start, at equal updates and at equal CPU seconds.

    python scripts/compare.py --quick       one seed, nothing tuned, equal updates only
    python scripts/compare.py               everything; the same command resumes an interrupted run
    python scripts/compare.py --config configs/compare_reasoning.yaml --rows SFT SeqKD --seeds 5

configs/compare.yaml explains the keys. Seconds are CPU seconds of the updates, teacher included,
and of files made for the row alone, but not of start-up. The folder OUT gets table.md, table.json
and table.png, a line per run in trials.jsonl, and the runs' files and logs in trials/.
"""

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
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from fnmatch import filter as matching
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # run as a script, Python looks for modules in scripts/ only

import yaml

from dataset.formats import category, read_each
from evaluation.tables import markdown, mean_and_spread
from runtime.args import (RANGES, check_values, checking_input, did_you_mean, make_parser,
                          resume_command)
from runtime.files import file_sha256, read_rows, write_json, write_jsonl, write_text
from runtime.log import Logger
from runtime.pictures import new_figure, save_picture

OUT = "<out>"               # in a command: the folder of its own that a run writes into
FIRST_SEED = 1337           # of the reported runs; candidates are tuned with the seed before it
TEN = 10                    # steps come in tens, so that stages and rounds can share them

# -- 1. The YAML file: its keys and their defaults; ... marks required ones ------------------------

PLAN = {"title": ..., "note": ..., "out": ..., "updates": ..., "seeds": ..., "values": ...,
        "tests": ..., "columns": ..., "rows": ..., "picture": ..., "beside": (), "references": (),
        "files": {}, "made": {}, "begin": 0, "validate": "", "tune_part": 0, "seconds": 0,
        "quick": {}}
MADE = {"command": ..., "writes": ...}
ROW = {"command": ..., "writes": ..., "tune": {}, "charge": (), "seeds": 0, "note": ""}
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
    plan = build(PLAN, yaml.safe_load(Path(path).read_text(encoding="utf-8")), path)
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
    for key in given.keys() - defaults.keys():
        near = did_you_mean(key, defaults)
        raise ValueError(f"{where}: unknown key {key!r}; did you mean {near}?")
    for key in defaults.keys() - given.keys():
        if defaults[key] is ...:
            raise ValueError(f"{where}: has no {key!r}")
    return Namespace(**defaults | given)


def candidates(row) -> list[dict]:
    """tune {a: [1, 2], b: [3, 4]} -> [{a: 1, b: 3}, {a: 1, b: 4}, {a: 2, b: 3}, {a: 2, b: 4}]"""
    return [dict(zip(row.tune, values)) for values in product(*row.tune.values())]


def placeholders(text: str, plan) -> set[str]:
    """The names that a command needs, through the values and made files that it names too."""
    texts = plan.values | {name: part.command for name, part in plan.made.items()}
    found, todo = set(), [text]
    while todo:
        names = {name for _, name, _, _ in string.Formatter().parse(todo.pop()) if name} - found
        found |= names
        todo += [str(texts[name]) for name in names & texts.keys()]
    return found


def filled(text: str, values: dict) -> str:
    """A command with its placeholders filled in, and those of their values."""
    for _ in range(10):
        text = text.format_map(values)
    return text


def check(path: str, plan):
    """All placeholders are known, all files exist, and each row takes the steps, samples and seed
    at which it is compared. Raises ValueError."""
    known = plan.values | dict.fromkeys([*plan.made, *plan.files, "out", "weights"], OUT) | {
        "steps": Number(TEN), "seed": Number(0)}
    commands = [(name, text, {}) for name, text in (plan.tests | {"val": plan.validate}).items()]
    for row in plan.rows:
        text = f"{row.command} {row.writes}"
        needed = placeholders(text, plan)
        commands += [(row.name, text, candidates(row)[0]),
                     *((name, plan.made[name].command, {}) for name in needed & plan.made.keys())]
        for word in ("steps", "seed", *plan.values.keys() & {"samples"}, *row.tune):
            if word not in needed:
                raise ValueError(f"{path}: {row.name}: its command does not take {{{word}}}")
    for name, text, tuned in commands:
        values = known | tuned
        for word in placeholders(text, plan) - values.keys():
            raise ValueError(f"{path}: {name}: unknown {{{word}}}; "
                             f"did you mean {did_you_mean(word, values)}?")
        for word in filled(text, values).split():
            is_file = Path(word).suffix in (".py", ".pth", ".json", ".jsonl", ".yaml")
            if is_file and OUT not in word and not (ROOT / word).exists():
                raise ValueError(f"{path}: {name}: no file at {word}; python quickstart.py makes "
                                 "data, teacher and start; docs/ has the commands of the others")


# -- 2. Runs, each of them once --------------------------------------------------------------------


class Jobs:
    """Runs commands, some at a time, each in a process of its own with one thread."""

    def __init__(self, folder, processes: int):
        self.folder, self.ledger = Path(folder), ROOT / folder / "trials.jsonl"
        fields = ("key", "name", "command", "made", "seconds", "peak_mb")
        self.records = {each["key"]: each for each in read_rows(self.ledger, *fields)}
        self.pool, self.lock, self.results = ThreadPoolExecutor(processes), Lock(), {}
        self.children, self.stopping = set(), False

    def stop(self):
        """Kills what runs, with the processes that it started; nothing new begins."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self.lock:
            self.stopping = True
            for child in self.children:
                with suppress(ProcessLookupError):          # it has just ended
                    os.killpg(child.pid, signal.SIGKILL)

    def run(self, name: str, command: str, makes: str) -> dict:
        """The line of trials.jsonl of a command that writes the file `makes`; any thread may call
        it. A finished command never runs again: its key is a checksum of itself and of the contents
        of the files that it names. Raises ValueError with the end of the log."""
        key = key_of(command)
        with self.lock:
            if key not in self.results:
                self.results[key] = self.pool.submit(self.record, key, name, command, makes)
        return self.results[key].result()

    def record(self, key: str, name: str, command: str, makes: str) -> dict:
        if key in self.records and (ROOT / self.records[key]["made"]).exists():
            return self.records[key]
        folder = self.folder / "trials" / f"{re.sub('[^a-z0-9.]+', '_', name.lower())}-{key}"
        made, log = makes.replace(OUT, str(folder)), ROOT / folder / "log.txt"
        status, used = self.execute(command.replace(OUT, str(folder)), log)
        if status or not (ROOT / made).exists():
            raise ValueError(f"{name} ended with status {status} and did not make {made}:\n"
                             f"{log.read_text(encoding='utf-8')[-2000:]}")
        for path in log.parent.rglob("*.resume*"):          # most of the disk space
            path.unlink()
        unit = 1 if sys.platform == "darwin" else 1024      # of ru_maxrss, in bytes
        record = {"key": key, "name": name, "command": command, "made": made,
                  "seconds": round(used.ru_utime + used.ru_stime, 2),
                  "peak_mb": round(used.ru_maxrss * unit / 2 ** 20)}
        Logger(f"{name}: {record['seconds']:.0f} s, {record['peak_mb']} MB")
        with self.lock, self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def execute(self, command: str, log: Path):
        """Its exit status, and the resources of this process alone. The log begins with it."""
        with self.lock:
            if self.stopping:
                raise KeyboardInterrupt
            shutil.rmtree(log.parent, ignore_errors=True)   # an interrupted run has too few seconds
            log.parent.mkdir(parents=True)
            log.write_text(f"python {command}\n", encoding="utf-8")
            with log.open("a", encoding="utf-8") as file:
                child = subprocess.Popen(
                    [sys.executable, *shlex.split(command)], cwd=ROOT, stdout=file, stderr=file,
                    env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
            self.children.add(child)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        with self.lock:
            self.children.remove(child)
        return child.returncode, used


def key_of(command: str) -> str:
    words = shlex.split(command)[1:]
    paths = {path for word in words for path in word.rpartition("=")[2].split(",")}
    contents = {path: file_sha256(ROOT / path) for path in sorted(paths) if (ROOT / path).is_file()}
    return hashlib.sha256(json.dumps([command, contents]).encode()).hexdigest()[:10]


def side_by_side(do, items) -> list:
    """[do(item), ...], a thread for each; the first error ends all."""
    pool = ThreadPoolExecutor(len(items))
    futures = [pool.submit(do, item) for item in items]
    for future in as_completed(futures):
        future.result()
    return [future.result() for future in futures]


# -- 3. The comparison -----------------------------------------------------------------------------


def steps_within(budget: float, charged: float, took: float, updates: int) -> int:
    """Updates that fit into `budget` seconds, in tens, at least ten, where `updates` of them `took`
    these seconds; the charged seconds are part of both. Raises ValueError."""
    if took <= charged:
        raise ValueError("the updates are too few to be timed: more --updates, or --seconds 0")
    return max(TEN, int((budget - charged) / (took - charged) * updates) // TEN * TEN)


class Comparison:
    """A plan, what fills in its commands, and the jobs that run them."""

    def __init__(self, plan, values: dict, jobs: Jobs):
        self.plan, self.values, self.jobs = plan, values, jobs

    def run(self, name: str, command: str, writes: str, values: dict) -> dict:
        """The record of a command, once the files that it needs are made."""
        needed = placeholders(command, self.plan) & self.plan.made.keys()
        values = self.values | {each: self.make(each, values)["made"] for each in needed} | values
        return self.jobs.run(name, filled(command, values), filled(writes, values))

    def make(self, name: str, values: dict) -> dict:
        """The record of a made file."""
        part = self.plan.made[name]
        return self.run(f"make {name}", part.command, part.writes, values)

    def train(self, phase: str, row, runs: list[dict], steps: int) -> list[dict]:
        """A record for each run (candidate and seed), with the seconds of what was made for it."""
        def one(values):
            values = values | {"steps": Number(steps)}
            record = self.run(f"{phase}, {row.name}", row.command, row.writes, values)
            charged = sum(self.make(name, values)["seconds"] for name in row.charge)
            return record | {"charged": charged}

        return side_by_side(one, runs)

    def scores(self, name: str, tests: dict[str, str], records: list[dict]) -> list[dict]:
        """{test: its scores} for the weights of each record."""
        weights = " ".join(f"{number}={record['made']}" for number, record in enumerate(records))
        path, found = f"{OUT}/scores.json", [{} for _ in records]
        for test, command in tests.items():
            done = self.run(name, f"{command} --json {path}", path, {"weights": weights})
            scores = json.loads((ROOT / done["made"]).read_text(encoding="utf-8"))
            for number, each in enumerate(found):
                each[test] = scores[str(number)][0]
        return found

    def prepare(self, row):
        """Sets the row's seconds to start, and its best candidate on the validation data: the
        highest exact match, then the lowest perplexity."""
        plan, tries = self.plan, candidates(row)
        runs = [each | {"seed": Number(FIRST_SEED - 1)} for each in tries]
        begun = self.train("begin", row, runs[:1], plan.begin) if plan.begin else []
        row.start_seconds, row.tuned = sum(each["seconds"] for each in begun), tries[0]
        if plan.validate:
            tried = self.train("tune", row, runs, plan.tune_steps)
            scores = self.scores(f"validate, {row.name}", {"val": plan.validate}, tried)
            ranks = [(val.get("exact_match"), -val["perplexity"])
                     for val in (each["val"] for each in scores)]
            row.tuned = tries[ranks.index(max(ranks))]

    def measure(self, phase: str, row, steps: int) -> list[dict]:
        """Steps, seconds, memory and scores for each seed."""
        runs = [row.tuned | {"seed": Number(FIRST_SEED + number)}
                for number in range(row.seeds)]
        trained = self.train(phase, row, runs, steps)
        scores = self.scores(f"test, {row.name}", self.plan.tests, trained)
        return [{"steps": steps, "peak_mb": record["peak_mb"], "charged": record["charged"],
                 "seconds": record["charged"] + record["seconds"] - row.start_seconds} | score
                for record, score in zip(trained, scores)]

    def references(self) -> dict[str, dict]:
        """Rows of the models that the others start or learn from, but for those of a seed."""
        needed = set().union(*(placeholders(row.command, self.plan) for row in self.plan.rows))
        found = {name: {"made": self.values[name]} for name in self.plan.references
                 if name not in self.plan.made}
        found |= {name: self.make(name, {}) for name, part in self.plan.made.items()
                  if name in needed and "seed" not in placeholders(part.command, self.plan)}
        return {name: {"group": "Reference models", "note": "", "tuned": {}, "updates": [
                    record | self.scores(f"test, {name}", self.plan.tests, [record])[0]]}
                for name, record in found.items() if record["made"].endswith(".pth")}

    def results(self):
        """Yields the content of table.json: at equal updates, then at equal seconds too."""
        plan = self.plan
        side_by_side(self.prepare, plan.rows)
        rows = self.references() | {row.name: {"group": row.group, "note": row.note,
                                               "tuned": row.tuned} for row in plan.rows}
        at_updates = side_by_side(lambda row: self.measure("updates", row, plan.updates), plan.rows)
        for row, seeds in zip(plan.rows, at_updates):
            rows[row.name]["updates"] = seeds
        yield {"updates": plan.updates, "seconds": None, "rows": rows}
        if not plan.seconds:
            return

        # The fastest seed of each row: other work of the machine only adds to it.
        fastest = [min(seeds, key=lambda seed: seed["seconds"]) for seeds in at_updates]
        budget = plan.seconds
        if budget == "slowest":
            budget = max(each["seconds"] for each in fastest)
        steps = [steps_within(budget, each["charged"], each["seconds"], plan.updates - plan.begin)
                 for each in fastest]
        at_seconds = side_by_side(lambda pair: self.measure("seconds", *pair),
                                  list(zip(plan.rows, steps)))
        for row, seeds in zip(plan.rows, at_seconds):
            rows[row.name]["seconds"] = seeds
        yield {"updates": plan.updates, "seconds": budget, "rows": rows}


# -- 4. Results ------------------------------------------------------------------------------------


def figures(results: dict, name: str, phase: str, column) -> list[float]:
    """A row's value in a column for each seed; [] if it was not measured."""
    def values(row):
        *keys, pattern = column.read.split()
        for scores in row.get(phase, []):
            for key in keys:
                scores = scores.get(key, {})
            if found := matching(scores, pattern):
                yield mean(scores[key] for key in found)

    rows = results["rows"]
    if not column.lost_since:
        return list(values(rows[name]))
    before = rows.get(column.lost_since, {})
    return [value - own for value, own in zip(values(before), values(rows[name]))
            if before["group"] == rows[name]["group"]]


def table(results: dict, plan, how: str) -> str:
    """Markdown: rows under their groups; the comparison at equal seconds on the right."""
    columns = [(title, "updates", column) for title, column in plan.columns.items()]
    if results["seconds"]:
        how += f"; then as many updates as fit into {results['seconds']:.0f} CPU seconds"
        columns += [(f"{title}, equal seconds", "seconds", column)
                    for title, column in plan.columns.items() if column.equal_seconds]
    lines, group = [["", *(title for title, *_ in columns), "with"]], None
    for name, row in results["rows"].items():
        if row["group"] != group:
            lines.append([f"**{(group := row['group'])}**"] + [""] * (len(columns) + 1))
        cells = [mean_and_spread(figures(results, name, phase, column), f"{{:{column.form}}}",
                                 column.spread) for _, phase, column in columns]
        tuned = ", ".join(f"{key} {value}" for key, value in row["tuned"].items())
        lines.append([name.replace("_", " "), *cells, tuned])
    notes = [f"- {name}: {row['note']}" for name, row in results["rows"].items() if row["note"]]
    return "\n".join([f"# {plan.title}\n\n{how}.\n",
                      markdown(lines, "l" + "r" * len(columns) + "l"),
                      f"\n{plan.note}\n", *notes]) + "\n"


def draw(results: dict, plan, path: Path):
    """A panel for each {title: column} of `picture`, also of the YAML files in `beside`."""
    found = [(plan, results)]
    for other in map(read, plan.beside):
        if (done := ROOT / other.out / "table.json").exists():
            found.append((other, json.loads(done.read_bytes())))
    panels = [(*each, *panel) for each in found for panel in each[0].picture.items()]
    figure = new_figure(5.4 * len(panels), 1.2 + 0.27 * max(len(each[0].rows) for each in found))
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw_panel(axis, *panel)
    save_picture(figure, path)


def draw_panel(axis, plan, results: dict, title: str, name: str):
    """Each row's mean, spread and seeds, at equal seconds if they were measured, and dotted
    references."""
    rows = [row for row in plan.rows if row.name in results["rows"]]
    groups, column = list(dict.fromkeys(row.group for row in rows)), plan.columns[name]
    phase, each = "updates", f"{results['updates']:,} updates each"
    if results["seconds"] and column.equal_seconds:
        phase, each = "seconds", f"{results['seconds']:.0f} CPU seconds each"
    for y, row in enumerate(rows):
        values, color = figures(results, row.name, phase, column), f"C{groups.index(row.group)}"
        axis.plot(values, [y] * len(values), ".", color=color, alpha=0.35)
        spread = stdev(values) if len(values) > 1 else 0.0
        axis.errorbar(mean(values), y, xerr=spread, fmt="o", color=color)
    for reference in plan.references:
        x, = figures(results, reference, "updates", column)
        axis.axvline(x, color="0.6", linestyle=":")
        axis.annotate(reference, (x, 1), xycoords=("data", "axes fraction"), ha="center")
    axis.set_title(f"{title}\n{each}", pad=16)
    axis.set(xlabel=name, ylim=(len(rows) - 0.5, -0.5))
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    if "KL" in name:
        axis.set_xscale("log")
        axis.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5], map(str, ticks))
        axis.minorticks_off()
    else:
        axis.set_xlim(0, 100)


def write_parts(files: dict, folder: Path) -> dict[str, str]:
    """The plan's parts of data files: the first rows whose leaf has a prefix. {name: path}"""
    for name, part in files.items():
        rows = [row for row in read_each(ROOT / part["of"], dict)
                if category(row, "").startswith(part.get("leaf", ""))]
        write_jsonl(ROOT / folder / f"{name}.jsonl", rows[:part.get("rows")])
    return {name: str(folder / f"{name}.jsonl") for name in files}


def main(argv=None):
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--config", default="configs/compare.yaml", help="YAML file of the comparison")
    add("--rows", nargs="+", metavar="NAME", help="rows to run; default: all")
    add("--quick", action="store_true",
        help="one seed, nothing tuned, equal updates only")
    add("--processes", type=int, default=os.cpu_count(),
        help="runs at a time, each with one thread; default: one per core")
    add("--seeds", type=int, help="runs per row; default: those of the YAML")
    add("--updates", type=int, help="updates per run, a multiple of ten; default: that of the YAML")
    add("--seconds", type=lambda text: text if text == "slowest" else float(text),
        help="CPU seconds per run of the second comparison; slowest: those of the slowest row; "
             "0: no second comparison; default: that of the YAML")
    add("--set", nargs="+", default=[], metavar="NAME=VALUE",
        help="values of the YAML to replace; give --out too")
    add("--out", help="folder of all files; default: that of the YAML, with --quick OUT_quick")
    args = parser.parse_args(argv)
    check_values(parser, args, RANGES | {"seeds": "[1, inf)"})

    # 2. Plan
    with checking_input():
        plan = read(args.config)
        if args.quick:
            vars(plan).update(plan.quick, validate="", seconds=0, out=f"{plan.out}_quick")
        vars(plan).update({name: value for name, value in vars(args).items()
                           if name in ("seeds", "updates", "seconds", "out") and value is not None})
        if plan.updates <= plan.begin or plan.updates % TEN:
            parser.error(f"--updates must be a multiple of {TEN} above {plan.begin}")
        names = [row.name for row in plan.rows]
        changes = dict(each.split("=", 1) for each in args.set)
        for name, known in (*((name, names) for name in args.rows or ()),
                            *((name, plan.values) for name in changes)):
            if name not in known:
                near = did_you_mean(name, known)
                parser.error(f"{args.config} has no {name!r}; did you mean {near}?")
        plan.values |= changes
        plan.rows = [row for row in plan.rows if row.name in (args.rows or names)]
        for row in plan.rows:
            row.seeds = not args.seeds and not args.quick and row.seeds or plan.seeds
        plan.tune_steps = max(TEN, round(plan.updates * plan.tune_part / TEN) * TEN)
        check(args.config, plan)
        folder = ROOT / plan.out
        folder.mkdir(parents=True, exist_ok=True)
        values = plan.values | {"out": OUT} | write_parts(plan.files, Path(plan.out))

    # 3. Run
    how = f"{plan.updates:,} updates, seeds: {plan.seeds}, "
    how += (f"tuned in {len(candidates(plan.rows[0]))} tries of {plan.tune_steps:,} updates"
            if plan.validate else "nothing tuned")
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: background jobs ignore it
        signal.signal(number, signal.default_int_handler)
    jobs = Jobs(plan.out, args.processes)
    try:
        with checking_input():
            for results in Comparison(plan, values, jobs).results():
                text = table(results, plan, how)
                write_text(folder / "table.md", text)
                write_json(folder / "table.json", results)
                draw(results, plan, folder / "table.png")
                Logger(f"\n{text}\n{plan.out}/table.md, {plan.out}/table.png")
    except KeyboardInterrupt:
        Logger(f"stopped. Resume with: {resume_command(1)}")
        sys.exit(130)
    finally:
        jobs.stop()


if __name__ == "__main__":
    main()
