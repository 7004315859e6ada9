"""
擂台的规律：每行同样多的候选、更新与样本；时间怎么算；做完的不再做；错误先说。
Laws of the arena: as many candidates, updates and samples for each row; how seconds are counted; what is done is not done
again; mistakes are told first. Scripts of three lines stand for those that train and evaluate.
"""

import argparse
import json
import os
import resource
import shlex
import signal
import threading
import time

import pytest
import yaml
from matplotlib.axes import Axes

import scripts.compare as compare
from benchmarks.runs import OUT, Job, Jobs, key_of
from helpers_run import ROOT
from scripts.compare import Row, Steps, best, counted, filled, pace_of, placeholders, steps_within
from test_configs import parser_of

TRAIN = """
import json, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
end = float(flags["--slow"]) * int(flags["--steps"]) / 1000
while time.process_time() < end: pass
if flags["--rate"] == "0": sys.exit("a rate of 0 teaches nothing")
open(flags["--out"], "w").write(json.dumps(flags))
open(sys.argv[0] + ".runs", "a").write("run\\n")
"""
EVALUATE = """
import json, sys
flags = sys.argv[1:]
weights = [word.partition("=") for word in flags[flags.index("--weights") + 1:flags.index("--data")]]
def score(path):
    rate = float(json.load(open(path))["--rate"])
    return {"exact_match": 50.0 if rate in (2, 3) else 10.0, "perplexity": rate, "kl": 0.5, "parameters": 7}
scores = {name: [score(path)] for name, _, path in weights}
open(flags[flags.index("--json") + 1], "w").write(json.dumps(scores))
"""


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    """An arena of two rows, the second of which needs an answer file and is twice as slow; as compare.yaml has it."""
    for name, text in (("train.py", TRAIN), ("evaluate.py", EVALUATE), ("data.jsonl", "{}\n"), ("teacher.pth", '{"--rate": 9}'),
                       ("start.pth", '{"--rate": 1}')):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(compare, "EVALUATE", str(tmp_path / "evaluate.py"))
    monkeypatch.setattr(compare, "draw", lambda told, path: None)               # a picture that no one looks at
    there = {name: str(tmp_path / file) for name, file in (("data", "data.jsonl"), ("val", "data.jsonl"),
                                                           ("teacher", "teacher.pth"), ("start", "start.pth"))}
    learn = (f"{tmp_path}/train.py --teacher {{teacher}} --data {{data}} --steps {{steps}} --samples {{samples}} --seed {{seed}} "
             "--rate {rate} --out {out}/model.pth")
    return {
        "setting": {**there, "test": [there["data"]], "samples": 24, "updates": 100, "tune_part": 0.5, "seconds": 0.9, "seeds": 2,
                    "quick": {"updates": 20, "seeds": 1}},
        "words": {"learn": learn},
        "made": {"answers": {"command": f"{tmp_path}/train.py --slow 30 --steps 10 --rate 1 --out {{out}}/answers.jsonl",
                             "writes": "{out}/answers.jsonl"}},
        "rows": {"Text": {"SFT": {"command": "{learn} --slow 3", "writes": "{out}/model.pth", "tune": {"rate": [1, 2, 3]}}},
                 "Words": {"SKD": {"command": "{learn} --slow 6 --from {answers}", "writes": "{out}/model.pth",
                                   "tune": {"rate": [1, 3, 2]}, "charge": ["answers"], "note": "on answers"}}},
    }


