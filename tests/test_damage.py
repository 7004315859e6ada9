"""
损坏的规律：翻转一位、换掉一块、藏进代码，都不会悄悄通过；NaN 既不写出，也不读入。
Laws of damage: a flipped bit, an exchanged part and hidden code never pass silently; NaN is neither written nor read.
"""

import json
import os
import pickle
import random
import re
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers_run import ROOT, load, same, succeed
from dataset.lm_dataset import SFTDataset
from distill.cache import TeacherCache
from interop import gguf, hf
from interop.checkpoint import load_config, load_model, save_model
from model.config import LMConfig
from runtime.checkpoint import Progress, fingerprint, load_resume, load_verified, read_resume, save_resume
from runtime.files import read_rows


def flips(path, read, n: int) -> Counter:
    """What became of n copies of a file with one flipped bit each: refused, equal all the same, or silent."""
    whole, expected, rng, counts = path.read_bytes(), read(), random.Random(0), Counter()
    for _ in range(n):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            counts["equal" if same(read(), expected) else "silent"] += 1
        except ValueError:
            counts["refused"] += 1
    path.write_bytes(whole)
    print(path.name, dict(counts))
    return counts


def trainer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([1, 5, 2]), [3]).logits.sum().backward()
    optimizer.step()
    return {"model": model}, optimizer, torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def saved(tiny, byte_tokenizer, tmp_path):
    """A folder with a model in each of our formats."""
    model, tokenizer = tiny(vocab_size=288, max_seq_len=96), byte_tokenizer()
    save_model(model, tokenizer, tmp_path / "run.pth")
    hf.write(model, tokenizer, tmp_path / "hf")
    gguf.write(model, tokenizer, tmp_path / "run.gguf")
    save_resume(tmp_path / "run.resume", *trainer(model.train()), Progress({}, 3))
    return tmp_path


# ----------------------------------------------------------------------------------------------------------- flipped bits


@pytest.mark.parametrize("name", ["run.pth", "hf/model.safetensors", "run.gguf"])
def test_a_flipped_bit_in_weights_is_refused(name, saved):
    path = saved / name
    model = path.parent if name.startswith("hf") else path
    assert not flips(path, lambda: dict(load_model(model)[0].state_dict()), 60)["silent"]


def test_a_flipped_bit_in_a_resume_file_is_refused(saved):
    assert not flips(saved / "run.resume", lambda: read_resume(saved / "run.resume"), 60)["silent"]


@pytest.fixture(scope="module")
def caches(models, data, tmp_path_factory):
    """Caches of two teachers of the same sizes."""
    folder = tmp_path_factory.mktemp("caches")
    model, tokenizer = load_model(models / "student.pth")
    for name in ("one", "two"):
        save_model(model, tokenizer, folder / f"{name}.pth")
        succeed("scripts/cache_teacher.py", teacher=folder / f"{name}.pth", data_path=data / "val.jsonl",
                cache_dir=folder / name, dtype="float32")
        torch.nn.init.normal_(model.head)
    return folder


def contents(path):
    """All that a cache says."""
    cache = TeacherCache(path)
    return [cache.look_up(cache.keys).states, cache.head]


@pytest.mark.parametrize("name", ["part-00003.bin", "index.npz", "head.pth", "about.json"])
def test_a_flipped_bit_in_a_teacher_cache_is_refused(name, caches, tmp_path):
    copy = shutil.copytree(caches / "one", tmp_path / "cache")
    assert not flips(copy / name, lambda: contents(copy), 60)["silent"]


def test_an_exchanged_part_of_a_teacher_cache_is_refused(caches, tmp_path):
    for source, target in (("one/part-00001.bin", "part-00000.bin"), ("two/part-00002.bin", "part-00002.bin"),
                           ("two/head.pth", "head.pth")):
        copy = shutil.copytree(caches / "one", tmp_path / source.replace("/", "-"))
        assert (caches / source).stat().st_size == (copy / target).stat().st_size
        shutil.copy(caches / source, copy / target)
        with pytest.raises(ValueError, match=target):
            contents(copy)


# ------------------------------------------------------------------------------------------------------------------- code


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_no_file_that_is_read_runs_code(saved):
    mark = saved / "executed"
    pickle.loads(pickle.dumps(Bomb(mark)))
    mark.rmdir()                                # so it does where pickle is trusted
    for path in (saved / "run.resume", saved / "run.pth"):
        torch.save({"rank": 0, "rows": Bomb(mark)}, path)
    with pytest.raises(ValueError, match="no readable resume file"):
        read_resume(saved / "run.resume")
    with pytest.raises(ValueError, match="run.pth is .*no weight file"):
        load_model(saved / "run.pth")
    assert not mark.exists()


