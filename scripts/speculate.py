"""
推测解码：小模型起草几个词元，大模型用一次前向传播验证；写出的文字仍服从大模型的分布。
Speculative decoding: a small model drafts tokens, and the large one verifies all of them in one
pass. The text is distributed exactly as if the large model had sampled it alone.

    draft     x_1, ..., x_n ~ q, each with a pass of the draft model
    verify    the target's p at each x_i and after x_n, in one pass
    accept    x_i with probability min(1, p(x_i) / q(x_i)), in order, up to the first rejection
    add       one token from p - q where it is positive (after a rejection), or from p (after x_n)

A token v is drafted and accepted with probability q min(1, p / q) = min(p, q). A rejection has the
rest, 1 - sum min(p, q) = sum max(p - q, 0), of which v gets max(p - q, 0). The two add up to p(v).
Leviathan et al. 2022, https://arxiv.org/abs/2211.17192, Alg. 1.

    python scripts/speculate.py --draft SFT=out/full_sft_64.pth KD=out/full_dist_64.pth --n_draft 2
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from evaluation.metrics import read_tests
from evaluation.tables import markdown
from interop.checkpoint import load_model
from model.generate import column_major
from model.transformer import KVCache
from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.pictures import new_figure, save_picture


class Round(NamedTuple):
    """What one pass of the target gives."""
    tokens: list[int]           # accepted drafts, then one of the target's own (none after a stop)
    n_accepted: int
    n_judged: int               # and the first rejected one; the drafts after it are not judged
    expected: float             # n_accepted on average: sum over v of min(p, q) at each judged one


def predict(model, cache, ids, n, temperature):  # -> (n, V)
    """Probabilities of what follows each of the last n prefixes of ids. Reads only what the cache
    does not hold yet. In fp64: p - q has nothing positive left where only rounding makes p < q."""
    new = torch.tensor(ids[int(cache.lengths):])
    logits = model(new, [len(new)], at=torch.arange(len(new) - n, len(new)), cache=cache).logits
    if temperature == 0.0:      # greedy decoding is a distribution, too: all of it on one token
        return torch.zeros_like(logits.double()).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return (logits.double() / temperature).softmax(dim=1)


@torch.inference_mode()
def speculate(target, draft, prompt: list[int], n_draft: int, max_new_tokens: int,
              stop: int | None = None, temperature: float = 1.0, generator=None):  # -> Rounds
    """The answer to one prompt, a round per pass of the target; n_draft=0 is ordinary decoding."""
    longest = min(target.config.max_seq_len, draft.config.max_seq_len)
    ids, end = list(prompt), min(len(prompt) + max_new_tokens, longest)
    if not 0 < len(ids) < end:
        raise ValueError(f"a prompt of {len(ids)} tokens: give 1 to {longest - 1}")
    caches = [KVCache(model.config, 1, end, "cpu") for model in (target, draft)]
    while len(ids) < end and stop not in ids[len(prompt):]:
        # 1. Draft; one token is left to the target
        n_max, drafted, q = min(n_draft, end - len(ids) - 1), [], []
        while len(drafted) < n_max and stop not in drafted:
            q.append(predict(draft, caches[1], ids + drafted, 1, temperature)[0])           # (V,)
            drafted.append(q[-1].multinomial(1, generator=generator).item())

        # 2. Verify: one pass of the target reads all drafts. After x_n nothing is drafted: q is 0
        n = len(drafted)
        p = predict(target, caches[0], ids + drafted, n + 1, temperature)           # (n + 1, V)
        q = torch.stack([*q, torch.zeros_like(p[n])])                               # (n + 1, V)

        # 3. Accept up to the first rejection, and forget what follows it
        ratio = (p / q)[range(n), drafted]
        accepted = torch.rand(n, dtype=torch.double, generator=generator) < ratio
        n_accepted = int(accepted.cumprod(dim=0).sum())
        for cache in caches:
            cache.lengths.clamp_(max=len(ids) + n_accepted)

        # 4. Add one token. After x_n p - q is p
        tokens = drafted[:n_accepted]
        if stop not in tokens:
            rest = (p[n_accepted] - q[n_accepted]).clamp_min(0.0)       # multinomial normalises it
            tokens.append(rest.multinomial(1, generator=generator).item())
        ids += tokens
        n_judged = min(n_accepted + 1, n)
        yield Round(tokens, n_accepted, n_judged, torch.minimum(p, q)[:n_judged].sum().item())


def draw(found: dict[str, tuple[float, float]], n_draft: int, path: Path):
    """Tokens per pass against a: the formula, 1 + a + ... + a^n, and the drafts.
    found: {name: (a, tokens per pass)}"""
    figure = new_figure(6, 4)
    axis = figure.subplots()
    a = torch.linspace(0, 1, 101)
    axis.plot(a, sum(a ** i for i in range(n_draft + 1)), "k--", label="answers without an end")
    for i, (name, point) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        axis.plot(*point, "C0o")
        x, y = ((-6, 7), (8, -12), (-6, 20), (8, -25))[i % 4]     # drafts lie close together
        axis.annotate(name, point, (x, y), textcoords="offset points",
                      ha="right" if x < 0 else "left")
    axis.set(xlabel="a, share of drafts that are accepted", ylabel="tokens per pass of the target")
    axis.legend(loc="upper left")
    save_picture(figure, path)


def main():
    # 1. Arguments
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", default="out/full_sft_128.pth", help="target: the model whose text is written")
    add("--draft", nargs="+", required=True, metavar="[NAME=]PATH", help="draft models to compare")
    add("--data", nargs="+", default=["dataset/val.jsonl"], help="files of conversations to answer")
    add("--limit", type=int, default=0, help="rows used from the start of each file; 0: all")
    add("--samples", type=int, default=4, help="number of answers shown; 0: none")
    add("--n_draft", type=int, default=4, help="tokens drafted per pass of the target")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0: greedy decoding")
    add("--max_new_tokens", type=int, default=64, help="maximum length of an answer, in tokens")
    add("--out", type=Path, default=Path("out/speculate.png"), help="picture to write, FILE.png")
    args = parse_args(parser, temperature="[0, inf)")

    with checking_input():
        # 2. Models and prompts
        target, tokenizer = load_model(args.weights)
        drafts = {"no draft": column_major(target)}
        for name, path in by_name(args.draft).items():
            draft, vocabulary = load_model(path)
            if vocabulary.ids != tokenizer.ids:
                raise ValueError(f"{path} cannot draft for {args.weights}: its tokenizer differs")
            drafts[name] = column_major(draft)
        tests = read_tests(args.data, args.limit)["conversations"]
        if not tests:
            raise ValueError(f"--data {' '.join(args.data)}: no conversations to answer")
        prompts = tokenizer.encode_chats([test["messages"][:-1] for test in tests], True)

        # 3. Answers
        rounds, seconds = {name: [] for name in drafts}, dict.fromkeys(drafts, 0.0)
        for i, (prompt, _) in enumerate(prompts):
            shown = ["> " + tests[i]["messages"][-2]["content"]]
            for name, draft in drafts.items():
                start, n_draft = time.process_time(), 0 if draft is target else args.n_draft
                answer = [*speculate(target, draft, prompt, n_draft, args.max_new_tokens,
                                     tokenizer.end_of_turn, args.temperature,
                                     torch.Generator().manual_seed(i))]
                seconds[name] += time.process_time() - start
                rounds[name] += answer
                text = "".join(f"[{tokenizer.decode(tokens[:n])}]" * (n > 0)
                               + tokenizer.decode(tokens[n:]) for tokens, n, *_ in answer)
                shown.append(f"    {name}: {text}")
            if i * args.samples // len(prompts) > (i - 1) * args.samples // len(prompts):
                print("\n".join(shown))

    # 4. Table
    table, points = [["", "accepted %", "a %", "tokens per pass", "tokens/s"]], {}
    for name in drafts:
        tokens, *counts = zip(*rounds[name])
        n_accepted, n_judged, expected = map(sum, counts)
        shares = [f"{100 * n / n_judged:.1f}" if n_judged else "" for n in (n_accepted, expected)]
        n = sum(map(len, tokens))
        if n_judged:
            points[name] = expected / n_judged, n / len(tokens)
        table.append([name, *shares, f"{n / len(tokens):.2f}", f"{n / seconds[name]:,.0f}"])
    print(f"\n{markdown(table)}\n\n[ ]: accepted drafts; accepted: of the drafts up to the first "
          f"rejection; a: the mean of sum min(p, q) there; tokens/s: of CPU time. The picture is "
          f"{args.out}")
    draw(points, args.n_draft, args.out)


if __name__ == "__main__":
    main()
