"""
代理：把一批对话交给一个模型，取回一批答复；模型在本地，或在一个 OpenAI 式的接口后面。
Agents: a list of conversations goes to a model, a list of replies comes back. The model is one of this repo's, in this
process, or one behind an endpoint that speaks OpenAI's chat protocol (vLLM, llama.cpp, Ollama, a vendor).

    add_agent_args(parser, "writer")                # --writer WEIGHTS, or --writer_url URL --writer_model NAME, ...
    writer = make_agent(args, "writer", device)
    writer.ask([[{"role": "user", "content": "2 + 3 ="}], ...], max_new_tokens=32)      # ["5", ...]

An endpoint fails now and then, and costs money. So each request is tried again a bounded number of times, requests keep
to a pace and to a budget, and each reply is written down as it comes: a run that is started again asks nothing twice.
"""

import argparse
import hashlib
import json
import os
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from glob import escape
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from tqdm import tqdm

from interop.checkpoint import load_model
from model.generate import column_major, generate
from runtime.log import Logger
from runtime.precision import pick_dtype

BACK_OFF = 1.0              # seconds before the second attempt; twice as long before each further one
LONGEST_WAIT = 120.0        # seconds. An endpoint that asks for more, say until tomorrow, is not waited for
FAILURES_IN_A_ROW = 10      # requests without a reply, each after all its attempts: the endpoint is down, not the request
SHORTEST_KEY = 8            # characters; a shorter one is made up for a local server, and may be a word of any reply

FATAL = (401, 403, 404)     # the key, or what may be done with it, or the model's name: no request would go better
TRY_AGAIN = (408, 409, 429)     # and all from 500 up; whatever else is refused would be refused again


