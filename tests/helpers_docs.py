"""
文档里的命令：取出来，换成两步的小设置，在 quickstart.py --smoke 的模型上运行。
The commands of the docs: taken from the pages, made small, and run on the models of
`quickstart.py --smoke`.
"""

import csv
import json
import re
import shlex
import shutil
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from dataset.reasoning import build
from helpers_run import ROOT, Shell
from interop import gguf, hf
from interop.checkpoint import new_model, save_model
from model.config import LMConfig
from runtime.files import write_jsonl
from scripts.train_tokenizer import read_texts, train


def blocks(page, language: str) -> list[str]:
    """The code blocks of a page in this language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)


def commands(*pages) -> list[str]:
    """The commands of the bash blocks of these pages, without comments and repetitions: each is a
    line, and those that are indented below it."""
    lines = [re.sub(r"\s+#.*", "", line).strip()
             for page in pages for block in blocks(page, "bash")
             for line in re.sub(r"( \\)?\n +", " ", block).splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def stands_in(quoted: list[str], lines: list[str]) -> bool:
    """Whether these lines follow each other somewhere among those, all indented by as much."""
    for first in range(len(lines) - len(quoted) + 1):
        indent = lines[first].removesuffix(quoted[0])
        of_file = lines[first:first + len(quoted)]
        if not indent.strip() and of_file == [(indent + line).rstrip() for line in quoted]:
            return True
    return False


def figures(page) -> list[list[str]]:
    """The numbers of each table row of a page."""
    return [re.findall(r"\d+(?:[.,]\d+)*", line)
            for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
            if line.startswith("|")]


# The pages and the test file that runs their commands. Each file has a folder of its own, so pages
# that use what another page's commands made stand in one file, behind it.
QUICKSTART = ("README.md", "docs/results.md", "docs/losses.md", "docs/offline.md", "docs/arena.md",
              "docs/speed.md")
PROMPTS = ("docs/experience.md", "docs/memory.md")
STAGES = ("docs/curriculum.md", "docs/ability_tree.md")
MODELS = ("docs/data.md", "docs/models.md", "docs/real_teachers.md", "docs/your_model.md")
SERVED = ("docs/served_teachers.md",)
CLASS = ("docs/teaching.md",)
PAGES = QUICKSTART + PROMPTS + STAGES + MODELS + SERVED + CLASS


# ------------------------------------------------------------------------- the commands, made small

TRAINING = ("train_pretrain.py", "train_sft.py", "train_distillation.py", "train_onpolicy.py",
            "train_curriculum.py")
LAUNCHERS = ("scripts/run_skd.sh", "scripts/run_seqkd.sh", "scripts/run_onpolicy_kd.sh")
TINY_BENCHMARKS = {
    "benchmarks.step": "--shapes test --vocab 64 --steps 1",
    "benchmarks.loss": "--tokens 16 --dim 8 --vocab 50 --repeats 1",
    "benchmarks.generate": "--cases 1 --prompt 4 --new_tokens 4 --dim 32 --n_layers 1 --repeats 1",
    "benchmarks.scaling": "--dim 32 --n_layers 1 --tokens 16 --length 8 --vocab 64 --steps 1 "
                          "--axes processes",
}
ROWS = {None: "SFT", "configs/compare_experience.yaml": "on-policy, MiniLLM + replay",
        "configs/compare_curriculum.yaml": "the curriculum", "configs/compare_methods.yaml": "SKD",
        "configs/compare_ability.yaml": "no new questions",
        "configs/compare_reasoning.yaml": "on-policy, T 1.5", "configs/compare_rl.yaml": "both",
        "configs/compare_routed.yaml": "routed",                  # a row of each comparison
        "configs/compare_teachers.yaml": "of the first teacher", "configs/compare_pruning.yaml": "3 x 192",
        "configs/compare_cache.yaml": "14 samples, 28 bytes"}
# The models that lesson 13 makes, and the lessons after it start from: their widths.
REASONING_MODELS = {"full_sft_48": 48, "full_sft_64": 64, "teacher/full_sft_64": 64}
# What makes a command small. argparse takes the last value of a flag, so a flag can be given again.
SMALL = ["--max_steps", "2", "--batch_size", "4", "--num_workers", "0"]


def sixteenth(match) -> str:
    return str(int(match[0]) // 16)


def small(command: str) -> list[str]:
    """The same command for models of 1/16 of the width (768 -> 48, 256 -> 16), and two steps. Those
    of the reasoning world and of experience are small and keep their width."""
    if (("--dim" in command or "out/real" in command)
            and not re.search("out/experience|reasoning", command)):
        command = re.sub(r"(?<=--dim )\d+|(?<=full_sft_)\d+", sixteenth, command)
    command = command.replace("dim=1024, n_layers=24, n_heads=16", "dim=32, n_layers=2, n_heads=2")
    words = shlex.split(re.sub(r"full_(dist|sft)_(192|384|576)", r"full_\1_32", command))
    if re.search(r"configs/(stories|smollm2|gpt2)", command):
        words += ["--dim", "32", "--val_fraction", "0.2"]           # of few rows
    if "quickstart.py" in words:
        return ["2" if word == "3" else word for word in words] + ["--smoke"]
    if "scripts/train_tokenizer.py" in words:
        return words if "reasoning" in command else [*words, "--vocab_size", "600"]
    if "-m" in words and words[2] in TINY_BENCHMARKS:
        return words + shlex.split(TINY_BENCHMARKS[words[2]])
    if "scripts/compare.py" in words:
        config = words[words.index("--config") + 1] if "--config" in words else None
        return [*words, "--updates", "20", "--processes", "1", "--seeds", "1", "--seconds", "0",
                "--rows", ROWS[config]]
    if "scripts/generate_answers.py" in words:
        # The model has not learned to end an answer, nor to give the right one, nor to write a text.
        words = [word for word in words if word != "--only_right"] + ["--keep_unfinished"]
        untrained = "--teacher_url" in words or "questions.csv" in words
        return words + ["--temperature", "1"] * untrained
    if set(words) & set(LAUNCHERS):
        return ["env", "NPROC=2", *words, *SMALL]
    if "out/experience" in words and "none" in words:   # enough to write letters
        return words + SMALL + ["--max_steps", "60", "--batch_size", "8", "--n_layers", "1"]
    if "out/ability/teacher" in words:                  # enough to write a readable question
        model = ["--weights", "none", "--dim", "128", "--n_layers", "2", "--n_heads", "2"]
        return [*words, *SMALL, *model, "--data_path", "lesson.jsonl", "--max_steps", "60",
                "--batch_size", "34", "--learning_rate", "1e-2", "--max_seq_len", "128"]
    if "train_ability_tree.py" in words:
        return [*words, "--n_samples", "80", "--max_steps", "2", "--batch_size", "4"]
    if "train_curriculum.py" in words:                  # the batch sizes stand in its stages
        return [*words, "--max_steps", "2", "--num_workers", "0", "--eval_samples", "4",
                "--max_new_tokens", "4"]
    if set(words) & set(TRAINING):
        more = ["--n_heads", "2", "--n_layers", "2"] if "--dim" in words else []
        return words + SMALL + more
    if {"scripts/evaluate.py", "scripts/report.py"} & {*words}:
        return [*words, "--limit", "8", "--max_new_tokens", "8"]
    if "scripts/speculate.py" in words:
        return [*words, "--limit", "2", "--max_new_tokens", "8"]
    if "scripts/chat.py" in words:
        return [*words, "--max_new_tokens", "8"]
    if "dataset/miniworld.py" in words:
        return [*words, "--smoke"]
    if "dataset/reasoning.py" in words:
        return [*words, "--base_size", "500"]
    return words


# ----------------------------------------------------------------------------- a reader of the docs


class Newcomer(NamedTuple):
    folder: Path        # a copy of the repo after `python quickstart.py --smoke`, with stand_ins
    shell: Shell

    def run(self, command: str):
        """Run it, made small. It must exit with 0. What a shell script starts has one process: the
        two of quickstart.py and of the launchers are tested elsewhere."""
        most = 1 if "bash" in command else 2
        ended = self.shell.run(small(command), self.folder, stdin="3 plus 4?\n", processes=most)
        assert ended.code == 0, ended.output


def stand_ins(folder: Path):
    """Files that the docs' commands read: the quickstart's models and data where the real ones would
    be, and small models and texts instead of downloads. A file's content tells its format."""
    shutil.copytree(folder / "out/smoke", folder / "out", dirs_exist_ok=True)
    shutil.copytree(folder / "out/smoke/dataset", folder / "dataset", dirs_exist_ok=True)
    data = folder / "dataset"
    sentences = [json.loads(line)["text"] for line in open(data / "pretrain_data.jsonl")]
    for name in ("text.txt", "tinystories.txt"):
        (folder / name).write_text("\n\n".join(sentences))
    (folder / "TinyStories-valid.txt").write_text(
        "".join(f"{text}\n<|endoftext|>\n" for text in sentences))
    for name, like in (("songci.jsonl", "pretrain_data.jsonl"), ("chats.jsonl", "sft_data.jsonl"),
                       ("sharegpt.jsonl", "sft_data.jsonl"), ("alpaca.json", "alpaca_data.json"),
                       ("alpaca_3k.json", "alpaca_data.json")):
        shutil.copy(data / like, folder / name)
    for name in ("tickets.csv", "tickets_test.csv", "questions.csv"):
        with open(folder / name, "w", newline="") as table:
            out = csv.writer(table)
            out.writerow(["ticket", "customer_message", "agent_reply"])
            for i, line in enumerate(islice(open(data / "sft_data.jsonl"), 40)):
                question, answer = (turn["content"] for turn in json.loads(line)["conversations"][-2:])
                out.writerow([i, question, "" if name == "questions.csv" else answer])
    with open(folder / "lesson.jsonl", "w") as lesson:      # writing questions, and answering them
        for line in open(data / "writer_data.jsonl"):
            question, answer = json.loads(line)["conversations"][1]["content"].split(" => ")
            lesson.write(line + json.dumps({"question": question, "answer": answer}) + "\n")
    (folder / "exams").mkdir()
    shutil.copy(data / "mcq_test.jsonl", folder / "exams/arc_easy.jsonl")
    with open(folder / "alfworld.jsonl", "w") as tasks:
        for i, line in enumerate(open(data / "experience_base.jsonl")):
            row = json.loads(line) | {"id": f"{i % 9}/{i}", "task_type": i % 2}
            tasks.write(json.dumps(row) + "\n")

    sizes = {"dim": 32, "n_layers": 30, "n_heads": 2, "max_seq_len": 1024}
    reasoning_world(folder)
    gguf.write(*new_model(LMConfig(**sizes)), folder / "out/smollm2.gguf")
    shutil.copy(folder / "out/smollm2.gguf", folder / "out/stories260K.bin")
    hf.write(*new_model(LMConfig(architecture="gpt2", **sizes)), folder / "out/gpt2-medium")


