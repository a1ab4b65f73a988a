"""Choose how many rows a batch has by the memory of the models' CUDA devices, and keep it with the run.

In bfloat16 a result depends on what shares its batch, so a run that goes on takes the numbers of its start.
"""

import logging
from collections.abc import Mapping

from decoding.memory import MOST_ROWS, MOST_TEXTS, LongestRow, rows_that_fit
from experiment.executor import Worker
from experiment.run import FORMAT_VERSION, Artifact, Run
from support.artifacts import fingerprint
from texts.encoding import encode

logger = logging.getLogger(__name__)


def _key(run: Run) -> str:
    return fingerprint(FORMAT_VERSION, *(side.fingerprint for side in run.inputs.sides), longest_rows(run))


BATCH_SIZES = Artifact("batch_sizes.json", 1, _key)


def with_batch_sizes(run: Run, keeps: bool = True) -> Run:
    """Return the run with numbers for the batch sizes that its configuration leaves to memory.

    keeps: write them to the run's folder. Without a CUDA device they are those of `ExperimentConfig`.
    """
    if not run.config.open_rows:
        return run
    content = BATCH_SIZES.current(run)
    if content is None:
        ((_, rows),) = run.executor.run("call", [(_rows_that_fit, longest_rows(run))])
        content = {"rows": rows}
        if rows and keeps:
            BATCH_SIZES.save(run, content)
    fitting = {key: n for key, n in content["rows"].items() if key in run.config.open_rows}
    for key, n in fitting.items():
        logger.info("%s: %d rows, by memory", key, n)
    return run.with_inputs(run.inputs.with_rows(fitting))


def _rows_that_fit(worker: Worker, longest: Mapping[str, Mapping[str, LongestRow]]) -> dict[str, int]:
    """Return batch size -> how many rows fit into the memory of a worker's CUDA devices, if it has any.

    longest: side -> batch size -> its longest row. The side with the least room decides, but a source that
    rests while the target writes leaves its room to it.
    """
    found: dict[str, int] = {}
    sides = [worker.side(name) for name in longest]  # both take their room before it is measured
    for side in sides:
        if side.name == "target" and sides[0].resting:
            sides[0].resting.rest()
        for key, row in longest[side.name].items():
            if row.cached and side.resting:
                continue
            most = MOST_ROWS if row.cached else MOST_TEXTS
            rows = rows_that_fit(side.model, side.extractor.blocks, row, found.get(key, most))
            if rows is not None:
                found[key] = rows
    return found


def longest_rows(run: Run) -> dict[str, dict[str, LongestRow]]:
    """Return side -> batch size -> the tokens of its longest row.

    The longest prompt is taken to be the longest question under the longest system prompt.
    """
    config, inputs = run.config, run.inputs
    personas, found = inputs.personas, {}
    questions = [*inputs.prompts, *inputs.development_prompts, *inputs.neutral_questions]
    questions += [text for persona in personas for text in persona.questions]
    instructions = ["", *inputs.neutral_styles, *(persona.description for persona in personas)]
    instructions += [text for persona in personas for pair in persona.instructions for text in pair]
    texts = [item.text for item in inputs.neutral_texts]
    texts += [text for persona in personas for text in persona.all_texts]
    new = max(config.max_new_tokens, config.extraction.max_new_tokens)
    for side in inputs.sides:
        shown = inputs.prompting.instructed(side.name, max(questions, key=len), max(instructions, key=len))
        prompt, text = map(len, encode(side.tokenizer, [shown, max(texts, key=len)], side.model))
        prompt += (config.n_turns - 1) * (prompt + new)
        found[side.name] = {
            "extraction_batch_size": LongestRow(max(text, prompt + new)),
            "generation_batch_size": LongestRow(prompt, predicted=1, cached=prompt + new),
            "evaluation_batch_size": LongestRow(prompt + new, predicted=new),
        }
    return found
