"""Rows that were appended survive a kill and a full disk; damage is noticed; one process writes at a time."""

import errno
import itertools
import json
import os
import random
import resource
import signal
import stat
import time
import zlib
from contextlib import contextmanager

import pytest

from support.journal import Journal, rows_of

NAN, INF = float("nan"), float("inf")
ROWS = [{"key": f"row {number}", "text": f"naïve “{number}”\n", "score": number / 8} for number in range(5)]


def named(rows):
    return {row["key"]: row for row in rows}


def write(path, rows):
    with Journal(path) as journal:
        journal.append(rows)


def read(path):
    """The rows, which must be the same whether or not the journal is opened."""
    rows = rows_of(path)
    with Journal(path) as journal:
        assert list(journal.rows.items()) == list(rows.items())
    return rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "grid.jsonl"


def test_rows_come_back_in_order_and_the_latest_of_a_key_wins(tmp_path):
    path = tmp_path / "a" / "b" / "grid.jsonl"
    assert rows_of(path) == {}
    write(str(path), ROWS[:2])
    with Journal(path) as journal:
        assert journal.rows == named(ROWS[:2])
        journal.append([*ROWS[2:], {"key": "row 0", "value": 1}, {"key": "row 0", "value": 2}])
        rows = journal.rows
        assert rows == {**named(ROWS), "row 0": {"key": "row 0", "value": 2}}
    assert list(read(path).items()) == list(rows.items())
    assert list(path.parent.iterdir()) == [path]


def line_of(row):
    crc = zlib.crc32(json.dumps(row, sort_keys=True).encode())
    return json.dumps({"row": row, "crc": crc}).encode()


def test_every_line_is_ascii_json_with_its_checksum(path):
    write(path, ROWS)
    assert path.read_bytes().splitlines() == list(map(line_of, ROWS))


@pytest.mark.parametrize(
    "text",
    [
        "naïve café 🙂",
        "line\nline\r\nline\r \u2028 \u2029 \x85 \x0b \x0c \x1c \ufeff",
        '\x00\x1b\x7f"row": {"key": "\\',
        "before \udfff after \ud800",
    ],
)
def test_any_text_survives_the_round_trip(path, text):
    row = {"key": f"key {text}", "text": text, text: [text]}
    write(path, [row, ROWS[0]])
    assert read(path) == named([row, ROWS[0]])
    assert path.read_bytes().count(b"\n") == 2


def test_rows_are_at_once_what_they_read_back_as_and_the_row_given_is_not_modified(path):
    row = {"key": "a", "score": NAN, "nested": [{"b": (-INF, 1.5)}], "counts": {10: -0.0}, "big": 2**70}
    with Journal(path) as journal:
        journal.append([row])
        row["nested"].append("changed later")
        rows = journal.rows
    assert row["score"] is NAN
    nested = [{"b": [None, 1.5]}]
    assert rows == {"a": {"key": "a", "score": None, "nested": nested, "counts": {"10": -0.0}, "big": 2**70}}
    assert repr(read(path)) == repr(rows)


@pytest.mark.parametrize(
    ("bad", "error"), [({}, ValueError), ({"key": 3}, ValueError), ({"key": "a", "x": object()}, TypeError)]
)
def test_a_row_that_cannot_be_kept_is_rejected_with_those_beside_it(path, bad, error):
    with Journal(path) as journal:
        journal.append(ROWS[:1])
        before = path.read_bytes()
        with pytest.raises(error):
            journal.append([ROWS[1], bad])
        assert journal.rows == named(ROWS[:1])
        assert path.read_bytes() == before


def test_rows_are_on_the_disk_when_append_returns_and_nothing_is_rewritten(path, monkeypatch):
    fsync, synced = os.fsync, []
    with Journal(path) as journal:
        journal.append(ROWS[:1])
        before, inode = path.read_bytes(), path.stat().st_ino
        monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(path.read_bytes()), fsync(handle)))
        journal.append(ROWS[1:])
        journal.append([])
    assert synced == [path.read_bytes()]
    assert synced[0].startswith(before)
    assert path.stat().st_ino == inode


