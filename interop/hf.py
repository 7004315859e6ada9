"""
Hugging Face 文件夹：config.json、safetensors 分片、tokenizer.json。只有这里认识它们的名字。
Hugging Face folders: config.json, .safetensors files, tokenizer.json; their names are only here.
MiniMind's export is Qwen3 under another name; minimind.py reads its .pth files.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from interop import (CONCATENATED, Piece, check_supported, family_of, fold, fused_weights,
                     named_errors, rename, report_cut, split_weights)
from interop.native import read_state
from interop.vocabulary import QWEN2, read_tokenizer_json, write_tokenizer
from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from runtime.files import UNSIGNED, check_signature, replace_atomic, sign, write_json

FAMILIES = {                # what is written, by what it has beyond Llama
    "": "llama", "attention_bias": "qwen2", "qk_norm": "qwen3", "nope_layers": "smollm3",
    "rotary_dim": "phi3", "use_moe+qk_norm": "qwen3_moe", "use_moe+shared": "qwen2_moe",
    "use_moe+shared+attention_bias": "qwen2_moe"}
OTHERS = ("mistral", "granite", "minimind", "gpt2")     # the first two are written as llama
CLASSES = {"smollm3": "SmolLM3"}                        # of transformers, less "ForCausalLM"

# Fields of LMConfig -> keys of config.json.
SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
         "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "activation": "hidden_act",
         "hidden_dim": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps",
         "max_seq_len": "max_position_embeddings", "tie_embeddings": "tie_word_embeddings"}
GPT2_SIZES = {"dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "hidden_dim": "n_inner",
              "vocab_size": "vocab_size", "max_seq_len": "n_positions",
              "norm_eps": "layer_norm_epsilon", "tie_embeddings": "tie_word_embeddings"}
MOE_SIZES = {"n_routed_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
             "hidden_dim": "moe_intermediate_size", "norm_topk_prob": "norm_topk_prob",
             "aux_loss_alpha": "router_aux_loss_coef"}
ROPE_SCALING = {        # rope_type -> arguments of scale_frequencies
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_slow", "beta_fast", "original_max_position_embeddings")}

# Settings that change what a model computes, with the values that this code has.
SUPPORTED = {"hidden_act": ("silu", "gelu", "relu2"), "mlp_bias": (False,),
             "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)}
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
    "attention.wqkv": "self_attn.qkv_proj", "ffn.w13": "mlp.gate_up_proj",
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
    if family not in (known := [*dict.fromkeys(FAMILIES.values()), *OTHERS]):
        raise ValueError(f"model_type {family!r} is none of {', '.join(known)}")
    if theirs.get("quantization_config"):
        raise ValueError("the weights are quantised; name the model that they were made from")
    check_supported(theirs, GPT2_SUPPORTED if family == "gpt2" else SUPPORTED)
    if family == "gpt2":
        defaults = {"n_inner": None, "tie_word_embeddings": True}
        return LMConfig(architecture="gpt2", **read_sizes(defaults | theirs, GPT2_SIZES))
    defaults = {"head_dim": head_dim_of(theirs), "hidden_act": "silu",
                "num_key_value_heads": theirs["num_attention_heads"],
                "tie_word_embeddings": family == "minimind"}
    sizes = read_sizes(defaults | without_none(theirs), SIZES) | read_rope(theirs)[0]
    if window := theirs.get("use_sliding_window", True) and theirs.get("sliding_window"):
        sizes["max_seq_len"] = min(sizes["max_seq_len"], window)    # up to it attention is causal
    if family == "smollm3":
        sizes["nope_layers"] = [i for i, has_rope in enumerate(theirs["no_rope_layers"])
                                if not has_rope]
    if family.endswith("_moe") or theirs.get("use_moe"):
        sizes |= read_experts(theirs, sizes["hidden_dim"])
    # Qwen2-MoE may declare the biases of Qwen2; in the others attention_bias adds one to wo, too.
    has_bias = (theirs.get("qkv_bias", True) if family == "qwen2_moe" else
                family == "qwen2" or theirs.get("attention_bias", False))
    return LMConfig(attention_bias=has_bias, qk_norm=family in ("qwen3", "qwen3_moe", "minimind"),
                    **sizes)


def without_none(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if value is not None}


def read_sizes(theirs: dict, names: dict[str, str]) -> dict:
    return {ours: theirs[name] for ours, name in names.items()}


def write_sizes(config: LMConfig, names: dict[str, str]) -> dict:
    return {name: getattr(config, ours) for ours, name in names.items()}


def read_experts(theirs: dict, hidden_dim: int) -> dict:
    hidden_dim = theirs.get("moe_intermediate_size") or hidden_dim
    # Qwen2-MoE has one shared expert, as wide as several; MiniMind had several before version 3.
    n_shared = (theirs.get("shared_expert_intermediate_size", 0) / hidden_dim
                or theirs.get("n_shared_experts", 0))
    # The number of experts has another name in transformers 5, and another in MiniMind.
    n_experts = next((theirs[name] for name in ("num_experts", "num_local_experts",
                                               "n_routed_experts") if name in theirs), 0)
    defaults = {"norm_topk_prob": False, "router_aux_loss_coef": LMConfig.aux_loss_alpha}
    given = {"num_experts": n_experts, "moe_intermediate_size": hidden_dim}
    return {"use_moe": True, "n_shared_experts": int(n_shared),
            **read_sizes(defaults | theirs | given, MOE_SIZES)}


def head_dim_of(theirs: dict) -> int:
    return theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]


def read_rope(theirs: dict) -> tuple[dict, float]:
    """Fields of LMConfig, and a factor of q . k. transformers 4 has rope_theta and rope_scaling,
    version 5 both in rope_parameters."""
    length = theirs["max_position_embeddings"]
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "beta_slow": 1.0,
            "beta_fast": 32.0, "original_max_position_embeddings": length}
    parameters, scaling = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
    for given in (theirs, parameters, scaling):
        rope |= without_none(given)
    scaling = scaling or parameters
    kind = ("longrope" if "short_factor" in scaling else        # also called su and yarn
            scaling.get("rope_type", scaling.get("type", "default")))
    fields, factor = {"rope_theta": float(rope["rope_theta"])}, 1.0
    fields["rotary_dim"] = int(head_dim_of(theirs) * rope["partial_rotary_factor"])
    if kind in ROPE_SCALING:
        fields["rope_scaling"] = {name: rope[name] for name in ROPE_SCALING[kind]}
    elif kind == "longrope" and {*rope["short_factor"]} == {1}:
        # Phi-4-mini scales no frequency up to its original length: the context ends there.
        fields["max_seq_len"] = rope["original_max_position_embeddings"]
        factor = math.sqrt(math.log(length) / math.log(fields["max_seq_len"]))
    elif kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not supported, only {', '.join(ROPE_SCALING)}, "
                         "and longrope with a short_factor of ones")
    if kind == "yarn":
        check_supported(rope, {"truncate": (True,), "mscale": (None,)})
        factor = 1 + 0.1 * math.log(rope["factor"])
    if kind in ("longrope", "yarn"):
        factor = rope.get("attention_factor", factor) ** 2          # it scales both q and k
    return fields, factor


def read_factors(theirs: dict) -> dict[str, float]:
    """The arguments of `fold`: Granite's factors, and the temperature of YaRN and longrope."""
    attention = theirs.get("attention_multiplier", 0) * math.sqrt(head_dim_of(theirs)) or 1.0
    return {"embedding": theirs.get("embedding_multiplier", 1.0),
            "residual": theirs.get("residual_multiplier", 1.0),
            "logits": 1 / theirs.get("logits_scaling", 1.0),
            "attention": attention * read_rope(theirs)[1]}


