"""
别人的词表：Hugging Face 的 tokenizer.json 与 GGUF 里的词表，读进来，写出去，一个编号都不变。
Other people's byte-level BPE vocabularies: Hugging Face's tokenizer.json and GGUF's fields.

Every id stays, or the file is refused with the reason. Only white space at the start of a content
differs: Hugging Face encodes a conversation as one text, which may join it with the header.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from itertools import pairwise, product
from os.path import commonprefix
from pathlib import Path

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from interop import named_errors
from model.tokenizer import CHATML, LLAMA3, PATTERN, PLAIN, ROLES, Chat, Tokenizer, any_of
from runtime.args import CHAT
from runtime.files import write_atomic
from runtime.log import Logger

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Digits are split off first, each one alone. So a space before a digit ends a piece.
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA_3.replace("{1,3}", "")

TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
          r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT_4O = TEKKEN.replace("|[^", ENDING + "|[^").replace(r"|\p{N}|", ENDING + r"|\p{N}{1,3}|")

# DeepSeek-V3 splits the pieces of one pattern by the next: numbers, CJK, the rest. As one pattern,
# in which a space before a number or CJK ends a piece, as it did before.
CJK = "\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff"
DEEPSEEK_V3_SPLITS = (
    r"\p{N}{1,3}", f"[{CJK}]+", r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK_V3 = "|".join((
    r"\p{N}{1,3}", r"[\p{L}\p{M}&&[CJK]]+", r"[\p{P}\p{S}&&[CJK]]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}\p{N}]?[\p{L}\p{M}&&[^CJK]]+",
    r" ?[\p{P}\p{S}&&[^CJK]]+[\r\n]*|\s*[\r\n]+|\s+(?=[\p{N}CJK])|\s+(?!\S)|\s+",
    r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+(?![\p{L}\p{M}&&[^CJK]])",         # control characters
)).replace("CJK", CJK)

# For the comparison with the tokenizers library: code, digits, blank lines, accents in two forms,
# scripts, emoji, and every character up to U+024F.
PROBE = ("def f(x):\n\treturn  x + 12345 # it's, IT'LL\r\n\r\n    \n"
         "小猫坐着，１２ 个。 e\u0301 é ﬁ ½ Ⅷ нет "
         "नमस्ते مرحبا 한국어 👩‍👩‍👧 ❤️ \u2028\u3000\ufeff\U000e0001"
         + "".join(map(chr, range(0x250))) + "   ")

# -- bytes and merges ------------------------------------------------------------------------------

# The letter that stands for each byte: printable ones have their own, the others those from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(value): value for value in PRINTABLE} | {
    chr(256 + n): value for n, value in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
LETTERS = {value: letter for letter, value in BYTES.items()}


def to_letters(token: bytes) -> str:
    return "".join(LETTERS[value] for value in token)


def to_bytes(letters: str) -> bytes:
    """Raises ValueError for a token of SentencePiece or WordPiece."""
    try:
        return bytes(BYTES[letter] for letter in letters)
    except KeyError as error:
        raise ValueError(f"token {letters!r}: {error.args[0]!r} stands for no byte; only "
                         "byte-level BPE is supported, not SentencePiece or WordPiece") from error


def merges_of(ranks: dict[bytes, int]) -> dict[bytes, tuple[bytes, bytes]]:
    """token -> the two parts that the tokens with lower ids leave of it, in the order of the ids.
    A token of which they leave more is found only where it is a whole piece of the text."""
    merges = {}
    for token in sorted(ranks, key=ranks.get):
        parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
        while len(parts) > 2:
            rank, i = min((ranks.get(left + right, limit), i)
                          for i, (left, right) in enumerate(pairwise(parts)))
            if rank >= limit:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges[token] = tuple(parts)
    return merges


def check_merges(ranks: dict[bytes, int], merges: list[tuple], ignore_merges: bool):
    """Raise ValueError where tiktoken would join other tokens than the merges do. tiktoken needs no
    merges: it joins any two tokens whose union is a token, the lowest id first. The ids are equal
    if the merges are in the order of the ids, and each token has the one of merges_of.

    ignore_merges: a piece of the text that is a token needs no merges, as in tiktoken
    """
    expected, made = merges_of(ranks), [left + right for left, right in merges]
    found_whole = [token for token in ranks if len(token) > 1 and token not in expected]
    if (made != sorted(made, key=ranks.__getitem__) or {*expected.values()} - {*merges}
            or found_whole and not ignore_merges):
        raise ValueError("its merges join other tokens than tiktoken, which joins by the ids alone")


# -- chat templates --------------------------------------------------------------------------------

OURS = re.compile(r"\{#- MiniDistill (\{.*?\}) -#\}", re.DOTALL)
WORDS = ("Sfjord", "Uglyph", "Anymph", "Mquartz", "Tvex")       # contents that no template writes
DATE = datetime(2024, 7, 26)    # "today" of Llama 3.1, so that ids do not change tomorrow


def renderer(template: str, tokens: dict[str, str]) -> Callable[[list[dict], bool], str]:
    """(messages, add_generation_prompt) -> the text of transformers' apply_chat_template with
    enable_thinking=False. A template is a foreign program: it runs in jinja2's sandbox."""
    def refuse(reason):
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": refuse, "strftime_now": DATE.strftime}
    # transformers' own marks around what the assistant writes
    template = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", template)
    program = environment.from_string(template.replace("endgeneration", "endif"))
    return lambda messages, prompt: program.render(
        messages=messages, add_generation_prompt=prompt, enable_thinking=False, tools=None,
        documents=None, **tokens)


