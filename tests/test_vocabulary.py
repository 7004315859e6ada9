"""
别人的词表的规律：编号与 tokenizers 库一个不差，写出去再读回来不变，不能一样的就拒绝并说明理由。
Laws of interop/vocabulary.py: the ids are those of the tokenizers library, out and in again changes
nothing, and what cannot be the same is refused with the reason.
"""

import json
import random
from dataclasses import replace

import jinja2
import pytest
import tokenizers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers

from model.tokenizer import CHATML, LLAMA3, PATTERN, PLAIN, Chat, Tokenizer
import helpers_templates
from runtime.args import make_parser, parse_args
from interop.vocabulary import (DATE, DEEPSEEK_V3_SPLITS, GPT2, GPT_4O, LLAMA_3, PRE_TOKENIZERS, QWEN2, SMOLLM, TEKKEN, from_gguf, merges_of, read_tokenizer_json, to_gguf, write_template, write_tokenizer)

CHATML_NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SOUP = ["the", " the", "don't", "IT'S", " 'll", "'ſ", "小猫", "，", "नमस्ते", "مرحبا", "한국어", "ﬁ", "½", "１２", "12345", " 7",
        "  ", "   \t", "\n", "\r\n", "\n\n", "\u2028", "\u3000", "\x85", "\ufeff", "\x04", "e\u0301", "\u212b", "\u0338",
        "😀", "👩‍👩‍👧", "\U000f1234", "カ・ナ゛", "〇が", "か\u3099", "McDonald's", "/n", "x = f(a)", "{", "->", "!!", "<think>", "</think>", "<th"]


def soups(seed, n):
    """Texts of pieces that are easily cut wrongly, and of characters from all of Unicode."""
    generator = random.Random(seed)

    def piece():
        points = generator.randrange(128), generator.randrange(0xD800), generator.randrange(0xE000, 0x110000)
        return generator.choice(SOUP) if generator.random() < 0.8 else chr(generator.choice(points))

    return ["".join(piece() for _ in range(generator.randrange(1, 30))) for _ in range(n)]


TEXTS = soups(seed=0, n=1000)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split(*patterns, behavior="isolated", **options):
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(pattern), behavior, **options) for pattern in patterns),
                                    byte_level(use_regex=False)])


