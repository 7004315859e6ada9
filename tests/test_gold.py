"""
两个分词器之间的损失：按相同的字节比较，分词器相同时就是前向 KL。
The loss between two tokenizers: it compares what both write with the same bytes; with one tokenizer it is the forward KL.
"""

import numpy as np
import pytest
import torch

from dataset.lm_dataset import packed_batch, same_text
from distill.fused import Dense, compare, fused_distillation_loss, in_spans, with_rests
from distill.losses import forward_kl, gold, uld
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer

D, END = 5, SPECIAL_TOKENS["<|im_end|>"]


def a_tokenizer(*tokens, **special):
    """All bytes, and these tokens; an earlier one is joined first."""
    ranks = {token: 16 + i for i, token in enumerate([*(bytes([b]) for b in range(256)), *tokens])}
    return Tokenizer(PATTERN, SPECIAL_TOKENS | special, ranks)


OURS = a_tokenizer(b"he", b"ll", b"llo", b"hello")
THEIRS = a_tokenizer(b"el", b"hel", b"lo", b"hello", b"help", b"ll")


def ids(tokenizer, *tokens):
    return [END if token is END else tokenizer.ranks[token] for token in tokens]


def a_batch(tokenizer, *answers):
    """Each answer after a token of the prompt."""
    answers = [[20, *ids(tokenizer, *answer)] for answer in answers]
    is_target = np.concatenate([[False, *[True] * (len(answer) - 1)] for answer in answers])
    return packed_batch(np.concatenate(answers), is_target, np.array([len(answer) for answer in answers]))


def matched(ours, theirs, student, teacher):
    """As TokenDataset.matched."""
    student, teacher = (batch._replace(shared=torch.from_numpy(shared))
                        for batch, shared in zip((student, teacher), ours.shared_tokens(theirs)))
    match, span = same_text(student, ours.n_bytes, teacher, theirs.n_bytes)
    return student._replace(teacher=teacher, match=match, span=span)


# "hello" is he|llo and hel|lo, then "a" and the end; then "hello" is he|llo and one token.
HELLO = matched(OURS, THEIRS, a_batch(OURS, [b"he", b"llo", b"a", END], [b"he", b"llo", END]),
                a_batch(THEIRS, [b"hel", b"lo", b"a", END], [b"hello", END]))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(batch, ours, theirs, scale=1.0):
    """Student (hidden, head, targets) with gradients, teacher."""
    hidden = (scale * randn(len(batch.at), D)).requires_grad_()
    states, head = scale * randn(len(batch.teacher.at), 6, seed=2), randn(theirs.vocab_size, 6, seed=3)
    teacher = Dense(states[batch.match.clamp_min(0)], head, batch=batch, all_states=states)
    return hidden, randn(ours.vocab_size, D, seed=1).requires_grad_(), batch.targets, teacher


def test_each_token_counts_as_the_first_token_of_both_that_the_other_writes_it_with():
    ours, theirs = OURS.shared_tokens(THEIRS)
    assert ours.shape == (OURS.vocab_size,) and theirs.shape == (THEIRS.vocab_size,)
    name = {i: token for token, i in OURS.ranks.items()} | OURS.names
    found = {token: name.get(theirs[i]) for token, i in THEIRS.ranks.items() if len(token) > 1}
    # help is he|l|p here, and he is h|e there
    assert found == {b"el": b"e", b"hel": b"h", b"lo": b"l", b"hello": b"hello", b"help": b"h", b"ll": b"ll"}
    assert {token: name[ours[OURS.ranks[token]]] for token in (b"he", b"llo", b"hello", b"h")} == {
        b"he": b"h", b"llo": b"l", b"hello": b"hello", b"h": b"h"}
    assert ours[END] == theirs[END] == END


def test_special_tokens_are_shared_by_name_or_by_what_they_end():
    theirs = Tokenizer(PATTERN, {"<|endoftext|>": 0, "<|file|>": 1}, {bytes([b]): 2 + b for b in range(256)},
                       chat=a_tokenizer().chat.__class__("{content}\n", "{content}\n", "{content}<|endoftext|>\n"))
    ours, its = OURS.shared_tokens(theirs)
    assert its[0] == END and its[1] == OURS.vocab_size      # their end of a turn is ours; <|file|> is nothing here
    assert ours[END] == END and ours[OURS.special_tokens["<think>"]] == OURS.vocab_size


