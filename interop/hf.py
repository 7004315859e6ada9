"""
Hugging Face 文件夹：config.json、safetensors 分片、tokenizer.json。只有这里认识它们的名字。
Hugging Face folders: config.json, one or several .safetensors files, tokenizer.json. Their names are known only here.

    Llama, SmolLM2      the plain decoder
    Qwen2, Qwen2.5      + biases on q, k and v
    Qwen3               + norms on q and k
    Qwen3-MoE           + experts;  Qwen2-MoE: experts and a shared one, behind a gate
    MiniMind            Qwen3 and Qwen3-MoE under another name; its .pth files too, see minimind.py
    GPT-2               model/gpt2.py
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from interop import Piece, halves, neighbours
from interop.native import read_state
from interop.vocabulary import read_tokenizer_json, write_tokenizer
from runtime.files import replace_atomic, write_atomic

SHARD_BYTES = 4 << 30

# Theirs -> ours.
NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
LAYER_NAMES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "ffn.w1", "mlp.down_proj": "ffn.w2", "mlp.up_proj": "ffn.w3", "mlp.gate": "ffn.router",
    "mlp.shared_expert.gate_proj": "ffn.shared.w1", "mlp.shared_expert.down_proj": "ffn.shared.w2",
    "mlp.shared_expert.up_proj": "ffn.shared.w3",
}
GPT2_NAMES = {"wte": "tok_embeddings", "wpe": "pos_embeddings", "ln_f": "norm", "lm_head": "output"}
GPT2_LAYER_NAMES = {"ln_1": "attention_norm", "attn.c_attn": "attention.wqkv", "attn.c_proj": "attention.wo",
                    "ln_2": "ffn_norm", "mlp.c_fc": "ffn.w1", "mlp.c_proj": "ffn.w2"}
EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
TURNED = ("attention.wq", "attention.wk", "attention.q_norm", "attention.k_norm")     # their pairs lie half a head apart

# ---------------------------------------------------------------------------------------------------------- config.json


def read_config(folder) -> LMConfig:
    """The sizes in a folder's config.json. Raises ValueError for a family, or a feature of one, that is not known here."""
    file = Path(folder) / "config.json"
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    try:
        return config_of(theirs)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def config_of(theirs: dict) -> LMConfig:
    family = theirs["model_type"]
    if family == "gpt2":
        only(theirs, activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
             scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
        return LMConfig(
            architecture="gpt2", dim=theirs["n_embd"], n_layers=theirs["n_layer"], n_heads=theirs["n_head"],
            hidden_dim=theirs.get("n_inner"), vocab_size=theirs["vocab_size"], max_seq_len=theirs["n_positions"],
            norm_eps=theirs["layer_norm_epsilon"], tie_embeddings=theirs.get("tie_word_embeddings", True))

    if family not in ("llama", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "minimind"):
        raise ValueError(f"model_type {family!r} is none of llama, qwen2, qwen3, qwen2_moe, qwen3_moe, minimind, gpt2")
    only(theirs, hidden_act=("silu",), mlp_bias=(False,), use_sliding_window=(False,), decoder_sparse_step=(1,),
         mlp_only_layers=([], None), partial_rotary_factor=(1.0,))
    if family != "qwen2_moe":           # there the two mean what they mean in qwen2
        only(theirs, attention_bias=(False,))
    heads = theirs["num_attention_heads"]
    sizes = dict(
        dim=theirs["hidden_size"], n_layers=theirs["num_hidden_layers"], n_heads=heads,
        n_kv_heads=theirs.get("num_key_value_heads") or heads, head_dim=theirs.get("head_dim"),
        hidden_dim=theirs["intermediate_size"], vocab_size=theirs["vocab_size"],
        max_seq_len=theirs["max_position_embeddings"], norm_eps=theirs["rms_norm_eps"],
        tie_embeddings=theirs.get("tie_word_embeddings", family == "minimind"),
        qk_norm=family in ("qwen3", "qwen3_moe", "minimind"),
        attention_bias=family == "qwen2" or family == "qwen2_moe" and theirs.get("qkv_bias", True))
    if family.endswith("_moe") or theirs.get("use_moe"):
        sizes |= experts(theirs, sizes["hidden_dim"])
    return LMConfig(**sizes, **rope(theirs))


def experts(theirs: dict, hidden_dim: int) -> dict:
    hidden_dim = theirs.get("moe_intermediate_size") or hidden_dim
    n_shared = theirs.get("n_shared_experts", 0)            # MiniMind's, before version 3
    if "shared_expert_intermediate_size" in theirs:         # Qwen2-MoE's single one is as wide as several
        n_shared, rest = divmod(theirs["shared_expert_intermediate_size"], hidden_dim)
        if rest:
            raise ValueError(f"shared_expert_intermediate_size {theirs['shared_expert_intermediate_size']} is no multiple "
                             f"of moe_intermediate_size {hidden_dim}")
    # As Qwen names their number, as transformers 5 does, and as MiniMind did.
    n_routed = next((theirs[name] for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in theirs), None)
    if n_routed is None:
        raise KeyError("num_experts")
    return {"use_moe": True, "hidden_dim": hidden_dim, "n_shared_experts": n_shared, "n_routed_experts": n_routed,
            "num_experts_per_tok": theirs["num_experts_per_tok"], "norm_topk_prob": theirs.get("norm_topk_prob", False),
            "aux_loss_alpha": theirs.get("router_aux_loss_coef", LMConfig.aux_loss_alpha)}


def only(theirs: dict, **known):
    """Refuse a setting that would change what the model computes, and that this code does not have."""
    for name, values in known.items():
        if name in theirs and theirs[name] not in values:
            raise ValueError(f"{name} {theirs[name]!r} is not supported, only {' or '.join(map(repr, values))}")


def rope(theirs: dict) -> dict:
    """rope_theta and rope_scaling, as transformers 4 writes them and as 5 does, together in rope_parameters."""
    together = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or together
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope scaling {kind!r} is not supported, only 'llama3'")
    return {"rope_theta": float(together.get("rope_theta") or theirs.get("rope_theta", 10000.0)),
            "rope_scaling": {name: scaling[name] for name in numbers} if kind == "llama3" else None}


def write_config(config: LMConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """The config.json of a model, in the smallest family that holds it. Raises ValueError if none does."""
    if config.quantization:
        raise ValueError(f"a model in {config.quantization} is for inference here; write the one it was made from")
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.end_of_turn, "torch_dtype": str(dtype)[6:],
           "vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    if config.architecture == "gpt2":
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": config.dim,
                "n_layer": config.n_layers, "n_head": config.n_heads, "n_inner": config.hidden_dim,
                "n_positions": config.max_seq_len, "layer_norm_epsilon": config.norm_eps,
                "activation_function": "gelu_new", "attn_pdrop": config.dropout, "embd_pdrop": config.dropout,
                "resid_pdrop": config.dropout, **ids}
    family, class_name = family_of(config)
    rope = {"rope_theta": config.rope_theta, "rope_type": "llama3" if config.rope_scaling else "default",
            **(config.rope_scaling or {})}
    theirs = {
        "model_type": family, "architectures": [class_name], "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim, "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps, "hidden_act": "silu",
        "rope_theta": config.rope_theta, "rope_scaling": rope if config.rope_scaling else None,    # transformers 4
        "rope_parameters": rope, **ids}                                                            # transformers 5
    if config.use_moe:
        theirs |= {"num_experts": config.n_routed_experts, "num_experts_per_tok": config.num_experts_per_tok,
                   "moe_intermediate_size": config.hidden_dim, "norm_topk_prob": config.norm_topk_prob,
                   "router_aux_loss_coef": config.aux_loss_alpha, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if family == "qwen2_moe":
        theirs |= {"shared_expert_intermediate_size": config.n_shared_experts * config.hidden_dim,
                   "qkv_bias": config.attention_bias}
    return theirs


def family_of(config: LMConfig) -> tuple[str, str]:
    """(model_type, class) of the family that computes what this model does."""
    if config.use_moe:
        if config.qk_norm and not config.n_shared_experts and not config.attention_bias:
            return "qwen3_moe", "Qwen3MoeForCausalLM"
        if not config.qk_norm and config.n_shared_experts:
            return "qwen2_moe", "Qwen2MoeForCausalLM"
        raise ValueError("no Hugging Face family has these experts: Qwen3-MoE has q/k norms and no shared expert, "
                         "Qwen2-MoE no q/k norms and a shared one")
    if config.qk_norm and config.attention_bias:
        raise ValueError("no Hugging Face family has both q/k norms and biases on q, k and v alone")
    return (("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("qwen2", "Qwen2ForCausalLM") if config.attention_bias
            else ("llama", "LlamaForCausalLM"))


# -------------------------------------------------------------------------------------------------------------- tensors


def read_tokenizer(folder) -> Tokenizer:
    return read_tokenizer_json(folder)


def read_pieces(folder, config: LMConfig) -> Iterator[Piece]:
    return to_pieces(read_tensors(Path(folder)), config)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a folder, one at a time. Raises FileNotFoundError for a missing shard, ValueError for a broken one."""
    index = folder / "model.safetensors.index.json"
    shards = [folder / "model.safetensors"]
    if index.exists():
        shards = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    elif not shards[0].exists():
        shards = sorted(folder.glob("pytorch_model*.bin"))      # MiniMind's own export
        if not shards:
            raise FileNotFoundError(f"{folder} has a config.json, but neither model.safetensors nor "
                                    "model.safetensors.index.json: the download is not complete")
    for shard in shards:
        if not shard.exists():
            raise FileNotFoundError(f"{shard}, which {index.name} names, is missing: the download is not complete")
        yield from read_state(shard).items() if shard.suffix == ".bin" else read_safetensors(shard)


def read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            # Opened anew for each: a tensor is a view of the mapped file, whose pages count until it is closed.
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short, or no safetensors file at all ({error})") from error


def to_pieces(tensors, config: LMConfig) -> Iterator[Piece]:
    """Their tensors as pieces of ours. A name that is not known goes through as it is: `fill` refuses it."""
    for source, tensor in tensors:
        for name, tensor, where in gpt2_pieces(source, tensor) if config.architecture == "gpt2" else \
                decoder_pieces(source, tensor, config):
            if name != "output.weight" or not config.tie_embeddings:        # tied: it is tok_embeddings again
                yield Piece(name, tensor, where, source)


def decoder_pieces(source: str, tensor, config: LMConfig):
    name, _, kind = source.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        layer, name = f"layers.{match[1]}", match[2]
        if name.endswith("rotary_emb") and kind == "inv_freq":              # in old files: RoPE's frequencies
            return
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)", name):
            yield f"{layer}.ffn.{EXPERT.get(expert[2])}", tensor, int(expert[1])
        elif shared := re.fullmatch(r"mlp\.shared_experts\.(\d+)\.(\w+)", name):        # MiniMind's, laid side by side
            part = slice(int(shared[1]) * config.hidden_dim, (int(shared[1]) + 1) * config.hidden_dim)
            where = (slice(None), part) if shared[2] == "down_proj" else part
            yield f"{layer}.ffn.shared.{EXPERT.get(shared[2])}.{kind}", tensor, where
        elif name == "mlp.shared_expert_gate":
            if tensor.count_nonzero():
                raise ValueError(f"{source} is not zero: a shared expert behind a gate that the text moves is not supported")
        else:
            ours = LAYER_NAMES.get(name, name)
            if ours in TURNED:
                tensor = neighbours(tensor, config.head_dim)
            if ours == "ffn.shared.w2":
                tensor = tensor / 2                                         # their gate, sigmoid(0)
            yield f"{layer}.{ours}.{kind}", tensor, ()
    else:
        yield f"{NAMES.get(name, name)}.{kind}", tensor, ()


def gpt2_pieces(source: str, tensor):
    name, _, kind = source.removeprefix("transformer.").rpartition(".")
    if match := re.fullmatch(r"h\.(\d+)\.(.+)", name):
        layer, name = f"layers.{match[1]}", GPT2_LAYER_NAMES.get(match[2], match[2])
        if name == "attn":                                                  # in old files: the causal mask
            return
        tensor = tensor.T if tensor.dim() == 2 else tensor                  # theirs multiply from the other side
        if name == "attention.wqkv":
            for part, third in zip(("wq", "wk", "wv"), tensor.chunk(3)):
                yield f"{layer}.attention.{part}.{kind}", third, ()
        else:
            yield f"{layer}.{name}.{kind}", tensor, ()
    else:
        yield f"{GPT2_NAMES.get(name, name)}.{kind}", tensor, ()


# -------------------------------------------------------------------------------------------------------------- writing


def write(model: Transformer, tokenizer: Tokenizer, folder, dtype: torch.dtype = torch.float32):
    """Write the folder that AutoModelForCausalLM and AutoTokenizer read. The config comes last: without it the folder
    counts as no model. Raises ValueError for a model that no family holds."""
    folder, config = Path(folder), write_config(model.config, tokenizer, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    shards = in_shards((name, tensor.numel() * dtype.itemsize) for name, tensor in their_tensors(model))
    tensors, weight_map = their_tensors(model), {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        shard = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in islice(tensors, len(names))}
        replace_atomic(folder / file, lambda beside: write_shard(shard, beside))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_tokenizer(tokenizer, folder)
    write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", config)


def write_shard(tensors: dict[str, torch.Tensor], path: Path):
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)               # the library writes files that their owner alone can read


def write_json(path: Path, value: dict):
    write_atomic(path, lambda file: file.write(json.dumps(value, indent=2, ensure_ascii=False).encode()))


def in_shards(sizes) -> list[list[str]]:
    """(name, bytes), ... -> the names of each file, which has at most SHARD_BYTES, or a single tensor."""
    shards, room = [], 0
    for name, size in sizes:
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def their_tensors(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their names and in their order, made one at a time."""
    for name, weight in model.named_parameters():           # a tied head is not among them, nor in their files
        yield from (gpt2_tensors if model.config.architecture == "gpt2" else decoder_tensors)(model, name, weight.detach())


THEIRS = {ours: theirs for theirs, ours in (NAMES | LAYER_NAMES).items()}
GPT2_THEIRS = {ours: theirs for theirs, ours in (GPT2_NAMES | GPT2_LAYER_NAMES).items()}


def decoder_tensors(model, name: str, weight):
    config = model.config
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if not match:
        ours, kind = name.rsplit(".", 1)
        yield f"{THEIRS[ours]}.{kind}", weight
        return
    layer, name = f"model.layers.{match[1]}", match[2]
    if expert := re.fullmatch(r"ffn\.(w[123])", name):
        theirs = next(theirs for theirs, ours in EXPERT.items() if ours == expert[1])
        for e, one in enumerate(weight):
            yield f"{layer}.mlp.experts.{e}.{theirs}.weight", one
        return
    ours, kind = name.rsplit(".", 1)
    if ours in TURNED:
        weight = halves(weight, config.head_dim)
    if ours == "ffn.shared.w2":
        # Qwen2-MoE multiplies its shared expert by sigmoid(gate . x). With a gate of 0 that is 1/2, whatever x.
        weight = weight * 2
        yield f"{layer}.mlp.shared_expert_gate.weight", weight.new_zeros(1, config.dim)
    yield f"{layer}.{THEIRS[ours]}.{kind}", weight


def gpt2_tensors(model, name: str, weight):
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    ours, kind = (match[2] if match else name).rsplit(".", 1)
    if ours == "output":
        yield "lm_head.weight", weight
    elif not match:
        yield f"transformer.{GPT2_THEIRS[ours]}.{kind}", weight
    elif ours not in ("attention.wk", "attention.wv"):      # those two travel with wq
        if ours == "attention.wq":
            attention = model.layers[int(match[1])].attention
            three = (attention.wq, attention.wk, attention.wv)
            ours, weight = "attention.wqkv", torch.cat([getattr(linear, kind).detach() for linear in three])
        yield f"transformer.h.{match[1]}.{GPT2_THEIRS[ours]}.{kind}", weight.T if weight.dim() == 2 else weight
