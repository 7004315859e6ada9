"""
OpenAI 的协议：对话、续写、给定词元的对数概率；不同的请求由引擎合成一个批次。
OpenAI's protocol: chats, completions, log-probabilities of given tokens. Engines batch requests.

    GET  /health, /v1/models
    POST /v1/chat/completions    messages, stream, temperature, top_p, top_k, max_tokens, stop, n,
                                 seed, logprobs, top_logprobs
    POST /v1/completions         the same with a prompt, or prompts: texts or lists of ids;
                                 logprobs: a number; echo: the prompt too, with its
                                 log-probabilities, what a teacher is asked for; with max_tokens 0
                                 that alone

With return_tokens_as_token_ids a token is "token_id:17" in log-probabilities, instead of its text.
"""

import asyncio
import hmac
import json
import time
import uuid
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from model.tokenizer import ROLES
from runtime.log import Logger
from serving.engine import Answer, Engine, Full, Reading, Token

MAX_BODY = 4 << 20          # bytes of a request
MAX_TOP = 100               # most likely tokens that are reported at each position
MAX_ANSWERS = 16            # n, or prompts of one request

# What a request may say: the type, the default, and the smallest and largest value.
FIELDS = {"temperature": (float, 1.0, 0, 10), "top_p": (float, 1.0, 0, 1),
          "top_k": (int, 0, 0, 1 << 20), "max_tokens": (int, None, 0, 1 << 20),
          "n": (int, 1, 1, MAX_ANSWERS), "seed": (int, None, -1 << 62, 1 << 62),
          "top_logprobs": (int, 0, 0, MAX_TOP),
          "stream": (bool, False, 0, 1), "echo": (bool, False, 0, 1),
          "return_tokens_as_token_ids": (bool, False, 0, 1)}


class Refused(Exception):
    def __init__(self, status: int, message: str, **headers: str):
        self.status, self.message, self.headers = status, message, headers


def make_app(engines: dict[str, Engine], key: str | None = None) -> FastAPI:
    """key: what clients must send as `Authorization: Bearer KEY`; None: nothing."""
    app = FastAPI(title="MiniDistill", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refuse(request, refused):
        kind = "invalid_request_error" if refused.status < 500 else "server_error"
        return JSONResponse({"error": {"message": refused.message, "type": kind,
                                       "code": refused.status}}, refused.status, refused.headers)

    @app.exception_handler(Exception)
    async def fail(request, error):
        return await refuse(request, Refused(500, "internal error; the server's log has more"))

    @app.middleware("http")
    async def check_key(request: Request, call_next):
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and request.url.path.startswith("/v1") and not hmac.compare_digest(
                given.encode(), key.encode()):
            return await refuse(request, Refused(401, "wrong or no key: Authorization: Bearer KEY"))
        return await call_next(request)

    @app.get("/health")
    async def health():
        return {name: {"answering": len(engine.rows.owners), "waiting": engine.n_waiting()}
                for name, engine in engines.items()}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "minidistill",
             "max_model_len": engine.model.config.max_seq_len} for name, engine in engines.items()]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request):
        body = await read_body(request)
        engine = pick(engines, body)
        prompt = engine.tokenizer.encode_chat(read_messages(body), add_generation_prompt=True)[0]
        n_top = body["top_logprobs"] if body.get("logprobs") else None
        return await answer(request, body, engine, [prompt], n_top, as_chat=True)

    @app.post("/v1/completions")
    async def complete(request: Request):
        body = await read_body(request)
        engine = pick(engines, body)
        prompts = read_prompts(body, engine)
        n_top = body.get("logprobs")
        if n_top is not None and not (type(n_top) is int and 0 <= n_top <= MAX_TOP):
            raise Refused(400, f"logprobs is {n_top!r}: an integer from 0 to {MAX_TOP}")
        return await answer(request, body, engine, prompts, n_top, as_chat=False)

    return app


# -- what a request says ---------------------------------------------------------------------------


