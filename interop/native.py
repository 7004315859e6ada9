"""
我们自己的格式：.pth 是纯状态字典，通常是 fp32，旁边的 .json 记着模型尺寸与分词器。
Our own format: the .pth is a plain state dict, fp32 unless it was converted; the .json beside it
has the model's sizes, the name of its vocabulary file, and for adapters their settings and the base
that they adapt.
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
from model.transformer import KVCache, Transformer
from runtime.checkpoint import is_finite, load_verified
from runtime.errors import FileError
from runtime.files import file_crc32, named_errors, replace_atomic, write_json
from runtime.processes import full_tensor, is_main_process, is_sharded

DESCRIPTION = "archive/about.json"      # record of the .pth: what the .json beside it must say
LOGITS = "archive/logits.json"          # another: [up to 8 tokens, their logits_of]


def write(model: Transformer, tokenizer: Tokenizer, path, dtype=torch.float32):
    """Write the three files, the weights last. All processes call this and the main one writes; a
    sharded model is gathered one tensor at a time. Raises ValueError, before anything is replaced,
    for a weight with NaN or infinity."""
    state = {}
    for name, weight in (lora_state(model) if model.adapted else model.state_dict()).items():
        weight = full_tensor(weight)
        if not is_finite(weight):
            raise FileError(f"{name} holds NaN or infinity; {path} stays as it was saved before")
        if is_main_process():       # int8 and int4 stay
            state[name] = (weight.to(dtype) if weight.is_floating_point() else weight).cpu()
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
    records = {DESCRIPTION: description(about, vocabulary)}
    if not (model.adapted or model.qat or is_sharded(model)):   # others compute with other weights
        tokens = [*range(0, model.n_tokens, -(-model.n_tokens // min(8, model.config.max_seq_len)))]
        records[LOGITS] = json.dumps([tokens, logits_of(model, tokens)])

    def to_file(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
        with zipfile.ZipFile(temporary, "a") as archive:    # torch.load does not look at these
            for name, text in records.items():
                archive.writestr(zipfile.ZipInfo(name), text)

    replace_atomic(path, to_file)


def description(about: dict, vocabulary: Path) -> str:
    """All that gives the weights their meaning. An adapter's base may move."""
    lora = {key: value for key, value in about.get("lora", {}).items() if key != "base"}
    return json.dumps([about["config"], lora, file_crc32(vocabulary)], sort_keys=True)


@torch.no_grad()
def logits_of(model: Transformer, tokens: list[int]) -> list[float]:
    """The logits of these tokens after all of them. With a cache, compiled layers are bypassed."""
    is_training, ids = model.training, torch.tensor(tokens, device=model.norm.weight.device)
    cache = KVCache(model.config, 1, len(ids), ids.device, model.norm.weight.dtype)
    last = ids.new_tensor([len(ids) - 1])
    logits = model.eval()(ids, [len(ids)], at=last, cache=cache).logits[0, ids]
    model.train(is_training)
    return [float(f"{logit:.4g}") for logit in logits.tolist()]


def changed_logits(model: Transformer, path) -> str | None:
    """What is wrong if the weights at PATH give other logits than when they were saved, by more
    than 2 % of their range: bf16 changes 0.6 %, GELU instead of SiLU 4 to 6 %. None if nothing is.
    """
    with zipfile.ZipFile(path) as archive:
        if LOGITS not in archive.namelist():
            return None
        tokens, saved = json.loads(archive.read(LOGITS))
    gap = max(abs(now - then) for now, then in zip(logits_of(model, tokens), saved))
    if gap <= 0.02 * (max(saved) - min(saved)):
        return None
    return (f"{path}: these weights gave other logits when they were saved: was model/ edited? If "
            f"that is meant, save them anew: python scripts/convert.py --weights {path} --out "
            "NEW.pth")


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
