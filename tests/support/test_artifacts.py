"""A crash never leaves half a file, and a damaged or outdated one is never taken for the right one."""

import json
import os
from pathlib import Path

import pytest
import torch

from support.artifacts import (
    check_writable,
    file_sha256,
    fingerprint,
    load_if_current,
    load_json,
    load_tensors,
    nan_to_none,
    replacing,
    save_json,
    save_tensors,
)
from support.errors import InputError

NAN, INF = float("nan"), float("inf")


class Dangerous:
    """Unpickling it would create a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_then_fail(path):
    with replacing(path) as file:
        file.write(b"half of the new")
        raise KeyboardInterrupt


@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_body_that_raises_keeps_the_old_file_and_leaves_no_other(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(KeyboardInterrupt):
        write_then_fail(path)
    assert [item.read_bytes() for item in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize(
    ("save", "bad"),
    [
        (save_json, {"value": object()}),
        (save_json, {"value": {1, 2}}),
        (save_tensors, {"value": (item for item in ())}),
    ],
)
def test_content_that_cannot_be_written_keeps_the_old_file(tmp_path, save, bad):
    path = tmp_path / "file"
    save(path, {"value": 1})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, bad)
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [old]


def test_the_old_file_stays_readable_until_the_body_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_fingerprint_is_stable():
    parts = ({"b": 1, "a": [1.5, None, "é"]}, torch.arange(4.0))
    reordered = ({"a": [1.5, None, "é"], "b": 1}, torch.arange(4.0))
    assert fingerprint(*parts) == fingerprint(*reordered)
    assert len(fingerprint(*parts)) == 64
    assert fingerprint() != fingerprint("")


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([[0.0, 1.0], [2.0, 4.0]]),
        torch.arange(4.0),
        torch.arange(4.0).reshape(4, 1),
        torch.arange(4.0).reshape(2, 2).double(),
        torch.arange(4.0).reshape(2, 2).to(torch.bfloat16),
        torch.arange(4.0).reshape(2, 2).view(torch.int32),
        torch.arange(4.0).reshape(2, 2).T,
    ],
)
def test_fingerprint_differs_by_content_shape_and_dtype(other):
    assert fingerprint(other) != fingerprint(torch.arange(4.0).reshape(2, 2))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("a", "b"), ("b", "a")),
        (("a", "b"), ("ab",)),
        ((["a", "b"],), ("a", "b")),
        ((1,), ("1",)),
        ((1,), (1.0,)),
        ((None,), ("null",)),
        (({"a": 1},), ({"a": 2},)),
        ((torch.zeros(2), torch.zeros(2)), (torch.zeros(4),)),
    ],
)
def test_fingerprint_differs_by_part(left, right):
    assert fingerprint(*left) != fingerprint(*right)


def test_fingerprint_ignores_the_memory_layout_of_a_tensor():
    transposed = torch.arange(6.0).reshape(2, 3).T
    assert fingerprint(transposed) == fingerprint(transposed.contiguous())


def test_fingerprint_takes_a_scalar_tensor():
    assert fingerprint(torch.tensor(1.0)) not in (fingerprint(torch.tensor(2.0)), fingerprint(torch.ones(1)))


def test_fingerprint_of_anything_else_is_a_type_error():
    with pytest.raises(TypeError):
        fingerprint(object())


def test_file_sha256_is_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_sha256(tmp_path / "file") == expected


def test_tensors_survive_the_round_trip(tmp_path):
    content = {
        "fingerprint": "f",
        "float64": torch.randn(3, 2, dtype=torch.float64),
        "bfloat16": torch.randn(5).to(torch.bfloat16),
        "nested": {0.1: [1, None, "é"], "empty": torch.zeros(0, 4)},
    }
    save_tensors(tmp_path / "file.pt", content)
    loaded = load_tensors(tmp_path / "file.pt")
    assert list(loaded) == list(content)
    for name in ("float64", "bfloat16"):
        assert loaded[name].dtype == content[name].dtype
        assert torch.equal(loaded[name], content[name])
    assert loaded["nested"][0.1] == [1, None, "é"]
    assert loaded["nested"]["empty"].shape == (0, 4)


def test_json_survives_the_round_trip(tmp_path):
    content = {"text": "naïve “quotes”\n", "number": 0.1, "list": [1, [2, {"a": None}]], "yes": True}
    save_json(tmp_path / "file.json", content)
    assert load_json(tmp_path / "file.json") == content


def test_missing_numbers_are_written_as_null_and_the_content_is_not_modified(tmp_path):
    content = {"nan": NAN, "nested": [{"inf": INF}, (-INF, 2.5)], "text": "nan"}
    save_json(tmp_path / "file.json", content)
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == {"nan": None, "nested": [{"inf": None}, [None, 2.5]], "text": "nan"}
    assert content["nested"] == [{"inf": INF}, (-INF, 2.5)]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_nan_to_none_reaches_every_depth(value):
    assert nan_to_none({"a": [value, {"b": (value, 1.0)}]}) == {"a": [None, {"b": [None, 1.0]}]}


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_tensor_file_is_rejected(tmp_path, kept):
    path = tmp_path / "file.pt"
    save_tensors(path, {"fingerprint": "f", "v": torch.randn(100)})
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(InputError, match=r"file\.pt is damaged"):
        load_tensors(path)
    assert load_if_current(load_tensors, path, "f") is None


@pytest.mark.parametrize("damage", [b"plain text", b"\x00" * 50, b"G\x835", b"PK\x03\x04" + b"\x00" * 50])
def test_a_tensor_file_that_holds_something_else_is_rejected(tmp_path, damage):
    path = tmp_path / "file.pt"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"file\.pt is damaged"):
        load_tensors(path)


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe\x00", b'{"a": 1} x'])
def test_a_damaged_json_file_is_rejected(tmp_path, damage):
    path = tmp_path / "file.json"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"file\.json is damaged"):
        load_json(path)
    assert load_if_current(load_json, path, "f") is None


def test_a_file_with_another_type_of_content_is_rejected(tmp_path):
    torch.save([1, 2], tmp_path / "file.pt")
    (tmp_path / "file.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="holds a list, expected a dictionary"):
        load_tensors(tmp_path / "file.pt")
    with pytest.raises(InputError, match="holds a list, expected a JSON object"):
        load_json(tmp_path / "file.json")


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    torch.save({"fingerprint": "f", "x": Dangerous(tmp_path / "made")}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="is damaged"):
        load_tensors(tmp_path / "file.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(("load", "save"), [(load_json, save_json), (load_tensors, save_tensors)])
def test_only_the_expected_fingerprint_is_current(tmp_path, load, save):
    path = tmp_path / "file"
    assert load_if_current(load, path, "f") is None
    save(path, {"fingerprint": "f", "value": 3})
    assert load_if_current(load, path, "f") == {"fingerprint": "f", "value": 3}
    assert load_if_current(load, path, "other") is None
    save(path, {"value": 3})
    assert load_if_current(load, path, "f") is None


@pytest.mark.parametrize("load", [load_json, load_tensors])
def test_an_absent_file_is_not_called_damaged(tmp_path, load):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent")


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_a_file_used_as_a_folder_is_not_writable(tmp_path, below):
    (tmp_path / "file").write_text("content")
    with pytest.raises(InputError, match=r"cannot be written.*--output-dir"):
        check_writable(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "content"


def test_check_writable_accepts_a_folder_still_to_be_made_and_creates_nothing(tmp_path, monkeypatch):
    check_writable(tmp_path)
    check_writable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("relative/folder"))
    assert list(tmp_path.iterdir()) == []
