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
from gguf import (GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter,
                  LlamaFileType, dequantize, get_tensor_name_map, quantize)

from interop import (CONCATENATED, FUSED, Piece, check_supported, family_of, fold, fused_weights,
                     named_errors, rename, report_cut, split_weights)
from interop.hf import names_of as hf_names
from interop.vocabulary import from_gguf, to_gguf
from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, scale_frequencies
from runtime.files import UNSIGNED, check_signature, replace_atomic, sign

# Not qwen2moe, which never normalises the weights of the chosen experts and gates the shared one.
FAMILIES = {                # what is written, by what it has beyond Llama
    "": "llama", "attention_bias": "qwen2", "qk_norm": "qwen3", "nope_layers": "smollm3",
    "rotary_dim": "phi3", "use_moe": "llama", "use_moe+qk_norm": "qwen3moe",
    "use_moe+shared": "bailingmoe"}
ARCHITECTURES = (*dict.fromkeys(FAMILIES.values()), "granite", "gpt2")
ARCHITECTURE_IDS = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
# llama.cpp's converter reorders Llama's q and k to our order; these keep Hugging Face's.
HALF_SPLIT = ("qwen2", "qwen3", "phi3", "qwen3moe")
SQUARE = ("qwen2", "gpt2", "phi3")      # n_heads * head_dim = dim

# The architecture's fields -> those of LMConfig.
SIZES = {"embedding_length": "dim", "block_count": "n_layers", "attention.head_count": "n_heads",
         "attention.head_count_kv": "n_kv_heads", "attention.key_length": "head_dim",
         "attention.value_length": "head_dim", "feed_forward_length": "hidden_dim",
         "context_length": "max_seq_len", "rope.dimension_count": "rotary_dim",
         "rope.freq_base": "rope_theta", "attention.layer_norm_epsilon": "norm_eps",
         "attention.layer_norm_rms_epsilon": "norm_eps"}
MOE_SIZES = SIZES | {
    "expert_count": "n_routed_experts", "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "hidden_dim", "expert_shared_count": "n_shared_experts",
    "expert_weights_norm": "norm_topk_prob"}

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
    """Where a tensor lies in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]              # in torch's order
    begin: int                          # its first byte
    n_bytes: int


class Header:
    """Everything before the weights: architecture, fields {name: value or list}, tensors {name:
    Stored}. The package's GGUFReader takes 8 s for the 152,000 tokens of Qwen, this 0.1 s."""

    def __init__(self, path):
        try:
            with open(path, "rb") as self.file:
                self.parse()
                end = max(each.begin + each.n_bytes for each in self.tensors.values())
                if end > (size := self.file.seek(0, 2)):
                    raise ValueError(f"a tensor ends at byte {end} of {size}")
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
        for name, *shape, kind, offset in described:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            self.tensors[name] = Stored(GGMLQuantizationType(kind), (*reversed(shape),),
                                        begin + offset, prod(shape) // block * block_bytes)

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


def read_tensor(path, stored: Stored) -> torch.Tensor:
    packed = np.fromfile(path, np.uint8, stored.n_bytes, offset=stored.begin)   # a map is memory
    values = dequantize(packed.reshape(*stored.shape[:-1], -1), stored.kind)
    return torch.from_numpy(values).view(stored.shape)


# -- config ----------------------------------------------------------------------------------------

def read_config(path) -> LMConfig:
    """The sizes. Raises ValueError for a broken file and for a feature that is not supported."""
    with named_errors(path):
        header = Header(path)
        return config_of(header, read_rope_scaling(path, header))


def config_of(header: Header, rope_scaling: dict | None) -> LMConfig:
    get, tensors, architecture = header.get, header.tensors, header.architecture
    supported = SUPPORTED | (FACTORS if architecture != "granite" else {})
    check_supported(header.fields, {f"{architecture}.{name}": values
                                    for name, values in supported.items()})
    use_moe = get("expert_count", 0) > 0
    sizes = {"n_kv_heads": get("attention.head_count")}
    if use_moe:
        sizes |= {"n_shared_experts": 0, "norm_topk_prob": architecture != "bailingmoe"}
    sizes |= {ours: get(theirs) for theirs, ours in (MOE_SIZES if use_moe else SIZES).items()
              if f"{architecture}.{theirs}" in header.fields}
    limits = [sizes.pop("max_seq_len"), get("attention.sliding_window", 0)]
    if "rope_factors_short.weight" in tensors:          # beyond it RoPE has other frequencies
        limits.append(get("rope.scaling.original_context_length"))
    every_fourth = range(3, sizes["n_layers"], 4)
    return LMConfig(
        architecture="gpt2" if architecture == "gpt2" else "llama", use_moe=use_moe,
        vocab_size=tensors["token_embd.weight"].shape[0], max_seq_len=min(filter(None, limits)),
        rope_scaling=rope_scaling, nope_layers=every_fourth if architecture == "smollm3" else (),
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors, **sizes)


def read_rope_scaling(path, header: Header) -> dict | None:
    """Of Llama 3's four parameters the file has only the result: a divisor per frequency. Phi's
    must be 1; it has others for longer contexts."""
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 1.0)) or 1.0
    if header.get("rope.scaling.type", "linear") == "linear" and factor != 1:
        return {"factor": factor}
    name = next((name for name in DIVISORS if name in header.tensors), None)
    if name is None:
        return None
    divisors = read_tensor(path, header.tensors[name])
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
    if config.use_moe and not config.norm_topk_prob and architecture != "bailingmoe":
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
    sizes = MOE_SIZES if config.use_moe else SIZES
    fields = {theirs: getattr(config, ours) for theirs, ours in sizes.items()}
    fields |= {"vocab_size": config.vocab_size, "rope.freq_base": float(config.rope_theta)}
    if {*(config.rope_scaling or {})} == {"factor"}:
        fields |= {"rope.scaling.type": "linear",
                   "rope.scaling.factor": float(config.rope_scaling["factor"])}
    if config.use_moe:
        fields["expert_gating_func"] = 1        # softmax
    return {f"{architecture}.{name}": value for name, value in fields.items()}


