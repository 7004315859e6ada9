"""
生成有多快：缓存一次分配、连续批处理、权重量化，与教科书写法并排，写出的词元相同。
How fast answers are generated: a preallocated cache, continuous batching, 8-bit and 4-bit weights,
beside the textbook's way. Greedy decoding, random weights, answers of given lengths.

one table           python -m benchmarks.generate
quick               python -m benchmarks.generate --cases 16 --new_tokens 32 --repeats 1
a larger model      python -m benchmarks.generate --cases 1 --dim 768 --n_layers 16

Cases: one prompt; 16 in one batch; mixed, 64 prompts, 16 at a time, answers of 8 to 128 tokens.
The fp32 forms must write the same tokens. int8 and int4 are other weights and may write others.
"""

import copy
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import plain
from benchmarks.measure import add_result_args, compare, parse, save, setting, table, timed
from model.config import LMConfig
from model.generate import column_major, generate
from model.quantize import KINDS, quantize
from model.transformer import Transformer
from runtime.args import checking_input, make_parser
from runtime.log import peak_above

VOCAB_SIZE = 6400
ROWS = 16                       # generation batch size
SHORTEST = 8                    # tokens of an answer of "mixed"
CASES = {"1": 1, "16": ROWS, "mixed": 4 * ROWS}         # number of prompts

# Form: its weights, how it generates, its tolerance. 0: another token is another answer. Where two
# tokens are equally likely rounding may decide, and a run stops though nothing is wrong: take
# another --seed.
OURS = partial(generate, rows=ROWS)
FORMS = {"plain, growing cache": ("fp32", partial(plain.generate, rows=ROWS), 0.0),
         "ours": ("fp32", OURS, 0.0)} | {f"ours, {kind}": (kind, OURS, math.inf) for kind in KINDS}


class Case(NamedTuple):
    name: str
    prompt: int             # tokens
    new_tokens: int         # of an answer; in "mixed" of the longest
    dim: int
    n_layers: int
    seed: int
    device: str
    threads: int
    weights: str            # folder of write_weights

    def prompts(self) -> list[list[int]]:
        """All of one length, so that the plain form needs no padding."""
        generator = torch.Generator().manual_seed(self.seed)
        size = CASES[self.name], self.prompt
        return torch.randint(VOCAB_SIZE, size, generator=generator).tolist()

    def sizes(self) -> list[int]:
        if self.name != "mixed":
            return [self.new_tokens] * CASES[self.name]
        generator = torch.Generator().manual_seed(self.seed)
        low, high = min(SHORTEST, self.new_tokens), self.new_tokens + 1
        return torch.randint(low, high, (CASES[self.name],), generator=generator).tolist()

    def config(self) -> LMConfig:
        return LMConfig(self.dim, self.n_layers, n_heads=8, vocab_size=VOCAB_SIZE,
                        tie_embeddings=False, max_seq_len=self.prompt + self.new_tokens)

    def model(self, kind: str = "fp32") -> Transformer:
        with torch.device("meta"):
            model = Transformer(self.config()).requires_grad_(False).eval()
            if kind != "fp32":
                quantize(model, kind)
        state = torch.load(Path(self.weights) / f"{kind}.pt", weights_only=True)
        model.load_state_dict(state, assign=True)
        return model.to(self.device)


def write_weights(case: Case):
    """The same random weights in each kind, as files: a process that initialises or quantises them
    keeps freed memory, which a measurement would miss.

    With its layers' matrices doubled the model depends on all that it read. As initialised it
    repeats a few tokens for any prompt, and a wrong cache would go unnoticed.
    """
    torch.manual_seed(case.seed)
    model = Transformer(case.config()).requires_grad_(False).eval()
    for weight in model.layers.parameters():
        if weight.dim() > 1:
            weight.mul_(2)
    torch.save(model.state_dict(), Path(case.weights) / "fp32.pt")
    for kind in KINDS:
        quantised = copy.deepcopy(model)
        quantize(quantised, kind)
        torch.save(quantised.state_dict(), Path(case.weights) / f"{kind}.pt")


def measure(case: Case, form: str, saved: Path | None) -> dict[str, float]:
    """Seconds for all answers, and bytes at the peak above the weights. The answers' tokens are
    `saved`."""
    device, prompts, sizes = torch.device(case.device), case.prompts(), case.sizes()
    kind, call, _ = FORMS[form]
    model = case.model(kind)
    if call is OURS:
        column_major(model)
    call(model, [[1, 2]], [2])                              # loads the code of the kernels
    with peak_above(device) as above:
        call(model, prompts, [min(2, size) for size in sizes])
        answers, seconds = timed(lambda: call(model, prompts, sizes), device)
    if saved:
        tokens = torch.tensor([token for answer in answers for token in answer])
        torch.save({"tokens": tokens.double()}, saved)
    return {"seconds": seconds, "peak": above(), "tokens_per_s": sum(sizes) / seconds,
            "weights_mb": sum(weight.nbytes for weight in model.parameters()) / 2 ** 20}


COLUMNS = {"case": "{case}", "form": "{form}", "seconds": "{seconds:.2f}",
           "useful tokens/s": "{tokens_per_s:,.0f}", "speed": "{speed:.2f} x",
           "peak MB": "{peak_mb:,.0f}", "peak / plain": "1/{peak_ratio:.1f}",
           "weights MB": "{weights_mb:,.0f}"}


def main(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=CASES, help="prompts at once")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--new_tokens", type=int, default=128, help="tokens of the longest answer")
    add("--dim", type=int, default=512, help="width of the model, a multiple of 32; it has 8 heads")
    add("--n_layers", type=int, default=8, help="number of its layers")
    add("--seed", type=int, default=0, help="random seed of weights, prompts and mixed lengths")
    add_result_args(parser)
    args = parse(parser, argv, "prompt", "new_tokens", "dim", "n_layers")
    if args.dim % 32:
        parser.error(f"--dim {args.dim} must be a multiple of 32, the group size of int4")

    forms, rows = {form: tolerance for form, (*_, tolerance) in FORMS.items()}, []
    with checking_input(), tempfile.TemporaryDirectory() as weights:
        for name in args.cases:
            case = Case(name, args.prompt, args.new_tokens, args.dim, args.n_layers, args.seed,
                        args.device, args.threads, weights)
            if not rows:
                write_weights(case)                         # the same for every case
            rows += [row | {"case": name} for row in compare(measure, case, forms, args.repeats)]

    print(f"greedy; {args.dim} x {args.n_layers}, vocabulary {VOCAB_SIZE:,}, {args.prompt} tokens "
          f"per prompt, up to {args.new_tokens} new\n\n{table(rows, COLUMNS)}\n\n{setting(args)};\n"
          "speed, peak: relative to the growing cache; peak above the weights")
    save(args, rows)


if __name__ == "__main__":
    main()
