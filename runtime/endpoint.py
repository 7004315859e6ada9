"""
接口的客户端与代理：OpenAI 的协议，总时间与回复大小都有上限，答复都留下记录。
Clients and agents of OpenAI's protocol: requests are bounded in time and size, replies are kept.
"""

import hashlib
import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from glob import escape
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import torch.distributed as dist
from tqdm import tqdm

from runtime.log import Logger

MAX_BODY = 1 << 26          # bytes of a reply: the log-probabilities of 100,000 tokens
MAX_FAILURES = 10           # failed requests in a row: the endpoint is down, not the request
FATAL = (401, 403, 404)     # wrong key, no permission, wrong model name: every request would fail


class OutOfBudget(ValueError):
    """An agent has used its tokens. Its replies so far are in its file."""


def make_client(url: str, key_env: str | None, retries: int, timeout: float, before=None):
    """(an openai.OpenAI, its key). Raises ValueError for a wrong URL, a missing package or key.

    timeout     seconds of a whole attempt
    before      called before each attempt
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"*_url {url} must begin with http:// or https:// and end before "
                         "/chat/completions")
    try:
        import openai           # needed for endpoints only
    except ImportError:
        raise ValueError("an endpoint needs the openai package: pip install openai") from None
    # Without a key, the package would send the user's OPENAI_API_KEY.
    key = os.environ.get(key_env, "").strip() if key_env else "none"
    if not key:             # key_env is not repeated: it may be the key itself, by mistake
        raise ValueError("*_key_env names an environment variable with the API key; there is "
                         "none of this name, or it is empty. Type: export NAME=KEY")
    hooks = {"request": [*([before] if before else []), partial(bound_time, timeout)],
             "response": [bound_size]}
    return openai.OpenAI(
        base_url=url.rstrip("/"), api_key=key, timeout=timeout, max_retries=retries,
        default_headers={"Accept-Encoding": "identity"},
        http_client=openai.DefaultHttpxClient(event_hooks=hooks)), key


def bound_time(seconds: float, request):
    """A request hook: the whole attempt may take so many seconds, not only each read. No attempt
    shares its connection, whose reads end at its deadline."""
    deadline = monotonic() + seconds
    request.headers["Connection"] = "close"

    def watch(event, info):
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = info["return_value"]
            read = stream.read
            stream.read = lambda size, timeout: read(size, max(1e-3, deadline - monotonic()))

    request.extensions["trace"] = watch


def bound_size(response):
    """A response hook: a reply has at most MAX_BODY bytes, and is not compressed."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("a compressed reply, which was not requested")
    body = bytearray()
    for part in response.iter_raw():
        body += part
        if len(body) > MAX_BODY:
            raise ValueError(f"a reply of more than {MAX_BODY:,} bytes")
    response._content = bytes(body)


