"""
教师缓存的规律：读出来的就是教师的输出；怎么写都一样；不匹配的一律拒绝，并说出差别。
Laws of cached teacher outputs: what is read is what the teacher computed, however it was written,
and what does not match is refused with the difference.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_run import ROOT, complaint, run, start, succeed, wait_until

from dataset import lm_dataset
from distill.cache import (CacheWriter, TeacherCache, lay_out, of_samples, pack, row_type, sample_ids,
                           unpack)
from distill.fused import MIN_LOG_P, Dense, TopK, fused_distillation_loss
from interop.checkpoint import load_model

SCRIPT = "scripts/cache_teacher.py"


@pytest.fixture(scope="module")
def flags(models, data):
    return {"teacher": models / "teacher.pth", "dtype": "float32", "tokens_per_batch": 256,
            "data_path": [data / "sft_data.jsonl", data / "val.jsonl"]}


@pytest.fixture(scope="module")
def written(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cache"
    return folder, succeed(SCRIPT, cache_dir=folder, **flags)


@pytest.fixture
def copied(written, tmp_path):
    """A cache that a test may damage."""
    return shutil.copytree(written[0], tmp_path / "copied")


@pytest.fixture(scope="module")
def teacher(models):
    return load_model(models / "teacher.pth")


@pytest.fixture(scope="module")
def samples(flags, teacher, tmp_path_factory):
    """What training would read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_dataset, "CACHE", tmp_path_factory.mktemp("tokens"))
        yield lm_dataset.SFTDataset(flags["data_path"], teacher[1], 128, log=lambda line: None)


