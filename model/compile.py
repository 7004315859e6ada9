"""
逐层编译：同一张图适用于任意数量的词元与样本。
torch.compile, layer by layer: one graph for any number of tokens and samples.
"""

import torch

from model.moe import has_grouped_products
from model.transformer import has_varlen


def compile_layers(model, device: torch.device, dtype: torch.dtype):
    """In place. Generation with a cache bypasses the compiled layers (see Transformer.forward).

    Raises ValueError for a model or device whose layers would need a new graph for each batch.
    """
    config = model.config
    if config.dropout and model.training or not has_varlen(device, dtype, config.head_dim):
        raise ValueError("--compile needs bfloat16 on a GPU from NVIDIA's Ampere on, dropout 0, "
                         f"and a head_dim divisible by 8, of at most 256; this is {device} in "
                         f"{dtype}, dropout {config.dropout:g}, head_dim {config.head_dim}")
    if config.use_moe and not has_grouped_products(device, dtype, model.layers[0].ffn.w1):
        raise ValueError("--compile needs experts of sizes divisible by 8, not quantised; the "
                         f"model has {config.dim} and {config.hidden_dim}. Leave it out")
    # DDP need not split a layer's graph to overlap communication, because layers overlap with each
    # other. And the gradients of single loss terms need a graph that remains for the next term.
    torch._dynamo.config.optimize_ddp = torch._functorch.config.donated_buffer = False
    for layer in model.layers:
        layer.compile(dynamic=True, recompile_limit=64)     # in training or not, last layer or not
