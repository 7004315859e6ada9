"""
生成有多快：缓存预先分配、写完的行让位、权重量化，与教科书写法并排，写出的词元相同。
How fast answers are written: a cache taken once, rows that leave, weights of 8 and 4 bits, beside the textbook's way.

Greedy, one model of random weights, the same prompts; no word ends an answer, each has a length of its own.

    1           one prompt
    16          sixteen, in one batch
    mixed       64 prompts, 16 at a time, answers of 8 to 128 tokens: how many tokens a second that someone asked for?

one table           python -m benchmarks.generate
quick               python -m benchmarks.generate --cases 16 --new_tokens 32 --repeats 1
a larger model      python -m benchmarks.generate --cases 1 --dim 768 --n_layers 16
a picture           python -m benchmarks.generate --picture generate.png --json generate.json

The fp32 forms have to write the same tokens, all of them. int8 and int4 are other weights and may write others.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import (PAGE, add_result_args, check_result_args, compare, peak, reset_peak, timed, write_results)
from model.config import LMConfig
from model.generate import column_major, generate
from model.quantize import KINDS, quantize
from model.transformer import Transformer, rotate

VOCABULARY = 6400
ROWS = 16                       # under way at once
SHORTEST = 8                    # tokens; of the answers of "mixed"
MOST_AGAIN = 32_768             # tokens read again and again, up to which "plain, no cache" is waited for: half a minute
CASES = {"1": 1, "16": ROWS, "mixed": 4 * ROWS}         # how many prompts


# --------------------------------------------------------------------------------------------------------- the forms


def read(model, tokens, past):  # (B, T), n_layers x ((B, G, T', K), (B, G, T', K)) or [] -> (B, V), the same with T' + T
    """The model as textbooks write it, with our weights: a batch is a rectangle, and the cache grows by torch.cat, which
    copies all that was there for each new token."""
    T, before = tokens.shape[1], past[0][0].shape[2] if past else 0
    rotation = model.rotation(torch.arange(before, before + T, device=tokens.device))       # (T, 1, K/2)
    x, grown = model.tok_embeddings(tokens), []                                     # (B, T, D)
    for number, layer in enumerate(model.layers):
        this, normed = layer.attention, layer.attention_norm(x)
        q, k, v = (matrix(normed).unflatten(-1, (-1, this.K)) for matrix in (this.wq, this.wk, this.wv))
        q, k, v = (each.transpose(1, 2) for each in (rotate(q, rotation), rotate(k, rotation), v))      # (B, H or G, T, K)
        if past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past[number], (k, v)))
        grown.append((k, v))
        k, v = (each.repeat_interleave(this.H // this.G, dim=1) for each in (k, v))                     # (B, H, T' + T, K)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        x = x + this.wo(mixed.transpose(1, 2).flatten(2))
        x = x + layer.ffn(layer.ffn_norm(x).flatten(0, 1)).view_as(x)
    return model.output(model.norm(x[:, -1])), grown


@torch.no_grad()
def plain(model, prompts, sizes, with_cache=True):
    """A batch after the other, each until its longest answer is done; what is beyond the size of the others is thrown away."""
    device, answers = model.norm.weight.device, []
    for start in range(0, len(prompts), ROWS):
        text, wanted = torch.tensor(prompts[start:start + ROWS], device=device), sizes[start:start + ROWS]
        first, newest, cache = text.shape[1], text, []
        for _ in range(max(wanted)):
            logits, cache = read(model, newest if with_cache else text, cache if with_cache else [])
            newest = logits.argmax(dim=-1, keepdim=True)                            # (B, 1)
            text = torch.cat([text, newest], dim=1)
        answers += [row[first:first + size] for row, size in zip(text.tolist(), wanted)]
    return answers


def plain_without_cache(model, prompts, sizes):
    """The whole text again for each token of it."""
    return plain(model, prompts, sizes, with_cache=False)


def ours(model, prompts, sizes):
    return generate(model, prompts, sizes, rows=ROWS)


FORMS = {"plain, growing cache": plain, "plain, no cache": plain_without_cache, "ours": ours}
QUANTISED = {f"ours, {kind}": kind for kind in KINDS}


# --------------------------------------------------------------------------------------------------- one measurement


class Case(NamedTuple):
    name: str
    prompt: int             # tokens
    new_tokens: int         # of an answer; of the longest, if they are mixed
    dim: int
    n_layers: int
    seed: int
    device: str
    threads: int
    weights: str            # folder of what `write_weights` has written

    def prompts(self) -> list[list[int]]:
        """All equally long: the plain forms have no padding there, and could have."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(VOCABULARY, (CASES[self.name], self.prompt), generator=generator).tolist()

    def sizes(self) -> list[int]:
        if self.name != "mixed":
            return [self.new_tokens] * CASES[self.name]
        generator = torch.Generator().manual_seed(self.seed)
        low = min(SHORTEST, self.new_tokens)
        return torch.randint(low, self.new_tokens + 1, (CASES[self.name],), generator=generator).tolist()

    def read_again(self) -> int:
        """Tokens that go through the model where there is no cache."""
        sizes, steps = self.sizes(), 0
        for start in range(0, len(sizes), ROWS):
            batch = sizes[start:start + ROWS]
            steps += len(batch) * sum(self.prompt + n for n in range(max(batch)))
        return steps

    def config(self) -> LMConfig:
        return LMConfig(self.dim, self.n_layers, n_heads=8, vocab_size=VOCABULARY, tie_embeddings=False,
                        max_seq_len=self.prompt + self.new_tokens)

    def model(self, kind: str = "fp32") -> Transformer:
        with torch.device("meta"):
            model = Transformer(self.config()).requires_grad_(False).eval()
            if kind != "fp32":
                quantize(model, kind)
        model.load_state_dict(torch.load(Path(self.weights) / f"{kind}.pt"), assign=True)
        return model.to(self.device)


