"""
GGUF：llama.cpp 的文件，权重、尺寸与词表都在一个文件里。
GGUF, llama.cpp's single file of sizes, vocabulary and weights; Ollama and LM Studio run it, too.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from collections.abc import Iterator
from contextlib import closing
from math import prod, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, dequantize, quantize
from gguf.quants import quant_shape_to_byte_shape

from interop import (GATED, QKV, Piece, check_supported, family_of, fold, fused, is_rotated,
                     named_errors, rename, report_cut, split_fused, to_half_split, to_interleaved)
from interop.vocabulary import from_gguf, to_gguf
from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, scale_frequencies
from runtime.files import UNSIGNED, check_signature, replace_atomic, sign

BLOCK = 1 << 22         # weights that are unpacked at once, 16 MB in fp32

# Not qwen2moe, which never normalises the weights of the chosen experts and gates the shared one.
FAMILIES = {                # what is written, by what it has beyond Llama
    "": "llama", "attention_bias": "qwen2", "qk_norm": "qwen3", "nope_layers": "smollm3",
    "rotary_dim": "phi3", "use_moe": "llama", "use_moe+qk_norm": "qwen3moe",
    "use_moe+shared": "bailingmoe", "use_moe+shared+qk_norm": "bailingmoe2"}
ARCHITECTURES = (*dict.fromkeys(FAMILIES.values()), "granite", "gpt2")
# llama.cpp's converter reorders Llama's q and k to our order; these keep Hugging Face's.
HALF_SPLIT = ("qwen2", "qwen3", "phi3", "qwen3moe", "bailingmoe2")
FUSED = {"gpt2": (QKV,), "phi3": (QKV, GATED), "bailingmoe2": (QKV,)}       # concatenated weights
SQUARE = ("qwen2", "gpt2", "phi3", "bailingmoe2")   # n_heads * head_dim = dim
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
NO_UP = {ours: theirs for ours, theirs in NAMES.items() if not ours.endswith("ffn.w3")}
GPT2_NAMES = NO_UP | {"layers.*.ffn.w1": "blk.*.ffn_up"}
PHI3_NAMES = NO_UP | {"layers.*.ffn.w13": "blk.*.ffn_up"}

# Settings that change what a model computes, with the values that this code has.
SUPPORTED = {
    "rope.scaling.type": ("none", "linear", "longrope"),
    "expert_gating_func": (1,),             # softmax
    "expert_weights_scale": (0.0, 1.0), "leading_dense_block_count": (0,),
    "expert_group_count": (0, 1)}
FACTORS = {"attention.scale": (0.0,), "logit_scale": (0.0, 1.0)}      # those of Granite are folded
DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

# -- header ----------------------------------------------------------------------------------------

# Types of fields, as struct's letters.
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd"))
FLOAT32, STRING, ARRAY = 6, 8, 9


class Stored(NamedTuple):
    """A tensor in the file; a vector has one column."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]              # in torch's order
    rows: int
    row_bytes: int
    begin: int                          # its first byte


