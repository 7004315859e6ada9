"""
上课用的规律：仓库里的小模型就是 quickstart.py 的模型，分数也是；重置不丢任何文件。
Laws of class.sh: the models in model/tiny have the scores of the docs, and a reset loses no file.
"""

import shutil
import subprocess

import pytest

from dataset.miniworld import generate
from helpers_docs import CLASS, commands
from evaluation.metrics import measure, read_tests
from helpers_run import ROOT
from interop.checkpoint import load_model

TINY = ROOT / "model/tiny"
SCORES = (("full_sft_128.pth", 95.7, 0.072), ("full_sft_64.pth", 8.1, 0.237), ("sft_alone/full_sft_64.pth", 37.2, 0.397),
          ("full_dist_64.pth", 81.0, 0.080))


@pytest.fixture
def repo(tmp_path):
    """What class.sh needs of the repo, as a git repository with two files more."""
    (tmp_path / "dataset").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("dataset/test.jsonl", "out/README.md", "train_sft.py"):
        (tmp_path / name).write_text(name)
    shutil.copy(ROOT / "class.sh", tmp_path)
    shutil.copytree(TINY, tmp_path / "model/tiny")
    (tmp_path / ".gitignore").write_text("/out/*\n!/out/README.md\n/dataset/*.jsonl\n/groups/\n/out.*/\n")
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def bash(repo, *words, code=0) -> str:
    ended = subprocess.run(["bash", "class.sh", *words], cwd=repo, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


def test_the_models_that_come_with_the_repo_have_the_scores_that_the_docs_say(tmp_path):
    generate(tmp_path)
    tests = read_tests([str(tmp_path / "test.jsonl"), str(tmp_path / "test_habits.jsonl")])
    page = (ROOT / "docs/teaching.md").read_text(encoding="utf-8")
    for name, exact_match, habits_kl in SCORES:
        found = measure(*load_model(TINY / name), tests)
        assert found["exact_match"] == pytest.approx(exact_match, abs=0.5), name
        assert found["habits_kl"] == pytest.approx(habits_kl, abs=0.01), name
        assert f"| {exact_match} | {habits_kl:.3f} |" in page
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 4e6


def test_a_reset_gives_the_same_start_and_keeps_what_was_there(repo):
    bash(repo, "reset")
    assert (repo / "out/full_sft_128.pth").read_bytes() == (TINY / "full_sft_128.pth").read_bytes()
    assert not (repo / "out.1").exists() and (repo / "out/README.md").exists()
    (repo / "out/mine.pth").write_text("mine")
    (repo / "out/full_dist_64.pth").write_text("mine, too")
    assert "out.1" in bash(repo, "reset")
    assert [(repo / "out.1" / name).read_text() for name in ("mine.pth", "full_dist_64.pth")] == ["mine", "mine, too"]
    assert not (repo / "out/mine.pth").exists()
    assert (repo / "out/full_dist_64.pth").read_bytes() == (TINY / "full_dist_64.pth").read_bytes()
    bash(repo, "reset")
    assert (repo / "out.2").is_dir()


def test_a_group_has_a_copy_of_its_own(repo):
    bash(repo, "group", "blue")
    assert (repo / "groups/blue/train_sft.py").read_text() == "train_sft.py"
    assert (repo / "groups/blue/dataset/test.jsonl").exists() and (repo / "groups/blue/out/full_sft_64.pth").exists()
    assert "exists already" in bash(repo, "group", "blue", code=1)
    assert "bash class.sh group NAME" in bash(repo, "group", "../x", code=1)
    assert "bash class.sh reset" in bash(repo, code=1)


@pytest.mark.parametrize("command", commands(*CLASS))
def test_a_command_of_the_page_runs(command, newcomer):
    newcomer.run(command)