def arena(config, folder, *flags):
    """Run the arena, and return its table.json."""
    (folder / "arena.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    compare.main(["--config", str(folder / "arena.yaml"), "--out", str(folder / "out"), "--processes", "2", *flags])
    return json.loads((folder / "out/table.json").read_text())


def trials(folder) -> list[dict]:
    return [json.loads(line) for line in open(folder / "out/trials.jsonl")]


# -------------------------------------------------------------------------------------------------------- arithmetic


def test_parts_that_meet_add_up_to_the_whole():
    assert f"{Steps(1000)} = {Steps(1000):0-60} + {Steps(1000):60-80} + {Steps(1000):80-100}" == "1000 = 600 + 200 + 200"
    for steps in (10, 370, 999):
        assert sum(int(f"{Steps(steps):{part}}") for part in ("0-60", "60-80", "80-100")) == steps


def test_seconds_are_those_of_the_updates_and_of_what_was_made_for_the_row_alone():
    assert counted(charged=5.0, seconds=34.0, begin=4.0) == 35.0


def test_a_row_takes_as_many_updates_as_fit_behind_what_was_made_for_it():
    pace = pace_of(took=35.0, charged=5.0, updates=1010)                        # 30 s for 1000 updates
    assert pace == 0.03
    assert steps_within(35.0, charged=5.0, pace=pace) == 1000
    assert steps_within(35.0, charged=0.0, pace=pace) == 1160                   # 1166.7, in tens
    assert steps_within(35.0, charged=50.0, pace=pace) == 10                    # it has eaten up its time, and some


def test_a_row_too_quick_to_be_timed_is_told_of():
    with pytest.raises(ValueError, match="20 updates take no longer than 10.*more --updates"):
        pace_of(took=4.9, charged=5.0, updates=20)


def test_candidates_are_all_combinations_and_the_first_is_of_the_first_values():
    assert Row("", "", "", "", {"a": [1, 2], "b": [3, 4]}).candidates == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]


def test_the_best_candidate_has_the_most_exact_matches_and_of_equal_ones_the_lowest_perplexity():
    scores = [{"exact_match": match, "perplexity": perplexity} for match, perplexity in ((9, 1), (10, 3), (10, 2), (10, 4))]
    assert best(scores) == 2


# --------------------------------------------------------------------------------------------------------- the arena


def test_all_rows_get_the_same_and_what_is_done_is_not_done_again(config, tmp_path):
    told = arena(config, tmp_path)
    first = trials(tmp_path)
    sft, skd = told["rows"]["SFT"], told["rows"]["SKD"]
    # Rates 2 and 3 are equally often right, 2 is less perplexed; 3 candidates of 50 updates, whichever row.
    assert sft["tuned"] == skd["tuned"] == {"rate": 2}
    for name in ("SFT", "SKD"):
        runs = {phase: [each["command"] for each in first if each["name"] == f"{phase}, {name}"] for phase in ("tune", "updates")}
        assert [sum("--steps 50 " in each and "--seed 1336 " in each for each in runs["tune"])] == [3]
        assert sorted(each.split("--seed ")[1].split()[0] for each in runs["updates"]) == ["1337", "1338"]
        assert all("--steps 100 " in each and "--samples 24 " in each for each in runs["updates"])
    assert [seed["steps"] for seed in sft["updates"]] == [100, 100] and sft["updates"][0]["exact_match"] == 50
    # Half as fast, and with 0.3 of 0.9 s gone for its answers: a third of the updates, or what a busy machine makes of that.
    assert skd["seconds"][0]["steps"] < 0.7 * sft["seconds"][0]["steps"] and skd["updates"][0]["seconds"] > 0.3

    text = (tmp_path / "out/table.md").read_text()
    assert "| **Words** |" in text and "| SKD | 7 | 50.0 ± 0.0 |" in text and "- SKD: on answers" in text

    runs = (tmp_path / "train.py.runs").read_text()
    assert arena(config, tmp_path) == told
    assert trials(tmp_path) == first and (tmp_path / "train.py.runs").read_text() == runs


def test_quick_tunes_nothing_and_tells_what_it_leaves_out(config, tmp_path):
    config["rows"]["Words"]["SKD"]["quick"] = False
    told = arena(config, tmp_path, "--quick")
    assert told["rows"]["SFT"]["tuned"] == {"rate": 1} and told["updates"] == 20 and told["seconds"] is None
    assert "Left out of --quick: SKD." in (tmp_path / "out/table.md").read_text()
    assert {each["name"].partition(",")[0] for each in trials(tmp_path)} == {"begin", "updates", "test"}     # nor made


def test_only_the_rows_that_are_asked_for_are_run(config, tmp_path):
    assert "SKD" not in arena(config, tmp_path, "--rows", "SFT", "--seconds", "0")["rows"]
    assert not any("SKD" in each["name"] or "answers" in each["name"] for each in trials(tmp_path))


