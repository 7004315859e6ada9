"""
GGUF 的规律：写出去再读回来，fp32 一位不差，fp16 与 q8_0 的误差有界；不认识的东西都按名字拒绝。
Laws of interop/gguf.py: in fp32 what was written comes back bit for bit, in fp16 and q8_0 within
bounds that can be worked out, and whatever is not known is refused by its name.
"""

import dataclasses

import gguf as package
import numpy as np
import pytest
import torch

from model.config import LMConfig
from model.gpt2 import GPT2
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from interop import fill, gguf, to_half_split

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "beta_slow": 1.0, "beta_fast": 32.0, "original_max_position_embeddings": 8192}
MOE = dict(use_moe=True, n_routed_experts=3, num_experts_per_tok=2)
KINDS = {
    "llama": dict(),
    "llama, wide heads": dict(head_dim=16),
    "llama, untied": dict(tie_embeddings=False),
    "llama, stretched": dict(rope_theta=5e5, rope_scaling=LLAMA3, head_dim=64),
    "llama, linear": dict(rope_scaling={"factor": 4.0}),
    "smollm3": dict(n_layers=5, nope_layers=[3]),
    "phi3": dict(rotary_dim=6),
    "llama, experts": dict(MOE, n_shared_experts=0),
    "qwen2": dict(attention_bias=True),
    "qwen3": dict(qk_norm=True, head_dim=16),
    "qwen3moe": dict(MOE, n_shared_experts=0, qk_norm=True),
    "bailingmoe": dict(MOE, n_shared_experts=2),
    "bailingmoe, not normed": dict(MOE, n_shared_experts=1, norm_topk_prob=False),
    "gpt2": dict(architecture="gpt2", n_kv_heads=4),
}
TOKENS, LENGTHS = torch.arange(20) * 13 % 272, [12, 8]


def make(**sizes):
    """A model with weights that are drawn wide, norms and biases too, so that none is too small to be seen."""
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=272, max_seq_len=24) | sizes
    config = LMConfig(**sizes)
    model = (GPT2 if config.architecture == "gpt2" else Transformer)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.dim() == 1))
    return model


def read(path):
    config = gguf.read_config(path)
    model = (GPT2 if config.architecture == "gpt2" else Transformer)(config).eval()
    fill(model, gguf.read_pieces(path, config), path)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS, LENGTHS).logits


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


@pytest.fixture
def written(file, byte_tokenizer, monkeypatch):
    """written(qk_norm=True, fields={...}, tensors={...}) -> a file in fp32 with some fields and tensors changed;
    a tensor of None is left out."""
    fields_of, their_tensors = gguf.fields_of, gguf.their_tensors

    def write(fields=None, tensors=None, architecture_of=None, **sizes):
        def changed(model, architecture):
            of = dict(their_tensors(model, architecture)) | (tensors or {})
            return ((name, tensor) for name, tensor in of.items() if tensor is not None)

        with monkeypatch.context() as patch:
            patch.setattr(gguf, "fields_of", lambda *given: fields_of(*given) | (fields or {}))
            if architecture_of:
                patch.setattr(gguf, "architecture_of", lambda config: architecture_of)
            patch.setattr(gguf, "their_tensors", changed)
            gguf.write(make(**sizes), byte_tokenizer(), file, "float32")
        return file

    return write


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_back_bit_for_bit_in_fp32(kind, file, byte_tokenizer):
    model = make(**KINDS[kind])
    gguf.write(model, byte_tokenizer(), file, "float32")
    back = read(file)
    assert gguf.Header(file).architecture == kind.split(",")[0]
    # llama.cpp wants a head of its own in the Bailing architectures: there a tied one comes back as a copy.
    assert back.config == dataclasses.replace(model.config, tie_embeddings=back.config.tie_embeddings)
    assert back.config.tie_embeddings == (model.config.tie_embeddings and "bailing" not in kind)
    for (name, ours), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(logits(model), logits(back))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bailingmoe", "gpt2"])
