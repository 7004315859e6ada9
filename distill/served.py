"""
远处的教师：在 OpenAI 协议的服务后面，只返回 top-k 对数概率。
A teacher elsewhere: behind a server of OpenAI's protocol, which returns top-k log-probabilities.

It is asked to "complete" token ids with echo, so it reads them and writes nothing. Our
scripts/serve.py answers with logprobs.top_logprobs, a dict per token with keys "token_id:17"; vLLM
also with prompt_logprobs, dicts {"17": {"logprob": -0.1}}, which are more. Other servers name
tokens by their text, or tell nothing of given tokens: learn from their answers
(scripts/generate_answers.py).
"""

import json
import math
from argparse import Namespace
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from urllib.parse import urlsplit

import numpy as np
import torch

from distill.cache import row_type, unpack
from distill.fused import TopK
from runtime.endpoint import make_client
from runtime.errors import FileError
from runtime.log import Logger

PROBE = "3 plus 4 is 7.\nГод 年 🙂"         # teacher and student must have the same ids of it
AT_ONCE = 8                                 # sequences of a request
PARALLEL = 4                                # requests at a time
BATCHES_AHEAD = 8                           # that are read before the student needs them
NEVER = -1e4                                # log-probability of what a server calls impossible


class Refused(FileError):
    """The endpoint cannot be reached, or answers with an error."""


