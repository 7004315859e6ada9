"""
远处的教师：在 OpenAI 协议的服务后面，只返回 top-k 对数概率。
A teacher elsewhere: behind a server of OpenAI's protocol, which returns top-k log-probabilities.

It is asked to "complete" token ids with echo, so it reads them and writes nothing. Two dialects of
the answer are known, and recognised from it:

    echo                our scripts/serve.py, vLLM: logprobs.top_logprobs, a dict per token, with
                        keys "token_id:17"
    prompt_logprobs     vLLM, SGLang: a dict {"17": {"logprob": -0.1, ...}} per token
"""

import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import torch

from distill.fused import TopK
from runtime.endpoint import make_client
from runtime.errors import FileError

PROBE = "3 plus 4 is 7.\nГод 年 🙂"         # teacher and student must have the same ids of it
AT_ONCE = 8                                 # sequences of a request
NEVER = -1e4                                # log-probability of what a server calls impossible


class Refused(FileError):
    """The endpoint cannot be reached, or answers with an error."""


class ServedTeacher:
    """Predictions for given tokens. Raises ValueError, with the endpoint and what to do, if it
    cannot be reached, refuses, or has another tokenizer.

    top_k       most likely tokens of each position
    parallel    requests at a time
    """

    temperature = 1.0                       # of the log-probabilities

    def __init__(self, url: str, model: str, tokenizer, top_k: int = 20, key_env: str | None = None,
                 parallel: int = 4, retries: int = 5, timeout: float = 300.0):
        self.client, self.key = make_client(url, key_env, retries, timeout)
        self.url, self.model, self.top_k = url.rstrip("/"), model, top_k
        self.tokenizer, self.n_tokens = tokenizer, tokenizer.vocab_size
        self.device, self.pool = torch.device("cpu"), ThreadPoolExecutor(parallel)
        self.asked = {}         # tokens of a sequence -> (the future of a request, place in it)
        self.config = Namespace(max_seq_len=self.check())
        self.about = {"ids": tokenizer.ids, "tokenizer": str(tokenizer.path)}

    def __str__(self):
        return f"{self.model} at {urlsplit(self.url).netloc}"

    def described(self) -> str:
        return f"teacher {self}, its top {self.top_k} tokens"

    def to(self, device) -> "ServedTeacher":
        self.device = torch.device(device)
        return self

    def check(self) -> int:
        """Whether its ids of a text are ours. Returns its context length, if it tells."""
        ids = self.tokenizer.encode(PROBE)
        with self.reading():
            given = self.request(PROBE)["choices"][0]["logprobs"]["tokens"]
        theirs = [int(name.removeprefix("token_id:")) for name in given
                  if name.startswith("token_id:")]
        if theirs[len(theirs) - len(ids):] != ids:
            raise ValueError(f"{self} splits {PROBE!r} into the tokens {given}, the student's "
                             f"tokenizer into {ids}: train the student with the teacher's "
                             "tokenizer, or on its answers (SeqKD)")
        names = {each.id: each for each in self.client.models.list()}
        return getattr(names.get(self.model), "max_model_len", None) or 1 << 30

    def request(self, prompt) -> dict:
        """The answer to one request, as JSON."""
        import openai
        try:
            raw = self.client.completions.with_raw_response.create(
                model=self.model, prompt=prompt, max_tokens=0, echo=True, logprobs=self.top_k,
                temperature=1.0, extra_body={"return_tokens_as_token_ids": True})
            return json.loads(raw.text)
        except openai.APIStatusError as error:
            problem = f"{error.status_code} {error.response.text}"
        except openai.APIError as error:
            problem = f"{error} ({error.__cause__!r})"
        except ValueError as error:
            problem = str(error)
        problem = " ".join(problem.replace(self.key, "***").split())
        raise Refused(f"{self}: {problem:.300}. Check that it is up, --teacher_url, "
                      "--teacher_model and --teacher_key_env; --resume continues")

    def ask(self, sequences: list[list[int]]) -> list[np.ndarray]:
        """For each sequence of N tokens the predictions after each of them: (N, k) ids and
        log-probabilities, as one array of (id, log_p) pairs."""
        # The prediction after the last token stands at one more token, whichever it is.
        answer = self.request([[*sequence, sequence[-1]] for sequence in sequences])
        with self.reading():
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            return [self.rows(choice, len(sequence))
                    for choice, sequence in zip(choices, sequences, strict=True)]

    @contextmanager
    def reading(self):
        """An answer of another form becomes a ValueError that says so."""
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, Refused):
                raise
            raise ValueError(f"{self} did not return the log-probabilities of {self.top_k} tokens "
                             f"at each position ({type(error).__name__}: {error})") from None

    def rows(self, choice: dict, n: int) -> np.ndarray:     # -> (n, k, 2) float64
        if choice.get("prompt_logprobs"):
            found = [{int(i): each["logprob"] for i, each in place.items()}
                     for place in choice["prompt_logprobs"][1:n + 1]]
        else:
            found = [{int(name.removeprefix("token_id:")): log_p for name, log_p in place.items()}
                     for place in choice["logprobs"]["top_logprobs"][1:n + 1]]
        rows = np.empty((n, self.top_k, 2))
        for row, place in zip(rows, found, strict=True):
            pairs = [(i, max(NEVER, NEVER if log_p is None else log_p))
                     for i, log_p in place.items()]
            row[:] = sorted(pairs, key=lambda pair: -pair[1])[:self.top_k]
        return rows

    def prefetch(self, sequences: list[list[int]]):
        """Ask for these sequences in the background, each once, for look_up."""
        new = {tuple(each) for each in sequences} - self.asked.keys()
        new = sorted(new, key=len)
        for start in range(0, len(new), AT_ONCE):
            part = new[start:start + AT_ONCE]
            future = self.pool.submit(self.ask, [list(each) for each in part])
            self.asked |= {each: (future, i) for i, each in enumerate(part)}

    def forget(self):
        """All answers, such as those to the samples of a student that has changed since."""
        self.asked = {}

    def look_up(self, batch) -> TopK:
        """The predictions at the supervised positions of a batch."""
        self.prefetch(sequences_of(batch))
        found = (self.asked[tuple(each)] for each in sequences_of(batch))
        rows = np.concatenate([future.result()[i] for future, i in found])          # (N, k, 2)
        rows = torch.from_numpy(rows[batch.at.cpu().numpy()]).to(self.device)       # (S, k, 2)
        log_p = rows[..., 1].float()
        # What the top-k leave over; at least what rounding may hide.
        tail = (1 - rows[..., 1].exp().sum(dim=-1)).clamp_min(1e-7).log().float()
        return TopK(rows[..., 0].long(), log_p, tail)


def sequences_of(batch) -> list[list[int]]:
    """The tokens of each sample."""
    return [part.tolist() for part in batch.tokens.split(batch.lengths)]


def add_served_args(add):
    add("--teacher_url", default=None,
        help="a teacher behind a server of OpenAI's protocol, e.g. http://localhost:8000/v1")
    add("--teacher_model", default=None, help="its name there")
    add("--teacher_key_env", default=None, metavar="VARIABLE",
        help="environment variable with the server's key")
    add("--teacher_top_k", type=int, default=20,
        help="most likely tokens that a served teacher is asked for at each position")


def make_served(args, tokenizer) -> ServedTeacher | None:
    """The teacher of add_served_args' flags, or None. Raises ValueError."""
    if not args.teacher_url:
        return None
    if not args.teacher_model:
        raise ValueError("--teacher_url needs the model's name there: --teacher_model NAME")
    return ServedTeacher(args.teacher_url, args.teacher_model, tokenizer, args.teacher_top_k,
                         args.teacher_key_env)
