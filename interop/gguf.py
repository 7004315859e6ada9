"""
GGUF：llama.cpp 的文件，权重、尺寸与词表都在一个文件里。
GGUF, llama.cpp's file: weights, sizes and vocabulary in one. What is written here runs in llama.cpp, Ollama, LM Studio.

    header      "GGUF", version, how many tensors, how many fields
    fields      llama.embedding_length = 576, tokenizer.ggml.tokens = ["!", ...], ...
    tensors     name, sizes (the last one first), type, where its bytes begin
    bytes       plain fp32 or fp16; or blocks of 32 or 256 small numbers, each block with its own scale

Among llama.cpp's architectures (src/models/ there), these compute what model/transformer.py and model/gpt2.py do:

    llama           dense, and experts without a shared one (Mixtral)
    qwen2           + biases on q, k and v
    qwen3           + norms on q and k;  qwen3moe: with experts
    bailingmoe      experts and shared ones (Ling);  bailingmoe2: + norms on q and k
    gpt2            model/gpt2.py

Its qwen2moe is not among them: it never makes the weights of the chosen experts sum to 1, and puts a gate before the
shared one. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import closing
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType, dequantize, quantize

from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, stretched
from interop import Piece, halves, neighbours
from interop.vocabulary import from_gguf, to_gguf
from runtime.files import replace_atomic
from runtime.log import Logger

BLOCK = 1 << 22         # numbers that are unpacked at once, 16 MB in fp32

# Ours -> theirs.
NAMES = {"tok_embeddings": "token_embd", "pos_embeddings": "position_embd", "norm": "output_norm", "output": "output"}
LAYER_NAMES = {
    "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm",
    "ffn_norm": "ffn_norm", "ffn.w1": "ffn_gate", "ffn.w2": "ffn_down", "ffn.w3": "ffn_up",
    "ffn.router": "ffn_gate_inp",
    "ffn.shared.w1": "ffn_gate_shexp", "ffn.shared.w2": "ffn_down_shexp", "ffn.shared.w3": "ffn_up_shexp",
}
GPT2_LAYER_NAMES = {name: LAYER_NAMES[name] for name in ("attention_norm", "attention.wo", "ffn_norm", "ffn.w2")} | {
    "ffn.w1": "ffn_up"}
STACKS = {"ffn.w1": "ffn_gate_exps", "ffn.w2": "ffn_down_exps", "ffn.w3": "ffn_up_exps"}     # (experts, ..., ...)
QKV = ("attention.wq", "attention.wk", "attention.wv")

# llama.cpp's converter turns Llama's q and k into neighbours, which are ours; of these it keeps Hugging Face's order.
HALVES = ("qwen2", "qwen3", "qwen3moe", "bailingmoe2")
TURNED = re.compile(r"attention\.(wq|wk|q_norm|k_norm)\.")
FUSED = ("gpt2", "bailingmoe2")             # q, k and v are one tensor, attn_qkv
SQUARE = ("qwen2", "gpt2", "bailingmoe2")   # the heads together have as many numbers as dim
SHARING = ("bailingmoe", "bailingmoe2")     # these say whether the experts' weights sum to 1, and are never tied

FAMILIES = {        # use_moe, shared experts, qk_norm, attention_bias
    (False, False, False, False): "llama",
    (False, False, False, True): "qwen2",
    (False, False, True, False): "qwen3",
    (True, False, False, False): "llama",
    (True, False, True, False): "qwen3moe",
    (True, True, False, False): "bailingmoe",
    (True, True, True, False): "bailingmoe2",
}
ARCHITECTURES = (*dict.fromkeys(FAMILIES.values()), "gpt2")

# Fields that change what a model computes, with the values at which they do not.
NEUTRAL = {
    "rope.scaling.type": ("none",), "rope.scaling.factor": (1.0,), "rope.scale_linear": (1.0,),
    "expert_gating_func": (1,),             # softmax
    "expert_weights_scale": (0.0, 1.0), "leading_dense_block_count": (0,), "expert_group_count": (0, 1),
    "attention.scale": (0.0,), "logit_scale": (0.0, 1.0),
}

# -------------------------------------------------------------------------------------------------------------- header

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}     # as in struct
FLOAT32, STRING, ARRAY = 6, 8, 9


class Stored(NamedTuple):
    """A tensor in the file."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]              # as in torch
    begin: int                          # its first byte

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else 1

    @property
    def row_bytes(self) -> int:
        numbers, size = GGML_QUANT_SIZES[self.kind]
        if self.columns % numbers:
            raise ValueError(f"{self.kind.name} packs {numbers} numbers of a row at a time, a row has {self.columns}")
        return self.columns // numbers * size

    @property
    def rows(self) -> int:
        return prod(self.shape) // self.columns


