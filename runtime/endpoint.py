"""
接口的客户端与代理：OpenAI 的协议；答复都留下记录，重新运行时不再发送。
Clients and agents of OpenAI's protocol. All replies are kept, so that a rerun
sends no request twice.
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
from urllib.parse import urlsplit

import torch.distributed as dist
from tqdm import tqdm

from runtime.files import read_rows
from runtime.log import Logger

MAX_FAILURES = 10           # failed requests in a row: the endpoint is down, not the request
FATAL = (401, 403, 404)     # wrong key, no permission, wrong model name: every request would fail


class OutOfBudget(ValueError):
    """An agent has used its tokens. Its replies so far are in its file."""


def make_client(url: str, key_env: str | None, retries: int, timeout: float):
    """(an openai.OpenAI, its key). Raises ValueError for a wrong URL, a missing package or key."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"*_url {url} must begin with http:// or https:// and end before "
                         "/chat/completions")
    try:
        import openai           # needed for endpoints only
    except ImportError:
        raise ValueError("an endpoint needs the openai package: pip install openai") from None
    # Without a key, the package would send the user's OPENAI_API_KEY.
    key = os.environ.get(key_env, "").strip() if key_env else "no-key"
    if not key:             # key_env is not repeated: it may be the key itself, by mistake
        raise ValueError("*_key_env names an environment variable with the API key; there is "
                         "none of this name, or it is empty. Type: export NAME=KEY")
    return openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries), key


class EndpointAgent:
    """A model behind an endpoint of OpenAI's chat protocol (vLLM, llama.cpp, Ollama, ...). The
    openai package retries a failed request; this class adds a budget and a record of all replies.

    replies   JSONL file, a line per reply: {"request", "model", "reply", "tokens",
              "finish_reason"}. A failed request has "reply": null and "error", and the next run
              sends it again. Process r > 0 writes REPLIES.part{r}; all of these files are read
    budget    tokens, as the endpoint counts them, earlier runs included; running requests are
              completed when it is used

    n_processes divide budget and parallel among them; this one is `rank`.
    """

    def __init__(self, url: str, model: str, replies, key_env: str | None = None, budget: int = 0,
                 parallel: int = 8, retries: int = 5, timeout: float = 600.0, rank: int = 0,
                 n_processes: int = 1):
        self.url, self.model = url.rstrip("/"), model
        self.client, self.key = make_client(self.url, key_env, retries, timeout)
        self.name = f"{model} at {urlsplit(url).hostname}"
        self.parallel = max(1, parallel // n_processes)
        self.path, self.replies, spent = open_replies(Path(replies), rank)
        self.budget, self.left = budget, (budget - spent) // n_processes        # tokens
        self.n_failed, self.error = 0, None
        self.lock = threading.Lock()

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
        pool = ThreadPoolExecutor(self.parallel)
        try:
            running = [pool.submit(self.fetch, key, request) for key, request in missing.items()]
            for done in tqdm(as_completed(running), total=len(running), unit=" replies",
                             disable=None, leave=False):
                done.result()
                if stop and stop.requested:
                    break
        finally:                    # after an error or Ctrl-C, running requests are completed
            pool.shutdown(cancel_futures=True)
        return [self.replies.get(key) for key, _ in requests]

    def fetch(self, key: str, request: dict):
        """One reply, into the file. Raises OutOfBudget and the ValueErrors of `ask`."""
        if self.budget and self.left <= 0:
            raise OutOfBudget(f"{self.name}: the budget of {self.budget:,} tokens is used. The "
                              f"replies are in {self.path}; a larger budget resumes")
        if self.error:              # of another thread
            raise self.error
        row, status = self.send(key, request)
        with self.lock, open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.left -= row["tokens"]
            self.n_failed = self.n_failed + 1 if "error" in row else 0
        if "error" not in row:
            self.replies[key] = row
            return
        Logger(f"{self.name}: no reply to request {key[:8]}: {row['error']}")
        if status in FATAL or self.n_failed >= MAX_FAILURES:
            self.error = ValueError(
                f"{self.name}: {self.n_failed} failed requests in a row, the last: {row['error']}. "
                "Check that it is up, *_url, *_model, and the key in the variable of *_key_env. "
                f"Replies are kept in {self.path}")
            raise self.error

    def send(self, key: str, request: dict) -> tuple[dict, int | None]:
        """(its line of the file, the HTTP status of an error)."""
        import openai

        row, status = {"request": key, "model": self.model, "reply": None, "tokens": 0}, None
        try:
            raw = self.client.chat.completions.with_raw_response.create(**request)
            completion = raw.parse()
            choice = completion.choices[0]
            text = (choice.message.content or "").strip()           # a refusal has none
            text = text.encode(errors="replace").decode()           # half an emoji, of a cut reply
            tokens = completion.usage.total_tokens if completion.usage else 0
            row |= {"reply": text, "tokens": tokens, "finish_reason": choice.finish_reason}
        except openai.APIStatusError as error:
            status, problem = error.status_code, f"{error.status_code} {error.response.text}"
        except openai.APIError as error:                    # no connection, or no reply in time
            problem = f"{error} ({error.__cause__!r})"
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            problem = f"no chat completion: {raw.text}"
        else:
            return row, None
        problem = " ".join(problem.replace(self.key, "***").split())
        return row | {"error": problem[:200]}, status


def open_replies(path: Path, rank: int) -> tuple[Path, dict[str, dict], int]:
    """(file of this process, {request: line} of all files, tokens that they took). A last line that
    a kill cut short is dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.name}.part{rank}") if rank else path
    if mine.exists():
        os.truncate(mine, mine.read_bytes().rfind(b"\n") + 1)
    rows = [row for file in [path, *sorted(path.parent.glob(f"{escape(path.name)}.part*"))]
            for row in read_rows(file, "request", "reply", "tokens")]
    replies = {row["request"]: row for row in rows if row["reply"] is not None}
    return mine, replies, sum(row["tokens"] for row in rows)


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
    add(f"--{role}_parallel", type=int,
        help="concurrent conversations; default: 64 per process for weights, 8 at an endpoint")


def make_endpoint(flags: dict, role: str) -> EndpointAgent | None:
    """The endpoint of add_agent_args' flags; None for weights. Raises ValueError."""
    url, model = flags[f"{role}_url"], flags[f"{role}_model"]
    if bool(flags[role]) == bool(url):
        raise ValueError(f"give either --{role} WEIGHTS or --{role}_url URL, and not both")
    if not url:
        return None
    if not model:
        raise ValueError(f"--{role}_url needs the model's name there: --{role}_model NAME")
    processes = ({"rank": dist.get_rank(), "n_processes": dist.get_world_size()}
                 if dist.is_initialized() else {})
    return EndpointAgent(url, model, flags[f"{role}_replies"] or f"out/replies/{role}.jsonl",
                         flags[f"{role}_key_env"], flags[f"{role}_budget"],
                         flags[f"{role}_parallel"] or 8, **processes)