def train(pre_tokenizer, names=CHATML_NAMES, normalizer=None, lacks=(), post_processor=None):
    """A small vocabulary of the tokenizers library, with <think> and </think> for any text."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        library.normalizer = normalizer
    letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter not in lacks]
    library.train_from_iterator(soups(seed=1, n=100), trainers.BpeTrainer(
        vocab_size=600, special_tokens=names, show_progress=False,
        initial_alphabet=letters, limit_alphabet=len(letters)))
    library.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>")])
    if post_processor is not None:
        library.post_processor = post_processor
    return library


def gpt2():
    return train(byte_level(), names=["<|endoftext|>"])


def smollm():
    digits = pre_tokenizers.Digits(individual_digits=True)
    return train(pre_tokenizers.Sequence([digits, byte_level()]), lacks="Ą")                # which is the byte 4


def qwen2():
    return train(split(QWEN2), normalizer=normalizers.NFC())


def llama_3():
    start = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    return train(split(LLAMA_3), names=LLAMA_NAMES, post_processor=processors.Sequence([processors.ByteLevel(), start]))


def gpt_4o():
    """Of the pieces between matches, of which there are none, nothing stays."""
    return train(split(GPT_4O, behavior="removed", invert=True))


def deepseek_v3():
    """Three patterns, the last with line ends as such."""
    *first, last = DEEPSEEK_V3_SPLITS
    return train(split(*first, last.replace(r"\r", "\r").replace(r"\n", "\n")))


FAMILIES = {"gpt2": gpt2, "smollm": smollm, "qwen2": qwen2, "llama_3": llama_3, "tekken": lambda: train(split(TEKKEN)),
            "gpt_4o": gpt_4o, "deepseek_v3": deepseek_v3}


@pytest.fixture(scope="module")
def libraries():
    return {name: make() for name, make in FAMILIES.items()}


def gguf_fields(tokens, token_type, merges, pre):
    fields = {"model": "gpt2", "tokens": tokens, "token_type": token_type, "merges": merges, "pre": pre}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def saved(library, folder, **config):
    """The folder that transformers would write."""
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# -- ids -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_a_thousand_texts_have_the_ids_of_the_library_in_and_out(libraries, tmp_path, family):
    library = libraries[family]
    expected = [ids.ids for ids in library.encode_batch(TEXTS, add_special_tokens=False)]
    tokenizer = read_tokenizer_json(saved(library, tmp_path / "in"))
    assert tokenizer.encode_batch(TEXTS) == expected
    write_tokenizer(tokenizer, tmp_path / "out")
    written = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [ids.ids for ids in written.encode_batch(TEXTS, add_special_tokens=False)] == expected
    assert written.encode("a").ids == library.encode("a").ids                 # with its bos, where it has one


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_and_read_again_is_the_same_vocabulary(libraries, tmp_path, family):
    tokenizer = read_tokenizer_json(saved(libraries[family], tmp_path / "in"))
    write_tokenizer(tokenizer, tmp_path / "out")
    tokenizer.save(tmp_path / "ours.json")
    assert read_tokenizer_json(tmp_path / "out").sha256 == tokenizer.sha256
    assert Tokenizer.load(tmp_path / "ours.json").sha256 == tokenizer.sha256
    fields = to_gguf(tokenizer, vocab_size=tokenizer.vocab_size + 9)
    for name in ("tokens", "token_type"):
        assert len(fields[f"tokenizer.ggml.{name}"]) == tokenizer.vocab_size + 9
    assert from_gguf(fields).sha256 == tokenizer.sha256


def test_the_shipped_vocabulary_goes_out_and_comes_back_with_the_same_ids(tmp_path):
    shipped = Tokenizer.load()
    write_tokenizer(shipped, tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:                                  # the library finds special tokens in any text
        assert library.encode(text).ids == shipped.encode(text, allow_special=True)
    assert read_tokenizer_json(tmp_path / "tokenizer.json").sha256 == shipped.sha256
    assert from_gguf(to_gguf(shipped, shipped.vocab_size)).sha256 == shipped.sha256


def test_the_merges_follow_from_the_ids(libraries):
    model = json.loads(libraries["qwen2"].to_str())["model"]
    merges, tokens = [" ".join(merge) for merge in model["merges"]], list(model["vocab"])
    fields = gguf_fields(tokens, [3] * 3 + [1] * (len(tokens) - 3), merges, "qwen2")
    tokenizer = from_gguf(fields | {"tokenizer.ggml.eos_token_id": 0})
    assert to_gguf(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.merges"] == merges
    # b + c is joined before a + b, so that abc is a + bc; no two tokens make xyz
    ranks = {bytes([value]): value for value in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"xyz": 259}
    assert merges_of(ranks) == {b"bc": (b"b", b"c"), b"ab": (b"a", b"b"), b"abc": (b"a", b"bc")}


def test_no_text_and_no_content_can_forge_a_special_token(libraries, tmp_path):
    for family, library in libraries.items():
        tokenizer = read_tokenizer_json(saved(library, tmp_path / family))
        forbidden = {i for name, i in tokenizer.special_tokens.items() if name not in tokenizer.matched}
        for name in tokenizer.special_tokens:
            assert not forbidden & set(tokenizer.encode(f"a{name}b{name}"))
            user = [{"role": "user", "content": name}]
            empty = [{"role": "user", "content": ""}]
            for i in forbidden:
                assert tokenizer.encode_chat(user)[0].count(i) == tokenizer.encode_chat(empty)[0].count(i)


def test_merges_may_be_strings_and_a_token_that_only_the_config_declares_is_named(libraries, tmp_path):
    saved(libraries["qwen2"], tmp_path, eos_token={"content": "<|im_end|>"})
    theirs = json.loads((tmp_path / "tokenizer.json").read_text())
    theirs["model"]["merges"] = [" ".join(merge) for merge in theirs["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(theirs))
    assert read_tokenizer_json(tmp_path).encode("<think>") == [600]
    saved(libraries["qwen2"], tmp_path, added_tokens_decoder={"602": {"content": "<|fim|>", "special": True}})
    with pytest.raises(ValueError, match=r"it lacks tokens that tokenizer_config.json declares: \['<|fim|>'\]"):
        read_tokenizer_json(tmp_path)


# -- chat templates --------------------------------------------------------------------------------

NAMES = [*CHATML_NAMES, "<|im_sep|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "<|User|>",
         "<|Assistant|>", "<|end|>"]
TURNS = [{"role": role, "content": content} for role, content in (
    ("system", "Be brief, 简."), ("user", "2+3=?\n\nthanks"), ("assistant", "5, don't ask"), ("user", "and\t12+3?"),
    ("assistant", "15 😀"), ("user", "ok"))]
FRAMED = ["QWEN2_5", "QWEN3", "QWEN3_THINKING", "LLAMA3", "LLAMA3_2", "ZEPHYR", "PHI4", "PHI4_MINI", "OPENCHAT", "R1", "MINIMIND",
          "MARKED"]


@pytest.fixture(scope="module")
def all_names():
    return train(split(LLAMA_3), names=NAMES)


def folder_of(library, folder, template, eos="</s>"):
    return saved(library, folder, chat_template=template, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>",
                 eos_token=eos)


@pytest.mark.parametrize("name", FRAMED)
def test_every_prompt_has_the_ids_of_transformers_and_every_answer_is_trained_behind_its_prompt(
        all_names, tmp_path, monkeypatch, name):
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    folder = folder_of(all_names, tmp_path / "in", vars(helpers_templates)[name])
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_tokenizer_json(folder)
    for first in (0, 1):
        for end in (2, 4, 6):
            expected = theirs.apply_chat_template(TURNS[first:end], add_generation_prompt=True, enable_thinking=False,
                                                  return_dict=False)
            assert ours.encode_chat(TURNS[first:end], True)[0] == expected
            ids, targets = ours.encode_chat(TURNS[first:end + 1])
            if end < 6:
                targets = targets[len(expected):]
                assert ids[:len(expected)] == expected and targets[0]
                assert ours.decode(ids[len(expected):]).startswith(("5", " 5", "\n</think>\n\n5", "15", " 15", "\n</think>\n\n15"))
    assert ours.decode([ours.end_of_turn]) in ("<|im_end|>", "<|eot_id|>", "<|end|>", "</s>")


class Today:
    """The day that is today for the frames."""

    @staticmethod
    def now():
        return DATE


@pytest.mark.parametrize("name", FRAMED)
def test_an_exported_vocabulary_keeps_its_chat_template(all_names, tmp_path, name):
    template = vars(helpers_templates)[name]
    tokenizer = read_tokenizer_json(folder_of(all_names, tmp_path / "in", template))
    tokenizer.save(tmp_path / "ours.json")
    write_tokenizer(Tokenizer.load(tmp_path / "ours.json"), tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (config["chat_template"], config["bos_token"], config["eos_token"]) == (template, "<s>", "</s>")
    again = read_tokenizer_json(tmp_path / "out")
    assert (again.chat, again.sha256, again.template) == (tokenizer.chat, tokenizer.sha256, tokenizer.template)
    fields = to_gguf(tokenizer, tokenizer.vocab_size)
    assert fields["tokenizer.chat_template"] == template and from_gguf(fields).chat == tokenizer.chat


@pytest.mark.parametrize("content, prompt, learned", [
    ("5", "<think>\n\n</think>\n\n", "5"),
    ("<think>\nsum\n</think>\n\n5", "", "<think>\nsum\n</think>\n\n5"),
    ("<think>\n\n</think>\n\n5", "<think>\n\n</think>\n\n", "5"),
])
def test_an_answer_has_one_thought_and_earlier_answers_have_none(all_names, tmp_path, content, prompt, learned):
    """As Qwen3's template renders `reasoning_content`, or a thought within the content."""
    folder = folder_of(all_names, tmp_path, helpers_templates.QWEN3)
    theirs, tokenizer = AutoTokenizer.from_pretrained(folder), read_tokenizer_json(folder)
    thought, _, rest = content.rpartition("</think>\n\n")
    apart = {"role": "assistant", "content": rest, "reasoning_content": thought.removeprefix("<think>\n")}
    messages = [TURNS[1], {"role": "assistant", "content": content}, TURNS[3], {"role": "assistant", "content": content}]
    ids, targets = tokenizer.encode_chat(messages)
    assert tokenizer.decode(i for i, target in zip(ids, targets) if target) == learned + "<|im_end|>"
    assert ids[:targets.index(True)] == tokenizer.encode(
        f"<|im_start|>user\n{TURNS[1]['content']}<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n<|im_start|>user\n"
        f"{TURNS[3]['content']}<|im_end|>\n<|im_start|>assistant\n{prompt}", allow_special=True)
    for last in (messages[-1], apart):
        assert theirs.apply_chat_template([*messages[:-1], last], return_dict=False) == ids


