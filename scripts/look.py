"""
看分布：几个模型对同一个回答，逐个词元的下一词元分布，并排放在一起。
Look at distributions: what several models predict at each token of one answer, side by side.

    python scripts/look.py "what does zizez drink?" --temperature 1 2 4 \\
        --weights teacher=out/full_sft_128.pth student=out/full_dist_64.pth

All read the first model's greedy answer, or --answer. A token is plausible if the first model gives
it 1 % or more at T = 1. Probability elsewhere goes to answers that are none; it grows with T.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from distill.losses import forward_kl
from evaluation.tables import aligned
from interop.checkpoint import load_model
from model.generate import generate
from runtime.args import checking_input, make_parser, parse_args, parse_named
from runtime.pictures import save_picture

PLAUSIBLE = 0.01


def shown(logits: dict[str, torch.Tensor], k: int) -> list[int]:
    """The k tokens with the largest probability in any model, as the first model orders them.
    logits: {model: (V,)}, at one token of the answer"""
    p = torch.stack([each.softmax(dim=-1) for each in logits.values()])                 # (M, V)
    return sorted(p.amax(dim=0).topk(k).indices.tolist(), key=lambda token: -p[0, token])


def measures(logits: dict[str, torch.Tensor], names: dict[int, str], temperature: float) -> dict:
    """{model: {row: value}} at one token of the answer: probability of each named token and of all
    that are not plausible; entropy and KL(first model || this one) in nats. logits: {model: (V,)}
    """
    first, found = next(iter(logits.values())), {}
    implausible = first.softmax(dim=-1) < PLAUSIBLE
    log_p = (first / temperature).log_softmax(dim=-1)
    for model, each in logits.items():
        log_q = (each / temperature).log_softmax(dim=-1)
        q = log_q.exp()
        of_all = {"implausible": q[implausible].sum(), "entropy, nats": -(q @ log_q),
                  "KL, nats": forward_kl(log_p, log_q)}
        found[model] = {name: float(value) for name, value in (
            {name: q[token] for token, name in names.items()} | of_all).items()}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The measures as text, with a bar of 20 characters beside each probability."""
    rows = [["", *found]]
    for name in next(iter(found.values())):
        width = 0 if "nats" in name else 20
        rows.append([name, *(f"{of[name]:.3f} {'█' * round(width * of[name])}"
                             for of in found.values())])
    return aligned(rows, "l" * len(rows[0]))


def draw(panels: dict[str, dict], n_columns: int, path: Path):
    """A panel of horizontal bars for each title: the probabilities of its measures."""
    from matplotlib.figure import Figure

    n_rows = len(panels) // n_columns
    figure = Figure(figsize=(1 + 3 * n_columns, 0.6 + 2.4 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    for axis, (title, found) in zip(grid.T.flat, panels.items()):
        height = 0.8 / len(found)
        for i, (model, of) in enumerate(found.items()):
            bars = {name: value for name, value in of.items() if "nats" not in name}
            places = [place + (i + 0.5) * height - 0.4 for place in range(len(bars))]
            axis.barh(places, bars.values(), height, label=model)
        axis.set_yticks(range(len(bars)), list(bars))
        axis.set(title=title, xlim=(0, 1), ylim=(len(bars) - 0.5, -0.5))
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(found), frameon=False)
    save_picture(figure, path)


def main():
    # 1. Arguments
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
        # 2. Models, and what they read
        models, tokenizer = {}, None
        for name, path in map(parse_named, args.weights):
            model, its_own = load_model(path)
            tokenizer = tokenizer or its_own
            if name in models:
                raise ValueError(f"two models have the name {name}; write NAME=PATH")
            if its_own.ids != tokenizer.ids:
                raise ValueError(f"{path} has another tokenizer than {args.weights[0]}")
            models[name] = model
        chat = [{"role": "user", "content": args.question}]
        prompt, stop = tokenizer.encode_chat(chat, True)[0], tokenizer.end_of_turn
        first = next(iter(models))
        if args.answer:
            chat.append({"role": "assistant", "content": args.answer})
            answer = tokenizer.encode_chat(chat)[0][len(prompt):]
            answer = answer[:answer.index(stop)]
        else:
            answer = generate(models[first], [prompt], args.max_new_tokens, stop)[0]
        answer = [*answer, stop][:args.max_new_tokens]

    # 3. Distributions at each token of the answer, from one pass over the tokens before it
    ids = torch.tensor(prompt + answer[:-1])
    at = torch.arange(len(prompt) - 1, len(ids))
    with torch.inference_mode():
        logits = {name: model(ids, [len(ids)], at=at).logits for name, model in models.items()}
    panels = {}
    for i, token in enumerate(answer):
        here = {name: each[i] for name, each in logits.items()}
        names = {each: text(tokenizer, each) for each in shown(here, args.top_k)}
        for temperature in args.temperature:
            title = f"token {i + 1}: {text(tokenizer, token)}, T = {temperature:g}"
            panels[title] = measures(here, names, temperature)
            print(f"{title}\n{table(panels[title])}\n")

    # 4. Picture
    draw(panels, len(answer), args.out)
    print(f"implausible: tokens with less than {PLAUSIBLE:.0%} in {first} at T = 1. KL: of {first} "
          f"to the model. The picture is {args.out}.")


def text(tokenizer, token: int) -> str:
    """A token on one line, with visible spaces; one that is no whole character by its id."""
    decoded = tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "·")
    return f"[{token}]" if "\ufffd" in decoded else decoded


if __name__ == "__main__":
    main()
