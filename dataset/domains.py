"""
领域课程的两部分数据：通用与领域。按问题留出评测部分，再按比例混合。
The two sides of a curriculum's data, general and domain: opened, held out by question, and mixed.
"""

import hashlib
import json

import numpy as np

from dataset.formats import category, files_of, read_each, to_messages
from dataset.lm_dataset import TokenDataset, dataset_of
from dataset.mixture import Joined, Mixture, growth

GENERAL, DOMAIN = "general", "domain"


def is_held_out(messages: list[dict], fraction: float) -> bool:
    """By a hash of the question: all copies of a row are on the same side of the split."""
    digest = hashlib.sha256(json.dumps(messages).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2 ** 64


def open_sides(paths: dict, tokenizer, max_seq_len: int, val_fraction: float, eval_samples: int,
               read_exam, skip_bad_lines: bool = False, log=print):
    """All data as one, the samples of each side and category, and what is held out:
    (Joined, {side: {category: (samples,)}}, {side: (validation data, exam questions)}).

    paths         {side: (file or folder, validation data of it)}. None: val_fraction of the
                  questions are held out; "none": no validation
    eval_samples  at most so many held-out samples and questions of each side; 0: all
    read_exam     evaluation.exam.read_exam
    """
    def read(file) -> TokenDataset:
        return dataset_of([file])([file], tokenizer, max_seq_len, skip_bad_lines, log)

    def read_questions(file) -> list:
        texts = dataset_of([file]).validated_on is None
        return [] if texts else read_exam([file], skip_bad_lines=skip_bad_lines, log=str)

    training, sides, held_out, first = [], {}, {}, 0
    for side, (path, val_path) in paths.items():
        names, val, exam = [], [], []
        for file in files_of(path):
            fraction = 0.0 if val_path else val_fraction
            data, rest, categories = split_file(file, read(file), fraction, skip_bad_lines)
            training.append(data)
            names.append(categories)
            if fraction:
                val += [rest] if len(rest) else []
                exam += [question for question in read_questions(file)
                         if is_held_out(question.messages, fraction)]
        if val_path and val_path != "none":
            files = files_of(val_path)
            val = list(map(read, files))
            exam = [question for file in files for question in read_questions(file)]
        names = np.concatenate(names)
        samples = first + np.arange(len(names))
        sides[side] = {str(name): samples[names == name] for name in np.unique(names)}
        first += len(names)
        kept = "none"
        if val:
            data, generator = Joined(val), np.random.default_rng(0)
            data = data.view(pick(len(data), eval_samples, generator))
            exam = [exam[i] for i in pick(len(exam), eval_samples, generator)]
            held_out[side] = data, exam
            kept = f"{len(data):,} samples, {len(exam):,} questions"
        log(f"{side}: {len(names):,} samples of {path}, {len(sides[side])} categories; "
            f"held out: {kept}")
    return Joined(training), sides, held_out


def split_file(file, data: TokenDataset, fraction: float, skip_bad_lines: bool):
    """(training data, held-out data, the category of each training sample) of one file."""
    if data.validated_on is None:           # texts: pieces of a text, without questions
        data, rest = data.split(fraction, seed=0)
        return data, rest, np.full(len(data), file.stem)
    rows = read_each(file, lambda row: (to_messages(row), category(row, file.stem)),
                     skip_bad_lines, log=str)
    names = np.array([name for _, name in rows])[data.origins]
    out = np.array([is_held_out(messages[:-1], fraction) for messages, _ in rows])[data.origins]
    return data.view(np.flatnonzero(~out)), data.view(np.flatnonzero(out)), names[~out]


def pick(n: int, limit: int, generator) -> np.ndarray:
    """Up to `limit` of n numbers, in order; all with limit 0."""
    if 0 < limit < n:
        return np.sort(generator.choice(n, limit, replace=False))
    return np.arange(n)


def mix_sides(data: Joined, sides: dict, stage, accumulation_steps: int, rank: int,
              world_size: int, seed: int) -> Mixture:
    """The samples of a stage (distill.stages.Stage), step by step. Parts are "general" and
    "domain/all", or "domain/CATEGORY" where weak categories are sampled more often. With a
    balance, a micro-batch has samples of one side only."""
    n_samples = {side: sum(map(len, categories.values())) for side, categories in sides.items()}
    step_samples = stage.batch_size * accumulation_steps * world_size
    mean = sum(stage.share) / 2
    epoch_samples = n_samples[DOMAIN] / mean if mean else n_samples[GENERAL]
    steps_per_epoch = max(1, round(epoch_samples / step_samples))
    n_steps = stage.steps or stage.epochs * steps_per_epoch
    domain_share = growth(*stage.share, n_steps)                  # (n_steps,)
    parts, shares = {}, []
    if domain_share.min() < 1:
        parts[GENERAL] = np.concatenate(list(sides[GENERAL].values()))
        shares.append(1 - domain_share)
    if mean:
        categories = sides[DOMAIN]
        if stage.sampling == "uniform":
            categories = {"all": np.concatenate(list(categories.values()))}
        for name, samples in categories.items():
            parts[f"{DOMAIN}/{name}"] = samples
            shares.append(domain_share * len(samples) / n_samples[DOMAIN])
    groups = None
    if stage.balance != "none":
        groups = [[GENERAL], [name for name in parts if name != GENERAL]]
    return Mixture(data, parts, np.stack(shares, axis=1), stage.batch_size, accumulation_steps,
                   rank, world_size, seed, steps_per_epoch, groups)
