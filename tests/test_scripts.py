"""
脚本的规律：每个脚本都能运行，每个错误都说明在哪里、怎么办。
Laws of the scripts: each of them runs, and each error says where it is and what to do.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from evaluation.metrics import read_tests
from helpers_run import ROOT, TINY, complaint, load, quickstart, rows, succeed
from interop.checkpoint import load_model, save_model
from interop.checkpoint import new_model as create_model
from model.config import LMConfig


@pytest.fixture
def refused(monkeypatch, capsys, cache):
    """refused("train_sft.py", dim=33) is the command, in this process. Returns the error that ends it."""
    def run_it(script, **flags):
        argv = [script]
        for name, value in flags.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            argv += [] if value is None else [f"--{name}", *map(str, values)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert ended.value.code not in (0, 130, None)
        return f"{capsys.readouterr().err}{ended.value.code}"

    return run_it


# ------------------------------------------------------------------------------------- the three lessons


@pytest.fixture(scope="module")
def flags(data):
    return {**TINY, "data_path": data / "sft_data.jsonl", "max_steps": 2}


@pytest.fixture(scope="module")
def pair(models):
    return {"student": models / "student.pth", "teacher": models / "teacher.pth", "size": "tiny"}


def test_the_lessons_follow_each_other_on_default_names(flags, data, tmp_path):
    """Each finds what the one before left in --out_dir. quickstart.py does the same without
    experts."""
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "use_moe": True, "out_dir": tmp_path}
    printed = succeed("train_pretrain.py",
                      **flags | sizes | {"data_path": data / "pretrain_data.jsonl"})
    assert "val_loss" in printed        # 5 % of the texts are held out
    printed = succeed("train_sft.py", **flags | sizes)
    assert f"from {tmp_path}/pretrain_32_moe.pth" in printed
    dense = {"dim": 128, "n_heads": 8, "weights": "none", "use_moe": None}
    succeed("train_sft.py", **flags | sizes | dense)
    printed = succeed("train_distillation.py", **flags | sizes, size="tiny")
    for name in ("full_sft_32_moe.pth", "full_sft_128.pth"):
        assert f"from {tmp_path}/{name}" in printed
    names = {path.name for path in tmp_path.iterdir()}
    for run in ("pretrain_32_moe", "full_sft_32_moe", "full_sft_128", "full_dist_32_moe"):
        assert {f"{run}{end}" for end in (".pth", "_best.pth", ".json", ".jsonl", ".resume")} <= names
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.parametrize("kind, teacher_kind", [("", "_moe"), ("_moe", "")])
def test_a_student_of_either_kind_learns_from_a_teacher_of_the_other(kind, teacher_kind, flags, models, tmp_path):
    succeed("train_distillation.py", **flags, out_dir=tmp_path, size="tiny", student=models / f"student{kind}.pth",
            teacher=models / f"teacher{teacher_kind}.pth", log_interval=1)
    assert load(tmp_path / f"full_dist_32{kind}.pth").keys() == load(models / f"student{kind}.pth").keys()
    first = next(row for row in rows(tmp_path / f"full_dist_32{kind}.jsonl") if "kd" in row)
    assert first["kd"] > 0.1 and ("balance" in first) == bool(kind)


def test_a_student_in_between_learns_first_and_then_teaches(flags, pair, models, tmp_path):
    """The teacher 48 x 4, then a new 64 x 3, then the weights of a 48 x 4 with experts, then the student 32 x 2."""
    chain = ["64x3", models / "teacher_moe.pth"]
    printed = succeed("train_distillation.py", **flags, **pair, out_dir=tmp_path, chain=chain)
    assert re.findall(r"student (.*?): ", printed) == ["64 x 3", "48 x 4, 4 experts", "32 x 2"]
    assert all((tmp_path / f"full_dist_{size}.pth").exists() for size in ("64", "48_moe", "32"))

    # The last student's teacher was the one before it, not the first.
    def first_kd(folder):
        return next(row["kd"] for row in rows(folder / "full_dist_32.jsonl") if "kd" in row)

    succeed("train_distillation.py", **flags, **pair | {"teacher": tmp_path / "full_dist_48_moe.pth"},
            out_dir=tmp_path / "by_hand")
    assert first_kd(tmp_path) == pytest.approx(first_kd(tmp_path / "by_hand"), rel=1e-5)


def test_a_link_of_a_chain_starts_from_its_weights_if_they_lie_there(flags, pair, tmp_path):
    succeed("train_sft.py", **flags, weights="none", dim=48, n_layers=3, n_heads=4, out_dir=tmp_path)
    printed = succeed("train_distillation.py", **flags, **pair, chain=["48x3"], out_dir=tmp_path, processes=2)
    assert re.search(rf"student 48 x 3: .* from {tmp_path}/full_sft_48.pth", printed)


def test_wandb_works_without_a_network(flags, tmp_path):
    succeed("train_sft.py", **flags, weights="none", dim=32, n_layers=1, n_heads=2, out_dir=tmp_path, use_wandb=True,
            variables={"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "WANDB_SILENT": "true"})
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


# ------------------------------------------------------------------------------------------------ errors


def new_model(flags, tmp_path) -> dict:
    return {**flags, "weights": "none", "dim": 32, "n_layers": 1, "n_heads": 2, "out_dir": tmp_path}


def test_a_bad_line_stops_before_training_and_is_named_or_skipped(flags, data, refused, tmp_path):
    lines = (data / "sft_data.jsonl").read_text().splitlines()[:20]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines[:6] + ['{"conversations": [{"role": "user"'] + lines[6:]) + "\n")
    given = new_model(flags, tmp_path) | {"data_path": bad}
    printed = refused("train_sft.py", **given)
    assert f"{bad}, line 7" in printed and "not a whole JSON object" in printed
    printed = succeed("train_sft.py", **given, skip_bad_lines=True)
    assert f"{bad}: left out 1 of 21 lines" in printed


@pytest.mark.parametrize("more, reason", [
    ({"data_path": ROOT / "dataset/none.jsonl"}, "Make it: python dataset/miniworld.py"),
    ({"data_path": "/nowhere/a.jsonl"}, "no file at /nowhere/a.jsonl. Check the path."),
    ({"weights": None}, "no weights at .*pretrain_32.pth.*python train_pretrain.py"),
    ({"dim": 33}, r"dim=33 does not split into n_heads=2 equal heads; try n_heads=1"),
    ({"max_seq_len": 2}, "max_seq_len=2"),
    ({"dtype": "float16", "device": "cpu"}, "--dtype float16 needs a GPU"),
    ({"tokenizer": "none.json"}, "none.json"),
])
def test_an_error_says_what_to_do(more, reason, flags, refused, tmp_path):
    printed = refused("train_sft.py", **new_model(flags, tmp_path) | more)
    assert re.search(reason, printed), printed


def test_torchrun_and_ddp_belong_together_and_bad_input_ends_all_processes(flags, tmp_path):
    given = new_model(flags, tmp_path)
    printed = complaint("train_sft.py", **given, variables={"WORLD_SIZE": 2})
    assert "2 processes that would each train alone; add --ddp" in printed
    assert "torchrun --nproc_per_node 2 train_sft.py" in complaint("train_sft.py", **given, ddp=True)
    printed = complaint("train_sft.py", **given | {"data_path": "/nowhere/a.jsonl"}, processes=2)
    assert "no file at /nowhere/a.jsonl" in printed


@pytest.mark.parametrize("more, reason", [
    ({"alpha": 1.5}, r"--alpha 1.5 must lie in \[0, 1\]"),
    ({"temperature": 0}, "--temperature 0.0 must be above 0"),
    ({"final_temperature": 0}, "--final_temperature 0.0 must be above 0"),
    ({"teacher": "none.pth"}, "no weights at none.pth"),
    ({"student": None, "dim": 40, "n_heads": 2}, "no weights at .*full_sft_40.pth. Train them: python train_sft.py"),
    ({"student": "none", "dim": 33}, "dim=33 does not split"),
    ({"max_seq_len": 256}, "--max_seq_len 256 exceeds the model's context length of 128"),
    ({"val_fraction": 1.5}, r"--val_fraction 1.5 must lie in \[0, 1\)"),
    ({"chain": ["0x3"]}, "dim=0"),
    ({"chain": ["32x3"]}, "students of widths 32, 32: two of a chain"),
])
def test_a_distillation_that_cannot_be_says_why(more, reason, flags, pair, refused, tmp_path):
    printed = refused("train_distillation.py", **flags | pair | {"out_dir": tmp_path} | more)
    assert re.search(reason, printed), printed


def test_two_vocabularies_cannot_be_distilled_into_each_other(flags, pair, data, refused, tmp_path):
    paths = []
    for text in ("pretrain_data", "sft_data"):
        vocabulary = tmp_path / f"{text}.json"
        succeed("scripts/train_tokenizer.py", data=data / f"{text}.jsonl", vocab_size=300,
                out=vocabulary)
        paths.append(tmp_path / f"{text}.pth")
        save_model(*create_model(LMConfig(dim=32, n_layers=1, n_heads=2, max_seq_len=128),
                                 vocabulary), paths[-1])
    given = flags | pair | {"student": paths[0], "out_dir": tmp_path}
    printed = refused("train_distillation.py", **given)
    assert "the teacher's vocabulary has 1024 tokens, the student's 300, and they split texts into other tokens" in printed
    assert "Train both with one tokenizer" in printed
    printed = refused("train_distillation.py", **given | {"teacher": paths[1]})
    assert "the teacher's vocabulary has 300 tokens, the student's 300, and they split texts into other tokens" in printed


@pytest.mark.parametrize("content", [b"", b"PK", b"no weights", None],
                         ids=["empty", "two bytes", "text", "cut short"])
def test_a_damaged_weight_file_is_named(content, models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "teacher.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ValueError, match=f"{damaged} is cut short, or no weight file at all"):
        load_model(damaged)


def test_the_weights_of_other_sizes_than_the_file_beside_says_are_refused(models, tmp_path):
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "teacher.json", tmp_path / "student.json")
    with pytest.raises(ValueError, match=f"{tmp_path}/student.json: .* is not what was saved with .*/student.pth"):
        load_model(tmp_path / "student.pth")
    (tmp_path / "student.json").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=f"no {tmp_path}/student.json beside the weights"):
        load_model(tmp_path / "student.pth")


# ---------------------------------------------------------------------------------------------- --config


def test_a_config_gives_values_and_the_command_line_overrides_them(flags, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  weights: none\n  dim: 32\n  n_layers: 1\n  n_heads: 2\n  use_moe: true\n"
                      f"data_path: [{flags['data_path']}]\nlearning_rate: 5e-6\nmax_steps: 7\nlog_interval: 1\n")
    given = {key: value for key, value in flags.items()
             if key not in ("data_path", "learning_rate", "max_steps")}
    succeed("train_sft.py", **given, config=config, max_steps=3, warmup_iters=3, out_dir=tmp_path)
    found = [row for row in rows(tmp_path / "full_sft_32_moe.jsonl") if "lr" in row]
    assert len(found) == 3
    assert found[-1]["lr"] == pytest.approx(1.1 * 5e-6)         # warmed up to where the cosine begins


def test_a_config_may_give_what_a_tool_demands(models, tmp_path):
    """--out and one of convert.py's two sources are required; a file that has them is enough."""
    config = tmp_path / "convert.yaml"
    config.write_text(f"weights: {models}/student.pth\nout: {tmp_path}/student.gguf\n")
    succeed("scripts/convert.py", config=config)
    assert (tmp_path / "student.gguf").exists()


