"""
蒸馏中的著名错误：每个错误违反哪条规律，正确写法又怎样守住它。
A zoo of famous mistakes: what each one breaks, shown on a few numbers, and how this repo does it.

Every test holds the wrong version and ours against one law: the wrong one breaks it, ours keeps it. None of these
mistakes crashes, and the loss falls all the same: only a law tells.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dataset.lm_dataset import packed_batch
from distill.features import FeatureProjections, feature_distillation_loss
from distill.fused import TopK, fused_distillation_loss
from distill.losses import distillation_loss_fn, forward_kl, jsd, reverse_kl
from interop.checkpoint import load_model, save_model
from runtime.precision import autocast
from runtime.processes import World, parallelize
from runtime.checkpoint import Progress, save_resume
from runtime.files import write_atomic

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss_of, weight) -> torch.Tensor:
    """Of loss_of(weight), at `weight`."""
    weight = weight.clone().requires_grad_()
    found, = torch.autograd.grad(loss_of(weight), weight)
    return found


# -- 1. What is learned, and from whom ---------------------------------------------------------------------------

def test_a_mask_that_is_not_shifted_with_the_labels():
    """The first word of each answer is never learned, and what follows the answer is."""
    ids, is_target = np.array([10, 11, 20, 21, 10]), np.array([False, False, True, True, False])
    answer = [20, 21]                               # what the assistant said, its end-of-turn last
    labels = ids[1:]
    assert labels[is_target[:-1]].tolist() == [21, 10] != answer
    assert packed_batch(ids, is_target, np.array([5])).targets.tolist() == answer


def test_padding_that_is_told_by_its_id_takes_the_end_of_turn_with_it():
    """Pad with the end-of-turn token, mask that id: a student that never sees an end never stops."""
    END = 2
    samples = [[10, 20, END], [10, 20, 21, 22, END]]
    padded = torch.tensor([sample + [END] * (5 - len(sample)) for sample in samples])
    learned = padded[:, 1:][padded[:, 1:] != END]
    assert END not in learned

    ids = np.array(sum(samples, []))                # ours: no padding to be told from anything
    batch = packed_batch(ids, ids != 10, np.array([len(sample) for sample in samples]))
    assert batch.targets.tolist() == [20, END, 20, 21, 22, END]


def test_a_teacher_left_in_train_mode(tiny, byte_tokenizer, tmp_path):
    """With its dropout on, the teacher teaches something else each time it is asked."""
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    made = tiny(dropout=0.5, vocab_size=tokenizer.vocab_size)
    save_model(made.train(), tokenizer, tmp_path / "teacher.pth")
    tokens = torch.arange(6)

    def differs(teacher):
        with torch.no_grad():
            once, again = (teacher(tokens, [6]).logits for _ in range(2))
        return distillation_loss_fn(once, again).item()

    teacher, _ = load_model(tmp_path / "teacher.pth")
    assert differs(made) > 0.01 and differs(teacher) == 0.0


def test_a_teacher_in_fp32_beside_a_student_in_bf16(tiny):
    """The student alone under autocast: it is taught away rounding errors that it cannot but make."""
    teacher, student, tokens = tiny(), tiny(), torch.arange(6)
    with torch.no_grad():
        exact = teacher(tokens, [6]).logits
        with autocast(CPU, torch.bfloat16):
            rounded, taught = student(tokens, [6]).logits, teacher(tokens, [6]).logits
    # They are one model: there is nothing to teach.
    assert distillation_loss_fn(rounded, exact).item() > 1e-6
    assert distillation_loss_fn(rounded, taught).item() == 0.0


def test_a_smaller_vocabulary_filled_up_with_zeros():
    """A logit of 0 is no probability of 0: a student that is perfect on its words is told it is not."""
    student = randn(4, 6)
    teacher = F.pad(student, (0, 2), value=-20.0)   # agrees on six words, and never says the other two
    wrong = distillation_loss_fn(F.pad(student, (0, 2), value=0.0), teacher)
    assert wrong.item() > 0.1
    with pytest.raises(ValueError, match=r"\(4, 6\).*\(4, 8\)"):
        distillation_loss_fn(student, teacher)
    assert distillation_loss_fn(student, teacher[:, :6]).item() == 0.0


# -- 2. The formula ----------------------------------------------------------------------------------------------

def test_a_cross_entropy_by_the_name_of_kl():
    """Without the teacher's entropy the gradient is right, but the figure never reaches 0: how far is it still?"""
    logits = randn(6, 11)
    p = logits.softmax(dim=-1)
    wrong = -(p * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    entropy = -(p * p.log()).sum(dim=-1).mean()
    assert wrong.item() == pytest.approx(entropy.item()) and wrong > 1
    assert distillation_loss_fn(logits, logits).item() == pytest.approx(0, abs=1e-6)


def test_temperature_squared_left_out():
    """At T = 4 the gradient is a sixteenth: beside the labels the teacher falls silent."""
    student, teacher = 0.1 * randn(8, 10), 0.1 * randn(8, 10, seed=1)

    def size(loss_of):
        return gradient(loss_of, student).norm().item()

    at_1 = size(lambda z: distillation_loss_fn(z, teacher, 1.0))
    wrong = size(lambda z: forward_kl((teacher / 4).log_softmax(-1), (z / 4).log_softmax(-1)).mean())
    assert wrong == pytest.approx(at_1 / 16, rel=0.05)
    assert size(lambda z: distillation_loss_fn(z, teacher, 4.0)) == pytest.approx(at_1, rel=0.05)


def test_a_softmax_of_a_softmax():
    """Of numbers in [0, 1], such as attention, it makes almost equal ones: all distributions look alike."""
    p, q = torch.tensor([[0.98, 0.01, 0.01]]), torch.tensor([[0.01, 0.98, 0.01]])
    true = 0.97 * math.log(98)                      # (.98 - .01) log(.98 / .01) = 4.4
    assert distillation_loss_fn(q, p).item() < true / 10
    assert forward_kl(p.log(), q.log()).item() == pytest.approx(true)


def test_a_kl_in_bf16():
    """Log-probabilities of two or three digits: a small KL is lost in their rounding."""
    teacher = randn(32, 1000).bfloat16()
    student = (teacher.float() + 0.01 * randn(32, 1000, seed=1)).bfloat16()
    true = forward_kl(teacher.double().log_softmax(-1), student.double().log_softmax(-1)).mean().item()     # 5e-5
    wrong = forward_kl(teacher.log_softmax(-1), student.log_softmax(-1)).float().mean().item()
    assert abs(wrong - true) > 5 * true
    assert distillation_loss_fn(student, teacher).item() == pytest.approx(true, rel=0.01)


def test_beta_of_nine_tenths_is_no_nine_tenths_of_the_reverse_kl():
    """JSD's beta is no mixer between the two KLs: towards either end the formula falls to 0."""
    log_p, log_q = ((3 * randn(1, 50, seed=seed)).double().log_softmax(dim=-1) for seed in (0, 1))
    reverse = reverse_kl(log_p, log_q).item()
    for beta in (0.9, 0.99, 0.999):
        believed = (1 - beta) * forward_kl(log_p, log_q).item() + beta * reverse
        assert jsd(log_p, log_q, beta).item() < 0.1 * believed
    assert jsd(log_p, log_q, 0.999).item() < jsd(log_p, log_q, 0.9).item() < jsd(log_p, log_q, 0.5).item()
    assert jsd(log_p, log_q, 1 - 1e-6, normalised=True).item() == pytest.approx(reverse, rel=0.01)


def test_the_tail_of_a_top_k_dropped():
    """Both cut to the teacher's top k and made to sum to 1: what the student says beyond them costs nothing."""
    p_top, q = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.05, 0.025, 0.9, 0.025]])       # the teacher keeps .25
    q_top = q[:, :2]
    wrong = forward_kl((p_top / p_top.sum()).log(), (q_top / q_top.sum()).log())
    assert wrong.item() == pytest.approx(0, abs=1e-6)

    top = TopK(torch.tensor([[0, 1]]), p_top.log(), tail=torch.tensor([0.25]).log())
    ours = fused_distillation_loss(q.log(), torch.eye(4), torch.tensor([0]), top).loss
    assert ours.item() == pytest.approx(0.75 * math.log(10) + 0.25 * math.log(0.25 / 0.925), rel=1e-5)


