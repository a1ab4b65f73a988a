"""Generate text while vectors are added to the residual stream (phase 4).

The output of decoder block `layer_idx` (counted from 0, where `activation_extractor` reads) becomes
h + alpha * v at every position, or with `steer_positions` "response" only where a token is about to be
generated: at the prompt's last token and at each new one.

Rows of a batch may differ in prompt, seed, vectors and alpha. The random numbers of a row depend on its
seed, its prompt and the step alone: conditions share them, and batch size and order change nothing.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.loop import check_cuda_graphs, decode, hides_left_padding
from decoding.row_sampler import RowSampler, row_uniforms
from decoding.steering_hooks import RowSteering, Steering, hook_error, reject_steered, unsteered
from model_loading import (
    check_layer,
    context_length,
    d_model,
    decoder_blocks,
    on_device,
    pad_token_id,
    plain_model,
)
from support.errors import InputError
from support.vocabulary import ALPHA_UNITS, STEER_POSITIONS
from texts.chat import Prompt, end_tokens, prompt_text
from texts.encoding import decoder, encode

logger = logging.getLogger(__name__)
RowVectors = Mapping[int, Tensor | np.ndarray]  # layer_idx -> (rows, d)


@dataclass(frozen=True)
class Generation:
    """One continuation of a prompt.

    n_tokens: without the one that ended it. has_ended: False if it was cut off at `max_new_tokens`.
    """

    text: str
    n_tokens: int
    has_ended: bool


def _remove_hooks(steering: dict[int, Steering]) -> None:
    while steering:
        steering.popitem()[1].handle.remove()


class SteeredGenerator:
    """Generate text with steering vectors at one or more layers.

    `register_steering` attaches hooks, which act on plain forward passes of the model too. They stay until
    `clear_steering`, the end of the `with` block, or the end of the generator's life:

        with SteeredGenerator(model, tokenizer) as generator:
            generator.register_steering(layer_idx=9, steering_vector=v, alpha=2.0)
            text = generator.generate("The weather today")

    device: moves the model there first; None leaves it where it is.
    alpha_unit: `absolute` adds alpha * v; `residual_norm` adds alpha * residual_norms[layer_idx] * v.
    residual_norms: layer_idx -> norm (`measure_residual_norm(...).median`), needed for `residual_norm`.
    batch_size: rows per batch; halved when memory runs out.
    block_path: dotted path of the block list, for architectures that are not recognised.
    steer_positions: `all`, or `response`: only the last position of each forward pass.
    cuda_graphs: repeat a decoding step as a CUDA graph; see `decoding.graphed_step`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        device: str | torch.device | None = None,
        alpha_unit: str = "absolute",
        residual_norms: dict[int, float] | None = None,
        batch_size: int = 32,
        block_path: str | None = None,
        steer_positions: str = "all",
        cuda_graphs: bool = False,
    ) -> None:
        """Raises InputError: unknown alpha_unit, steer_positions, device, no decoder blocks, cache, graph."""
        model = plain_model(model)
        if alpha_unit not in ALPHA_UNITS:
            raise InputError(f"alpha_unit {alpha_unit!r} is unknown; choose {' or '.join(ALPHA_UNITS)}")
        if steer_positions not in STEER_POSITIONS:
            choices = " or ".join(STEER_POSITIONS)
            raise InputError(f"steer_positions {steer_positions!r} is unknown; choose {choices}")
        self.model = on_device(model, device)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.blocks = decoder_blocks(model, block_path)
        self.alpha_unit, self.residual_norms = alpha_unit, dict(residual_norms or {})
        self.at_last = steer_positions == "response"
        self._hides_padding = hides_left_padding(model, pad_token_id(tokenizer, model))
        self.cuda_graphs = cuda_graphs
        if cuda_graphs:
            check_cuda_graphs(model, pad_token_id(tokenizer, model))
        self._steering: dict[int, Steering] = {}
        weakref.finalize(self, _remove_hooks, self._steering)

    def __enter__(self) -> "SteeredGenerator":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear_steering()

    def register_steering(
        self, layer_idx: int, steering_vector: Tensor | np.ndarray | Sequence[float], alpha: float = 1.0
    ) -> None:
        """Add alpha * steering_vector to the output of block `layer_idx` from now on.

        steering_vector: (d,), used at its own length; with `residual_norm`, another length than 1 logs a
            warning. A second vector at the same layer replaces the first.
        Raises InputError, with nothing changed: layer out of range, wrong width, a vector or alpha that is
        not finite, or no residual norm for the layer where `alpha_unit` needs it.
        """
        check_layer(layer_idx, self.blocks)
        vector = _as_tensor(steering_vector, "steering_vector")
        expected = f"({d_model(self.model)},), the width of the model that is steered"
        if vector.shape != (d_model(self.model),):
            raise InputError(f"steering_vector has shape {tuple(vector.shape)}, expected {expected}")
        scale = self.alpha_scale(layer_idx)
        length = vector.norm().item()
        if self.alpha_unit == "residual_norm" and length and abs(length - 1) > 1e-3:
            logger.warning(
                f"the steering vector at layer {layer_idx} has length {length:.3g}: with alpha_unit "
                f"residual_norm, alpha {alpha:g} adds {alpha * length:.3g} residual norms; divide the vector "
                "by its norm"
            )
        vector, alpha = vector.to(self.model.device), _checked_alpha(alpha)
        self.clear_steering(layer_idx)
        self._steering[layer_idx] = Steering(self.blocks, layer_idx, vector, alpha, scale, self.at_last)

    def set_alpha(self, alpha: float, layer_idx: int | None = None) -> None:
        """Change the strength at one layer, or at all registered ones, keeping the vectors."""
        alpha = _checked_alpha(alpha)
        for steering in self._chosen(layer_idx):
            steering.alpha = alpha

    def deactivate(self) -> None:
        """Stop adding anything, keeping vectors and strengths."""
        for steering in self._steering.values():
            steering.active = False

    def activate(self) -> None:
        """Add the registered vectors again after `deactivate`."""
        for steering in self._steering.values():
            steering.active = True

    def clear_steering(self, layer_idx: int | None = None) -> None:
        """Remove the hook at one layer, or all of them; a layer without one is left alone."""
        if layer_idx is None:
            _remove_hooks(self._steering)
        elif layer_idx in self._steering:
            _remove_hooks({layer_idx: self._steering.pop(layer_idx)})

    def added_vector(self, layer_idx: int) -> Tensor:
        """Return what is added at a layer now, (d,) float32, in units of the residual stream."""
        (steering,) = self._chosen(layer_idx)
        return steering.alpha * steering.scale * steering.active * steering.vector

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Return the text of one continuation; see `generate_batch`."""
        return self.generate_batch([prompt], max_new_tokens, temperature, top_k, top_p, [seed])[0].text

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        steering_vectors: RowVectors | None = None,
        alphas: Sequence[float] | None = None,
    ) -> list[Generation]:
        """Return a continuation of each prompt, in their order.

        prompts: texts, or lists of messages, which are rendered in the tokenizer's chat template.
        temperature, top_k, top_p: see `RowSampler`. seeds: one per prompt; 0 by default.
        steering_vectors: layer_idx -> (rows, d), a vector for each prompt, added beside what is
            registered. A row of zeros steers nothing.
        alphas: (rows,) steering strength of each prompt at all these layers.
        Raises InputError: no prompts, one that is empty, too long or cannot be rendered, an option out of
        range, vectors that do not fit prompts and model, or a model that another generator steers.
        """
        reject_steered(self.model, tuple(self._steering.values()))
        if isinstance(prompts, str) or not prompts:
            raise InputError("prompts must be a list with at least one string; for one use generate()")
        seeds = [0] * len(prompts) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise InputError(f"got {len(seeds)} seeds for {len(prompts)} prompts; give one for each")
        sampler = self.sampler(temperature, top_k, top_p)
        texts = [prompt_text(self.tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
        tokens = self.tokenise_prompts(texts, max_new_tokens)
        added = self._added_to_rows(len(prompts), steering_vectors, alphas)

        def run(indices: list[int]) -> list[Generation]:
            uniform = torch.stack([row_uniforms(seeds[i], texts[i], max_new_tokens) for i in indices])
            vectors = {layer: of_layer[indices] for layer, of_layer in added.items()}
            return self._generate_rows([tokens[i] for i in indices], sampler, uniform, vectors)

        return run_in_batches(
            run,
            list(map(len, tokens)),
            self.batch_size,
            "generating",
            self.model,
            equal_lengths=not self._hides_padding,
        )

    def sampler(self, temperature: float, top_k: int, top_p: float) -> RowSampler:
        """Return the sampler of these settings. Raises InputError for one out of range."""
        size = self.model.config.get_text_config(decoder=True).vocab_size
        if top_k > size:
            expected = f"the model's vocabulary has {size} tokens; lower it, or 0 for no limit"
            raise InputError(f"top_k is {top_k} but {expected}")
        return RowSampler(temperature, top_k, top_p)

    def _added_to_rows(
        self, n_rows: int, steering_vectors: RowVectors | None, alphas: Sequence[float] | None
    ) -> dict[int, Tensor]:
        """Return layer_idx -> (rows, d) float32 on the CPU: alpha times the vector of each row."""
        if steering_vectors is None and alphas is None:
            return {}
        if not isinstance(steering_vectors, Mapping) or alphas is None:
            raise InputError("row steering needs both: steering_vectors (layer_idx -> (rows, d)) and alphas")
        strengths = torch.tensor([_checked_alpha(alpha) for alpha in alphas])
        shape, added = (n_rows, d_model(self.model)), {}
        for layer_idx in sorted(steering_vectors):
            check_layer(layer_idx, self.blocks)
            vectors = _as_tensor(steering_vectors[layer_idx], "steering_vectors").cpu()
            if vectors.shape != shape or len(alphas) != n_rows:
                raise InputError(
                    f"got steering_vectors {tuple(vectors.shape)} and {len(alphas)} alphas for "
                    f"{n_rows} prompts; expected {shape} and one alpha for each prompt"
                )
            # Adding 0 turns -0 into 0, so that all unsteered rows have equal keys.
            added[layer_idx] = (strengths * self.alpha_scale(layer_idx))[:, None] * vectors + 0.0
        return added

    def tokenise_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Return each prompt's tokens. Raises InputError: a prompt is empty or too long to be continued."""
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise InputError(f"prompt {index} is empty or not a string ({prompt!r}); remove it")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected 1 or more")
        tokens = encode(self.tokenizer, prompts, self.model)
        limit = context_length(self.model, self.tokenizer)
        for index, ids in enumerate(tokens):
            if len(ids) + max_new_tokens > limit:
                raise InputError(
                    f"prompt {index} has {len(ids)} tokens; with {max_new_tokens} new ones that exceeds "
                    f"the context of {limit}; shorten the prompt or lower max_new_tokens"
                )
        return tokens

    def _generate_rows(
        self, tokens: list[list[int]], sampler: RowSampler, uniform: Tensor, added: dict[int, Tensor]
    ) -> list[Generation]:
        """Return a batch's continuations. uniform: (rows, max_new_tokens); added: layer_idx -> (rows, d)."""
        device, max_new_tokens = self.model.device, uniform.shape[1]
        uniform = uniform.to(device)
        hooks = {layer: RowSteering(vectors.to(device), self.at_last) for layer, vectors in added.items()}
        steered = [*hooks.items(), *self._steering.items()]
        n_before = [steering.n_calls for _, steering in steered]

        def keep(rows: Tensor) -> None:
            for steering in hooks.values():
                steering.keep(rows)

        with ExitStack() as stack:
            for layer, steering in hooks.items():
                stack.enter_context(self.blocks[layer].register_forward_hook(steering.hook))
            continuations = decode(
                self.model,
                tokens,
                lambda logits, rows, step: sampler.choose(logits, uniform[rows, step]),
                max_new_tokens,
                ends=end_tokens(self.model, self.tokenizer),
                pad_id=pad_token_id(self.tokenizer, self.model),
                on_rows_change=keep,
                row_keys=[
                    (*ids, *(vectors[row].numpy().tobytes() for vectors in added.values()))
                    for row, ids in enumerate(tokens)
                ],
                cuda_graphs=self.cuda_graphs,
            )
        n_passes = min(max_new_tokens, max(map(len, continuations)) + 1)
        if self.cuda_graphs:
            n_passes = min(n_passes, 3)  # those of the prompts, of a first step and of one that is recorded
        for (layer, steering), n in zip(steered, n_before, strict=True):
            if steering.n_calls - n < n_passes:
                raise hook_error(layer)
        text = decoder(self.tokenizer)
        # Cutting the prompt off the whole keeps a space that some tokenizers drop from a text's first token.
        return [
            Generation(text([*prompt, *new])[len(text(prompt)) :], len(new), len(new) < max_new_tokens)
            for prompt, new in zip(tokens, continuations, strict=True)
        ]

    def alpha_scale(self, layer_idx: int) -> float:
        """Return one unit of alpha at a layer, in units of the residual stream."""
        if self.alpha_unit == "absolute":
            return 1.0
        norm = self.residual_norms.get(layer_idx)
        if norm is None:
            remedy = f"pass residual_norms={{{layer_idx}: measure_residual_norm(activations).median}}"
            raise InputError(f"alpha_unit 'residual_norm' needs the norm at layer {layer_idx}; {remedy}")
        if not 0 < norm < float("inf"):
            expected = "expected a finite number above 0"
            raise InputError(f"the residual norm at layer {layer_idx} is {norm}, {expected}")
        return norm

    def _chosen(self, layer_idx: int | None) -> list[Steering]:
        layers = list(self._steering) if layer_idx is None else [layer_idx]
        if not set(layers) <= self._steering.keys():
            raise InputError(
                f"no steering is registered at layer {layer_idx} (registered: {sorted(self._steering)})"
            )
        return [self._steering[layer] for layer in layers]


