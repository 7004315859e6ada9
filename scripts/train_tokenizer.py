"""
训练分词器：从任意文本学出一份词表。
Train a tokenizer: learn a vocabulary from text.

Start with the 256 bytes. Count all pairs of neighbouring tokens within the pieces of the text (see
model/tokenizer.py), make the most frequent pair a new token, repeat until the vocabulary is full.

    python scripts/train_tokenizer.py --data dataset/*.jsonl --out out/tokenizer.json

How large? The embedding of V tokens has V * D parameters. At D = 512 the default 6,400 tokens cost
3.3 M; the 151,669 of Qwen3 would cost 78 M, more than all layers of a small student, but make
sequences shorter. A student that imitates its teacher's distribution needs the teacher's
vocabulary, not a new one.

The same data give the same file, byte by byte.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

# `python scripts/train_tokenizer.py` searches scripts/ for modules; ours are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.formats import END_OF_TEXT
from interop.vocabulary import to_bytes
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer, as_text_or_bytes
from runtime.args import parse_args

SMALLEST = len(SPECIAL_TOKENS) + 256

# Five Chinese characters, or a word such as " responsibility". Without a limit, phrases that a data
# set repeats (在这种情况下) become tokens, and in a small data set whole sentences do.
MAX_TOKEN_BYTES = 16

# Keys whose strings are not text: 100,000 times "assistant" would take ids from real words.
LABELS = {"id", "role", "from"}


# -- 1. text of any file ---------------------------------------------------------------------------

def strings(value) -> Iterator[str]:
    """Every string in a JSON value, except keys and the values of LABELS."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in LABELS:
                yield from strings(item)


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SystemExit(f"{where}: not JSON ({error})") from error


def all_texts(path: Path) -> Iterator[str]:
    """The texts in a .jsonl, a .json, or a plain text (in blocks of lines of about 64 KB)."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield from strings(parse(line, f"{path}, line {number}"))
        elif path.suffix == ".json":
            yield from strings(parse(file.read(), str(path)))
        else:
            while lines := file.readlines(1 << 16):
                yield "".join(line for line in lines if line.strip() != END_OF_TEXT)


def read_texts(path: Path, max_bytes: float) -> list[str]:
    """The texts of a file until max_bytes are reached. Half of a surrogate pair becomes "?"."""
    texts, n_bytes = [], 0
    try:
        for text in all_texts(path):
            text = text.encode("utf-8", "replace")
            texts.append(text.decode())
            n_bytes += len(text)
            if n_bytes >= max_bytes:
                break
    except FileNotFoundError as error:
        raise SystemExit(f"--data {path}: no such file") from error
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path}: not UTF-8 ({error}); convert it: iconv -f gb18030 -t utf-8"
                         ) from error
    if n_bytes == 0:
        raise SystemExit(f"{path}: no text in it")
    return texts


# -- 2. training -----------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of 256 bytes and up to vocab_size - 272 merges; 16 ids are special tokens.
    A pair that occurs once, or is longer than MAX_TOKEN_BYTES, is not merged."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        max_token_length=MAX_TOKEN_BYTES,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),     # all 256 bytes
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    return trained


def to_tokenizer(trained: tokenizers.Tokenizer) -> Tokenizer:
    """Ids: special tokens 0 .. 15, bytes 16 .. 271, then the merged tokens as they were learned."""
    by_id = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [to_bytes(letters) for letters, _ in by_id]

    in_order = [bytes([value]) for value in range(256)]
    in_order += [token for token in tokens if len(token) > 1]
    ranks = {token: i for i, token in enumerate(in_order, start=len(SPECIAL_TOKENS))}
    return Tokenizer(PATTERN, dict(SPECIAL_TOKENS), ranks)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A vocabulary of vocab_size ids, or SystemExit with the number that the texts suffice for."""
    if vocab_size < SMALLEST:
        raise SystemExit(f"--vocab_size {vocab_size} is below {SMALLEST} = "
                         f"{len(SPECIAL_TOKENS)} special tokens + 256 bytes")
    tokenizer = to_tokenizer(train_bpe(texts, vocab_size))
    if tokenizer.vocab_size < vocab_size:
        raise SystemExit(f"the text suffices for {tokenizer.vocab_size} tokens, not for "
                         f"{vocab_size}: give more --data, or --vocab_size {tokenizer.vocab_size}")
    return tokenizer


# -- 3. report ------------------------------------------------------------------------------

def report(tokenizer: Tokenizer, texts_of: dict[Path, list[str]]) -> None:
    """Bytes per token of each file and of all of them, and the longest tokens."""
    rows = []
    for path, texts in texts_of.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        n_tokens = sum(len(tokenizer.encode(text)) for text in texts)
        rows.append((path.name, n_bytes, n_tokens))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))

    print(f"{'file':32} {'MB':>8} {'tokens':>12} {'bytes/token':>12}")
    for name, n_bytes, n_tokens in rows:
        print(f"{name:32} {n_bytes / 1e6:8.2f} {n_tokens:12,} {n_bytes / n_tokens:12.2f}")

    longest = sorted(tokenizer.ranks, key=lambda token: (-len(token), tokenizer.ranks[token]))[:20]
    print("longest tokens:", *(repr(as_text_or_bytes(token)) for token in longest))


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="files to read: .jsonl, .json (every string in them) or plain text, in UTF-8")
    add("--max_mb", type=float, default=100, help="maximum amount of text per file, in MB")
    add("--vocab_size", type=int, default=6400, help=f"number of ids, at least {SMALLEST}")
    add("--out", type=Path, default=Path("out/tokenizer.json"), help="vocabulary file to write")
    return parse_args(parser)


def main() -> None:
    args = get_args()

    start = time.perf_counter()
    texts_of = {path: read_texts(path, args.max_mb * 1e6) for path in args.data}
    tokenizer = train((text for texts in texts_of.values() for text in texts), args.vocab_size)
    tokenizer.save(args.out)
    seconds = time.perf_counter() - start
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens in {seconds:.1f} s, "
          f"sha256 {tokenizer.sha256}")

    report(tokenizer, texts_of)


if __name__ == "__main__":
    main()