def write_config(config: LMConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict:
    """The config.json of the family that computes the same. Raises ValueError if there is none."""
    family = family_of(config, FAMILIES, "Hugging Face", SUPPORTED["hidden_act"])
    # AutoTokenizer gives every Qwen2 the pattern of Qwen2. Llama has these biases, and one of wo.
    if family == "qwen2" and (tokenizer.pattern, tokenizer.normalization) != (QWEN2, "NFC"):
        family = "llama"
    if family == "phi3" and config.rope_scaling:
        raise ValueError("transformers' phi3 has no rope_scaling like this model's")
    theirs = {"model_type": family, "bos_token_id": tokenizer.bos,
              "eos_token_id": tokenizer.end_of_turn, "pad_token_id": None,
              "torch_dtype": str(dtype)[6:]}
    if family == "gpt2":
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout)
        return theirs | write_sizes(config, GPT2_SIZES) | dropout | {
            "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"}
    scaling = config.rope_scaling or {}
    kinds = {frozenset(names): kind for kind, names in ROPE_SCALING.items()}
    rope = {"rope_theta": config.rope_theta, **scaling,
            "rope_type": kinds[frozenset(scaling)] if scaling else "default"}
    if rope["rope_type"] == "yarn":
        rope["attention_factor"] = 1.0              # the temperature is in the weights
    if family == "phi3":
        rope["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    theirs |= write_sizes(config, SIZES) | {        # transformers 5 reads rope_parameters
        "architectures": [CLASSES.get(family, family.title().replace("_", "")) + "ForCausalLM"],
        "rope_parameters": rope, "rope_theta": config.rope_theta,
        "rope_scaling": rope if scaling else None}
    if family == "llama":
        theirs["attention_bias"] = config.attention_bias
    if family == "smollm3":
        theirs["no_rope_layers"] = [int(i not in config.nope_layers)
                                    for i in range(config.n_layers)]
    if config.use_moe:
        theirs |= write_sizes(config, MOE_SIZES) | {"decoder_sparse_step": 1, "mlp_only_layers": []}
    if family == "qwen2_moe":
        theirs |= {"shared_expert_intermediate_size": config.n_shared_experts * config.hidden_dim,
                   "qkv_bias": config.attention_bias}
    return theirs


