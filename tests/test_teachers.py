"""
教师们的规律：几个教师如一个，不同的分词按文字对齐，多出的词表列不算。
Laws of who teaches: several as one, tokens of two vocabularies matched by their text, padded columns left out, and what
the log shows of it.
"""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch

from dataset.lm_dataset import SFTDataset, packed_batch, same_text
from distill.teachers import StatesInMemory
from helpers_run import TINY, complaint, first_gradients, pad, rows, succeed
from interop.checkpoint import load_model, save_model
from model.config import LMConfig
from model.tokenizer import Chat, Tokenizer
from model.transformer import Transformer
from runtime.processes import World

SCRIPT, FILE = "train_distillation.py", "full_dist_32"


@pytest.fixture
def flags(data, models, tmp_path):
    return {**TINY, "size": "tiny", "data_path": data / "sft_data.jsonl", "val_path": "none", "max_steps": 1,
            "log_interval": 1, "student": models / "student.pth",
            "teacher": models / "teacher.pth", "out_dir": tmp_path / "out"}


@pytest.fixture(scope="module")
def byte_teacher(byte_tokenizer, tmp_path_factory):
    """A teacher whose tokens are bytes."""
    torch.manual_seed(1)
    path, tokenizer = tmp_path_factory.mktemp("bytes") / "bytes.pth", byte_tokenizer()
    model = Transformer(LMConfig(dim=16, n_layers=1, n_heads=2, max_seq_len=512, vocab_size=tokenizer.vocab_size))
    save_model(model, tokenizer, path)
    return path


def learned(folder) -> list[torch.Tensor]:
    """The gradients. (The weights themselves would not do: Adam makes a step of full length out of a rounding error.)"""
    return first_gradients(next(folder.glob(f"{FILE}*.resume")))


def close(a, b, tolerance=1e-4) -> bool:
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in zip(a, b, strict=True))


# -- one loss in two forms -------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [{}, {"alpha": 0.5, "temperature": 2.0}, {"divergence": "jsd", "beta": 0.1},
                                  {"divergence": "akl"}], ids=str)