class OutOfBudget(RuntimeError):
    """The tokens that an agent may use are used.

    replies     what has come to the conversations that were asked, in their order; "" where nothing has. An endpoint's
                are kept in its file as well
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.replies = []


class Agent(ABC):
    """Someone who replies to conversations. `name` is how messages call it."""

    name: str

    @abstractmethod
    def ask(self, conversations: list[list[dict]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[str]:
        """A reply to each conversation, in their order, without the white space around it; "" where nothing came.

        conversations   lists of {"role", "content"}, the user's turn last
        temperature     0: the likeliest reply, whatever the seed. Above 0, a conversation that is there twice has two
                        replies, and a reply depends on seed and on what else is asked in the same call. Processes that
                        are to end with what one would have share out whole calls, each with a seed of its own

        Raises OutOfBudget.
        """


# ------------------------------------------------------------------------------------------------------ in this process


class LocalAgent(Agent):
    """Any weights that load_model reads; it raises what load_model raises.

    rows        conversations under way at once
    dtype       of weights and computation
    """

    def __init__(self, path, device, rows: int = 64, dtype: torch.dtype = torch.float32):
        self.name, self.device, self.rows = str(path), device, rows
        self.model, self.tokenizer = load_model(path, device, dtype)
        column_major(self.model)

    def ask(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        """As Agent.ask. A conversation that leaves no room for a reply within max_seq_len is replied to by "": it is
        counted in the log."""
        prompts = [ids for ids, _ in self.tokenizer.encode_chats(conversations, add_generation_prompt=True)]
        longest = self.model.config.max_seq_len - 1
        fits = [len(prompt) <= longest for prompt in prompts]
        if not all(fits):
            Logger(f"{self.name}: {fits.count(False):,} of {len(fits):,} conversations are longer than {longest:,} tokens; "
                   "they have no reply")
        replies = iter(generate(
            self.model, [prompt for prompt, fit in zip(prompts, fits) if fit], max_new_tokens, self.tokenizer.end_of_turn,
            rows=self.rows, vocab_size=self.tokenizer.vocab_size, temperature=temperature,
            generator=torch.Generator(self.device).manual_seed(seed)))
        return [self.tokenizer.decode(next(replies)).strip() if fit else "" for fit in fits]


# --------------------------------------------------------------------------------------------------- behind an endpoint


class EndpointAgent(Agent):
    """A model behind an endpoint of OpenAI's chat protocol.

    url             up to and with /v1
    model           its name there
    replies         JSONL file, one line a reply as it comes: {"request", "model", "reply", "tokens", "attempts"}. What
                    came to nothing has "reply": null and "error", and is asked again by the next run. Process r > 0
                    writes REPLIES.part{r}; all of them are read
    key_env         the environment variable that holds the API key; None: no key is sent. The key itself is neither
                    logged nor written
    budget          tokens of prompts and replies, those of earlier runs in REPLIES among them; 0: no limit. No request
                    starts once they are used; those under way are waited for, so that it can end a little above
    rpm             requests a minute, attempts among them, evenly spaced; 0: no limit
    parallel        requests under way at once
    retries         attempts after the first
    timeout         seconds without a byte from the endpoint after which an attempt has failed
    rank, n_processes   which of how many this one is; budget, rpm and parallel are of all together
    clock           what has monotonic() and sleep(seconds)

    Raises ValueError without the openai package, without the key, for a url that is none and a REPLIES file that is none.
    """

    def __init__(self, url: str, model: str, replies, key_env: str | None = None, budget: int = 0, rpm: float = 0,
                 parallel: int = 8, retries: int = 5, timeout: float = 600.0, rank: int = 0, n_processes: int = 1,
                 clock=time):
        if not re.match(r"https?://", url):
            raise ValueError(f"*_url {url} must begin with http:// or https://, and go up to where /chat/completions follows")
        self.openai = import_openai()
        self.url, self.model, self.name = url.rstrip("/"), model, f"{model} at {urlsplit(url).hostname}"
        self.key = read_key(key_env)
        self.client = self.openai.OpenAI(base_url=self.url, api_key=self.key, timeout=timeout, max_retries=0)
        self.retries, self.clock = retries, clock
        self.parallel = max(1, parallel // n_processes)

        self.path, self.kept, spent = open_replies(Path(replies), rank)
        self.budget, self.left = budget, (budget - spent) // n_processes        # tokens
        self.gap = 60.0 * n_processes / rpm if rpm else 0.0                     # seconds from one start to the next
        self.next_start = clock.monotonic()
        self.failures_in_a_row = 0
        self.stop = None                                # the error that ends the call, for the threads to see
        self.gate, self.lock = threading.Lock(), threading.Lock()

    def ask(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        """As Agent.ask. Raises ValueError if the endpoint refuses key or model, and after FAILURES_IN_A_ROW."""
        requests = self.requests(conversations, max_new_tokens, temperature, seed)
        keys = [self.key_of(request) for request in requests]
        missing = {key: request for key, request in zip(keys, requests) if key not in self.kept}
        if missing:
            Logger(f"{self.name}: {len(set(keys)):,} requests, {len(set(keys)) - len(missing):,} replied to by an earlier run")
        try:
            self.fetch_all(missing)
        except OutOfBudget as error:
            error.replies = [self.kept.get(key, "") for key in keys]
            raise
        return [self.kept.get(key, "") for key in keys]

    def requests(self, conversations, max_new_tokens, temperature, seed) -> list[dict]:
        """What is sent for each. Conversations that are the same are one request at temperature 0, else several."""
        requests, seen = [], Counter()
        for messages in conversations:
            request = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens, "temperature": temperature}
            if temperature > 0:
                text = json.dumps(messages)
                request["seed"] = random.Random(f"{seed} {seen[text]}").getrandbits(31)
                seen[text] += 1
            requests.append(request)
        return requests

    def key_of(self, request: dict) -> str:
        """Under which the reply is kept. The address is part of it: "default" is another model elsewhere."""
        return hashlib.sha256(json.dumps({"url": self.url, **request}, sort_keys=True).encode()).hexdigest()

    def fetch_all(self, requests: dict[str, dict]):
        """The replies, into `kept`. On an error, what is under way comes to its end and is kept."""
        self.stop = None
        pool = ThreadPoolExecutor(self.parallel)
        try:
            under_way = [pool.submit(self.fetch, key, request) for key, request in requests.items()]
            for one in tqdm(as_completed(under_way), total=len(under_way), unit=" replies", disable=None, leave=False):
                one.result()
        except BaseException as error:                  # Ctrl-C too: threads that wait for their turn are to hear of it
            self.stop = error
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def fetch(self, key: str, request: dict):
        """One reply, in as many attempts as it takes or is allowed."""
        for attempt in range(1, self.retries + 2):
            self.wait_for_turn()
            wait = BACK_OFF * 2 ** (attempt - 1)
            try:
                body = self.client.chat.completions.with_raw_response.create(**request).text
                reply, tokens = read_completion(body)
            except self.openai.APIStatusError as error:
                problem = self.in_words(f"{error.status_code} {error.response.text}")
                if error.status_code in FATAL:
                    # From None: what openai raised holds the request and, in its headers, the key.
                    raise self.halt(ValueError(f"{self.name} refuses all requests: {problem}. Look at its key (the variable "
                                               "that *_key_env names), *_url and *_model")) from None
                if error.status_code not in TRY_AGAIN and error.status_code < 500:
                    break
                wait = asked_to_wait(error.response.headers, wait)
            except self.openai.APIError as error:                       # no connection, or no reply in time
                problem = self.in_words(f"{error} ({type(error.__cause__).__name__})")
            except ValueError as error:                                 # no completion
                problem = self.in_words(str(error))
            else:
                self.keep(key, request, reply, tokens, attempt)
                return
            if attempt > self.retries or wait > LONGEST_WAIT:
                break
            self.clock.sleep(wait)
        self.give_up(key, attempt, problem)

    def wait_for_turn(self):
        """Returns when a request may start. Raises the error that ends the call."""
        with self.gate:             # one waits here for the time to come, the others for that one
            if self.stop is None:
                self.clock.sleep(max(0.0, self.next_start - self.clock.monotonic()))
            if self.stop is not None:
                raise self.stop
            if self.budget and self.left <= 0:
                raise self.halt(OutOfBudget(f"{self.name}: the budget of {self.budget:,} tokens is used. What has come is in "
                                            f"{self.path}; the same command with a larger budget goes on from there"))
            self.next_start = self.clock.monotonic() + self.gap

    def halt(self, error: Exception) -> Exception:
        """The error, after the other threads have been told of it."""
        self.stop = error
        return error

    def keep(self, key: str, request: dict, reply: str, tokens: int | None, attempts: int):
        if tokens is None:          # an endpoint that does not count: a token is rarely less than three bytes
            told = "".join(message["content"] for message in request["messages"])
            tokens = -(-len((told + reply).encode(errors="replace")) // 3)
        reply = self.without_key(reply)
        with self.lock:
            self.write({"request": key, "model": self.model, "reply": reply, "tokens": tokens, "attempts": attempts})
            self.kept[key] = reply
            self.left -= tokens
            self.failures_in_a_row = 0

    def give_up(self, key: str, attempts: int, problem: str):
        with self.lock:
            self.write({"request": key, "model": self.model, "reply": None, "tokens": 0, "attempts": attempts,
                        "error": problem})
            self.failures_in_a_row += 1
            is_down = self.failures_in_a_row >= FAILURES_IN_A_ROW
        Logger(f"{self.name}: no reply to request {key[:8]} in {attempts} attempts: {problem}")
        if is_down:
            raise self.halt(ValueError(f"{self.name}: {self.failures_in_a_row} requests in a row had no reply, the last: "
                                       f"{problem}. Is it up? What has come is in {self.path}; the same command goes on"))

    def write(self, row: dict):
        with open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def in_words(self, problem: str) -> str:
        """One line of it, and not too long: it may quote whatever the endpoint has sent."""
        return f"{' '.join(self.without_key(problem).split()):.200}"

    def without_key(self, text: str) -> str:
        return text.replace(self.key, "***") if len(self.key) >= SHORTEST_KEY else text


def import_openai():
    try:
        import openai           # needed only by those who speak to an endpoint
    except ImportError:
        raise ValueError("an endpoint is spoken to by the openai package, which is not there: pip install openai") from None
    return openai


def read_key(key_env: str | None) -> str:
    """The API key. Messages do not repeat key_env: who mistakes it for the key would find that in a log."""
    if key_env is None:
        return "none"           # given None, the package looks for a key itself, and sends it to whom it is not meant for
    if key_env not in os.environ:
        raise ValueError("*_key_env takes the name of an environment variable that holds the API key, and there is none of "
                         "the name given. Type: export NAME=KEY, and give NAME")
    key = os.environ[key_env].strip()
    if not re.fullmatch(r"[!-~]+", key):
        raise ValueError("the environment variable that *_key_env names holds no API key: it is empty, or has spaces or "
                         "characters beyond ASCII")
    return key


def read_completion(body: str) -> tuple[str, int | None]:
    """(what was said, the tokens it took or None). Raises ValueError for a body that is no chat completion."""
    try:
        completion = json.loads(body)
        said = completion["choices"][0]["message"]["content"]
        usage = completion.get("usage")
        tokens = usage["total_tokens"] if usage else None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"no chat completion: {body}") from None
    if said is None:            # nothing but a refusal or a call of a tool
        said = ""
    if not isinstance(said, str) or not isinstance(tokens, int | None):
        raise ValueError(f"no chat completion: {body}")
    # JSON may hold half of an emoji, that of a reply cut short; no file could.
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip(), tokens


def asked_to_wait(headers, otherwise: float) -> float:
    """Seconds of a Retry-After header: https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3. Its other form, a date, is
    left aside."""
    asked = headers.get("retry-after", "")
    return float(asked) if re.fullmatch(r"\d+(\.\d+)?", asked) else otherwise


def open_replies(path: Path, rank: int) -> tuple[Path, dict[str, str], int]:
    """(the file for this process to write, reply of each request in all files, the tokens they took).

    Raises ValueError for a line that is no row of such a file. A last line that a kill cut short is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = path.with_name(f"{path.name}.part{rank}") if rank else path
    kept, spent = {}, 0
    for file in [path, *sorted(path.parent.glob(f"{escape(path.name)}.part*"))]:
        if not file.exists():
            continue
        content = file.read_bytes()
        *lines, rest = content.split(b"\n")
        if rest and file == mine:
            os.truncate(file, len(content) - len(rest))
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                key, reply, tokens = row["request"], row["reply"], row["tokens"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number} is no reply of an endpoint: {line!r:.80}. Remove the line, or give "
                                 "another file by *_replies") from None
            spent += tokens
            if reply is not None:
                kept[key] = reply
    return mine, kept, spent


