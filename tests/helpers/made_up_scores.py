"""Scored texts of a known truth, as `eval_results.json` holds them."""

from itertools import product

import numpy as np

from analysis.results_table import results_table
from analysis.verdict import decide_verdicts
from experiment.conditions import DECIDING_CONTROLS, MAPPED, ORACLE, UNSTEERED
from support.artifacts import load_json, save_json, sealed

VALIDATED = {
    "is_validated": True,
    "problems": [],
    "auc": {"ordinary": 0.98, "loops": 0.93},
    "sensitivity": {"n_right": 16, "n": 20},
    "specificity": {"n_right": 90, "n": 100},
    "threshold": 0.5,
}
NOT_VALIDATED = {**VALIDATED, "is_validated": False, "problems": ["AUC 0.70 on fragments"]}
COMPARED = dict.fromkeys((MAPPED, ORACLE, *DECIDING_CONTROLS), 1.0)  # condition -> alpha


def scored_row(condition, prompt, score, seed=0, persona="loud", alpha=1.0, perplexity=10.0, **more):
    """One text of a persona; `score` is what both trained scorers give it."""
    return {
        "persona": persona,
        "condition": condition,
        "alpha": None if condition == UNSTEERED else alpha,
        "prompt_idx": prompt,
        "prompt": f"Question {prompt}?",
        "seed": seed,
        "output": "What a fine day it is!",
        "has_ended": True,
        "trait_probability": score,
        "probe_probability": score,
        "trait_probabilities": {persona: score},
        "classifier_auc": 0.97,
        "independent_perplexity": perplexity,
        "perplexity": perplexity,
        "repetition": 0.1,
        "is_collapsed": False,
        "gpt4_coherence_score": None,
        "gpt4_trait_score": None,
        **more,
    }


def scored_run(mapped, oracle, n=20, other=None, persona="loud", noise=0.05, judged=False):
    """All conditions that a claim needs, with these mean scores where nothing gives 0.1.

    other: the language-model probe's mean of the mapped vector, where it differs from the classifier's.
    """
    generator, rows = np.random.default_rng(0), []
    means = {UNSTEERED: 0.1, MAPPED: mapped, ORACLE: oracle, **dict.fromkeys(DECIDING_CONTROLS, 0.1)}

    def drawn(mean):
        return float(np.clip(generator.normal(mean, noise), 0, 1))

    for prompt, (name, mean) in product(range(n), means.items()):
        row = scored_row(name, prompt, drawn(mean), persona=persona)
        if other is not None and name == MAPPED:
            row["probe_probability"] = drawn(other)
        if judged:
            row |= {"gpt4_coherence_score": 4, "gpt4_trait_score": 1 + round(4 * row["trait_probability"])}
        rows.append(row)
    return rows


def save_scores(folder, rows, validation, alphas=COMPARED):
    """Give a finished run these scored texts, and the verdicts that follow from them; returns the folder."""
    verdicts = decide_verdicts(results_table(rows), dict.fromkeys(validation, alphas), validation)
    personas = {name: verdict.content() for name, verdict in verdicts.items()}
    change(folder / "verdict.json", personas=personas)
    save_json(folder / "eval_results.json", sealed({"rows": rows}))
    return folder


def change(path, **content):
    """Replace entries of a JSON artifact."""
    save_json(path, sealed({**load_json(path), **content}))


def detection(personas):
    """What `detection.json` has of personas whose mapped vector exceeds the words; the last has no texts."""
    areas = {
        "oracle": 0.99,
        "ridge_mapped": 0.94,
        "embedding_source": 0.5,
        "first_block": 0.81,
        "other_persona: pirate": 0.66,
        "shuffled_pairs: 1": 0.52,
        "shuffled_pairs: 3": 0.58,
        "random_direction: 2": 0.55,
    }
    strongest = {name.partition(": ")[0]: name for name in areas}
    labelled = {
        "not_measured": None,
        "position": "mean",
        "n_positive": 50,
        "n_negative": 50,
        "auroc": {
            name: [{"estimate": each, "low": each - 0.05, "high": min(1.0, each + 0.05)}]
            for name, each in areas.items()
        },
        "zeros": ["embedding_source"],
        "shown": strongest,
        "lexical_control": "first_block",
        "over_lexical": {"estimate": 0.13, "low": 0.06, "high": 0.2},
        "over_native": {"estimate": -0.05, "low": -0.11, "high": 0.01},
    }
    responses = {
        **labelled,
        "position": "response",
        "over_native": {"estimate": -0.2, "low": -0.3, "high": -0.1},
    }
    unread = {"not_measured": "there are none"}
    found = {persona: {"labelled": labelled, "responses": responses} for persona in personas}
    return {**found, personas[-1]: {"labelled": unread, "responses": unread}}