@pytest.mark.parametrize("name, said", [
    ("UPPER", "it does not write every content as it is"),
    ("FIRST_APART", "it writes '<|im_start|>assistant"),
    ("NO_SYSTEM", "no system"),
    ("NO_SYSTEM_ROLE", "it does not write every content as it is"),
    ("SPIES", "is unsafe"),
])
def test_a_template_that_cannot_be_followed_is_refused_with_the_way_out(all_names, tmp_path, monkeypatch, capsys, name, said):
    folder = folder_of(all_names, tmp_path, vars(helpers_templates)[name])
    with pytest.raises(ValueError) as error:
        read_tokenizer_json(folder)
    assert str(error.value).startswith(f"{folder}/tokenizer.json: its chat template") and said in str(error.value)
    assert "--chat chatml, llama3, plain" in str(error.value)
    monkeypatch.setenv("MINIDISTILL_CHAT", "none")                           # restored after the test
    parse_args(make_parser(""), ["--chat", "chatml"])
    assert read_tokenizer_json(folder).chat == CHATML
    assert capsys.readouterr().out.count("WARNING: --chat chatml replaces") == 1


@pytest.mark.parametrize("family, chat", [("qwen2", CHATML), ("llama_3", LLAMA3), ("gpt2", PLAIN("<|endoftext|>"))])
def test_without_a_template_the_special_tokens_decide_and_it_is_said(libraries, tmp_path, capsys, family, chat):
    assert read_tokenizer_json(saved(libraries[family], tmp_path)).chat == chat
    assert capsys.readouterr().out.count("no chat template: conversations are formatted as --chat ") == 1


