"""Passages are cut from prose of any source, whole documents apart from personas and prompts."""

import json
import random
import re
import string

import pyarrow
import pytest
from pyarrow import parquet

from support.errors import InputError
from texts.neutral_text import (
    MIN_WORDS,
    OverlapCheck,
    load_neutral_texts,
    plain_prose,
    read_documents,
    usable_paragraphs,
)

WORDS = (
    "the old river runs past a small town where people sell bread and fish on most days of each year".split()
)


def paragraph(number, n_words=60):
    """One long sentence that no other number gives."""
    rng = random.Random(number)
    return f"Number {number} " + " ".join(rng.choices(WORDS, k=n_words - 3)) + " end."


@pytest.fixture
def text_file(tmp_path):
    def write(n=200, n_words=60):
        path = tmp_path / "neutral.txt"
        path.write_text("\n\n".join(paragraph(number, n_words) for number in range(n)))
        return str(path)

    return write


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")


def write_parquet(path, rows):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {"jsonl": write_jsonl, "parquet": write_parquet}


def test_order_and_cuts_depend_on_the_seed_alone(text_file):
    source = text_file()
    first = load_neutral_texts(source, 100, seed=1)
    assert load_neutral_texts(source, 100, seed=1) == first
    assert load_neutral_texts(source, 60, seed=1) == first[:60]
    assert load_neutral_texts(source, 100, seed=2) != first
    numbers = [int(item.text.split()[1]) for item in first]
    assert numbers != sorted(numbers)
    assert len(set(numbers)) == 100


@pytest.mark.parametrize("n_words", [MIN_WORDS, 40, 60])
def test_passages_begin_a_paragraph_vary_in_length_and_end_in_mid_sentence(n_words, text_file):
    found = load_neutral_texts(text_file(n_words=n_words), 200)
    for item in found:
        assert item.document == item.text.split()[1], "each paragraph of a .txt file is a document"
        assert paragraph(int(item.document), n_words).startswith(f"{item.text} ")
    lengths = {len(item.text.split()) for item in found}
    assert min(lengths) >= 12
    assert max(lengths) <= 48
    assert len(lengths) > min(25, n_words - 14)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("key", ["document", "id", "title"])
def test_paragraphs_keep_the_document_they_come_from(kind, key, tmp_path):
    path = tmp_path / f"neutral.{kind}"
    both = [f"{paragraph(2 * page)}\n{paragraph(2 * page + 1)}" for page in range(20)]
    rows = [{key: f"page {page}", "text": text} for page, text in enumerate(both)]
    WRITERS[kind](path, rows)
    found = load_neutral_texts(str(path), 40)
    assert {item.document for item in found} == {f"page {page}" for page in range(20)}
    assert all(item.document == f"page {int(item.text.split()[1]) // 2}" for item in found)
    WRITERS[kind](path, [{"text": paragraph(number)} for number in range(3)])
    assert list(read_documents(str(path))) == [(str(i + 1), paragraph(i)) for i in range(3)], "else numbered"


LONG_ROW = json.dumps({"text": paragraph(0)}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LONG_ROW + b"{half", "line 2 is not JSON"),
        ("a.jsonl", LONG_ROW + b"[" * 100_000, "line 2"),
        ("a.jsonl", LONG_ROW + b"9" * 5_000, "2"),
        ("a.jsonl", LONG_ROW + b'{"text": 3}', "row 2 has no string field 'text'"),
        ("a.jsonl", LONG_ROW + b"null", "row 2 has no string field 'text'"),
        ("a.jsonl", b"\n\n", "gives 0 passages"),
        ("a.txt", b"", "gives 0 passages"),
        ("a.txt", "\ufeffText".encode("utf-16"), "UTF-16; save it as UTF-8"),
        ("a.txt", "\ufeffété".encode("utf-16-le"), "save it as UTF-8"),
        ("a.txt", "été".encode("latin-1"), "save it as UTF-8"),
        ("a.txt", "Text without a mark.".encode("utf-16-le"), "holds a NUL at byte 2"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.csv", b"x", "is unknown; choose 'wikitext-103'"),
        ("a.txt", None, "does not exist"),
    ],
    ids=str,
)
def test_an_unusable_file_is_rejected_in_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_neutral_texts(str(path), 1)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_parquet_without_text_and_paths_of_no_file_are_rejected(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"body": "x"}])
    (tmp_path / "folder.txt").mkdir()
    paths = "a\0.txt", "~nobody-of-that-name/a.txt", "a" * 100_000
    for name, message in (
        (tmp_path / "a.parquet", "no string field 'text'"),
        (tmp_path / "folder.txt", "is no file"),
        *((path, "neutral_text|cannot be used") for path in paths),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_neutral_texts(str(name), 1)
        assert len(str(caught.value)) < 400


def test_home_and_capital_endings_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.TXT").write_text(paragraph(0), encoding="utf-8")
    assert len(load_neutral_texts("~/text.TXT", 1)) == 1


def test_long_paragraphs_give_further_passages_from_the_next_sentence_on(tmp_path):
    """Ten sentences of ten words, no two alike; what follows a passage's last sentence is used again."""
    names = string.ascii_lowercase[:10]
    paragraphs = []
    for start in ("sun", "moon", "mars"):
        words = [[f"{start}{s}{w}um" for w in names] for s in names]
        paragraphs.append(" ".join(f"{' '.join(sentence).capitalize()}." for sentence in words))
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(paragraphs))
    first = load_neutral_texts(str(path), 3)
    found = load_neutral_texts(str(path), 6)
    assert found[:3] == first
    assert all(item.text.split()[0].endswith("aaum") for item in first)
    for later in found[3:]:
        assert later.text[0].isupper()
        (earlier,) = (item for item in first if item.document == later.document)
        assert not set(later.text.split()) & set(earlier.text.split())


