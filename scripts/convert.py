"""
转换：任何能读的模型，写成 Hugging Face 文件夹、GGUF 或我们的 .pth；也可只留若干层、量化，或取平均。
Conversion: any model that can be read becomes a Hugging Face folder, a GGUF file or a .pth of ours;
complete, quantised, or with some of its layers only; or several become the mean of their weights.

    python scripts/convert.py --weights out/full_dist_64.pth --out out/student_hf
    python scripts/convert.py --weights out/full_dist_64.pth --out out/student.gguf
    python scripts/convert.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2.pth
    python scripts/convert.py --weights out/full_dist_64.pth --out out/small.pth --quantize int4
    python scripts/convert.py --student_from out/full_sft_128.pth --layers 0,3 --out out/two.pth
    python scripts/convert.py --average out/a/full_sft_64.pth out/b/full_sft_64.pth --out out/ab.pth

--layers is how DistilBERT's student is initialised: with some of the teacher's layers. Sanh et al.
2019, https://arxiv.org/abs/1910.01108, Sec. 3. --average is a model soup: Wortsman et al. 2022,
https://arxiv.org/abs/2203.05482.
"""

import argparse
import copy
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from interop.checkpoint import load_model, save_model
from model.quantize import KINDS, quantize
from model.transformer import Transformer
from runtime.args import checking_input, make_parser, parse_args
from runtime.log import Logger

# --dtype of each kind of --out; "" is a Hugging Face folder.
DTYPES = {".pth": ("float32",), ".gguf": ("float16", "float32", "q8_0"),
          "": ("float32", "float16", "bfloat16")}


def keep_layers(model: Transformer, layers: list[int]) -> Transformer:
    """The model with these layers only, in this order. Raises ValueError for a missing one."""
    last = model.config.n_layers - 1
    if not all(0 <= i <= last for i in layers):
        raise ValueError(f"--layers {','.join(map(str, layers))}: the model has layers 0 to {last}")

    model.config = dataclasses.replace(model.config, n_layers=len(layers))
    model.layers = torch.nn.ModuleList(copy.deepcopy(model.layers[old]) for old in layers)
    for new, layer in enumerate(model.layers):
        layer.attention.layer = new
    return model


def average(paths: list[str]):
    """The mean of the weights of several models, and their tokenizer. Raises ValueError if their
    sizes or tokenizers differ, or for quantised weights."""
    models, tokenizers = zip(*map(load_model, paths))
    for path, model, tokenizer in zip(paths, models, tokenizers):
        if model.config.quantization or (model.config, tokenizer.sha256) != (
                models[0].config, tokenizers[0].sha256):
            raise ValueError(f"--average: {path} is quantised, or has other sizes or another "
                             f"tokenizer than {paths[0]}")
    states = [model.state_dict() for model in models]
    models[0].load_state_dict({name: torch.stack([state[name] for state in states]).mean(dim=0)
                               for name in states[0]})
    return models[0], tokenizers[0]


def numbers(text: str) -> list[int]:
    """"0,2,4" -> [0, 2, 4]"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers like 0,2,4") from None


def check(args) -> str:
    """The kind of --out. Raises ValueError for flags that conflict, before anything is read."""
    out, sources = args.out, args.average or [args.weights or args.student_from]
    kind = out.suffix if out.suffix in DTYPES else ""       # Qwen2.5-0.5B is a folder, too
    if out.suffix in (".bin", ".json", ".pt", ".safetensors"):
        raise ValueError(f"--out {out}: write FILE.pth, FILE.gguf, or a folder, for Hugging Face")
    if bool(args.student_from) != bool(args.layers):
        raise ValueError("--student_from needs --layers, and --layers a --student_from")
    if args.quantize and kind != ".pth":
        raise ValueError("--quantize is for our own --out FILE.pth; a GGUF file has --dtype q8_0")
    if args.dtype not in (None, *DTYPES[kind]):
        raise ValueError(f"--dtype {args.dtype}: {out} can have {', '.join(DTYPES[kind])}")
    if out.exists() and out.is_dir() != (kind == ""):
        raise ValueError(f"--out {out} exists and is {'a' if out.is_dir() else 'no'} folder")
    if out.exists() and any(map(out.samefile, sources)):
        raise ValueError(f"--out {out} is the model that is to be converted; name another file")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: files of another model might be read instead "
                         "of this one; name a new folder")
    return kind


def main():
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="PATH", help="model to convert, in any known format")
    source.add_argument("--student_from", metavar="PATH", help="model of which --layers are kept")
    source.add_argument("--average", nargs="+", metavar="PATH",
                        help="models of the same sizes: the result is the mean of their weights")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="FILE.pth, FILE.gguf, or a folder (Hugging Face)")
    add("--layers", type=numbers, default=None, metavar="0,2,4",
        help="layers of --student_from that are kept, counted from 0")
    add("--quantize", default=None, choices=[*KINDS],
        help="quantisation of a .pth, for inference: 8, 4, 3 or 2 bits per weight")
    add("--dtype", default=None, choices=sorted(set().union(*DTYPES.values())),
        help="dtype of the weights; default: float32, float16 in a GGUF file; q8_0 is GGUF's int8")
    args = parse_args(parser)

    with checking_input():
        kind = check(args)
        model, tokenizer = (average(args.average) if args.average else
                            load_model(args.weights or args.student_from))
        if args.layers:
            model = keep_layers(model, args.layers)
        if args.quantize:
            model = quantize(model, args.quantize)
        dtype = args.dtype or DTYPES[kind][0]
        if kind == ".pth":
            save_model(model, tokenizer, args.out)
        elif kind == ".gguf":
            from interop import gguf

            gguf.write(model, tokenizer, args.out, dtype)
        else:
            from interop import hf

            hf.write(model, tokenizer, args.out, getattr(torch, dtype))
    files = [args.out] if args.out.is_file() else args.out.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    Logger(f"{args.out}: {model.config}, {model.n_parameters():,} parameters, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
