"""
Muon 的规律：与 torch.optim.Muon 一致，只动各层的矩阵。
Laws of Muon: it agrees with torch.optim.Muon, and changes the matrices of the layers alone.
"""

import pytest
import torch

from interop.checkpoint import build
from model.config import LMConfig
from model.lora import add_lora
from runtime.optim import Muon, orthogonalise, parameter_groups


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shapes", [[(12, 8), (8, 12), (12, 8)], [(5, 5)]])
def test_muon_is_that_of_torch_in_float64(shapes, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)       # torch rounds to bf16
    ours, theirs = ([torch.nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
                    for _ in range(2))
    muon = Muon([{"params": ours, "weight_decay": 0.1, "layers": True}], lr=0.02)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True,
                                 adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for i, pair in enumerate(zip(ours, theirs)):
            for weight in pair:
                weight.grad = randn(*weight.shape, seed=10 * step + i)
        muon.step()
        reference.step()
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_orthogonalise_keeps_the_directions_and_evens_their_lengths():
    matrices = randn(3, 6, 9)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    lengths = torch.linalg.svdvals(found := orthogonalise(matrices))
    assert 0.6 < lengths.min() and lengths.max() < 1.3
    assert (U.mT @ found @ V.mT).diagonal(dim1=-2, dim2=-1).min() > 0.6     # in the same directions
    assert torch.equal(orthogonalise(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_stack_of_experts_is_a_batch_of_matrices():
    stack = torch.nn.Parameter(randn(3, 4, 5))
    alone = [torch.nn.Parameter(expert.clone()) for expert in stack.detach()]
    for weights in ([stack], alone):
        muon = Muon([{"params": weights, "weight_decay": 0.1, "layers": True}], lr=0.1)
        for i, weight in enumerate(weights):
            weight.grad = randn(3, 4, 5, seed=1) if weights[0] is stack else randn(3, 4, 5, seed=1)[i]
        muon.step()
    torch.testing.assert_close(stack, torch.stack(alone))


@pytest.mark.parametrize("more", [{}, {"use_moe": True}, {"architecture": "gpt2"}])
def test_muon_gets_the_layers_matrices_and_adamw_the_rest(more):
    model = build(LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=50, **more))
    layers, others, vectors = parameter_groups({"model": model}, 0.1)
    found = {id(weight): name for name, weight in model.named_parameters()}
    assert all(found[id(weight)].startswith("layers.") for weight in layers["params"])
    assert {found[id(weight)].split(".")[0] for weight in others["params"]} <= {
        "tok_embeddings", "output", "pos_embeddings"}
    assert all(weight.dim() == 1 for weight in vectors["params"])
    assert sum(len(group["params"]) for group in (layers, others, vectors)) == len(found)


def test_adapters_are_adamws():
    model = build(LMConfig(dim=16, n_layers=2, n_heads=2, vocab_size=50))
    add_lora(model, rank=2)
    assert [group["layers"] for group in parameter_groups({"model": model}, 0.1)] == [False]
