"""
擂台：所有方法，同样的数据、同样的起点，先比同样的更新步数，再比同样的时间。
The arena: all methods on the same data, from the same start, first at equal updates, then at equal seconds.

    python scripts/compare.py --quick           one seed, nothing tuned, equal updates: six minutes on two idle cores
    python scripts/compare.py                   an hour of them; broken off, the same command goes on
    python scripts/compare.py --rows SFT "forward KL" --seeds 5

What is compared stands in configs/compare.yaml: a row is a command, and the values that may be tuned in it.

    begin      each row for 10 updates: whether its command is right, and what it takes to begin
    tune       the same number of candidates for each row, each once, on the validation data: the most exact matches, of equal
               ones the lowest perplexity
    updates    the best candidate, for the same number of updates, over the seeds; on the test data
    seconds    the same for so many updates as fit into --seconds of the processor

Seconds of a row are those of its updates and of what was made for it alone (answers, a student in between), the teacher's part
in both among them; not those that it takes to begin, such as importing torch, nor those in which the teacher learned.

    out/arena/table.md, table.json, arena.png       written after `updates` and again after `seconds`
    out/arena/trials.jsonl                          a line for each run: benchmarks/runs.py
"""

import argparse
import difflib
import json
import os
import signal
import statistics
import string
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

# Run as `python scripts/compare.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from benchmarks.runs import OUT, ROOT, Job, Jobs
from dataset.formats import read_each
from runtime.args import checking_input, resume_command
from runtime.files import write_atomic
from runtime.log import Logger

BEGIN = 10              # updates of the run that tells what it takes to begin; and steps come in tens
FIRST_SEED = 1337       # of those that are reported; the candidates have the one before it
UPDATE, ELSE = 0.03, 4.5        # seconds of an ordinary update, and of an evaluation or of beginning: for the time left
THERE = "What there is"
EVALUATE = "scripts/evaluate.py"
SECTIONS = ("setting", "words", "made", "rows")
SETTING = ("data", "val", "test", "teacher", "start", "samples", "updates", "tune_part", "seconds", "seeds", "quick")


class Steps(int):
    """Updates, of which a command may want a part: with 1000 of them {steps} is 1000, {steps:60-80} what lies between 60 and
    80 % of the way, 200. Parts that meet add up to the whole."""

    def __format__(self, part: str) -> str:
        if not part:
            return str(int(self))
        begin, end = (round(self * int(percent) / 100) for percent in part.split("-"))
        return str(end - begin)


@dataclass(frozen=True)
class Made:
    """What is made once, before the rows that name it as {NAME}."""

    name: str
    command: str
    writes: str
    existing: str | None = None         # a file that serves as well, if it is there


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    group: str
    command: str
    writes: str                         # the weights
    tune: dict = field(default_factory=dict)        # {placeholder: values}; of each the first is what is sensible untuned
    charge: tuple = ()                  # what was made for it alone
    quick: bool = True                  # whether --quick has it
    note: str = ""

    @property
    def candidates(self) -> list[dict]:
        """{a: [1, 2], b: [3, 4]} -> [{a: 1, b: 3}, {a: 1, b: 4}, {a: 2, b: 3}, {a: 2, b: 4}]"""
        return [dict(zip(self.tune, values)) for values in product(*self.tune.values())]


# -------------------------------------------------------------------------------------------------- reading the YAML


def read(path: str) -> tuple[dict, dict, dict[str, Made], list[Row]]:
    """(setting, words, made, rows) of a YAML. Raises ValueError, naming the file, the row and the way out."""
    if not Path(path).exists():
        raise ValueError(f"no config file at {path}")
    try:
        document = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    check_keys(path, document, SECTIONS, SECTIONS)
    setting = document["setting"]
    check_keys(f"{path}: setting", setting, SETTING, SETTING)
    made = {}
    for name, parts in document["made"].items():
        check_keys(f"{path}: made: {name}", parts, Made.__dataclass_fields__, ("command", "writes"))
        made[name] = Made(name, **parts)
        if later := placeholders(made[name].command, document["words"]) & (document["made"].keys() - (made.keys() - {name})):
            raise ValueError(f"{path}: made: {name} needs {', '.join(sorted(later))}; what it needs must stand above it")
    rows = []
    for group, of_group in document["rows"].items():
        for name, parts in of_group.items():
            check_keys(f"{path}: {name}", parts, Row.__dataclass_fields__, ("command", "writes", "tune"))
            rows.append(Row(name, group, **parts))
    counts = {row.name: len(row.candidates) for row in rows}
    if len(counts) < len(rows):
        raise ValueError(f"{path}: two rows have one name")
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {n}" for name, n in counts.items())
        raise ValueError(f"{path}: all rows must have the same number of candidates, or the comparison is not fair: {told}")
    return setting, document["words"], made, rows


