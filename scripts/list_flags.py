"""
列出每个脚本的全部参数，写成 docs/flags.md。
List the flags of every script as one Markdown page, read from the scripts' own parsers.

    python scripts/list_flags.py --out docs/flags.md
"""

import re
import runpy
import sys
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # `python scripts/list_flags.py` looks in scripts/ alone

from evaluation.tables import markdown
from runtime.args import make_parser, parse_args
from runtime.files import write_text

FOLDERS = ("train_*.py", "scripts/*.py", "ability_tree/*.py", "dataset/*.py", "benchmarks/*.py")
HEAD = """# Flags

Written by `python scripts/list_flags.py --out docs/flags.md`. `--help` shows the same on a
terminal. Scripts that train or prepare models also take `--config FILE.yaml ...` with values for
any flag: a later file overrides earlier ones, and the command line overrides all. `--chat NAME` is
the format of conversations for a model whose chat template is missing or cannot be followed.
`--columns NAME=COLUMN ...` names the columns of the data files (dataset/dataset.md)."""


def parser_of(script: str) -> ArgumentParser:
    """The parser of a script, run up to the line that parses the command line."""
    found = []

    def stop(parser, *_, **__):
        found.append(parser)
        sys.exit()

    with patch("runtime.args.parse_args", stop), patch.object(ArgumentParser, "parse_args", stop), \
            patch.object(sys, "argv", [script]), patch.object(sys, "path", [str(ROOT), *sys.path]):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit:
            return found[0]


def scripts() -> list[str]:
    """Paths of all scripts that have flags."""
    paths = [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in paths
            if "make_parser(__doc__)" in path.read_text(encoding="utf-8")]


def row(flag) -> list[str]:
    """Names, default and help of a flag, as cells of a table."""
    default = "" if flag.nargs == 0 or flag.default in (None, SUPPRESS) else flag.default
    default = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
    texts = ["required" if flag.required else "", (flag.help or "") % vars(flag),
             f"one of {', '.join(map(str, flag.choices))}" if flag.choices else ""]
    names = ", ".join(f"`{name}`" for name in flag.option_strings or [flag.dest])
    cells = names, default and f"`{default}`", "; ".join(filter(None, texts))
    return [cell.replace("|", "\\|") for cell in cells]


def page() -> str:
    """A section per script. A group of flags that an earlier script has too is only named."""
    blocks, first = [HEAD], {}
    for script in scripts():
        parser = parser_of(script)
        first_paragraph = parser.description.strip().split("\n\n")[0]
        purpose = re.sub(r"^.*[\u4e00-\u9fff].*\n", "", first_paragraph)       # the line in Chinese
        command = script
        if script.startswith(("ability_tree/", "benchmarks/")):
            command = f"-m {script.removesuffix('.py').replace('/', '.')}"
        blocks.append(f"## {script}\n\n{purpose}\n\n    python {command}")
        for group in parser._action_groups:
            rows = [row(flag) for flag in group._group_actions if flag.dest != "help"]
            same = first.setdefault(str((group.title, rows)), script)
            if rows:
                text = (f": as in {same}" if same != script else
                        "\n\n" + markdown([["flag", "default", ""], *rows], "lll"))
                blocks.append(f"**{group.title}**{text}")
    return "\n\n".join(blocks) + "\n"


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    args = parse_args(parser)
    text = page()
    write_text(args.out, text)
    print(f"{args.out}: {text.count(chr(10) + '## ')} scripts")


if __name__ == "__main__":
    main()
