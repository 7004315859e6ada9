"""
载入与保存模型：路径是什么格式，看内容便知，不必声明。
Loading and saving models. The format of a path is detected, not declared: our own .pth with a .json
beside it, a Hugging Face folder, a .gguf, MiniMind's .pth without a .json, or llama2.c's .bin.
"""

import dataclasses
import hashlib
import importlib
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from interop import fill, native
from model.compile import compile_layers
from model.config import LMConfig
from model.gpt2 import GPT2
from model.lora import TARGETS, add_lora, load_lora, merge_lora, store_frozen
from model.qat import fake_quantize
from model.quantize import quantize
from model.tokenizer import DEFAULT, Tokenizer
from model.transformer import Transformer
from runtime.checkpoint import not_finite
from runtime.files import file_sha256, named_errors
from runtime.log import Logger
from runtime.processes import World, fully_shard, is_sharded

save_model = native.write

# Prefix of a weight file's name -> the script that writes it.
SCRIPTS = {"pretrain": "train_pretrain.py", "full_sft": "train_sft.py",
           "full_dist": "train_distillation.py", "full_onpolicy": "train_onpolicy.py"}


# -- a model and its tokenizer ---------------------------------------------------------------------

def load_model(path, device="cpu", dtype=torch.float32,
               is_teacher=False) -> tuple[Transformer, Tokenizer]:
    """The model at PATH in eval mode, and its tokenizer. Raises FileNotFoundError, and ValueError
    for what is cut short or cannot be reproduced exactly. Weights of ours that do not compute what
    they did when they were saved: an error for a teacher, else a warning."""
    reader = detect_format(path)
    if reader is native and (lora := native.read_about(path)[2]):
        with named_errors(path):
            return load_adapted(Path(path), lora, device, dtype, is_teacher)
    config = reader.read_config(path)
    model = empty_model(config, device, dtype)
    fill(model, reader.read_pieces(path, config), path)
    tokenizer = reader.read_tokenizer(path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, its weights "
                         f"only {config.vocab_size:,} rows: they do not belong together")
    model.n_tokens = tokenizer.vocab_size
    if model.n_tokens < config.vocab_size:
        Logger(f"{path}: {tokenizer.vocab_size:,} tokens and {config.vocab_size:,} rows; the rows "
               "after the last token are padding and get no logits")
    model.eval()
    if reader is native and (problem := native.changed_logits(model, path)):
        if is_teacher:
            raise ValueError(problem)
        Logger(f"*** {problem} ***")
    return model, tokenizer


def load_adapted(path: Path, lora: dict, device, dtype,
                 is_teacher) -> tuple[Transformer, Tokenizer]:
    """The base model of an adapter file, with the adapters merged into it."""
    base = path.parent / lora["base"]
    if not base.exists():
        raise FileNotFoundError(f"{path} holds adapters to the missing weights {base}")
    if detect_format(base) is native and native.read_about(base)[2]:
        raise ValueError(f"{path} holds adapters to {base}, which holds adapters itself")
    model, tokenizer = load_model(base, device, dtype, is_teacher)
    if sha256_of_model(base) != lora["base_sha256"]:
        raise ValueError(f"{path} holds adapters to other weights than those now at {base}")
    add_lora(model, lora["rank"], lora["alpha"], targets=lora["targets"])
    state = native.read_state(path)
    if wrong := not_finite(state):
        raise ValueError(f"{path}: tensor {wrong} holds NaN or infinity")
    load_lora(model, state)
    return merge_lora(model).eval(), tokenizer


def load_config(path) -> LMConfig:
    """The sizes of the model at PATH, without its weights."""
    return detect_format(path).read_config(path)


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of the model at PATH, or of a vocabulary file, ours or Hugging Face's."""
    path = Path(path)
    if path.suffix != ".json":
        return detect_format(path).read_tokenizer(path)
    if path.exists() and '"added_tokens"' in path.read_text(encoding="utf-8")[:1000]:
        return reader_of("vocabulary").read_tokenizer_json(path)
    return Tokenizer.load(path)


def new_model(config: LMConfig, vocabulary=None) -> tuple[Transformer, Tokenizer]:
    """A randomly initialised model of these sizes, with the vocab_size of the vocabulary: a
    Tokenizer, or a path for load_tokenizer; None: model/tokenizer.json."""
    tokenizer = vocabulary
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(vocabulary or DEFAULT)
    return build(dataclasses.replace(config, vocab_size=tokenizer.vocab_size)), tokenizer


def build(config: LMConfig) -> Transformer:
    """A randomly initialised model of these sizes."""
    model = (GPT2 if config.architecture == "gpt2" else Transformer)(config)
    return quantize(model, config.quantization) if config.quantization else model