def test_the_plain_and_the_fused_loss_teach_the_same(more, flags, tmp_path):
    for form in ("fused", "plain"):
        succeed(SCRIPT, **flags | more | {"plain_loss": form == "plain" or None, "out_dir": tmp_path / form})
    assert close(learned(tmp_path / "fused"), learned(tmp_path / "plain"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_row_shows_each_term_of_the_loss_and_a_validation_the_true_kl(processes, flags, data, tmp_path):
    terms = {"alpha": 0.5, "temperature": 2.0, "feature_weight": 1.0, "attention_weight": 1.0, "relation_heads": 2,
             "contrastive_weight": 1.0, "processes": processes}
    succeed(SCRIPT, **flags | terms | {"val_path": data / "val.jsonl"})
    start, row, validation = rows(tmp_path / f"out/{FILE}.jsonl")
    assert start["step"] == 0 and start["val_teacher_ce"] == validation["val_teacher_ce"]
    for term in ("ce", "kd", "feature", "attention", "contrastive"):
        assert row[term] > 0
    assert validation["val_kl"] > 0 and 0 < validation["val_entropy"] < np.log(1024) and 0 <= validation["val_agreement"] <= 1
    whole = 0.5 * row["ce"] + 0.5 * row["kd"] + row["feature"] + row["attention"] + row["contrastive"]
    assert row["loss"] == pytest.approx(whole, rel=1e-5)


def test_two_processes_validate_like_one(flags, data, tmp_path):
    found = []
    for processes in (1, 2):
        succeed(SCRIPT, **flags | {"val_path": data / "val.jsonl", "learning_rate": 0.0, "out_dir": tmp_path / str(processes),
                                   "batch_size": 8 // processes}, processes=processes)
        found.append({name: value for name, value in rows(tmp_path / f"{processes}/{FILE}.jsonl")[-1].items() if "val_" in name})
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0].keys() >= {
        "val_overlap", "val_acceptance", "val_ece", "val_teacher_ece", "val_teacher_accuracy", "val_entropy", "val_student_entropy"}


# -- several teachers ------------------------------------------------------------------------------------------

def test_a_teacher_named_twice_teaches_like_once(flags, models, tmp_path):
    succeed(SCRIPT, **flags)
    teacher = flags["teacher"]
    succeed(SCRIPT, **flags | {"teacher": [teacher, f"{teacher}=3"], "out_dir": tmp_path / "twice"})
    assert close(learned(tmp_path / "twice"), learned(tmp_path / "out"))


def test_of_two_teachers_the_heavier_one_counts_more(flags, models, tmp_path):
    moe = models / "teacher_moe.pth"
    for name, teachers in (("one", [moe]), ("both", [f"{flags['teacher']}=1", f"{moe}=1"]),
                           ("nearly", [f"{flags['teacher']}=1e-7", f"{moe}=1"])):
        said = succeed(SCRIPT, **flags | {"teacher": teachers, "out_dir": tmp_path / name})
        if name == "both":
            assert "0.5 x (teacher 48 x 4) + 0.5 x (teacher 48 x 4, 4 experts) -> student 32 x 2" in said
    assert close(learned(tmp_path / "nearly"), learned(tmp_path / "one"), 1e-3)
    assert not close(learned(tmp_path / "both"), learned(tmp_path / "one"), 1e-2)


def test_the_command_line_overrides_the_teachers_of_a_config(flags, models, tmp_path):
    config = tmp_path / "two.yaml"
    config.write_text(f"teacher: [{models}/nowhere.pth, {models}/teacher_moe.pth]\n")
    assert "no weights at" in complaint(SCRIPT, **flags | {"teacher": None}, config=config)
    assert "\nteacher 48 x 4 ->" in succeed(SCRIPT, **flags, config=config)


# -- a teacher that reads once ---------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [{"processes": 2, "batch_size": 4}, {"teachers": ["teacher", "student"]},
                                  {"teachers": ["student"], "lora_rank": 2},            # the student without its adapters
                                  {"teacher_data_path": "data_path", "val_path": "none"}], ids=str)
def test_a_teacher_read_once_teaches_like_one_that_reads_in_each_epoch(more, flags, data, tmp_path):
    """Three epochs of 16 rows, one of them twice and one of them in the validation data."""
    few = flags["data_path"].read_text().splitlines(keepends=True)[:15]
    (tmp_path / "few.jsonl").write_text("".join(few + few[:1]))
    (tmp_path / "val.jsonl").write_text("".join(few[3:4] + (data / "val.jsonl").read_text().splitlines(keepends=True)[:5]))
    flags |= {"data_path": tmp_path / "few.jsonl", "val_path": tmp_path / "val.jsonl", "max_steps": 6}
    flags |= {name: flags[value] if value in flags else value for name, value in more.items() if name != "teachers"}
    flags["teacher"] = [flags[name] for name in more.get("teachers", ["teacher"])]
    assert "reads a sample once" in succeed(SCRIPT, **flags)
    said = succeed(SCRIPT, **flags | {"teacher_states_gb": 0, "out_dir": tmp_path / "asked"})
    assert "reads a sample in each epoch" in said
    assert close(learned(tmp_path / "out"), learned(tmp_path / "asked"))
    kept, asked = (rows(next((tmp_path / name).glob("*.jsonl")))[-1] for name in ("out", "asked"))
    assert kept == pytest.approx(asked, rel=1e-3)


def test_states_in_memory_are_those_of_each_sample_in_any_batch(flags, models, cache):
    data = SFTDataset([flags["data_path"]], Tokenizer.load(), 128, log=str)
    model, _ = load_model(flags["teacher"])
    few, world = data.view(np.array([5, 2, 9, 2, 7])), World(0, 1, torch.device("cpu"), torch.float32)
    states = StatesInMemory(model, [few, data.view(np.array([9, 0]))], world)
    assert len(states.states) == sum(data.n_targets[[5, 2, 9, 7, 0]])       # a sample that comes twice takes no more
    batch = data.batch(np.array([0, 9, 5]))
    with torch.no_grad():
        truth = model(batch.tokens, batch.lengths, at=batch.at, with_logits=False).final
    torch.testing.assert_close(states.look_up(batch.keys).states, truth)


# -- a teacher on disk -----------------------------------------------------------------------------------------

def cached(flags, folder, *, data_path=None, **more):
    succeed("scripts/cache_teacher.py", teacher=flags["teacher"], data_path=data_path or flags["data_path"],
            max_seq_len=128, dtype="float32", cache_dir=folder, **more)
    return flags | {"teacher": None, "teacher_cache": folder}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_teacher_on_disk_teaches_like_the_one_in_memory(processes, flags, data, tmp_path):
    both = [flags["data_path"], data / "val.jsonl"]
    flags |= {"val_path": both[1], "alpha": 0.5, "temperature": 2.0}
    succeed(SCRIPT, **flags)
    on_disk = cached(flags, tmp_path / "cache", data_path=both) | {"out_dir": tmp_path / "disk"}
    said = succeed(SCRIPT, **on_disk | {"batch_size": 8 // processes}, processes=processes)
    assert "teacher 48 x 4" not in said                                         # it was never loaded
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 1e-2)   # its states are bf16
    live, disk = (rows(tmp_path / f"{name}/{FILE}.jsonl")[-1] for name in ("out", "disk"))
    assert disk["val_kl"] == pytest.approx(live["val_kl"], rel=1e-2)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_all_words_of_a_teacher_on_disk_are_the_teacher(divergence, flags, tmp_path):
    flags |= {"temperature": 2.0, "divergence": divergence}
    succeed(SCRIPT, **flags)
    succeed(SCRIPT, **cached(flags, tmp_path / "top", top_k=1024, temperature=2.0) | {"out_dir": tmp_path / "disk"})
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 1e-3)


def test_top_words_are_of_one_temperature_and_teach_alone(flags, tmp_path):
    top = cached(flags, tmp_path / "top", top_k=8, temperature=2.0)
    assert "at temperature 2" in complaint(SCRIPT, **top)
    said = complaint(SCRIPT, **top | {"teacher": flags["teacher"], "temperature": 2.0})
    assert "top 8 tokens only, which cannot be mixed" in said


def test_sampled_words_teach_by_the_forward_kl_alone(flags, data, tmp_path):
    """Many samples are nearly the teacher in memory."""
    both = [flags["data_path"], data / "val.jsonl"]
    flags |= {"temperature": 2.0, "val_path": both[1]}
    succeed(SCRIPT, **flags)
    sampled = cached(flags, tmp_path / "samples", data_path=both, sampled=10_000, temperature=2.0)
    said = succeed(SCRIPT, **sampled | {"out_dir": tmp_path / "disk"})
    assert "its 10000 sampled tokens at T=2" in said
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 0.1)
    assert rows(tmp_path / f"disk/{FILE}.jsonl")[-1]["val_kl"] > 0
    refused = complaint(SCRIPT, **sampled | {"divergence": "reverse_kl"})
    assert "linear in the teacher's probabilities: --divergence forward_kl, not reverse_kl" in refused
    assert "at temperature 2: train at --temperature 2" in complaint(SCRIPT, **sampled | {"temperature": 1.0})
    assert "10000 sampled tokens only, which cannot be mixed" in complaint(SCRIPT, **sampled | {"teacher": flags["teacher"]})


