"""
分词器：文字变成编号，编号变回文字；对话变成编号和“哪些要学”的标记。
Tokenizer: text to ids and back, and a conversation to ids with a mark on each one that is to be learned.

Byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909, on bytes as in GPT-2): cut the text
into pieces by PATTERN, take each piece as UTF-8 bytes, and join the neighbours whose union has the lowest id,
until no two have one. With " t" = 272, "he" = 273 and " the" = 274:

    bytes   " " "t" "h" "e"
    272     " t" "h" "e"
    273     " t" "he"
    274     " the"

Every byte is a token, so every text has ids and none is unknown. tiktoken (Rust) does the joining: about 10 MB
of text a second on one core. scripts/train_tokenizer.py learns which unions to have.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from runtime import write_whole

DEFAULT = Path(__file__).with_name("tokenizer.json")

# Where a text is cut: no token crosses a cut. The first part that fits at a place wins, and together they fit
# every character. There is no look-ahead (GPT-4 has \s+(?!\S), which leaves an indented word its space): without
# one, tiktoken's regex runs in linear time, a fifth faster, and a million spaces in a row do not overflow its
# stack. The price is 0.7 % more tokens on Python code and none on prose.
PATTERN = "|".join((
    r"\p{Han}+",                            # 汉字 up to the next punctuation, never glued to a comma or to Latin
    r"[ '’]?[\p{L}\p{M}&&[^\p{Han}]]+",     # a word and the space before it; the 't of don't; accents stay on
    r"\p{N}",                               # digits one by one, or 12 and 127 would have nothing in common
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",      # punctuation and emoji, with the ends of the lines they close
    r"\s*[\r\n]+",                          # blank lines
    r"\s+",                                 # other space, such as the indentation of code
))

# 16 ids, the first ones. The reserved ones are for you: a new mark can be named without resizing a trained model.
SPECIAL_TOKENS = {text: i for i, text in enumerate((
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
    *(f"<|reserved_{n}|>" for n in range(11)),
))}
NEEDED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")      # a vocabulary from elsewhere must have these three
ROLES = ("system", "user", "assistant")

N_THREADS = min(8, os.cpu_count() or 1)


class Tokenizer:
    """
    A vocabulary at work.

        pattern         regex that cuts a text into pieces (Rust syntax)
        special_tokens  name -> id, the ids that no text can produce
        ranks           token bytes -> id; the lower id is joined first. Ids may start anywhere and have holes
        path            the file it came from; None if it was made in memory

        vocab_size      the highest id + 1
        sha256          the key of caches and checkpoints

    Raises ValueError if one of the 256 bytes or of the three NEEDED names is missing, an id is used twice, or the
    pattern is no regex.
    """

    def __init__(
        self, pattern: str, special_tokens: dict[str, int], ranks: dict[bytes, int], path: Path | None = None
    ):
        check(special_tokens, ranks)
        try:
            self._encoding = tiktoken.Encoding(
                "minidistill", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        except ValueError as error:
            raise ValueError(f"pattern {pattern!r} is not a regex that tiktoken can run: {error}") from error

        self.pattern, self.special_tokens, self.ranks, self.path = pattern, special_tokens, ranks, path
        self.vocab_size = max(*special_tokens.values(), *ranks.values()) + 1
        self.end_of_text, self.im_start, self.im_end = (special_tokens[name] for name in NEEDED)

        # The frame of a message, encoded once. Were "user\n" and the content encoded as one string, the ids of the
        # frame would depend on the content, and a prompt would be no prefix of the conversation it begins.
        self._newline = self.encode("\n")
        self._headers = {role: [self.im_start, *self.encode(role + "\n")] for role in ROLES}

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file that save writes. It depends on the content only: a checkout with other line ends
        is still the same tokenizer."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    @cached_property
    def n_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes of text in each token; a special one counts as one byte, whatever its name."""
        sizes = np.ones(self.vocab_size, dtype=np.int64)
        sizes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return sizes

    # -- text --------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ten ordinary characters, or a user could end his own turn and speak
        as the assistant. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, over threads."""
        texts = list(texts)
        if len(texts) < 32:                                     # one conversation: starting threads takes longer
            return [self.encode(text) for text in texts]

        # A thread is handed many texts at once. tiktoken's own batch call hands over one at a time, which on short
        # texts (100,000 of 40 characters, 2 cores) takes 2.8 s against 0.4 s.
        size = 1 + len(texts) // (4 * N_THREADS)
        shares = [texts[start:start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(N_THREADS) as pool:
            encoded = pool.map(lambda share: [self.encode(text) for text in share], shares)
            return [ids for share in encoded for ids in share]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; a part of a character becomes U+FFFD. Raises KeyError for an id that is no token."""
        return self._encoding.decode(list(ids), errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece while ids arrive. 汉 is three bytes and may be three tokens: nothing is shown until
        the character is whole. The pieces joined are what decode gives."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            if text := decoder.decode(self._encoding.decode_single_token_bytes(i)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    # -- conversations -----------------------------------------------------------------------------------------

    def encode_chat(
        self, messages: list[dict], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """
        (ids, targets) of one conversation in ChatML. A target is what the assistant has to learn to write: its
        words and its <|im_end|>, without which it would never learn to stop.

            ids      <|im_start|> user \\n 2+3= <|im_end|> \\n <|im_start|> assistant \\n 5 <|im_end|> \\n
            targets       .        .   .   .       .       .       .           .      .  T     T       .

        add_generation_prompt ends with "<|im_start|>assistant\\n", for the model to go on. The ids of a prompt are
        a prefix of the ids of any conversation that goes on from it.

        Raises ValueError for a role that is not one of ROLES, or a content that is not text.
        """
        return self.encode_chats([messages], add_generation_prompt)[0]

    def encode_chats(
        self, conversations: Iterable[list[dict]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[bool]]]:
        """encode_chat of each conversation, all of their contents encoded over threads in one go."""
        conversations = list(conversations)
        for number, messages in enumerate(conversations):
            check_messages(messages, where=f"conversation {number}")

        contents = iter(self.encode_batch(m["content"] for messages in conversations for m in messages))
        return [self._frame(messages, contents, add_generation_prompt) for messages in conversations]

    def _frame(
        self, messages: list[dict], contents: Iterator[list[int]], add_generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """One conversation, taking the ids of its contents from `contents`."""
        ids, targets = [], []
        for message in messages:
            header, content = self._headers[message["role"]], next(contents)
            ids += [*header, *content, self.im_end, *self._newline]

            learn = message["role"] == "assistant"
            targets += [False] * len(header) + [learn] * (len(content) + 1) + [False] * len(self._newline)

        if add_generation_prompt:
            ids += self._headers["assistant"]
            targets += [False] * len(self._headers["assistant"])
        return ids, targets

    def render(self, messages: list[dict]) -> str:
        """The conversation as encode_chat frames it, for people to read."""
        check_messages(messages, where="conversation")
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)

    # -- the vocabulary file -----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path = DEFAULT) -> "Tokenizer":
        """The vocabulary of a file. Raises FileNotFoundError, or ValueError with the file and what is wrong."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no vocabulary at {path}. "
                f"Train one: python scripts/train_tokenizer.py --data FILE --out {path}")
        try:
            return cls(*from_json(path.read_text(encoding="utf-8")), path=path)
        except ValueError as error:                     # json's and UTF-8's errors are ValueErrors as well
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file; a reader sees the old file or the new one, never a half."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: file.write(self._to_json().encode()))

    def _to_json(self) -> str:
        """
        One token a line, to be read, searched and compared. A token that is text is written as this text; a part of
        a character, which JSON cannot hold, as its bytes. base64 would hide both, latin-1 the Chinese:

            [272, " t"],
            [416, [228, 189]],
            [530, "月"],
        """
        to_json = json.JSONEncoder(ensure_ascii=False).encode
        special_tokens = dict(sorted(self.special_tokens.items(), key=lambda item: item[1]))
        tokens = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = ",\n".join(to_json([i, as_text_or_bytes(token)]) for token, i in tokens)
        return (
            f'{{\n"pattern": {to_json(self.pattern)},\n'
            f'"special_tokens": {to_json(special_tokens)},\n'
            f'"tokens": [\n{lines}\n]\n}}\n'
        )


def as_text_or_bytes(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def from_json(text: str) -> tuple[str, dict[str, int], dict[bytes, int]]:
    """(pattern, special_tokens, ranks) of a vocabulary file's text. Raises ValueError."""
    match json.loads(text):
        case {"pattern": str(pattern), "special_tokens": {**special_tokens}, "tokens": [*entries]}:
            pass
        case _:
            raise ValueError('not a vocabulary file: it has to be '
                             '{"pattern": "...", "special_tokens": {...}, "tokens": [...]}')

    ranks = {}
    for entry in entries:
        match entry:
            case [int(i), str(token)]:
                token = token.encode()
            case [int(i), [*values]] if values and all(type(v) is int and v in range(256) for v in values):
                token = bytes(values)
            case _:
                raise ValueError(f'token entry {entry!r} is neither [id, "text"] nor [id, [byte, byte, ...]]')
        if token in ranks:
            raise ValueError(f"token {as_text_or_bytes(token)!r} has two ids, {ranks[token]} and {i}")
        ranks[token] = i
    return pattern, special_tokens, ranks


def check(special_tokens: dict[str, int], ranks: dict[bytes, int]) -> None:
    """Raise ValueError for what tiktoken would panic on in Rust: that panic is no Exception of Python's."""
    missing = [name for name in NEEDED if name not in special_tokens]
    if missing:
        raise ValueError(f"special token {missing[0]!r} is missing")

    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise ValueError(f"no token for byte {missing[0]} ({len(missing)} of the 256 bytes are missing), "
                         "so some texts would have no ids")

    owner = {}
    for token, i in [*special_tokens.items(), *ranks.items()]:
        name = token if isinstance(token, str) else as_text_or_bytes(token)
        if not (isinstance(i, int) and 0 <= i < 2**31):
            raise ValueError(f"id {i!r} of {name!r} is not a whole number in 0 .. 2**31 - 1")
        if i in owner:
            raise ValueError(f"id {i} is used twice, by {owner[i]!r} and by {name!r}")
        owner[i] = name


def check_messages(messages: list[dict], where: str) -> None:
    """Raise ValueError for a role that is not one of ROLES, or a content that is not text."""
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where}, message {number}: role {message['role']!r} is not one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}, message {number}: content {message['content']!r} is not text")
