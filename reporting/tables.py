"""Put the numbers of a run into sentences and Markdown tables, for the log, a paper or an issue."""

from collections.abc import Mapping, Sequence
from typing import Any

from analysis.alpha_search import AlphaKey, ChosenAlpha, CoherenceBound
from analysis.results_table import worst_cells
from analysis.strength_curve import MULTIPLES
from analysis.success_criteria import CRITERIA, EXPECTED
from analysis.verdict import BEYOND_WORDS, FEWEST_PROMPTS, HIGH_SCORE, VERDICTS
from experiment.conditions import (
    CONDITIONS,
    LEXICAL_CONTROLS,
    MAPPED,
    ORACLE,
    RANDOM,
    SCORERS,
    drawn_name,
    label_of,
)

# heading -> metric and format of a condition's mean
COLUMNS = {
    "trait": ("trait_probability", ".2f"),
    "change": ("trait_change", "+.2f"),
    "ppl": ("perplexity", ".1f"),
    "indep ppl": ("independent_perplexity", ".1f"),
    "repeat": ("repetition", ".2f"),
    "collapsed": ("is_collapsed", ".0%"),
}
OF_LENGTH = {"words": ("n_words", ".0f"), "ended": ("has_ended", ".0%")}
OF_JUDGE = {f"judged {name}": (f"gpt4_{name}_score", ".2f") for name in ("coherence", "trait")}
WITH_SPREAD = ("trait", "change", "ppl", "indep ppl", *OF_JUDGE)  # shown with their standard deviation
MEASURED = {"coherence": ".1f", "trait": ".1f", "collapse_rate": ".0%"}  # in the order of EXPECTED
# What an interval does not cover; said once beside verdicts.
COVERED = (
    "intervals cover the choice of questions, not vectors extracted from other texts nor another machine"
)
ENDING = 0.1  # share of unsteered texts that end, from which lengths are a result
AT_END = {"inside": "", "highest": "at the top of the bracket", "lowest": "at the bottom of the bracket"}
READ_AS = {"mean": "texts, mean over tokens", "last": "texts, last token", "responses": "responses"}
READ_AS["prompt"] = "last token of prompts"
# Columns of the table of detectors; None is the stronger lexical control.
DETECTORS = (ORACLE, MAPPED, None, "other_persona", "shuffled_pairs", RANDOM)
AT_END["listed"] = "the strongest listed one that can be read"


def number(value: float | None, form: str = ".2f") -> str:
    """Return a number in this format, or a dash if it is missing."""
    return "–" if value is None else format(value, form)


def p_value(value: float | None) -> str:
    """Return a p to three digits, or that it is below what they show."""
    return "< 0.001" if value is not None and value < 0.001 else number(value, ".3f")


def interval(found: Mapping[str, float | None] | None, form: str = "+.2f") -> str:
    """Return an estimate with its interval in brackets, or a dash if it is missing."""
    if not found or found["estimate"] is None:
        return "–"
    low, high = ("unbounded" if found[end] is None else format(found[end], form) for end in ("low", "high"))
    return f"{found['estimate']:{form}} [{low}, {high}]"


def percent(found: Mapping[str, float | None], unit: str = " %") -> str:
    """Return a share with its interval in per cent: 91 % [69, 113]."""
    low, high = ("unbounded" if found[end] is None else f"{found[end]:.0%}"[:-1] for end in ("low", "high"))
    return f"{number(found['estimate'], '.0%')[:-1]}{unit} [{low}, {high}]"


def verdict_sentence(found: Mapping[str, Any]) -> str:
    """Return why a persona's verdict stands, what else the vector does, and how other texts would move it.

    found: `Verdict.content()`, and where they are known preflight's `source_vector`, `off_target`, and
    `extraction_spread` of phase 5.
    """
    said = [_why(found)]
    if other := found.get("off_target"):
        verb = "raises" if other["mapped"] > 0 else "lowers"
        native = number(other["native"], "+.2f")
        said.append(f"also {verb} {other['persona']} by {other['mapped']:+.2f} (native {native})")
    if found.get("source_vector") == "fail":
        said.append("in the source itself, the vector does not move the trait at these alphas (preflight)")
    return "; ".join([*said, *_moved(found)])


