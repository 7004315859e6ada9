"""
混合数据流的规律：每一步都合乎份额；一类看完才重看；与进程数无关；改了份额，之前的不变。
Laws of dataset/mixture.py: each step keeps to its shares, no sample of a part repeats before all of
it occurred, the number of processes changes nothing, and new weights leave earlier steps unchanged.
"""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from test_lm_dataset import DEALS, chat, samples_of, sixty, tokenizer, write  # noqa: F401

from dataset.lm_dataset import PretrainDataset, in_order
from dataset.mixture import Joined, Mixture, growth, seed_of

# 30, 23 and 7 samples
PARTS = {"general": np.arange(30), "law": np.arange(30, 53), "medicine": np.arange(53, 60)}


def constant(n_steps, *shares):
    return np.tile(shares, (n_steps, 1))


def mixture(data, *deal, shares=constant(40, 0.5, 0.3, 0.2), parts=PARTS, **others):
    """batch size, accumulation steps, rank, processes: 8 samples a step unless told otherwise."""
    return Mixture(data, parts, shares, *deal or (8,), **others)


def samples_of_part(mix, steps, name):
    """What the steps have of a part, as one list."""
    mine = set(mix.parts[mix.names.index(name)].tolist())
    return [i for step in steps for i in mix.samples_of_step(step).tolist() if i in mine]


# -- growth --------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_steps", [2, 3, 4, 17, 400])
def test_a_share_grows_from_start_to_end_and_never_back(n_steps):
    shares = growth(0.3, 0.7, n_steps)
    assert shares.shape == (n_steps,) and shares[0] == 0.3 and shares[-1] == 0.7
    assert (np.diff(shares) >= 0).all()
    assert np.allclose(growth(0.7, 0.3, n_steps), 1 - shares)         # and falls as it grows


def test_growth_by_hand():
    assert np.allclose(growth(0.3, 0.7, 5), [0.3, 0.4, 0.5, 0.6, 0.7])
    assert growth(0.3, 0.7, 1).tolist() == [0.5]


# -- shares --------------------------------------------------------------------------------------

def test_no_step_is_a_whole_sample_away_from_its_shares_and_on_average_none_is_lost(sixty):
    law = growth(0.3, 0.7, 400)
    shares = np.stack([(1 - law) * 0.9, law, (1 - law) * 0.1], axis=1)
    mix = mixture(sixty, shares=shares)
    strays = np.diff(mix.taken, axis=0) - 8 * shares                    # (steps, parts)
    assert abs(strays).max() < 1
    # A stray of less than 1 has a standard deviation of at most 1/2, a sum of 400 independent ones
    # of at most 10.
    assert abs(strays.sum(axis=0)).max() < 40
    assert mix.counts(0, 400) == dict(zip(PARTS, mix.taken[-1]))
    assert sum(mix.counts(0, 400).values()) == 8 * 400
    # 8 * 0.3 and 8 * 0.7
    assert mix.counts(0, 1)["law"] in (2, 3) and mix.counts(399, 400)["law"] in (5, 6)


def test_a_step_holds_what_is_counted_from_short_to_long(sixty):
    mix = mixture(sixty)
    for step in range(40):
        samples = mix.samples_of_step(step)
        assert {name: int(np.isin(samples, part).sum())
                for name, part in PARTS.items()} == mix.counts(step, step + 1)
        assert (np.diff(sixty.lengths[samples]) >= 0).all() and len(samples) == 8


def test_shares_without_a_remainder_are_met_exactly(sixty):
    mix = mixture(sixty, shares=constant(20, 0.5, 0.25, 0.25))
    assert all(mix.counts(step, step + 1) == {"general": 4, "law": 2, "medicine": 2}
               for step in range(20))


def test_shares_that_sum_to_almost_1_fill_the_step_and_give_nothing_to_share_0(sixty):
    """The last tooth of a comb that is shifted as far as it goes stands closest to where the shares
    end."""
    mix = mixture(sixty, shares=constant(2, 0.3, 0.7 - 5e-7, 0.0),
                  parts=PARTS | {"medicine": np.array([])})
    mix.offsets[:] = [0, 1 - 2**-24]
    mix.restore([])
    # teeth at 0 1 2 | 3 ... 7, of 2.4 and 5.6
    assert mix.counts(0, 1) == {"general": 3, "law": 5, "medicine": 0}
    # at 0.99 1.99 | 2.99 ... 7.99
    assert mix.counts(1, 2) == {"general": 2, "law": 6, "medicine": 0}


