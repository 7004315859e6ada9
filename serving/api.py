"""
OpenAI 的协议：对话、续写、给定词元的对数概率；不同的请求由引擎合成一个批次。
OpenAI's protocol: chats, completions, log-probabilities of given tokens. Engines batch requests.

    GET  /health, /v1/models
    POST /v1/chat/completions, /v1/completions: the classes Chat and Completion are what they read
"""

import asyncio
import hmac
import json
import time
import uuid
from typing import Annotated, ClassVar, Literal

import torch
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AliasChoices, BaseModel, Field, ValidationError, field_validator
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from model.tokenizer import ROLES
from runtime.log import Logger
from serving.engine import Answer, Engine, Token

MAX_BODY = 4 << 20          # bytes of a request
MAX_TOP = 100               # most likely tokens that are reported at each position
MAX_ANSWERS = 16            # to a prompt; prompts of a request; texts that stop an answer
Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[int], Field(min_length=1)]


class Body(BaseModel, strict=True):
    """What any request may say. Fields that are not here are ignored."""

    model: str
    temperature: float = Field(1.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=0, validation_alias=AliasChoices(
        "max_tokens", "max_completion_tokens"))
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    seed: int | None = Field(None, ge=0, le=1 << 62)        # + i for the answer i to a prompt
    stop: Text | Annotated[list[Text], Field(max_length=MAX_ANSWERS)] | None = None
    stream: bool = False
    stream_options: dict | None = None
    return_tokens_as_token_ids: bool = False        # "token_id:17" instead of a token's text


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal[ROLES]
    content: str | list[Part]

    @field_validator("content")
    @classmethod
    def joined(cls, content) -> str:
        return content if isinstance(content, str) else "".join(part.text for part in content)


class Chat(Body):
    messages: list[Message] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)
    echo: ClassVar = False

    @property
    def n_top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def prompts(self, engine: Engine) -> list[list[int]]:
        messages = [each.model_dump() for each in self.messages]
        return [engine.tokenizer.encode_chat(messages, add_generation_prompt=True)[0]]