# ---------------------------------------------------------------------------------------- chat, evaluate


def test_chat_answers_forgets_on_new_and_leaves_on_quit(models):
    given = {"weights": models / "teacher.pth", "max_new_tokens": 8, "seed": 0, "temperature": 0}
    printed = succeed("scripts/chat.py", **given, stdin="hello\n/new\nhello\n\n/quit\nnever asked\n")
    start, first, after_new = printed.split("model> ")
    assert re.search(r"48 x 4, 0\.\d+ M parameters", start)
    assert first.replace("you> ", "") == after_new.replace("you> ", "") and first.strip() != ""


def test_chat_continues_a_conversation_longer_than_the_context(models):
    """The thirteenth question alone exceeds it; the last one is answered again."""
    questions = "how does totiz feel?\n" * 12 + "how does totiz feel? " * 40 + "\nhello\n"
    printed = succeed("scripts/chat.py", weights=models / "student.pth", max_new_tokens=16,
                      system="be brief", stdin=questions)
    assert "max_seq_len=128" in printed and printed.count("model> ") == 14


def test_a_script_runs_in_a_python_of_its_own_and_says_how_to_make_what_is_missing():
    command = [sys.executable, "scripts/chat.py", "--weights", "none.pth"]
    ended = subprocess.run(command, cwd=ROOT, input="", capture_output=True, text=True)
    assert ended.returncode == 1 and "no weights at none.pth" in ended.stderr


