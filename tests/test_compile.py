"""
--compile 的规律：编译后的层算的是同一回事，长度不同的批次共用同样的图；做不到的事一开始就说明。
Laws of --compile: compiled layers compute the same, batches of other lengths share their graphs,
and what cannot be compiled is refused at once. Without a GPU, attention's kernel is replaced, and
graphs run operation by operation.
"""

import math
from argparse import ArgumentParser
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

import model.compile
from interop.checkpoint import prepare
from model import transformer
from model.compile import compile_layers
from model.generate import sample
from model.transformer import Block
from runtime.args import add_training_args, parse_args
from runtime.processes import World

CPU = torch.device("cpu")


def masked_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa):
    """What varlen_attn computes, by a mask."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    places = torch.arange(q.shape[0])
    sample = torch.searchsorted(cu_seq_q, places, right=True)
    seen = (sample[:, None] == sample) & (places[:, None] >= places)
    scores = torch.einsum("ihk,jhk->hij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hij,jhk->ihk", scores.masked_fill(~seen, -math.inf).softmax(dim=-1), v)


@pytest.fixture
def n_graphs(monkeypatch):
    """As on a GPU, but compiled graphs run here. Returns a function: how many graphs there are."""
    for module in (transformer, model.compile):
        monkeypatch.setattr(module, "has_varlen", lambda device, dtype, head_dim: head_dim % 8 == 0)
    monkeypatch.setattr(varlen, "varlen_attn", masked_attention)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["frames"]["ok"]


def logits_and_gradients(model, lengths):
    """At every second position; the gradients of one loss term, then those of the whole loss."""
    tokens, at = torch.arange(sum(lengths)) % 12, torch.arange(0, sum(lengths), 2)
    weights, logits = list(model.parameters()), model(tokens, lengths, at=at).logits
    loss = logits.square().sum()
    of_a_term = torch.autograd.grad(loss / 2, weights, retain_graph=True)
    return logits, *of_a_term, *torch.autograd.grad(loss, weights)


def test_compiled_layers_learn_the_same_and_their_graphs_serve_all_lengths(tiny, n_graphs):
    plain, model = (tiny(n_heads=2, n_kv_heads=1, n_layers=3).train() for _ in range(2))
    names = list(model.state_dict())
    compile_layers(model, CPU, torch.bfloat16)
    for lengths in ([3, 5, 5, 2], [7, 9], [20]):
        for a, b in zip(logits_and_gradients(model, lengths), logits_and_gradients(plain, lengths)):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert n_graphs() == 2                              # one for the layers, one for the last
    assert list(model.state_dict()) == names

    # Sampling, whose cache grows by one position per token, does not use the compiled layers.
    list(sample(model.eval(), [[1, 2], [3]], [4, 4], stop=11, temperature=0.0))
    assert n_graphs() == 2


@pytest.mark.parametrize("sizes, reason", [
    ({"dropout": 0.1, "n_heads": 2}, "needs .* dropout 0.* dropout 0.1, head_dim 8"),
    ({"n_heads": 4}, "a head_dim divisible by 8.* dropout 0, head_dim 4"),
    ({"n_heads": 2, "use_moe": True}, "needs experts of sizes divisible by 8.* has 16 and 24")])
def test_a_model_whose_layers_would_need_a_graph_per_batch_is_refused(sizes, reason, tiny, n_graphs):
    with pytest.raises(ValueError, match=reason):
        compile_layers(tiny(**sizes).train(), CPU, torch.bfloat16)


def test_without_a_gpu_in_bf16_nothing_is_compiled(tiny):
    with pytest.raises(ValueError, match="--compile needs bfloat16 on a GPU .* this is cpu in torch.float32"):
        compile_layers(tiny(n_heads=2), CPU, torch.float32)


def test_compiling_and_sharding_exclude_each_other(capsys):
    parser = ArgumentParser()
    add_training_args(parser)
    with pytest.raises(SystemExit):
        parse_args(parser, ["--compile", "--ddp", "--shard", "zero3"])
    assert "--compile compiles whole layers, and --shard zero3 gathers" in capsys.readouterr().err


def test_with_the_flag_and_only_with_it_the_layers_are_compiled(tiny, n_graphs, monkeypatch):
    compiled = []
    monkeypatch.setattr(Block, "compile", lambda layer, **options: compiled.append(layer))
    teacher, student = tiny(n_heads=2, dropout=0.1), tiny(n_heads=2)
    here = World(rank=0, size=1, device=CPU, dtype=torch.bfloat16)
    prepare(student, "none", here)
    assert compiled == []
    prepare(student, "none", here, compiled=True)
    compile_layers(teacher, CPU, torch.bfloat16)            # in eval mode its dropout is inactive
    assert compiled == [*student.layers, *teacher.layers]
