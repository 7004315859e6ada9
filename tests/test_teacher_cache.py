"""
教师缓存的规律：读出来的就是教师说的；怎么写都一样；不对的一律拒绝，并说出名字。
Laws of a teacher's outputs on disk: what is read is what it said, however it was written, and what does not fit is
refused by name.
"""

import json
import re
import runpy
import shlex
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataset.lm_dataset import SFTDataset
from distill.fused import Dense, fused_distillation_loss
from distill.cache import TeacherCache, lay_out
from runtime.files import file_sha256
from helpers_run import ROOT, complaint, run, start, succeed, wait_until
from interop.checkpoint import load_model

SCRIPT = "scripts/cache_teacher.py"


@pytest.fixture(scope="module")
def flags(models, data):
    return {"teacher": models / "teacher.pth", "data_path": [data / "sft_data.jsonl", data / "val.jsonl"],
            "dtype": "float32", "tokens_per_batch": 256}


@pytest.fixture(scope="module")
def written(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cache"
    return folder, succeed(SCRIPT, cache_dir=folder, **flags)


@pytest.fixture
def copied(written, tmp_path):
    """A cache that a test may spoil."""
    return shutil.copytree(written[0], tmp_path / "copied")


@pytest.fixture(scope="module")
def teacher(models):
    return load_model(models / "teacher.pth")


@pytest.fixture
def samples(flags, teacher, cache):
    """What training would read."""
    return SFTDataset(flags["data_path"], teacher[1], 128, log=lambda line: None)


@pytest.fixture
def lesson(samples, teacher):
    """A batch of twenty samples from short to long, what the live teacher says of it, and a student."""
    batch = samples.batch(np.argsort(samples.lengths, kind="stable")[::len(samples) // 20][:20])
    with torch.no_grad():
        live = teacher[0](batch.tokens, batch.lengths, at=batch.at)
    generator = torch.Generator().manual_seed(0)
    student = {"hidden": torch.randn(len(batch.at), 8, generator=generator),
               "head": torch.randn(len(teacher[0].output.weight), 8, generator=generator), "targets": batch.targets}
    return batch, live, student


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------- what is read was said so


def test_a_cached_state_is_the_live_one_rounded_to_bf16(written, samples, teacher):
    batch = samples.batch(np.argsort(samples.lengths, kind="stable"))          # all there are
    with torch.no_grad():
        live = teacher[0](batch.tokens, batch.lengths, at=batch.at, with_logits=False)
    said = TeacherCache(written[0]).look_up(batch.keys)
    assert said.states.dtype == torch.bfloat16 and said.states.shape == live.final.shape
    # 8 binary digits: off by half of the last one, 2^-9 of the value. Another batch of the same sample adds some 1e-6.
    assert ((said.states - live.final).abs() <= 2**-8 * live.final.abs() + 1e-5).all()


def test_the_head_is_the_teacher_s_own(written, teacher):
    assert torch.equal(TeacherCache(written[0]).head, teacher[0].output.weight)


def test_cached_states_teach_what_the_live_teacher_does(written, lesson, teacher):
    batch, live, student = lesson
    said = TeacherCache(written[0]).look_up(batch.keys)
    for temperature in (1.0, 3.0):
        from_disk = fused_distillation_loss(**student, taught=[said], temperature=temperature)
        from_memory = fused_distillation_loss(**student, taught=[Dense(live.final, teacher[0].output.weight)],
                                              temperature=temperature)
        assert from_disk.kd.item() == pytest.approx(from_memory.kd.item(), rel=1e-3)


def test_the_top_of_all_words_is_the_whole_distribution(flags, lesson, teacher, tmp_path):
    batch, live, student = lesson
    V = teacher[0].config.vocab_size
    succeed(SCRIPT, cache_dir=tmp_path / "all", top_k=V, temperature=2, **flags)
    said = TeacherCache(tmp_path / "all").look_up(batch.keys)
    from_disk = fused_distillation_loss(**student, taught=said, temperature=2.0)
    from_memory = fused_distillation_loss(**student, taught=[Dense(live.final, teacher[0].output.weight)],
                                          temperature=2.0)
    assert said.log_p.shape == (len(batch.at), V)
    assert from_disk.kd.item() == pytest.approx(from_memory.kd.item(), rel=1e-4)


def test_a_top_k_has_the_likeliest_words_at_its_temperature(flags, lesson, tmp_path):
    batch, live, _ = lesson
    succeed(SCRIPT, cache_dir=tmp_path / "top", top_k=5, temperature=2, **flags)
    cache = TeacherCache(tmp_path / "top")
    said, truth = cache.look_up(batch.keys), torch.log_softmax(live.logits / 2, dim=-1)
    assert (cache.top_k, cache.temperature, cache.head) == (5, 2.0, None)
    assert torch.allclose(said.log_p, truth.topk(5).values, atol=1e-4)
    assert torch.allclose(said.log_p, truth.gather(1, said.ids), atol=1e-4)     # and the ids are theirs
    assert (said.log_p.exp().sum(dim=-1) < 1).all()                             # the others have the rest
    assert sum(size for name, size in cache.about["bytes"].items() if "part" in name) == cache.about["positions"] * 5 * 6


def test_samples_are_found_in_any_order_and_by_any_subset(written, lesson):
    batch, cache = lesson[0], TeacherCache(written[0])
    alone = {key: cache.look_up([key]).states for key in batch.keys}
    for keys in (batch.keys, batch.keys[::-1], batch.keys[3:7:2], (batch.keys[5], batch.keys[0], batch.keys[5])):
        assert torch.equal(cache.look_up(keys).states, torch.cat([alone[key] for key in keys]))


def test_a_sample_the_teacher_has_not_read_is_not_found(written):
    with pytest.raises(ValueError, match="a sample of the batch is not in"):
        TeacherCache(written[0]).look_up([123])


# ------------------------------------------------------------------------------------------------- however it is written


def test_a_sample_that_comes_twice_is_kept_once():
    layout = lay_out(np.array([7, 3, 7], np.uint64), np.array([9, 4, 9]), np.array([5, 2, 5]), row_bytes=256)
    assert layout.samples.tolist() == [1, 0] and layout.n_rows.tolist() == [2, 5]       # from short to long


def test_parts_follow_from_the_samples_and_not_from_their_order():
    keys, lengths = np.arange(100, 200, dtype=np.uint64), np.arange(100) % 7 + 2
    once = lay_out(keys, lengths, lengths - 1, row_bytes=256)
    twice = lay_out(keys[::-1], lengths[::-1], lengths[::-1] - 1, row_bytes=256)
    assert once.keys.tolist() == twice.keys.tolist() and once.cuts.tolist() == twice.cuts.tolist()
    assert len(once.cuts) == 16 + 1


def test_two_processes_write_what_one_writes(written, flags, tmp_path):
    succeed(SCRIPT, cache_dir=tmp_path / "two", processes=2, **flags)
    assert contents(tmp_path / "two") == contents(written[0])


@pytest.mark.parametrize("how, code, processes", [(signal.SIGKILL, -9, 2), (signal.SIGINT, 130, 1)])
def test_a_run_that_is_ended_goes_on_with_what_is_missing(how, code, processes, written, flags, tmp_path):
    folder = tmp_path / "ended"
    under_way = start(SCRIPT, cache_dir=folder, **flags)
    wait_until(lambda: len(list(folder.glob("part-*.bin"))) >= 3)
    under_way.send(how)
    ended = under_way.wait()
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.bin")}
    assert ended.code == code and not (folder / "about.json").exists() and 3 <= len(done) < 16, ended.output
    if code == 130:
        assert f"{len(done)} of 16 parts are saved. Resume with: python {SCRIPT}" in ended.output
    with pytest.raises(ValueError, match=f"half written, {len(done) + 2} of 18 files"):
        TeacherCache(folder)

    succeed(SCRIPT, cache_dir=folder, processes=processes, **flags)
    assert contents(folder) == contents(written[0])
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}.items()    # not done again


def test_the_size_that_is_told_is_the_size_on_disk(written):
    folder, told = written
    positions, row, total, head = re.search(
        r"([\d,]+) positions x ([\d,]+) bytes = ([\d.]+) MB in 16 parts, and ([\d.]+) MB for the head", told).groups()
    parts = sum(path.stat().st_size for path in folder.glob("part-*.bin"))
    assert parts == int(positions.replace(",", "")) * int(row) and total == f"{parts / 1e6:.2f}"
    rest = sum(map(len, contents(folder).values())) - parts - 1e6 * float(head)
    assert rest < 30 * len(TeacherCache(folder)) + 10_000      # the index: 24 bytes a sample, and the files' own words


def test_what_does_not_fit_on_the_disk_is_not_begun(monkeypatch, tmp_path):
    script = runpy.run_path(str(ROOT / SCRIPT))
    layout = lay_out(np.arange(4, dtype=np.uint64), np.full(4, 9), np.full(4, 250), row_bytes=200)
    writer = script["CacheWriter"](tmp_path, {"dim": 100, "top_k": 0, "vocab_size": 7}, layout, torch.zeros(7, 100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ValueError, match=r"0.20 MB do not fit in the 0.10 MB .*--top_k K, which takes 6 K bytes"):
        script["check_room"](writer, writer.missing())


# -------------------------------------------------------------------------------------------------------- what is refused


def test_a_second_run_has_nothing_to_do(written, flags):
    before = {path: path.stat().st_mtime_ns for path in written[0].iterdir()}
    assert "is complete" in succeed(SCRIPT, cache_dir=written[0], **flags)
    assert "is complete" in succeed(SCRIPT, cache_dir=written[0], **flags | {"data_path": flags["data_path"][1:]})
    assert before == {path: path.stat().st_mtime_ns for path in written[0].iterdir()}


def test_a_folder_keeps_one_teacher_and_one_setting(copied, flags, models):
    before = contents(copied)
    for changed, told in (({"teacher": models / "student.pth"}, r"teacher was \S+teacher.pth \(\w+\), is \S+student.pth"),
                          ({"top_k": 4}, "--top_k was 0, is 4"),
                          ({"max_seq_len": 64}, "--max_seq_len was 128, is 64")):
        assert re.search(told, complaint(SCRIPT, cache_dir=copied, **flags | changed))
        assert contents(copied) == before
    succeed(SCRIPT, "--overwrite", cache_dir=copied, top_k=4, **flags)
    assert TeacherCache(copied).top_k == 4 and not (copied / "head.pth").exists()


@pytest.fixture
def checked(samples, flags):
    """What training checks a cache with."""
    return {"tokenizer_sha256": samples.tokenizer.sha256, "tokenizer_path": "mine.json", "max_seq_len": 128,
            "files": {path: file_sha256(path) for path in flags["data_path"]},
            "keys": samples.batch(np.arange(len(samples))).keys, "names": lambda i: f"sft_data.jsonl, sample {i + 1}"}


def test_the_samples_it_was_written_for_are_accepted(written, checked):
    TeacherCache(written[0]).check(**checked)


@pytest.mark.parametrize("changed, told", [
    ({"tokenizer_sha256": "0123456789"}, r"of \S+tokenizer-\w+.json \(\w+\), these are of mine.json \(01234567\)"),
    ({"max_seq_len": 64}, r"cut to 128 tokens, here they are cut to 64.* --max_seq_len 64 "),
    ({"files": {"dataset/x.jsonl": "0123"}}, r"dataset/x.jsonl has changed since \S+ was written, or was never in it"),
    ({"keys": (1, 2)}, r"sft_data.jsonl, sample 1: its tokens are not in \S+, nor are those of 1 others"),
], ids=["tokenizer", "max_seq_len", "file", "sample"])
def test_what_the_teacher_has_not_read_is_refused_by_name(changed, told, written, checked):
    with pytest.raises(ValueError, match=told) as refused:
        TeacherCache(written[0]).check(**checked | changed)
    assert re.search(r"anew.*: python scripts/cache_teacher.py --teacher .* --overwrite", str(refused.value))


def test_a_file_may_have_moved(written, checked):
    moved = {f"elsewhere/{path.name}": sha256 for path, sha256 in checked["files"].items()}
    TeacherCache(written[0]).check(**checked | {"files": moved})


@pytest.mark.parametrize("name", ["part-00003.bin", "index.npz", "head.pth"])
@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_damaged_file_is_named_with_the_command_that_repairs_it(name, damage, copied, written):
    file = copied / name
    file.write_bytes(file.read_bytes()[:-7]) if damage == "cut short" else file.unlink()
    with pytest.raises(ValueError, match=f"{name} (has [\\d,]+ bytes|is missing), it should have") as refused:
        TeacherCache(copied)
    command = shlex.split(str(refused.value).partition("anew: ")[2])
    assert run(*command[1:]).code == 0
    assert contents(copied).keys() == contents(written[0]).keys() and len(TeacherCache(copied)) > 0


def test_no_cache_is_an_error_that_says_how_to_write_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no teacher's outputs in .*python scripts/cache_teacher.py"):
        TeacherCache(tmp_path)


def test_a_cache_of_another_format_is_refused(copied):
    about = json.loads((copied / "about.json").read_text())
    (copied / "about.json").write_text(json.dumps(about | {"version": 0}))
    with pytest.raises(ValueError, match="has format 0, this program reads 1"):
        TeacherCache(copied)


@pytest.mark.parametrize("flag, value, told", [
    ("top_k", -1, "--top_k -1 must be 0 or more"), ("temperature", 2, "--temperature 2 must be above 0, and needs a --top_k"),
    ("top_k", 10**6, "--top_k 1000000 exceeds the vocabulary"), ("max_seq_len", 999, "exceeds the teacher's context length of 128"),
])
def test_a_flag_out_of_range_is_refused(flag, value, told, flags, tmp_path):
    assert told in complaint(SCRIPT, cache_dir=tmp_path, **flags | {flag: value})