class Header:
    """
    All that comes before the weights.

        architecture    "llama", "qwen2", ...
        fields          {name: number, text or list}
        tensors         {name: Stored}

    The package's own GGUFReader makes several numpy arrays of each word of the vocabulary, which takes 8 s for the
    152,000 of Qwen; this takes 0.2 s. Raises ValueError for a file that is cut short, or none of GGUF, or of an
    architecture that is not known here.
    """

    def __init__(self, path):
        self.path, self.at = path, 0
        try:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self.data:
                self.parse()
                end = max((each.begin + each.rows * each.row_bytes for each in self.tensors.values()), default=0)
                if end > len(self.data):
                    raise ValueError(f"the last tensor ends at byte {end:,} of {len(self.data):,}")
        except struct.error as error:
            raise ValueError(f"{path} is cut short, or no GGUF file: it ends before its weights begin") from error
        except (ValueError, ArithmeticError, TypeError) as error:                   # broken bytes may say anything
            raise ValueError(f"{path} is cut short, or no GGUF file that can be read here: {error}") from error
        if self.fields.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one of {self.fields['split.count']} parts; join them: "
                             "llama-gguf-split --merge FIRST_PART WHOLE")
        self.architecture = self.fields.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: architecture {self.architecture!r} is none of {', '.join(ARCHITECTURES)}")

    def parse(self):
        magic, version, n_tensors, n_fields = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it begins with {magic!r}, version {version}, not with b'GGUF', version 2 or 3")
        self.fields = {}
        for _ in range(n_fields):
            (name,) = self.strings(1)
            (kind,) = self.numbers("I")
            self.fields[name] = self.array(*self.numbers("IQ")) if kind == ARRAY else self.array(kind, 1)[0]

        described = {}
        for _ in range(n_tensors):
            (name,) = self.strings(1)
            (n_sizes,) = self.numbers("I")
            *sizes, kind, offset = self.numbers(f"{n_sizes}QIQ")
            described[name] = kind, tuple(reversed(sizes)), offset
        alignment = self.fields.get("general.alignment", 32)
        begin = -(-self.at // alignment) * alignment
        self.tensors = {}
        for name, (kind, shape, offset) in described.items():
            if kind not in GGML_QUANT_SIZES:
                raise ValueError(f"tensor {name} is of type {kind}, which the gguf package does not know")
            self.tensors[name] = Stored(GGMLQuantizationType(kind), shape, begin + offset)

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
            raise ValueError(f"a field is of type {kind}, which is not known here")
        values = self.numbers(f"{count}{SCALARS[kind]}")
        # 1e-5 in fp32 is 9.99999974e-06 in fp64; the shortest number that is the same in fp32 is what was meant.
        return [float(str(np.float32(value))) for value in values] if kind == FLOAT32 else list(values)

    def get(self, name: str, default=None):
        """The architecture's field of this name. Raises ValueError if it is missing and no default is given."""
        value = self.fields.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise ValueError(f"{self.architecture}.{name} is missing")
        if isinstance(value, list):
            raise ValueError(f"{self.architecture}.{name} is a list, a number for each layer, which is not supported")
        return value


# -------------------------------------------------------------------------------------------------------------- config


def read_config(path) -> LMConfig:
    """The sizes. Raises ValueError for a file that cannot be read, and for a feature that is not known here."""
    header = Header(path)
    try:
        return config_of(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def config_of(header: Header) -> LMConfig:
    get, tensors, gpt2 = header.get, header.tensors, header.architecture == "gpt2"
    for name, values in NEUTRAL.items():
        if (value := get(name, values[0])) not in values:
            raise ValueError(f"{header.architecture}.{name} = {value!r} is not supported, only "
                             f"{' or '.join(map(repr, values))}")
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no tensor token_embd.weight")

    dim, n_heads, hidden_dim = get("embedding_length"), get("attention.head_count"), get("feed_forward_length")
    head_dim, rope_theta = get("attention.key_length", dim // n_heads), get("rope.freq_base", 10000.0)
    for name in ("attention.value_length", "rope.dimension_count"):
        if get(name, head_dim) != head_dim:
            raise ValueError(f"{header.architecture}.{name} = {get(name)} where a head has {head_dim} numbers")
    experts = {}
    if n_experts := get("expert_count", 0):
        hidden_dim = get("expert_feed_forward_length", hidden_dim)
        experts = {"use_moe": True, "n_routed_experts": n_experts, "num_experts_per_tok": get("expert_used_count"),
                   "n_shared_experts": get("expert_shared_count", 0),
                   "norm_topk_prob": get("expert_weights_norm", header.architecture not in SHARING)}
    return LMConfig(
        architecture="gpt2" if gpt2 else "llama", dim=dim, n_layers=get("block_count"), n_heads=n_heads,
        n_kv_heads=get("attention.head_count_kv", n_heads), head_dim=head_dim, hidden_dim=hidden_dim,
        vocab_size=tensors["token_embd.weight"].shape[0], max_seq_len=get("context_length"), rope_theta=rope_theta,
        rope_scaling=read_rope_scaling(header, rope_theta, head_dim),
        norm_eps=get(f"attention.layer_norm{'' if gpt2 else '_rms'}_epsilon"),
        tie_embeddings="output.weight" not in tensors, qk_norm="blk.0.attn_q_norm.weight" in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors, **experts)


def read_rope_scaling(header: Header, rope_theta: float, head_dim: int) -> dict | None:
    """Of Llama 3's four numbers the file has only what they do: a divisor for each frequency of RoPE."""
    if "rope_freqs.weight" not in header.tensors:
        return None
    stored = header.tensors["rope_freqs.weight"]
    with open(header.path, "rb") as file:
        divisors = torch.from_numpy(read_rows(file, stored, 0, stored.rows))
    scaling = {"factor": divisors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    expected = rope_divisors(rope_theta, head_dim, scaling)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"rope_freqs.weight is not what {scaling} makes of RoPE, and no other scaling is supported")
    return scaling


def rope_divisors(rope_theta: float, head_dim: int, scaling: dict):  # -> (K/2,)
    frequency = rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequency / stretched(frequency, **scaling)).float()


def architecture_of(config: LMConfig) -> str:
    """The architecture of llama.cpp that computes what this model does. Raises ValueError if there is none."""
    if config.quantization:
        raise ValueError(f"a model in {config.quantization} is for inference here; write the one it was made from")
    shared = config.use_moe and config.n_shared_experts > 0
    architecture = FAMILIES.get((config.use_moe, shared, config.qk_norm, config.attention_bias))
    if config.architecture == "gpt2":
        architecture = "gpt2"
    if architecture is None:
        shared = f", n_shared_experts={config.n_shared_experts}" if config.use_moe else ""
        raise ValueError(f"llama.cpp has no architecture with use_moe={config.use_moe}{shared}, "
                         f"qk_norm={config.qk_norm} and attention_bias={config.attention_bias}")
    if config.use_moe and not config.norm_topk_prob and architecture not in SHARING:
        raise ValueError(f"llama.cpp's {architecture} makes the weights of the chosen experts sum to 1; "
                         "this model has norm_topk_prob=False")
    if config.n_heads * config.head_dim != config.dim and architecture in SQUARE:
        raise ValueError(f"llama.cpp's {architecture} needs n_heads * head_dim = dim, "
                         f"not {config.n_heads} * {config.head_dim} and {config.dim}")
    if config.rope_scaling and architecture != "llama":
        raise ValueError(f"llama.cpp's {architecture} has no rope_scaling of Llama 3's kind")
    return architecture


def fields_of(config: LMConfig, architecture: str) -> dict:
    """What read_config reads, under the file's names."""
    gpt2 = architecture == "gpt2"
    fields = {
        "vocab_size": config.vocab_size, "context_length": config.max_seq_len, "embedding_length": config.dim,
        "block_count": config.n_layers, "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads, "attention.head_count_kv": config.n_kv_heads,
        f"attention.layer_norm{'' if gpt2 else '_rms'}_epsilon": config.norm_eps}
    if not gpt2:
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
                   "rope.dimension_count": config.head_dim, "rope.freq_base": float(config.rope_theta)}
    if config.use_moe:
        fields |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
                   "expert_feed_forward_length": config.hidden_dim, "expert_gating_func": 1}
    if architecture in SHARING:
        fields |= {"expert_shared_count": config.n_shared_experts, "expert_weights_norm": config.norm_topk_prob}
    return {f"{architecture}.{name}": value for name, value in fields.items()}


