"""
转换的规律：换一种文件，模型不变；量化、打分与当教师，都与原来的那一个一致。
Laws of scripts/convert.py and of other people's files: a model is the same in every file, has the
same scores, and teaches and learns the same; what cannot be converted is refused before anything is read.
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
from safetensors.torch import load_file, save_file

import scripts.convert as convert_script
import scripts.evaluate as evaluate_script
from dataset.lm_dataset import dataset_of
from evaluation import scores as scoring
from helpers_run import ROOT, TINY, complaint, first_gradients, load, rows, same, succeed
from interop import hf
from interop.checkpoint import build, load_model, load_tokenizer, new_model, prepare, save_model
from model.config import LMConfig
from model.generate import generate
from model.tokenizer import SPECIAL_TOKENS, Chat, Tokenizer
from model.quantize import Quantised, quantize
from model.transformer import Transformer
from runtime.processes import World
from scripts.convert import modelfile

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
    """{label: what evaluate.py measured}"""
    as_script(evaluate_script, **flags, json=folder / "scores.json", device="cpu")
    found = json.loads((folder / "scores.json").read_text())
    return {label: one for label, (one,) in found.items()}


def texts(path, lines):
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def logits(model):
    with torch.no_grad():
        return model(TOKENS, LENGTHS).logits


# -- the mean of several models ---------------------------------------------------------------------

def test_averaged_weights_are_the_mean_of_models_of_one_kind(files, tiny, byte_tokenizer, tmp_path):
    save_model(tiny(seed=3, **SIZES), byte_tokenizer(), tmp_path / "other.pth")
    pair = [files / "model.pth", tmp_path / "other.pth"]
    convert(average=pair, out=tmp_path / "mean.pth")
    mean, *each = (dict(load_model(path)[0].named_parameters()) for path in [tmp_path / "mean.pth", *pair])
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (each[0][name] + each[1][name]) / 2)
    convert(average=pair[:1] * 2, out=tmp_path / "same.pth")
    assert torch.equal(logits(load_model(tmp_path / "same.pth")[0]), logits(load_model(pair[0])[0]))

    letters = Tokenizer("(?s:.)", SPECIAL_TOKENS, {bytes([value]): 16 + value for value in range(256)})
    save_model(tiny(**SIZES), letters, tmp_path / "words.pth")
    convert(weights=pair[0], out=tmp_path / "int8.pth", quantize="int8")
    for wrong, reason in (([pair[0], files / "student.pth"], "student.pth is quantised, or"), ([pair[0], tmp_path / "words.pth"], "words.pth is"),
                          ([tmp_path / "int8.pth"] * 2, "int8.pth is quantised"), (pair, "is to be converted itself")):
        with pytest.raises(SystemExit, match=reason):
            convert(average=wrong, out=tmp_path / ("other.pth" if wrong is pair else "no.pth"))


# -- one model in many files -----------------------------------------------------------------------

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


@pytest.mark.parametrize("out, flags, bits, most", [("f", {"dtype": "bfloat16"}, 16, 0.03), ("f", {"dtype": "float16"}, 16, 0.004),
                                                    ("m.gguf", {}, 16, 0.004), ("m.gguf", {"quantize": "q8_0"}, 8.5, 0.03),
                                                    ("m.gguf", {"quantize": "q4_0"}, 5.1, 0.2)])
def test_fewer_bits_make_smaller_files_and_nearly_the_same_model(out, flags, bits, most, files, tmp_path):
    convert(weights=files / "model.pth", out=tmp_path / out, **flags)
    (model, _), (back, _) = load_model(files / "model.pth"), load_model(tmp_path / out)
    file = tmp_path / "f/model.safetensors" if out == "f" else tmp_path / out
    assert file.stat().st_size - bits / 8 * model.n_parameters() < 20_000       # a header with the vocabulary
    for ours, theirs in zip(model.parameters(), back.parameters(), strict=True):
        assert (ours - theirs).abs().max() <= most * ours.abs().max()


def test_a_modelfile_beside_a_gguf_file_has_its_chat_for_ollama(files, tmp_path):
    convert(weights=files / "student.pth", out=tmp_path / "small.gguf")
    assert (tmp_path / "small.Modelfile").read_text() == (
        'FROM ./small.gguf\nTEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n')


def test_a_modelfile_has_the_default_system_message_and_what_precedes_an_answer():
    tokenizer = Tokenizer.load()
    tokenizer.chat = Chat("S{content}.", "U{content}.", "A{content}.", default_system="Be brief.", before_answer="<t>")
    text = modelfile("m.gguf", tokenizer)
    assert 'SYSTEM """Be brief."""\n' in text and '{{ end }}{{ end }}A<t>"""\n' in text