def test_fresh_starts_an_empty_journal_whose_name_is_durable_before_a_row_is(path, monkeypatch):
    write(path, ROWS)
    fsync, synced = os.fsync, []

    def watched(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            synced.append(path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    with Journal(path, fresh=True) as journal:
        assert synced == [b""]
        journal.append(ROWS[4:])
    assert read(path) == named(ROWS[4:])


def test_a_journal_of_an_earlier_version_is_started_anew(path):
    write(path, ROWS)
    path.write_bytes(b'{"journal": 1, "cache_key": "f"}\n' + path.read_bytes())
    assert rows_of(path) == {}
    with Journal(path) as journal:
        assert (journal.rows, journal.n_damaged) == ({}, 0)
        journal.append(ROWS[:1])
    assert read(path) == named(ROWS[:1])
    assert list(path.parent.iterdir()) == [path]


# Kills


def numbered_row(key, n_characters):
    return {"key": key, "text": (f"{key} é\n" * n_characters)[:n_characters]}


def append_until_killed(path, report, turn, n_characters):
    try:
        with Journal(path) as journal:
            for number in itertools.count():
                keys = [f"{turn}-{number}-{part}" for part in range(1 + number % 3)]
                journal.append([numbered_row(key, n_characters) for key in keys])
                os.write(report, f"{' '.join(keys)}\n".encode())
    finally:
        os._exit(1)


@pytest.mark.parametrize("n_characters", [1, 100_000])
def test_rows_whose_append_returned_survive_kills_at_random_instants(path, n_characters):
    """The next writer is accepted at once, and finds whole rows alone."""
    random_ = random.Random(n_characters)
    reported, n_kills = set(), 20
    for turn in range(n_kills):
        reading, report = os.pipe()
        child = os.fork()
        if child == 0:
            append_until_killed(path, report, turn, n_characters)
        os.close(report)
        with os.fdopen(reading) as reports:
            # Every other kill comes while rows are written, the others perhaps while the file is opened.
            first = reports.readline() if turn % 2 else ""
            time.sleep(random_.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            reported.update((first + reports.read()).split())
        with Journal(path) as journal:
            rows, n_damaged = journal.rows, journal.n_damaged
        assert n_damaged == 0
        assert reported <= set(rows)
        assert all(row == numbered_row(key, n_characters) for key, row in rows.items())
        # At most the rows of one call are appended and not reported in time, for each kill.
        assert len(set(rows) - reported) <= 3 * (turn + 1)
    assert len(reported) >= n_kills // 2


def test_a_file_cut_at_any_byte_keeps_its_whole_lines_and_takes_rows(path):
    write(path, [{"key": name, "text": f"é{name}"} for name in "abc"])
    whole = path.read_bytes()
    ends = [0, *itertools.accumulate(len(line) for line in whole.splitlines(keepends=True))]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        n_whole = sum(end <= size for end in ends[1:])
        with Journal(path) as journal:
            assert list(journal.rows) == list("abc"[:n_whole])
            assert journal.n_damaged == 0
            assert path.read_bytes() == whole[: ends[n_whole]]
            journal.append([{"key": "new"}])
        assert list(read(path)) == [*"abc"[:n_whole], "new"]


# Damage


@pytest.mark.parametrize("flip", [1, 0x20, 0x80])
def test_a_flipped_byte_is_noticed_or_changes_no_row(path, flip):
    write(path, ROWS[:3])
    whole = path.read_bytes()
    first, second, _ = whole.splitlines(keepends=True)
    n_noticed = 0
    for position in range(len(first), len(first + second) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with Journal(path) as journal:
            n_noticed += journal.n_damaged
            assert journal.rows == named(ROWS[:3] if not journal.n_damaged else [ROWS[0], ROWS[2]])
        assert path.read_bytes() == damaged
    # Only a hexadecimal digit of an escaped character can change its case and mean the same.
    assert n_noticed >= len(second) - 1 - (10 if flip == 0x20 else 0)


@pytest.mark.parametrize(
    "damage",
    [
        *(b"", b"plain text", b"\xff\xfe", b"[1, 2]", b'{"crc": 1}'),
        b'{"row": {"key": "row 1", "text": "other"}, "crc": 1}',
        line_of({"text": "no key"}),
        line_of(["key"]),
        line_of({"key": "row 1", "score": NAN}),
        line_of(ROWS[1]) + b" " + line_of(ROWS[1]),  # a lost newline
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_damaged_line_is_left_out_and_counted(path, damage, place):
    write(path, ROWS[:3])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    with Journal(path) as journal:
        assert journal.n_damaged == 1
        assert journal.rows == named([ROWS[1 - place], ROWS[2]])
        journal.append(ROWS[place : place + 1])
        assert path.read_bytes().startswith(b"".join(lines))
    assert read(path) == named(ROWS[:3])


# Writing errors


@contextmanager
def room_for(path, n_bytes):
    """Let files grow to `n_bytes` more than `path` has; the system cuts a longer write short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("n_bytes", [0, 1, 200])
def test_a_full_disk_leaves_no_part_of_a_line(path, n_bytes):
    with Journal(path) as journal:
        journal.append(ROWS[:2])
        before = path.read_bytes()
        with room_for(path, n_bytes), pytest.raises(OSError, match="too large"):
            journal.append(ROWS[2:])
        assert path.read_bytes() == before
        assert journal.rows == named(ROWS[:2])
        with open(path, "ab") as file:
            file.write(b'{"row": ')  # bytes that could not be cut off are cut later
        journal.append(ROWS[3:])
        assert path.read_bytes().startswith(before)
    assert read(path) == named([*ROWS[:2], *ROWS[3:]])


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
def test_rows_that_were_not_made_durable_are_taken_back(path, monkeypatch, error):
    def fail(handle):
        raise error

    with Journal(path) as journal:
        journal.append(ROWS[:2])
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(type(error)):
                journal.append(ROWS[2:4])
        assert path.read_bytes() == before
        journal.append(ROWS[4:])
    assert read(path) == named([*ROWS[:2], ROWS[4]])
