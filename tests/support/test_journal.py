"""Rows that were appended survive a kill, damage is noticed, and results of other inputs stay apart."""

import errno
import itertools
import json
import logging
import os
import random
import resource
import signal
import stat
import time
import zlib
from contextlib import contextmanager

import pytest

from support.artifacts import fingerprint
from support.errors import InputError
from support.journal import Journal

OURS, OTHER = fingerprint("ours"), fingerprint("other")
NAN, INF = float("nan"), float("inf")
ROWS = [{"key": f"row {number}", "text": f"naïve “{number}”\n", "score": number / 8} for number in range(5)]


def named(rows):
    return {row["key"]: row for row in rows}


def write(path, rows, cache_key=OURS):
    with Journal(path, cache_key) as journal:
        journal.append(rows)


def read(path, cache_key=OURS):
    with Journal(path, cache_key) as journal:
        return journal.rows


def visible(folder):
    return sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))


def aside(cache_key, number=""):
    return f"grid.{cache_key[:12]}{number}.jsonl"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "grid.jsonl"


@contextmanager
def forked(body):
    """Run `body(report)` in a child until it is killed; yields its process id and the reading end."""
    reading, report = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            body(report)
        finally:
            os._exit(1)
    os.close(report)
    with os.fdopen(reading) as reports:
        try:
            yield child, reports
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_rows_come_back_in_order(path):
    write(path, ROWS[:2])
    with Journal(path, OURS) as journal:
        assert journal.rows == named(ROWS[:2])
        journal.append(ROWS[2:])
        assert journal.rows == named(ROWS)
    assert list(read(path).items()) == list(named(ROWS).items())
    assert visible(path.parent) == ["grid.jsonl"]


def test_the_folder_is_made_and_a_text_path_is_taken(tmp_path):
    write(str(tmp_path / "a" / "b" / "grid.jsonl"), ROWS)
    assert read(tmp_path / "a" / "b" / "grid.jsonl") == named(ROWS)


def test_every_line_is_ascii_json_with_the_checksum_stated(path):
    write(path, ROWS)
    header, *lines = [json.loads(line) for line in path.read_bytes().decode("ascii").splitlines()]
    assert header == {"journal": 1, "cache_key": OURS}
    assert [line["row"] for line in lines] == ROWS
    for line in lines:
        assert line == {
            "row": line["row"],
            "crc": zlib.crc32(json.dumps(line["row"], sort_keys=True).encode()),
        }


def test_the_latest_row_of_a_key_wins(path):
    with Journal(path, OURS) as journal:
        journal.append([{"key": "a", "value": 1}, {"key": "b"}, {"key": "a", "value": 2}])
        assert journal.rows["a"]["value"] == 2
        journal.append([{"key": "a", "value": 3}])
        rows = journal.rows
        assert rows["a"]["value"] == 3
    assert read(path) == rows


@pytest.mark.parametrize(
    "text",
    [
        "",
        "naïve café 🙂",
        "line\nline\r\nline\r",
        "\u2028 \u2029 \x85 \x0b \x0c \x1c \ufeff",
        "\x00\x1b\x7f",
        '"row": {"key": "\\',
        "\ud800",
        "before \udfff after",
        "\udc80\ud83d",
    ],
)
def test_any_text_survives_the_round_trip(path, text):
    row = {"key": f"key {text}", "text": text, text: [text]}
    write(path, [row, ROWS[0]])
    assert read(path) == named([row, ROWS[0]])
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_non_finite_number_becomes_null_and_the_row_given_is_not_modified(path, value):
    row = {"key": "a", "score": value, "nested": [{"b": (value, 1.5)}]}
    with Journal(path, OURS) as journal:
        journal.append([row])
        rows = journal.rows
    assert rows == {"a": {"key": "a", "score": None, "nested": [{"b": [None, 1.5]}]}}
    assert row == {"key": "a", "score": value, "nested": [{"b": (value, 1.5)}]}
    assert read(path) == rows


