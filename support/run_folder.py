"""The files of one run: which of them are current, and which are required.

A file counts as current only if its fingerprint is that of the inputs (see `support.artifacts`). In a
fresh run nothing that lies there is current, but what a later phase requires may be read.
"""

from pathlib import Path
from typing import Any

from support.artifacts import load_if_current, load_json, load_tensors, save_json, save_tensors
from support.errors import InputError
from support.journal import Journal


class RunFolder:
    """An output directory, for the length of one run.

    fresh: artifacts of earlier runs are not current, and a journal starts empty when first opened.
    """

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = Path(path).expanduser()
        self.fresh = fresh
        self.notes: list[str] = []
        self._opened: set[str] = set()

    def current(self, name: str, made_from: str) -> dict[str, Any] | None:
        """Return what an artifact (`.json` or `.pt`) holds if it was made from these inputs, else None."""
        return None if self.fresh else self.left(name, made_from)

    def left(self, name: str, made_from: str) -> dict[str, Any] | None:
        """Return the same, also in a fresh run: for what an earlier phase of the run has just made."""
        load = load_tensors if name.endswith(".pt") else load_json
        return load_if_current(load, self.path / name, made_from)

    def required(self, name: str, made_from: str, phase: int) -> dict[str, Any]:
        """Return what an earlier phase left. Raises InputError that names the phase to run first."""
        content = self.left(name, made_from)
        if content is None:
            raise InputError(
                f"{self.path / name} is missing, incomplete or made from another configuration; "
                f"run phase {phase} first"
            )
        return content

    def save(self, name: str, made_from: str, content: dict[str, Any]) -> dict[str, Any]:
        """Write an artifact in one step; returns the content with its fingerprint."""
        content = {"fingerprint": made_from, **content}
        (save_tensors if name.endswith(".pt") else save_json)(self.path / name, content)
        return content

    def journal(self, name: str, made_from: str) -> Journal:
        """Open `<name>_journal.jsonl`; rows in it are keyed by what they were made from."""
        path = self.path / f"{name}_journal.jsonl"
        journal = Journal(path, made_from, self.fresh and name not in self._opened)
        self._opened.add(name)
        if journal.n_damaged:
            self.notes.append(f"{journal.n_damaged} lines of {path} were damaged; their rows are made again")
        return journal


def main() -> None:
    """Check that a fresh run reads what it has just made, and nothing older as current."""
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        folder, fresh = RunFolder(Path(path)), RunFolder(Path(path), fresh=True)
        folder.save("check.json", "inputs", {"n": 3})
        assert folder.current("check.json", "inputs") == {"fingerprint": "inputs", "n": 3}
        assert folder.current("check.json", "others") is None is fresh.current("check.json", "inputs")
        assert fresh.required("check.json", "inputs", 2)["n"] == 3
    print("run_folder OK: fingerprints decide what is current")


if __name__ == "__main__":
    main()