def test_the_offset_of_a_step_does_not_depend_on_the_shares(sixty):
    """So a change of the shares moves no sample that it need not move: more of one part is more of
    the same."""
    few, many = (mixture(sixty, shares=constant(40, 1 - law, law, 0.0)) for law in (0.3, 0.4))
    assert ((many.taken - few.taken)[:, 1] >= 0).all()
    assert np.diff((many.taken - few.taken)[:, 1]).max() == 1
    assert np.diff((many.taken - few.taken)[:, 1]).min() == 0


# -- which samples -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PARTS)
def test_every_sample_of_a_part_is_seen_once_before_any_is_seen_twice(sixty, name):
    mix, seen = mixture(sixty), Counter(dict.fromkeys(PARTS[name].tolist(), 0))
    for step in range(40):                      # of medicine 64 samples are seen, of its 7
        seen.update(samples_of_part(mix, [step], name))
        assert max(seen.values()) - min(seen.values()) <= 1
    assert min(seen.values()) >= 4


def test_a_step_may_take_a_small_part_several_times(sixty):
    mix = mixture(sixty, shares=constant(3, 0.0, 0.0, 1.0),
                  parts=PARTS | {"medicine": np.array([53, 54, 55])})
    assert sorted(Counter(mix.samples_of_step(0).tolist()).values()) == [2, 3, 3]
    assert sorted(Counter(samples_of_part(mix, range(3), "medicine")).values()) == [8, 8, 8]


def test_each_pass_over_a_part_has_another_order(sixty):
    mix = mixture(sixty, 10, shares=constant(9, 1.0, 0.0, 0.0))
    passes = [[set(samples_of_part(mix, [step], "general")) for step in range(begin, begin + 3)]
              for begin in (0, 3, 6)]
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_the_order_of_a_part_depends_on_its_name_and_on_no_other_part(sixty):
    shares = constant(20, 0.5, 0.5)
    law, general = PARTS["law"], PARTS["general"]
    one, other, renamed = (mixture(sixty, shares=shares, parts=parts) for parts in (
        {"general": general, "law": law}, {"history": PARTS["medicine"], "law": law},
        {"general": general, "laws": law}))
    order = samples_of_part(one, range(20), "law")
    assert order == samples_of_part(other, range(20), "law")
    assert order != samples_of_part(renamed, range(20), "laws")


def test_a_name_gives_the_same_seed_in_every_process():
    assert seed_of("law", 0) == 0x83bf93c837e2037f              # printf '0 law' | b2sum -l 64


def test_the_seed_decides_the_order_and_the_offsets(sixty):
    first, again, other = ([mixture(sixty, seed=seed).samples_of_step(k).tolist()
                            for k in range(9)] for seed in (1, 1, 2))
    assert first == again and all(a != b for a, b in zip(first, other))
    assert (mixture(sixty, seed=1).taken != mixture(sixty, seed=2).taken).any()


def test_steps_may_be_asked_for_in_any_order_and_by_a_copy(sixty):
    mix, copy = mixture(sixty), mixture(sixty)
    wanted = [mix.samples_of_step(step).tolist() for step in range(40)]
    assert [copy.samples_of_step(step).tolist() for step in reversed(range(40))] == wanted[::-1]


# -- dealing -------------------------------------------------------------------------------------

def hands_of_step(data, step, batch_size, accumulation_steps, world_size, **others):
    """All micro-batches of a step, [process][micro-batch]."""
    processes = [mixture(data, batch_size, accumulation_steps, rank, world_size, **others)
                 for rank in range(world_size)]
    return [[process[step * process.per_step + micro] for micro in range(process.per_step)]
            for process in processes]


@pytest.mark.parametrize("deal", [*DEALS, (2, 1, 4)], ids=str)
def test_a_step_has_the_same_samples_however_it_is_dealt(sixty, deal):
    for step in (0, 7, 39):
        hands = sum(hands_of_step(sixty, step, *deal), [])
        whole = sixty.batch(mixture(sixty).samples_of_step(step))
        assert sorted(sample for hand in hands
                      for sample in samples_of(hand)) == sorted(samples_of(whole))
        assert all(len(hand.lengths) == deal[0] and hand.lengths == sorted(hand.lengths)
                   for hand in hands)
        assert all(hand.step_targets == len(whole.targets) and hand.step_samples == 8
                   for hand in hands)


GROUPS = [["general"], ["medicine", "law"]]


