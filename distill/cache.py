"""
教师的输出写在磁盘上：教师只读一遍数据，之后训练时它不必在内存里，也不必再算。
A teacher's outputs on disk: it reads the data once, and then teaches without being in memory, and without computing.

    DIR/about.json       which teacher, which tokenizer, which files; the size of each file below. It is written last
    DIR/index.npz        where each sample lies, by a key that is a hash of its tokens (dataset/lm_dataset.py)
    DIR/head.pth         (V, D) fp32, what turns states into logits; not with top-k
    DIR/part-00000.bin   one row for each position that has something to predict, samples one behind the other

A row is the final hidden state in bf16, from which the loss makes all V logits (distill/fused.py): 2 D bytes for all that
the teacher says. Or it is the k likeliest words, log-probabilities and ids: 6 k bytes. They break even at k = D / 3.

Which samples are in which part is a matter of the samples alone. So any number of processes write the same parts, and a
run that was killed goes on, on any number of them, with the parts that are not there.
"""

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from distill.fused import CHUNK_BYTES, Dense, TopK
from runtime.files import file_sha256, write_atomic

VERSION = 1                 # raise it when the meaning of a file changes
PART_BYTES = 64 << 20       # of a part, and at most one sample more: what a killed process has to do again
N_PARTS = 16                # smaller parts rather than fewer: little data, too, is shared among processes

# What makes two caches different, and how to call it. Paths do not: a file is known by its content.
IDENTITY = {"version": "format", "teacher_sha256": "teacher", "teacher_sizes": "its sizes",
            "tokenizer_sha256": "tokenizer", "max_seq_len": "--max_seq_len", "top_k": "--top_k",
            "temperature": "--temperature", "dtype": "--dtype", "files": "data",
            "samples_sha256": "tokens of the samples"}


def differing(was: dict, now: dict) -> list[str]:
    """The fields of IDENTITY in which two caches, as their about.json has them, are not the same."""
    if was["version"] != now["version"]:
        return ["version"]                                  # which other fields there are is not known then

    def value(about, field):
        return set(about[field].values()) if field == "files" else about[field]

    return [field for field in IDENTITY if value(was, field) != value(now, field)]


def differences(was: dict, now: dict) -> str:
    """The same in words: "--top_k was 0, is 32"."""

    def show(about, field):
        if field in ("teacher_sha256", "tokenizer_sha256"):
            return f"{about[field.removesuffix('_sha256')]} ({about[field][:8]})"
        if field == "files":
            return ", ".join(f"{path} ({sha256[:8]})" for path, sha256 in about[field].items())
        return about[field][:8] if field == "samples_sha256" else about[field]

    fields = differing(was, now)
    if len(fields) > 1 and "samples_sha256" in fields:
        fields.remove("samples_sha256")                     # it follows from the others, and says nothing to a reader
    return "; ".join(f"{IDENTITY[field]} was {show(was, field)}, is {show(now, field)}" for field in fields)


def command(about: dict, path, *more) -> str:
    """What to type for a cache like this one at PATH."""
    words = ["--teacher", about["teacher"], "--data_path", *about["files"], "--cache_dir", path,
             "--max_seq_len", about["max_seq_len"]]
    if about["top_k"]:
        words += ["--top_k", about["top_k"], "--temperature", f"{about['temperature']:g}"]
    if about["dtype"] != "bfloat16":
        words += ["--dtype", about["dtype"]]
    if about["skip_bad_lines"]:
        words += ["--skip_bad_lines"]
    return shlex.join(["python", "scripts/cache_teacher.py", *map(str, [*words, *more])])


# ---------------------------------------------------------------------------------------------------------------- rows


def row_type(about: dict) -> np.dtype:
    """What is kept of one position. NumPy has no bf16: its 16 bits are kept as an integer."""
    if not about["top_k"]:
        return np.dtype([("states", "<i2", (about["dim"],))])
    ids = "<u2" if about["vocab_size"] <= 1 << 16 else "<u4"
    return np.dtype([("log_p", "<f4", (about["top_k"],)), ("ids", ids, (about["top_k"],))])


