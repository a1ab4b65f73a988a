"""Choose the layer pair by evidence where the configuration says `"layer_idx": "auto"` (before phase 1)."""

import logging
from typing import Any

from experiment.run import FORMAT_VERSION, Artifact, Run
from maps.layer_search import search_layers
from reporting.figures_mapping import layer_search_figure
from reporting.style import draw_once
from support.artifacts import fingerprint
from texts.encoding import encode
from texts.neutral_text import NeutralText

logger = logging.getLogger(__name__)


def _key(run: Run) -> str:
    config, inputs = run.config, run.inputs
    personas = [
        [persona.name, persona.positive_texts, persona.negative_texts] for persona in inputs.labelled_personas
    ]
    return fingerprint(
        FORMAT_VERSION,
        [side.fingerprint for side in inputs.sides],
        [config.search_source_layers, config.search_target_layers, inputs.mapping_positions, config.seed],
        [personas, config.persona_names, config.persona_position],
        [[item.text, item.document] for item in _texts(run)],
    )


FIGURE = "layer_search.png"
LAYER_SEARCH = Artifact("layer_search.json", 1, _key)


def choose_layers(run: Run, may_search: bool) -> Run:
    """Return the run at its layers; a search takes minutes.

    may_search: else the search of an earlier run is required. Raises InputError where it is not there.
    """
    if run.config.layer_idx != "auto":
        (run.folder.path / FIGURE).unlink(missing_ok=True)  # a report would show that of an earlier search
        return run
    search = LAYER_SEARCH.current_or_make(run, _search) if may_search else LAYER_SEARCH.require(run)
    draw_once(run.folder, FIGURE, search["fingerprint"], layer_search_figure, search)
    logger.info("layer search: best pair %d -> %d", *search["best"])
    return run.with_inputs(run.inputs.at_pairs([tuple(search["best"])]))


def _search(run: Run) -> dict[str, Any]:
    config, inputs = run.config, run.inputs
    return search_layers(
        inputs.source.extractor,
        inputs.target.extractor,
        _texts(run),
        inputs.labelled_personas,
        config.persona_names,
        position=config.persona_position,
        positions=inputs.mapping_positions,
        source_layers=config.search_source_layers,
        target_layers=config.search_target_layers,
        seed=config.seed,
    ).content()


def _texts(run: Run) -> list[NeutralText]:
    """Return the first neutral texts that hold `search_tokens` source tokens, or all of them."""
    n_tokens, texts = 0, []
    for item in run.inputs.neutral_texts:
        texts.append(item)
        n_tokens += len(encode(run.inputs.source.tokenizer, [item.text])[0])
        if n_tokens >= run.config.search_tokens:
            break
    return texts