def check_keys(where: str, parts: dict, known, needed=()):
    if not isinstance(parts, dict):
        raise ValueError(f"{where}: must hold lines like `name: value`")
    for key in parts:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
    for key in needed:
        if key not in parts:
            raise ValueError(f"{where}: has no {key!r}")


def placeholders(text: str, words: dict) -> set[str]:
    """The names that a command asks for, those within the words that it uses among them."""
    found, todo = set(), [text]
    while todo:
        names = {name for _, name, _, _ in string.Formatter().parse(todo.pop()) if name} - found
        found |= names
        todo += [words[name] for name in names if name in words]
    return found


def filled(text: str, values: dict) -> str:
    """A command with its placeholders filled in, and those that come with what is filled in."""
    for _ in range(10):
        if "{" not in text:
            return text
        text = text.format_map(values)
    raise ValueError(f"{text}: a word that fills in itself")


def needed(rows: list[Row], made: dict[str, Made], words: dict) -> dict[str, Made]:
    """Of all that can be made, what these rows need, in the order of the YAML."""
    names, todo = set(), [f"{row.command} {row.writes}" for row in rows]
    while todo:
        new = (placeholders(todo.pop(), words) & made.keys()) - names
        names |= new
        todo += [made[name].command for name in new]
    return {name: made[name] for name in made if name in names}


def check(path: str, values: dict, words: dict, made: dict[str, Made], rows: list[Row]):
    """That each command can be filled in and its files are there, and that each row takes the steps, samples and seed that it
    is given. Raises ValueError."""
    known = {**values, **words, **{name: f"{OUT}/{name}" for name in made}}
    for part in (*made.values(), *rows):
        where, names = f"{path}: {part.name}", placeholders(f"{part.command} {part.writes}", words)
        own = known | ({"steps": Steps(BEGIN), "seed": 0} | part.candidates[0] if isinstance(part, Row) else {})
        for name in names - own.keys():
            nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: {{{name}}} is not known; did you mean {{{nearest}}}?")
        if isinstance(part, Row):
            for name in ("steps", "samples", "seed", *part.tune):
                if name not in names:
                    raise ValueError(f"{where}: its command does not take {{{name}}}, so that it would not be compared as told")
            for name in part.charge:
                if name not in made or made[name].existing:
                    raise ValueError(f"{where}: charge: {name!r} is nothing that is made here for its command")
        for word in filled(part.command, own).split():
            is_file = Path(word).suffix in (".py", ".pth", ".json", ".jsonl", ".yaml") and OUT not in word
            if is_file and not (ROOT / word).exists():
                raise ValueError(f"{where}: no file at {word}; bash quickstart.sh makes the embedded data, the teacher and the "
                                 "start, of other files the README tells")


# ------------------------------------------------------------------------------------------------------- arithmetic


def counted(charged: float, seconds: float, begin: float) -> float:
    """A row's seconds: what was made for it alone, and a run less what it takes to begin."""
    return charged + seconds - begin


def pace_of(took: float, charged: float, updates: int) -> float:
    """Seconds an update, of a row's seconds at equal updates; ten of them are within what it takes to begin. Raises ValueError
    where they cannot be told from it."""
    if took <= charged:
        raise ValueError(f"{updates} updates take no longer than {BEGIN}, so that nothing can be said of equal seconds: more "
                         "--updates, or --seconds 0")
    return (took - charged) / (updates - BEGIN)


