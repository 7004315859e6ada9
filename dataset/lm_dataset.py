"""
文本变成词元流：只分词一次，写成内存映射文件；第 k 步用哪些样本，与进程数和微批次数无关。
Text becomes packed token batches: tokenised once into a memory-mapped file. Optimizer step k sees
the same samples for any number of micro-batches and processes. Sequence packing: the samples of a
batch follow each other without padding. Targets are the assistant's tokens and its end of turn.
"""

import copy
import functools
import hashlib
import os
import time
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dataset.formats import (check_exists, holds_texts, read_one_by_one, read_routes, to_messages,
                             to_prompts, to_text)
from runtime.args import COLUMNS
from runtime.files import file_crc32, file_sha256, write_atomic

CACHE = Path(__file__).with_name(".cache")      # not beside the data: that folder may be read-only
CACHE_VERSION = 4           # raise it when the meaning of a cached file changes
BLOCK = 512                 # conversations or texts that are tokenised at once, by all threads


class Batch(NamedTuple):
    """One micro-batch as a packed stream (model/transformer.py), samples from short to long."""

    tokens: torch.Tensor            # (N,) ids that the model reads
    lengths: list[int]              # tokens of each sample
    at: torch.Tensor                # (S,) supervised positions of the stream
    targets: torch.Tensor           # (S,) the next id at each of them
    step_targets: int               # targets of the optimizer step: all micro-batches and processes
    step_samples: int               # samples of the optimizer step
    keys: tuple[int, ...] = ()      # sample_key of each sample
    # If each sample has one of several teachers: (teacher, its samples), in this order in the batch
    parts: "tuple[tuple[int, Batch], ...]" = ()

    # If the teacher reads other tokens (paired_with):
    teacher: "Batch | None" = None          # the same samples as the teacher reads them
    # (S,) the place in `teacher.at` that has seen the same text, or -1. None: place i matches i
    match: torch.Tensor | None = None
    shared: torch.Tensor | None = None      # (V,) of Tokenizer.shared_tokens
    span: torch.Tensor | None = None        # (S,) of same_text

    @property
    def routes(self) -> list[int | None]:
        """The teacher of each sample; None: not routed."""
        return [i for i, part in self.parts for _ in part.lengths] or [None] * len(self.lengths)

    def each(self, change) -> "Batch":
        """`change` applied to each tensor, also of the teacher's batch."""
        tensors = {name: change(value) for name, value in self._asdict().items()
                   if isinstance(value, torch.Tensor)}
        return self._replace(**tensors, teacher=self.teacher and self.teacher.each(change),
                             parts=tuple((i, part.each(change)) for i, part in self.parts))

    def to(self, device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from which `to` copies while a GPU computes."""
        return self.each(torch.Tensor.pin_memory)


def read_index(stream: Path, index: Path) -> dict | None:
    """The arrays that describe a file of tokens; None if one of the two is missing or damaged."""
    try:
        with np.load(index) as file:
            arrays = dict(file)
        return arrays if arrays["crc32"] == file_crc32(stream) else None
    except Exception:           # whatever zipfile raises for a damaged file
        return None


class TokenDataset:
    """Samples of token ids in one memory-mapped file; the top bit of an id marks a target.

    The file is identified by the text files' content, the tokenizer and the length limit.
    Subclasses define encode(), which yields for each sample (number of its conversation in the
    files, ids, which of them are targets). Raises what dataset/formats.py raises, and ValueError if
    nothing is left to learn.

    by_turns    each answer of a conversation is a sample of its own, as the tokenizer's chat may
                require (model.tokenizer.Chat)
    """

    validated_on = None             # name of a validation file beside the data
    teacher = None                  # the same samples as a teacher reads them, see paired_with
    shared = None                   # (V,), (V of the teacher): with another tokenizer
    routes = None                   # (samples,) number of the teacher of each, see routed

    def __init__(self, paths, tokenizer, max_seq_len: int = 512, skip_bad_lines: bool = False,
                 log=print, by_turns: bool = False):
        self.paths, self.tokenizer = [Path(path) for path in paths], tokenizer
        self.by_turns = by_turns or tokenizer.chat.reframes
        self.max_seq_len, self.skip_bad_lines, self.log = max_seq_len, skip_bad_lines, log
        self.dtype = np.uint16 if tokenizer.vocab_size <= 1 << 15 else np.uint32
        self.flag = self.dtype(1 << (8 * self.dtype().itemsize - 1))
        stream, index = self.cache_files()
        self.key = stream.stem
        arrays = read_index(stream, index)
        if arrays is None:
            self.build(stream, index)
            arrays = read_index(stream, index)
        # As a plain array: slicing a memmap takes seven times as long.
        self.stream = np.asarray(np.memmap(stream, dtype=self.dtype, mode="r"))
        self.ends, self.n_targets = arrays["ends"], arrays["n_targets"]         # (samples,)
        self.rows = arrays["rows"]                  # (samples,) number of each
        self.n_rows = int(arrays["n_rows"])         # samples of the files, also those left out
        self.origins = arrays["origins"]            # (samples,) its conversation's number
        self.lengths = np.diff(self.ends, prepend=0)

    def cache_files(self) -> tuple[Path, Path]:
        key = hashlib.sha256(f"{type(self).__name__} {self.tokenizer.sha256} {self.max_seq_len} "
                             f"{self.skip_bad_lines} {self.by_turns} {CACHE_VERSION}"
                             f"{os.environ.get(COLUMNS, '')}".encode())
        for path in self.paths:
            check_exists(path)
            key.update(bytes.fromhex(file_sha256(path)))
        name = f"{self.paths[0].name}-{key.hexdigest()[:16]}"
        return CACHE / f"{name}.bin", CACHE / f"{name}.npz"

    def build(self, stream: Path, index: Path):
        start, length = time.time(), self.max_seq_len + 1   # the last token is only predicted
        found = array("q")                  # size, targets, origin and uncut size of each sample

        def write(file):
            for origin, ids, targets in self.encode():
                row = np.array(ids[:length], dtype=self.dtype)
                is_target = np.array(targets[1:length], dtype=bool)
                row[1:][is_target] |= self.flag
                if is_target.any():
                    file.write(row)
                found.extend((len(row), is_target.sum(), origin, len(ids)))
            if not any(found[1::4]):
                raise ValueError(f"{self}: no sample has anything to learn within "
                                 f"max_seq_len={self.max_seq_len} tokens; raise --max_seq_len")

        write_atomic(stream, write)
        sizes, n_targets, origins, uncut = np.array(found).reshape(-1, 4).T
        rows = np.flatnonzero(n_targets)
        ends = np.cumsum(sizes[rows])
        write_atomic(index, lambda file: np.savez(
            file, ends=ends, n_targets=n_targets[rows], rows=rows, origins=origins[rows],
            n_rows=len(sizes), crc32=file_crc32(stream)))
        self.log(f"{self}: {len(rows):,} samples, {ends[-1]:,} tokens, {n_targets.sum():,} "
                 f"targets; {(uncut > sizes).sum():,} cut to {self.max_seq_len} tokens, "
                 f"{len(sizes) - len(rows):,} left out without a target; "
                 f"{time.time() - start:.1f} s")

    def read(self, convert):
        """convert(row) of every row of the files, one by one: as Python's objects, a file takes 20
        times its size."""
        return (value for path in self.paths for value in
                read_one_by_one(path, convert, self.skip_bad_lines, self.log) if value is not None)

    def __str__(self):
        return ", ".join(map(str, self.paths))

    def __len__(self):
        return len(self.ends)

    def answered(self) -> np.ndarray:  # -> (samples,) whether each has an answer
        return np.ones(len(self), dtype=bool)

    def split(self, fraction: float, seed: int) -> tuple["TokenDataset", "TokenDataset"]:
        """Two views, the second with that fraction of the conversations that have an answer, chosen
        by the seed."""
        origins, origin = np.unique(self.origins, return_inverse=True)
        answered = np.isin(origins, self.origins[self.answered()])
        order = permutation(len(origins), seed, 0)
        order = order[np.argsort(~answered[order], kind="stable")]
        is_second = np.isin(origin, order[:round(fraction * answered.sum())])
        return self.view(np.flatnonzero(~is_second)), self.view(np.flatnonzero(is_second))

    def view(self, samples: np.ndarray) -> "TokenDataset":
        part = copy.copy(self)
        for name in ("ends", "lengths", "n_targets", "rows", "origins"):
            setattr(part, name, getattr(self, name)[samples])
        if self.routes is not None:
            part.routes = self.routes[samples]
        return part

    def routed(self, names: list[str]) -> "TokenDataset":
        """A view whose samples know their teacher, one of these names: see formats.read_routes."""
        if not isinstance(self, SFTDataset):
            raise ValueError(f"{self} holds texts; only conversations name their teacher")
        found = [read_routes(path, names, self.convert, self.skip_bad_lines) for path in self.paths]
        routes = np.concatenate(found)[self.origins]
        part = self.view(np.flatnonzero(routes >= 0))
        part.routes = routes[routes >= 0]
        counts = np.bincount(part.routes, minlength=len(names)).tolist()
        self.log(f"{self}: samples by teacher: "
                 + ", ".join(f"{name} {count:,}" for name, count in zip(names, counts)))
        return part

    def read_by(self, teacher: int) -> "TokenDataset":
        """A view of the samples of this teacher: all, if they are not routed."""
        return self if self.routes is None else self.view(np.flatnonzero(self.routes == teacher))

    def sample(self, i: int) -> np.ndarray:  # -> (lengths[i],) ids and flags
        return self.stream[self.ends[i] - self.lengths[i]:self.ends[i]]

    def batch(self, samples: np.ndarray, step_targets: int = 0, step_samples: int = 0) -> Batch:
        """The packed stream of these samples, in the given order; of routed ones by teacher."""
        if self.routes is not None:
            own = [(i, samples[self.routes[samples] == i]) for i in np.unique(self.routes[samples])]
            batch = self.pack(np.concatenate([some for _, some in own]), step_targets, step_samples)
            return batch._replace(parts=tuple((i, self.pack(some)) for i, some in own))
        batch = self.pack(samples, step_targets, step_samples)
        if self.teacher is None:
            return batch
        its = self.teacher.batch(np.searchsorted(self.teacher.rows, self.rows[samples]))
        return self.matched(batch, its)

    def matched(self, batch: Batch, its: Batch) -> Batch:
        """The batch with the same samples as the teacher reads them."""
        if self.shared is None:
            return batch._replace(teacher=its)
        batch, its = (one._replace(shared=shared) for one, shared in zip((batch, its), self.shared))
        match, span = same_text(batch, self.tokenizer.n_bytes, its, self.teacher.tokenizer.n_bytes)
        return batch._replace(teacher=its, match=match, span=span)

    def pack(self, samples: np.ndarray, step_targets: int = 0, step_samples: int = 0) -> Batch:
        parts = [self.sample(i) for i in samples]
        stream = np.concatenate(parts)
        batch = packed_batch(stream & ~self.flag, stream & self.flag > 0, self.lengths[samples],
                             step_targets, step_samples)
        return batch._replace(keys=tuple(map(sample_key, parts)))

    def retold(self, prompt: list[int], answer: list[int]) -> list[int]:
        """An answer in the teacher's tokens, after its prompt; what is no text ends it."""
        ours, its = self.tokenizer, self.teacher.tokenizer
        ends = answer[-1] == ours.end_of_turn
        text, broken, _ = ours.decode(
            i if ours.names.get(i) in (None, *ours.matched) else ours.vocab_size
            for i in answer[:len(answer) - ends]).partition("\ufffd")
        ids = its.encode(text + broken) + [its.end_of_turn] * (ends and not broken)
        return ids[:self.teacher.max_seq_len - len(prompt)]

    def paired_with(self, teacher: "TokenDataset") -> "TokenDataset":
        """A view whose batches also hold the teacher's version of the same samples: other tokens,
        or another prompt. Samples of which the teacher keeps no target are left out.

        Raises ValueError if the sample counts differ, or, with one tokenizer, the answers.
        """
        if self.n_rows != teacher.n_rows:
            raise ValueError(
                f"{self} has {self.n_rows:,} samples and {teacher} {teacher.n_rows:,}: which "
                "belong together? The teacher's files must match the student's row by row")
        both = self.tokenizer, teacher.tokenizer
        ours, theirs = (one.chat.lead + " " * one.prefix_space for one in both)
        if ours != theirs:              # same_text counts the bytes of answers from their start
            raise ValueError(f"answers begin with {ours!r} in the student's chat format and "
                             f"{theirs!r} in the teacher's; give the student's folder the "
                             "chat_template of the teacher")
        pair = self.view(np.flatnonzero(np.isin(self.rows, teacher.rows)))
        pair.teacher = teacher
        if self.tokenizer.conflict(teacher.tokenizer.ids):
            pair.shared = [*map(torch.from_numpy, self.tokenizer.shared_tokens(teacher.tokenizer))]
            return pair
        answered = pair.answered()
        for i, j in enumerate(np.searchsorted(teacher.rows, pair.rows)):
            if answered[i] and not np.array_equal(pair.answer(i), teacher.answer(j)):
                raise ValueError(
                    f"sample {pair.origins[i] + 1} of {pair} and of {teacher}: the answers differ, "
                    "or one is cut by a max_seq_len; both files must hold the same answers row by "
                    "row")
        return pair

    def with_room(self, log) -> "TokenDataset":
        """A view of the samples whose first prompt leaves room for an answer."""
        keep = [np.argmax(self.sample(i) & self.flag > 0) < self.max_seq_len
                for i in range(len(self))]
        if not all(keep):
            log(f"{self}: {len(keep) - sum(keep):,} of {len(keep):,} samples have a prompt that "
                "leaves no room for an answer, and are left out")
        return self.view(np.flatnonzero(keep))

    def answer(self, i: int) -> np.ndarray:  # -> (n_targets[i],) ids
        sample = self.sample(i)[1:]
        return sample[sample & self.flag > 0]


def packed_batch(ids, is_target, sizes, step_targets: int = 0, step_samples: int = 0) -> Batch:
    """Concatenated samples, NumPy arrays (all ids,), (all ids,), (samples,) -> a Batch. The only
    place that shifts targets: the target of a position is the token after it."""
    ends = np.cumsum(sizes)
    is_read, is_next = np.ones(len(ids), dtype=bool), np.ones(len(ids), dtype=bool)
    is_read[ends - 1] = False
    is_next[ends - sizes] = False
    at = np.flatnonzero(is_target[is_next])
    tokens, targets = ids[is_read].astype(np.int64), ids[is_next][at].astype(np.int64)
    return Batch(torch.from_numpy(tokens), (sizes - 1).tolist(), torch.from_numpy(at),
                 torch.from_numpy(targets), step_targets, step_samples)


def prompts_and_answers(batch: Batch) -> list[list[tuple[list[int], list[int]]]]:
    """Each sample's answers, each after all tokens before it: [[(prompt, answer)]] of ids."""
    tokens, targets = batch.tokens.tolist(), dict(zip(batch.at.tolist(), batch.targets.tolist()))
    found, begin = [], 0
    for length in batch.lengths:
        answers = []
        for at in range(begin, begin + length):
            if at in targets:
                if at == begin or at - 1 not in targets:
                    answers.append((tokens[begin:at + 1], []))
                answers[-1][1].append(targets[at])
        found.append(answers)
        begin += length
    return found


def batch_of_answers(prompts, answers, routes=()) -> Batch:
    """One sample per prompt and its answer, as ids; all answer tokens are targets. routes: the
    teacher of each, in rising order, if each has its own."""
    parts = ((i, [pair for pair, route in zip(zip(prompts, answers), routes) if route == i])
             for i in sorted({*routes} - {None}))
    parts = tuple((i, batch_of_answers(*zip(*pairs))) for i, pairs in parts)
    ids = np.concatenate([prompt + answer for prompt, answer in zip(prompts, answers)])
    sizes = np.array([(len(prompt), len(answer)) for prompt, answer in zip(prompts, answers)])
    is_target = np.tile([False, True], len(sizes)).repeat(sizes.flatten())
    return packed_batch(ids, is_target, sizes.sum(axis=1))._replace(parts=parts)


def sample_key(sample: np.ndarray) -> int:
    """A 64-bit hash of a sample's ids and targets."""
    content = sample.astype(np.uint32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def same_text(student: Batch, student_bytes, teacher: Batch, teacher_bytes):  # -> (S,), (S,)
    """For each student target the teacher target that begins at the same byte, or -1; and the span,
    the text up to the next match: a shared token, V + 1 for another text, or -1 where nothing
    matches or a sample is cut within it.

        student  | he | llo | <|im_end|> |      bytes  0  2  5
        teacher  | hel | lo | <|im_end|> |             0  3  5      match  0 -1 2   span  V+1 -1 2
    """
    def places(batch, n_bytes):  # -> (2, S) begins and ends, rising: sample << 32 | byte
        sample = np.searchsorted(np.cumsum(batch.lengths), batch.at.numpy(), side="right")
        size = n_bytes[batch.targets.numpy()]
        begins = np.cumsum(size) - size
        first = np.searchsorted(sample, sample)             # the first target of the same sample
        begins = (sample.astype(np.int64) << 32) + begins - begins[first]
        return np.stack([begins, begins + size])

    ours, theirs = places(student, student_bytes), places(teacher, teacher_bytes)
    found = np.minimum(np.searchsorted(theirs[0], ours[0]), len(theirs[0]) - 1)
    match, span = np.where(theirs[0, found] == ours[0], found, -1), np.full(len(found), -1)

    begins, n_bytes = np.flatnonzero(match >= 0), np.append(student_bytes, -1)
    ends, span[begins] = ours[1, np.append(begins[1:], 0) - 1], len(n_bytes)
    for batch, first in (student, begins), (teacher, match[begins]):
        token = batch.shared[batch.targets[first]].numpy()
        span[begins] = np.where(n_bytes[token] == ends - ours[0, begins], token, span[begins])
    span[begins[ends != theirs[1, np.append(match[begins[1:]], 0) - 1]]] = -1           # cut
    return torch.from_numpy(match), torch.from_numpy(span)


class PretrainDataset(TokenDataset):
    """Each text is a sample that ends in <|endoftext|>; long texts are cut into several samples.
    Every token is a target."""

    def encode(self):
        texts, number = self.read(to_text), count()
        while block := list(islice(texts, BLOCK)):
            for sample in text_samples(block, self.tokenizer, self.max_seq_len):
                yield next(number), *sample


def text_samples(texts, tokenizer, max_seq_len: int) -> list[tuple[list[int], list[bool]]]:
    """Each text with its begin and end tokens, in pieces of at most max_seq_len read tokens."""
    samples, begin = [], [] if tokenizer.bos is None else [tokenizer.bos]
    for ids in tokenizer.encode_batch(texts):
        ids = begin + ids + [tokenizer.end_of_text]
        # Pieces overlap by one token: the last target of one is the first input of the next.
        for start in range(0, len(ids) - 1, max_seq_len):
            piece = ids[start:start + max_seq_len + 1]
            samples.append((piece, [True] * len(piece)))
    return samples


class SFTDataset(TokenDataset):
    """Each conversation is a sample; only the assistant's tokens and end of turn are targets."""

    validated_on = "val.jsonl"
    convert = staticmethod(to_messages)

    def encode(self):
        turns = ((origin, part) for origin, messages in enumerate(self.read(self.convert))
                 for part in (each_answer(messages) if self.by_turns else [messages]))
        while block := list(islice(turns, BLOCK)):
            encoded = self.tokenizer.encode_chats(part for _, part in block)
            yield from ((origin, *sample) for (origin, _), sample in zip(block, encoded))


class PromptDataset(SFTDataset):
    """Also rows without an answer, for a student that writes it: the end of turn stands for it."""

    convert = staticmethod(to_prompts)

    def answered(self):
        none = [self.tokenizer.end_of_turn | self.flag]
        found = np.array([self.answer(i).tolist() != none for i in range(len(self))], dtype=bool)
        if self.teacher is not None:
            found &= self.teacher.answered()[np.searchsorted(self.teacher.rows, self.rows)]
        return found


def each_answer(messages: list[dict]) -> list[list[dict]]:
    """A conversation per answer to be learned, which ends with it; earlier answers are context."""
    context = [{**message, "train": False} for message in messages]
    return [[*context[:i], message] for i, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train", True)]


def dataset_of(paths) -> type[TokenDataset]:
    """The class for these files: texts, or conversations, which refuse texts among them."""
    return PretrainDataset if all(map(holds_texts, paths)) else SFTDataset


def open_data(kind, paths, tokenizer, max_seq_len: int, val_path=None, val_fraction: float = 0.05,
              skip_bad_lines: bool = False, first=nullcontext(), log=print, teacher=None, names=()):
    """Training and validation data: (kind, kind or None).

    kind      PretrainDataset or SFTDataset
    val_path  None: the file beside the data that `kind` names, else a fraction of the data;
              "none": no validation
    first     a context in which the main process tokenises first (main_process_first)
    teacher   (paths, tokenizer, max_seq_len) of a teacher with other tokens or other prompts
    names     of the teachers, if each reads its own samples only
    """
    other_prompts = teacher is not None and list(teacher[0]) != list(paths)
    if other_prompts and val_path not in (None, "none"):
        raise ValueError(f"--val_path {val_path} has no prompts for the teacher; leave it out for "
                         "--val_fraction")
    if not val_path and kind.validated_on and not other_prompts:
        beside = Path(paths[0]).with_name(kind.validated_on)
        val_path = beside if beside.exists() else None

    by_turns = tokenizer.chat.reframes or teacher is not None and teacher[1].chat.reframes

    def read(files):
        data = kind(files, tokenizer, max_seq_len, skip_bad_lines, log, by_turns)
        if any(names):
            data = data.routed(names)
        if teacher is None:
            return data
        its_files = teacher[0] if other_prompts else files
        return data.paired_with(kind(its_files, *teacher[1:], skip_bad_lines, log, by_turns))

    with first:
        data = read(paths)
        val = read([val_path]) if val_path and val_path != "none" else None
    if val is not None:
        val = val.view(np.flatnonzero(val.answered()))
    if not val_path:
        # More than 1,000 samples make validation slower, and its result hardly more precise.
        data, val = data.split(min(val_fraction, 1000 / len(data)), seed=0)
    val = val if val is not None and len(val) else None
    log(f"data: {len(data):,} samples of {data}; "
        + (f"the teacher reads {data.teacher}; " if other_prompts else "")
        + f"validation: {f'{len(val):,} of {val}' if val else 'none'}")
    return data, val


def make_loader(data, first_step: int, last_step: int, num_workers: int = 0, device: str = "cpu"):
    """An iterator over this process's micro-batches of steps first_step ... last_step - 1, which
    num_workers threads prepare ahead. Threads share the memory map, and receive no signals."""
    wanted = range(first_step * data.per_step, last_step * data.per_step)
    pin = torch.device(device).type == "cuda"

    def micro_batch(j):
        return data[j].pinned() if pin else data[j]

    if not num_workers:
        yield from map(micro_batch, wanted)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        ahead = deque()
        for j in wanted:
            ahead.append(pool.submit(micro_batch, j))
            if len(ahead) > num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class MicroBatches:
    """All micro-batches of one process in order; item j is a Batch.

    Optimizer step k takes the k-th slice of the epoch's permutation. Its samples, from short to
    long, are dealt like cards to the micro-batches of all processes, so these are about equally
    large. The remainder of an epoch is dropped; fewer samples than a step are one smaller step.
    """

    def __init__(self, dataset: TokenDataset, batch_size: int, accumulation_steps: int = 1,
                 rank: int = 0, world_size: int = 1, seed: int = 0):
        self.dataset, self.seed, self.rank = dataset, seed, rank
        self.accumulation_steps = self.per_step = accumulation_steps    # micro-batches per process
        self.hands = accumulation_steps * world_size                    # and of all processes
        self.step_samples = min(batch_size * self.hands, len(dataset))
        if not self.step_samples:
            raise ValueError(f"{dataset} has no samples left to train on")
        self.steps_per_epoch = len(dataset) // self.step_samples

    def __getitem__(self, j: int) -> Batch:
        k, micro = divmod(j, self.accumulation_steps)
        samples = self.samples_of_step(k)
        hand = samples[self.rank * self.accumulation_steps + micro::self.hands]
        if not len(hand):       # all processes communicate: a sample of weight 0
            return self.dataset.batch(samples[:1], np.inf, np.inf)
        return self.dataset.batch(hand, int(self.dataset.n_targets[samples].sum()), len(samples))

    def samples_of_step(self, k: int) -> np.ndarray:  # -> (step_samples,) from short to long
        epoch, place = divmod(k, self.steps_per_epoch)
        order = permutation(len(self.dataset), self.seed, epoch)
        samples = order[place * self.step_samples:(place + 1) * self.step_samples]
        return samples[np.argsort(self.dataset.lengths[samples], kind="stable")]


@functools.lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def by_length(lengths: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Sample indices from short to long, in batches of at most so many tokens."""
    order, start, batches = np.argsort(lengths, kind="stable"), 0, []
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[start:end + 1]].sum() > tokens_per_batch:
            batches.append(order[start:end])
            start = end
    return batches


def in_order(dataset: TokenDataset, rank: int = 0, world_size: int = 1,
             tokens_per_batch: int = 4096):
    """Batches for evaluation: every sample once, from short to long. All processes get equally
    many, because a sharded model's forward pass needs all of them: the last without targets."""
    parts = by_length(dataset.lengths, tokens_per_batch)
    for first in range(0, len(parts), world_size):
        has_part = first + rank < len(parts)
        batch = dataset.batch(parts[first + rank if has_part else first])
        yield batch if has_part else batch._replace(at=batch.at[:0], targets=batch.targets[:0],
                                                    parts=())