class EndpointAgent:
    """A model behind an endpoint of OpenAI's chat protocol (vLLM, llama.cpp, Ollama, ...). The
    openai package retries a failed request; this class adds a pace, a budget, and a record of all
    replies, so that a rerun sends no request twice.

    replies   JSONL file, a line per reply: {"request", "model", "reply", "tokens",
              "finish_reason"}. A failed request has "reply": null and "error", and the next run
              sends it again. Process r > 0 writes REPLIES.part{r}; all of these files are read
    budget    tokens, earlier runs included; running requests are completed when it is used

    n_processes divide budget, rpm and parallel among them; this one is `rank`. The other options
    are the flags of add_agent_args.
    """

    def __init__(self, url: str, model: str, replies, key_env: str | None = None, budget: int = 0,
                 rpm: float = 0, parallel: int = 8, retries: int = 5, timeout: float = 600.0,
                 rank: int = 0, n_processes: int = 1):
        self.client, self.key = make_client(url, key_env, retries, timeout, self.wait_for_turn)
        self.url, self.model = url.rstrip("/"), model
        self.name = f"{model} at {urlsplit(url).hostname}"
        self.parallel = max(1, parallel // n_processes)
        self.path, self.replies, spent = open_replies(Path(replies), rank)
        self.budget, self.left = budget, (budget - spent) // n_processes        # tokens
        self.gap = 60.0 * n_processes / rpm if rpm else 0.0         # seconds between two requests
        self.next_start, self.n_failed = 0.0, 0
        self.stop = threading.Event()
        self.gate, self.lock = threading.Lock(), threading.Lock()

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        rows = self.ask(conversations, max_new_tokens, temperature, seed)
        return [row["reply"] if row else "" for row in rows]

    def ask(self, conversations, max_new_tokens, temperature=0.0, seed=0, stop=None):
        """The lines of the file, until stop.requested; None for a failed request. Raises ValueError
        if the endpoint refuses key or model, and after MAX_FAILURES."""
        seen, requests = Counter(), []
        for messages in conversations:
            request = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens,
                       "temperature": temperature}
            if temperature > 0:     # greedy replies to equal conversations are one request
                text = json.dumps(messages)
                request["seed"] = random.Random(f"{seed} {seen[text]}").getrandbits(31)
                seen[text] += 1
            # The URL is a part of the key: "default" is another model elsewhere.
            key = json.dumps({"url": self.url, **request}, sort_keys=True)
            requests.append((hashlib.sha256(key.encode()).hexdigest(), request))
        missing = {key: request for key, request in requests if key not in self.replies}
        self.stop.clear()
        pool = ThreadPoolExecutor(self.parallel)
        try:
            running = [pool.submit(self.fetch, key, request) for key, request in missing.items()]
            for done in tqdm(as_completed(running), total=len(running), unit=" replies",
                             disable=None, leave=False):
                done.result()
                if stop and stop.requested:
                    break
        finally:                    # after an error or Ctrl-C, running requests are completed
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return [self.replies.get(key) for key, _ in requests]

    def wait_for_turn(self, _request):
        """Called by the client before each attempt."""
        with self.gate:
            self.stop.wait(max(0.0, self.next_start - monotonic()))
            self.next_start = monotonic() + self.gap

    def fetch(self, key: str, request: dict):
        """One reply, into the file. Raises OutOfBudget and the ValueErrors of generate."""
        if self.stop.is_set():
            return
        if self.budget and self.left <= 0:
            raise OutOfBudget(f"{self.name}: the budget of {self.budget:,} tokens is used. The "
                              f"replies are in {self.path}; a larger budget resumes")
        import openai
        row = {"request": key, "model": self.model, "reply": None, "tokens": 0}
        status = problem = None
        try:
            raw = self.client.chat.completions.with_raw_response.create(**request)
            row |= read_completion(raw.text, request["messages"])
            row["reply"] = self.without_key(row["reply"])
        except openai.APIStatusError as error:
            status, problem = error.status_code, f"{error.status_code} {error.response.text}"
        except openai.APIError as error:                    # no connection, or no reply in time
            problem = f"{error} ({error.__cause__!r})"
        except ValueError as error:                         # no completion
            problem = str(error)
        if problem:
            row["error"] = problem = f"{' '.join(self.without_key(problem).split()):.200}"
        with self.lock, open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.left -= row["tokens"]
            self.n_failed = self.n_failed + 1 if problem else 0
        if problem is None:
            self.replies[key] = row
            return
        Logger(f"{self.name}: no reply to request {key[:8]}: {problem}")
        if status in FATAL or self.n_failed >= MAX_FAILURES:
            self.stop.set()
            raise ValueError(f"{self.name}: {self.n_failed} failed requests in a row, the last: "
                             f"{problem}. Check that it is up, *_url, *_model, and the key in the "
                             f"variable of *_key_env. Replies are kept in {self.path}")

    def without_key(self, text: str) -> str:
        # A short, made-up key may be a part of any reply.
        return text.replace(self.key, "***") if len(self.key) >= 8 else text


