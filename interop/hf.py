"""
Hugging Face 文件夹：config.json、safetensors 分片、tokenizer.json。只有这里认识它们的名字。
Hugging Face folders: config.json, .safetensors files, tokenizer.json; their names are only here.
MiniMind's export is Qwen3 under another name; minimind.py reads its .pth files.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from interop import (QKV, Piece, check_supported, family_of, is_rotated, named_errors, rename,
                     to_half_split, to_interleaved)
from interop.native import read_state
from interop.vocabulary import read_tokenizer_json, write_tokenizer
from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime.files import UNSIGNED, check_signature, replace_atomic, sign, write_json

SHARD_BYTES = 4 << 30       # of a file, plus at most one tensor

FAMILIES = {        # use_moe, with shared experts, qk_norm, attention_bias
    (False, False, False, False): "llama",
    (False, False, False, True): "qwen2",
    (False, False, True, False): "qwen3",
    (True, False, True, False): "qwen3_moe",
    (True, True, False, False): "qwen2_moe",
    (True, True, False, True): "qwen2_moe",
}

# Fields of LMConfig -> keys of config.json.
SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
         "hidden_dim": "intermediate_size", "vocab_size": "vocab_size",
         "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps"}
GPT2_SIZES = {"dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "hidden_dim": "n_inner",
              "vocab_size": "vocab_size", "max_seq_len": "n_positions",
              "norm_eps": "layer_norm_epsilon"}
MOE_SIZES = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
             "hidden_dim": "moe_intermediate_size", "norm_topk_prob": "norm_topk_prob",
             "aux_loss_alpha": "router_aux_loss_coef"}
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# Settings that change what a model computes, with the values that this code has.
SUPPORTED = {"hidden_act": ("silu", "gelu", "relu2"), "mlp_bias": (False,),
             "decoder_sparse_step": (1,), "use_sliding_window": (False,),
             "mlp_only_layers": ([], None), "partial_rotary_factor": (1.0,)}
GPT2_SUPPORTED = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                  "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
                  "add_cross_attention": (False,)}

# Our names -> theirs. An expert's number stands behind "experts.".
NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
NAMES |= {f"layers.*.{ours}": f"model.layers.*.{theirs}" for ours, theirs in {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
    "ffn.w1": "mlp.gate_proj", "ffn.w2": "mlp.down_proj", "ffn.w3": "mlp.up_proj",
    "ffn.router": "mlp.gate", "ffn.shared.w1": "mlp.shared_expert.gate_proj",
    "ffn.shared.w2": "mlp.shared_expert.down_proj", "ffn.shared.w3": "mlp.shared_expert.up_proj",
}.items()}
GPT2_NAMES = {"tok_embeddings": "transformer.wte", "pos_embeddings": "transformer.wpe",
              "norm": "transformer.ln_f", "output": "lm_head"}
GPT2_NAMES |= {f"layers.*.{ours}": f"transformer.h.*.{theirs}" for ours, theirs in {
    "attention_norm": "ln_1", "attention.wqkv": "attn.c_attn", "attention.wo": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn.w1": "mlp.c_fc", "ffn.w2": "mlp.c_proj"}.items()}
STACKS = {f"layers.*.ffn.{w}": f"model.layers.*.mlp.experts.{theirs}.weight"
          for w, theirs in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))}

OURS = {theirs.removeprefix("transformer."): ours
        for table in (NAMES, GPT2_NAMES, STACKS) for ours, theirs in table.items()}
OURS |= {theirs.replace("shared_expert.", "shared_experts."): ours for theirs, ours in OURS.items()
         if "shared_expert." in theirs}     # MiniMind's

# -- config.json -----------------------------------------------------------------------------------

def read_config(folder) -> LMConfig:
    """The sizes in a folder's config.json. Raises ValueError for what is not supported."""
    file = Path(folder) / "config.json"
    with named_errors(file):
        return config_of(json.loads(file.read_text(encoding="utf-8")))