# -- 3. What the sum is divided by -------------------------------------------------------------------------------

def test_a_mean_divided_by_the_tokens_again():
    """Adam hides it, but the gradient shrinks with the length of the batch, and clipping never bites."""
    logits, targets = randn(8, 5), torch.arange(8) % 5
    batches = [(logits, targets), (logits.repeat(2, 1), targets.repeat(2))]     # the second is the first twice

    def pulls(loss_of):
        """On a bias that all rows share: one batch pulls it as far as the other."""
        return [gradient(lambda bias: loss_of(logits + bias, targets), torch.zeros(5)) for logits, targets in batches]

    def wrong(logits, targets):
        return F.cross_entropy(logits, targets) / len(targets)

    def ours(logits, targets):
        return F.cross_entropy(logits, targets, reduction="sum") / len(targets)

    of_wrong, of_ours = pulls(wrong), pulls(ours)
    assert torch.allclose(of_wrong[1], of_wrong[0] / 2) and torch.allclose(of_ours[1], of_ours[0])
    assert of_wrong[0].norm() < 0.2 * of_ours[0].norm()


def test_batchmean_over_a_grid_of_tokens():
    """F.kl_div's batchmean divides (B, T, V) by B alone: the longer the samples, the louder the teacher."""
    student, teacher = randn(2, 3, 5), randn(2, 3, 5, seed=1)

    def wrong(student, teacher):
        return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean").item()

    rows = student.view(6, 5), teacher.view(6, 5)   # the same six tokens
    assert wrong(student, teacher) == pytest.approx(3 * wrong(*rows))
    assert distillation_loss_fn(student, teacher).item() == pytest.approx(distillation_loss_fn(*rows).item())


