"""
擂台的规律：每行同样多的候选、更新与样本；时间怎么算；做完的不再做；错误先报。
Laws of the arena: the same number of candidates, updates and samples for each row; how seconds are
counted; finished runs never run again; mistakes are reported first. Scripts of three lines stand
for those that train and evaluate.
"""

import json
import os
import resource
import runpy
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace

import pytest
import yaml
from helpers_docs import ROWS
from helpers_run import ROOT
from matplotlib.axes import Axes

import runtime.args
import scripts.compare as compare
from scripts.compare import (FIRST_SEED, OUT, Jobs, Number, candidates, filled, key_of,
                             placeholders, steps_within)
from scripts.score_ability_tree import right_answer, share_right

TRAIN = """
import json, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
end = float(flags["--slow"]) * int(flags["--steps"]) / 1000
while time.process_time() < end: pass
if flags["--rate"] == "0": sys.exit("a rate of 0 is refused")
open(flags["--out"], "w").write(json.dumps(flags))
"""
EVALUATE = """
import json, sys
flags = sys.argv[1:]
weights, data, path = (flags.index(name) for name in ("--weights", "--data", "--json"))
def score(path):
    read = json.load(open(path))
    rate, seed = float(read["--rate"]), int(read.get("--seed", 0))
    return {"exact_match": 50.0 if rate in (2, 3) else 10.0, "perplexity": rate,
            "leaves": {"a/x": seed, "a/y": seed + 2, "b": 9}}
pairs = [word.partition("=") for word in flags[weights + 1:data]]
json.dump({name: [score(path)] for name, _, path in pairs}, open(flags[path + 1], "w"))
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """A comparison of two rows, the second of which needs an answer file and is twice as slow."""
    for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE),
                       ("start.pth", '{"--rate": 1}'),
                       ("data.jsonl", '{"leaf": "a/x"}\n{"leaf": "b"}\n{"leaf": "a/y"}\n')):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compare, "draw", lambda results, plan, path: None)
    score = f"{tmp_path}/evaluate.py --weights {{weights}} --data {{data}}"
    return {
        "title": "Two rows", "note": "A note.", "out": str(tmp_path / "out"), "updates": 100,
        "seeds": 2, "begin": 10, "tune_part": 0.5, "seconds": 0.45,
        "quick": {"updates": 20, "seeds": 1}, "references": ["start"], "picture": {"Exact": "exact"},
        "values": {"data": f"{tmp_path}/data.jsonl", "start": f"{tmp_path}/start.pth",
                   "samples": 24,
                   "learn": f"{tmp_path}/train.py --start {{start}} --data {{data}} --steps {{steps}}"
                            " --samples {samples} --seed {seed} --rate {rate} --out {model}",
                   "model": "{out}/model.pth"},
        "validate": score, "tests": {"test": score},
        "columns": {"exact": {"read": "test exact_match", "equal_seconds": True},
                    "a": {"read": "test leaves a/*"},
                    "lost": {"read": "test leaves a/*", "lost_since": "SKD"},
                    "seconds": {"read": "seconds", "form": ".0f", "spread": False}},
        "made": {"answers": {"command": f"{tmp_path}/train.py --slow 15 --steps 10 --rate 1 "
                                        "--out {out}/answers.jsonl",
                             "writes": "{out}/answers.jsonl"}},
        "rows": {"Text": {"SFT": {"command": "{learn} --slow 1.5", "writes": "{model}",
                                  "tune": {"rate": [1, 2, 3]}}},
                 "Teacher": {"SKD": {"command": "{learn} --slow 3 --from {answers}",
                                     "writes": "{model}", "tune": {"rate": [1, 3, 2]},
                                     "charge": ["answers"], "note": "on answers"}}},
    }


def arena(config, folder, *flags):
    """Run the comparison, and return its table.json."""
    (folder / "arena.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    compare.main(["--config", str(folder / "arena.yaml"), "--out", str(folder / "out"),
                  "--processes", "2", *flags])
    return json.loads((folder / "out/table.json").read_text())


def trials(folder) -> list[dict]:
    return [json.loads(line) for line in open(folder / "out/trials.jsonl")]


# -- arithmetic


def test_adjoining_parts_add_up_to_the_whole():
    steps = Number(1000)
    assert f"{steps} = {steps:0-60} + {steps:60-80} + {steps:80-100}; {Number(1337):+2}" == "1000 = 600 + 200 + 200; 1339"
    for steps in (10, 370, 999):
        parts = "0-62.5", "62.5-84.375", "84.375-100"
        assert sum(int(f"{Number(steps):{part}}") for part in parts) == steps


def test_a_row_takes_as_many_updates_as_fit_after_its_made_files():
    # 30 s for 1000 updates
    assert steps_within(35.0, charged=5.0, took=35.0, updates=1000) == 1000
    assert steps_within(35.0, charged=0.0, took=30.0, updates=1000) == 1160     # 1166.7, in tens
    # more than its time is charged
    assert steps_within(35.0, charged=50.0, took=80.0, updates=1000) == 10
    with pytest.raises(ValueError, match="more --updates"):
        steps_within(35.0, charged=5.0, took=4.9, updates=20)


def test_candidates_are_all_combinations():
    assert candidates(Namespace(tune={"a": [1, 2], "b": [3, 4]})) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


# -- the arena


def test_all_rows_get_the_same_and_finished_runs_never_run_again(config, tmp_path):
    config["files"] = {"part": {"of": config["values"]["data"], "leaf": "a/", "rows": 1}}
    results = arena(config, tmp_path)
    first = trials(tmp_path)
    sft, skd = results["rows"]["SFT"], results["rows"]["SKD"]
    # Rates 2 and 3 have the same exact match, 2 the lower perplexity; 3 candidates of 50 updates
    # for each row.
    assert sft["tuned"] == skd["tuned"] == {"rate": 2}
    for name in ("SFT", "SKD"):
        tune, updates = ([each["command"] for each in first if each["name"] == f"{phase}, {name}"]
                         for phase in ("tune", "updates"))
        assert len(tune) == 3
        assert all("--steps 50 " in each and "--seed 1336 " in each for each in tune)
        assert sorted(each.split("--seed ")[1].split()[0] for each in updates) == ["1337", "1338"]
        assert all("--steps 100 " in each and "--samples 24 " in each for each in updates)
    assert [seed["steps"] for seed in sft["updates"]] == [100, 100]
    assert sft["updates"][0]["test"]["exact_match"] == 50
    # Half as fast, and with 0.15 of 0.45 s spent on its answers: a third of the updates, or what a
    # busy machine makes of that.
    assert skd["seconds"][0]["steps"] < 0.7 * sft["seconds"][0]["steps"]
    assert skd["updates"][0]["seconds"] > 0.3

    text = " ".join((tmp_path / "out/table.md").read_text().split())
    # The mean of the leaves a/x and a/y is the seed plus 1; SKD loses nothing against itself, SFT
    # is of another group.
    assert "| **Teacher** |" in text and "| SKD | 50.0 ± 0.0 | 1338.5 ± 0.7 | 0.0 ± 0.0 |" in text
    assert "| SFT | 50.0 ± 0.0 | 1338.5 ± 0.7 | |" in text and "- SKD: on answers" in text
    assert (tmp_path / "out/part.jsonl").read_text() == '{"leaf": "a/x"}\n'

    assert arena(config, tmp_path) == results and trials(tmp_path) == first


def test_quick_runs_the_wanted_rows_untuned_and_makes_a_file_of_a_seed_for_each_seed(config, tmp_path):
    config["made"]["answers"]["command"] += " --seed {seed:+1}"
    results = arena(config, tmp_path, "--quick", "--rows", "SKD", "--seeds", "2")
    assert results["rows"].keys() == {"start", "SKD"} and results["rows"]["SKD"]["tuned"] == {"rate": 1}
    assert results["updates"] == 20 and results["seconds"] is None
    names = [each["name"] for each in trials(tmp_path)]
    assert {name.partition(",")[0] for name in names} == {"begin", "updates", "test", "make answers"}
    assert not any("SFT" in name for name in names)
    made = [each["command"].split("--seed ")[1] for each in trials(tmp_path)
            if each["name"] == "make answers"]
    assert sorted(made) == ["1337", "1338", "1339"]                 # of `begin`, and of two seeds


def test_a_main_row_has_more_seeds_unless_the_command_says_how_many(config, tmp_path):
    config |= {"seconds": 0, "validate": ""}
    config["rows"]["Text"]["SFT"]["seeds"] = 3
    rows = arena(config, tmp_path)["rows"]
    assert [len(rows[name]["updates"]) for name in ("SFT", "SKD")] == [3, 2]
    rows = arena(config, tmp_path, "--seeds", "1")["rows"]
    assert [len(rows[name]["updates"]) for name in ("SFT", "SKD")] == [1, 1]


def test_a_reference_can_be_a_made_file(config, tmp_path):
    start = {"command": f"{tmp_path}/train.py --slow 0 --steps 10 --rate 2 --out {{out}}/start.pth",
             "writes": "{out}/start.pth"}
    config |= {"made": config["made"] | {"start": start}}
    del config["values"]["start"]
    found = arena(config, tmp_path, "--quick", "--rows", "SFT")["rows"]["start"]
    assert found["group"] == "Reference models"
    assert found["updates"][0]["test"]["exact_match"] == 50


def test_a_value_of_the_plan_can_be_set(config, tmp_path):
    config |= {"seconds": 0, "validate": ""}
    config["values"]["samples"] = 24
    arena(config, tmp_path, "--set", "samples=12", "--rows", "SFT")
    assert all("--samples 12 " in each["command"] for each in trials(tmp_path) if "SFT" in each["name"]
               and "test" not in each["name"])


def test_a_run_that_fails_ends_the_arena_with_the_end_of_its_log(config, tmp_path):
    config |= {"begin": 0, "made": {}}
    config["rows"].pop("Teacher")
    config["rows"]["Text"]["SFT"]["tune"]["rate"] = [0]
    with pytest.raises(SystemExit) as ended:
        arena(config, tmp_path)
    for part in ("tune, SFT ended with status 1", f"python {tmp_path}/train.py", "of 0 is refused"):
        assert part in str(ended.value)


def test_a_mistake_is_reported_before_anything_runs(config, tmp_path, capsys):
    def with_row(name, **changed):
        rows = {group: dict(rows) for group, rows in config["rows"].items()}
        group = next(group for group in rows if name in rows[group])
        rows[group][name] = rows[group][name] | changed
        return config | {"rows": rows}

    def with_learn(text):
        return config | {"values": config["values"] | {"learn": text}}

    sft, learn = config["rows"]["Text"]["SFT"], config["values"]["learn"]
    for wrong, reason in (
            (with_row("SFT", tune={"rate": [1, 2]}), "same number of candidates.*'SFT': 2, 'SKD': 3"),
            (with_row("SFT", tuned={}), "SFT: unknown key 'tuned'; did you mean 'tune'"),
            ({key: config[key] for key in config if key != "seeds"}, "has no 'seeds'"),
            (config | {"rows": {"Text": {"SFT": sft}, "Teacher": {"SFT": sft}}},
             "two rows have the same name"),
            (with_learn(f"{learn} {{sample}}"), r"unknown \{sample\}; did you mean 'samples'"),
            (with_learn(learn.replace("{seed}", "1")), r"SFT: .*not take \{seed\}"),
            (with_row("SKD", command="{learn} --from {answers} out/no.pth"),
             "SKD: no file at out/no.pth; python quickstart.py")):
        with pytest.raises(SystemExit, match=reason):
            arena(wrong, tmp_path)
    for flags, reason in (("--rows SDK", "has no 'SDK'; did you mean 'SKD'?"),
                          ("--updates 25", "must be a multiple of 10"),
                          ("--seeds 0", "--seeds 0 must be 1 or more"),
                          ("--seconds -1", "--seconds -1.0 must be 0 or more")):
        with pytest.raises(SystemExit):
            arena(config, tmp_path, *flags.split())
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out/trials.jsonl").exists()


def test_the_picture_has_a_point_for_each_row_in_each_panel_and_those_beside_it(
        config, tmp_path, monkeypatch):
    monkeypatch.undo()                                                  # the fixture draws nothing
    def seeds(*values):
        return [{"test": {"exact_match": value}} for value in values]

    row = {"updates": seeds(10.0, 20.0), "seconds": seeds(30.0)}
    results = {"updates": 100, "seconds": 5.0, "rows": {"teacher": {"updates": seeds(90.0)},
                                                        "SFT": row, "SeqKD": row}}
    rows = [Namespace(name=name, group="Text") for name in ("SFT", "SeqKD")]
    column = Namespace(read="test exact_match", lost_since="", equal_seconds=False)
    timed = Namespace(read="test exact_match", lost_since="", equal_seconds=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/table.json").write_text(json.dumps(
        {"updates": 9, "seconds": None, "rows": {"SFT": {"updates": seeds(7.0)},
                                                 "start": {"updates": seeds(1.0)}}}))
    (tmp_path / "beside.yaml").write_text(yaml.safe_dump(config))
    plan = Namespace(rows=rows, references=["teacher"], picture={"A": "exact", "B": "KL"},
                     columns={"exact": column, "KL": timed}, beside=[tmp_path / "beside.yaml"])
    points, errorbar = [], Axes.errorbar

    def noted(axis, x, y, **how):
        points.append((x, y, how["xerr"]))
        return errorbar(axis, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", noted)
    compare.draw(results, plan, tmp_path / "table.png")
    spread = 50 ** 0.5                                                          # of 10 and 20
    assert points == [(15, 0, pytest.approx(spread)), (15, 1, pytest.approx(spread)), (30, 0, 0),
                      (30, 1, 0), (7, 0, 0)]
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


# -- the runs


def script(folder, text, *args) -> tuple[str, str, str]:
    """A job that runs this text, which writes <out>/done."""
    (folder / "script.py").write_text(text)
    return "try", shlex.join([f"{folder}/script.py", f"{OUT}/done", *map(str, args)]), f"{OUT}/done"


def test_the_key_of_a_job_covers_its_command_and_the_contents_of_the_files_that_it_names(tmp_path):
    teacher, command = tmp_path / "teacher.pth", f"train.py 0={tmp_path}/teacher.pth,other"
    keys = [key_of(command)]
    teacher.write_text("a")
    keys += [key_of(command), key_of(f"{command} --seed 2")]
    teacher.write_text("b")
    assert len({*keys, key_of(command)}) == 4


def test_seconds_and_memory_are_those_of_the_child_alone(tmp_path):
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (64 << 20)
    burn = ("import sys, time\nheld = bytearray(int(sys.argv[2]))\n"
            "while time.process_time() < 0.3: pass\nopen(sys.argv[1], 'w')")
    jobs = Jobs(tmp_path / "out", 1)
    busy = jobs.run(*script(tmp_path, burn, size))
    idle = jobs.run(*script(tmp_path, burn.replace("0.3", "0"), 0))
    # not added up, though idle came later
    assert busy["seconds"] >= 0.3 and idle["seconds"] < busy["seconds"]
    assert size / 2 ** 20 <= busy["peak_mb"] <= size / 2 ** 20 + 40


def test_ctrl_c_ends_the_children_and_an_interrupted_job_is_not_done(tmp_path, config):
    """A row's script starts another and waits: both end, and the second row never begins."""
    wait = ("import os, subprocess, sys, time\n"
            "other = subprocess.Popen(['sleep', '60'])\n"
            "open(sys.argv[-1], 'w').write(f'{os.getpid()} {other.pid}')\ntime.sleep(60)")
    (tmp_path / "train.py").write_text(wait)
    config |= {"begin": 0, "made": {}}
    config["rows"]["Text"]["SFT"]["command"] = "{learn}"
    config["rows"]["Teacher"]["SKD"].update(command="{learn}", charge=[])

    def press():
        while not (pids := "".join(path.read_text() for path
                                   in tmp_path.glob("out/trials/*/model.pth"))):
            time.sleep(0.02)
        seen.extend(map(int, pids.split()))
        os.kill(os.getpid(), signal.SIGINT)

    seen, before = [], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    threading.Thread(target=press).start()
    with pytest.raises(SystemExit) as ended:
        arena(config, tmp_path, "--processes", "1")
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)
    assert ended.value.code == 130
    assert len(seen) == 2 and not any(map(is_running, seen))
    assert len(list(tmp_path.glob("out/trials/*"))) == 1 and not (tmp_path / "out/trials.jsonl").exists()


