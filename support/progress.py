"""Show progress in a terminal and in a notebook, and none in a log file."""

from tqdm.auto import tqdm
from tqdm.notebook import tqdm as _of_notebooks

# What `disable` says: a terminal is asked whether it is one; a notebook is none, and shows bars all the same.
HIDDEN: bool | None = False if issubclass(tqdm, _of_notebooks) else None


def main() -> None:
    """Check that a bar counts."""
    with tqdm(total=2, disable=HIDDEN) as progress:
        progress.update(2)
    print("progress OK: bars are shown where somebody can see them")


if __name__ == "__main__":
    main()
