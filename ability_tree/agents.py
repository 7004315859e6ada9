"""
代理：把一批对话交给一个模型，取回一批答复；模型在本地，或在一个 OpenAI 式的接口后面。
Agents: generate(conversations, max_new_tokens, temperature=0.0, seed=0) returns a reply to each
conversation, stripped, "" for none. Temperature 0 is greedy. Above 0 a reply depends on the seed
and the other conversations of the call; equal conversations get different replies.
"""

import hashlib
import json
import os
import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from glob import escape
from pathlib import Path
from time import monotonic
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluation.exam import write_answers
from interop.checkpoint import load_model, sha256_of_model
from model.generate import column_major
from runtime.endpoint import make_client
from runtime.log import Logger
from runtime.precision import pick_dtype

MAX_FAILURES = 10           # failed requests in a row: the endpoint is down, not the request
FATAL = (401, 403, 404)     # wrong key, no permission, wrong model name: every request would fail


class OutOfBudget(ValueError):
    """An agent has used its tokens. Its replies so far are in its file."""


class LocalAgent:
    """Any weights that load_model reads, with `rows` conversations per batch."""

    def __init__(self, path, device, rows: int = 64, dtype: torch.dtype = torch.float32):
        self.name, self.device, self.rows = str(path), device, rows
        self.model, self.tokenizer = load_model(path, device, dtype)
        column_major(self.model)

    def generate(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        return write_answers(self.model, self.tokenizer, conversations, max_new_tokens,
                             rows=self.rows, temperature=temperature,
                             generator=torch.Generator(self.device).manual_seed(seed))


class EndpointAgent:
    """A model behind an endpoint of OpenAI's chat protocol (vLLM, llama.cpp, Ollama, ...). The
    openai package retries a failed request; this class adds a pace, a budget, and a record of all
    replies, so that a rerun sends no request twice.

    replies   JSONL file, a line per reply: {"request", "model", "reply", "tokens"}. A failed
              request has "reply": null and "error", and the next run sends it again. Process r > 0
              writes REPLIES.part{r}; all of these files are read
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
        """Raises ValueError if the endpoint refuses key or model, and after MAX_FAILURES."""
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
        finally:                    # after an error or Ctrl-C, running requests are completed
            self.stop.set()
            pool.shutdown(cancel_futures=True)
        return [self.replies.get(key, "") for key, _ in requests]

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
            self.stop.set()
            raise OutOfBudget(f"{self.name}: the budget of {self.budget:,} tokens is used. The "
                              f"replies are in {self.path}; a larger budget resumes")
        import openai               # needed for endpoints only
        row = {"request": key, "model": self.model, "reply": None, "tokens": 0}
        status = problem = None
        try:
            raw = self.client.chat.completions.with_raw_response.create(**request)
            row["reply"], row["tokens"] = read_completion(raw.text, request["messages"])
        except openai.APIStatusError as error:
            status, problem = error.status_code, f"{error.status_code} {error.response.text}"
        except openai.APIError as error:                    # no connection, or no reply in time
            problem = f"{error} ({error.__cause__!r})"
        except ValueError as error:                         # no completion
            problem = str(error)
        if problem is None:
            row["reply"] = self.without_key(row["reply"])
        else:
            row["error"] = problem = f"{' '.join(self.without_key(problem).split()):.200}"
        with self.lock:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.left -= row["tokens"]
            self.n_failed = self.n_failed + 1 if problem else 0
        if problem is None:
            self.replies[key] = row["reply"]
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


def read_completion(body: str, messages: list[dict]) -> tuple[str, int]:
    """(text, tokens of prompt and reply). Raises ValueError for what is no chat completion."""
    try:
        completion = json.loads(body)
        text = completion["choices"][0]["message"]["content"] or ""     # a refusal has none
        # JSON may hold half an emoji, of a reply that was cut; UTF-8 cannot.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
        if usage := completion.get("usage"):
            if type(usage["total_tokens"]) is not int or usage["total_tokens"] < 0:
                raise ValueError
            return text, usage["total_tokens"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"no chat completion: {body}") from None
    prompt = "".join(message["content"] for message in messages)
    return text, -(-len((prompt + text).encode(errors="replace")) // 3)     # about 3 bytes a token


def open_replies(path: Path, rank: int) -> tuple[Path, dict[str, str], int]:
    """(file of this process, {request: reply} of all files, tokens that they took). A last line
    that a kill cut short is dropped."""
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
                    replies[row["request"]] = row["reply"]
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


def make_agent(flags: dict, role: str, device) -> LocalAgent | EndpointAgent:
    """The agent of add_agent_args' flags. Raises ValueError for flags that exclude each other."""
    weights, url, parallel = flags[role], flags[f"{role}_url"], flags[f"{role}_parallel"]
    options = {name: flags[f"{role}_{name}"]
               for name in ("model", "key_env", "replies", "budget", "rpm")}
    if (weights is None) == (url is None):
        raise ValueError(f"give either --{role} WEIGHTS or --{role}_url URL, and not both")
    if url is None:
        if idle := [f"--{role}_{name}" for name, value in options.items() if value]:
            raise ValueError(f"{', '.join(idle)}: no effect without --{role}_url")
        return LocalAgent(weights, device, parallel or 64, pick_dtype("auto", device))
    if not options["model"]:
        raise ValueError(f"--{role}_url needs the model's name there: --{role}_model NAME")
    options["replies"] = options["replies"] or f"out/replies/{role}.jsonl"
    if dist.is_initialized():
        options |= {"rank": dist.get_rank(), "n_processes": dist.get_world_size()}
    return EndpointAgent(url, parallel=parallel or 8, **options)


def identity_of(flags: dict, role: str) -> str:
    """The hash of the weights and their batch size, on which samples depend; or URL and model."""
    if flags[role]:
        return f"{sha256_of_model(flags[role])}, {flags[f'{role}_parallel']} at once"
    return f"{flags[f'{role}_url']} {flags[f'{role}_model']}"
