"""
权重文件的规律：存下再读，分毫不差；坏文件、缺文件都指名道姓。
Laws of interop/checkpoint.py: what is saved comes back equal, and a broken or missing file is named.
"""

import dataclasses
import json
import re
import time
import zipfile

import pytest
import torch

from interop import native
from interop.checkpoint import build, load_config, load_model, load_teacher, new_model, save_model
from model.config import LMConfig
from model.moe import FeedForward
from model.qat import fake_quantize
from model.quantize import quantize
from runtime.processes import World

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
TOKENS = torch.tensor([1, 17, 113, 5, 2, 99])


@pytest.fixture
def saved(tiny, byte_tokenizer, tmp_path):
    """A model, its tokenizer, and the path of its weights in a folder of their own."""
    model, tokenizer = tiny(vocab_size=272), byte_tokenizer()
    path = tmp_path / "weights" / "full_sft_16.pth"
    save_model(model, tokenizer, path)
    return model, tokenizer, path


@pytest.mark.parametrize("sizes", [
    {}, {"tie_embeddings": False, "qk_norm": True, "attention_bias": True}, {"use_moe": True},
], ids=["plain", "untied, qk_norm, bias", "experts"])
def test_a_model_that_is_saved_and_loaded_gives_equal_logits(tiny, byte_tokenizer, tmp_path, sizes):
    model = tiny(vocab_size=272, **sizes)
    save_model(model, byte_tokenizer(), tmp_path / "model.pth")
    loaded, _ = load_model(tmp_path / "model.pth")
    assert loaded.config == model.config and not loaded.training
    assert loaded.n_parameters() == model.n_parameters()
    assert torch.equal(loaded(TOKENS, [2, 4]).logits, model(TOKENS, [2, 4]).logits)


def test_the_weights_are_a_plain_dict_of_fp32_tensors_whatever_the_model_was_in(saved):
    model, tokenizer, path = saved
    save_model(model.bfloat16(), tokenizer, path)
    state = torch.load(path, weights_only=True)
    assert set(state) == set(model.state_dict())
    assert all(weight.dtype == torch.float32 for weight in state.values())


def test_a_tied_matrix_is_stored_once(saved):
    model, _, path = saved
    assert path.stat().st_size < 4 * model.n_parameters() + 20_000     # another 272 x 16 x 4 would be 17,408 more
    state = torch.load(path, weights_only=True)
    assert state["output.weight"].data_ptr() == state["tok_embeddings.weight"].data_ptr()


def test_a_folder_of_weights_can_be_moved_as_it_is(saved):
    model, tokenizer, path = saved
    path.parent.rename(path.parent.with_name("elsewhere"))
    loaded, its_tokenizer = load_model(path.parent.with_name("elsewhere") / path.name)
    assert its_tokenizer.sha256 == tokenizer.sha256
    assert torch.equal(loaded(TOKENS, [6]).logits, model(TOKENS, [6]).logits)


def test_models_of_one_tokenizer_share_its_file_and_another_has_its_own(saved, byte_tokenizer):
    model, tokenizer, path = saved
    save_model(model, tokenizer, path.with_name("pretrain_16.pth"))
    assert len(list(path.parent.glob("tokenizer-*.json"))) == 1
    other = build(dataclasses.replace(model.config, vocab_size=5_001))
    save_model(other, byte_tokenizer(end_of_text=5_000), path.with_name("other_16.pth"))
    assert len(list(path.parent.glob("tokenizer-*.json"))) == 2
    assert load_model(path)[1].end_of_text == 0 and load_model(path.with_name("other_16.pth"))[1].end_of_text == 5_000


def test_no_half_written_file_stays_behind(saved):
    assert sorted(file.suffix for file in saved[2].parent.iterdir()) == [".json", ".json", ".pth"]


def test_a_new_model_takes_its_vocabulary_from_the_tokenizer_file(byte_tokenizer, tmp_path):
    byte_tokenizer().save(tmp_path / "bytes.json")
    model, tokenizer = new_model(LMConfig(dim=16, n_layers=1, n_heads=2), tmp_path / "bytes.json")
    assert model.config.vocab_size == tokenizer.vocab_size == 272
    assert model.config.n_layers == 1 and model.tok_embeddings.weight.shape == (272, 16)


# -- what can be wrong -----------------------------------------------------------------------------

def test_a_broken_file_is_refused_and_named(saved):
    model, _, path = saved
    whole = path.read_bytes()
    for left in (0.0, 0.001, 0.5, 0.99):
        path.write_bytes(whole[:int(left * len(whole))])
        with pytest.raises(ValueError, match=r"full_sft_16\.pth is cut short, or no weight file"):
            load_model(path)
    path.write_text("hello, this is no file of weights")
    with pytest.raises(ValueError, match=r"full_sft_16\.pth is .*no weight file"):
        load_model(path)
    torch.save(model, path)                             # a pickled model could run any code
    with pytest.raises(ValueError, match=r"full_sft_16\.pth is .*no weight file"):
        load_model(path)