def test_the_card_of_a_folder_says_what_the_files_beside_the_weights_know_and_no_more(files, tmp_path):
    for path in (files / "student.pth", files / "student.json", *files.glob("tokenizer-*.json")):
        shutil.copy(path, tmp_path)
    convert(weights=tmp_path / "student.pth", out=tmp_path / "bare")
    bare = (tmp_path / "bare/README.md").read_text()
    assert "# 64 x 1, " in bare and "student.pth" in bare and "licences" in bare and bare.count("|\n") == 2

    settings = {"data": "tickets.csv-12ab", "teacher": ["big.pth"], "alpha": 0.0, "student": None, "chain": []}
    torch.save({"progress": {"settings": settings}}, tmp_path / "student.resume")
    rows = [{"step": 5, "loss": 2.0}, {"step": 5, "val_ce": 1.25}, {"step": 9, "val_ce": 0.75}, {"step": 9, "loss": 1.0}]
    (tmp_path / "student.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert(weights=tmp_path / "student.pth", out=tmp_path / "told")
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in
             (tmp_path / "told/README.md").read_text().splitlines() if line.startswith("|") and "---" not in line]
    assert cells == [["from", "student.pth"], ["data", "tickets.csv-12ab"], ["teacher", "['big.pth']"], ["alpha", "0.0"],
                     ["step", "9"], ["val_ce", "0.75"]]


def test_converting_says_what_came_out(files, tmp_path, capfd):
    convert(weights=files / "model.gguf", out=tmp_path / "m.pth")
    parameters = load_model(files / "model.pth")[0].n_parameters()
    assert f"{tmp_path}/m.pth: 64 x 4, {parameters:,} parameters, 0.6 MB" in capfd.readouterr().out


def test_a_folder_that_holds_something_is_not_written_into(files, tmp_path):
    """A shard that another model left there would be read instead of the new weights."""
    convert(weights=files / "student.pth", out=tmp_path / "folder")
    with pytest.raises(SystemExit, match=f"--out {tmp_path}/folder is a file, or not empty"):
        convert(weights=files / "model.pth", out=tmp_path / "folder")


def test_a_folder_may_have_a_point_in_its_name(files, tmp_path):
    convert(weights=files / "student.pth", out=tmp_path / "Tiny-0.5B")
    assert load_model(tmp_path / "Tiny-0.5B")[0].config.n_layers == 1


CONFLICTS = (
    ({"out": "m.bin"}, "--out m.bin: write FILE.pth, FILE.gguf, or a folder"),
    ({"out": "m.gguf", "quantize": "int8"}, "--quantize int8: m.gguf can have q8_0, q4_0"),
    ({"out": "m.pth", "quantize": "q4_0"}, "--quantize q4_0: m.pth can have int8, int4, int3, int2"),
    ({"out": "folder", "quantize": "int4"}, "--quantize int4: folder can have none"),
    ({"out": "m.pth", "dtype": "float16"}, "--dtype float16: m.pth can have float32"),
    ({"out": "m.gguf", "dtype": "bfloat16"}, "--dtype bfloat16: m.gguf can have float16, float32"),
    ({"out": "README"}, "--out README is a file, or not empty: name a new folder"),
    ({"out": "folder.pth"}, "--out folder.pth is a folder"),
    ({"out": "m.gguf", "weights": "full_sft_64.pth"}, "Train them: python train_sft.py --help"),
)


def test_flags_that_conflict_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README").touch()
    (tmp_path / "folder.pth").mkdir()
    for flags, reason in CONFLICTS:
        flags = {"weights": "nowhere.pth"} | flags
        with pytest.raises(SystemExit, match=re.escape(reason)):
            convert(**flags)
    assert not (tmp_path / "m.gguf").exists()


# -- quantised -------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=["int8", "int4"])
def small(request, files):
    path = files / f"{request.param}.pth"
    convert(weights=files / "model.pth", out=path, quantize=request.param)
    return path