def test_evaluation_compares_models_seeds_and_kinds_of_questions(models, data, tmp_path):
    """The student is untrained: a perplexity of about its 1,024 tokens, and one of four options is correct."""
    tests = [data / name for name in ("test.jsonl", "mcq_test.jsonl", "test_habits.jsonl")]
    weights = [f"teacher={models}/teacher.pth", f"students={models}/student.pth,{models}/student_moe.pth"]
    printed = succeed("scripts/evaluate.py", weights=weights, data=tests, json=tmp_path / "scores.json",
                      report=tmp_path / "report.md")
    header, _, teacher, students = [line for line in printed.splitlines() if line.startswith("|")][:4]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "parameters", "exact match %", "multiple choice %", "perplexity", "agreement %", "KL", "habits KL",
        "habits mode %"]
    assert "±" not in teacher and students.count("±") == 7
    assert [cell.strip() for cell in teacher.split("|")][6:8] == ["100.0", "0.000"]     # agrees with itself
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {label: len(seeds) for label, seeds in scores.items()} == {"teacher": 1, "students": 2}
    assert len(scores["teacher"][0]["leaves"]) == 17
    untrained = scores["students"][0]
    assert untrained["perplexity"] == pytest.approx(1024, rel=0.1) and untrained["exact_match"] == 0
    assert 10 < untrained["multiple_choice"] < 45
    report = (tmp_path / "report.md").read_text()
    assert teacher in report and "(report.png)" in report
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("line, reason", [
    ('{"conversations": [', "not a whole JSON object"),
    ('{"title": "no question"}', "line 3"),
    ('{"question": "a?", "options": {"A": "b"}}', "answer_idx"),
    ('{"conversations": [{"role": "user", "content": "a?"}], "distribution": {"x": 0.5}}', "1 in all"),
    ('{"distribution": {"x": 1}}', "line 3"),
])
def test_a_bad_line_of_a_test_file_is_named(line, reason, data, tmp_path):
    bad = tmp_path / "bad.jsonl"
    good = (data / "test.jsonl").read_text().splitlines()[:2]
    bad.write_text("\n".join([*good, line]) + "\n")
    with pytest.raises(ValueError, match=f"{bad}, line 3") as refused:
        read_tests([str(bad)])
    assert reason in str(refused.value)