def _moved(found: Mapping[str, Any]) -> list[str]:
    """Return how far another sample of the extraction texts moves effects; nothing where it is not known."""
    spread = found.get("extraction_spread") or {}
    of_vectors = spread.get("vectors")
    if not of_vectors:
        return []
    by = "" if spread["scorer"] == found["decided_by"] else f" by {SCORERS[spread['scorer']].phrase}"
    moved = ", ".join(
        f"±{each['std']:.2f} {'mapped' if name == MAPPED else 'native'}" for name, each in of_vectors.items()
    )
    chance = ", ".join(f"±{each['std_sampling']:.2f}" for each in of_vectors.values())
    return [f"another sample of the extraction texts moves the effect{by} by {moved} (chance alone {chance})"]


def _why(found: Mapping[str, Any]) -> str:
    scorers = found["scorers"]
    if found["reason"] == "all collapse":
        lowest = min(found["collapse_rates"], key=found["collapse_rates"].get)
        rate = f"{found['collapse_rates'][lowest]:.0%} of them under {CONDITIONS[lowest].label}"
        return (
            f"under every vector most texts collapse into repetition ({rate}, the fewest); lower alpha_values"
        )
    if found["reason"] == "unreadable":
        return (
            "at no alpha that was tried does the native vector leave text that can be read: even at the "
            f"weakest it breaks the bounds ({found['unreadable']})"
        )
    if found["reason"] == "no scorer validated":
        named = [f"{SCORERS[name].label}: {', '.join(scorers[name]['problems'])}" for name in scorers]
        return "no scorer is validated" + (f" ({'; '.join(named)})" if named else "")
    decided = scorers[found["decided_by"]]
    by = f"{SCORERS[found['decided_by']].phrase}{_validated_on(decided)}"
    why = f"by {by}, {_scorer_sentence(decided)}"
    if found["reason"] == "decided by scorer":
        return why
    said = [f"{SCORERS[name].label} says {scorers[name]['verdict']}" for name in found["rests_on"]]
    return f"the scorers disagree ({', '.join(said)}); {why}"


def _scorer_sentence(found: Mapping[str, Any]) -> str:
    """Return why a scorer's verdict stands. found: of `ScorerVerdict`."""
    missing = ", ".join(map(label_of, found["missing"]))
    if found["reason"] == "no scores":
        return f"no text has a score under {missing}"
    if found["reason"] == "few prompts":
        return f"{found['n_prompts']} prompts have scores and an interval needs {FEWEST_PROMPTS}"
    if found["reason"] == "equal scores":
        return "all scores are equal, so that nothing can be compared"
    needed = f"; about {n} prompts would settle it" if (n := found["prompts_needed"]) else ""
    if found["reason"] == "native effect":
        return f"the native vector moves the trait by {interval(found['native'])}{needed}"
    recovers = f"the mapped vector recovers {percent(found['recovery'])} of the native effect"
    if found["reason"] == "recovery":
        return recovers
    if found["reason"] == "control missing":
        return f"{recovers}, but these controls were not run, or have no score: {missing}"
    best, over = label_of(found["best_control"]), interval(found["over_best_control"])
    differs = f"differs from the best control, {best}, by {over} (Holm p {p_value(found['adjusted_p'])})"
    return f"{recovers} and {differs}{_beyond_words(found)}{_ceiling(found)}{needed}"


def _beyond_words(found: Mapping[str, Any]) -> str:
    """Return what the mapped vector does beyond the source's words; nothing where no control says it."""
    if found["lexical_control"] is None:
        return ""
    lexical, over = label_of(found["lexical_control"]), interval(found["over_lexical"])
    p = f"Holm p {p_value(found['lexical_p'])} for more than {BEYOND_WORDS:.0%} of the native effect"
    said = f", and from the lexical control, {lexical}, by {over} ({p}); {_beyond_lexical(found)}"
    if found["reason"] == "lexical control":
        said += "; the source's words do as well: nothing of the source model was needed"
        if found["over_lexical"]["high"] > BEYOND_WORDS * found["native"]["estimate"]:
            said += ", as far as these prompts can tell"
    return said