def test_rows_are_at_once_what_they_read_back_as(path):
    row = {"key": "a", "pair": (1, 2), "counts": {10: 1, 9: -0.0}, "tiny": 5e-324, "big": 2**70}
    with Journal(path, OURS) as journal:
        journal.append([row])
        row["pair"] = "changed later"
        rows = journal.rows
    assert rows["a"]["pair"] == [1, 2]
    assert repr(read(path)) == repr(rows)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({}, ValueError),
        ({"key": None}, ValueError),
        ({"key": 3}, ValueError),
        ({"key": "a", "value": object()}, TypeError),
        ({"key": "a", "value": {1, 2}}, TypeError),
    ],
)
def test_a_row_that_cannot_be_kept_is_refused_with_those_beside_it(path, bad, error):
    with Journal(path, OURS) as journal:
        journal.append(ROWS[:1])
        before = path.read_bytes()
        with pytest.raises(error):
            journal.append([ROWS[1], bad])
        assert journal.rows == named(ROWS[:1])
        assert path.read_bytes() == before


def test_many_rows_are_one_write_and_one_fsync_and_rewrite_nothing(path, monkeypatch):
    fsync, synced = os.fsync, []
    with Journal(path, OURS) as journal:
        journal.append(ROWS[:1])
        before, inode = path.read_bytes(), path.stat().st_ino
        file = journal._file = CountedFile(journal._file)
        monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(path.read_bytes()), fsync(handle)))
        journal.append(ROWS[1:])
        journal.append([])
    assert file.n_writes == 1
    assert synced == [path.read_bytes()]
    assert synced[0].startswith(before)
    assert path.stat().st_ino == inode


class CountedFile:
    def __init__(self, file):
        self.file = file
        self.n_writes = 0

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.n_writes += 1
        return self.file.write(data)