def test_missing_weights_end_with_the_command_that_makes_them(tmp_path):
    for name, advice in (("pretrain_64.pth", "python train_pretrain.py"), ("full_sft_64.pth", "python train_sft.py"),
                         ("full_dist_64.pth", "python train_distillation.py"), ("mine.pth", r"Is the path right\?")):
        with pytest.raises(FileNotFoundError, match=rf"{name}.*{advice}"):
            load_model(tmp_path / name)


def test_weights_without_their_json_or_their_tokenizer_say_what_is_missing(saved):
    path = saved[2]
    vocabulary = next(path.parent.glob("tokenizer-*.json"))
    vocabulary.rename(path.parent / "hidden")
    with pytest.raises(FileNotFoundError, match=vocabulary.name):
        load_model(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="full_sft_16.json beside the weights"):
        load_config(path)


def change_sizes(path, **sizes):
    about = json.loads(path.with_suffix(".json").read_text())
    about["config"] |= sizes
    path.with_suffix(".json").write_text(json.dumps(about))


def test_sizes_that_are_not_those_of_the_weights_are_refused_and_named(saved):
    change_sizes(saved[2], hidden_dim=32)
    with pytest.raises(ValueError, match=r"full_sft_16\.json: .* is not what was saved with .*full_sft_16\.pth"):
        load_model(saved[2])
    torch.save(torch.load(saved[2], weights_only=True), saved[2])           # of an older version
    with pytest.raises(ValueError, match=r"full_sft_16\.pth: tensor layers\.0\.ffn\.w1\.weight has the shape \(24, 16\), but .* has \(32, 16\)"):
        load_model(saved[2])


def test_a_json_that_describes_no_model_is_named(saved):
    change_sizes(saved[2], n_hats=3)
    with pytest.raises(ValueError, match=r"full_sft_16\.json.*unknown model sizes.*n_hats"):
        load_config(saved[2])
    saved[2].with_suffix(".json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"full_sft_16\.json: Expecting value"):
        load_config(saved[2])


# -- the logits that are saved with the weights ----------------------------------------------------


def edited(self, x):
    """The FFN of model/moe.py as a student in class may leave it: ReLU instead of SiLU."""
    return self.w2(torch.relu(self.w1(x)) * self.w3(x))


CHANGED = r"full_sft_16.pth: these weights gave other logits when they were saved: was model/ edited\?"


def test_a_teacher_whose_model_was_edited_after_it_was_saved_is_refused_and_a_student_warned(saved, monkeypatch, capsys):
    *_, path = saved
    load_teacher(path, WORLD)
    monkeypatch.setattr(FeedForward, "forward", edited)
    with pytest.raises(ValueError, match=CHANGED):
        load_teacher(path, WORLD)
    capsys.readouterr()
    load_model(path)
    assert re.search(CHANGED, capsys.readouterr().out)


def test_an_edited_model_that_is_meant_is_saved_anew(saved, monkeypatch, capsys):
    *_, path = saved
    monkeypatch.setattr(FeedForward, "forward", edited)
    save_model(*load_model(path), path.with_name("new.pth"))
    load_teacher(path.with_name("new.pth"), WORLD)
    assert capsys.readouterr().out.count("gave other logits") == 1


@pytest.mark.parametrize("sizes", [{}, {"use_moe": True}, {"architecture": "gpt2", "n_kv_heads": None}, {"max_seq_len": 4},
                                   {"dropout": 0.5}], ids=["plain", "experts", "gpt2", "short", "dropout"])
def test_rounding_to_bf16_and_to_int8_changes_no_logits_that_matter(sizes, tiny, byte_tokenizer, tmp_path, capsys):
    model = tiny(vocab_size=272, **sizes) if "architecture" not in sizes else build(LMConfig(
        dim=16, n_layers=2, n_heads=2, vocab_size=272, max_seq_len=24, architecture="gpt2"))
    save_model(model.train(), byte_tokenizer(), tmp_path / "model.pth")
    assert model.training and native.changed_logits(model, tmp_path / "model.pth") is None
    load_model(tmp_path / "model.pth", dtype=torch.bfloat16)
    save_model(quantize(load_model(tmp_path / "model.pth")[0], "int8"), byte_tokenizer(), tmp_path / "int8.pth")
    load_teacher(tmp_path / "int8.pth", WORLD)
    assert "gave other logits" not in capsys.readouterr().out


def test_weights_without_logits_are_loaded_silently(saved, monkeypatch, capsys):
    """Of an earlier version; and what is saved of adapters, of quantisation-aware training and of sharded models, which
    compute with other weights than those in the file."""
    model, tokenizer, path = saved
    save_model(fake_quantize(model, "int8"), tokenizer, path)
    assert native.LOGITS not in zipfile.ZipFile(path).namelist()
    monkeypatch.setattr(FeedForward, "forward", edited)
    load_teacher(path, WORLD)
    assert "gave other logits" not in capsys.readouterr().out


def test_the_logits_cost_less_than_50_cpu_ms_in_a_small_model(saved):
    model, *_ = saved
    times = []
    for _ in range(5):
        start = time.process_time()
        native.logits_of(model, [1, 2, 3, 4, 5, 6, 7, 8])
        times.append(time.process_time() - start)
    assert min(times) < 0.05