def _beyond_lexical(found: Mapping[str, Any]) -> str:
    """Return the recovery beyond the lexical control, or why it has no interval."""
    if found["beyond_lexical"] is None:
        return "native is not surely above that control, so that recovery beyond it has no interval"
    return f"it recovers {percent(found['beyond_lexical'])} of what native does beyond that control"


def _ceiling(found: Mapping[str, Any]) -> str:
    """Return that scores are at a ceiling, and what follows; nothing where they are not."""
    if found["log_odds_p"] is None:
        return ""
    return (
        f"; a ceiling: {found['share_near_one']:.0%} of native texts score above {HIGH_SCORE}, so that "
        f"equivalence needs equal log-odds, too (p {p_value(found['log_odds_p'])})"
    )


def recovery_rows(
    personas: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of a table: what mapped does of the native effect, and beyond the words.

    personas: name -> `Verdict.content()`. `*` marks a scorer that is not validated.
    """
    header = ("persona", "scorer", "native", "mapped", "recovery (%)", "lexical control", "mapped beyond it")
    header += ("recovery beyond it (%)",)
    rows = []
    for persona, found in personas.items():
        for scorer, decided in found["scorers"].items():
            if not decided["recovery"]:
                continue
            beyond, name = decided["beyond_lexical"], decided["lexical_control"]
            missing = "native not surely above it" if name else "not run"
            rows.append(
                (
                    persona,
                    SCORERS[scorer].label + ("" if decided["is_validated"] else " *"),
                    *(interval(decided[effect]) for effect in ("native", "mapped")),
                    percent(decided["recovery"], ""),
                    label_of(name) if name else "–",
                    interval(decided["over_lexical"]),
                    percent(beyond, "") if beyond else missing,
                )
            )
    return header, rows


def strength_tables(
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return heading -> a table of one persona over strengths; few narrow columns, one a vector.

    found: `strength_curve` of `verdict.json`. `*` marks a scorer that is not validated. After effects come
    shares of the native effect at the same strength, then what each vector does at native's perplexity
    ratio, and where it has half of native's effect.
    """
    tables = {}
    for (persona, scorer), of_persona in _by_scorer(found):
        vectors = of_persona["vectors"]
        columns = [_strength_cells(vector) for vector in vectors.values()]
        rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
        heading = f"{persona} by {scorer} at α {of_persona['alpha']:.3g}"
        tables[heading] = ("strength", *map(label_of, vectors)), rows
    return tables


def _strength_cells(vector: Mapping[str, Any]) -> dict[str, str]:
    """Return what stands in the rows of a vector's column."""
    at_multiples = list(zip(MULTIPLES, vector["points"], strict=True))
    equal = vector["at_native_ratio"]
    return {
        **{
            f"effect (ratio) at {multiple:g} α": f"{point['effect']:+.2f} ({point['perplexity_ratio']:.2f})"
            for multiple, point in at_multiples
        },
        **{f"recovery at {multiple:g} α (%)": _share(point["recovery"]) for multiple, point in at_multiples},
        "α × at native's ratio": number(equal["multiple"]) + ("" if equal["is_reached"] else " (nearest)"),
        "ratio there": number(equal["perplexity_ratio"]),
        "effect there": interval(equal["effect"]),
        "recovery there (%)": _share(equal["recovery"]),
        "half of native's effect at α ×": _reached(vector["half_effect"]),
        "over native's": _reached(vector["half_over_native"]),
    }


def _by_scorer(found: Mapping[str, Mapping[str, Any]]) -> list[tuple[tuple[str, str], Mapping[str, Any]]]:
    """Return (persona, the scorer's label) and the persona's curves."""
    return [
        ((persona, SCORERS[each["scorer"]].label + ("" if each["is_validated"] else " *")), each)
        for persona, each in found.items()
    ]


def _share(found: Mapping[str, float | None] | None) -> str:
    """Return a share of the native effect in per cent, a dash where there is no native effect; narrow."""
    if not found or found["estimate"] is None:
        return "–"
    return percent(found, "").replace("[unbounded", "[−∞").replace("unbounded]", "∞]")


def _reached(found: Mapping[str, float | None] | None) -> str:
    """Return a strength with its interval, each of which may not be reached; a dash if it is not known."""
    if found and found["estimate"] is None:
        return "not reached"
    return interval(found, ".2f").replace("unbounded", "not reached")


def capability_rows(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of a table: the accuracy on short questions, and its change in points.

    found: `capability.json`.
    """
    rows = [("unsteered", f"{found['unsteered']:.0%}", "–")]
    for persona, by_condition in found["personas"].items():
        for condition, each in by_condition.items():
            name = {MAPPED: "mapped", ORACLE: "native", RANDOM: "random"}.get(condition, "lexical")
            points = {end: 100 * value for end, value in each["change"].items()}
            rows.append((f"{persona}: {name}", f"{each['accuracy']:.0%}", interval(points, "+.0f")))
    return ("vector", "right", "change"), rows


def format_capability(found: Mapping[str, Any]) -> str:
    """Return the same as a Markdown table."""
    return markdown_table(*capability_rows(found), left=("vector",))


def turn_tables(
    found: Mapping[str, Mapping[str, Any]],
) -> dict[str, tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return heading -> a table of one persona over the turns of conversations; few narrow columns.

    found: `turns` of `verdict.json`. `*` marks a scorer that is not validated. An effect of too few
    conversations has no interval.
    """
    header = ("vector", "turn", "trait", "effect", "perplexity ratio", "n")
    tables = {}
    for (persona, scorer), of_persona in _by_scorer(found):
        rows = []
        for name, of_name in of_persona["conditions"].items():
            for turn in of_name["turns"]:
                said = number(turn["trait"]), _change(turn["effect"]), number(turn["perplexity_ratio"])
                rows.append((label_of(name), str(turn["turn"]), *said, _count(turn["effect"])))
            if drift := of_name["drift"]:
                rows.append((label_of(name), "drift", "", _change(drift), "", _count(drift)))
        tables[f"{persona} by {scorer} at α {of_persona['alpha']:.3g}"] = header, rows
    return tables


def _change(found: Mapping[str, float | None] | None) -> str:
    """Return an effect, with its interval if it has one."""
    return interval(found) if not found or found["low"] is not None else number(found["estimate"], "+.2f")


def _count(found: Mapping[str, Any] | None) -> str:
    return str(found["n"]) if found else ""


def format_headed(tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]]) -> str:
    """Return Markdown tables, each under its heading. tables: of `strength_tables` or `turn_tables`."""
    return "\n\n".join(f"{heading}\n\n{markdown_table(*table)}" for heading, table in tables.items())


