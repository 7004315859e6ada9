"""
参数的规律：坏值与坏 YAML 没有一个以回溯告终，也没有一个被悄悄接受；别家的键名照读。
Laws of the arguments: no bad value and no bad YAML file ends in a traceback or is accepted
silently; the keys of other frameworks are read as they are meant.
"""

import copy
import functools
import os
import random

import pytest

from helpers_run import ROOT, complaint
from runtime.args import COLUMNS, RANGES, parse_args
from scripts.list_flags import parser_of, scripts

LESSONS = [script for script in scripts() if script.startswith("train_")]
parser_of = functools.cache(parser_of)


def parse(script, *argv):
    return parse_args(copy.deepcopy(parser_of(script)), list(map(str, argv)))


def refusal(capsys, script, *argv) -> str | None:
    """The one line with which it is refused; None if it is accepted. Anything else is an error."""
    try:
        parse(script, *argv)
    except SystemExit as ended:
        assert ended.code == 2, (script, argv)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and len(said) > 20, (script, argv, said)
        return said
    capsys.readouterr()


def needed(parser) -> list[str]:
    """Values for the flags that must be given."""
    return [word for flag in parser._actions if flag.required for word in [*flag.option_strings[:1], "x"]]


# ---- the command line ----------------------------------------------------------------------------

def out_of_range(name: str) -> list[str]:
    """Values next to the ends of a flag's range, outside it."""
    interval = RANGES.get(name) or RANGES.get(name.rpartition("_")[2], "[0, inf)")
    low, high = map(float, interval[1:-1].split(","))
    step = (interval[0] == "[") * 1
    return [f"{low - step:g}", *([f"{high + 1:g}"] if high < 1e9 else [])]


def test_columns_are_pairs_and_a_later_script_of_a_workflow_reads_them_too(capsys, monkeypatch):
    monkeypatch.setenv(COLUMNS, "")
    for bad in (["question"], ["=a"], ["question="], ["question=a", "b"]):
        assert "write NAME=COLUMN" in refusal(capsys, "train_sft.py", "--columns", *bad)
    parse("train_sft.py", "--columns", "question=客户 消息", "answer=a=b")
    assert os.environ[COLUMNS] == "question=客户 消息\nanswer=a=b"


def test_no_bad_value_of_a_flag_is_accepted_or_ends_in_a_traceback(capsys):
    rng, tried, accepted = random.Random(0), 0, []
    for script in scripts():
        parser = parser_of(script)
        for flag in parser._actions:
            if not flag.option_strings or flag.nargs == 0 or script.startswith(("benchmarks", "scripts/compare")):
                continue
            bad = ["no such value"] if flag.choices or flag.type in (int, float) else []
            bad += out_of_range(flag.dest) if flag.type in (int, float) else []
            bad += ["nan", "inf", "-inf"] if flag.type in (int, float) else []
            for value in (value for value in bad if rng.random() < 0.1):
                tried += 1
                if refusal(capsys, script, *needed(parser), f"{flag.option_strings[0]}={value}") is None:
                    accepted.append((script, flag.dest, value))
    print(f"{tried} bad values of flags, {len(accepted)} accepted")
    assert tried > 100 and not accepted, accepted


def test_every_default_is_in_its_range(capsys):
    for script in LESSONS[1:]:
        assert refusal(capsys, script) is None


@pytest.mark.parametrize("argv, says", [
    ("--batch_size 0", "--batch_size 0 must be 1 or more"), ("--grad_clip nan", "must be 0 or more"),
    ("--learning_rate inf", "--learning_rate inf must be 0 or more"), ("--val_fraction 1", "must lie in [0, 1)"),
    ("--seed -1", "--seed -1 must be 0 or more"),
    ("--num_workers 99999", "must lie in [0, 10000]"), ("--epoch", "expected one argument"),
])
def test_a_refusal_names_flag_value_and_range(argv, says, capsys):
    assert says in refusal(capsys, "train_sft.py", *argv.split())


def test_the_weight_of_kd_is_one_minus_alpha(tmp_path):
    assert parse("train_distillation.py", "--kd_weight", 0.75).alpha == 0.25
    (tmp_path / "a.yaml").write_text("kd_weight: 0.75\n")
    assert parse("train_distillation.py", "--config", tmp_path / "a.yaml").alpha == 0.25
    assert parse("train_distillation.py", "--config", tmp_path / "a.yaml", "--alpha", 0.5).alpha == 0.5


