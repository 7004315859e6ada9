"""
llama2.c 的权重与词表：一个文件头，一串 fp32 张量；词表是旁边的另一个文件。
llama2.c's checkpoints (version 0) and vocabularies: https://github.com/karpathy/llama2.c, run.c

    stories260K.bin     7 int32, then fp32 tensors, each stacked over the layers
    tok512.bin          512 tokens with their scores; Llama 2's own vocabulary is tokenizer.bin

The weights need no reordering: RoPE rotates the pairs (x0, x1) there as in model/transformer.py.
"""

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from interop import Piece, named_errors
from model.config import LMConfig
from model.tokenizer import PLAIN, Tokenizer

HEADER_BYTES = 28       # 7 int32: dim, hidden, layers, heads, kv heads, vocab (< 0: untied), seq
MAGIC = 0x616B3432      # "ak42", the first number of later versions

# Where a text is split for tiktoken, which looks up a whole piece before it joins bytes. Multi-byte
# characters are pieces of their own, because no tokens lead from their bytes to them.
WORDS = r" *[\x00-\x1F\x21-\x7F]+| +|[^\x00-\x7F]"
LINES = r"[\x00-\x7F]+|[^\x00-\x7F]"    # where tokens contain inner spaces; 1.4 times as slow

FIRST_BYTE, FIRST_TOKEN = 3, 259    # <unk> <s> </s>, the bytes <0x00> ... <0xFF>, learned tokens


# -- weights ---------------------------------------------------------------------------------------


def read_config(path: str | Path) -> LMConfig:
    """The sizes in the header. Raises ValueError for another version or another file size."""
    with named_errors(path):
        sizes = np.fromfile(path, "<i4", 7).tolist()
        dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = sizes
        if dim == MAGIC:
            raise ValueError(f"version {hidden_dim} of llama2.c's format; only version 0 is "
                             "supported. llama2.c writes it: python export.py FILE --version 0")
        config = LMConfig(
            dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
            hidden_dim=hidden_dim, vocab_size=abs(vocab_size), max_seq_len=max_seq_len,
            tie_embeddings=vocab_size > 0, rope_theta=1e4, norm_eps=1e-5)
        size = Path(path).stat().st_size
        expected = HEADER_BYTES + 4 * sum(prod(shape) for _, _, shape in layout(config))
        if size != expected:
            raise ValueError(f"{size:,} bytes, but a llama2.c checkpoint of {config}, {vocab_size} "
                             f"tokens and max_seq_len={max_seq_len} has {expected:,}; it is cut "
                             "short, or no such checkpoint")
        return config


def read_pieces(path: str | Path, config: LMConfig) -> Iterator[Piece]:
    """Every weight of the file, one layer's tensor in memory at a time."""
    values = np.memmap(path, dtype="<f4", mode="r", offset=HEADER_BYTES)
    start = 0
    for source, name, shape in layout(config):
        end = start + prod(shape)
        if name:
            tensor = torch.from_numpy(np.array(values[start:end])).view(shape)
            yield Piece(name, tensor, source=source)
        start = end


def layout(config: LMConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(run.c's name, our name, shape) of each tensor in the file's order. RoPE's tables have no
    name here; the model recomputes them."""
    D, F, V, T = config.dim, config.hidden_dim, config.vocab_size, config.max_seq_len
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
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
    yield "freq_cis_real, freq_cis_imag", "", (2, T, K // 2)
    if not config.tie_embeddings:
        yield "wcls", "output.weight", (V, D)


# -- vocabulary ------------------------------------------------------------------------------------


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The vocabulary beside the weights: tok{vocab_size}.bin, or else tokenizer.bin.

    It is SentencePiece's BPE. A text begins with a space; its characters are the first tokens (an
    unknown character becomes its bytes); the neighbours whose union has the best score are joined.
    tiktoken does the same on bytes, with ids instead of scores, if each token of several characters

        has a lower score than the one before it    so the lowest id is the best score
        is ASCII                                    several bytes are joined to nothing else
        is what joining its characters gives        tiktoken finds it at once, run.c only this way

    This is checked here. An ASCII character that is a token has two ids, its own and its byte's.
    Texts never get the second one; if a model generates it, it reads as <0x65>.

    Raises FileNotFoundError with both places, or ValueError with the file and the token.
    """
    path = Path(path)
    vocab_size = read_config(path).vocab_size
    places = path.with_name(f"tok{vocab_size}.bin"), path.with_name("tokenizer.bin")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no vocabulary for {path}: neither {places[0]} nor {places[1]} "
                                "exists. Put the one that it was trained with beside it")
    with named_errors(file):
        scores = read_scores(file)
        if len(scores) != vocab_size:
            raise ValueError(f"{len(scores)} tokens, but {path} has {vocab_size}")
        learned = learned_tokens(scores)

    byte_ids = {bytes([value]): FIRST_BYTE + value for value in range(256)}
    ids = {text.encode(): i for text, i in learned.items()}
    spare = {f"<0x{ord(byte):02X}>": i for byte, i in byte_ids.items() if byte in ids}
    pattern = LINES if any(" " in text.lstrip(" ") for text in learned) else WORDS
    return Tokenizer(pattern, {"<unk>": 0, "<s>": 1, "</s>": 2} | spare, byte_ids | ids, path=file,
                     chat=PLAIN("<s>"), bos="<s>", end_of_text="<s>", prefix_space=True)


def read_scores(path: Path) -> list[tuple[bytes, float]]:
    """(token, score) in the order of the ids."""
    data, tokens, start = path.read_bytes(), [], 4      # after the length of the longest token
    try:
        while start < len(data):
            score, size = struct.unpack_from("<fi", data, start)
            token, = struct.unpack_from(f"{size}s", data, start + 8)
            tokens.append((token, score))
            start += 8 + size
    except struct.error as error:
        raise ValueError(f"token {len(tokens)} at byte {start:,} is cut short, or this is no "
                         f"vocabulary of llama2.c: {error}") from error
    return tokens


def learned_tokens(scores: list[tuple[bytes, float]]) -> dict[str, int]:
    """Text -> id of all but the first 259. Raises ValueError for what cannot be exact."""
    for i in range(FIRST_BYTE, FIRST_TOKEN):
        name = f"<0x{i - FIRST_BYTE:02X}>"
        if scores[i:i + 1] and scores[i][0] != name.encode():
            raise ValueError(f"token {i} is not {name}; only SentencePiece's vocabularies with "
                             "byte_fallback are supported")
    learned = {token.decode(): i for i, (token, _) in enumerate(scores) if i >= FIRST_TOKEN}
    last = float("inf")
    for text, i in learned.items():
        if len(text) == 1:
            continue
        score = scores[i][1]
        reason = None
        if score >= last:
            reason = f"has the score {score}, no lower than the one before it, {last}"
        elif not text.isascii():
            reason = "joins non-ASCII characters; read these weights from a Hugging Face folder"
        elif (parts := join(text, learned)) != [text]:
            reason = f"cannot be reached: its characters are joined to {parts}"
        if reason:
            raise ValueError(f"token {i}, {text!r}, {reason}")
        last = score
    return learned


def join(text: str, ids: dict[str, int]) -> list[str]:
    """Byte-pair encoding by the textbook: the neighbours whose union has the lowest id first."""
    parts = list(text)
    while unions := [(ids[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                     if a in ids and b in ids and a + b in ids]:
        _, i = min(unions)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