def steps_within(budget: float, charged: float, pace: float) -> int:
    """The updates that fit into so many seconds, in tens, at least ten: what was made for the row comes first, the rest is
    divided by its pace."""
    return max(BEGIN, int((budget - charged) / pace) // BEGIN * BEGIN)


def in_tens(steps: float) -> int:
    return max(BEGIN, round(steps / BEGIN) * BEGIN)


def best(scores: list[dict]) -> int:
    """The candidate of the most exact matches; of equal ones, that of the lowest perplexity."""
    return max(range(len(scores)), key=lambda i: (scores[i]["exact_match"], -scores[i]["perplexity"]))


# ------------------------------------------------------------------------------------------------------------- runs


class Arena:
    """The rows, and what their commands are filled in with. Each method is what is done of one row; `of_each` does it for all of
    them, side by side."""

    def __init__(self, args, values: dict, made: dict[str, Made], rows: list[Row], jobs: Jobs):
        self.args, self.values, self.made, self.rows, self.jobs = args, values, made, rows, jobs
        self.seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
        self.making, self.begin, self.chosen = {}, {}, {}       # seconds of what is made; of a row's begin; its best candidate

    def of_each(self, do) -> dict:
        """{name of a row: do(row)}. A thread for each row, which mostly waits for its runs; the first error ends all."""
        pool = ThreadPoolExecutor(len(self.rows))
        longest_first = sorted(self.rows, key=lambda row: -self.begin.get(row.name, 0.0))       # no core waits for it at the end
        found = {row.name: pool.submit(do, row) for row in longest_first}
        for future in as_completed(found.values()):
            future.result()
        return {row.name: found[row.name].result() for row in self.rows}

    def fill(self, text: str, values: dict) -> str:
        """A command with its placeholders filled in. What it needs is made first."""
        for name in placeholders(text, self.args.words) & (self.made.keys() - self.values.keys()):
            part = self.made[name]
            record, = self.jobs.run([Job(f"make {name}", self.fill(part.command, {}), filled(part.writes, self.values),
                                         ELSE + UPDATE * self.args.updates)])
            self.values[name], self.making[name] = record["made"], record["seconds"]
        return filled(text, self.values | values)

    def train(self, phase: str, row: Row, runs: list[tuple[dict, int, int]]) -> list[dict]:
        """[(values of its tuning, steps, seed), ...] -> a record of each"""
        jobs = []
        for tuned, steps, seed in runs:
            values = tuned | {"steps": Steps(steps), "seed": seed}
            seconds = self.args.seconds if phase == "seconds" and self.args.seconds else UPDATE * steps
            jobs.append(Job(f"{phase}, {row.name}", self.fill(row.command, values), filled(row.writes, self.values),
                            ELSE + seconds))
        return self.jobs.run(jobs)

    def scores(self, name: str, weights: list[str], data: str) -> list[dict]:
        """What scripts/evaluate.py says of each of the weights."""
        numbered = " ".join(f"{number}={path}" for number, path in enumerate(weights))
        record, = self.jobs.run([Job(name, f"{EVALUATE} --weights {numbered} --data {data} --reference "
                                     f"{self.values['teacher']} --json {OUT}/scores.json", f"{OUT}/scores.json", ELSE)])
        found = json.loads((ROOT / record["made"]).read_text())
        return [found[str(number)][0] for number in range(len(weights))]

    def charged(self, row: Row) -> float:
        return sum(self.making[name] for name in row.charge)

    def models(self) -> dict[str, str]:
        """{name: weights} of all that the rows learn from and start from."""
        named = {"teacher", "start"}.union(*(placeholders(row.command, self.args.words) for row in self.rows))
        return {name: path for name, path in self.values.items()
                if name in named - self.args.words.keys() and str(path).endswith(".pth")}

    def prepare(self, row: Row):
        """Make what it needs, see what it takes to begin, and tune it on the validation data."""
        begun, = self.train("begin", row, [(row.candidates[0], BEGIN, FIRST_SEED - 1)])
        self.begin[row.name], self.chosen[row.name] = begun["seconds"], row.candidates[0]
        if not self.args.quick:
            steps = in_tens(self.args.updates * self.args.tune_part)
            tried = self.train("tune", row, [(tuned, steps, FIRST_SEED - 1) for tuned in row.candidates])
            scores = self.scores(f"validate, {row.name}", [record["made"] for record in tried], self.values["val"])
            self.chosen[row.name] = row.candidates[best(scores)]

    def measure(self, phase: str, row: Row, steps: int) -> list[dict]:
        """Train it with each seed, and test it: scores, steps, seconds and memory of each."""
        trained = self.train(phase, row, [(self.chosen[row.name], steps, seed) for seed in self.seeds])
        scores = self.scores(f"test, {row.name}", [record["made"] for record in trained], " ".join(self.values["test"]))
        return [score | {"steps": steps, "peak_mb": record["peak_mb"],
                         "seconds": counted(self.charged(row), record["seconds"], self.begin[row.name])}
                for record, score in zip(trained, scores)]


def run(arena: Arena, args):
    """All phases; what table.json holds is written after each of the last two."""
    arena.of_each(arena.prepare)

    told = {"updates": args.updates, "seconds": None, "rows": {}}
    for name, path in arena.models().items():
        score, = arena.scores(f"test, {name}", [path], " ".join(arena.values["test"]))
        making = {"seconds": arena.making[name]} if name in arena.making else {}
        told["rows"][name.replace("_", " ")] = {"group": THERE, "note": "", "tuned": {}, "updates": [score | making]}
    at_updates = arena.of_each(lambda row: arena.measure("updates", row, args.updates))
    told["rows"] |= {row.name: {"group": row.group, "note": row.note, "tuned": arena.chosen[row.name],
                                "updates": at_updates[row.name]} for row in arena.rows}
    write(told, args)
    if args.quick or args.seconds == 0:
        return

    # Of its seeds the quickest: what else the machine does only adds to it.
    took = {name: min(seed["seconds"] for seed in seeds) for name, seeds in at_updates.items()}
    told["seconds"] = args.seconds or max(took.values())

    def as_long(row):
        charged = arena.charged(row)
        pace = pace_of(took[row.name], charged, args.updates)
        return arena.measure("seconds", row, steps_within(told["seconds"], charged, pace))

    for name, seeds in arena.of_each(as_long).items():
        told["rows"][name]["seconds"] = seeds
    write(told, args)


def split_by_leaf(paths: dict[str, str], folder: Path) -> dict[str, str]:
    """Writes general and specialist rows of each file into files of their own: {NAME_general: path, NAME_specialist: path}."""
    written = {}
    for name, path in paths.items():
        rows = list(read_each(ROOT / path, dict))
        for side in ("general", "specialist"):
            written[f"{name}_{side}"] = str(folder / f"{name}_{side}.jsonl")
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["leaf"].startswith(f"{side}/"))
            write_atomic(ROOT / written[f"{name}_{side}"], lambda file: file.write(text.encode()))
    return written


