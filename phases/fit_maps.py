"""Sum up paired activations, choose lambda, and fit the map and those to compare it with (phase 2).

Before phase 1, `"layer_idx": "auto"` has the layer pair searched.

The pairs of all layer pairs come from one pass over the texts. Files of the middle layer pair stand in the
run's folder, those of the others in `layers/SOURCE_TARGET/`. Sums are kept for a single layer pair, so that
other lambda values need no second pass; those of many pairs would fill a disk. Of the maps to compare with,
those of the run's conditions are fitted. Controls that are read from
another source have maps of their own, to the target's block of each pair: embeddings and the first block are
read in the same pass, a model with random weights in one of its own.

Vectors from prompts are of the last token of a prompt. Their maps are learnt there with the same settings,
and stand in `prompt_maps/`.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from activation_extractor import ResidualNorm, measure_residual_norm
from experiment.conditions import CONDITIONS, LEXICAL_CONTROLS, N_DRAWS, vector_names
from experiment.executor import collect_in_chunks
from experiment.run import FORMAT_VERSION, Artifact, Run, pair_folder
from maps.comparison_maps import ABOUT, ABOUT_CONTROLS, KINDS, ComparisonMap, edge_notes, maps_table
from maps.layer_bands import LayerPair
from maps.layer_search import search_layers
from maps.pair_collection import PairSettings, collection_notes, statistics_content, training_data
from phases.collect_responses import neutral_responses_key
from reporting.figures_mapping import layer_search_figure, mapping_figure
from reporting.style import draw_once
from reporting.tables import format_maps
from ridge_mapping import RidgeMapping, algebra_device
from support.artifacts import fingerprint
from support.pair_statistics import Moments, PairStatistics
from support.progress import each
from support.vocabulary import PROMPT_MAPS, LambdaUnit
from texts.encoding import encode
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)


def mapping_data_key(run: Run, pairs: Sequence[LayerPair] | None = None) -> str:
    """Return what the activations that the maps learn from depend on, and with them the unit of alpha.

    pairs: the layers that are read, by default the run's.
    """
    inputs, config = run.inputs, run.config
    sides = [side.fingerprint for side in inputs.sides]
    texts = neutral_responses_key(run) if inputs.neutral_questions else _texts_key(inputs.neutral_texts)
    settings = [pairs or inputs.layer_pairs, inputs.mapping_positions, config.seed]
    return fingerprint(FORMAT_VERSION, sides, settings, texts)


@lru_cache(maxsize=4)
def _texts_key(texts: tuple[NeutralText, ...]) -> str:
    return fingerprint([[item.text, item.document, *filter(None, item.prompts)] for item in texts])


def left_out(run: Run) -> list[str]:
    """Return the kinds of comparison maps that no condition of the run needs, and that are not fitted."""
    return [kind for kind in KINDS if kind not in run.config.conditions]


def _pairs_key(run: Run, pairs: Sequence[LayerPair] | None = None) -> str:
    return fingerprint(mapping_data_key(run, pairs), run.config.n_folds)


def _maps_key(run: Run, pairs: Sequence[LayerPair] | None = None) -> str:
    config = run.config
    settings = [config.lambda_values, config.lambda_unit, config.lambda_criterion]
    return fingerprint(_pairs_key(run, pairs), settings)


def _compared_key(run: Run) -> str:
    kinds = left_out(run)
    return fingerprint(_maps_key(run), kinds) if kinds else _maps_key(run)


def control_key(run: Run, condition: str) -> str:
    """Return what the maps from a control's own source depend on, and which weights it has."""
    pairs = [CONDITIONS[condition].source.layer_pair(pair) for pair in run.inputs.layer_pairs]
    return fingerprint(_maps_key(run, pairs), source_seeds(run, condition))


def _controls_key(run: Run) -> str:
    return fingerprint([[name, control_key(run, name)] for name in run.config.source_controls])


def source_seeds(run: Run, condition: str) -> dict[str, int | None]:
    """Return vector name -> seed of the random weights of a control's source; None for trained ones."""
    names = vector_names(condition)
    if not CONDITIONS[condition].source.is_untrained:
        return dict.fromkeys(names)
    return {name: run.config.seed * N_DRAWS + draw for draw, name in enumerate(names)}


