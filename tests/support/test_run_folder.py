"""Fingerprint and checksum decide what is current; one object writes at a time; killed runs leave nothing."""

import errno
import fcntl
import json
import logging
import os

import pytest
import torch
from damage import delete, halve

import model_loading
from support.artifacts import load_json, save_json
from support.errors import InputError
from support.package_cache import CACHE_VARIABLE, build_once
from support.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "out")
    yield folder
    folder.close()


def content_of(name):
    return {"number": 3, "vector": [0.0, 1.0, 2.0] if name.endswith(".json") else torch.arange(3.0)}


def drop_checksum(path):
    path.write_text(json.dumps(load_json(path)))


@pytest.mark.parametrize("name", ["a.json", "a.pt"])
def test_an_artifact_is_current_only_under_its_own_key(name, folder):
    assert folder.current(name, "ours") is folder.load(name, "ours") is None
    saved = folder.save(name, "ours", content_of(name))
    assert saved["fingerprint"] == "ours"
    for found in (folder.current(name, "ours"), folder.load(name, "ours"), folder.require(name, "ours", 2)):
        assert found.keys() == saved.keys()
        assert torch.equal(torch.as_tensor(found["vector"]), torch.arange(3.0))
    assert folder.current(name, "theirs") is folder.load(name, "theirs") is None


def test_a_fresh_run_reads_what_it_has_just_made_and_nothing_older_as_current(folder):
    folder.save("a.json", "key", {"n": 3})
    fresh = RunFolder(folder.path, fresh=True)
    assert fresh.current("a.json", "key") is None
    assert fresh.load("a.json", "key") == fresh.require("a.json", "key", 2) == {"fingerprint": "key", "n": 3}


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("a.json", halve, r"damaged \(.*\)"),
        ("a.pt", halve, r"damaged \(.*\)"),
        ("a.json", drop_checksum, r"damaged \(no checksum\)"),
        ("a.json", lambda path: None, r"stale \(made from another configuration\)"),
        ("a.json", delete, "missing"),
    ],
)
def test_an_artifact_that_cannot_be_used_is_recomputed_or_required_with_the_reason(
    name, damage, reason, folder, caplog
):
    caplog.set_level(logging.INFO)
    folder.save(name, "key", content_of(name))
    damage(folder.path / name)
    key = "other" if reason.startswith("stale") else "key"
    with pytest.raises(InputError, match=rf"{name} is {reason}; run phase 4 first"):
        folder.require(name, key, 4)
    assert folder.load(name, key) is None
    assert [name in message for message in caplog.messages] == ([] if reason == "missing" else [True])


def test_a_fresh_runs_journal_is_empty_when_first_opened_alone(folder):
    for fresh, before in ((False, []), (False, ["a"]), (True, [])):
        run = RunFolder(folder.path, fresh)
        for expected in (before, ["a"]):
            with run.journal("texts") as journal:
                assert list(journal.rows) == expected
                journal.append([{"key": "a"}])
        run.close()
    assert (folder.path / "texts_journal.jsonl").exists()


def test_damaged_lines_of_a_journal_are_noted(folder):
    with folder.journal("texts") as journal:
        journal.append([{"key": "a"}, {"key": "b"}])
    path = folder.path / "texts_journal.jsonl"
    path.write_text(path.read_text().replace('"a"', '"c"'))
    with folder.journal("texts") as journal:
        assert list(journal.rows) == ["b"]
    assert folder.notes == [f"1 lines of {path} were damaged; their rows are recomputed"]


def test_a_second_writer_is_told_who_holds_the_folder_until_it_is_closed(folder):
    other = RunFolder(folder.path)
    with folder.logged():
        logging.getLogger("test").info("said")
    assert "said" in (folder.path / "experiment.log").read_text()
    for write in (other.lock, lambda: other.save("a.json", "key", {}), lambda: other.journal("texts")):
        with pytest.raises(InputError, match="in use by this process, through another object"):
            write()
    owner = load_json(folder.path / ".run_owner.json")
    save_json(folder.path / ".run_owner.json", {**owner, "host": "node7", "process": 4321})
    with pytest.raises(
        InputError, match=f"is in use by process 4321 on node7 since .*{owner['since'][-5:]}; wait"
    ):
        other.lock()
    folder.close()
    folder.close()
    other.lock()
    other.close()
    assert not (folder.path / ".run_owner.json").exists()


def test_the_temporary_files_of_killed_runs_are_removed_and_no_others(folder):
    folder.path.mkdir()
    left, others = {".cv_results.json.ab3_x9yz", ".figure1.png.abcdefgh"}, {".notes.txt", "a.json.abcdefgh"}
    for name in left | others:
        (folder.path / name).touch()
    folder.lock()
    assert {path.name for path in folder.path.iterdir()} & (left | others) == others


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "ESTALE", "EINVAL", "ENOSYS"])
def test_a_file_system_without_locks_is_used_without_them_and_named_once(code, tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        number = getattr(errno, code)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    for number in range(2):
        folder = RunFolder(tmp_path / "out")
        folder.save("a.json", "key", {"n": number})
        assert folder.current("a.json", "key")["n"] == number
        folder.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path / 'out'} has no file locks" in caplog.text
    assert build_once("entry", lambda made: (made / "file").touch()).is_dir()
    # Nobody can tell whose folder is still in use, so all are left alone.
    first, second = model_loading._new_offload_folder(), model_loading._new_offload_folder()
    assert os.path.isdir(first)
    assert os.path.isdir(second)
