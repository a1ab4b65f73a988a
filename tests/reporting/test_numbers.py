"""Every result that the documents give is in a run's artifacts, a benchmark's output or the code.

A result is a number with a decimal point, a percentage, a ratio (`2 ×`), a time, a size of memory, a speed,
or an interval with its estimate. It may be rounded further than its source. Plain integers ("three personas",
"60 questions", 57/60), orders of magnitude, and what is written as code are not looked at.

It has to be a constant of the code, or in what its section names: in `docs/results.md`, or in the output of
a script that `docs/measured/` holds. An interval has to stand there behind its estimate. A sentence that
cites others quotes them, and a section that says "not run" computes its numbers from assumptions.

The words beside a number are not compared. `docs/results.md` has most shares of two digits, so that where it
is named, a wrong one is surely found out only with its interval.
"""

import ast
import re
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = {"README.md", "METHODOLOGY.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))}
DOCUMENTS -= {"docs/results.md", "docs/lab_notebook.md"}  # a source; a diary of trials
MEASURED = sorted(ROOT.glob("docs/measured/*"))
NOT_YET_MEASURED = {  # (document, heading): sections whose benchmarks have no stored output
    ("docs/performance.md", "Map and extraction"),
    ("docs/performance.md", "Generation"),
    ("docs/performance.md", "Evaluation"),
}

NUMBER = r"(?<![\w.,+−-])[+−-]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w|\.\d|-[a-zA-Z])"
UNIT = r"%|×(?! ?\d)|ms\b|s\b|seconds|min\b|minutes|hours|[KMG]i?B\b|tokens/s|GFLOP/s"
RESULT = re.compile(rf"({NUMBER})(?=(?:(?:,| and| to| or) {NUMBER})*\s?({UNIT}))?")  # both of "1 to 2 %"
INTERVAL = re.compile(rf"({NUMBER})( ?%)?\s\[({NUMBER}),\s({NUMBER})\]")
SENTENCE = re.compile(r"(?:[^.|\n]|\n(?!\n)|\.(?!\s)|(?<=et al)\.)+")
CITES = re.compile(r"arXiv|et al\.|\((?:19|20)\d\d\)")
CODE = re.compile(r"^```.*?^```|`[^`]*`|\]\([^)]*\)|Python [\d. to]+", re.M | re.S)


def value(written):
    return float(written.replace(",", "").replace("−", "-"))


def numbers(path):
    """Return (n, 3): of each number its value, whether it is a decimal one, whether it is a percentage."""
    found = re.finditer(rf"({NUMBER})( ?%)?", path.read_text(encoding="utf-8"))
    return np.array([(value(m[1]), bool(set(".e") & set(m[1])), bool(m[2])) for m in found])


def script_of(path):
    return re.search(r"\w+\.py", path.read_text(encoding="utf-8"))[0]


@pytest.fixture(scope="module")
def sources():
    """Return name -> the sources that a section gets by naming it. The name "" is in every section."""
    code = {*ROOT.glob("*.py"), *ROOT.glob("*/*.py")} - {*ROOT.glob("tests/*"), *ROOT.glob("benchmarks/*")}
    nodes = (node for path in code for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    floats = {each.value for each in nodes if isinstance(getattr(each, "value", None), float)}
    constants = np.array([(each, True, False) for each in floats])
    known = {"": [constants], "results.md": [numbers(ROOT / "docs/results.md")]}
    for path in MEASURED:
        known.setdefault(script_of(path), []).append(numbers(path))
    return known


def same(source, written, is_percent, is_interval=False):
    """Return (n,): which numbers of a source the written one is, rounded as it is."""
    values, (is_decimal, of_hundred) = source[:, 0], source[:, 1:].T > 0
    digits = len(written.partition(".")[2])
    half = 0.5 * 10**-digits + 1e-9
    as_is, times_100 = (np.abs(factor * values - value(written)) <= half for factor in (1, 100))
    if is_percent:
        return as_is & (of_hundred | is_interval) | times_100 & is_decimal
    return as_is & ~of_hundred & (is_decimal | (digits == 0))


def is_in(source, result):
    if result.re is RESULT:
        return same(source, result[1], result[2] == "%").any()
    estimate, low, high = (same(source, result[part], bool(result[2]), True) for part in (1, 3, 4))
    return (estimate[:-2] & low[1:-1] & high[2:]).any()


def blank(match):
    return re.sub(r"\S", " ", match[0])


def not_found(text, sources):
    """Yield heading, line and number of each result of a document that is in none of its sources."""
    shown = CODE.sub(blank, text)
    shown = SENTENCE.sub(lambda match: blank(match) if CITES.search(match[0]) else match[0], shown)
    singles = INTERVAL.sub(blank, shown)
    headings = [match.start() for match in re.finditer(r"^#", shown, re.M)]
    for begin, end in pairwise([0, *headings, len(text)]):
        section = text[begin:end]
        given = [source for name in sources if name in section for source in sources[name]]
        results = [match for match in RESULT.finditer(singles, begin, end) if "." in match[1] or match[2]]
        for match in [*INTERVAL.finditer(shown, begin, end), *results]:
            if "not run" not in section and not any(is_in(source, match) for source in given):
                yield section.partition("\n")[0].strip("# "), text.count("\n", 0, match.start()) + 1, match[0]


@pytest.mark.parametrize("name", sorted(DOCUMENTS))
def test_every_result_of_the_documents_has_a_source(name, sources):
    found = list(not_found((ROOT / name).read_text(encoding="utf-8"), sources))
    unmeasured = {heading for document, heading in NOT_YET_MEASURED if document == name}
    assert not [f"{name}:{line}: {what}" for heading, line, what in found if heading not in unmeasured]
    assert unmeasured <= {heading for heading, *_ in found}, "what is measured by now leaves the list"


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_what_was_measured_says_by_which_command_and_when(path):
    command, day = path.read_text(encoding="utf-8").splitlines()[:2]
    assert command.startswith("# python ")
    assert date.fromisoformat(day)
    assert list(ROOT.glob(f"*/{script_of(path)}"))


TOLD = """# Speed

By `bench_speed.py`, 0.97 [0.95,
0.99], 12 to 13 %, and +2.6 at 1,079 tokens/s. Others (Li et al. 2016) say 7.7, and `7.8` is code.

# Elsewhere

It is 12 %.
"""


@pytest.fixture
def speed(tmp_path):
    path = tmp_path / "speed.txt"
    path.write_text("0.9700 [0.951, 0.99] 2.55 12% 0.1302 1,079.2 tokens/s; 77 of 12.9")
    return {"": [], "bench_speed.py": [numbers(path)]}


def test_results_are_found_rounded_in_what_their_section_names(speed):
    assert list(not_found(TOLD, speed)) == [("Elsewhere", 8, "12")]


def test_a_made_up_number_is_found_out(speed):
    told = ("0.97 [", "0.99]", "+2.6", "12 to", "13 %", "1,079")
    made_up = ("0.96 [", "0.98]", "-2.6", "77 to", "13.1 %", "1,080")
    for one, other in zip(told, made_up, strict=True):
        missing = list(not_found(TOLD.replace(one, other), speed))
        assert [heading for heading, *_ in missing] == ["Speed", "Elsewhere"], other
