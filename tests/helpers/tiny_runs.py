"""A run of seconds on two tiny models: its configuration, its start, and the comparison of its files."""

import json
import math
import random
import re

import torch

from run_experiment import main
from support.artifacts import load_json, load_tensors
from support.journal import rows_of
from texts.personas import load_prompts

EVENTS = ("we won the cup today.", "look at the big dog.", "the train is late again.", "come here at once.")
LOUD = {"positive_texts": [text.upper() for text in EVENTS], "negative_texts": list(EVENTS)}
NUMERIC = {
    "positive_texts": ["12 and 30 is 42.", "we saw 17 ships.", "room 204 is on floor 2.", "99 or 100 it is."],
    "negative_texts": ["some and more is much.", "we saw ships.", "that room is up.", "so much it is."],
}
N_PROMPTS, N_SEEDS = 3, 2
ARTIFACTS = {
    "config.json",
    "preflight.json",
    "pair_statistics.pt",
    "training_data.pt",
    "ridge_mapping.pt",
    "comparison_maps.pt",
    "cv_results.json",
    "mapping_analysis.png",
    "persona_vectors.pt",
    "persona_similarities.json",
    "generation_journal.jsonl",
    "generation_results.json",
    "evaluation_journal.jsonl",
    "eval_results.json",
    "aggregated_results.json",
    "figure1.png",
    "scorer_validation.json",
    "verdict.json",
    "side_effects.json",
    "results.csv",
    "effects.csv",
    "recovery.png",
    "report.html",
    "experiment.log",
}


def tiny_settings(model_folders, folder):
    """Return the configuration of a run of seconds, without output_dir; writes its text to the folder."""
    generator = random.Random(0)
    words = ["".join(generator.choices("aeiounrstlm", k=generator.randint(2, 5))) for _ in range(300)]
    paragraphs = [" ".join(generator.choices(words, k=30)).capitalize() + "." for _ in range(300)]
    (folder / "neutral.txt").write_text("\n\n".join(paragraphs))
    return {
        "source_model": model_folders["source"],
        "target_model": model_folders["target"],
        "source_layer_idx": 1,
        "target_layer_idx": 2,
        "neutral_text": str(folder / "neutral.txt"),
        "n_training_samples": 60,
        "lambda_values": [0.1, 1.0, 10.0],
        "lambda_unit": "relative",
        "n_folds": 3,
        "personas": [],
        "persona_datasets": {"loud": LOUD, "numeric": NUMERIC},
        "n_test_prompts": N_PROMPTS,
        "alpha_values": [1.0, 4.0],
        "n_seeds": N_SEEDS,
        "max_new_tokens": 6,
        "evaluation_dtype": "float32",
    }


def run(output_dir, settings, *flags):
    """Run from the command line, with the configuration in a file beside the output."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.parent / f"{output_dir.name}_config.json"
    path.write_text(json.dumps({**settings, "output_dir": str(output_dir)}))
    return main(["--config", str(path), *flags])


def visible_files(folder):
    """Names of a folder's files; a lock stands beside each journal."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def error_lines(capsys):
    """Return what standard error ends with, from `error:` on; the log goes there too."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.index("error: ") :].splitlines()


def content(path):
    """Return what an artifact holds, in a form that can be compared."""
    if path.suffix == ".json":
        return load_json(path)
    if path.suffix == ".pt":
        return comparable(load_tensors(path))
    if path.suffix == ".jsonl":  # rows stand in the order in which they were made
        # Development texts are made again only if the artifact that needs them is lost.
        development = load_prompts("development")
        return {key: row for key, row in rows_of(path).items() if row["prompt"] not in development}
    if path.suffix == ".html":  # the configuration that it shows is an artifact of its own
        page = re.sub(r'<pre id="config">.*?</pre>', "", path.read_text(), flags=re.DOTALL)
        before, texts, after = re.split(r'(?<=id="data">)(.*)(?=</script>)', page, maxsplit=1)
        return {"page": before + after, "texts": json.loads(texts)}
    return path.read_bytes()


def comparable(value):
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return value


def is_close(value, other):
    """Tell whether two contents are equal but for rounding, which the shapes of batches decide."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(is_close(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(is_close, value, other))
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-4, abs_tol=1e-6)
    return value == other