def is_running(pid: int) -> bool:
    """Within a second: an orphan stays a zombie until init collects it."""
    for _ in range(50):
        try:
            state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


# -- configs/*.yaml


PLANS = {name: compare.read(ROOT / f"configs/{name}.yaml")
         for name in ("compare", "compare_experience", "compare_methods", "compare_curriculum",
                      "compare_ability", "compare_reasoning", "compare_rl", "compare_routed", "compare_teachers",
                      "compare_pruning", "compare_cache")}
SAMPLES = {"compare": 24, "compare_experience": 32, "compare_methods": 32, "compare_curriculum": None,
           "compare_ability": 48, "compare_reasoning": 16, "compare_rl": 8, "compare_routed": 32,
           "compare_teachers": 24, "compare_pruning": 24, "compare_cache": 24}
PARSERS = {}            # {script: its argument parser}


def parser_of(script: str):
    """A script's parser, as it is when parse_args gets it."""
    class Found(Exception):
        pass

    def stop(parser, argv=None, **ranges):
        raise Found(parser)

    if script not in PARSERS:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
            patch.setattr(runtime.args, "parse_args", stop)
            patch.setattr(sys, "argv", [script])
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        PARSERS[script] = found.value.args[0]
        PARSERS[script].add_argument("--config", nargs="+")
    return PARSERS[script]