def pack(about: dict, states, head) -> np.ndarray:  # (S, D), (V, D) -> (S,) rows
    """What the teacher says of S positions. The logits of a top-k are worked out in the head's type."""
    rows = np.empty(len(states), row_type(about))
    if not about["top_k"]:
        rows["states"] = states.to(torch.bfloat16).view(torch.int16).cpu().numpy()
        return rows
    size = max(1, CHUNK_BYTES // (4 * len(head)))
    for start in range(0, len(states), size):
        logits = (states[start:start + size].to(head.dtype) @ head.T).float() / about["temperature"]    # (C, V)
        top = logits.topk(about["top_k"], dim=-1)                           # (C, k) twice, the likeliest first
        log_p = top.values - logits.logsumexp(dim=-1, keepdim=True)
        rows["log_p"][start:start + size] = log_p.cpu().numpy()
        rows["ids"][start:start + size] = top.indices.cpu().numpy()
    return rows


def unpack(about: dict, rows) -> tuple[torch.Tensor, ...]:  # (S,) rows -> (S, D), or ids and log_p, (S, k) each
    if not about["top_k"]:
        return (torch.from_numpy(rows["states"]).view(torch.bfloat16),)
    return torch.from_numpy(rows["ids"].astype(np.int64)), torch.from_numpy(np.ascontiguousarray(rows["log_p"]))


# ------------------------------------------------------------------------------------------------------------- writing


class Layout(NamedTuple):
    """Which of n samples lie in which part."""

    samples: np.ndarray         # (n,) their numbers among those given, each key once, from short to long
    keys: np.ndarray            # (n,)
    n_rows: np.ndarray          # (n,) positions of each
    cuts: np.ndarray            # (parts + 1,): part i has the samples from cuts[i] up to cuts[i + 1]

    def part(self, i: int) -> slice:
        return slice(self.cuts[i], self.cuts[i + 1])


def lay_out(keys, lengths, n_rows, row_bytes: int) -> Layout:
    """The layout of samples given by key, tokens and positions, (n,) each. Their order, and how often one comes, is all
    the same: they are put from short to long, which is also how a model reads them fastest."""
    _, samples = np.unique(keys, return_index=True)
    samples = samples[np.argsort(lengths[samples], kind="stable")]      # np.unique sorts: by length, then by key
    n_rows = n_rows[samples]
    ends = np.cumsum(n_rows)
    room = max(1, min(PART_BYTES // row_bytes, -(-int(ends[-1]) // N_PARTS)))      # positions
    part = (ends - n_rows) // room                                      # a sample is where its first position is
    cuts = [*np.flatnonzero(np.diff(part, prepend=-1)), len(samples)]
    return Layout(samples, keys[samples], n_rows, np.array(cuts))


class CacheWriter:
    """A cache in the making: `prepare`, `begin`, then `write` each part that is missing, in any process, then `finish`.

    Until then DIR/unfinished.json stands for about.json, so that nobody takes it for whole.

    about   what its about.json is to say: the fields of IDENTITY (but samples_sha256), "teacher" and "tokenizer" as
            paths, "vocab_size" and "dim" (V and D of the teacher), "skip_bad_lines"
    """

    def __init__(self, path, about: dict, layout: Layout, head: torch.Tensor):
        self.path, self.layout, self.head = Path(path), layout, head
        self.row_bytes = row_type(about).itemsize
        self.part_bytes = self.row_bytes * np.add.reduceat(layout.n_rows, layout.cuts[:-1])     # (parts,)
        digest = hashlib.sha256(layout.keys.tobytes() + layout.n_rows.tobytes() + layout.cuts.tobytes())
        self.about = about | {"samples_sha256": digest.hexdigest(), "samples": len(layout.keys),
                              "positions": int(layout.n_rows.sum())}
        self.finished, self.unfinished = self.path / "about.json", self.path / "unfinished.json"

    def prepare(self, overwrite: bool = False) -> list[int]:
        """Make sure that what DIR holds is of this cache. Returns the parts that are still to be written: none if all
        is there, or if DIR holds a whole cache of these files and others.

        Raises ValueError if DIR holds another cache, unless `overwrite`: that one is then thrown away.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        found, parts = self.found(), list(self.path.glob("part-*.bin"))
        if found.exists():
            was = read_json(found)
            if found == self.finished and self.is_within(was):
                TeacherCache(self.path)                                     # complains if a part of it is damaged
                return []
            other = differences(was, self.about)
        else:
            other = "parts without an about.json" if parts else ""
        if other and not overwrite:
            raise ValueError(f"{self.path} holds another cache: {other}. "
                             "Give another --cache_dir, or throw that one away with --overwrite")
        if other:
            for file in (found, self.path / "index.npz", self.path / "head.pth", *parts):
                file.unlink(missing_ok=True)
        for cut_short in (*self.path.glob("part-*.tmp"), *self.path.glob("head.pth.*.tmp")):
            cut_short.unlink()
        return self.missing()

    def found(self) -> Path:
        return self.finished if self.finished.exists() else self.unfinished

    def is_within(self, was: dict) -> bool:
        """Whether that cache is of the files of this one and others."""
        fields = set(differing(was, self.about))
        return ("files" in fields and fields <= {"files", "samples_sha256"}
                and set(self.about["files"].values()) < set(was["files"].values()))

    def begin(self):
        """Write all but the parts. It comes before the teacher's first word, so that it is known what is missing."""
        found = self.found()
        if found.exists() and all(size_of(self.path / name) == size for name, size in read_json(found)["bytes"].items()
                                  if not name.startswith("part-")):
            return
        order = np.argsort(self.layout.keys)
        starts = np.cumsum(self.layout.n_rows) - self.layout.n_rows
        index = {"keys": self.layout.keys[order], "starts": starts[order], "n_rows": self.layout.n_rows[order],
                 "part_ends": np.cumsum(self.part_bytes) // self.row_bytes}
        files = {"index.npz": lambda file: np.savez(file, **index)}
        if not self.about["top_k"]:
            files["head.pth"] = lambda file: torch.save(self.head, file)
        for name, write in files.items():
            write_atomic(self.path / name, write)
        sizes = {name: size_of(self.path / name) for name in files}
        sizes |= {part_name(i): int(size) for i, size in enumerate(self.part_bytes)}
        about = json.dumps(self.about | {"bytes": sizes}, indent=2)
        write_atomic(found, lambda file: file.write(about.encode()))

    def missing(self) -> list[int]:
        return [i for i, size in enumerate(self.part_bytes) if size_of(self.path / part_name(i)) != size]

    def write(self, part: int, rows: np.ndarray):
        assert rows.nbytes == self.part_bytes[part], f"{part_name(part)} is to have {self.part_bytes[part]} bytes"
        write_atomic(self.path / part_name(part), rows.tofile)

    def finish(self):
        """All parts are there: from now on it counts."""
        if self.unfinished.exists():
            os.replace(self.unfinished, self.finished)


def part_name(i: int) -> str:
    return f"part-{i:05d}.bin"


def size_of(path: Path) -> int:
    """In bytes; -1 if it is not there."""
    return path.stat().st_size if path.exists() else -1


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); remove it and write the cache anew") from error


# ------------------------------------------------------------------------------------------------------------- reading


class TeacherCache:
    """What a teacher said, by sample.

    head         (V, D) fp32; None with top-k
    top_k        words kept at each position; 0: states, from which all V come
    temperature  of the top-k's log-probabilities, and 1 for states, which serve any
    vocab_size   V
    about        all that about.json says

    Raises FileNotFoundError if there is none, and ValueError if it is half-written or damaged, naming the file and the
    command that completes it.
    """

    def __init__(self, path):
        self.path, self.device = Path(path), torch.device("cpu")
        if not (self.path / "about.json").exists():
            self.complain_of_none()
        self.about = read_json(self.path / "about.json")
        if self.about["version"] != VERSION:
            raise ValueError(f"{self} has format {self.about['version']}, this program reads {VERSION}. "
                             "Write it anew: python scripts/cache_teacher.py --overwrite ...")
        for name, size in self.about["bytes"].items():
            found = size_of(self.path / name)
            if found != size:
                state = f"has {found:,} bytes" if found >= 0 else "is missing"
                raise ValueError(f"{self.path / name} {state}, it should have {size:,} bytes. Write what is damaged "
                                 f"anew: {command(self.about, self.path)}")
        self.top_k, self.temperature = self.about["top_k"], self.about["temperature"]
        self.vocab_size, self.row = self.about["vocab_size"], row_type(self.about)
        with np.load(self.path / "index.npz") as index:
            self.keys, self.starts = index["keys"], index["starts"]         # (samples,) each, by rising key
            self.n_rows, self.part_ends = index["n_rows"], index["part_ends"]
        self.parts = {}                                                     # number -> (rows, row bytes), memory-mapped
        self.head = None if self.top_k else torch.load(self.path / "head.pth", weights_only=True)

    def complain_of_none(self):
        unfinished = self.path / "unfinished.json"
        if not unfinished.exists():
            raise FileNotFoundError(f"no teacher's outputs in {self.path}. Write them: python scripts/cache_teacher.py "
                                    f"--teacher WEIGHTS --data_path FILES --cache_dir {self.path}")
        about = read_json(unfinished)
        there = sum(size_of(self.path / name) == size for name, size in about["bytes"].items())
        raise ValueError(f"{self.path} is half written, {there} of {len(about['bytes'])} files. "
                         f"Go on with: {command(about, self.path)}")

    def __str__(self):
        return str(self.path)

    def __len__(self):
        return len(self.keys)

    def described(self) -> str:
        what = f"its top {self.top_k} words at T={self.temperature:g}" if self.top_k else "its states"
        return f"{self.about['teacher']} on disk, {what} in {self}"

    def to(self, device) -> "TeacherCache":
        """From now on what is looked up comes to this device, and the head stays there."""
        self.device = torch.device(device)
        self.head = None if self.head is None else self.head.to(device)
        return self

    def check(self, tokenizer_sha256: str, tokenizer_path, max_seq_len: int, files: dict, keys, names):
        """Refuse what the teacher has not read.

        files   path -> sha256 of its content
        keys    of all samples
        names   i -> what to call the i-th of them, "file, sample n"

        Raises ValueError that names what differs and the command that makes the cache anew.
        """
        about = self.about
        # The command names the cache's own files too: written anew for these alone, it would have lost the others.
        files = {str(path): sha256 for path, sha256 in files.items()}
        wanted = about | {"max_seq_len": max_seq_len, "files": about["files"] | files}
        anew = f"Write it anew: {command(wanted, self.path, '--overwrite')}"
        if tokenizer_sha256 != about["tokenizer_sha256"]:
            with_it = wanted | {"teacher": "TEACHER"}
            raise ValueError(f"{self} was written in the tokens of {about['tokenizer']} "
                             f"({about['tokenizer_sha256'][:8]}), these are of {tokenizer_path} ({tokenizer_sha256[:8]}). "
                             "Write it anew by a teacher that has this tokenizer: "
                             f"{command(with_it, self.path, '--overwrite')}")
        if max_seq_len != about["max_seq_len"]:
            raise ValueError(f"{self} was written with samples cut to {about['max_seq_len']} tokens, here they are cut "
                             f"to {max_seq_len}. Give --max_seq_len {about['max_seq_len']}, or w{anew[1:]}")
        for path, sha256 in files.items():
            if sha256 not in about["files"].values():
                raise ValueError(f"{path} has changed since {self} was written, or was never in it. {anew}")
        keys = np.fromiter(keys, dtype=np.uint64)
        unknown = np.flatnonzero(self.keys[self.find(keys)] != keys)
        if len(unknown):
            raise ValueError(f"{names(int(unknown[0]))}: its tokens are not in {self}, nor are those of "
                             f"{len(unknown) - 1:,} others. {anew}")

    def find(self, keys):  # (n,) -> (n,), where each one is or would be
        return np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)

    def look_up(self, keys) -> Dense | TopK:
        """What the teacher says at the positions of these samples, one behind the other in the order given."""
        keys = np.array(keys, dtype=np.uint64)
        found = self.find(keys)
        if (self.keys[found] != keys).any():
            raise ValueError(f"a sample of the batch is not in {self}; TeacherCache.check says which")
        starts, n_rows = self.starts[found], self.n_rows[found]
        numbers = np.searchsorted(self.part_ends, starts, side="right")
        begins = starts - np.where(numbers > 0, self.part_ends[numbers - 1], 0)
        rows = np.concatenate([self.part(number)[begin:begin + n]
                               for number, begin, n in zip(numbers.tolist(), begins.tolist(), n_rows.tolist())])
        said = [part.to(self.device) for part in unpack(self.about, rows.view(self.row)[:, 0])]
        return TopK(*said) if self.top_k else Dense(*said, self.head)

    def part(self, number: int) -> np.ndarray:  # -> (rows, row bytes): as bytes, they are copied the fastest
        if number not in self.parts:
            file = np.memmap(self.path / part_name(number), dtype=np.uint8, mode="r")
            self.parts[number] = file.reshape(-1, self.row.itemsize).view(np.ndarray)
        return self.parts[number]
