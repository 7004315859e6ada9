"""
权重文件：自己的、Hugging Face 文件夹、GGUF、llama2.c 与 MiniMind，读进来，写出去。
Weight files, ours and other people's, in and out. Each module here knows one format and offers the same three functions:

    read_config(path)           -> LMConfig
    read_tokenizer(path)        -> Tokenizer
    read_pieces(path, config)   -> the weights as Pieces, one tensor in memory at a time

and native.py, hf.py and gguf.py also write(model, tokenizer, path). interop/checkpoint.py recognises which one a path needs.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch


class Piece(NamedTuple):
    """A tensor that fills one of our weights, or the part of it at an index, such as one expert of a stack."""

    name: str                           # ours, as in model.state_dict()
    tensor: torch.Tensor
    where: tuple | int | slice = ()     # () is all of it
    source: str = ""                    # its name in the file, for messages


def fill(model, pieces: Iterable[Piece], path):
    """Copy the pieces into the model's weights, in its own dtype, each weight exactly once.

    Raises ValueError that names the file and the tensor: one that the model has no place for, that has another shape,
    that comes twice, or that is missing.
    """
    weights = dict(model.named_parameters()) | dict(model.named_buffers())      # a tied weight is there once
    left = {name: weight.numel() for name, weight in weights.items()}
    with torch.no_grad():
        for name, tensor, where, source in pieces:
            if name not in weights:
                raise ValueError(f"{path}: tensor {source} ({name} here) has no place in a model of {model.config}")
            place = weights[name][where]
            if place.shape != tensor.shape:
                raise ValueError(f"{path}: tensor {source} has the shape {tuple(tensor.shape)}, where {name} of a model of "
                                 f"{model.config} has {tuple(place.shape)}")
            place.copy_(tensor)
            left[name] -= place.numel()
            if left[name] < 0:
                raise ValueError(f"{path}: {name} comes twice, the second time as {source}")
    missing = [name for name, numbers in left.items() if numbers]
    if missing:
        raise ValueError(f"{path}: nothing for {', '.join(missing[:5])}"
                         + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""))


def neighbours(weight, head_dim: int):  # (H * K, ...) -> (H * K, ...)
    """Rows of wq or wk, or gains of a norm, from Hugging Face's order to ours.

    RoPE turns pairs. Theirs are x_i and x_{i + K/2}, ours (and llama2.c's, and the paper's) x_{2i} and x_{2i + 1}:

        x0 x1 x2 | x3 x4 x5    ->    x0 x3 | x1 x4 | x2 x5
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(weight.shape)


def halves(weight, head_dim: int):  # (H * K, ...) -> (H * K, ...)
    """The other way round."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(weight.shape)
