"""
文件：要么完整写入，要么不写。
Files that are written completely or not at all.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path


def replace_atomic(path: Path, write):
    """Call `write` with a temporary path, flush the file, then rename it to `path`. Several
    processes may do so at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)       # exists only if something went wrong


def write_atomic(path: Path, write):
    """The same for a `write` that takes an open binary file."""
    def to_file(temporary):
        with open(temporary, "wb") as file:
            write(file)

    replace_atomic(path, to_file)


def write_jsonl(path, rows: list[dict]):
    """One JSON object a line; the folder is created."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # surrogatepass: a text may hold half a character, which UTF-8 refuses.
    write_atomic(Path(path), lambda file: file.write(lines.encode(errors="surrogatepass")))


def keep_previous(path: Path):
    """Rename the file or folder at PATH to PATH.previous."""
    previous = path.with_name(path.name + ".previous")
    if path.exists():
        if previous.is_dir():
            shutil.rmtree(previous)
        elif path.is_dir():
            previous.unlink(missing_ok=True)
        os.replace(path, previous)


def read_lines(path: Path) -> list[str]:
    """The complete lines of a log; a last line that a kill cut short is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
