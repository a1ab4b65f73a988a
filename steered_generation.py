"""Write text while vectors are added to the residual stream (phase 4).

The output of decoder block `layer_idx` (counted from 0, where `activation_extractor`
reads) becomes h + alpha * v at every position: the prompt's tokens and each token as
it is processed, so that the first generated token is steered like the rest. With
`steer_positions` "response" it does so only where a token is about to be generated: at the
prompt's last token and at each new one.

Rows of a batch may differ in prompt, seed, vector, layers and strength. The random numbers of
a row depend on (its seed, its prompt, the step) alone, so that neither batch size nor
order changes them, and two conditions of one prompt and seed share them.
"""

import logging
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from numbers import Integral
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.loop import check_decodable, decode, hides_left_padding
from decoding.row_sampler import RowSampler, row_uniforms
from decoding.steering_hooks import RowSteering, Steering, refuse_steered
from model_loading import (
    check_layer,
    context_length,
    d_model,
    decoder_blocks,
    pad_token_id,
    plain_model,
)
from support.errors import InputError
from support.vocabulary import ALPHA_UNITS, STEER_POSITIONS
from texts.chat import Prompt, end_tokens, prompt_text
from texts.encoding import encode

logger = logging.getLogger(__name__)

RowVectors = Tensor | np.ndarray | Sequence[Sequence[float]]  # (rows, d)


def _remove_hooks(steering: dict[int, Steering]) -> None:
    while steering:
        _, entry = steering.popitem()
        if entry.handle is not None:
            entry.handle.remove()


