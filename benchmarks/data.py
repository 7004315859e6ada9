"""
批次准备得有多快：每次现场分词并填充，与分词一次、内存映射并排，编号与目标相同。
How fast batches are prepared: tokenised and padded each time, or tokenised once into a memory map.

one table           python -m benchmarks.data
quick               python -m benchmarks.data --rows 500 --repeats 1

An epoch through a DataLoader in the same process. Only real tokens count, not padding; ids and
targets must be the same.
"""

import json
import tempfile
from collections import namedtuple
from pathlib import Path
from random import Random

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import (add_result_args, compare, parse, setting, table, timed,
                                with_ratios, write_json)
from dataset import lm_dataset
from dataset.lm_dataset import Batch, MicroBatches, SFTDataset, permutation
from dataset.miniworld import LEAVES, World
from model.tokenizer import Tokenizer
from runtime.args import checking_input, make_parser
from runtime.files import write_jsonl

SEED = 0
IGNORED = -100                  # the target that F.cross_entropy ignores
MOST_TURNS = 10                 # of a chat: some 140 tokens on average
Case = namedtuple("Case", "rows batch_size max_seq_len device threads")           # as the flags


class PlainChats(Dataset):
    """A Dataset as textbooks write it. Item i is (max_seq_len,) ids and (max_seq_len,) targets."""

    def __init__(self, path, tokenizer, max_seq_len):
        self.chats = [json.loads(line)["conversations"]
                      for line in path.read_text(encoding="utf-8").splitlines()]
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.begin = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)

    def __len__(self):
        return len(self.chats)

    def __getitem__(self, i):
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                       for turn in self.chats[i])
        ids = self.tokenizer.encode(text, allow_special=True)[:self.max_seq_len + 1]
        targets, n, is_target = [IGNORED] * len(ids), len(self.begin), False
        for at, token in enumerate(ids):
            if is_target or ids[max(0, at - n):at] == self.begin:
                targets[at] = token
                is_target = token != self.tokenizer.end_of_turn
        padding = self.max_seq_len + 1 - len(ids)
        return (torch.tensor(ids[:-1] + [self.tokenizer.end_of_text] * padding),
                torch.tensor(targets[1:] + [IGNORED] * padding))


def plain(case, path, tokenizer):
    """In the order of our shuffling, so that batches can be compared."""
    data = PlainChats(path, tokenizer, case.max_seq_len)
    order = permutation(len(data), SEED, 0).tolist()
    return lambda: DataLoader(data, case.batch_size, sampler=order, drop_last=True)


def ours(case, path, tokenizer):
    chats = SFTDataset([path], tokenizer, case.max_seq_len, log=lambda line: None)
    data = MicroBatches(chats, case.batch_size, seed=SEED)
    return lambda: DataLoader(data, batch_size=None, sampler=range(data.steps_per_epoch))


# form: (prepares the data and returns a function that makes an epoch, whether preparation is timed)
FORMS = {"plain": (plain, True), "ours, first epoch": (ours, True),
         "ours, from the map": (ours, False)}


def write_chats(path: Path, n: int):
    """n chats of 1 to MOST_TURNS questions of the small world and their answers."""
    rng, world = Random(SEED), World(SEED)
    known = [pair for leaf in LEAVES.values() for fact in leaf(world)
             for pair in fact.answers.items()]
    chats = [rng.choices(known, k=rng.randint(1, MOST_TURNS)) for _ in range(n)]
    write_jsonl(path, [{"conversations": [{"role": role, "content": content} for turn in turns
                                          for role, content in zip(("user", "assistant"), turn)]}
                       for turns in chats])


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds of an epoch, and its tokens. All ids and targets are `saved`."""
    device, tokenizer = torch.device(case.device), Tokenizer.load()
    prepare, is_timed = FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        lm_dataset.CACHE = Path(folder) / "cache"           # empty
        few, path = Path(folder) / "few.jsonl", Path(folder) / "chats.jsonl"
        write_chats(few, case.batch_size)
        consume(prepare(case, few, tokenizer)(), device)     # imports, tables
        write_chats(path, case.rows)

        epoch = None if is_timed else prepare(case, path, tokenizer)
        _, seconds = timed(
            lambda: consume((epoch or prepare(case, path, tokenizer))(), device), device)
        found = all_of(prepare(case, path, tokenizer)(), tokenizer)
        if saved:
            torch.save(found, saved)
    return {"seconds": seconds, "tokens": len(found["ids"])}


def consume(batches, device):
    """Move each batch to the device and drop it."""
    for batch in batches:
        if isinstance(batch, Batch):
            batch.to(device)
        else:
            [part.to(device, non_blocking=True) for part in batch]


def all_of(batches, tokenizer) -> dict[str, torch.Tensor]:
    """(N,) ids and (N,) targets, without padding, each batch from short to long."""
    ids, targets = [], []
    for batch in batches:
        if isinstance(batch, Batch):
            ids.append(batch.tokens)
            ignored = torch.full_like(batch.tokens, IGNORED)
            targets.append(ignored.index_put((batch.at,), batch.targets))
        else:
            lengths = (batch[0] != tokenizer.end_of_text).sum(dim=1)
            order = lengths.argsort(stable=True)
            for parts, rectangle in zip((ids, targets), batch):
                parts += [rectangle[i, :lengths[i]] for i in order]
    return {"ids": torch.cat(ids).double(), "targets": torch.cat(targets).double()}


COLUMNS = {"form": "{form}", "seconds": "{seconds:.3f}", "tokens/s": "{tokens_per_s:,.0f}",
           "speed": "{speed:.1f} x"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=5000, help=f"chats of 1 to {MOST_TURNS} questions and answers")
    add("--batch_size", type=int, default=16, help="chats per batch")
    add("--max_seq_len", type=int, default=512,
        help="maximum length in tokens, 64 or more; the plain form pads to it")
    add_result_args(parser)
    args = parse(parser, argv, "rows", "batch_size")
    if args.max_seq_len < 64:
        parser.error(f"--max_seq_len {args.max_seq_len} must be 64 or more: chats need an answer")
    if args.rows < args.batch_size:
        parser.error(f"--rows {args.rows} does not fill one batch of {args.batch_size}")

    case = Case(*(vars(args)[field] for field in Case._fields))
    with checking_input():                                  # integers: no tolerance
        figures = compare(measure, case, FORMS, args.repeats, tolerance=0.0)
    rows = [row | {"tokens_per_s": row["tokens"] / row["seconds"]} for row in with_ratios(figures)]
    print(f"{args.rows:,} chats in batches of {args.batch_size}: {rows[0]['tokens']:,.0f} tokens"
          f"\n\n{table(rows, COLUMNS)}\n\nseconds of one epoch, {setting(args)}")
    write_json(args, rows)


if __name__ == "__main__":
    main()
