"""
别人的词表：Hugging Face 的 tokenizer.json 与 GGUF 里的词表，读进来，写出去，一个编号都不变。
Other people's vocabularies, every id unchanged: Hugging Face's tokenizer.json and GGUF's fields.

Both list tokens and merges, the pairs that may be joined, in order of priority. tiktoken needs no
merges: it joins any two tokens whose union is a token, the lowest id first. The ids are equal if

    1  the merges are in the order of the ids of the tokens that they make
    2  each token has the merge of the two parts that the tokens before it leave of it

Both are checked for every token. What cannot be exact is refused, with the file and the reason.

A chat template is a program in Jinja. It is not run, but recognised by its text:

    <|im_start|>            CHATML, with the system message in the template (SmolLM2, Qwen2.5), and
                            an empty thought before the answer (Qwen3 with enable_thinking=False)
    <|start_header_id|>     LLAMA3, and for 3.1 to 3.3 the two dates before the system message.
                            Today is the template's date, so that ids do not change tomorrow
    anything else           PLAIN, with the end-of-text token
    no template             as the special tokens above suggest

Hugging Face encodes a conversation as one text, so white space at the start of a content may be
joined with the header. Here it never is (see model/tokenizer.py). All other ids are equal.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from interop import named_errors
from model.tokenizer import (CHATML, LLAMA3, PATTERN, PLAIN, ROLES, Chat, Tokenizer,
                             as_text_or_bytes)
from runtime.files import write_atomic

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Digits are split off first, each one alone. So a space before a digit ends a piece.
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA_3.replace("{1,3}", "")

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


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the tokens with lower ids leave of a token: two parts if one merge makes it."""
    parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, i = min((ranks.get(left + right, limit), i)
                      for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make the tokens, in the order of their ids. A token that no merge makes is
    found only where it is a whole piece of the text."""
    parts = (parts_of(token, ranks) for token in sorted(ranks, key=ranks.get))
    return [tuple(two) for two in parts if len(two) == 2]


def check_merges(ranks: dict[bytes, int], merges: list[tuple], ignore_merges: bool):
    """Raise ValueError where tiktoken would join other tokens than the merges do.

    ignore_merges: a piece of the text that is a token needs no merges, as in tiktoken
    """
    name = as_text_or_bytes
    for before, after in pairwise(left + right for left, right in merges):
        if ranks[before] > ranks[after]:
            raise ValueError(f"the merge that makes {name(before)!r}, id {ranks[before]}, precedes "
                             f"that of {name(after)!r}, id {ranks[after]}; tiktoken joins in the "
                             "order of the ids")
    expected = merges_of(ranks)
    if missing := set(expected) - set(merges):
        left, right = min(missing, key=lambda pair: ranks[pair[0] + pair[1]])
        raise ValueError(f"there is no merge of {name(left)!r} and {name(right)!r}, which tiktoken "
                         f"would join to {name(left + right)!r}")
    if not ignore_merges and (unmade := unmade_tokens(ranks, expected)):
        raise ValueError(f"no merge makes token {name(unmade[0])!r}, id {ranks[unmade[0]]}, which "
                         "tiktoken would find")


def unmade_tokens(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The tokens of several bytes that no merge makes."""
    made = {left + right for left, right in merges}
    return [token for token in ranks if len(token) > 1 and token not in made]


# -- chat templates --------------------------------------------------------------------------------

OURS = re.compile(r"\{#- MiniDistill (\{.*?\}) -#\}", re.DOTALL)


def read_template(template: str | None, special_tokens: dict[str, int], eos: str | None) -> dict:
    """The Tokenizer's chat and end_of_text for a chat template or None. eos: the eos_token of the
    files, which may end a turn or a text. Raises ValueError if nothing ends a text."""
    if template and (ours := OURS.match(template)):
        about = json.loads(ours[1])
        return {"chat": Chat(**about["chat"]), "end_of_text": about["end_of_text"]}
    names = "<|endoftext|>", "<|end_of_text|>", eos, "</s>"
    ends = [name for name in names if name in special_tokens]
    if not ends:
        raise ValueError("nothing ends a text: there is neither an eos_token nor a special token "
                         "<|endoftext|>, <|end_of_text|> or </s>")

    text = "".join(special_tokens) if template is None else template
    text = text.replace("\\n", "\n").replace("\\'", "'")
    chat = PLAIN(ends[0])
    if "<|im_start|>" in text and {"<|im_start|>", "<|im_end|>"} <= special_tokens.keys():
        chat = chatml(text)
    header = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    if "<|start_header_id|>" in text and header <= special_tokens.keys():
        chat = llama3(text)
    return {"chat": chat, "end_of_text": ends[0]}


def chatml(template: str) -> Chat:
    # A system message written out in the template: no quote and plus sign, no brace.
    text = r"""<\|im_start\|>system\n((?:(?!['"]\s*[+~])[^{}])*?)<\|im_end\|>"""
    default = re.search(text, template)
    thinks = "<think>\n" in template.partition("add_generation_prompt")[2]
    return replace(CHATML, default_system=default[1] if default else None,
                   before_answer="<think>\n\n</think>\n\n" if thinks else "")


def llama3(template: str) -> Chat:
    known = re.search(r"Cutting Knowledge Date: [^\n'\"{}]+", template)
    today = re.search(r"date_string = [\"']([^\"']+)[\"']", template)
    if not (known and today):
        return LLAMA3
    dates = f"{known[0]}\nToday Date: {today[1]}\n\n{{content}}"
    return replace(LLAMA3, system=LLAMA3.system.replace("{content}", dates), default_system="")


def write_template(tokenizer: Tokenizer) -> str:
    """A Jinja template that formats a conversation as tokenizer.chat does. It begins with a comment
    from which read_template restores the chat."""
    chat = tokenizer.chat
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    quoted = json.JSONEncoder(ensure_ascii=False).encode
    comment = quoted({"chat": vars(chat), "end_of_text": name_of[tokenizer.end_of_text]})
    comment = comment.replace("#}", "#\\u007d")                 # which would end the comment

    lines = [f"{{#- MiniDistill {comment} -#}}"]
    if tokenizer.bos is not None:
        lines += [f"{{{{- {quoted(name_of[tokenizer.bos])} }}}}"]
    if chat.default_system is not None:
        default = chat.default_system.strip() if chat.trims else chat.default_system
        lines += ["{%- if not messages or messages[0].role != 'system' %}",
                  f"{{{{- {quoted(chat.system.replace('{content}', default))} }}}}", "{%- endif %}"]
    lines += ["{%- for message in messages %}",
              f"{{%- set content = message.content{' | trim' if chat.trims else ''} %}}"]
    for role in ROLES:
        header, end = vars(chat)[role].split("{content}")
        thought = f" + ({quoted(chat.before_answer)} if loop.last else '')"
        lines += [f"{{%- if message.role == '{role}' %}}",
                  f"{{{{- {quoted(header)}{thought if role == 'assistant' else ''} + content + "
                  f"{quoted(end)} }}}}", "{%- endif %}"]
    prompt = chat.assistant.split("{content}")[0] + chat.before_answer
    lines += ["{%- endfor %}", "{%- if add_generation_prompt %}", f"{{{{- {quoted(prompt)} }}}}",
              "{%- endif %}"]
    return "\n".join(lines)


# -- what both formats share -----------------------------------------------------------------------


def byte_level(vocab: dict[str, int], merges: Iterable[list[str]], pattern: str,
               special_tokens: dict[str, int], *, eos: str | None = None,
               chat_template: str | None = None, ignore_merges: bool = False,
               **options) -> Tokenizer:
    """
    A byte-level BPE vocabulary of tokens and merges.

        vocab           token -> id, its bytes as letters; special tokens may be among them
        ignore_merges   see check_merges

    Other arguments as in Tokenizer and read_template. Raises ValueError for what cannot be exact.
    """
    ranks = {to_bytes(token): i for token, i in vocab.items() if token not in special_tokens}
    pairs = [(to_bytes(left), to_bytes(right)) for left, right in merges]
    check_merges(ranks, pairs, ignore_merges)
    drops_bytes = any(bytes([value]) not in ranks for value in range(256))
    return Tokenizer(pattern, special_tokens, ranks, drops_bytes=drops_bytes, **options,
                     **read_template(chat_template, special_tokens, eos))


# -- GGUF ------------------------------------------------------------------------------------------

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5          # token types

# llama.cpp has a set of named patterns, without ours. Two patterns give the same ids where no token
# crosses a place at which only one of them cuts. "superbpe" cuts off digits only, and so do we. Of
# 1,100 texts (English, Chinese, code, chat, noise) 1,056 have equal ids with a vocabulary of 6,400;
# with "qwen2", which looks more like ours, 860, with "gpt-2" 460.
SUBSTITUTE = "superbpe"
OUR_PRE = "minidistill.tokenizer.pre"       # our own field, which others ignore
PRE_TOKENIZERS = {"gpt-2": GPT2, "smollm": SMOLLM, "llama-bpe": LLAMA_3, "llama3": LLAMA_3,
                  "qwen2": QWEN2, "minidistill": PATTERN}   # of equal ones, the first is written


def from_gguf(fields: dict, path: Path | None = None) -> Tokenizer:
    """The vocabulary in a GGUF file's fields. Raises ValueError, without the file's name."""
    of = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    if of.get("model") != "gpt2":
        about = {"llama": ", SentencePiece", "bert": ", WordPiece"}.get(of.get("model"), "")
        raise ValueError(f"tokenizer.ggml.model is {of.get('model')!r}{about}; only 'gpt2', "
                         "byte-level BPE, is supported")
    if missing := {"tokens", "token_type"} - of.keys():
        raise ValueError(f"there is no tokenizer.ggml.{min(missing)}")
    pre, tokens = of.get(OUR_PRE, of.get("pre", "default")), of["tokens"]
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(PRE_TOKENIZERS)}")
    is_llama3 = PRE_TOKENIZERS[pre] == LLAMA_3
    named = list(zip(tokens, range(len(tokens)), of["token_type"], strict=True))
    eos, bos = of.get("eos_token_id"), of.get("bos_token_id")
    adds_bos = bos is not None and of.get("add_bos_token", is_llama3)       # llama.cpp's default
    return byte_level(
        {token: i for token, i, kind in named if kind == NORMAL},
        [merge.split(" ") for merge in of.get("merges", [])],
        PRE_TOKENIZERS[pre],
        {token: i for token, i, kind in named if kind in (UNKNOWN, CONTROL, USER_DEFINED)},
        matched=[token for token, _, kind in named if kind == USER_DEFINED],
        eos=None if eos is None else tokens[eos], bos=tokens[bos] if adds_bos else None,
        chat_template=of.get("tokenizer.chat_template"), ignore_merges=is_llama3, path=path,
        normalization="NFC" if pre == "qwen2" else None)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The fields of a vocabulary, with as many tokens as the model has. Raises ValueError for one
    that the format cannot hold."""
    names = {pattern: name for name, pattern in reversed(PRE_TOKENIZERS.items())}
    if tokenizer.pattern not in names or tokenizer.prefix_space:
        raise ValueError("llama.cpp has no pre-tokenizer for this vocabulary, whose pattern is "
                         f"{tokenizer.pattern!r}; write a folder or a .pth")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.ranks.items():
        tokens[i], kinds[i] = to_letters(token), NORMAL
    for name, i in tokenizer.special_tokens.items():
        tokens[i], kinds[i] = name, USER_DEFINED if name in tokenizer.matched else CONTROL
    merges = map(" ".join, (map(to_letters, pair) for pair in merges_of(tokenizer.ranks)))
    pre = names[tokenizer.pattern]
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
              "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds,
              "tokenizer.ggml.merges": list(merges),
              "tokenizer.ggml.eos_token_id": tokenizer.end_of_turn,
              "tokenizer.ggml.add_bos_token": tokenizer.bos is not None,
              "tokenizer.chat_template": write_template(tokenizer)}
    if tokenizer.bos is not None:
        fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos
    if pre == "minidistill":
        fields |= {"tokenizer.ggml.pre": SUBSTITUTE, OUR_PRE: pre}
    return fields


# -- Hugging Face ----------------------------------------------------------------------------------


def read_tokenizer_json(path: str | Path) -> Tokenizer:
    """
    The vocabulary of a folder, or of a tokenizer.json and the files beside it:
    tokenizer_config.json, chat_template.jinja, and added_tokens.json in older folders.

    Raises FileNotFoundError, or ValueError with the file, the part and why it cannot be exact.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary at {file}. transformers writes one: AutoTokenizer."
                                f"from_pretrained(NAME).save_pretrained({str(file.parent)!r})")
    with named_errors(file):
        library = load_library(file.read_text(encoding="utf-8"))
        config, older = (json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
                         for beside in map(file.with_name, ("tokenizer_config.json",
                                                            "added_tokens.json")))
        template, jinja = config.get("chat_template"), file.with_name("chat_template.jinja")
        if jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
        if isinstance(template, list):                          # several, with names
            template = {each["name"]: each["template"] for each in template}.get("default")
        theirs = json.loads(library.to_str())                   # in the newest form
        tokenizer = to_tokenizer(theirs, config, read_added(theirs, config, older), template, file)
        check_against_library(tokenizer, library)
        return tokenizer


