import re

import pytest

from analysis.alpha_search import AlphaPoint, ChosenAlpha
from evaluation import METRICS, aggregate
from reporting.tables import format_alphas, format_table, markdown_table


def rows(condition, persona, alpha, n=12, auc=0.97, **values):
    one = {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": auc}
    return [{**one, **dict.fromkeys((*METRICS, "trait_probability")), **values} for _ in range(n)]


def cells(text):
    """Return the body of each table as {(condition, alpha): {column: cell}}, one a persona."""
    tables = []
    for block in text.split("\n\n")[1::2]:
        header, _, *body = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")
        ]
        tables.append({(row[0], row[1]): dict(zip(header, row, strict=True)) for row in body})
    return tables


@pytest.fixture(scope="module")
def table():
    return aggregate(
        [
            *rows("baseline", "loud", None, trait_probability=0.25, perplexity=20.0, is_collapsed=False),
            *rows("oracle", "loud", 0.5, trait_probability=0.75, perplexity=31.26, is_collapsed=True),
            *rows("oracle", "loud", 2.0, n=10, trait_probability=0.125, repetition=0.3),
            *rows("oracle", "loud", 2.0, n=2),
            *rows("baseline", "bare", None, auc=None),
            *rows("oracle", "bare", 0.5, auc=None),
        ]
    )


def test_changes_are_against_the_unsteered_text(table):
    loud, _ = cells(format_table(table))
    assert loud["baseline", ""]["change"] == "–"
    assert loud["oracle", "0.5"]["change"] == "+0.50"
    assert loud["oracle", "2"]["change"] == "-0.12"


def test_numbers_are_those_of_the_aggregation(table):
    loud, _ = cells(format_table(table))
    row = loud["oracle", "0.5"]
    assert (row["trait"], row["ppl"], row["collapsed"]) == ("0.75", "31.3", "100%")
    assert (row["n"], row["missing"]) == ("12", "0")
    assert (loud["oracle", "2"]["n"], loud["oracle", "2"]["missing"]) == ("12", "2")
    assert loud["oracle", "2"]["repeat"] == "0.30"


def test_missing_numbers_are_dashes(table):
    _, bare = cells(format_table(table))
    assert bare["oracle", "0.5"]["trait"] == bare["oracle", "0.5"]["change"] == "–"
    assert bare["oracle", "0.5"]["indep ppl"] == "–"


def test_headings_name_persona_and_classifier(table):
    headings = format_table(table).split("\n\n")[::2]
    assert headings == [
        "loud (trait by a classifier with cross-validated AUC 0.970)",
        "bare (no trait classifier)",
    ]


def test_judges_columns_come_with_its_scores(table):
    assert "judged" not in format_table(table)
    judged = aggregate(rows("oracle", "loud", 1.0, gpt4_coherence_score=4.2, gpt4_trait_score=2.0))
    (found,) = cells(format_table(judged))
    row = found["oracle", "1"]
    assert (row["judged coherence"], row["judged trait"]) == ("4.20", "2.00")


@pytest.mark.parametrize("n", [1, 9, 12, 100])
def test_table_is_valid_markdown(n):
    text = format_table(aggregate(rows("baseline", "loud", None, n=n)))
    lines = text.split("\n\n")[1].split("\n")
    assert len({len(line) for line in lines}) == 1
    rule = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert len(rule) == lines[0].count("|") - 1
    assert all(re.fullmatch(r":?-+:?", cell) for cell in rule), rule


@pytest.mark.parametrize("name", ["a|b", "|", "a\\|b", "a\\", "$x$", "_a_"])
def test_a_name_stays_in_its_cell(name):
    header, _, row = markdown_table(("persona", "n"), [(name, "1")]).split("\n")
    assert len(header) == len(row)
    # As Markdown reads a row: a backslash takes the bars and backslashes behind it out of the count.
    cells = re.findall(r"(?:\\[|\\]|[^|\\])+", row)
    assert [re.sub(r"\\([|\\])", r"\1", cell).strip() for cell in cells] == [name, "1"]


@pytest.mark.parametrize(
    ("at", "reason", "note"),
    [
        ("inside", None, ""),
        ("highest", None, "at the top of the bracket"),
        ("lowest", None, "at the bottom of the bracket"),
        ("lowest", "texts missing", "not coherent even there: texts missing"),
    ],
)
def test_chosen_alphas_are_shown_with_what_was_measured_there(at, reason, note):
    point = AlphaPoint(0.5, None if reason else 1.25, None if reason else 0.02, 4, 0, reason is None, reason)
    chosen = ChosenAlpha(0.5, reason is None, at, [point])
    row = format_alphas({("loud", "oracle"): chosen}).split("\n")[2]
    shown = ("–", "–") if reason else ("1.25", "+0.020")
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["loud", "oracle", "0.5", *shown, note]