@pytest.fixture(scope="module")
def lesson(samples, teacher):
    """Twenty samples from short to long, the live teacher's outputs, and a student."""
    order = np.argsort(samples.lengths, kind="stable")
    batch = samples.batch(order[::len(samples) // 20][:20])
    with torch.no_grad():
        live = teacher[0](batch.tokens, batch.lengths, at=batch.at)
    generator = torch.Generator().manual_seed(0)
    student = {"hidden": torch.randn(len(batch.at), 8, generator=generator),
               "head": torch.randn(len(teacher[0].head), 8, generator=generator),
               "targets": batch.targets}
    return batch, live, student


@pytest.fixture(scope="module")
def writer_for(written, samples, teacher):
    """writer_for(folder, top_k=4) -> a CacheWriter of what the script wrote, with changes."""
    about = json.loads((written[0] / "about.json").read_text())
    for name in ("bytes", "crc32", "samples_sha256", "samples", "positions"):
        del about[name]
    keys = np.array(samples.batch(np.arange(len(samples))).keys, np.uint64)

    def writer(folder, **changed):
        row_bytes = row_type(about | changed).itemsize
        layout = lay_out(keys, samples.lengths, samples.n_targets, row_bytes)
        return CacheWriter(folder, about | changed, layout, teacher[0].head.detach())

    return writer


def write(writer, samples, model, parts):
    writer.begin()
    for part in parts:
        batch = samples.batch(writer.layout.samples[writer.layout.part(part)])
        with torch.no_grad():
            states = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
        writer.write(part, pack(writer.about, states, writer.head))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# -- what is read is what the teacher computed ---------------------------------------------------

def test_a_cached_state_is_the_live_one_rounded_to_bf16(written, samples, teacher):
    batch = samples.batch(np.argsort(samples.lengths, kind="stable"))          # all of them
    with torch.no_grad():
        live = teacher[0](batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
    cache = TeacherCache(written[0])
    states = cache.look_up(batch.keys).states
    assert states.dtype == torch.bfloat16 and states.shape == live.shape
    # 8 bits: at most half of the last one off, 2^-9. Another batch composition adds some 1e-6.
    assert ((states - live).abs() <= 2**-8 * live.abs() + 1e-5).all()
    assert torch.equal(cache.head, teacher[0].head)


def test_cached_states_give_the_loss_of_the_live_teacher(written, lesson, teacher):
    batch, live, student = lesson
    cached = TeacherCache(written[0]).look_up(batch.keys)
    for temperature in (1.0, 3.0):
        kd = [fused_distillation_loss(**student, teacher=[one], temperature=temperature).kd.item()
              for one in (cached, Dense(live.final, teacher[0].head))]
        assert kd[0] == pytest.approx(kd[1], rel=1e-3)


def test_the_top_v_tokens_are_the_whole_distribution(writer_for, samples, lesson, teacher,
                                                     tmp_path):
    (batch, live, student), V = lesson, teacher[0].config.vocab_size
    writer = writer_for(tmp_path, top_k=V, temperature=2.0)
    write(writer, samples, teacher[0], writer.prepare())
    cached = TeacherCache(tmp_path).look_up(batch.keys)
    assert cached.log_p.shape == (len(batch.at), V)
    kd = [fused_distillation_loss(**student, teacher=one, temperature=2.0).kd.item()
          for one in (cached, [Dense(live.final, teacher[0].head)])]
    assert kd[0] == pytest.approx(kd[1], rel=1e-4)


def test_a_top_k_has_the_most_likely_tokens_at_its_temperature(flags, lesson, tmp_path):
    batch, live, _ = lesson
    succeed(SCRIPT, cache_dir=tmp_path / "top", top_k=5, temperature=2, **flags)
    cache = TeacherCache(tmp_path / "top")
    cached, truth = cache.look_up(batch.keys), torch.log_softmax(live.logits / 2, dim=-1)
    assert (cache.sparse, cache.temperature, cache.head) == ("top 5 tokens", 2.0, None)
    assert torch.allclose(cached.log_p, truth.topk(5).values, atol=1e-4)
    assert torch.allclose(cached.log_p, truth.gather(1, cached.ids), atol=1e-4)
    tail = truth.sort(descending=True).values[:, 5:].logsumexp(dim=-1)
    assert torch.allclose(cached.tail, tail, atol=1e-4)
    n_bytes = sum(size for name, size in cache.about["bytes"].items() if "part" in name)
    assert n_bytes == cache.about["positions"] * (5 * 6 + 4) + 16 * 4       # a checksum in each part


def test_samples_are_found_in_any_order_and_by_any_subset(written, lesson):
    keys, cache = lesson[0].keys, TeacherCache(written[0])
    alone = {key: cache.look_up([key]).states for key in keys}
    for some in (keys, keys[::-1], keys[3:7:2], (keys[5], keys[0], keys[5])):
        assert torch.equal(cache.look_up(some).states, torch.cat([alone[key] for key in some]))
    with pytest.raises(ValueError, match="a sample of the batch is not in"):
        cache.look_up([123])


# -- samples -------------------------------------------------------------------------------------

def test_the_mean_gradient_of_samples_is_that_of_the_whole_distribution_and_of_a_top_k_it_is_not():
    """20,000 caches of one position, 40 tokens; the student is another random model."""
    V, D, n, T = 40, 6, 20_000, 2.0
    state, teacher_head, hidden, head = (torch.randn(*size, generator=torch.Generator().manual_seed(seed))
                                         for seed, size in enumerate([(1, D), (V, D), (1, D), (V, D)]))
    about = {"top_k": 0, "sampled": 0, "vocab_size": V, "temperature": T}

    def gradients(teacher, n):
        """Of n students that are the same, one a row."""
        own = hidden.repeat(n, 1).requires_grad_()
        fused_distillation_loss(own, head, torch.zeros(n, dtype=torch.long), teacher,
                                temperature=T).loss.backward()
        return own.grad                                                                 # (n, D)

    exact = gradients([Dense(state, teacher_head)], 1)[0]
    rows = pack(about | {"sampled": 4}, state.repeat(n, 1), teacher_head, np.random.default_rng(0))
    sampled = gradients(unpack(rows, "cpu"), n)
    error = sampled.std(dim=0) / n ** 0.5
    assert (error < 0.03).all() and ((sampled.mean(dim=0) - exact).abs() < 4 * error).all()

    top = unpack(pack(about | {"top_k": 4}, state, teacher_head), "cpu")
    without = top._replace(log_p=top.log_p.log_softmax(dim=-1), tail=torch.tensor([-torch.inf]))
    for biased in (top, without):               # with one bucket for the tail; renormalised
        assert ((gradients(biased, 1)[0] - exact).abs() > 10 * error).any()


def test_a_token_that_is_sampled_twice_counts_twice():
    # Of four samples token 3 is three, so KL = .75 ln(.75 / .1) + .25 ln(.25 / .2); q - p.
    q = torch.tensor([[0.2, 0.4, 0.3, 0.1]])
    hidden, found = q.log().requires_grad_(), of_samples(torch.tensor([[0, 3, 3, 3]]))
    fused = fused_distillation_loss(hidden, torch.eye(4), torch.tensor([0]), found)
    fused.loss.backward()
    assert fused.kd.item() == pytest.approx(0.75 * np.log(7.5) + 0.25 * np.log(1.25), rel=1e-5)
    assert torch.allclose(hidden.grad, torch.tensor([[-0.05, 0.4, 0.3, -0.65]]), atol=1e-5)
    again = TopK(torch.tensor([[0, 3]]), torch.tensor([[0.25, 0.75]]).log(), torch.tensor([MIN_LOG_P]))
    assert fused_distillation_loss(q.log(), torch.eye(4), torch.tensor([0]), again).kd.item() == (
        pytest.approx(fused.kd.item(), rel=1e-6))


def test_rare_tokens_are_sampled_as_often_as_they_should_be():
    """1e-8 each, a hundredth together: sums in fp32 would lose them behind the first token."""
    logits = torch.full((1, 1_000_001), 1e-8).log()
    logits[0, 0] = np.log(0.99)
    ids = sample_ids(logits, 100_000, np.random.default_rng(0))
    assert (ids > 0).float().mean().item() == pytest.approx(0.01, abs=0.002)
    assert (ids.diff() >= 0).all() and ids.max() > 900_000


def test_samples_take_two_bytes_each_and_are_the_same_however_they_are_written(flags, lesson, tmp_path):
    one, resumed, batches = (tmp_path / name for name in ("one", "resumed", "batches"))
    sampled = flags | {"sampled": 12, "temperature": 2}
    said = succeed(SCRIPT, cache_dir=one, **sampled)
    cache = TeacherCache(one)
    assert "positions x 24 bytes" in said and cache.head is None and not (one / "head.pth").exists()
    assert f"its 12 sampled tokens at T=2 in {one}" in cache.described()
    n_bytes = sum(size for name, size in cache.about["bytes"].items() if "part" in name)
    assert n_bytes == cache.about["positions"] * 24 + 16 * 4

    shutil.copytree(one, resumed)
    for part in (0, 3, 7, 15):
        (resumed / f"part-{part:05d}.bin").unlink()
    succeed(SCRIPT, cache_dir=resumed, processes=2, **sampled)
    succeed(SCRIPT, cache_dir=batches, **sampled | {"tokens_per_batch": 1000})
    assert contents(one) == contents(resumed) == contents(batches)

    batch, live, student = lesson
    found, p = cache.look_up(batch.keys), torch.softmax(live.logits / 2, dim=-1)
    shares = torch.zeros_like(p).scatter_add(1, found.ids, found.log_p.exp())
    assert torch.allclose(shares.sum(dim=1), torch.ones(len(p)))
    n_positions = len(p)                                    # each token's own error is sqrt(p / 12 S)
    assert ((shares - p).mean(dim=0).abs() < 5 * (p.mean(dim=0) / 12 / n_positions).sqrt() + 0.01).all()


# -- however it is written -----------------------------------------------------------------------

def test_a_sample_that_occurs_twice_is_stored_once():
    layout = lay_out(np.array([7, 3, 7], np.uint64), np.array([9, 4, 9]), np.array([5, 2, 5]), 256)
    assert layout.samples.tolist() == [1, 0] and layout.n_rows.tolist() == [2, 5]   # short to long


def test_parts_follow_from_the_samples_and_not_from_their_order():
    keys, lengths = np.arange(100, 200, dtype=np.uint64), np.arange(100) % 7 + 2
    one = lay_out(keys, lengths, lengths - 1, row_bytes=256)
    other = lay_out(keys[::-1], lengths[::-1], lengths[::-1] - 1, row_bytes=256)
    assert one.keys.tolist() == other.keys.tolist() and one.cuts.tolist() == other.cuts.tolist()
    assert len(one.cuts) == 16 + 1


def test_an_interrupted_run_resumes_in_two_processes_with_the_same_bytes(written, flags, tmp_path):
    folder = tmp_path / "ended"
    for _ in range(5):              # all 16 parts take a third of a second: some runs end before
        shutil.rmtree(folder, ignore_errors=True)
        under_way = start(SCRIPT, cache_dir=folder, **flags)
        wait_until(lambda: list(folder.glob("part-*.bin")))
        under_way.send(signal.SIGINT)
        if (ended := under_way.wait()).code:
            break
    done = {name: time for name, time in times(folder).items() if name.startswith("part-")}
    assert ended.code == 130 and 1 <= len(done) < 16, ended.output
    assert re.search(rf"{len(done)} of 16 parts.*: python {SCRIPT}", ended.output)
    with pytest.raises(ValueError, match=f"incomplete, {len(done) + 2} of 18 files; .*Complete it: py"):
        TeacherCache(folder)

    succeed(SCRIPT, cache_dir=folder, processes=2, **flags)
    assert contents(folder) == contents(written[0])
    assert done.items() <= times(folder).items()                        # none was written again


def test_a_killed_run_leaves_its_parts_to_the_next(writer_for, samples, teacher, tmp_path, written):
    killed = writer_for(tmp_path)
    write(killed, samples, teacher[0], killed.prepare()[:3])
    (tmp_path / "part-00003.bin.77.tmp").write_bytes(b"cut")
    os.utime(tmp_path / "part-00003.bin.77.tmp", (1, 1))
    with pytest.raises(ValueError, match="incomplete, 5 of 18 files"):
        TeacherCache(tmp_path)
    resumed = writer_for(tmp_path)
    assert resumed.prepare() == list(range(3, 16))
    write(resumed, samples, teacher[0], range(3, 16))
    cache = TeacherCache(tmp_path)
    assert contents(tmp_path).keys() == contents(written[0]).keys()
    assert np.array_equal(cache.keys, TeacherCache(written[0]).keys)


def test_the_printed_size_is_the_size_on_disk(written):
    folder, printed = written
    positions, row, total, head = re.search(
        r"([\d,]+) positions x ([\d,]+) bytes = ([\d.]+) MB in 16 parts, and ([\d.]+) MB for",
        printed).groups()
    parts = sum(path.stat().st_size for path in folder.glob("part-*.bin"))
    assert parts - 16 * 4 == int(positions.replace(",", "")) * int(row) and total == f"{parts / 1e6:.2f}"
    rest = sum(map(len, contents(folder).values())) - parts - 1e6 * float(head)
    assert rest < 30 * len(TeacherCache(folder).keys) + 10_000          # index: 24 bytes a sample


def test_a_cache_that_does_not_fit_on_the_disk_is_not_begun(monkeypatch, tmp_path):
    script = runpy.run_path(str(ROOT / SCRIPT))
    layout = lay_out(np.arange(4, dtype=np.uint64), np.full(4, 9), np.full(4, 250), row_bytes=200)
    about = {"dim": 100, "top_k": 0, "sampled": 0, "vocab_size": 7}
    writer = CacheWriter(tmp_path, about, layout, torch.zeros(7, 100))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ValueError, match=r"0.20 MB .* 0.10 MB .*--top_k or --sampled"):
        script["check_room"](writer, writer.missing())


# -- what is refused -----------------------------------------------------------------------------

def test_a_second_run_has_nothing_to_do(written, flags):
    before = times(written[0])
    assert "is complete" in succeed(SCRIPT, cache_dir=written[0], **flags)
    assert before == times(written[0])


def test_a_cache_from_before_the_config_had_all_its_fields_is_completed(writer_for, samples, teacher, flags, tmp_path):
    """The fields since then have their defaults; a part's checksum covers those on record."""
    sizes = vars(teacher[0].config).copy()
    for name in ("rotary_dim", "nope_layers", "activation"):
        del sizes[name]
    older = writer_for(tmp_path, teacher_sizes=sizes)
    write(older, samples, teacher[0], older.prepare()[:3])
    succeed(SCRIPT, cache_dir=tmp_path, **flags)
    cache = TeacherCache(tmp_path)
    assert cache.about["teacher_sizes"] == sizes and sum(len(cache.part(i)) for i in range(16)) == len(cache.look_up(cache.keys).states)


@pytest.mark.parametrize("changed, message", [
    ({"teacher": "other.pth", "teacher_sha256": "0" * 64},
     r"teacher was \S+teacher.pth \(\w{8}\), is other.pth \(00000000\). Give another --cache_dir"),
    ({"top_k": 4}, "--top_k was 0, is 4"),
    ({"sampled": 4}, "--sampled was 0, is 4"),
    ({"max_seq_len": 64, "temperature": 2.0}, "--max_seq_len was 128, is 64; --temp"),
    ({"version": 9}, "holds another cache: format was 2, is 9. Give"),
])
def test_a_folder_keeps_one_teacher_and_one_setting(copied, writer_for, changed, message):
    before, writer = contents(copied), writer_for(copied, **changed)
    with pytest.raises(ValueError, match=message):
        writer.prepare()
    assert contents(copied) == before
    assert writer.prepare(overwrite=True) == list(range(len(writer.part_bytes)))
    assert list(copied.iterdir()) == []


def test_the_samples_it_was_written_for_are_accepted_wherever_their_file_is(written, samples):
    cache, moved = TeacherCache(written[0]), samples.view(np.arange(5, len(samples)))
    moved.paths = ["elsewhere.jsonl"]
    cache.check(samples)
    cache.check(moved)


def test_a_sample_that_the_teacher_has_not_read_is_refused_by_name(written, samples):
    cache, other = TeacherCache(written[0]), samples.view(np.arange(len(samples)))
    key = other.batch(np.array([3])).keys[0]
    cache.keys = np.delete(cache.keys, np.searchsorted(cache.keys, key))
    other.paths, other.max_seq_len = ["more.jsonl"], 64
    with pytest.raises(ValueError, match=rf"lacks \d+ of {len(samples):,} samples, such as number \d+ of more.jsonl .* 64.. It is of .* 128.. "
                                         r"Write it again: python scripts/cache_teacher.py --teacher .* --max_seq_len 64 .* more.jsonl .*--overwrite"):
        cache.check(other)


def test_damaged_files_are_named_with_the_command_that_repairs_them(copied, written):
    for name in ("part-00003.bin", "index.npz", "head.pth"):
        whole = (copied / name).read_bytes()
        for damage in (lambda: (copied / name).write_bytes(whole[:-7]), (copied / name).unlink):
            damage()
            with pytest.raises(ValueError, match=f"missing or damaged: .*{name}.*Comp") as refused:
                TeacherCache(copied)
    command = shlex.split(str(refused.value).partition("Complete it: ")[2])
    assert run(*command[1:]).code == 0
    assert contents(copied).keys() == contents(written[0]).keys()
    TeacherCache(copied)


def test_no_cache_and_another_format_are_errors_with_the_command(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match="no cached teacher outputs.*scripts/cache_t"):
        TeacherCache(tmp_path / "none")
    about = json.loads((copied / "about.json").read_text())
    (copied / "about.json").write_text(json.dumps(about | {"version": 0}))
    with pytest.raises(ValueError, match="has format 0, this program reads 2"):
        TeacherCache(copied)


def test_a_cache_of_before_there_were_samples_is_still_read(copied):
    about = json.loads((copied / "about.json").read_text())
    assert about.pop("sampled") == 0
    (copied / "about.json").write_text(json.dumps(about))
    assert len(TeacherCache(copied).part(0))


@pytest.mark.parametrize("flag, value, message", [
    ("top_k", -1, "--top_k -1 must be 0 or more"),
    ("temperature", 2, "--temperature 2 needs a --top_k or --sampled"),
    ("sampled", -1, "--sampled -1 must be 0 or more"),
    ("top_k", 10**6, "--top_k 1000000 "),
    ("max_seq_len", 999, "--max_seq_len 999 "),
])
def test_a_flag_out_of_range_is_refused(flag, value, message, flags, tmp_path):
    assert message in complaint(SCRIPT, cache_dir=tmp_path, **flags | {flag: value})


@pytest.mark.parametrize("other", [{"top_k": 4}, {"teacher": None, "teacher_url": "http://x/v1", "teacher_model": "m"}],
                         ids=["top_k", "teacher_url"])
def test_samples_need_a_teacher_here_and_no_top_k(other, flags, tmp_path):
    message = complaint(SCRIPT, cache_dir=tmp_path, **flags | {"sampled": 4} | other)
    assert "--sampled needs a --teacher and no --top_k" in message
