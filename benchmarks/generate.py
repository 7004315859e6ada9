"""
生成有多快：缓存一次分配、连续批处理、权重量化、经 HTTP，与教科书写法并排，写出的词元相同。
How fast answers are generated: a preallocated cache, continuous batching, 8-bit and 4-bit weights,
over HTTP, beside the textbook's way. Greedy decoding, random weights, answers of given lengths.

one table           python -m benchmarks.generate
quick               python -m benchmarks.generate --cases 16 --new_tokens 32 --repeats 1
a larger model      python -m benchmarks.generate --cases 1 --dim 768 --n_layers 16

Cases: one prompt; 16 in one batch; mixed, 64 prompts, 16 at a time, answers of 8 to 128 tokens.
The fp32 forms must write the same tokens. int8 and int4 are other weights and may write others.
Over HTTP (with fastapi and uvicorn) up to 16 clients send one prompt each, in the same process.
"""

import copy
import json
import math
import socket
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.measure import (add_result_args, compare, parse, setting, table, timed,
                                with_ratios, write_json)
from model.config import LMConfig
from model.generate import column_major, generate
from model.quantize import KINDS, quantize
from model.tokenizer import Tokenizer
from model.transformer import Transformer, rope_rotation, rotate
from runtime.args import checking_input, make_parser
from runtime.log import peak_above

VOCAB_SIZE = 6400
ROWS = 16                       # generation batch size
SHORTEST = 8                    # tokens of an answer of "mixed"
CASES = {"1": 1, "16": ROWS, "mixed": 4 * ROWS}         # number of prompts


def forward(model, tokens, past):
    """(B, T), n_layers x (k, v) of (B, G, T', K), or [] -> (B, V), the cache with T' + T positions.

    The model as textbooks write it: a rectangular batch, and a cache that grows by torch.cat, which
    copies it for each new token."""
    T, before = tokens.shape[1], past[0][0].shape[2] if past else 0
    rotation = rope_rotation(model.config, torch.arange(before, before + T, device=tokens.device))
    x, grown = model.tok_embeddings(tokens), []                                     # (B, T, D)
    for number, layer in enumerate(model.layers):
        this, normed = layer.attention, layer.attention_norm(x)
        q, k, v = (w(normed).unflatten(-1, (-1, this.K)) for w in (this.wq, this.wk, this.wv))
        q, k, v = (each.transpose(1, 2) for each in (rotate(q, rotation), rotate(k, rotation), v))
        if past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past[number], (k, v)))
        grown.append((k, v))
        k, v = (each.repeat_interleave(this.H // this.G, dim=1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=not past)
        x = x + this.wo(mixed.transpose(1, 2).flatten(2))
        x = x + layer.ffn(layer.ffn_norm(x).flatten(0, 1)).view_as(x)
    return model.output(model.norm(x[:, -1])), grown


@torch.no_grad()
def plain(model, prompts, sizes):
    """One batch after another, each until its longest answer is complete; surplus tokens are
    dropped."""
    device, answers = model.norm.weight.device, []
    for start in range(0, len(prompts), ROWS):
        newest = torch.tensor(prompts[start:start + ROWS], device=device)
        wanted, cache, written = sizes[start:start + ROWS], [], []
        for _ in range(max(wanted)):
            logits, cache = forward(model, newest, cache)
            newest = logits.argmax(dim=-1, keepdim=True)                            # (B, 1)
            written.append(newest)
        rows = torch.cat(written, dim=1).tolist()
        answers += [row[:size] for row, size in zip(rows, wanted)]
    return answers


def ours(model, prompts, sizes):
    return generate(model, prompts, sizes, rows=ROWS)


def served(model, prompts, sizes):
    """By the application of scripts/serve.py, in this process, with a client for each row."""
    import uvicorn

    from serving.api import make_app
    from serving.engine import Engine

    engine = Engine("", model, Tokenizer.load(), ROWS)
    listening = socket.create_server(("127.0.0.1", 0))
    engine.ends = ()                            # no token ends an answer before its length
    server = uvicorn.Server(uvicorn.Config(make_app({"": engine}), log_level="warning"))
    Thread(target=server.run, args=[[listening]], daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"

    def ask(prompt, size) -> list[int]:
        body = {"model": "", "prompt": prompt, "max_tokens": size, "temperature": 0,
                "logprobs": 0, "return_tokens_as_token_ids": True}
        request = urllib.request.Request(url, json.dumps(body).encode())
        answer = json.load(urllib.request.urlopen(request))["choices"][0]
        return [int(name.removeprefix("token_id:")) for name in answer["logprobs"]["tokens"]]

    with ThreadPoolExecutor(ROWS) as clients:
        return list(clients.map(ask, prompts, sizes))


FORMS = {"plain, growing cache": plain, "ours": ours}
if find_spec("uvicorn") and find_spec("fastapi"):
    FORMS["ours, over HTTP"] = served
QUANTISED = {f"ours, {kind}": kind for kind in KINDS}


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
        """All of one length, so that the plain forms need no padding."""
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
    model, call = case.model(QUANTISED.get(form, "fp32")), FORMS.get(form, ours)
    if call is not plain:
        column_major(model)
    call(model, [[1, 2]], [2])                              # loads the code of the kernels
    with peak_above(device) as above:
        call(model, prompts, [min(2, size) for size in sizes])
        answers, seconds = timed(lambda: call(model, prompts, sizes), device)
    if saved:
        tokens = torch.tensor([token for answer in answers for token in answer])
        torch.save({"tokens": tokens.double()}, saved)
    return {"seconds": seconds, "peak": above(),
            "weights_mb": sum(weight.nbytes for weight in model.parameters()) / 2 ** 20}


COLUMNS = {"case": "{case}", "form": "{form}", "seconds": "{seconds:.2f}",
           "useful tokens/s": "{tokens_per_s:,.0f}", "speed": "{speed:.2f} x",
           "peak MB": "{peak_mb:,.0f}", "peak / plain": "1/{peak_ratio:.1f}",
           "weights MB": "{weights_mb:,.0f}"}


def rows_of(case: Case, repeats: int) -> list[dict]:
    """A row for each form."""
    # Tolerance 0: another token is another answer. Where two tokens are equally likely, rounding
    # may decide, and the run stops though nothing is wrong: take another --seed.
    tolerances = dict.fromkeys(FORMS, 0.0) | dict.fromkeys(QUANTISED, math.inf)
    rows = with_ratios(compare(measure, case, tolerances, repeats, tolerances), case=case.name)
    return [row | {"tokens_per_s": sum(case.sizes()) / row["seconds"]} for row in rows]


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

    with checking_input(), tempfile.TemporaryDirectory() as weights:
        cases = [Case(name, args.prompt, args.new_tokens, args.dim, args.n_layers, args.seed,
                      args.device, args.threads, weights) for name in args.cases]
        write_weights(cases[0])                             # the same for every case
        rows = [row for case in cases for row in rows_of(case, args.repeats)]

    print(f"greedy; {args.dim} x {args.n_layers}, vocabulary {VOCAB_SIZE:,}, {args.prompt} tokens "
          f"per prompt, up to {args.new_tokens} new\n\n{table(rows, COLUMNS)}\n\n{setting(args)};\n"
          "speed, peak: relative to the growing cache; peak above the weights")
    write_json(args, rows)


if __name__ == "__main__":
    main()