class SteeredGenerator:
    """Generate text with steering vectors at one or more layers.

    Hooks are attached by `register_steering` and stay, for plain forward passes of the model
    too, until `clear_steering`, the end of the `with` block, or the end of the generator's life:

        with SteeredGenerator(model, tokenizer) as generator:
            generator.register_steering(layer_idx=9, steering_vector=v, alpha=2.0)
            text = generator.generate("The weather today")

    device: moves the model there first; None leaves it where it is.
    alpha_unit: `absolute` adds alpha * v; `residual_norm` adds alpha * residual_norms[layer_idx] * v,
        the norm being `measure_residual_norm(...).median`.
    residual_norms: layer_idx -> norm, needed for `residual_norm`.
    batch_size: rows a batch; halved when memory runs out.
    steer_positions: `all`, or `generated`: only the last position of each forward pass, which while
        text is written are the prompt's last token and every new one.
    block_path: dotted path of the block list, for architectures that cannot be recognised.
    n_tokens counts the tokens generated so far. has_ended: of each text of the last call, whether the model
    ended it, or else was cut off at the limit.
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
    ) -> None:
        """Raises InputError: unknown alpha_unit or steer_positions, no decoder blocks or no cache found."""
        model = plain_model(model)
        check_decodable(model)
        if steer_positions not in STEER_POSITIONS:
            raise InputError(
                f"steer_positions {steer_positions!r} is unknown; choose {' or '.join(STEER_POSITIONS)}"
            )
        if alpha_unit not in ALPHA_UNITS:
            raise InputError(f"alpha_unit {alpha_unit!r} is unknown; choose {' or '.join(ALPHA_UNITS)}")
        self.model = model if device is None else model.to(device)
        self.tokenizer = tokenizer
        self.blocks = decoder_blocks(model, block_path)
        self.alpha_unit = alpha_unit
        self.residual_norms = dict(residual_norms or {})
        self.batch_size = batch_size
        self.at_last = steer_positions == "response"
        self.n_tokens = 0
        self.has_ended: list[bool] = []
        self._hides_padding = hides_left_padding(model, pad_token_id(tokenizer, model))
        self._steering: dict[int, Steering] = {}
        weakref.finalize(self, _remove_hooks, self._steering)

    def __enter__(self) -> "SteeredGenerator":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.clear_steering()

    def register_steering(
        self, layer_idx: int, steering_vector: Tensor | np.ndarray | Sequence[float], alpha: float = 1.0
    ) -> None:
        """Add alpha * steering_vector to the output of block `layer_idx` from now on.

        steering_vector: (d,), used as long as it is; with `residual_norm`, alpha is in units of that norm
        only for a vector of length 1, and another one is warned of. Several layers may be registered; a
        second vector at the same layer replaces the first. Everything is checked before a hook is attached.
        Raises InputError: layer out of range, wrong width, a vector or alpha that is not
        finite, or no residual norm for the layer where `alpha_unit` needs it.
        """
        check_layer(layer_idx, self.blocks)
        vector = _as_tensor(steering_vector, "steering_vector")
        width = d_model(self.model)
        if vector.shape != (width,):
            raise InputError(
                f"steering_vector has shape {tuple(vector.shape)}, expected ({width},), "
                "the width of the model that is steered"
            )
        scale = self.alpha_scale(layer_idx)
        if self.alpha_unit == "residual_norm" and abs(vector.norm().item() - 1) > 1e-3:
            logger.warning(
                "the steering vector at layer %d has length %.3g: with alpha_unit residual_norm, alpha %g "
                "adds %.3g residual norms; divide the vector by its norm",
                layer_idx,
                vector.norm(),
                alpha,
                alpha * vector.norm(),
            )
        steering = Steering(
            layer_idx, vector.to(self.model.device), _checked_alpha(alpha), scale, self.at_last
        )
        self.clear_steering(layer_idx)
        steering.handle = self.blocks[layer_idx].register_forward_hook(steering.hook)
        self._steering[layer_idx] = steering

    def set_alpha(self, alpha: float, layer_idx: int | None = None) -> None:
        """Change the strength at one layer, or at all registered ones, keeping the vectors."""
        checked = _checked_alpha(alpha)
        for steering in self._chosen(layer_idx):
            steering.alpha = checked

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
        """Return one continuation without its prompt; see `generate_batch`."""
        return self.generate_batch([prompt], max_new_tokens, temperature, top_k, top_p, [seed])[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        layer_idx: int | Sequence[int | Collection[int]] | None = None,
        steering_vectors: RowVectors | Mapping[int, RowVectors] | None = None,
        alphas: Sequence[float] | None = None,
    ) -> list[str]:
        """Return a continuation, without its prompt, for each prompt, in their order.

        prompts: texts to go on with, or lists of messages, which are shown in the tokenizer's chat template;
            see `texts.chat`. Packed by length into batches of `batch_size`.
        temperature, top_k, top_p: see `RowSampler`.
        seeds: one a prompt, 0 if not given.
        layer_idx, steering_vectors (rows, d), alphas (rows,): a vector and strength for each
            prompt, added beside what is registered, so that many conditions share a batch.
            layer_idx is one layer for all, or for each prompt its layer or its set of layers.
            steering_vectors may also be layer -> (rows, d), a vector for each prompt and layer; layer_idx
            is left out then. Alpha 0 leaves a row unsteered.
        Raises InputError: no prompts, an empty one, messages that cannot be shown, one too long for the
        context, an option out of range, row vectors that don't fit prompts and model, or a model that another
        generator steers.
        """
        refuse_steered(self.model, tuple(self._steering.values()))
        if isinstance(prompts, str) or not prompts:
            raise InputError("prompts must be a list with at least one string; for one use generate()")
        row_seeds = [0] * len(prompts) if seeds is None else list(seeds)
        if len(row_seeds) != len(prompts):
            raise InputError(f"got {len(row_seeds)} seeds for {len(prompts)} prompts; give one for each")
        sampler = self.sampler(temperature, top_k, top_p)
        prompts = [prompt_text(self.tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
        tokens = self.tokenise_prompts(prompts, max_new_tokens)
        added = self._row_additions(len(prompts), layer_idx, steering_vectors, alphas)

        def run(indices: list[int]) -> list[tuple[str, bool]]:
            uniform = torch.stack([row_uniforms(row_seeds[i], prompts[i], max_new_tokens) for i in indices])
            here = {layer: vectors[indices] for layer, vectors in added.items()}
            return self._write([tokens[i] for i in indices], max_new_tokens, sampler, uniform, here)

        lengths = [len(ids) for ids in tokens]
        written = run_in_batches(
            run,
            lengths,
            self.batch_size,
            "generating",
            on_halved=self._shrink,
            equal_lengths=not self._hides_padding,
        )
        self.has_ended = [has_ended for _, has_ended in written]
        return [text for text, _ in written]

    def _shrink(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def sampler(self, temperature: float, top_k: int, top_p: float) -> RowSampler:
        """Return the sampler of these settings. Raises InputError for one out of range."""
        size = self.model.config.get_text_config(decoder=True).vocab_size
        if top_k > size:
            raise InputError(
                f"top_k is {top_k} but the model's vocabulary has {size} tokens; lower it, or 0 for no limit"
            )
        return RowSampler(temperature, top_k, top_p)

    def _row_additions(
        self,
        n_rows: int,
        layer_idx: int | Sequence[int | Collection[int]] | None,
        steering_vectors: RowVectors | Mapping[int, RowVectors] | None,
        alphas: Sequence[float] | None,
    ) -> dict[int, Tensor]:
        """Return what is added to each row, layer -> (rows, d) float32, on the CPU."""
        by_layer = isinstance(steering_vectors, Mapping)
        given = [value is not None for value in (layer_idx, steering_vectors, alphas)]
        if not any(given):
            return {}
        if given != [not by_layer, True, True]:
            raise InputError(
                "row steering needs layer_idx, steering_vectors and alphas together; steering_vectors of "
                "layer -> vectors stand without layer_idx"
            )
        row_layers = self._row_layers(n_rows, [set(steering_vectors)] * n_rows if by_layer else layer_idx)
        layers = sorted(set().union(*row_layers))
        if by_layer:
            vectors = {
                layer: _as_tensor(steering_vectors[layer], "steering_vectors").cpu() for layer in layers
            }
        else:
            vectors = dict.fromkeys(layers, _as_tensor(steering_vectors, "steering_vectors").cpu())
        shape = (n_rows, d_model(self.model))
        for of_layer in vectors.values():
            if of_layer.shape != shape or len(alphas) != n_rows:
                raise InputError(
                    f"got steering_vectors {tuple(of_layer.shape)} and {len(alphas)} alphas for "
                    f"{n_rows} prompts; expected {shape} and one alpha for each prompt"
                )
        strengths = torch.tensor([_checked_alpha(alpha) for alpha in alphas])
        added = {}
        for layer in layers:
            here = torch.tensor([layer in chosen for chosen in row_layers])
            # Plus 0 makes -0 a 0, so that all unsteered rows are alike.
            added[layer] = (strengths * here * self.alpha_scale(layer))[:, None] * vectors[layer] + 0.0
        return added

    def _row_layers(self, n_rows: int, layer_idx: int | Sequence[int | Collection[int]]) -> list[set[int]]:
        given = [layer_idx] * n_rows if isinstance(layer_idx, Integral) else list(layer_idx)
        if len(given) != n_rows:
            raise InputError(f"got {len(given)} layers for {n_rows} prompts; give one entry for each")
        row_layers = [{entry} if isinstance(entry, Integral) else set(entry) for entry in given]
        for layer in sorted(set().union(*row_layers)):
            check_layer(layer, self.blocks)
        return row_layers

    def tokenise_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        """Return each prompt's tokens. Raises InputError for one that is empty or too long to go on."""
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

    def _write(
        self,
        tokens: list[list[int]],
        max_new_tokens: int,
        sampler: RowSampler,
        uniform: Tensor,
        added: dict[int, Tensor],
    ) -> list[tuple[str, bool]]:
        """Return each continuation of a batch and whether it ended by itself.

        uniform: (rows, steps), added: layer -> (rows, d).
        """
        device = self.model.device
        uniform = uniform.to(device)
        steered = {layer: RowSteering(vectors.to(device), self.at_last) for layer, vectors in added.items()}

        def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
            return sampler.choose(logits, uniform[rows, step])

        def keep(rows: Tensor) -> None:
            for steering in steered.values():
                steering.keep(rows)

        with ExitStack() as stack:
            for layer, steering in steered.items():
                stack.enter_context(self.blocks[layer].register_forward_hook(steering.hook))
            continuations = decode(
                self.model,
                tokens,
                choose,
                max_new_tokens,
                ends=self._end_tokens(),
                pad_id=pad_token_id(self.tokenizer, self.model),
                rows_change=keep,
                alike=[
                    (*ids, *(vectors[row].numpy().tobytes() for vectors in added.values()))
                    for row, ids in enumerate(tokens)
                ],
                n_largest=sampler.n_largest,
            )
        self.n_tokens += sum(len(new) for new in continuations)
        return [
            (self._decode(prompt, new), len(new) < max_new_tokens)
            for prompt, new in zip(tokens, continuations, strict=True)
        ]

    def _end_tokens(self) -> set[int]:
        return end_tokens(self.model, self.tokenizer)

    def _decode(self, prompt: list[int], new: list[int]) -> str:
        """Return the text of the new tokens as it stands behind the prompt.

        Decoding both and cutting the prompt off keeps the space that some tokenizers drop
        from the first token of a text.
        """
        whole = self.tokenizer.decode([*prompt, *new], skip_special_tokens=True)
        return whole[len(self.tokenizer.decode(prompt, skip_special_tokens=True)) :]

    def alpha_scale(self, layer_idx: int) -> float:
        """Return what one unit of alpha is at a layer, in units of the residual stream."""
        if self.alpha_unit == "absolute":
            return 1.0
        if layer_idx not in self.residual_norms:
            raise InputError(
                f"alpha_unit 'residual_norm' needs the norm at layer {layer_idx}; pass "
                f"residual_norms={{{layer_idx}: measure_residual_norm(activations).median}}"
            )
        norm = self.residual_norms[layer_idx]
        if not 0 < norm < float("inf"):
            raise InputError(
                f"the residual norm at layer {layer_idx} is {norm}, expected a finite number above 0"
            )
        return norm

    def _chosen(self, layer_idx: int | None) -> list[Steering]:
        if layer_idx is None:
            return list(self._steering.values())
        if layer_idx not in self._steering:
            raise InputError(
                f"no steering is registered at layer {layer_idx} (registered: {sorted(self._steering)})"
            )
        return [self._steering[layer_idx]]