def test_a_changed_file_and_one_the_teacher_has_not_read_are_refused(flags, data, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(flags["data_path"].read_text())
    on_disk = cached(flags, tmp_path / "cache", data_path=mine) | {"data_path": mine}
    succeed(SCRIPT, **on_disk)
    assert "val.jsonl" in complaint(SCRIPT, **on_disk | {"val_path": data / "val.jsonl"})
    mine.write_text(mine.read_text().replace("?", "!", 1))
    assert "lacks 1 of " in complaint(SCRIPT, **on_disk)


# -- vocabularies ----------------------------------------------------------------------------------------------

def test_tokens_of_two_vocabularies_are_matched_where_they_begin_at_the_same_byte():
    # Ids here are numbers of bytes, but for 9, the end of turn, one byte as well. The first token is only read.
    n_bytes, shared = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 1]), torch.arange(10)

    def batch(*answers):
        ids = np.concatenate([[0, *answer, 9] for answer in answers])
        sizes = np.array([len(answer) + 2 for answer in answers])
        return packed_batch(ids, ids > 0, sizes)._replace(shared=shared)

    student, teacher = batch([2, 3], [1, 1, 1]), batch([3, 2], [2, 1])
    # Sample one: bytes 0 2 5 against 0 3 5; sample two: 0 1 2 3 against 0 2 3.
    assert same_text(student, n_bytes, teacher, n_bytes)[0].tolist() == [0, -1, 2, 3, -1, 4, 5]
    assert same_text(student, n_bytes, student, n_bytes)[0].tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_of_real_text_each_match_has_the_same_text_before_and_behind_it(data, cache, models, byte_tokenizer):
    _, ours = load_model(models / "student.pth")
    theirs = byte_tokenizer()
    pair = SFTDataset([data / "sft_data.jsonl"], ours, 128).paired_with(SFTDataset([data / "sft_data.jsonl"], theirs, 512))
    batch = pair.batch(np.arange(20))
    assert (batch.match >= 0).all()                     # each of our tokens begins where some byte does
    taught = batch.teacher
    for s, t in enumerate(batch.match.tolist()):
        token = ours.decode([batch.targets[s]]) if batch.targets[s] != ours.end_of_turn else None
        if token is None:
            assert taught.targets[t] == theirs.end_of_turn
        else:
            assert ours._encoding.decode_single_token_bytes(int(batch.targets[s]))[0] == taught.targets[t] - 16


