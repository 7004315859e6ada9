"""
参数的规律：四百个坏值、三百个坏 YAML，没有回溯，也没有一个被悄悄接受；别家的键名照读。
Laws of the arguments: of 1,000 bad values and YAML files none ends in a traceback and none is
accepted silently; the keys of other frameworks are read as they are meant.
"""

import copy
import functools
import os
import random
from pathlib import Path

import pytest

from helpers_run import ROOT, complaint
from runtime.args import ALIASES, COLUMNS, RANGES, parse_args
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
        assert said.count("\n") == 1 + ("Type:\n" in said) and len(said) > 20, (script, argv, said)
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
            bad += ["9" * 30] if flag.type is int else []
            bad += ["nan", "inf", "-inf", "1e999"] if flag.type in (int, float) else []
            bad += [""] if flag.type is None and not flag.choices and flag.default != "" else []
            for value in (value for value in bad if rng.random() < 0.3):     # of 2,000
                tried += 1
                if refusal(capsys, script, *needed(parser), f"{flag.option_strings[0]}={value}") is None:
                    accepted.append((script, flag.dest, value))
    print(f"{tried} bad values of flags, {len(accepted)} accepted")
    assert tried > 400 and not accepted, accepted


def test_every_default_is_in_its_range(capsys):
    for script in LESSONS[1:]:
        assert refusal(capsys, script) is None


