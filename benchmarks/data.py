"""
批次准备得有多快：每次现场分词并填充，与分词一次、内存映射并排，编号与目标相同。
How fast batches are made ready: tokenised and padded anew each time, beside tokenised once and read from a memory map.

    plain                   a Dataset as textbooks have it: render, encode, look for the assistant's turns, pad to the limit
    ours, first epoch       dataset/lm_dataset.py with an empty cache: tokenise the file, write the map, read it
    ours, from the map      any epoch after that

One epoch each, through a DataLoader in the same process; a token counts where it is read, padding does not.

one table           python -m benchmarks.data
quick               python -m benchmarks.data --rows 500 --repeats 1
a picture           python -m benchmarks.data --picture data.png --json data.json

Ids and targets have to be the same, batch by batch.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import add_result_args, check_result_args, compare, timed, write_results
from dataset import lm_dataset
from dataset.lm_dataset import Batch, MicroBatches, SFTDataset, permutation
from dataset.miniworld import LEAVES, World
from model.tokenizer import Tokenizer

SEED = 0
NO_TARGET = -100                # what F.cross_entropy passes over
MOST_TURNS = 10                 # of a chat: some 140 tokens on average


# --------------------------------------------------------------------------------------------------------- the forms


class PlainChats(Dataset):
    """Item i is (max_seq_len,) ids and (max_seq_len,) targets, worked out whenever it is asked for."""

    def __init__(self, path, tokenizer, max_seq_len):
        self.chats = [json.loads(line)["conversations"] for line in path.read_text().splitlines()]
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.begin = tokenizer.encode("<|im_start|>assistant\n", allow_special=True)
        self.end = tokenizer.end_of_turn

    def __len__(self):
        return len(self.chats)

    def __getitem__(self, i):
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in self.chats[i])
        ids = self.tokenizer.encode(text, allow_special=True)[:self.max_seq_len + 1]
        targets = [NO_TARGET] * len(ids)
        n, at = len(self.begin), 0
        while at < len(ids):
            if ids[at:at + n] == self.begin:
                at += n
                while at < len(ids):
                    targets[at] = ids[at]
                    if ids[at] == self.end:
                        break
                    at += 1
            at += 1
        padding = self.max_seq_len + 1 - len(ids)
        return (torch.tensor(ids[:-1] + [self.tokenizer.end_of_text] * padding),
                torch.tensor(targets[1:] + [NO_TARGET] * padding))


def plain(case, path, tokenizer):
    """In the order that ours are shuffled to, so that they can be compared."""
    data = PlainChats(path, tokenizer, case.max_seq_len)
    order = permutation(len(data), SEED, 0).tolist()
    return lambda: DataLoader(data, case.batch_size, sampler=order, drop_last=True)


def ours(case, path, tokenizer):
    data = MicroBatches(SFTDataset([path], tokenizer, case.max_seq_len, log=lambda line: None), case.batch_size, seed=SEED)
    return lambda: DataLoader(data, batch_size=None, sampler=range(data.steps_per_epoch))


# form: (what makes it ready and returns a call for an epoch, whether that is timed with the epoch)
FORMS = {"plain": (plain, True), "ours, first epoch": (ours, True), "ours, from the map": (ours, False)}


# --------------------------------------------------------------------------------------------------- one measurement


class Case(NamedTuple):
    rows: int
    batch_size: int
    max_seq_len: int
    device: str
    threads: int


def write_chats(path: Path, n: int):
    """n chats of 1 to MOST_TURNS questions of the small world and their answers."""
    rng, world = Random(SEED), World(SEED)
    known = [(question, answer) for leaf in LEAVES.values() for fact in leaf(world)
             for question, answer in fact.answers.items()]
    with path.open("w") as file:
        for _ in range(n):
            turns = rng.choices(known, k=rng.randint(1, MOST_TURNS))
            chat = [{"role": role, "content": content} for turn in turns for role, content in zip(("user", "assistant"), turn)]
            print(json.dumps({"conversations": chat}, ensure_ascii=False), file=file)


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds of an epoch, and its tokens. All it reads and all its targets are `saved`."""
    torch.set_num_threads(case.threads)
    device, tokenizer, (ready, is_timed) = torch.device(case.device), Tokenizer.load(), FORMS[form]
    with tempfile.TemporaryDirectory() as folder:
        lm_dataset.CACHE = Path(folder) / "cache"           # ours alone: empty, and gone afterwards
        few, path = Path(folder) / "few.jsonl", Path(folder) / "chats.jsonl"
        write_chats(few, case.batch_size)
        consume(ready(case, few, tokenizer)(), tokenizer, device)       # imports, and the tokenizer's own tables
        write_chats(path, case.rows)

        epoch = None if is_timed else ready(case, path, tokenizer)
        tokens, seconds = timed(lambda: consume((epoch or ready(case, path, tokenizer))(), tokenizer, device), device)
        if saved:
            torch.save(all_of(ready(case, path, tokenizer)(), tokenizer), saved)
    return {"seconds": seconds, "tokens": tokens}