def _as_tensor(values: Any, name: str) -> Tensor:
    """Return values as a float32 tensor. Raises InputError: no numbers, or some that are not finite."""
    if isinstance(values, list | tuple):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    try:
        tensor = torch.as_tensor(values).detach().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is a {type(values).__name__}, expected numbers: {error}") from error
    if not tensor.isfinite().all():
        raise InputError(f"{name} has values that are not finite; extract it again in float32")
    return tensor


def _checked_alpha(alpha: float) -> float:
    if not torch.isfinite(torch.tensor(float(alpha))):
        raise InputError(f"alpha is {alpha}, expected a finite number")
    return float(alpha)


def steering_error(
    generator: SteeredGenerator,
    layer_idx: int,
    text: str,
    read_block: Callable[[str], Tensor],
) -> float:
    """Return how far steered minus unsteered is from alpha * v, in units of alpha * v (largest entries).

    read_block: returns the (d,) output of block `layer_idx` at one position of the text, by
    its own hook (for example `ActivationExtractor.extract`). Steering must be registered.
    """
    added = generator.added_vector(layer_idx).cpu()
    steered = read_block(text)
    generator.deactivate()
    try:
        unsteered = read_block(text)
    finally:
        generator.activate()
    return ((steered - unsteered - added).abs().max() / added.abs().max()).item()


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