def protocol_rows(protocol: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of a table: what a run chose before its first test text, and by what.

    protocol: what `protocol.json` holds.
    """
    layers, test, search = protocol["layers"], protocol["test"], protocol["alpha"]
    pairs = ", ".join(f"{source} → {target}" for source, target in layers["chosen"])
    learnt = protocol["mapping_data"]
    learnt_of = ", ".join(learnt["alternatives"]).replace("_", " ")
    rows = [
        ("layers, source → target", pairs, f"by {layers['by']}"),
        ("text of the map", learnt["chosen"].replace("_", " "), f"of {learnt_of}"),
        _map_row("λ of the map", protocol["maps"]),
    ]
    if of_prompts := protocol["prompt_maps"]:
        rows.append(_map_row("λ of the map of vectors from prompts", of_prompts))
    for persona, kind in protocol["extraction"]["chosen"].items():
        cosines = [
            min(filter(None, of_side[persona]), default=None)
            for of_side in protocol["split_half_cosines"].values()
        ]
        halves = " and ".join(number(cosine) for cosine in cosines)
        kinds = protocol["extraction_numbers"].get(persona, {})
        measured = "; ".join(_kind(name, found) for name, found in kinds.items())
        by = f"cosine of halves at least {halves} in source and target"
        rows.append((f"vector of {persona}", READ_AS[kind], "; ".join(filter(None, [measured, by]))))
    bound = CoherenceBound(**search["bound"])
    for entry in search["alphas"]:
        most = bound.of_trait(search["trait_costs"].get(entry["persona"], 1.0)).max_perplexity_ratio
        tried = "; ".join([f"ratio at most {most:.2f}", *map(_tried, entry["curve"])])
        rows.append((f"α of {entry['persona']}", number(entry["alpha"], ".4g"), tried))
    rows.append(
        ("test prompts", f"{len(test['prompts'])} of {test['chosen']}", f"{len(test['seeds'])} seeds")
    )
    return ("what", "chosen", "by"), rows


def _map_row(what: str, maps: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Return the lambdas of the maps of all layer pairs, and their held-out R2."""
    r2 = [of_pair["r2"][str(of_pair["best_lambda"])] for of_pair in maps]
    lambdas = ", ".join(f"{of_pair['best_lambda']:g}" for of_pair in maps)
    return what, lambdas, f"best held-out R² of {len(maps[0]['r2'])}, {min(r2):.2f} to {max(r2):.2f}"


def _kind(kind: str, found: Mapping[str, Any]) -> str:
    """Return what is known of a kind of vector that was tried."""
    words = max(found["lexical_cosines"].values(), default=None)
    return f"{kind}: native {number(found['native_effect'], '+.2f')}, cosine of words {number(words)}"


def _tried(point: Mapping[str, Any]) -> str:
    """Return an alpha that was tried, the native vector's perplexity ratio, and the bounds it breaks."""
    said = f"{point['alpha']:.3g}: ratio {number(point['perplexity_ratio'])}"
    return f"{said} ({point['reason']})" if point["reason"] else said


def format_recoveries(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the same as a Markdown table."""
    return markdown_table(*recovery_rows(personas), left=("persona", "scorer", "lexical control"))


def alone(found: Mapping[str, Any]) -> str:
    """Return a note for a verdict that rests on one scorer, else nothing. found: `Verdict.content()`."""
    rests_on = found["rests_on"]
    return f" (on {SCORERS[rests_on[0]].phrase} alone)" if len(rests_on) == 1 else ""


def format_verdicts(content: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a line a persona: the verdict, the numbers that decided it, and the scorers it rests on.

    Last, how many personas have which verdict, and what no interval covers.

    content: persona -> `Verdict.content()`.
    """
    lines = [
        f"{persona}: {found['verdict'].upper()}{alone(found)}: {verdict_sentence(found)}"
        for persona, found in content.items()
    ]
    counts = {word: sum(found["verdict"] == word for found in content.values()) for word in VERDICTS}
    in_all = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return "\n".join([*lines, f"personas: {in_all}; {COVERED}"])


def format_validation(validation: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return a line for each scorer of each persona: whether it is validated, and how it does.

    validation: persona -> scorer -> what `scoring.validation.validate` returns.
    """
    lines = []
    for persona, by_scorer in validation.items():
        if not by_scorer:
            lines.append(f"{persona}: no scorer")
        for scorer, found in by_scorer.items():
            line = "validated" if found["is_validated"] else f"NOT VALIDATED ({'; '.join(found['problems'])})"
            if not found.get("auc"):
                line += f"; {found.get('measure', 'not measured')}"
            else:
                line += f"; lowest AUC {lowest_auc(found)}"
                for name in ("sensitivity", "specificity"):
                    if found[name]:
                        line += f", {name} {found[name]['n_right'] / found[name]['n']:.0%}"
            if found.get("repeat_noise") is not None:
                line += f", a second judgement differs by {found['repeat_noise']:.2f} of 1 to 5"
            lines.append(f"{persona}, {scorer}: {line}{_validated_on(found)}")
    return "\n".join(lines)


def _validated_on(found: Mapping[str, Any]) -> str:
    """Return on what a judge was validated, in brackets; nothing for other scorers."""
    return f" (validated on {found['validated_on']})" if found.get("validated_on") else ""


def lowest_auc(found: Mapping[str, Any]) -> str:
    """Return a scorer's lowest AUC and its set, or a dash. found: of `scoring.validation.validate`."""
    lowest = min(found.get("auc") or {}, key=lambda name: found["auc"][name], default=None)
    return "–" if lowest is None else f"{found['auc'][lowest]:.2f} ({lowest})"


def format_success(found: Mapping[str, Any]) -> str:
    """Return a Markdown table a persona: what was measured, and in brackets what the specification expects.

    found: what `success_criteria.success` returns.
    """
    blocks = []
    for persona, of_persona in found.items():
        said = [f"{name}: {'reached' if of_persona[name] else 'not reached'}" for name in CRITERIA]
        rows = []
        for condition, measured in of_persona["conditions"].items():
            names = zip(MEASURED.items(), EXPECTED[condition], strict=True)
            cells = [f"{measured[name]:{form}} ({expected:{form}})" for (name, form), expected in names]
            rows.append((condition, *cells, str(measured["n"])))
        table = markdown_table(("condition", "coherence", "trait", "collapsed", "n"), rows)
        blocks.append(f"{persona}, the specification's result, {', '.join(said)}\n\n{table}")
    return "\n\n".join(blocks)


def format_kinds(kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of one persona: what each kind of its vector does natively, and its words.

    kinds: kind -> `KindNumbers` as a dictionary.
    """
    rows = [
        (
            kind,
            number(found["alpha"], ".4g"),
            number(found["native_effect"], "+.2f"),
            number(found["perplexity_ratio"]),
            "" if found["is_coherent"] else "cannot be read",
            *map(number, found["lexical_cosines"].values()),
        )
        for kind, found in kinds.items()
    ]
    controls = next((found["lexical_cosines"] for found in kinds.values()), ())
    header = ("made from", "α", "native effect", "perplexity ratio", "note", *map(label_of, controls))
    return markdown_table(header, rows, left=("made from", "note"))


def format_alphas(alphas: Mapping[AlphaKey, ChosenAlpha]) -> str:
    """Return a Markdown table: each chosen alpha, and where its search met an end of the bracket."""
    rows = [
        (
            *key,
            f"{chosen.alpha:.4g}",
            number(chosen.point.perplexity_ratio),
            number(chosen.point.repetition_increase, "+.3f"),
            number(chosen.point.non_words_increase, "+.3f"),
            AT_END[chosen.at] if chosen.is_coherent else f"not coherent even there: {chosen.point.reason}",
        )
        for key, chosen in alphas.items()
    ]
    header = ("persona", "method", "alpha", "perplexity ratio", "repetition increase")
    header += ("non-words increase", "note")
    return markdown_table(header, rows, left=("persona", "method", "note"))


def alpha_notes(alphas: Mapping[AlphaKey, ChosenAlpha]) -> list[str]:
    """Return a note for each persona whose bracket holds no alpha that its bounds decide."""
    notes = []
    for (persona, _), found in alphas.items():
        if not found.is_coherent:
            note = f"native steering leaves no text that can be read ({found.point.reason}), not even at"
            weakest = f"the weakest alpha, {found.alpha:g}, at which conditions are compared"
            key = "alpha_values" if found.at == "listed" else "alpha_search.bracket"
            notes.append(f"{persona}: {note} {weakest}; lower {key}")
        elif found.at == "highest":
            note = f"the strongest alpha tried, {found.alpha:g}, still leaves text that can be read; raise"
            notes.append(f"{persona}: {note} alpha_search.bracket")
    return notes


def format_table(table: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table a persona, each under a heading with its classifier's AUC.

    table: what `evaluation.aggregate` returns. Perplexities are geometric means; missing counts texts
    without a trait score, empty those without a word, which show no trait. Standard deviations are those
    over seeds, or over prompts if there is one seed. Of a control of several draws, the row is of the draw
    with the largest change. A judge's scores come in two more columns if there are any; so do, where
    unsteered texts end, the mean number of words and the share of texts that the model ended before the
    limit.
    """
    more = {}
    if any((entry["has_ended"]["mean"] or 0) >= ENDING for entry in table if entry["alpha"] is None):
        more |= OF_LENGTH
    if any(entry["gpt4_coherence_score"]["n"] for entry in table):
        more |= OF_JUDGE
    header = ("condition", "alpha", *COLUMNS, "n", "missing", "empty", *more)
    over = "seeds" if any(entry["n_words"]["std_seeds"] is not None for entry in table) else "prompts"
    said = f"± standard deviation over {over}, ×/÷ of logarithms"
    blocks = []
    for persona in dict.fromkeys(entry["persona"] for entry in table):
        entries = worst_cells([entry for entry in table if entry["persona"] == persona])
        auc = entries[0]["classifier_auc"]
        note = f"trait by a classifier with cross-validated AUC {auc:.3f}" if auc else "no trait classifier"
        rows = []
        for entry in entries:
            alpha = "" if entry["alpha"] is None else f"{entry['alpha']:.4g}"
            shown, behind = (
                [
                    _mean(entry[metric], form, f"std_{over}" if name in WITH_SPREAD else None, metric)
                    for name, (metric, form) in columns.items()
                ]
                for columns in (COLUMNS, more)
            )
            n_missing = entry["trait_probability"]["missing"]
            counts = map(str, (entry["n"], n_missing, entry["n_empty"]))
            rows.append((drawn_name(entry["condition"], entry["draw"]), alpha, *shown, *counts, *behind))
        blocks.append(f"{persona} ({note}; {said})\n\n{markdown_table(header, rows)}")
    return "\n\n".join(blocks)


def _mean(found: Mapping[str, float | None], form: str, spread: str | None, metric: str) -> str:
    """Return a mean, with the deviation that `spread` names: 0.62 ± 0.05, for perplexities 31.3 ×/÷ 1.2."""
    mean = number(found["mean"], form)
    if spread is None or found[spread] is None:
        return mean
    if metric.endswith("perplexity"):
        return f"{mean} ×/÷ {found[spread]:.3g}"
    return f"{mean} ± {found[spread]:{form.lstrip('+')}}"


def format_maps(table: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of maps: held-out R2 in three ways, and retrieval accuracy.

    table: what `comparison_maps.maps_table` returns.
    """
    return markdown_table(*maps_rows(table))


def maps_rows(table: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the same table."""
    columns = {"n": "d", "lambda": "g", "rank": "d"}
    columns |= dict.fromkeys(("r2", "r2_standardised", "r2_median_dimension"), ".3f")
    header = ("map", "pairs", "lambda", "rank", "R2", "standardised", "median dim", "retrieval")
    rows = [
        (
            row["map"],
            *(number(row[name], form) for name, form in columns.items()),
            f"{number(row['retrieval_accuracy'], '.1%')} of {row['retrieval_n']}",
        )
        for row in table
    ]
    return header, rows


def format_cosines(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: each transfer's cosine to the oracle, with / without massive dimensions.

    personas: name -> what phase 3 reports. The last columns: where the oracle is of other texts than the
    source's vector, the cosine of the target's vector of the latter (ceiling); the highest cosine of the
    mapped vector to another persona's oracle; and the share of the oracle that the map predicts.
    """
    return markdown_table(*cosine_rows(personas))


def cosine_rows(
    personas: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the same table."""
    header, rows = (), []
    has_ceiling = any(entry["ceiling"] for entry in personas.values())
    for name, entry in personas.items():
        cosines, without = entry["cosine_to_oracle"], entry["cosine_without_massive"]
        cells = {method: f"{cosines[method]:.2f} / {without[method]:.2f}" for method in cosines}
        if has_ceiling:
            cells["ceiling"] = " / ".join(f"{each:.2f}" for each in (entry["ceiling"] or {}).values()) or "–"
        energy = number(entry["oracle_energy"]["mean_r2"], ".0%")
        rows.append((name, *cells.values(), number(entry["highest_cosine_to_other_oracles"]), energy))
        header = ("persona", *cells, "other oracles", "predicted energy")
    return header, rows


def format_spread(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table: how far cosines spread over resamples of each persona's extraction texts.

    personas: of `extraction_spread.json`.
    """
    return markdown_table(*spread_rows(personas), left=("persona", "not resampled because"))


def spread_rows(
    personas: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the same table: medians with the middle 95 %."""
    header = ("persona", "mapped to native", "resampled", "without massive", "resampled", "source to its own")
    header += ("target to its own", "not resampled because")
    rows = []
    for name, found in personas.items():
        cells: list[str] = []
        for cosine in ("cosine_to_oracle", "cosine_without_massive"):
            spread = found.get(cosine) or {}
            cells += [number(spread.get("all_texts")), _middle(spread)]
        cells += [_middle(found.get(side)) for side in ("source", "target")]
        rows.append((name, *cells, found["not_resampled"] or ""))
    return header, rows


def _middle(spread: Mapping[str, float] | None) -> str:
    """Return a median with the middle 95 %, or a dash."""
    return f"{spread['median']:.2f} [{spread['low']:.2f}, {spread['high']:.2f}]" if spread else "–"


def detection_rows(
    personas: Mapping[str, Mapping[str, Any]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a table of vectors as detectors: AUROC at the middle block, and mapped less the lexical control.

    personas: of `detection.json`. The labelled texts of a persona have a row also where they are not read,
    its own responses (marked `responses`) where they are. Of a control the draw with the largest AUROC.
    """
    header = ("persona", "native", "mapped", "lexical", "other persona", "shuffled", "random")
    rows = []
    for persona, sets in personas.items():
        for name, found in sets.items():
            is_labelled = name == "labelled"
            if is_labelled or not found["not_measured"]:
                areas = [number(_area(found, condition)) for condition in DETECTORS]
                over = interval(found.get("over_lexical"))
                rows.append((persona if is_labelled else f"{persona}, {name}", *areas, over))
    return (*header, "mapped − lexical"), rows


def _area(found: Mapping[str, Any], condition: str | None) -> float | None:
    """Return the AUROC of a condition's strongest draw at the middle block; None if it is not known."""
    name = found.get("lexical_control" if condition is None else "shown")
    if name and condition:
        name = name.get(condition)
    return found["auroc"][name][len(found["auroc"][name]) // 2]["estimate"] if name else None


def detection_sentence(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what the table of detectors says, which sets are not measured, and which controls are zeros."""
    sets = [(f"{persona}, {name}", found) for persona, by in personas.items() for name, found in by.items()]
    read = [(place, found) for place, found in sets if not found["not_measured"]]
    told = ""
    for other, key in (
        ("the stronger lexical control", "over_lexical"),
        ("the native vector", "over_native"),
    ):
        if over := [found[key] for _, found in read if found[key]]:
            better, worse = sum(each["low"] > 0 for each in over), sum(each["high"] < 0 for each in over)
            counted = f"on {better} of {len(over)} sets of texts, and surely worse on {worse}"
            told += f"Mapped is surely better than {other} {counted}. "
    zeros = [place for place, found in read if set(found["zeros"]) & set(LEXICAL_CONTROLS)]
    if zeros:
        told += f"A lexical control is zeros, with an AUROC of 0.50 by definition: {'; '.join(zeros)}. "
    reasons: dict[str, list[str]] = {}
    for place, found in sets:
        if found["not_measured"]:
            reasons.setdefault(found["not_measured"], []).append(place)
    missing = [f"{'; '.join(places)} ({why})" for why, places in reasons.items()]
    counted = f"{len(sets) - len(read)} of {len(sets)} sets are not measured: " if missing else ""
    return f"{told}{counted}{'; '.join(missing)}{'.' if missing else ''}".strip()


def format_detection(personas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of detectors in Markdown, and what it says."""
    return f"{markdown_table(*detection_rows(personas))}\n\n{detection_sentence(personas)}"


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