def empty_model(config: LMConfig, device, dtype) -> Transformer:
    """A model with uninitialised weights, for `fill`; they take no memory until they are filled."""
    with torch.device("meta"), SkipInit():
        model = build(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()                 # to_empty gives each name its own tensor
    return model


class SkipInit(TorchFunctionMode):
    """Skips normal_, which has no effect on the meta device, but imports 800 modules there: one
    second and 78 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **kwargs)


# -- teachers and students -------------------------------------------------------------------------

def load_teacher(path, world: World, shard: str = "none",
                 compiled: bool = False) -> tuple[Transformer, Tokenizer]:
    """A frozen model (see `freeze`) and its tokenizer. Under zero3 it is sharded over processes,
    and need not fit on one device; otherwise it is whole on each."""
    device = "cpu" if shard == "zero3" else world.device
    model, tokenizer = load_model(path, device, is_teacher=True)
    Logger(f"teacher {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {path}")
    freeze(model, world)
    if shard == "zero3":
        fully_shard(model, world._replace(dtype=None), model.shard_units())
    elif compiled:
        compile_layers(model, world.device, world.dtype)
    return model, tokenizer


def freeze(model: Transformer, world: World) -> Transformer:
    """Eval mode, no gradients, and bf16 weights where matrix products run in bf16. In place."""
    if world.dtype == torch.bfloat16 and not is_sharded(model):
        model.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def prepare(model: Transformer, base, world: World, lora: dict | None = None,
            qat: str | None = None, grad_checkpoint=False, compiled=False) -> Transformer:
    """Prepare a model that was loaded from `base` for training, in place. lora: arguments of
    add_lora; save_model then writes the adapters alone. qat: the kind of fake_quantize."""
    Logger(f"student {model.config}: {model.n_parameters() / 1e6:.2f} M parameters, from {base}")
    model.train()
    model.grad_checkpoint = grad_checkpoint
    if lora:
        Logger(adapt(model, base, **lora))
        store_frozen(model, world.dtype)
    if qat:
        fake_quantize(model, qat)
        Logger(f"quantisation-aware training: {qat} layers, int8 embedding and head")
    if compiled:
        compile_layers(model, world.device, world.dtype)
    return model


def adapt(model: Transformer, base, rank: int, alpha: float | None, dropout: float,
          targets=None) -> str:
    """add_lora to a model that was loaded from `base`. If that holds adapters of the same rank,
    alpha and targets, these are trained on."""
    if str(base) == "none":
        raise ValueError("--lora_rank adapts pretrained weights: --weights or --student FILE")
    targets = targets or TARGETS
    wanted = {"rank": rank, "alpha": rank if alpha is None else alpha, "targets": list(targets)}
    lora = native.read_about(base)[2] if detect_format(base) is native else None
    weights = base
    if lora:
        if differ := [key for key, value in wanted.items() if lora[key] != value]:
            raise ValueError(f"{base} holds adapters of {differ[0]} {lora[differ[0]]}, not "
                             f"{wanted[differ[0]]}. Merge them into their weights, and adapt those:"
                             f" python scripts/convert.py --weights {base} --out NEW.pth")
        weights = Path(base).parent / lora["base"]
        model.load_state_dict(load_model(weights)[0].state_dict())      # without the adapters
    report = add_lora(model, rank, alpha, dropout, targets)
    if lora:
        load_lora(model, native.read_state(base))
    model.adapted = wanted | {"base": str(weights), "base_sha256": sha256_of_model(weights)}
    return report


def run_name(out_dir, prefix: str, model: Transformer) -> str:
    """OUT_DIR/PREFIX_DIM, with _moe, _lora or _qat: the beginning of the names of a run's files."""
    kind = model.config.moe_path + "_lora" * bool(model.adapted) + "_qat" * bool(model.qat)
    return f"{out_dir}/{prefix}_{model.config.dim}{kind}"


def sha256_of_model(path) -> str:
    """The hash of a weight file; of a folder, the hash of the names and hashes of its weights."""
    if Path(path).is_file():
        return file_sha256(path)
    lines = "".join(f"{file.name} {file_sha256(file)}" for file in weight_files(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def weight_files(path) -> list[Path]:
    """The file itself, or the weights in a Hugging Face folder."""
    path = Path(path)
    return [path] if path.is_file() else sorted(
        file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))


# -- formats ---------------------------------------------------------------------------------------

def weight_file(path: str) -> str:
    """PATH, or PATH.pth where only that exists."""
    alone = f"{path}.pth"
    return alone if Path(alone).exists() and not Path(path).exists() else path


def detect_format(path):
    """The module of interop/ that reads PATH. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.exists():
        script = next((SCRIPTS[prefix] for prefix in SCRIPTS if path.name.startswith(prefix)), None)
        advice = f"Train them: python {script} --help" if script else "Is the path right?"
        if re.fullmatch(r"[\w-]+/[\w.-]+", str(path)) and not path.parent.exists():
            advice = (f"A model of Hugging Face? Run: hf download {path} --local-dir {path.name}\n"
                      f"Then name the folder, {path.name}")
        raise FileNotFoundError(f"no weights at {path}. {advice}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} alone has no sizes and tokenizer; name its folder, {path.parent}")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{path} is a folder without a config.json: an incomplete download?")
        return reader_of("hf")
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            return reader_of("gguf")
    if path.suffix == ".bin":
        return reader_of("llama2c")
    if not path.with_suffix(".json").exists():
        minimind = reader_of("minimind")
        return minimind if minimind.MARK in native.read_state(path) else native
    return native


def reader_of(name: str):
    """Imported when it is needed: most runs need only the native format."""
    return importlib.import_module(f"interop.{name}")
