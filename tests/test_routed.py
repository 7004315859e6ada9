"""
分派教师的规律：每行只由自己的教师教，损失等于各教师单独的损失之和。
Laws of routed teachers: each row learns from its own teacher alone, and the loss is the sum of the teachers' losses.
"""

import json

import numpy as np
import pytest
import torch

from dataset.formats import BadLine, read_routes, to_messages
from dataset.lm_dataset import MicroBatches, SFTDataset, in_order
from distill.fused import Dense, compare, fused_distillation_loss
from distill.losses import forward_kl, pick_divergence
from distill.rollouts import Rollout, rollout_batches
from distill.teachers import Teacher, read_once, teacher_outputs
from helpers_run import TINY, complaint, first_gradients, rows, succeed
from interop.checkpoint import load_model, new_model, save_model
from model.config import LMConfig
from model.generate import Sampled
from model.tokenizer import Tokenizer
from runtime.args import parse_teacher
from runtime.processes import World

SCRIPT, NAMES = "train_distillation.py", ["roads", "numbers"]
ROADS = [{"conversations": [{"role": "user", "content": f"{n} red ku" + "burg" * n},
                            {"role": "assistant", "content": "zo" * n + "burg"}], "leaf": "roads/red"} for n in range(1, 6)]
NUMBERS = [{"conversations": [{"role": "user", "content": f"{n} +7 48"}, {"role": "assistant", "content": str(7 * n + 48)}],
            "teacher": "numbers", "leaf": "roads/of no account"} for n in range(3)]


def write(path, some) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return str(path)


@pytest.fixture(scope="module")
def world(models, tmp_path_factory) -> dict:
    """Eight rows of two teachers of different widths, and the rows of each alone."""
    folder = tmp_path_factory.mktemp("routed")
    mixed = [ROADS[0], NUMBERS[0], ROADS[1], ROADS[2], NUMBERS[1], NUMBERS[2], *ROADS[3:]]
    torch.manual_seed(5)
    small, tokenizer = new_model(LMConfig(dim=24, n_layers=1, n_heads=2, max_seq_len=128), "model/tokenizer.json")
    with torch.no_grad():
        small.output.weight.mul_(20)
    save_model(small, tokenizer, folder / "numbers.pth")
    return {"roads": str(models / "teacher.pth"), "numbers": str(folder / "numbers.pth"),
            "mixed": write(folder / "mixed.jsonl", mixed), "of_roads": write(folder / "of_roads.jsonl", ROADS),
            "of_numbers": write(folder / "of_numbers.jsonl", NUMBERS)}


@pytest.fixture
def flags(world, models, tmp_path):
    return {**TINY, "size": "tiny", "data_path": world["mixed"], "val_path": "none", "max_steps": 1, "log_interval": 1,
            "grad_clip": 0, "student": models / "student.pth", "out_dir": tmp_path / "out",
            "teacher": [f"{name}={world[name]}" for name in NAMES]}


def learned(folder) -> list[torch.Tensor]:
    return first_gradients(folder / "full_dist_32.resume")


# -- which teacher -------------------------------------------------------------------------------------------------

def test_a_row_names_its_teacher_by_its_key_its_category_or_its_file(tmp_path):
    def routes(name, keys, names=("roads", "roads/red", "numbers")):
        path = write(tmp_path / f"{name}.jsonl", [ROADS[0] | {"leaf": None} | more for more in keys])
        return read_routes(path, names, to_messages)

    keys = [{"leaf": "roads"}, {"leaf": "roads/blue"}, {"leaf": "roads/red/1"}, {"leaf": "roads", "teacher": "numbers"}, {}]
    assert routes("numbers", keys) == [0, 0, 1, 2, 2]
    with pytest.raises(BadLine, match=r"b.jsonl, line 2: its category is 'roadside', and --teacher names roads, roads/red"):
        routes("b", [{"leaf": "roads"}, {"leaf": "roadside"}])
    with pytest.raises(BadLine, match=r"b.jsonl, line 1: its teacher is 'road', and"):
        routes("b", [{"leaf": "roads", "teacher": "road"}])


