"""Tables for people have the aggregated numbers, dashes for missing ones, and stay valid Markdown."""

import re
from dataclasses import replace

import pytest
from made_up_scores import detection

from analysis.alpha_search import AlphaPoint, ChosenAlpha
from evaluation import METRICS, aggregate
from reporting.tables import detection_sentence, format_alphas, format_table, markdown_table


def rows(condition, alpha, persona="loud", n=12, auc=0.97, **values):
    one = {"condition": condition, "persona": persona, "alpha": alpha, "classifier_auc": auc}
    return [{**one, **dict.fromkeys((*METRICS, "trait_probability")), **values} for _ in range(n)]


def cells(block):
    """Return the body of a table as {(condition, alpha): {column: cell}}."""
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
    return {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in body}


def test_a_table_has_the_aggregated_numbers_and_dashes_for_missing_ones():
    scored = [
        *rows("baseline", None, trait_probability=0.25, perplexity=20.0, is_collapsed=False),
        *rows("oracle", 0.5, trait_probability=0.75, perplexity=31.26, is_collapsed=True),
        *rows("oracle", 2.0, n=10, trait_probability=0.125, repetition=0.3),
        *rows("oracle", 2.0, n=2, gpt4_coherence_score=4.2, gpt4_trait_score=2.0),
        *rows("oracle", 0.5, persona="bare", auc=None),
    ]
    heading, loud, of_bare, bare = format_table(aggregate(scored)).split("\n\n")
    said = "± standard deviation over prompts, ×/÷ of logarithms"
    assert heading == f"loud (trait by a classifier with cross-validated AUC 0.970; {said})"
    assert of_bare == f"bare (no trait classifier; {said})"
    expected = {
        ("baseline", ""): {"change": "–", "trait": "0.25 ± 0.00", "collapsed": "0%"},
        ("oracle", "0.5"): {"change": "+0.50 ± 0.00", "ppl": "31.3 ×/÷ 1", "collapsed": "100%", "n": "12"}
        | {"missing": "0"},
        ("oracle", "2"): {"change": "-0.12 ± 0.00", "repeat": "0.30", "n": "12", "missing": "2"}
        | {"judged coherence": "4.20 ± 0.00", "judged trait": "2.00 ± 0.00"},
    }
    found = cells(loud)
    assert {key: {name: found[key][name] for name in shown} for key, shown in expected.items()} == expected
    assert {cells(bare)["oracle", "0.5"][name] for name in ("trait", "change", "indep ppl")} == {"–"}
    assert "judged" not in format_table(aggregate(scored[:30]))  # the columns come with a judge's scores


@pytest.mark.parametrize(("seeds", "over"), [((0, 1), "seeds"), ((0,), "prompts")])
def test_a_mean_has_its_deviation_over_seeds_or_with_one_seed_over_prompts(seeds, over):
    scored = [
        row | {"prompt_idx": prompt, "seed": seed}
        for prompt, score in enumerate((0.2, 0.4))
        for seed in seeds
        for row in rows(
            *("oracle", 0.5),
            n=1,
            trait_probability=score + 0.1 * seed,
            perplexity=10.0 * (prompt + 1) * (seed + 1),
            n_words=5,
        )
    ]
    table = aggregate(scored)
    heading, body = format_table(table).split("\n\n")
    assert f"± standard deviation over {over}" in heading
    trait, perplexity = (table[0][name] for name in ("trait_probability", "perplexity"))
    shown = cells(body)["oracle", "0.5"]
    assert shown["trait"] == f"{trait['mean']:.2f} ± {trait[f'std_{over}']:.2f}"
    assert shown["ppl"] == f"{perplexity['mean']:.1f} ×/÷ {perplexity[f'std_{over}']:.3g}"


def test_table_is_valid_markdown():
    lines = format_table(aggregate(rows("baseline", None, n=9))).split("\n\n")[1].split("\n")
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
    point = replace(point, non_words_increase=None if reason else 0.01)
    row = format_alphas({("loud", "oracle"): ChosenAlpha(0.5, reason is None, at, [point])}).split("\n")[2]
    shown = ("–",) * 3 if reason else ("1.25", "+0.020", "+0.010")
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["loud", "oracle", "0.5", *shown, note]


def test_a_sentence_counts_sets_of_texts_and_says_what_is_not_measured():
    assert detection_sentence(detection(["loud", "pirate"])) == (
        "Mapped is surely better than the stronger lexical control on 2 of 2 sets of texts, and surely worse "
        "on 0. Mapped is surely better than the native vector on 0 of 2 sets of texts, and surely worse on "
        "1. A lexical control is zeros, "
        "with an AUROC of 0.50 by definition: loud, labelled; loud, responses. 2 of 4 sets are not measured: "
        "pirate, labelled; pirate, responses (there are none)."
    )
