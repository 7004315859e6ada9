"""
文件：要么完整写入，要么不写；可分块、可续做的大文件。
Files that are written completely or not at all, and large files that are made in resumable parts.
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
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PartFiles:
    """A file that any number of processes make in parts, in a folder beside it, until all parts
    exist:

    OUT.parts/about.json        what the parts are made from
    OUT.parts/part-00000.*      the result of one part

    The work and the random numbers of a part depend on its number alone. So any number of processes
    writes the same file, and the same command resumes an interrupted one.
    """

    suffix, others = ".json", "another file"

    def __init__(self, out, about: dict, n_parts: int):
        self.out, self.folder = Path(out), Path(f"{out}.parts")
        self.about, self.n_parts = about, n_parts

    def prepare(self) -> list[int]:
        """Returns the missing parts. Raises ValueError if the file exists, or parts of another file
        do."""
        if self.out.exists():
            raise ValueError(f"{self.out} exists already. Give another --out, or remove it")
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.json"
        if about.exists():
            was = json.loads(about.read_text())
            changed = [f"{name} was {was.get(name)}, is {value}"
                       for name, value in self.about.items() if was.get(name) != value]
            if changed:
                raise ValueError(f"{self.folder} holds parts of {self.others}: "
                                 f"{'; '.join(changed)}. Resume with the same settings, give "
                                 "another --out, or remove that folder")
        elif any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} exists already and holds other files. Give another "
                             "--out, or remove it")
        else:
            write_atomic(about, lambda file: file.write(json.dumps(self.about, indent=2).encode()))
        return self.missing()

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part:05d}{self.suffix}"

    def missing(self) -> list[int]:
        return [part for part in range(self.n_parts) if not self.path(part).exists()]

    def remove(self):
        """Remove the folder, once the file is written."""
        shutil.rmtree(self.folder)
