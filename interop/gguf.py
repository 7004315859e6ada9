"""
GGUF：llama.cpp 的文件，权重、尺寸与词表都在一个文件里。
GGUF, llama.cpp's single file of weights, sizes and vocabulary; Ollama and LM Studio run it, too.

    header      "GGUF", version, number of tensors, number of fields
    fields      llama.embedding_length = 576, tokenizer.ggml.tokens = ["!", ...], ...
    tensors     name, shape (last dimension first), type, offset of its bytes
    bytes       plain fp32 or fp16; or blocks of 32 or 256 small integers, each block with its scale

These architectures of llama.cpp compute what model/transformer.py and model/gpt2.py do:

    llama           dense, and experts without a shared one (Mixtral)
    qwen2           + biases on q, k and v
    qwen3           + norms on q and k;  qwen3moe: with experts
    bailingmoe      experts and shared ones (Ling);  bailingmoe2: + norms on q and k
    gpt2            model/gpt2.py

qwen2moe does not: it never normalises the weights of the chosen experts, and it puts a gate before
the shared one. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import closing
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import (GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, dequantize,
                  quantize)

from interop import (QKV, Piece, family_of, is_rotated, named_errors, rename, to_half_split,
                     to_interleaved)
from interop.vocabulary import SUBSTITUTE, from_gguf, to_gguf
from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, scale_frequencies
from runtime.files import replace_atomic
from runtime.log import Logger

BLOCK = 1 << 22         # weights that are unpacked at once, 16 MB in fp32

FAMILIES = {        # use_moe, with shared experts, qk_norm, attention_bias
    (False, False, False, False): "llama",
    (False, False, False, True): "qwen2",
    (False, False, True, False): "qwen3",
    (True, False, False, False): "llama",
    (True, False, True, False): "qwen3moe",
    (True, True, False, False): "bailingmoe",
    (True, True, True, False): "bailingmoe2",
}
ARCHITECTURES = (*dict.fromkeys(FAMILIES.values()), "gpt2")
# llama.cpp's converter reorders Llama's q and k to our order; these keep Hugging Face's.
HALF_SPLIT = ("qwen2", "qwen3", "qwen3moe", "bailingmoe2")
FUSED = ("gpt2", "bailingmoe2")             # q, k and v are one tensor
SQUARE = ("qwen2", "gpt2", "bailingmoe2")   # n_heads * head_dim = dim
BAILING = ("bailingmoe", "bailingmoe2")     # have a field for norm_topk_prob; never tie the head

# Our names -> theirs.
NAMES = {"tok_embeddings": "token_embd", "pos_embeddings": "position_embd", "norm": "output_norm",
         "output": "output"}
NAMES |= {f"layers.*.{ours}": f"blk.*.{theirs}" for ours, theirs in {
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
    "attention.wv": "attn_v", "attention.wo": "attn_output", "attention.wqkv": "attn_qkv",
    "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm", "ffn_norm": "ffn_norm",
    "ffn.w1": "ffn_gate", "ffn.w2": "ffn_down", "ffn.w3": "ffn_up", "ffn.router": "ffn_gate_inp",
    "ffn.shared.w1": "ffn_gate_shexp", "ffn.shared.w2": "ffn_down_shexp",
    "ffn.shared.w3": "ffn_up_shexp"}.items()}
STACKS = {f"layers.*.ffn.{w}": f"blk.*.ffn_{theirs}_exps.weight"        # (experts, ..., ...)
          for w, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up"))}
GPT2_NAMES = {ours: theirs for ours, theirs in NAMES.items() if "ffn.w3" not in ours} | {
    "layers.*.ffn.w1": "blk.*.ffn_up"}

# Settings that change what a model computes, with the values that this code has.
SUPPORTED = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,),
    "expert_gating_func": (1,),             # softmax
    "expert_weights_scale": (0.0, 1.0), "leading_dense_block_count": (0,),
    "expert_group_count": (0, 1), "attention.scale": (0.0,), "logit_scale": (0.0, 1.0),
}

# -- header ----------------------------------------------------------------------------------------

# Types of fields, as struct's letters.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
FLOAT32, STRING, ARRAY = 6, 8, 9


class Stored(NamedTuple):
    """A tensor in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]              # in torch's order
    begin: int                          # its first byte

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        if self.columns % block:
            raise ValueError(f"{self.kind.name} packs {block} weights, a row has {self.columns}")
        return self.columns // block * size

    @property
    def rows(self) -> int:
        return prod(self.shape) // self.columns