def test_nothing_here_unpickles_without_a_safe_switch():
    unsafe = re.compile(r"torch\.load\((?!.*weights_only=True)|pickle\.loads?\(|allow_pickle|checkpoint as dcp")
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    assert len(files) > 50
    assert not [f"{path}:{line}" for path in files for line in path.read_text().splitlines() if unsafe.search(line)]


# -------------------------------------------------------------------------------------------------------------------- NaN

WEIGHT = "layers.1.attention.wv.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value, saved, tiny, byte_tokenizer):
    theirs = "model.layers.1.self_attn.v_proj.weight"
    for name, state, write in ((WEIGHT, load(saved / "run.pth"), lambda state: torch.save(state, saved / "run.pth")),
                               (theirs, load_file(saved / "hf/model.safetensors"),
                                lambda state: save_file(state, saved / "hf/model.safetensors"))):
        state[name][3, 2] = value
        write(state)
    for path, name in ((saved / "run.pth", WEIGHT), (saved / "hf", theirs)):
        with pytest.raises(ValueError, match=f"tensor {name} holds NaN or infinity"):
            load_model(path)

    model = tiny(vocab_size=288, max_seq_len=96).train()
    run = trainer(model)
    torch.nn.init.constant_(model.get_parameter(WEIGHT), value)
    before = {path: path.read_bytes() for path in saved.rglob("run*")}
    with pytest.raises(ValueError, match=f"{WEIGHT} holds NaN or infinity; .*run.pth stays"):
        save_model(model, byte_tokenizer(), saved / "run.pth")
    with pytest.raises(ValueError, match=f"model.{WEIGHT} holds NaN or infinity after step 0; .*run.resume stays"):
        save_resume(saved / "run.resume", *run, Progress({}, 3))
    assert before == {path: path.read_bytes() for path in saved.rglob("run*")}

    state = load(saved / "run.resume")
    state["optimizer"]["state"][0]["exp_avg"][0] = value
    torch.save(state, saved / "run.resume")
    with pytest.raises(ValueError, match="no readable resume file"):
        load_resume(saved / "run.resume", *run, Progress({}, 3))


def test_large_numbers_in_half_precision_are_finite(saved):
    """Their sum is not: 60,000 + 60,000 exceeds fp16's 65,504."""
    state = {name: tensor.half() for name, tensor in load(saved / "run.pth").items()}
    state[WEIGHT].fill_(60_000)
    torch.save(state, saved / "run.pth")
    assert load_model(saved / "run.pth")[0].get_parameter(WEIGHT)[0, 0] == 60_000


# ---------------------------------------------------------------------------------------------- files that belong together


def test_weights_and_json_of_two_saves_never_pass_as_one_model(saved, tiny, byte_tokenizer):
    """A save writes the JSON, then the weights; a kill in between leaves the JSON of the one and the weights of the other."""
    weights = (saved / "run.pth").read_bytes()
    save_model(tiny(seed=1, vocab_size=288, max_seq_len=96), byte_tokenizer(), saved / "run.pth")
    (saved / "run.pth").write_bytes(weights)                # the same model a step before: the pair is consistent
    load_model(saved / "run.pth")
    save_model(tiny(vocab_size=288, max_seq_len=96, rope_theta=5e4), byte_tokenizer(), saved / "run.pth")
    (saved / "run.pth").write_bytes(weights)                # another model with tensors of the same names and shapes
    with pytest.raises(ValueError, match="run.json: .* is not what was saved with .*run.pth"):
        load_model(saved / "run.pth")
    torch.save(load(saved / "run.pth"), saved / "run.pth")  # a plain state dict, as old versions wrote
    load_model(saved / "run.pth")


def test_another_vocabulary_under_the_same_name_is_refused(saved):
    vocabulary = saved / json.loads((saved / "run.json").read_text())["tokenizer"]
    text = vocabulary.read_bytes()
    vocabulary.write_bytes(text.replace(b'"a"', b'"~"', 1).replace(b'[97, "~"]', b'[97, "a"]') + b" ")
    with pytest.raises(ValueError, match="tokenizer-.*.json, is not what was saved with .*run.pth"):
        load_model(saved / "run.pth")


def test_a_tokenizer_with_more_tokens_than_the_weights_have_rows_is_refused(saved, tiny, byte_tokenizer):
    save_model(tiny(vocab_size=288), byte_tokenizer(end_of_text=5_000), saved / "run.pth")
    with pytest.raises(ValueError, match="tokenizer has 5,001 tokens, its weights only 288 rows"):
        load_model(saved / "run.pth")