def test_equal_passages_count_once(tmp_path):
    path = tmp_path / "twice.jsonl"
    write_jsonl(path, [{"text": paragraph(0, MIN_WORDS)}] * 50)
    found = load_neutral_texts(str(path), 2)
    assert len({item.text for item in found}) == 2
    with pytest.raises(InputError, match="gives 13 passages"):
        load_neutral_texts(str(path), 45)


def test_overlapping_text_is_rejected_counted_and_logged(text_file, caplog):
    source = text_file(50)
    forbidden = [" ".join(paragraph(number).split()[1:10]).upper() for number in range(5)]
    found = load_neutral_texts(source, 45, forbidden)
    assert sorted(int(item.document) for item in found) == list(range(5, 50))
    assert "rejected 5 neutral texts" in caplog.text
    with pytest.raises(InputError, match=r"45 passages .* 5 rejected"):
        load_neutral_texts(source, 46, forbidden)


@pytest.mark.parametrize(
    ("known", "text", "found"),
    [
        ("one two three four five six seven eight nine", "x two three four five six seven eight nine", True),
        ("one two three four five six seven eight nine", "x three four five six seven eight nine", False),
        ("One two, three FOUR five: six seven eight", 'a "one" two three four five six seven eight b', True),
        ("In my humble opinion", "this is, in my humble opinion, wrong", True),
        ("In my humble opinion", "in my opinion", False),
        ("In my opinion", "in my opinion", False),
        ("", "anything", False),
        ("Grüße an die Straße", "GRÜSSE AN DIE STRASSE", True),
    ],
)
def test_overlap_is_a_run_of_eight_words_or_a_whole_shorter_text(known, text, found):
    assert OverlapCheck([known]).found_in(text) is found


@pytest.mark.parametrize(
    "line",
    [
        "Too short to be a paragraph of prose.",
        paragraph(1)[0].lower() + paragraph(1)[1:],
        paragraph(1)[:-1],
        paragraph(1).upper(),
        "* " + paragraph(1),
        paragraph(1).replace("Number 1 ", "Number 1 ( "),
        paragraph(1).replace("Number 1 ", "Number 1 , "),
        " ".join(["12 345 | 67"] * 20) + ".",
    ],
)
def test_lines_that_are_no_prose_are_left_out(line):
    assert list(usable_paragraphs(f"{paragraph(0)}\n{line}\n{paragraph(2)}")) == [paragraph(0), paragraph(2)]


@pytest.mark.parametrize(
    ("wikicode", "prose"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("[[water|moving water]] in a [[lake]]", "moving water in a lake"),
        ("a book<ref name=x>Smith, {{cite}}</ref> on<ref name=x/> fish", "a book on fish"),
        ("a {{convert|5|km}} walk", "a 5 km walk"),
        ("a word ({{lang|fr|mot}})", "a word (mot)"),
        ("a town ({{IPA|x}}) here", "a town here"),
        ("{{Infobox\n| a = b\n}}text", "text"),
        ("[[File:a.png|thumb|caption]]text", "text"),
        ("text<!-- hidden --> here", "text here"),
        ("== Heading ==\ntext\n* item\n# number\n{|\n| cell\n|}\n", "text"),
        ("see [http://example.com the site] here", "see the site here"),
    ],
)
def test_markup_is_removed(wikicode, prose):
    assert " ".join(plain_prose(wikicode).split()) == prose


@pytest.mark.real_models
def test_the_wikipedia_sample_has_thousands_of_clean_passages_that_end_like_running_text():
    documents = list(read_documents("wikipedia-sample"))
    paragraphs = [text for _, whole in documents for text in usable_paragraphs(whole)]
    assert len({document for document, _ in documents}) > 90
    assert len(paragraphs) > 3000
    assert [text for text in paragraphs if re.search(r"\{\{|\}\}|\[\[|\]\]|<ref|\||''|&\w+;", text)] == []
    found = load_neutral_texts("wikipedia-sample", 1500)
    assert len({item.text for item in found}) == 1500
    ends = sum(bool(re.search(r"[.!?][\"'”)]*$", item.text)) for item in found)
    assert ends / len(found) < 0.1
    assert len({item.document for item in found}) > 80
