"""
推理引擎：一个模型，一个线程；所有请求共用一个连续批次。
Engine: a model and its thread. All answers share one continuous batch (model/generate.py). Given
tokens are read in a second thread, so that answers go on.
"""

import asyncio
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from starlette.exceptions import HTTPException

from model.generate import ActiveRows, choose
from runtime.log import Logger

READ_TOKENS = 4096          # in one forward pass, or one longer sequence


class Full(HTTPException):
    def __init__(self):
        super().__init__(429, "too many requests are waiting", {"Retry-After": "1"})


class Token(NamedTuple):
    """A token, and the model's log-probabilities where it stands."""

    id: int
    log_p: float
    top: list[tuple[int, float]]        # the most likely tokens and their log-probabilities


@dataclass(eq=False)
class Answer:
    prompt: list[int]
    max_new_tokens: int
    # Called in the engine's thread with each Token; at the end with "stop" or "length", or an error
    emit: Callable
    sampling: tuple = ()    # arguments of `choose`
    n_top: int = 0          # how many of the most likely tokens each Token has
    cancelled: bool = False
    n_tokens: int = 0


class Engine:
    """n_rows    answers that are generated at a time
    max_waiting  answers that may wait for a row, and readings"""

    def __init__(self, name: str, model, tokenizer, n_rows: int = 16, max_waiting: int = 64):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.n_rows, self.max_waiting = n_rows, max_waiting
        self.ends = tokenizer.end_of_turn, tokenizer.end_of_text
        self.rows = ActiveRows([model], n_rows, [model.config.max_seq_len])
        self.waiting, self.changed = deque(), threading.Condition()
        self.reader, self.n_readings = ThreadPoolExecutor(1), 0
        threading.Thread(target=self.run, daemon=True, name=name).start()

    def submit(self, *answers: Answer):
        """All of them, or none, then it raises Full."""
        with self.changed:
            if self.waiting and len(self.waiting) + len(answers) > self.max_waiting:
                raise Full
            self.waiting += answers
            self.changed.notify()

    @torch.inference_mode()
    def run(self):
        while True:
            new = []
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.rows.owners)
                while self.waiting and len(new) < self.n_rows - len(self.rows.owners):
                    answer = self.waiting.popleft()
                    new += [] if answer.cancelled else [answer]
            try:
                self.step(new)
            except Exception as error:          # whatever a model may raise: its clients get it
                Logger(f"{self.name}: {type(error).__name__}: {error}")
                for each in {*new, *self.rows.owners}:
                    each.emit(error)
                self.rows.remove(range(len(self.rows.owners)))

    def step(self, new: list[Answer]):
        """One more token for each row: the first of new answers, or the next of all others."""
        self.rows.remove([i for i, each in enumerate(self.rows.owners) if each.cancelled])
        if new:
            new.sort(key=lambda each: len(each.prompt))
            first, (logits,) = self.rows.begin(new, [[each.prompt for each in new]])
        elif self.rows.owners:
            first, (logits,) = self.rows.advance()
        else:
            return
        logits, owners = logits.float(), self.rows.owners[first:]
        ids, alike = [0] * len(owners), defaultdict(list)       # rows that are sampled together
        for i, each in enumerate(owners):
            alike[each.sampling].append(i)
        for sampling, group in alike.items():
            for i, token in zip(group, choose(logits[group], *sampling).tolist()):
                ids[i] = token
        self.rows.newest[first:] = ids
        done, tokens = [], described(logits, ids, [each.n_top for each in owners])
        for i, (each, token) in enumerate(zip(owners, tokens)):
            each.n_tokens += 1
            each.emit(token)
            if token.id in self.ends or each.n_tokens == each.max_new_tokens:
                each.emit("stop" if token.id in self.ends else "length")
                done.append(first + i)
        self.rows.remove(done)

    async def read(self, work, *arguments):
        """work(*arguments) in the thread that reads. Raises Full."""
        if self.n_readings >= self.max_waiting:
            raise Full
        self.n_readings += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reader, work, *arguments)
        finally:
            self.n_readings -= 1

    @torch.inference_mode()
    def states(self, *sequences: list[int]) -> tuple[torch.Tensor, ...]:
        """The final hidden states (S, D) of each."""
        lengths = [len(ids) for ids in sequences]
        tokens = torch.tensor([i for ids in sequences for i in ids], device=self.rows.device)
        return self.model(tokens, lengths, with_logits=False).final.split(lengths)

    @torch.inference_mode()
    def log_probs(self, sequences: list[list[int]], n_top: int) -> list[list[Token]]:
        """Of each sequence a Token for each but the first, which nothing predicts."""
        found, n = [], max(1, READ_TOKENS // max(map(len, sequences)))
        for part in (sequences[i:i + n] for i in range(0, len(sequences), n)):
            for ids, states in zip(part, self.states(*part)):
                logits = self.model.logits(states[:-1]).float()
                found.append(described(logits, ids[1:], [n_top] * len(logits)))
        return found


def described(logits, ids: list[int], n_tops: list[int]) -> list[Token]:     # (S, V)
    """A Token for each row of logits, with so many of the most likely ones."""
    if not ids:
        return []
    log_p = logits.log_softmax(dim=-1)
    own = log_p.gather(1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(1).tolist()
    values, indices = (each.tolist() for each in log_p.topk(max(n_tops), dim=-1))
    return [Token(i, value, list(zip(top, logs))[:n])
            for i, value, n, top, logs in zip(ids, own, n_tops, indices, values)]