@pytest.mark.parametrize("earlier", [None, OURS, OTHER])
def test_the_name_of_a_new_journal_is_durable_before_a_row_is(path, monkeypatch, earlier):
    if earlier:
        write(path, ROWS, earlier)
    fsync, synced = os.fsync, []

    def watched(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            synced.append(path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with Journal(path, OURS, fresh=True):
        assert synced == [path.read_bytes()]


# -- Kills


def numbered_row(key, n_characters):
    return {"key": key, "text": (f"{key} é\n" * n_characters)[:n_characters]}


class SlowFile(CountedFile):
    """Takes 10 bytes at a time, so that most kills come in the middle of a line."""

    def write(self, data):
        return self.file.write(data[:10])


@pytest.mark.parametrize(("n_characters", "slow"), [(1, False), (200_000, False), (20_000, True)])
def test_rows_whose_append_returned_survive_kills_at_random_instants(path, n_characters, slow, caplog):
    caplog.set_level(logging.INFO)
    random_ = random.Random(n_characters)
    reported, n_kills = set(), 25

    def append_until_killed(report, turn):
        with Journal(path, OURS) as journal:
            if slow:
                journal._file = SlowFile(journal._file)
            for number in itertools.count():
                keys = [f"{turn}-{number}-{part}" for part in range(1 + number % 3)]
                journal.append([numbered_row(key, n_characters) for key in keys])
                os.write(report, f"{' '.join(keys)}\n".encode())

    for turn in range(n_kills):
        with forked(lambda report, turn=turn: append_until_killed(report, turn)) as (child, reports):
            # Every other kill comes while rows are written, the others perhaps while the file is opened.
            first = reports.readline() if turn % 2 else ""
            time.sleep(random_.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            reported.update((first + reports.read()).split())
        with Journal(path, OURS) as journal:
            rows, n_damaged = journal.rows, journal.n_damaged
        assert n_damaged == 0
        assert reported <= set(rows)
        assert all(row == numbered_row(key, n_characters) for key, row in rows.items())
        assert path.read_bytes().endswith(b"\n")
        # What was appended but not reported in time is at most one call's rows for each kill.
        assert len(set(rows) - reported) <= 3 * (turn + 1)
    assert len(reported) >= n_kills // 2
    assert not slow or "cut short" in caplog.text


def test_a_file_cut_at_any_byte_of_its_last_two_lines_keeps_the_rest_and_takes_rows(path):
    write(path, [{"key": name, "text": f"é{name}"} for name in "abcd"])
    whole = path.read_bytes()
    ends = list(itertools.accumulate(len(line) for line in whole.splitlines(keepends=True)))
    for size in range(ends[2], len(whole) + 1):
        path.write_bytes(whole[:size])
        n_whole = sum(end <= size for end in ends[1:])
        with Journal(path, OURS) as journal:
            assert list(journal.rows) == list("abcd"[:n_whole])
            assert journal.n_damaged == 0
            assert path.read_bytes() == whole[: ends[n_whole]]
            journal.append([{"key": "new"}])
        assert list(read(path)) == [*"abcd"[:n_whole], "new"]


def test_a_file_cut_at_any_byte_of_its_first_row_or_header_is_started_again(path):
    write(path, ROWS[:1])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        write(path, ROWS[1:2])
        assert read(path) == named(ROWS[1:2])
        assert visible(path.parent) == ["grid.jsonl"]


# -- Damage


@pytest.mark.parametrize("flip", [1, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_is_noticed_or_changes_no_row(path, flip):
    write(path, ROWS[:4])
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(lines[0] + lines[1])
    n_noticed = 0
    for position in range(start, start + len(lines[2]) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with Journal(path, OURS) as journal:
            if journal.n_damaged:
                n_noticed += 1
                assert journal.rows == named([ROWS[0], *ROWS[2:4]])
            else:
                assert journal.rows == named(ROWS[:4])
        assert path.read_bytes() == damaged
    # Only a hexadecimal digit of an escaped character can change its case and mean the same.
    assert n_noticed >= len(lines[2]) - 1 - (10 if flip == 0x20 else 0)


def line_of(row):
    crc = zlib.crc32(json.dumps(row, sort_keys=True).encode())
    return json.dumps({"row": row, "crc": crc}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"plain text",
        b"\xff\xfe",
        b"\x00" * 20,
        b"[1, 2]",
        b'{"row": {"key": "row 1", "text": "other"}, "crc": 1}',
        b'{"row": {"key": "row 1"}}',
        line_of({"key": 1}),
        line_of({"text": "no key"}),
        line_of(["key"]),
        line_of({"key": "row 1", "score": NAN}),
        b'{"crc": 1}',
    ],
)
def test_a_damaged_line_is_left_out_counted_and_logged(path, caplog, damage):
    write(path, ROWS[:3])
    header, first, _, third = path.read_bytes().splitlines(keepends=True)
    content = header + first + damage + b"\n" + third
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING), Journal(path, OURS) as journal:
        assert journal.n_damaged == 1
        assert journal.rows == named([ROWS[0], ROWS[2]])
        assert "damaged lines left out: 1" in caplog.text
        journal.append(ROWS[1:2])
        assert path.read_bytes().startswith(content)
    assert read(path) == named(ROWS[:3])


def test_a_lost_newline_costs_the_two_rows_beside_it(path):
    write(path, ROWS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"\n", b" ")
    path.write_bytes(b"".join(lines))
    with Journal(path, OURS) as journal:
        assert journal.n_damaged == 1
        assert journal.rows == named([ROWS[0], *ROWS[3:]])


@pytest.mark.parametrize(
    "header",
    [
        b"plain text",
        b"\xff\xfe",
        b'{"journal": 2, "cache_key": "%s"}' % OURS.encode(),
        b'{"journal": 1, "cache_key": null}',
        b'{"journal": 1, "cache_key"',
        b"[]",
    ],
)
def test_a_damaged_header_keeps_the_file_aside_only_if_something_follows(path, header, caplog):
    path.write_bytes(header + b"\n")
    assert read(path) == {}
    assert visible(path.parent) == ["grid.jsonl"]
    for name in ("grid.unreadable.jsonl", "grid.unreadable.2.jsonl"):
        write(path, ROWS)
        damaged = header + b"\n" + path.read_bytes().split(b"\n", maxsplit=1)[1]
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert read(path) == {}
        assert (path.parent / name).read_bytes() == damaged
        assert name in caplog.text


# -- Other inputs


def test_a_journal_of_other_inputs_is_kept_aside_and_brought_back(path, caplog):
    caplog.set_level(logging.INFO)
    write(path, ROWS[:3], OTHER)
    content = path.read_bytes()
    assert read(path) == {}
    assert (path.parent / aside(OTHER)).read_bytes() == content
    assert aside(OTHER) in caplog.text
    write(path, ROWS[3:])
    with Journal(path, OTHER) as journal:
        assert journal.rows == named(ROWS[:3])
        assert path.read_bytes() == content
        journal.append(ROWS[3:4])
    assert visible(path.parent) == sorted([aside(OURS), "grid.jsonl"])
    assert read(path) == named(ROWS[3:])
    assert read(path, OTHER) == named(ROWS[:4])


def test_a_torn_journal_that_comes_back_takes_rows(path):
    write(path, ROWS[:2], OTHER)
    with open(path, "ab") as file:
        file.write(b'{"row": {"key"')
    read(path)
    write(path, ROWS[2:], OTHER)
    assert read(path, OTHER) == named(ROWS)


@pytest.mark.parametrize("content", [b"something else", b""])
def test_a_name_that_is_taken_is_not_overwritten(path, content):
    for name in (aside(OTHER), aside(OTHER, ".2")):
        (path.parent / name).write_bytes(content)
    write(path, ROWS, OTHER)
    assert read(path) == {}
    for name in (aside(OTHER), aside(OTHER, ".2")):
        assert (path.parent / name).read_bytes() == content
    assert (path.parent / aside(OTHER, ".3")).exists()
    assert read(path, OTHER) == named(ROWS)
    assert not (path.parent / aside(OTHER, ".3")).exists()


def test_the_largest_of_several_comes_back_and_the_others_stay(path):
    write(path, ROWS[:1], OTHER)
    small = path.read_bytes()
    write(path.parent / aside(OTHER), ROWS[:3], OTHER)
    assert read(path) == {}
    assert (path.parent / aside(OTHER, ".2")).read_bytes() == small
    assert read(path, OTHER) == named(ROWS[:3])
    assert (path.parent / aside(OTHER, ".2")).read_bytes() == small


def test_equal_first_digits_are_not_the_same_inputs(path):
    similar = OURS[:12] + OTHER[12:]
    write(path, ROWS[:2], similar)
    assert read(path) == {}
    write(path, ROWS[2:])
    assert read(path, similar) == named(ROWS[:2])
    assert read(path) == named(ROWS[2:])


def test_a_file_kept_aside_is_known_by_its_header_and_not_by_its_name(path):
    (path.parent / aside(OURS)).mkdir()
    (path.parent / aside(OURS, ".2")).write_bytes(b"{}\n")
    write(path.parent / aside(OURS, ".3"), ROWS, OTHER)
    assert read(path) == {}


def test_a_header_with_any_text_can_be_kept_aside(path):
    for cache_key in ("../../x", "a/b", "nul\x00", ""):
        write(path, ROWS, cache_key)
        assert read(path) == {}
        assert read(path, cache_key) == named(ROWS)


@pytest.mark.parametrize("at_path", [OURS, OTHER, None])
def test_fresh_deletes_what_these_inputs_made_and_nothing_else(path, at_path):
    write(path, ROWS[:2], OURS)
    if at_path is not OURS:
        write(path, ROWS[2:], OTHER)
    if at_path is None:
        path.unlink()
    with Journal(path, OURS, fresh=True) as journal:
        assert journal.rows == {}
        journal.append(ROWS[4:])
    assert visible(path.parent) == sorted(["grid.jsonl", *([aside(OTHER)] if at_path is OTHER else [])])
    assert read(path) == named(ROWS[4:])
    assert read(path, OTHER) == (named(ROWS[2:]) if at_path is OTHER else {})


# -- One writer


def test_a_second_writer_is_refused_until_the_first_closes(path):
    first = Journal(path, OURS)
    first.append(ROWS[:1])
    for cache_key, fresh in ((OURS, False), (OTHER, False), (OURS, True)):
        with pytest.raises(InputError, match=r"another run is writing.*stop it.*--output-dir"):
            Journal(path, cache_key, fresh=fresh)
    first.append(ROWS[1:])
    first.close()
    first.close()
    assert read(path) == named(ROWS)
    with pytest.raises(ValueError, match="closed"):
        first.append(ROWS)


def test_a_second_writer_is_accepted_when_the_first_is_killed(path):
    def hold(report):
        journal = Journal(path, OURS)
        journal.append(ROWS[:2])
        os.write(report, b"held\n")
        time.sleep(60)

    with forked(hold) as (_, reports):
        assert reports.readline() == "held\n"
        with pytest.raises(InputError, match="another run is writing"):
            Journal(path, OURS)
    write(path, ROWS[2:])
    assert read(path) == named(ROWS)


def test_journals_of_one_folder_do_not_hinder_each_other(path):
    with Journal(path, OURS) as one, Journal(path.with_name("texts.jsonl"), OURS) as two:
        one.append(ROWS[:1])
        two.append(ROWS[1:])
    assert read(path) == named(ROWS[:1])


def test_a_journal_that_cannot_be_opened_is_not_locked(path):
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        Journal(path, OURS)
    path.rmdir()
    write(path, ROWS)


# -- Writing errors


@contextmanager
def room_for(path, n_bytes):
    """Let files grow to `n_bytes` more than `path` has; the system cuts a longer write short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [0, 1, 30, 200])
def test_a_full_disk_leaves_no_part_of_a_line(path, n_bytes):
    with Journal(path, OURS) as journal:
        journal.append(ROWS[:2])
        before = path.read_bytes()
        with room_for(path, n_bytes), pytest.raises(OSError, match="too large"):
            journal.append(ROWS[2:])
        assert path.read_bytes() == before
        assert journal.rows == named(ROWS[:2])
        journal.append(ROWS[3:])
        assert path.read_bytes().startswith(before)
    assert read(path) == named([*ROWS[:2], *ROWS[3:]])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_rows_that_were_not_made_durable_are_taken_back(path, monkeypatch, error):
    def fail(handle):
        raise error

    with Journal(path, OURS) as journal:
        journal.append(ROWS[:2])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(type(error)):
                journal.append(ROWS[2:4])
        assert path.read_bytes() == before
        journal.append(ROWS[4:])
        assert journal.rows == named([*ROWS[:2], ROWS[4]])
    assert read(path) == named([*ROWS[:2], ROWS[4]])


class BrokenDisk(CountedFile):
    """Takes 20 bytes of a write, then refuses everything, the cut of those bytes too."""

    def write(self, data):
        if self.n_writes:
            raise OSError(errno.ENOSPC, "no space left")
        return super().write(data[:20])

    def truncate(self, size):
        if self.n_writes:
            raise OSError(errno.EIO, "input/output error")
        return self.file.truncate(size)


@pytest.mark.parametrize("reopen", [True, False])
def test_bytes_that_could_not_be_cut_off_are_cut_later(path, reopen):
    journal = Journal(path, OURS)
    journal.append(ROWS[:2])
    n_bytes, file = path.stat().st_size, journal._file
    journal._file = BrokenDisk(file)
    with pytest.raises(OSError, match="error"):
        journal.append(ROWS[2:])
    assert path.stat().st_size == n_bytes + 20
    journal._file = file
    if reopen:
        journal.close()
        journal = Journal(path, OURS)
    journal.append(ROWS[3:])
    journal.close()
    with Journal(path, OURS) as journal:
        assert journal.n_damaged == 0
        assert journal.rows == named([*ROWS[:2], *ROWS[3:]])
