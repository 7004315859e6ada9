"""
权重文件：自己的、Hugging Face 文件夹、GGUF、llama2.c 与 MiniMind，读进来，写出去。
Weight files, ours and other people's. Each module reads one format: read_config(path),
read_tokenizer(path), and read_pieces(path, config), the weights one tensor at a time. native.py,
hf.py and gguf.py also have write(model, tokenizer, path). checkpoint.py detects the format.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from model.config import LMConfig
from runtime.checkpoint import is_finite
from runtime.files import named_errors

QKV = ("wq", "wk", "wv")


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
    left, heads = {name: weight.numel() for name, weight in weights.items()}, []
    with named_errors(path), torch.no_grad():
        for name, tensor, where, source in pieces:
            if name == "output.weight" and model.config.tie_embeddings:     # stored twice
                heads.append((source, tensor))
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
        for source, head in heads:
            shared = model.tok_embeddings.weight
            if not torch.equal(shared, head.to(shared)):
                raise ValueError(f"tensor {source} differs from the embeddings, but the model's "
                                 "config says that they are tied")


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


def to_interleaved(weight, head_dim: int):  # (H * K, ...) -> (H * K, ...)
    """Rows of wq or wk, or gains of a q/k norm: from Hugging Face's order to ours and the paper's.

    RoPE rotates pairs of components: there x_i with x_{i + K/2}, here x_{2i} with x_{2i + 1}.

        x0 x1 x2 | x3 x4 x5    ->    x0 x3 | x1 x4 | x2 x5
    """
    if len(weight) % head_dim:
        return weight                   # a wrong shape, which `fill` reports
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def to_half_split(weight, head_dim: int):  # (H * K, ...) -> (H * K, ...)
    """The inverse of to_interleaved."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)


def check_supported(settings: dict, supported: dict[str, tuple]):
    """Raise ValueError for a setting with another value than those that this code computes."""
    for name, values in supported.items():
        if settings.get(name, values[0]) not in values:
            raise ValueError(f"{name} = {settings[name]!r} is not supported, only "
                             f"{' or '.join(map(repr, values))}")


def family_of(config: LMConfig, families: dict[tuple, str], library: str,
              activations=("silu",)) -> str:
    """The library's name for models that compute what this one does. Raises ValueError without one.

    families    (use_moe, with shared experts, qk_norm, attention_bias) -> name
    """
    if config.quantization:
        raise ValueError(f"the model is {config.quantization}; convert the one it was made from")
    if config.activation not in activations:
        raise ValueError(f"{library} has no such architecture with the activation "
                         f"{config.activation}, only with {' or '.join(activations)}")
    if config.architecture == "gpt2":
        return "gpt2"
    n_shared = config.n_shared_experts if config.use_moe else 0
    kind = config.use_moe, n_shared > 0, config.qk_norm, config.attention_bias
    if kind not in families:
        raise ValueError(f"{library} has no architecture with use_moe={config.use_moe}, "
                         f"n_shared_experts={n_shared}, qk_norm={config.qk_norm} and "
                         f"attention_bias={config.attention_bias}")
    return families[kind]