def _as_tensor(values: Any, name: str) -> Tensor:
    """Return values as a float32 tensor. Raises InputError: not numbers, or some are not finite."""
    try:
        tensor = torch.as_tensor(values).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(values).__name__}, expected numbers: {error}") from error
    if not tensor.isfinite().all():
        raise InputError(f"{name} has values that are not finite; extract it again in float32")
    return tensor


def _checked_alpha(alpha: float) -> float:
    if not torch.tensor(float(alpha)).isfinite():
        raise InputError(f"alpha is {alpha}, expected a finite number")
    return float(alpha)


def steering_error(
    generator: SteeredGenerator, layer_idx: int, text: str, read_block: Callable[[str], Tensor]
) -> float:
    """Return how far steered minus unsteered is from alpha * v, in units of alpha * v (largest entries).

    read_block: returns the (d,) output of block `layer_idx`, which is steered, at one position of the text.
    """
    added = generator.added_vector(layer_idx).cpu()
    steered = read_block(text)
    with unsteered(generator.model):
        error = steered - read_block(text) - added
    return (error.abs().max() / added.abs().max()).item()


def main() -> None:
    """Check on a tiny model that steering changes the text and leaves no trace."""
    from support.tiny_models import D_MODEL, tiny_model, tiny_tokenizer

    with SteeredGenerator(tiny_model(), tiny_tokenizer()) as generator:
        plain = generator.generate("Once", max_new_tokens=12)
        generator.register_steering(layer_idx=1, steering_vector=torch.ones(D_MODEL), alpha=3.0)
        assert generator.generate("Once", max_new_tokens=12) != plain
        generator.clear_steering()
        assert generator.generate("Once", max_new_tokens=12) == plain
    print("steered_generation OK: steering changes the text, and no hook is left")


if __name__ == "__main__":
    main()
