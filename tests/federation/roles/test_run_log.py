"""The log of a run: one readable line each, whatever is quoted in it."""

from __future__ import annotations

from pathlib import Path

from scaleot_ray.federation.roles.run_log import RunLog


def test_nobody_writes_a_line_of_its_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run.log")
    log.warning("refused: \x1b[2Jnothing\n2026-11-23T00:00:00Z INFO tenant=ann submitted", tenant="a\nb", round=1)
    log.info("x" * 100_000)
    first, second = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert first.endswith(
        "WARNING round=1 tenant=a?b refused: ?[2Jnothing 2026-11-23T00:00:00Z INFO tenant=ann submitted"
    )
    assert len(second) < 5000