# ------------------------------------------------------------------------------------------------------- by their flags


def add_agent_args(parser: argparse.ArgumentParser, role: str):
    """The flags that make an agent of this role, such as "writer": --writer, --writer_url, ..."""
    add = parser.add_argument_group(f"{role}: weights, or a model behind an endpoint").add_argument
    add(f"--{role}", default=None, help="its weights: a checkpoint, a Hugging Face folder, a GGUF file")
    add(f"--{role}_url", default=None, help="an endpoint of OpenAI's chat protocol instead, e.g. http://localhost:8000/v1")
    add(f"--{role}_model", default=None, help="the model's name there")
    add(f"--{role}_key_env", default=None, help="name of the environment variable that holds the API key; default: no key")
    add(f"--{role}_replies", default=None, help="JSONL file of all its replies, so that nothing is asked twice; default: "
                                                f"out/replies/{role}.jsonl")
    add(f"--{role}_budget", type=int, default=0, help="tokens, prompts and replies in that file together; 0: no limit")
    add(f"--{role}_rpm", type=float, default=0, help="requests a minute, of all processes together; 0: no limit")
    add(f"--{role}_parallel", type=int, default=None, help="conversations under way at once; default: 64 for weights, per "
                                                           "process; 8 at an endpoint, of all processes together")


