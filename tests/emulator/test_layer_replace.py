import json
import math
from functools import cache

import pytest
import torch

from scaleot_ray import checkpoints
from scaleot_ray.checkpoints import read_state, write_state
from scaleot_ray.config import StageOneSettings
from scaleot_ray.emulator.distillation import distillation_loss
from scaleot_ray.emulator.harmonizer import Harmonizer, switchable
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.stage_one import StageOne, steps_done
from scaleot_ray.errors import ResourcesMissing, RunFailed
from scaleot_ray.families import family_of
from tests.emulator.token_stream import RandomTokens
from tests.full_disk import largest_file
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
    harmonizers = {}
    for index in replaced:
        harmonizers[index] = Harmonizer(32, result.settings.harmonizer_rank, "identity", family.returns_tuple)
        harmonizers[index].load_state_dict(result.harmonizers[index])
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


def _whole(settings=SETTINGS):
    """What a run gives that nothing interrupts; trained once for each settings, and nobody changes it."""
    return _trained(settings.model_dump_json())


@cache
def _trained(settings):
    return _train(StageOneSettings.model_validate_json(settings))


class _Stop(Exception):
    pass


def _stopped(path, step, stage="stage 1", **options):
    """A run that something ends after a step of a stage."""

    def stop(progress):
        if (progress.stage, progress.step) == (stage, step):
            raise _Stop

    with pytest.raises(_Stop):
        _train(checkpoint=path, on_progress=stop, **options)


def _same(one: StageOne, other: StageOne) -> bool:
    pairs = [(one.harmonizers[index], other.harmonizers[index]) for index in one.harmonizers]
    pairs += [(one.moments[index], other.moments[index]) for index in one.moments]
    return (
        (one.scores, one.history, one.fit, one.leader) == (other.scores, other.history, other.fit, other.leader)
        and one.moments.keys() == other.moments.keys()
        and all(torch.equal(mine[name], theirs[name]) for mine, theirs in pairs for name in mine)
    )


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_ends(tmp_path, stop_at):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, stop_at)
    saved = steps_done(path)
    assert saved == (stop_at - 1) // 3 * 3  # told of a step before it is saved
    heard = []
    resumed = _train(checkpoint=path, on_progress=heard.append)
    # What precedes the first step is kept, too.
    assert {progress.stage for progress in heard} == {"stage 1"}
    assert heard[0].step == saved + 1
    assert _same(_whole(), resumed)


@pytest.mark.parametrize("step", [1, 2])
def test_interrupted_in_calibration_it_starts_afresh(tmp_path, step):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, step, "calibrate")
    assert not list(tmp_path.iterdir())
    assert _same(_whole(), _train(checkpoint=path))


@pytest.mark.parametrize("step", [1, 2, 6])
@pytest.mark.parametrize("steps", [0, 8])
def test_interrupted_in_layer_damage_it_keeps_the_calibration(tmp_path, step, steps):
    path, settings = tmp_path / "stage_one.safetensors", SETTINGS.model_copy(update={"steps": steps})
    _stopped(path, step, "layer damage", settings=settings)
    assert steps_done(path) is None
    heard = []
    assert _same(_whole(settings), _train(settings, checkpoint=path, on_progress=heard.append))
    assert [progress.step for progress in heard if progress.stage == "layer damage"] == [1, 2, 3, 4, 5, 6]
    assert {progress.stage for progress in heard} == {"layer damage", *(["stage 1"] if steps else [])}
    assert steps_done(path) == steps


def test_interrupted_at_the_first_step_it_keeps_the_layer_damage(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, 1)
    heard = []
    assert _same(_whole(), _train(checkpoint=path, on_progress=heard.append))
    assert {progress.stage for progress in heard} == {"stage 1"}


def test_scores_that_start_from_zero_need_no_layer_damage(tmp_path):
    path, settings = tmp_path / "stage_one.safetensors", SETTINGS.model_copy(update={"score_start": "zero"})
    heard = []
    _train(settings.model_copy(update={"steps": 0}), checkpoint=path, on_progress=heard.append)
    assert {progress.stage for progress in heard} == {"calibrate"}
    assert steps_done(path) == 0


def test_a_state_of_before_layer_damage_had_its_own_checkpoint_is_read(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, 5)
    tensors, text = read_state(path, "stage_one")
    record = json.loads(text)
    del record["scored"]
    write_state(path, tensors, "stage_one", json.dumps(record))
    assert steps_done(path) == 3
    assert _same(_whole(), _train(checkpoint=path))