class Header:
    """Everything before the weights: architecture, fields {name: value or list}, tensors {name:
    Stored}. The package's GGUFReader takes 8 s for the 152,000 tokens of Qwen, this 0.1 s."""

    def __init__(self, path):
        try:
            with open(path, "rb") as self.file:
                self.parse()
                ends = [each.begin + each.rows * each.row_bytes for each in self.tensors.values()]
                size = self.file.seek(0, 2)
            if max(ends, default=0) > size:
                raise ValueError(f"a tensor ends at byte {max(ends)} of {size}")
        except (struct.error, ValueError, LookupError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path} is cut short, or no readable GGUF file: {error}") from error
        if (n_parts := self.fields.get("split.count", 1)) > 1:
            raise ValueError(f"{path} is one of {n_parts} parts; join: llama-gguf-split --merge")
        self.architecture = self.fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is none of {ARCHITECTURES}")

    def parse(self):
        magic, version, n_tensors, n_fields = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, not b'GGUF', 2 or 3")
        self.fields, described, self.tensors = {}, [], {}
        for _ in range(n_fields):
            name, (kind,) = self.string(), self.numbers("I")
            values = self.values(*(self.numbers("IQ") if kind == ARRAY else (kind, 1)))
            self.fields[name] = values if kind == ARRAY else values[0]
        for _ in range(n_tensors):
            name, (n_dims,) = self.string(), self.numbers("I")
            described.append((name, *self.numbers(f"{n_dims}QIQ")))
        alignment = self.fields.get("general.alignment", 32)
        begin = -(-self.file.tell() // alignment) * alignment
        for name, columns, *shape, kind, offset in described:
            shape, kind = (*reversed(shape), columns), GGMLQuantizationType(kind)
            columns = columns if len(shape) > 1 else 1
            row_bytes = quant_shape_to_byte_shape((columns,), kind)[0]
            self.tensors[name] = Stored(kind, shape, prod(shape) // columns, row_bytes,
                                        begin + offset)

    def numbers(self, kinds: str) -> tuple:
        return struct.unpack(f"<{kinds}", self.file.read(struct.calcsize(f"<{kinds}")))

    def string(self) -> str:
        return self.file.read(int.from_bytes(self.file.read(8), "little")).decode()

    def values(self, kind: int, count: int) -> list:
        if kind == STRING:
            return [self.string() for _ in range(count)]
        values = self.numbers(f"{count}{SCALARS[kind]}")
        # 1e-5 in fp32 is 9.99999974e-06 in fp64. The shortest number equal in fp32 was meant.
        return [float(str(np.float32(x))) for x in values] if kind == FLOAT32 else list(values)

    def get(self, name: str, *default):
        """The architecture's field of this name. KeyError without one and without a default."""
        name = f"{self.architecture}.{name}"
        return self.fields.get(name, *default) if default else self.fields[name]


# -- config ----------------------------------------------------------------------------------------

def read_config(path) -> LMConfig:
    """The sizes. Raises ValueError for a broken file and for a feature that is not supported."""
    with named_errors(path):
        header = Header(path)
        return config_of(header, read_rope_scaling(path, header))


def config_of(header: Header, rope_scaling: dict | None) -> LMConfig:
    get, tensors, architecture = header.get, header.tensors, header.architecture
    is_gpt2, n_layers = architecture == "gpt2", get("block_count")
    dim, n_heads = get("embedding_length"), get("attention.head_count")
    hidden_dim, head_dim = get("feed_forward_length"), get("attention.key_length", dim // n_heads)
    rotary_dim = get("rope.dimension_count", head_dim)
    supported = SUPPORTED | {"attention.value_length": (head_dim,)}
    supported |= FACTORS if architecture != "granite" else {}
    if architecture != "phi3":
        supported["rope.dimension_count"] = (head_dim,)
    check_supported(header.fields, {f"{architecture}.{name}": values
                                    for name, values in supported.items()})
    limits = [get("context_length"), get("attention.sliding_window", 0)]
    if "rope_factors_short.weight" in tensors:          # beyond it RoPE has other frequencies
        limits.append(get("rope.scaling.original_context_length"))
    experts = {}
    if n_experts := get("expert_count", 0):
        hidden_dim = get("expert_feed_forward_length", hidden_dim)
        is_normed = get("expert_weights_norm", architecture not in BAILING)
        experts = {"use_moe": True, "n_routed_experts": n_experts, "norm_topk_prob": is_normed,
                   "num_experts_per_tok": get("expert_used_count"),
                   "n_shared_experts": get("expert_shared_count", 0)}
    return LMConfig(
        architecture="gpt2" if is_gpt2 else "llama", dim=dim, n_layers=n_layers,
        n_heads=n_heads, n_kv_heads=get("attention.head_count_kv", n_heads), head_dim=head_dim,
        hidden_dim=hidden_dim, vocab_size=tensors["token_embd.weight"].shape[0],
        max_seq_len=min(filter(None, limits)),
        rope_theta=get("rope.freq_base", 10000.0), rope_scaling=rope_scaling, rotary_dim=rotary_dim,
        nope_layers=range(3, n_layers, 4) if architecture == "smollm3" else (),
        norm_eps=get(f"attention.layer_norm{'' if is_gpt2 else '_rms'}_epsilon"),
        tie_embeddings="output.weight" not in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors, **experts)


def read_rope_scaling(path, header: Header) -> dict | None:
    """Of Llama 3's four parameters the file has only the result: a divisor per frequency. Phi's
    must be 1; it has others for longer contexts."""
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 1.0)) or 1.0
    if header.get("rope.scaling.type", "linear") == "linear" and factor != 1:
        return {"factor": factor}
    name = next((name for name in DIVISORS if name in header.tensors), None)
    if name is None:
        return None
    stored = header.tensors[name]
    with open(path, "rb") as file:
        divisors = torch.from_numpy(read_rows(file, stored, 0, stored.rows))
    if name != "rope_freqs.weight":
        if torch.any(divisors != 1):
            raise ValueError(f"{name} is not 1 everywhere: not supported")
        return None
    scaling = {"factor": divisors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    expected = rope_divisors(header.get("rope.freq_base", 10000.0), 2 * len(divisors), scaling)
    if not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"rope_freqs.weight is not the result of {scaling}: not supported")
    return scaling