def test_a_teacher_of_other_tokens_teaches_by_its_bytes(flags, byte_teacher, tmp_path):
    other = flags | {"teacher": byte_teacher, "val_path": flags["data_path"]}
    said = complaint(SCRIPT, **other)
    assert "the teacher's vocabulary has 272 tokens, the student's 1024" in said and "--divergence gold" in said
    for processes in (1, 2):
        succeed(SCRIPT, **other | {"batch_size": 8 // processes, "out_dir": tmp_path / str(processes)},
                divergence="gold", processes=processes)
        _, first, last = rows(tmp_path / f"{processes}/{FILE}.jsonl")
        assert first["kd"] > 0 and last["val_kl"] > 0 and "val_agreement" not in last
    assert close(learned(tmp_path / "1"), learned(tmp_path / "2"))


def test_where_only_the_student_cuts_a_token_the_teacher_is_not_used(flags, byte_teacher, tmp_path):
    """A student of bytes: within a token of the teacher's it is alone. At a learning rate of 0 the validation, on the
    eight rows of the step, sums up the same positions."""
    eight = tmp_path / "eight.jsonl"
    eight.write_text("".join(flags["data_path"].read_text().splitlines(keepends=True)[:8]))
    succeed(SCRIPT, **flags | {"student": byte_teacher, "data_path": eight, "val_path": eight, "learning_rate": 0.0},
            divergence="gold")
    _, row, validation = rows(tmp_path / "out/full_dist_16.jsonl")
    assert row["kd"] == pytest.approx(validation["val_kl"], rel=1e-5)


@pytest.fixture
def wide(flags, tmp_path):
    """The same two models, their vocabularies rounded up to 1,100 and 1,050 with columns as loud as real words."""
    return flags | {name: pad(flags[name], tmp_path / f"{name}.pth", n) for name, n in (("teacher", 1100), ("student", 1050))}


@pytest.mark.parametrize("more", [{}, {"plain_loss": True}, {"divergence": "jsd", "alpha": 0.5}, {"processes": 2, "shard": "zero3"},
                                  {"grad_checkpoint": True, "feature_weight": 1.0}], ids=str)
def test_padded_columns_are_left_out(more, flags, wide, data, tmp_path):
    flags, wide = (each | {"val_path": data / "val.jsonl", "batch_size": 8 // more.get("processes", 1)} for each in (flags, wide))
    said = succeed(SCRIPT, **wide | more | {"out_dir": tmp_path / "padded"})
    assert said.count("1,024 tokens and 1,100 rows") == said.count("1,024 tokens and 1,050 rows") == 1
    succeed(SCRIPT, **flags | more)
    for row, padded in zip(*(rows(tmp_path / name / f"{FILE}.jsonl") for name in ("out", "padded")), strict=True):
        assert padded == pytest.approx(row, rel=1e-5)
    if "shard" not in more:
        narrow = [weight[:1024] if len(weight) == 1050 else weight for weight in learned(tmp_path / "padded")]
        assert close(narrow, learned(tmp_path / "out"))


@pytest.mark.parametrize("objective", ["gkd", "minillm"])
def test_padding_is_neither_sampled_nor_graded(objective, flags, wide, data, tmp_path):
    for name, each in (("out", flags), ("padded", wide)):
        succeed("train_onpolicy.py", **each | {"data_path": data / "experience_student.jsonl", "out_dir": tmp_path / name, "size": None},
                objective=objective, max_new_tokens=6)
    a, b = ([{key: x for key, x in row.items() if "share" not in key} for row in rows(tmp_path / name / "full_onpolicy_32.jsonl")]
            for name in ("out", "padded"))
    for one, two in zip(a, b, strict=True):
        assert one.pop("sample", None) == two.pop("sample", None) and one == pytest.approx(two, rel=1e-5)


def test_an_evaluation_has_no_padding_either(flags, wide, data, tmp_path):
    found = {}
    for name, each in (("plain", flags), ("padded", wide)):
        succeed("scripts/evaluate.py", weights=[f"{who}={each[who]}" for who in ("teacher", "student")], limit=40,
                data=[data / "test.jsonl", data / "mcq_test.jsonl"], json=tmp_path / name)
        found[name] = {who: seeds[0] for who, seeds in json.loads((tmp_path / name).read_text()).items()}
    for who in ("teacher", "student"):
        for key in ("exact_match", "perplexity", "agreement", "kl", "multiple_choice"):
            assert found["padded"][who][key] == pytest.approx(found["plain"][who][key], rel=1e-4), key
    assert found["padded"]["student"]["kl"] > 0.1


@pytest.mark.parametrize("more", [{}, {"top_k": 1024}, {"top_k": 5}], ids=str)
def test_a_cache_has_no_padding_either(more, flags, wide, tmp_path):
    for name, each in (("out", flags), ("padded", wide)):
        succeed(SCRIPT, **cached(each, tmp_path / f"{name} cache", **more) | {"out_dir": tmp_path / name})
    for ours, padded in zip(*(rows(tmp_path / f"{name}/{FILE}.jsonl") for name in ("out", "padded")), strict=True):
        assert padded == pytest.approx(ours)
    parts = [next((tmp_path / f"{name} cache").glob("part-00003.bin")).read_bytes() for name in ("out", "padded")]
    assert parts[0][:-4] == parts[1][:-4]                       # without the checksum, which names the teacher


def test_tokens_that_only_the_teacher_has_are_left_out(flags, tmp_path):
    """Two special tokens more, as in a newer vocabulary of the same family; in memory and in caches."""
    _, own = load_model(flags["student"])
    tokenizer = Tokenizer(own.pattern, own.special_tokens | {"<|a|>": 1024, "<|b|>": 1025}, own.ranks)
    newer = flags | {"teacher": pad(flags["teacher"], tmp_path / "newer.pth", 1026, tokenizer)}
    succeed(SCRIPT, **flags)
    assert "not all have <|a|>, <|b|>" in succeed(SCRIPT, **newer | {"out_dir": tmp_path / "newer"})
    assert close(learned(tmp_path / "newer"), learned(tmp_path / "out"))
    succeed(SCRIPT, **cached(newer, tmp_path / "states") | {"out_dir": tmp_path / "disk"})
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 1e-2)           # its states are bf16
    top = cached(newer, tmp_path / "top", top_k=1026)
    assert "top 1026 tokens of 1026, of which the student has 1024" in complaint(SCRIPT, **top)
    succeed(SCRIPT, **cached(newer, tmp_path / "trimmed", top_k=1024, tokenizer=flags["student"]) | {"out_dir": tmp_path / "k"})
    assert close(learned(tmp_path / "k"), learned(tmp_path / "out"), 1e-3)


@pytest.fixture
def instruct(flags, tmp_path):
    """The teacher with another chat format of the same ids."""
    _, own = load_model(flags["teacher"])
    chat = Chat(*(f"{role}: {{content}}<|im_end|>\n" for role in ("sys", "you", "me")))
    tokenizer = Tokenizer(own.pattern, own.special_tokens, own.ranks, chat=chat)
    return flags | {"teacher": pad(flags["teacher"], tmp_path / "instruct.pth", 1024, tokenizer)}


def test_of_two_formats_of_the_same_ids_the_student_s_is_read(flags, instruct, tmp_path):
    succeed(SCRIPT, **flags)
    assert succeed(SCRIPT, **instruct | {"out_dir": tmp_path / "two"}).count("the formats differ in chat:") == 1
    assert close(learned(tmp_path / "two"), learned(tmp_path / "out"))
    on_disk = cached(instruct, tmp_path / "cache")
    said = complaint(SCRIPT, **on_disk)
    words = shlex.split(said[said.index("python scripts/cache_teacher.py"):].splitlines()[0])
    assert words[words.index("--tokenizer") + 1] in said.partition("python")[0]
    succeed(*words[1:])
    succeed(SCRIPT, **on_disk | {"out_dir": tmp_path / "disk"})
    assert close(learned(tmp_path / "disk"), learned(tmp_path / "out"), 1e-2)


def test_a_format_with_a_token_that_the_teacher_lacks_is_not_read_by_it(flags, instruct, tmp_path):
    """Each reads its own, as with --teacher_data_path; the answers are the same ids."""
    _, own = load_model(flags["student"])
    thinks = dataclasses.replace(own.chat, before_answer="<|new|>")
    tokenizer = Tokenizer(own.pattern, own.special_tokens | {"<|new|>": 1024}, own.ranks, chat=thinks)
    newer = instruct | {"student": pad(flags["student"], tmp_path / "newer.pth", 1025, tokenizer)}
    assert "cannot read the student's conversations, it lacks <|new|>" in succeed(SCRIPT, **newer)
    succeed(SCRIPT, **newer | {"teacher_data_path": flags["data_path"], "out_dir": tmp_path / "same"})
    assert close(learned(tmp_path / "same"), learned(tmp_path / "out"), 0)
    assert "--attention_weight compares all tokens" in complaint(SCRIPT, **newer | {"attention_weight": 1.0})
    said = complaint("scripts/cache_teacher.py", teacher=newer["teacher"], data_path=flags["data_path"], tokenizer=newer["student"])
    assert "it lacks <|new|>: distil it without a cache" in said


@pytest.mark.parametrize("changed, reason", [
    ({"special_tokens": {"<|renamed|>": 15}}, "id 15 is <|reserved_10|> and <|renamed|>"),
    ({"pattern": r"\p{L}+|\s|."}, "they split texts into other tokens"),
    ({"normalization": "NFC"}, "they split texts into other tokens"),
    ({"matched": ["<think>"]}, None),
    ({"special_tokens": {"<|more|>": 1024}}, None)], ids=str)
def test_vocabularies_conflict_where_an_id_is_another_token(changed, reason):
    own = Tokenizer.load()
    special_tokens = {name: i for name, i in own.special_tokens.items() if i not in changed.get("special_tokens", {}).values()}
    parts = {"pattern": own.pattern, "ranks": own.ranks} | changed
    other = Tokenizer(**parts | {"special_tokens": special_tokens | changed.get("special_tokens", {})})
    assert own.conflict(other.ids) == reason and json.loads(json.dumps(other.ids)) == other.ids


@pytest.mark.parametrize("kind, divide", [
    ("", {"batch_size": 2, "accumulation_steps": 4}), ("_moe", {"batch_size": 1, "accumulation_steps": 3, "processes": 2}),
    ("", {"batch_size": 9, "accumulation_steps": 3, "processes": 2, "shard": "zero2"})], ids=str)
def test_a_file_smaller_than_a_step_is_a_smaller_step(kind, divide, flags, models, tmp_path):
    """Five rows, at times fewer than micro-batches, give the same sum over their tokens."""
    five = tmp_path / "five.jsonl"
    five.write_text("".join(flags["data_path"].read_text().splitlines(keepends=True)[:5]))
    flags |= {"data_path": five, "student": models / f"student{kind}.pth", "max_steps": 2}
    for name, more in (("one", {"batch_size": 64}), ("several", divide)):
        succeed(SCRIPT, **flags | more | {"out_dir": tmp_path / name})
    one, several = (rows(tmp_path / f"{name}/{FILE}{kind}.jsonl") for name in ("one", "several"))
    assert len(one) == 2 and all(a == pytest.approx(b, rel=2e-4) for a, b in zip(one, several, strict=True))


# -- what cannot be --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("more, reason", [
    ({"beta": 1.5}, "--beta 1.5 must lie in [0, 1]"),
    ({"skew": 0.0}, "--skew 0.0 must lie in (0, 1)"),
    ({"contrastive_temperature": 0.0}, "--contrastive_temperature 0.0 must be above 0"),
    ({"feature_weight": 1.0, "layer_map": "1:9"}, "'1:9'"),
    ({"attention_weight": 1.0, "relation_heads": 5}, "n_relation_heads=5"),
    ({"divergence": "gold", "plain_loss": True}, "--plain_loss"),
    ({"divergence": "gold", "feature_weight": 1.0}, "--feature_weight compares position by position"),
    ({"teacher_cache": "nowhere"}, "nowhere"),
    ({"teacher": "tests"}, "tests is a folder without a config.json"),
], ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "")
def test_settings_that_cannot_be_are_refused_with_their_value(more, reason, flags):
    assert reason in complaint(SCRIPT, **flags | more)


