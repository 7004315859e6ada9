"""
我们自己的格式：.pth 是纯 fp32 状态字典，旁边的 .json 记着模型尺寸与分词器。
Our own format: the .pth is a plain fp32 state dict; the .json beside it has the model's sizes, the
name of its vocabulary file, and for adapters their settings and the base that they adapt.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from interop import Piece
from model.config import LMConfig
from model.lora import lora_state
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime.checkpoint import is_finite, load_verified
from runtime.errors import FileError
from runtime.files import file_crc32, named_errors, replace_atomic, write_json
from runtime.processes import full_tensor, is_main_process

DESCRIPTION = "archive/about.json"      # record of the .pth: what the .json beside it must say


def write(model: Transformer, tokenizer: Tokenizer, path):
    """Write the three files, the weights last. All processes call this and the main one writes; a
    sharded model is gathered one tensor at a time. Raises ValueError, before anything is replaced,
    for a weight with NaN or infinity."""
    state = {}
    for name, weight in (lora_state(model) if model.adapted else model.state_dict()).items():
        weight = full_tensor(weight)
        if not is_finite(weight):
            raise FileError(f"{name} holds NaN or infinity; {path} stays as it was saved before")
        if is_main_process():       # int8 and int4 stay
            state[name] = (weight.float() if weight.is_floating_point() else weight).cpu()
    if not is_main_process():
        return
    if "output.weight" in state and model.config.tie_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]         # one tensor, stored once
    path = Path(path)
    vocabulary = path.parent / f"tokenizer-{tokenizer.sha256[:8]}.json"
    if not vocabulary.exists():
        tokenizer.save(vocabulary)
    about = {"config": dataclasses.asdict(model.config), "tokenizer": vocabulary.name}
    if model.adapted:
        base = os.path.relpath(model.adapted["base"], path.parent)
        about["lora"] = model.adapted | {"base": base}
    write_json(path.with_suffix(".json"), about)

    def to_file(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
        with zipfile.ZipFile(temporary, "a") as records:    # torch.load does not look at it
            records.writestr(zipfile.ZipInfo(DESCRIPTION), description(about, vocabulary))

    replace_atomic(path, to_file)


def description(about: dict, vocabulary: Path) -> str:
    """All that gives the weights their meaning. An adapter's base may move."""
    lora = {key: value for key, value in about.get("lora", {}).items() if key != "base"}
    return json.dumps([about["config"], lora, file_crc32(vocabulary)], sort_keys=True)


def read_config(path) -> LMConfig:
    return read_about(path)[0]


def read_tokenizer(path) -> Tokenizer:
    vocabulary = read_about(path)[1]
    if not vocabulary.exists():
        raise FileNotFoundError(f"no {vocabulary}, the vocabulary of {path}: copy it, too")
    return Tokenizer.load(vocabulary)


def read_about(path) -> tuple[LMConfig, Path, dict | None]:
    """The model's sizes, its vocabulary file, and the description of its adapters or None."""
    beside = Path(path).with_suffix(".json")
    if not beside.exists():
        raise FileNotFoundError(f"no {beside} beside the weights, with their sizes: copy it, too")
    with named_errors(beside):
        about = json.loads(beside.read_text(encoding="utf-8"))
        config, vocabulary = LMConfig.from_dict(about["config"]), beside.parent / about["tokenizer"]
        with suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(path) as records:
            if records.read(DESCRIPTION).decode() != description(about, vocabulary):
                raise ValueError(
                    f"it, or {vocabulary}, is not what was saved with {path}: it was edited or "
                    "damaged, or a save was interrupted. --resume writes all again")
        return config, vocabulary, about.get("lora")


def read_state(path) -> dict[str, torch.Tensor]:
    """A state dict that torch.save wrote; its tensors are read from the file when they are used."""
    state = load_verified(path)
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise ValueError(f"{path} is not a state dict {{name: tensor}}")
    return state


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    for name, tensor in read_state(path).items():
        yield Piece(name, tensor, source=name)
