"""
转换：任何能读的模型，写成 Hugging Face 文件夹、GGUF 或我们的 .pth；也可只留若干层，或量化。
Conversion: any model that can be read becomes a Hugging Face folder, a GGUF file or a .pth of ours; whole, quantised, or
with some of its layers only, as a student's start.

    python scripts/convert.py --weights out/full_dist_64.pth --out out/student_hf
    python scripts/convert.py --weights out/full_dist_64.pth --out out/student.gguf
    python scripts/convert.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2.pth
    python scripts/convert.py --weights out/full_dist_64.pth --out out/student_int4.pth --quantize int4
    python scripts/convert.py --student_from out/full_sft_128.pth --layers 0,3 --out out/two_layers.pth

The last is how DistilBERT's student starts (Sanh et al. 2019, https://arxiv.org/abs/1910.01108, Sec. 3): width, vocabulary
and some layers are the teacher's.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

# Run as `python scripts/convert.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from interop.checkpoint import empty_model, load_model, save_model
from model.quantize import quantize
from model.transformer import Transformer
from interop import Piece, fill
from runtime.args import checking_input, parse_args
from runtime.log import Logger

GGUF_TYPES = ("float32", "float16", "q8_0")
HF_TYPES = ("float32", "float16", "bfloat16")


def keep_layers(model: Transformer, layers: list[int]) -> Transformer:
    """A model of these layers only, in this order. Raises ValueError for one that is not there."""
    wrong = [i for i in layers if not 0 <= i < model.config.n_layers]
    if wrong or not layers:
        raise ValueError(f"--layers {','.join(map(str, layers))}: the model has layers 0 to {model.config.n_layers - 1}")

    def pieces():
        for name, weight in model.named_parameters():
            if name.startswith("layers."):
                _, number, rest = name.split(".", 2)
                for new, old in enumerate(layers):
                    if old == int(number):
                        yield Piece(f"layers.{new}.{rest}", weight, source=name)
            else:
                yield Piece(name, weight, source=name)

    weight = model.norm.weight
    student = empty_model(dataclasses.replace(model.config, n_layers=len(layers)), weight.device, weight.dtype)
    fill(student, pieces(), "the teacher")
    return student.eval()


def numbers(text: str) -> list[int]:
    """"0,2,4" -> [0, 2, 4]"""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers like 0,2,4") from None


def check(args):
    """What cannot go together, before anything is read."""
    kind = args.out.suffix if args.out.suffix in (".pth", ".gguf") else ""         # Qwen2.5-0.5B is a folder, too
    if args.out.suffix in (".bin", ".json", ".pt", ".safetensors"):
        raise ValueError(f"--out {args.out}: write FILE.pth, FILE.gguf, or a folder, for Hugging Face")
    if bool(args.student_from) != bool(args.layers):
        raise ValueError("--student_from needs --layers, and --layers a --student_from")
    if args.quantize and kind != ".pth":
        raise ValueError(f"--quantize is for our own --out FILE.pth; a GGUF file has --dtype {GGUF_TYPES[-1]}")
    allowed = {".pth": ("float32",), ".gguf": GGUF_TYPES, "": HF_TYPES}[kind]
    if args.dtype not in (None, *allowed):
        raise ValueError(f"--dtype {args.dtype}: {args.out} can have {', '.join(allowed)}")
    if args.out.exists() and args.out.is_dir() != (kind == ""):
        raise ValueError(f"--out {args.out} is there already, and is {'a folder' if args.out.is_dir() else 'no folder'}")
    if args.out.exists() and args.out.samefile(args.weights or args.student_from):
        raise ValueError(f"--out {args.out} is the model that is to be converted; name another file")
    if args.out.is_dir() and any(args.out.iterdir()):
        raise ValueError(f"--out {args.out} is not empty, and what another model left there might be read in place of this "
                         "one; name a new folder")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="PATH", help="model to convert, of any kind that model/checkpoint.py reads")
    source.add_argument("--student_from", metavar="PATH", help="model of which --layers are kept")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="FILE.pth, FILE.gguf, or a folder, for Hugging Face")
    add("--layers", type=numbers, default=None, metavar="0,2,4", help="layers that are kept of --student_from, from 0")
    add("--quantize", default=None, choices=["int8", "int4"], help="weights for inference, in a .pth: 8 bits a number, or 4")
    add("--dtype", default=None, choices=sorted({*GGUF_TYPES, *HF_TYPES}), help="of the weights; default: float32, in a GGUF "
                                                                              "file float16. q8_0 is GGUF's int8")
    args = parse_args(parser)

    with checking_input():
        check(args)
        model, tokenizer = load_model(args.weights or args.student_from)
        if args.layers:
            model = keep_layers(model, args.layers)
        if args.quantize:
            model = quantize(model, args.quantize)
        if args.out.suffix == ".pth":
            save_model(model, tokenizer, args.out)
        elif args.out.suffix == ".gguf":
            from interop import gguf

            gguf.write(model, tokenizer, args.out, args.dtype or "float16")
        else:
            from interop import hf

            hf.write(model, tokenizer, args.out, getattr(torch, args.dtype or "float32"))
    files = [args.out] if args.out.is_file() else args.out.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    Logger(f"{args.out}: {model.config}, {model.n_parameters():,} parameters, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
