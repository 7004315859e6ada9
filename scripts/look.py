"""
看分布：对同一个回答，把几个模型在每个词元处的预测并排显示。
Look at distributions: what several models predict at each token of one answer, side by side.

    python scripts/look.py "what does zizez drink?" --temperature 1 2 4 \\
        --weights teacher=out/full_sft_128.pth student=out/full_dist_64.pth

A token is implausible if the first model gives it less than 1 % at T = 1. Their probability, of
answers that are none, grows with T.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from distill.losses import forward_kl
from evaluation.tables import aligned
from interop.checkpoint import load_model
from model.generate import generate
from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.pictures import new_figure, save_picture

PLAUSIBLE = 0.01


def shown(logits: dict[str, torch.Tensor], k: int) -> list[int]:
    """The k tokens with the largest probability in any model, as the first model orders them.
    logits: {model: (V,)}, at one token of the answer"""
    p = torch.stack([each.softmax(dim=-1) for each in logits.values()])                 # (M, V)
    return sorted(p.amax(dim=0).topk(k).indices.tolist(), key=lambda token: -p[0, token])


def measures(logits: dict[str, torch.Tensor], names: dict[int, str], temperature: float) -> dict:
    """{model: {row: value}} at one token of the answer: probability of each named token and of all
    implausible ones, entropy, KL(first model || this one). logits: {model: (V,)}"""
    log = {model: (each / temperature).log_softmax(dim=-1) for model, each in logits.items()}
    first = next(iter(logits))
    implausible = logits[first].softmax(dim=-1) < PLAUSIBLE
    return {model: {name: log_q[token].exp().item() for token, name in names.items()} | {
        "implausible": log_q[implausible].exp().sum().item(),
        "entropy, nats": -(log_q.exp() @ log_q).item(),
        "KL, nats": forward_kl(log[first], log_q).item()} for model, log_q in log.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """The measures as text, with a bar of up to 20 characters beside each probability."""
    rows = [["", *found]]
    for name in next(iter(found.values())):
        values, bar = [of[name] for of in found.values()], "" if "nats" in name else "█"
        rows.append([name, *(f"{value:.3f} {bar * round(20 * value)}" for value in values)])
    return aligned(rows, "l" * len(rows[0]))


def draw(panels: dict[str, dict], n_columns: int, path: Path):
    """A panel of bars for each title: the probabilities. Columns are filled one after the other."""
    n_rows = len(panels) // n_columns
    figure = new_figure(1 + 3 * n_columns, 0.6 + 2.4 * n_rows)
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    for axis, (title, found) in zip(grid.T.flat, panels.items()):
        height = 0.8 / len(found)
        for i, (model, of) in enumerate(found.items()):
            names = [name for name in of if "nats" not in name]
            places = [place + (i + 0.5) * height - 0.4 for place in range(len(names))]
            axis.barh(places, [of[name] for name in names], height, label=model)
        axis.set_yticks(range(len(names)), names)
        axis.set(title=title, xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(found))
    save_picture(figure, path)


def text(tokenizer, token: int) -> str:
    """A token on one line, with visible spaces; one that is no whole character by its id."""
    decoded = tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "·")
    return f"[{token}]" if "\ufffd" in decoded else decoded


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("question", help="what the models are asked")
    add("--weights", nargs="+", required=True, metavar="[NAME=]PATH",
        help="models of one tokenizer; the others are compared with the first")
    add("--answer", default=None, help="answer that is read; default: the first model's, greedy")
    add("--temperature", nargs="+", type=float, default=[1.0], help="softmax temperatures")
    add("--top_k", type=int, default=5, help="number of tokens shown, by probability")
    add("--max_new_tokens", type=int, default=8, help="maximum length of an answer, in tokens")
    add("--out", type=Path, default=Path("out/look.png"), help="picture to write, FILE.png")
    args = parse_args(parser, top_k="[1, 100]")

    with checking_input():
        loaded = {name: load_model(path) for name, path in by_name(args.weights).items()}
        first, (model, tokenizer) = next(iter(loaded.items()))
        if any(each.ids != tokenizer.ids for _, each in loaded.values()):
            raise ValueError("--weights: the models need one tokenizer")
        chat, n = [{"role": "user", "content": args.question}], args.max_new_tokens
        prompt = tokenizer.encode_chat(chat, add_generation_prompt=True)[0]
        answer = (tokenizer.encode(args.answer) if args.answer else
                  generate(model, [prompt], n, tokenizer.end_of_turn)[0])
        answer = [*answer, tokenizer.end_of_turn][:n]

    ids = torch.tensor(prompt + answer[:-1])        # one pass reads the answer of each model
    at, panels = torch.arange(len(prompt) - 1, len(ids)), {}
    with torch.inference_mode():
        logits = {name: model(ids, [len(ids)], at=at).logits for name, (model, _) in loaded.items()}
    for i, token in enumerate(answer):
        here = {name: each[i] for name, each in logits.items()}
        names = {each: text(tokenizer, each) for each in shown(here, args.top_k)}
        for temperature in args.temperature:
            title = f"token {i + 1}: {text(tokenizer, token)}, T = {temperature:g}"
            panels[title] = measures(here, names, temperature)
            print(f"{title}\n{table(panels[title])}\n")
    draw(panels, len(answer), args.out)
    print(f"implausible: below {PLAUSIBLE:.0%} in {first} at T = 1. KL: of {first} to the model. "
          f"The picture is {args.out}.")


if __name__ == "__main__":
    main()