def test_fp16_keeps_eleven_bits_of_a_matrix_and_all_of_a_vector(kind, file, byte_tokenizer):
    model = make(**KINDS[kind])
    gguf.write(model, byte_tokenizer(), file, "float16")
    for (name, ours), theirs in zip(model.state_dict().items(), read(file).state_dict().values()):
        exact = ours.dim() == 1 or name.endswith(("router.weight", "pos_embeddings.weight"))
        assert torch.all((ours - theirs).abs() <= (0 if exact else ours.abs() * 2**-11 + 2**-25)), name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "bailingmoe", "gpt2"])
def test_q8_0_is_wrong_by_half_a_step_of_its_block_of_32(kind, file, byte_tokenizer):
    # A block's largest number is 127 steps. Half a step is lost in rounding to whole ones, and at
    # the 127th another 127 times the error of the step itself, which is kept in fp16: 127 / 2^11 = 0.06 steps.
    model = make(**KINDS[kind])
    gguf.write(model, byte_tokenizer(), file, "q8_0")
    for (name, ours), theirs in zip(model.state_dict().items(), read(file).state_dict().values()):
        exact = ours.dim() == 1 or name.endswith(("router.weight", "pos_embeddings.weight"))
        step = 0 if exact else ours.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
        off = (ours - theirs).abs() if exact else (ours - theirs).abs().unflatten(-1, (-1, 32))
        assert torch.all(off <= 0.57 * step), name


def test_q4_0_is_wrong_by_a_step_at_most_and_keeps_embedding_and_head_in_8_bits(file, byte_tokenizer):
    # -8 .. 7 steps, so the largest number is 8 steps; of the other sign 7 are left, which is a step off.
    model = make(**KINDS["llama"])
    gguf.write(model, byte_tokenizer(), file, "q4_0")
    kinds = {name: stored.kind.name for name, stored in gguf.Header(file).tensors.items()}
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_q.weight"] == "Q4_0"
    for (name, ours), theirs in zip(model.state_dict().items(), read(file).state_dict().values()):
        step = 0 if ours.dim() == 1 else ours.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) / 8
        off = (ours - theirs).abs() if ours.dim() == 1 else (ours - theirs).abs().unflatten(-1, (-1, 32))
        assert torch.all(off <= 1.01 * step), name