def load_library(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:                              # the library raises nothing narrower
        raise ValueError(f"the tokenizers library cannot read it: {error}") from error


def read_added(theirs: dict, config: dict, older: dict) -> dict[str, dict]:
    """name -> {"id", "special", ...} of the tokens that are matched in a text first."""
    added = {name: {"content": name, "id": i, "special": False} for name, i in older.items()}
    added |= {each["content"]: {"id": int(i), **each}
              for i, each in config.get("added_tokens_decoder", {}).items()}
    added |= {each["content"]: each for each in theirs.get("added_tokens", [])}
    for name, each in added.items():
        if flags := [flag for flag in ("lstrip", "rstrip", "single_word") if each.get(flag)]:
            raise ValueError(f"added token {name!r} has {flags[0]}, which is not supported")
    return added


def to_tokenizer(theirs: dict, config: dict, added: dict[str, dict], chat_template: str | None,
                 file: Path) -> Tokenizer:
    model = theirs["model"]
    if model["type"] != "BPE":
        raise ValueError(f"model is {model['type']}; only byte-level BPE is supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"model has {key} {model[key]!r}, which tiktoken does not support")
    eos = config.get("eos_token")
    tokenizer = byte_level(
        model["vocab"], model["merges"], read_pre_tokenizer(theirs.get("pre_tokenizer")),
        {name: each["id"] for name, each in added.items()},
        matched=[name for name, each in added.items() if not each["special"]],
        eos=eos["content"] if isinstance(eos, dict) else eos,
        bos=read_post_processor(theirs.get("post_processor")), chat_template=chat_template,
        ignore_merges=model.get("ignore_merges", False), path=file,
        **read_normalizer(theirs.get("normalizer")))
    if tokenizer.drops_bytes and model.get("unk_token") is not None:
        raise ValueError(f"bytes without a token become {model['unk_token']!r}: not supported")
    return tokenizer


def steps_of(part: dict | None, key: str) -> list[dict]:
    """The steps of a part that may be none, one, or a sequence of them."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def read_pre_tokenizer(part: dict | None) -> str:
    """The pattern that splits a text."""
    match steps_of(part, "pretokenizers"):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise ValueError(f"pre_tokenizer {json.dumps(part)[:500]} is not supported. Known: ByteLevel; "
                     "Digits and ByteLevel; Split by a regex and ByteLevel; no add_prefix_space")


def read_normalizer(part: dict | None) -> dict:
    """The Tokenizer's options that normalise a text."""
    match steps_of(part, "normalizers"):
        case []:
            return {}
        case [{"type": "NFC"}]:
            return {"normalization": "NFC"}
        case [{"type": "Prepend", "prepend": " "}]:
            return {"prefix_space": True}
    raise ValueError(f"normalizer {json.dumps(part)[:500]} is not supported, only NFC and Prepend")


def read_post_processor(part: dict | None) -> str | None:
    """The special token that is put before every text."""
    bos = None
    for step in steps_of(part, "processors"):
        match step:
            case ({"type": "ByteLevel"} |
                  {"type": "TemplateProcessing", "single": [{"Sequence": _}]}):
                pass
            case {"type": "TemplateProcessing",
                  "single": [{"SpecialToken": {"id": str(bos)}}, {"Sequence": _}]}:
                pass
            case _:
                raise ValueError(f"post_processor {json.dumps(step)[:500]} is not supported, only "
                                 "one token before a text")
    return bos


def check_against_library(tokenizer: Tokenizer, library: tokenizers.Tokenizer):
    """Raise ValueError if the tokenizers library has other ids for special tokens or for PROBE."""
    library.no_truncation()
    library.no_padding()
    for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]):
        if library.token_to_id(name) is None:                   # declared in a file beside this one
            library.add_tokens([AddedToken(name, normalized=False)])
        if (theirs := library.token_to_id(name)) != i:
            raise ValueError(f"special token {name!r} has the id {i} here, but {theirs} in the "
                             "tokenizers library")
    probe = PROBE + "x".join(tokenizer.matched)
    theirs, ours = library.encode(probe, add_special_tokens=False).ids, tokenizer.encode(probe)
    if theirs != ours:
        unequal = (i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b)
        at = next(unequal, min(len(theirs), len(ours)))
        raise ValueError("the tokenizers library splits a text in another way than tiktoken, after "
                         f"{tokenizer.decode(ours[:at])[-20:]!r}: its ids {theirs[at:at + 5]}, "
                         f"here {ours[at:at + 5]}")


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path):
    """Write tokenizer.json and tokenizer_config.json, from which AutoTokenizer has the same ids for
    texts and conversations. Raises ValueError, before it writes, if that is not possible."""
    folder = Path(folder)
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    bos, eos = name_of.get(tokenizer.bos), name_of[tokenizer.end_of_turn]
    library = to_library(tokenizer, name_of)
    check_against_library(tokenizer, library)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
              "bos_token": bos, "eos_token": eos, "pad_token": name_of[tokenizer.end_of_text],
              "chat_template": write_template(tokenizer)}
    config = json.dumps(config, ensure_ascii=False, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("tokenizer.json", library.to_str(pretty=True)),
                       ("tokenizer_config.json", config)):
        write_atomic(folder / name, lambda file: file.write(text.encode()))


def to_library(tokenizer: Tokenizer, name_of: dict[int, str]) -> tokenizers.Tokenizer:
    """The vocabulary as one of the tokenizers library."""
    merges = merges_of(tokenizer.ranks)
    # Special tokens too: the library gives those outside the vocabulary the ids after it.
    tokens = {to_letters(token): i for token, i in tokenizer.ranks.items()}
    library = tokenizers.Tokenizer(models.BPE(
        tokenizer.special_tokens | tokens, [tuple(map(to_letters, pair)) for pair in merges],
        ignore_merges=bool(unmade_tokens(tokenizer.ranks, merges))))
    try:
        pattern = tokenizers.Regex(tokenizer.pattern)
    except Exception as error:
        raise ValueError(f"the tokenizers library cannot read its pattern: {error}") from error
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    if tokenizer.normalization:
        library.normalizer = normalizers.NFC()
    if tokenizer.prefix_space:
        library.normalizer = normalizers.Prepend(" ")
    if (bos := name_of.get(tokenizer.bos)) is not None:
        library.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, tokenizer.bos)])
    library.add_tokens([AddedToken(name, normalized=False, special=name not in tokenizer.matched)
                        for _, name in sorted(name_of.items())])
    return library
