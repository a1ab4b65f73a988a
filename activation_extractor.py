"""Read residual-stream activations and persona vectors from a language model (phases 2 and 3).

Conventions, shared with steering:
- Layer `layer_idx` is the output of decoder block `layer_idx`, counted from 0, where
  `steered_generation` adds its vector. Layer EMBEDDINGS is what enters block 0.
- Texts are tokenised with the tokenizer's special tokens, as prompts are.
- Batches are padded on the right. Under causal attention that cannot reach a real token, so batch size
  and padding change nothing but float rounding.
- The forward pass stops after the deepest block that is read.

Results are float32 on the CPU.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from decoding.batching import run_in_batches
from decoding.steering_hooks import block_input, block_output, hook_error, reject_steered
from model_loading import (
    check_layer,
    context_length,
    d_model,
    decoder_blocks,
    evaluation_mode,
    filler_token_id,
    on_device,
    pad_tokens,
    plain_model,
)
from support.errors import InputError, shown
from support.vocabulary import EMBEDDINGS, PAIR_POSITIONS, PERSONA_POSITIONS
from texts.aligned_positions import aligned_tokens, check_offsets, token_ends
from texts.chat import Prompt, prompt_text
from texts.encoding import encode, encode_continuations, encode_with_offsets

logger = logging.getLogger(__name__)

MASSIVE_RATIO = 10.0  # to the root mean square of the median dimension
N_SPLITS = 20  # random halves behind a split-half cosine
WINDOW = 64  # texts of which paired activations are yielded at a time
ReadText = str | tuple[Prompt, str]  # the latter a prompt with its response
PairedText = str | tuple[str, str, str]  # the latter (source's prefix, target's prefix, text)


class _StopForward(Exception):
    """Ends a forward pass after the deepest block that is read."""


@dataclass(frozen=True)
class PersonaVector:
    """A difference of means and how stable it is.

    vector: (d,) float32, unit L2 norm. raw_norm: its norm before that, in units of the residual stream.
    split_half_cosine: see `split_half_cosine`; near 0, the vector is noise.
    n_positive, n_negative: texts on each side.
    """

    vector: Tensor
    raw_norm: float
    split_half_cosine: float | None
    n_positive: int
    n_negative: int

    def __repr__(self) -> str:
        halves = "n/a" if self.split_half_cosine is None else f"{self.split_half_cosine:.2f}"
        texts = f"{self.n_positive} positive and {self.n_negative} negative texts"
        norm = f"{len(self.vector)} dimensions, raw norm {self.raw_norm:.4g}"
        return f"PersonaVector({norm}, split-half cosine {halves}, {texts})"


@dataclass(frozen=True)
class ResidualNorm:
    """The typical length of a block output, the unit of `alpha_unit="residual_norm"`.

    median: median L2 norm over positions, without `massive_dimensions`. median_with_massive: with them.
    """

    median: float
    median_with_massive: float
    massive_dimensions: list[int]


class ActivationExtractor:
    """Read activations at one layer with one protocol for neutral texts, personas and checks.

    layer_idx: the output of this decoder block is read, counted from 0.
    device: moves the model there first; None leaves it where it is.
    batch_size: texts per batch; halved when memory runs out.
    max_length: longest text in tokens, the model's context by default; longer ones are cut at the end and
        counted in `n_truncated`. `n_tokens` counts the tokens read so far.
    block_path: dotted path of the block list, for architectures that are not recognised.
    read_steered: also read a model that a SteeredGenerator steers; by default that is an error.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer_idx: int,
        device: str | torch.device | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        block_path: str | None = None,
        read_steered: bool = False,
    ) -> None:
        """Raises InputError: layer out of range, no decoder blocks found, or no such device here."""
        model = plain_model(model)
        self.model = on_device(model, device)
        self.tokenizer, self.batch_size, self.read_steered = tokenizer, batch_size, read_steered
        self.blocks, self.block_path = decoder_blocks(model, block_path), block_path
        check_layer(layer_idx, self.blocks)
        self.layer_idx = layer_idx
        self.max_length = context_length(model, tokenizer) if max_length is None else max_length
        if self.max_length < 1:
            raise InputError(f"max_length is {max_length}, expected 1 or more tokens")
        self.d_model = d_model(model)
        self.n_truncated = self.n_tokens = 0

    def extract(self, text: ReadText, position: str = "last") -> Tensor:
        """Return the activation of one text, (d,). See `extract_layers`."""
        return self.extract_batch([text], position)[0]

    def extract_batch(
        self, texts: Sequence[ReadText], position: str = "last", batch_size: int | None = None
    ) -> Tensor:
        """Return the activations of texts, (n, d), in their order. See `extract_layers`."""
        return self.extract_layers(texts, [self.layer_idx], position, batch_size)[self.layer_idx]

    def extract_layers(
        self,
        texts: Sequence[ReadText],
        layers: Sequence[int],
        position: str = "last",
        batch_size: int | None = None,
    ) -> dict[int, Tensor]:
        """Return layer_idx -> (n, d) float32 for several layers from one pass over the texts.

        texts: strings; for position `response` pairs of a prompt (a string or messages) and the response.
        position: `last`, the last token; `mean`, the mean over the tokens but special ones and the very
            first, an attention sink with a huge norm; `response`, the mean over the tokens of the response
            (arXiv 2507.21509).
        batch_size: of this call, the extractor's by default.
        Raises InputError: no texts, an empty text, a layer out of range, an unknown position, or an
        activation that is not finite (the text's index is named).
        """
        if not texts:
            raise InputError("the list of texts is empty; give at least one text")
        if isinstance(texts, str):
            raise InputError("texts is a single string; give a list of strings, or use extract()")
        if position not in PERSONA_POSITIONS:
            raise InputError(f"position {position!r} is unknown; choose {', '.join(PERSONA_POSITIONS)}")
        wanted = self.check_layers(layers, with_embeddings=True)
        if position == "response":
            tokens, token_indices = self._response_tokens(texts)
        else:
            self._check_texts(texts)
            tokens = self._cut(encode(self.tokenizer, texts, self.model))
            token_indices = [[len(ids) - 1] for ids in tokens]
            if position == "mean":
                left_out = set(self.tokenizer.all_special_ids)
                kept = ([i for i, token in enumerate(ids) if i and token not in left_out] for ids in tokens)
                token_indices = [of_text or last for of_text, last in zip(kept, token_indices, strict=True)]
        return self.read(
            tokens,
            token_indices,
            wanted,
            lambda activations: activations.mean(0, keepdim=True),
            0,
            batch_size,
        )

    def extract_tokens(
        self,
        tokens: Sequence[Sequence[int]],
        token_indices: Sequence[Sequence[int]],
        layers: Sequence[int],
        first_index: int = 0,
    ) -> dict[int, Tensor]:
        """Return layer_idx -> (n, d) float32: the activations at some tokens of each text.

        tokens: ids of each text, no longer than `max_length`.
        token_indices: of each text, from 0; the rows come in this order, and n is their number.
        first_index: the number of the first text in errors.
        Raises InputError: an activation that is not finite (the text's index is named).
        """
        wanted = self.check_layers(layers, with_embeddings=True)
        return self.read(tokens, token_indices, wanted, lambda rows: rows, first_index, None)

    def check_layers(self, layers: Sequence[int], with_embeddings: bool = False) -> list[int]:
        """Return the layers in ascending order, each once. Raises InputError: none, or one out of range."""
        if not layers:
            raise InputError("the list of layers is empty; name at least one layer_idx")
        for layer_idx in layers:
            if not (with_embeddings and layer_idx == EMBEDDINGS):
                check_layer(layer_idx, self.blocks)
        return sorted(set(layers))

    def token_ends(
        self,
        texts: Sequence[str],
        positions: str = "aligned",
        first_index: int = 0,
        prompts: Sequence[str] | None = None,
    ) -> tuple[list[list[int]], list[dict[int, int]]]:
        """Return the tokens of texts, and for each text character end -> index of a token that may be read.

        positions: `aligned`, see `aligned_positions.token_ends`; or `last`: the last token alone, and none
            of a text that is cut, because other models may end it elsewhere.
        prompts: precede each text, none by default. Their tokens are returned, their ends are not; but with
            `last` a text may be empty, and the token is its prompt's, from which a response would begin. A
            special token is a token in a prompt, and words in a text.
        Raises InputError: an empty text, or a token without embedding; texts count from `first_index`.
        """
        prompts = [""] * len(texts) if prompts is None else prompts
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        self._check_texts(whole if positions == "last" else texts, first_index)
        if positions == "last":
            tokens = encode(self.tokenizer, texts, self.model, first_index, prompts)
            ends = [{len(text): len(ids) - 1} for text, ids in zip(texts, tokens, strict=True)]
        else:
            tokens, offsets = encode_with_offsets(self.tokenizer, texts, self.model, first_index, prompts)
            special = set(self.tokenizer.all_special_ids)
            found = [token_ends(*sides, special) for sides in zip(tokens, offsets, strict=True)]
            ends = [
                {end - len(prompt): i for end, i in of_text.items() if end > len(prompt)}
                for prompt, of_text in zip(prompts, found, strict=True)
            ]
        kept = [{end: i for end, i in of_text.items() if i < self.max_length} for of_text in ends]
        return self._cut(tokens), kept

    def extract_persona_vector(
        self, positive_texts: Sequence[str], negative_texts: Sequence[str], position: str = "last"
    ) -> Tensor:
        """Return mean(positive) - mean(negative) as a unit vector, (d,) float32; log its stability."""
        persona = self.measure_persona_vector(positive_texts, negative_texts, position)
        logger.info("raw norm %.3g, split-half cosine %s", persona.raw_norm, persona.split_half_cosine)
        return persona.vector

    def measure_persona_vector(
        self, positive_texts: Sequence[str], negative_texts: Sequence[str], position: str = "last"
    ) -> PersonaVector:
        """Return the persona vector at the extractor's layer, with its norm and stability."""
        measured = self.measure_persona_vectors(positive_texts, negative_texts, [self.layer_idx], position)
        return measured[self.layer_idx]

    def measure_persona_vectors(
        self,
        positive_texts: Sequence[ReadText],
        negative_texts: Sequence[ReadText],
        layers: Sequence[int],
        position: str = "last",
        may_vanish: bool = False,
    ) -> dict[int, PersonaVector]:
        """Return layer -> persona vector with its raw norm and split-half cosine, from one pass.

        Raises InputError: as `extract_sides` and `difference_vector`.
        """
        by_layer = self.extract_sides(positive_texts, negative_texts, layers, position)
        return {layer: difference_vector(*sides, may_vanish) for layer, sides in by_layer.items()}

    def extract_sides(
        self,
        positive_texts: Sequence[ReadText],
        negative_texts: Sequence[ReadText],
        layers: Sequence[int],
        position: str = "last",
    ) -> dict[int, tuple[Tensor, ...]]:
        """Return layer -> activations of the positive and of the negative texts, (n, d) each, from one pass.

        Raises InputError: a side is empty.
        """
        for side, side_texts in (("positive", positive_texts), ("negative", negative_texts)):
            if isinstance(side_texts, str):
                raise InputError(f"the {side} texts are a single string; give a list of strings")
            if not side_texts:
                raise InputError(f"the persona has no {side} texts; it needs texts on both sides")
        sizes = len(positive_texts), len(negative_texts)
        by_layer = self.extract_layers([*positive_texts, *negative_texts], layers, position)
        return {layer: activations.split(sizes) for layer, activations in by_layer.items()}

    def _response_tokens(self, texts: Sequence[ReadText]) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens of prompts with their responses, and the indices of the responses' tokens."""
        pairs = []
        for index, text in enumerate(texts):
            is_pair = isinstance(text, tuple) and len(text) == 2 and isinstance(text[1], str)
            if not is_pair or not text[1].strip():
                raise InputError(
                    f"text {index} is {shown(text)}, expected (prompt, response) for position 'response', "
                    "with a response that is not empty"
                )
            pairs.append((prompt_text(self.tokenizer, text[0], index), text[1]))
        encoded = encode_continuations(self.tokenizer, pairs, self.model)
        tokens = self._cut([ids for ids, _ in encoded])
        indices = [list(range(start, len(ids))) for ids, (_, start) in zip(tokens, encoded, strict=True)]
        if [] in indices:
            where = f"text {indices.index([])} has no response left within {self.max_length} tokens"
            raise InputError(f"{where}; shorten its prompt, or raise max_length")
        return tokens, indices

    def _check_texts(self, texts: Sequence[str], first_index: int = 0) -> None:
        for index, text in enumerate(texts, start=first_index):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"text {index} is empty or not a string ({text!r}); remove it")

    def _cut(self, tokens: list[list[int]]) -> list[list[int]]:
        """Return the texts cut to `max_length`, counting those that are longer."""
        if n_long := sum(len(ids) > self.max_length for ids in tokens):
            self.n_truncated += n_long
            logger.warning("%d of %d texts were cut to %d tokens", n_long, len(tokens), self.max_length)
        return [ids[: self.max_length] for ids in tokens]

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        token_indices: Sequence[Sequence[int]],
        layers: list[int],
        reduce: Callable[[Tensor], Tensor],
        first_index: int,
        batch_size: int | None,
    ) -> dict[int, Tensor]:
        """Return layer_idx -> rows that `reduce` makes of each text's activations (tokens, layers, d).

        tokens, token_indices, first_index: as `extract_tokens` takes them. layers: ascending. batch_size: the
        extractor's own where it is None.
        """

        def run(indices: list[int]) -> list[Tensor]:
            batch = self._forward([tokens[i] for i in indices], [token_indices[i] for i in indices], layers)
            for index, activations in zip(indices, batch, strict=True):
                if not activations.isfinite().all():
                    raise InputError(
                        f"text {first_index + index} gives an activation that is not finite "
                        f"(model dtype {self.model.dtype}); use bfloat16 or float32"
                    )
            return [reduce(activations) for activations in batch]

        if not self.read_steered:
            reject_steered(self.model, remedy=", or pass read_steered=True to read it as it is")
        lengths = [len(ids) for ids in tokens]
        self.n_tokens += sum(lengths)
        size = self.batch_size if batch_size is None else batch_size
        found = run_in_batches(run, lengths, size, "extracting", self.model, quiet=len(tokens) <= WINDOW)
        return dict(zip(layers, torch.cat(found).unbind(1), strict=True))

    @torch.inference_mode()
    def _forward(
        self, tokens: list[Sequence[int]], token_indices: list[Sequence[int]], layers: list[int]
    ) -> Sequence[Tensor]:
        """Return for each text of a batch (tokens, layers, d) float32 on the CPU; layers ascend."""
        recorded: dict[int, Tensor] = {}

        def keep(layer_idx: int, hidden: Tensor) -> None:
            recorded[layer_idx] = hidden
            if layer_idx == layers[-1]:
                raise _StopForward

        def record_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            keep(EMBEDDINGS, block_input(args, kwargs))

        def record(layer_idx: int, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
            keep(layer_idx, block_output(output))

        padded, _ = pad_tokens(tokens, filler_token_id(self.model), "right", self.model.device)
        with evaluation_mode(self.model), ExitStack() as stack:
            for layer_idx in layers:
                if layer_idx == EMBEDDINGS:
                    handle = self.blocks[0].register_forward_pre_hook(record_input, with_kwargs=True)
                else:
                    handle = self.blocks[layer_idx].register_forward_hook(partial(record, layer_idx))
                stack.enter_context(handle)
            stack.enter_context(suppress(_StopForward))
            # Causality hides padding on the right, and without a mask attention takes its fast path.
            self.model(input_ids=padded, use_cache=False)
        if missed := [layer_idx for layer_idx in layers if layer_idx not in recorded]:
            raise hook_error(missed[0])
        rows = torch.tensor([row for row, kept in enumerate(token_indices) for _ in kept], dtype=torch.int64)
        columns = torch.tensor([i for kept in token_indices for i in kept], dtype=torch.int64)
        taken = [
            hidden[rows.to(hidden.device), columns.to(hidden.device)].float().cpu()
            for hidden in map(recorded.__getitem__, layers)
        ]
        return torch.stack(taken, dim=1).split([len(kept) for kept in token_indices])


@dataclass(frozen=True)
class PairedBatch:
    """Activations of both models at the same places of some texts.

    H_source, H_target: layer_idx -> (n, d) float32 on the CPU; row i of both is one pair.
    text_idx, end: (n,) int64, the text's number over all batches, and how many of its characters were read.
    n_source_tokens, n_target_tokens: tokens of these texts, special and first ones included, prefixes not.
    """

    H_source: dict[int, Tensor]
    H_target: dict[int, Tensor]
    text_idx: Tensor
    end: Tensor
    n_source_tokens: int
    n_target_tokens: int


def paired_activations(
    source: ActivationExtractor,
    target: ActivationExtractor,
    texts: Iterable[PairedText],
    positions: str = "aligned",
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
) -> Iterator[PairedBatch]:
    """Yield paired activations of both models on the same texts, 64 texts at a time.

    texts: strings, or (prefix for the source, prefix for the target, text); a prefix is read before the
        text and gives no pairs. They are consumed as they are needed.
    positions: `aligned`, every place where both tokenizers end a token on the same character, see
        `aligned_positions`; or `last`, the last token of each text, which works with any tokenizer; of an
        empty text, the last one of its prefixes.
    source_layers, target_layers: layers to read in the one pass; the extractors' own by default.
    Raises InputError: an unknown `positions`, a tokenizer without offsets, an empty text, or an
    activation that is not finite (the text is named).
    """
    if positions not in PAIR_POSITIONS:
        raise InputError(f"positions {positions!r} is unknown; choose 'aligned' or 'last'")
    if positions == "aligned":
        check_offsets(source.tokenizer, "source")
        check_offsets(target.tokenizer, "target")
    source_layers = source.check_layers([source.layer_idx] if source_layers is None else source_layers, True)
    target_layers = target.check_layers([target.layer_idx] if target_layers is None else target_layers)
    remaining, first_index = iter(texts), 0
    while window := list(islice(remaining, WINDOW)):
        parts = [("", "", item) if isinstance(item, str) else item for item in window]
        *prefixes, read = zip(*parts, strict=True)
        source_tokens, source_ends = source.token_ends(read, positions, first_index, prefixes[0])
        target_tokens, target_ends = target.token_ends(read, positions, first_index, prefixes[1])
        aligned = [aligned_tokens(*sides) for sides in zip(source_ends, target_ends, strict=True)]
        ends, source_indices, target_indices = zip(*aligned, strict=True)
        text_idx = [first_index + row for row, of_text in enumerate(ends) for _ in of_text]
        yield PairedBatch(
            source.extract_tokens(source_tokens, source_indices, source_layers, first_index),
            target.extract_tokens(target_tokens, target_indices, target_layers, first_index),
            torch.tensor(text_idx, dtype=torch.int64),
            torch.tensor([end for of_text in ends for end in of_text], dtype=torch.int64),
            _n_own_tokens(source_tokens, source_ends, prefixes[0]),
            _n_own_tokens(target_tokens, target_ends, prefixes[1]),
        )
        first_index += len(window)


def _n_own_tokens(
    tokens: Sequence[list[int]], ends: Sequence[dict[int, int]], prefixes: Sequence[str]
) -> int:
    """Return how many tokens texts have without those of their prefixes."""
    starts = [
        min(of_text.values(), default=len(ids)) if prefix else 0
        for ids, of_text, prefix in zip(tokens, ends, prefixes, strict=True)
    ]
    return sum(map(len, tokens)) - sum(starts)


def difference_vector(positive: Tensor, negative: Tensor, may_vanish: bool = False) -> PersonaVector:
    """Return mean(positive) - mean(negative) with its norm and stability.

    positive, negative: (n, d) activations; with equal n, row i of both stays in the same half.
    Both sides may have the same mean: an InputError, or with `may_vanish` a vector of zeros and norm 0.
    """
    difference = positive.mean(0) - negative.mean(0)
    raw_norm = difference.norm().item()
    if raw_norm <= 1e-6 * torch.cat([positive, negative]).norm(dim=1).mean().item():
        if may_vanish:
            return PersonaVector(torch.zeros_like(difference), 0.0, None, len(positive), len(negative))
        raise InputError("positive and negative texts have the same mean activation; are they equal?")
    stability = split_half_cosine(positive, negative)
    return PersonaVector(difference / raw_norm, raw_norm, stability, len(positive), len(negative))


def split_half_cosine(positive: Tensor, negative: Tensor) -> float | None:
    """Return the mean cosine between difference vectors of two random halves, or None if too few texts.

    positive, negative: (n, d) activations; with equal n, row i of both stays in the same half.
    """
    if min(len(positive), len(negative)) < 4:
        return None
    generator, total = torch.Generator().manual_seed(0), 0.0
    for _ in range(N_SPLITS):
        order = torch.randperm(len(positive), generator=generator)
        paired = len(positive) == len(negative)
        other = order if paired else torch.randperm(len(negative), generator=generator)
        halves = (positive[order[part::2]].mean(0) - negative[other[part::2]].mean(0) for part in (0, 1))
        total += torch.cosine_similarity(*halves, dim=0).item()
    return total / N_SPLITS


def massive_dimensions(activations: Tensor) -> list[int]:
    """Return the dimensions whose root mean square is over 10 times the median dimension's.

    activations: (n, d). Sun et al. 2024 (arXiv 2402.17762) call single activations massive; here whole
    dimensions count, since a norm is a sum over dimensions.
    """
    return massive_by_scale(activations.double().pow(2).mean(0).sqrt())


def massive_by_scale(scale: Tensor) -> list[int]:
    """Return the massive dimensions given the root mean square of each, (d,). See `massive_dimensions`."""
    return (scale > MASSIVE_RATIO * scale.median()).nonzero().flatten().tolist()


def measure_residual_norm(activations: Tensor) -> ResidualNorm:
    """Return the median norm of block outputs with and without massive dimensions.

    activations: (n, d), a row for each position of neutral text. Raises InputError: no rows.
    """
    if activations.ndim != 2 or not len(activations):
        raise InputError(f"activations have shape {tuple(activations.shape)}, expected (n, d) with n > 0")
    massive = massive_dimensions(activations)
    kept = [index for index in range(activations.shape[1]) if index not in massive]
    medians = [rows.norm(dim=1).median().item() for rows in (activations[:, kept], activations)]
    return ResidualNorm(*medians, massive)


def main() -> None:
    """Check on a tiny model that a batch has the activations of texts read one by one."""
    from support.tiny_models import tiny_model, tiny_tokenizer

    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = ["Short.", "A longer text about nothing at all."]
    batch = ActivationExtractor(model, tokenizer, layer_idx=2).extract_batch(texts)
    for row, text in zip(batch, texts, strict=True):
        states = model(torch.tensor([tokenizer(text).input_ids]), output_hidden_states=True).hidden_states
        assert torch.allclose(row, states[3][0, -1], atol=1e-5)
    print(f"activation_extractor OK: shape {tuple(batch.shape)}, equal to hidden_states[layer_idx + 1]")


if __name__ == "__main__":
    main()
