"""
两份 README 说的是同一件事，其中每条命令都能跑。
Both READMEs say the same, and every command in them runs: here on the models of `quickstart.sh --smoke`, for two steps.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_run import ROOT
from interop.checkpoint import new_model
from model.config import LMConfig
from interop import gguf, hf


def commands(name: str) -> list[str]:
    """The lines of a README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = commands("README.md")
TRAINING = ("train_pretrain.py", "train_sft.py", "train_distillation.py", "train_onpolicy.py", "train_curriculum.py")
LAUNCHERS = ("scripts/run_skd.sh", "scripts/run_seqkd.sh", "scripts/run_onpolicy_kd.sh")
TINY_BENCHMARKS = {
    "benchmarks.step": "--shapes test --vocab 64 --steps 1",
    "benchmarks.generate": "--cases 1 --prompt 4 --new_tokens 4 --dim 32 --n_layers 1 --repeats 1",
    "benchmarks.data": "--rows 20 --repeats 1",
    "benchmarks.ddp": "--model 32x1 --tokens 16 --length 8 --steps 1 --repeats 1",
    "benchmarks.scaling": "--model 32x1 --tokens 16 --length 8 --vocab 64 --steps 1 --repeats 1 --axes tokens=16,32",
}
# What makes a command small. argparse takes the last value of a flag, so numbers can be said again.
SMALL = ["--max_steps", "2", "--batch_size", "4", "--num_workers", "0"]


def sixteenth(match) -> str:
    return str(int(match[0]) // 16)


def small(command: str) -> list[str]:
    """The same command for models of a sixteenth the width (768 -> 48, 256 -> 16), and two steps."""
    if ("--dim" in command or "out/real" in command) and "out/experience" not in command:
        command = re.sub(r"(?<=--dim )\d+|(?<=full_sft_)\d+", sixteenth, command)
    words = shlex.split(re.sub(r"full_(dist|sft)_(384|576)", r"full_\1_32", command))
    if re.search(r"configs/(stories|smollm2|gpt2)", command):
        words += ["--dim", "32", "--val_fraction", "0.2"]           # of few rows
    if "quickstart.sh" in words:
        return ["2" if word == "3" else word for word in words] + ["--smoke"]
    if "scripts/train_tokenizer.py" in words:
        return [*words, "--vocab_size", "600"]
    if "benchmarks.loss" in words:
        return [*words, "--tokens", "16", "--dim", "8", "--vocab", "50", "--repeats", "1"]
    if "-m" in words and words[2] in TINY_BENCHMARKS:
        return words + shlex.split(TINY_BENCHMARKS[words[2]])
    if "scripts/compare.py" in words:
        return [*words, "--updates", "20", "--processes", "1", "--seeds", "1", "--seconds", "0", "--rows", "SFT"]
    if "--measure" in words:
        return [*words, "1"]
    if "benchmarks.experience" in words:
        return [*words, "--seeds", "1", "--steps", "2", "--methods", "SeqKD", "on-policy, MiniLLM"]
    if "scripts/generate_answers.py" in words:
        return [*words, "--keep_unfinished"]                        # of a model that has not learned to end an answer
    if set(words) & set(LAUNCHERS):
        return ["env", "NPROC=2", *words, *SMALL]
    if "out/experience" in words and "none" in words:               # enough to write letters, where others only begin
        return words + SMALL + ["--max_steps", "80", "--batch_size", "8"]
    if "benchmarks.curriculum" in words:
        return [*words, "--seeds", "1", "--steps", "2", "2", "2", "--methods", "from nothing: specialist alone",
                "general first: the curriculum"]
    if "out/ability/teacher" in words:                              # it must learn to write what can be read as a question
        return words + SMALL + ["--max_steps", "250", "--batch_size", "32", "--learning_rate", "5e-3"]
    if "benchmarks.ability" in words:
        return [*words, "--seeds", "1", "--n_samples", "80", "--steps", "2", "--batch_size", "4", "--methods",
                "no new questions", "questions for weak leaves"]
    if "train_ability_tree.py" in words:
        return [*words, "--n_samples", "80", "--max_steps", "2", "--batch_size", "4"]
    if "train_curriculum.py" in words:                              # the batch sizes stand in its stages
        return [*words, "--max_steps", "2", "--num_workers", "0", "--eval_samples", "8"]
    if set(words) & set(TRAINING):
        return words + SMALL + (["--n_heads", "2", "--n_layers", "2"] if "--dim" in words else [])
    return words


@pytest.fixture(scope="module")
def newcomer(clone):
    """The folder after the first command, its smoke results standing where the real ones would."""
    shutil.copytree(clone / "out/smoke", clone / "out", dirs_exist_ok=True)
    shutil.copytree(clone / "out/smoke/dataset", clone / "dataset", dirs_exist_ok=True)
    # What the sections on one's own data and on real data speak of.
    sentences = [json.loads(line)["text"] for line in open(clone / "dataset/pretrain_data.jsonl")]
    for name in ("text.txt", "tinystories.txt"):
        (clone / name).write_text("\n\n".join(sentences))
    for name, like in (("songci.jsonl", "pretrain_data.jsonl"), ("chats.jsonl", "sft_data.jsonl"),
                       ("sharegpt.jsonl", "sft_data.jsonl"), ("alpaca.json", "alpaca_data.json")):
        shutil.copy(clone / "dataset" / like, clone / name)

    (clone / "exams").mkdir()
    shutil.copy(clone / "dataset/mcq_train.jsonl", clone / "exams/arc_easy.jsonl")

    with open(clone / "alfworld.jsonl", "w") as tasks:
        for i, line in enumerate(open(clone / "dataset/experience_base.jsonl")):
            tasks.write(json.dumps(json.loads(line) | {"id": f"{i % 9}/{i}", "task_type": i % 2}) + "\n")

    # Stand-ins for the models and stories that are downloaded. What a file holds tells its format, not its name.
    sizes = {"dim": 32, "n_layers": 30, "n_heads": 2, "max_seq_len": 1024}
    gguf.write(*new_model(LMConfig(**sizes)), clone / "out/smollm2.gguf")
    shutil.copy(clone / "out/smollm2.gguf", clone / "out/stories260K.bin")
    hf.write(*new_model(LMConfig(architecture="gpt2", **sizes)), clone / "out/gpt2-medium")
    (clone / "TinyStories-valid.txt").write_text("".join(f"{text}\n<|endoftext|>\n" for text in sentences))
    return clone


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs(command, newcomer):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(small(command), cwd=newcomer, env=environment, input="3 plus 4?\n", text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 0, ended.stdout


def test_both_readmes_have_the_same_commands():
    assert commands("README_zh.md") == COMMANDS


def test_both_readmes_have_the_same_figures():
    """Every number of a table row stands in both."""
    tables = [[re.findall(r"\d+(?:[.,]\d+)*", line)
               for line in (ROOT / name).read_text().splitlines() if line.startswith("|")]
              for name in ("README.md", "README_zh.md")]
    assert tables[0] == tables[1]


def test_every_flag_stands_in_the_readme():
    flags = {flag for script in (*TRAINING, "train_ability_tree.py", "runtime.py")
             for flag in re.findall(r'add\("(--\w+)"', (ROOT / script).read_text())}
    assert flags and {flag for flag in flags if f"`{flag}`" not in (ROOT / "README.md").read_text()} == set()
