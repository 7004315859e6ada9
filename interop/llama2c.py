"""
llama2.c 的权重与词表：一个文件头，一串 fp32 张量；词表是旁边的另一个文件。
llama2.c's checkpoints (version 0) and vocabularies: https://github.com/karpathy/llama2.c, run.c
RoPE rotates the pairs (x0, x1) there as in model/transformer.py, so nothing is reordered.
"""

import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from interop import Piece, named_errors
from interop.vocabulary import merges_of
from model.config import LMConfig
from model.tokenizer import PLAIN, Tokenizer

HEADER_BYTES = 28       # 7 int32: dim, hidden, layers, heads, kv heads, vocab (< 0: untied), seq
MAGIC = 0x616B3432      # "ak42", the first number of later versions

# Where a text is split. Multi-byte characters are pieces: no tokens lead from bytes to them.
WORDS = r" *[\x00-\x1F\x21-\x7F]+| +|[^\x00-\x7F]"
LINES = r"[\x00-\x7F]+|[^\x00-\x7F]"    # where tokens contain inner spaces; 1.4 times as slow

FIRST_BYTE, FIRST_TOKEN = 3, 259    # <unk> <s> </s>, the bytes <0x00> ... <0xFF>, learned tokens


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
            raise ValueError(f"{size:,} bytes, but a llama2.c checkpoint of {config} has "
                             f"{expected:,}; it is cut short, or no such checkpoint")
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
    """(run.c's name, our name or "", shape) of each tensor in the file's order."""
    D, F, V, T = config.dim, config.hidden_dim, config.vocab_size, config.max_seq_len
    H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
    stacks = {
        "rms_att_weight": ("attention_norm", (D,)), "wq": ("attention.wq", (H * K, D)),
        "wk": ("attention.wk", (G * K, D)), "wv": ("attention.wv", (G * K, D)),
        "wo": ("attention.wo", (D, H * K)), "rms_ffn_weight": ("ffn_norm", (D,)),
        "w1": ("ffn.w1", (F, D)), "w2": ("ffn.w2", (D, F)), "w3": ("ffn.w3", (F, D))}
    yield "token_embedding_table", "tok_embeddings.weight", (V, D)
    for source, (name, shape) in stacks.items():
        for layer in range(config.n_layers):
            yield f"{source}[{layer}]", f"layers.{layer}.{name}.weight", shape
    yield "rms_final_weight", "norm.weight", (D,)
    yield "freq_cis_real, freq_cis_imag", "", (2, T, K // 2)
    if not config.tie_embeddings:
        yield "wcls", "output.weight", (V, D)


# -- vocabulary ------------------------------------------------------------------------------------

def read_tokenizer(path: str | Path) -> Tokenizer:
    """
    The vocabulary beside the weights: tok{vocab_size}.bin, or else tokenizer.bin. It is
    SentencePiece's BPE on characters: the neighbours whose union has the best score are joined.
    tiktoken does the same on bytes, with ids instead of scores, if each token of several characters
    has a lower score than the one before it, is ASCII, and is what joining its characters gives.
    """
    path = Path(path)
    vocab_size = read_config(path).vocab_size
    places = path.with_name(f"tok{vocab_size}.bin"), path.with_name("tokenizer.bin")
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no vocabulary for {path}: neither {places[0]} nor {places[1]}")
    with named_errors(file):
        scores = read_scores(file)
        if len(scores) != vocab_size:
            raise ValueError(f"{len(scores)} tokens, but {path} has {vocab_size}")
        ids = learned_tokens(scores)

    byte_ids = {bytes([value]): FIRST_BYTE + value for value in range(256)}
    spare = {f"<0x{ord(byte):02X}>": i for byte, i in byte_ids.items() if byte in ids}
    pattern = LINES if any(b" " in token.lstrip(b" ") for token in ids) else WORDS
    return Tokenizer(pattern, {"<unk>": 0, "<s>": 1, "</s>": 2} | spare, byte_ids | ids, path=file,
                     chat=PLAIN("<s>"), bos="<s>", end_of_text="<s>", prefix_space=True)


def read_scores(path: Path) -> list[tuple[bytes, float]]:
    """(token, score) in the order of the ids."""
    data, tokens, start = path.read_bytes(), [], 4      # after the length of the longest token
    while start + 8 <= len(data):
        score, size = struct.unpack_from("<fI", data, start)
        start += 8 + size
        tokens.append((data[start - size:start], score))
    if start != len(data):
        raise ValueError(f"token {len(tokens) - 1} is cut short, or this is no vocabulary")
    return tokens


def learned_tokens(scores: list[tuple[bytes, float]]) -> dict[bytes, int]:
    """Token -> id of all but the first 259. Raises ValueError for what cannot be exact."""
    if scores[FIRST_BYTE][0] != b"<0x00>" or scores[FIRST_TOKEN - 1][0] != b"<0xFF>":
        raise ValueError("tokens 3 .. 258 are not the bytes of SentencePiece's byte_fallback")
    ids = {token: i for i, (token, _) in enumerate(scores) if i >= FIRST_TOKEN}
    unions = {token: i for token, i in ids.items() if len(token.decode()) > 1}
    merges, last = merges_of(ids), float("inf")
    for token, i in unions.items():
        if scores[i][1] >= last or not token.isascii() or not {*merges.get(token, [b""])} <= {*ids}:
            raise ValueError(f"token {i}, {token.decode()!r}, cannot be exact in tiktoken: read "
                             "these weights from a Hugging Face folder")
        last = scores[i][1]
    return ids
