"""Two processes under DeepSpeed give what one gives, in every ZeRO stage and for every family."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import distributed
from transformers import AutoModelForCausalLM

from scaleot_ray.config import ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.emulator.harmonizer import SwitchableLayer
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.layer_replace_steps import Steps
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.errors import RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import load_base_model
from scaleot_ray.parallel.data_parallel import averaging
from scaleot_ray.parallel.deepspeed_config import deepspeed_config
from scaleot_ray.parallel.zero import spread_over_group, under_zero
from tests.emulator.token_stream import RandomTokens
from tests.parallel.processes import in_group
from tests.tiny_models import TINY, tiny_model

SMOLLM2 = Path(__file__).parents[2] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STREAM = RandomTokens()
STAGES = (0, 1, 2, 3)
SETTINGS = StageOneSettings(
    harmonizer_rank=8,
    activation="silu",
    start_tokens=128,
    steps=5,
    score_every=2,
    candidates=3,
    block_size=16,
    weight_decay=0.01,
    generated_tokens=0,
)
CASES = {
    **{f"{name}-zero{stage}": (name, stage, {}) for name, stage in product(TINY, STAGES)},
    **{f"llama-lm-zero{stage}": ("llama", stage, {"objective": "lm"}) for stage in STAGES},
    **{f"llama-one-sequence-zero{stage}": ("llama", stage, {"batch_size": 2}) for stage in (2, 3)},
}


def _model(name):
    if Path(name).is_dir():
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
    else:
        model = tiny_model(name).double()
    return model.eval().requires_grad_(False)


def _started(name, options) -> StageOne:
    model = _model(name)
    settings = SETTINGS.model_copy(update=options)
    stream = RandomTokens(settings.batch_size)
    return train_stage_one(model, family_of(model.config), stream, _held_out(settings), settings, to_the_end=False)


def _held_out(settings):
    return RandomTokens(settings.batch_size - 1).fixed(2)  # not a multiple of the processes


def _stepped(name, state, ranks=None, stage=0, extra=None, keep=None, stream=None, recompute=False, zero=None):
    model, settings, more = _model(name), state.settings, {"recompute": recompute}
    if ranks is not None:
        parallel = ParallelSettings(workers=ranks.size, zero=stage)
        config = deepspeed_config(parallel, settings, ModelSettings(path="tiny", dtype="float64"))
        config["zero_optimization"] |= zero or {}
        if stage == 3:
            spread_over_group(model, config, torch.device("cpu"))
        training = under_zero(config) if stage else averaging(ranks, torch.device("cpu"))
        more |= {"ranks": ranks, "training": training}
    stream = stream or RandomTokens(settings.batch_size)
    steps = Steps(model, family_of(model.config), stream, _held_out(settings), **more)
    return steps.run(state, extra or {}, keep)


def _every_case(ranks, folder, cases):
    for case, (name, stage, _) in cases.items():
        torch.manual_seed(ranks.rank)  # what is drawn outside of the common generator differs
        start, _ = StageOne.load(folder / f"{case}.start", with_moments=False)
        found = _stepped(name, start, ranks, stage)
        if ranks.first:
            found.save(folder / f"{case}.safetensors", with_moments=False)


def _by_two(folder, cases):
    """Every case by two processes, from the start that one process goes on from too."""
    for case, (name, _, options) in cases.items():
        _alone(name, **options)[0].save(folder / f"{case}.start", with_moments=False)
    in_group(2, _every_case, folder, cases)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    _by_two(folder, CASES)
    return folder


@cache
def _alone(name, **options):
    """Start and end in one process."""
    state = _started(name, options)
    return state, _stepped(name, state)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(shared, case):
    name, _, options = CASES[case]
    _check_same(*_alone(name, **options), shared / f"{case}.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="`make demo` obtains SmolLM2")
def test_also_on_the_first_layers_of_a_real_model(tmp_path):
    base = load_base_model(ModelSettings(path=str(SMOLLM2), device="cpu"))
    del base.family.layers(base.model)[6:]
    base.model.config.num_hidden_layers = 6
    base.model.config.layer_types = None
    place = str(tmp_path / "slice")
    base.model.save_pretrained(place)
    cases = {f"zero{stage}": (place, stage, {"harmonizer_rank": 32}) for stage in STAGES}
    _by_two(tmp_path, cases)
    for case in cases:
        _check_same(*_alone(place, harmonizer_rank=32), tmp_path / f"{case}.safetensors")


def _check_same(start, alone, file):
    found, _ = StageOne.load(file, with_moments=False)
    for index, values in alone.harmonizers.items():
        apart = {part: (found.harmonizers[index][part] - value).norm() for part, value in values.items()}
        assert _norm(apart.values()) <= 1e-5 * _norm(value.norm() for value in values.values()), index
        for part, value in values.items():  # where a gradient is nearly zero, Adam goes by its rounding
            change = (value - start.harmonizers[index][part]).norm()
            # ZeRO rounds weights to float32, also where nothing changes.
            assert apart[part] <= 0.02 * change + 1e-6 * value.norm(), (index, part)
    before, after = start.harmonizers, alone.harmonizers
    assert sum(not torch.equal(before[index]["up.weight"], after[index]["up.weight"]) for index in before) >= 3
    assert found.scores == pytest.approx(alone.scores, rel=1e-5)
    assert [list(one) for one in found.history] == [list(one) for one in alone.history]
    for one, other in zip(found.history, alone.history, strict=True):
        assert one.get("replaced") == other.get("replaced")
        numbers = [[*entry.get("candidate_losses", ()), entry.get("loss", 0.0)] for entry in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-9)


def _norm(parts) -> float:
    return math.hypot(*map(float, parts))


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def _continued(ranks, folder):
    """Stopped after two steps and gone on with, in another ZeRO stage; optimizers in part offloaded to memory."""
    everything = {3: {**OFFLOAD, "offload_param": {"device": "cpu"}}}
    for first, then in ((3, 3), (2, 2), (0, 1), (3, 2)):
        kept = {}

        def keep(state, extra, kept=kept):
            kept.setdefault(state.step, (state, extra))

        state = _started("llama", {"checkpoint_every": 2})
        _stepped("llama", state, ranks, first, keep=keep, recompute=True, zero=everything.get(first))
        half, extra = _from_first(kept.get(2), ranks)
        found = _stepped("llama", half, ranks, then, extra, zero=OFFLOAD)
        if ranks.first:
            found.save(folder / f"continued-{first}-{then}.safetensors", with_moments=False)


def _from_first(found, ranks):
    given = [found if ranks.first else None]
    distributed.broadcast_object_list(given)
    return given[0]


def test_what_is_kept_goes_on_in_any_stage(tmp_path):
    in_group(2, _continued, tmp_path)
    _, alone = _alone("llama")
    for file in sorted(tmp_path.iterdir()):
        found, _ = StageOne.load(file, with_moments=False)
        assert [one.get("replaced") for one in found.history] == [one.get("replaced") for one in alone.history]
        for index, values in alone.harmonizers.items():
            apart = [(found.harmonizers[index][part] - value).norm() for part, value in values.items()]
            assert _norm(apart) <= 1e-5 * _norm(value.norm() for value in values.values()), (file.name, index)
    assert len(list(tmp_path.iterdir())) == 4


def _with_a_mask_of_its_own(ranks, folder):
    state = _started("llama", {})
    if ranks.rank == 1:  # as if another version had drawn it
        state = replace(state, settings=state.settings.model_copy(update={"seed": 1}))
    try:
        _stepped("llama", state, ranks, 3)
    except RunFailed as error:
        (folder / f"{ranks.rank}").write_text(str(error))


def test_masks_that_differ_are_an_error_on_every_worker_and_no_hang(tmp_path):
    in_group(2, _with_a_mask_of_its_own, tmp_path)
    said = [(tmp_path / f"{rank}").read_text() for rank in (0, 1)]
    assert all("the mask of worker 1 is not the one of worker 0" in text for text in said)


class _OtherText(RandomTokens):
    def batches(self, start=0):
        return super().batches(start + 7)


def _with_text_of_its_own(ranks, folder):
    try:
        _stepped("llama", _started("llama", {}), ranks, 2, stream=_OtherText() if ranks.rank else STREAM)
    except RunFailed as error:
        (folder / f"{ranks.rank}").write_text(str(error))


def test_text_that_differs_is_an_error(tmp_path):
    in_group(2, _with_text_of_its_own, tmp_path)
    said = (tmp_path / "0").read_text()
    assert "the text of worker 1" in said
    assert "public.path" in said


def _counting(ranks, folder):
    gathered = []
    whole = PartitionedParameterCoordinator.fetch_sub_module

    def fetch(self, module, forward):
        # Whatever else it begins to gather shows in what is available afterwards.
        found = whole(self, module, forward)
        gathered.extend(
            index
            for index, layer in enumerate(layers)
            for parameter in raw(layer).parameters()
            if parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE and not parameter.ds_persist
        )
        return found

    def raw(layer):
        return layer.raw if isinstance(layer, SwitchableLayer) else layer

    model, state = _model("llama"), _started("llama", {})
    settings = state.settings.model_copy(update={"objective": "lm", "score_every": 100})  # one forward pass a step
    parallel = ParallelSettings(workers=2, zero=3)
    config = deepspeed_config(parallel, settings, ModelSettings(path="tiny", dtype="float64"))
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    spread_over_group(model, config, torch.device("cpu"))
    layers = family_of(model.config).layers(model)
    PartitionedParameterCoordinator.fetch_sub_module = fetch
    used = {}

    def heard(progress):
        used[progress.step] = sorted(set(gathered))
        gathered.clear()

    more = {"ranks": ranks, "training": under_zero(config)}
    steps = Steps(model, family_of(model.config), STREAM, STREAM.fixed(1), **more)
    found = steps.run(replace(state, settings=settings), {}, on_progress=heard)
    if ranks.first:
        replaced = {entry["step"]: entry["replaced"] for entry in found.history}
        (folder / "used.json").write_text(json.dumps([used, replaced]))


def test_zero_3_gathers_no_layer_that_a_harmonizer_stands_in_for(tmp_path):
    in_group(2, _counting, tmp_path)
    used, replaced = json.loads((tmp_path / "used.json").read_text())
    assert len(used) == len(replaced) == SETTINGS.steps
    for step, layers in used.items():
        assert sorted({*layers, *replaced[step]}) == list(range(8))
        assert not {*layers} & {*replaced[step]}
