"""
分块文件的规律：怎么跑都是同样的字节；中断后只补缺的部分；别人的文件原样留下。
Laws of files made in parts: the same bytes however they are made, a resumed run makes only what is missing, and other
files stay as they are.
"""

import signal

import pytest

from helpers_run import complaint, start, succeed, wait_until
from runtime.parts import Parts
from runtime.precision import pick_device
from runtime.processes import World

ALONE = World(0, 1, pick_device("cpu"))

SCRIPT = """
import argparse, json, time
from pathlib import Path
from runtime.args import checking_input, parse_args
from runtime.parts import Parts
from runtime.processes import init_distributed_mode, main_process_first

parser = argparse.ArgumentParser()
for flag in ("--out", "--slow_from", "--stop_at", "--tag"):
    parser.add_argument(flag)
parser.add_argument("--ddp", action="store_true")
args = parse_args(parser)
world = init_distributed_mode(args.ddp, "cpu")
with checking_input():
    parts = Parts(args.out, {"tag": args.tag}, 6, world)
    with main_process_first(world):
        missing = parts.prepare()
why = None
for part in parts.mine(missing):
    if args.stop_at and part >= int(args.stop_at):
        why = "the budget is spent"
        break
    parts.write(part, part ** 2)
    if args.slow_from and part >= int(args.slow_from):
        time.sleep(0.2)
results = parts.join(why)
if results:
    Path(args.out).write_text(json.dumps(results))
    parts.remove()
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "squares.py").write_text(SCRIPT)
    return str(tmp_path / "squares.py")


def times(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.json")}


# ------------------------------------------------------------------------------------------------------- in any number


@pytest.mark.parametrize("processes", [1, 2])
def test_any_number_of_processes_makes_the_same_file_and_leaves_nothing_else(processes, script, tmp_path):
    out = tmp_path / "out" / "squares.json"
    out.parent.mkdir()
    printed = succeed(script, out=out, processes=processes)
    assert out.read_text() == "[0, 1, 4, 9, 16, 25]" and list(out.parent.iterdir()) == [out]
    assert ("3/3" if processes == 2 else "6/6") in printed


@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_was_ended_resumes_with_the_missing_parts_and_only_with_the_same_settings(
        how, code, script, tmp_path):
    out, folder = tmp_path / "squares.json", tmp_path / "squares.json.parts"
    running = start(script, out=out, slow_from=2)
    wait_until(lambda: len(times(folder)) >= 3)
    running.send(how)
    ended, done = running.wait(), times(folder)
    assert ended.code == code and not out.exists() and 3 <= len(done) < 6, ended.output
    if code == 130:
        assert f"stopped. {len(done)} of 6 parts are saved. Resume with: python {script}" in ended.output

    printed = complaint(script, out=out, tag="new")
    assert f"{folder} holds parts of another file: tag was None, is new. Resume with the same settings" in printed
    assert times(folder) == done

    stopped = start(script, out=out, slow_from=0, stop_at=5, processes=2).wait()    # the parts of 0 .. 4, not of 5
    assert stopped.code == 1 and "stopped; the budget is spent. 5 of 6 parts are saved" in stopped.output
    assert done.items() <= times(folder).items()                                    # nothing is made twice
    succeed(script, out=out)
    assert out.read_text() == "[0, 1, 4, 9, 16, 25]" and not folder.exists()


# ------------------------------------------------------------------------------------------------------ files that stay


def test_a_finished_file_stays(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="out exists already. Give another --out, or remove it"):
        Parts(tmp_path / "out", {}, 1, ALONE).prepare()
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_killed_while_it_cleans_up_is_complete_when_it_is_called_again(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "out", {"seed": 1}, 2, ALONE)
    for part in parts.mine(parts.prepare()):
        parts.write(part, part)
    parts.out.write_text(str(parts.join()))                 # killed here
    again = Parts(tmp_path / "out", {"seed": 1}, 2, ALONE)
    assert again.prepare() == [] and list(again.mine([])) == [] and again.join() == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        again.remove()                                      # or here
    with pytest.raises(ValueError, match="out exists already"):
        Parts(tmp_path / "out", {"seed": 1}, 2, ALONE).prepare()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and parts.out.read_text() == "[0, 1]"


def test_a_result_comes_back_as_it_was_even_with_half_a_character(tmp_path):
    parts = Parts(tmp_path / "out", {}, 2, ALONE)
    results = [{"id": "\ud83d", "n": [1, None]}, "水"]
    for part in parts.mine(parts.prepare()):
        parts.write(part, results[part])
    assert parts.join() == results and parts.missing() == []
