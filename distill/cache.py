"""
离线蒸馏：教师只读一遍数据，输出缓存在磁盘上；训练时教师不必在内存里。
Offline distillation (logit caching): the teacher reads the data once and its outputs go to disk.

    DIR/about.json       teacher, tokenizer, data files, size of each file below and checksum of the
                         next two; written before the parts
    DIR/index.npz        position of each sample, by a hash of its tokens (dataset/lm_dataset.py)
    DIR/head.pth         (V, D) fp32, turns states into logits; only with states
    DIR/part-00000.bin   per supervised position the final hidden state in bf16, 2 D bytes; or the
                         top-k log-probabilities, ids and the log-probability of all
                         other tokens, 6 k + 4 bytes, less at k < D / 3; or N sampled ids, 2 N
                         bytes. At the end 4 bytes, a checksum of these, the part's number and the
                         cache's identity

The samples alone decide which part holds which sample, and a part's number is the seed of its
sampled ids. So any number of processes writes the same parts, and an interrupted run resumes at the
missing ones.
"""

import hashlib
import json
import shlex
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataset.lm_dataset import sample_key
from distill.fused import CHUNK_BYTES, MIN_LOG_P, Dense, TopK
from runtime.checkpoint import load_verified
from runtime.errors import FileError
from runtime.files import file_crc32, named_errors, write_atomic, write_json

VERSION = 2                 # raise it when the meaning of a file changes
PART_BYTES = 64 << 20       # of a part, plus at most one sample: what an interruption costs
N_PARTS = 16                # at least, if there are that many samples: processes share parts

# The fields that make two caches different. A file is identified by its content, not by its path.
IDENTITY = {"version": "format", "teacher_sha256": "teacher", "teacher_sizes": "its sizes",
            "ids": "tokenizer", "max_seq_len": "--max_seq_len", "top_k": "--top_k",
            "sampled": "--sampled", "temperature": "--temperature", "dtype": "--dtype",
            "files": "data", "samples_sha256": "tokens of the samples"}


def differences(was: dict, now: dict) -> list[str]:
    """["--top_k was 0, is 32"] between the about.json of two caches. Files may have moved."""
    if was["version"] != now["version"]:                            # the rest is unknown
        return [f"format was {was['version']}, is {now['version']}"]

    def shown(about, field):
        files = about["files"].items()
        return {"teacher_sha256": f"{about['teacher']} ({about['teacher_sha256'][:8]})",
                "ids": about["tokenizer"], "samples_sha256": about["samples_sha256"][:8],
                "files": ", ".join(f"{path} ({sha256[:8]})" for path, sha256 in files)
                }.get(field, about[field])

    moved = set(was["files"].values()) == set(now["files"].values())
    return [f"{name} was {shown(was, field)}, is {shown(now, field)}"
            for field, name in IDENTITY.items()
            if was[field] != now[field] and not (field == "files" and moved)]


def checksum(about: dict, part: int, rows: np.ndarray) -> bytes:
    """4 bytes that other rows, the rows of another part, or of another cache do not have."""
    # A cache without samples may be one of before there were any.
    identity = [about[field] for field in IDENTITY
                if field != "files" and (field != "sampled" or about["sampled"])]
    seed = json.dumps([*identity, sorted(set(about["files"].values())), part], sort_keys=True)
    return zlib.crc32(rows.data, zlib.crc32(seed.encode())).to_bytes(4, "little")


def command(about: dict, path, *more) -> str:
    """The command that writes a cache with this about.json at PATH."""
    flags = ["--teacher", about["teacher"], "--dtype", about["dtype"]]
    if about["dtype"] == "served":                      # "NAME at URL"
        name, _, url = about["teacher"].rpartition(" at ")
        flags = ["--teacher_url", url, "--teacher_model", name]
    for name in ("tokenizer", "max_seq_len", "top_k", "sampled", "temperature"):
        flags += [f"--{name}", about[name]]
    flags += ["--skip_bad_lines"] * about["skip_bad_lines"]
    flags += ["--data_path", *about["files"], "--cache_dir", path, *more]
    return shlex.join(map(str, ["python", "scripts/cache_teacher.py", *flags]))


# -- rows ----------------------------------------------------------------------------------------

def row_type(about: dict) -> np.dtype:
    """What is stored per position. NumPy has no bf16, so its 16 bits are stored as an integer."""
    k = about["top_k"] or about["sampled"]
    if not k:
        return np.dtype([("states", "<i2", (about["dim"],))])
    ids = ("ids", "<u2" if about["vocab_size"] <= 1 << 16 else "<u4", (k,))
    return np.dtype([ids] if about["sampled"] else [("log_p", "<f4", (k,)), ids, ("tail", "<f4")])