class Header:
    """
    Everything before the weights: architecture ("llama", ...), fields {name: value or list},
    tensors {name: Stored}.

    The package's GGUFReader makes several numpy arrays of each token: 8 s for the 152,000 of Qwen,
    where this takes 0.2 s. Raises ValueError for a broken file and for an unknown architecture.
    """

    def __init__(self, path):
        self.path, self.at = path, 0
        try:
            with open(path, "rb") as file, \
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
                self.parse()
                ends = [each.begin + each.rows * each.row_bytes for each in self.tensors.values()]
                if max(ends, default=0) > len(self.data):
                    raise ValueError(f"a tensor ends at byte {max(ends)} of {len(self.data)}")
        except (struct.error, ValueError, ArithmeticError, TypeError) as error:
            raise ValueError(f"{path} is cut short, or no readable GGUF file: {error}") from error
        if (n_parts := self.fields.get("split.count", 1)) > 1:
            raise ValueError(f"{path} is one of {n_parts} parts; join them: "
                             "llama-gguf-split --merge FIRST_PART WHOLE")
        self.architecture = self.fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is none of "
                             f"{', '.join(ARCHITECTURES)}")

    def parse(self):
        magic, version, n_tensors, n_fields = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, not b'GGUF', 2 or 3")
        self.fields, described, self.tensors = {}, [], {}
        for _ in range(n_fields):
            (name,), (kind,) = self.strings(1), self.numbers("I")
            values = self.array(*(self.numbers("IQ") if kind == ARRAY else (kind, 1)))
            self.fields[name] = values if kind == ARRAY else values[0]
        for _ in range(n_tensors):
            (name,), (n_dims,) = self.strings(1), self.numbers("I")
            described.append((name, *self.numbers(f"{n_dims}QIQ")))
        alignment = self.fields.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        for name, *shape, kind, offset in described:
            kind, shape = GGMLQuantizationType(kind), tuple(reversed(shape))
            self.tensors[name] = Stored(kind, shape, begin + offset)

    def numbers(self, kinds: str) -> tuple:
        values = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return values

    def strings(self, count: int) -> list[str]:
        data, at, size_of, found = self.data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            at = start + size_of(data, at)[0]
            found.append(data[start:at].decode())
        self.at = at
        return found

    def array(self, kind: int, count: int) -> list:
        if kind == STRING:
            return self.strings(count)
        if kind not in SCALARS:
            raise ValueError(f"a field is of the unknown type {kind}")
        values = self.numbers(f"{count}{SCALARS[kind]}")
        # 1e-5 in fp32 is 9.99999974e-06 in fp64. The shortest number equal in fp32 was meant.
        return [float(str(np.float32(x))) for x in values] if kind == FLOAT32 else list(values)

    def get(self, name: str, default=None):
        """The architecture's field of this name. Raises ValueError without one and a default."""
        value = self.fields.get(f"{self.architecture}.{name}", default)
        if value is None or isinstance(value, list):
            reason = "is missing" if value is None else "is a list, one value per layer"
            raise ValueError(f"{self.architecture}.{name} {reason}")
        return value


# -- config ----------------------------------------------------------------------------------------


def read_config(path) -> LMConfig:
    """The sizes. Raises ValueError for a broken file and for a feature that is not supported."""
    with named_errors(path):
        return config_of(Header(path))


