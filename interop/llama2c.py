"""
llama2.c 的权重与词表：一个文件头，一串 fp32 张量；词表是旁边的另一个文件。
llama2.c's checkpoints (version 0) and the vocabulary beside them. https://github.com/karpathy/llama2.c, run.c

    stories260K.bin     7 int32, then fp32 tensors one behind the other, each stacked over the layers
    tok512.bin          the 512 tokens with their scores; llama2.c calls Llama 2's own tokenizer.bin

The weights need no rearranging: llama2.c turns neighbours (x0, x1) in RoPE, as model/transformer.py does.
"""

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from model.config import LMConfig
from model.tokenizer import PLAIN, Tokenizer
from interop import Piece

HEADER = struct.Struct("<7i")       # dim, hidden, layers, heads, kv heads, vocab (negative: an untied head), seq
MAGIC = 0x616B3432                  # "ak42", the first number of the later versions

# Where a text is cut for tiktoken, which looks a whole piece up before it joins bytes. A character of several bytes
# is a piece of its own, for no tokens lead from its bytes to it. Else only spaces are cut before.
WORDS = r" *[\x00-\x1F\x21-\x7F]+| +|[^\x00-\x7F]"
LINES = r"[\x00-\x7F]+|[^\x00-\x7F]"      # for a vocabulary whose tokens reach past a space; 1.4 times as slow

FIRST_BYTE, FIRST_TOKEN = 3, 259    # <unk> <s> </s>, the bytes <0x00> ... <0xFF>, and then what was learned


# -- weights ---------------------------------------------------------------------------------------------------

def read_config(path: str | Path) -> LMConfig:
    """The sizes in the header. Raises ValueError for a file of another version, or not of the size that they tell."""
    path = Path(path)
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise ValueError(f"{path}: {len(header)} bytes; the header of a llama2.c checkpoint alone has {HEADER.size}")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes = HEADER.unpack(header)
    if dim == MAGIC:
        raise ValueError(f"{path}: version {hidden_dim} of llama2.c's format; only version 0 is read here. "
                         "llama2.c writes it: python export.py FILE --version 0")
    if vocab_size == 0 or min(dim, hidden_dim, n_layers, n_heads, n_kv_heads, max_seq_len) < 1:
        raise ValueError(f"{path}: no llama2.c checkpoint; its first seven numbers would be sizes, but are {sizes}")
    try:
        config = LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, hidden_dim=hidden_dim,
                          vocab_size=abs(vocab_size), max_seq_len=max_seq_len, tie_embeddings=vocab_size > 0,
                          rope_theta=1e4, norm_eps=1e-5)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_size(path, config)
    return config


def read_pieces(path: str | Path, config: LMConfig) -> Iterator[Piece]:
    """Every weight of the file, one layer's tensor in memory at a time. Raises ValueError if the file's size is not
    that of `config`, which read_config gave."""
    check_size(path, config)
    numbers = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
    start = 0
    for source, name, shape in layout(config):
        end = start + prod(shape)
        if name:
            yield Piece(name, torch.from_numpy(np.array(numbers[start:end])).view(shape), source=source)
        start = end


