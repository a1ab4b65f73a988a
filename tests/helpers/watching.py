"""What a model computes, seen by plain hooks, and a model that runs out of memory."""

import functools

import torch

from decoding.steering_hooks import block_output
from model_loading import decoder_blocks

TOKENS = torch.tensor([[256, 10, 20, 30, 40, 50]])


def n_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@torch.inference_mode()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def block_outputs(model, tokens=TOKENS):
    """Every block's output (rows, positions, d), as hooks see it that were registered last."""
    outputs = []
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(block_output(output)))
        for block in decoder_blocks(model)
    ]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return outputs


def fails_at(model, is_too_large):
    """Make passes fail where is_too_large(rows, number of the pass), and list the rows of each."""
    forward, passes = model.forward, []

    @functools.wraps(forward)
    def limited(input_ids, **options):
        passes.append(len(input_ids))
        if is_too_large(len(input_ids), len(passes)):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return forward(input_ids=input_ids, **options)

    model.forward = limited
    return passes
