"""
训练分词器：从任意文本学出一份词表。
Train a tokenizer: learn a vocabulary from text.

Start with the 256 bytes. Count all pairs of neighbouring tokens within the pieces of the text (see
model/tokenizer.py), make the most frequent pair a new token, repeat until the vocabulary is full.
V tokens cost V * D parameters in the embedding; a student that imitates its teacher's distribution
needs the teacher's vocabulary, not a new one.

    python scripts/train_tokenizer.py --data dataset/*.jsonl --out out/tokenizer.json
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from dataset.formats import read_rows
from interop.vocabulary import split_by, to_bytes
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from runtime.args import checking_input, make_parser, parse_args

SMALLEST = len(SPECIAL_TOKENS) + 256

MAX_TOKEN_BYTES = 16                # five Chinese characters; repeated phrases are no tokens
LABELS = {"id", "role", "from"}     # keys whose strings are not text


# -- 1. text of any file ---------------------------------------------------------------------------

def strings(value) -> Iterator[str]:
    """Every string in a JSON value, except keys and the values of LABELS."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        items = value if isinstance(value, list) else [
            item for key, item in value.items() if key not in LABELS]
        for item in items:
            yield from strings(item)


def read_texts(path: Path, max_bytes: float) -> list[str]:
    """The texts in a file that dataset/formats.py reads, until max_bytes are reached. Half of a
    surrogate pair becomes "?". Raises ValueError with file and line."""
    texts, n_bytes = [], 0
    for number, row in read_rows(path):
        if isinstance(row, str):
            raise ValueError(f"{path}, line {number}: {row}")
        for text in strings(row):
            data = text.encode("utf-8", "replace")
            texts.append(data.decode())
            n_bytes += len(data)
            if n_bytes >= max_bytes:
                return texts
    return texts


# -- 2. training -----------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of 256 bytes and up to vocab_size - 272 merges; 16 ids are special."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = split_by(PATTERN)
    trained.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS), min_frequency=2, show_progress=False,
        max_token_length=MAX_TOKEN_BYTES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return trained


def to_tokenizer(trained: tokenizers.Tokenizer) -> Tokenizer:
    """Ids: special tokens 0 .. 15, bytes 16 .. 271, then the merged tokens as they were learned."""
    vocab = trained.get_vocab()
    tokens = [to_bytes(letters) for letters in sorted(vocab, key=vocab.get)]
    in_order = [bytes([value]) for value in range(256)]
    in_order += [token for token in tokens if len(token) > 1]
    ranks = {token: i for i, token in enumerate(in_order, start=len(SPECIAL_TOKENS))}
    return Tokenizer(PATTERN, dict(SPECIAL_TOKENS), ranks, matched=("<think>", "</think>"))


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


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, metavar="FILE",
        help="files to read: rows (every string in them) or plain text, in UTF-8")
    add("--max_mb", type=float, default=100, help="maximum amount of text per file, in MB")
    add("--vocab_size", type=int, default=6400, help=f"number of ids, at least {SMALLEST}")
    add("--out", type=Path, default=Path("out/tokenizer.json"), help="vocabulary file to write")
    args = parse_args(parser)

    start = time.perf_counter()
    with checking_input():
        texts = [text for path in args.data for text in read_texts(path, args.max_mb * 1e6)]
    tokenizer = train(texts, args.vocab_size)
    tokenizer.save(args.out)
    seconds = time.perf_counter() - start
    per_token = sum(len(text.encode()) for text in texts) / sum(
        map(len, tokenizer.encode_batch(texts)))
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens in {seconds:.1f} s, {per_token:.2f} bytes "
          f"of the text per token, sha256 {tokenizer.sha256}")


if __name__ == "__main__":
    main()
