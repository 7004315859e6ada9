"""
配置与启动脚本的规律：每个 YAML 都合它的脚本的参数；后者覆盖前者，命令行覆盖一切。
Laws of the configs and of the launch scripts: every YAML fits the flags of its script; a later file
overrides an earlier one, and the command line overrides all.
"""

import argparse
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers_run import ROOT, rows, succeed
from runtime.args import parse_args
from scripts.list_flags import parser_of

LAUNCHERS = {"scripts/run_skd.sh": "train_distillation.py", "scripts/run_seqkd.sh": "train_sft.py",
             "scripts/run_onpolicy_kd.sh": "train_onpolicy.py"}


def uses() -> set[tuple[str, tuple[str, ...]]]:
    """(script, configs) of every command in the docs, a launch script or the head of a config."""
    found = set()
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("scripts/*.sh"),
                 *ROOT.glob("configs/*.yaml")]:
        text = re.sub(r" \\\n[# ]*", " ", path.read_text())      # lines that a backslash joins
        for script, files in re.findall(
                r"(\S+\.(?:py|sh)) .*?--config ((?:configs/\S+\.yaml ?)+)", text):
            if script != "scripts/compare.py":      # its configs hold commands, not flags
                found.add((LAUNCHERS.get(script, script), tuple(files.split())))
    return found


USES = sorted(uses())


def read(script, configs) -> dict:
    """What a script makes of these configs, started as one of several processes."""
    parser = parser_of(script)
    several = ["--ddp"] if "--ddp" in parser.format_help() else []
    return vars(parse_args(parser, [*several, "--config", *(str(ROOT / config) for config in configs)]))


def values(config) -> dict:
    """What a YAML says, without its sections."""
    flat = {}
    for key, value in yaml.safe_load((ROOT / config).read_text()).items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


# ------------------------------------------------------------------------------------------------------------ configs/


def test_every_config_is_used_by_a_command():
    assert {config for _, configs in uses() for config in configs} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("configs/*.yaml")
        if not path.stem.startswith("compare")}


@pytest.mark.parametrize("script, configs", USES, ids=lambda part: part if isinstance(part, str) else "+".join(part))
def test_every_key_of_a_config_is_a_flag_of_the_script_it_is_for(script, configs):
    given = read(script, configs)
    for key, value in values(configs[-1]).items():              # which nothing overrides
        assert given[key] == value, key


@pytest.mark.parametrize("script, configs", [use for use in USES if use[1][0] == "configs/base.yaml"])
def test_the_8b_configs_say_what_the_method_prescribes(script, configs):
    """Qwen3-8B into itself: bf16, batches of 2, 8 of them a step, 2e-5, 3 epochs, gradient checkpointing."""
    given = read(script, configs)
    assert [given[key] for key in ("dtype", "batch_size", "accumulation_steps", "learning_rate", "epochs", "lora_rank")] == [
        "bfloat16", 2, 8, 2e-5, 3, 0]
    assert given["grad_checkpoint"] is True
    assert given["shard"] == ("zero2" if script == "train_onpolicy.py" else "zero3")
    of_the_method = {
        "train_sft.py": {},
        "train_distillation.py": {"divergence": "reverse_kl", "temperature": 4.0, "alpha": 0.5},
        "train_onpolicy.py": {"divergence": "jsd", "beta": 0.5, "temperature": 1.0, "max_new_tokens": 256,
                              "generation_temperature": 0.9, "num_samples": 1}}[script]
    assert {key: given[key] for key in of_the_method} == of_the_method


# ------------------------------------------------------------------------------------------------------------ --config


