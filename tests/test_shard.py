"""
分片与重算的规律：分担一个模型，学到的与独占它时相同；换几个进程，都能接着训练。
Laws of --shard and --grad_checkpoint: a model that is shared out, or whose layers are worked out again, learns what it
would have learned whole; and a run goes on with another number of processes.
"""

import os
import signal
import socket
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from helpers_run import FORKS, ROOT, TINY, complaint, load, rows, same, start, succeed, wait_until
from interop.checkpoint import load_model, new_model, save_model
from model.config import LMConfig
from model.lora import add_lora, lora_state
from model.transformer import KVCache
from runtime.checkpoint import (Progress, load_resume, read_resume, run_state, save_resume,
                                tensors_of)
from runtime.files import keep_previous
from runtime.optim import parameter_groups, trained_weights
from runtime.precision import autocast
from runtime.processes import World, full_tensor, parallelize, release_gathered, sync_gradients

CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def untied(models):
    """models/untied.pth: its head is a matrix of its own."""
    torch.manual_seed(0)
    config = LMConfig(dim=32, n_layers=2, n_heads=2, max_seq_len=128, tie_embeddings=False)
    save_model(*new_model(config, ROOT / "model/tokenizer.json"), models / "untied.pth")


def lesson(name, data, models, student="student"):
    """The script of a lesson, its flags, and the name of the files it writes."""
    flags = {**TINY, "weights": models / f"{student}.pth", "data_path": data / "sft_data.jsonl", "log_interval": 1,
             "max_steps": 4}
    kind = "_moe" if student.endswith("_moe") else ""
    if name == "sft":
        return "train_sft.py", flags, f"full_sft_32{kind}"
    flags |= {"teacher": models / "teacher.pth", "size": "tiny", "alpha": 0.5}
    return "train_distillation.py", flags, f"full_dist_32{kind}"


