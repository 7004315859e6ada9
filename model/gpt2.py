"""
GPT-2：位置是学来的向量，归一化用 LayerNorm，前馈网络用 GELU；其余与 transformer.py 相同。
GPT-2 differs from model/transformer.py in four places: learned position embeddings, LayerNorm, an
FFN with GELU, and biases in every layer but the head.

    GPT2(LMConfig(architecture="gpt2", dim=768, n_layers=12, n_heads=12, vocab_size=50257,
                  max_seq_len=1024))

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import torch.nn.functional as F
from torch import nn

from model.config import LMConfig
from model.transformer import Block, Layout, Transformer


class GELUFeedForward(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):  # (N, D) -> (N, D)
        """w2 gelu(w1 x), with the tanh form of GELU: Hendrycks & Gimpel 2016,
        https://arxiv.org/abs/1606.08415."""
        return self.w2(F.gelu(self.w1(x), approximate="tanh"))


class GPT2Block(Block):
    def __init__(self, config: LMConfig, layer: int):
        super().__init__(config, layer)
        self.attention_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.attention.wo = nn.Linear(config.n_heads * config.head_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.ffn = GELUFeedForward(config.dim, config.hidden_dim)


class GPT2(Transformer):
    block = GPT2Block

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.pos_embeddings = nn.Embedding(config.max_seq_len, config.dim)
        nn.init.normal_(self.pos_embeddings.weight, std=0.01)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def embed(self, tokens, layout: Layout):  # (N,) -> (N, D)
        return self.tok_embeddings(tokens) + self.pos_embeddings(layout.positions)