class ServedTeacher:
    """Predictions for given tokens. All methods raise ValueError, with the endpoint and what to do,
    if it cannot be reached, refuses, or returns something else. top_k: of each position."""

    temperature = 1.0                       # of the log-probabilities

    def __init__(self, url: str, model: str, top_k: int = 20, key_env: str | None = None):
        self.client, self.key = make_client(url, key_env, retries=5, timeout=300.0)
        self.url, self.model, self.top_k = url.rstrip("/"), model, top_k
        self.sparse = f"top {top_k} tokens"
        self.device, self.pool = torch.device("cpu"), ThreadPoolExecutor(PARALLEL)
        # Tokens of a sequence -> (the future of a request, place in it); kept for later epochs
        self.asked = {}

    def __str__(self):
        return f"{self.model} at {urlsplit(self.url).netloc}"

    def described(self) -> str:
        return f"{self}, its {self.sparse}"

    def to(self, device) -> "ServedTeacher":
        self.device = torch.device(device)
        return self

    def check(self, tokenizer):
        """Raises ValueError unless its ids of a text are those of the student's tokenizer. After
        this it has a `config`, and reads."""
        ids = tokenizer.encode(PROBE)
        theirs, _ = self.request([PROBE], max_tokens=1)[0]      # to llama.cpp 0 means no limit
        if None in theirs:
            raise ValueError(f"{self} names tokens by their text, not by their ids, which vLLM and "
                             "scripts/serve.py do. Learn from its answers: "
                             f"scripts/generate_answers.py --teacher_url {self.url}")
        if ids not in (theirs[:len(ids)], theirs[1:len(ids) + 1]):      # a begin token comes first
            raise ValueError(f"{self} splits {PROBE!r} into the tokens {theirs}, the student's "
                             f"tokenizer into {ids}: train the student with the teacher's "
                             "tokenizer, or on its answers (scripts/generate_answers.py)")
        self.n_tokens = tokenizer.vocab_size
        self.about = {"ids": tokenizer.ids, "tokenizer": str(tokenizer.path), "top_k": self.top_k,
                      "sampled": 0, "vocab_size": tokenizer.vocab_size}
        self.row = row_type(self.about)
        names = {each.id: each for each in self.client.models.list()}
        tells = getattr(names.get(self.model), "max_model_len", None)
        self.config = Namespace(max_seq_len=tells or 1 << 30)

    def request(self, prompts: list, max_tokens: int = 0) -> list[tuple[list, list[dict]]]:
        """For each prompt, a text or a list of ids: its ids, None for those it does not tell; and
        {id: log p} where each of them stands."""
        import openai
        try:
            raw = self.client.completions.with_raw_response.create(
                model=self.model, prompt=prompts, max_tokens=max_tokens, temperature=1.0,
                echo=True, logprobs=self.top_k, extra_body={"return_tokens_as_token_ids": True})
            answer = json.loads(raw.text)
        except openai.APIStatusError as error:
            problem = f"{error.status_code} {error.response.text}"
        except openai.APIError as error:
            problem = f"{error} ({error.__cause__!r})"
        except (ValueError, RecursionError) as error:
            problem = str(error)
        else:
            with self.reading():
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                return [read_choice(choice) for choice in choices]
        if len(self.key) >= 8:                          # a short one may be a part of any text
            problem = problem.replace(self.key, "***")
        raise Refused(f"{self}: {' '.join(problem.split()):.300}. Check that it is up, "
                      "--teacher_url, which ends in /v1, --teacher_model and --teacher_key_env")

    def ask(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """The predictions after each token of each sequence, (tokens,) rows as in a TeacherCache of
        top-k."""
        # The prediction after the last token stands at one more token, whichever it is.
        answers = self.request([[*sequence, sequence[-1]] for sequence in sequences])
        with self.reading():
            return [self.rows(places[1:len(sequence) + 1])
                    for (_, places), sequence in zip(answers, sequences, strict=True)]

    @contextmanager
    def reading(self):
        """An answer of another form becomes a ValueError that says so."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, Refused):
                raise
            raise ValueError(f"{self} did not return {self.top_k} log-probabilities per position "
                             f"({type(error).__name__}: {error})") from None

    def rows(self, places: list[dict]) -> np.ndarray:       # -> (places,)
        rows = np.zeros(len(places), self.row)
        for row, place in zip(rows, places):
            pairs = [(i, max(NEVER, NEVER if log_p is None else log_p))
                     for i, log_p in place.items() if i < self.n_tokens]    # others are padding
            pairs.sort(key=lambda pair: -pair[1])
            row["ids"], row["log_p"] = zip(*pairs[:self.top_k])
            # What the top-k leave over; at least what rounding may hide.
            tail = 1 - sum(math.exp(log_p) for log_p in row["log_p"])
            row["tail"] = math.log(max(tail, 1e-7))
        return rows

    def prefetch(self, sequences: list[list[int]]):
        """Ask for these sequences in the background, each once, for look_up."""
        new = sorted({tuple(each) for each in sequences} - self.asked.keys(), key=len)
        for start in range(0, len(new), AT_ONCE):
            part = new[start:start + AT_ONCE]
            future = self.pool.submit(self.ask, part)
            self.asked |= {each: (future, i) for i, each in enumerate(part)}

    def answered(self, sequences: list[list[int]]) -> bool:
        """Wait for these. False, with a message, if one of them does not come."""
        try:
            for each in sequences:
                if tuple(each) in self.asked:
                    self.asked[tuple(each)][0].result()
        except Refused as error:
            Logger(f"*** {error} ***")
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.pool = ThreadPoolExecutor(PARALLEL)
            self.asked = {each: (future, i) for each, (future, i) in self.asked.items()
                          if future.done() and not future.cancelled() and not future.exception()}
            return False
        return True

    def reads(self, sequences: list[list[int]]) -> bool:
        """Ask for these and forget all others, such as samples of a student that has changed."""
        self.asked = {}
        self.prefetch(sequences)
        return self.answered(sequences)

    def read(self, batch) -> np.ndarray:
        """The (S,) rows at the supervised positions of a batch."""
        sequences = sequences_of(batch)
        self.prefetch(sequences)
        found = (self.asked[tuple(each)] for each in sequences)
        rows = np.concatenate([future.result()[i] for future, i in found])
        return rows[(batch.teacher or batch).at.cpu().numpy()]

    def look_up(self, batch) -> TopK:
        return unpack(self.read(batch), self.device)


def read_choice(choice: dict) -> tuple[list, list[dict]]:
    def as_id(name: str) -> int | None:
        return int(name.removeprefix("token_id:")) if name.startswith("token_id:") else None

    if choice.get("prompt_logprobs"):
        places = [{int(i): each["logprob"] for i, each in (place or {}).items()}
                  for place in choice["prompt_logprobs"]]
    else:
        places = [{as_id(name): log_p for name, log_p in (place or {}).items()}
                  for place in choice["logprobs"]["top_logprobs"]]
    return [as_id(name) for name in choice["logprobs"]["tokens"]], places


def sequences_of(batch) -> list[list[int]]:
    """The tokens of each sample, as its teacher reads them."""
    batch = batch.teacher or batch
    return [part.tolist() for part in batch.tokens.split(batch.lengths)]


def read_ahead(loader, teachers, stop, per_step: int):
    """The batches of a loader, per_step in each step. A served teacher reads the next ones while
    the student learns. If it cannot read those of the next step, this step is the last."""
    served = [one.source for one in teachers if isinstance(one.source, ServedTeacher)]
    if not served:
        yield from loader
        return
    teacher, ahead = served[0], deque()
    for i in count():
        for batch in islice(loader, max(BATCHES_AHEAD, 2 * per_step) - len(ahead)):
            teacher.prefetch(sequences_of(batch))
            ahead.append(batch)
        if not ahead:
            return
        if i % per_step == 0:               # the answers for this step and the next
            for batch in islice(ahead, 2 * per_step):
                stop.requested |= not teacher.answered(sequences_of(batch))
        yield ahead.popleft()


def add_served_args(add):
    add("--teacher_url", default=None,
        help="a teacher behind a server of OpenAI's protocol, e.g. http://localhost:8000/v1")
    add("--teacher_model", default=None, help="its name there")
    add("--teacher_key_env", default=None, metavar="VARIABLE",
        help="environment variable with the server's key")
    add("--teacher_top_k", type=int, default=20,
        help="most likely tokens that a served teacher is asked for at each position")


def make_served(args) -> ServedTeacher | None:
    """The teacher of add_served_args' flags, if there is one. Raises ValueError."""
    if not args.teacher_url:
        return None
    if not args.teacher_model:
        raise ValueError("--teacher_url needs the model's name there: --teacher_model NAME")
    return ServedTeacher(args.teacher_url, args.teacher_model, args.teacher_top_k,
                         args.teacher_key_env)