def test_a_run_that_fails_ends_the_arena_with_what_it_said(config, tmp_path):
    config["rows"]["Text"]["SFT"]["tune"]["rate"] = [1, 0, 3]
    with pytest.raises(SystemExit) as ended:
        arena(config, tmp_path)
    assert "tune, SFT ended with status 1" in str(ended.value) and "a rate of 0 teaches nothing" in str(ended.value)
    assert f"python {tmp_path}/train.py" in str(ended.value)


@pytest.mark.parametrize("change, reason", [
    (lambda config: config["rows"]["Text"]["SFT"]["tune"].update(rate=[1, 2]), "same number of candidates.*SFT 2, SKD 3"),
    (lambda config: config["rows"]["Text"]["SFT"].update(tuned={}), "SFT: unknown key 'tuned'; did you mean 'tune'"),
    (lambda config: config["rows"]["Text"]["SFT"].pop("writes"), "SFT: has no 'writes'"),
    (lambda config: config["setting"].pop("seeds"), "setting: has no 'seeds'"),
    (lambda config: config["words"].update(learn="x.py {sample}"), r"SFT: \{sample\} is not known; did you mean \{samples\}"),
    (lambda config: config["words"].update(learn=config["words"]["learn"].replace("{seed}", "1")), r"SFT: .*not take \{seed\}"),
    (lambda config: config["rows"]["Words"]["SKD"].update(charge=["texts"]), "SKD: charge: 'texts' is nothing that is made"),
    (lambda config: config["rows"]["Words"]["SKD"].update(command="{learn} --from {answers} out/no.pth"),
     "SKD: no file at out/no.pth"),
    (lambda config: config["setting"].update(teacher="out/no.pth"), "no file at out/no.pth; bash quickstart.sh makes it"),
    (lambda config: config["made"]["answers"].update(command="{later}") or config["made"].update(
        later={"command": "a.py", "writes": "b"}), "made: answers needs later; .* must stand above it"),
])
def test_a_mistake_is_told_before_anything_is_run(change, reason, config, tmp_path):
    change(config)
    with pytest.raises(SystemExit, match=reason):
        arena(config, tmp_path)
    assert not (tmp_path / "out/trials.jsonl").exists()


@pytest.mark.parametrize("flags, reason", [
    (["--rows", "SDK"], "has no 'SDK'; did you mean 'SKD'?"), (["--updates", "25"], "must be a multiple of 10"),
    (["--seeds", "0"], "--seeds 0 must be 1 or more"), (["--seconds", "-1"], "--seconds -1.0 must be 0 or more")])
