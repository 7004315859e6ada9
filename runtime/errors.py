"""
一处边界：环境与输入文件的错误变成一行话，程序自身的错误保留回溯。
One boundary for all scripts: an error of the machine or of an input file becomes one line with the
way out. An error of the program, such as a wrong shape in a lesson, keeps its traceback.
"""

import errno
import io
import re
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WAY_OUT = {errno.ENOSPC: "free some space; --resume continues from the last save",
           errno.ENAMETOOLONG: "shorten the name", **dict.fromkeys(
               (errno.EACCES, errno.EROFS, errno.EPERM), "give a folder that you may write to")}
# In the name of an error's class, or in the text of a RuntimeError -> the way out.
KNOWN = {
    "out of memory|alloc_cpu|MemoryError": "lower --batch_size (with more --accumulation_steps) "
        "or --max_seq_len, or add --grad_checkpoint; scripts/plan_memory.py plans a run",
    "No CUDA GPUs|not compiled with CUDA|NVIDIA driver|no kernel image": "try --device cpu",
    "Dist[A-Z][a-z]*Error|gloo/|NCCL": "a process has lost the others; see what the first said",
    r"wandb\.": "log in (wandb login), log locally (WANDB_MODE=offline), or leave out --use_wandb",
    "PanicException": "the tokenizers library cannot use this tokenizer",
    "ModuleNotFoundError": "pip install -r requirements.txt"}


class FileError(ValueError):
    """A file that cannot be used or written in the middle of a run: its message ends the script."""


def report_errors():
    """From here on, the errors that in_one_line knows end the script with one line and status 1.
    Characters that the console lacks are printed as question marks."""
    sys.excepthook = shorten
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def shorten(kind, error, trace):
    """A sys.excepthook."""
    line = in_one_line(error)
    if line is None:
        return sys.__excepthook__(kind, error, trace)
    print(line, file=sys.stderr)


def in_one_line(error: BaseException) -> str | None:
    """What went wrong, where, and the way out; None for an error of the program."""
    if isinstance(error, KeyboardInterrupt):        # before a run can save itself
        return "interrupted; the files stay as they were last saved"
    paths = [frame.f_locals.get("path") for frame, _ in traceback.walk_tb(error.__traceback__)]
    path = next((path for path in reversed(paths) if isinstance(path, (str, Path))), None)
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__           # torch.save, when the disk is full
    text = f"{' '.join(str(error).split()):.400}".rstrip('. ')
    is_ours = isinstance(error, FileNotFoundError) and error.errno is None
    if is_ours or isinstance(error, FileError):
        return f"{error}"
    if isinstance(error, OSError):
        advice = f"; {WAY_OUT[error.errno]}" if error.errno in WAY_OUT else ""
        return f"{error.filename or path or type(error).__name__}: {error.strerror or text}{advice}"
    if isinstance(error, UnicodeError):
        return f"{path or 'a text'} is not UTF-8: {text}"
    names = " ".join(f"{base.__module__}.{base.__name__}" for base in type(error).__mro__)
    machine = text if isinstance(error, (RuntimeError, AssertionError)) else ""
    for pattern, advice in KNOWN.items():
        if re.search(pattern, f"{names} {machine}"):
            return f"{text or type(error).__name__}: {advice}"
    return None
