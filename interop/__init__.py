"""
权重文件：自己的、Hugging Face 文件夹、GGUF、llama2.c 与 MiniMind，读进来，写出去。
Weight files, ours and other people's. Each module reads one format: read_config(path),
read_tokenizer(path), and read_pieces(path, config), the weights one tensor at a time. native.py,
hf.py and gguf.py also have write(model, tokenizer, path). checkpoint.py detects the format.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from model.config import LMConfig
from runtime.checkpoint import is_finite
from runtime.files import named_errors
from runtime.log import Logger

FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}       # what some families concatenate
CONCATENATED = {"gpt2": ("wqkv",), "phi3": ("wqkv", "w13")}


class Piece(NamedTuple):
    """A tensor that fills one of our weights, or a part of it, such as one expert of a stack."""

    name: str                           # our name, as in model.state_dict()
    tensor: torch.Tensor
    where: tuple | int | slice = ()     # index of the part; () is the whole weight
    source: str = ""                    # its name in the file, for error messages


def fill(model, pieces: Iterable[Piece], path):
    """Copy the pieces into the model's weights, in its dtype. Raises ValueError with the file and
    the tensor for an unknown name, another shape, NaN or infinity, a second or missing tensor, and
    a head that differs from the embeddings with which the model shares it."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())  # a tied weight once
    left, head = {name: weight.numel() for name, weight in weights.items()}, None
    with named_errors(path), torch.no_grad():
        for name, tensor, where, source in pieces:
            if name == "output.weight" and model.config.tie_embeddings:     # stored twice
                head = tensor
                continue
            if name not in weights:
                raise ValueError(f"tensor {source} has no place in a model of {model.config}")
            place = weights[name][where]
            if place.shape != tensor.shape:
                raise ValueError(f"tensor {source} has the shape {tuple(tensor.shape)}, but {name} "
                                 f"of a model of {model.config} has {tuple(place.shape)}")
            place.copy_(tensor)
            if not is_finite(place):
                raise ValueError(f"tensor {source} holds NaN or infinity")
            left[name] -= place.numel()
        if wrong := [name for name, count in left.items() if count]:
            raise ValueError(f"missing or repeated: {', '.join(wrong[:5])} ({len(wrong)} in all)")
        shared = model.tok_embeddings.weight
        if head is not None and not torch.equal(shared, head.to(shared)):
            raise ValueError("the head differs from the embeddings, to which it is tied")


def rename(name: str, table: dict[str, str]) -> str:
    """A tensor's name in another format. The table may leave out .weight; * is the layer's number:

        rename("blk.7.attn_q.bias", {"blk.*.attn_q": "layers.*.attention.wq"})
        -> "layers.7.attention.wq.bias"

    An unknown name is returned unchanged; `fill` reports it.
    """
    number = re.search(r"\.(\d+)\.", name)
    pattern = re.sub(r"\.\d+\.", ".*.", name, count=1)
    stem, dot, kind = pattern.rpartition(".")
    found = table.get(pattern) or (table[stem] + dot + kind if stem in table else pattern)
    return found.replace("*", number[1]) if number else found


def is_rotated(name: str) -> bool:
    """Whether a weight's rows are the components that RoPE rotates in pairs."""
    return re.search(r"attention\.(wq|wk|q_norm|k_norm)\.", name) is not None


def to_interleaved(weight, head_dim: int, rotary_dim: int | None = None, pairs=(2, -1)):
    # (H * K, ...) -> (H * K, ...)
    """Rows of wq or wk, or gains of a q/k norm: from Hugging Face's order to ours and the paper's.

    RoPE rotates pairs of components: there x_i with x_{i + K/2}, here x_{2i} with x_{2i + 1}.

        x0 x1 x2 | x3 x4 x5    ->    x0 x3 | x1 x4 | x2 x5

    rotary_dim: of a head so many components are rotated, the first ones; None: all
    """
    if len(weight) % head_dim:
        return weight                   # a wrong shape, which `fill` reports
    rotated, rest = weight.unflatten(0, (-1, head_dim)).tensor_split([rotary_dim or head_dim], 1)
    rotated = rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat([rotated, rest], dim=1).flatten(0, 1)


def to_half_split(weight, head_dim: int, rotary_dim: int | None = None):
    """The inverse of to_interleaved."""
    return to_interleaved(weight, head_dim, rotary_dim, pairs=(-1, 2))


