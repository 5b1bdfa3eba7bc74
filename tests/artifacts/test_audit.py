import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
from datetime import datetime, timezone

import pytest

from scaleot_ray.artifacts import AuditLog
from scaleot_ray.artifacts.audit import MODEL_OWNER, data_owner, evaluator, tenant_of
from scaleot_ray.artifacts.untrusted import PROBLEM_LIMIT
from scaleot_ray.errors import ResourcesMissing


def test_a_line_says_who_sent_what_to_whom(tmp_path):
    log = AuditLog(tmp_path / "logs" / "audit.jsonl")
    assert log.read() == []
    log.record("owner", "alice", "emulator", 123, "ab" * 32)
    log.record("alice", "owner", "delta", 7, "cd" * 32, decision="refused", reason="tensor 'x'\nis missing")
    first, second = log.read()
    names = {"time", "sender", "recipient", "kind", "bytes", "digest", "decision", "reason", "previous"}
    assert first.keys() == second.keys() == names
    assert abs(datetime.fromisoformat(first["time"].replace("Z", "+00:00")) - datetime.now(timezone.utc)).seconds < 60
    assert (first["sender"], first["recipient"], first["kind"], first["bytes"]) == ("owner", "alice", "emulator", 123)
    assert (first["decision"], first["reason"]) == ("sent", None)
    assert (second["decision"], second["reason"]) == ("refused", "tensor 'x'\nis missing")
    assert len(log.path.read_bytes().splitlines()) == 2


def test_a_new_log_on_the_same_file_appends(tmp_path):
    path = tmp_path / "audit.jsonl"
    for number in range(3):
        AuditLog(path).record("a", "b", "metrics", number, "0")
    assert [entry["bytes"] for entry in AuditLog(path).read()] == [0, 1, 2]


def _append(path, sender, count):
    log = AuditLog(path)
    for number in range(count):
        log.record(sender, "owner" * 200, "delta", number, "0" * 64)


def test_processes_that_append_at_once_keep_every_line_whole(tmp_path):
    path, context = tmp_path / "audit.jsonl", multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(path, f"tenant {index}", 50)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    log = AuditLog(path)
    entries = log.read()
    assert log.damaged == log.broken == []
    for index in range(4):
        assert [entry["bytes"] for entry in entries if entry["sender"] == f"tenant {index}"] == list(range(50))


@pytest.mark.parametrize("cut", [1, 2, 30, 100])
def test_truncated_last_line_is_left_out_and_reported(tmp_path, caplog, cut):
    log = AuditLog(tmp_path / "audit.jsonl")
    log.record("a", "b", "delta", 1, "0")
    log.record("a", "b", "delta", 2, "0")
    os.truncate(log.path, log.path.stat().st_size - cut)
    entries = log.read()
    whole = cut == 1  # only the line's end is gone
    assert [entry["bytes"] for entry in entries] == ([1, 2] if whole else [1])
    assert log.damaged == ([] if whole else [2])
    assert ("incomplete" in caplog.text) is not whole
    # The next crossing is not swallowed by the half line before it.
    log.record("a", "b", "delta", 3, "0")
    assert [entry["bytes"] for entry in log.read()][-1] == 3
    assert log.damaged == ([] if whole else [2])
    assert log.broken == []  # a process that died has hidden nothing that was acknowledged


def _chain(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(5):
        log.record("a", "b", "delta", number, "0", reason="x" * (number * 3000))  # longer than one look back
    assert len(log.read()) == 5
    assert (log.broken, len(log.head())) == ([], 64)
    return log, log.path.read_bytes().splitlines(keepends=True)


def test_the_first_line_has_nothing_before_it_and_each_other_the_one_before(tmp_path):
    _, lines = _chain(tmp_path)
    previous = [json.loads(line)["previous"] for line in lines]
    assert previous == ["", *(hashlib.sha256(line.rstrip(b"\n")).hexdigest() for line in lines[:-1])]


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_missing_line_shows(tmp_path, caplog, missing):
    log, lines = _chain(tmp_path)
    log.path.write_bytes(b"".join(lines[:missing] + lines[missing + 1 :]))
    assert len(log.read()) == 4
    assert log.broken == [missing + 1]
    assert "missing or altered before lines" in caplog.text


def test_missing_last_lines_show_in_the_head_that_was_kept(tmp_path):
    log, lines = _chain(tmp_path)
    head = log.head()
    log.path.write_bytes(b"".join(lines[:-1]))
    log.read()
    assert log.broken == []
    assert log.head() != head


def test_altered_swapped_and_added_lines_show(tmp_path):
    log, lines = _chain(tmp_path)
    log.path.write_bytes(b"".join([lines[0], lines[1].replace(b'"bytes": 1', b'"bytes": 9'), *lines[2:]]))
    assert log.read()[1]["bytes"] == 9
    assert log.broken == [3]
    log.path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    log.read()
    assert log.broken == [2, 3, 4]
    unchained = json.dumps({key: value for key, value in json.loads(lines[0]).items() if key != "previous"})
    log.path.write_bytes(b"".join([*lines[:2], unchained.encode() + b"\n", *lines[2:]]))
    log.read()
    assert log.broken == [3, 4]


def test_log_that_cannot_be_written_stops_the_crossing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourcesMissing, match="audit log"):
        AuditLog(tmp_path / "file" / "audit.jsonl").record("a", "b", "delta", 1, "0")


def test_full_disk_stops_the_crossing_and_leaves_no_half_line(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs privileges")
    try:
        log = AuditLog(place / "audit.jsonl")
        with pytest.raises(ResourcesMissing, match="audit log"):
            _append(log.path, "a", 100)
        lines = log.path.read_bytes()
        assert lines.endswith(b"\n")
        assert [json.loads(line)["bytes"] for line in lines.splitlines()] == list(range(len(lines.splitlines())))
        assert 2 < len(lines.splitlines()) < 100
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_whose_a_party_is():
    names = ("alice", "owner", "evaluator", "data")
    assert [tenant_of(data_owner(name)) for name in names] == [tenant_of(evaluator(name)) for name in names] == [*names]
    assert [tenant_of(party) for party in (MODEL_OWNER, "coordinator", "evaluators", "data owners")] == [None] * 4


def test_a_long_reason_is_cut(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for reason in ("x" * 1_000_000, "y" * PROBLEM_LIMIT, None):
        log.record("a", "b", "delta", 1, "0", decision="refused", reason=reason)
    long, whole, none = (entry["reason"] for entry in log.read())
    assert long == "x" * (PROBLEM_LIMIT - 1) + "…"
    assert (whole, none) == ("y" * PROBLEM_LIMIT, None)
    assert log.path.stat().st_size < 5000
