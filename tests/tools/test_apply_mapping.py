"""A vector is mapped without a model, between the layers that the map itself names."""

import numpy as np
import pytest
import torch
from tiny_runs import error_lines

from ridge_mapping import RidgeMapping
from support.vector_files import FORMATS, read_vectors, write_vectors
from tools import apply_mapping

VECTOR = torch.arange(1.0, 6.0)


def saved_map(folder, layers=(3, 2)):
    """Save a map in a folder whose name has numbers in it that are no layers."""
    place = folder / "results" / "qwen_7_to_llama_70"
    place.mkdir(parents=True)
    ridge = RidgeMapping(5, 4).fit(torch.randn(20, 5), torch.randn(20, 4))
    ridge.source_layer, ridge.target_layer = layers
    ridge.source_model, ridge.target_model, ridge.source_blocks = "qwen", "llama", 5
    ridge.save(place / "ridge_mapping.pt")
    return ridge, place / "ridge_mapping.pt"


def apply(path, vector, output, *more):
    given = ["--mapping", str(path), "--vector", str(vector), "--output", str(output)]
    return apply_mapping.main([*given, *more])


@pytest.mark.parametrize("form", FORMATS)
def test_a_mapped_vector_is_filed_under_the_maps_own_target_layer(form, tmp_path, capsys):
    ridge, path = saved_map(tmp_path)
    np.save(tmp_path / "loud.npy", VECTOR.numpy())
    assert apply(path, tmp_path / "loud.npy", tmp_path / f"mapped.{form}") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / f"mapped.{form}")
    found = read_vectors(tmp_path / f"mapped.{form}").by_layer
    assert list(found) == [2]
    assert torch.allclose(found[2].double(), VECTOR.double() @ ridge.W, atol=1e-6)


def test_a_file_of_several_layers_is_read_at_the_maps_source_layer(tmp_path, capsys):
    ridge, path = saved_map(tmp_path)
    rows = torch.randn(6, 5)  # the first row is the embedding's
    torch.save(rows, tmp_path / "rows.pt")
    torch.save(rows[1:], tmp_path / "blocks.pt")
    write_vectors(tmp_path / "two.gguf", "gguf", {2: rows[3], 3: rows[4]}, "qwen", {})
    for name, options, layer in (
        ("rows.pt", [], 3),
        ("blocks.pt", [], 3),
        ("two.gguf", [], 3),
        ("two.gguf", ["--layer", "2"], 2),
    ):
        assert apply(path, tmp_path / name, tmp_path / "mapped.pt", *options, "--target-layer", "1") == 0
        found = read_vectors(tmp_path / "mapped.pt").by_layer
        assert torch.allclose(found[1].double(), rows[layer + 1].double() @ ridge.W, atol=1e-6)
    write_vectors(tmp_path / "one.gguf", "gguf", {1: rows[2]}, "qwen", {})
    assert apply(path, tmp_path / "one.gguf", tmp_path / "mapped.pt") == 2
    assert "has no vector for layer 3, only for 1" in error_lines(capsys)[0]


def test_a_map_without_layers_asks_for_them(tmp_path, capsys):
    _, path = saved_map(tmp_path, (None, None))
    write_vectors(tmp_path / "two.pt", "pt", {2: VECTOR, 3: VECTOR}, "", {})
    assert apply(path, tmp_path / "two.pt", tmp_path / "mapped.pt") == 2
    assert "was saved without its target layer; name it with --target-layer" in error_lines(capsys)[0]
    assert apply(path, tmp_path / "two.pt", tmp_path / "mapped.pt", "--target-layer", "1") == 2
    assert "holds vectors of several layers; choose one with --layer" in error_lines(capsys)[0]
    options = ("--target-layer", "1", "--layer", "2")
    assert apply(path, tmp_path / "two.pt", tmp_path / "mapped.pt", *options) == 0


def test_rows_of_an_earlier_map_need_the_number_of_blocks(tmp_path, capsys):
    ridge, path = saved_map(tmp_path)
    ridge.source_blocks = None
    ridge.save(path)
    rows = torch.randn(5, 5)
    torch.save(rows, tmp_path / "rows.pt")
    assert apply(path, tmp_path / "rows.pt", tmp_path / "mapped.pt") == 2
    assert "with --source-blocks" in error_lines(capsys)[0]
    assert apply(path, tmp_path / "rows.pt", tmp_path / "mapped.pt", "--source-blocks", "5") == 0
    found = read_vectors(tmp_path / "mapped.pt").by_layer
    assert torch.allclose(found[2].double(), rows[3].double() @ ridge.W, atol=1e-6)


@pytest.mark.parametrize(
    ("vector", "output", "message"),
    [
        ("narrow.npy", "mapped.pt", "holds vectors of width 3, the model's is 5"),
        ("loud.npy", "mapped.npy", "expected a file that ends with .gguf, .safetensors, .pt"),
        ("absent.npy", "mapped.pt", "there is no file"),
    ],
)
def test_what_cannot_be_mapped_is_rejected(vector, output, message, tmp_path, capsys):
    for name, width in (("narrow.npy", 3), ("loud.npy", 5)):
        np.save(tmp_path / name, np.ones(width))
    assert apply(saved_map(tmp_path)[1], tmp_path / vector, tmp_path / output) == 2
    assert message in error_lines(capsys)[0]
    assert not (tmp_path / output).exists()
