"""
两个分词器之间的损失：按相同的字节比较，分词器相同时就是前向 KL。
The loss between two tokenizers: it compares what both write with the same bytes; with one tokenizer it is the forward KL.
"""

import numpy as np
import pytest
import torch

from dataset.lm_dataset import PromptDataset, SFTDataset, packed_batch, prompts_and_answers, same_text
from distill.fused import Dense, compare, fused_distillation_loss, in_spans, span_rests
from distill.losses import forward_kl, gold
from distill.rollouts import Rollout, rollout_batches
from helpers_run import TINY, complaint, rows, succeed
from interop.checkpoint import load_model, save_model
from model.config import LMConfig
from model.generate import Sampled
from model.tokenizer import PATTERN, SPECIAL_TOKENS, Tokenizer
from model.transformer import Transformer

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
    teacher = Dense(states, head, batch=batch)
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
                         for states, weight in ((hidden, head), (teacher.at_targets, teacher.head),
                                                (teacher.states, teacher.head)))
    rest = torch.zeros(len(hidden), dtype=torch.float64)
    rest[0], rest[4] = log_q[1, batch.targets[1]], log_q[5, batch.targets[5]]
    its_rest = torch.zeros(len(hidden), dtype=torch.float64)
    its_rest[0] = its[1, batch.teacher.targets[1]]
    return (log_p, log_q, rest, its_rest,
            in_spans(teacher, slice(None), log_p, log_q, batch.targets, torch.stack([rest, its_rest], dim=1)))


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

    def loss(some, rest):
        logits = torch.cat([some, log_q[:, 8:]], dim=1)
        rests = torch.stack([rest, its_rest], dim=1)
        return forward_kl(*in_spans(teacher, slice(None), log_p, logits.log_softmax(dim=1), HELLO.targets, rests)).sum()

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
    teacher = Dense(hidden.detach(), head.detach(), batch=batch)
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
    p = (teacher.at_targets @ teacher.head.T).softmax(dim=1)[weight]
    assert found["entropy"].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-5)


def test_no_position_gives_0():
    empty = HELLO._replace(**{name: getattr(HELLO, name)[:0] for name in ("at", "targets", "match", "span")})
    hidden, head, targets, teacher = models(empty, OURS, THEIRS)
    loss = fused_distillation_loss(hidden, head, targets, [teacher], 0.5, divergence=gold)
    loss.loss.backward()
    assert loss.loss.item() == 0 and hidden.grad.shape == (0, D)
    assert compare(hidden, head, targets, [teacher])["kl"] == 0
    assert span_rests(hidden, head, targets, [teacher], 1.0).shape == (0, 2)


def test_a_tokenizer_that_puts_a_space_before_a_text_is_refused(byte_tokenizer, data, cache):
    """The bytes of its answers begin one later."""
    ours = byte_tokenizer()
    theirs = Tokenizer("[a-z]+|.", ours.special_tokens, ours.ranks, prefix_space=True)
    pair = [SFTDataset([data / "sft_data.jsonl"], one, 512) for one in (ours, theirs)]
    with pytest.raises(ValueError, match="answers begin with '' .* and ' ' in the teacher's"):
        pair[0].paired_with(pair[1])


# -- on-policy -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def byte_teacher(byte_tokenizer, tmp_path_factory):
    """A teacher whose tokens are bytes."""
    torch.manual_seed(1)
    path, tokenizer = tmp_path_factory.mktemp("bytes") / "bytes.pth", byte_tokenizer()
    model = Transformer(LMConfig(dim=16, n_layers=1, n_heads=2, max_seq_len=512, vocab_size=tokenizer.vocab_size))
    save_model(model, tokenizer, path)
    return path


@pytest.fixture
def prompts(data, cache, models, byte_tokenizer):
    """Prompts that a teacher of bytes reads too, and the student's tokenizer."""
    _, ours = load_model(models / "student.pth")
    files = [data / "experience_student.jsonl"]
    return PromptDataset(files, ours, 128).paired_with(PromptDataset(files, byte_tokenizer(), 40)), ours


def test_the_teacher_reads_the_bytes_of_the_student_s_answer(prompts):
    data, ours = prompts
    text = ours.encode("monday 7")
    for answer, bytes_, ends in ((text + [ours.end_of_turn], b"monday 7", True), (text, b"monday 7", False),
                                 (text + ours.encode("\xe9")[:1], b"monday 7\xef\xbf\xbd", False),      # half a character
                                 (text + [ours.special_tokens["<|im_start|>"], *text], b"monday 7\xef\xbf\xbd", False)):
        assert data.retold([1], answer) == [*(16 + byte for byte in bytes_), *[data.teacher.tokenizer.end_of_turn] * ends]
    assert len(data.retold([1] * 35, text)) == 40 - 35          # as far as its context reaches


def test_rollouts_are_matched_by_their_bytes(prompts):
    data, ours = prompts
    answer = [*ours.encode("monday 7"), ours.end_of_turn]
    sampled = Sampled(answer, True, [0.0] * len(answer), [0.0] * len(answer), [0.0] * len(answer))
    ((batch, *_),) = rollout_batches([Rollout([20], [30], sampled)], 1, "cpu", data)
    assert prompts_and_answers(batch.teacher) == [[([30], data.retold([30], answer))]]
    n = np.cumsum([0, *ours.n_bytes[answer]])
    assert batch.match.tolist() == n[:-1].tolist() and (batch.span >= 0).all()


def test_a_student_learns_on_policy_from_a_teacher_of_other_tokens(byte_teacher, data, models, tmp_path):
    flags = TINY | {"data_path": data / "experience_student.jsonl", "student": models / "student.pth", "teacher": byte_teacher,
                    "max_new_tokens": 6, "max_steps": 2, "log_interval": 1, "eval_interval": 2, "val_fraction": 0.1,
                    "out_dir": tmp_path, "size": None, "on_policy_fraction": 0.5, "dtype": "float32"}
    assert "--divergence gold" in complaint("train_onpolicy.py", **flags)
    gold = flags | {"divergence": "gold"}
    for more, reason in (({"objective": "pg"}, "--divergence gold"), ({"privileged": "answer"}, "in the student's tokens"),
                         ({"teacher": [byte_teacher] * 2}, "one --teacher")):
        assert reason in complaint("train_onpolicy.py", **gold | {"on_policy_fraction": 1.0} | more)
    succeed("train_onpolicy.py", **gold)
    one, two, validation = rows(tmp_path / "full_onpolicy_32.jsonl")
    assert one["kd"] > 0 and two["kd"] > 0 and validation["val_kl"] > 0
