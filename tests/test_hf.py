"""
真值：transformers 建的小模型读进来，输出相同；写出去，transformers 再读，还是相同。
The truth: a tiny random model that transformers built gives the same logits and the same text here,
and again there after it was written out.
"""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from interop.checkpoint import build, load_config
from model.config import LMConfig
from model.generate import generate
from interop import fill, hf, minimind, to_half_split, to_interleaved
from interop.vocabulary import QWEN2, write_tokenizer
from model.tokenizer import PATTERN, Tokenizer

SIZES = {"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": [1.0] * 3,
            "long_factor": [2.0, 3.0, 4.0]}
FAMILIES = {
    "Llama": transformers.LlamaConfig(**SIZES),
    "SmolLM2": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=1e5),
    "Llama 3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "Qwen2.5": transformers.Qwen2Config(**SIZES),
    "Qwen3": transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "Qwen3-MoE": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=12, norm_topk_prob=True),
    "Qwen2-MoE": transformers.Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=48),
    "Mistral": transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=80),
    "Granite": transformers.GraniteConfig(**SIZES, tie_word_embeddings=True, embedding_multiplier=12.0, attention_multiplier=0.2,
                                          residual_multiplier=0.22, logits_scaling=8.0),
    "Granite, untied": transformers.GraniteConfig(**SIZES, embedding_multiplier=3.0, logits_scaling=0.5),
    "Phi-3": transformers.Phi3Config(**SIZES, sliding_window=2047, pad_token_id=None),
    "Phi-4-mini": transformers.Phi3Config(**SIZES | {"max_position_embeddings": 384}, original_max_position_embeddings=96,
                                          pad_token_id=None, rope_parameters=LONGROPE),
    "SmolLM3": transformers.SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1], pad_token_id=None, rope_parameters=YARN),
    "linear": transformers.LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "YaRN": transformers.Qwen3Config(**SIZES, head_dim=12, rope_parameters=YARN),
    "YaRN, biases": transformers.Qwen2Config(**SIZES, rope_parameters=YARN | {"attention_factor": 0.8, "beta_fast": 4.0}),
    "GPT-2": transformers.GPT2Config(vocab_size=288, n_embd=32, n_layer=3, n_head=4, n_positions=96,
                                     bos_token_id=None, eos_token_id=None),
}
# Another family that computes the same; Qwen2.5 only with Qwen's own vocabulary.
WRITTEN_AS = dict.fromkeys(("Qwen2.5", "YaRN, biases", "Mistral", "Granite", "Granite, untied", "Phi-3"), transformers.LlamaForCausalLM)
TOKENS = torch.arange(160) * 7 % 288