def read_completion(body: str, messages: list[dict]) -> dict:
    """The reply, the tokens of prompt and reply, and why it ended. Raises ValueError for what is no
    chat completion."""
    prompt = "".join(message["content"] for message in messages)
    try:
        completion = json.loads(body)
        choice = completion["choices"][0]
        text = choice["message"]["content"] or ""                       # a refusal has none
        # JSON may hold half an emoji, of a reply that was cut; UTF-8 cannot.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
        n_bytes = len((prompt + text).encode(errors="replace"))             # about 3 a token
        tokens = (completion.get("usage") or {"total_tokens": -(-n_bytes // 3)})["total_tokens"]
        if type(tokens) is not int or tokens < 0:
            raise ValueError
        return {"reply": text, "tokens": tokens, "finish_reason": choice.get("finish_reason")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {body}") from None


def open_replies(path: Path, rank: int) -> tuple[Path, dict[str, dict], int]:
    """(file of this process, {request: line} of all files, tokens that they took). A last line that
    a kill cut short is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.name}.part{rank}") if rank else path
    replies, spent = {}, 0
    for file in [path, *sorted(path.parent.glob(f"{escape(path.name)}.part*"))]:
        *lines, rest = file.read_bytes().split(b"\n") if file.exists() else [b""]
        if rest and file == mine:
            os.truncate(file, file.stat().st_size - len(rest))
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                spent += row["tokens"]
                if row["reply"] is not None:
                    replies[row["request"]] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number} is no reply of an endpoint: {line!r:.80}. "
                                 "Remove the line, or give another file by *_replies") from None
    return mine, replies, spent


def add_agent_args(parser, role: str):
    """The flags of an agent: --ROLE, --ROLE_url, ..."""
    add = parser.add_argument_group(f"{role}: weights, or a model behind an endpoint").add_argument
    add(f"--{role}", help="weights: a checkpoint, a Hugging Face folder, a GGUF file")
    add(f"--{role}_url", help="or an endpoint of OpenAI's protocol, e.g. http://localhost:8000/v1")
    add(f"--{role}_model", help="name of the model at the endpoint")
    add(f"--{role}_key_env", help="environment variable with the API key; default: no key")
    add(f"--{role}_replies", help="JSONL file of the endpoint's replies, which a rerun reads; "
                                  f"default: out/replies/{role}.jsonl")
    add(f"--{role}_budget", type=int, default=0,
        help="maximum number of tokens, prompts and replies in that file together; 0: no limit")
    add(f"--{role}_rpm", type=float, default=0, help="requests per minute; 0: no limit")
    add(f"--{role}_parallel", type=int,
        help="concurrent conversations; default: 64 per process for weights, 8 at an endpoint")


def make_endpoint(flags: dict, role: str) -> EndpointAgent | None:
    """The endpoint of add_agent_args' flags; None for weights. Raises ValueError."""
    weights, url = flags[role], flags[f"{role}_url"]
    options = {name: flags[f"{role}_{name}"]
               for name in ("model", "key_env", "replies", "budget", "rpm")}
    if (weights is None) == (url is None):
        raise ValueError(f"give either --{role} WEIGHTS or --{role}_url URL, and not both")
    if url is None:
        if idle := [f"--{role}_{name}" for name, value in options.items() if value]:
            raise ValueError(f"{', '.join(idle)}: no effect without --{role}_url")
        return None
    if not options["model"]:
        raise ValueError(f"--{role}_url needs the model's name there: --{role}_model NAME")
    options["replies"] = options["replies"] or f"out/replies/{role}.jsonl"
    if dist.is_initialized():
        options |= {"rank": dist.get_rank(), "n_processes": dist.get_world_size()}
    return EndpointAgent(url, parallel=flags[f"{role}_parallel"] or 8, **options)
