"""
逐层编译：同一张图适用于任意数量的词元与样本。
torch.compile, layer by layer: one graph serves any number of tokens and samples.
"""

import torch

from model.moe import has_grouped_products
from model.transformer import has_varlen


def compile_layers(model, device: torch.device, dtype: torch.dtype):
    """In place. Generation with a cache bypasses the compiled layers, see Transformer.forward.

    Raises ValueError for a model or device whose layers would need a new graph for each batch.
    """
    config = model.config
    if config.dropout and model.training or not has_varlen(device, dtype, config.head_dim):
        raise ValueError(f"--compile needs a GPU from NVIDIA's Ampere on in bfloat16, dropout 0, and a head_dim that 8 divides, "
                         f"of at most 256; this is {device} in {dtype}, dropout {config.dropout:g}, head_dim "
                         f"{config.head_dim}. Leave it out")
    if config.use_moe and not has_grouped_products(device, dtype, model.layers[0].ffn.w1):
        raise ValueError(f"--compile needs experts of sizes that 8 divides, not quantised; the model has {config.dim} "
                         f"and {config.hidden_dim}. Leave it out")
    # DDP does not need to cut a layer's graph to overlap communication: layers overlap with each other. And gradients
    # of single loss terms are taken on graphs that must remain for the next term.
    torch._dynamo.config.optimize_ddp = torch._functorch.config.donated_buffer = False
    for layer in model.layers:
        layer.compile(dynamic=True, recompile_limit=64)     # training or not, the last layer or not, ...