# -- tensors ---------------------------------------------------------------------------------------

def names_of(config: LMConfig, architecture: str) -> dict[str, str]:
    """Our names -> theirs: the package knows those of Hugging Face."""
    known = get_tensor_name_map(ARCHITECTURE_IDS[architecture], n_blocks=1)
    absent = [part for whole, parts in FUSED.items()
              for part in (parts if whole in CONCATENATED.get(architecture, ()) else [whole])]
    return {ours: name.replace(".0.", ".*.") for ours, theirs in hf_names(config).items()
            if ours.rpartition(".")[2] not in absent
            and (name := known.get_name(theirs.replace("*", "0"), [".weight"]))}


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
    ours = {theirs: ours for ours, theirs in names_of(config, header.architecture).items()}
    half_split = header.architecture in HALF_SPLIT
    for source, stored in header.tensors.items():
        if source not in DIVISORS:
            name, tensor = rename(source, ours), read_tensor(path, stored)
            yield from split_weights(name, tensor, source, config, half_split)


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
            for name, tensor in their_tensors(model, architecture):
                values = tensor.float().cpu().numpy()
                kind = kind_of(name, values.shape, dtype)
                largest = max(values.max(), -values.min())
                if kind == GGMLQuantizationType.F16 and largest > 65504:
                    raise ValueError(f"{name} reaches {largest:.3g}; fp16 ends at 65504")
                writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        sign(temporary)

    replace_atomic(Path(path), to_file)


def kind_of(name: str, shape: tuple, dtype: str) -> GGMLQuantizationType:
    if dtype == "float32" or len(shape) == 1 or name.endswith(EXACT):
        return GGMLQuantizationType.F32
    if dtype == "float16" or shape[-1] % 32:            # a block has 32 weights of one row
        return GGMLQuantizationType.F16
    return GGMLQuantizationType["Q8_0" if name in EIGHT_BITS else dtype.upper()]


def their_tensors(model: Transformer, architecture: str) -> Iterator[tuple[str, torch.Tensor]]:
    config, names = model.config, names_of(model.config, architecture)
    wholes = CONCATENATED.get(architecture, ())
    for name, weight in fused_weights(model, wholes, architecture in HALF_SPLIT):
        yield rename(name, names), weight
    if config.tie_embeddings and architecture == "bailingmoe":      # which never ties them
        yield "output.weight", model.tok_embeddings.weight.detach()
    if "high_freq_factor" in (config.rope_scaling or {}):
        divisors = rope_divisors(config.rope_theta, config.head_dim, config.rope_scaling)
        yield "rope_freqs.weight", divisors