def message(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def between(text: str, *words: str) -> list[str]:
    """The parts of a text around these words."""
    if not all(word in text for word in words):
        raise ValueError("it does not write every content as it is")
    return re.split("|".join(words), text)


def common_start(one: str, other: str, names: re.Pattern) -> str:
    """The longest text that begins both and cuts no special token."""
    units = ([found[0] for found in re.finditer(f"{names.pattern}|.", text, re.DOTALL)]
             for text in (one, other))
    return "".join(commonprefix([*units]))


def read_frame(render: Callable, special_tokens: Iterable[str], bos: str | None) -> Chat:
    """The Chat of a template, from what it writes around known contents; check_frame finds what
    is no such frame. bos: of every text."""
    names, (S, U, A, M, T) = any_of(special_tokens), WORDS
    user, answer, more = message("user", U), message("assistant", A), message("user", M)

    # begin user| U |end assistant| A |end user| M |end prompt
    start, middle, after, prompt = between(render([user, answer, more], True), U, A, M)
    user_end = common_start(between(render([user], False), U)[1], prompt, names)
    _, last, tail = between(render([user, answer], False), U, A)
    rest = after.removeprefix(common_start(tail, after, names))
    header = start[len(start) - len(commonprefix([start[::-1], rest[::-1]])):]
    begin, end = start.removesuffix(header), after.removesuffix(header)
    assistant, prompt, last = (text.removeprefix(user_end) for text in (middle, prompt, last))
    prompt = prompt or last                                 # some templates write none
    if not last.startswith(prompt):     # the prompt counts, and the thought that it may open
        opens = prompt.count("<think>") > prompt.count("</think>")
        last = prompt + "\n</think>\n\n" * opens

    first, second, _ = between(render([message("system", S), user], True), S, U)
    system_end, default = second.removesuffix(header), None
    if not first.startswith(begin):                         # without a system turn there is one
        begin, default = "", begin.removeprefix(first).removesuffix(system_end)

    thought = message("assistant", f"<think>\n{T}\n</think>\n\n{A}")
    kept = between(render([user, thought, more], True), U, A)[1].removeprefix(user_end + assistant)
    return Chat(f"{first.removeprefix(begin)}{{content}}{system_end}",
                f"{header}{{content}}{user_end}", f"{assistant}{{content}}{end}",
                default_system=default, before_answer=last.removeprefix(assistant),
                trims=f" {U} " not in render([message("user", f" {U} ")], True),
                begin=None if begin == (bos or "") else begin,
                prompt=None if prompt == last else prompt,
                thoughts="all" if T in kept else "space" if kept else "none")


def check_frame(tokenizer: Tokenizer, render: Callable):
    """Raise ValueError if a prompt has other ids than its template's text, or another text around
    white space and thoughts, or an answer another text than the template writes behind its prompt.
    """
    S, U, A, M, T = WORDS
    roles = "system", "user", "assistant", "user", "assistant", "user"
    plain = [*map(message, roles, (S, U, A, f"{M}? {M}\n{U}", f"{A}, {M}.", T))]
    spaced = [message(each["role"], f"\n {each['content']} \n") for each in plain]
    thoughtful = [message(each["role"], f"<think>\n{T}\n</think>\n\n{each['content']}")
                  if each["role"] == "assistant" else each for each in plain]
    is_written = render(plain[:3], False).startswith(render(plain[:2], True))
    ends = range(2, 7) if is_written else (2, 4, 6)             # of which even ones are prompts
    n_end = len(tokenizer.chat.assistant.split("{content}")[1])
    for probe, start, end in product((plain, spaced, thoughtful), (0, 1), ends):
        turns, is_prompt = probe[start:end], end % 2 == 0
        theirs = render(turns, is_prompt)
        ids, _ = tokenizer.encode_chat(turns, is_prompt and theirs != render(turns, False))
        ours = tokenizer.decode(ids)
        if not is_prompt:                                       # something may follow the last turn
            theirs, ours = theirs[:len(ours) - n_end], ours[:-n_end]
        if theirs != ours:
            at = len(commonprefix([theirs, ours]))
            raise ValueError(f"it writes {theirs[at:at + 40]!r} after {theirs[:at][-40:]!r}, where "
                             f"{ours[at:at + 40]!r} is expected")
        if is_prompt and probe is plain and tokenizer.encode(theirs, allow_special=True) != ids:
            raise ValueError(f"{theirs[:200]!r} has other tokens as one text")


def read_template(template: str | None, special_tokens: dict[str, int], tokens: dict[str, str],
                  bos: str | None, make: Callable[..., Tokenizer]) -> Tokenizer:
    """make(chat=, end_of_text=, ...), with the frame that the chat template writes. --chat decides
    where there is none, or no such frame; else the names of the special tokens.

    tokens      the special tokens that a template may name: bos_token and eos_token"""
    if template and (ours := OURS.match(template)):
        about = json.loads(ours[1])
        return make(chat=Chat(**about["chat"]), end_of_text=about["end_of_text"])
    names = "<|endoftext|>", "<|end_of_text|>", tokens.get("eos_token"), "</s>"
    end = next((name for name in names if name in special_tokens), None)
    if end is None:
        raise ValueError(f"nothing ends a text: there is no special token {names}")
    known, chosen = {"chatml": CHATML, "llama3": LLAMA3, "plain": PLAIN(end)}, os.environ.get(CHAT)
    if template:
        try:
            render = renderer(template, tokens)
            chat = read_frame(render, special_tokens, bos)
            thoughts = [name for name in ("<think>", "</think>")
                        if chat.reframes and name in special_tokens]
            tokenizer = make(thoughts, chat=chat, end_of_text=end,
                             template={"chat_template": template, **tokens})
            check_frame(tokenizer, render)
            return tokenizer
        except Exception as error:                          # whatever a foreign program may raise
            if chosen is None:
                raise ValueError(f"its chat template cannot be followed exactly: {error}. Another "
                                 f"format of conversations: --chat {', '.join(known)}") from error
            Logger(f"WARNING: --chat {chosen} replaces a chat template that cannot be followed: "
                   f"the model was made for other prompts ({error})")
    elif chosen is None:
        marks = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}
        chosen = next((marks[mark] for mark in marks if mark in special_tokens), "plain")
        Logger(f"no chat template: conversations are formatted as --chat {chosen}")
    return make(chat=known[chosen], end_of_text=end)