def rope_divisors(rope_theta: float, head_dim: int, scaling: dict):  # -> (K/2,)
    frequency = rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequency / scale_frequencies(frequency, **scaling)).float()


def architecture_of(config: LMConfig) -> str:
    """The architecture of llama.cpp that computes the same. Raises ValueError if there is none."""
    architecture = family_of(config, FAMILIES, "llama.cpp")
    if config.use_moe and not config.norm_topk_prob and architecture not in BAILING:
        raise ValueError(f"llama.cpp's {architecture} needs norm_topk_prob=True")
    if config.n_heads * config.head_dim != config.dim and architecture in SQUARE:
        raise ValueError(f"llama.cpp's {architecture} needs n_heads * head_dim = dim")
    scaling = config.rope_scaling or {}
    if "beta_fast" in scaling or "high_freq_factor" in scaling and architecture != "llama":
        raise ValueError(f"llama.cpp's {architecture} has no rope_scaling like this model's")
    if architecture == "smollm3" and config.nope_layers != [*range(3, config.n_layers, 4)]:
        raise ValueError(f"llama.cpp's smollm3 has no RoPE in every fourth layer, not in layers "
                         f"{config.nope_layers}")
    return architecture


def fields_of(config: LMConfig, architecture: str) -> dict:
    is_gpt2 = architecture == "gpt2"
    fields = {
        "vocab_size": config.vocab_size, "context_length": config.max_seq_len,
        "embedding_length": config.dim, "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim, "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        f"attention.layer_norm{'' if is_gpt2 else '_rms'}_epsilon": config.norm_eps}
    if not is_gpt2:
        fields |= dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim)
        fields |= {"rope.dimension_count": config.rotary_dim,
                   "rope.freq_base": float(config.rope_theta)}
    if {*(config.rope_scaling or {})} == {"factor"}:
        fields |= {"rope.scaling.type": "linear",
                   "rope.scaling.factor": float(config.rope_scaling["factor"])}
    if config.use_moe:
        fields |= {"expert_count": config.n_routed_experts, "expert_gating_func": 1,
                   "expert_used_count": config.num_experts_per_tok,
                   "expert_feed_forward_length": config.hidden_dim}
    if architecture in BAILING:
        fields |= {"expert_shared_count": config.n_shared_experts,
                   "expert_weights_norm": config.norm_topk_prob}
    return {f"{architecture}.{name}": value for name, value in fields.items()}


# -- tensors ---------------------------------------------------------------------------------------

def names_of(config: LMConfig, architecture: str) -> dict[str, str]:
    tables = {"gpt2": GPT2_NAMES, "phi3": PHI3_NAMES}
    return tables.get(architecture, NAMES) | (STACKS if config.use_moe else {})


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    check_signature(path)
    header = Header(path)
    get = header.get
    report_cut(path, config, get("context_length"))
    attention = get("attention.scale", 0) * sqrt(config.head_dim) or 1.0
    return fold(stored_pieces(path, header, config), config,
                embedding=get("embedding_scale", 1.0), residual=get("residual_scale", 1.0),
                logits=1 / (get("logit_scale", 0) or 1.0),
                attention=attention * get("rope.scaling.attn_factor", 1.0) ** 2)


def stored_pieces(path, header: Header, config: LMConfig) -> Iterator[Piece]:
    is_half_split = header.architecture in HALF_SPLIT
    with open(path, "rb") as file:          # not mapped: mapped pages would count as memory
        for source, stored in header.tensors.items():
            if source in DIVISORS:
                continue
            # Whole heads, because to_interleaved reorders the rows of a head.
            n_heads = BLOCK * stored.rows // prod(stored.shape) // config.head_dim
            step = max(1, n_heads) * config.head_dim
            first = 0
            for name, expert, n_rows in parts_of(source, stored, config, header.architecture):
                for start in range(0, n_rows, step):
                    stop = min(start + step, n_rows)
                    tensor = torch.from_numpy(read_rows(file, stored, first + start, first + stop))
                    if is_half_split and is_rotated(name):
                        tensor = to_interleaved(tensor, config.head_dim, config.rotary_dim)
                    # An open end, so that a tensor with too few rows has a wrong shape.
                    rows = slice(start, None if stop == n_rows else stop)
                    yield Piece(name, tensor, (*expert, rows), source)
                first += n_rows