def config_of(theirs: dict) -> LMConfig:
    family = theirs["model_type"]
    if family not in (known := [*dict.fromkeys(FAMILIES.values()), "minimind", "gpt2"]):
        raise ValueError(f"model_type {family!r} is none of {', '.join(known)}")
    if theirs.get("quantization_config"):
        method = theirs["quantization_config"].get("quant_method", "of some kind")
        raise ValueError(f"the weights are quantised ({method}); name the folder of the model that "
                         "they were made from, and quantise that: scripts/convert.py --quantize")
    # Qwen2-MoE may declare the biases of Qwen2; in the others attention_bias adds one to wo, too.
    supported = (GPT2_SUPPORTED if family == "gpt2" else SUPPORTED if family == "qwen2_moe" else
                 SUPPORTED | {"attention_bias": (False,)})
    check_supported(theirs, supported)
    if family == "gpt2":
        return LMConfig(architecture="gpt2", tie_embeddings=theirs.get("tie_word_embeddings", True),
                        **read_sizes({"n_inner": None} | theirs, GPT2_SIZES))
    sizes = read_sizes(theirs, SIZES) | read_rope(theirs)
    if family.endswith("_moe") or theirs.get("use_moe"):
        sizes |= read_experts(theirs, sizes["hidden_dim"])
    has_bias = family == "qwen2" or family == "qwen2_moe" and theirs.get("qkv_bias", True)
    return LMConfig(
        n_kv_heads=theirs.get("num_key_value_heads") or sizes["n_heads"],
        head_dim=theirs.get("head_dim"), attention_bias=has_bias,
        activation=theirs.get("hidden_act", "silu"),
        tie_embeddings=theirs.get("tie_word_embeddings", family == "minimind"),
        qk_norm=family in ("qwen3", "qwen3_moe", "minimind"), **sizes)


def read_sizes(theirs: dict, names: dict[str, str]) -> dict:
    return {ours: theirs[name] for ours, name in names.items()}


def write_sizes(config: LMConfig, names: dict[str, str]) -> dict:
    return {name: getattr(config, ours) for ours, name in names.items()}


def read_experts(theirs: dict, hidden_dim: int) -> dict:
    hidden_dim = theirs.get("moe_intermediate_size") or hidden_dim
    # Qwen2-MoE has one shared expert, as wide as several; MiniMind had several before version 3.
    n_shared = (theirs.get("shared_expert_intermediate_size", 0) / hidden_dim
                or theirs.get("n_shared_experts", 0))
    if n_shared % 1:
        raise ValueError("shared_expert_intermediate_size is no multiple of moe_intermediate_size")
    # The number of experts has another name in transformers 5, and another in MiniMind.
    n_experts = next((theirs[name] for name in ("num_experts", "num_local_experts",
                                               "n_routed_experts") if name in theirs), 0)
    defaults = {"norm_topk_prob": False, "router_aux_loss_coef": LMConfig.aux_loss_alpha}
    given = {"num_experts": n_experts, "moe_intermediate_size": hidden_dim}
    return {"use_moe": True, "n_shared_experts": int(n_shared),
            **read_sizes(defaults | theirs | given, MOE_SIZES)}


def read_rope(theirs: dict) -> dict:
    """transformers 4 has rope_theta and rope_scaling, version 5 both in rope_parameters."""
    parameters = theirs.get("rope_parameters") or {}
    scaling = theirs.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope scaling {kind!r} is not supported, only 'llama3'")
    llama3 = {name: scaling[name] for name in ROPE_SCALING} if kind == "llama3" else None
    return {"rope_theta": float(parameters.get("rope_theta") or theirs.get("rope_theta", 10000.0)),
            "rope_scaling": llama3}


def write_config(config: LMConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """The config.json of the family that computes the same. Raises ValueError if there is none."""
    family = family_of(config, FAMILIES, "Hugging Face", SUPPORTED["hidden_act"])
    theirs = {"model_type": family, "bos_token_id": tokenizer.bos,
              "eos_token_id": tokenizer.end_of_turn, "torch_dtype": str(dtype)[6:],
              "tie_word_embeddings": config.tie_embeddings}
    if family == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        return theirs | write_sizes(config, GPT2_SIZES) | dropout | {
            "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    rope = {"rope_theta": config.rope_theta, **(config.rope_scaling or {}),
            "rope_type": "llama3" if config.rope_scaling else "default"}
    theirs |= write_sizes(config, SIZES) | {        # transformers 5 reads rope_parameters
        "architectures": [family.title().replace("_", "") + "ForCausalLM"],
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rope_parameters": rope, "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None}
    if config.use_moe:
        theirs |= write_sizes(config, MOE_SIZES) | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if family == "qwen2_moe":
        theirs |= {"shared_expert_intermediate_size": config.n_shared_experts * config.hidden_dim,
                   "qkv_bias": config.attention_bias}
    return theirs


# -- reading ---------------------------------------------------------------------------------------

read_tokenizer = read_tokenizer_json


def read_pieces(folder, config: LMConfig) -> Iterator[Piece]:
    return to_pieces(read_tensors(Path(folder)), config)


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    index = folder / "model.safetensors.index.json"
    shards = [folder / "model.safetensors"]         # before the index, as in transformers
    if index.exists() and not shards[0].exists():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        shards = [folder / name for name in names]
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {outside[0]!r}, which is not a file in its folder")
    elif not shards[0].exists():        # MiniMind's own export
        shards = sorted(folder.glob("pytorch_model*.bin")) or shards
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} is missing: the download of {folder} is not complete")
        yield from read_state(shard).items() if shard.suffix == ".bin" else read_safetensors(shard)


