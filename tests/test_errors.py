"""
边界的规律：机器与文件的错误是一行话，说出什么、在哪里、怎么办；学生自己的错误保留回溯。
Laws of the boundary: what the machine or a file does wrong is one line with the way out, in every
script; what a student's edit does wrong keeps its traceback. No value of a flag ends in a traceback.
"""

import ast
import errno
import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers_run import ROOT, TINY, complaint, run
from interop import vocabulary
from interop.checkpoint import load_model
from runtime.args import make_parser
from runtime.errors import in_one_line, shorten
from runtime.precision import pick_device, pick_dtype
from scripts.list_flags import scripts

CPU = torch.device("cpu")
LESSONS = [script for script in scripts() if script.startswith("train_")]


# ---- kinds of errors -----------------------------------------------------------------------------

def panic(path):
    raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("index out of range")


def wandb_error(path):
    raise type("UsageError", (Exception,), {"__module__": "wandb.errors"})("no API key")


def raises(error):
    def act(path):
        raise error

    return act


OF_THE_MACHINE = {
    "a full disk": (raises(OSError(errno.ENOSPC, "No space left on device")), "{path}: No space .* --resume continues"),
    "a full disk in NumPy": (raises(OSError("64 requested and 0 written")), "{path}: 64 requested"),
    "a folder": (lambda path: open(path.parent, encoding="utf-8"), "{folder}: Is a directory"),
    "a long name": (lambda path: open(path.with_name("x" * 300), encoding="utf-8"), "x: File name too long; shorten"),
    "a file as a folder": (lambda path: (path / "out").mkdir(), "{path}/out: Not a directory"),
    "no permission": (raises(PermissionError(errno.EACCES, "Permission denied", "a")), "a: Permission denied; give a folder"),
    "not UTF-8": (lambda path: path.read_text(encoding="utf-8"), "{path} is not UTF-8"),
    "no memory of the GPU": (raises(torch.OutOfMemoryError("CUDA out of memory. Tried")), "out of memory.*--batch_size"),
    "no memory": (lambda path: torch.empty(1 << 50), "--batch_size"),
    "no GPU": (lambda path: torch.ones(1, device="cuda"), "CUDA.*--device cpu"),
    "no wandb": (wandb_error, "no API key.*WANDB_MODE=offline"),
    "a panic": (panic, "index out of range.*tokenizers library"),
    "Ctrl-C before the first step": (raises(KeyboardInterrupt()), "interrupted; the files stay"),
    "a broken connection": (raises(torch.distributed.DistNetworkError("timed out")), "timed out.*a process"),
}
OF_THE_PROGRAM = {
    "a shape": lambda path: torch.ones(2, 3) @ torch.ones(2, 3), "a name": lambda path: undefined,  # noqa: F821
    "a type": lambda path: torch.ones("2"), "a key": lambda path: {}["kd"], "a value": lambda path: int("a"),
    "an assertion": raises(AssertionError("2 is not 3")),
}


def caught(act, path):
    try:
        act(path)
    except BaseException as error:
        return error


@pytest.mark.parametrize("act, says", OF_THE_MACHINE.values(), ids=OF_THE_MACHINE)
def test_an_error_of_the_machine_is_one_line_with_the_place_and_the_way_out(act, says, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"\xe9")
    line = in_one_line(caught(act, path))
    assert "\n" not in line and re.search(says.format(path=path, folder=tmp_path), line), line