def given(plan, command: str, steps: int, tuned: dict):
    """A command's script, and its flags."""
    values = plan.values | {"out": "OUT", "steps": Number(steps), "seed": Number(FIRST_SEED)}
    values |= {name: f"{name}.pth" for name in (*plan.made, *plan.files)} | tuned
    script, *words = shlex.split(filled(command, values))
    if script == "-m":
        script, *words = words
    return script, parser_of(script).parse_args(words)


def test_every_row_takes_the_steps_samples_and_seed_that_it_is_given():
    for name, plan in PLANS.items():
        for row in plan.rows:
            script, flags = given(plan, row.command, 800, candidates(row)[-1])
            if script == "train_curriculum.py":
                changes = [change.partition("=")[::2] for change in flags.set]
                steps = sum(int(value) for key, value in changes if key.endswith(".steps"))
                # of 800: done in stage 1, which is made
                steps += 500 * (flags.start_stage == 2)
                steps += 300 * (row.name == "general")                          # stage 1 alone
                batches = {int(value) for key, value in changes if key.endswith(".batch_size")}
            else:
                # Two rounds: of the workflow, or of one that is made and one of the row.
                two = ("ability_tree" in script or row.name == "no new questions"
                       or row.name.endswith("in two steps"))
                steps = flags.max_steps * (2 if two else 1)
                batches = {flags.batch_size}
            assert steps == 800, (name, row.name)
            assert flags.seed == FIRST_SEED + 2 * (row.name == "no new questions"), (name, row.name)
            assert batches in ({SAMPLES[name]}, set()), (name, row.name)


