"""Load neutral text, on which the map is learnt (phase 2).

Sources: `wikitext-103` (through `datasets`, needs the hub), `wikipedia-sample` (pages of
the English Wikipedia inside a package, no hub), or a local `.txt`, `.jsonl` or `.parquet`
file. Each text is a passage cut from one paragraph, from its beginning unless many are
wanted, and keeps the id of its document, so that folds never split a document.

Passages end in the middle of sentences, after a varying number of words: if every text
ended in a full stop, all last-token activations would be those of full stops.
"""

import bz2
import json
import logging
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.errors import HubError, InputError, first_line, shown
from support.package_cache import PackagedFile, build_once, fetch_packaged_files
from support.text_files import local_path, parse_json, read_text
from texts.scripts import (
    CHARACTERS_IN_WORD,
    SENTENCE_END,
    SPACELESS,
    is_prose,
    is_spaceless,
    without_marks,
    words_of,
)

logger = logging.getLogger(__name__)

_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
WIKIPEDIA_PAGES = PackagedFile(
    file_name="enwiki-pages.xml.bz2",
    parts=(("gensim", "4.4.0", _MEMBER),),
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # Only a data file is needed, so the wheel of one platform serves all.
    pip_arguments=("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"),
)
SHORTEST, LONGEST = 12, 48  # words of a passage
MIN_WORDS = 25  # of a paragraph
DROPPED_TAGS = {"ref", "table", "gallery", "math", "code", "pre", "source", "timeline", "sup", "sub", "li"}
OVERLAP_WORDS = 8  # so long a run of equal words is no coincidence
# Control characters, lone surrogates, and gaps where markup was.
NO_TEXT = re.compile(r"[\0-\x1f\x7f-\x9f\ud800-\udfff]|[(,;]\s*[,;]|\(\s|\s[,.)]")


@dataclass(frozen=True)
class NeutralText:
    """Hold a passage and the document that it was cut from, or a response and its question.

    prompts: texts that the source and the target read before it; only the text's own tokens give pairs. Of an
        empty text, which is a response that has not begun, the prompts' last tokens do.
    """

    text: str
    document: str
    prompts: tuple[str, str] = ("", "")


def load_neutral_texts(
    name_or_path: str, n_texts: int, forbidden: Sequence[str] = (), seed: int = 0
) -> list[NeutralText]:
    """Return `n_texts` passages in a deterministic shuffled order.

    Every paragraph gives one passage from its beginning; if these are not enough, the rest of each
    paragraph gives further ones, from the next sentence on.

    name_or_path: see `read_documents`.
    forbidden: persona texts and test prompts; a paragraph is rejected, counted and logged if its passage
        overlaps one of them, see `OverlapCheck`.
    Raises InputError: unknown name, or fewer passages than asked for.
    """
    rng = random.Random(seed)
    paragraphs = [
        (words_of(paragraph), 0, document)
        for document, text in read_documents(name_or_path)
        for paragraph in usable_paragraphs(text)
    ]
    rng.shuffle(paragraphs)
    overlaps = OverlapCheck(forbidden)
    n_rejected, chosen, seen = 0, [], set()
    while paragraphs and len(chosen) < n_texts:
        rests = []
        for words, start, document in paragraphs:
            if len(chosen) == n_texts:
                break
            # At least one word is left out, so that no passage ends with its paragraph.
            end = start + rng.randint(SHORTEST, min(LONGEST, len(words) - start - 1))
            passage = "".join(words[start:end]).rstrip()
            if overlaps.found_in(passage):
                n_rejected += 1
                continue
            rest = end  # further passages begin after the sentence that this one ends in
            while rest < len(words) and not SENTENCE_END.search(words[rest - 1].rstrip()):
                rest += 1
            if len(words) - rest > SHORTEST:
                rests.append((words, rest, document))
            if passage not in seen:
                seen.add(passage)
                chosen.append(NeutralText(passage, document))
        paragraphs = rests
    if n_rejected:
        logger.warning("rejected %d neutral texts that overlap persona texts or prompts", n_rejected)
    if len(chosen) < n_texts:
        raise InputError(
            f"neutral text {name_or_path!r} gives {len(chosen)} passages (paragraphs of {MIN_WORDS} words or "
            f"more count), {n_rejected} rejected, but {n_texts} are wanted; lower n_training_samples (or "
            "ablation_samples) or give more text"
        )
    return chosen