def random_model(config):
    """Weights drawn wide, so that no part of the model is too small to be seen in the logits."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + ("norm" in name or "ln_" in name))
            if "shared_expert_gate" in name:
                weight.zero_()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory, byte_tokenizer):
    """{family: (transformers' model, its folder)}, each with a tokenizer."""
    made = {}
    for family, config in FAMILIES.items():
        model, folder = random_model(config), tmp_path_factory.mktemp("model")
        model.save_pretrained(folder, max_shard_size="60KB")
        write_tokenizer(byte_tokenizer(), folder)
        made[family] = model, folder
    return made


def read(path):
    config = load_config(path)
    model = build(config)
    fill(model, hf.read_pieces(path, config), path)
    return model.eval()


@torch.no_grad()
def logits(model):  # -> (160, V)
    if isinstance(model, transformers.PreTrainedModel):
        return model(TOKENS.view(2, 80)).logits.flatten(0, 1)
    return model(TOKENS, [80, 80]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_logits_and_the_text_that_transformers_gives(family, folders):
    theirs, folder = folders[family]
    ours = read(folder)
    assert ours.config.max_seq_len == (80 if family == "Mistral" else 96)       # its sliding window
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)

    prompt = TOKENS[:9]
    text = theirs.generate(prompt[None], max_new_tokens=8, do_sample=False)[0, 9:].tolist()
    assert generate(ours, [prompt.tolist()], 8) == [text]


@pytest.mark.parametrize("family", FAMILIES)
def test_written_out_and_read_by_transformers_it_is_the_same_model(family, folders, byte_tokenizer, tmp_path):
    theirs, folder = folders[family]
    hf.write(read(folder), byte_tokenizer(), tmp_path)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and type(again) is WRITTEN_AS.get(family, type(theirs))
    torch.testing.assert_close(logits(again.eval()), logits(theirs), rtol=0, atol=1e-4)
    assert torch.equal(logits(read(tmp_path)), logits(read(folder)))


@pytest.mark.parametrize("sizes", [{}, {"tie_embeddings": False}, {"attention_bias": True}, {"qk_norm": True},
                                   {"use_moe": True, "n_shared_experts": 2}, {"use_moe": True, "qk_norm": True, "n_shared_experts": 0},
                                   {"activation": "gelu"}, {"activation": "relu2", "use_moe": True, "n_shared_experts": 1}])
def test_a_model_of_ours_is_read_by_transformers_and_by_us(sizes, tiny, byte_tokenizer, tmp_path):
    ours, tokenizer = tiny(vocab_size=288, max_seq_len=96, **sizes), byte_tokenizer()
    hf.write(ours, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=0, atol=1e-4)
    assert torch.equal(logits(read(tmp_path)), logits(ours))

    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer("Hello, 你好!")["input_ids"] == tokenizer.encode("Hello, 你好!")
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_turn


@pytest.mark.parametrize("sizes, pattern, normalization, family", [
    ({"attention_bias": True}, PATTERN, None, "llama"), ({"attention_bias": True}, QWEN2, "NFC", "qwen2"),
    ({"qk_norm": True}, PATTERN, None, "qwen3"), ({"nope_layers": [0]}, PATTERN, None, "smollm3"), ({"rotary_dim": 2}, PATTERN, None, "phi3"),
], ids=["llama", "qwen2", "qwen3", "smollm3", "phi3"])
def test_a_model_keeps_the_ids_of_its_vocabulary(sizes, pattern, normalization, family, tiny, tmp_path):
    """AutoTokenizer splits the texts of every qwen2 by Qwen2's pattern, whatever the folder says."""
    shipped = Tokenizer.load()
    tokenizer = Tokenizer(pattern, shipped.special_tokens, shipped.ranks, chat=shipped.chat, normalization=normalization)
    ours = tiny(vocab_size=shipped.vocab_size, max_seq_len=96, **sizes)
    hf.write(ours, tokenizer, tmp_path)
    theirs, text = transformers.AutoTokenizer.from_pretrained(tmp_path), "what is 12 + 345?\n\n  小猫don't \u212b Don’t"
    assert theirs(text)["input_ids"] == tokenizer.encode(text)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert model.config.model_type == family
    torch.testing.assert_close(logits(model), logits(ours), rtol=0, atol=1e-4)
    assert load_config(tmp_path) == ours.config


def test_fp16_halves_the_files(tiny, byte_tokenizer, tmp_path):
    hf.write(tiny(vocab_size=288), byte_tokenizer(), tmp_path, torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float16}
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == 0o044        # others may read it too
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.float16


def test_rope_pairs_that_lie_half_a_head_apart_become_to_interleaved():
    rows = torch.arange(12)                             # two heads of 6: x0 x1 x2 | x3 x4 x5
    assert to_interleaved(rows, 6).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(to_half_split(to_interleaved(rows, 6), 6), rows)


# -- MiniMind --------------------------------------------------------------------------------------


MINIMIND = LMConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, hidden_dim=40, vocab_size=288, max_seq_len=32768,
                    rope_theta=1e6, norm_eps=1e-6, qk_norm=True)


def minimind_state(config):
    """A state dict as MiniMind's scripts save it: fp16, the tied head twice."""
    model = build(config)
    state = {name: tensor.half() for name, tensor in hf.their_tensors(model, "qwen3")}
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


@pytest.mark.parametrize("experts", [{}, {"use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1}])
def test_the_sizes_of_minimind_are_read_off_its_pth(experts, tmp_path, byte_tokenizer):
    config = LMConfig(**{**vars(MINIMIND), **experts})
    (tmp_path / "out").mkdir()
    (tmp_path / "model").mkdir()
    path, state = tmp_path / "out/full_sft_64.pth", minimind_state(config)
    torch.save(state, path)
    write_tokenizer(byte_tokenizer(), tmp_path / "model")           # as in MiniMind's repo
    assert load_config(path) == config
    assert minimind.read_tokenizer(path).encode("a") == byte_tokenizer().encode("a")
    model = build(config)
    fill(model, minimind.read_pieces(path, config), path)
    assert torch.equal(model.layers[1].attention.wv.weight.half(), state["model.layers.1.self_attn.v_proj.weight"])


def test_minimind_in_its_transformers_form_is_read_too(tmp_path):
    """Its own model_type and a pytorch_model.bin."""
    about = {"model_type": "minimind", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 40, "vocab_size": 288, "rms_norm_eps": 1e-6,
             "max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": None, "use_moe": False, "hidden_act": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    torch.save(minimind_state(MINIMIND), tmp_path / "pytorch_model.bin")
    assert load_config(tmp_path) == MINIMIND
    read(tmp_path)


def test_minimind_without_its_tokenizer_says_where_it_should_lie(tmp_path):
    torch.save(minimind_state(MINIMIND), tmp_path / "full_sft_64.pth")
    with pytest.raises(FileNotFoundError, match="copy its tokenizer.json beside the weights"):
        minimind.read_tokenizer(tmp_path / "full_sft_64.pth")


# -- what cannot be loaded -------------------------------------------------------------------------


@pytest.fixture
def llama(tiny, byte_tokenizer, tmp_path):
    """A folder to be damaged: (its path, change(tensors), config(**settings))."""
    hf.write(tiny(vocab_size=288), byte_tokenizer(), tmp_path)

    def change(edit):
        tensors = load_file(tmp_path / "model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / "model.safetensors")

    def config(**settings):
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return tmp_path, change, config


@pytest.mark.parametrize("edit, message", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing or repeated: layers\.1\.ffn\.w3\.weight"),
    (lambda t: t.update({"model.layers.1.mlp.bias": torch.zeros(3)}), r"model\.layers\.1\.mlp\.bias has no place"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight has the shape \(3,\), but .* \(16,\)"),
])
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named(edit, message, llama):
    folder, change, _ = llama
    change(edit)
    with pytest.raises(ValueError, match=message):
        read(folder)


@pytest.mark.parametrize("settings, message", [
    ({"model_type": "mamba"}, "model_type 'mamba' is none of"),
    ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported, only 'silu' or 'gelu' or 'relu2'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.1]}}, "rope scaling 'longrope' is not supported"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale = 0.7 is not supported"),
    ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantised; name the model that they were made from"),
    ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
])
def test_a_setting_that_would_change_the_result_is_refused(settings, message, llama):
    folder, _, config = llama
    config(**settings)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        load_config(folder)


def test_a_bias_of_the_output_projection_is_refused_unless_it_is_zero(llama):
    folder, change, config = llama
    config(attention_bias=True)
    change(lambda t: t.update({f"model.layers.{i}.self_attn.{name}.bias": torch.zeros(len(t[f"model.layers.{i}.self_attn.{name}.weight"]))
                               for i in range(2) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}))
    assert read(folder).config.attention_bias
    change(lambda t: t["model.layers.1.self_attn.o_proj.bias"].add_(1))
    with pytest.raises(ValueError, match="model.layers.1.self_attn.o_proj.bias is not zero"):
        read(folder)


def test_a_config_that_lacks_a_size_names_it(llama):
    folder, _, _ = llama
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="config.json lacks 'hidden_size'"):
        load_config(folder)


def test_a_file_cut_short_and_a_missing_shard_are_named(llama):
    folder, _, _ = llama
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is cut short"):
        read(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="the download of .* is not complete"):
        read(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="model-00001-of-00002.safetensors is missing"):
        read(folder)


@pytest.mark.parametrize("sizes", [{"use_moe": True, "qk_norm": True}, {"use_moe": True, "n_shared_experts": 0},
                                   {"qk_norm": True, "attention_bias": True}])
def test_what_no_family_computes_is_not_written(sizes, tiny, byte_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="Hugging Face has no architecture"):
        hf.write(tiny(**sizes), byte_tokenizer(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