# -- reading ---------------------------------------------------------------------------------------

read_tokenizer = read_tokenizer_json


def read_pieces(folder, config: LMConfig) -> Iterator[Piece]:
    theirs = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    pieces = to_pieces(read_tensors(Path(folder)), config)
    if config.architecture == "gpt2":
        return pieces
    report_cut(folder, config, theirs["max_position_embeddings"])
    return fold(pieces, config, **read_factors(theirs))


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    shards = [folder / "model.safetensors"]         # before the index, as in transformers
    index = folder / "model.safetensors.index.json"
    if not shards[0].exists() and index.exists():
        names = {*json.loads(index.read_bytes())["weight_map"].values()}
        shards = [folder / Path(name).name for name in sorted(names)]
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
        if source.endswith(("shared_expert_gate.weight", "self_attn.o_proj.bias")):
            if tensor.count_nonzero():
                raise ValueError(f"{source} is not zero: not supported")
            continue
        if config.architecture == "gpt2" and name.startswith("layers") and tensor.dim() == 2:
            tensor = tensor.T                       # GPT-2's layers compute x W, ours x W^T
        if "shared_expert." in source and name.endswith("shared.w2.weight"):
            tensor = tensor / 2                     # the gate of Qwen2-MoE: sigmoid(0)

        if number and "shared" in name:           # MiniMind's shared experts, here one wide FFN
            start = int(number[1]) * config.hidden_dim
            part = slice(start, start + config.hidden_dim)
            yield Piece(name, tensor, (slice(None), part) if "w2" in name else part, source)
        elif number:
            yield Piece(name, tensor, int(number[1]), source)
        else:
            yield from split_weights(name, tensor, source, config, config.architecture != "gpt2")


# -- writing ---------------------------------------------------------------------------------------

def write(model: Transformer, tokenizer: Tokenizer, folder, dtype: torch.dtype = torch.float32):
    """Write the folder that AutoModelForCausalLM and AutoTokenizer read. config.json comes last:
    without it the folder is no model. Raises ValueError for a model that no family can hold."""
    folder, config = Path(folder), write_config(model.config, tokenizer, dtype)
    tensors = {name: tensor.to(dtype).contiguous()
               for name, tensor in their_tensors(model, config["model_type"])}

    def to_file(temporary):
        save_file(tensors, temporary, {"format": "pt", "checksum": UNSIGNED.decode()})
        temporary.chmod(0o644)          # save_file leaves it to its owner
        sign(temporary)

    replace_atomic(folder / "model.safetensors", to_file)
    write_tokenizer(tokenizer, folder)
    write_json(folder / "generation_config.json",
               {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", config)


def names_of(config: LMConfig) -> dict[str, str]:
    """Our names -> theirs."""
    if config.architecture == "gpt2":
        return GPT2_NAMES
    return NAMES | STACKS if config.use_moe else NAMES


def their_tensors(model: Transformer, family: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under their names and in their order."""
    config, is_gpt2, table = model.config, family == "gpt2", names_of(model.config)
    for name, weight in fused_weights(model, CONCATENATED.get(family, ()), not is_gpt2):
        theirs = rename(name, table)
        if is_gpt2 and name.startswith("layers") and weight.dim() == 2:
            weight = weight.T
        elif family == "llama" and name.endswith("wq.bias"):
            yield theirs.replace("q_proj", "o_proj"), weight.new_zeros(config.dim)
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