# ----------------------------------------------------------------------------------------------------------- results


# Title -> (key of a seed's figures, how to print it).
AT_UPDATES = {"parameters": ("parameters", "{:,.0f}"), "exact match %": ("exact_match", "{:.1f}"),
              "multiple choice %": ("multiple_choice", "{:.1f}"), "agreement %": ("agreement", "{:.1f}"), "KL": ("kl", "{:.3f}"),
              "habits KL": ("habits_kl", "{:.3f}"), "seconds": ("seconds", "{:.0f}"), "MB": ("peak_mb", "{:.0f}")}
AT_SECONDS = {"updates": ("steps", "{:,.0f}"), "exact match %": ("exact_match", "{:.1f}"), "KL": ("kl", "{:.3f}"),
              "habits KL": ("habits_kl", "{:.3f}"), "seconds": ("seconds", "{:.0f}")}
WITHOUT_SPREAD = ("parameters", "steps", "seconds", "peak_mb")


def cell(seeds: list[dict], key: str, form: str) -> str:
    """'69.0 ± 2.4' over several seeds (sample standard deviation), '69.0' of one; '' if it was not measured."""
    values = [seed[key] for seed in seeds if key in seed]
    if not values:
        return ""
    mean = form.format(statistics.mean(values)).replace("-0.000", "0.000")          # a KL of rounding errors
    return mean if len(values) == 1 or key in WITHOUT_SPREAD else f"{mean} ± {form.format(statistics.stdev(values))}"


