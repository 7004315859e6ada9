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
    at = torch.arange(len(prompt) - 1, len(ids))
    with torch.inference_mode():
        logits = {name: model(ids, [len(ids)], at=at).logits for name, (model, _) in loaded.items()}
    for i, token in enumerate(answer):
        here = {name: each[i] for name, each in logits.items()}
        names = {each: text(tokenizer, each) for each in shown(here, args.top_k)}
        for temperature in args.temperature:
            print(f"token {i + 1}: {text(tokenizer, token)}, T = {temperature:g}\n"
                  f"{table(measures(here, names, temperature))}\n")
    print(f"implausible: below {PLAUSIBLE:.0%} in {first} at T = 1. KL: of {first} to the model.")


if __name__ == "__main__":
    main()
