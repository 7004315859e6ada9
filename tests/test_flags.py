"""
标志的规律：docs/flags.md 与各脚本一致；每个标志都有说明，都被读取。
Laws of the flags: docs/flags.md agrees with the scripts, and every flag is explained and read.
"""

import re

import pytest

from helpers_run import ROOT
from scripts.list_flags import page, parser_of, scripts


def source_of(script: str) -> str:
    """The script and the modules of ours that it imports."""
    text = (ROOT / script).read_text(encoding="utf-8")
    modules = re.findall(r"^from (\w+(?:\.\w+)+) import", text, re.M)
    paths = [ROOT / f"{module.replace('.', '/')}.py" for module in modules]
    return text + "".join(path.read_text(encoding="utf-8") for path in paths if path.exists())


def test_the_page_of_flags_is_up_to_date():
    there = ROOT / "docs/flags.md"
    assert there.exists() and there.read_text(encoding="utf-8") == page(), \
        "docs/flags.md is stale. Write it anew: python scripts/list_flags.py --out docs/flags.md"


@pytest.mark.parametrize("script", scripts())
def test_every_flag_is_read_and_explained(script):
    """As args.NAME or by its name in quotes; of a name with a prefix, f"{role}_budget", the rest in
    quotes. vars(args).items() reads all of them."""
    source = source_of(script)
    quoted = set(re.findall(r"""["'](?:\{\w+\})?(\w+)["']""", source))
    for flag in parser_of(script)._actions:
        parts = flag.dest.split("_")
        rests = {"_".join(parts[i:]) for i in range(len(parts))}
        is_read = (re.search(rf"\bargs\.{flag.dest}\b", source) or "vars(args).items()" in source
                   or quoted & (rests | {f"_{rest}" for rest in rests}))
        assert flag.dest == "help" or is_read, f"--{flag.dest} is never read"
        assert flag.help, f"--{flag.dest} has no help"