def test_a_step_as_a_mean_of_means():
    """A token of a short micro-batch weighs more, and the same data split otherwise is another step."""
    logits, targets = randn(4, 5), torch.arange(4)
    micro_batches = [slice(0, 1), slice(1, 4)]      # one token, three tokens

    def whole(z):
        return F.cross_entropy(z, targets)

    def wrong(z):
        return sum(F.cross_entropy(z[part], targets[part]) / len(micro_batches) for part in micro_batches)

    def ours(z):
        return sum(F.cross_entropy(z[part], targets[part], reduction="sum") / len(z) for part in micro_batches)

    assert torch.allclose(gradient(ours, logits), gradient(whole, logits))
    assert torch.allclose(gradient(wrong, logits)[0], 2 * gradient(whole, logits)[0])       # 1/2 instead of 1/4


def test_alpha_on_the_routers_loss(tiny):
    """The balance of the experts within the alpha mix: with the labels alone, nothing keeps them in use."""
    model, tokens = tiny(use_moe=True), torch.arange(12)
    router, out = model.layers[0].ffn.router.weight, model(tokens, [12])
    ce, kd = F.cross_entropy(out.logits, tokens), distillation_loss_fn(out.logits, randn(12, 12))

    def pull_of_the_balance(loss_of, alpha):
        """What it adds to the gradient of the router."""
        with_it, without = (torch.autograd.grad(loss_of(alpha, balance), router, retain_graph=True)[0]
                            for balance in (out.balance_loss, 0.0))
        return with_it - without

    def wrong(alpha, balance):
        return alpha * ce + (1 - alpha) * (kd + balance)

    def ours(alpha, balance):
        return alpha * ce + (1 - alpha) * kd + balance

    of_wrong, of_ours = ([pull_of_the_balance(loss_of, alpha) for alpha in (0.0, 1.0)] for loss_of in (wrong, ours))
    assert of_wrong[0].norm() > 1e-3 and of_wrong[1].norm() == 0
    assert torch.allclose(of_ours[0], of_ours[1], atol=1e-6) and torch.allclose(of_ours[0], of_wrong[0], atol=1e-6)


# -- 4. What is trained, and what is kept ------------------------------------------------------------------------

def test_feature_projections_made_inside_the_loss():
    """A new nn.Linear at every step is in no optimizer and never learns; the student is pulled all ways."""
    torch.manual_seed(0)
    student, teacher = [randn(20, 4)], [randn(20, 6, seed=1)]
    sizes = SimpleNamespace(dim=4, n_layers=1), SimpleNamespace(dim=6, n_layers=1)

    def wrong(made_before):
        return feature_distillation_loss(*FeatureProjections(*sizes)(student, teacher), reduction="sum")

    def ours(made_before):
        return feature_distillation_loss(*made_before(student, teacher), reduction="sum")

    def fitted(loss_of) -> bool:
        """Whether 60 steps bring the loss near the best that a matrix can do."""
        projections = FeatureProjections(*sizes)
        optimizer = torch.optim.Adam(projections.parameters(), lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            loss = loss_of(projections)
            loss.backward()
            optimizer.step()
        best = teacher[0] - student[0] @ torch.linalg.lstsq(student[0], teacher[0]).solution
        return loss.item() < 1.05 * best.square().mean(dim=-1).sum().item()

    assert fitted(ours) and not fitted(wrong)


def test_small_steps_kept_in_fp16(tmp_path):
    """Beside 1 fp16 has no number nearer than 1 + 1/1024: each resume takes the small steps back."""
    before = torch.tensor([1.0, 0.5, 3.0])
    after = before + 1e-4 * before                  # what a day of small learning rates did
    write_atomic(tmp_path / "wrong.resume", lambda file: torch.save(after.half(), file))
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = after[None]
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    save_resume(tmp_path / "ours.resume", {"model": model}, optimizer, scaler, Progress({}, 1))
    assert torch.equal(torch.load(tmp_path / "wrong.resume").float(), before)
    assert torch.equal(torch.load(tmp_path / "ours.resume")["model"]["weight"][0], after)


@pytest.fixture
def gloo():
    """A process group of this process alone: enough for DDP to do all that it does among many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_calling_the_module_behind_ddp(gloo):
    """model.module(x) in the loss: gradients do not travel, and each process trains a model of its own."""
    travelled = []

    def send(state, bucket):
        travelled.append(bucket.buffer().numel())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    # As a process of two; the other one would send as much.
    model = parallelize(nn.Linear(3, 2, bias=False), World(rank=0, size=2, device=CPU))
    model.register_comm_hook(None, send)
    model.module(randn(5, 3)).sum().backward()
    assert travelled == []
    model(randn(5, 3)).sum().backward()
    assert travelled == [6]