def write_weights(case: Case):
    """The same random weights in each kind, as files: where they were made and quantised, memory that is free again lies
    about, which a measurement would take for its own.

    Random, but not indifferent to what was read: as initialised, the model repeats a few words, whatever the prompt was, and
    a wrong cache would not be noticed. With its layers' matrices doubled few words of an answer come twice.
    """
    for kind in ("fp32", *KINDS):
        torch.manual_seed(case.seed)
        model = Transformer(case.config()).requires_grad_(False).eval()
        for weight in model.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
        if kind != "fp32":
            quantize(model, kind)
        torch.save(model.state_dict(), Path(case.weights) / f"{kind}.pt")


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds for all answers, and bytes at the peak above the weights. The answers' tokens are `saved`."""
    torch.set_num_threads(case.threads)
    device, prompts, sizes = torch.device(case.device), case.prompts(), case.sizes()
    model, call = case.model(QUANTISED.get(form, "fp32")), FORMS.get(form, ours)
    if call is ours:
        column_major(model)

    call(model, [[1, 2]], [2])                              # loads the code of the kernels, which is memory too
    reset_peak(device)
    before = peak(device)
    call(model, prompts, [min(2, size) for size in sizes])
    answers, seconds = timed(lambda: call(model, prompts, sizes), device)
    figures = {"seconds": seconds, "peak": max(PAGE, peak(device) - before),
               "weights": sum(weight.nbytes for weight in model.parameters())}
    if form in QUANTISED:
        figures["agreement"] = agreement(case.model(), prompts, answers)
    if saved:
        torch.save({"tokens": torch.tensor([token for answer in answers for token in answer], dtype=torch.float64)}, saved)
    return figures


@torch.no_grad()
def agreement(model, prompts, answers) -> float:
    """Share of the tokens that this model, too, would have written after the same text. (Compared as they are, answers
    part for good at the first other word.)"""
    same = 0
    for prompt, answer in zip(prompts, answers):
        text = torch.tensor(prompt + answer, device=model.norm.weight.device)
        asked = torch.arange(len(prompt), len(text), device=text.device)
        logits = model(text[:-1], [len(text) - 1], at=asked - 1).logits             # (answer, V)
        same += int((logits.argmax(dim=-1) == text[asked]).sum())
    return same / sum(map(len, answers))


