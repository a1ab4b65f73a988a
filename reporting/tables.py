"""Lay out the result of a run as a table that can be pasted into a paper or an issue (phase 5)."""

from collections.abc import Mapping, Sequence
from typing import Any

HEADER = ("condition", "alpha", "trait", "change", "ppl", "indep ppl", "repeat", "collapsed", "n", "missing")
ENDING = 0.1  # share of unsteered texts that end, from which lengths are a result


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table a persona, each under a heading with its classifier's AUC.

    table: what `evaluation.aggregate` returns. trait and its change against the unsteered
    text of the same prompt are means; perplexities are medians; missing counts texts without a trait score.
    A judge's scores come in two more columns if there are any; so do, where unsteered texts end, the mean
    number of words and the share of texts that the model ended before the limit.
    """
    judged = any(entry["gpt4_coherence_score"]["n"] for entry in table)
    ending = any((entry["has_ended"]["mean"] or 0) >= ENDING for entry in table if entry["alpha"] is None)
    header = HEADER + ("words", "ended") * ending + ("judged coherence", "judged trait") * judged
    blocks = []
    for persona in dict.fromkeys(entry["persona"] for entry in table):
        entries = [entry for entry in table if entry["persona"] == persona]
        auc = entries[0]["classifier_auc"]
        note = f"trait by a classifier with cross-validated AUC {auc:.3f}" if auc else "no trait classifier"
        rows = [_cells(entry, judged, ending) for entry in entries]
        blocks.append(f"{persona} ({note})\n\n{markdown_table(header, rows)}")
    return "\n\n".join(blocks)


def format_maps(table: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of maps: held-out R2 in three ways, and retrieval accuracy.

    table: what `comparison_maps.maps_table` returns.
    """
    return markdown_table(*maps_rows(table))


def maps_rows(table: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the same table."""
    header = ("map", "pairs", "lambda", "rank", "R2", "standardised", "median dim", "retrieval")
    rows = [
        (
            row["map"],
            str(row["n"]),
            _number(row["lambda"], "g"),
            _number(row["rank"], "d"),
            _number(row["r2"], ".3f"),
            _number(row["r2_standardised"], ".3f"),
            _number(row["r2_median_dimension"], ".3f"),
            f"{_number(row['retrieval_accuracy'], '.1%')} of {row['retrieval_n']}",
        )
        for row in table
    ]
    return header, rows


def format_cosines(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: each transfer's cosine to the oracle, with / without massive dimensions.

    personas: name -> what phase 3 reports. The last columns: the highest cosine of the mapped vector
    to another persona's oracle, and the share of the oracle that the map predicts.
    """
    methods = list(next(iter(personas.values()))["cosine_to_oracle"])
    header = ("persona", *methods, "other oracles", "predicted energy")
    rows = []
    for name, entry in personas.items():
        pairs = [(entry["cosine_to_oracle"][key], entry["cosine_without_massive"][key]) for key in methods]
        cells = [f"{cosine:.2f} / {without:.2f}" for cosine, without in pairs]
        energy = _number(entry["oracle_energy"]["mean_r2"], ".0%")
        rows.append((name, *cells, _number(entry["highest_cosine_to_other_oracles"], ".2f"), energy))
    return markdown_table(header, rows)


def _cells(entry: Mapping[str, Any], judged: bool, ending: bool) -> tuple[str, ...]:
    cells = (
        entry["condition"],
        "" if entry["alpha"] is None else f"{entry['alpha']:.4g}",
        _number(entry["trait_probability"]["mean"], ".2f"),
        _number(entry["trait_change"]["mean"], "+.2f"),
        _number(entry["perplexity"]["median"], ".1f"),
        _number(entry["independent_perplexity"]["median"], ".1f"),
        _number(entry["repetition"]["mean"], ".2f"),
        _number(entry["is_collapsed"]["mean"], ".0%"),
        str(entry["n"]),
        str(entry["trait_probability"]["missing"]),
    )
    if ending:
        cells += (_number(entry["n_words"]["mean"], ".0f"), _number(entry["has_ended"]["mean"], ".0%"))
    if not judged:
        return cells
    scores = (entry["gpt4_coherence_score"]["mean"], entry["gpt4_trait_score"]["mean"])
    return (*cells, *(_number(score, ".2f") for score in scores))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] | None = None
) -> str:
    """Return a Markdown table in columns of equal width.

    left: names of the columns that are aligned to the left; the first by default.
    A `|` or backslash in a cell is escaped.
    """
    left = header[:1] if left is None else left
    rows = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in row] for row in rows]
    # A rule needs three marks to be one.
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]
    columns = [("<" if name in left else ">", width) for name, width in zip(header, widths, strict=True)]
    rule = ["-" * width if side == "<" else "-" * (width - 1) + ":" for side, width in columns]
    lines = [
        " | ".join(f"{cell:{side}{width}}" for cell, (side, width) in zip(row, columns, strict=True))
        for row in (header, rule, *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Check the table of made-up numbers: the change is against the baseline, missing is a dash."""
    number = {"mean": 0.25, "median": 20.0, "std": 0.1, "n": 3, "missing": 0}
    absent = {"mean": None, "median": None, "std": None, "n": 0, "missing": 3}
    common = {"persona": "check", "n": 3, "classifier_auc": 0.97}
    common |= dict.fromkeys(("perplexity", "repetition", "is_collapsed", "trait_probability"), number)
    common["trait_change"] = {"mean": None}
    common |= dict.fromkeys(
        ("independent_perplexity", "gpt4_coherence_score", "gpt4_trait_score", "has_ended"), absent
    )
    steered = {"condition": "oracle", "alpha": 2.0, "trait_change": {"mean": 0.5}}
    text = format_table([{**common, "condition": "baseline", "alpha": None}, {**common, **steered}])
    assert all(part in text for part in ("+0.50", "–", "AUC 0.970")), text
    print(text, "tables OK: changes are against the baseline, missing is a dash", sep="\n")


if __name__ == "__main__":
    main()
