"""
数据流的规律：只有助手的话是目标；第 k 步用哪些样本，与怎样分给进程和微批无关。
Laws of dataset/lm_dataset.py: only the assistant's tokens are targets, and the samples of step k do
not depend on the number of processes and micro-batches.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.lm_dataset import (MicroBatches, PretrainDataset, PromptDataset, SFTDataset,
                                batch_of_answers, in_order, make_loader, open_data, packed_batch,
                                prompts_and_answers)
from helpers_run import ROOT
from model.tokenizer import CHATML, PATTERN, Tokenizer


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn}
                         for i, turn in enumerate(turns)]}


@pytest.fixture
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


@pytest.fixture
def sixty(cache, tmp_path, tokenizer):
    """60 conversations, no two alike, of many lengths and with 2 to 12 targets each."""
    rows = [chat(f"n {i} {'?' * (7 * i % 13)}", "a" * (1 + 5 * i % 11)) for i in range(60)]
    return SFTDataset([write(tmp_path / "sft.jsonl", rows)], tokenizer, max_seq_len=64,
                      log=lambda line: None)


def samples_of(batch):
    """The samples of a batch, each as a tuple of the ids that are read."""
    return [tuple(sample.tolist()) for sample in batch.tokens.split(batch.lengths)]


# -- what is learned -----------------------------------------------------------------------------

def test_only_the_assistants_tokens_and_its_end_of_turn_are_targets(cache, tmp_path, tokenizer):
    data = SFTDataset([write(tmp_path / "sft.jsonl", [chat("2 + 3 ?", "5", "sure?", "yes.")])],
                      tokenizer, log=print)
    batch = data.batch(np.array([0]))
    assert tokenizer.decode(batch.targets.tolist()) == "5<|im_end|>yes.<|im_end|>"
    assert data.n_targets.tolist() == [2 + 5]
    read = tokenizer.decode(batch.tokens.tolist())
    assert read == ("<|im_start|>user\n2 + 3 ?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
                    "<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\nyes.<|im_end|>")


def test_the_target_of_a_position_is_the_token_after_it():
    # ids 10 .. 14, of which 12 and 14 are to be predicted: from 11 and from 13, at positions 1 and
    # 3.
    batch = packed_batch(np.arange(10, 15), np.array([False, False, True, False, True]),
                         np.array([5]))
    assert batch.tokens.tolist() == [10, 11, 12, 13] and batch.lengths == [4]
    assert batch.at.tolist() == [1, 3] and batch.targets.tolist() == [12, 14]


def test_each_answer_of_a_conversation_has_all_tokens_before_it_as_prompt(cache, tmp_path,
                                                                          tokenizer):
    rows = [chat("2 + 3 ?", "5", "sure?", "yes."), chat("hi", "ho")]
    data = SFTDataset([write(tmp_path / "sft.jsonl", rows)], tokenizer, log=print)
    found = [[tuple(map(tokenizer.decode, turn)) for turn in sample]
             for sample in prompts_and_answers(data.batch(np.array([0, 1])))]
    first = "<|im_start|>user\n2 + 3 ?<|im_end|>\n<|im_start|>assistant\n"
    assert found[0] == [(first, "5<|im_end|>"),
                        (f"{first}5<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n"
                                                 "<|im_start|>assistant\n", "yes.<|im_end|>")]
    assert found[1] == [("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "ho<|im_end|>")]


def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out_and_counted(cache, tmp_path,
                                                                            tokenizer):
    """Around its words a question has 19 tokens of the template: with 22 in all, "abc" leaves no
    room and "ab" one token."""
    rows = write(tmp_path / "sft.jsonl", [chat("a", "5"), chat("abc", "5"), chat("ab", "5")])
    data, said = SFTDataset([rows], tokenizer, max_seq_len=22, log=lambda line: None), []
    assert len(tokenizer.encode_chat(chat("")["messages"], add_generation_prompt=True)[0]) == 19
    assert data.with_room(said.append).rows.tolist() == [0, 2]
    assert "1 of 3 samples have a prompt that leaves no room" in said[0]


def test_turns_end_where_their_sample_ends():
    """Of 10 11 12 and 13 14, read 10 11 and 13, everything but the first is a target, and position
    1 borders on position 2."""
    batch = packed_batch(np.arange(10, 15), np.array([False, True, True, False, True]),
                         np.array([3, 2]))
    assert prompts_and_answers(batch) == [[([10], [11, 12])], [([13], [14])]]


def test_a_batch_of_answers_gives_the_same_prompts_and_answers_back():
    prompts, answers = [[1], [2, 3, 4], [5, 6]], [[7, 8], [9], [1, 2, 3]]
    batch = batch_of_answers(prompts, answers)
    assert prompts_and_answers(batch) == [[pair] for pair in zip(prompts, answers)]
    assert batch.lengths == [2, 3, 4] and batch.targets.tolist() == [7, 8, 9, 1, 2, 3]


def test_no_target_reaches_over_the_end_of_a_sample():
    # Samples 10 11 12 | 20 21: the stream that is read is 10 11 | 20, and nothing is asked to
    # foretell 20.
    batch = packed_batch(np.array([10, 11, 12, 20, 21]), np.ones(5, dtype=bool), np.array([3, 2]))
    assert batch.tokens.tolist() == [10, 11, 20] and batch.lengths == [2, 1]
    assert batch.at.tolist() == [0, 1, 2] and batch.targets.tolist() == [11, 12, 21]


def test_pieces_of_a_long_text_overlap_by_one_and_each_token_but_the_first_is_a_target_once(
        cache, tmp_path, tokenizer):
    # 13 bytes and <|endoftext|>: pieces of 6, 6 and 4
    text = "abcdefghijklm"
    data = PretrainDataset([write(tmp_path / "text.jsonl", [{"text": text}])], tokenizer,
                           max_seq_len=5)
    assert data.lengths.tolist() == [6, 6, 4]
    batch = data.batch(np.arange(3))
    assert [tokenizer.decode(sample) for sample in samples_of(batch)] == ["abcde", "fghij", "klm"]
    assert tokenizer.decode(batch.targets.tolist()) == "bcdefghijklm<|endoftext|>"


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13])
def test_no_length_of_text_loses_or_doubles_a_target(cache, tmp_path, tokenizer, length):
    text = "abcdefghijklm"[:length]
    data = PretrainDataset([write(tmp_path / "text.jsonl", [{"text": text}])], tokenizer,
                           max_seq_len=4)
    targets = data.batch(np.arange(len(data))).targets.tolist()
    assert tokenizer.decode(targets) == text[1:] + "<|endoftext|>"
    assert max(data.lengths) <= 4 + 1


def test_nothing_is_cut_silently(cache, tmp_path, tokenizer):
    # Before the answer stand <|im_start|>, "user\n", q, <|im_end|>, "\n", <|im_start|> and
    # "assistant\n": 20 ids with one q, 59 with 40. Of the 31 ids kept, then, a long answer has 11,
    # and a long question leaves no answer.
    rows = [chat("q", "yes"), chat("q", "y" * 40), chat("q" * 40, "yes"), chat("q", "no")]
    log = []
    data = SFTDataset([write(tmp_path / "sft.jsonl", rows)], tokenizer, max_seq_len=30,
                      log=log.append)
    assert "3 samples" in log[0] and "2 cut to 30 tokens" in log[0] and "1 left out" in log[0]
    # 30 are read, the last is only predicted
    assert max(data.lengths) == 31
    assert len(data) == 3 and data.n_targets.min() >= 1


def test_a_file_of_which_nothing_is_left_says_so(cache, tmp_path, tokenizer):
    path = write(tmp_path / "sft.jsonl", [chat("q" * 40, "yes")])
    with pytest.raises(ValueError,
                       match="sft.jsonl: no sample has anything to learn within max_seq_len=8"):
        SFTDataset([path], tokenizer, max_seq_len=8)


# -- the cached file -----------------------------------------------------------------------------

def test_a_file_is_tokenised_once_and_anew_when_it_or_the_tokenizer_or_the_length_changes(
        cache, tmp_path, byte_tokenizer):
    path, log = write(tmp_path / "sft.jsonl", [chat("a", "b")]), []

    def builds(tokenizer=byte_tokenizer(), max_seq_len=64, kind=SFTDataset):
        before = len(log)
        kind([path], tokenizer, max_seq_len, log=log.append)
        return len(log) - before

    assert [builds(), builds()] == [1, 0]
    assert [builds(max_seq_len=63), builds(byte_tokenizer(end_of_text=300)), builds()] == [1, 1, 0]
    write(path, [chat("a", "c")])
    assert [builds(), builds()] == [1, 0]
    assert len(list(cache.glob("*.npz"))) == len(list(cache.glob("*.bin"))) == 4


def test_a_cached_file_has_the_same_samples_as_a_fresh_one(sixty, tokenizer):
    again = SFTDataset(sixty.paths, tokenizer, max_seq_len=64, log=pytest.fail)
    for a, b in zip(sixty.batch(np.arange(60))[:4], again.batch(np.arange(60))[:4]):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_small_vocabularies_take_2_bytes_a_token_and_large_ones_4(cache, tmp_path, byte_tokenizer):
    path = write(tmp_path / "text.jsonl", [{"text": "abc"}])
    for end_of_text, n_bytes in ((32_767, 2), (32_768, 4), (40_000, 4)):
        data = PretrainDataset([path], byte_tokenizer(end_of_text))
        batch = data.batch(np.array([0]))
        assert data.stream.itemsize == n_bytes
        assert batch.tokens.tolist() == [16 + 97, 16 + 98, 16 + 99]         # a b c
        assert batch.targets.tolist() == [16 + 98, 16 + 99, end_of_text]


# -- which samples a step sees -------------------------------------------------------------------

# batch size x micro-batches x processes: 8 samples a step, each time
DEALS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]


def hands_of_step(data, step, batch_size, accumulation_steps, world_size):
    """All micro-batches of a step, of all processes."""
    processes = [MicroBatches(data, batch_size, accumulation_steps, rank, world_size)
                 for rank in range(world_size)]
    return [process[step * accumulation_steps + micro] for process in processes
            for micro in range(accumulation_steps)]


@pytest.mark.parametrize("deal", DEALS, ids=str)
def test_a_step_sees_the_same_samples_however_they_are_dealt(sixty, deal):
    # 7 steps an epoch: three epochs are looked at
    for step in (0, 3, 7, 12):
        hands = hands_of_step(sixty, step, *deal)
        dealt = sorted(sample for hand in hands for sample in samples_of(hand))
        assert len(set(dealt)) == 8                             # each card is in one hand
        assert dealt == sorted(samples_of(hands_of_step(sixty, step, 8, 1, 1)[0]))
        assert all(len(hand.lengths) == deal[0] and hand.lengths == sorted(hand.lengths)
                   for hand in hands)


@pytest.mark.parametrize("deal", DEALS, ids=str)
def test_every_micro_batch_has_the_targets_and_samples_of_the_whole_step(sixty, deal):
    hands = hands_of_step(sixty, 2, *deal)
    n_targets = sum(len(hand.targets) for hand in hands)
    assert all(hand.step_targets == n_targets and hand.step_samples == 8 for hand in hands)


@pytest.mark.parametrize("deal", DEALS, ids=str)
def test_a_step_has_the_same_gradient_however_it_is_dealt(sixty, tiny, deal):
    model = tiny(vocab_size=272, max_seq_len=64)

    def gradient(hands):
        model.zero_grad()
        # a sum, divided by the targets of the whole step
        for hand in hands:
            logits = model(hand.tokens, hand.lengths, at=hand.at).logits
            (F.cross_entropy(logits, hand.targets, reduction="sum") / hand.step_targets).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    whole = gradient(hands_of_step(sixty, 0, 8, 1, 1))
    assert torch.allclose(gradient(hands_of_step(sixty, 0, *deal)), whole,
                          atol=1e-5 * whole.abs().max().item())


def test_micro_batches_have_about_the_same_size(sixty):
    for step in range(7):
        sizes = [len(hand.tokens) for hand in hands_of_step(sixty, step, 2, 2, 2)]
        longest = max(sixty.lengths) - 1
        # dealt from short to long, never by more than one card
        assert max(sizes) - min(sizes) <= longest


def test_an_epoch_visits_no_sample_twice_and_the_next_has_another_order(sixty):
    data = MicroBatches(sixty, batch_size=8)
    assert data.steps_per_epoch == 60 // 8
    first, second = ([i for step in range(7) for i in data.samples_of_step(epoch * 7 + step)]
                     for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 56
    assert first != second


def test_the_seed_decides_the_order(sixty):
    first, again, other = (MicroBatches(sixty, 8, seed=seed).samples_of_step(0).tolist()
                           for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("n, sizes", [(9, [3, 2, 2, 2]), (3, [1, 1, 1, 0])])
def test_fewer_samples_than_a_step_are_one_smaller_step(sixty, n, sizes):
    few = sixty.view(np.arange(n))
    data = MicroBatches(few, batch_size=16, accumulation_steps=2, world_size=2)
    assert (data.step_samples, data.steps_per_epoch) == (n, 1)
    hands = hands_of_step(few, 0, 16, 2, 2)
    for hand, size in zip(hands, sizes, strict=True):       # a hand that is empty weighs nothing
        assert len(hand.lengths) == max(size, 1)
        expected = (few.n_targets.sum(), n) if size else (np.inf, np.inf)
        assert (hand.step_targets, hand.step_samples) == expected
    with pytest.raises(ValueError, match="sft.jsonl has no samples left to train on"):
        MicroBatches(sixty.view(np.arange(0)), batch_size=16)


# -- prompts without answers ---------------------------------------------------------------------

def test_a_row_without_an_answer_is_a_prompt_and_never_validated(cache, tmp_path, tokenizer):
    rows = [chat("a", "b"), chat("c"), {"prompt": "d"}, chat("e", "f", "g")]
    data = PromptDataset([write(tmp_path / "p.jsonl", rows)], tokenizer, 64, log=print)
    found = prompts_and_answers(data.batch(np.arange(4)))
    assert [[tokenizer.decode(answer) for _, answer in turns] for turns in found] == [
        ["b<|im_end|>"], ["<|im_end|>"], ["<|im_end|>"], ["f<|im_end|>"]]
    assert tokenizer.decode(found[1][0][0]).endswith("c<|im_end|>\n<|im_start|>assistant\n")
    assert data.answered().tolist() == [True, False, False, True]
    train, val = open_data(PromptDataset, data.paths, tokenizer, 64, val_fraction=0.9)
    assert (train.rows.tolist(), val.rows.tolist()) == ([1, 2], [0, 3])
    alone = write(tmp_path / "q.jsonl", rows[1:3])
    assert open_data(PromptDataset, [alone], tokenizer, 64)[1] is None


# -- memory --------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from dataset import lm_dataset
from model.tokenizer import Tokenizer

def size(key):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

lm_dataset.CACHE, tokenizer = Path(sys.argv[1]), Tokenizer.load()
for path in map(Path, sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")       # the highest mark is set back to what is used now
    before = size("VmRSS")
    lm_dataset.dataset_of([path])([path], tokenizer, 128, log=str)
    print((size("VmHWM") - before) / path.stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tokenising_a_file_takes_little_memory(tmp_path):
    """2 MB, which took 20 times that as Python's objects. Some MB do not depend on the file: at 80 MB
    it is 0.3 to 0.9 times the file. A small file first loads what is imported."""
    rows = [chat(f"what is {i} and {i}?", f"it is {2 * i}, 也就是 {2 * i}") for i in range(15_000)]
    for name, some in (("small", rows[:99]), ("large", rows)):
        write(tmp_path / f"{name}.jsonl", some)
    command = [sys.executable, "-c", PEAK, tmp_path / "cache", tmp_path / "small.jsonl",
               tmp_path / "large.jsonl"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    _, peak = map(float, ended.stdout.split())
    assert peak < 4, ended


# -- validation ----------------------------------------------------------------------------------

def test_the_held_out_part_shares_no_sample_with_the_rest_and_is_the_same_each_time(sixty):
    train, val = sixty.split(0.1, seed=0)
    assert (len(train), len(val)) == (54, 6)
    rows = [samples_of(part.batch(np.arange(len(part)))) for part in (train, val, sixty)]
    assert not set(rows[0]) & set(rows[1]) and sorted(rows[0] + rows[1]) == sorted(rows[2])
    assert sixty.split(0.1, seed=0)[1].ends.tolist() == val.ends.tolist()
    assert sixty.split(0.1, seed=1)[1].ends.tolist() != val.ends.tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_reads_every_sample_once_and_gives_each_process_as_many_batches(sixty,
                                                                                   world_size):
    processes = [list(in_order(sixty, rank, world_size, tokens_per_batch=200))
                 for rank in range(world_size)]
    assert len({len(batches) for batches in processes}) == 1
    batches = [batch for batches in processes for batch in batches]
    counted = [batch for batch in batches if len(batch.targets)]
    assert sorted(sample for batch in counted for sample in samples_of(batch)) == sorted(
        samples_of(sixty.batch(np.arange(60))))
    assert max(len(batch.tokens) + len(batch.lengths) for batch in batches) <= 200
    # The forward pass of a sharded model needs all processes: an extra batch has tokens, no
    # targets.
    extra = [batch for batch in batches if not len(batch.targets)]
    assert len(extra) < world_size and len(counted) > 8
    assert all(len(batch.at) == 0 and len(batch.tokens) for batch in extra)
    assert sum(len(batch.targets) for batch in counted) == sixty.n_targets.sum()


def test_open_data_holds_out_a_fraction_or_takes_the_file_beside_the_data(cache, tmp_path,
                                                                          tokenizer):
    rows = [chat(f"n {i}", "a" * (i + 1)) for i in range(20)]
    path, log = write(tmp_path / "sft.jsonl", rows), []

    def sizes(**settings):
        data, val = open_data(SFTDataset, [path], tokenizer, 64, log=log.append, **settings)
        return len(data), len(val) if val is not None else None

    assert sizes(val_fraction=0.1) == (18, 2) and sizes(val_fraction=0.0) == (20, None)
    assert sizes(val_path="none") == (20, None) and "validation: none" in log[-1]
    write(tmp_path / "val.jsonl", rows[:3])
    assert sizes() == (20, 3) and f"validation: 3 of {tmp_path / 'val.jsonl'}" in log[-1]
    assert sizes(val_path=write(tmp_path / "other.jsonl", rows[:4])) == (20, 4)


def test_open_data_pairs_other_prompts_and_holds_out_pairs(cache, tmp_path, tokenizer):
    student, teacher = (write(tmp_path / name, [chat(f"{prompt}{i}", f"{i}") for i in range(20)])
                        for name, prompt in (("student.jsonl", "q"),
                                             ("teacher.jsonl", "context, q")))
    write(tmp_path / "val.jsonl", [chat("q", "a")])            # it has no prompts for the teacher

    def opened(**settings):
        return open_data(SFTDataset, [student], tokenizer, 64, val_fraction=0.1,
                         teacher=([teacher], tokenizer, 64), log=lambda line: None, **settings)

    data, val = opened()
    assert (len(data), len(val)) == (18, 2)
    batch = data.batch(np.array([0]))
    assert "context, q" in tokenizer.decode(batch.teacher.tokens.tolist())
    assert torch.equal(batch.targets, batch.teacher.targets)
    with pytest.raises(ValueError, match="val.jsonl has no prompts for the teacher"):
        opened(val_path=tmp_path / "val.jsonl")


def test_a_loader_gives_the_micro_batches_of_its_steps(sixty):
    data = MicroBatches(sixty, batch_size=4, accumulation_steps=2)
    for threads in (0, 1, 3):
        loaded = [batch.tokens.tolist() for batch in make_loader(data, 2, 5, threads)]
        assert loaded == [data[j].tokens.tolist() for j in range(4, 10)]


# -- each answer behind the prompt that it gets in use ---------------------------------------------

def thinking(tokenizer):
    chat = replace(CHATML, before_answer="<think>\n\n</think>\n\n", thoughts="none")
    return Tokenizer(PATTERN, tokenizer.special_tokens, tokenizer.ranks, chat=chat)


def test_of_a_thinking_chat_every_answer_is_a_sample_behind_its_own_prompt(cache, tmp_path, tokenizer):
    """Prompts are what on-policy distillation samples from."""
    ours, rows = thinking(tokenizer), [chat("2 + 3 ?", "5", "sure?", "yes."), chat("a", "b")]
    rows[0]["messages"][3]["train"] = False
    rows.append(chat("2 + 3 ?", "5", "sure?", "yes."))
    data = SFTDataset([write(tmp_path / "sft.jsonl", rows)], ours, log=print)
    assert data.origins.tolist() == [0, 1, 2, 2]
    found = prompts_and_answers(data.batch(np.arange(4)))
    messages = [row["messages"] for row in rows]
    expected = [(messages[0][:1], "5"), (messages[1][:1], "b"), (messages[2][:1], "5"), (messages[2][:3], "yes.")]
    for turns, (asked, answer) in zip(found, expected):
        prompt = ours.encode_chat(asked, add_generation_prompt=True)[0]
        assert turns == [(prompt, [*ours.encode(answer), ours.end_of_turn])]
    one, other = data.split(0.34, seed=0)
    assert len(one) + len(other) == 4 and not set(one.origins.tolist()) & set(other.origins.tolist())


def test_two_chats_of_which_one_thinks_are_paired_answer_by_answer(cache, tmp_path, tokenizer):
    path = write(tmp_path / "sft.jsonl", [chat("2 + 3 ?", "5", "sure?", "yes.")] * 20)
    ours, theirs = thinking(tokenizer), tokenizer
    for student, teacher in ((ours, theirs), (theirs, ours)):
        data, val = open_data(SFTDataset, [path], student, 128, teacher=([path], teacher, 128))
        batch = data.batch(np.arange(4))
        assert batch.targets.tolist() == batch.teacher.targets.tolist()
        assert len(data) + len(val) == 40 and batch.match is None
    opens = replace(ours.chat, prompt="<|im_start|>assistant\n<think>\n")           # "\n</think>\n\n" is learned
    opens = Tokenizer(PATTERN, tokenizer.special_tokens, tokenizer.ranks, chat=opens)
    with pytest.raises(ValueError, match=r"answers begin with '' .* and '\\n</think>\\n\\n' in the teacher's"):
        open_data(SFTDataset, [path], tokenizer, 128, teacher=([path], opens, 128))
