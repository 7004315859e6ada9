"""
分词器：文字变成编号，编号变回文字；对话变成编号和“哪些要学”的标记。
Tokenizer: text to ids and back; a conversation to ids and a loss mask.

Byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes as in GPT-2): split
the text into pieces by PATTERN, take each piece as UTF-8 bytes, and join the two neighbours whose
union has the lowest id, until no union is a token: " " "t" "h" "e" -> " t" "he" -> " the".
"""

import codecs
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import regex
import tiktoken

from runtime.files import write_atomic

DEFAULT = Path(__file__).with_name("tokenizer.json")

# Where a text is split: no token crosses a split. The first alternative that matches wins; together
# they match every character. Without look-ahead (as in GPT-4's \s+(?!\S)) tiktoken's regex runs in
# linear time, and a million spaces in a row do not overflow its stack.
PATTERN = "|".join((
    r"\p{Han}+",                            # 汉字, without punctuation and Latin letters
    r"[ '’]?[\p{L}\p{M}&&[^\p{Han}]]+",     # a word and the space before it; the 't of don't
    r"\p{N}",                               # single digits, so that 12 and 127 have some in common
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",      # punctuation and emoji, with the line ends after them
    r"\s*[\r\n]+",                          # blank lines
    r"\s+",                                 # other white space, such as indentation
))

# The first 16 ids. The reserved ones are for you: a new token needs no resizing of a trained model.
SPECIAL_TOKENS = {text: i for i, text in enumerate((
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
    *(f"<|reserved_{n}|>" for n in range(11)),
))}
ROLES = ("system", "user", "assistant")

N_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Chat:
    """
    How a conversation is formatted: a template per role, with "{content}" once in each. The part
    after the assistant's content begins with the special token that ends the turn.

        default_system  system message of conversations without one; None: they get none
        before_answer   put before the final answer, and before one that is to be generated
        trims           whether white space around a content is removed
    """

    system: str
    user: str
    assistant: str
    default_system: str | None = None
    before_answer: str = ""
    trims: bool = False

    def messages(self, messages: list[dict]) -> list[dict]:
        """The messages with the default system message, and trimmed."""
        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        if not self.trims:
            return messages
        return [{**message, "content": message["content"].strip()} for message in messages]


CHATML = Chat(*(f"<|im_start|>{role}\n{{content}}<|im_end|>\n" for role in ROLES))
LLAMA3 = Chat(*(f"<|start_header_id|>{role}<|end_header_id|>\n\n{{content}}<|eot_id|>"
                for role in ROLES), trims=True)


def PLAIN(end: str) -> Chat:
    """Alpaca's format, for a vocabulary without chat tokens, such as GPT-2's; `end` ends a text."""
    return Chat("{content}\n\n", "### Instruction:\n{content}\n\n",
                f"### Response:\n{{content}}{end}\n\n")


DEFAULT_OPTIONS = {"chat": asdict(CHATML), "end_of_text": "<|endoftext|>", "bos": None,
                   "matched": [], "normalization": None, "prefix_space": False,
                   "drops_bytes": False}