def make_agent(args: argparse.Namespace, role: str, device: torch.device) -> Agent:
    """The agent of add_agent_args' flags. Raises ValueError for flags that do not go together, and what LocalAgent and
    EndpointAgent raise."""
    given = {name: vars(args)[f"{role}_{name}"] for name in ("model", "key_env", "replies", "budget", "rpm", "parallel")}
    weights, url, parallel = vars(args)[role], vars(args)[f"{role}_url"], given.pop("parallel")
    if (weights is None) == (url is None):
        raise ValueError(f"give either --{role} WEIGHTS or --{role}_url URL" + (", not both" if weights else ""))
    if min(given["budget"], given["rpm"]) < 0 or (parallel is not None and parallel < 1):
        raise ValueError(f"--{role}_budget {given['budget']} and --{role}_rpm {given['rpm']:g} must be 0 or more, "
                         f"--{role}_parallel 1 or more")
    if url is None:
        idle = [f"--{role}_{name}" for name, value in given.items() if value]
        if idle:
            raise ValueError(f"{', '.join(idle)}: of no effect without --{role}_url")
        return LocalAgent(weights, device, parallel or 64, pick_dtype("bfloat16", device))
    if not given["model"]:
        raise ValueError(f"--{role}_url needs the model's name there: --{role}_model NAME")
    rank, n_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    given["replies"] = given["replies"] or f"out/replies/{role}.jsonl"
    return EndpointAgent(url, parallel=parallel or 8, rank=rank, n_processes=n_processes, **given)
