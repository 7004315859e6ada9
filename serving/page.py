"""
网页的数据：两个模型在同一个回答上的分布，out/ 里的训练曲线与比较表。
What the page at / asks for: two models' distributions over one answer; curves and tables in out/.
"""

import base64
from pathlib import Path
from typing import Annotated

import torch
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from runtime.files import read_rows
from serving.api import Message, pick, read_body
from serving.engine import Engine

FILES = Path(__file__).parent / "page"
MAX_ROWS = 2000             # of a run's log that are sent
AT_ONCE = 256               # positions whose logits are in memory together
SECURITY = {"Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
                                       "form-action 'none'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache"}


class Pair(BaseModel, strict=True):
    """Two models and what both read: a conversation, and the ids of an answer to it."""

    models: Annotated[list[str], Field(min_length=2, max_length=2)]
    messages: list[Message] = Field(min_length=1)
    answer: list[int] = []
    temperature: float = Field(1.0, ge=0.05, le=10)


def add_page(app: FastAPI, engines: dict[str, Engine], out: Path):
    """out: the folder of the runs."""

    @app.get("/")
    @app.get("/page/{name}")
    def page(name: str = "index.html"):
        if name not in ("index.html", "app.js", "style.css", "icon.svg"):
            raise HTTPException(404, f"no file {name}")
        return FileResponse(FILES / name, headers=SECURITY)

    @app.get("/v1/page/vocabulary/{model:path}")
    def vocabulary(model: str):
        """The bytes of each token, as characters from 0 to 255."""
        engine = pick(engines, model)
        texts = {i: name.encode() for i, name in engine.tokenizer.names.items()}
        texts |= {i: token for token, i in engine.tokenizer.ranks.items()}
        return [texts.get(i, b"").decode("latin-1") for i in range(engine.model.n_tokens)]

    @app.post("/v1/page/compare")
    async def compare(request: Request):
        """What two models predict at each token of an answer and after it; see `divergences`."""
        body = await read_body(request, Pair)
        pair = [pick(engines, name) for name in body.models]
        return await pair[0].read(divergences, pair, body)

    @app.get("/v1/page/files")
    def files():
        """{path: time of its last change} of runs' logs and of tables, newest first."""
        times = {path: path.stat().st_mtime for path in out.rglob("*.*")
                 if path.resolve().is_relative_to(out.resolve()) and is_shown(path)}
        return {str(path.relative_to(out)): times[path]
                for path in sorted(times, key=times.get, reverse=True)[:200]}

    @app.get("/v1/page/files/{name:path}")
    def file(name: str):
        if name not in files():
            raise HTTPException(404, f"no file {name}")
        if name.endswith(".jsonl"):
            return read_rows(out / name, "step")[-MAX_ROWS:]
        return (out / name).read_text(encoding="utf-8")


def is_shown(path: Path) -> bool:
    """A table of comparisons; or a log of runtime/log.py, not other rows, such as answers."""
    if path.suffix == ".jsonl" and path.is_file():
        with open(path, "rb") as file:
            return file.read(8) == b'{"step":'
    return path.name in ("table.md", "report.md")


@torch.inference_mode()
def divergences(pair: list[Engine], body: Pair) -> dict:
    """KL(first || second) and both entropies, in nats, at each token of the answer and after it;
    both models' logits of what follows, fp32 in base64; and the prompt's ids."""
    (first, second), found = pair, {"kl": [], "entropies": [[], []]}
    if reason := first.tokenizer.conflict(second.tokenizer.ids):
        raise HTTPException(400, f"the two have no common vocabulary: {reason}")
    prompt = first.tokenizer.encode_chat([each.model_dump() for each in body.messages],
                                         add_generation_prompt=True)[0]
    limit = min(engine.model.config.max_seq_len for engine in pair)
    n = min(engine.model.n_tokens for engine in pair)
    if len(prompt + body.answer) > limit or not all(0 <= i < n for i in body.answer):
        raise HTTPException(400, f"answer: ids below {n}, with the prompt at most {limit}")
    states = [engine.states(prompt + body.answer)[0][len(prompt) - 1:].split(AT_ONCE)
              for engine in pair]
    for part in zip(*states):
        logits = [engine.model.logits(each)[:, :n].float() for engine, each in zip(pair, part)]
        log_p, log_q = ((each / body.temperature).log_softmax(dim=-1) for each in logits)
        found["kl"] += (log_p.exp() * (log_p - log_q)).sum(dim=-1).tolist()
        for entropies, log in zip(found["entropies"], (log_p, log_q)):
            entropies += (-log.exp() * log).sum(dim=-1).tolist()
    last = (each[-1].cpu().numpy().tobytes() for each in logits)
    return found | {"logits": [base64.b64encode(each).decode() for each in last], "prompt": prompt}
