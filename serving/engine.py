"""
推理引擎：一个模型，一个线程；所有请求共用一个连续批次。
Engine: a model and its thread. All requests share one continuous batch (model/generate.py).

    answer       a request for an answer: a token per step, until it ends or its client has left
    read         log-probabilities of given tokens: what a teacher is asked for
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.generate import ActiveRows, choose
from runtime.log import Logger

READ_TOKENS = 4096          # of sequences that are read in one forward pass, or one longer sequence


class Full(Exception):
    """As many requests are waiting as may."""


class Token(NamedTuple):
    """A token, and the model's log-probabilities where it stands."""

    id: int
    log_p: float
    top: list[tuple[int, float]]        # the most likely tokens and their log-probabilities


@dataclass(eq=False)
class Answer:
    prompt: list[int]
    max_new_tokens: int
    emit: Callable          # called in the engine's thread with each Token, then None or an error
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n_top: int = 0          # how many of the most likely tokens each Token has
    cancelled: bool = False
    n_tokens: int = 0
    generator: torch.Generator | None = None


@dataclass(eq=False)
class Reading:
    """Given tokens. The result is a Token for each but the first, which nothing predicts; or from
    the position `logits_from` on, the logits of what comes next."""

    tokens: list[int]
    emit: Callable          # called once, with a list of Tokens, with logits (S, V), or an error
    n_top: int = 0
    logits_from: int | None = None
    cancelled: bool = False


class Engine:
    """n_rows    answers that are generated at a time
    max_waiting  requests that may wait for a row"""

    def __init__(self, name: str, model, tokenizer, n_rows: int = 16, max_waiting: int = 64):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.n_rows, self.max_waiting = n_rows, max_waiting
        self.rows = ActiveRows([model], n_rows, [model.config.max_seq_len])
        self.answers, self.readings, self.changed = deque(), deque(), threading.Condition()
        self.thread = threading.Thread(target=self.run, daemon=True, name=name)
        self.thread.start()

    def n_waiting(self) -> int:
        return len(self.answers) + len(self.readings)

    def submit(self, *requests: Answer | Reading):
        """Raises Full; then none of them was taken."""
        with self.changed:
            waiting = self.n_waiting()
            if waiting and waiting + len(requests) > self.max_waiting:
                raise Full
            for request in requests:
                (self.answers if isinstance(request, Answer) else self.readings).append(request)
            self.changed.notify()

    @torch.inference_mode()
    def run(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.answers or self.readings or self.rows.owners)
                new = self.take(self.answers, self.n_rows - len(self.rows.owners))
                reading = self.take(self.readings, READ_TOKENS, lambda each: len(each.tokens))
            for work, requests in ((self.read, reading), (self.step, new)):
                try:
                    work(requests)
                except Exception as error:      # whatever a model may raise: its clients get it
                    Logger(f"{self.name}: {type(error).__name__}: {error}")
                    rows = self.rows.owners if work == self.step else []
                    for request in {*requests, *rows}:
                        request.emit(error)
                    self.rows.remove(range(len(rows)))

    def take(self, waiting: deque, room: int, size=lambda request: 1) -> list:
        """The first of the waiting requests that fit, at least one, without those whose client has
        left."""
        taken = []
        while waiting and room > 0:
            request = waiting[0]
            if not request.cancelled:
                room -= size(request)
                if room < 0 and taken:
                    break
                taken.append(request)
            waiting.popleft()
        return taken

    def step(self, new: list[Answer]):
        """One more token for each row: the first of new answers, or the next of all others."""
        self.rows.remove([i for i, each in enumerate(self.rows.owners) if each.cancelled])
        if new:
            new.sort(key=lambda each: len(each.prompt))
            for each in new:
                if each.seed is not None:
                    each.generator = torch.Generator(self.rows.device).manual_seed(each.seed)
            first, (logits,) = self.rows.begin(new, [[each.prompt for each in new]])
        elif self.rows.owners:
            first, (logits,) = self.rows.advance()
        else:
            return
        logits, owners = logits.float(), self.rows.owners[first:]
        ids, alike = [0] * len(owners), defaultdict(list)       # rows that are sampled together
        for i, each in enumerate(owners):
            how = each.temperature, each.top_k, each.top_p, each.generator
            alike[how].append(i)
        for (temperature, top_k, top_p, generator), group in alike.items():
            chosen = choose(logits[group], temperature, top_k, top_p, generator)
            for i, token in zip(group, chosen.tolist()):
                ids[i] = token
        self.rows.newest[first:] = ids
        done = []
        for i, (each, token) in enumerate(zip(owners, described(logits, ids, owners))):
            each.n_tokens += 1
            ends = token.id == self.tokenizer.end_of_turn or token.id == self.tokenizer.end_of_text
            each.emit(token)
            if ends or each.n_tokens == each.max_new_tokens:
                each.emit(None)
                done.append(first + i)
        self.rows.remove(done)

    def read(self, requests: list[Reading]):
        if not requests:
            return
        requests.sort(key=lambda each: len(each.tokens))
        lengths = [len(each.tokens) for each in requests]
        tokens = torch.tensor([token for each in requests for token in each.tokens],
                              device=self.rows.device)
        final = self.model(tokens, lengths, with_logits=False).final.split(lengths)
        for each, states in zip(requests, final):
            if each.logits_from is not None:
                each.emit(self.model.logits(states[each.logits_from:]).float())
                continue
            logits = self.model.logits(states[:-1]).float()
            each.emit(described(logits, each.tokens[1:], [each] * len(logits)))


def described(logits, ids: list[int], requests) -> list[Token]:     # (S, V)
    """A Token for each row of logits, with as many of the most likely ones as its request wants."""
    if not len(logits):
        return []
    log_p = logits.log_softmax(dim=-1)
    own = log_p.gather(1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(1).tolist()
    n_top = max(each.n_top for each in requests)
    values, indices = (each.tolist() for each in log_p.topk(n_top, dim=-1))
    return [Token(i, value, list(zip(top, logs))[:each.n_top])
            for i, value, each, top, logs in zip(ids, own, requests, indices, values)]