def read_documents(name_or_path: str) -> Iterator[tuple[str, str]]:
    """Yield (document id, text) with paragraphs separated by line breaks.

    name_or_path: `wikitext-103`, `wikipedia-sample`, or the path of a file.
    `.txt`: blank lines separate paragraphs, each of which is a document of its own.
    `.jsonl`, `.parquet`: a field `text`, with a paragraph a line or hard-wrapped ones between blank lines;
    the document id is in `document`, `id` or `title`, or else the row number.
    Raises InputError: unknown name, a file that is missing or unreadable, or no `text` field.
    """
    if name_or_path == "wikitext-103":
        return _wikitext()
    if name_or_path == "wikipedia-sample":
        return _wikipedia_sample()
    path = local_path(name_or_path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    ending = path.suffix.lower()
    if ending not in readers:
        raise InputError(
            f"neutral_text {shown(name_or_path)} is unknown; choose 'wikitext-103', 'wikipedia-sample' or a "
            f"{', '.join(readers)} file"
        )
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise InputError(f"neutral_text file {name_or_path!r} {problem}")
    return ((document, unwrapped(text)) for document, text in readers[ending](path))


def unwrapped(text: str) -> str:
    """Return a text with the lines of each hard-wrapped paragraph joined.

    Lines between blank ones form one paragraph if most of them end in the middle of a sentence, and all
    but the last have about the same width.
    """
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.splitlines()]
        inner = lines[:-1]
        n_open = sum(not SENTENCE_END.search(line) for line in inner)
        is_even = inner and min(map(len, inner)) >= 0.5 * max(map(len, lines))
        joint = "" if is_spaceless(block) else " "
        blocks.append(joint.join(lines) if is_even and n_open > len(inner) / 2 else block)
    return "\n".join(blocks)


def usable_paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs (lines) of prose (`is_prose`) with MIN_WORDS words or more, white space folded.

    Lines with gaps where markup was, with control characters or with lone surrogates are left out. Byte-order
    marks are removed.
    """
    for line in text.splitlines():
        paragraph = " ".join(line.replace("\ufeff", "").split())
        if is_prose(paragraph) and len(words_of(paragraph)) >= MIN_WORDS and not NO_TEXT.search(paragraph):
            yield paragraph


class OverlapCheck:
    """Check whether a text shares a run of 8 words with any of the given texts.

    A given text of 4 to 7 words overlaps where it occurs whole; shorter ones ("In my opinion") are
    ordinary language. Case, punctuation, accents and vowel signs are ignored. In scripts without
    spaces, two characters count as a word.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.runs: dict[int, set[tuple[str, ...]]] = {}
        for text in texts:
            words, in_word = _words(text), CHARACTERS_IN_WORD if is_spaceless(text) else 1
            length = min(len(words), OVERLAP_WORDS * in_word)
            if length >= 4 * in_word:
                self.runs.setdefault(length, set()).update(_runs(words, length))

    def found_in(self, text: str) -> bool:
        """Return whether `text` overlaps."""
        words = _words(text)
        return any(not known.isdisjoint(_runs(words, length)) for length, known in self.runs.items())


_WORD = re.compile(rf"{SPACELESS.pattern}|(?:(?!{SPACELESS.pattern})\w)+")


def _words(text: str) -> list[str]:
    """Return the words of a text, and the single characters of scripts without spaces."""
    return _WORD.findall(without_marks(text.casefold()))


def _runs(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[start : start + length]) for start in range(len(words) - length + 1))


def _wikitext() -> Iterator[tuple[str, str]]:
    """Yield the articles of WikiText-103's training split, from the hub through `datasets`."""
    from datasets import load_dataset  # takes seconds to import and only this source needs it

    try:
        rows = load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", split="train")
    except (OSError, ValueError) as error:
        raise HubError(
            f"WikiText-103 cannot be loaded ({first_line(error, 150)}); without a hub, "
            '"wikipedia-sample" or a local file is neutral text'
        ) from error
    title, lines = "", []
    for line in rows["text"]:
        heading = re.fullmatch(r" = ([^=].*[^=]) = \n?", line)
        if heading:
            yield title, "".join(lines)
            title, lines = heading[1], []
        else:
            # WikiText writes ` , ` for `, ` and ` @-@ ` for `-`.
            line = re.sub(r" @([-.,])@ ", r"\1", line)
            line = re.sub(r" ([,.;:!?)\]%]|'s|n't|'[a-z]+\b)", r"\1", line)
            lines.append(re.sub(r"([(\[$£]) ", r"\1", line))
    yield title, "".join(lines)