def consume(batches, tokenizer, device) -> int:
    """Each batch arrives on the device and is dropped, as after its step. Returns how many tokens there were to read."""
    tokens = 0
    for batch in batches:
        if isinstance(batch, Batch):
            batch.to(device)
            tokens += len(batch.tokens)
        else:
            tokens += int((batch[0] != tokenizer.end_of_text).sum())
            [part.to(device, non_blocking=True) for part in batch]
    return tokens


def all_of(batches, tokenizer) -> dict[str, torch.Tensor]:
    """Batches of both kinds as one stream: (N,) ids and (N,) targets, without padding, from short to long in each batch."""
    ids, targets = [], []
    for batch in batches:
        if isinstance(batch, Batch):
            ids.append(batch.tokens)
            targets.append(torch.full_like(batch.tokens, NO_TARGET).index_put((batch.at,), batch.targets))
        else:
            lengths = (batch[0] != tokenizer.end_of_text).sum(dim=1)
            order = lengths.argsort(stable=True)
            for parts, rectangle in zip((ids, targets), batch):
                parts += [rectangle[i, :lengths[i]] for i in order]
    return {"ids": torch.cat(ids).double(), "targets": torch.cat(targets).double()}


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form. Integers are compared: no tolerance."""
    figures = compare(measure, case, FORMS, repeats, tolerance=0.0)
    plain = figures["plain"]
    return [{"group": f"{case.rows:,} chats", "form": form, "seconds": each["seconds"], "tokens": int(each["tokens"]),
             "tokens_per_s": each["tokens"] / each["seconds"], "speed": plain["seconds"] / each["seconds"]}
            for form, each in figures.items()]


def table(rows) -> str:
    lines = ["| form | seconds | tokens/s | speed |", "|---|---:|---:|---:|"]
    return "\n".join(lines + [f"| {row['form']} | {row['seconds']:.3f} | {row['tokens_per_s']:,.0f} | {row['speed']:.1f} x |"
                              for row in rows])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=5000, help=f"chats, of 1 to {MOST_TURNS} questions and answers each")
    add("--batch_size", type=int, default=16, help="chats of a batch")
    add("--max_seq_len", type=int, default=512, help="tokens; longer chats are cut, and the plain form pads to it")
    add_result_args(parser)
    args = parser.parse_args(argv)
    if min(args.rows, args.batch_size) < 1 or args.max_seq_len < 64:
        parser.error("--rows and --batch_size are counts, 1 or more; --max_seq_len is 64 or more, that each chat has an answer")
    if args.rows < args.batch_size:
        parser.error(f"--rows {args.rows} does not fill one batch of {args.batch_size}")
    check_result_args(parser, args)

    try:
        rows = rows_of(Case(args.rows, args.batch_size, args.max_seq_len, args.device, args.threads), args.repeats)
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))
    tokens = rows[0]["tokens"]
    setting = (f"{args.rows:,} chats, batches of {args.batch_size}, {args.device}"
               + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    places = args.rows // args.batch_size * args.batch_size * args.max_seq_len
    print(f"{setting}; {tokens:,} tokens to read, for which the plain form hands over {places:,} places\n\n{table(rows)}\n")
    print(f"seconds: of one epoch, {'CPU time' if args.device == 'cpu' else 'on the clock'}, median of {args.repeats} new "
          "processes")
    write_results(args, rows, setting, {"speed": "times as fast as the plain form"})


if __name__ == "__main__":
    main()