@pytest.mark.parametrize("act", OF_THE_PROGRAM.values(), ids=OF_THE_PROGRAM)
def test_an_error_of_the_program_keeps_its_traceback(act, tmp_path, capsys):
    error = caught(act, tmp_path)
    assert in_one_line(error) is None
    shorten(type(error), error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err


def test_a_panic_of_the_tokenizers_library_names_the_file(tmp_path, monkeypatch):
    def from_file(path):
        panic(path)

    monkeypatch.setattr(vocabulary, "tokenizers", SimpleNamespace(Tokenizer=SimpleNamespace(from_file=from_file)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json.*cannot read it: index out of range"):
        vocabulary.read_tokenizer_json(tmp_path)


# ---- in whole runs -------------------------------------------------------------------------------

EDITED = """
import runpy, sys
sys.argv[0] = "train_sft.py"
import torch.nn.functional
torch.nn.functional.cross_entropy = lambda *a, **b: torch.ones(2, 3) @ torch.ones(2, 3)
runpy.run_path("train_sft.py", run_name="__main__")
"""
FULL = """
import resource, runpy, signal, sys
sys.argv[0] = "train_sft.py"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
runpy.run_path("train_sft.py", run_name="__main__")
"""


@pytest.fixture
def flags(data, models, tmp_path):
    return TINY | {"data_path": data / "sft_data.jsonl", "weights": models / "student.pth", "max_steps": 2,
                   "val_path": "none", "out_dir": tmp_path / "out"}


def test_a_run_that_cannot_write_says_where(flags, tmp_path):
    (tmp_path / "file").touch()
    for out_dir, says in ((tmp_path / "file/out", "Not a directory"), ("/proc/out", "No such file")):
        printed = complaint("train_sft.py", **flags | {"out_dir": out_dir})
        assert says in printed.splitlines()[-1] and str(out_dir) in printed.splitlines()[-1]


def test_a_disk_that_is_full_costs_a_line_and_a_wrong_shape_keeps_its_traceback(flags, tmp_path):
    printed = complaint("-c", FULL, **flags)
    assert str(tmp_path / "out") in printed.splitlines()[-1] and "File too large" in printed.splitlines()[-1]
    ended = run("-c", EDITED, **flags)
    assert ended.code == 1 and "Traceback" in ended.output and "mat2" in ended.output


def test_wandb_without_a_login_says_what_to_do(flags, tmp_path):
    alone = {"WANDB_API_KEY": "", "WANDB_MODE": "online", "HOME": tmp_path, "NETRC": tmp_path / "none"}
    assert "WANDB_MODE=offline" in complaint("train_sft.py", **flags, use_wandb=True, variables=alone).splitlines()[-1]


def test_a_console_without_a_character_prints_a_question_mark(monkeypatch):
    for encoding in ("ascii", "latin-1"):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        make_parser("蒸馏 69.2 ± 2.9").print_help()
        sys.stdout.flush()
        assert b"?" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda:9", "cuda:x", "mps", "cpu:1", "meta", ":"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit, match=f"--device {name}: this machine has cpu$"):
        pick_device(name)


def test_auto_takes_cuda_before_mps_before_the_cpu(monkeypatch):
    for n_gpus, apple, kind in ((2, False, "cuda"), (2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
        assert pick_device() == torch.device(kind)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")


def test_on_apples_gpu_all_is_float32(monkeypatch):
    mps = torch.device("mps")
    assert pick_dtype("bfloat16", mps) == torch.float32
    with pytest.raises(SystemExit, match="needs a GPU with CUDA"):
        pick_dtype("float16", mps)


NO_FLOAT64 = """
import runpy, sys
import torch
from torch.utils._pytree import tree_leaves
from torch.utils._python_dispatch import TorchDispatchMode

class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        wide = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor) and each.dtype == torch.float64]
        assert not wide, function
        return out

for module in list(sys.modules.values()):
    if hasattr(module, "sum_dtype"):
        module.sum_dtype = lambda device: torch.float32
script, *sys.argv = ["", *sys.argv[1:]][1:2] * 2 + sys.argv[2:]
with NoFloat64():
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("script", ["train_sft.py", "train_distillation.py", "train_onpolicy.py"])
def test_no_tensor_of_a_lesson_needs_float64(script, flags, models):
    """As on Apple's GPUs, which have none."""
    pair = {"weights": None, "student": models / "student.pth", "teacher": models / "teacher.pth"}
    more = pair | ({"max_new_tokens": 4} if script == "train_onpolicy.py" else {}) if script != "train_sft.py" else {}
    ended = run("-c", NO_FLOAT64, script, **flags | more | {"val_path": flags["data_path"], "max_steps": 1})
    assert ended.code == 0, ended.output


def test_the_name_of_a_hub_model_ends_with_the_command_that_gets_it():
    with pytest.raises(FileNotFoundError, match="hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B"):
        load_model("Qwen/Qwen3-0.6B")


def test_every_script_has_the_boundary_and_every_text_file_an_encoding():
    """On Windows a text file without an encoding is read as cp1252."""
    for path in ROOT.glob("**/*.py"):
        if path.relative_to(ROOT).parts[0] in (".venv", "tests", "out"):
            continue
        source = path.read_text(encoding="utf-8")
        assert '"__main__"' not in source or "make_parser(" in source or path.name in ("list_flags.py", "distill_min.py"), path
        for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
            name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
            words = {each.arg for each in call.keywords}
            binary = any(isinstance(each, ast.Constant) and "b" in str(each.value) for each in call.args[-1:])
            if name in ("read_text", "write_text") and call.func.__class__ is ast.Attribute or name == "open" and call.args:
                assert words & {"encoding"} or binary, f"{path}:{call.lineno}"
