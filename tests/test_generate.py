"""
生成与打分的规律：有无缓存结果相同；贪心解码写出的正是打分认为对的。
Laws of model/generate.py and model/score.py: the cache changes nothing, and what greedy decoding
writes is what scoring calls exact.
"""

import math

import pytest
import torch

from model.config import LMConfig
from model.generate import Guide, column_major, choose, generate, generate_steps, sample
from evaluation.scores import score
from model.transformer import KVCache, Transformer

PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [8, 9], [2, 7, 1]]


@pytest.fixture(scope="module")
def counter():
    """A model of 16 tokens that counts: after 3 comes 4, after 15 comes 0. Attention and FFN give 0, the embedding
    is the identity and the head looks one token ahead: its logit is 4 for the next token (the norm makes the single 1
    among 16 numbers a 4) and 0 for any other."""
    config = LMConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=16, max_seq_len=10, norm_eps=0.0,
                      tie_embeddings=False)
    model = Transformer(config).eval()
    with torch.no_grad():
        model.layers[0].attention.wo.weight.zero_()
        model.layers[0].ffn.w2.weight.zero_()
        model.tok_embeddings.weight.copy_(torch.eye(16))
        model.output.weight.copy_(torch.eye(16).roll(1, dims=0))
    return model


def without_cache(model, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor(ids), [len(ids)]).logits[-1].argmax().item())
    return ids[len(prompt):]


# -- the cache -------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{}, {"n_kv_heads": 1}, {"qk_norm": True, "attention_bias": True}, {"use_moe": True}],
                         ids=["plain", "one key/value head", "qk_norm and bias", "experts"])
