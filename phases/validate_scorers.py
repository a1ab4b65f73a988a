"""Examine a run's scorers: on shipped texts, the target's own and broken ones (phase 5)."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from experiment.inputs import Inputs
from experiment.plan import UNSTEERED, Cell, Row, licences_fingerprint, personas_fingerprint
from experiment.structures import expected
from phases.choose_alphas import write_development
from phases.generate_texts import asked_judge
from phases.make_vectors import SteeringVectors
from scoring.cached_judge import CachedJudge
from scoring.gpt_judge import trait_prompt
from scoring.likelihood_ratio import remembered
from scoring.validation import Sets, at_most, texts_of, validate, validation_sets
from support.artifacts import fingerprint
from support.run_folder import RunFolder
from support.vocabulary import vector_names
from texts.personas import Persona, load_prompts

BRIEF = {"is_validated": True, "problems": [], "measure": "length, which needs no licence"}
N_SEEDS = 2  # unsteered texts to a development prompt, for the validation
JUDGED_A_SIDE = 24  # texts of a set that a judge is examined on
JUDGE_DECIDES = 0.4999  # of its scale as 0 to 1: 3, "clearly present in parts", is the trait
TOO_STRONG = 3.0  # times the strongest dose, at which random directions break text


def validated_scorers(
    inputs: Inputs, folder: RunFolder, executor: Any, steering: SteeringVectors, rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """Return persona -> scorer -> what its validation found, unless an earlier run has."""
    name, cache_key = "scorer_validation.json", licences_fingerprint(inputs)
    content = folder.current(name, cache_key, expected(name, inputs))
    if content is None:
        judge = asked_judge(inputs, folder)
        has_scorers = inputs.classifiers or inputs.likelihood_ratios or judge
        unsteered, steered = (
            _development_texts(inputs, folder, executor, steering, rows) if has_scorers else ([], [])
        )
        found: dict[str, dict[str, Any]] = {}
        for persona in inputs.personas:
            sets = sets_of(inputs, persona, unsteered, steered)
            of_persona = found[persona.name] = {}
            if classifier := inputs.classifiers.get(persona.name):
                of_persona["classifier"] = validate(classifier.score, sets, classifier.threshold)
            if ratio := inputs.likelihood_ratios.get(persona.name):
                score = remembered(ratio, inputs.labelled_personas, texts_of(sets_of(inputs, persona)))
                of_persona["likelihood_ratio"] = validate(score, sets, ratio.threshold)
            if judge:
                of_persona["judge"] = _examined_judge(judge, persona, at_most(sets, JUDGED_A_SIDE))
        content = folder.save(name, cache_key, {"personas": found})
    validation = content["personas"]
    return {
        persona.name: {
            **validation.get(persona.name, {}),
            **({"brevity": BRIEF} if persona.direct_measure == "brevity" and inputs.asks_questions else {}),
        }
        for persona in inputs.personas
    }


def sets_of(
    inputs: Inputs, persona: Persona, unsteered: Sequence[str] = (), steered: Sequence[str] = ()
) -> Sets:
    """Return the sets on which a persona's scorers are examined.

    unsteered, steered: by the target model; without them, what is the same in every run.
    """
    others = [other for other in inputs.labelled_personas if other.name != persona.name]
    others.sort(key=lambda other: other.name)  # what is drawn does not depend on the run's order
    return validation_sets(persona, others, load_prompts("ordinary_validation"), unsteered, steered)


def _examined_judge(judge: CachedJudge, persona: Persona, sets: Sets) -> dict[str, Any]:
    """Return what a judge's validation found, and by how much its second word on a text differs."""

    def asked(text: str) -> str:
        return trait_prompt(persona.name, persona.description, persona.eval_prompt, "", text)

    def score(texts: Sequence[str]) -> list[float | None]:
        judged = judge.judge(list(map(asked, texts)))
        return [None if each.score is None else (each.score - 1) / 4 for each in judged]

    examined = validate(score, sets, JUDGE_DECIDES)
    whole = [asked(text) for sides in islice(sets.values(), 1) for side in sides for text in side[:10]]
    return {**examined, "repeat_noise": judge.repeat_noise(whole)}


def _development_texts(
    inputs: Inputs, folder: RunFolder, executor: Any, steering: SteeringVectors, rows: Sequence[Row]
) -> tuple[list[str], list[str]]:
    """Return texts on development prompts: unsteered, and steered by random directions far too strong."""
    cache_key = personas_fingerprint(inputs)
    alpha = TOO_STRONG * max((abs(row["alpha"]) for row in rows if row["alpha"] is not None), default=1.0)
    persona = inputs.personas[0].name
    cells = [
        Cell(name, persona, alpha, fingerprint("random_direction", cache_key, draw))
        for draw, name in enumerate(vector_names("random_direction"))
    ]
    unsteered = write_development(
        inputs, folder, executor, [UNSTEERED], steering.vectors, steering.medians, N_SEEDS
    )[0]
    by_cell = write_development(inputs, folder, executor, cells, steering.vectors, steering.medians)
    return [row["output"] for row in unsteered], [row["output"] for rows in by_cell for row in rows]


def format_validation(validation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a line for each scorer of each persona: its licence, or what costs it."""
    lines = []
    for persona, by_scorer in validation.items():
        for scorer, found in by_scorer.items():
            if found.get("auc"):
                lowest = min(found["auc"], key=found["auc"].get)
                rates = [found[name]["n_right"] / found[name]["n"] for name in ("sensitivity", "specificity")]
                detail = f"lowest AUC {found['auc'][lowest]:.2f} ({lowest}), sensitivity {rates[0]:.0%}, "
                detail += f"specificity {rates[1]:.0%}"
                if found.get("repeat_noise") is not None:
                    detail += f", a second draw differs by {found['repeat_noise']:.2f} of 1 to 5"
            else:
                detail = found.get("measure", "not examined")
            word = "licensed" if found["is_validated"] else f"UNLICENSED ({'; '.join(found['problems'])})"
            lines.append(f"{persona}, {scorer}: {word}; {detail}")
        if not by_scorer:
            lines.append(f"{persona}: no scorer")
    return "\n".join(lines)


def main() -> None:
    """Check how a licence and the lack of one are said."""
    rate = {"n_right": 9, "n": 10}
    examined = {"auc": {"ordinary": 0.8}, "problems": [], "is_validated": True}
    examined |= {"sensitivity": rate, "specificity": rate}
    refused = {**examined, "problems": ["AUC 0.80 on ordinary"], "is_validated": False}
    text = format_validation({"check": {"classifier": examined, "judge": refused}})
    assert "classifier: licensed" in text
    assert "judge: UNLICENSED (AUC 0.80 on ordinary)" in text
    print("validation OK:", text.splitlines()[0])


if __name__ == "__main__":
    main()
