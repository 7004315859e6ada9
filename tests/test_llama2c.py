"""
llama2.c 的规律：写下的权重原样读回；分词与 run.c 的做法处处相同；不能做到精确的，拒绝并说明原因。
Laws of interop/llama2c.py: weights come back equal, texts get the ids that run.c gives them, and
what cannot be exact is refused with its reason.
"""

import random
import struct

import pytest
import torch

from model.config import LMConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from interop import fill
from interop.llama2c import read_config, read_pieces, read_tokenizer

BASE = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{value:02X}>" for value in range(256))]
UNIONS = [" t", "he", " the", "in", "ing", " th", " thing", "th", "hi",                     # from 259
          "aa", "aaa", " s", "  ", "st", " st", "\n\n"]
CHARACTERS = [*" theingas\n", "é", "汉", "”"]                                               # from 275
TOKENS = BASE + UNIONS + CHARACTERS

def write_weights(path, model):
    """Tensor by tensor as export.py of llama2.c does, and nan for RoPE's tables, which no reader needs."""
    c = model.config
    vocab_size = c.vocab_size if c.tie_embeddings else -c.vocab_size
    parts = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
             "ffn_norm", "ffn.w1", "ffn.w2", "ffn.w3")
    tensors = [model.tok_embeddings.weight]
    tensors += [block.get_submodule(part).weight for part in parts for block in model.layers]
    tensors += [model.norm.weight, torch.full((2, c.max_seq_len, c.head_dim // 2), torch.nan)]
    tensors += [] if c.tie_embeddings else [model.output.weight]
    header = struct.pack("<7i", c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, vocab_size, c.max_seq_len)
    path.write_bytes(header + b"".join(tensor.detach().numpy().tobytes() for tensor in tensors))


def write_vocabulary(path, tokens, scores=None):
    scores = scores or [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    data = struct.pack("<i", max(map(len, tokens)))
    for token, score in zip(tokens, scores):
        data += struct.pack("<fi", score, len(token.encode())) + token.encode()
    path.write_bytes(data)


def as_run_c(text, tokens=TOKENS):
    """The ids of run.c's encode: a space, the characters, then again and again the neighbours of the best score."""
    ids = []
    for character in " " + text if text else "":
        ids += [tokens.index(character)] if character in tokens else [3 + byte for byte in character.encode()]
    while True:
        best = None
        for i, (left, right) in enumerate(zip(ids, ids[1:])):
            union = tokens[left] + tokens[right]
            if union in tokens and (best is None or tokens.index(union) < best[0]):
                best = tokens.index(union), i
        if best is None:
            return ids
        ids[best[1]:best[1] + 2] = [best[0]]


@pytest.fixture
def weights(tiny, tmp_path):
    path = tmp_path / "stories.bin"
    write_weights(path, tiny(vocab_size=len(TOKENS), n_layers=1))
    return path


@pytest.fixture
def tokenizer(weights):
    write_vocabulary(weights.with_name(f"tok{len(TOKENS)}.bin"), TOKENS)
    return read_tokenizer(weights)


# -- weights ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [True, False])
def test_weights_written_by_llama2c_come_back_equal(tiny, tmp_path, tied):
    model, path = tiny(tie_embeddings=tied), tmp_path / "stories.bin"
    write_weights(path, model)
    config = read_config(path)
    assert config == LMConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=12, max_seq_len=24,
                              tie_embeddings=tied, rope_theta=1e4, norm_eps=1e-5)
    loaded = Transformer(config)
    fill(loaded, read_pieces(path, config), path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_piece_is_one_layer_of_one_tensor_and_says_where_it_is_from(tiny, tmp_path):
    path = tmp_path / "stories.bin"
    write_weights(path, tiny())
    sources = {piece.name: piece.source for piece in read_pieces(path, read_config(path))}
    assert len(sources) == 2 + 2 * 9
    assert sources["layers.1.attention.wk.weight"] == "wk[1]"


def test_a_file_that_is_a_number_too_short_is_named_with_both_sizes(weights):
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"stories.bin: {size - 4:,} bytes, .* has {size:,}"):
        read_config(weights)


@pytest.mark.parametrize("content, message", [
    (b"ab", "not enough values to unpack"),
    (struct.pack("<7i", 0x616B3432, 1, 16, 2, 4, 2, 12), "version 1 of llama2.c's format; only version 0"),
    (struct.pack("<7i", 16, 24, 2, 4, 2, 0, 24), "vocab_size=0 must be an integer of 1 to 16,777,216"),
    (struct.pack("<7i", 16, 24, 2, 4, 3, 12, 24), "n_heads=4 is no multiple of n_kv_heads=3"),
], ids=["short", "version 1", "zero", "odd sizes"])
def test_a_file_that_is_no_such_checkpoint_is_refused_by_its_header(tmp_path, content, message):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.bin: {message}"):
        read_config(tmp_path / "model.bin")


# -- vocabulary ------------------------------------------------------------------------------------

def test_a_text_begins_with_a_space_and_the_best_scores_are_joined_first(tokenizer):
    def parts(text):
        return [tokenizer.decode([i]) for i in tokenizer.encode(text)]

    assert tokenizer.encode("the") == [261] and parts("the") == [" the"]
    assert parts("thing") == [" thing"]                         # " t", "in", "ing", " th", " thing"
    assert parts("thin") == [" th", "in"]                       # "in" is better than "hi"
    assert parts("nthe") == [" ", "n", "t", "he"]               # "he" is better than "th", and " the" has a space
    assert tokenizer.encode("") == []


def test_a_character_without_a_token_becomes_its_bytes(tokenizer):
    assert tokenizer.encode("é") == [275, 285]
    assert tokenizer.encode("ü") == [275, 3 + 0xC3, 3 + 0xBC]
    assert tokenizer.decode(tokenizer.encode("üé汉字😀\n")) == " üé汉字😀\n"


def test_texts_get_the_ids_that_run_c_gives_them(tokenizer):
    generator = random.Random(0)
    parts = [*UNIONS, *CHARACTERS, *"ThxY.,0~\t\x00\x7f", "ü", "字", "😀", "“", "<s>", "<0x41>", "     ", "aaaaaaaa"]
    for _ in range(1000):
        text = "".join(generator.choices(parts, k=generator.randrange(12)))
        assert tokenizer.encode(text) == as_run_c(text), repr(text)


def test_a_token_that_reaches_past_a_space_is_found_too(weights):
    tokens = [*BASE, "t ", "t t", "s ", "s t", "  ", *" tsABCDEFGHIJKLMNOPQRSTUVWXYZ"][:len(TOKENS)]
    write_vocabulary(weights.with_name("tokenizer.bin"), tokens)
    tokenizer = read_tokenizer(weights)
    assert tokenizer.encode("t t") == [264, 260]                # " ", "t t"
    for text in ("st t", "s t t", "t t t t  s", "  t   t\n"):
        assert tokenizer.encode(text) == as_run_c(text, tokens)


def test_stories_are_opened_and_separated_by_s(tokenizer):
    assert (tokenizer.bos, tokenizer.end_of_text, tokenizer.end_of_turn) == (1, 1, 1)
    assert tokenizer.vocab_size == len(TOKENS)
    assert 1 not in tokenizer.encode("<s>")


def test_the_second_id_of_a_character_is_no_hole(tokenizer):
    assert tokenizer.decode([3 + ord("t")]) == "<0x74>"
    assert 3 + ord("t") not in tokenizer.encode("t<0x74>")
    assert tokenizer.decode(range(len(TOKENS))).startswith("<unk><s></s>\x00\x01")


def test_the_vocabulary_can_be_kept_as_one_of_ours(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    kept = Tokenizer.load(tmp_path / "tokenizer.json")
    assert kept.sha256 == tokenizer.sha256
    assert kept.encode("the thing") == tokenizer.encode("the thing")


def test_a_missing_vocabulary_is_named_at_both_of_its_places(weights):
    with pytest.raises(FileNotFoundError, match=rf"tok{len(TOKENS)}.bin nor .*tokenizer.bin"):
        read_tokenizer(weights)


def test_a_vocabulary_of_another_size_belongs_to_other_weights(weights):
    write_vocabulary(weights.with_name("tokenizer.bin"), TOKENS[:-1])
    message = f"tokenizer.bin: {len(TOKENS) - 1} tokens, but .*stories.bin has {len(TOKENS)}"
    with pytest.raises(ValueError, match=message):
        read_tokenizer(weights)


def test_a_vocabulary_that_breaks_off_is_named_with_the_place(weights):
    path = weights.with_name("tokenizer.bin")
    write_vocabulary(path, TOKENS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"tokenizer.bin: token {len(TOKENS) - 1} is cut short"):
        read_tokenizer(weights)


@pytest.mark.parametrize("i, token, message", [
    (3, "A", "tokens 3 .. 258 are not the bytes"),
    (268, "na", "token 269, 'aaa', cannot be exact"),            # its characters are not joined: "aa" is missing
    (262, " t", "token 260, 'he', cannot be exact"),             # " t" twice: its later score counts
    (262, "éé", "token 262, 'éé', cannot be exact"),             # tiktoken would join the bytes
    (262, "xy", "token 262, 'xy', cannot be exact"),             # x and y are no tokens
])
def test_what_bytes_cannot_do_exactly_is_refused_with_the_token(weights, i, token, message):
    write_vocabulary(weights.with_name("tokenizer.bin"), [*TOKENS[:i], token, *TOKENS[i + 1:]])
    with pytest.raises(ValueError, match=f"tokenizer.bin: {message}"):
        read_tokenizer(weights)


def test_scores_that_do_not_fall_with_the_ids_are_refused(weights):
    scores = [0.0] * 259 + [-float(i) for i in range(len(TOKENS) - 259)]
    scores[261] = -1.0
    write_vocabulary(weights.with_name("tokenizer.bin"), TOKENS, scores)
    with pytest.raises(ValueError, match="token 261, ' the', cannot be exact"):
        read_tokenizer(weights)