def test_a_quantised_file_is_small_and_loads_as_the_model_that_was_quantised(small, files):
    (model, _), (back, _) = load_model(files / "model.pth"), load_model(small)
    assert torch.equal(logits(back), logits(quantize(model, small.stem)))
    assert small.stat().st_size < (0.35 if small.stem == "int8" else 0.30) * (files / "model.pth").stat().st_size


def test_a_quantised_model_scores_near_the_original(small, files, tmp_path):
    found = scores(tmp_path, data=files / "texts.jsonl",
                   weights=[f"whole={files / 'model.pth'}", f"small={small}", f"another={files / 'student.pth'}"])
    assert 0 < found["small"]["kl"] < (0.01 if small.stem == "int8" else 0.5) * found["another"]["kl"]


def test_what_is_quantised_is_neither_converted_nor_quantised_again_nor_trained(small, tmp_path):
    for out in ("folder", "m.gguf"):
        with pytest.raises(SystemExit, match="convert the one it was made from"):
            convert(weights=small, out=tmp_path / out)
    with pytest.raises(SystemExit, match=f"{small.stem} already"):
        convert(weights=small, out=tmp_path / "m.pth", quantize="int4")
    with pytest.raises(ValueError, match="cannot be trained.* Train the model they were made from"):
        prepare(load_model(small)[0], small, World(0, 1, torch.device("cpu")))


def test_a_quantised_model_talks(small):
    model, tokenizer = load_model(small)
    (answer,) = generate(model, [tokenizer.encode_chat([{"role": "user", "content": "hello"}], True)[0]], 4)
    assert len(answer) == 4


# -- teachers and students of other formats --------------------------------------------------------


@pytest.fixture(scope="module")
def flags(files, data):
    return {**TINY, "data_path": data / "sft_data.jsonl", "val_path": "none", "size": "tiny", "max_steps": 1,
            "log_interval": 1, "teacher": files / "model.pth", "student": files / "student.pth"}


def learned(folder) -> list[torch.Tensor]:
    return first_gradients(folder / "full_dist_64.resume")


@pytest.fixture(scope="module")
def gradients(flags, tmp_path_factory):
    """What student.pth learns from model.pth."""
    folder = tmp_path_factory.mktemp("pth")
    succeed("train_distillation.py", **flags, out_dir=folder)
    return learned(folder)


def close(a, b, tolerance) -> bool:
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


def test_a_quantised_teacher_teaches_as_its_dequantised_weights(flags, files, tmp_path):
    """In memory, with either form of the loss, and cached on disk in bf16."""
    small = tmp_path / "int4.pth"
    convert(weights=files / "model.pth", out=small, quantize="int4")
    quantised, tokenizer = load_model(small)
    floats, _ = load_model(files / "model.pth")
    weights = {f"{name}.weight": module.dequantised() for name, module in quantised.named_modules()
               if isinstance(module, Quantised)}
    floats.load_state_dict(floats.state_dict() | weights)
    save_model(floats, tokenizer, tmp_path / "floats.pth")
    succeed("scripts/cache_teacher.py", teacher=small, data_path=flags["data_path"], max_seq_len=128, dtype="float32",
            cache_dir=tmp_path / "cache")
    for name, its in (("floats", {"teacher": tmp_path / "floats.pth"}), ("fused", {"teacher": small}),
                      ("plain", {"teacher": small, "plain_loss": True}),
                      ("on disk", {"teacher": None, "teacher_cache": tmp_path / "cache"})):
        succeed("train_distillation.py", **flags | its, out_dir=tmp_path / name)
        assert close(learned(tmp_path / name), learned(tmp_path / "floats"), 2e-2 if name == "on disk" else 1e-3), name


@pytest.mark.parametrize("kind", ["folder", "model.gguf"])
def test_a_folder_and_a_gguf_file_teach_and_learn_as_the_pth_does(kind, flags, files, gradients, tmp_path):
    student = {"folder": tmp_path / "student", "model.gguf": tmp_path / "student.gguf"}[kind]
    convert(weights=flags["student"], out=student, dtype="float32")
    printed = succeed("train_distillation.py", **flags | {"teacher": files / kind, "student": student}, out_dir=tmp_path)
    assert f"from {files / kind}" in printed and f"from {student}" in printed
    assert close(learned(tmp_path), gradients, 1e-6)
    assert load_model(tmp_path / "full_dist_64.pth")[1].sha256 == load_tokenizer(files / kind).sha256