def test_what_follows_the_equals_sign_is_a_weight_if_it_is_a_number(tmp_path):
    odd = tmp_path / "a=b.pth"
    odd.touch()
    assert parse_teacher("out/a.pth=0.5") == ("", "out/a.pth", 0.5)
    assert parse_teacher("roads/red=out/a=b.pth") == ("roads/red", "out/a=b.pth", 1.0)
    assert parse_teacher(str(odd)) == ("", str(odd), 1.0) and parse_teacher("a.pth") == ("", "a.pth", 1.0)


def test_a_row_without_a_teacher_stops_before_training_or_is_left_out(flags, cache, tmp_path):
    more = [*ROADS, NUMBERS[0] | {"teacher": "words"}, *NUMBERS]
    stray = flags | {"data_path": write(tmp_path / "stray.jsonl", more)}
    said = complaint(SCRIPT, **stray)
    assert "stray.jsonl, line 6: its teacher is 'words', and --teacher names roads, numbers" in said
    assert not (tmp_path / "out/full_dist_32.resume").exists()
    lines = []
    SFTDataset([stray["data_path"]], Tokenizer.load(), 128, skip_bad_lines=True, log=lines.append).routed(NAMES)
    assert lines[-1].endswith("samples by teacher: roads 5, numbers 3")


@pytest.mark.parametrize("more, reason", [
    ({"feature_weight": 1.0}, "--feature_weight needs exactly one --teacher PATH"), ({"plain_loss": True}, "--plain_loss"),
    ({"divergence": "gold"}, "--divergence gold needs exactly one"),
    ({"teacher_data_path": "mixed"}, "--teacher_data_path"),
    ({"teacher": ["roads", ""]}, "a name of their own"), ({"teacher": ["roads", "roads"]}, "a name of their own"),
    ({"teacher": ["roads"], "feature_weight": 1.0}, "without a name")], ids=str)
def test_what_does_not_go_with_routed_teachers_is_refused(more, reason, flags, world):
    if "teacher" in more:
        more = more | {"teacher": [f"{name}={world['roads']}".lstrip("=") for name in more["teacher"]]}
    if "teacher_data_path" in more:
        more = {"teacher_data_path": world["mixed"]}
    assert reason in complaint(SCRIPT, **flags | more)