def reasoning_world(folder: Path):
    """What the first commands of lesson 13 make: dataset/reasoning with few base rows, and the
    models, untrained. The comparisons in configs/ make their models in two steps."""
    data, out = folder / "dataset/reasoning", folder / "out/reasoning"
    for name, rows in build(0, 500).items():
        write_jsonl(data / f"{name}.jsonl", rows)
    texts = (text for name in ("base", "roads_teacher", "numbers_teacher")
             for text in read_texts(data / f"{name}.jsonl", max_bytes=1e8))
    out.mkdir(parents=True, exist_ok=True)
    train(texts, 420).save(out / "tokenizer.json")
    for name, dim in REASONING_MODELS.items():
        config = LMConfig(dim=dim, n_layers=2, n_heads=4, max_seq_len=128)
        save_model(*new_model(config, out / "tokenizer.json"), out / f"{name}.pth")
    for config in filter(None, ROWS):
        plan = (folder / config).read_text(encoding="utf-8")
        if "dataset/reasoning" in plan:
            plan = re.sub(r"--max_steps \d+", "--max_steps 2", plan)
            plan = re.sub(r"--max_new_tokens \d+", "--max_new_tokens 8", plan)
            plan = plan.replace("scripts/evaluate.py", "scripts/evaluate.py --limit 4")
            (folder / config).write_text(plan, encoding="utf-8")
