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
from dataclasses import dataclass, fields
from functools import cache, cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import regex
import tiktoken

from runtime.files import named_errors, write_atomic

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

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
N_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Chat:
    """How a conversation is formatted: a template per role, with "{content}" once in each. The part
    after the assistant's content begins with the special token that ends the turn.

    The rule: an answer is trained, and sampled, after exactly the text that a chat puts before it.
    Qwen3 puts its empty thought before the last answer alone, and no thought into earlier ones, so
    an answer that another turn follows is not framed as it was generated. Of such chats only a
    conversation's last answer is a target; SFTDataset makes a conversation of each answer.
    """

    system: str
    user: str
    assistant: str
    default_system: str | None = None   # of conversations without one; None: they get none
    before_answer: str = ""             # before the last answer only: the empty thought of Qwen3
    trims: bool = False                 # whether white space around a content is removed
    begin: str | None = None            # before the first turn; None: the tokenizer's bos
    prompt: str | None = None           # before an answer to generate; None: as before the last one
    thoughts: str = "all"               # what earlier answers keep of "<think>...</think>": "all",
                                        # "none"; "space" keeps the line ends after it

    @property
    def reframes(self) -> bool:
        """Whether an answer is framed in another way once another turn follows it."""
        return self.before_answer != "" or self.thoughts != "all"

    @property
    def headers(self) -> tuple[str, str]:
        """What stands before an answer's content, and what before one that is to be generated."""
        header = self.assistant.split("{content}")[0]
        return header, header + self.before_answer if self.prompt is None else self.prompt

    @property
    def lead(self) -> str:
        """What an answer begins with before its content: the end of a thought that the prompt
        opens, or a space."""
        header, prompt = self.headers
        return (header + self.before_answer).removeprefix(prompt)

    def answer(self, content: str, is_last: bool) -> str:
        """The assistant's content as its template writes it: an earlier answer as `thoughts` says,
        the last with its own thought or else with before_answer."""
        thought, mark, _ = content.partition("</think>")
        rest = content.rpartition("</think>")[2]
        if not is_last:
            return {"all": content, "space": rest, "none": rest.lstrip("\n") if mark else rest}[
                self.thoughts]
        if "</think>" not in self.before_answer + content * self.reframes:
            return self.before_answer + content
        before, end, after = (self.before_answer or EMPTY_THOUGHT).partition("\n</think>")
        thought = thought.split("<think>")[-1].strip("\n") if mark else ""
        return before + thought + end + after + rest.lstrip("\n")

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


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A vocabulary, and the functions that use it. Raises ValueError for what cannot work, KeyError
    for a special token that is missing.

    The attributes end_of_text and bos become ids (or None), like end_of_turn, which ends an answer.
    vocab_size is the highest id + 1; sha256 identifies the vocabulary in caches and checkpoints."""

    pattern: str                        # regex that splits a text into pieces (Rust syntax)
    special_tokens: dict[str, int]      # name -> id; no text can produce these ids
    ranks: dict[bytes, int]             # token -> id; the lower id is joined first. Gaps are fine
    path: Path | None = None            # its file; None if it was made in memory
    chat: Chat = CHATML                 # format of conversations
    end_of_text: str = "<|endoftext|>"  # name of the special token that ends a document
    bos: str | None = None              # of that which encode_chat puts before every conversation
    matched: tuple[str, ...] = ()       # special tokens that any text can produce: Qwen3's <think>
    normalization: str | None = None    # or "NFC", before splitting
    prefix_space: bool = False          # a space before every text (SentencePiece); decode keeps it
    drops_bytes: bool = False           # skip bytes without a token, instead of requiring all 256
    template: dict | None = None        # for exports: the files' own chat template, whose frame
                                        # is `chat`, and the special tokens that it names

    def __post_init__(self):
        self.matched = tuple(self.matched)
        self.options = {field.name: getattr(self, field.name) for field in fields(self)[4:]
                        if getattr(self, field.name) != field.default}
        ids = [*self.special_tokens.values(), *self.ranks.values()]
        twice, count = Counter(ids).most_common(1)[0]
        if count > 1:                                   # tiktoken would panic in Rust
            raise ValueError(f"id {twice} is used twice")
        self._missing = bytes(value for value in range(256) if bytes([value]) not in self.ranks)
        if self._missing and not self.drops_bytes:
            raise ValueError(f"no token for byte {self._missing[0]} "
                             f"({len(self._missing)} are missing)")
        self._encoding = tiktoken.Encoding("minidistill", pat_str=self.pattern,
                                           mergeable_ranks=self.ranks,
                                           special_tokens=self.special_tokens)
        self.vocab_size = max(ids) + 1
        self.names = {i: name for name, i in self.special_tokens.items()}
        self._any_special, self._any_matched = any_of(self.special_tokens), any_of(self.matched)

        # Headers are encoded apart from contents, so that a prompt is a prefix of its conversation.
        self._frames = {}
        for role in ROLES:
            parts = vars(self.chat)[role].split("{content}")
            if len(parts) != 2:
                raise ValueError(f"the {role}'s template {vars(self.chat)[role]!r} has to have "
                                 "{content} once")
            self._frames[role] = [self._encode(part, self._any_special) for part in parts]
        if not self._any_special.match(parts[1]):
            raise ValueError(f"no special token ends the assistant's template "
                             f"{self.chat.assistant!r}")
        self.end_of_turn = self._frames["assistant"][1][0]
        begin = (self.bos or "") if self.chat.begin is None else self.chat.begin
        self._begin = self._encode(begin, self._any_special)
        self._prompt = self._encode(self.chat.headers[1], self._any_special)
        self.end_of_text = self.special_tokens[self.end_of_text]
        self.bos = None if self.bos is None else self.special_tokens[self.bos]

    @cached_property
    def sha256(self) -> str:
        """Hash of the file that save writes, without its template: no id depends on that."""
        return hashlib.sha256(self._to_json(without="template").encode()).hexdigest()

    @cached_property
    def ids(self) -> dict:
        """What decides the ids of a text, as JSON holds it: a hash of all but the special tokens,
        and these. The frame of conversations does not."""
        parts = self.pattern, self.normalization, self.prefix_space, sorted(self.ranks.items())
        return {"sha256": hashlib.sha256(repr(parts).encode()).hexdigest(),
                "special_tokens": self.special_tokens}

    def conflict(self, ids: dict) -> str | None:
        """Where an id of another vocabulary's `ids` means something else; None: nowhere. Either may
        have special tokens that the other lacks."""
        if ids["sha256"] != self.ids["sha256"]:
            return "they split texts into other tokens"
        return next((f"id {i} is {self.names[i]} and {name}" for name, i in
                     ids["special_tokens"].items() if self.names.get(i, name) != name), None)

    def unreadable(self, ids: dict) -> str | None:
        """Why a model with another vocabulary's `ids` cannot read these texts and conversations."""
        used = self._any_special.findall(" ".join(map(str, vars(self.chat).values())))
        used = {*(self.special_tokens[name] for name in (*used, *self.matched)),
                self.end_of_text, self.bos}
        lacking = [name for name, i in self.special_tokens.items()
                   if i in used and ids["special_tokens"].get(name) != i]
        return self.conflict(ids) or (f"it lacks {', '.join(lacking)}" if lacking else None)

    @cached_property
    def n_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes of text in each token; a special token counts as one byte unless it
        is matched in texts."""
        sizes = np.ones(self.vocab_size, dtype=np.int64)
        sizes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        for name in self.matched:
            sizes[self.special_tokens[name]] = len(name.encode())
        return sizes

    def shared_tokens(self, other: "Tokenizer") -> list[np.ndarray]:
        """(vocab_size,), (other.vocab_size,) The token of both that each id of either counts as, by
        its id here, or vocab_size: the first with which the other writes its bytes, and so on until
        both have it, " helicopter" -> " hel"; special tokens by name, or by what they end."""
        ours, theirs = ({**one.ranks, **one.special_tokens, "end of text": one.end_of_text,
                         "end of turn": one.end_of_turn} for one in (self, other))
        ids = {token: ours[token] for token in ours.keys() & theirs.keys()}

        def shared(token, writer, reader):
            if token in ids or isinstance(token, str) or {*token} & {*writer._missing}:
                return ids.get(token, self.vocab_size)
            first = writer._encoding._encode_single_piece(token)[0]
            return shared(writer._encoding.decode_single_token_bytes(first), reader, writer)

        tables = [np.full(one.vocab_size, self.vocab_size) for one in (self, other)]
        for table, tokens, pair in zip(tables, (ours, theirs), ((other, self), (self, other))):
            table[[*tokens.values()]] = [shared(token, *pair) for token in tokens]
        return tables

    # -- text ---------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ten ordinary characters, or with allow_special, for
        trusted texts only, the token. A lone surrogate becomes U+FFFD."""
        if self.prefix_space and text:
            text = " " + text
        return self._encode(text, self._any_special if allow_special else self._any_matched)

    def _encode(self, text: str, names: re.Pattern) -> list[int]:
        ids = []
        for n, part in enumerate(names.split(text)):               # text, name, text, ...
            ids += [self.special_tokens[part]] if n % 2 else self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        if self.normalization is not None:
            text = unicodedata.normalize(self.normalization, text)
        if self._missing:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if not any(byte in text.encode() for byte in self._missing):
            return self._encoding.encode_ordinary(text)
        # Bytes without a token, on which tiktoken panics, are removed from their piece, whose other
        # bytes may then be joined, as in Hugging Face's library. V1 has && in a class, as Rust has.
        pieces = (piece.encode().translate(None, self._missing)
                  for piece in regex.findall(self.pattern, text, regex.V1))
        return [i for piece in pieces if piece for i in self._encoding._encode_single_piece(piece)]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, over threads. Each gets many texts at a time; tiktoken's own batch call
        gives one and takes 7 times as long for short texts."""
        texts = list(texts)
        if len(texts) < 32:                 # handing them to threads takes longer
            return [self.encode(text) for text in texts]
        size = 1 + len(texts) // (4 * N_THREADS)
        shares = [texts[start:start + size] for start in range(0, len(texts), size)]
        encoded = threads(os.getpid()).map(lambda share: [*map(self.encode, share)], shares)
        return [*chain.from_iterable(encoded)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Incomplete characters and ids without a token become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text, piece by piece, while ids arrive; a character is shown when it is complete."""
        def bytes_of(i):
            try:
                return self._encoding.decode_single_token_bytes(i)
            except KeyError:
                return "\ufffd".encode()

        return codecs.iterdecode(map(bytes_of, ids), "utf-8", errors="replace")

    # -- conversations ------------------------------------------------------------------------

    def encode_chat(self, messages: list[dict],
                    add_generation_prompt: bool = False) -> tuple[list[int], list[bool]]:
        """
        (ids, targets) of one conversation. targets is the loss mask: the assistant's contents, and
        the tokens that end the turns, without which the model would never stop. In ChatML:

            ids    <|im_start|> user \\n 2+3= <|im_end|> \\n <|im_start|> assistant \\n 5 <|im_end|>
            targets     .        .   .   .       .       .       .           .      .  T     T

        A message with "train": False is context: none of its tokens is a target. Nor is an earlier
        answer of a chat that `reframes`. add_generation_prompt ends with
        "<|im_start|>assistant\\n", for the model to continue. Raises ValueError for an unknown role
        and for a content that is not text.
        """
        return self.encode_chats([messages], add_generation_prompt)[0]

    def encode_chats(self, conversations: Iterable[list[dict]],
                     add_generation_prompt: bool = False) -> list[tuple[list[int], list[bool]]]:
        framed = [list(self._frame(messages)) for messages in conversations]
        contents = iter(self.encode_batch(text for turns in framed for _, text, _, _ in turns))
        encoded = []
        for turns in framed:
            parts = [(self._begin, False)]                      # (ids, whether they are targets)
            for header, _, end, is_target in turns:             # end[0] ends the turn
                parts += [(header, False), (next(contents), is_target), (end[:1], is_target),
                          (end[1:], False)]
            if add_generation_prompt:
                parts.append((self._prompt, False))
            encoded.append(([i for ids, _ in parts for i in ids],
                            [is_target for ids, is_target in parts for _ in ids]))
        return encoded

    def _frame(self, messages: list[dict]) -> Iterator[tuple[list[int], str, list[int], bool]]:
        """(ids before the content, content, ids after it, whether it is a target) of each turn."""
        for message in messages:
            if message["role"] not in ROLES or not isinstance(message["content"], str):
                raise ValueError(f"{message} does not have one of the roles {', '.join(ROLES)} and "
                                 "a text as content")
        messages = self.chat.messages(messages)
        for left, message in enumerate(messages, start=1 - len(messages)):
            role, text = message["role"], message["content"]
            header, end = self._frames[role]
            if role == "assistant":
                before, prompt = self.chat.headers
                text = before + self.chat.answer(text, is_last=left == 0)
                if text.startswith(prompt):
                    before, header = prompt, self._prompt
                text = text[len(before):]
            is_framed = role == "assistant" and (left == 0 or not self.chat.reframes)
            yield header, text, end, is_framed and message.get("train", True)

    # -- the vocabulary file ------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path = DEFAULT) -> "Tokenizer":
        """The vocabulary in a file. Raises FileNotFoundError, or ValueError with the file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no vocabulary at {path}. Train one: "
                                    f"python scripts/train_tokenizer.py --data FILE --out {path}")
        with named_errors(path):
            about = json.loads(path.read_text(encoding="utf-8"))
            about["ranks"] = {token.encode() if isinstance(token, str) else bytes(token): i
                              for i, token in about.pop("tokens")}
            about["chat"] = Chat(**about.get("chat", vars(CHATML)))
            return cls(**about, path=path)

    def save(self, path: str | Path) -> None:
        write_atomic(Path(path), lambda file: file.write(self._to_json().encode()))

    def _to_json(self, without: str = "") -> str:
        """One token per line, such as [272, " t"], or [416, [228, 189]] for the bytes of an
        incomplete character, which JSON cannot hold. Options that are not the default follow."""
        to_json = json.JSONEncoder(ensure_ascii=False, default=vars).encode
        special_tokens = {name: i for i, name in sorted(self.names.items())}
        lines = ",\n".join(to_json([self.ranks[token], as_text_or_bytes(token)])
                           for token in sorted(self.ranks, key=self.ranks.get))
        options = "".join(f',\n"{key}": {to_json(value)}' for key, value in self.options.items()
                          if key != without)
        return (f'{{\n"pattern": {to_json(self.pattern)},\n'
                f'"special_tokens": {to_json(special_tokens)},\n'
                f'"tokens": [\n{lines}\n]{options}\n}}\n')


@cache
def threads(process_id: int) -> ThreadPoolExecutor:
    """One pool for all texts: tiktoken keeps memory for each new thread. A fork needs its own."""
    return ThreadPoolExecutor(N_THREADS)


def as_text_or_bytes(token: bytes) -> str | list[int]:
    text = token.decode(errors="ignore")
    return text if text.encode() == token else list(token)


def any_of(names: Iterable[str]) -> re.Pattern:
    """Regex that finds any of the names, the longest one at each place."""
    names = map(re.escape, sorted(names, key=len, reverse=True))
    return re.compile(f"({'|'.join(names) or '(?!)'})")         # (?!) is found nowhere
