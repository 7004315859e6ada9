"""
MiniMind 自己保存的 .pth：只有半精度的张量，尺寸从形状读出，分词器在旁边。
MiniMind's own .pth: fp16 tensors and nothing else. The sizes are read off the shapes, the vocabulary lies beside it.

    minimind/out/full_sft_768.pth      minimind/model/tokenizer.json, or a tokenizer.json in the folder of the weights
"""

import re
from collections.abc import Iterator
from pathlib import Path

from model.config import LMConfig
from model.tokenizer import Tokenizer
from interop import Piece
from interop.hf import to_pieces
from interop.native import read_state
from interop.vocabulary import read_tokenizer_json

MARK = "model.layers.0.self_attn.q_proj.weight"     # what its files hold, and ours do not


def read_config(path) -> LMConfig:
    """What the shapes tell, and for the rest the defaults of MiniMind's config: RoPE's base 1e6 and, where there are
    q/k norms (since MiniMind-3), eps 1e-6 and one expert a token; before, 8 heads, eps 1e-5 and two experts. Models made
    with other numbers should come as MiniMind's own transformers export, which has a config.json."""
    shapes = {name: tensor.shape for name, tensor in read_state(path).items()}
    first = "model.layers.0."
    newer, use_moe = f"{first}self_attn.q_norm.weight" in shapes, f"{first}mlp.gate.weight" in shapes
    (vocab_size, dim), rows = shapes["model.embed_tokens.weight"], shapes[MARK][0]
    head_dim = shapes[f"{first}self_attn.q_norm.weight"][0] if newer else dim // 8
    ffn = f"{first}mlp.experts.0." if use_moe else f"{first}mlp."
    experts = {}
    if use_moe:
        n_shared = sum(bool(re.fullmatch(r"model\.layers\.0\.mlp\.shared_experts\.\d+\.up_proj\.weight", name)) for name in shapes)
        experts = {"use_moe": True, "n_routed_experts": shapes[f"{first}mlp.gate.weight"][0], "n_shared_experts": n_shared,
                   "num_experts_per_tok": 1 if newer else 2}
    return LMConfig(
        dim=dim, n_layers=1 + max(int(m[1]) for name in shapes if (m := re.match(r"model\.layers\.(\d+)\.", name))),
        n_heads=rows // head_dim, n_kv_heads=shapes[f"{first}self_attn.k_proj.weight"][0] // head_dim, head_dim=head_dim,
        hidden_dim=shapes[f"{ffn}gate_proj.weight"][0], vocab_size=vocab_size, max_seq_len=32768, rope_theta=1e6,
        norm_eps=1e-6 if newer else 1e-5, qk_norm=newer, **experts)


def read_tokenizer(path) -> Tokenizer:
    folder = Path(path).parent
    places = folder / "tokenizer.json", folder.parent / "model" / "tokenizer.json"
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds MiniMind's weights, but neither {places[0]} nor {places[1]} is there; "
                                "copy its tokenizer.json beside the weights")
    return read_tokenizer_json(found)


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    return to_pieces(read_state(path).items(), config)