def test_a_weight_that_is_none_is_refused(flags):
    assert "no weights at" in complaint(SCRIPT, **flags | {"teacher": f"{flags['teacher']}=much"})


def test_two_teachers_cannot_have_their_hidden_states_imitated(flags):
    assert "--feature_weight needs exactly one --teacher" in complaint(
        SCRIPT, **flags | {"teacher": [flags["teacher"]] * 2, "feature_weight": 1.0})


def test_the_command_that_a_refusal_prints_makes_the_run_start(flags, data, tmp_path):
    """It keeps the files that were in the cache, or the next refusal would be of one of those."""
    on_disk = cached(flags, tmp_path / "cache") | {"val_path": data / "val.jsonl"}
    said = complaint(SCRIPT, **on_disk)
    words = shlex.split(said[said.index("python scripts/cache_teacher.py"):].splitlines()[0])
    succeed(*words[1:])
    assert "teacher.pth on disk, its states in" in succeed(SCRIPT, **on_disk)


def test_the_temperature_of_the_last_step_is_the_final_one(flags, tmp_path):
    succeed(SCRIPT, **flags | {"max_steps": 3}, temperature=4.0, final_temperature=1.0)
    assert [row["temperature"] for row in rows(tmp_path / f"out/{FILE}.jsonl")] == [4.0, 2.5, 1.0]