def _wikipedia_sample() -> Iterator[tuple[str, str]]:
    folder = build_once(f"text/wikipedia-sample-{WIKIPEDIA_PAGES.sha256[:16]}", _build_wikipedia_sample)
    return _read_jsonl(folder / "pages.jsonl")


def _build_wikipedia_sample(folder: Path) -> None:
    """Strip the markup of the packaged pages and write one JSON line a page."""
    (packed,) = fetch_packaged_files([WIKIPEDIA_PAGES], folder)
    with open(folder / "pages.jsonl", "w", encoding="utf-8") as file, bz2.open(packed) as pages:
        for _, element in ElementTree.iterparse(pages):
            if element.tag.rpartition("}")[2] != "page":
                continue
            title = element.findtext(".//{*}title")
            wikicode = element.findtext(".//{*}text") or ""
            if ":" not in title and not wikicode.lstrip().lower().startswith("#redirect"):
                file.write(json.dumps({"title": title, "text": plain_prose(wikicode)}) + "\n")
            element.clear()
    packed.unlink()


def plain_prose(wikicode: str) -> str:
    """Return the running text of a wiki page: no templates, tables, references, lists or headings."""
    import mwparserfromhell  # only the first fetch needs it

    without_tables = re.sub(r"\{\|.*?^\|\}", "", wikicode, flags=re.DOTALL | re.MULTILINE)
    code = mwparserfromhell.parse(re.sub(r"^[*#:;|!].*$", "", without_tables, flags=re.MULTILINE))
    for node in code.filter(matches=_is_not_prose):
        with suppress(ValueError):  # an enclosing node was already replaced
            code.replace(node, _words_of(node))
    text = code.strip_code(normalize=True, collapse=False)
    # Templates and references leave empty brackets, doubled spaces and stray marks.
    text = re.sub(r"\(\s*[,;]*\s*\)", "", text)
    text = re.sub(r"\(\s*[,;]\s*", "(", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"[ \t]+([,.;:)])", r"\1", text)
    kept = [line for line in text.splitlines() if not re.search(r"[{}|\[\]<>]|&\w+;|https?:", line)]
    return re.sub(r"[ \t]{2,}", " ", "\n".join(kept))


def _is_not_prose(node: Any) -> bool:
    """Return whether a wiki node is a heading, a template, a file link or a tag that holds no prose."""
    from mwparserfromhell.nodes import Heading, Tag, Template, Wikilink

    if isinstance(node, Wikilink):
        return bool(re.match(r"(?i)\s*(file|image|category|[a-z-]{2,12}):", str(node.title)))
    if isinstance(node, Tag):
        return str(node.tag).strip().lower() in DROPPED_TAGS
    return isinstance(node, Heading | Template)


def _words_of(node: Any) -> str:
    """Return the words of measures and foreign words, and nothing for other nodes."""
    name = str(getattr(node, "name", "")).strip().lower()
    values = [str(param.value) for param in getattr(node, "params", ()) if not param.showkey]
    if name in ("convert", "cvt") and len(values) >= 2:
        return " ".join(values[:2])
    return values[-1] if values and (name.startswith("lang") or name == "nowrap") else ""


def _read_txt(path: Path) -> Iterator[tuple[str, str]]:
    paragraphs = re.split(r"\n\s*\n", read_text(path))
    for index, text in enumerate(paragraphs):
        yield str(index), ("" if is_spaceless(text) else " ").join(map(str.strip, text.splitlines()))


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield _document_of(parse_json(line, f"{path} line {number}"), number, path)


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    from pyarrow import ArrowInvalid, parquet  # only this source needs it

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({str(error)[:150]})") from error
    return (_document_of(row, number, path) for number, row in enumerate(rows, start=1))


def _document_of(row: dict, number: int, path: Path) -> tuple[str, str]:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise InputError(f"{path} row {number} has no string field 'text'; each row needs one")
    names = (str(row[key]) for key in ("document", "id", "title") if row.get(key) is not None)
    # A fingerprint cannot encode half a surrogate pair, so it is spelled out.
    return next(names, str(number)).encode("utf-8", "backslashreplace").decode(), row["text"]