def read_rows(file, stored: Stored, start: int, stop: int):  # -> (stop - start, columns) or (rows,)
    file.seek(stored.begin + start * stored.row_bytes)
    packed = np.fromfile(file, np.uint8, (stop - start) * stored.row_bytes)
    values = dequantize(packed.reshape(stop - start, stored.row_bytes), stored.kind)
    return values if len(stored.shape) > 1 else values.reshape(-1)


def parts_of(source: str, stored: Stored, config: LMConfig,
             architecture: str) -> list[tuple[str, tuple, int]]:
    """(our name, index of the expert or (), rows) of each weight that one of their tensors has."""
    ours = {theirs: ours for ours, theirs in names_of(config, architecture).items()}
    name = rename(source, ours)
    parts = [(part, (), n_rows) for part, n_rows in split_fused(name, stored.rows, config)]
    if source.endswith("_exps.weight"):
        n_rows = config.dim if name.endswith("w2") else config.hidden_dim
        parts = [(name, (e,), n_rows) for e in range(config.n_routed_experts)]
    if sum(n_rows for _, _, n_rows in parts) != stored.rows:
        raise ValueError(f"tensor {source} has the shape {stored.shape}, not that of {config}")
    return parts


def read_tokenizer(path) -> Tokenizer:
    """Raises ValueError for a vocabulary that is not byte-level BPE, or cannot be exact here."""
    with named_errors(path):
        return from_gguf(Header(path).fields, Path(path))


# -- writing ---------------------------------------------------------------------------------------

FILE_TYPES = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16,
              "q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_0": LlamaFileType.MOSTLY_Q4_0}
EIGHT_BITS = ("token_embd.weight", "output.weight")             # in q4_0, too
EXACT = ("ffn_gate_inp.weight", "position_embd.weight")         # matrices that stay fp32


def write(model: Transformer, tokenizer: Tokenizer, path, dtype: str = "float16"):
    """Write the file, completely or not at all. dtype of the matrices: float32, float16, q8_0 (8.5
    bits per weight) or q4_0 (4.5; embedding and head 8.5); vectors, routers and positions stay
    fp32.

    Raises ValueError for a model or a vocabulary that llama.cpp cannot run."""
    config, architecture = model.config, architecture_of(model.config)
    fields = fields_of(config, architecture) | to_gguf(tokenizer, config.vocab_size) | {
        "general.file_type": int(FILE_TYPES[dtype]), "general.quantization_version": 2}

    def to_file(temporary):
        with closing(GGUFWriter(temporary, architecture, use_temp_file=True)) as writer:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool,
                   str: writer.add_string, list: writer.add_array}
            writer.add_string("minidistill.checksum", UNSIGNED.decode())
            for name, value in fields.items():
                add[type(value)](name, value)
            for name, parts in their_tensors(model, architecture):
                values = torch.cat(parts).detach().float().cpu().numpy()
                is_exact = values.ndim == 1 or name.endswith(EXACT)
                packed = "q8_0" if name in EIGHT_BITS else dtype
                packs = dtype in ("q8_0", "q4_0") and values.shape[-1] % 32 == 0
                kind = (GGMLQuantizationType.F32 if dtype == "float32" or is_exact else
                        GGMLQuantizationType[packed.upper()] if packs else
                        GGMLQuantizationType.F16)
                largest = max(values.max(), -values.min())
                if kind == GGMLQuantizationType.F16 and largest > 65504:
                    raise ValueError(f"{name} reaches {largest:.3g}; fp16 ends at 65504")
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        sign(temporary)

    replace_atomic(Path(path), to_file)


def their_tensors(model: Transformer, architecture: str) -> Iterator[tuple[str, list]]:
    """Their names, and the weights of ours that each tensor concatenates."""
    config, names = model.config, names_of(model.config, architecture)

    def weight_of(name):
        weight = model.get_parameter(name)
        is_split = architecture in HALF_SPLIT and is_rotated(name)
        return to_half_split(weight, config.head_dim, config.rotary_dim) if is_split else weight

    for name, parts in fused(dict(model.named_parameters()), FUSED.get(architecture, ())):
        yield rename(name, names), [*map(weight_of, parts)]
    if config.tie_embeddings and architecture in BAILING:
        yield "output.weight", [model.tok_embeddings.weight]
    if "high_freq_factor" in (config.rope_scaling or {}):
        yield "rope_freqs.weight", [
            rope_divisors(config.rope_theta, config.head_dim, config.rope_scaling)]
