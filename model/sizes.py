"""
已发表模型的尺寸。
Sizes of published models.
"""

from model.config import LMConfig


def qwen3(dim, n_layers, n_heads, hidden_dim, tied=False) -> LMConfig:
    return LMConfig(dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8, head_dim=128,
                    hidden_dim=hidden_dim, vocab_size=151936, max_seq_len=40960, rope_theta=1e6,
                    norm_eps=1e-6, tie_embeddings=tied, qk_norm=True)


# Qwen3: Yang et al. 2025, https://arxiv.org/abs/2505.09388, Table 1; widths from each config.json.
# Llama 3.1 70B: Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, Table 3.
SIZES = {
    "0.6B": qwen3(1024, 28, 16, 3072, tied=True),
    "1.7B": qwen3(2048, 28, 16, 6144, tied=True),
    "4B": qwen3(2560, 36, 32, 9728, tied=True),
    "8B": qwen3(4096, 36, 32, 12288),
    "14B": qwen3(5120, 40, 40, 17408),
    "32B": qwen3(5120, 64, 64, 25600),
    "70B": LMConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672,
                    vocab_size=128256, max_seq_len=131072, rope_theta=5e5, tie_embeddings=False),
}
