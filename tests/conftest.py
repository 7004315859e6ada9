"""
各测试共用的小模型与按字节的分词器。
What several tests share: a model small enough for a hand, and a tokenizer whose ids are bytes.
"""

import pytest
import torch

from dataset import lm_dataset
from model.config import LMConfig
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from model.transformer import Transformer

torch.set_num_threads(1)        # on matrices of 16 x 16, handing work to threads takes longer than the work


@pytest.fixture(scope="session")
def tiny():
    """tiny(n_heads=2, ...) -> a model of 16 x 2 in eval mode. Its weights are drawn wide, norms and biases too, so that
    no part of it is too small to be seen in the logits."""

    def make(seed=0, **sizes):
        sizes = dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=12, max_seq_len=24) | sizes
        model = Transformer(LMConfig(**sizes)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
        return model

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    """byte_tokenizer(end_of_text=0) -> no two bytes are joined, so that "a" is 16 + 97 wherever it stands."""

    def make(end_of_text=0):
        special_tokens = SPECIAL_TOKENS | {"<|endoftext|>": end_of_text}
        return Tokenizer(PATTERN, special_tokens, {bytes([value]): 16 + value for value in range(256)})

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The token cache in a folder of its own."""
    monkeypatch.setattr(lm_dataset, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"