def test_a_flag_out_of_its_range_is_refused(flags, reason, config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        arena(config, tmp_path, *flags)
    assert reason in capsys.readouterr().err


def test_the_picture_has_a_point_for_each_row_in_each_panel(tmp_path, monkeypatch):
    row = {"group": "Text", "updates": [{"exact_match": 10.0}, {"exact_match": 20.0}], "seconds": [{"exact_match": 30.0}]}
    there = {"group": compare.THERE, "updates": [{"exact_match": 90.0}]}
    told = {"updates": 100, "seconds": 5.0, "rows": {"teacher": there, "start": there, "SFT": row, "SeqKD": row}}
    points, errorbar = [], Axes.errorbar

    def noted(axis, x, y, **how):
        points.append((x, y, how["xerr"]))
        return errorbar(axis, x, y, **how)

    monkeypatch.setattr(Axes, "errorbar", noted)
    compare.draw(told, tmp_path / "arena.png")
    spread = 50 ** 0.5                                                          # of 10 and 20
    assert points == [(15, 1, pytest.approx(spread)), (15, 2, pytest.approx(spread)), (30, 1, 0), (30, 2, 0)]
    assert (tmp_path / "arena.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------- the runs


def job(folder, text, *words) -> Job:
    """A script of this text, which is to write <out>/done."""
    (folder / "script.py").write_text(text)
    return Job("try", shlex.join([f"{folder}/script.py", f"{OUT}/done", *map(str, words)]), f"{OUT}/done")


def test_a_job_is_told_by_its_command_and_by_what_is_in_the_files_that_it_names(tmp_path):
    (tmp_path / "teacher.pth").write_text("a")
    named = Job("", f"train.py 0={tmp_path}/teacher.pth,other", "")
    before = key_of(named)
    assert key_of(named._replace(name="another")) == before != key_of(named._replace(command=f"{named.command} --seed 2"))
    (tmp_path / "teacher.pth").write_text("b")
    os.utime(tmp_path / "teacher.pth", (0, 0))
    assert key_of(named) != before


def test_seconds_and_memory_are_those_of_the_child_alone(tmp_path):
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (64 << 20)
    burn = "import sys, time\nheld = bytearray(int(sys.argv[2]))\nwhile time.process_time() < 0.3: pass\nopen(sys.argv[1], 'w')"
    with Jobs(tmp_path / "out", 1, 2, 2) as jobs:
        (busy,), (idle,) = jobs.run([job(tmp_path, burn, size)]), jobs.run([job(tmp_path, burn.replace("0.3", "0"), 0)])
    assert busy["seconds"] >= 0.3 and idle["seconds"] < busy["seconds"]         # not added up, though idle came later
    assert size / 2 ** 20 <= busy["peak_mb"] <= size / 2 ** 20 + 40


@pytest.fixture
def sigint():
    """As it is on a terminal: a shell lets its jobs in the background, and what they start, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_children_and_what_was_cut_short_is_not_done(tmp_path, sigint):
    wait = ("import os, signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(sys.argv[1] + '.saved', 'w').close()))\n"
            "open(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)")
    begun = tmp_path / "out/trials"
    with pytest.raises(KeyboardInterrupt):
        with Jobs(tmp_path / "out", 1, 2, 2) as jobs:

            def press():
                while not any(path.read_text() for path in begun.glob("*/done")):
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGINT)

            threading.Thread(target=press).start()
            jobs.run([job(tmp_path, wait, 1), job(tmp_path, wait, 2)])
    (done,) = begun.glob("*/done")                      # the second waited, and was never begun
    assert done.with_name("done.saved").exists()        # it was asked, and had the time to save
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.read_text()), 0)
    assert not (tmp_path / "out/trials.jsonl").exists()


# ------------------------------------------------------------------------------------------------- configs/compare.yaml


SETTING, WORDS, MADE, ROWS = compare.read(ROOT / "configs/compare.yaml")
SCRIPTS = {}            # {script: its table of flags}


def given(part, steps: int) -> tuple[str, argparse.Namespace]:
    """A command's script, and its flags."""
    values = {name: SETTING[name] for name in ("data", "teacher", "start", "samples")} | WORDS | {
        "out": "OUT", "steps": Steps(steps), "seed": 7, **{name: f"{name}.pth" for name in MADE},
        **{f"{name}_{side}": "x.jsonl" for name in ("data", "val") for side in ("general", "specialist")}}
    script, *words = shlex.split(filled(part.command, values | (part.candidates[-1] if isinstance(part, Row) else {})))
    if script not in SCRIPTS:
        SCRIPTS[script] = parser_of(script)
        SCRIPTS[script].add_argument("--config", nargs="+")
    return script, SCRIPTS[script].parse_args(words)


def updates_of(script, flags) -> int:
    if script == "train_curriculum.py":
        return sum(int(change.partition("=")[2]) for change in flags.set if ".steps=" in change)
    return flags.max_steps * (flags.rounds if script == "train_ability_tree.py" else 1)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_takes_the_steps_samples_and_seed_that_it_is_given(row):
    script, flags = given(row, steps=730)
    assert updates_of(script, flags) == 730 and flags.seed == 7
    batches = [int(change.partition("=")[2]) for change in flags.set if ".batch_size=" in change] \
        if script == "train_curriculum.py" else [flags.batch_size]
    assert set(batches) == {24}


@pytest.mark.parametrize("part", MADE.values(), ids=lambda part: part.name)
def test_every_command_of_what_is_made_is_one_of_its_script(part):
    given(part, steps=10)


def test_what_is_made_is_needed_by_a_row():
    names = set().union(*(placeholders(f"{row.command} {row.writes}", WORDS) for row in ROWS))
    assert MADE.keys() - names == {"moe_pretrained"} and "{moe_pretrained}" in MADE["moe_start"].command