def test_a_tied_head_that_differs_is_refused(saved):
    file = saved / "hf/model.safetensors"
    state = load_file(file)
    for change in (0.0, 0.5):
        save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + change}, file)
        if not change:
            load_model(saved / "hf")
    with pytest.raises(ValueError, match="the head differs from the embeddings"):
        load_model(saved / "hf")


def test_of_a_single_file_and_an_index_that_is_read_which_transformers_reads(saved):
    transformers = pytest.importorskip("transformers")
    other = load_file(saved / "hf/model.safetensors")
    other["model.norm.weight"] += 1
    save_file(other, saved / "hf/other.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")}
    (saved / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    for _ in range(2):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(saved / "hf").model.norm.weight
        assert torch.equal(load_model(saved / "hf")[0].norm.weight, theirs)
        (saved / "hf/model.safetensors").unlink(missing_ok=True)        # then it is the index


@pytest.mark.parametrize("name", ["../run.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_names_files_in_its_folder_only(name, saved):
    shutil.copy(saved / "hf/model.safetensors", saved / "run.safetensors")
    (saved / "hf/sub").mkdir()
    (saved / "hf/model.safetensors").rename(saved / "hf/sub/model.safetensors")
    weights = dict.fromkeys(load_file(saved / "run.safetensors"), name)
    (saved / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(FileNotFoundError, match="hf/(run.safetensors|passwd|model.safetensors) is missing"):
        load_model(saved / "hf")


@pytest.mark.parametrize("sizes", [
    {"n_layers": 10**9}, {"norm_eps": float("nan")}, {"rope_theta": float("inf")}, {"dim": -16}, {"hidden_dim": -24},
    {"vocab_size": 0}, {"n_kv_heads": 0}, {"dim": 16.0}, {"n_layers": True}, {"head_dim": 2**40}, {"aux_loss_alpha": -1.0},
    {"dim": None}, {"n_layers": []}, {"norm_eps": None}, {"rope_scaling": {"factor": float("nan")}}, {"n_heads": "4"}], ids=str)
def test_absurd_sizes_are_refused_by_name(sizes, saved):
    about = json.loads((saved / "run.json").read_text())
    about["config"] |= sizes
    (saved / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"run.json.*{'factor' if 'rope_scaling' in sizes else [*sizes][0]}="):
        load_config(saved / "run.pth")
    with pytest.raises(ValueError):
        LMConfig(**sizes)


def test_adapters_of_themselves_and_of_adapters_are_refused(saved):
    about = json.loads((saved / "run.json").read_text())
    for name, base in (("a", "a"), ("b", "c"), ("c", "b")):
        torch.save(load(saved / "run.pth"), saved / f"{name}.pth")      # without a record of its .json
        lora = {"rank": 1, "alpha": 1, "targets": ["wq"], "base": f"{base}.pth", "base_sha256": ""}
        (saved / f"{name}.json").write_text(json.dumps(about | {"lora": lora}))
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name}.pth holds adapters to .*, which holds adapters itself"):
            load_model(saved / f"{name}.pth")


def test_the_fingerprint_of_weights_tells_any_change(saved):
    state, found = load(saved / "run.pth"), {fingerprint(saved / "run.pth")}
    for name in state:
        if not name.startswith("output"):
            torch.save(state | {name: state[name] + 1}, saved / "run.pth")
            found.add(fingerprint(saved / "run.pth"))
    assert len(found) == len(state) - ("output.weight" in state) + 1


# ------------------------------------------------------------------------------------------------------------ derived files


def test_a_damaged_token_cache_is_made_again(data, byte_tokenizer, cache):
    def read():
        tokens = SFTDataset([data / "val.jsonl"], byte_tokenizer(), 128, log=lambda line: None)
        return [torch.from_numpy(tokens.sample(i).astype("i4")) for i in range(len(tokens))]

    expected = read()
    for path in sorted(cache.iterdir()):
        whole = path.read_bytes()
        for damaged in (b"", whole[:-9], whole.replace(whole[40:48], b"\1" * 8), b"\0" * len(whole)):
            path.write_bytes(damaged)
            assert same(read(), expected)


def test_a_damaged_line_of_a_log_is_left_out_and_named(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n{"st\xff": 2}\n{"loss": 2}\n[]\n{"step": 3}\n{"step"')
    assert read_rows(log, "step") == [{"step": 1}, {"step": 3}]
    assert [f"line {n} is damaged" in capsys.readouterr().err or n for n in (2,)] == [True]


def test_verifying_costs_less_than_a_second_per_gigabyte(tmp_path):
    import time
    torch.save({"w": torch.ones(1 << 26)}, tmp_path / "w.pth")         # 256 MB
    start = time.process_time()
    load_verified(tmp_path / "w.pth")
    assert time.process_time() - start < 1.0
