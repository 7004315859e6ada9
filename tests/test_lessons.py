"""
课程页里引用的代码确在文件里，命令都能跑，两种语言说的是同一件事；术语表指向的代码确实存在。
The lesson pages quote code that exists, their commands run, and both languages say the same;
the glossary names code that exists and terms that the lessons use.
"""

import re
import shlex
import shutil

import nbformat
import pytest
from helpers_docs import SMALL, blocks, commands, figures, reasoning_world, small
from helpers_run import ROOT, Shell

from interop.checkpoint import new_model, save_model
from model.config import LMConfig
from scripts.make_notebooks import cells, execute, notebook

CHINESE = sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/lessons/*_zh.md"))
PAIRS = [(page.with_name(page.name.replace("_zh.md", ".md")), page) for page in CHINESE]
ENGLISH = [page for page, _ in PAIRS]
INDEX, GLOSSARY = ROOT / "docs/README.md", ROOT / "docs/glossary.md"
# The models that quickstart.py leaves for the lessons, untrained: (dim, n_layers, n_heads).
MODELS = {"pretrain_64": (64, 2, 4), "full_sft_64": (64, 2, 4), "full_dist_64": (64, 2, 4),
          "full_sft_128": (128, 4, 8)}


def read(page) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def contains(lines: list[str], quoted: list[str]) -> bool:
    """Whether the quoted lines follow each other in lines, all of them indented by as much."""
    for first in range(len(lines) - len(quoted) + 1):
        indent = lines[first].removesuffix(quoted[0])
        if not indent.strip() and lines[first:first + len(quoted)] == [
                (indent + line).rstrip() for line in quoted]:
            return True
    return False


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_quoted_code_is_in_the_file_that_its_first_line_names(page):
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        where, *quoted = block.splitlines()
        file = where.removeprefix("# ")
        assert contains(read(file).splitlines(), quoted), f"{page}: not in {file}:\n{block}"


def test_code_is_found_at_any_indent_but_only_in_one_piece():
    lines = ["def f():", "    a = 1", "    if a:", "        b = 2"]
    assert contains(lines, ["a = 1", "if a:", "    b = 2"])
    assert not contains(lines, ["a = 1", "    b = 2"])
    assert not contains(lines, ["= 1"])


def test_every_lesson_exists_in_both_languages():
    in_index = re.findall(r"^\| \d\d \|", INDEX.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(PAIRS) == len(in_index) >= 12
    pages = sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/lessons/*.md"))
    assert sorted(page for pair in PAIRS for page in pair) == pages


@pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda page: page.stem)
def test_both_languages_have_the_same_code_commands_and_figures(english, chinese):
    assert blocks(english, "python") == blocks(chinese, "python")
    assert commands(english) == commands(chinese)
    assert figures(english) == figures(chinese)


@pytest.mark.parametrize("language", [0, 1], ids=["en", "zh"])
def test_all_lessons_have_the_same_parts_in_the_same_order(language):
    parts = {tuple(re.findall(r"^## .*|^<.*", read(pair[language]), flags=re.MULTILINE))
             for pair in PAIRS}
    assert len(parts) == 1


def test_links_lead_to_files_and_the_index_names_every_page():
    linked = {}
    for page in [INDEX, GLOSSARY, *(ROOT / page for pair in PAIRS for page in pair)]:
        prose = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)      # code indexes, too
        links = re.findall(r"\]\(([^)#]+)\)", prose)
        linked[page] = {(page.parent / link).resolve() for link in links if "://" not in link}
        missing = [str(path) for path in linked[page] if not path.exists()]
        assert not missing, f"{page}: {missing}"
    assert linked[INDEX] >= {(ROOT / page).resolve() for pair in PAIRS for page in pair}


# ------------------------------------------------------------------------------------- glossary


def entries() -> list[list[str]]:
    """The rows of the glossary: term, Chinese term, meaning, Chinese meaning, paper, code."""
    rows = [line for line in read(GLOSSARY).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows[1:]]


def test_the_glossary_names_files_and_what_they_define():
    assert len(entries()) > 40
    for term, _, _, _, _, code in entries():
        if code == "not in this repo":
            continue
        file, name = re.fullmatch(r"`([\w/.]+)` `([\w-]+)`", code).groups()
        defined = rf"^\s*(?:def|class) {name}\b|^{name} = |\"{name}\""
        assert re.search(defined, read(file), flags=re.MULTILINE), f"{term}: {file} has no {name}"


@pytest.mark.parametrize("language", [0, 1], ids=["en", "zh"])
def test_every_term_of_the_glossary_is_used_in_a_lesson(language):
    text = re.sub(r"\s+", " ", "".join(read(pair[language]) for pair in PAIRS)).lower()
    terms = [re.sub(r" \(.*\)", "", row[language]).lower() for row in entries()]
    assert [term for term in terms if term not in text] == []


# ------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def classroom(tmp_path_factory, data):
    """The repo as a reader has it after quickstart.py, with untrained models and little data."""
    folder = tmp_path_factory.mktemp("classroom")
    copied = "configs", "scripts"       # reasoning_world changes configs; compare.py writes beside it
    for path in ROOT.iterdir():
        if path.name not in ("out", "dataset", *copied, ".git", ".cache", ".venv"):
            (folder / path.name).symlink_to(path)
    for name in copied:
        shutil.copytree(ROOT / name, folder / name)
    (folder / "dataset").mkdir()
    for path in [*(ROOT / "dataset").glob("*.py"), *data.iterdir()]:
        (folder / "dataset" / path.name).symlink_to(path)
    for name, (dim, n_layers, n_heads) in MODELS.items():
        config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, max_seq_len=128)
        save_model(*new_model(config, ROOT / "model/tokenizer.json"), folder / f"out/{name}.pth")
    reasoning_world(folder)
    return folder


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return Shell(tmp_path_factory.mktemp("shell"))


def tiny(command: str) -> list[str]:
    """A lesson's command in two steps. Models keep their width: later commands name them by it."""
    words = shlex.split(command) + SMALL if "--dim " in command else small(command)
    if "scripts/evaluate.py" in words:
        words += ["--limit", "4"]
    if "scripts/generate_answers.py" in words:  # sampled: a greedy untrained model writes no text
        words += ["--temperature", "1", "--max_new_tokens", "2"]
    return words


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_the_commands_of_a_lesson_run_in_their_order(page, classroom, shell):
    for command in commands(page):
        ended = shell.run(tiny(command), classroom, stdin="3 plus 4?\n")
        assert ended.code == 0, f"{command}\n{ended.output}"


# ------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = sorted(ROOT.glob("docs/lessons/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_page_and_their_outputs(path):
    book = nbformat.read(path, as_version=4)
    page = path.with_suffix(".md").read_text(encoding="utf-8")
    assert [(cell.cell_type, cell.source) for cell in book.cells] == cells(page)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("page", [path.with_suffix(".md") for path in NOTEBOOKS
                                  if not path.stem.endswith("_zh")], ids=lambda page: page.stem)
def test_a_notebook_runs(page, classroom):
    book = notebook(page)
    for cell in book.cells:
        if cell.source.startswith("%%bash\npython"):
            cell.source = "%%bash\n" + shlex.join(tiny(cell.source.removeprefix("%%bash\n")))
        elif cell.source.startswith("%%bash"):
            cell.source = ""            # class.sh is tested elsewhere; the classroom has its models
    execute(book, classroom)
    assert "display_data" in str(book.cells)    # a picture of a run