# -------------------------------------------------------------------------------------- a teacher that is told more


ANSWERS = ["c b", "a c", "b b a"]


def written_pairs(folder, teacher_answers=ANSWERS):
    """student.jsonl asks, teacher.jsonl asks with a hint."""
    for name, hint, answers in (("student", "", ANSWERS), ("teacher", "backwards, please: ", teacher_answers)):
        rows = [{"question": f"{hint}{answer[::-1]}", "answer": answer} for answer in answers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "student.jsonl", folder / "teacher.jsonl"


def test_each_side_is_asked_for_the_same_answer_after_its_own_prompt(tmp_path, cache):
    tokenizer = Tokenizer.load()
    student, teacher = (SFTDataset([path], tokenizer, 128, log=str) for path in written_pairs(tmp_path))
    batch = student.paired_with(teacher).batch(np.array([2, 0, 1]))
    assert batch.match is None and torch.equal(batch.targets, batch.teacher.targets)
    assert all(longer > shorter for longer, shorter in zip(batch.teacher.lengths, batch.lengths))


def test_answers_that_differ_are_refused_by_their_row(tmp_path, cache):
    paths = written_pairs(tmp_path, ["c b", "a b", "b b a"])
    student, teacher = (SFTDataset([path], Tokenizer.load(), 128, log=str) for path in paths)
    with pytest.raises(ValueError, match=r"sample 2 of .*student\.jsonl and of .*teacher\.jsonl: the answers differ"):
        student.paired_with(teacher)


@pytest.mark.parametrize("its", [ANSWERS[:2], [*ANSWERS, "a"]], ids=len)
def test_files_that_do_not_match_row_by_row_are_refused(its, tmp_path, cache):
    student, teacher = (SFTDataset([path], Tokenizer.load(), 128, log=str) for path in written_pairs(tmp_path, its))
    with pytest.raises(ValueError, match=rf"student\.jsonl has 3 samples and .*teacher\.jsonl {len(its)}: which belong together"):
        student.paired_with(teacher)


def test_an_answer_that_is_cut_on_one_side_is_refused(tmp_path, cache):
    asked, told = written_pairs(tmp_path)
    tokenizer = Tokenizer.load()
    limit = int(max(SFTDataset([told], tokenizer, 128, log=str).lengths)) - 3         # without the answer's end and the line break behind it
    student, teacher = SFTDataset([asked], tokenizer, 128, log=str), SFTDataset([told], tokenizer, limit, log=str)
    with pytest.raises(ValueError, match="sample .*teacher.jsonl: .* or one is cut by a max_seq_len"):
        student.paired_with(teacher)


def test_the_loss_is_that_of_the_two_models_each_under_its_own_prompt(models, tmp_path, cache):
    """One step on all three rows; KL(teacher || student) by hand, an answer at a time."""
    student_path, teacher_path = written_pairs(tmp_path)
    flags = {"teacher": models / "teacher.pth", "student": models / "student.pth", "data_path": student_path,
             "teacher_data_path": teacher_path, "val_path": "none", "batch_size": 3, "max_steps": 1, "learning_rate": 0.0,
             "num_workers": 0, "dtype": "float32", "out_dir": tmp_path / "out"}
    succeed(SCRIPT, **flags)
    succeed(SCRIPT, **flags | {"out_dir": tmp_path / "plain", "plain_loss": True})

    (student, tokenizer), (teacher, _) = load_model(models / "student.pth"), load_model(models / "teacher.pth")
    total, n = 0.0, 0
    for asked, told in zip(*(map(json.loads, path.read_text().splitlines()) for path in (student_path, teacher_path))):
        log_p, log_q = [], []
        for model, row, found in ((teacher, told, log_p), (student, asked, log_q)):
            ids, targets = tokenizer.encode_chat([{"role": "user", "content": row["question"]},
                                                  {"role": "assistant", "content": row["answer"]}])
            with torch.no_grad():
                logits = model(torch.tensor(ids[:-1]), [len(ids) - 1]).logits.double().log_softmax(dim=-1)
            found.append(logits[torch.tensor(targets[1:])])
        p, q = log_p[0], log_q[0]
        total, n = total + (p.exp() * (p - q)).sum().item(), n + len(p)
    for folder in ("out", "plain"):
        assert rows(tmp_path / folder / "full_dist_32.jsonl")[0]["loss"] == pytest.approx(total / n, rel=1e-4)


@pytest.mark.parametrize("more, reason", [
    ({"val_path": "tests/nothing.jsonl"}, "has no prompts for the teacher"),
    ({"attention_weight": 1.0}, "--attention_weight compares all tokens of a sample"),
])
def test_what_a_pair_of_prompts_cannot_do_is_said(more, reason, models, tmp_path, cache):
    student_path, teacher_path = written_pairs(tmp_path)
    assert reason in complaint(SCRIPT, teacher=models / "teacher.pth", student=models / "student.pth", batch_size=1,
                               data_path=student_path, teacher_data_path=teacher_path, out_dir=tmp_path / "out", **more)
