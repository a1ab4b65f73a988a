"""A crash never leaves half a file, and a damaged or outdated one is never taken for the right one."""

import json
import os
from pathlib import Path

import pytest
import torch

from support.artifacts import (
    check_writable,
    fingerprint,
    load_json,
    load_tensors,
    replacing,
    save_json,
    save_tensors,
    sealed,
)
from support.errors import InputError

NAN, INF = float("nan"), float("inf")


class Dangerous:
    """Unpickling it would create a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_body_that_raises_keeps_the_old_file_and_leaves_no_other(tmp_path, old):
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:  # noqa: PT012
        file.write(b"half of the new")
        raise KeyboardInterrupt
    assert [item.read_bytes() for item in tmp_path.iterdir()] == ([] if old is None else [old])
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert old is None or path.read_bytes() == old
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [b"new"]


@pytest.mark.parametrize(
    ("save", "bad"), [(save_json, {"value": object()}), (save_tensors, {"value": (item for item in ())})]
)
def test_content_that_cannot_be_written_keeps_the_old_file(tmp_path, save, bad):
    path = tmp_path / "file"
    save(path, {"value": 1})
    old = path.read_bytes()
    with pytest.raises(TypeError):
        save(path, bad)
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [old]


def test_fingerprint_is_of_the_content_whatever_the_order_of_keys_and_memory():
    parts = ({"b": 1, "a": [1.5, None, "é"]}, torch.arange(6.0).reshape(2, 3).T)
    reordered = ({"a": [1.5, None, "é"], "b": 1}, torch.arange(6.0).reshape(2, 3).T.contiguous())
    assert fingerprint(*parts) == fingerprint(*reordered)
    assert len(fingerprint(*parts)) == 64
    with pytest.raises(TypeError):
        fingerprint(object())


SQUARE = torch.arange(4.0).reshape(2, 2)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((), ("",)),
        (("a", "b"), ("b", "a")),
        (("a", "b"), ("ab",)),
        ((["a", "b"],), ("a", "b")),
        *(((one,), (other,)) for one, other in [(1, "1"), (1, 1.0), (None, "null"), ({"a": 1}, {"a": 2})]),
        ((torch.zeros(2), torch.zeros(2)), (torch.zeros(4),)),
        ((torch.tensor(1.0),), (torch.tensor(2.0),)),
        ((torch.tensor(1.0),), (torch.ones(1),)),
        *(((SQUARE,), (other,)) for other in (SQUARE.flatten(), SQUARE.reshape(4, 1), SQUARE.T)),
        *(((SQUARE,), (other,)) for other in (SQUARE.double(), SQUARE.bfloat16(), SQUARE.view(torch.int32))),
    ],
)
def test_fingerprint_differs_by_part_content_shape_and_dtype(left, right):
    assert fingerprint(*left) != fingerprint(*right)


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


def test_json_survives_but_for_missing_numbers_and_the_content_is_not_modified(tmp_path):
    content = {"nan": NAN, "nested": [{"inf": INF}, (-INF, 2.5)], "text": "naïve “nan”\n", "yes": True}
    save_json(tmp_path / "file.json", content)
    expected = {"nan": None, "nested": [{"inf": None}, [None, 2.5]]}
    assert load_json(tmp_path / "file.json") == {**content, **expected}
    assert content["nested"] == [{"inf": INF}, (-INF, 2.5)]


def flipped(whole):
    damaged = bytearray(whole)
    damaged[whole.index(b"fingerprint")] ^= 4
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        *(lambda whole, kept=kept: whole[: int(kept * len(whole))] for kept in (0, 0.001, 0.1, 0.5, 0.99)),
        *(lambda whole, content=content: content for content in (b"plain text", b"\x00" * 50, b"G\x835")),
        lambda whole: b"PK\x03\x04" + b"\x00" * 50,
    ],
)
def test_a_damaged_tensor_file_is_rejected(tmp_path, damage):
    path = tmp_path / "file.pt"
    save_tensors(path, {"fingerprint": "f", "v": torch.randn(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"file\.pt is damaged"):
        load_tensors(path)


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe\x00", b'{"a": 1} x', b"[" * 10_000])
def test_a_damaged_json_file_is_rejected(tmp_path, damage):
    path = tmp_path / "file.json"
    path.write_bytes(damage)
    with pytest.raises(InputError, match=r"file\.json is damaged"):
        load_json(path)


def test_a_file_with_another_type_of_content_is_rejected(tmp_path):
    torch.save([1, 2], tmp_path / "file.pt")
    (tmp_path / "file.json").write_text("[1, 2]")
    for load, name in ((load_tensors, "file.pt"), (load_json, "file.json")):
        with pytest.raises(InputError, match="holds a list, expected a "):
            load(tmp_path / name)


def test_a_pickled_object_is_rejected_and_not_run(tmp_path):
    torch.save({"fingerprint": "f", "x": Dangerous(tmp_path / "made")}, tmp_path / "file.pt")
    with pytest.raises(InputError, match="is damaged"):
        load_tensors(tmp_path / "file.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "changed", [{"number": 0.2}, {"list": [1]}, {"more": None}, {"fingerprint": "other"}, {"checksum": "0"}]
)
def test_a_json_artifact_that_was_changed_is_damaged(tmp_path, changed):
    path = tmp_path / "file.json"
    content = {"fingerprint": "f", "number": 0.1, "list": [NAN, (1, 2)], "text": "é"}
    save_json(path, sealed(content))
    expected = content | {"list": [None, [1, 2]]}
    assert load_json(path, needs_checksum=True) == load_json(path) == expected
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(whole.items()))))  # neither white space nor order counts
    assert load_json(path) == expected
    path.write_text(json.dumps(whole | changed))
    with pytest.raises(InputError, match=r"file\.json is damaged \(wrong checksum\); delete it or run "):
        load_json(path, needs_checksum=True)


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


def test_a_folder_still_to_be_made_is_writable_and_not_created(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, tmp_path / "a" / "b", Path("relative/folder")):
        check_writable(path)
    assert list(tmp_path.iterdir()) == []
