"""
转换：把能读的模型写成 Hugging Face 文件夹、GGUF 或我们的 .pth；可以量化，也可以取几个模型的平均。
Conversion: any model that can be read becomes a Hugging Face folder, a GGUF file or a .pth of ours,
which may be quantised; or several become the mean of their weights. A Modelfile for Ollama stands
beside a GGUF file, and a model card, README.md, in a folder.

    python scripts/convert.py --weights out/full_dist_64.pth --out out/student_hf
    python scripts/convert.py --weights out/full_dist_64.pth --out out/student.gguf --quantize q8_0
    python scripts/convert.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --out out/smollm2.pth
    python scripts/convert.py --weights out/full_dist_64.pth --out out/small.pth --quantize int4
    python scripts/convert.py --average out/a/full_sft_64.pth out/b/full_sft_64.pth --out out/ab.pth

--average is a model soup: Wortsman et al. 2022, https://arxiv.org/abs/2203.05482.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from evaluation.tables import markdown
from interop.checkpoint import load_model, save_model, weight_files
from model.quantize import KINDS, quantize
from model.tokenizer import ROLES, Tokenizer
from runtime.args import checking_input, make_parser, parse_args
from runtime.checkpoint import load_verified
from runtime.files import read_rows, write_text
from runtime.log import Logger

# --dtype and --quantize of each kind of --out; "" is a Hugging Face folder.
DTYPES = {".pth": ("float32", "bfloat16"), ".gguf": ("float16", "float32"),
          "": ("float32", "float16", "bfloat16")}
QUANTISED = {".pth": (*KINDS,), ".gguf": ("q8_0", "q4_0"), "": ()}


# Of these settings a model card tells, by the names of the resume file.
RECIPE = ("data", "weights", "student", "teacher", "teacher_cache", "alpha", "divergence",
          "temperature", "learning_rate", "samples per step", "total steps", "seed")


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


def modelfile(file: str, tokenizer: Tokenizer) -> str:
    """Ollama's recipe for a GGUF file: its chat as a template of Go's text/template, the end of a
    turn, and the default system message. https://docs.ollama.com/modelfile"""
    chat = tokenizer.chat
    turns = "{{ else if ".join(f'eq .Role "{role}" }}}}{getattr(chat, role)}' for role in ROLES)
    turns = turns.replace("{content}", "{{ .Content }}")
    system = f'SYSTEM """{chat.default_system}"""\n' if chat.default_system else ""
    return (f'FROM ./{file}\nTEMPLATE """{{{{ range .Messages }}}}{{{{ if {turns}{{{{ end }}}}'
            f'{{{{ end }}}}{chat.headers[1]}"""\n{system}'
            f'PARAMETER stop "{tokenizer.names[tokenizer.end_of_turn]}"\n')


def model_card(title: str, sources: list[str]) -> str:
    """What the files beside the weights tell: the recipe, and the last validation of the log."""
    parts = [f"---\nlibrary_name: transformers\n---\n# {title}, written by MiniDistill"]
    for path in sources:
        run, rows = path.removesuffix(".pth").removesuffix("_best"), [["from", Path(path).name]]
        if Path(f"{run}.resume").is_file():
            told = load_verified(f"{run}.resume")["progress"]["settings"]
            rows += [[key, str(told[key])] for key in RECIPE if told.get(key) not in (None, [])]
        scores = [row for row in read_rows(Path(f"{run}.jsonl"), "step") if "val_" in str([*row])]
        rows += [[key, str(round(value, 4))] for row in scores[-1:] for key, value in row.items()]
        parts += [markdown(rows, "ll")]
    parts += ["The licences of the data, the teacher and the initial weights apply.\n"]
    return "\n\n".join(parts)


def check(args) -> str:
    """The kind of --out. Raises ValueError for flags that conflict, before anything is read."""
    out, sources = args.out, args.average or [args.weights]
    kind = out.suffix if out.suffix in DTYPES else ""       # Qwen2.5-0.5B is a folder, too
    if out.suffix in (".bin", ".json", ".pt", ".safetensors"):
        raise ValueError(f"--out {out}: write FILE.pth, FILE.gguf, or a folder, for Hugging Face")
    for flag, known in (("dtype", DTYPES[kind]), ("quantize", QUANTISED[kind])):
        if vars(args)[flag] not in (None, *known):
            raise ValueError(f"--{flag} {vars(args)[flag]}: {out} can have "
                             f"{', '.join(known) or 'none'}")
    if kind == "" and out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"--out {out} is a file, or not empty: name a new folder")
    if kind and out.exists() and (out.is_dir() or any(map(out.samefile, sources))):
        raise ValueError(f"--out {out} is a folder, or is to be converted itself: name a new file")
    return kind


def main():
    parser = make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", metavar="PATH", help="model to convert, in any known format")
    source.add_argument("--average", nargs="+", metavar="PATH",
                        help="models of the same sizes: the result is the mean of their weights")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="FILE.pth, FILE.gguf, or a folder (Hugging Face)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--quantize", default=None, choices=[each for of in QUANTISED.values() for each in of],
        help="quantisation, for inference: of a .pth 8, 4, 3 or 2 bits per weight; of a GGUF file "
             "8.5 (q8_0) or 4.5 (q4_0)")
    add("--dtype", default=None, choices=sorted(set().union(*DTYPES.values())),
        help="dtype of the weights; default: float32, float16 in a GGUF file")
    args = parse_args(parser)

    with checking_input():
        kind = check(args)
        model, tokenizer = average(args.average) if args.average else load_model(args.weights)
        if args.quantize in KINDS:
            model = quantize(model, args.quantize)
        dtype = args.dtype or DTYPES[kind][0]
        if kind == ".pth":
            save_model(model, tokenizer, args.out, getattr(torch, dtype))
        elif kind == ".gguf":
            from interop import gguf

            gguf.write(model, tokenizer, args.out, args.quantize or dtype)
            write_text(args.out.with_suffix(".Modelfile"), modelfile(args.out.name, tokenizer))
        else:
            from interop import hf

            hf.write(model, tokenizer, args.out, getattr(torch, dtype))
            title = f"{model.config}, {model.n_parameters():,} parameters"
            write_text(args.out / "README.md", model_card(title, args.average or [args.weights]))
    size = sum(file.stat().st_size for file in weight_files(args.out))
    Logger(f"{args.out}: {model.config}, {model.n_parameters():,} parameters, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