def test_a_new_student_takes_the_vocabulary_of_its_teacher(flags, files, tmp_path):
    printed = succeed("train_distillation.py", **flags | {"teacher": files / "model.gguf", "student": "none"}, dim=32,
                      n_heads=2, out_dir=tmp_path)
    assert "student 32 x 2" in printed
    model, tokenizer = load_model(tmp_path / "full_dist_32.pth")
    assert model.config.vocab_size == 272 and tokenizer.sha256 == load_tokenizer(files / "model.gguf").sha256
    printed = complaint("train_distillation.py", **flags | {"student": "none"}, tokenizer=ROOT / "model/tokenizer.json",
                        out_dir=tmp_path)
    assert "the teacher's vocabulary has 272 tokens, the student's 1024" in printed


@pytest.fixture(scope="module")
def padded(files):
    """The same model with 16 padding rows, as large as those of tokens, in a folder."""
    model, tokenizer = load_model(files / "model.pth")
    wide = Transformer(dataclasses.replace(model.config, vocab_size=288))
    state = model.state_dict()
    for key in ("tok_embeddings.weight", "output.weight"):
        state[key] = torch.cat([state[key], state[key][-16:]])
    wide.load_state_dict(state)
    hf.write(wide, tokenizer, files / "padded")
    return files / "padded"


def test_a_padded_vocabulary_teaches_its_tokens(padded, flags, gradients, tmp_path):
    wide = flags | {"teacher": padded, "out_dir": tmp_path}
    assert "272 tokens and 288 rows" in succeed("train_distillation.py", **wide)
    assert close(learned(tmp_path), gradients, 1e-5)


def test_a_padded_vocabulary_keeps_its_rows_in_every_file(padded, tmp_path):
    model, tokenizer = load_model(padded)
    for out in ("folder", "m.gguf", "m.pth"):
        convert(weights=padded, out=tmp_path / out, dtype="float32")
        back, its_tokenizer = load_model(tmp_path / out)
        assert back.config.vocab_size == 288 and its_tokenizer.sha256 == tokenizer.sha256
        assert torch.equal(logits(back), logits(model))


def test_a_vocabulary_may_be_given_as_any_file_that_holds_one(files, byte_tokenizer, data, tmp_path):
    byte_tokenizer().save(tmp_path / "own.json")
    (tmp_path / "lone").mkdir()
    for file in files.glob("folder/tokenizer*.json"):               # a download without the weights
        shutil.copy(file, tmp_path / "lone")
    config = LMConfig(dim=16, n_layers=1, n_heads=2)
    for path in (*(files / name for name in ("folder", "model.gguf", "model.pth", "folder/tokenizer.json")),
                 tmp_path / "own.json", tmp_path / "lone/tokenizer.json"):
        model, tokenizer = new_model(config, path)
        assert tokenizer.sha256 == byte_tokenizer().sha256 and model.config.vocab_size == 272
    succeed("train_pretrain.py", **TINY, data_path=data / "pretrain_data.jsonl", max_steps=1, dim=32, n_layers=1,
            n_heads=2, out_dir=tmp_path, tokenizer=files / "model.gguf")
    assert load_model(tmp_path / "pretrain_32.pth")[0].config.vocab_size == 272


# -- distillation on texts -------------------------------------------------------------------------

def test_texts_teach_the_same_from_disk_as_from_memory(flags, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"Story {n}: the cat has {n} mice, and {'eats ' * (n % 7)}them."
                                for n in range(40)) + "\n")
    of_texts = flags | {"data_path": path, "val_path": None, "alpha": 0.5}
    printed = succeed("train_distillation.py", **of_texts, out_dir=tmp_path / "memory")
    assert "data: 38 samples" in printed and "validation: 2 of" in printed      # 5 % are held out
    succeed("scripts/cache_teacher.py", teacher=flags["teacher"], data_path=path, max_seq_len=128, dtype="float32",
            cache_dir=tmp_path / "cache")
    succeed("train_distillation.py", **of_texts | {"teacher": None, "teacher_cache": tmp_path / "cache"},
            out_dir=tmp_path / "disk")
    live, disk = (rows(tmp_path / f"{name}/full_dist_64.jsonl")[1:] for name in ("memory", "disk"))    # after step 0
    assert disk[0]["ce"] == live[0]["ce"] > 0 and live[-1]["val_kl"] > 0
    assert disk[0]["kd"] == pytest.approx(live[0]["kd"], rel=1e-2)              # cached in bf16
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "memory"), 2e-2)


