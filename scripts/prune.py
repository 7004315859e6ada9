"""
剪枝：由教师得到更小的学生，只留指定的层，或去掉校准数据上最不重要的层、头、前馈单元、维度与专家。
Pruning: a smaller student from a teacher, with the layers that are named, or without the layers,
heads, FFN units, dimensions and experts that matter least on a few rows of data (model/prune.py).

    python scripts/prune.py --weights out/full_sft_128.pth --layers 0,3 --out out/two_layers.pth
    python scripts/prune.py --weights out/full_sft_128.pth --target 0.5 --out out/half.pth
    python scripts/prune.py --weights smollm2.gguf --n_layers 18 --hidden_dim 768 \\
        --data_path alpaca.jsonl --out out/smollm2_68m.pth
    python train_distillation.py --teacher out/full_sft_128.pth --student out/half.pth

Prune, then distil: a pruned model makes many errors until its teacher has taught it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from dataset.lm_dataset import dataset_of, in_order, permutation
from interop.checkpoint import load_model, save_model
from model.prune import dense, keep_layers, measure, prune, sizes_for
from runtime.args import checking_input, make_parser, parse_args
from runtime.log import Logger
from runtime.precision import pick_device

SIZES = {"n_layers": "layers", "n_heads": "query heads, in groups with their key/value head",
         "hidden_dim": "units of each FFN", "n_routed_experts": "experts",
         "dim": "width of a hidden state"}


def numbers(text: str) -> list[int]:
    """"0,2,4" -> [0, 2, 4]"""
    return [int(number) for number in text.split(",")]


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, help="model to prune, in any known format")
    add("--out", type=Path, required=True, help="FILE.pth of the pruned model")
    add("--data_path", nargs="+", default=["./dataset/sft_data.jsonl"],
        help="files of conversations or texts, on which the importance is measured")
    add("--rows", type=int, default=64, help="samples that are read")
    add("--layers", type=numbers, default=None, metavar="0,2,4",
        help="layers that stay, counted from 0, in this order; they are cut before the sizes")
    add("--target", type=float, default=None,
        help="share of the parameters that stays, in (0, 1]; layers and FFNs shrink alike")
    for name, what in SIZES.items():
        add(f"--{name}", type=int, default=None, help=f"number that stays: {what}; default: all")
    add("--dense", action="store_true",
        help="make a mixture of experts dense first: each FFN has the units of all experts")
    add("--by", default="activation", choices=["activation", "magnitude", "random"],
        help="importance; the other two are for comparison")
    add("--seed", type=int, default=1337, help="random seed of --by random, and of the rows")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parse_args(parser, target="(0, 1]")
    sizes = {name: vars(args)[name] for name in SIZES if vars(args)[name] is not None}
    if args.target and sizes or not (args.target or sizes or args.layers or args.dense):
        parser.error(f"give --layers, or either --target or sizes: --{', --'.join(SIZES)}")

    device = pick_device(args.device)
    with checking_input():
        model, tokenizer = load_model(args.weights, device)
        if model.config.quantization:
            raise ValueError(f"{args.weights} is quantised: prune it first, then quantise")
        if args.dense and not model.config.use_moe:
            raise ValueError(f"--dense: {args.weights} has no experts")
        if args.out.suffix != ".pth" or args.out.exists() and args.out.samefile(args.weights):
            raise ValueError(f"--out {args.out}: give another FILE.pth")

        def importance(by):
            data = dataset_of(args.data_path)(args.data_path, tokenizer, model.config.max_seq_len)
            data = data.view(permutation(len(data), args.seed, 0)[:args.rows])
            return measure(model, (batch.to(device) for batch in in_order(data)), by, args.seed)

        n_before = model.n_parameters()
        before = f"{args.weights}, {model.config}: {n_before / 1e6:.2f} M parameters"
        if args.layers:
            model = keep_layers(model, args.layers)
        if args.dense:
            model = dense(model, importance("activation")).to(device)
        if args.target:
            sizes = sizes_for(model, args.target * n_before / model.n_parameters())
        if sizes:
            model = prune(model, importance(args.by), **sizes)
        save_model(model, tokenizer, args.out)
    n, kept = model.n_parameters(), "".join(f"; {name} {sizes[name]}" for name in sizes)
    Logger(f"{before} -> {args.out}, {model.config}: {n / 1e6:.2f} M ({n / n_before:.0%}{kept})")
    # The student's folder is its own.
    columns = f" --columns {' '.join(args.columns)}" if args.columns else ""
    Logger(f"Teach it: python train_distillation.py --teacher {args.weights} --student {args.out} "
           f"--data_path {' '.join(args.data_path)}{columns} --out_dir {args.out.with_suffix('')}")


if __name__ == "__main__":
    main()
