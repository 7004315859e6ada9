"""
课程页里引用的代码确在文件里，命令都能跑，两种语言说的是同一件事。
The lesson pages quote code that is there, every command in them runs, and both languages say the same.
"""

import re
import shlex

import helpers_run
import pytest
from helpers_run import FORKS, ROOT
from interop.checkpoint import new_model, save_model
from model.config import LMConfig
from test_readme import COMMANDS, SMALL, commands, small

PAGES = sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/lessons/*_zh.md"))
PAIRS = [(page.with_name(page.name.replace("_zh.md", ".md")), page) for page in PAGES]
BOTH = [page for pair in PAIRS for page in pair]
OWN = [command for page, _ in PAIRS for command in commands(page) if command not in COMMANDS]
# The models that quickstart.sh leaves for the lessons, untrained.
MODELS = {"pretrain_64": (64, 2, 4), "full_sft_64": (64, 2, 4), "full_sft_128": (128, 4, 8)}


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", (ROOT / page).read_text(), flags=re.DOTALL)


def stands_in(quoted: list[str], lines: list[str]) -> bool:
    """Whether these lines follow each other somewhere among those, all of them indented by as much."""
    for first in range(len(lines) - len(quoted) + 1):
        indent = lines[first].removesuffix(quoted[0])
        if not indent.strip() and lines[first:first + len(quoted)] == [(indent + line).rstrip() for line in quoted]:
            return True
    return False


@pytest.mark.parametrize("page", [page for page, _ in PAIRS], ids=lambda page: page.stem)
def test_quoted_code_stands_in_the_file_that_its_first_line_names(page):
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        where, *quoted = block.splitlines()
        lines = (ROOT / where.removeprefix("# ")).read_text().splitlines()
        assert stands_in(quoted, lines), f"{page}: not in {where.removeprefix('# ')}:\n{block}"


def test_code_is_found_at_any_indent_but_only_in_one_piece():
    lines = ["def f():", "    a = 1", "    if a:", "        b = 2"]
    assert stands_in(["a = 1", "if a:", "    b = 2"], lines)
    assert not stands_in(["a = 1", "    b = 2"], lines)
    assert not stands_in(["= 1"], lines)


def test_every_lesson_is_there_in_both_languages():
    assert len(PAIRS) == 12
    assert sorted(map(str, BOTH)) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/lessons/*.md"))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].stem)
def test_both_languages_have_the_same_code_commands_and_figures(pair):
    def figures(page):
        lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("|")]
        return [re.findall(r"\d+(?:[.,]\d+)*", line) for line in lines]

    ours, theirs = pair
    assert blocks(ours, "python") == blocks(theirs, "python")
    assert commands(ours) == commands(theirs)
    assert figures(ours) == figures(theirs)


@pytest.mark.parametrize("language", [0, 1], ids=["en", "zh"])
def test_all_lessons_have_the_same_parts_in_the_same_order(language):
    texts = [(ROOT / pair[language]).read_text() for pair in PAIRS]
    assert len({tuple(re.findall(r"^## .*|^<.*", text, flags=re.MULTILINE)) for text in texts}) == 1


def test_links_lead_to_files_and_the_index_names_every_page():
    index = ROOT / "docs/README.md"
    linked = {}
    for page in [index, *(ROOT / page for page in BOTH)]:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        linked[page] = {(page.parent / link).resolve() for link in links if "://" not in link}
        missing = [str(path) for path in linked[page] if not path.exists()]
        assert not missing, f"{page}: {missing}"
    assert linked[index] >= {(ROOT / page).resolve() for page in BOTH}


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def classroom(tmp_path_factory, data):
    """The repo as a reader has it after quickstart.sh, with models that have learned nothing and little data."""
    folder = tmp_path_factory.mktemp("classroom")
    for path in ROOT.iterdir():
        if path.name not in ("out", "dataset", ".git", ".cache"):
            (folder / path.name).symlink_to(path)
    (folder / "dataset").mkdir()
    for path in [*(ROOT / "dataset").glob("*.py"), *data.iterdir()]:
        (folder / "dataset" / path.name).symlink_to(path)
    for name, (dim, n_layers, n_heads) in MODELS.items():
        config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=128)
        save_model(*new_model(config, ROOT / "model/tokenizer.json"), folder / f"out/{name}.pth")
    return folder


def tiny(command: str) -> list[str]:
    """A lesson's command in two steps; models keep their width, by which later commands name them."""
    _, *words = shlex.split(command) + SMALL if "--dim " in command else small(command)
    if words[0] == "-m":
        words[:2] = [words[1].replace(".", "/") + ".py"]
    if words[0] == "scripts/evaluate.py":
        words += ["--limit", "4"]
    if words[0] == "scripts/generate_answers.py":                   # drawn: the likeliest token of an untrained model is no word
        words += ["--temperature", "1", "--max_new_tokens", "2"]
    return words


def execute_in(folder, *arguments):
    """In the fork: the script is run there and not in the repo."""
    helpers_run.ROOT = folder
    helpers_run.execute(*arguments)


@pytest.mark.parametrize("command", OWN)
def test_a_command_of_a_lesson_runs(command, classroom):
    output = classroom / "output"
    output.write_text("")
    process = FORKS.Process(target=execute_in, args=(classroom, tiny(command), {}, "3 plus 4?\n", output, classroom / "cache"))
    process.start()
    process.join(60)
    assert process.exitcode == 0, output.read_text()