def read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    check_signature(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        for name in names:
            # Opened again each time: the mapped pages of a tensor count as memory until it closes.
            with safe_open(file, framework="pt") as opened:
                yield name, opened.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short, or no safetensors file at all ({error})") from error


def to_pieces(tensors, config: LMConfig) -> Iterator[Piece]:
    """Their tensors as pieces of our weights."""
    for source, tensor in tensors:
        number = re.search(r"experts\.(\d+)\.", source)
        name = re.sub(r"experts\.\d+\.", "experts.", source.removeprefix("transformer."))
        name = rename(name, OURS)
        if source.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")):
            continue                    # old files hold RoPE's frequencies and the causal mask
        if source.endswith("shared_expert_gate.weight"):
            if tensor.count_nonzero():
                raise ValueError(f"{source} is not zero: a learned gate is not supported")
            continue
        if config.architecture == "gpt2" and name.startswith("layers") and tensor.dim() == 2:
            tensor = tensor.T                       # GPT-2's layers compute x W, ours x W^T
        if "shared_expert." in source and name.endswith("shared.w2.weight"):
            tensor = tensor / 2                     # the gate of Qwen2-MoE: sigmoid(0)

        if "attention.wqkv" in name:
            for part, third in zip(QKV, tensor.chunk(3)):
                yield Piece(name.replace("wqkv", part), third, source=source)
        elif number and "shared" in name:           # MiniMind's shared experts, here one wide FFN
            start = int(number[1]) * config.hidden_dim
            part = slice(start, start + config.hidden_dim)
            yield Piece(name, tensor, (slice(None), part) if "w2" in name else part, source)
        elif number:
            yield Piece(name, tensor, int(number[1]), source)
        else:
            if config.architecture != "gpt2" and is_rotated(name):
                tensor = to_interleaved(tensor, config.head_dim)
            yield Piece(name, tensor, source=source)


# -- writing ---------------------------------------------------------------------------------------

def write(model: Transformer, tokenizer: Tokenizer, folder, dtype: torch.dtype = torch.float32):
    """Write the folder that AutoModelForCausalLM and AutoTokenizer read. config.json comes last:
    without it the folder is no model. Raises ValueError for a model that no family can hold."""
    folder, config = Path(folder), write_config(model.config, tokenizer, dtype)
    shards, weight_map, size = {}, {}, 0
    for name, tensor in their_tensors(model):
        shards.setdefault(size // SHARD_BYTES, {})[name] = tensor
        size += tensor.numel() * dtype.itemsize
    for i, shard in enumerate(shards.values(), 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        shard = {name: tensor.to(dtype).contiguous() for name, tensor in shard.items()}

        def to_file(temporary):
            temporary.write_bytes(save(shard, {"format": "pt", "checksum": UNSIGNED.decode()}))
            sign(temporary)

        replace_atomic(folder / f"model{part}.safetensors", to_file)
        weight_map |= dict.fromkeys(shard, f"model{part}.safetensors")
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {}, "weight_map": weight_map})
    write_tokenizer(tokenizer, folder)
    write_json(folder / "generation_config.json",
               {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", config)


def their_tensors(model: Transformer) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their names and in their order, made one at a time."""
    config = model.config
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    is_gpt2 = config.architecture == "gpt2"
    table = GPT2_NAMES if is_gpt2 else NAMES | STACKS if config.use_moe else NAMES
    for name, weight in weights.items():
        if is_gpt2 and ("attention.wk" in name or "attention.wv" in name):
            continue                                # written with wq
        if is_gpt2 and "attention.wq" in name:
            weight = torch.cat([weights[name.replace("wq", part)] for part in QKV])
            name = name.replace("wq", "wqkv")
        theirs = rename(name, table)
        if is_gpt2 and name.startswith("layers") and weight.dim() == 2:
            weight = weight.T
        elif not is_gpt2 and is_rotated(name):
            weight = to_half_split(weight, config.head_dim)
        elif name.endswith("shared.w2.weight"):
            # Qwen2-MoE multiplies its shared expert by sigmoid(gate . x), 1/2 for a gate of 0.
            weight = weight * 2
            gate = theirs.replace("expert.down_proj", "expert_gate")
            yield gate, weight.new_zeros(1, config.dim)
        if weight.dim() == 3:
            for e, expert in enumerate(weight):
                yield theirs.replace("experts.", f"experts.{e}."), expert
        else:
            yield theirs, weight