def test_a_byte_that_the_other_lacks_counts_as_none():
    theirs = Tokenizer(PATTERN, SPECIAL_TOKENS, {b"h": 16, b"e": 17, b"hx": 18}, drops_bytes=True)
    ours, its = OURS.shared_tokens(theirs)
    assert ours[OURS.ranks[b"z"]] == OURS.vocab_size and its[18] == OURS.ranks[b"h"]


def test_one_vocabulary_shares_every_token_with_itself():
    ours, theirs = OURS.shared_tokens(OURS)
    assert np.array_equal(ours, theirs)
    assert all(ours[i] == i for i in [*OURS.ranks.values(), *OURS.special_tokens.values()])


def test_a_span_runs_to_the_next_byte_at_which_both_begin_a_token():
    none, hello = OURS.vocab_size + 1, OURS.ranks[b"hello"]
    assert HELLO.match.tolist() == [0, -1, 2, 3, 4, -1, 5]
    # the first "hello" is one token on neither side, the second of the teacher's, which the student has too
    assert HELLO.span.tolist() == [none, -1, OURS.ranks[b"a"], END, hello, -1, END]


def test_a_span_that_is_cut_on_one_side_is_not_compared():
    batch = matched(OURS, THEIRS, a_batch(OURS, [b"a", b"he"], [b"a", END]), a_batch(THEIRS, [b"a", b"hel"], [b"a", END]))
    assert batch.match.tolist() == [0, 1, 2, 3]
    assert batch.span.tolist() == [OURS.ranks[b"a"], -1, OURS.ranks[b"a"], END]


def over_spans(batch, teacher, hidden, head, temperature=1.0):
    """in_spans of all rows, from logits in float64."""
    log_q, log_p, its = ((states.double() @ weight.double().T / temperature).log_softmax(dim=-1)
                         for states, weight in ((hidden, head), (teacher.states, teacher.head),
                                                (teacher.all_states, teacher.head)))
    rest = torch.zeros(len(hidden), dtype=torch.float64)
    rest[0], rest[4] = log_q[1, batch.targets[1]], log_q[5, batch.targets[5]]
    its_rest = torch.zeros(len(hidden), dtype=torch.float64)
    its_rest[0] = its[1, batch.teacher.targets[1]]
    return (log_p, log_q, rest, its_rest,
            in_spans(teacher._replace(rest=its_rest), slice(None), log_p, log_q, batch.targets, rest))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_sides_are_distributions_and_the_span_has_the_product_of_its_tokens(temperature):
    hidden, head, _, teacher = models(HELLO, OURS, THEIRS)
    log_p, log_q, *_, (p, q) = over_spans(HELLO, teacher, hidden, head, temperature)
    assert torch.allclose(p.exp().sum(dim=1), torch.ones(7, dtype=torch.float64))
    assert torch.allclose(q.exp().sum(dim=1), torch.ones(7, dtype=torch.float64))
    he, llo = OURS.ranks[b"he"], OURS.ranks[b"llo"]
    assert q[0, -1].item() == pytest.approx((log_q[0, he] + log_q[1, llo]).item())
    # the second span is the token hello: as one token, or as the two of the sample
    hello = OURS.ranks[b"hello"]
    assert q[4, hello].exp().item() == pytest.approx(
        (log_q[4, hello].exp() + (log_q[4, he] + log_q[5, llo]).exp()).item())
    assert p[4, hello].item() == pytest.approx(log_p[4, THEIRS.ranks[b"hello"]].item())
    # what begins with h here, but does not go on with llo: "h", "he"
    others = log_q[0, OURS.ranks[b"h"]].exp() + log_q[0, he].exp() * (1 - log_q[1, llo].exp())
    assert q[0, OURS.ranks[b"h"]].exp().item() == pytest.approx(others.item())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_the_fused_loss_is_the_plain_sum_in_value_and_gradient(chunk_rows, temperature):
    """Chunks of any size; gradients reach every token of a span."""
    hidden, head, targets, teacher = models(HELLO, OURS, THEIRS)
    weight = (HELLO.span >= 0).float()
    found = fused_distillation_loss(hidden, head, targets, [teacher], 0.3, temperature, gold, kd_weight=weight,
                                    chunk_bytes=4 * 4 * OURS.vocab_size * chunk_rows)
    found.loss.backward()
    grads = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None

    *_, (p, q) = over_spans(HELLO, teacher, hidden, head, temperature)
    kd = temperature ** 2 * (forward_kl(p, q) * weight).sum()
    ce = torch.nn.functional.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (0.3 * ce + 0.7 * kd).backward()
    assert found.kd.item() == pytest.approx(kd.item(), rel=1e-5) and found.ce.item() == pytest.approx(ce.item(), rel=1e-5)
    for ours, plain in zip(grads, (hidden.grad, head.grad)):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)
    assert (hidden.grad[[1, 5]].abs().sum(dim=1) > 0).all()


