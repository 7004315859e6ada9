"""
别人的词表：Hugging Face 的 tokenizer.json 与 GGUF 里的词表，读进来，写出去，一个编号都不变。
Other people's vocabularies, in and out, every id as it was: Hugging Face's tokenizer.json and what GGUF holds.

Both are lists of tokens and of merges, pairs that may be joined, the first ones first. tiktoken needs no merges: it
joins any two tokens whose union is a token, the lowest id first. The ids of a text are the same if

    1  the merges are in the order of the ids of what they make
    2  for each token, the merge is listed that makes it out of the parts which the tokens before it leave of it

for as long as no token crosses its ends, the bytes of a token in a text are joined as they are when they stand alone.
Both are checked here for every token, and what cannot be the same is refused, with the file and the reason. So are
SentencePiece and WordPiece, whose tokens are no bytes.

A chat template is a program in Jinja, and code from a data file is not run here. It is recognised by its text:

    <|im_start|>            CHATML, with the system message that stands in it (SmolLM2, Qwen2.5), and with an empty
                            thought before the answer if it can think (Qwen3 with enable_thinking=False)
    <|start_header_id|>     LLAMA3, and for 3.1 to 3.3 the two dates before the system message. Today is the day
                            that stands in the template, so that a prompt has the same ids tomorrow
    anything else           PLAIN, with the end-of-text token; without a template the two special tokens above decide

Hugging Face cuts a conversation as one text: there, white space at the start of a content may be joined with the end of
the header. Here it never is (model/tokenizer.py says why). All other contents have the same ids.
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import tokenizers

from model.tokenizer import (CHATML, LLAMA3, PATTERN, PLAIN, ROLES, Chat, Tokenizer, as_text_or_bytes,
                             options_from_json)
from runtime.files import write_atomic

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Digits are cut out first, each one alone, and the rest by GPT2: the space before a digit is the end of a text.
SMOLLM = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA_3.replace("{1,3}", "")

# GGUF's name -> where a text is cut. Of two names for the same, the first one is written. llama.cpp does not know
# the last one and says so.
PRE_TOKENIZERS = {"gpt-2": GPT2, "smollm": SMOLLM, "llama-bpe": LLAMA_3, "llama3": LLAMA_3, "qwen2": QWEN2,
                  "minidistill": PATTERN}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5          # GGUF's types of tokens

# For the last comparison with the tokenizers library: code, digits, blank lines, accents in two forms, scripts, emoji,
# and each character up to U+024F, so that no class of them is forgotten by a pattern.
PROBE = ("def f(x):\n\treturn  x + 12345 # it's, IT'LL\r\n\r\n    \n" + "小猫坐着，１２ 个。 e\u0301 é ﬁ ½ Ⅷ нет नमस्ते مرحبا "
         "한국어 👩‍👩‍👧 ❤️ \u2028\u3000\ufeff\U000e0001" + "".join(map(chr, range(0x250))) + "   ")


# -- bytes and merges --------------------------------------------------------------------------------------------------


def letters_of_bytes() -> list[str]:
    """The letter that stands for each byte: a printable one for itself, the n-th of the others (from 0) is the letter
    256 + n, so that a space is "Ġ"."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(value if value in printable else next(others)) for value in range(256)]


LETTERS = letters_of_bytes()
BYTES = {letter: value for value, letter in enumerate(LETTERS)}


def to_letters(token: bytes) -> str:
    return "".join(LETTERS[value] for value in token)


def to_bytes(letters: str) -> bytes:
    """Raises ValueError for a token of SentencePiece or WordPiece."""
    try:
        return bytes(BYTES[letter] for letter in letters)
    except KeyError as error:
        raise ValueError(f"token {letters!r}: {error.args[0]!r} stands for no byte. This is no byte-level BPE, the "
                         "only kind that is read") from error