def config_of(header: Header) -> LMConfig:
    get, tensors, is_gpt2 = header.get, header.tensors, header.architecture == "gpt2"
    dim, n_heads, hidden_dim = (get(name) for name in (
        "embedding_length", "attention.head_count", "feed_forward_length"))
    head_dim = get("attention.key_length", dim // n_heads)
    rope_theta = get("rope.freq_base", 10000.0)
    same = dict.fromkeys(("attention.value_length", "rope.dimension_count"), (head_dim,))
    for name, values in (SUPPORTED | same).items():
        if (value := get(name, values[0])) not in values:
            raise ValueError(f"{header.architecture}.{name} = {value!r} is not supported, only "
                             f"{' or '.join(map(repr, values))}")
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no tensor token_embd.weight")
    experts = {}
    if n_experts := get("expert_count", 0):
        hidden_dim = get("expert_feed_forward_length", hidden_dim)
        is_normed = get("expert_weights_norm", header.architecture not in BAILING)
        experts = {"use_moe": True, "n_routed_experts": n_experts, "norm_topk_prob": is_normed,
                   "num_experts_per_tok": get("expert_used_count"),
                   "n_shared_experts": get("expert_shared_count", 0)}
    return LMConfig(
        architecture="gpt2" if is_gpt2 else "llama", dim=dim, n_layers=get("block_count"),
        n_heads=n_heads, n_kv_heads=get("attention.head_count_kv", n_heads), head_dim=head_dim,
        hidden_dim=hidden_dim, vocab_size=tensors["token_embd.weight"].shape[0],
        max_seq_len=get("context_length"), rope_theta=rope_theta,
        rope_scaling=read_rope_scaling(header, rope_theta, head_dim),
        norm_eps=get(f"attention.layer_norm{'' if is_gpt2 else '_rms'}_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors, **experts)


def read_rope_scaling(header: Header, rope_theta: float, head_dim: int) -> dict | None:
    """Of Llama 3's four parameters the file has only the result: a divisor per frequency."""
    if "rope_freqs.weight" not in header.tensors:
        return None
    stored = header.tensors["rope_freqs.weight"]
    with open(header.path, "rb") as file:
        divisors = torch.from_numpy(read_rows(file, stored, 0, stored.rows))
    scaling = {"factor": divisors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    expected = rope_divisors(rope_theta, head_dim, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"rope_freqs.weight is not the result of {scaling}: not supported")
    return scaling


def rope_divisors(rope_theta: float, head_dim: int, scaling: dict):  # -> (K/2,)
    frequency = rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequency / scale_frequencies(frequency, **scaling)).float()


def architecture_of(config: LMConfig) -> str:
    """The architecture of llama.cpp that computes the same. Raises ValueError if there is none."""
    architecture = family_of(config, FAMILIES, "llama.cpp")
    if config.use_moe and not config.norm_topk_prob and architecture not in BAILING:
        raise ValueError(f"llama.cpp's {architecture} makes the weights of the chosen experts sum "
                         "to 1; this model has norm_topk_prob=False")
    if config.n_heads * config.head_dim != config.dim and architecture in SQUARE:
        raise ValueError(f"llama.cpp's {architecture} needs n_heads * head_dim = dim, "
                         f"not {config.n_heads} * {config.head_dim} and {config.dim}")
    if config.rope_scaling and architecture != "llama":
        raise ValueError(f"llama.cpp's {architecture} has no rope_scaling like Llama 3's")
    return architecture


def fields_of(config: LMConfig, architecture: str) -> dict:
    """What read_config reads, under the file's names."""
    is_gpt2 = architecture == "gpt2"
    fields = {
        "vocab_size": config.vocab_size, "context_length": config.max_seq_len,
        "embedding_length": config.dim, "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim, "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        f"attention.layer_norm{'' if is_gpt2 else '_rms'}_epsilon": config.norm_eps}
    if not is_gpt2:
        fields |= dict.fromkeys(("attention.key_length", "attention.value_length",
                                 "rope.dimension_count"), config.head_dim)
        fields["rope.freq_base"] = float(config.rope_theta)
    if config.use_moe:
        fields |= {"expert_count": config.n_routed_experts, "expert_gating_func": 1,
                   "expert_used_count": config.num_experts_per_tok,
                   "expert_feed_forward_length": config.hidden_dim}
    if architecture in BAILING:
        fields |= {"expert_shared_count": config.n_shared_experts,
                   "expert_weights_norm": config.norm_topk_prob}
    return {f"{architecture}.{name}": value for name, value in fields.items()}


# -- tensors ---------------------------------------------------------------------------------------


def names_of(config: LMConfig) -> dict[str, str]:
    if config.architecture == "gpt2":
        return GPT2_NAMES
    return NAMES | STACKS if config.use_moe else NAMES


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    header = Header(path)
    is_half_split = header.architecture in HALF_SPLIT
    with open(path, "rb") as file:          # not mapped: mapped pages would count as memory
        for source, stored in header.tensors.items():
            if source == "rope_freqs.weight":
                continue
            # Whole heads, because to_interleaved reorders the rows of a head.
            step = max(1, BLOCK // stored.columns // config.head_dim) * config.head_dim
            first = 0
            for name, expert, n_rows in parts_of(source, stored, config):
                for start in range(0, n_rows, step):
                    stop = min(start + step, n_rows)
                    tensor = torch.from_numpy(read_rows(file, stored, first + start, first + stop))
                    if is_half_split and is_rotated(name):
                        tensor = to_interleaved(tensor, config.head_dim)
                    # An open end, so that a tensor with too few rows has a wrong shape.
                    rows = slice(start, None if stop == n_rows else stop)
                    yield Piece(name, tensor, (*expert, rows), source)
                first += n_rows


def read_rows(file, stored: Stored, start: int, stop: int):  # -> (stop - start, columns) or (rows,)
    file.seek(stored.begin + start * stored.row_bytes)
    packed = np.fromfile(file, np.uint8, (stop - start) * stored.row_bytes)
    values = dequantize(packed.reshape(stop - start, stored.row_bytes), stored.kind)
    return values if len(stored.shape) > 1 else values.reshape(-1)


def parts_of(source: str, stored: Stored, config: LMConfig) -> list[tuple[str, tuple, int]]:
    """(our name, index of the expert or (), rows) of each weight that one of their tensors has."""
    name = rename(source, {theirs: ours for ours, theirs in names_of(config).items()})
    kv = config.n_kv_heads * config.head_dim
    parts = [(name, (), stored.rows)]
    if "attention.wqkv" in name:
        rows = config.n_heads * config.head_dim, kv, kv
        parts = [(name.replace("wqkv", part), (), n) for part, n in zip(QKV, rows)]
    elif source.endswith("_exps.weight"):
        n_rows = config.dim if name.endswith("w2") else config.hidden_dim
        parts = [(name, (e,), n_rows) for e in range(config.n_routed_experts)]
    if sum(n_rows for _, _, n_rows in parts) != stored.rows:
        raise ValueError(f"tensor {source} has the shape {stored.shape}, but should have "
                         f"{' + '.join(str(n_rows) for _, _, n_rows in parts)} rows")
    return parts


# -- vocabulary ------------------------------------------------------------------------------------


def read_tokenizer(path) -> Tokenizer:
    """Raises ValueError for a vocabulary that is not byte-level BPE, or cannot be exact here."""
    with named_errors(path):
        return from_gguf(Header(path).fields, Path(path))


def vocabulary_fields(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """What read_tokenizer reads."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the vocabulary has ids up to {tokenizer.vocab_size - 1}, the model rows "
                         f"for {vocab_size}")
    fields = to_gguf(tokenizer, vocab_size)
    if fields["tokenizer.ggml.pre"] == SUBSTITUTE:
        Logger("llama.cpp does not have the pattern of this vocabulary; the one written instead "
               "gives other ids where more than one space precedes a word, as in code")
    return fields


# -- writing ---------------------------------------------------------------------------------------

FILE_TYPES = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16,
              "q8_0": LlamaFileType.MOSTLY_Q8_0}


def write(model: Transformer, tokenizer: Tokenizer, path, dtype: str = "float16"):
    """Write the file, completely or not at all.

    dtype   of the matrices: float32, float16, or q8_0 (8.5 bits per weight: blocks of 32 with a
            scale); vectors, routers and positions stay fp32

    Raises ValueError for a model or a vocabulary that llama.cpp cannot run.
    """
    config, architecture = model.config, architecture_of(model.config)
    fields = fields_of(config, architecture) | vocabulary_fields(tokenizer, config.vocab_size) | {
        "general.file_type": int(FILE_TYPES[dtype]), "general.quantization_version": 2}

    def to_file(temporary):
        with closing(GGUFWriter(temporary, architecture)) as writer:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
                   str: writer.add_string, list: writer.add_array}
            for name, value in fields.items():
                add[type(value)](name, value)
            kinds = []
            for name, parts in their_tensors(model, architecture):
                shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                kinds.append(kind_of(name, shape, dtype))
                block, block_bytes = GGML_QUANT_SIZES[kinds[-1]]
                n_bytes = prod(shape) // block * block_bytes
                writer.add_tensor_info(name, shape, np.float32, n_bytes, kinds[-1])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (name, parts), kind in zip(their_tensors(model, architecture), kinds):
                values = torch.cat(parts).detach().float().cpu().numpy()
                largest = max(values.max(), -values.min())
                if kind == GGMLQuantizationType.F16 and largest > 65504:
                    raise ValueError(f"{name} reaches {largest:.3g}; fp16 ends at 65504")
                writer.write_tensor_data(quantize(values, kind))

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_atomic(Path(path), to_file)


def their_tensors(model: Transformer, architecture: str) -> Iterator[tuple[str, list]]:
    """Their names, and the weights of ours that each tensor concatenates."""
    config, names = model.config, names_of(model.config)

    def weight_of(name):
        weight = model.get_parameter(name)
        is_split = architecture in HALF_SPLIT and is_rotated(name)
        return to_half_split(weight, config.head_dim) if is_split else weight

    for name, _ in model.named_parameters():
        if architecture not in FUSED or not any(f"attention.{part}." in name for part in QKV):
            yield rename(name, names), [weight_of(name)]
        elif "attention.wq." in name:
            parts = [weight_of(name.replace("wq", part)) for part in QKV]
            yield rename(name.replace("wq", "wqkv"), names), parts
    if config.tie_embeddings and architecture in BAILING:
        yield "output.weight", [model.tok_embeddings.weight]
    if config.rope_scaling:
        divisors = rope_divisors(config.rope_theta, config.head_dim, config.rope_scaling)
        yield "rope_freqs.weight", [divisors]


def kind_of(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    is_exact = len(shape) == 1 or name.endswith(("ffn_gate_inp.weight", "position_embd.weight"))
    if dtype == "float32" or is_exact:
        return GGMLQuantizationType.F32
    packs = dtype == "q8_0" and shape[-1] % 32 == 0
    return GGMLQuantizationType.Q8_0 if packs else GGMLQuantizationType.F16