def table(told: dict, args) -> str:
    """Markdown: rows under the heading of their group; on the right, if it was measured, what equal seconds gave."""
    more = AT_SECONDS if told["seconds"] else {}
    titles = [*AT_UPDATES, *(f"{title}, equal seconds" for title in more), "with"]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1) + "---|"]
    group = None
    for name, row in told["rows"].items():
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| **{group}** |" + " |" * len(titles))
        cells = [cell(row["updates"], *column) for column in AT_UPDATES.values()]
        cells += [cell(row.get("seconds", []), *column) for column in more.values()]
        cells.append(", ".join(f"{key} {value}" for key, value in row["tuned"].items()))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    notes = [f"- {name}: {row['note']}" for name, row in told["rows"].items() if row["note"]]
    head = (f"{told['updates']:,} updates of {args.samples} samples, {args.seeds} seed{'s' * (args.seeds > 1)}, "
            + ("nothing tuned" if args.quick else f"tuned on {args.val} in {args.n_candidates} tries of "
               f"{in_tens(args.updates * args.tune_part):,} updates each")
            + (f"; then as many updates as fit into {told['seconds']:.0f} seconds of the processor" if told["seconds"] else ""))
    key = ("Mean ± standard deviation over the seeds, which decide the order of the rows and what is drawn; of the test data. "
           "Agreement, KL: with the teacher; habits KL: KL(truth || model); both KL in nats. Seconds, of the processor: of the "
           "updates, the teacher's part among them, and of what was made for the row alone; they mean something only where "
           "nothing else kept the machine busy. MB: the most that a process held.")
    left_out = [f"Left out of --quick: {', '.join(args.left_out)}."] if args.left_out else []
    return "\n".join([f"# The arena\n\n{head}.\n", *lines, f"\n{key}", *[f"\n{line}" for line in left_out], "", *notes]) + "\n"