def test_texts_among_conversations_are_refused(data, files, cache, byte_tokenizer):
    paths = [data / "sft_data.jsonl", files / "texts.jsonl"]
    with pytest.raises(ValueError, match=r"texts.jsonl, line 1: no known format .* only text is for train_pretrain\.py"):
        dataset_of(paths)(paths, byte_tokenizer())


def test_samples_longer_than_the_context_of_the_teacher_are_refused(flags, tiny, byte_tokenizer, tmp_path):
    save_model(tiny(**SIZES | {"max_seq_len": 64}), byte_tokenizer(), tmp_path / "short.pth")
    printed = complaint("train_distillation.py", **flags | {"teacher": tmp_path / "short.pth"}, out_dir=tmp_path)
    assert "samples of up to 128 tokens exceed the teacher's context length of 64: --max_seq_len 64" in printed


# -- scores of texts -------------------------------------------------------------------------------

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
            prompts, stop = [tokenizer.encode(text)[:16] for text in TEXTS[:4:2]], tokenizer.end_of_text
        else:
            asked = [json.loads(line)["conversations"][:-1] for line in test.read_text().splitlines()[:4:2]]
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
        assert a[1:4] == b[1:4] and a.right == b.right


def test_a_report_on_texts_alone_has_no_picture_and_names_none(files, tmp_path):
    scores(tmp_path, weights=files / "student.pth", data=files / "texts.jsonl", report=tmp_path / "report.md")
    assert "png" not in (tmp_path / "report.md").read_text() and not (tmp_path / "report.png").exists()


def test_two_models_of_one_name_are_not_shown_as_one(files, tmp_path):
    """It must not be the last one that is left in the table."""
    shutil.copytree(files, tmp_path / "other", dirs_exist_ok=True)
    both = [files / "student.pth", tmp_path / "other/student.pth"]
    with pytest.raises(SystemExit, match="student"):
        scores(tmp_path, weights=both, data=files / "texts.jsonl")
    assert len(scores(tmp_path, weights=[f"a={both[0]}", f"b={both[1]}"], data=files / "texts.jsonl")) == 2


# -- what a path holds -----------------------------------------------------------------------------

def test_a_path_that_is_no_model_says_what_it_is_and_what_to_give(files, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(files / "folder/model.safetensors", tmp_path)
    shutil.copy(files / "model.pth", tmp_path / "lone.pth")
    for name, reason in (("none.gguf", f"no weights at {tmp_path}/none.gguf. Is the path right?"),
                         ("empty", "is a folder without a config.json: an incomplete download?"),
                         ("model.safetensors", f"alone has no sizes and tokenizer; name its folder, {tmp_path}"),
                         ("lone.pth", f"no {tmp_path}/lone.json beside the weights")):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(reason)):
            load_model(tmp_path / name)


# -- memory ----------------------------------------------------------------------------------------

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
def test_loading_a_folder_takes_little_more_memory_than_the_model(files, byte_tokenizer, tmp_path):
    """9 million parameters, 36 MB in fp32, from bf16 in one file and in several. A small model is loaded first, with
    the modules that it imports."""
    model = build(LMConfig(dim=256, n_layers=9, n_heads=4, vocab_size=4096))
    hf.write(model, byte_tokenizer(), tmp_path / "one", torch.bfloat16)
    shutil.copytree(tmp_path / "one", tmp_path / "several")
    tensors, shards = load_file(tmp_path / "one/model.safetensors"), {}
    (tmp_path / "several/model.safetensors").unlink()
    for i, name in enumerate(tensors):
        shards.setdefault(f"model-{i // 12}.safetensors", []).append(name)
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / "several" / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (tmp_path / "several/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", PEAK, files / "folder", tmp_path / "one", tmp_path / "several"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    _, *times = [float(line) for line in ended.stdout.splitlines() if ":" not in line]     # else a line of the log
    assert len(times) == 2 and max(times) < 1.35, ended