@pytest.mark.parametrize("deal", [*DEALS, (2, 1, 4)], ids=str)
def test_of_groups_each_micro_batch_has_one_and_knows_its_targets_in_the_whole_step(sixty, deal):
    # of the groups 2.8 and 5.2 samples a step
    shares = constant(40, 0.35, 0.4, 0.25)
    whole, samples = mixture(sixty, shares=shares), [samples_of(sixty.batch(np.array([i])))[0]
                                                     for i in range(60)]
    for step in (0, 7, 39):
        processes = hands_of_step(sixty, step, *deal, shares=shares, groups=GROUPS)
        drawn = whole.samples_of_step(step)
        for group, mine in enumerate([PARTS["general"], np.arange(30, 60)]):
            hands = [hand for process in processes
                     for hand in process[group * deal[1]:(group + 1) * deal[1]]]
            wanted = drawn[np.isin(drawn, mine)]
            assert sorted(sample for hand in hands
                          for sample in samples_of(hand)) == sorted(samples[i] for i in wanted)
            assert {hand.step_targets for hand in hands} == {sixty.n_targets[wanted].sum()}
            assert {hand.step_samples for hand in hands} == {len(wanted)}
            sizes = [len(hand.lengths) for hand in hands]
            assert max(sizes) - min(sizes) <= 1
        # Over the groups, what one hand had more the other has less: no process has more to do.
        assert {sum(len(hand.lengths) for hand in process)
                for process in processes} == {deal[0] * deal[1]}


def test_a_micro_batch_without_samples_is_an_empty_batch(sixty):
    """Of 8 samples 1 is of the domain, or none: of 8 hands at least 7 are empty."""
    shares = np.array([[1.0, 0.0, 0.0], [0.875, 0.0, 0.125]])
    for step, n_domain in enumerate((0, 1)):
        hands = hands_of_step(sixty, step, 1, 8, 1, shares=shares, groups=GROUPS)[0][8:]
        empty = [hand for hand in hands if not hand.lengths]
        assert len(empty) == 8 - n_domain
        for hand in empty:
            assert [len(hand.tokens), len(hand.at), len(hand.targets), hand.keys] == [0, 0, 0, ()]
            assert hand.tokens.dtype == hand.at.dtype == hand.targets.dtype == torch.int64
            assert hand.step_samples == n_domain and (hand.step_targets > 0) == (n_domain == 1)


def test_an_epoch_is_as_long_as_all_parts_would_last_or_as_told(sixty):
    assert mixture(sixty).steps_per_epoch == 60 // 8
    assert mixture(sixty, steps_per_epoch=3).steps_per_epoch == 3
    without = PARTS | {"general": np.arange(10)}
    assert mixture(sixty, parts=without).steps_per_epoch == 40 // 8


# -- new weights ---------------------------------------------------------------------------------

def test_new_weights_divide_the_total_of_the_parts_and_change_no_earlier_step(sixty):
    before, mix = mixture(sixty), mixture(sixty)
    mix.reweigh(10, {"law": 0.1, "medicine": 0.3})          # 0.5 together: 0.125 and 0.375
    assert np.allclose(mix.shares[10:], [0.5, 0.125, 0.375])
    assert np.allclose(mix.shares[:10], [0.5, 0.3, 0.2])
    assert all((mix.samples_of_step(k) == before.samples_of_step(k)).all() for k in range(10))
    assert (mix.taken[:11] == before.taken[:11]).all()
    assert mix.counts(10, 40) == {"general": 120, "law": 30, "medicine": 90}
    assert mixture(sixty).counts(10, 40) != mix.counts(10, 40)


def test_new_weights_keep_a_share_that_grows(sixty):
    domain = growth(0.3, 0.7, 20)
    mix = mixture(sixty, shares=np.stack([1 - domain, domain / 2, domain / 2], axis=1))
    mix.reweigh(0, {"medicine": 3, "law": 1})
    assert np.allclose(mix.shares, np.stack([1 - domain, domain / 4, domain * 3 / 4], axis=1))


def test_the_history_gives_the_very_same_stream_again(sixty):
    mix, resumed = mixture(sixty), mixture(sixty)
    mix.reweigh(10, {"law": 0.1, "medicine": 0.7})
    mix.reweigh(20, {"general": 1, "law": 0.3})
    mix.reweigh(30, {"law": 2, "medicine": 1})
    # what it was told before does not matter
    resumed.reweigh(5, {"law": 1, "general": 9})
    resumed.restore(pickle.loads(pickle.dumps(mix.history)))
    assert resumed.history == mix.history and len(mix.history) == 3
    assert (resumed.shares == mix.shares).all() and (resumed.taken == mix.taken).all()
    assert all((resumed.samples_of_step(k) == mix.samples_of_step(k)).all() for k in range(40))
    mix.restore([])
    assert (mix.taken == mixture(sixty).taken).all() and mix.history == []


