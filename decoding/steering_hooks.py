"""Add vectors to the residual stream by hooks, and find those that are active on a model (phase 4).

Until it is removed, a hook changes all that a model computes; code that reads or scores asks here first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from support.errors import InputError


def block_output(output: Tensor | tuple) -> Tensor:
    """Return the hidden states (rows, positions, d) in what a decoder block returned: a tensor or a tuple.

    Raises InputError: another shape, such as the four streams that the blocks of Gemma 3n pass on.
    """
    hidden = output[0] if isinstance(output, tuple) else output
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else ""
        raise InputError(
            f"a decoder block returned a {type(hidden).__name__} {shape}, expected (rows, positions, "
            "d): blocks that pass on several streams, as Gemma 3n's do, have no single residual stream; "
            "choose another model"
        )
    return hidden


def block_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states (rows, positions, d) that a decoder block is given.

    Raises InputError: it is given something else.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise InputError(
            f"the first decoder block is given a {type(hidden).__name__}, expected hidden states (rows, "
            "positions, d), so that the model's embeddings cannot be found; name its blocks with block_path, "
            "or do without them"
        )
    return hidden


def hook_error(layer_idx: int) -> InputError:
    """Return the error of a forward pass in which a block's hook was not called."""
    return InputError(
        f"the model ran without calling the hook on block {layer_idx}, as traced code does, so it can "
        "neither be read nor steered there; give the plain model, or name its blocks with block_path"
    )


class Steering:
    """A vector that a hook adds at one layer until `handle` is removed; `active`: whether it does so now."""

    def __init__(
        self, blocks: nn.ModuleList, layer_idx: int, vector: Tensor, alpha: float, scale: float, at_last: bool
    ) -> None:
        """vector: (d,) float32 on the model's device. at_last: only on the last position of each pass."""
        self.layer_idx, self.vector, self.at_last = layer_idx, vector, at_last
        self.alpha, self.scale, self.active, self.n_calls = alpha, scale, True, 0
        self.handle = blocks[layer_idx].register_forward_hook(self.hook)

    def hook(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        """Return the block's output with alpha * v added; never changes a tensor in place."""
        self.n_calls += 1
        if not self.active or self.alpha == 0:
            return None
        return _with_added(output, self.alpha * self.scale * self.vector, self.at_last)


class RowSteering:
    """A vector for each row of a batch, added at one layer, also after rows have left the batch."""

    def __init__(self, added: Tensor, at_last: bool) -> None:
        """added: (rows, d) float32, on the model's device."""
        self.added = self.current = added
        self.at_last, self.n_calls = at_last, 0

    def keep(self, rows: Tensor) -> None:
        self.current = self.added[rows]

    def hook(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        self.n_calls += 1
        return _with_added(output, self.current[:, None], self.at_last)


def _with_added(output: Tensor | tuple, added: Tensor, at_last: bool) -> Tensor | tuple:
    """Return a block's output with `added`, (d,) or (rows, 1, d), on its hidden states (rows, positions, d).

    at_last: only on the last position, where the next token is predicted.
    """
    hidden = block_output(output)
    added = added.to(hidden.device, hidden.dtype)
    if at_last and hidden.shape[1] > 1:
        steered = torch.cat([hidden[:, :-1], hidden[:, -1:] + added], dim=1)
    else:
        steered = hidden + added
    return (steered, *output[1:]) if isinstance(output, tuple) else steered


def active_steering(model: nn.Module) -> list[Steering]:
    """Return the registered vectors that change this model's forward passes at present."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return [owner for owner in owners if isinstance(owner, Steering) and owner.active and owner.alpha]


@contextmanager
def unsteered(model: nn.Module) -> Iterator[None]:
    """Switch off what steers a model while the body runs."""
    switched_off = active_steering(model)
    for steering in switched_off:
        steering.active = False
    try:
        yield
    finally:
        for steering in switched_off:
            steering.active = True


def reject_steered(model: nn.Module, own: Sequence[Steering] = (), remedy: str = "") -> None:
    """Raise InputError, which advises a `remedy` too, if a vector other than `own` is active on the model."""
    first = next((each for each in active_steering(model) if each not in own), None)
    if first:
        raise InputError(
            f"the model is being steered at layer {first.layer_idx} (alpha {first.alpha:g}) by another "
            f"SteeredGenerator; call its clear_steering() or deactivate() first{remedy}"
        )
