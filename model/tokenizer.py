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
of text a second on one core. scripts/train_tokenizer.py learns which unions to have, interop/vocabulary.py
reads other people's.
"""

import codecs
import hashlib
import json
import os
import re
import unicodedata
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
ROLES = ("system", "user", "assistant")

N_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Chat:
    """
    How a conversation is framed: a template per role, with "{content}" once in each. Special tokens named in a
    template become their ids. What follows the assistant's content begins with the token that ends his turn.

        default_system  put before a conversation without a system message; None: nothing is
        before_answer   put before an answer that ends the conversation and before one that the model is to write.
                        Qwen3 with thinking off: an empty thought
        trims           the white space around a content is left out
    """

    system: str
    user: str
    assistant: str
    default_system: str | None = None
    before_answer: str = ""
    trims: bool = False

    def messages(self, messages: list[dict]) -> list[dict]:
        """The messages as they are framed: with the default system message, and trimmed."""
        if self.default_system is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return [{**m, "content": m["content"].strip()} for m in messages] if self.trims else messages


CHATML = Chat(*(f"<|im_start|>{role}\n{{content}}<|im_end|>\n" for role in ROLES))
LLAMA3 = Chat(*(f"<|start_header_id|>{role}<|end_header_id|>\n\n{{content}}<|eot_id|>" for role in ROLES), trims=True)


def PLAIN(end: str) -> Chat:
    """Alpaca's frame, for a vocabulary that has no chat tokens, such as GPT-2's; `end` is its end of text."""
    return Chat("{content}\n\n", "### Instruction:\n{content}\n\n", f"### Response:\n{{content}}{end}\n\n")


DEFAULT_OPTIONS = {"chat": asdict(CHATML), "end_of_text": "<|endoftext|>", "bos": None, "matched": [],
                   "normalization": None, "prefix_space": False, "drops_bytes": False}


class Tokenizer:
    """
    A vocabulary at work.

        pattern         regex that cuts a text into pieces (Rust syntax)
        special_tokens  name -> id, the ids that no text can produce
        ranks           token bytes -> id; the lower id is joined first. Ids may start anywhere and have holes
        path            the file it came from; None if it was made in memory

        chat            how a conversation is framed
        end_of_text     name of the special token that ends a document. The attribute is its id
        bos             name of the special token that opens every document and conversation, for those who read them
                        in (encode_chat does; encode is handed parts and does not). The attribute is its id, or None
        matched         special tokens that any text can produce after all, such as <think> in Qwen3's vocabulary
        normalization   None or "NFC": how a text is normalised before it is cut
        prefix_space    put a space before every text that is not empty (SentencePiece); decode leaves it there
        drops_bytes     leave out a byte that has no token, instead of insisting on all 256

        end_of_turn     the id that ends an answer
        vocab_size      the highest id + 1
        sha256          the key of caches and checkpoints

    Raises ValueError if one of the 256 bytes or a special token that is named is missing, an id is used twice, the
    pattern is no regex, or a template does not do what Chat says.
    """

    def __init__(
        self, pattern: str, special_tokens: dict[str, int], ranks: dict[bytes, int], path: Path | None = None, *,
        chat: Chat = CHATML, end_of_text: str = "<|endoftext|>", bos: str | None = None, matched: Iterable[str] = (),
        normalization: str | None = None, prefix_space: bool = False, drops_bytes: bool = False,
    ):
        check_ids(special_tokens, ranks)
        check_chat(chat, special_tokens, names=[end_of_text, *([] if bos is None else [bos]), *matched])
        missing = bytes(value for value in range(256) if bytes([value]) not in ranks)
        if missing and not drops_bytes:
            raise ValueError(f"no token for byte {missing[0]} ({len(missing)} of the 256 bytes are missing), "
                             "so some texts would have no ids")
        if normalization not in (None, "NFC"):
            raise ValueError(f"normalization {normalization!r} is neither null nor \"NFC\"")
        try:
            self._encoding = tiktoken.Encoding(
                "minidistill", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        except ValueError as error:
            raise ValueError(f"pattern {pattern!r} is not a regex that tiktoken can run: {error}") from error

        self.pattern, self.special_tokens, self.ranks, self.path = pattern, special_tokens, ranks, path
        self.chat, self.matched, self.normalization = chat, tuple(matched), normalization
        self.prefix_space, self.drops_bytes, self._missing = prefix_space, drops_bytes, missing
        self.vocab_size = max(*special_tokens.values(), *ranks.values()) + 1
        self.end_of_text = special_tokens[end_of_text]
        self.bos = None if bos is None else special_tokens[bos]
        self._any_special, self._any_matched = any_of(special_tokens), any_of(self.matched)

        # The frame of a message, encoded once. Were "user\n" and the content encoded as one string, the ids of the
        # frame would depend on the content, and a prompt would be no prefix of the conversation it begins.
        self._frames = {
            role: [self._encode(part, self._any_special) for part in asdict(chat)[role].split("{content}")]
            for role in ROLES}
        self._before_answer = self._encode(chat.before_answer, self._any_special)
        self.end_of_turn = self._frames["assistant"][1][0]

    @property
    def options(self) -> dict:
        """What was said beyond pattern, special tokens and ranks, where it is not the default."""
        name_of = {i: name for name, i in self.special_tokens.items()}
        options = {
            "chat": asdict(self.chat), "end_of_text": name_of[self.end_of_text], "bos": name_of.get(self.bos),
            "matched": list(self.matched), "normalization": self.normalization,
            "prefix_space": self.prefix_space, "drops_bytes": self.drops_bytes}
        return {key: value for key, value in options.items() if value != DEFAULT_OPTIONS[key]}

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file that save writes. It depends on the content only: a checkout with other line ends
        is still the same tokenizer."""
        return hashlib.sha256(self._to_json().encode()).hexdigest()

    @cached_property
    def n_bytes(self) -> np.ndarray:
        """(vocab_size,) bytes of text in each token; a special one counts as one byte, whatever its name, unless it
        is matched in texts."""
        sizes = np.ones(self.vocab_size, dtype=np.int64)
        sizes[list(self.ranks.values())] = [len(token) for token in self.ranks]
        for name in self.matched:
            sizes[self.special_tokens[name]] = len(name.encode())
        return sizes

    # -- text --------------------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text. "<|im_end|>" in it is ten ordinary characters, or a user could end his own turn and speak
        as the assistant. allow_special makes it the token: for texts that you wrote yourself, never for a user's.
        A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
        if self.prefix_space and text:
            text = " " + text
        return self._encode(text, self._any_special if allow_special else self._any_matched)

    def _encode(self, text: str, names: re.Pattern | None) -> list[int]:
        """Ids of a text in which the special tokens that `names` finds become their ids."""
        if names is None:
            return self._encode_ordinary(text)
        ids = []
        for n, part in enumerate(names.split(text)):            # text, name, text, name, ..., text
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
        """A byte without a token is dropped from its piece, and its neighbours there may be joined, as in Hugging
        Face's library. tiktoken panics on such a byte, so each piece is cut out in Python; few texts have one."""
        pieces = regex.findall(self.pattern, text, regex.V1)    # V1 knows && in a class, as Rust does
        pieces = (piece.encode().translate(None, self._missing) for piece in pieces)
        return [i for piece in pieces if piece for i in self._encoding._encode_single_piece(piece)]

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
        """Text of ids. A part of a character becomes U+FFFD, and so does an id that is no token: a model whose
        vocabulary was rounded up can write one."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece while ids arrive. 汉 is three bytes and may be three tokens: nothing is shown until
        the character is whole. The pieces joined are what decode gives."""
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

    # -- conversations -----------------------------------------------------------------------------------------

    def encode_chat(
        self, messages: list[dict], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """
        (ids, targets) of one conversation. A target is what the assistant has to learn to write: its words and its
        end of turn, without which it would never learn to stop. In ChatML:

            ids      <|im_start|> user \\n 2+3= <|im_end|> \\n <|im_start|> assistant \\n 5 <|im_end|> \\n
            targets       .        .   .   .       .       .       .           .      .  T     T       .

        add_generation_prompt ends with "<|im_start|>assistant\\n", for the model to go on. The ids of a prompt are
        a prefix of the ids of any conversation that its answer completes.

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
        conversations = [self.chat.messages(messages) for messages in conversations]

        contents = iter(self.encode_batch(m["content"] for messages in conversations for m in messages))
        return [self._frame(messages, contents, add_generation_prompt) for messages in conversations]

    def _frame(
        self, messages: list[dict], contents: Iterator[list[int]], add_generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """One conversation, taking the ids of its contents from `contents`."""
        ids = [] if self.bos is None else [self.bos]
        targets = [False] * len(ids)
        for left, message in enumerate(messages, start=1 - len(messages)):
            header, end = self._frames[message["role"]]
            content = next(contents)
            learned = len(content) + 1 if message["role"] == "assistant" else 0
            if learned and left == 0:
                header = header + self._before_answer

            ids += [*header, *content, *end]
            targets += [False] * len(header) + [True] * learned + [False] * (len(content) + len(end) - learned)

        if add_generation_prompt:
            prompt = self._frames["assistant"][0] + self._before_answer
            ids += prompt
            targets += [False] * len(prompt)
        return ids, targets

    def render(self, messages: list[dict]) -> str:
        """The conversation as encode_chat frames it, for people to read."""
        check_messages(messages, where="conversation")
        return self.decode(self.encode_chat(messages)[0])

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
            return cls(**from_json(path.read_text(encoding="utf-8")), path=path)
        except ValueError as error:                     # json's and UTF-8's errors are ValueErrors as well
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file; a reader sees the old file or the new one, never a half."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(self._to_json().encode()))

    def _to_json(self) -> str:
        """
        One token a line, to be read, searched and compared. A token that is text is written as this text; a part of
        a character, which JSON cannot hold, as its bytes. base64 would hide both, latin-1 the Chinese:

            [272, " t"],
            [416, [228, 189]],
            [530, "月"],

        The options follow, those that are not the default.
        """
        to_json = json.JSONEncoder(ensure_ascii=False).encode
        special_tokens = dict(sorted(self.special_tokens.items(), key=lambda item: item[1]))
        tokens = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = ",\n".join(to_json([i, as_text_or_bytes(token)]) for token, i in tokens)
        options = "".join(f',\n"{key}": {to_json(value)}' for key, value in self.options.items())
        return (
            f'{{\n"pattern": {to_json(self.pattern)},\n'
            f'"special_tokens": {to_json(special_tokens)},\n'
            f'"tokens": [\n{lines}\n]{options}\n}}\n'
        )


def as_text_or_bytes(token: bytes) -> str | list[int]:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return list(token)


def from_json(text: str) -> dict:
    """What a vocabulary file's text says, as the arguments of Tokenizer. Raises ValueError."""
    match json.loads(text):
        case {"pattern": str(pattern), "special_tokens": {**special_tokens}, "tokens": [*entries], **options}:
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
    return {"pattern": pattern, "special_tokens": special_tokens, "ranks": ranks, **options_from_json(options)}


def options_from_json(options: dict) -> dict:
    """The optional keys of a vocabulary file, checked. Raises ValueError."""
    for key, value in options.items():
        if key not in DEFAULT_OPTIONS:
            raise ValueError(f"{key!r} is not a key of a vocabulary file. They are pattern, special_tokens, tokens "
                             f"and {', '.join(DEFAULT_OPTIONS)}")
        default = DEFAULT_OPTIONS[key]
        if not isinstance(value, str | None if default is None else type(default)):
            raise ValueError(f"{key!r} cannot be {value!r}; the default is {json.dumps(default)}")
    return options | {"chat": chat_from_json(options["chat"])} if "chat" in options else options


def chat_from_json(chat: dict) -> Chat:
    """Raises ValueError."""
    kinds = dict.fromkeys(ROLES, str) | {"default_system": str | None, "before_answer": str, "trims": bool}
    if wrong := (chat.keys() - kinds.keys()) | (set(ROLES) - chat.keys()):
        raise ValueError(f"'chat' has to have {', '.join(ROLES)} and may have {', '.join(list(kinds)[len(ROLES):])}; "
                         f"too many or too few: {', '.join(sorted(wrong))}")
    for key, value in chat.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"'{key}' of 'chat' cannot be {value!r}")
    return Chat(**chat)


