"""
代理：把一批对话交给一个模型，取回一批答复；模型在本地，或在一个 OpenAI 式的接口后面。
Agents: generate(conversations, max_new_tokens, temperature=0.0, seed=0) returns a reply to each
conversation, stripped, "" for none. Temperature 0 is greedy. Above 0 a reply depends on the seed
and the other conversations of the call; equal conversations get different replies.
"""

import torch

from evaluation.exam import write_answers
from interop.checkpoint import load_model, sha256_of_model
from model.generate import column_major
from runtime.endpoint import EndpointAgent, make_endpoint
from runtime.precision import pick_dtype


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


def make_agent(flags: dict, role: str, device) -> LocalAgent | EndpointAgent:
    """The agent of add_agent_args' flags. Raises ValueError for flags that exclude each other."""
    return make_endpoint(flags, role) or LocalAgent(
        flags[role], device, flags[f"{role}_parallel"] or 64, pick_dtype("auto", device))


def identity_of(flags: dict, role: str) -> str:
    """The hash of the weights and their batch size, on which samples depend; or URL and model."""
    if flags[role]:
        return f"{sha256_of_model(flags[role])}, {flags[f'{role}_parallel']} at once"
    return f"{flags[f'{role}_url']} {flags[f'{role}_model']}"
