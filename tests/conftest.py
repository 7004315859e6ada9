"""
各测试共用的材料：小模型、按字节的分词器、小数据、一份跑过快速上手的副本。
What several tests share: a model small enough for a hand, a tokenizer whose ids are bytes, data and weights for whole
runs, and a copy of the repo in which quickstart.py has run.
"""

import fcntl
import os
import shutil
from pathlib import Path

import pytest
import torch

from dataset import lm_dataset
from dataset.miniworld import SMOKE, generate
from helpers_docs import Newcomer, stand_ins
from helpers_run import ROOT, Shell, quickstart
from interop.checkpoint import new_model, save_model
from model.config import LMConfig
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from model.transformer import Transformer

torch.set_num_threads(1)        # on matrices of 16 x 16, handing work to threads takes longer than the work

# `bash test.sh -m core`: in less than two minutes whether an edit broke something important. A file, or
# a test of a file with the beginning of its parameters.
CORE = (
    "test_losses.py", "test_fused.py", "test_model.py", "test_moe.py", "test_lm_dataset.py",
    "test_formats.py",
    # A gradient does not depend on how its samples are split; two processes in each of them.
    "test_training.py::test_eight_samples_give_one_gradient_however_they_are_split",
    "test_onpolicy.py::test_two_processes_take_the_steps_of_one[none]",
    "test_curriculum.py::test_a_step_split_over_processes_or_micro_batches_is_the_same_step",
    "test_ability_runs.py::test_two_processes_write_the_bytes_of_one",
    # An interrupted run ends as the uninterrupted one.
    "test_training.py::test_an_interrupted_run_of_two_processes_goes_on_with_one",
    "test_readme.py::test_both_languages",
)


def pytest_configure(config):
    config.addinivalue_line("markers", "core: the most important tests, less than two minutes")


def pytest_collection_modifyitems(items):
    for item in items:
        name = f"{item.path.name}::{item.name}"
        if any(name.startswith(entry + "::" * ("::" not in entry)) for entry in CORE):
            item.add_marker("core")


@pytest.fixture(scope="session")
def tiny():
    """tiny(n_heads=2, ...) -> a model of 16 x 2 in eval mode. Its weights are drawn wide, norms and biases too, so that
    no part of it is too small to be seen in the logits."""

    def make(seed=0, **sizes):
        sizes = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=12, max_seq_len=24) | sizes
        model = Transformer(LMConfig(**sizes)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
        return model

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    """byte_tokenizer(end_of_text=0) -> no two bytes are joined, so that "a" is 16 + 97 wherever it stands."""

    def make(end_of_text=0):
        special_tokens = SPECIAL_TOKENS | {"<|endoftext|>": end_of_text}
        return Tokenizer(PATTERN, special_tokens, {bytes([value]): 16 + value for value in range(256)})

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The token cache in a folder of its own."""
    monkeypatch.setattr(lm_dataset, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The embedded world, a few hundred rows a file."""
    folder = tmp_path_factory.mktemp("data")
    generate(folder, seed=0, label_noise=0.3, **SMOKE)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """student.pth, student_moe.pth, teacher.pth, teacher_moe.pth: untrained, the teachers with opinions."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, dim, n_layers, loudness in (("student", 32, 2, 1), ("teacher", 48, 4, 20)):
        for kind in ("", "_moe"):
            config = LMConfig(dim=dim, n_layers=n_layers, n_heads=2, max_seq_len=128, use_moe=bool(kind))
            model, tokenizer = new_model(config, ROOT / "model/tokenizer.json")
            with torch.no_grad():       # logits of unit size instead of 0.1: a distribution worth imitating
                model.output.weight.mul_(loudness)
            save_model(model, tokenizer, folder / f"{name}{kind}.pth")
    return folder


# ---------------------------------------------------------------------- a copy of the repo, set up


def copy_repo(folder: Path):
    """The repo without what is not tracked, and with an environment that is complete."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git", ".venv", ".cache", "__pycache__", ".pytest_cache", "out", "output", "wandb", "*.jsonl"))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/.installed").touch()


@pytest.fixture(scope="session")
def quickstarted(tmp_path_factory) -> Path:
    """A copy of the repo after `python quickstart.py --smoke`, which the workers of pytest-xdist share:
    the first of them makes it. Read only; `clone` is a copy of it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quickstarted"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            copy_repo(shared / "repo")
            assert "The table is in out/smoke/report.md" in quickstart(shared / "repo")
            (shared / "done").touch()
    return shared / "repo"


@pytest.fixture(scope="session")
def clone(quickstarted, tmp_path_factory) -> Path:
    """A copy of the repo after `python quickstart.py --smoke`."""
    return shutil.copytree(quickstarted, tmp_path_factory.mktemp("clone") / "repo")


@pytest.fixture(scope="module")
def newcomer(quickstarted, tmp_path_factory) -> Newcomer:
    """What a reader of the docs has after the first command: Newcomer(folder, shell)."""
    folder = shutil.copytree(quickstarted, tmp_path_factory.mktemp("newcomer") / "repo")
    stand_ins(folder)
    return Newcomer(folder, Shell(folder / ".venv/bin"))