def fused_weights(model, wholes, half_split: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's weights, concatenated to the `wholes` of FUSED, half_split as Hugging Face's."""
    config = model.config

    def weight_of(name):
        weight = model.get_parameter(name).detach()
        is_reordered = half_split and is_rotated(name)
        return to_half_split(weight, config.head_dim, config.rotary_dim) if is_reordered else weight

    for name, _ in model.named_parameters():
        part = name.split(".")[-2]
        whole = next((whole for whole in wholes if part in FUSED[whole]), None)
        if whole is None:
            yield name, weight_of(name)
        elif part == FUSED[whole][0]:
            parts = [weight_of(name.replace(part, each)) for each in FUSED[whole]]
            yield name.replace(part, whole), torch.cat(parts)


def split_weights(name: str, tensor, source: str, config: LMConfig,
                  half_split: bool) -> Iterator[Piece]:
    """The inverse, for one tensor. The last part takes the rest, so that `fill` reports a tensor of
    another size."""
    query, kv = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
    ends = {"wqkv": [query, query + kv], "w13": [config.hidden_dim]}
    whole = next((whole for whole in ends if f".{whole}." in name), None)
    names = [name.replace(whole, part) for part in FUSED[whole]] if whole else [name]
    for name, rows in zip(names, tensor.tensor_split(ends.get(whole, [])), strict=True):
        if half_split and is_rotated(name):
            rows = to_interleaved(rows, config.head_dim, config.rotary_dim)
        yield Piece(name, rows, source=source)


def fold(pieces: Iterable[Piece], config: LMConfig, embedding=1.0, attention=1.0, residual=1.0,
         logits=1.0) -> Iterator[Piece]:
    """The pieces of a model whose layers use factors, as weights that need none; in fp32.

        embedding   factor of the embeddings, not of the head that may share them
        attention   factor of the part of q . k that RoPE rotates, beside our 1 / sqrt(head_dim)
        residual    factor of what attention and FFN add to the residual stream
        logits      factor of the logits
    """
    factors = {"tok_embeddings": embedding, "output": embedding, "norm": logits / embedding,
               "wo": residual, "w2": residual, "q_norm" if config.qk_norm else "wq": attention}
    for piece in pieces:
        part = piece.name.rpartition(".")[0].rpartition(".")[2]
        if (factor := factors.get(part, 1.0)) != 1.0:
            tensor = piece.tensor.float()
            if part in ("wq", "q_norm"):
                has_rope = int(piece.name.split(".")[1]) not in config.nope_layers
                component = torch.arange(len(tensor)) % config.head_dim
                rotated = component < config.rotary_dim * has_rope
                factor = torch.where(rotated, factor, 1.0).view(-1, *[1] * (tensor.dim() - 1))
            piece = piece._replace(tensor=tensor * factor)
        yield piece


def report_cut(path, config: LMConfig, length: int):
    """Log that a model reads fewer tokens than its file says."""
    if config.max_seq_len < length:
        Logger(f"{path}: the context is {config.max_seq_len:,} of {length:,} tokens; beyond it "
               "attention has a sliding window, or RoPE other frequencies")


def check_supported(settings: dict, supported: dict[str, tuple]):
    """Raise ValueError for a setting with another value than those supported."""
    for name, values in supported.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {settings[name]!r} is not supported, only "
                             f"{' or '.join(map(repr, values))}")


def family_of(config: LMConfig, families: dict[str, str], library: str,
              activations=("silu",)) -> str:
    """The library's name for models that compute what this one does. Raises ValueError without one.

    families    fields of LMConfig in which the model is no plain Llama, with "+" between -> name
    """
    if config.quantization:
        raise ValueError(f"the model is {config.quantization}; convert the one it was made from")
    if config.activation not in activations:
        raise ValueError(f"{library} has no such architecture with the activation "
                         f"{config.activation}, only with {' or '.join(activations)}")
    if config.architecture == "gpt2":
        return "gpt2"
    parts = {"use_moe": config.use_moe, "shared": config.use_moe and config.n_shared_experts,
             "qk_norm": config.qk_norm, "attention_bias": config.attention_bias,
             "nope_layers": config.nope_layers,
             "rotary_dim": config.rotary_dim < config.head_dim}
    kind = "+".join(name for name, has in parts.items() if has)
    if kind not in families:
        raise ValueError(f"{library} has no architecture with {kind}")
    return families[kind]