def assert_close(a: dict, b: dict):
    """Equal, but for fp32 summed in another order, which Adam makes larger where a gradient is near 0: to a fiftieth of
    a step at TINY's learning rate of 0.01."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name, student, shard, more", [
    ("sft", "student", "zero2", {}),
    ("sft", "untied", "zero3", {"accumulation_steps": 2}),
    ("sft", "student_moe", "zero3", {"grad_checkpoint": True}),
    ("distillation", "student", "zero3", {"accumulation_steps": 2, "feature_weight": 0.1, "attention_weight": 0.1}),
    ("distillation", "untied", "zero2", {"accumulation_steps": 2, "grad_checkpoint": True}),
    ("distillation", "student_moe", "zero2", {"plain_loss": True}),
    ("distillation", "student", "zero2", {"lora_rank": 3}),
    ("sft", "student_moe", "zero3", {"optimizer": "adamw"}),
    ("distillation", "untied", "zero2", {"optimizer": "adamw", "accumulation_steps": 2}),
])
def test_two_processes_that_share_a_model_learn_what_one_learns(name, student, shard, more, untied, data, models, tmp_path):
    script, flags, file = lesson(name, data, models, student)
    flags |= more
    file += "_lora" * ("lora_rank" in more)
    batch_size = 4 // flags.pop("accumulation_steps", 1)            # of 8 samples a step
    succeed(script, **flags | {"grad_checkpoint": None}, out_dir=tmp_path / "one")
    split = {"batch_size": batch_size, "accumulation_steps": 4 // batch_size, "processes": 2}
    succeed(script, **flags | split, shard=shard, out_dir=tmp_path / "two")
    one, two = (rows(tmp_path / folder / f"{file}.jsonl") for folder in ("one", "two"))
    for whole, shared in zip(one, two, strict=True):
        whole = {key: value for key, value in whole.items() if key in shared}       # less the norm per term
        assert shared == pytest.approx(whole, rel=2e-3, abs=1e-5)
    assert_close(load(tmp_path / "one" / f"{file}.pth"), load(tmp_path / "two" / f"{file}.pth"))
    model, _ = load_model(tmp_path / "two" / f"{file}.pth")
    assert (model.output.weight is model.tok_embeddings.weight) == (student != "untied")


def split(processes: int) -> dict:
    """Eight samples a step, on so many processes of --ddp; one alone is told of itself as torchrun would."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    more = {"ddp": True, "variables": variables} if processes == 1 else {"processes": processes}
    return {"batch_size": 8 // processes, **more}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("processes, others", [(2, 1), (1, 2)])
def test_a_run_that_shares_a_model_goes_on_with_another_number_of_processes(processes, others, data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    flags |= {"feature_weight": 0.1, "max_steps": 6, "save_interval": 3, "shard": "zero3"}
    succeed(script, **flags | split(processes), out_dir=tmp_path)
    unbroken, resume = load(tmp_path / f"{file}.pth"), tmp_path / f"{file}.resume"
    resume.rename(tmp_path / "gone")                                    # killed between the two renames of a save
    said = succeed(script, **flags | split(others) | {"shard": "zero2"}, out_dir=tmp_path, resume=True)
    assert f"resumed {resume} after step 3" in said
    assert_close(load(tmp_path / f"{file}.pth"), unbroken)


@pytest.mark.parametrize("more", [{}, {"lora_rank": 3, "lora_dropout": 0.1}], ids=["all weights", "adapters"])
def test_a_run_that_shares_a_model_and_is_killed_ends_as_the_unbroken_one(more, data, models, tmp_path):
    script, flags, file = lesson("sft", data, models)
    flags |= {"max_steps": 8, "save_interval": 2, "eval_interval": 3, "shard": "zero3", **split(2), **more}
    file += "_lora" * ("lora_rank" in more)
    succeed(script, **flags, out_dir=tmp_path / "unbroken")
    broken = tmp_path / "broken"
    killed = start(script, **flags, out_dir=broken)
    wait_until(lambda: any(row["step"] >= 4 for row in rows(broken / f"{file}.jsonl")))
    killed.send(signal.SIGKILL)
    killed.wait()
    assert "resumed" in succeed(script, **flags, out_dir=broken, resume=True)
    for name in (f"{file}.pth", f"{file}_best.pth"):
        assert same(load(tmp_path / "unbroken" / name), load(broken / name))
    assert rows(tmp_path / "unbroken" / f"{file}.jsonl") == rows(broken / f"{file}.jsonl")


@pytest.mark.parametrize("shard, other", [("zero3", None), (None, "zero2")])
def test_a_run_that_shares_a_model_goes_on_alone_and_one_alone_is_shared(shard, other, data, models, tmp_path):
    script, flags, file = lesson("sft", data, models)
    flags |= {"max_steps": 6, "save_interval": 3, "out_dir": tmp_path}
    alone = {"batch_size": 8}
    succeed(script, **flags | ({"shard": shard} | split(2) if shard else alone))
    unbroken, resume = load(tmp_path / f"{file}.pth"), tmp_path / f"{file}.resume"
    resume.unlink()
    said = succeed(script, **flags | ({"shard": other} | split(2) if other else alone), resume=True)
    assert f"resumed {resume} after step 3" in said
    assert_close(load(tmp_path / f"{file}.pth"), unbroken)


def test_where_a_shared_run_cannot_read_its_resume_file_all_processes_take_the_one_before(data, models, tmp_path):
    script, flags, file = lesson("sft", data, models)
    flags |= {"max_steps": 2, "save_interval": 1, "eval_interval": 0, "out_dir": tmp_path, "shard": "zero2", **split(2)}
    resume = tmp_path / f"{file}.resume"
    succeed(script, **flags)
    weights = load(tmp_path / f"{file}.pth")
    resume.write_bytes(resume.read_bytes()[:100])
    said = succeed(script, **flags, resume=True)
    assert f"{resume} cannot be read" in said and f"resumed {resume} after step 1" in said
    assert same(load(tmp_path / f"{file}.pth"), weights)
    for path in tmp_path.glob(f"{file}.resume*"):
        path.write_bytes(b"no progress")
    assert f"no readable resume file at {resume}" in complaint(script, **flags, resume=True)


def test_a_resume_file_and_a_folder_of_that_name_put_each_other_aside(tmp_path):
    resume, previous = tmp_path / "run.resume", tmp_path / "run.resume.previous"
    for kind in ("file", "folder", "folder", "file", "file"):
        if kind == "file":
            resume.write_text("weights")
        else:
            resume.mkdir()
            (resume / "part").write_text("weights")
        keep_previous(resume)
        assert not resume.exists() and previous.is_dir() == (kind == "folder")


def test_validation_is_the_same_where_a_process_has_fewer_batches(data, models, tmp_path):
    script, flags, file = lesson("distillation", data, models)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((data / "val.jsonl").read_text().splitlines(keepends=True)[:5]))     # one batch, of one process
    flags |= {"val_path": few, "max_steps": 1}
    succeed(script, **flags, out_dir=tmp_path / "one")
    succeed(script, **flags | {"shard": "zero3"} | split(2), out_dir=tmp_path / "two")
    one, two = (rows(tmp_path / folder / f"{file}.jsonl")[-1] for folder in ("one", "two"))
    one = {name: value for name, value in one.items() if not name.startswith("grad_")}      # no process has the whole gradient
    assert "val_kl" in one and two == pytest.approx(one, rel=1e-4)


def test_half_precision_is_not_sharded():
    said = complaint("train_sft.py", shard="zero2", ddp=True, dtype="float16")
    assert "--shard zero2 works in bfloat16 or float32, not in float16" in said


# ------------------------------------------------------------------------------------------- one model, step by step


def on_two_processes(law, *given):
    """law(world, *given) on both of two processes, each of which must come to its end."""
    port = free_port()
    processes = [FORKS.Process(target=one_of_two, args=(law, rank, port, given)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def one_of_two(law, rank, port, given):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    law(World(rank, 2, CPU), *given)
    dist.destroy_process_group()


class Run(NamedTuple):
    """A model and what the loop of a lesson has around it."""

    model: Any
    modules: dict
    optimizer: Any
    world: World


def a_run(model, world, shard) -> Run:
    modules = {"model": parallelize(model, world, shard, model.shard_units())}
    return Run(model, modules, torch.optim.AdamW(parameter_groups(modules, 0.1), lr=0.1), world)


TOKENS, LENGTHS = torch.tensor([1, 5, 2, 11, 3, 3, 7]), [3, 4]


def learn(run, last=True):
    with autocast(CPU, run.world.dtype), sync_gradients(run.modules, last):
        out = run.modules["model"](TOKENS, LENGTHS, with_logits=False)
        loss = F.cross_entropy(F.linear(out.final, run.model.head), TOKENS.roll(-1), reduction="sum")
    loss.backward()


def sample(model) -> torch.Tensor:
    """Logits of two prompts, and of a word each that follows, by way of a cache."""
    cache = KVCache(model.config, 2, 8, CPU)
    with torch.no_grad():
        first = model(TOKENS, LENGTHS, at=torch.tensor([2, 6]), cache=cache).logits
        return torch.cat([first, model(torch.tensor([4, 9]), [1, 1], cache=cache).logits])


def law_of_fresh_weights(world, twin, models):
    for shard, model in zip(("zero2", "zero3"), models):
        run = a_run(model, world, shard)
        for step in range(3):
            learn(run)
            before = sample(model)                          # gathers weights that the step makes old
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            release_gathered(run.modules)
            after = sample(model)
            twin.load_state_dict({name: full_tensor(tensor) for name, tensor in model.state_dict().items()})
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, sample(twin))
            model.train(step == 1)                          # after each step in another mode
        own_part = sum(weight.to_local().numel() for weight in trained_weights(run.optimizer))
        assert own_part <= 0.6 * model.n_parameters()


@pytest.mark.parametrize("kind", [{}, {"use_moe": True, "tie_embeddings": False}])
def test_what_is_generated_between_two_steps_is_of_the_newest_weights(kind, tiny):
    on_two_processes(law_of_fresh_weights, tiny(**kind), [tiny(**kind).train() for _ in range(2)])


def law_of_bf16(world, models):
    world, found = world._replace(dtype=torch.bfloat16), []         # a processor that has none emulates it
    for shard, model in zip(("none", "zero2", "zero3"), models):
        run = a_run(model, world if shard != "none" else world._replace(size=1), shard)
        for last in (False, True):
            learn(run, last)
        found.append([full_tensor(weight.grad) for weight in model.parameters() if weight.requires_grad])
    assert same(found[1], found[0]) and same(found[2], found[0])


def law_of_uneven_rows(world, model, others, folder):
    """Thirteen words are seven and six; what two processes wrote, any number of others puts together."""
    run, more = a_run(model, world, "zero3"), (torch.amp.GradScaler("cpu", enabled=False), Progress({}, 1))
    learn(run)
    run.optimizer.step()
    save_resume(folder / "run.resume", run.modules, run.optimizer, *more)
    dist.barrier()
    written = {name: full_tensor(tensor) for name, tensor in tensors_of(run_state(run.modules, run.optimizer)).items()}
    assert same(tensors_of(read_resume(folder / "run.resume")), written)
    again = a_run(others, world, "zero2")
    load_resume(folder / "run.resume", again.modules, again.optimizer, *more)
    found = tensors_of(run_state(again.modules, again.optimizer))
    assert same({name: full_tensor(tensor) for name, tensor in found.items()}, written)


def test_a_resume_file_holds_all_rows_also_where_they_do_not_divide_evenly(tiny, tmp_path):
    on_two_processes(law_of_uneven_rows, tiny(vocab_size=13).train(), tiny(vocab_size=13, seed=1).train(), tmp_path)


def law_of_nan(world, model, folder):
    run, more = a_run(model, world, "zero3"), (torch.amp.GradScaler("cpu", enabled=False), Progress({}, 1))
    if world.rank == 1:
        model.layers[0].attention.wq.weight.data.to_local().fill_(float("nan"))
    with pytest.raises(ValueError, match="wq.weight holds NaN" if world.rank == 1 else "a tensor of another process"):
        save_resume(folder / "run.resume", run.modules, run.optimizer, *more)
    assert not any(folder.iterdir())


def test_where_one_process_has_a_nan_none_saves(tiny, tmp_path):
    on_two_processes(law_of_nan, tiny().train(), tmp_path)


@pytest.mark.parametrize("lora_rank", [0, 3], ids=["all weights", "adapters"])
def test_a_shared_model_in_bf16_has_the_gradients_of_autocast_to_the_bit(lora_rank, tiny):
    models = [tiny().train() for _ in range(3)]
    for model in models if lora_rank else []:
        torch.manual_seed(0)
        add_lora(model, lora_rank)
        for weight in lora_state(model).values():
            torch.nn.init.normal_(weight, std=0.3)
    on_two_processes(law_of_bf16, models)


# ------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("kind", [{}, {"use_moe": True}])
def test_layers_that_are_worked_out_again_give_the_same_gradients_to_the_bit(kind, tiny):
    found = []
    for grad_checkpoint in (False, True):
        model = tiny(dropout=0.3, **kind).train()
        model.grad_checkpoint = grad_checkpoint
        torch.manual_seed(0)                                # of dropout
        out = model(TOKENS, LENGTHS, return_hidden=True)
        (out.logits.square().sum() + out.balance_loss + out.hidden[0].sum() + out.qkv[1].sum()).backward()
        found.append([weight.grad for weight in model.parameters()])
    assert same(*found)


def test_layers_that_are_worked_out_again_keep_less_for_the_gradient(tiny):
    kept = {}
    for grad_checkpoint in (False, True):
        model, sizes = tiny(n_layers=6).train(), []

        def keep(tensor):
            sizes.append(tensor.numel())
            return tensor

        model.grad_checkpoint = grad_checkpoint
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            model(TOKENS, LENGTHS)
        kept[grad_checkpoint] = sum(sizes)
    assert kept[True] < kept[False] / 4


def test_a_model_that_does_not_train_works_nothing_out_again(tiny, monkeypatch):
    model = tiny().eval()
    expected = model(TOKENS, LENGTHS).logits
    model.grad_checkpoint = True
    monkeypatch.setattr("model.transformer.checkpoint", None)
    assert torch.equal(model(TOKENS, LENGTHS).logits, expected)