def test_a_template_without_a_prompt_is_given_the_answers_header_and_a_file_of_its_own_counts(libraries, tmp_path):
    folder = saved(libraries["qwen2"], tmp_path, chat_template="{{ 'nothing' }}")
    (folder / "chat_template.jinja").write_text(helpers_templates.CHATML_LOOP)
    assert read_tokenizer_json(folder).chat == CHATML


def test_a_template_of_ours_brings_back_any_chat(libraries, tmp_path):
    shipped = Tokenizer.load()
    odd = Chat("<|im_start|>S {content}'\"#}", "\\n{content}{# ", "<|im_start|>A 汉{content}<|im_end|>",
               default_system="#} {{ x }}", before_answer="😀", trims=True)
    tokenizer = Tokenizer(PATTERN, shipped.special_tokens, shipped.ranks, chat=odd, end_of_text="<|reserved_1|>",
                          bos="<|reserved_2|>")
    write_tokenizer(tokenizer, tmp_path)
    assert read_tokenizer_json(tmp_path).sha256 == tokenizer.sha256


def test_the_template_that_is_written_formats_as_the_chat_does():
    shipped = Tokenizer.load()
    turns = [{"role": "user", "content": " 2+3=? "}, {"role": "assistant", "content": "5"}]
    for chat in (CHATML, replace(CHATML, default_system="Be 'kind'.\n", before_answer="<think>\n\n</think>\n\n"),
                 replace(CHATML, default_system="", trims=True, user="<|im_start|>U{content}\"\\n"), PLAIN("<|endoftext|>")):
        tokenizer = Tokenizer(PATTERN, shipped.special_tokens, shipped.ranks, chat=chat, bos="<|reserved_2|>")
        template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(write_template(tokenizer))
        for messages in ([], turns[:1], turns, [{"role": "system", "content": "Be brief."}, *turns]):
            assert template.render(messages=messages) == tokenizer.decode(tokenizer.encode_chat(messages)[0])
            ids, _ = tokenizer.encode_chat(messages, add_generation_prompt=True)
            assert template.render(messages=messages, add_generation_prompt=True) == tokenizer.decode(ids)