# -- the sum of the teachers' losses -------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [{}, {"alpha": 0.5, "temperature": 2.0}, {"divergence": "jsd", "alpha": 0.5}], ids=str)
@pytest.mark.parametrize("rows_at_once", [3, 256])
def test_the_routed_loss_and_its_gradient_are_the_sums_of_two_losses(more, rows_at_once):
    draw, V = torch.Generator().manual_seed(0), 11
    hidden, head = (torch.randn(n, 6, generator=draw, requires_grad=True) for n in (12, V))
    targets = torch.randint(V, (12,), generator=draw)
    teachers = [Dense(torch.randn(n, dim, generator=draw), torch.randn(V, dim, generator=draw), begin=begin)
                for n, dim, begin in ((5, 4, 0), (7, 8, 5))]
    divergence, _ = pick_divergence(more.get("divergence", "forward_kl"), 0.5, 0.1, False)
    settings = more | {"divergence": divergence, "chunk_bytes": rows_at_once * 4 * V * (1 if divergence is forward_kl else 4)}

    def scores(*parts):
        hidden.grad = head.grad = None
        found = [fused_distillation_loss(hidden[at], head, targets[at], some, **settings) for at, some in parts]
        sum(one.loss for one in found).backward()
        compared = [compare(hidden[at], head, targets[at], some) for at, some in parts]
        return [*(sum(values).detach() for values in zip(*found)), hidden.grad, head.grad,
                *(sum(one[name] for one in compared) for name in compared[0])]

    alone = [(slice(0, 5), teachers[:1]), (slice(5, 12), [teachers[1]._replace(begin=0)])]
    for ours, theirs in zip(scores((slice(0, 12), teachers)), scores(*alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def mean_of_alone(flags, world, folder, key=None):
    """What the teachers teach one after the other, weighted by their targets: gradients, or a number of the log."""
    found, sizes = [], []
    for name in NAMES:
        own = {"data_path": world[f"of_{name}"], "teacher": world[name], "out_dir": folder / name}
        succeed(SCRIPT, **flags | own | ({"val_path": world[f"of_{name}"]} if key else {}))
        sizes.append(int(SFTDataset([world[f"of_{name}"]], Tokenizer.load(), 128, log=str).n_targets.sum()))
        found.append([rows(folder / name / "full_dist_32.jsonl")[-1][key]] if key else learned(folder / name))
    return [sum(n * value for n, value in zip(sizes, values)) / sum(sizes) for values in zip(*found)]


DEALS = (8, 1, 1), (1, 8, 1), (4, 1, 2), (1, 4, 2)         # batch size, micro-batches, processes


@pytest.mark.parametrize("more, deals", [({}, DEALS), ({"alpha": 0.5, "temperature": 2.0}, DEALS[1:2]),
                                         ({"divergence": "reverse_kl"}, DEALS[3:])], ids=str)
def test_any_split_of_a_routed_step_has_the_gradient_of_the_teachers_alone(more, deals, flags, world, cache, tmp_path):
    expected = mean_of_alone(flags | more, world, tmp_path)
    for batch_size, accumulation_steps, processes in deals:
        folder = tmp_path / f"{batch_size}x{accumulation_steps}x{processes}"
        said = succeed(SCRIPT, **flags | more | {"batch_size": batch_size, "out_dir": folder},
                       accumulation_steps=accumulation_steps, processes=processes)
        for g, truth in zip(learned(folder), expected, strict=True):
            assert (g - truth).abs().max() <= 4e-6 * truth.abs().max()
    assert "roads (teacher 48 x 4) + numbers (teacher 24 x 1) -> student 32 x 2" in said


def test_in_a_chain_the_named_teachers_teach_the_first_student_alone(flags):
    said = succeed(SCRIPT, **flags, chain=["40x1"])
    assert "numbers (teacher 24 x 1) -> student 40 x 1" in said and "\nteacher 40 x 1 -> student 32 x 2" in said
    assert said.count("samples by teacher") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_compares_each_row_with_its_own_teacher(processes, flags, world, cache, tmp_path):
    flags |= {"learning_rate": 0.0}
    succeed(SCRIPT, **flags | {"val_path": world["mixed"], "batch_size": 8 // processes}, processes=processes)
    found = rows(tmp_path / "out/full_dist_32.jsonl")[-1]
    assert [found["val_kl"]] == pytest.approx(mean_of_alone(flags, world, tmp_path, "val_kl"), rel=1e-5)


# -- each teacher reads its own ------------------------------------------------------------------------------------

class Counting:
    """A model that counts the tokens of its forward passes."""

    def __init__(self, path):
        self.model, _ = load_model(path)
        self.config, self.head, self.read = self.model.config, self.model.head, 0

    def __call__(self, tokens, *more, **named):
        self.read += len(tokens)
        with torch.no_grad():
            return self.model(tokens, *more, **named)


def test_each_teacher_reads_its_own_tokens_and_with_epochs_once(world, cache):
    data = SFTDataset([world["mixed"]], Tokenizer.load(), 128, log=str).routed(NAMES)
    teachers = [Teacher(Counting(world[name]), name=name) for name in NAMES]
    own = [int((data.lengths[data.routes == i] - 1).sum()) for i in (0, 1)]
    micro_batches = MicroBatches(data, 1, accumulation_steps=8)
    for batch in (micro_batches[j] for j in range(8)):          # one sample each, so one teacher each
        only, = teacher_outputs(teachers, batch).predictions
        assert len(only.states) == len(batch.at)
    assert [teacher.source.read for teacher in teachers] == own

    whole = data.batch(np.arange(8))
    live = teacher_outputs(teachers, whole).predictions
    kept = read_once(teachers, (data, data.view(np.array([2, 1]))), 1.0, World(0, 1, torch.device("cpu"), torch.float32))
    assert [teacher.source.read for teacher in teachers] == [3 * n for n in own]
    for one, other in zip(live, teacher_outputs(kept, whole).predictions, strict=True):
        assert one.begin == other.begin
        torch.testing.assert_close(one.states, other.states)
    assert [len(list(in_order(data.read_by(i)))) for i in (0, 1)] == [1, 1]


@pytest.mark.parametrize("read", ["once", "in each epoch"])
def test_an_interrupted_run_of_several_epochs_goes_on_with_two_processes(read, flags, tmp_path):
    """Two processes of 2 samples, then one of 4."""
    flags |= {"max_steps": 6, "teacher_states_gb": 1.0 if read == "once" else 0.0}
    one, two = {"batch_size": 4}, {"batch_size": 2, "processes": 2}
    assert f"the teacher reads a sample {read}" in succeed(SCRIPT, **flags | one)
    broken = {"out_dir": tmp_path / "broken", "save_interval": 3}
    succeed(SCRIPT, **flags | two | broken)
    (tmp_path / "broken/full_dist_32.resume").unlink()              # as if it had stopped after step 3
    assert "after step 3" in succeed(SCRIPT, **flags | one | broken, resume=True)
    for row, other in zip(*(rows(tmp_path / f"{name}/full_dist_32.jsonl") for name in ("out", "broken")), strict=True):
        assert row == pytest.approx(other, rel=1e-3)


# -- on-policy -----------------------------------------------------------------------------------------------------

def test_on_policy_each_teacher_judges_the_answers_to_its_own_prompts(flags, tmp_path):
    """On the data's answers it is distillation; on the student's own the split of a step makes no difference either."""
    shared = {name: value for name, value in flags.items() if name not in ("size", "out_dir")} | {"optimizer": "adamw"}
    succeed(SCRIPT, **shared, size="tiny", out_dir=tmp_path)
    found = {(0, 0): learned(tmp_path)}
    for fraction, batch_size, processes in ((0, 8, 1), (0, 2, 2), (1, 8, 1), (1, 2, 1)):
        folder = tmp_path / f"{fraction}{batch_size}"
        succeed("train_onpolicy.py", **shared | {"batch_size": batch_size}, accumulation_steps=8 // batch_size // processes,
                processes=processes, on_policy_fraction=fraction, max_new_tokens=6, out_dir=folder)
        found[fraction, batch_size] = first_gradients(folder / "full_onpolicy_32.resume")
    for one, other in (((0, 0), (0, 8)), ((0, 0), (0, 2)), ((1, 8), (1, 2))):
        for g, truth in zip(found[one], found[other], strict=True):
            assert (g - truth).abs().max() <= 4e-6 * truth.abs().max()


def test_rollouts_go_to_the_teacher_of_their_prompt():
    rollouts = [Rollout([n], [n], Sampled([n] * n, True, [0.0] * n, [0.0] * n, []), route=route) for n, route in ((3, 1), (5, 0), (2, 0), (4, 1), (1, 0))]
    batches = [each.batch for each in rollout_batches(rollouts, 2, "cpu", None)]
    assert [[(i, part.targets.unique().tolist()) for i, part in batch.parts] for batch in batches] == [
        [(0, [1, 2, 5])], [(1, [3, 4])]]
    assert [batch.targets.unique(sorted=True).tolist() for batch in batches] == [[1, 2, 5], [3, 4]]
    assert batches[0].routes == [0, 0, 0]


def test_on_policy_refuses_a_mixture_to_sample_from_and_other_prompts_for_routed_teachers(flags, world):
    flags = {name: value for name, value in flags.items() if name != "size"}
    assert "several teachers: --objective gkd" in complaint("train_onpolicy.py", **flags, objective="minillm")
    assert "nor --teacher_data_path" in complaint("train_onpolicy.py", **flags, teacher_data_path=world["mixed"])
