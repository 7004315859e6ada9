"""
网页的数据：两个模型在同一个回答上的分布，out/ 里的训练曲线与比较表。
What the page at / asks for: two models' distributions over one answer; curves and tables in out/.
"""

import asyncio
import base64
import json
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse

from serving.api import Refused, pick, read_body, read_messages
from serving.engine import Engine, Full, Reading

FILES = Path(__file__).parent / "page"
MAX_ROWS = 2000             # of a run's log that are sent
SECURITY = {"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
                                       "connect-src 'self'; img-src 'self'; base-uri 'none'; "
                                       "form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache"}


def add_page(app: FastAPI, engines: dict[str, Engine], out: Path):
    """out: the folder of the runs."""

    @app.get("/")
    @app.get("/page/{name}")
    async def page(name: str = "index.html"):
        if name not in ("index.html", "app.js", "style.css"):
            raise Refused(404, f"no file {name}")
        return FileResponse(FILES / name, headers=SECURITY)

    @app.get("/v1/page/vocabulary/{model}")
    async def vocabulary(model: str):
        engine = pick(engines, {"model": model})
        tokenizer = engine.tokenizer
        return [tokenizer.names.get(i) or tokenizer.decode([i])
                for i in range(engine.model.n_tokens)]

    @app.post("/v1/page/compare")
    async def compare(request: Request):
        """KL(first || second) and both entropies at each token of an answer, at a temperature."""
        body = await read_body(request)
        pair, tokens, n_prompt = read_pair(engines, body)
        T = max(body["temperature"], 0.05)
        log_p, log_q = [(logits / T).log_softmax(dim=-1)
                        for logits in await asyncio.gather(*(
                            logits_of(engine, tokens, n_prompt - 1) for engine in pair))]
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        entropies = [-(each.exp() * each).sum(dim=-1) for each in (log_p, log_q)]
        own = [each[:-1].gather(1, torch.tensor(tokens[n_prompt:])[:, None]).squeeze(1)
               for each in (log_p, log_q)]
        return {"tokens": tokens, "n_prompt": n_prompt, "kl": kl.tolist(),
                "entropies": [each.tolist() for each in entropies],
                "log_p": [each.tolist() for each in own]}

    @app.post("/v1/page/distribution")
    async def distribution(request: Request):
        """Both models' logits of what follows `tokens`, fp32 in base64."""
        body = await read_body(request)
        pair, tokens, _ = read_pair(engines, body)
        both = await asyncio.gather(*(logits_of(each, tokens, len(tokens) - 1) for each in pair))
        return {"logits": [base64.b64encode(each[0].numpy().tobytes()).decode() for each in both]}

    @app.get("/v1/page/runs")
    async def runs():
        """{name: time of its last row}, newest first."""
        logs = [path for path in out.rglob("*.jsonl") if path.with_suffix(".pth").exists()]
        logs = sorted(logs, key=lambda path: -path.stat().st_mtime)[:200]
        return {str(path.relative_to(out).with_suffix("")): path.stat().st_mtime for path in logs}

    @app.get("/v1/page/runs/{name:path}")
    async def run(name: str):
        lines = read_below(out, f"{name}.jsonl").splitlines()
        return [json.loads(line) for line in lines[-MAX_ROWS:]]

    @app.get("/v1/page/tables")
    async def tables():
        return [str(path.relative_to(out)) for path in sorted(out.glob("*/table.md"))]

    @app.get("/v1/page/tables/{name:path}")
    async def table(name: str):
        return read_below(out, name)


def read_below(folder: Path, name: str) -> str:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or path.suffix not in (".jsonl", ".md"):
        raise Refused(404, f"no file {name}")
    if not path.is_file():
        raise Refused(404, f"no file {name}")
    text = path.read_text(encoding="utf-8")
    return text if text.endswith("\n") else text.rpartition("\n")[0]    # a row is being written


def read_pair(engines, body) -> tuple[list[Engine], list[int], int]:
    """Two engines with one tokenizer, the tokens to read, and how many of them are the prompt's."""
    names = body.get("models")
    if not isinstance(names, list) or len(names) != 2:
        raise Refused(400, "models is a list of two names")
    pair = [pick(engines, {"model": name}) for name in names]
    if reason := pair[0].tokenizer.conflict(pair[1].tokenizer.ids):
        raise Refused(400, f"the two have no common vocabulary: {reason}")
    tokens, n_prompt = body.get("tokens"), 1
    if tokens is None:
        tokenizer = pair[0].tokenizer
        tokens = tokenizer.encode_chat(read_messages(body), add_generation_prompt=True)[0]
        n_prompt = len(tokens)
        tokens += tokenizer.encode(str(body.get("answer", ""))) + [tokenizer.end_of_turn]
    limit = min(engine.model.config.max_seq_len for engine in pair)
    n = min(engine.model.n_tokens for engine in pair)
    if not (isinstance(tokens, list) and 0 < len(tokens) <= limit
            and all(type(i) is int and 0 <= i < n for i in tokens)):
        raise Refused(400, f"tokens is a list of 1 to {limit} ids below {n}")
    return pair, tokens, n_prompt


async def logits_of(engine: Engine, tokens: list[int], begin: int) -> torch.Tensor:
    queue = asyncio.Queue()
    emit = partial(asyncio.get_running_loop().call_soon_threadsafe, queue.put_nowait)
    try:
        engine.submit(Reading(tokens, emit, logits_from=begin))
    except Full:
        raise Refused(429, "too many requests are waiting", **{"Retry-After": "1"}) from None
    got = await queue.get()
    if isinstance(got, Exception):
        raise got
    return got.cpu()