def test_between_chat_tokens_the_ids_of_a_conversation_are_those_of_its_text(libraries, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "小猫 2+3=?\n"},
                {"role": "assistant", "content": "don't\n\n"}]
    for family in ("smollm", "qwen2", "llama_3"):
        library = libraries[family]
        tokenizer = read_tokenizer_json(saved(library, tmp_path / family))
        ids, _ = tokenizer.encode_chat(messages)
        assert library.encode(tokenizer.decode(tokenizer.encode_chat(messages)[0]), add_special_tokens=False).ids == ids


# -- refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("part, value, said", [
    ("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "model is WordLevel with "),
    ("model.byte_fallback", True, "model is BPE with byte_fallback True, not BPE"),
    ("model.end_of_word_suffix", "</w>", "model is BPE with end_of_word_suffix '</w>'"),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer {\"type\": \"Whitespace\"} is not supported"),
    ("pre_tokenizer", None, "pre_tokenizer null is not supported"),
    ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
     "the tokenizers library splits a text in another way"),
    ("normalizer", {"type": "Lowercase"}, "normalizer {\"type\": \"Lowercase\"} is not supported"),
    ("post_processor", {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]},
     "post_processor makes ['"),
    ("added_tokens.0.lstrip", True, "strips or needs white space"),
    ("model.vocab.▁the", 900, "token '▁the': '▁' stands for no byte"),
    ("model.vocab.zzzz", 900, "its merges join other tokens than tiktoken"),
    ("model.merges.0", ["Ħ", "ħ"], "the tokenizers library cannot read it"),
])
def test_what_cannot_be_the_same_is_refused_with_the_reason(libraries, tmp_path, part, value, said):
    theirs = json.loads(libraries["qwen2"].to_str())
    *path, last = part.split(".")
    place = theirs
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[int(last) if last.isdigit() else last] = value
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(theirs))
    with pytest.raises(ValueError) as error:
        read_tokenizer_json(file)
    assert str(error.value).startswith(f"{file}: ") and said in str(error.value)


def small(merges, tokens):
    """Bytes 0 .. 255, then these tokens, then <|endoftext|>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = [*letters, *tokens, "<|endoftext|>"]
    return from_gguf(gguf_fields(named, [1] * (len(named) - 1) + [3], merges, "gpt-2"))


def test_merges_in_another_order_than_the_ids_or_too_few_of_them_are_refused():
    assert small(["b c", "a b", "a bc"], ["bc", "ab", "abc"]).encode("abc") == [258]
    for merges in (["a b", "b c", "a bc"], ["b c", "a b", "ab c"], ["b c", "a b"]):
        with pytest.raises(ValueError, match="its merges join other tokens than tiktoken"):
            small(merges, ["bc", "ab", "abc"])


def test_a_pattern_that_the_library_runs_otherwise_is_refused(tmp_path):
    library = train(split(r"\w+"))                      # the library keeps what is between the words, tiktoken does not
    with pytest.raises(ValueError, match="the tokenizers library splits a text in another way"):
        read_tokenizer_json(saved(library, tmp_path))


def test_a_name_that_gguf_does_not_have_is_refused(libraries, tmp_path):
    with pytest.raises(ValueError, match="tokenizer.ggml.pre is 'chatglm-bpe'; known are llama-bpe, llama3, llama-v3"):
        from_gguf(gguf_fields([], [], [], "chatglm-bpe"))
    assert all(PRE_TOKENIZERS[name] == LLAMA_3 for name in ("llama-v3", "falcon3", "pixtral", "dbrx"))
    assert PRE_TOKENIZERS["deepseek-r1-qwen"] == PRE_TOKENIZERS["megrez"] == QWEN2
    tokenizer = read_tokenizer_json(saved(libraries["gpt2"], tmp_path))
    assert tokenizer.pattern == PRE_TOKENIZERS["gpt-2"] == GPT2 and PRE_TOKENIZERS["smollm"] == SMOLLM
    lowercase = Tokenizer(r"[a-z]+|.", tokenizer.special_tokens, tokenizer.ranks, chat=tokenizer.chat)
    with pytest.raises(ValueError, match="no pre-tokenizer for the pattern"):
        to_gguf(lowercase, lowercase.vocab_size)


def test_a_folder_without_a_vocabulary_says_what_writes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="AutoTokenizer.from_pretrained"):
        read_tokenizer_json(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"tokens": []}')
    with pytest.raises(ValueError, match="tokenizer.json: the tokenizers library cannot read it"):
        read_tokenizer_json(tmp_path)
