"""What another party writes reaches a screen as text, whatever it is."""

from __future__ import annotations

import io
from typing import Any

import pytest

from scaleot_ray.artifacts.card import model_card
from scaleot_ray.artifacts.inspect import describe
from scaleot_ray.cli import status, tenants
from scaleot_ray.cli.failure import explain
from scaleot_ray.cli.inspect import show_artifact
from scaleot_ray.cli.output import console
from scaleot_ray.cli.tables import show_standard_table
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.plain_text import plain_line, plain_text
from tests.artifacts.examples import delta, emulator

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
HOSTILE = f"[/x] [red]{ESCAPE}"


def shown(show: Any, *arguments: Any) -> str:
    """What is printed."""
    stream = io.StringIO()
    show(console(stream), *arguments)
    return stream.getvalue()


@pytest.mark.parametrize("text", ["\x1b", "\x9b", "\r", "\x08", "\x7f", "\u202e", "\u2066", "\ud800", "\x00"])
def test_what_steers_a_terminal_is_replaced(text: str) -> None:
    assert plain_text(f"a{text}b") == "a\ufffdb"


def test_all_other_text_stays() -> None:
    text = "Grüße, 数据 🙂\n\ttab [b]markup[/b] → α"
    assert plain_text(text) == text
    assert plain_text("a\r\nb") == "a\nb"
    assert plain_line("kind  delta\nverbatim  0 %\r\n") == "kind  delta verbatim  0 %"


def test_an_error_quotes_without_obeying() -> None:
    text = explain(ArtifactRefused(f"kind {HOSTILE!s} is unknown", "Ask.")).as_text()
    assert "\x1b" not in text
    assert "[/x] [red]" in text


def test_an_artefact_and_its_card() -> None:
    artifact = delta(emulator().manifest, "lora")
    settings = {**artifact.manifest.content.settings, "note": HOSTILE}
    content = artifact.manifest.content.model_copy(update={"settings": settings, "method": HOSTILE})
    manifest = artifact.manifest.model_copy(update={"content": content, "base_model": f"x\nverbatim  0 %{ESCAPE}"})
    manifest = manifest.model_copy(update={"model_config_json": {"model_type": [ESCAPE]}})
    text = shown(show_artifact, describe(manifest))
    assert "[/x] [red]" in text
    for written in (text, model_card(manifest)):
        assert "\x1b" not in written
        assert "\x07" not in written
    assert not [line for line in text.splitlines() if line.startswith("verbatim")]
    assert model_card(artifact.manifest).startswith("# Delta for")


def test_stored_reasons() -> None:
    part = {"name": "ann", "state": "refused", "attempts": 1, "reason": HOSTILE}
    one = {"number": 1, "state": "failed", "opened": 0, "ended": 1, "reason": HOSTILE, "tenants": [part]}
    run = {"under_way": False, "directory": "run", "emulator": "0" * 64, "rounds": [one], "aggregate": None}
    tenant = {"name": "ann", "state": "paused", "submissions": 0, "plug_in": None, "reason": HOSTILE}
    refused = {**tenant, "refusals": [{"count": 2, "reason": HOSTILE}]}
    for text in (shown(status._show, run), shown(tenants._show, {"tenants": [refused]})):
        assert "".join(text.split()).count("[/x]") == 2
        assert "\x1b" not in text


def test_names_in_the_standard_table() -> None:
    gain = {"usable": False, "reason": "too small [/x]"}
    row = {"name": "[bold]ann[/x]", "metric": "loss", "full_zero_shot": 3.0, "full_tuned": 2.0, "gain": gain}
    text = shown(show_standard_table, [row])
    assert "[bold]ann[/x]" in text
    assert "too small [/x]" in text
