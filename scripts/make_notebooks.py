"""
把课程页变成 Jupyter 笔记本：文字照抄，每条命令成为一个单元格，并运行。
Lesson pages as Jupyter notebooks: the text as it is, each command a cell of its own, executed.

    python scripts/make_notebooks.py docs/lessons/03_*.md docs/lessons/08_*.md

A notebook lies beside its page, so that links and pictures stay. `pip install nbclient ipykernel`.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from runtime.args import make_parser, parse_args
from runtime.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SETUP = '''\
import os, sys, time
from pathlib import Path
from IPython.display import Image, display

if Path("distill_min.py").exists():     # started in docs/lessons
    os.chdir("../..")
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
shown = time.time()


def show_pictures():
    """The pictures in out/ that the cells since the last call have written."""
    global shown
    pictures = sorted(Path("out").rglob("*.png"), key=lambda path: path.stat().st_mtime)
    for path in pictures:
        if path.stat().st_mtime > shown:
            print(path)
            display(Image(path, width=700))
    shown = time.time()'''

MODELS = "%%bash\n[ -e out/full_sft_128.pth ] || bash class.sh reset"


def cells(page: str) -> list[tuple[str, str]]:
    """(type, source) of the cells of a page: first the models of model/tiny, then its text; a bash
    block becomes a cell for each command, and one that shows their pictures."""
    found = [("code", SETUP), ("code", MODELS)]
    for part in re.split(r"(?m)^(```bash\n.*?\n```)$", page, flags=re.DOTALL):
        if part.startswith("```bash"):
            commands = part.removeprefix("```bash\n").removesuffix("\n```").splitlines()
            found += [("code", f"%%bash\n{command}") for command in commands]
            found.append(("code", "show_pictures()"))
        elif part.strip():
            found.append(("markdown", part.strip()))
    title = next(i for i, (kind, _) in enumerate(found) if kind == "markdown")
    return [found[title], *found[:title], *found[title + 1:]]


def notebook(page: Path):
    """The notebook of a page, not executed."""
    from nbformat import v4

    new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}
    sources = cells(page.read_text(encoding="utf-8"))
    return v4.new_notebook(cells=[new[kind](source, id=f"cell-{i}")
                                  for i, (kind, source) in enumerate(sources)])


def execute(book, folder: Path = ROOT, timeout: int = 600):
    """Run all cells in folder, the root of a copy of the repo. A command that fails raises
    nbclient.exceptions.CellExecutionError."""
    from nbclient import NotebookClient

    return NotebookClient(book, timeout=timeout, kernel_name="python3", record_timing=False,
                          coalesce_streams=True,
                          resources={"metadata": {"path": str(folder)}}).execute()


def main():
    parser = make_parser(__doc__)
    parser.add_argument("pages", nargs="+", type=Path, help="lesson pages, docs/lessons/NAME.md")
    args = parse_args(parser)

    import nbformat

    for page in args.pages:
        book = execute(notebook(page))
        out = page.with_suffix(".ipynb")
        write_text(out, nbformat.writes(book))
        print(f"{out}: {sum(cell.cell_type == 'code' for cell in book.cells)} cells executed")


if __name__ == "__main__":
    main()