# --------------------------------------------------------------------------------------------------------------- results


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form."""
    forms = [form for form in FORMS if form != "plain, no cache" or case.read_again() <= MOST_AGAIN]
    # No tolerance: another token is another answer. Where the model likes two words equally well, rounding may choose, and the
    # run stops though nothing is wrong: take another --seed. With the default one the closest two of the 6,682 choices are
    # 1e-5 apart; in the three texts looked at, the logits of two forms differed by at most 5e-6.
    figures = compare(measure, case, forms, repeats, tolerance=0.0)
    for form in QUANTISED:                                  # each alone: nothing is checked, and they take no turns with others
        figures |= compare(measure, case, [form], repeats)
    plain, tokens = figures["plain, growing cache"], sum(case.sizes())
    return [{"group": case.name, "form": form, "seconds": each["seconds"], "tokens_per_s": tokens / each["seconds"],
             "speed": plain["seconds"] / each["seconds"], "peak_mb": each["peak"] / 2 ** 20,
             "peak_ratio": plain["peak"] / each["peak"], "weights_mb": each["weights"] / 2 ** 20}
            | ({"agreement": each["agreement"]} if form in QUANTISED else {"deviation": each["deviation"]})
            for form, each in figures.items()]


def table(rows) -> str:
    lines = ["| case | form | seconds | useful tokens/s | speed | peak MB | peak / plain | weights MB | as fp32 |",
             "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    return "\n".join(lines + [
        f"| {row['group']} | {row['form']} | {row['seconds']:.2f} | {row['tokens_per_s']:,.0f} | {row['speed']:.2f} x "
        f"| {row['peak_mb']:,.0f} | 1/{row['peak_ratio']:.1f} | {row['weights_mb']:,.0f} | {as_fp32(row)} |"
        for row in rows])


def as_fp32(row) -> str:
    return f"{row['agreement']:.1%}" if "agreement" in row else "the same"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=CASES, help="how many prompts at once; a table has them all")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--new_tokens", type=int, default=128, help="tokens of each answer; mixed: of the longest")
    add("--dim", type=int, default=512, help="width of the model, a multiple of 32; its 8 heads share it")
    add("--n_layers", type=int, default=8, help="its depth")
    add("--seed", type=int, default=0, help="of weights, prompts and the mixed lengths")
    add_result_args(parser)
    args = parser.parse_args(argv)
    if min(args.prompt, args.new_tokens, args.dim, args.n_layers) < 1:
        parser.error("--prompt, --new_tokens, --dim and --n_layers are counts: 1 or more")
    if args.dim % 32:
        parser.error(f"--dim {args.dim} is no multiple of 32, and int4 groups weights by 32")
    check_result_args(parser, args)

    rows, left_out = [], []
    try:
        with tempfile.TemporaryDirectory() as weights:
            cases = [Case(name, args.prompt, args.new_tokens, args.dim, args.n_layers, args.seed, args.device, args.threads,
                          weights) for name in args.cases]
            write_weights(cases[0])                         # every case has the same
            for case in cases:
                rows += rows_of(case, args.repeats)
                if case.read_again() > MOST_AGAIN:
                    left_out.append(f"{case.name} ({case.read_again():,})")
    except (ValueError, MemoryError) as error:
        sys.exit(str(error))

    setting = (f"{args.dim} x {args.n_layers}, {VOCABULARY:,} words, prompts of {args.prompt} tokens, answers of up to "
               f"{args.new_tokens}, {args.device}" + (f", threads: {args.threads}" if args.device == "cpu" else ""))
    print(f"greedy; {setting}\n\n{table(rows)}\n")
    print(f"seconds: {'CPU time' if args.device == 'cpu' else 'of the GPU'}, median of {args.repeats} new processes; speed and "
          "peak: against the growing cache;\npeak: above the weights; as fp32: tokens that fp32 would have written after the "
          "same text")
    if left_out:
        print(f"plain, no cache: left out where more than {MOST_AGAIN:,} tokens are read again and again: "
              + ", ".join(left_out))
    write_results(args, rows, setting, {"speed": "times as fast as with a growing cache",
                                        "peak_ratio": "times less memory above the weights"})


if __name__ == "__main__":
    main()