@pytest.fixture
def table():
    """Three flags: a number, one that takes several values, and one that must be given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--data_path", nargs="+", default=None)
    parser.add_argument("--weights", required=True)
    return parser


def write(folder, name, text) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_later_config_overrides_an_earlier_one_and_the_command_line_both(table, tmp_path):
    first = write(tmp_path, "first.yaml", "epochs: 2\nweights: a.pth\ndata_path: [a, b]\n")
    second = write(tmp_path, "second.yaml", "training:\n  weights: b.pth\ndata_path: [c]\n")
    given = parse_args(copy.deepcopy(table), ["--config", first, second])
    assert (given.epochs, given.weights, given.data_path) == (2, "b.pth", ["c"])
    given = parse_args(table, ["--epochs", "4", "--config", second, first])
    assert (given.epochs, given.weights, given.data_path) == (4, "a.pth", ["a", "b"])


def test_a_config_given_again_takes_the_place_of_the_first(table, tmp_path):
    """So a launch script can name its own before those of the user."""
    own = write(tmp_path, "own.yaml", "epochs: 2\n")
    users = write(tmp_path, "users.yaml", "weights: a.pth\n")
    given = parse_args(table, ["--config", own, "--config", users])
    assert (given.epochs, given.weights, given.config) == (1, "a.pth", [users])


@pytest.mark.parametrize("wrong_one", [0, 1])
def test_an_error_names_the_file_it_is_in(wrong_one, table, tmp_path, capsys):
    files = [write(tmp_path, "zero.yaml", "weights: a.pth\n"), write(tmp_path, "one.yaml", "weights: a.pth\n")]
    Path(files[wrong_one]).write_text("epoch: 2\n")
    with pytest.raises(SystemExit):
        parse_args(table, ["--config", *files])
    said = capsys.readouterr().err
    assert files[wrong_one] in said and files[1 - wrong_one] not in said and "did you mean 'epochs'?" in said


def test_a_config_that_is_not_there_is_named(table, tmp_path, capsys):
    there = write(tmp_path, "there.yaml", "weights: a.pth\n")
    with pytest.raises(SystemExit):
        parse_args(table, ["--config", there, "none.yaml"])
    assert "no config file at none.yaml" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ scripts/run_*.sh


def bash(script, *argv, **variables) -> subprocess.CompletedProcess:
    """`bash SCRIPT ...`, in an environment with nothing of torchrun's in it but these variables."""
    path = f"{variables.pop('before', '')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    inherited = {key: value for key, value in os.environ.items()
                 if key not in ("NPROC", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(["bash", script, *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          env={**inherited, **{key: str(value) for key, value in variables.items()}, "PATH": path})


@pytest.fixture
def tools(tmp_path) -> Path:
    """A torchrun that says what it was told, and a python that counts 8 GPUs."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name, text in (("torchrun", 'echo torchrun "$@"'), ("python", "echo 8")):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("launcher, script", LAUNCHERS.items())
def test_a_launch_script_starts_a_process_for_each_gpu(launcher, script, tools, tmp_path):
    said = bash(launcher, "--learning_rate", "5e-6", before=tools, ANSWERS=__file__).stdout.splitlines()[-1]
    assert said.startswith(f"torchrun --standalone --nproc_per_node 8 {script} --ddp --config configs/base.yaml configs/")
    assert said.endswith("--learning_rate 5e-6")


def test_a_launch_script_joins_several_machines(tools):
    there = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "10.0.0.1", "NPROC": 4}
    said = bash("scripts/run_skd.sh", before=tools, **there).stdout
    assert said.startswith("torchrun --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 "
                           "--nproc_per_node 4 train_distillation.py")
    del there["NODE_RANK"]
    ended = bash("scripts/run_skd.sh", before=tools, **there)
    assert ended.returncode != 0 and "NODE_RANK: is the number of this machine" in ended.stderr


def test_seqkd_writes_the_answers_first_unless_they_are_there(tools, tmp_path):
    answers = tmp_path / "answers.jsonl"
    first, second = bash("scripts/run_seqkd.sh", before=tools, ANSWERS=answers, TEACHER="t.pth").stdout.splitlines()
    assert first == ("torchrun --standalone --nproc_per_node 8 scripts/generate_answers.py --ddp --teacher t.pth "
                     f"--data_path alfworld_student.jsonl --teacher_data_path alfworld_teacher.jsonl --out {answers}")
    assert f"--data_path {answers}" in second
    answers.touch()
    first, second = bash("scripts/run_seqkd.sh", before=tools, ANSWERS=answers).stdout.splitlines()
    assert first == f"the answers exist: {answers}" and second.startswith("torchrun")


def test_seqkd_samples_with_the_flags_of_sampling_and_trains_with_the_others(tools, tmp_path):
    sampling = ["--temperature", "0.7", "--top_p", "0.8", "--top_k", "20", "--max_new_tokens", "64", "--num_samples", "2"]
    answers = tmp_path / "answers.jsonl"
    more = ["--seed", "1", *sampling, "--epochs", "2"]
    first, second = bash("scripts/run_seqkd.sh", *more, before=tools, ANSWERS=answers).stdout.splitlines()
    assert first.endswith(f"--out {answers} {' '.join(sampling)}") and second.endswith(f"{answers} --seed 1 --epochs 2")
    answers.touch()
    first, second = bash("scripts/run_seqkd.sh", *more, before=tools, ANSWERS=answers).stdout.splitlines()
    assert "remove them for other --temperature 0.7" in first and second.endswith("--seed 1 --epochs 2")


def test_seqkd_learns_the_replay_beside_the_answers(tools):
    there = {"before": tools, "ANSWERS": __file__}
    without, replay = (bash("scripts/run_seqkd.sh", "--seed", 1, **there, **more).stdout
                       for more in ({}, {"REPLAY": "a.jsonl b.jsonl"}))
    assert f"--data_path {__file__} --seed 1\n" in without
    assert f"--data_path {__file__} a.jsonl b.jsonl --seed 1\n" in replay


@pytest.mark.parametrize("launcher, script", LAUNCHERS.items())
def test_what_a_launch_script_starts_runs_in_two_processes(launcher, script, tools, data, models, tmp_path):
    """The tiny recipe with the user's flags, on a few rows, for two steps: torchrun itself is quickstart.py's to test."""
    config = ROOT / "configs" / launcher.replace("scripts/run_", "").replace("onpolicy_kd", "onpolicy").replace(
        ".sh", "_tiny.yaml")
    student, told = data / "experience_student.jsonl", data / "experience_teacher.jsonl"
    weights = {"weights": models / "student.pth"} if script == "train_sft.py" else {
        "student": models / "student.pth", "teacher": models / "student.pth", "data_path": student, "teacher_data_path": told}
    more = {**weights, "out_dir": tmp_path / "out", "max_steps": 2, "batch_size": 4, "num_workers": 0, "val_path": "none"}
    flags = [word for name, value in more.items() for word in (f"--{name}", value)]
    said = bash(launcher, "--config", config, *flags, before=tools, NPROC=2, ANSWERS=student).stdout.splitlines()[-1]
    words = said.split()
    assert words[:5] == ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    succeed(*words[4:], processes=2)
    assert len(list((tmp_path / "out").glob("*_32.pth"))) == 1
    assert [row["step"] for found in (tmp_path / "out").glob("*.jsonl") for row in rows(found)][-1] == 2