class Tokenizer:
    """
    A vocabulary, and the functions that use it. Raises ValueError for what cannot work.

        pattern         regex that splits a text into pieces (Rust syntax)
        special_tokens  name -> id; no text can produce these ids
        ranks           token bytes -> id; the lower id is joined first. Ids may have gaps
        path            its file; None if it was made in memory
        chat            format of conversations
        end_of_text     name of the special token that ends a document. The attribute is its id
        bos             name of the special token that begins every document and conversation.
                        encode_chat adds it, encode does not. The attribute is its id or None
        matched         special tokens that any text can produce after all, such as <think> in Qwen3
        normalization   None, or "NFC" before splitting
        prefix_space    put a space before every non-empty text (SentencePiece); decode keeps it
        drops_bytes     skip bytes without a token, instead of requiring all 256

    end_of_turn is the id that ends an answer, vocab_size the highest id + 1, and sha256 identifies
    the vocabulary in caches and checkpoints.
    """

    def __init__(self, pattern: str, special_tokens: dict[str, int], ranks: dict[bytes, int],
                 path: Path | None = None, *, chat: Chat = CHATML,
                 end_of_text: str = "<|endoftext|>", bos: str | None = None,
                 matched: Iterable[str] = (), normalization: str | None = None,
                 prefix_space: bool = False, drops_bytes: bool = False):
        twice, count = Counter([*special_tokens.values(), *ranks.values()]).most_common(1)[0]
        if count > 1:                                   # tiktoken would panic in Rust
            raise ValueError(f"id {twice} is used twice")
        check_chat(chat, special_tokens, [end_of_text, *matched, *([bos] if bos else [])])
        missing = bytes(value for value in range(256) if bytes([value]) not in ranks)
        if missing and not drops_bytes:
            raise ValueError(f"no token for byte {missing[0]} ({len(missing)} are missing)")
        if not pattern:
            raise ValueError("the pattern is empty, and would leave out every text")
        self._encoding = tiktoken.Encoding("minidistill", pat_str=pattern, mergeable_ranks=ranks,
                                           special_tokens=special_tokens)
        self.pattern, self.special_tokens, self.ranks = pattern, special_tokens, ranks
        options = {"chat": asdict(chat), "end_of_text": end_of_text, "bos": bos,
                   "matched": list(matched), "normalization": normalization,
                   "prefix_space": prefix_space, "drops_bytes": drops_bytes}
        self.options = {key: value for key, value in options.items()
                        if value != DEFAULT_OPTIONS[key]}
        self.path, self.chat, self.matched = path, chat, tuple(matched)
        self.normalization, self.prefix_space = normalization, prefix_space
        self.drops_bytes, self._missing = drops_bytes, missing
        self.vocab_size = max(*special_tokens.values(), *ranks.values()) + 1
        self.end_of_text = special_tokens[end_of_text]
        self.bos = None if bos is None else special_tokens[bos]
        self._any_special, self._any_matched = any_of(special_tokens), any_of(self.matched)

        # Headers are encoded apart from contents, so that a prompt is a prefix of its conversation.
        self._frames = {role: [self._encode(part, self._any_special)
                               for part in vars(chat)[role].split("{content}")] for role in ROLES}
        self._before_answer = self._encode(chat.before_answer, self._any_special)
        self.end_of_turn = self._frames["assistant"][1][0]

    @cached_property
    def sha256(self) -> str:
        """Hash of the file that save writes."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    @cached_property
    def n_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes of text in each token; a special token counts as one byte unless it
        is matched in texts."""
        sizes = np.ones(self.vocab_size, dtype=np.int64)
        sizes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        for name in self.matched:
            sizes[self.special_tokens[name]] = len(name.encode())
        return sizes

    # -- text ---------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ten ordinary characters, or with allow_special, for
        trusted texts only, the token. A lone surrogate becomes U+FFFD."""
        if self.prefix_space and text:
            text = " " + text
        return self._encode(text, self._any_special if allow_special else self._any_matched)

    def _encode(self, text: str, names: re.Pattern | None) -> list[int]:
        ids = []
        for n, part in enumerate(names.split(text) if names else [text]):   # text, name, text, ...
            ids += [self.special_tokens[part]] if n % 2 else self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.normalization is not None:
            text = unicodedata.normalize(self.normalization, text)
        if self._missing:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if any(byte in text.encode() for byte in self._missing):
                return self._encode_without_missing(text)
        return self._encoding.encode_ordinary(text)

    def _encode_without_missing(self, text: str) -> list[int]:
        """Bytes without a token, on which tiktoken panics, are removed from their piece, whose
        other bytes may then be joined, as in Hugging Face's library."""
        pieces = regex.findall(self.pattern, text, regex.V1)    # V1 has && in a class, as Rust has
        pieces = (piece.encode().translate(None, self._missing) for piece in pieces)
        return [i for piece in pieces if piece for i in self._encoding._encode_single_piece(piece)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, over threads. Each gets many texts at a time; tiktoken's own batch call
        gives one and takes 7 times as long for short texts."""
        texts = list(texts)
        if len(texts) < 32:                 # starting threads takes longer
            return [self.encode(text) for text in texts]
        size = 1 + len(texts) // (4 * N_THREADS)
        shares = [texts[start:start + size] for start in range(0, len(texts), size)]
        with ThreadPoolExecutor(N_THREADS) as pool:
            encoded = pool.map(lambda share: [self.encode(text) for text in share], shares)
            return [ids for share in encoded for ids in share]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Incomplete characters and ids without a token become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text, piece by piece, while ids arrive; a character is shown when it is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            try:
                token = self._encoding.decode_single_token_bytes(i)
            except KeyError:
                token = "\ufffd".encode()
            if text := decoder.decode(token):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    # -- conversations ------------------------------------------------------------------------

    def encode_chat(self, messages: list[dict],
                    add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """
        (ids, targets) of one conversation. targets is the loss mask: the assistant's contents, and
        the tokens that end the turns, without which the model would never stop. In ChatML:

            ids    <|im_start|> user \\n 2+3= <|im_end|> \\n <|im_start|> assistant \\n 5 <|im_end|>
            targets     .        .   .   .       .       .       .           .      .  T     T

        add_generation_prompt ends with "<|im_start|>assistant\\n", for the model to continue.
        Raises ValueError for an unknown role and for a content that is not text.
        """
        return self.encode_chats([messages], add_generation_prompt)[0]

    def encode_chats(self, conversations: Iterable[list[dict]],
                     add_generation_prompt: bool = False) -> list[tuple[list[int], list[bool]]]:
        conversations = list(conversations)
        for number, messages in enumerate(conversations):
            for i, message in enumerate(messages):
                if message["role"] not in ROLES or not isinstance(message["content"], str):
                    raise ValueError(f"conversation {number}, message {i}: {message} does not have "
                                     f"one of the roles {', '.join(ROLES)} and a text as content")
        conversations = [self.chat.messages(messages) for messages in conversations]
        contents = (message["content"] for messages in conversations for message in messages)
        contents = iter(self.encode_batch(contents))
        return [self._frame(messages, contents, add_generation_prompt)
                for messages in conversations]

    def _frame(self, messages: list[dict], contents: Iterator[list[int]],
               add_generation_prompt: bool) -> tuple[list[int], list[bool]]:
        ids = [] if self.bos is None else [self.bos]
        targets = [False] * len(ids)
        for left, message in enumerate(messages, start=1 - len(messages)):
            header, end = self._frames[message["role"]]
            content = next(contents)
            n_targets = len(content) + 1 if message["role"] == "assistant" else 0
            if n_targets and left == 0:
                header = header + self._before_answer
            ids += [*header, *content, *end]
            targets += [False] * len(header) + [True] * n_targets
            targets += [False] * (len(content) + len(end) - n_targets)
        if add_generation_prompt:
            prompt = self._frames["assistant"][0] + self._before_answer
            ids += prompt
            targets += [False] * len(prompt)
        return ids, targets

    def render(self, messages: list[dict]) -> str:
        """The conversation as encode_chat formats it, for people to read."""
        return self.decode(self.encode_chat(messages)[0])

    # -- the vocabulary file ------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path = DEFAULT) -> "Tokenizer":
        """The vocabulary in a file. Raises FileNotFoundError, or ValueError with the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}. Train one: "
                                    f"python scripts/train_tokenizer.py --data FILE --out {path}")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            about["ranks"] = {token.encode() if isinstance(token, str) else bytes(token): i
                              for i, token in about.pop("tokens")}
            if "chat" in about:
                about["chat"] = Chat(**about["chat"])
            return cls(**about, path=path)
        except ValueError as error:                     # JSON's and UTF-8's errors are ValueErrors
            raise ValueError(f"{path}: {error}") from error
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a vocabulary file: {error}") from error

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(self._to_json().encode()))

    def _to_json(self) -> str:
        """One token per line, such as [272, " t"], or [416, [228, 189]] for the bytes of an
        incomplete character, which JSON cannot hold. Options that are not the default follow."""
        to_json = json.JSONEncoder(ensure_ascii=False).encode
        special_tokens = dict(sorted(self.special_tokens.items(), key=lambda item: item[1]))
        tokens = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = ",\n".join(to_json([i, as_text_or_bytes(token)]) for token, i in tokens)
        options = "".join(f',\n"{key}": {to_json(value)}' for key, value in self.options.items())
        return (f'{{\n"pattern": {to_json(self.pattern)},\n'
                f'"special_tokens": {to_json(special_tokens)},\n'
                f'"tokens": [\n{lines}\n]{options}\n}}\n')


def as_text_or_bytes(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def any_of(names: Iterable[str]) -> re.Pattern | None:
    """Regex that finds any of the names, the longest one at each place; None for no names."""
    names = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def check_chat(chat: Chat, special_tokens: dict[str, int], names: Iterable[str]) -> None:
    """Raise ValueError for a template that is not as Chat requires, or a missing special token."""
    templates = {role: vars(chat)[role] for role in ROLES}
    for role, template in templates.items():
        if template.count("{content}") != 1:
            raise ValueError(f"the {role}'s template {template!r} has to have {{content}} once")
    marks = re.findall(r"<\|.*?\|>", " ".join([*templates.values(), chat.before_answer]))
    for name in [*names, *marks]:
        if name not in special_tokens:
            raise ValueError(f"special token {name!r} is missing")
    if not any_of(special_tokens).match(templates["assistant"].split("{content}")[1]):
        raise ValueError(f"no special token ends the assistant's template {chat.assistant!r}")