TEMPLATE = """\
{{- bos }}
{%- if not messages or messages[0].role != 'system' %}
{{- default_system }}
{%- endif %}
{%- for message in messages %}
{%- set content = message.content | trim if trims else message.content %}
{%- set thought = before_answer if loop.last and message.role == 'assistant' else '' %}
{{- frames[message.role][0] + thought + content + frames[message.role][1] }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- frames['assistant'][0] + before_answer }}
{%- endif %}"""


def write_template(tokenizer: Tokenizer) -> str:
    """The files' own template, or one that formats a conversation as tokenizer.chat does and begins
    with a comment from which read_template restores the chat."""
    if tokenizer.template:
        return tokenizer.template["chat_template"]
    chat = tokenizer.chat
    default = (chat.system.replace("{content}", each["content"]) for each in chat.messages([]))
    values = {"bos": tokenizer.names.get(tokenizer.bos, ""), "default_system": "".join(default),
              "before_answer": chat.before_answer, "trims": chat.trims,
              "frames": {role: vars(chat)[role].split("{content}") for role in ROLES}}
    quoted = json.JSONEncoder(ensure_ascii=False).encode
    about = quoted({"chat": vars(chat), "end_of_text": tokenizer.names[tokenizer.end_of_text]})
    about = about.replace("#}", "#\\u007d")                   # which would end the comment
    lines = [f"{{%- set {name} = {quoted(value)} %}}" for name, value in values.items()]
    return "\n".join([f"{{#- MiniDistill {about} -#}}", *lines, TEMPLATE])


