"""
房子的规律：谁可以导入谁，每一课都把循环写在自己的文件里。
Laws of the layout: who may import whom, and that every lesson shows its loop in its own file.
"""

import ast
import re
import subprocess
import sys

import pytest

from helpers_run import ROOT

# Every folder may import itself and these. Nothing imports a script or a benchmark; a benchmark may import the lesson whose loop
# it measures.
MAY_IMPORT = {
    "runtime": [],
    "model": ["runtime"],
    "dataset": ["runtime"],
    "distill": ["dataset", "runtime"],
    "interop": ["model", "runtime"],
    "evaluation": ["dataset", "distill", "interop", "model", "runtime"],
    "ability_tree": ["dataset", "evaluation", "interop", "model", "runtime"],
    "scripts": ["dataset", "distill", "evaluation", "interop", "model", "runtime"],
    "exercises": ["runtime"],
    "benchmarks": ["dataset", "distill", "evaluation", "interop", "model", "runtime"],
}
LESSONS = ["train_pretrain.py", "train_sft.py", "train_distillation.py", "train_onpolicy.py", "train_curriculum.py"]


def imported(path) -> set[str]:
    """The first parts of all names that a file imports, at its top or within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_lies_below_it(folder):
    ours = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("train_*.py") if folder != "benchmarks")}
    allowed = {folder, *MAY_IMPORT[folder]}
    wrong = {f"{path.relative_to(ROOT)} imports {name}" for path in (ROOT / folder).rglob("*.py")
             for name in imported(path) & ours - allowed}
    assert not wrong


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_shows_its_loop_in_its_own_file(lesson):
    source = (ROOT / lesson).read_text()
    steps = [r"OPTIMIZERS\[args\.optimizer\]\(", r"for step in ", r'group\["lr"\] = lr', r"for micro", r"sync_gradients\(",
             r"\.backward\(\)", r"clip_grad_norm_\(", r"scaler\.step\(optimizer\)", r"optimizer\.zero_grad\(",
             r"log\.row\(", r"save_model\(", r"stop\.agreed\(", r"save_resume\("]
    places = []
    for step in steps[1:]:
        found = re.search(step, source)
        assert found, f"{lesson} does not show {step}"
        places.append(found.start())
    assert places == sorted(places), f"{lesson} shows its loop in another order than the other lessons"
    assert re.search(steps[0], source)


def test_the_difference_between_two_lessons_is_a_lecture():
    diff = subprocess.run(["diff", "train_sft.py", "train_distillation.py"], cwd=ROOT, capture_output=True, text=True)
    assert sum(line[:1] in ("<", ">") for line in diff.stdout.splitlines()) <= 200
    assert len((ROOT / "train_distillation.py").read_text().splitlines()) <= 280


def test_lines_are_short_and_no_name_is_unused():
    """See ruff.toml."""
    checked = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
