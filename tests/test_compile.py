"""
--compile 的规律：编译后的层算的是同一回事，长度不同的批次共用同样的图；做不到的事一开始就说明。
Laws of --compile: compiled layers compute what they did, batches of other lengths share their graphs, and what cannot be
is said at once. Without a GPU: attention's kernel is stood in for, and graphs are run as they are.
"""

import math
from argparse import ArgumentParser
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from model import transformer
from model.generate import sample
from model.transformer import Block
from runtime.args import add_training_args, parse_args
from runtime.processes import World
from runtime.run import Run, compile_layers, place_frozen

HERE = World(rank=0, size=1, device=torch.device("cpu"))


def all_at_once(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What varlen_attn computes, of tensors alone."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    places = torch.arange(q.shape[0])
    sample = torch.searchsorted(cu_seq_q, places, right=True)
    seen = (sample[:, None] == sample) & (places[:, None] >= places)
    scores = torch.einsum("ihk,jhk->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhk->ihk", scores.masked_fill(~seen, -math.inf).softmax(dim=-1), v)


@pytest.fixture
def graphs(monkeypatch):
    """As on a GPU, but what is compiled runs here, operation by operation. Calling it tells how many graphs there are."""
    for module in (transformer, runtime):
        monkeypatch.setattr(module, "has_varlen", lambda device, dtype, head_dim: head_dim % 8 == 0)
    monkeypatch.setattr(varlen, "varlen_attn", all_at_once)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["frames"]["ok"]


def flags(*given):
    parser = ArgumentParser()
    add_training_args(parser)
    return parse_args(parser, ["--dtype", "bfloat16", *given])


@pytest.fixture
def compiling(monkeypatch, graphs):
    monkeypatch.setattr(runtime, "pick_dtype", lambda name, device: getattr(torch, name))
    return flags("--compile", "--device", "cpu")


def learn(model, lengths):
    """Logits at every second position, the gradients of a term, as Run.add_gradients takes them, and those of the whole."""
    tokens, at = torch.arange(sum(lengths)) % 12, torch.arange(0, sum(lengths), 2)
    weights, logits = list(model.parameters()), model(tokens, lengths, at=at).logits
    loss = logits.square().sum()
    of_a_term = torch.autograd.grad(loss / 2, weights, retain_graph=True)
    return logits, *of_a_term, *torch.autograd.grad(loss, weights)


def test_compiled_layers_learn_the_same_and_their_graphs_serve_all_lengths(tiny, compiling, graphs):
    as_it_was, model = (tiny(n_heads=2, n_kv_heads=1, n_layers=3).train() for _ in range(2))
    names = list(model.state_dict())
    compile_layers(model, compiling, HERE)
    for lengths in ([3, 5, 5, 2], [7, 9], [4, 4, 4, 1, 1], [20]):
        for there, here in zip(learn(model, lengths), learn(as_it_was, lengths)):
            assert torch.allclose(there, here, rtol=1e-4, atol=1e-5)
        assert graphs() == 2                                    # one for the layers, one for the last of them
    assert list(model.state_dict()) == names

    # Sampling, whose keys and values grow by a place a token, is none of their business.
    model.eval()
    list(sample(model, [[1, 2], [3]], [4, 4], stop=11, temperature=0.0))
    assert graphs() == 2


@pytest.mark.parametrize("sizes, reason", [
    ({"dropout": 0.1, "n_heads": 2}, "needs dropout 0 .* the model has 0.1 and 8"),
    ({"n_heads": 4}, "a head_dim that 8 divides.* the model has 0 and 4"),
    ({"n_heads": 2, "use_moe": True}, "needs experts of sizes that 8 divides, not quantised; the model has 16 and 24")])
def test_a_model_that_asks_for_numbers_on_its_way_is_not_compiled(sizes, reason, tiny, compiling):
    with pytest.raises(ValueError, match=reason):
        compile_layers(tiny(**sizes).train(), compiling, HERE)


@pytest.mark.parametrize("given, reason", [
    (["--device", "cpu"], "--compile works on a GPU in bfloat16"),
    (["--dtype", "float32"], "--compile works on a GPU in bfloat16"),
    (["--ddp", "--shard", "zero3"], "--compile takes a layer whole, and --shard zero3 gathers its weights in between")])
def test_a_run_that_would_compile_each_batch_anew_ends_before_it_begins(given, reason, capsys):
    with pytest.raises(SystemExit):
        flags("--compile", *given)
    assert reason in capsys.readouterr().err


def test_a_student_and_a_frozen_teacher_are_compiled_and_without_the_flag_neither(tiny, compiling, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda layer, **how: compiled.append(layer))
    teacher, student = tiny(n_heads=2, dropout=0.1), tiny(n_heads=2).train()        # only training drops out
    data = SimpleNamespace(dataset=SimpleNamespace(key="two samples"), step_samples=2, per_step=1, steps_per_epoch=9)
    for args in (flags(), compiling):
        vars(args).update(out_dir=tmp_path, max_steps=9, num_workers=0)
        assert compiled == []
        assert place_frozen(teacher, args, HERE) is teacher
        Run("tiny", args, HERE, {"model": student}, data)
    assert compiled == [*teacher.layers, *student.layers]