def test_evaluation_names_what_is_missing_or_ambiguous(models, data, refused, tmp_path):
    printed = refused("scripts/evaluate.py", weights=models / "student.pth", data="none.jsonl")
    assert "no file at none.jsonl" in printed
    printed = refused("scripts/evaluate.py", weights=tmp_path / "full_sft_9.pth", data=data / "test.jsonl")
    assert f"no weights at {tmp_path}/full_sft_9.pth. Train them: python train_sft.py --help" in printed
    printed = refused("scripts/evaluate.py", weights=["a/x.pth", "b/x.pth"])
    assert "two models have the name x, a/x.pth and b/x.pth; write NAME=PATH" in printed


# -------------------------------------------------------------------------------------------- quickstart


def steps(printed) -> tuple[list[str], list[str]]:
    """The outputs of the steps that quickstart.py made, and of those that it found up to date."""
    outputs = re.findall(r"^== \d+ of 12, after \S+ min: (out\S+)( is up to date)?$", printed, flags=re.MULTILINE)
    return [name for name, done in outputs if not done], [name for name, done in outputs if done]


def test_quickstart_ends_in_a_table_a_picture_and_a_report_card(clone):
    report = (clone / "out/smoke/report.md").read_text()
    labels = [line.split("|")[1].strip() for line in report.splitlines() if line.startswith("|")]
    assert labels[2:7] == ["teacher", "SFT", "distilled", "SFT, right labels", "distilled, right labels"]
    assert (clone / "out/smoke/report.png").stat().st_size > 10_000
    assert "CPU seconds of its training" in (clone / "out/smoke/report_card.md").read_text()


def test_quickstart_repeats_only_what_depends_on_a_file_that_changed(clone):
    """Run again, it trains nothing."""
    with open(clone / "out/smoke/dataset/sft_data_clean.jsonl", "a") as file:
        file.write('{"question": "2 + 3 =", "answer": "5"}\n')
    made, found = steps(quickstart(clone))
    assert made == [f"out/smoke/right/{name}_64.pth"
                    for name in ("full_sft", "sft_alone/full_sft", "full_dist")]
    assert len(found) == 7
    printed = quickstart(clone)
    made, found = steps(printed)
    assert made == [] and len(found) == 10 and "\nstep " not in printed


def test_quickstart_stops_at_the_first_command_that_fails(clone):
    rows = clone / "out/smoke/dataset/sft_data_clean.jsonl"
    rows.write_bytes(rows.read_bytes() + b"{\n")
    made, found = steps(quickstart(clone, code=1))
    assert made == ["out/smoke/right/full_sft_64.pth"] and len(found) == 7      # the other chain continues


def test_quickstart_names_an_option_that_it_does_not_know():
    ended = subprocess.run([sys.executable, "quickstart.py", "--smok"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "unrecognized arguments: --smok" in ended.stderr
