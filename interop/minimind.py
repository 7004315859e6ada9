"""
MiniMind 自己保存的 .pth：只有半精度的张量，尺寸从形状读出，分词器在旁边。
MiniMind's .pth: fp16 tensors and nothing else. The sizes follow from the shapes.

    minimind/out/full_sft_768.pth
    minimind/model/tokenizer.json       or a tokenizer.json beside the weights
"""

from collections.abc import Iterator
from pathlib import Path

from interop import Piece
from interop.hf import to_pieces
from interop.native import read_state
from interop.vocabulary import read_tokenizer_json
from model.config import LMConfig
from model.tokenizer import Tokenizer

MARK = "model.layers.0.self_attn.q_proj.weight"     # a tensor that only its files have


def read_config(path) -> LMConfig:
    """The sizes that follow from the shapes, and otherwise MiniMind's defaults: RoPE's base 1e6;
    with q/k norms (since MiniMind-3) eps 1e-6 and one expert per token; before, 8 heads, eps 1e-5
    and two experts. Models of other sizes should come as MiniMind's transformers export."""
    shapes = {name: tensor.shape for name, tensor in read_state(path).items()}
    layer = {name.removeprefix("model.layers.0.").removesuffix(".weight"): shape
             for name, shape in shapes.items() if name.startswith("model.layers.0.")}
    is_new, use_moe = "self_attn.q_norm" in layer, "mlp.gate" in layer
    vocab_size, dim = shapes["model.embed_tokens.weight"]
    head_dim = layer["self_attn.q_norm"][0] if is_new else dim // 8
    experts = {}
    if use_moe:
        is_shared = [name for name in layer if "shared_experts" in name and "up_proj" in name]
        experts = {"use_moe": True, "n_routed_experts": layer["mlp.gate"][0],
                   "n_shared_experts": len(is_shared), "num_experts_per_tok": 1 if is_new else 2}
    return LMConfig(
        dim=dim, n_layers=sum(name.endswith("self_attn.q_proj.weight") for name in shapes),
        n_heads=layer["self_attn.q_proj"][0] // head_dim,
        n_kv_heads=layer["self_attn.k_proj"][0] // head_dim, head_dim=head_dim,
        hidden_dim=layer["mlp.experts.0.gate_proj" if use_moe else "mlp.gate_proj"][0],
        vocab_size=vocab_size, max_seq_len=32768, rope_theta=1e6, norm_eps=1e-6 if is_new else 1e-5,
        qk_norm=is_new, **experts)


def read_tokenizer(path) -> Tokenizer:
    folder = Path(path).parent
    places = folder / "tokenizer.json", folder.parent / "model" / "tokenizer.json"
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds MiniMind's weights, but neither {places[0]} nor "
                                f"{places[1]} exists; copy its tokenizer.json beside the weights")
    return read_tokenizer_json(found)


def read_pieces(path, config: LMConfig) -> Iterator[Piece]:
    return to_pieces(read_state(path).items(), config)
