"""
转换的规律：换一种文件，模型不变；留层、量化、打分与当教师，都与原来的那一个一致。
Laws of scripts/convert.py, and of what other people's files are for: a model is the same one in every file, is scored by
the same figures, teaches and learns the same; and what cannot be is refused before anything is read.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import scripts.convert as convert_script
import scripts.evaluate as evaluate_script
from helpers_run import ROOT, TINY, complaint, load, rows, same, succeed
from model import score as scoring
from interop.checkpoint import build, load_model, load_tokenizer, new_model, save_model
from model.config import LMConfig
from model.generate import generate
from model.quantize import Quantised, quantize
from model.transformer import Transformer
from interop import hf

SIZES = dict(dim=64, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=272, max_seq_len=128)
TOKENS, LENGTHS = torch.arange(40) * 7 % 272, [24, 16]
TEXTS = ["The cat sat on the mat.", "小猫坐着。", "a" * 300, "One, two, three, four."]


@pytest.fixture(scope="module")
def files(tiny, byte_tokenizer, tmp_path_factory):
    """model.pth, whose tokens are bytes, and the same model as folder/ and model.gguf; student.pth; texts.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    save_model(tiny(**SIZES), byte_tokenizer(), folder / "model.pth")
    save_model(tiny(seed=1, **SIZES | {"n_layers": 1}), byte_tokenizer(), folder / "student.pth")
    convert(weights=folder / "model.pth", out=folder / "folder")
    convert(weights=folder / "model.pth", out=folder / "model.gguf", dtype="float32")
    texts(folder / "texts.jsonl", TEXTS)
    return folder


def as_script(script, **flags):
    """Its main() with these flags, in this process."""
    argv = [script.__name__]
    for name, value in flags.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        script.main()


def convert(**flags):
    as_script(convert_script, **flags)


def scores(folder, **flags) -> dict[str, dict]:
    """{label: what evaluate.py measured}, less what the clock decides."""
    as_script(evaluate_script, **flags, json=folder / "scores.json", device="cpu")
    found = json.loads((folder / "scores.json").read_text())
    return {label: {key: value for key, value in one.items() if key != "tokens_per_s"}
            for label, (one,) in found.items()}