# Each at one layer pair, see `Run.at_pair`.
PAIR_STATISTICS = Artifact("pair_statistics.pt", 2, _pairs_key)
TRAINING_DATA = Artifact("training_data.pt", 2, _pairs_key)
RIDGE_MAPPING = Artifact("ridge_mapping.pt", 2, _maps_key)
COMPARISON_MAPS = Artifact("comparison_maps.pt", 2, _compared_key)
CV_RESULTS = Artifact("cv_results.json", 2, _compared_key)
CONTROL_MAPS = Artifact("control_maps.pt", 2, _controls_key)
OF_MAPS = (CV_RESULTS, RIDGE_MAPPING, COMPARISON_MAPS)
CONSTANT = 1e-20  # variance, as a share of the squared mean, that rounding leaves of equal activations


@dataclass(frozen=True, repr=False)
class LearnedMaps:
    """The maps of one layer pair. others, controls: by vector name. results: what `cv_results.json` holds.

    controls: from what controls read in the place of the source. of_prompts: those of vectors from prompts.
    """

    ridge: RidgeMapping
    others: dict[str, ComparisonMap]
    results: dict[str, Any]
    controls: dict[str, ComparisonMap] = field(default_factory=dict)
    of_prompts: "LearnedMaps | None" = None

    def for_kind(self, kind: str) -> "LearnedMaps":
        """Return the maps of a kind of vectors."""
        return self.of_prompts if kind == "prompt" else self

    @property
    def residual_norm(self) -> ResidualNorm:
        """The norm of the target's activations that the map was fitted on."""
        return ResidualNorm(**self.results["target_residual_norm"])

    @property
    def transforms(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Vector name -> how a comparison map carries a direction over."""
        return {name: other.transform for name, other in self.others.items()}

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each map, see `maps_table`."""
        return [*self.results["maps"], *maps_table(self.ridge, self.controls)[1:]]


def at_kind(run: Run, kind: str) -> Run:
    """Return the run whose maps are those of a kind of vectors."""
    return run.with_inputs(run.inputs.for_kind(kind))


def map_runs(run: Run) -> list[Run]:
    """Return the run and, where its vectors have maps of two kinds, the one of the other maps."""
    return [run, at_kind(run, "prompt")] if run.config.reads_prompts else [run]


def maps_key(run: Run) -> str:
    """Return what the maps of all layer pairs depend on."""
    return fingerprint(
        [_maps_key(run.with_inputs(run.inputs.at_pairs([pair]))) for pair in run.inputs.layer_pairs]
    )


def fit_maps(
    run: Run, collected: Mapping[LayerPair, dict[str, Any]] | None = None
) -> tuple[LearnedMaps, ...]:
    """Return the maps of every layer pair: those of an earlier run, or fitted on one pass over the texts.

    collected: layer pair -> what `collect_sums` returns, if it was collected elsewhere.
    """
    return with_prompt_maps(run, _fit_all(run, collected or {}))


def with_prompt_maps(
    run: Run,
    maps: Sequence[LearnedMaps],
    make: Callable[[Run], tuple[LearnedMaps, ...]] | None = None,
) -> tuple[LearnedMaps, ...]:
    """Return the maps with those of vectors from prompts, if a persona has any.

    make: returns them of the run that has their texts; by default they are fitted in the same way.
    """
    if not run.config.reads_prompts:
        return tuple(maps)
    with run.beside(PROMPT_MAPS, run.inputs.for_kind("prompt")) as beside:
        found = make(beside) if make else _fit_all(beside, {})
    return tuple(replace(each, of_prompts=other) for each, other in zip(maps, found, strict=True))


def _fit_all(run: Run, collected: Mapping[LayerPair, dict[str, Any]]) -> tuple[LearnedMaps, ...]:
    pairs = run.inputs.layer_pairs
    learned = {pair: maps for pair in pairs if (maps := _current(run, pair)) is not None}
    controls = {pair: found for pair in pairs if (found := _current_controls(run, pair)) is not None}
    missing, uncontrolled = ([pair for pair in pairs if pair not in found] for found in (learned, controls))
    sums = _collected(run, missing, uncontrolled, collected)
    for pair in each(missing, "fitting maps", "layer pair", leave=False):
        learned[pair] = _fit_pair(run, pair, sums[pair])
    controls |= _fit_controls(run, uncontrolled, sums)
    maps = tuple(replace(learned[pair], controls=controls[pair]) for pair in pairs)
    _report(run, maps)
    return maps


def load_maps(run: Run) -> tuple[LearnedMaps, ...]:
    """Return what phase 2 left of every layer pair. Raises InputError that names the phase to run first."""
    return with_prompt_maps(run, _load_all(run), _load_all)


def _load_all(run: Run) -> tuple[LearnedMaps, ...]:
    learned = []
    for pair in run.inputs.layer_pairs:
        with run.at_pair(pair) as at_pair:
            maps = _read(at_pair, *(artifact.require(at_pair) for artifact in OF_MAPS))
            controls = CONTROL_MAPS.require(at_pair)["maps"] if run.config.source_controls else {}
            learned.append(replace(maps, controls=_maps_from(controls)))
    return tuple(learned)


def collect_sums(
    run: Run, pairs: Sequence[LayerPair], untrained: int | None = None
) -> dict[LayerPair, dict[str, Any]]:
    """Return layer pair -> what `statistics_content` returns, from one pass over the texts of the map.

    untrained: the seed of random weights that the source has in the place of its own.
    """
    config, positions = run.config, run.inputs.mapping_positions
    size = config.extraction_batch_size
    settings = PairSettings(tuple(pairs), positions, config.n_folds, config.seed, untrained, size)
    collected = collect_in_chunks(run.executor, run.inputs.mapping_texts, settings)
    return {pair: statistics_content(collected, pair) for pair in pairs}


def save_sums(run: Run, sums: Mapping[str, Any]) -> None:
    """Write the sums of the run's only layer pair to `pair_statistics.pt`."""
    PAIR_STATISTICS.save(run, {**sums, "statistics": sums["statistics"].content()})


def _current_sums(run: Run) -> dict[str, Any] | None:
    found = PAIR_STATISTICS.current(run)
    return found and {**found, "statistics": PairStatistics.from_content(found["statistics"])}


def _collected(
    run: Run,
    missing: Sequence[LayerPair],
    uncontrolled: Sequence[LayerPair],
    given: Mapping[LayerPair, dict[str, Any]],
) -> dict[LayerPair, dict[str, Any]]:
    """Return the sums of the missing layer pairs, and those of controls of the trained source.

    uncontrolled: pairs whose controls have no map yet. given: sums that are there. The sums of a run of one
    layer pair are kept in a file.
    """
    sums = dict(given)
    kept = [pair for pair in missing if len(run.inputs.layer_pairs) == 1 and pair not in sums]
    sums |= {pair: content for pair in kept if (content := _current_sums(run)) is not None}
    sources = [CONDITIONS[name].source for name in run.config.source_controls]
    trained = [source for source in sources if not source.is_untrained]
    wanted = [*missing, *(source.layer_pair(pair) for source in trained for pair in uncontrolled)]
    if new := [pair for pair in dict.fromkeys(wanted) if pair not in sums]:
        sums |= collect_sums(run, new)
    for pair in kept:
        if pair in new:
            save_sums(run, sums[pair])
    return sums


def _current_controls(run: Run, pair: LayerPair) -> dict[str, ComparisonMap] | None:
    """Return the controls' maps of an earlier run; None if they have to be fitted."""
    if not run.config.source_controls:
        return {}
    with run.at_pair(pair) as at_pair:
        content = CONTROL_MAPS.current(at_pair)
    return None if content is None else _maps_from(content["maps"])


def _fit_controls(
    run: Run, pairs: Sequence[LayerPair], sums: Mapping[LayerPair, dict[str, Any]]
) -> dict[LayerPair, dict[str, ComparisonMap]]:
    """Fit and write the controls' maps of each layer pair; sums: of the trained source."""
    found: dict[LayerPair, dict[str, ComparisonMap]] = {pair: {} for pair in pairs}
    for condition in run.config.source_controls if pairs else ():
        layers = {pair: CONDITIONS[condition].source.layer_pair(pair) for pair in pairs}
        for draw, (name, seed) in enumerate(source_seeds(run, condition).items()):
            read = sums if seed is None else collect_sums(run, list(layers.values()), seed)
            before: RidgeMapping | None = None
            for pair in each(pairs, f"fitting maps of {name}", "layer pair", leave=False):
                is_shared = before is not None and before.source_layer == layers[pair][0]
                ridge = _cross_validated(run, read[layers[pair]], True, before if is_shared else None)
                ridge.source_layer = layers[pair][0]
                found[pair][name] = ComparisonMap.of_source(condition, ridge, draw)
                before = ridge
    for pair, maps in found.items():
        with run.at_pair(pair) as at_pair:
            CONTROL_MAPS.save(
                at_pair,
                {
                    "about": ABOUT_CONTROLS,
                    "layer_pairs": [
                        list(CONDITIONS[each.kind].source.layer_pair(pair)) for each in maps.values()
                    ],
                    "maps": {name: each.content() for name, each in maps.items()},
                },
            )
    return found


def _cross_validated(
    run: Run, sums: Mapping[str, Any], is_control: bool = False, beside: RidgeMapping | None = None
) -> RidgeMapping:
    """Return a map at its best lambda; a control's may be one of zeros, from activations that are all equal.

    Such are embeddings of a token that ends every prompt. beside: a map from the same activations.
    """
    config, statistics = run.config, sums["statistics"]
    unit: LambdaUnit = config.lambda_unit
    if is_control and _is_constant(statistics.total()):
        unit = "absolute"  # there is no variance that lambda could be a multiple of
    ridge = RidgeMapping.from_statistics(statistics, unit, algebra_device(run.inputs.target.model.device))
    ridge.cross_validate(
        lambda_values=config.lambda_values,
        criterion=config.lambda_criterion,
        beside=beside,
        is_control=is_control,
    )
    return ridge


def _is_constant(moments: Moments) -> bool:
    energy = moments.n * moments.source_mean.square().sum()
    return bool(moments.gram.diagonal().sum() <= CONSTANT * energy)


def _current(run: Run, pair: LayerPair) -> LearnedMaps | None:
    """Return the maps of an earlier run; None if a file of theirs is not current."""
    with run.at_pair(pair) as at_pair:
        wanted = OF_MAPS if pair != run.inputs.middle_pair else (*OF_MAPS, TRAINING_DATA)
        files = [artifact.current(at_pair) for artifact in wanted]
        return None if any(content is None for content in files) else _read(at_pair, *files[:3])


def _fit_pair(run: Run, pair: LayerPair, sums: dict[str, Any]) -> LearnedMaps:
    """Choose lambda, fit all maps on the summed pairs, and write them; `cv_results.json` last."""
    is_middle = pair == run.inputs.middle_pair
    ridge = _cross_validated(run, sums)
    ridge.source_layer, ridge.target_layer = pair
    ridge.source_model, ridge.target_model = (side.model_name for side in run.inputs.sides)
    ridge.source_blocks = run.inputs.source.n_blocks
    others = {
        name: ComparisonMap.fitted(kind, ridge, draw)
        for kind in KINDS
        if kind not in left_out(run)
        for draw, name in enumerate(vector_names(kind))
    }
    results = {
        "source_layer": pair[0],
        "target_layer": pair[1],
        "source_model": ridge.source_model,
        "target_model": ridge.target_model,
        **ridge.cv,
        "pairs": sums["report"],
        "analysis": ridge.analyze(),
        "maps": maps_table(ridge, others),
        "target_residual_norm": asdict(measure_residual_norm(ridge.statistics.sample.H_target)),
    }
    ridge.forget_pairs()
    with run.at_pair(pair) as at_pair:
        if is_middle:
            TRAINING_DATA.save(at_pair, training_data(run.inputs.mapping_texts, sums))
        maps = {name: other.content() for name, other in others.items()}
        COMPARISON_MAPS.save(at_pair, {"about": ABOUT, "maps": maps})
        at_pair.folder.lock()
        ridge.save(RIDGE_MAPPING.path(at_pair), RIDGE_MAPPING.key(at_pair))
        results = CV_RESULTS.save(at_pair, results)
    return LearnedMaps(ridge, others, results)


def _read(
    run: Run, results: dict[str, Any], ridge: dict[str, Any], others: dict[str, Any], *_: Any
) -> LearnedMaps:
    mapping = RidgeMapping.from_content(ridge, str(RIDGE_MAPPING.path(run)))
    return LearnedMaps(mapping, _maps_from(others["maps"]), results)


def _maps_from(content: Mapping[str, Mapping[str, Any]]) -> dict[str, ComparisonMap]:
    return {name: ComparisonMap.from_content(entry) for name, entry in content.items()}


def _report(run: Run, maps: Sequence[LearnedMaps]) -> None:
    """Draw the middle layer pair's map, and log what it knows."""
    middle = maps[len(maps) // 2]
    cv = middle.ridge.cv
    key, folder = middle.results["fingerprint"], run.folder
    lexical = [name for name in middle.controls if name in LEXICAL_CONTROLS]
    of_lexical = {name: [learned.controls[name] for learned in maps] for name in lexical}
    folder.notes += collection_notes(middle.results["pairs"])
    folder.notes += edge_notes(of_lexical, run.config.lambda_values)
    draw_once(folder, "mapping_analysis.png", key, mapping_figure, middle.results["analysis"], cv)
    logger.info("held-out R2 of the maps\n%s", format_maps(middle.table))
    documents = "questions" if run.inputs.neutral_questions else "documents"
    of_band = f"{len(maps)} layer pairs, of which the middle one has " if len(maps) > 1 else ""
    logger.info(
        f"{of_band}{cv['n_rows']} activation pairs ({middle.results['pairs']['fraction_aligned']:.0%} of the "
        f"tokens) from {cv['n_groups']} {documents}, lambda {cv['best_lambda']:g} ({cv['lambda_unit']}), "
        f"held-out R2 {cv['best_r2']:.3f} (median dimension {cv['best_r2_median_dimension']:.3f}, shuffled "
        f"pairs {cv['shuffled_r2']:.3f}), {RIDGE_MAPPING.path(run)}"
    )
    for pair in run.inputs.layer_pairs:
        if pair != run.inputs.middle_pair:
            logger.info(f"layer pair {pair[0]} -> {pair[1]}: {folder.path / pair_folder(pair)}")


def _search_key(run: Run) -> str:
    config, inputs = run.config, run.inputs
    personas = [
        [persona.name, persona.positive_texts, persona.negative_texts] for persona in inputs.labelled_personas
    ]
    return fingerprint(
        FORMAT_VERSION,
        [side.fingerprint for side in inputs.sides],
        [config.search_source_layers, config.search_target_layers, inputs.mapping_positions, config.seed],
        [personas, config.persona_names, config.persona_position],
        [[item.text, item.document] for item in _search_texts(run)],
    )


SEARCH_FIGURE = "layer_search.png"
LAYER_SEARCH = Artifact("layer_search.json", 1, _search_key)


def choose_layers(run: Run, may_search: bool) -> Run:
    """Return the run at its layers; a search takes minutes.

    may_search: else the search of an earlier run is required. Raises InputError where it is not there.
    """
    if run.config.layer_idx != "auto":
        (run.folder.path / SEARCH_FIGURE).unlink(
            missing_ok=True
        )  # a report would show that of an earlier search
        return run
    search = LAYER_SEARCH.current_or_make(run, _search_layers) if may_search else LAYER_SEARCH.require(run)
    draw_once(run.folder, SEARCH_FIGURE, search["fingerprint"], layer_search_figure, search)
    logger.info("layer search: best pair %d -> %d", *search["best"])
    return run.with_inputs(run.inputs.at_pairs([tuple(search["best"])]))


def _search_layers(run: Run) -> dict[str, Any]:
    config, inputs = run.config, run.inputs
    return search_layers(
        inputs.source.extractor,
        inputs.target.extractor,
        _search_texts(run),
        inputs.labelled_personas,
        config.persona_names,
        position=config.persona_position,
        positions=inputs.mapping_positions,
        source_layers=config.search_source_layers,
        target_layers=config.search_target_layers,
        seed=config.seed,
    ).content()


def _search_texts(run: Run) -> list[NeutralText]:
    """Return the first neutral texts that hold `search_tokens` source tokens, or all of them."""
    n_tokens, texts = 0, []
    for item in run.inputs.neutral_texts:
        texts.append(item)
        n_tokens += len(encode(run.inputs.source.tokenizer, [item.text])[0])
        if n_tokens >= run.config.search_tokens:
            break
    return texts