def test_a_batch_of_unequal_prompts_with_cache_writes_what_each_writes_alone_without(tiny, sizes):
    model = tiny(**sizes)
    assert generate(model, PROMPTS, 8) == [without_cache(model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("tied", [True, False])
def test_column_major_changes_the_layout_of_wide_matrices_and_no_value(tiny, tied):
    model = tiny(tie_embeddings=tied)
    answers, ffn = generate(model, PROMPTS, 8), model.layers[0].ffn
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    column_major(model)
    assert ffn.w1.weight.stride() == (1, ffn.w1.out_features) and ffn.w2.weight.is_contiguous()     # out > in, out < in
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert generate(model, PROMPTS, 8) == answers


def test_the_cache_gives_the_logits_of_the_whole_text(tiny):
    model, texts = tiny(), [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    cache = KVCache(model.config, rows=3, capacity=7, device="cpu")
    model(torch.tensor(sum(texts, [])), [5, 2, 3], cache=cache)
    for new in ([7, 8, 9], [0, 1, 2]):
        texts = [text + [token] for text, token in zip(texts, new)]
        cached = model(torch.tensor(new), [1, 1, 1], cache=cache).logits
        whole = torch.stack([model(torch.tensor(text), [len(text)]).logits[-1] for text in texts])
        assert torch.allclose(cached, whole, atol=1e-4)
    assert cache.lengths.tolist() == [7, 4, 5]


@pytest.mark.parametrize("sizes", [{}, {"n_kv_heads": 4}, {"qk_norm": True, "attention_bias": True}, {"use_moe": True}],
                         ids=["plain", "own key/value heads", "qk_norm and bias", "experts"])
def test_a_filled_cache_takes_several_tokens_per_row_and_forgets_those_that_are_cut(tiny, sizes):
    model, texts = tiny(**sizes), [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
    cache = KVCache(model.config, rows=3, capacity=12, device="cpu")
    model(torch.tensor(sum(texts, [])), [5, 2, 3], cache=cache)
    for new, kept in (([[7, 8, 9], [0, 1, 2], [3, 3, 3]], 1), ([[1, 2], [2, 4], [0, 0]], 2), ([[5], [6], [7]], 1)):
        longer = [text + more for text, more in zip(texts, new)]
        T = len(new[0])
        cached = model(torch.tensor(sum(new, [])), [T] * 3, cache=cache).logits
        whole = torch.cat([model(torch.tensor(text), [len(text)]).logits[-T:] for text in longer])
        assert torch.allclose(cached, whole, atol=1e-4)
        texts = [text[:len(text) - T + kept] for text in longer]
        cache.lengths -= T - kept
    assert cache.lengths.tolist() == [len(text) for text in texts] == [9, 6, 7]


# -- where an answer ends --------------------------------------------------------------------------

def test_the_stop_token_ends_its_row_and_the_others_continue(counter):
    steps = generate_steps(counter, [[3], [10, 4]], max_new_tokens=5, stop=7)
    assert [(step.indices, step.tokens, step.done) for step in steps] == [
        ([0, 1], [4, 5], [False, False]), ([0, 1], [5, 6], [False, False]),
        ([0, 1], [6, 7], [False, True]), ([0], [7], [True])]    # the second row meets 7 first, the first a step later
    assert generate(counter, [[3], [10, 4], [7]], max_new_tokens=5, stop=7) == [[4, 5, 6], [5, 6], [8, 9, 10, 11, 12]]


def test_an_answer_has_at_most_max_new_tokens_and_fits_into_max_seq_len(counter):
    assert generate(counter, [[0]], max_new_tokens=3) == [[1, 2, 3]]
    assert generate(counter, [[0] * 8, [5]], max_new_tokens=99) == [[1, 2], [6, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert generate(counter, [[0], [5]], max_new_tokens=[3, 1]) == [[1, 2, 3], [6]]     # above: 8 + 2 = 1 + 9 = max_seq_len


def test_a_prompt_without_tokens_or_without_room_is_refused(counter):
    for prompts in ([[0] * 10], [[1], [0] * 12], [[1], []]):
        with pytest.raises(ValueError, match="at least one token.*max_seq_len=10"):
            generate(counter, prompts, max_new_tokens=1)


# -- continuous batching ---------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{}, {"use_moe": True}], ids=["dense", "experts"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_a_prompt_gets_the_same_answer_however_few_rows_there_are(tiny, rows, sizes):
    """20 prompts through 1 to 5 rows, each of which ends after 1 to 6 tokens."""
    model, limits = tiny(**sizes), [1 + i % 6 for i in range(20)]
    answers = generate(model, PROMPTS * 5, limits, rows=rows)
    assert answers == [without_cache(model, prompt, n) for prompt, n in zip(PROMPTS * 5, limits)]


def test_places_that_have_become_free_are_filled_a_quarter_of_the_rows_at_a_time(counter):
    """Of 8 rows two must be free before a new prompt enters, so that no pass is made for a single one; the last ones enter
    when there is room."""
    steps = generate_steps(counter, [[i % 4] for i in range(12)], [1, 2] + [3] * 10, rows=8)
    assert [len(step.indices) for step in steps] == [8, 7, 2, 8, 2, 4, 2]
    # The last prompt of all needs one row alone.
    steps = generate_steps(counter, [[i % 4] for i in range(9)], [1] + [3] * 8, rows=8)
    assert [len(step.indices) for step in steps] == [8, 1, 8, 8]


def test_padding_of_the_vocabulary_is_never_sampled(counter):
    """Of the tokens 0 to 4 none follows 4 in the counter's order: its 15 others are equally likely, and 0 is the first."""
    counter.n_tokens = 5
    assert generate(counter, [[3]], 3) == [[4, 0, 1]]
    counter.n_tokens = 16


def test_a_process_without_work_runs_the_forward_passes_of_the_others(counter):
    """Sharded weights are gathered by all processes or by none: this one generates in 2 passes, the others need 3 more."""
    passes, others = [], iter([False] * 2 + [True] * 3 + [False])
    counter.register_forward_hook(lambda *_: passes.append(1))
    assert generate(counter, [[3]], 2, any_busy=lambda busy: next(others) or busy) == [[4, 5]]
    assert len(passes) == 5
    counter._forward_hooks.clear()


def test_only_a_model_that_is_not_sharded_generates_in_inference_mode(counter):
    for any_busy, expected in ((bool, True), (lambda busy: busy, False)):
        step = next(generate_steps(counter, [[3]], 2, any_busy=any_busy))
        assert step.logits[0].is_inference() == expected


# -- statistics of a token -------------------------------------------------------------------

def test_a_sample_has_the_log_probability_and_entropy_of_each_token(tiny):
    model = tiny()
    how = {"temperature": 0.7, "top_k": 5, "generator": torch.Generator().manual_seed(0)}
    for i, answer in sample(model, PROMPTS, 6, stop=3, rows=2, **how):
        ids, n = PROMPTS[i] + answer.tokens, len(answer.tokens)
        log_q = model(torch.tensor(ids), [len(ids)]).logits[-n - 1:-1].log_softmax(dim=-1)
        assert answer.log_q == pytest.approx(log_q[range(n), answer.tokens].tolist(), abs=1e-5)
        assert answer.entropy == pytest.approx((-log_q.exp() * log_q).sum(dim=-1).tolist(), abs=1e-5)
        assert answer.finished == (answer.tokens[-1] == 3) and answer.log_p == []
        assert 3 not in answer.tokens[:-1] and (n == 6 or answer.finished)
    for i, answer in sample(model, PROMPTS, 3, temperature=2.0, log_q_temperature=2.0):
        ids, n = PROMPTS[i] + answer.tokens, len(answer.tokens)
        log_q = (model(torch.tensor(ids), [len(ids)]).logits[-n - 1:-1] / 2).log_softmax(dim=-1)
        assert answer.log_q == pytest.approx(log_q[range(n), answer.tokens].tolist(), abs=1e-5)


def test_the_guide_is_mixed_into_the_distribution(counter, tiny):
    """The counter says 5 after 4, its guide, under a prompt that ends in 9, says 10. Of two equal shares both come as often,
    and each model continues from the sampled token."""
    draws = dict(sample(counter, [[4]] * 400, 2, guide=Guide(counter, [[1, 2, 9]] * 400, 0.5), temperature=1.0,
                        generator=torch.Generator().manual_seed(0)))
    first = torch.tensor([draw.tokens[0] for draw in draws.values()]).bincount(minlength=16) / 400
    likely, other = (54.6 + 1) / 2 / 69.6, 1 / 69.6         # e^4 = 54.6, and 15 more tokens: the hand's counter, above
    assert first[5] == pytest.approx(likely, abs=0.07) and first[10] == pytest.approx(likely, abs=0.07)
    one = next(draw for draw in draws.values() if draw.tokens == [5, 6])
    sure, unsure = math.log(54.6 / 69.6), math.log(other)
    assert one.log_q == pytest.approx([sure, sure], abs=1e-3) and one.log_p == pytest.approx([unsure, sure], abs=1e-3)


# -- sampling --------------------------------------------------------------------------------------

P = torch.tensor([0.15, 0.5, 0.05, 0.3])


def frequencies(n=2000, seed=0, **sampling):
    """How often each of P's four tokens is sampled, of n."""
    generator = torch.Generator().manual_seed(seed)
    tokens = choose(P.log().expand(n, 4), generator=generator, **sampling)
    return tokens.bincount(minlength=4) / n


def test_temperature_0_is_greedy_and_so_is_top_k_1():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(dim=-1)
    assert torch.equal(choose(logits), best)
    assert torch.equal(choose(logits, temperature=1.5, top_k=1), best)
    assert torch.equal(choose(logits, temperature=1.5, top_p=1e-6), best)


@pytest.mark.parametrize("temperature, p", [(1.0, [.15, .5, .05, .3]), (0.5, [.0616, .6849, .0068, .2466])])
def test_tokens_are_sampled_by_the_tempered_distribution(temperature, p):
    # At temperature 1/2 probabilities are squared: .0225, .25, .0025, .09, over their sum .365.
    assert torch.allclose(frequencies(20_000, temperature=temperature), torch.tensor(p), atol=0.015)


def test_top_k_and_top_p_keep_the_most_likely_tokens():
    # In decreasing order .5, .3, .15, .05 sum to .5, .8, .95, 1.
    for how, kept in (({"top_k": 1}, [1]), ({"top_k": 2}, [1, 3]), ({"top_k": 3}, [0, 1, 3]),
                      ({"top_k": 4}, [0, 1, 2, 3]), ({"top_k": 9}, [0, 1, 2, 3]),
                      ({"top_p": 0.4}, [1]), ({"top_p": 0.49}, [1]), ({"top_p": 0.51}, [1, 3]),
                      ({"top_p": 0.79}, [1, 3]), ({"top_p": 0.81}, [0, 1, 3]), ({"top_p": 0.96}, [0, 1, 2, 3])):
        assert frequencies(temperature=1.0, **how).nonzero().flatten().tolist() == kept


def test_the_kept_tokens_share_the_probability_of_the_dropped_ones():
    assert torch.allclose(frequencies(20_000, temperature=1.0, top_k=2), torch.tensor([0, .625, 0, .375]), atol=0.015)


def test_a_row_takes_one_random_number_however_many_tokens_there_are():
    ours, plain = (torch.Generator().manual_seed(0) for _ in range(2))
    for how in ({}, {"top_k": 50}, {"top_p": 0.5}):
        choose(torch.randn(8, 1000), temperature=1.0, generator=ours, **how)
        torch.rand(8, generator=plain)
        assert torch.equal(ours.get_state(), plain.get_state())


def test_a_token_of_probability_0_is_never_sampled():
    logits = torch.full((5000, 6), -torch.inf).index_fill(1, torch.tensor([1, 4]), 3.0)
    for how in ({}, {"top_k": 5}, {"top_p": 0.99}):
        generator = torch.Generator().manual_seed(0)
        assert choose(logits, 1.0, generator=generator, **how).unique().tolist() == [1, 4]


def test_the_same_seed_writes_the_same_text_and_another_seed_another(tiny):
    model = tiny()

    def text(seed):
        return generate(model, PROMPTS, 10, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert text(1) == text(1) != text(2)


# -- scoring ---------------------------------------------------------------------------------------

class Ready:
    """Stands for a tokenizer: its conversations are (ids, targets) already."""

    encode_chats = staticmethod(list)


def conversation(prompt, answer):
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def test_exact_is_what_greedy_decoding_writes(tiny):
    model = tiny()
    answers = generate(model, PROMPTS, 6)
    right = [conversation(prompt, answer) for prompt, answer in zip(PROMPTS, answers)]
    wrong = [conversation(prompt, answer[:i] + [(answer[i] + 1) % 12] + answer[i + 1:])
             for i, (prompt, answer) in enumerate(zip(PROMPTS, answers))]
    assert [s.exact for s in score(model, Ready, right + wrong)] == [True] * 4 + [False] * 4


def test_log_p_is_the_sum_over_the_answer_that_a_hand_makes(counter):
    # Of e^4 + 15 = 69.6 parts the next token has e^4 = 54.6, and each of the 15 others one.
    right, other = 4 - math.log(math.exp(4) + 15), -math.log(math.exp(4) + 15)
    scores = score(counter, Ready, [conversation([3], [4, 5, 6]), conversation([0, 3], [4, 9, 10])])
    assert [s.log_p for s in scores] == pytest.approx([3 * right, 2 * right + other], rel=1e-5)
    assert [(s.n_tokens, s.exact) for s in scores] == [(3, True), (3, False)]


def test_scores_come_in_the_order_given_and_do_not_depend_on_the_batches(tiny):
    model = tiny()
    chats = [conversation(prompt, [1, 2, 3][:1 + i % 3]) for i, prompt in enumerate(PROMPTS * 2)]
    alone = [score(model, Ready, [chat])[0] for chat in chats]
    for tokens_per_batch in (1, 13, 4096):
        together = score(model, Ready, chats, tokens_per_batch=tokens_per_batch)
        assert [s.log_p for s in together] == pytest.approx([s.log_p for s in alone], rel=1e-4)
        assert [s.n_tokens for s in together] == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_model_agrees_with_itself_everywhere_and_no_divergence_lies_between(tiny):
    model, other = tiny(), tiny(seed=1)
    chats = [conversation(prompt, [1, 2, 3]) for prompt in PROMPTS]
    assert all(s.agree == s.n_tokens == 3 and abs(s.kl) < 1e-5
               for s in score(model, Ready, chats, reference=model))
    assert all(s.agree <= 3 and s.kl > 0.01 for s in score(model, Ready, chats, reference=other))


def test_kl_is_from_the_reference_to_the_model_at_each_token_of_the_answer(tiny):
    model, reference = tiny(), tiny(seed=1)
    ids, targets = conversation([1, 2], [3, 4])
    p, q = (m(torch.tensor(ids[:-1]), [3]).logits[1:].double().softmax(dim=-1) for m in (reference, model))
    by_hand = (p * (p.log() - q.log())).sum().item()
    assert score(model, Ready, [(ids, targets)], reference)[0].kl == pytest.approx(by_hand, rel=1e-4)


def test_a_conversation_longer_than_the_model_is_named(counter):
    with pytest.raises(ValueError, match="sample 2 has 12 tokens, more than the model's max_seq_len=10"):
        score(counter, Ready, [conversation([1], [2]), conversation([1] * 12, [2])])
