"""What an evaluator sends: its rows as numbers, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.evaluation.choice import ChoiceScore
from scaleot_ray.evaluation.loss import LossScore
from scaleot_ray.evaluation.table import TenantTable, table_json
from scaleot_ray.federation.roles import table_gate
from scaleot_ray.federation.roles.table_gate import pack_table, unpack_table

LOSS = TenantTable("alice", "loss", {"plug_in": LossScore(np.array([1.5, 0.1 + 0.2, 3e-300]), np.array([7, 9, 0]))})
CHOICE = TenantTable(
    "alice",
    "accuracy",
    {
        row: ChoiceScore(
            np.array([True, False]), np.array([False, False]), np.array([-0.1, -2.5]), np.array([-0.05, -1.5])
        )
        for row in ("full_zero_shot", "full_tuned")
    },
)


@pytest.mark.parametrize("table", [LOSS, CHOICE, TenantTable("alice", "loss")], ids=["loss", "accuracy", "empty"])
def test_a_table_comes_out_as_it_went_in(table: TenantTable) -> None:
    back = unpack_table(pack_table(table), "alice", table.metric)
    assert table_json(back) == table_json(table)
    assert pack_table(back) == pack_table(table)


def edited(table: TenantTable, *path: str, value: Any) -> bytes:
    """A packed table with one value replaced or added."""
    values = json.loads(pack_table(table))
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04N.", "is no JSON"),
        (b"[1]", "is no JSON object"),
        (b'{"a":' * 100_000, "is no JSON"),
        (edited(LOSS, "note", value="Alice"), "has the keys"),
        (edited(LOSS, "rows", value=[]), "has the keys"),
        (edited(LOSS, "name", value="bob"), "is not the table of alice by loss"),
        (pack_table(CHOICE), "is not the table of alice by loss"),
        (edited(LOSS, "rows", "Alice lives here", value={}), "has the row 'Alice lives here'"),
        (edited(LOSS, "rows", "\x1b[2J" * 1_000_000, value={}), r"has the row '\\x1b\[2J.{,100}…, expected"),
        (edited(LOSS, "rows", "plug_in", "text", value=["Alice"]), "row plug_in is not made of sums, counts"),
        (edited(LOSS, "rows", "plug_in", value=1.5), "row plug_in is not made of"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, "Alice", 2.0]), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, None, 2.0]), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, float("inf"), 2.0]), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, True, 2.0]), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, 10**400, 2.0]), "sums holds something else"),
        (pack_table(LOSS).replace(b"1.5", b"1e999"), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value={"0": 1.5}), "sums holds something else"),
        (edited(LOSS, "rows", "plug_in", "sums", value=[1.5, 2.5]), "rows of different lengths"),
        (edited(LOSS, "rows", "plug_in", "counts", value=[1, -1, 2]), "counts holds something else"),
        (edited(LOSS, "rows", "plug_in", "counts", value=[1, 1.5, 2]), "counts holds something else"),
        (edited(LOSS, "rows", "plug_in", "counts", value=[0, 0, 0]), "counts no token"),
        (edited(LOSS, "rows", "full_tuned", value={"sums": [1.0], "counts": [1]}), "rows of different lengths"),
    ],
)
def test_what_is_no_table_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactRefused, match=message) as caught:
        unpack_table(data, "alice", "loss")
    assert caught.value.remedy


def test_answers_are_true_or_false() -> None:
    with pytest.raises(ArtifactRefused, match="correct holds something else than true and false"):
        unpack_table(edited(CHOICE, "rows", "full_tuned", "correct", value=[1, 17]), "alice", "accuracy")


def test_a_table_has_a_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pack_table(LOSS)
    monkeypatch.setattr(table_gate, "TABLE_LIMIT", len(data))
    unpack_table(data, "alice", "loss")
    monkeypatch.setattr(table_gate, "TABLE_LIMIT", len(data) - 1)
    with pytest.raises(ArtifactRefused, match="more than"):
        unpack_table(data, "alice", "loss")