def byte_level(vocab: dict[str, int], merges: Iterable[list[str]], pattern: str,
               special_tokens: dict[str, int], *, tokens: dict[str, str],
               chat_template: str | None = None, ignore_merges: bool = False,
               bos: str | None = None, matched: Iterable[str] = (), **options) -> Tokenizer:
    """The Tokenizer of a vocabulary {token, its bytes as letters: id} and its merges."""
    ranks = {to_bytes(token): i for token, i in vocab.items() if token not in special_tokens}
    check_merges(ranks, [(to_bytes(left), to_bytes(right)) for left, right in merges],
                 ignore_merges)
    drops_bytes = any(bytes([value]) not in ranks for value in range(256))

    def make(thoughts=(), **about):
        return Tokenizer(pattern, special_tokens, ranks, drops_bytes=drops_bytes, bos=bos,
                         matched=dict.fromkeys([*matched, *thoughts]), **about, **options)

    return read_template(chat_template, special_tokens, tokens, bos, make)


# -- GGUF ------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5          # token types

# llama.cpp has named patterns, without ours. "superbpe" cuts off digits only. With it and a
# vocabulary of 6,400, 1,056 of 1,100 texts have equal ids; with "qwen2" 860, with "gpt-2" 460.
SUBSTITUTE = "superbpe"
OUR_PRE = "minidistill.tokenizer.pre"       # our own field, which others ignore
LIKE_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral")
PRE_TOKENIZERS = {                          # of equal ones, the first is written
    **dict.fromkeys(LIKE_LLAMA_3, LLAMA_3), "dbrx": LLAMA_3, "gpt-2": GPT2, "smollm": SMOLLM,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "megrez": QWEN2, "tekken": TEKKEN,
    "gpt-4o": GPT_4O, "deepseek-v3": DEEPSEEK_V3, "minidistill": PATTERN}
# A piece that is a token needs no merges; by default a text begins with bos.
WHOLE_PIECES = (*LIKE_LLAMA_3, "tekken")