def pack(about: dict, states, head, rng=None) -> np.ndarray:  # (S, D), (V, D) -> (S,) rows
    """The rows of S positions. Their logits, if needed, are computed in the head's dtype; `rng`, a
    NumPy generator, is for samples."""
    rows = np.empty(len(states), row_type(about))
    if "states" in rows.dtype.names:
        rows["states"] = states.to(torch.bfloat16).view(torch.int16).cpu().numpy()
        return rows
    size = max(1, CHUNK_BYTES // (4 * len(head)))
    for start in range(0, len(states), size):
        logits = states[start:start + size].to(head.dtype) @ head.T
        logits = logits.float() / about["temperature"]                      # (C, V)
        chunk = rows[start:start + size]
        if about["sampled"]:
            chunk["ids"] = sample_ids(logits, about["sampled"], rng).cpu().numpy()
            continue
        top = logits.topk(about["top_k"], dim=-1)                           # (C, k), descending
        log_sum = logits.logsumexp(dim=-1, keepdim=True)
        tail = logits.scatter_(-1, top.indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
        chunk["log_p"] = (top.values - log_sum).cpu().numpy()
        chunk["ids"] = top.indices.cpu().numpy()
        chunk["tail"] = (tail - log_sum).squeeze(-1).cpu().numpy()
    return rows


def sample_ids(logits, n, rng):  # (C, V) -> (C, n), each row rising
    """n tokens per row, with replacement: where uniform numbers fall among the cumulative
    probabilities. These are fp64, because fp32 sums near 1 lose rare tokens."""
    ends = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    at = torch.from_numpy(np.sort(rng.random((len(logits), n)))).to(logits.device)
    return torch.searchsorted(ends, at * ends[:, -1:])


def unpack(rows: np.ndarray, device) -> TopK:       # (S,) rows of a top-k or of samples
    ids = torch.from_numpy(rows["ids"].astype(np.int64)).to(device)
    if "tail" in rows.dtype.names:
        return TopK(ids, *(torch.from_numpy(rows[name].copy()).to(device)
                           for name in ("log_p", "tail")))
    return of_samples(ids)


def of_samples(ids) -> TopK:  # (S, N), each row rising
    """The distribution of N samples: count / N for each token, nothing for all others.

    Its mean is the teacher's p. The gradient of the forward KL is linear in p, so its mean is that
    of the whole distribution; those of other divergences are biased. Anshumann et al. 2025,
    https://arxiv.org/abs/2503.16870
    """
    first, n = torch.searchsorted(ids, ids), ids.shape[-1]              # of equal ids
    counts = torch.searchsorted(ids, ids, right=True) - first
    is_first = first == torch.arange(n, device=ids.device)              # the others repeat it
    log_p = (counts / n).log().where(is_first, MIN_LOG_P)
    return TopK(ids, log_p, torch.full_like(log_p[:, 0], MIN_LOG_P))


# -- writing -------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """Which of n samples are in which part."""

    samples: np.ndarray         # (n,) indices of the samples, each key once, from short to long
    keys: np.ndarray            # (n,)
    n_rows: np.ndarray          # (n,) supervised positions
    cuts: np.ndarray            # (parts + 1,): part i holds samples cuts[i] ... cuts[i + 1] - 1

    def part(self, i: int) -> slice:
        return slice(self.cuts[i], self.cuts[i + 1])


def lay_out(keys, lengths, n_rows, row_bytes: int) -> Layout:
    """Distribute samples, given by key, tokens and supervised positions, (n,) each, over parts, by
    length, then by key. Their order and repetitions do not matter."""
    _, samples = np.unique(keys, return_index=True)
    samples = samples[np.argsort(lengths[samples], kind="stable")]
    n_rows = n_rows[samples]
    ends = np.cumsum(n_rows)
    rows_per_part = max(1, min(PART_BYTES // row_bytes, -(-int(ends[-1]) // N_PARTS)))
    part = (ends - n_rows) // rows_per_part             # of a sample's first position
    cuts = [*np.flatnonzero(np.diff(part, prepend=-1)), len(samples)]
    return Layout(samples, keys[samples], n_rows, np.array(cuts))


class CacheWriter:
    """Writes a cache: `prepare`, `begin`, `write` each missing part in any process.

    about   the fields of IDENTITY except samples_sha256 (ids: of the tokenizer); teacher and
            tokenizer (paths), vocab_size and dim (V and D of the head), skip_bad_lines
    """

    def __init__(self, path, about: dict, layout: Layout, head: torch.Tensor):
        self.path, self.layout, self.head = Path(path), layout, head
        self.row_bytes = row_type(about).itemsize
        self.part_bytes = self.row_bytes * np.add.reduceat(layout.n_rows, layout.cuts[:-1])
        content = layout.keys.tobytes() + layout.n_rows.tobytes() + layout.cuts.tobytes()
        self.about = about | {"samples_sha256": hashlib.sha256(content).hexdigest(),
                              "samples": len(layout.keys), "positions": int(layout.n_rows.sum())}

    def prepare(self, overwrite: bool = False) -> list[int]:
        """The missing parts. Raises ValueError if DIR holds another cache; `overwrite` deletes
        that one."""
        self.path.mkdir(parents=True, exist_ok=True)
        found = self.path / "about.json"
        changed = differences(read_about(found), self.about) if found.exists() else []
        if changed and not overwrite:
            raise ValueError(f"{self.path} holds another cache: {'; '.join(changed)}. "
                             "Give another --cache_dir, or delete that cache with --overwrite")
        if changed or not found.exists():                           # also parts of an unknown cache
            for file in (found, self.path / "index.npz", self.path / "head.pth",
                         *self.path.glob("part-*.bin")):
                file.unlink(missing_ok=True)
        return self.missing()

    def begin(self):
        """Write all other files, so that a run that is interrupted knows what is missing."""
        found = self.path / "about.json"
        if found.exists() and not {"index.npz", "head.pth"}.intersection(
                damaged_files(self.path, read_about(found))):
            return
        order = np.argsort(self.layout.keys)
        starts = np.cumsum(self.layout.n_rows) - self.layout.n_rows
        index = {"keys": self.layout.keys[order], "starts": starts[order],
                 "n_rows": self.layout.n_rows[order],
                 "part_ends": np.cumsum(self.part_bytes) // self.row_bytes}
        files = {"index.npz": lambda file: np.savez(file, **index)}
        if not (self.about["top_k"] or self.about["sampled"]):
            files["head.pth"] = lambda file: torch.save(self.head, file)
        sizes, crc32 = {}, {}
        for name, write in files.items():
            write_atomic(self.path / name, write)
            sizes[name], crc32[name] = size_of(self.path / name), file_crc32(self.path / name)
        sizes |= {part_name(i): int(size) + 4 for i, size in enumerate(self.part_bytes)}
        write_json(found, self.about | {"bytes": sizes, "crc32": crc32})

    def missing(self) -> list[int]:
        return [i for i, size in enumerate(self.part_bytes)
                if size_of(self.path / part_name(i)) != size + 4]

    def write(self, part: int, rows: np.ndarray):
        assert rows.nbytes == self.part_bytes[part]
        rows = rows.view(np.uint8)
        data = rows.tobytes() + checksum(self.about, part, rows)
        write_atomic(self.path / part_name(part), lambda file: file.write(data))


def read_about(file: Path) -> dict:
    """Raises ValueError for a damaged file, by the field that is missing."""
    with named_errors(file):
        about = {"sampled": 0} | json.loads(file.read_bytes())      # older ones have no such field
        if about["version"] == VERSION:
            [about[field] for field in (*IDENTITY, "teacher", "tokenizer", "vocab_size", "dim",
                                        "skip_bad_lines", "bytes", "crc32")]
        return about


def part_name(i: int) -> str:
    return f"part-{i:05d}.bin"


def size_of(path: Path) -> int:
    """Bytes of a file; -1 if it does not exist."""
    return path.stat().st_size if path.exists() else -1


def damaged_files(path: Path, about: dict) -> list[str]:
    """The missing files and those of the wrong size or checksum. The checksum of a part is for
    TeacherCache.part."""
    return [name for name, size in about["bytes"].items() if size_of(path / name) != size
            or name in about["crc32"] and file_crc32(path / name) != about["crc32"][name]]


# -- reading -------------------------------------------------------------------------------------

class TeacherCache:
    """The cached outputs of a teacher, looked up by sample.

    head         (V, D) fp32; None if sparse
    sparse       tokens stored per position, as text; "": hidden states, which give all V logits
    temperature  of the sparse tokens; states serve any
    n_tokens     number of tokens that get logits, the first ones (share_vocabulary)

    Raises FileNotFoundError if there is none, and ValueError if it is incomplete or damaged, with
    the command that completes it.
    """

    def __init__(self, path):
        self.path, self.device = Path(path), torch.device("cpu")
        file = self.path / "about.json"
        if not file.exists():
            raise FileNotFoundError(
                f"no cached teacher outputs in {self}. Write them: python scripts/cache_teacher.py "
                f"--teacher WEIGHTS --data_path FILES --cache_dir {self}")
        self.about = about = read_about(file)
        if about["version"] != VERSION:
            raise ValueError(
                f"{self} has format {about['version']}, this program reads {VERSION}. Write it "
                "again: python scripts/cache_teacher.py --overwrite ...")
        if damaged := damaged_files(self.path, about):
            n_files = len(about["bytes"])
            raise ValueError(f"{self} is incomplete, {n_files - len(damaged)} of {n_files} files; "
                             f"missing or damaged: {', '.join(damaged[:3])}. Complete it: "
                             f"{command(about, self)}")
        self.row, self.n_tokens = row_type(about), about["vocab_size"]
        self.temperature = about["temperature"]
        self.sparse = (f"top {about['top_k']} tokens" if about["top_k"] else
                       f"{about['sampled']} sampled tokens" if about["sampled"] else "")
        with np.load(self.path / "index.npz") as index:
            self.keys, self.starts = index["keys"], index["starts"]     # (samples,), by rising key
            self.n_rows, self.part_ends = index["n_rows"], index["part_ends"]
        self.parts = {}                             # number -> (rows, row bytes), memory-mapped
        self.head = None if self.sparse else load_verified(self.path / "head.pth", mmap=False)

    def __str__(self):
        return str(self.path)

    def described(self) -> str:
        what = f"{self.sparse} at T={self.temperature:g}" if self.sparse else "states"
        return f"{self.about['teacher']} on disk, its {what} in {self}"

    def to(self, device) -> "TeacherCache":
        """Return later look-ups on this device, and move the head there."""
        self.device = torch.device(device)
        self.head = None if self.head is None else self.head.to(device)
        return self

    def check(self, data):
        """Refuse a dataset with samples that the teacher has not read: ValueError with the command
        that writes the cache again, for the data's files and those that are in it already."""
        keys = np.fromiter((sample_key(data.sample(i)) for i in range(len(data))), np.uint64)
        unknown = np.flatnonzero(self.keys[self.find(keys)] != keys)
        if len(unknown):
            was = self.about
            needed = was | {"tokenizer": data.tokenizer.path, "max_seq_len": data.max_seq_len,
                            "files": dict.fromkeys([*was["files"], *map(str, data.paths)])}
            its, ours = (f"tokenizer {each['tokenizer']}, --max_seq_len {each['max_seq_len']}"
                         for each in (was, needed))
            raise ValueError(
                f"{self} lacks {len(unknown):,} of {len(keys):,} samples, such as number "
                f"{data.origins[unknown[0]] + 1} of {data} ({ours}). It is of "
                f"{', '.join(was['files'])} ({its}). Write it again: "
                f"{command(needed, self, '--overwrite')}")

    def find(self, keys):  # (n,) -> (n,) places in the index
        return np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)

    def look_up(self, keys) -> Dense | TopK:
        """The teacher's outputs at the positions of these samples, packed in the given order."""
        keys = np.array(keys, dtype=np.uint64)
        found = self.find(keys)
        if (self.keys[found] != keys).any():
            raise ValueError(f"a sample of the batch is not in {self}; TeacherCache.check names it")
        starts, n_rows = self.starts[found], self.n_rows[found]
        parts = np.searchsorted(self.part_ends, starts, side="right")
        begins = starts - np.where(parts > 0, self.part_ends[parts - 1], 0)
        rows = np.concatenate([self.part(i)[begin:begin + n] for i, begin, n in
                               zip(parts.tolist(), begins.tolist(), n_rows.tolist())])
        rows = rows.view(self.row)[:, 0]                                            # (S,)
        if self.sparse:
            return unpack(rows, self.device)
        states = torch.from_numpy(rows["states"]).view(torch.bfloat16)
        return Dense(states.to(self.device), self.head[:self.n_tokens])

    def part(self, i: int) -> np.ndarray:  # -> (rows, row bytes): bytes are copied fastest
        if i not in self.parts:
            path = self.path / part_name(i)
            file = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
            if checksum(self.about, i, file[:-4]) != file[-4:].tobytes():
                raise FileError(f"{path} is damaged, or a part of another cache. Remove it, and "
                                f"write it again: {command(self.about, self)}")
            self.parts[i] = file[:-4].reshape(-1, self.row.itemsize)
        return self.parts[i]