def any_of(names: Iterable[str]) -> re.Pattern | None:
    """Regex that finds any of the names, of two at the same place the longer; None for no names."""
    names = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def check_ids(special_tokens: dict[str, int], ranks: dict[bytes, int]) -> None:
    """Raise ValueError for what tiktoken would panic on in Rust: that panic is no Exception of Python's."""
    owner = {}
    for token, i in [*special_tokens.items(), *ranks.items()]:
        name = token if isinstance(token, str) else as_text_or_bytes(token)
        if not (isinstance(i, int) and 0 <= i < 2**31):
            raise ValueError(f"id {i!r} of {name!r} is not a whole number in 0 .. 2**31 - 1")
        if i in owner:
            raise ValueError(f"id {i} is used twice, by {owner[i]!r} and by {name!r}")
        owner[i] = name


def check_chat(chat: Chat, special_tokens: dict[str, int], names: Iterable[str]) -> None:
    """Raise ValueError for a template that does not do what Chat says, or a special token that is named in one, or in
    `names`, and is missing."""
    templates = {role: asdict(chat)[role] for role in ROLES}
    for role, template in templates.items():
        if template.count("{content}") != 1:
            raise ValueError(f"the {role}'s template {template!r} has to have {{content}} once")

    marks = re.findall(r"<\|.*?\|>", " ".join([*templates.values(), chat.before_answer]))
    for name in [*names, *marks]:
        if name not in special_tokens:
            raise ValueError(f"special token {name!r} is missing")

    end = templates["assistant"].split("{content}")[1]
    if not any_of(special_tokens).match(end):
        raise ValueError(f"what follows the assistant's {{content}}, {end!r}, has to begin with a special token: "
                         "the one that ends his turn")


def check_messages(messages: list[dict], where: str) -> None:
    """Raise ValueError for a role that is not one of ROLES, or a content that is not text."""
    for number, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise ValueError(
                f"{where}, message {number}: role {message['role']!r} is not one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{where}, message {number}: content {message['content']!r} is not text")
