"""
文档的规律：两种语言的命令与数字相同，引用的代码就是文件里的代码，链接有效，用语规范；入门各页的命令都能运行。
Laws of the docs: both languages have the same commands and figures, quoted code is the file's code,
links lead to files, the terms are the field's; and the commands of the first pages run, on the models
of `quickstart.py --smoke`, for two steps.
"""

import re
import subprocess
import sys

import pytest
from conftest import CORE
from helpers_docs import (PAGES, QUICKSTART, SMALL, blocks, commands, figures, small,  # noqa: F401
                          stands_in)
from helpers_run import ROOT

COMMANDS = commands(*PAGES)
MANUAL = [page for page in PAGES if page != "README.md"]
# Phrases of a private dialect, and what the field says.
DIALECT = {
    r"from nothing": "from scratch, randomly initialised",
    r"below the (words|logits)": "intermediate-layer losses",
    r"\b(is|are|being) told\b": "with privileged context",
    r"\b(has|have) (a|no) say\b": "is used, is masked",
    r"seconds of the processor|processor's seconds": "CPU seconds",
    r"longest gradient": "gradient norm",
    r"likeliest (words?|tokens?)": "most likely token, top-k tokens",
    r"\b(numbers|a number) that suits? ": "hyperparameters",
    r"goes on where it stood": "resumes",
    r"mass of the rest": "tail probability",
    r"student in between": "teacher assistant",
}


def chinese(page: str) -> str:
    return page.removesuffix(".md") + "_zh.md"


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_code_commands_and_figures(page):
    assert commands(page) == commands(chinese(page))
    assert blocks(page, "python") == blocks(chinese(page), "python")
    assert blocks(page, "console") == blocks(chinese(page), "console")
    assert figures(page) == figures(chinese(page))


def test_the_loop_of_the_readme_is_that_of_the_lesson():
    [loop] = blocks("README.md", "python")
    where, *quoted = loop.splitlines()
    assert where == "# train_distillation.py" and any("backward()" in line for line in quoted)
    lines = (ROOT / "train_distillation.py").read_text(encoding="utf-8").splitlines()
    assert stands_in(quoted, lines), f"not in train_distillation.py:\n{loop}"


def test_code_is_found_at_any_indent_but_only_in_one_piece():
    lines = ["def f():", "    a = 1", "    if a:", "        b = 2"]
    assert stands_in(["a = 1", "if a:", "    b = 2"], lines)
    assert not stands_in(["a = 1", "    b = 2"], lines)
    assert not stands_in(["= 1"], lines)


def test_every_page_of_the_manual_is_in_the_index_in_both_languages_and_no_page_is_long():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in [name for page in MANUAL for name in (page, chinese(page))]:
        assert f"({page.removeprefix('docs/')})" in index, page
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 200, page
    for page in ("README.md", "README_zh.md"):
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 250, page


def test_links_lead_to_files():
    pages = [page for name in PAGES for page in (name, chinese(name))]
    for page in [*pages, "docs/README.md", "NOTES.md"]:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
        missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
        assert not missing, f"{page}: {missing}"


def test_the_core_names_tests_that_exist():
    """`bash test.sh -m core` runs what tests/conftest.py lists."""
    for file, _, test in (entry.partition("::") for entry in CORE):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test.partition('[')[0]}" in text, f"{file}::{test}"


@pytest.mark.parametrize("phrase", DIALECT)
def test_the_terms_are_those_of_the_field(phrase):
    """In docs, help texts, comments and names. Not in tests: their data speak as people do."""
    command = ["git", "ls-files", "*.md", "*.py", "*.yaml", "*.sh"]
    listed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    found = []
    for name in listed.split():
        if not name.startswith("tests/") and "_zh" not in name:
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1)
                      if re.search(phrase, line, flags=re.IGNORECASE)]
    assert not found, "\n".join([f'"{phrase}" is "{DIALECT[phrase]}":', *found])


# ------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("command", commands(*QUICKSTART))
def test_a_command_of_the_first_pages_runs(command, newcomer):
    newcomer.run(command)


def test_the_main_job_runs_under_torchrun_itself(newcomer):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ["train_distillation.py", "--ddp", *SMALL, "--out_dir", "out/real"]
    ended = subprocess.run([*launcher, *script], cwd=newcomer.folder, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert ended.returncode == 0, ended.stdout