# -- what is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, words", [
    (dict(parts=PARTS | {"law": np.array([])}), "part 'law' has no samples, but a share of 0.3"),
    (dict(parts={name: part[:2] for name, part in PARTS.items()}, accumulation_steps=8),
     "have 6 samples, fewer than the 8 micro-batches of one step"),
])
def test_what_cannot_be_mixed_is_refused(sixty, wrong, words):
    with pytest.raises(ValueError, match=words):
        mixture(sixty, **wrong)


def test_a_part_without_samples_can_be_given_nothing(sixty):
    mix = mixture(sixty, shares=constant(40, 0.5, 0.5, 0.0), parts=PARTS | {"medicine": []})
    with pytest.raises(ValueError, match="part 'medicine' has no samples"):
        mix.reweigh(5, {"law": 1, "medicine": 1})
    assert mix.history == [] and (mix.shares == [0.5, 0.5, 0.0]).all()
    assert mix.counts(0, 40)["medicine"] == 0


# -- several datasets as one ---------------------------------------------------------------------

@pytest.fixture
def texts(cache, tmp_path, tokenizer):
    rows = [{"text": "abcdefghijklm"[:2 + 5 * i % 11]} for i in range(9)]
    return PretrainDataset([write(tmp_path / "texts.jsonl", rows)], tokenizer, max_seq_len=80,
                           log=lambda line: None)


def same(a, b):
    return all(torch.equal(torch.as_tensor(x), torch.as_tensor(y))
               for x, y in zip(a[:6], b[:6])) and a.keys == b.keys


def test_conversations_and_texts_joined_are_the_samples_of_each(sixty, texts):
    both = Joined([sixty, texts])
    assert len(both) == 60 + 9 and both.max_seq_len == 80
    assert both.paths == sixty.paths + texts.paths
    assert "sft.jsonl" in str(both) and "texts.jsonl" in str(both)
    assert same(both.batch(np.arange(60), 5, 7), sixty.batch(np.arange(60), 5, 7))
    assert same(both.batch(60 + np.arange(9)), texts.batch(np.arange(9)))
    mixed = both.batch(np.array([61, 3, 60]))
    ours, its = sixty.batch(np.array([3])), texts.batch(np.array([1, 0]))
    assert samples_of(mixed) == [samples_of(its)[0], *samples_of(ours), samples_of(its)[1]]
    assert mixed.targets.tolist()[its.lengths[0]:][:len(ours.targets)] == ours.targets.tolist()
    assert both.lengths.tolist() == [*sixty.lengths, *texts.lengths]
    assert both.n_targets.tolist() == [*sixty.n_targets, *texts.n_targets]


def test_views_of_one_file_are_joined_in_the_order_given(sixty, texts):
    train, val = sixty.split(0.2, seed=0)
    order = Joined([val, texts, train])
    wanted = [sample for part in (val, texts, train)
              for sample in samples_of(part.batch(np.arange(len(part))))]
    assert samples_of(order.batch(np.arange(69))) == wanted
    # the last, the first, and the first of the texts
    part = order.view(np.array([68, 0, 12]))
    assert samples_of(part.batch(np.arange(3))) == [wanted[68], wanted[0], wanted[12]]
    assert sorted(sample for batch in in_order(order)
                  for sample in samples_of(batch)) == sorted(wanted)


def test_another_split_another_order_or_another_file_is_another_dataset(sixty, texts):
    train, val = sixty.split(0.2, seed=0)
    all_of_them = [Joined([sixty, texts]), Joined([texts, sixty]), Joined([train, texts]),
                   Joined([val, texts]),
                   Joined([sixty.split(0.2, seed=1)[0], texts]), Joined([sixty]),
                   Joined([sixty, texts]).split(0.1, seed=0)[0]]
    assert len({data.key for data in all_of_them}) == 7
    assert Joined([sixty.split(0.2, seed=0)[0], texts]).key == Joined([train, texts]).key


def test_a_mixture_of_joined_datasets_takes_from_each(sixty, texts):
    both = Joined([sixty, texts])
    parts = {"chats": np.arange(60), "texts": 60 + np.arange(9)}
    mix = Mixture(both, parts, constant(5, 0.75, 0.25), batch_size=8, groups=[["chats"], ["texts"]])
    for step in range(5):
        chats, read = mix[2 * step], mix[2 * step + 1]
        assert (len(chats.lengths), len(read.lengths)) == (6, 2)
        assert set(samples_of(read)) <= set(samples_of(texts.batch(np.arange(9))))
        assert chats.step_targets == len(chats.targets)
        assert read.step_targets == len(read.targets) == len(read.tokens)