def texts(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def logits(model):
    with torch.no_grad():
        return model(TOKENS, LENGTHS).logits


# -- one model in many files -----------------------------------------------------------------------------------

def test_from_file_to_folder_to_gguf_and_back_no_weight_changes(files, tmp_path):
    convert(weights=files / "folder", out=tmp_path / "a.gguf", dtype="float32")
    convert(weights=tmp_path / "a.gguf", out=tmp_path / "b")
    convert(weights=tmp_path / "b", out=tmp_path / "c.pth")
    assert same(load(tmp_path / "c.pth"), load(files / "model.pth"))
    (model, tokenizer), (back, its_tokenizer) = load_model(files / "model.pth"), load_model(tmp_path / "c.pth")
    assert back.config == model.config and its_tokenizer.sha256 == tokenizer.sha256


def test_a_model_has_the_same_scores_in_every_file(files, data, tmp_path):
    test = tmp_path / "test.jsonl"
    test.write_text("".join((data / "test.jsonl").read_text().splitlines(keepends=True)[:20]))
    found = scores(tmp_path, data=[test, files / "texts.jsonl"],
                   weights=[f"{label}={files / name}" for label, name in
                            (("pth", "model.pth"), ("folder", "folder"), ("gguf", "model.gguf"))])
    assert found["folder"] == found["gguf"] == found["pth"]
    assert found["gguf"]["agreement"] == 100 and found["gguf"]["kl"] < 1e-6


@pytest.mark.parametrize("out, dtype, bits, most", [("f", "bfloat16", 16, 0.03), ("f", "float16", 16, 0.004),
                                                    ("m.gguf", None, 16, 0.004), ("m.gguf", "q8_0", 8.5, 0.03)])
def test_fewer_bits_make_smaller_files_and_nearly_the_same_model(out, dtype, bits, most, files, tmp_path):
    convert(weights=files / "model.pth", out=tmp_path / out, **{"dtype": dtype} if dtype else {})
    (model, _), (back, _) = load_model(files / "model.pth"), load_model(tmp_path / out)
    file = tmp_path / "f/model.safetensors" if out == "f" else tmp_path / out
    assert file.stat().st_size - bits / 8 * model.n_parameters() < 20_000       # a header with the vocabulary
    for ours, theirs in zip(model.parameters(), back.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= most * ours.abs().max()


def test_converting_says_what_came_out(files, tmp_path, capfd):
    convert(weights=files / "model.gguf", out=tmp_path / "m.pth")
    parameters = load_model(files / "model.pth")[0].n_parameters()
    assert f"{tmp_path}/m.pth: 64 x 4, {parameters:,} parameters, 0.6 MB" in capfd.readouterr().out


def test_a_folder_that_holds_something_is_not_written_into(files, tmp_path):
    """A shard that another model left there would be read in place of the new weights."""
    convert(weights=files / "student.pth", out=tmp_path / "folder")
    said = complaint("scripts/convert.py", weights=files / "model.pth", out=tmp_path / "folder")
    assert f"--out {tmp_path}/folder is not empty" in said


def test_a_folder_may_have_a_point_in_its_name(files, tmp_path):
    convert(weights=files / "student.pth", out=tmp_path / "Tiny-0.5B")
    assert load_model(tmp_path / "Tiny-0.5B")[0].config.n_layers == 1


@pytest.mark.parametrize("flags, reason", [
    ({"out": "m.bin"}, "--out m.bin: write FILE.pth, FILE.gguf, or a folder"),
    ({"out": "m.pth", "layers": "0"}, "--layers a --student_from"),
    ({"out": "m.pth", "weights": None, "student_from": "nowhere.pth"}, "--student_from needs --layers"),
    ({"out": "m.gguf", "quantize": "int8"}, "--quantize is for our own --out FILE.pth; a GGUF file has --dtype q8_0"),
    ({"out": "folder", "quantize": "int4"}, "--quantize is for our own --out FILE.pth"),
    ({"out": "m.pth", "dtype": "float16"}, "--dtype float16: m.pth can have float32"),
    ({"out": "m.gguf", "dtype": "bfloat16"}, "--dtype bfloat16: m.gguf can have float32, float16, q8_0"),
    ({"out": "folder", "dtype": "q8_0"}, "--dtype q8_0: folder can have float32, float16, bfloat16"),
    ({"out": "README"}, "--out README is there already, and is no folder"),
    ({"out": "folder.pth"}, "--out folder.pth is there already, and is a folder"),
], ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_what_cannot_go_together_is_said_before_anything_is_read(flags, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").touch()
    (tmp_path / "folder.pth").mkdir()
    flags = {"weights": "nowhere.pth"} | flags
    with pytest.raises(SystemExit, match=re.escape(reason)):
        convert(**{name: value for name, value in flags.items() if value is not None})


def test_a_list_of_layers_that_is_none_and_a_missing_file_are_named(files, tmp_path, capfd):
    with pytest.raises(SystemExit):
        convert(student_from=files / "model.pth", layers="0,two", out=tmp_path / "m.pth")
    assert "'0,two' is no list of layers like 0,2,4" in capfd.readouterr().err
    said = complaint("scripts/convert.py", weights=tmp_path / "full_sft_64.pth", out=tmp_path / "m.gguf")
    assert "Train them: python train_sft.py --help" in said and not (tmp_path / "m.gguf").exists()


# -- some of its layers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [
    {}, {"use_moe": True}, {"tie_embeddings": False, "qk_norm": True, "attention_bias": True},
], ids=["plain", "experts", "untied, q/k norms, biases"])
def test_a_student_has_exactly_the_layers_that_are_named_in_their_order(kind, tiny, byte_tokenizer, tmp_path):
    teacher = tiny(**SIZES | kind)
    save_model(teacher, byte_tokenizer(), tmp_path / "teacher.pth")
    convert(student_from=tmp_path / "teacher.pth", layers="3,1", out=tmp_path / "student.pth")
    student, _ = load_model(tmp_path / "student.pth")
    assert student.config == dataclasses.replace(teacher.config, n_layers=2)
    for new, old in ((student.layers[0], teacher.layers[3]), (student.layers[1], teacher.layers[1]),
                     (student.norm, teacher.norm), (student.output, teacher.output),
                     (student.tok_embeddings, teacher.tok_embeddings)):
        assert same(new.state_dict(), old.state_dict())


def test_a_student_that_writes_word_by_word_writes_what_the_full_pass_finds_likeliest(files):
    """Each layer has its own place in the cache: layer 3 of the teacher is layer 0 of the student."""
    student = convert_script.keep_layers(load_model(files / "model.pth")[0], [3, 1])
    assert [layer.attention.layer for layer in student.layers] == [0, 1]
    prompt = [40, 50, 60]
    answer = generate(student, [prompt], 20)[0]
    with torch.no_grad():
        best = student(torch.tensor(prompt + answer), [23]).logits.argmax(dim=-1)
    assert best[2:-1].tolist() == answer


@pytest.mark.parametrize("layers", [[4], [0, -1], [1, 9]])
def test_a_layer_that_is_not_there_is_named_with_those_that_are(layers, files):
    with pytest.raises(ValueError, match=rf"--layers {','.join(map(str, layers))}: the model has layers 0 to 3"):
        convert_script.keep_layers(load_model(files / "model.pth")[0], layers)


# -- quantised -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["int8", "int4"])
def small(request, files):
    path = files / f"{request.param}.pth"
    convert(weights=files / "model.pth", out=path, quantize=request.param)
    return path


def test_a_quantised_file_is_small_and_loads_as_the_model_that_was_quantised(small, files):
    (model, _), (back, _) = load_model(files / "model.pth"), load_model(small)
    assert torch.equal(logits(back), logits(quantize(model, small.stem)))
    assert small.stat().st_size < (0.35 if small.stem == "int8" else 0.30) * (files / "model.pth").stat().st_size


def test_a_quantised_model_is_scored_and_talks_and_is_near_the_whole_one(small, files, tmp_path):
    found = scores(tmp_path, data=files / "texts.jsonl",
                   weights=[f"whole={files / 'model.pth'}", f"small={small}", f"another={files / 'student.pth'}"])
    assert 0 < found["small"]["kl"] < (0.01 if small.stem == "int8" else 0.5) * found["another"]["kl"]
    assert "model> " in succeed("scripts/chat.py", weights=small, stdin="hello\n", max_new_tokens=4)


@pytest.mark.parametrize("out", ["folder", "m.gguf"])
def test_a_quantised_model_is_not_written_for_others_as_if_its_integers_were_weights(out, small, tmp_path):
    with pytest.raises(SystemExit, match="write the one it was made from"):
        convert(weights=small, out=tmp_path / out)


def test_what_is_quantised_is_not_quantised_again(small, tmp_path):
    with pytest.raises(SystemExit, match=f"{small.stem} already"):
        convert(weights=small, out=tmp_path / "m.pth", quantize="int4")


# -- teachers and students of other people's -------------------------------------------------------------------

@pytest.fixture
def flags(files, data, tmp_path):
    return {**TINY, "data_path": data / "sft_data.jsonl", "val_path": "none", "size": "tiny", "max_steps": 1,
            "log_interval": 1, "teacher": files / "model.pth", "student": files / "student.pth",
            "out_dir": tmp_path / "out"}


def learned(folder) -> list[torch.Tensor]:
    """The gradient of each weight in the one step, as Adam's first moment has it."""
    return [state["exp_avg"] for state in load(folder / "full_dist_64.resume")["optimizer"]["state"].values()]


def close(a, b, tolerance) -> bool:
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def test_a_quantised_student_is_refused_with_the_way_out(small, flags, tmp_path):
    for script, its in (("train_distillation.py", {"student": small}),
                        ("train_sft.py", {"weights": small, "student": None, "teacher": None, "size": None})):
        said = complaint(script, **flags | its)
        assert "cannot be trained" in said and "Train the model they were made from" in said


def test_a_quantised_teacher_teaches_as_the_numbers_that_its_integers_stand_for(small, flags, files, tmp_path):
    """In memory, by either form of the loss, and on disk, whose states are bf16."""
    code, tokenizer = load_model(small)
    floats, _ = load_model(files / "model.pth")
    stand_for = {f"{name}.weight": module.dequantised() for name, module in code.named_modules()
                 if isinstance(module, Quantised)}
    floats.load_state_dict(floats.state_dict() | stand_for)
    save_model(floats, tokenizer, tmp_path / "floats.pth")
    succeed("scripts/cache_teacher.py", teacher=small, data_path=flags["data_path"], max_seq_len=128, dtype="float32",
            cache_dir=tmp_path / "cache")
    for name, its in (("floats", {"teacher": tmp_path / "floats.pth"}), ("fused", {"teacher": small}),
                      ("plain", {"teacher": small, "plain_loss": True}),
                      ("on disk", {"teacher": None, "teacher_cache": tmp_path / "cache"})):
        succeed("train_distillation.py", **flags | its | {"out_dir": tmp_path / name})
        assert close(learned(tmp_path / name), learned(tmp_path / "floats"), 2e-2 if name == "on disk" else 1e-3), name


@pytest.mark.parametrize("kind", ["folder", "model.gguf"])
def test_a_folder_and_a_gguf_file_teach_and_learn_as_the_pth_does(kind, flags, files, tmp_path):
    student = {"folder": tmp_path / "student", "model.gguf": tmp_path / "student.gguf"}[kind]
    convert(weights=flags["student"], out=student, dtype="float32")
    succeed("train_distillation.py", **flags)
    theirs = {"teacher": files / kind, "student": student, "out_dir": tmp_path / "b"}
    said = succeed("train_distillation.py", **flags | theirs)
    assert f"from {files / kind}" in said and f"from {student}" in said
    assert close(learned(tmp_path / "b"), learned(tmp_path / "out"), 1e-6)
    assert load_model(tmp_path / "b/full_dist_64.pth")[1].sha256 == load_tokenizer(files / kind).sha256


@pytest.mark.parametrize("kind", ["folder", "model.gguf"])
def test_a_student_from_nothing_takes_the_vocabulary_of_its_teacher(kind, flags, files, tmp_path):
    said = succeed("train_distillation.py", **flags | {"teacher": files / kind, "student": "none"}, dim=32, n_heads=2)
    assert "student 32 x 2" in said
    model, tokenizer = load_model(tmp_path / "out/full_dist_32.pth")
    assert model.config.vocab_size == 272 and tokenizer.sha256 == load_tokenizer(files / kind).sha256
    said = complaint("train_distillation.py", **flags | {"student": "none"}, tokenizer=ROOT / "model/tokenizer.json")
    assert "the teacher's vocabulary has 272 words, the student's 1024" in said


@pytest.fixture(scope="module")
def padded(files):
    """The same model with 16 rows more than there are words, as loud as words, in a folder."""
    model, tokenizer = load_model(files / "model.pth")
    wide = Transformer(dataclasses.replace(model.config, vocab_size=288))
    state = model.state_dict()
    for key in ("tok_embeddings.weight", "output.weight"):
        state[key] = torch.cat([state[key], state[key][-16:]])
    wide.load_state_dict(state)
    hf.write(wide, tokenizer, files / "padded")
    return files / "padded"


def test_a_padded_vocabulary_is_refused_and_with_pad_vocab_teaches_what_its_words_say(padded, flags, tmp_path):
    wide = flags | {"teacher": padded, "out_dir": tmp_path / "padded"}
    assert "288 words, the student's 272; the tokenizer knows 272. If the others are padding: --pad_vocab" in complaint(
        "train_distillation.py", **wide)
    succeed("train_distillation.py", **wide, pad_vocab=True)
    succeed("train_distillation.py", **flags)
    assert close(learned(tmp_path / "padded"), learned(tmp_path / "out"), 1e-5)


@pytest.mark.parametrize("out", ["folder", "m.gguf", "m.pth"])
def test_a_padded_vocabulary_keeps_its_rows_in_every_file(out, padded, tmp_path):
    convert(weights=padded, out=tmp_path / out, **{"dtype": "float32"})
    (model, tokenizer), (back, its_tokenizer) = load_model(padded), load_model(tmp_path / out)
    assert back.config.vocab_size == 288 and its_tokenizer.sha256 == tokenizer.sha256
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("name", ["folder", "model.gguf", "model.pth", "folder/tokenizer.json", "own.json",
                                  "lone/tokenizer.json"])
def test_a_vocabulary_may_be_given_as_any_file_that_holds_one(name, files, byte_tokenizer):
    byte_tokenizer().save(files / "own.json")
    (files / "lone").mkdir(exist_ok=True)
    for file in files.glob("folder/tokenizer*.json"):               # a download without the weights
        shutil.copy(file, files / "lone")
    model, tokenizer = new_model(LMConfig(dim=16, n_layers=1, n_heads=2), files / name)
    assert tokenizer.sha256 == byte_tokenizer().sha256 and model.config.vocab_size == 272


def test_a_script_takes_a_vocabulary_from_other_peoples_files(files, data, tmp_path):
    succeed("train_pretrain.py", **TINY, data_path=data / "pretrain_data.jsonl", max_steps=1, dim=32, n_layers=1,
            n_heads=2, out_dir=tmp_path, tokenizer=files / "model.gguf")
    assert load_model(tmp_path / "pretrain_32.pth")[0].config.vocab_size == 272


# -- distillation on texts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_texts_teach_the_same_from_disk_as_from_memory(kind, flags, tmp_path):
    lines = [f"Story {n}: the cat has {n} mice, and {'eats ' * (n % 7)}them." for n in range(40)]
    path = texts(tmp_path / "texts.jsonl", lines)
    if kind == "txt":
        path = tmp_path / "texts.txt"
        path.write_text("\n\n".join(lines) + "\n")
    flags |= {"data_path": path, "val_path": None, "alpha": 0.5}
    said = succeed("train_distillation.py", **flags)
    assert "data: 38 samples" in said and "validation: 2 of" in said         # 5 % of the texts are held out
    succeed("scripts/cache_teacher.py", teacher=flags["teacher"], data_path=path, max_seq_len=128, dtype="float32",
            cache_dir=tmp_path / "cache")
    succeed("train_distillation.py", **flags | {"teacher": None, "teacher_cache": tmp_path / "cache",
                                                "out_dir": tmp_path / "disk"})
    live, disk = (rows(tmp_path / f"{name}/full_dist_64.jsonl") for name in ("out", "disk"))
    assert disk[0]["ce"] == live[0]["ce"] > 0 and live[-1]["val_kl"] > 0
    assert disk[0]["kd"] == pytest.approx(live[0]["kd"], rel=1e-2)           # its states are bf16
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 2e-2)


def test_texts_and_conversations_together_are_refused_and_both_named(flags, files):
    both = [flags["data_path"], files / "texts.jsonl"]
    said = complaint("train_distillation.py", **flags | {"data_path": both})
    assert f"{files}/texts.jsonl holds texts, {flags['data_path']} conversations; give files of one kind" in said


def test_a_teacher_that_reads_less_than_the_data_is_long_is_refused_with_the_way_out(
        flags, tiny, byte_tokenizer, tmp_path):
    save_model(tiny(**SIZES | {"max_seq_len": 64}), byte_tokenizer(), tmp_path / "short.pth")
    flags |= {"teacher": tmp_path / "short.pth"}
    said = complaint("train_distillation.py", **flags)
    assert "the student reads 128 tokens, the teacher was made for 64: --max_seq_len 64" in said
    succeed("train_distillation.py", **flags | {"max_seq_len": 64})


# -- scores of texts -------------------------------------------------------------------------------------------

def test_the_nats_of_a_text_are_what_a_sum_by_hand_gives(byte_tokenizer, tmp_path):
    """Without its layers a model is a table, q(next | token) = softmax(output . token / |token| * sqrt(16)), which NumPy
    has in float64. A text of 30 bytes and its end is read in pieces of 12 by a model of 12."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = build(LMConfig(dim=16, n_layers=1, n_heads=2, vocab_size=272, max_seq_len=12, norm_eps=1e-12))
    with torch.no_grad():
        model.tok_embeddings.weight.normal_()
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].ffn.w2.weight.zero_()
    save_model(model, tokenizer, tmp_path / "table.pth")
    lines = ["ab", "The cat sat on the big old mat"]
    found = scores(tmp_path, weights=tmp_path / "table.pth", data=texts(tmp_path / "t.jsonl", lines))["table"]

    E = model.tok_embeddings.weight.detach().double().numpy()
    nats = []
    for line in lines:
        ids = [16 + byte for byte in line.encode()] + [0]
        for token, after in zip(ids, ids[1:]):
            z = E @ E[token] / np.linalg.norm(E[token]) * 4
            nats.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[after])
    assert len(nats) == 2 + 30
    assert found["text_loss"] == pytest.approx(np.mean(nats), rel=1e-6)
    assert found["text_perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)


def test_a_limit_reads_the_first_rows_of_each_file(files, data, tmp_path):
    (tmp_path / "short.jsonl").write_text("".join((data / "test.jsonl").read_text().splitlines(keepends=True)[:2]))
    whole = {"weights": files / "model.pth", "data": [data / "test.jsonl", files / "texts.jsonl"]}
    short = {"weights": files / "model.pth", "data": [tmp_path / "short.jsonl", texts(tmp_path / "t.jsonl", TEXTS[:2])]}
    assert scores(tmp_path, **whole, limit=2) == scores(tmp_path, **short) != scores(tmp_path, **whole, limit=3)


@pytest.mark.parametrize("of", ["conversations", "texts"])
def test_samples_show_what_each_model_answers_side_by_side(of, files, data, tmp_path, capfd):
    test = data / "test.jsonl" if of == "conversations" else files / "texts.jsonl"
    scores(tmp_path, weights=[f"big={files / 'folder'}", f"small={files / 'student.pth'}"], data=test, limit=4,
           samples=2, max_new_tokens=5, report=tmp_path / "report.md")
    said, report = capfd.readouterr().out, (tmp_path / "report.md").read_text()
    for name, label in (("model.pth", "big"), ("student.pth", "small")):
        model, tokenizer = load_model(files / name)
        if of == "texts":
            prompts, stop = [tokenizer.encode(text)[:16] for text in TEXTS[:2]], tokenizer.end_of_text
        else:
            asked = [json.loads(line)["conversations"][:-1] for line in test.read_text().splitlines()[:2]]
            prompts, stop = [tokenizer.encode_chat(each, True)[0] for each in asked], tokenizer.end_of_turn
        for ids in generate(model, prompts, 5, stop):
            answer = " ".join(tokenizer.decode(ids).split())
            assert label in said and answer in " ".join(said.split()) and answer in " ".join(report.split())


def test_logits_in_small_blocks_give_the_same_scores(files, byte_tokenizer, monkeypatch):
    (model, tokenizer), (other, _) = load_model(files / "model.pth"), load_model(files / "student.pth")
    conversations = [[{"role": "user", "content": "how?"}, {"role": "assistant", "content": "so " * n}]
                     for n in range(1, 9)]
    whole = scoring.score(model, tokenizer, conversations, other)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 5 * 4 * 272)                # 5 rows at once, of some hundred
    for a, b in zip(scoring.score(model, tokenizer, conversations, other), whole, strict=True):
        assert a.log_p == pytest.approx(b.log_p, rel=1e-5) and a.kl == pytest.approx(b.kl, rel=1e-4, abs=1e-6)
        assert a[1:4] == b[1:4] and a.positions == b.positions


def test_a_report_on_texts_alone_has_no_picture_and_names_none(files, tmp_path):
    succeed("scripts/evaluate.py", weights=files / "student.pth", data=files / "texts.jsonl", report=tmp_path / "report.md")
    assert "png" not in (tmp_path / "report.md").read_text() and not (tmp_path / "report.png").exists()


def test_two_models_of_one_name_are_not_shown_as_one(files, tmp_path):
    """It must not be the last one that is left in the table."""
    shutil.copytree(files, tmp_path / "other", dirs_exist_ok=True)
    both = [files / "student.pth", tmp_path / "other/student.pth"]
    with pytest.raises(SystemExit, match="student"):
        scores(tmp_path, weights=both, data=files / "texts.jsonl")
    assert len(scores(tmp_path, weights=[f"a={both[0]}", f"b={both[1]}"], data=files / "texts.jsonl")) == 2


# -- what a path holds -----------------------------------------------------------------------------------------

def test_a_path_that_is_no_model_says_what_it_is_and_what_to_give(files, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(files / "folder/model.safetensors", tmp_path)
    shutil.copy(files / "model.pth", tmp_path / "lone.pth")
    for name, reason in (("none.gguf", f"no weights at {tmp_path}/none.gguf. Is the path right?"),
                         ("empty", "a folder without a config.json: no model, or its download is not complete"),
                         ("model.safetensors", f"alone has no sizes and no tokenizer; name its folder, {tmp_path}"),
                         ("lone.pth", f"no {tmp_path}/lone.json beside the weights")):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)):
            load_model(tmp_path / name)


# -- memory ----------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from interop.checkpoint import load_model
from interop import hf

def size(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")       # the highest mark is set back to what is used now
    before = size("VmRSS")
    model, _ = load_model(path)
    print((size("VmHWM") - before) / (4 * model.n_parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_a_folder_takes_little_more_memory_than_the_model(files, byte_tokenizer, tmp_path, monkeypatch):
    """15 million parameters, 60 MB in fp32, from 30 MB of bf16 in one file and in several; after a small model, with
    which come the modules that a first model brings."""
    model = build(LMConfig(dim=256, n_layers=16, n_heads=4, vocab_size=4096))
    hf.write(model, byte_tokenizer(), tmp_path / "one", torch.bfloat16)
    monkeypatch.setattr(hf, "SHARD_BYTES", 8 << 20)
    hf.write(model, byte_tokenizer(), tmp_path / "several", torch.bfloat16)
    command = [sys.executable, "-c", PEAK, files / "folder", tmp_path / "one", tmp_path / "several"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    _, *times = map(float, ended.stdout.split())
    assert len(times) == 2 and max(times) < 1.35, ended