class Completion(Body):
    """echo: nothing is written; the prompt returns with its log-probabilities, for a student."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=MAX_ANSWERS)]
    n_top: int | None = Field(None, ge=0, le=MAX_TOP, validation_alias="logprobs")
    echo: bool = False

    def prompts(self, engine: Engine) -> list[list[int]]:
        tokenizer, n = engine.tokenizer, engine.model.n_tokens
        is_one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        prompts = [begin + tokenizer.encode(each) if isinstance(each, str) else each
                   for each in ([self.prompt] if is_one else self.prompt)]
        if not all(0 <= i < n for ids in prompts for i in ids):
            raise HTTPException(400, f"prompt: ids are integers from 0 to {n - 1}")
        return prompts


def make_app(engines: dict[str, Engine], key: str | None = None) -> FastAPI:
    """key: what clients must send as `Authorization: Bearer KEY`; None: nothing."""

    async def check_key(request: Request):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and request.url.path.startswith("/v1") and not hmac.compare_digest(
                given.encode(), key.encode()):
            raise HTTPException(401, "wrong or no key: Authorization: Bearer KEY")

    app = FastAPI(title="MiniDistill", docs_url=None, redoc_url=None, openapi_url=None,
                  dependencies=[Depends(check_key)])

    @app.exception_handler(HTTPException)
    async def refuse(request, error):
        return JSONResponse({"error": {"message": error.detail, "type": "invalid_request_error",
                                       "code": error.status_code}},
                            error.status_code, error.headers)

    @app.get("/health")
    async def health():
        return {name: {"answering": len(engine.rows.owners),
                       "waiting": len(engine.waiting) + engine.n_readings}
                for name, engine in engines.items()}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "minidistill",
             "max_model_len": engine.model.config.max_seq_len} for name, engine in engines.items()]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        return await respond(request, await read_body(request, Chat), engines)

    @app.post("/v1/completions")
    async def complete(request: Request):
        return await respond(request, await read_body(request, Completion), engines)

    return app


async def read_body(request: Request, kind: type[BaseModel]):
    if int(request.headers.get("content-length", MAX_BODY + 1)) > MAX_BODY:
        raise HTTPException(413, f"give a Content-Length, of at most {MAX_BODY:,} bytes")
    try:
        return kind.model_validate_json(await request.body())
    except ClientDisconnect:
        raise HTTPException(499, "the client has left") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(400, f"{place}: {first['msg']}") from None


def pick(engines: dict[str, Engine], name: str) -> Engine:
    if name not in engines:
        raise HTTPException(404, f"no model {name!r}; this server has {', '.join(engines)}")
    return engines[name]


async def respond(request: Request, body: Chat | Completion, engines: dict[str, Engine]):
    """n answers to each prompt, whole or as a stream."""
    engine = pick(engines, body.model)
    if body.echo and body.stream or not body.echo and body.max_tokens == 0:
        raise HTTPException(400, "echo: leave out stream; without echo max_tokens is at least 1")
    max_seq_len = engine.model.config.max_seq_len
    prompts = await asyncio.to_thread(body.prompts, engine)     # 4 MB take a second
    for prompt in prompts:
        if not 0 < len(prompt) <= max_seq_len - (not body.echo):
            raise HTTPException(400, f"prompt: has {len(prompt):,} tokens; the model reads "
                                     f"{max_seq_len:,} with the answer")
    reply = Reply(body, engine, prompts)
    if body.stream:
        return StreamingResponse(reply.events(), media_type="text/event-stream")
    whole = asyncio.create_task(reply.whole())
    left = asyncio.create_task(request.receive())       # after its body a client only hangs up
    await asyncio.wait([whole, left], return_when=asyncio.FIRST_COMPLETED)
    left.cancel()
    if not whole.done():
        whole.cancel()
        return Response(status_code=499)                # nobody reads it
    return Response(await whole, media_type="application/json")


class Choice:
    """One answer, as its engine writes it."""

    def __init__(self, index: int, prompt: list[int], body: Body, engine: Engine, queue):
        self.index, self.prompt, self.engine = index, prompt, engine
        self.reason, self.n_tokens = None, 0            # why it ended; all tokens
        self.text, self.tokens, self.half = "", [], []  # not sent yet; ids that end in a character
        self.stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.held = max(map(len, self.stops), default=1) - 1        # characters a stop may begin in
        loop, room = asyncio.get_running_loop(), engine.model.config.max_seq_len - len(prompt)
        temperature = body.temperature if body.temperature > 1e-3 else 0.0  # logits / 1e-40: inf
        generator = None if body.seed is None else torch.Generator(
            engine.rows.device).manual_seed(body.seed + index % body.n)
        self.answer = Answer(
            prompt, min(body.max_tokens or room, room),
            lambda got: loop.call_soon_threadsafe(queue.put_nowait, (self, got)),
            (temperature, body.top_k, body.top_p, generator), body.n_top or 0)

    def echo(self, tokens: list[Token]):
        """The prompt instead of an answer."""
        self.text, self.reason = self.engine.tokenizer.decode(self.prompt), "length"
        self.tokens = [Token(self.prompt[0], None, []), *tokens]

    def add(self, got: Token | str):
        """One more Token, or at the end the reason."""
        if isinstance(got, str):
            self.reason = got
        else:
            self.tokens.append(got)
            self.n_tokens += 1
            self.half += [] if got.id in self.engine.ends else [got.id]
        text = self.engine.tokenizer.decode(self.half)
        if self.reason or not text.endswith("\ufffd"):
            self.text, self.half = self.text + text, []
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.reason = self.text[:min(found)], "stop"
            self.answer.cancelled = True                # gives back its row


class Reply:
    """The answers to one request, in the form of the protocol."""

    def __init__(self, body: Chat | Completion, engine: Engine, prompts: list[list[int]]):
        self.body, self.engine, self.prompts = body, engine, prompts
        self.as_chat, self.queue = isinstance(body, Chat), asyncio.Queue()
        self.head = {"id": f"{'chatcmpl' if self.as_chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "created": int(time.time()), "model": engine.name}
        self.choices = [Choice(i, prompts[i // body.n], body, engine, self.queue)
                        for i in range(len(prompts) * body.n)]
        if not body.echo:
            engine.submit(*(choice.answer for choice in self.choices))

    def __del__(self):
        """The client has its answers, or has left: rows are given back."""
        for choice in self.choices:
            choice.answer.cancelled = True

    async def changed(self):
        """Whichever choice the engine has said more of, until all are done."""
        if self.body.echo:
            read = await self.engine.read(self.engine.log_probs, self.prompts, self.body.n_top or 0)
            for choice in self.choices:
                choice.echo(read[choice.index // self.body.n])
        while not all(choice.reason for choice in self.choices):
            choice, got = await self.queue.get()
            if isinstance(got, Exception):
                raise got
            if not choice.reason:                       # else it follows a stop
                choice.add(got)
                yield choice

    async def whole(self) -> bytes:
        async for _ in self.changed():
            pass
        return await asyncio.to_thread(self.written)    # log-probabilities may be megabytes

    def written(self) -> bytes:
        choices = [self.choice(each, "message") for each in self.choices]
        whole = self.form("chat.completion", choices) | self.usage()
        return json.dumps(whole, ensure_ascii=False).encode()

    async def events(self):
        """Server-sent events: a chunk per piece of text of any of the answers."""
        try:
            async for each in self.changed():
                yield event(self.form("chat.completion.chunk", [self.choice(each, "delta")]))
            if (self.body.stream_options or {}).get("include_usage"):
                yield event(self.form("chat.completion.chunk", []) | self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:                      # of the engine: whatever a model may raise
            Logger(f"{self.body.model}: {type(error).__name__}: {error}")
            yield event({"error": {"message": "internal error", "type": "server_error"}})

    def form(self, kind: str, choices: list[dict]) -> dict:
        return self.head | {"object": kind if self.as_chat else "text_completion",
                            "choices": choices}

    def choice(self, each: Choice, name: str) -> dict:
        """What came since the last call, but for an end of the text that may begin a stop."""
        end = len(each.text) if each.reason else max(0, len(each.text) - each.held)
        text, tokens, each.text, each.tokens = each.text[:end], each.tokens, each.text[end:], []
        said = {name: {"role": "assistant", "content": text}} if self.as_chat else {"text": text}
        return {"index": each.index, **said, "finish_reason": each.reason,
                "logprobs": None if self.body.n_top is None else self.log_probs(tokens)}

    def usage(self) -> dict:
        n_prompt = sum(map(len, self.prompts))
        n_new = sum(each.n_tokens for each in self.choices)
        return {"usage": {"prompt_tokens": n_prompt, "completion_tokens": n_new,
                          "total_tokens": n_prompt + n_new}}

    def log_probs(self, tokens: list[Token]) -> dict:
        if self.as_chat:
            return {"content": [
                self.entry(i, log_p) | {"top_logprobs": [self.entry(*pair) for pair in top]}
                for i, log_p, top in tokens]}
        return {"tokens": [self.name(token.id) for token in tokens],
                "token_logprobs": [token.log_p for token in tokens],
                "top_logprobs": [{self.name(i): log_p for i, log_p in token.top} or None
                                 for token in tokens]}

    def entry(self, i: int, log_p: float) -> dict:
        return {"token": self.name(i), "logprob": log_p, "bytes": None}

    def name(self, i: int) -> str:
        if self.body.return_tokens_as_token_ids:
            return f"token_id:{i}"
        return self.engine.tokenizer.names.get(i) or self.engine.tokenizer.decode([i])


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
