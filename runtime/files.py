"""
文件：要么完整写入，要么不写。
Files that are written completely or not at all.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_atomic(path: Path, write):
    """Call `write` with a temporary path, flush the file, then rename it to `path`; the folder is
    created. Several processes may do so at once; what a killed one left is removed after ten
    minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - stale.stat().st_mtime > 600:
                stale.unlink()
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


def write_text(path, text: str):
    """A complete file; its folder is created. A text may hold half a character: surrogatepass."""
    write_atomic(Path(path), lambda file: file.write(text.encode(errors="surrogatepass")))


LOCKS = []              # open files: a lock ends with its process, however that ends


def lock(name):
    """Take NAME.lock for this process, where there are locks: not on Windows, nor on some network
    disks. Raises ValueError if another process has it."""
    LOCKS.append(file := open(f"{name}.lock", "a+", encoding="utf-8"))
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise ValueError(f"process {file.read()} is writing {name}.*: wait for it, stop it, or "
                         "give another --out_dir") from None
    except (ImportError, OSError):
        return
    file.truncate(0)
    print(os.getpid(), "on", socket.gethostname(), end="", file=file, flush=True)


UNSIGNED = b"crc32:00000000"        # in the first bytes of a file that `sign` completes
SIGNATURE = re.compile(rb"crc32:([0-9a-f]{8})")


def sign(path: Path):
    """Replace the zeros of UNSIGNED by the file's checksum."""
    with open(path, "rb+") as file:
        file.seek(file.read(4096).index(UNSIGNED))
        file.write(b"crc32:%08x" % file_crc32(path))


def check_signature(path: Path):
    """Raise ValueError if a signed file has changed; a file of another program is not signed."""
    with open(path, "rb") as file:
        signature = SIGNATURE.search(file.read(4096))
    if signature and int(signature[1], 16) != file_crc32(path):
        raise ValueError(f"{path} is cut short or damaged: it differs from its checksum")


def file_crc32(path: Path) -> int:
    """Of a file's bytes, its signature as UNSIGNED, at 2.9 GB/s."""
    with open(path, "rb") as file:
        crc = zlib.crc32(SIGNATURE.sub(UNSIGNED, file.read(4096), count=1))
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


@contextmanager
def named_errors(path):
    """Errors in a file's content become ValueErrors that begin with its path."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not have the expected form: {error}") from error
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2))


def write_jsonl(path, rows: list[dict]):
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def keep_previous(path: Path):
    """Rename the file or folder at PATH to PATH.previous."""
    if path.exists():
        previous = path.with_name(f"{path.name}.previous")
        if previous.is_dir() or path.is_dir():
            delete(previous)
        os.replace(path, previous)


def delete(path: Path):
    """A file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def read_rows(path: Path, *keys) -> list[dict]:
    """The rows of a log, one JSON object with these keys a line. A last line that a kill cut short
    is dropped; a damaged one too, with a warning."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(True) if path.exists() else [], 1):
        try:
            row = json.loads(line)
            [row[key] for key in keys]
            rows.append(row)
        except (ValueError, TypeError, LookupError):
            if line.endswith(b"\n"):
                print(f"{path}, line {number} is damaged and left out", file=sys.stderr)
    return rows


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
