"""
代理：把一批对话交给一个模型，取回一批答复；模型在本地，或通过 OpenAI 兼容的 API 调用。
Agents: generate(conversations, max_new_tokens, temperature=0.0, seed=0) returns a reply to each
conversation, stripped, "" for none. Temperature 0 is greedy. Above 0 a reply depends on the seed
and the other conversations of the call; equal conversations get different replies.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

from evaluation.exam import write_answers
from interop.checkpoint import load_model, sha256_of_model
from model.generate import column_major
from runtime.endpoint import EndpointAgent, make_endpoint
from runtime.precision import pick_dtype, seed_of
from runtime.processes import patient_group


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


def batches_of(items: list, size: int) -> list[list]:
    return [items[start:start + size] for start in range(0, len(items), size)]


def divided(agent, world, size: int, max_new_tokens: int, temperature: float = 0.0) -> Callable:
    """generate(conversations, seed) -> the replies, on every process; each requests its share of
    the calls, which have `size` conversations."""
    group = patient_group(world)

    def generate(conversations: list, seed: int = 0) -> list[str]:
        batches = batches_of(conversations, size)
        mine = {n: agent.generate(batches[n], max_new_tokens, temperature, seed_of(seed, n))
                for n in range(world.rank, len(batches), world.size)}
        shares = [mine] * world.size
        if group:
            dist.all_gather_object(shares, mine, group=group)
        return [text for n in range(len(batches)) for text in shares[n % world.size][n]]

    return generate