def from_gguf(fields: dict, path: Path | None = None) -> Tokenizer:
    """The vocabulary in a GGUF file's fields. Raises ValueError, without the file's name."""
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if of.get("model") != "gpt2":
        raise ValueError(f"tokenizer.ggml.model is {of.get('model')!r}; only 'gpt2', byte-level "
                         "BPE, is supported, not SentencePiece ('llama') or WordPiece ('bert')")
    pre, tokens = of.get(OUR_PRE, of.get("pre", "default")), of["tokens"]
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(PRE_TOKENIZERS)}")
    named = list(zip(tokens, range(len(tokens)), of["token_type"], strict=True))
    eos, bos = of.get("eos_token_id"), of.get("bos_token_id")
    adds_bos = bos is not None and of.get("add_bos_token", pre in WHOLE_PIECES)
    return byte_level(
        {token: i for token, i, kind in named if kind == NORMAL},
        [merge.split(" ") for merge in of.get("merges", [])],
        PRE_TOKENIZERS[pre],
        {token: i for token, i, kind in named if kind in (UNKNOWN, CONTROL, USER_DEFINED)},
        matched=[token for token, _, kind in named if kind == USER_DEFINED],
        tokens={f"{key}_token": tokens[i] for key, i in (("bos", bos), ("eos", eos))
                if i is not None}, bos=tokens[bos] if adds_bos else None,
        chat_template=of.get("tokenizer.chat_template"), ignore_merges=pre in WHOLE_PIECES,
        path=path, normalization="NFC" if PRE_TOKENIZERS[pre] == QWEN2 else None)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The fields of a vocabulary, with as many tokens as the model has."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{tokenizer.vocab_size} ids, but the model has rows for {vocab_size}")
    names = {pattern: name for name, pattern in reversed(PRE_TOKENIZERS.items())}
    if tokenizer.pattern not in names or tokenizer.prefix_space:
        raise ValueError(f"llama.cpp has no pre-tokenizer for the pattern {tokenizer.pattern!r}")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.ranks.items():
        tokens[i], kinds[i] = to_letters(token), NORMAL
    for name, i in tokenizer.special_tokens.items():
        tokens[i], kinds[i] = name, USER_DEFINED if name in tokenizer.matched else CONTROL
    pre = names[tokenizer.pattern]
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
              "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
              "tokenizer.ggml.merges": [f"{to_letters(left)} {to_letters(right)}"
                                        for left, right in merges_of(tokenizer.ranks).values()],
              "tokenizer.ggml.eos_token_id": tokenizer.end_of_turn,
              "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
              "tokenizer.chat_template": write_template(tokenizer)}
    named = tokenizer.special_tokens.get((tokenizer.template or {}).get("bos_token"))
    if (bos := named if tokenizer.bos is None else tokenizer.bos) is not None:
        fields["tokenizer.ggml.bos_token_id"] = bos
    if pre == "minidistill":
        fields |= {"tokenizer.ggml.pre": SUBSTITUTE, OUR_PRE: pre}
        Logger("llama.cpp does not have the pattern of this vocabulary; the one written instead "
               "gives other ids where more than one space precedes a word, as in code")
    return fields


# -- Hugging Face ----------------------------------------------------------------------------------

def read_tokenizer_json(path: str | Path) -> Tokenizer:
    """The vocabulary of a folder, or of a tokenizer.json and the files beside it:
    tokenizer_config.json and chat_template.jinja.

    Raises FileNotFoundError, or ValueError with the file, the part and why it cannot be exact."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary at {file}. transformers writes one: AutoTokenizer."
                                f"from_pretrained(NAME).save_pretrained({str(file.parent)!r})")
    with named_errors(file):
        try:
            library = tokenizers.Tokenizer.from_file(str(file))
        except BaseException as error:      # the library raises nothing narrower, and panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"the tokenizers library cannot read it: {error}") from error
        library.no_truncation()
        library.no_padding()
        beside = file.with_name("tokenizer_config.json")
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        jinja = file.with_name("chat_template.jinja")
        template = (jinja.read_text(encoding="utf-8") if jinja.is_file() else
                    config.get("chat_template"))
        if isinstance(template, list):                          # several, with names
            template = {each["name"]: each["template"] for each in template}.get("default")
        tokens = {key: token["content"] if isinstance(token, dict) else token
                  for key in ("bos_token", "eos_token") if (token := config.get(key)) is not None}
        declared = {each["content"] for each in config.get("added_tokens_decoder", {}).values()}
        known = {each.content for each in library.get_added_tokens_decoder().values()}
        if declared - known:
            raise ValueError("it lacks tokens that tokenizer_config.json declares: "
                             f"{sorted(declared - known)}")
        tokenizer = from_library(library, tokens=tokens, chat_template=template, path=file)
        check_against_library(tokenizer, library)
        return tokenizer


def from_library(library: tokenizers.Tokenizer, **options) -> Tokenizer:
    theirs = json.loads(library.to_str())                       # in the newest form
    model, added = theirs["model"], theirs["added_tokens"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model["type"] != "BPE" or model.get(key):
            raise ValueError(f"model is {model['type']} with {key} {model.get(key)!r}, not BPE")
    for each in added:
        if each["lstrip"] or each["rstrip"] or each["single_word"]:
            raise ValueError(f"added token {each} strips or needs white space: not supported")
    tokenizer = byte_level(
        model["vocab"], model["merges"], read_pre_tokenizer(theirs["pre_tokenizer"]),
        {each["content"]: each["id"] for each in added},
        matched=[each["content"] for each in added if not each["special"]], bos=read_bos(library),
        ignore_merges=model["ignore_merges"], **read_normalizer(theirs["normalizer"]), **options)
    if tokenizer.drops_bytes and model["unk_token"] is not None:
        raise ValueError(f"bytes without a token become {model['unk_token']!r}: not supported")
    return tokenizer


def steps_of(part: dict | None, key: str) -> list[dict]:
    """The steps of a part that may be none, one, or a sequence of them."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def read_pre_tokenizer(part: dict | None) -> str:
    """The pattern that splits a text; check_against_library compares all other settings."""
    match steps_of(part, "pretokenizers"):
        case [{"type": "ByteLevel"}]:
            return GPT2
        case [{"type": "Digits"}, {"type": "ByteLevel"}]:
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": pattern}}, {"type": "ByteLevel"}]:
            return pattern
        case [*splits, {"type": "ByteLevel"}]:
            patterns = (str(split.get("pattern", {}).get("Regex")) for split in splits)
            if tuple(each.replace("\r", r"\r").replace("\n", r"\n")
                     for each in patterns) == DEEPSEEK_V3_SPLITS:
                return DEEPSEEK_V3
    raise ValueError(f"pre_tokenizer {json.dumps(part)[:500]} is not supported")