def draw(told: dict, path: Path):
    """A point per row with its spread and its seeds, under the heading of its group; a panel for each of the two measures."""
    from matplotlib.figure import Figure

    panels = {"updates": f"{told['updates']:,} updates each"}
    if told["seconds"]:
        panels["seconds"] = f"{told['seconds']:.0f} seconds of the processor each"
    places, labels, headings, place, group = {}, {}, {}, 0.0, None
    lines = {name: row for name, row in told["rows"].items() if row["group"] != THERE}
    for name, row in lines.items():
        if row["group"] != group:
            group = row["group"]
            headings[place] = group
            place += 1.0
        places[name], labels[place] = place, name
        place += 1.0

    figure = Figure(figsize=(4.2 + 3.6 * len(panels), 1.2 + 0.27 * place), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
    groups = list(headings.values())
    for axis, (measure, title) in zip(axes, panels.items()):
        for name, row in lines.items():
            values, color = [seed["exact_match"] for seed in row[measure]], f"C{groups.index(row['group'])}"
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.plot(values, [places[name]] * len(values), ".", color=color, alpha=0.35)
            axis.errorbar(statistics.mean(values), places[name], xerr=spread, fmt="o", color=color, capsize=3)
        for name in ("teacher", "start"):
            value = told["rows"][name]["updates"][0]["exact_match"]
            axis.axvline(value, color="0.6", linestyle=":")
            axis.annotate(f"the {name}", (value, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                          color="0.4", fontsize=8, ha="center", va="bottom")
        for y in places.values():
            axis.axhline(y, color="0.93", linewidth=0.8, zorder=0)
        axis.set_title(title, pad=16)
        axis.set(xlabel="exact match on the test data, %", xlim=(0, 100), ylim=(place - 0.5, -0.7))
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks([*labels, *headings], [*labels.values(), *headings.values()])
    for tick in axes[0].get_yticklabels()[len(labels):]:
        tick.set_fontweight("bold")
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write(told: dict, args):
    """table.md, table.json and the picture."""
    out, text = ROOT / args.out, table(told, args)
    write_atomic(out / "table.md", lambda file: file.write(text.encode()))
    write_atomic(out / "table.json", lambda file: file.write(json.dumps(told, indent=2).encode()))
    draw(told, out / "arena.png")
    Logger(f"\n{text}\n{args.out}/table.md, {args.out}/arena.png")


def main(argv=None):
    # 1. Arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs/compare.yaml", help="YAML of the rows")
    add("--rows", nargs="+", default=None, metavar="NAME", help="only these rows of it; default: all")
    add("--quick", action="store_true", help="one seed, nothing tuned, equal updates alone, without the slowest rows")
    add("--processes", type=int, default=os.cpu_count(), help="runs at once, each with one thread; default: one for each core")
    add("--seeds", type=int, default=None, help="of each row: mean and spread; default: the YAML's, as of the next three")
    add("--updates", type=int, default=None, help="of each run at equal updates, in tens")
    add("--seconds", type=float, default=None, help="of the processor, of each run at equal seconds; of the YAML null: what the "
                                                    "slowest row takes; 0: no such runs")
    add("--out", default=None, help="folder for all files; default: out/arena, with --quick out/arena_quick")
    args = parser.parse_args(argv)

    # 2. What is compared
    with checking_input():
        setting, args.words, made, rows = read(args.config)
        setting |= setting["quick"] if args.quick else {}
        for name in ("seeds", "updates", "seconds"):
            if vars(args)[name] is None:
                setattr(args, name, setting[name])
        args.out = args.out or ("out/arena_quick" if args.quick else "out/arena")
        args.samples, args.val, args.tune_part, args.n_candidates = (
            setting["samples"], setting["val"], setting["tune_part"], len(rows[0].candidates))
        for name, least in (("processes", 1), ("seeds", 1), ("updates", 2 * BEGIN), ("seconds", 0)):
            if vars(args)[name] is not None and vars(args)[name] < least:
                parser.error(f"--{name} {vars(args)[name]} must be {least} or more")
        if args.updates % BEGIN:
            parser.error(f"--updates {args.updates} must be a multiple of {BEGIN}, which stages and rounds can share out")
        for name in args.rows or []:
            if name not in (names := [row.name for row in rows]):
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                parser.error(f"--rows: {args.config} has no {name!r}; did you mean {nearest!r}? It has {'; '.join(names)}")
        rows = [row for row in rows if row.name in (args.rows or [row.name])]
        args.left_out = [row.name for row in rows if args.quick and not row.quick]
        rows = [row for row in rows if row.name not in args.left_out]
        if args.left_out:
            Logger(f"left out of --quick: {', '.join(args.left_out)}")

        values = {name: setting[name] for name in ("data", "val", "test", "teacher", "start", "samples")} | {"out": OUT}
        made, folder = needed(rows, made, args.words), Path(args.out)
        for part in list(made.values()):
            if part.existing and (ROOT / part.existing).exists():
                values[part.name] = made.pop(part.name).existing
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        for path in (values["data"], values["val"], *values["test"], values["teacher"], values["start"]):
            if not (ROOT / path).exists():
                raise ValueError(f"no file at {path}; bash quickstart.sh makes it")
        if any("_general}" in row.command for row in rows):
            values |= split_by_leaf({name: values[name] for name in ("data", "val")}, folder)
        values |= args.words
        check(args.config, values, args.words, made, rows)

    # 3. Run
    tries, measures = (0, 1) if args.quick else (args.n_candidates, 1 + (args.seconds != 0))
    trainings = len(rows) * (1 + tries + measures * args.seeds) + len(made)
    evaluations = len(rows) * (measures + (tries > 0)) + 2
    each = [UPDATE * args.updates] + (measures - 1) * [args.seconds or UPDATE * args.updates]
    work = (trainings + evaluations) * ELSE + len(made) * each[0] + len(rows) * (
        tries * args.tune_part * each[0] + args.seeds * sum(each))
    jobs = Jobs(folder, args.processes, trainings + evaluations, work)
    for number in (signal.SIGINT, signal.SIGTERM):          # the first too: a shell lets its jobs in the background ignore it
        signal.signal(number, signal.default_int_handler)
    try:
        with checking_input(), jobs:
            run(Arena(args, values, made, rows, jobs), args)
    except KeyboardInterrupt:
        Logger(f"stopped; {jobs.n_done} of {jobs.n_jobs} runs are done and stay. Go on with: {resume_command(1)}")
        sys.exit(130)


if __name__ == "__main__":
    main()
