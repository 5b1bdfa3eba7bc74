import pytest

from scaleot_ray.config import EmulatorSettings
from scaleot_ray.emulator import privacy
from scaleot_ray.emulator.build import FullModelFacts
from scaleot_ray.emulator.privacy import PrivacyLevel, build_for_privacy
from scaleot_ray.errors import ConfigError
from scaleot_ray.evaluation.loss import evaluate_loss
from tests.emulator.test_build import STREAM, _base, _stage_one

HELD_OUT = STREAM.fixed(2)


def _build(monkeypatch, margin, verbatim):
    monkeypatch.setitem(privacy.LEVELS, "medium", PrivacyLevel(margin, verbatim))
    base = _base()
    facts = FullModelFacts("0" * 64, evaluate_loss(base.model, HELD_OUT).value)
    settings = EmulatorSettings(plug_in_layers=2, compression="svd", privacy="medium")
    return build_for_privacy(base, _stage_one(base), settings, facts, HELD_OUT)


def test_the_first_emulator_that_meets_both_bounds_is_built(monkeypatch):
    result = _build(monkeypatch, margin=-1, verbatim=0.5)
    content = result.artifact.manifest.content
    assert content.verbatim_share <= 0.5
    assert all(rung.verbatim_share > 0.5 for rung in result.tried[:-1])
    assert (content.alpha, content.beta) == (result.tried[-1].alpha, result.tried[-1].beta)
    assert content.loss_margin == pytest.approx(result.tried[-1].loss_margin)


def test_a_weaker_demand_stops_earlier(monkeypatch):
    weak, strong = _build(monkeypatch, -1, 0.58), _build(monkeypatch, -1, 0.5)
    assert len(weak.tried) < len(strong.tried)


def test_what_cannot_be_reached_says_how_far_it_came(monkeypatch):
    with pytest.raises(
        ConfigError, match=r"at least 50 nats.*reached are at most .* nats(.|\n)*Use fewer plug-in layers"
    ):
        _build(monkeypatch, margin=50, verbatim=0.7)