def layout(config: LMConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(run.c's name, ours, shape) of each tensor in the file's order; no name of ours for RoPE's tables, which
    model/transformer.py works out anew."""
    D, F, V, T, K = config.dim, config.hidden_dim, config.vocab_size, config.max_seq_len, config.head_dim
    H, G = config.n_heads, config.n_kv_heads
    stacks = (
        ("rms_att_weight", "attention_norm", (D,)),
        ("wq", "attention.wq", (H * K, D)),
        ("wk", "attention.wk", (G * K, D)),
        ("wv", "attention.wv", (G * K, D)),
        ("wo", "attention.wo", (D, H * K)),
        ("rms_ffn_weight", "ffn_norm", (D,)),
        ("w1", "ffn.w1", (F, D)),
        ("w2", "ffn.w2", (D, F)),
        ("w3", "ffn.w3", (F, D)),
    )
    yield "token_embedding_table", "tok_embeddings.weight", (V, D)
    for source, name, shape in stacks:
        for layer in range(config.n_layers):
            yield f"{source}[{layer}]", f"layers.{layer}.{name}.weight", shape
    yield "rms_final_weight", "norm.weight", (D,)
    yield "freq_cis_real", "", (T, K // 2)
    yield "freq_cis_imag", "", (T, K // 2)
    if not config.tie_embeddings:
        yield "wcls", "output.weight", (V, D)


def check_size(path: str | Path, config: LMConfig):
    size = Path(path).stat().st_size
    expected = HEADER.size + 4 * sum(prod(shape) for _, _, shape in layout(config))
    if size != expected:
        raise ValueError(f"{path}: {size:,} bytes, but a llama2.c checkpoint of {config}, {config.vocab_size} tokens "
                         f"and max_seq_len={config.max_seq_len} has {expected:,}; it is cut off, or no such checkpoint")


# -- vocabulary ------------------------------------------------------------------------------------------------

def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary beside the weights: tok{vocab_size}.bin, or else tokenizer.bin.

    It is SentencePiece's BPE: a text begins with a space, its characters are the first tokens (a character that is
    none becomes its bytes), and the neighbours whose union has the best score are joined until no two have one.
    tiktoken does the same on bytes, with ids in place of scores, if four things hold for every token of several
    characters. They are checked here:

        its score is below the one before it        so that the lowest id is the best score
        its characters are ASCII                    a character of several bytes is never joined to another
        and tokens themselves                       what run.c turns into bytes, it never joins
        joining its characters leads to it          tiktoken finds it at once, run.c on the way alone

    An ASCII character that is a token has two ids, its own and its byte's. Texts never have the second one; should
    a model write it, it reads as <0x65>.

    Raises FileNotFoundError that names both places, or ValueError with the file, the token and what is wrong.
    """
    path = Path(path)
    vocab_size = read_config(path).vocab_size
    places = path.with_name(f"tok{vocab_size}.bin"), path.with_name("tokenizer.bin")
    found = [place for place in places if place.is_file()]
    if not found:
        raise FileNotFoundError(f"no vocabulary for {path}: neither {places[0]} nor {places[1]} is there. "
                                "Put the one that it was trained with beside it")
    scores = read_scores(found[0])
    if len(scores) != vocab_size:
        raise ValueError(f"{found[0]}: {len(scores)} tokens, but {path} has {vocab_size}; "
                         "it belongs to other weights")
    try:
        learned = learned_tokens(scores)
    except ValueError as error:
        raise ValueError(f"{found[0]}: {error}") from error

    byte_ids = {bytes([value]): FIRST_BYTE + value for value in range(256)}
    ids = {text.encode(): i for text, i in learned.items()}
    spare = {f"<0x{ord(byte):02X}>": i for byte, i in byte_ids.items() if byte in ids}
    past_a_space = any(" " in text.lstrip(" ") for text in learned)
    return Tokenizer(LINES if past_a_space else WORDS, {"<unk>": 0, "<s>": 1, "</s>": 2} | spare, byte_ids | ids,
                     path=found[0], chat=PLAIN("<s>"), bos="<s>", end_of_text="<s>", prefix_space=True)


def read_scores(path: Path) -> list[tuple[bytes, float]]:
    """(token, score) in the order of the ids. Raises ValueError where the file breaks off."""
    data, tokens = path.read_bytes(), []
    start = 4                                                   # behind the length of the longest, for run.c's buffer
    try:
        while start < len(data):
            score, size = struct.unpack_from("<fi", data, start)
            token, = struct.unpack_from(f"{size}s", data, start + 8)
            tokens.append((token, score))
            start += 8 + size
    except struct.error as error:
        raise ValueError(f"{path}: token {len(tokens)} at byte {start:,} is cut off, or this is no vocabulary of "
                         f"llama2.c: {error}") from error
    return tokens


def learned_tokens(scores: list[tuple[bytes, float]]) -> dict[str, int]:
    """Text -> id of all but the first 259. Raises ValueError for what read_tokenizer cannot do exactly."""
    for i in range(FIRST_BYTE, FIRST_TOKEN):
        name = f"<0x{i - FIRST_BYTE:02X}>".encode()
        if i < len(scores) and scores[i][0] == name:
            continue
        raise ValueError(f"token {i} is not {name.decode()}; "
                         "only SentencePiece's vocabularies with byte_fallback are read")

    learned = {}
    for i, (token, _) in enumerate(scores[FIRST_TOKEN:], FIRST_TOKEN):
        try:
            text = token.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"token {i} is {token!r}, which is no text: {error}") from error
        if not text or text in learned:
            raise ValueError(f"token {i}, {text!r}, " + (f"is token {learned[text]} as well" if text else "is empty"))
        learned[text] = i

    last = float("inf")
    for text, i in learned.items():
        if len(text) == 1:
            continue
        score = scores[i][1]
        if score >= last:
            raise ValueError(f"token {i}, {text!r}, has the score {score}, no lower than the one before it, {last}; "
                             "tiktoken joins by ids alone")
        last = score
        if not text.isascii():
            raise ValueError(f"token {i}, {text!r}, joins characters that are not ASCII. tiktoken joins bytes, and would "
                             "need tokens for their parts; read these weights from a Hugging Face folder instead")
        if missing := [character for character in text if character not in learned]:
            raise ValueError(f"token {i}, {text!r}, has the character {missing[0]!r}, which is no token")
        if (parts := join(text, learned)) != [text]:
            raise ValueError(f"token {i}, {text!r}, cannot be reached: its characters are joined to {parts}")
    return learned


def join(text: str, ids: dict[str, int]) -> list[str]:
    """Byte-pair encoding as the textbook has it: the neighbours whose union has the lowest id first."""
    parts = list(text)
    while unions := [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ids]:
        _, i = min(unions)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
