"""
权重文件：.pth 是纯 fp32 状态字典，旁边的 .json 记着模型尺寸与分词器。
Weight files: the .pth is a plain fp32 state dict; the .json beside it knows the model's sizes and its tokenizer.

    out/full_sft_64.pth      {name: tensor}, read with weights_only=True
    out/full_sft_64.json     {"config": {"dim": 64, ...}, "tokenizer": "tokenizer-1f0c2a9b.json"}
    out/tokenizer-....json   the vocabulary, so that a folder of weights can be moved as it is
"""

import dataclasses
import json
from pathlib import Path

import torch

from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime import UNREADABLE, write_whole


def save_model(model: Transformer, tokenizer: Tokenizer, path):
    """Write the three files, each whole or not at all, the weights last."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = path.parent / f"tokenizer-{tokenizer.sha256[:8]}.json"
    if not vocabulary.exists():
        tokenizer.save(vocabulary)
    about = json.dumps({"config": dataclasses.asdict(model.config), "tokenizer": vocabulary.name}, indent=2)
    state = {name: weight.detach().float().cpu() for name, weight in model.state_dict().items()}
    write_whole(path.with_suffix(".json"), lambda file: file.write(about.encode()))
    write_whole(path, lambda file: torch.save(state, file))


def new_model(config: LMConfig, vocabulary) -> tuple[Transformer, Tokenizer]:
    """A model that knows nothing, of these sizes but for the vocabulary, which the tokenizer file decides."""
    tokenizer = Tokenizer.load(vocabulary)
    return Transformer(dataclasses.replace(config, vocab_size=tokenizer.vocab_size)), tokenizer


def load_model(path, device="cpu") -> tuple[Transformer, Tokenizer]:
    """The model of a .pth in eval mode, and its tokenizer.

    Raises FileNotFoundError with the way to get the weights, and ValueError for a file that is cut short or does not
    fit the sizes beside it.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}. {how_to_make(path)}")
    config, vocabulary = read_about(path)
    tokenizer, model = Tokenizer.load(vocabulary), Transformer(config)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} is cut short, or no weight file at all ({type(error).__name__})") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:              # other names or shapes; no dict at all
        raise ValueError(f"{path} does not hold the weights of {model.config}: {error}") from error
    return model.to(device).eval(), tokenizer


def read_about(path) -> tuple[LMConfig, Path]:
    """The sizes of the model at PATH and its vocabulary file. Raises FileNotFoundError or ValueError, naming the file."""
    beside = Path(path).with_suffix(".json")
    if not beside.exists():
        raise FileNotFoundError(f"no {beside} beside the weights; it holds the model's sizes and its tokenizer's name")
    try:
        about = json.loads(beside.read_text())
        return LMConfig.from_dict(about["config"]), beside.parent / about["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside} does not describe a model: {type(error).__name__} {error}") from error


def how_to_make(path: Path) -> str:
    """The command that makes a missing weight file, told from its name."""
    script = next((script for prefix, script in (("pretrain", "train_pretrain.py"), ("full_sft", "train_sft.py"),
                                                 ("full_dist", "train_distillation.py"))
                   if path.name.startswith(prefix)), None)
    return f"Train them: python {script} --help" if script else "Is the path right?"