def test_a_slow_run_is_saved_between_its_checkpoints(tmp_path, monkeypatch):
    path, settings = tmp_path / "stage_one.safetensors", SETTINGS.model_copy(update={"checkpoint_every": 100})
    _stopped(path, 4, settings=settings)
    assert steps_done(path) == 0
    monkeypatch.setattr(checkpoints, "LONGEST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "_WRITING_SHARE", math.inf)
    _stopped(path, 5, settings=settings)
    assert steps_done(path) == 4
    assert _same(_whole(settings), _train(settings, checkpoint=path))


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


def test_another_pace_of_checkpoints_is_no_other_setting(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, 5)
    heard = []
    resumed = _train(SETTINGS.model_copy(update={"checkpoint_every": 5}), checkpoint=path, on_progress=heard.append)
    assert heard[0].step == 4
    assert _same(_whole(), resumed)


def test_a_full_disk_leaves_the_older_state(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _stopped(path, 5)
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(written) == 2
    with largest_file(10_000), pytest.raises(ResourcesMissing, match="no room to write stage 1") as caught:
        _train(checkpoint=path)
    assert "Free disk space" in caught.value.remedy
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == written
    assert _same(_whole(), _train(checkpoint=path))


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path):
    with largest_file(10_000), pytest.raises(ResourcesMissing, match="no room to write stage 1"):
        _train(checkpoint=tmp_path / "stage_one.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_not_called_a_full_disk(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed, match="stage 1 could not be saved") as caught:
        _train(checkpoint=tmp_path / "file" / "stage_one.safetensors")
    assert "Give a cache folder that can be written" in caught.value.remedy


def _cut(data: bytes) -> bytes:
    return data[:-100]


def _bit_flipped(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]


def _header_flipped(data: bytes) -> bytes:
    place = data.index(b"sha256")
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def _score_flipped(data: bytes) -> bytes:
    place = data.index(b"scores") + 14  # the first score's digits: valid JSON before and after
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("damage", [_cut, _bit_flipped, _header_flipped, _score_flipped, lambda data: b""])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "stage_one.safetensors"
    _train(checkpoint=path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(RunFailed, match="no readable stage-1 result") as caught:
        _train(checkpoint=path)
    assert "delete it" in caught.value.remedy
    assert path.read_bytes() == damaged  # a copy may be put back; nothing is thrown away unasked


@pytest.mark.parametrize("damage", [_cut, _bit_flipped, _header_flipped, lambda data: b"", None])
@pytest.mark.parametrize("stop_at", [5, None])
def test_damaged_moments_are_taken_again(tmp_path, damage, stop_at):
    path = tmp_path / "stage_one.safetensors"
    moments = tmp_path / "stage_one.moments.safetensors"
    if stop_at is None:
        _train(checkpoint=path)
    else:
        _stopped(path, stop_at)
    if damage is None:
        moments.unlink()
    else:
        moments.write_bytes(damage(moments.read_bytes()))
        with pytest.raises(RunFailed, match=r"stage_one\.moments\.safetensors: holds no readable moments"):
            StageOne.load(path)
    heard = []
    assert _same(_whole(), _train(checkpoint=path, on_progress=heard.append))
    assert heard[0].stage == "calibrate again"
    assert [progress.step for progress in heard if progress.stage == "stage 1"] == ([4, 5, 6, 7, 8] if stop_at else [])
    assert _same(_whole(), StageOne.load(path)[0])
    seen = []
    _train(checkpoint=path, on_progress=seen.append)
    assert not seen


def test_moments_of_an_attempt_that_left_no_state_are_replaced(tmp_path):
    path = tmp_path / "stage_one.safetensors"
    _train(SETTINGS.model_copy(update={"start_tokens": 2048, "steps": 0}), checkpoint=path)
    path.unlink()
    assert _same(_whole(), _train(checkpoint=path))
    assert _same(_whole(), StageOne.load(path)[0])


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


def test_an_output_that_is_not_finite_stops_before_training(tmp_path):
    checkpoint = tmp_path / "stage_one.safetensors"
    for _ in range(2):  # the second finds what the first has saved
        model = tiny_model("llama")
        model.model.norm.weight.data.fill_(float("inf"))
        with pytest.raises(RunFailed, match=r"the model's own output is not finite, before anything.*\n.*model.dtype"):
            train_stage_one(model, family_of(model.config), STREAM, STREAM.fixed(2), SETTINGS, checkpoint)


def test_the_language_model_objective_is_one_setting_away():
    losses = [
        record["loss"] for record in _train(SETTINGS.model_copy(update={"objective": "lm"})).history if "loss" in record
    ]
    # Random tokens cannot be predicted: the loss is at least about log(vocabulary), a KL would be far below.
    assert min(losses) > 0.9 * math.log(94)