# ---- YAML ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, says", [
    ("resume: yes", "'resume' takes true or false, not 'yes'"), ("epochs: [1, 2]", "'epochs' takes one value"),
    ("teacher: [[a]]", "takes plain values"), ("training:\n  student:\n    a: 1", "'student' takes one value"),
    ("a:\n  epochs: 1\nb:\n  epochs: 2", "'epochs' is given twice"), ("epochs:", "'epochs' takes one value"),
    ("7: 1", "line 1: '7' is no flag"), ("epochs: 1\nseed: 0\nepochs: 2", "line 3: 'epochs' is given twice"),
    ("training:\n  epoch: 2", "line 2: 'epoch' is no flag; did you mean 'epochs'?"),
    ("epochs: many", "'epochs': argument --epochs: invalid int value: 'many'"), ("config: a.yaml", "'config' is no flag"),
    ("optimizer: sgd", "invalid choice: 'sgd'"), ("? [a]\n: 1", "is no flag"), ("a: [", "not YAML"), ("- a", "must hold lines like"),
])
def test_a_bad_yaml_file_is_refused_with_the_file_the_key_and_what_it_takes(text, says, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    said = refusal(capsys, "train_distillation.py", "--config", path)
    assert str(path) in said and says in said
    path.write_bytes(text.encode("utf-16"))
    assert f"{path} is not YAML in UTF-8" in refusal(capsys, "train_distillation.py", "--config", path)


def test_a_number_of_a_config_is_in_its_range_and_a_switch_may_be_in_quotes(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("batch_size: 0")
    assert "--batch_size 0 must be 1 or more" in refusal(capsys, "train_sft.py", "--config", path)
    path.write_text("use_moe: 'false'\nresume: \"True\"\n")
    given = parse("train_sft.py", "--config", path)
    assert given.use_moe is False and given.resume is True


def test_keys_of_other_frameworks_are_read_as_they_are_meant(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("""\
model:
  student_path: "Qwen/Qwen3-8B"
  teacher_path: "Qwen/Qwen3-8B"
  enable_thinking: false
  torch_dtype: bfloat16
training:
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 8
  num_train_epochs: 3
skd:
  alpha: 0.75
  kl_direction: reverse
peft:
  enabled: true
""")
    given = vars(parse("train_distillation.py", "--config", path))
    assert {key: given[key] for key in ("student", "teacher", "dtype", "batch_size", "accumulation_steps", "epochs",
                                        "alpha", "divergence", "lora_rank")} == {
        "student": "Qwen/Qwen3-8B", "teacher": ["Qwen/Qwen3-8B"], "dtype": "bfloat16", "batch_size": 2,
        "accumulation_steps": 8, "epochs": 3, "alpha": 0.25, "divergence": "reverse_kl", "lora_rank": 16}
    path.write_text("student_path: a\npeft:\n  enabled: false\n")
    given = parse("train_sft.py", "--config", path)
    assert (given.weights, given.lora_rank) == ("a", 0)
    for text, says in (("enable_thinking: true", "is no flag"), ("kl_direction: backward", "takes forward or reverse"),
                       ("enabled: true", "is no flag"), ("student: a\nstudent_path: b", "is given twice")):
        path.write_text(text)
        assert says in refusal(capsys, "train_distillation.py", "--config", path)


# ---- where, and with how many --------------------------------------------------------------------

@pytest.mark.parametrize("script, config", [("train_distillation.py", "skd"), ("train_sft.py", "seqkd"),
                                            ("train_onpolicy.py", "onpolicy_kd")])
def test_a_config_that_shards_runs_in_one_process(script, config, capsys):
    given = parse(script, "--config", ROOT / f"configs/{config}.yaml")
    assert given.shard == "none" and "one process: without --shard zero" in capsys.readouterr().out
    assert parse(script, "--ddp", "--config", ROOT / f"configs/{config}.yaml").shard.startswith("zero")


def test_a_chain_is_checked_to_its_end_before_its_first_link_is_trained(data, models, tmp_path):
    flags = {"data_path": data / "sft_data.jsonl", "teacher": models / "teacher.pth", "student": "none", "dim": 16,
             "n_layers": 1, "n_heads": 2, "max_steps": 2, "num_workers": 0, "out_dir": tmp_path / "out"}
    for more, says in (({"chain": ["40x2", models / "none.pth"]}, "no weights at"),
                       ({"chain": ["40x2", "24x0"]}, "n_layers=0"),
                       ({"chain": ["40x2"], "feature_weight": 1, "layer_map": "1:4", "max_seq_len": 64}, "'1:4'")):
        printed = complaint("train_distillation.py", **flags | more)
        assert says in printed and "step 1/" not in printed, printed
    assert not list((tmp_path).glob("out/*.pth"))
