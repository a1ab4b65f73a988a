"""A run of seconds on two tiny models: its configuration, its start, and the comparison of its files."""

import json
import math
import random
import re
import zlib
from functools import partial
from types import SimpleNamespace

import torch
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from phases import collect_responses, decide_verdicts, fit_maps
from reporting.style import figure_fingerprint
from run_experiment import main
from scoring import language_model_probe, trait_classifier
from support.artifacts import load_json, load_tensors
from support.journal import rows_of
from texts.personas import load_prompts

EVENTS = ("we won the cup today.", "look at the big dog.", "the train is late again.", "come here at once.")
LOUD = {"positive_texts": [text.upper() for text in EVENTS], "negative_texts": list(EVENTS)}
NUMERIC = {
    "positive_texts": ["12 and 30 is 42.", "we saw 17 ships.", "room 204 is on floor 2.", "99 or 100 it is."],
    "negative_texts": ["some and more is much.", "we saw ships.", "that room is up.", "so much it is."],
}
ASKED = {
    "instruction": [{"pos": "Shout.", "neg": "Whisper."}, {"pos": "Be loud.", "neg": "Be quiet."}],
    "questions": ["What is that noise?", "Who is at the door?", "Where is my hat?", "Is it late?"],
}
N_PROMPTS, N_SEEDS = 3, 2
ARTIFACTS = set(
    "config.json preflight.json native_vectors.pt pair_statistics.pt training_data.pt ridge_mapping.pt "
    "comparison_maps.pt cv_results.json mapping_analysis.png persona_vectors.pt persona_similarities.json "
    "generation_journal.jsonl generation_results.json evaluation_journal.jsonl eval_results.json "
    "aggregated_results.json figure1.png scorer_validation.json trait_costs.json side_effects.json "
    "alpha_search.json verdict.json protocol.json results.csv effects.csv headline.png "
    "report.html experiment.log resampled_vectors.pt extraction_spread.json effect_spread.json "
    "capability.json detection.json".split()
)


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
        "controls": [],
        "n_test_prompts": N_PROMPTS,
        "alpha_values": [1.0, 4.0],
        "n_seeds": N_SEEDS,
        "max_new_tokens": 6,
        "evaluation_dtype": "float32",
        "n_capability_questions": 4,
    }


def band_settings(tiny, chat_target):
    """Return a band whose target is a chat model: vectors and map are made of responses, alphas searched."""
    return {
        **tiny,
        "target_model": chat_target,
        "source_layer_idx": [0, 2],
        "target_layer_idx": [1, 3],
        "mapping_data": "styled_responses",
        "extraction": {"kind": "responses", "from_texts": ["numeric"], "max_new_tokens": 4},
        "persona_datasets": {"loud": {**LOUD, **ASKED}, "numeric": NUMERIC},
        "system_prompt": "Be kind.",
        "methods": ["ridge_mapped", "shuffled_pairs", "oracle"],
        "alpha_values": "auto",
        "alpha_search": {
            "n_evaluations": 3,
            "n_seeds": 1,
            "bracket": [0.1, 2.0],
            "max_perplexity_ratio": 1.2,
        },
    }


def run(output_dir, settings, *flags):
    """Run from the command line, with the configuration in a file beside the output."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    path = output_dir.parent / f"{output_dir.name}_config.json"
    path.write_text(json.dumps({**settings, "output_dir": str(output_dir)}))
    return main(["--config", str(path), *flags])


def blank_figures(patch):
    """Have runs save figures of one pixel, with their fingerprints; most of a tiny run draws."""
    for module in (decide_verdicts, fit_maps):
        for name in [name for name in vars(module) if name.endswith("_figure") and name != "save_figure"]:
            patch.setattr(module, name, lambda *arguments: Figure(figsize=(1, 1)))

    def savefig(figure, file, metadata, **options):
        texts = PngInfo()
        texts.add_text("Fingerprint", metadata["Fingerprint"])
        Image.new("1", (1, 1)).save(file, "png", pnginfo=texts)

    patch.setattr(Figure, "savefig", savefig)


def score_by_characters(patch):
    """Replace the trained scorers by two that score any text in no time, since tiny models write no words.

    Their keys are others, too: a run keeps scores of validation texts in the cache of all runs.
    """
    for module, divisor in ((trait_classifier, 7), (language_model_probe, 11)):
        real_key = module.scorer_key
        patch.setattr(module, "load_scorers", _by_characters(divisor))
        patch.setattr(module, "scorer_key", lambda *given, key=real_key: f"by characters {key(*given)}")
    patch.setattr(collect_responses, "show_trait", lambda persona, texts: _score(texts, 5))


def _by_characters(divisor):
    scorer = SimpleNamespace(threshold=0.5, auc=0.99, score=partial(_score, divisor=divisor))
    return lambda names, personas, language_model, device="cpu": dict.fromkeys(names, scorer)


def _score(texts, divisor):
    return [zlib.crc32(each.encode()) % divisor / (divisor - 1) if each.strip() else 0.0 for each in texts]


def visible_files(folder):
    """Names of a folder's files; a lock stands beside each journal."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def error_lines(capsys):
    """Return what standard error ends with, from `error:` on; the log goes there too."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed[printed.index("error: ") :].splitlines()


def rows(output_dir, name="generation_results.json"):
    return load_json(output_dir / name)["rows"]


def texts(output_dir):
    """Return key -> text of the grid."""
    return {row["key"]: row["output"] for row in rows(output_dir)}


def content(path):
    """Return what an artifact holds, in a form that can be compared."""
    if path.suffix == ".json":
        return load_json(path)
    if path.suffix == ".pt":
        return comparable(load_tensors(path))
    if path.suffix == ".png":
        return {"fingerprint": figure_fingerprint(path)}
    if path.suffix == ".jsonl":  # rows stand in the order in which they were made
        # Development texts are made again only if the artifact that needs them is lost.
        development = load_prompts("development")
        return {key: row for key, row in rows_of(path).items() if row["prompt"] not in development}
    if path.suffix == ".html":  # the configuration that it shows is an artifact of its own
        page = re.sub(r'<pre id="config">.*?</pre>', "", path.read_text(), flags=re.DOTALL)
        before, found, after = re.split(r'(?<=id="data">)(.*)(?=</script>)', page, maxsplit=1)
        return {"page": before + after, "texts": json.loads(found)}
    return path.read_bytes()


def comparable(value):
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


def artifacts(folder):
    """Return name -> content of everything that carries a fingerprint, also in folders below."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".json", ".pt", ".png") and not path.name.startswith((".", "config.json"))
    }


def is_close(value, other):
    """Tell whether two contents are equal but for rounding, which the shapes of batches decide."""
    if value == other:
        return True
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(is_close(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(is_close, value, other))
    are_numbers = isinstance(value, float) and isinstance(other, float)
    return are_numbers and math.isclose(value, other, rel_tol=1e-3, abs_tol=1e-4)