def test_a_row_that_blocks_of_32_do_not_fill_is_written_in_fp16(file, byte_tokenizer):
    gguf.write(make(hidden_dim=40), byte_tokenizer(), file, "q8_0")
    kinds = {name: stored.kind.name for name, stored in gguf.Header(file).tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16"          # (32, 40)
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"           # (40, 32)


def test_a_weight_past_the_end_of_fp16_is_refused_rather_than_made_infinite(file, byte_tokenizer):
    model = make()
    with torch.no_grad():
        model.layers[1].ffn.w2.weight[3, 4] = -70000
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight reaches 7e\+04"):
        gguf.write(model, byte_tokenizer(), file, "float16")


def test_the_package_reads_the_same_from_our_file(written):
    file = written(qk_norm=True)
    reader, header = package.GGUFReader(file), gguf.Header(file)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert theirs.keys() == header.fields.keys()
    for name, value in theirs.items():
        assert header.fields[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert [(t.name, tuple(t.shape[::-1]), t.data_offset) for t in reader.tensors] == [
        (name, stored.shape, stored.begin) for name, stored in header.tensors.items()]


def test_llama_keeps_our_order_of_q_and_qwen_has_hugging_faces(written):
    for kind in ("llama", "qwen3"):
        weight = make(**KINDS[kind]).layers[0].attention.wq.weight.detach()
        expected = weight if kind == "llama" else to_half_split(weight, 16)
        data = {t.name: t.data for t in package.GGUFReader(written(**KINDS[kind])).tensors}["blk.0.attn_q.weight"]
        assert np.array_equal(data, expected.numpy())


def test_the_factors_of_granite_become_a_part_of_the_weights(written):
    model = make()
    scales = {"embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0, "attention.scale": 0.125}
    file = written(fields={f"granite.{name}": value for name, value in scales.items()}, architecture_of="granite")
    factors = {"tok_embeddings": 12, "norm": 1 / (8 * 12), "wo": 0.25, "w2": 0.25, "wq": 0.125 * 8 ** 0.5}
    for (name, ours), theirs in zip(model.state_dict().items(), read(file).state_dict().values(), strict=True):
        torch.testing.assert_close(theirs, ours * factors.get("tok_embeddings" if name == "output.weight" else name.split(".")[-2], 1))


def test_a_phi_with_two_sets_of_frequencies_ends_where_the_second_begins(written):
    """Its temperature is a factor of the part of q and of k that RoPE rotates, here the first 6 of 8."""
    fields = {"phi3.rope.scaling.original_context_length": 12, "phi3.rope.scaling.attn_factor": 2.0}
    factors = {"rope_factors_short.weight": torch.ones(3), "rope_factors_long.weight": torch.full((3,), 3.0)}
    file = written(fields=fields, tensors=factors, rotary_dim=6)
    assert gguf.read_config(file).max_seq_len == 12
    ours, theirs = (model.layers[1].attention.wq.weight.view(4, 8, 32) for model in (make(rotary_dim=6), read(file)))
    assert torch.equal(theirs[:, :6], 4 * ours[:, :6]) and torch.equal(theirs[:, 6:], ours[:, 6:])
    with pytest.raises(ValueError, match="rope_factors_short.weight is not 1 everywhere"):
        gguf.read_config(written(fields=fields, rotary_dim=6, tensors=factors | {"rope_factors_short.weight": torch.full((3,), 3.0)}))


def test_a_sliding_window_cuts_the_context(written):
    assert gguf.read_config(written(fields={"llama.attention.sliding_window": 20})).max_seq_len == 20


# -- Llama 3's frequencies -------------------------------------------------------------------------


def test_fast_frequencies_stay_and_slow_ones_are_divided_by_the_factor():
    divisors = gguf.rope_divisors(5e5, 64, LLAMA3)
    assert divisors[0] == 1             # turns 8192 / 2 pi times in the original length: more than 4
    assert divisors[-1] == 8            # 0.002 times: less than 1
    assert torch.all(divisors.diff() >= 0)


def test_divisors_that_llama_3_does_not_make_are_refused(written):
    divisors = gguf.rope_divisors(5e5, 64, LLAMA3)
    divisors[10] = 1.5
    file = written(tensors={"rope_freqs.weight": divisors}, **KINDS["llama, stretched"])
    with pytest.raises(ValueError, match=r"model\.gguf: rope_freqs\.weight is not the result"):
        gguf.read_config(file)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("fields, named", [
    ({"general.architecture": "mamba"}, "architecture 'mamba' is none of .*'llama', 'qwen2'"),
    ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
    ({"llama.attention.scale": 0.5}, "llama.attention.scale = 0.5"),
    ({"llama.attention.head_count_kv": 3}, "n_heads=4 is no multiple of n_kv_heads=3"),
    ({"split.count": 3}, "one of 3 parts"),
])
def test_a_feature_that_is_not_known_is_named(written, fields, named):
    with pytest.raises(ValueError, match=named) as refused:
        gguf.read_config(written(fields=fields))
    assert "model.gguf" in str(refused.value)


@pytest.mark.parametrize("tensors, named", [
    ({"blk.1.ffn_up.weight": None}, r"missing or repeated: layers\.1\.ffn\.w3\.weight"),
    ({"blk.1.ffn_up.bias": torch.zeros(64)}, r"tensor blk\.1\.ffn_up\.bias has no place"),
    ({"blk.0.attn_sinks": torch.zeros(4)}, r"tensor blk\.0\.attn_sinks has no place"),
    ({"blk.0.ffn_up.weight": torch.zeros(63, 32)}, r"tensor blk\.0\.ffn_up\.weight has the shape \(63, 32\)"),
    ({"blk.0.attn_q.weight": torch.zeros(30, 32)}, r"tensor blk\.0\.attn_q\.weight has the shape \(30, 32\)"),
    ({"blk.0.attn_v.weight": torch.zeros(16, 33)}, r"tensor blk\.0\.attn_v\.weight has the shape \(16, 33\)"),
])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_tensor_too_many_too_few_or_of_another_shape_is_named(written, tensors, named, kind):
    file = written(tensors=tensors, qk_norm=kind == "qwen3")
    with pytest.raises(ValueError, match=named) as refused:
        read(file)
    assert "model.gguf" in str(refused.value)


@pytest.mark.parametrize("kind, tensors", [
    ("qwen3moe", {"blk.0.ffn_up_exps.weight": torch.zeros(2, 64, 32)}),
    ("gpt2", {"blk.0.attn_qkv.weight": torch.zeros(80, 32)}),
])
def test_a_stack_of_another_size_is_named(written, kind, tensors):
    with pytest.raises(ValueError, match=f"tensor {next(iter(tensors))} has the shape"):
        read(written(tensors=tensors, **KINDS[kind]))


def test_a_file_that_is_cut_short_is_named_wherever_it_ends(written):
    file = written()
    whole = file.read_bytes()
    begin = gguf.Header(file).tensors["token_embd.weight"].begin
    for size in (0, 3, 10, 24, 100, begin // 2, begin - 40, begin + 1, len(whole) - 100):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.gguf is cut short, or no readable GGUF file"):
            gguf.read_config(file)


@pytest.mark.parametrize("sizes, named", [
    (dict(qk_norm=True, attention_bias=True), "llama.cpp has no architecture with qk_norm.attention_bias"),
    (dict(MOE, attention_bias=True), "no architecture with use_moe.shared.attention_bias"),
    (dict(MOE, qk_norm=True), "no architecture with use_moe.shared.qk_norm"),
    (dict(MOE, n_shared_experts=0, norm_topk_prob=False), "llama needs norm_topk_prob=True"),
    (dict(attention_bias=True, head_dim=16), r"qwen2 needs n_heads \* head_dim = dim"),
    (dict(qk_norm=True, rope_scaling=LLAMA3), "qwen3 has no rope_scaling"),
    (dict(activation="relu2"), "llama.cpp has no such architecture with the activation relu2, only with silu"),
    (dict(rope_scaling=YARN), "llama has no rope_scaling"),
    (dict(nope_layers=[0]), r"smollm3 has no RoPE in every fourth layer, not in layers \[0\]"),
])
def test_what_no_architecture_holds_is_refused_before_a_file_is_made(sizes, named, file, byte_tokenizer):
    with pytest.raises(ValueError, match=named):
        gguf.write(make(**sizes), byte_tokenizer(), file)
    assert not list(file.parent.iterdir())


def test_a_write_that_is_interrupted_leaves_the_file_as_it_was(written, byte_tokenizer, monkeypatch):
    file = written()
    before = file.read_bytes()
    calls = iter(range(100))

    def interrupted(numbers, kind):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return package.quantize(numbers, kind)

    monkeypatch.setattr(gguf, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gguf.write(make(), byte_tokenizer(), file)
    assert file.read_bytes() == before


# -- vocabulary ------------------------------------------------------------------------------------


def test_the_vocabulary_comes_back_as_it_was(file):
    tokenizer = Tokenizer.load()
    gguf.write(make(vocab_size=tokenizer.vocab_size + 8), tokenizer, file)      # rows to spare, as in Qwen
    back = gguf.read_tokenizer(file)
    assert back.sha256 == tokenizer.sha256
    assert back.path == file


def test_llama_cpp_is_told_the_name_of_a_pattern_that_it_has(written):
    # Ours has none there; "superbpe" cuts out numbers and nothing else, so it cuts nowhere that ours does not.
    fields = gguf.Header(written()).fields
    assert fields["tokenizer.ggml.pre"] == "superbpe"
    assert fields["minidistill.tokenizer.pre"] == "minidistill"


def test_a_vocabulary_larger_than_the_model_is_refused(file):
    with pytest.raises(ValueError, match="1024 ids, but the model has rows for 272"):
        gguf.write(make(), Tokenizer.load(), file)


@pytest.mark.parametrize("fields, named", [
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; .*SentencePiece"),
    ({"minidistill.tokenizer.pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'"),
])
def test_a_vocabulary_of_another_kind_is_named(written, monkeypatch, fields, named):
    to_gguf = gguf.to_gguf
    monkeypatch.setattr(gguf, "to_gguf", lambda *given: to_gguf(*given) | fields)
    with pytest.raises(ValueError, match=named) as refused:
        gguf.read_tokenizer(written())
    assert "model.gguf" in str(refused.value)