def parts_of(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """What the tokens below it leave of a token; two parts if one merge makes it."""
    parts, limit = [token[i:i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        rank, i = min((ranks.get(left + right, limit), i) for i, (left, right) in enumerate(pairwise(parts)))
        if rank >= limit:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that make the tokens, in the order of their ids. A token that no merge makes has none: it is found
    only where it is a whole piece of the text."""
    parts = (parts_of(token, ranks) for token in sorted(ranks, key=ranks.get))
    return [tuple(two) for two in parts if len(two) == 2]


def check_merges(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]], ignore_merges: bool):
    """Raise ValueError where tiktoken would join otherwise than the merges do. ignore_merges: a piece of the text that
    is a token needs no merges, which is what tiktoken does."""
    for left, right in merges:
        if left + right not in ranks:
            raise ValueError(f"merge {as_text_or_bytes(left)!r} + {as_text_or_bytes(right)!r} makes no token")
    made = [left + right for left, right in merges]
    for before, after in pairwise(made):
        if ranks[before] > ranks[after]:
            raise ValueError(f"the merge that makes {as_text_or_bytes(before)!r}, id {ranks[before]}, comes before the "
                             f"one that makes {as_text_or_bytes(after)!r}, id {ranks[after]}; tiktoken joins in the "
                             "order of the ids")
    expected = merges_of(ranks)
    if missing := set(expected) - set(merges):
        left, right = min(missing, key=lambda pair: ranks[pair[0] + pair[1]])
        raise ValueError(f"there is no merge of {as_text_or_bytes(left)!r} and {as_text_or_bytes(right)!r}, which "
                         f"tiktoken would join to {as_text_or_bytes(left + right)!r}")
    if not ignore_merges and (unmade := unmade_tokens(ranks, expected)):
        raise ValueError(f"no merge makes token {as_text_or_bytes(unmade[0])!r}, id {ranks[unmade[0]]}, which tiktoken "
                         "would find")


def unmade_tokens(ranks: dict[bytes, int], merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The tokens of several bytes that no merge makes."""
    made = {left + right for left, right in merges}
    return [token for token in ranks if len(token) > 1 and token not in made]


# -- chat templates ----------------------------------------------------------------------------------------------------

OURS = re.compile(r"\{#- MiniDistill (\{.*?\}) -#\}", re.DOTALL)


def read_template(template: str | None, special_tokens: dict[str, int], eos: str | None) -> dict:
    """The Tokenizer's chat and end_of_text for a chat template, or for none. eos: the token that its files call so,
    which may end a turn or a text. Raises ValueError if nothing ends a text."""
    if template and (ours := OURS.match(template)):
        about = json.loads(ours[1])
        return options_from_json({key: about[key] for key in ("chat", "end_of_text")})
    ends = [name for name in ("<|endoftext|>", "<|end_of_text|>", eos, "</s>") if name in special_tokens]
    if not ends:
        raise ValueError("nothing ends a text: there is neither an eos_token nor a special token <|endoftext|>, "
                         "<|end_of_text|> or </s>")

    said = "".join(special_tokens) if template is None else template.replace("\\n", "\n").replace("\\'", "'")
    if "<|im_start|>" in said and {"<|im_start|>", "<|im_end|>"} <= special_tokens.keys():
        return {"chat": chatml(said), "end_of_text": ends[0]}
    header = {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
    if "<|start_header_id|>" in said and header <= special_tokens.keys():
        return {"chat": llama3(said), "end_of_text": ends[0]}
    return {"chat": PLAIN(ends[0]), "end_of_text": ends[0]}


def chatml(template: str) -> Chat:
    # A system message that stands in the template, not one that is put together: no quote and plus sign, no brace.
    default = re.search(r"""<\|im_start\|>system\n((?:(?!['"]\s*[+~])[^{}])*?)<\|im_end\|>""", template)
    thinks = "<think>\n" in template.partition("add_generation_prompt")[2]
    return Chat(CHATML.system, CHATML.user, CHATML.assistant, default_system=default[1] if default else None,
                before_answer="<think>\n\n</think>\n\n" if thinks else "")


def llama3(template: str) -> Chat:
    known = re.search(r"Cutting Knowledge Date: [^\n'\"{}]+", template)
    today = re.search(r"date_string = [\"']([^\"']+)[\"']", template)
    if not (known and today):
        return LLAMA3
    dates = f"{known[0]}\nToday Date: {today[1]}\n\n{{content}}"
    return Chat(LLAMA3.system.replace("{content}", dates), LLAMA3.user, LLAMA3.assistant, default_system="", trims=True)


def write_template(tokenizer: Tokenizer) -> str:
    """A Jinja template that frames a conversation as tokenizer.chat does. It begins with a comment, from which
    read_template has the same chat back."""
    chat = tokenizer.chat
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    about = {"chat": vars(chat), "end_of_text": name_of[tokenizer.end_of_text]}
    comment = json.dumps(about, ensure_ascii=False).replace("#}", "#\\u007d")           # or the comment would end here
    quoted = json.JSONEncoder(ensure_ascii=False).encode

    lines = [f"{{#- MiniDistill {comment} -#}}"]
    if tokenizer.bos is not None:
        lines += [f"{{{{- {quoted(name_of[tokenizer.bos])} }}}}"]
    if chat.default_system is not None:
        system = chat.system.replace("{content}", chat.default_system.strip() if chat.trims else chat.default_system)
        lines += ["{%- if not messages or messages[0].role != 'system' %}", f"{{{{- {quoted(system)} }}}}",
                  "{%- endif %}"]
    lines += ["{%- for message in messages %}",
              f"{{%- set content = message.content{' | trim' if chat.trims else ''} %}}"]
    for role in ROLES:
        header, end = vars(chat)[role].split("{content}")
        before = f" + ({quoted(chat.before_answer)} if loop.last else '')" if role == "assistant" else ""
        lines += [f"{{%- if message.role == '{role}' %}}",
                  f"{{{{- {quoted(header)}{before} + content + {quoted(end)} }}}}", "{%- endif %}"]
    prompt = chat.assistant.split("{content}")[0] + chat.before_answer
    lines += ["{%- endfor %}", "{%- if add_generation_prompt %}", f"{{{{- {quoted(prompt)} }}}}", "{%- endif %}"]
    return "\n".join(lines)


# -- what both formats share -------------------------------------------------------------------------------------------


def byte_level(
    vocab: dict[str, int], merges: Iterable[str | list[str]], pattern: str, special_tokens: dict[str, int], *,
    matched: Iterable[str] = (), eos: str | None = None, bos: str | None = None, chat_template: str | None = None,
    normalization: str | None = None, prefix_space: bool = False, ignore_merges: bool = False, path: Path | None = None,
) -> Tokenizer:
    """
    A byte-level BPE vocabulary of tokens and merges.

        vocab           token -> id, a byte written as its letter; the special tokens may be among them
        merges          "a b" or ["a", "b"]
        ignore_merges   see check_merges

    The others as for Tokenizer and read_template. Raises ValueError for what cannot be the same here.
    """
    ranks = {to_bytes(token): i for token, i in vocab.items() if token not in special_tokens}
    pairs = []
    for merge in merges:
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(left), str(right)]:
                pairs.append((to_bytes(left), to_bytes(right)))
            case _:
                raise ValueError(f'merge {merge!r} is neither "a b" nor ["a", "b"]')
    check_merges(ranks, pairs, ignore_merges)
    return Tokenizer(pattern, special_tokens, ranks, path, bos=bos, matched=matched, normalization=normalization,
                     prefix_space=prefix_space, drops_bytes=not all(bytes([value]) in ranks for value in range(256)),
                     **read_template(chat_template, special_tokens, eos))


# -- GGUF --------------------------------------------------------------------------------------------------------------


def from_gguf(
    tokens: list[str], token_types: list[int], merges: list[str], pre: str, *, eos_id: int | None = None,
    bos_id: int | None = None, add_bos: bool | None = None, chat_template: str | None = None, path: Path | None = None,
) -> Tokenizer:
    """
    The vocabulary that a GGUF file of tokenizer.ggml.model "gpt2" holds; each argument is the field tokenizer.ggml.*
    of about the same name. add_bos None: as llama.cpp does without the field, for Llama 3 alone.

    A token that is unused has no id here. Raises ValueError, without the name of the file.
    """
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; read are {', '.join(PRE_TOKENIZERS)}")
    if unknown := set(token_types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}:
        raise ValueError(f"a token of type {min(unknown)} in tokenizer.ggml.token_type; byte-level BPE has 1 to 5")
    is_llama3 = PRE_TOKENIZERS[pre] == LLAMA_3
    named = list(zip(tokens, range(len(tokens)), token_types, strict=True))
    return byte_level(
        {token: i for token, i, kind in named if kind == NORMAL}, merges, PRE_TOKENIZERS[pre],
        {token: i for token, i, kind in named if kind in (UNKNOWN, CONTROL, USER_DEFINED)},
        matched=[token for token, _, kind in named if kind == USER_DEFINED],
        eos=None if eos_id is None else tokens[eos_id],
        bos=tokens[bos_id] if bos_id is not None and (is_llama3 if add_bos is None else add_bos) else None,
        chat_template=chat_template, normalization="NFC" if pre == "qwen2" else None, ignore_merges=is_llama3,
        path=path)


def to_gguf(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """The arguments of from_gguf for a vocabulary, but path, with as many tokens as the model has. Raises ValueError
    for a vocabulary that the format has no words for."""
    names = {pattern: name for name, pattern in reversed(PRE_TOKENIZERS.items())}
    if tokenizer.pattern not in names:
        raise ValueError("llama.cpp cuts text in ways of its own, and has none for this vocabulary, whose pattern is "
                         f"{tokenizer.pattern!r}; write a folder or a .pth")
    if tokenizer.prefix_space:
        raise ValueError("GGUF's byte-level BPE puts no space before a text, as this vocabulary does")
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [UNUSED] * vocab_size
    for token, i in tokenizer.ranks.items():
        tokens[i], kinds[i] = to_letters(token), NORMAL
    for name, i in tokenizer.special_tokens.items():
        tokens[i], kinds[i] = name, USER_DEFINED if name in tokenizer.matched else CONTROL
    return {"tokens": tokens, "token_types": kinds, "pre": names[tokenizer.pattern],
            "merges": [f"{to_letters(left)} {to_letters(right)}" for left, right in merges_of(tokenizer.ranks)],
            "eos_id": tokenizer.end_of_turn, "bos_id": tokenizer.bos, "add_bos": tokenizer.bos is not None,
            "chat_template": write_template(tokenizer)}


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def read_tokenizer_json(path: str | Path) -> Tokenizer:
    """
    The vocabulary of a folder, or of a tokenizer.json and what lies beside it: tokenizer_config.json,
    chat_template.jinja, and added_tokens.json of older ones.

    Raises FileNotFoundError, or ValueError with the file, the part and why it cannot be the same here.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no vocabulary at {file}. transformers writes one: "
                                f"AutoTokenizer.from_pretrained(NAME).save_pretrained({str(file.parent)!r})")
    try:
        text = file.read_text(encoding="utf-8")
        theirs = json.loads(text)
        config = json_beside(file, "tokenizer_config.json")
        added = read_added(theirs, config, json_beside(file, "added_tokens.json"))
        tokenizer = to_tokenizer(theirs, config, added, read_chat_template(file, config), file)
        check_against_library(tokenizer, text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return tokenizer


def json_beside(file: Path, name: str) -> dict:
    beside = file.with_name(name)
    if not beside.is_file():
        return {}
    try:
        return json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} beside it: {error}") from error


def read_chat_template(file: Path, config: dict) -> str | None:
    beside = file.with_name("chat_template.jinja")
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):                              # several with names
        template = {each["name"]: each["template"] for each in template}.get("default")
    return template


def read_added(theirs: dict, config: dict, older: dict) -> dict[str, dict]:
    """name -> {"id", "special", ...} of the tokens that are cut out of a text first, wherever they are declared."""
    added = {name: {"content": name, "id": i, "special": False} for name, i in older.items()}
    added |= {each["content"]: {"id": int(i), **each} for i, each in config.get("added_tokens_decoder", {}).items()}
    added |= {each["content"]: each for each in theirs.get("added_tokens", [])}
    for name, each in added.items():
        for flag in ("lstrip", "rstrip", "single_word"):
            if each.get(flag):
                raise ValueError(f"added token {name!r} has {flag}: the text around it would decide what it takes in")
    return added


def to_tokenizer(theirs: dict, config: dict, added: dict[str, dict], chat_template: str | None,
                 file: Path) -> Tokenizer:
    match theirs:
        case {"model": {"vocab": {}, "merges": [*_], **options} as model} if options.get("type", "BPE") == "BPE":
            pass
        case {"model": {"type": kind}}:
            raise ValueError(f"model is {kind}; only byte-level BPE is read")
        case _:
            raise ValueError("not a tokenizer.json of Hugging Face's: there is no model with a vocab and merges")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ValueError(f"model has {key} {model[key]!r}, which tiktoken does not know")
    eos = config.get("eos_token")
    tokenizer = byte_level(
        model["vocab"], model["merges"], read_pre_tokenizer(theirs.get("pre_tokenizer")),
        {name: each["id"] for name, each in added.items()},
        matched=[name for name, each in added.items() if not each["special"]],
        eos=eos["content"] if isinstance(eos, dict) else eos, bos=read_post_processor(theirs.get("post_processor")),
        chat_template=chat_template, ignore_merges=model.get("ignore_merges", False), path=file,
        **read_normalizer(theirs.get("normalizer")))
    if tokenizer.drops_bytes and model.get("unk_token") is not None:
        raise ValueError(f"some bytes have no token and become {model['unk_token']!r}, which tiktoken does not know")
    return tokenizer


def steps_of(part: dict | None, key: str) -> list[dict]:
    """The steps of a part that may be none, one, or a sequence of them."""
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def read_pre_tokenizer(part: dict | None) -> str:
    """Where a text is cut."""
    match steps_of(part, "pretokenizers"):
        case [*_, {"type": "ByteLevel", "add_prefix_space": True}]:
            raise ValueError("pre_tokenizer ByteLevel has add_prefix_space: it puts a space before some texts only")
        case [{"type": "ByteLevel", **options}] if options.get("use_regex", True):
            return GPT2
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", **options}] if (
                options.get("use_regex", True)):
            return SMOLLM
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "use_regex": False}]:
            return pattern
    raise ValueError(f"pre_tokenizer {json.dumps(part)[:500]} is none of the known ones: ByteLevel, Digits and "
                     "ByteLevel, Split by a regex and ByteLevel")


def read_normalizer(part: dict | None) -> dict:
    """The Tokenizer's options that normalise a text."""
    match steps_of(part, "normalizers"):
        case []:
            return {}
        case [{"type": "NFC"}]:
            return {"normalization": "NFC"}
        case [{"type": "Prepend", "prepend": " "}]:
            return {"prefix_space": True}
    raise ValueError(f"normalizer {json.dumps(part)[:500]} is neither NFC nor a space before the text")


def read_post_processor(part: dict | None) -> str | None:
    """The special token that is put before every text."""
    bos = None
    for step in steps_of(part, "processors"):
        match step:
            case {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
                pass
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(bos)}}, {"Sequence": _}]}:
                pass
            case _:
                raise ValueError(f"post_processor {json.dumps(step)[:500]} does more than put one token before a text")
    return bos


def check_against_library(tokenizer: Tokenizer, text: str):
    """Raise ValueError if the tokenizers library cannot read the text of a tokenizer.json, or has other ids for the
    special tokens or for PROBE."""
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:                                  # it raises nothing narrower
        raise ValueError(f"the tokenizers library cannot read it: {error}") from error
    library.no_truncation()
    library.no_padding()
    for name, i in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1]):
        if library.token_to_id(name) is None:                   # it stands in a file beside this one
            library.add_tokens([tokenizers.AddedToken(name, normalized=False)])
        if library.token_to_id(name) != i:
            raise ValueError(f"special token {name!r} has the id {i} here, the tokenizers library gives it "
                             f"{library.token_to_id(name)}")
    probe = PROBE + "x".join(tokenizer.matched)
    theirs, ours = library.encode(probe, add_special_tokens=False).ids, tokenizer.encode(probe)
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
        raise ValueError(f"the tokenizers library cuts a text otherwise than tiktoken does here, after "
                         f"{tokenizer.decode(ours[:at])[-20:]!r}: its ids {theirs[at:at + 5]}, ours {ours[at:at + 5]}")


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path):
    """Write tokenizer.json and tokenizer_config.json, from which AutoTokenizer has the same ids for texts and for
    conversations. Raises ValueError, before it writes, if the tokenizers library has not."""
    folder = Path(folder)
    name_of = {i: name for name, i in tokenizer.special_tokens.items()}
    # The special tokens as well: the library gives those that are not in it the ids behind it, whatever they say.
    vocab = tokenizer.special_tokens | {to_letters(token): i for token, i in tokenizer.ranks.items()}
    merges = merges_of(tokenizer.ranks)
    bos = name_of.get(tokenizer.bos)

    normalizer = {"type": "NFC"} if tokenizer.normalization else None
    if tokenizer.prefix_space:
        normalizer = {"type": "Prepend", "prepend": " "}
    post_processor = None
    if bos is not None:
        text, start = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": bos, "type_id": 0}}
        post_processor = {
            "type": "TemplateProcessing", "single": [start, text],
            "pair": [start, text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}}}
    byte_level_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    theirs = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": name not in tokenizer.matched} for i, name in sorted(name_of.items())],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
            byte_level_step]},
        "post_processor": post_processor,
        "decoder": byte_level_step,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": bool(unmade_tokens(tokenizer.ranks, merges)), "vocab": vocab,
                  "merges": [[to_letters(left), to_letters(right)] for left, right in merges]}}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": bos, "eos_token": name_of[tokenizer.end_of_turn], "pad_token": name_of[tokenizer.end_of_text],
        "chat_template": write_template(tokenizer)}

    texts = {"tokenizer.json": theirs, "tokenizer_config.json": config}
    texts = {name: json.dumps(value, ensure_ascii=False, indent=1) for name, value in texts.items()}
    try:
        check_against_library(tokenizer, texts["tokenizer.json"])
    except ValueError as error:
        raise ValueError(f"{folder}: this vocabulary cannot be written as a tokenizer.json: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomic(folder / name, lambda file: file.write(text.encode()))