def test_every_made_file_is_needed_and_its_command_is_one_of_its_script():
    for plan in PLANS.values():
        names = set().union(*(placeholders(f"{row.command} {row.writes}", plan) for row
                              in plan.rows))
        assert plan.made.keys() <= names and plan.files.keys() <= names
        for part in plan.made.values():
            given(plan, part.command, 10, {})
        for command in plan.tests.values():
            if "evaluate" in command:
                given(plan, command.replace("{weights}", "0=a.pth"), 10, {})


def test_the_rows_that_stand_for_a_comparison_in_the_tests_of_the_docs_are_rows_of_it():
    for config, name in ROWS.items():
        plan = PLANS["compare" if config is None else config[len("configs/"):-len(".yaml")]]
        assert name in [row.name for row in plan.rows], config


def test_written_questions_are_judged_by_the_world_and_its_rules():
    known = {"what is 3 plus 4?": "7"}
    right = {"what is 3 plus 4?": "7", "flip c s c.": "c s c", "alphabetical order: z y y": "y y z",
             "home of the liver?": None}
    assert {question: right_answer(question, known) for question in right} == right
    rows = [{"question": "flip a b.", "options": {"A": "a b", "B": "b a"}, "answer_idx": letter}
            for letter in "AB"]
    rows.append({"question": "what is 3 plus 4?", "options": {"A": "7"}, "answer_idx": "A"})
    assert share_right(rows) == pytest.approx(200 / 3)
