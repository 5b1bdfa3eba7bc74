import math

import pytest
import torch

from scaleot_ray.config import StageOneSettings
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import switchable
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import family_of
from tests.emulator.token_stream import RandomTokens
from tests.tiny_models import TINY, tiny_model, tiny_tokens

STREAM = RandomTokens()
SETTINGS = StageOneSettings(
    harmonizer_rank=8, start_tokens=128, steps=8, score_every=2, candidates=3, checkpoint_every=3, block_size=16
)


def _train(settings=SETTINGS, name="llama", **options):
    model = tiny_model(name)
    return train_stage_one(model, family_of(model.config), STREAM, STREAM.fixed(2), settings, **options)


@pytest.mark.parametrize("name", list(TINY))
def test_every_family_trains_and_its_weights_stay(name):
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.requires_grad_(False)
    result = train_stage_one(model, family_of(model.config), STREAM, STREAM.fixed(2), SETTINGS)
    assert set(result.harmonizers) == set(result.scores) == set(range(1, 7))
    assert all(math.isfinite(score) for score in result.scores.values())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def _distance(result: StageOne, replaced=(2, 3, 5)) -> float:
    """KL to the full model with three layers replaced, on tokens that were not trained on."""
    model = tiny_model("llama")
    family = family_of(model.config)
    harmonizers = {index: result.harmonizer(index, family) for index in replaced}
    tokens = tiny_tokens(16, 16, seed=5)
    with torch.no_grad(), switchable(model, family, harmonizers) as switchboard:
        teacher = model(input_ids=tokens).logits
        switchboard.set(frozenset(replaced))
        return distillation_loss(model(input_ids=tokens).logits, teacher).item()


def test_training_brings_the_emulator_closer_to_the_model():
    settings = SETTINGS.model_copy(update={"start": "random", "score_every": 100, "learning_rate": 3e-3})
    untrained, trained = (_train(settings.model_copy(update={"steps": steps})) for steps in (0, 60))
    assert _distance(trained) < 0.9 * _distance(untrained)


def test_the_closed_form_starts_closer_than_the_random_start():
    settings = SETTINGS.model_copy(update={"steps": 0, "start_tokens": 4096, "harmonizer_rank": 32})
    closed, random = _train(settings), _train(settings.model_copy(update={"start": "random"}))
    assert closed.fit
    assert not random.fit
    assert _distance(closed) < 0.8 * _distance(random)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(tmp_path, stop_at):
    whole = _train()

    def stop(progress):
        if progress.stage == "stage 1" and progress.step == stop_at:
            raise _Stop

    path = tmp_path / "stage_one.safetensors"
    with pytest.raises(_Stop):
        _train(checkpoint=path, on_progress=stop)
    assert path.exists() == (stop_at > 3)
    resumed = _train(checkpoint=path)
    assert resumed.scores == whole.scores
    assert resumed.history == whole.history
    for index, state in whole.harmonizers.items():
        assert all(torch.equal(value, resumed.harmonizers[index][name]) for name, value in state.items())


def test_a_finished_run_is_not_trained_again(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    first = _train(checkpoint=path)
    seen = []
    again = _train(checkpoint=path, on_progress=seen.append)
    assert not seen
    assert again.scores == first.scores


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _train(checkpoint=path)
    with pytest.raises(RunFailed, match="other settings"):
        _train(SETTINGS.model_copy(update={"harmonizer_rank": 4}), checkpoint=path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _train(checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunFailed, match="no readable stage-1 result"):
        StageOne.load(path)


def test_a_masked_out_harmonizer_is_not_touched():
    settings = SETTINGS.model_copy(update={"start": "random", "steps": 1, "weight_decay": 0.1})
    started = _train(settings.model_copy(update={"steps": 0}))
    stepped = _train(settings)
    replaced = set(stepped.history[0]["replaced"])
    assert replaced
    assert replaced != set(started.harmonizers)
    for index in started.harmonizers:
        same = all(
            torch.equal(value, stepped.harmonizers[index][name]) for name, value in started.harmonizers[index].items()
        )
        assert same == (index not in replaced)


def test_a_loss_that_is_not_finite_stops_with_the_step():
    with pytest.raises(RunFailed, match=r"step \d+.*\n.*learning_rate"):
        _train(SETTINGS.model_copy(update={"learning_rate": 1e30, "score_every": 100}))


def test_the_language_model_objective_is_one_setting_away():
    losses = [
        record["loss"] for record in _train(SETTINGS.model_copy(update={"objective": "lm"})).history if "loss" in record
    ]
    # Random tokens cannot be predicted: the loss is at least about log(vocabulary), a KL would be far below.
    assert min(losses) > 0.9 * math.log(94)