def read_normalizer(part: dict | None) -> dict:
    """The Tokenizer's options that normalise a text."""
    known = {(): {}, ("NFC",): {"normalization": "NFC"}, ("Prepend",): {"prefix_space": True}}
    kinds = tuple(step["type"] for step in steps_of(part, "normalizers"))
    if kinds not in known:
        raise ValueError(f"normalizer {json.dumps(part)[:500]} is not supported")
    return known[kinds]


def read_bos(library: tokenizers.Tokenizer) -> str | None:
    """The special token that the post-processor puts before every text."""
    ids = library.encode("a", add_special_tokens=False).ids
    whole = library.encode("a").ids
    if whole[-len(ids):] != ids or len(whole) > len(ids) + 1:
        raise ValueError(f"post_processor makes {library.encode('a').tokens} of 'a'")
    return library.id_to_token(whole[0]) if len(whole) > len(ids) else None


def check_against_library(tokenizer: Tokenizer, library: tokenizers.Tokenizer):
    """Raise ValueError if the tokenizers library has other ids for PROBE."""
    probe = PROBE + "x".join(tokenizer.matched)
    if library.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
        raise ValueError("the tokenizers library splits a text in another way than tiktoken")


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path):
    """Write tokenizer.json and tokenizer_config.json for AutoTokenizer. Raises ValueError, before
    it writes, if the ids would differ."""
    folder, name_of = Path(folder), tokenizer.names
    library = to_library(tokenizer)
    check_against_library(tokenizer, library)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "bos_token": name_of.get(tokenizer.bos), "eos_token": name_of[tokenizer.end_of_turn],
              "pad_token": name_of[tokenizer.end_of_text],
              "chat_template": write_template(tokenizer), **(tokenizer.template or {})}
    config = json.dumps(config, ensure_ascii=False, indent=1)
    for name, text in (("tokenizer.json", library.to_str(pretty=True)),
                       ("tokenizer_config.json", config)):
        write_atomic(folder / name, lambda file: file.write(text.encode()))


def to_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The vocabulary as one of the tokenizers library."""
    merges = merges_of(tokenizer.ranks)
    # Special tokens too: the library gives those outside the vocabulary the ids after it.
    tokens = {to_letters(token): i for token, i in tokenizer.ranks.items()}
    library = tokenizers.Tokenizer(models.BPE(
        tokenizer.special_tokens | tokens,
        [tuple(map(to_letters, pair)) for pair in merges.values()],
        ignore_merges=any(len(token) > 1 and token not in merges for token in tokenizer.ranks)))
    library.pre_tokenizer = split_by(tokenizer.pattern)
    library.decoder = decoders.ByteLevel()
    if tokenizer.normalization:
        library.normalizer = normalizers.NFC()
    if tokenizer.prefix_space:
        library.normalizer = normalizers.Prepend(" ")
    if (bos := tokenizer.names.get(tokenizer.bos)) is not None:
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.bos)])
    library.add_tokens([AddedToken(name, normalized=False, special=name not in tokenizer.matched)
                        for _, name in sorted(tokenizer.names.items())])
    return library


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