# -------------------------------------------------------------------------------------------------------------- tensors


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    """Raises ValueError that names the tensor whose type the gguf package cannot unpack."""
    header = Header(path)
    with open(path, "rb") as file:          # not mapped: mapped pages would count as memory of this process
        for source, stored in header.tensors.items():
            if source == "rope_freqs.weight":
                continue
            # As many whole heads as fit, for neighbours() reorders the rows of a head.
            step = max(1, BLOCK // stored.columns // config.head_dim) * config.head_dim
            for name, expert, first, last in parts_of(source, stored, config, header):
                for start in range(first, last, step):
                    stop = min(start + step, last)
                    try:
                        numbers = torch.from_numpy(read_rows(file, stored, start, stop))
                    except NotImplementedError as error:
                        raise ValueError(f"{path}: tensor {source} is of type {stored.kind.name}, "
                                         "which the gguf package cannot unpack") from error
                    if is_turned(name, header.architecture) and len(numbers) % config.head_dim == 0:    # else: refused
                        numbers = neighbours(numbers, config.head_dim)
                    # Open at both ends, so that a tensor with too few rows does not fit either.
                    rows = slice(None if start == first else start - first, None if stop == last else stop - first)
                    yield Piece(name, numbers, (*expert, rows), source)


def read_rows(file, stored: Stored, start: int, stop: int) -> np.ndarray:  # -> (stop - start, columns), or (rows,)
    file.seek(stored.begin + start * stored.row_bytes)
    packed = np.fromfile(file, np.uint8, (stop - start) * stored.row_bytes).reshape(stop - start, stored.row_bytes)
    numbers = dequantize(packed, stored.kind)
    return numbers if len(stored.shape) > 1 else numbers.reshape(-1)


def parts_of(source: str, stored: Stored, config: LMConfig, header: Header):
    """(our name, index of the expert or none, first row, row after the last) of each weight in one of their tensors.
    A name that is not known goes through as it is: `fill` refuses it."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.(weight|bias)", source)
    layer, theirs, kind = match.groups() if match else (None, source, "")
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    if theirs in STACKS.values():
        if len(stored.shape) != 3 or stored.shape[0] != config.n_routed_experts:
            raise ValueError(f"{header.path}: tensor {source} has the shape {stored.shape}, "
                             f"which is no stack of {config.n_routed_experts} experts")
        size = stored.shape[1]
        for e in range(config.n_routed_experts):
            yield f"layers.{layer}.{ours_of(theirs, STACKS)}", (e,), e * size, (e + 1) * size
    elif theirs == "attn_qkv" and header.architecture in FUSED:
        if stored.rows != q + 2 * kv:
            raise ValueError(f"{header.path}: tensor {source} has the shape {stored.shape}, where q, k and v have "
                             f"{q} + {kv} + {kv} rows")
        for ours, first, last in zip(QKV, (0, q, q + kv), (q, q + kv, q + 2 * kv)):
            yield f"layers.{layer}.{ours}.{kind}", (), first, last
    elif layer is not None:
        yield f"layers.{layer}.{ours_of(theirs, layer_names(header.architecture))}.{kind}", (), 0, stored.rows
    else:
        yield f"{ours_of(theirs, NAMES)}.{kind}", (), 0, stored.rows


def ours_of(theirs: str, names: dict[str, str]) -> str:
    return next((ours for ours, name in names.items() if name == theirs), theirs)


def is_turned(name: str, architecture: str) -> bool:
    return architecture in HALVES and TURNED.search(name) is not None


def layer_names(architecture: str) -> dict[str, str]:
    return GPT2_LAYER_NAMES if architecture == "gpt2" else LAYER_NAMES


# ----------------------------------------------------------------------------------------------------------- vocabulary

# Arguments of from_gguf -> fields.
VOCABULARY = {"tokens": "tokenizer.ggml.tokens", "token_types": "tokenizer.ggml.token_type",
              "merges": "tokenizer.ggml.merges", "pre": "tokenizer.ggml.pre", "eos_id": "tokenizer.ggml.eos_token_id",
              "bos_id": "tokenizer.ggml.bos_token_id", "add_bos": "tokenizer.ggml.add_bos_token",
              "chat_template": "tokenizer.chat_template"}
OUR_PRE = "minidistill.tokenizer.pre"       # a field of our own, which others pass over


def read_tokenizer(path) -> Tokenizer:
    """Raises ValueError for a vocabulary that is no byte-level BPE, or whose ids cannot be the same here."""
    fields = Header(path).fields
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2":
        about = {"llama": "SentencePiece, whose tokens are no bytes", "bert": "WordPiece"}.get(kind, "not known here")
        raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r}, {about}; only 'gpt2', byte-level BPE, is read")
    given = {"merges": [], "pre": "default"} | {
        argument: fields[name] for argument, name in VOCABULARY.items() if name in fields}
    if missing := {"tokens", "token_types"} - given.keys():
        raise ValueError(f"{path} has no {VOCABULARY[min(missing)]}")
    try:
        return from_gguf(**given | {"pre": fields.get(OUR_PRE, given["pre"])}, path=Path(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def vocabulary_fields(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """What read_tokenizer reads.

    llama.cpp has its patterns built in, under names, and ours is not among them. Two patterns give the same ids where
    no token lies across a place at which only one of them cuts. Our tokens are pieces of our own pattern or parts of
    them, so the name to write is the one that cuts least: "superbpe", which cuts out numbers and no more. Of 1,100
    texts (English, Chinese, code, chat, noise) with a vocabulary of 6,400 the ids of 1,056 are equal; under "qwen2",
    which looks more like ours, 860, under "gpt-2" 460.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the vocabulary has ids up to {tokenizer.vocab_size - 1}, the model rows for {vocab_size}")
    written = to_gguf(tokenizer, vocab_size)
    own = {}
    if written["pre"] == "minidistill":
        own, written["pre"] = {OUR_PRE: written["pre"]}, "superbpe"
        Logger("llama.cpp does not know the pattern of this vocabulary; the one written instead gives other ids where "
               "more than one space comes before a word, as in code")
    return own | {"tokenizer.ggml.model": "gpt2"} | {
        VOCABULARY[argument]: value for argument, value in written.items() if value is not None}


# -------------------------------------------------------------------------------------------------------------- writing


FILE_TYPES = {"float32": LlamaFileType.ALL_F32, "float16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}


def write(model: Transformer, tokenizer: Tokenizer, path, dtype: str = "float16"):
    """Write the file, whole or not at all. dtype is float32, float16 or q8_0 (8.5 bits a number: blocks of 32 share a
    scale); vectors, routers and positions stay fp32.

    Raises ValueError for a model or a vocabulary that llama.cpp cannot run.
    """
    config = model.config
    architecture = architecture_of(config)
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(FILE_TYPES)}")
    fields = fields_of(config, architecture) | vocabulary_fields(tokenizer, config.vocab_size) | {
        "general.file_type": int(FILE_TYPES[dtype]), "general.quantization_version": 2}

    def to_file(beside):
        with closing(GGUFWriter(beside, architecture)) as writer:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string,
                   list: writer.add_array}
            for name, value in fields.items():
                add[type(value)](name, value)
            kinds = []
            for name, parts in their_tensors(model, architecture):
                shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                kinds.append(kind_of(name, shape, dtype))
                numbers, size = GGML_QUANT_SIZES[kinds[-1]]
                writer.add_tensor_info(name, shape, np.float32, prod(shape) // numbers * size, kinds[-1])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (name, parts), kind in zip(their_tensors(model, architecture), kinds):
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                numbers = whole.detach().float().cpu().numpy()
                largest = max(numbers.max(), -numbers.min())
                if kind == GGMLQuantizationType.F16 and largest > 65504:
                    raise ValueError(f"{name} reaches {largest:.3g}, and fp16 ends at 65504; write float32")
                writer.write_tensor_data(quantize(numbers, kind))

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    replace_atomic(Path(path), to_file)


def their_tensors(model: Transformer, architecture: str) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Their names, and the weights of ours that lie one behind the other in each."""
    config, weights = model.config, dict(model.named_parameters())
    names = layer_names(architecture)

    def turned(name, weight):
        return halves(weight, config.head_dim) if is_turned(name, architecture) else weight

    for name, weight in weights.items():
        layer, ours = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)", name).groups()
        stem, _, kind = ours.rpartition(".")
        if layer is None:
            yield f"{NAMES[stem]}.{kind}", [weight]
        elif ours in STACKS:
            yield f"blk.{layer}.{STACKS[ours]}.weight", [weight]
        elif stem in QKV and architecture in FUSED:
            if stem == QKV[0]:
                parts = [f"layers.{layer}.{part}.{kind}" for part in QKV]
                yield f"blk.{layer}.attn_qkv.{kind}", [turned(part, weights[part]) for part in parts]
        else:
            yield f"blk.{layer}.{names[stem]}.{kind}", [turned(name, weight)]
    if config.tie_embeddings and architecture in SHARING:
        yield "output.weight", [weights["tok_embeddings.weight"]]
    if config.rope_scaling:
        yield "rope_freqs.weight", [rope_divisors(config.rope_theta, config.head_dim, config.rope_scaling)]


def kind_of(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    if dtype == "float32" or len(shape) == 1 or name.endswith(("ffn_gate_inp.weight", "position_embd.weight")):
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % 32 == 0:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F16