def test_the_gradient_equals_finite_differences():
    hidden, head, _, teacher = models(HELLO, OURS, THEIRS)
    log_p, log_q, rest, its_rest, _ = over_spans(HELLO, teacher, hidden.detach(), head.detach())
    teacher = teacher._replace(rest=its_rest)

    def loss(some, rest):
        logits = torch.cat([some, log_q[:, 8:]], dim=1)
        return forward_kl(*in_spans(teacher, slice(None), log_p, logits.log_softmax(dim=1), HELLO.targets, rest)).sum()

    assert torch.autograd.gradcheck(loss, (log_q[:, :8].clone().requires_grad_(), (rest - 0.1).requires_grad_()))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_one_tokenizer_it_is_the_forward_kl(temperature):
    answers = [b"he", b"llo", b"a", END], [b"hello", END]
    batch = matched(OURS, OURS, a_batch(OURS, *answers), a_batch(OURS, *answers))
    hidden, head, targets, teacher = models(batch, OURS, OURS, scale=3.0)
    found = []
    for divergence, one in (gold, teacher), (forward_kl, teacher._replace(batch=None)):
        hidden.grad = head.grad = None
        loss = fused_distillation_loss(hidden, head, targets, [one], 0.3, temperature, divergence)
        loss.loss.backward()
        found.append((loss.kd.detach(), hidden.grad, head.grad))
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    same, also = (compare(hidden, head, targets, [one])["kl"] for one in (teacher, teacher._replace(batch=None)))
    assert same.item() == pytest.approx(also.item(), rel=1e-5)


def test_it_is_0_where_both_agree():
    answers = [b"he", b"llo", END],
    batch = matched(OURS, OURS, a_batch(OURS, *answers), a_batch(OURS, *answers))
    hidden, head, targets, _ = models(batch, OURS, OURS)
    teacher = Dense(hidden.detach(), head.detach(), batch=batch, all_states=hidden.detach())
    found = fused_distillation_loss(hidden, head, targets, [teacher], divergence=gold)
    found.loss.backward()
    assert abs(found.kd.item()) < 1e-5 and hidden.grad.abs().max() < 1e-5


def test_what_is_not_compared_changes_nothing():
    """The tokens of a span that is cut, and of a masked position."""
    hidden, head, targets, teacher = models(HELLO, OURS, THEIRS)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 0, 0])          # nothing of the second sample
    found = fused_distillation_loss(hidden, head, targets, [teacher], divergence=gold, kd_weight=weight)
    found.loss.backward()
    assert hidden.grad[4:].abs().sum() == 0 and hidden.grad[:4].abs().sum() > 0


def test_a_validation_compares_spans_whatever_the_divergence():
    hidden, head, targets, teacher = models(HELLO, OURS, THEIRS)
    weight = HELLO.span >= 0
    found = compare(hidden, head, targets, [teacher], weight)
    loss = fused_distillation_loss(hidden, head, targets, [teacher], divergence=gold, kd_weight=weight)
    assert found["kl"].item() == pytest.approx(loss.kd.item(), rel=1e-5) and "agreement" not in found
    p = (teacher.states @ teacher.head.T).softmax(dim=1)[weight]
    assert found["entropy"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_no_position_gives_0():
    empty = HELLO._replace(**{name: getattr(HELLO, name)[:0] for name in ("at", "targets", "match", "span")})
    hidden, head, targets, teacher = models(empty, OURS, THEIRS)
    for divergence in (gold, uld):
        loss = fused_distillation_loss(hidden, head, targets, [teacher], 0.5, divergence=divergence)
        loss.loss.backward()
        assert loss.loss.item() == 0 and hidden.grad.shape == (0, D)
    assert compare(hidden, head, targets, [teacher])["kl"] == 0
    assert with_rests(hidden, head, targets, [teacher], 1.0)[1].shape == (0,)