@pytest.mark.parametrize("argv, says", [
    ("--batch_size 0", "--batch_size 0 must be 1 or more"), ("--grad_clip nan", "must be finite"),
    ("--learning_rate inf", "--learning_rate inf must be finite"), ("--val_fraction 1", "must lie in [0, 1)"),
    ("--seed -1", "--seed -1 must be 0 or more"), ("--out_dir=", "--out_dir is empty"),
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

TEXT = """\
models:
  teacher: [big.pth]
  student: small.pth
training:
  learning_rate: 2e-5
  epochs: 3
  resume: true
  out_dir: out/here
  lora_targets: [wq, wv]
"""
# Kind -> what it makes of a line `  key: value`, and what the refusal says.
SPOILED = {
    "a switch as text": (lambda key, value: f"  {key}: '{value}'", ("resume",), None),
    "yes for true": (lambda key, value: f"  {key}: yes", ("resume",), "takes true or false"),
    "a switch as a number": (lambda key, value: f"  {key}: 1", ("resume",), "takes true or false"),
    "a switch for a value": (lambda key, value: f"  {key}: false", ("student", "epochs", "out_dir"), "takes no switch"),
    "a list for one value": (lambda key, value: f"  {key}: [{value}, {value}]",
                             ("student", "learning_rate", "epochs", "resume", "out_dir"), "takes one value"),
    "an empty list": (lambda key, value: f"  {key}: []", ("teacher", "lora_targets"), "is an empty list"),
    "a list in a list": (lambda key, value: f"  {key}: [[{value}]]", ("teacher",), "takes plain values"),
    "a section for a value": (lambda key, value: f"  {key}:\n    a: 1", None, "takes"),
    "given twice": (lambda key, value: f"  {key}: {value}\n  {key}: {value}", None, "is given twice; see line"),
    "no value": (lambda key, value: f"  {key}:", None, "has no value"),
    "null": (lambda key, value: f"  {key}: ~", None, "has no value"),
    "empty text": (lambda key, value: f"  {key}: ''", None, "has no value"),
    "a number as a key": (lambda key, value: f"  7: {value}", None, "unknown key '7'"),
    "a list as a key": (lambda key, value: f"  ? [{key}]\n  : {value}", None, "unknown key"),
    "another key": (lambda key, value: f"  {key}x: {value}", None, "x'; did you mean"),
    "a text as a number": (lambda key, value: f"  {key}: many", ("learning_rate", "epochs"), "invalid"),
    "infinity": (lambda key, value: f"  {key}: inf", ("learning_rate",), "must be finite"),
    "config in a config": (lambda key, value: f"  config: {value}", None, "unknown key 'config'"),
}
ENCODINGS = {"utf-16": "not YAML in UTF-8", "utf-16-be": "not YAML in UTF-8", "utf-32": "not YAML in UTF-8",
             "latin-1": "not YAML in UTF-8"}


def lines_of(text):
    return {line.split(":")[0].strip(): line for line in text.splitlines() if line.startswith("  ")}


def test_three_hundred_spoiled_yaml_files_are_refused_with_file_and_line(tmp_path, capsys):
    rng, counts, path = random.Random(0), {}, tmp_path / "c.yaml"
    for number in range(300):
        kind = rng.choice([*SPOILED, *ENCODINGS])
        data = TEXT.replace("small", "sm\u00e4ll").encode(kind if kind in ENCODINGS else "utf-8")
        says = ENCODINGS.get(kind)
        if kind in SPOILED:
            spoil, keys, says = SPOILED[kind]
            lines = lines_of(TEXT)
            key = rng.choice(keys or list(lines))
            value = lines[key].partition(": ")[2]
            data = TEXT.replace(lines[key], spoil(key, value)).encode()
        path.write_bytes(data)
        said = refusal(capsys, "train_distillation.py", "--lora_rank", 4, "--config", path)
        counts[said is not None] = counts.get(said is not None, 0) + 1
        if says is None:
            assert said is None, (kind, said)
        else:
            assert said and says in said and ("must be finite" in said or str(path) in said), (kind, data, said)
            assert kind in ENCODINGS or kind == "infinity" or "line " in said, said
    print(f"300 spoiled YAML files: {counts}")


def test_bytes_that_are_flipped_inserted_or_cut_end_in_no_traceback(tmp_path, capsys):
    rng, refused, path = random.Random(0), 0, tmp_path / "c.yaml"
    for number in range(300):
        data = bytearray((ROOT / "configs/skd.yaml").read_bytes() if number % 2 else TEXT.encode())
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at:at + rng.randrange(3)] = rng.choice([b"", b":", b"\n", b"[", b"&a ", b"*a", b"\t", bytes([rng.randrange(256)])])
        path.write_bytes(data)
        refused += refusal(capsys, "train_distillation.py", "--lora_rank", 4, "--config", path) is not None
    print(f"300 damaged YAML files: {refused} refused")
    assert refused > 100


def test_a_switch_in_quotes_is_read_right_and_all_unknown_keys_are_named_at_once(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("use_moe: 'false'\nresume: \"True\"\n")
    given = parse("train_sft.py", "--config", path)
    assert given.use_moe is False and given.resume is True
    path.write_text("epoch: 2\ntraining:\n  lerning_rate: 3\n  output_dir: there\n  sed: 4\n")
    said = refusal(capsys, "train_sft.py", "--config", path)
    assert f"{path}, line 1: unknown key 'epoch'; did you mean 'epochs'? line 3: unknown key 'lerning_rate'" in said
    assert "line 5: unknown key 'sed'; did you mean 'seed'?" in said and "output_dir" not in said


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
  r: 8
""")
    given = vars(parse("train_distillation.py", "--config", path))
    assert {key: given[key] for key in ("student", "teacher", "dtype", "batch_size", "accumulation_steps", "epochs",
                                        "alpha", "divergence", "lora_rank")} == {
        "student": "Qwen/Qwen3-8B", "teacher": ["Qwen/Qwen3-8B"], "dtype": "bfloat16", "batch_size": 2,
        "accumulation_steps": 8, "epochs": 3, "alpha": 0.25, "divergence": "reverse_kl", "lora_rank": 8}
    for text, rank in (("enabled: true", 16), ("enabled: false\n  r: 8", 0), ("r: 8\n  enabled: true", 8)):
        path.write_text(f"student_path: a\npeft:\n  {text}\n")
        given = parse("train_sft.py", "--config", path)
        assert (given.weights, given.lora_rank) == ("a", rank)
    for text, says in (("enable_thinking: true", "takes false"), ("kl_direction: backward", "takes forward or reverse"),
                       ("enabled: true", "unknown key"), ("student: a\nstudent_path: b", "is given twice")):
        path.write_text(text)
        assert says in refusal(capsys, "train_distillation.py", "--config", path)
    assert all(any(name in names for name in "student teacher kd_weight".split()) or names in RANGES or not names
               or names in ("dtype", "divergence") for names, _ in ALIASES.values())


# ---- where, and with how many --------------------------------------------------------------------

@pytest.mark.parametrize("script, config", [("train_distillation.py", "skd"), ("train_sft.py", "seqkd"),
                                            ("train_onpolicy.py", "onpolicy_kd")])
def test_a_config_that_shards_runs_in_one_process(script, config, capsys):
    given = parse(script, "--config", ROOT / f"configs/{config}.yaml")
    assert given.shard == "none" and "one process: without the config's --shard zero" in capsys.readouterr().out
    assert parse(script, "--ddp", "--config", ROOT / f"configs/{config}.yaml").shard.startswith("zero")
    assert "--shard zero3 shards the model over" in refusal(capsys, script, "--shard", "zero3")


def test_defaults_and_configs_name_the_files_of_the_repo_from_any_folder(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    for folder in ("dataset", "configs", "out"):
        (repo / folder).mkdir(parents=True)
    (repo / "mine.jsonl").touch()
    (repo / "configs/c.yaml").write_text("val_path: mine.jsonl\nweights: out/exp/a.pth\n")
    monkeypatch.setattr("runtime.args.ROOT", repo)
    monkeypatch.chdir(repo)
    given = parse("train_sft.py", "--config", "configs/c.yaml")
    assert (given.data_path, given.out_dir, given.val_path) == (["./dataset/sft_data.jsonl"], "out", "mine.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = parse("train_sft.py", "--config", "configs/c.yaml", "--tokenizer", "mine.json")
    assert [*given.data_path, given.out_dir, given.val_path, given.weights] == [
        str(repo / name) for name in ("dataset/sft_data.jsonl", "out", "mine.jsonl", "out/exp/a.pth")]
    assert given.tokenizer == "mine.json"               # of the command line: relative to this folder
    Path("dataset").mkdir()
    assert parse("train_sft.py").data_path == ["./dataset/sft_data.jsonl"]      # there is one here


def test_a_chain_is_checked_to_its_end_before_its_first_link_is_trained(data, models, tmp_path):
    flags = {"data_path": data / "sft_data.jsonl", "teacher": models / "teacher.pth", "student": "none", "dim": 16,
             "n_layers": 1, "n_heads": 2, "max_steps": 2, "num_workers": 0, "out_dir": tmp_path / "out"}
    for more, says in (({"chain": ["40x2", models / "none.pth"]}, "no weights at"),
                       ({"chain": ["40x2", "24x0"]}, "n_layers=0"),
                       ({"chain": ["40x2"], "feature_weight": 1, "layer_map": "1:4", "max_seq_len": 64}, "'1:4'")):
        printed = complaint("train_distillation.py", **flags | more)
        assert says in printed and "step 1/" not in printed, printed
    assert not list((tmp_path).glob("out/*.pth"))