async def read_body(request: Request) -> dict:
    """Its JSON, with defaults, values in their ranges."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise Refused(413, f"the body has more than {MAX_BODY:,} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    body.setdefault("max_tokens", body.get("max_completion_tokens"))
    for name, (kind, default, low, high) in FIELDS.items():
        value = default if body.get(name) is None else body[name]
        good = type(value) is kind or kind is float and type(value) is int
        if value is not default and not (good and low <= value <= high):
            raise Refused(400, f"{name} is {value!r}: a {kind.__name__} from {low} to {high}")
        body[name] = value
    stops = body.get("stop") or []
    body["stop"] = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, (str, list)) or not all(isinstance(each, str) and each
                                                     for each in body["stop"]):
        raise Refused(400, "stop is a text, or a list of texts")
    return body


def pick(engines, body) -> Engine:
    if body.get("model") not in engines:
        raise Refused(404, f"no model {body.get('model')!r}; this server has {', '.join(engines)}")
    return engines[body["model"]]


def read_messages(body) -> list[dict]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is a list of {role, content}")
    read = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):                   # parts; those that are no text are refused
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str) or message.get("role") not in ROLES:
            raise Refused(400, f"messages[{i}] needs a role of {', '.join(ROLES)} and a text")
        read.append({"role": message["role"], "content": content})
    return read


def read_prompts(body, engine: Engine) -> list[list[int]]:
    prompt, tokenizer = body.get("prompt"), engine.tokenizer
    if isinstance(prompt, str) or isinstance(prompt, list) and prompt and type(prompt[0]) is int:
        prompt = [prompt]
    if not isinstance(prompt, list) or not 1 <= len(prompt) <= MAX_ANSWERS:
        raise Refused(400, f"prompt is a text, a list of ids, or up to {MAX_ANSWERS} of them")
    start, prompts = [] if tokenizer.bos is None else [tokenizer.bos], []
    for each in prompt:
        ids = start + tokenizer.encode(each) if isinstance(each, str) else each
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < engine.model.n_tokens
                                                for i in ids):
            raise Refused(400, f"prompt: ids are integers from 0 to {engine.model.n_tokens - 1}")
        prompts.append(ids)
    return prompts


# -- answers ---------------------------------------------------------------------------------------


async def answer(request: Request, body: dict, engine: Engine, prompts, n_top: int | None,
                 as_chat: bool):
    """The response to n answers to each prompt."""
    max_seq_len = engine.model.config.max_seq_len
    alone = body["echo"] and body["max_tokens"] == 0            # only the prompts are read
    if body["echo"] and body["stream"]:
        raise Refused(400, "echo is for whole answers: leave out stream")
    for prompt in prompts:
        if not prompt or len(prompt) + (not alone) > max_seq_len:
            raise Refused(400, f"a prompt of {len(prompt):,} tokens; the model reads "
                               f"{max_seq_len:,} with the answer")
    prompts = [prompt for prompt in prompts for _ in range(body["n"])]
    listeners, requests = [], []
    for i, prompt in enumerate(prompts):
        queue = asyncio.Queue()
        emit = partial(asyncio.get_running_loop().call_soon_threadsafe, queue.put_nowait)
        reading = Reading(prompt, emit, n_top or 0) if body["echo"] else None
        limit = min(body["max_tokens"] or max_seq_len, max_seq_len - len(prompt))
        seed = None if body["seed"] is None else body["seed"] + i % body["n"]
        own = None if alone else Answer(prompt, limit, emit, body["temperature"], body["top_p"],
                                        body["top_k"], seed, n_top or 0)
        requests += [each for each in (reading, own) if each]
        listeners.append(Listener(i, queue, reading, own, engine, body["stop"]))
    try:
        engine.submit(*requests)
    except Full:
        raise Refused(429, "too many requests are waiting", **{"Retry-After": "1"}) from None
    form = Form(body, engine, n_top, as_chat)
    if body["stream"]:
        return StreamingResponse(form.events(listeners), media_type="text/event-stream")
    work = asyncio.gather(*(listener.whole() for listener in listeners))
    while not work.done():
        await asyncio.wait([work], timeout=0.5)
        if await request.is_disconnected():
            work.cancel()                               # each listener gives back its row
            break
    return JSONResponse(form.whole(await work))


class Listener:
    """What an engine writes for one answer, as pieces of text."""

    def __init__(self, index, queue, reading, own, engine, stops):
        self.index, self.queue, self.reading, self.answer = index, queue, reading, own
        self.tokenizer, self.stops = engine.tokenizer, stops
        self.read = []                                  # Tokens of the prompt, but the first

    async def pieces(self):
        """(text, its Tokens, None), ...; at the end the reason: "stop" or "length"."""
        ends = self.tokenizer.end_of_turn, self.tokenizer.end_of_text
        ids, tokens, sent, last = [], [], 0, None
        reason = None if self.answer else "length"
        try:
            if self.reading:
                self.read = await self.next()
            while reason is None:
                token = await self.next()
                if token is None:
                    reason = "stop" if last in ends else "length"
                else:
                    last = token.id
                    tokens.append(token)
                    ids += [last] if last not in ends else []
                text = self.tokenizer.decode(ids)
                found = [at for at in map(text.find, self.stops) if at >= 0]
                if found:
                    text, reason = text[:min(found)], "stop"
                end = len(text) - (0 if reason else held_back(text, self.stops))
                if end > sent or reason:
                    yield text[sent:end], tokens, reason
                    sent, tokens = end, []
            if not self.answer:
                yield "", [], reason
        finally:
            for each in (self.answer, self.reading):
                if each:
                    each.cancelled = True

    async def next(self):
        got = await self.queue.get()
        if isinstance(got, Exception):
            raise got
        return got

    async def whole(self):
        """(text, Tokens, reason) of the whole answer."""
        texts, tokens = [], []
        async for text, more, reason in self.pieces():
            texts.append(text)
            tokens += more
        return "".join(texts), tokens, reason, self


def held_back(text: str, stops: list[str]) -> int:
    """Characters at the end that may still change: a half-written one, or the begin of a stop."""
    longest = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                  default=0)
    return max(longest, len(text) - len(text.rstrip("\ufffd")))


class Form:
    """Answers in the form of the protocol."""

    def __init__(self, body, engine: Engine, n_top: int | None, as_chat: bool):
        self.body, self.engine, self.n_top, self.as_chat = body, engine, n_top, as_chat
        self.head = {"id": f"{'chatcmpl' if as_chat else 'cmpl'}-{uuid.uuid4().hex}",
                     "created": int(time.time()), "model": engine.name}

    def whole(self, answers) -> dict:
        choices = []
        for text, tokens, reason, listener in answers:
            if listener.reading:
                text = self.engine.tokenizer.decode(listener.reading.tokens) + text
                tokens = [Token(listener.reading.tokens[0], None, []), *listener.read, *tokens]
            said = ({"message": {"role": "assistant", "content": text}} if self.as_chat
                    else {"text": text})
            choices.append({"index": listener.index, **said, "logprobs": self.log_probs(tokens),
                            "finish_reason": reason})
        n_prompt = sum(len(each[3].answer.prompt if each[3].answer else each[3].reading.tokens)
                       for each in answers)
        n_new = sum(len(tokens) for _, tokens, *_ in answers)
        kind = "chat.completion" if self.as_chat else "text_completion"
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_new,
                 "total_tokens": n_prompt + n_new}
        return self.head | {"object": kind, "choices": choices, "usage": usage}

    async def events(self, listeners):
        """Server-sent events: a chunk per piece of text of any of the answers."""
        merged = asyncio.Queue()
        kind = "chat.completion.chunk" if self.as_chat else "text_completion"

        async def forward(listener):
            try:
                async for piece in listener.pieces():
                    await merged.put((listener.index, *piece))
            except Exception as error:          # of the engine, whatever a model may raise
                await merged.put(error)

        tasks = [asyncio.create_task(forward(listener)) for listener in listeners]
        running, n_new = len(tasks), 0
        try:
            while running:
                got = await merged.get()
                if isinstance(got, Exception):
                    Logger(f"{self.engine.name}: {type(got).__name__}: {got}")
                    yield event({"error": {"message": "internal error", "type": "server_error"}})
                    return
                index, text, tokens, reason = got
                n_new += len(tokens)
                running -= reason is not None
                said = ({"delta": {"role": "assistant", "content": text}} if self.as_chat
                        else {"text": text})
                yield event(self.head | {"object": kind, "choices": [
                    {"index": index, **said, "logprobs": self.log_probs(tokens),
                     "finish_reason": reason}]})
            if (self.body.get("stream_options") or {}).get("include_usage"):
                yield event(self.head | {"object": kind, "choices": [], "usage": {
                    "completion_tokens": n_new}})
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:                          # the client has left: rows are given back
                task.cancel()

    def log_probs(self, tokens: list[Token]) -> dict | None:
        if self.n_top is None:
            return None
        if self.as_chat:
            return {"content": [
                self.entry(token.id, token.log_p) | {"top_logprobs": [self.entry(*pair)
                                                                      for pair in token.top]}
                for token in tokens]}
        return {"tokens": [self.name(token.id) for token in tokens],
                "token_logprobs": [token.log_p for token in tokens],
                "top_logprobs": [{self.name(i): log_p for i, log_p in token.top} or None
                                 for token in tokens]}

    def name(self, i: int) -> str:
        if self.body["return_tokens_as_token_ids"]:
            return f"token_id:{i}"
        return self.engine.tokenizer.names.get(i) or self.engine.tokenizer.decode([i])

    def entry(self, i: int, log_p: float) -> dict:
        name = self.name(i)
        return {"token": name, "logprob": log_p, "bytes": list(name.encode())}


def event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
