"""The planner against what builds and tunings allocate, and what it says of what cannot fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from scaleot_ray.config import (
    DataSettings,
    EmulatorSettings,
    ModelSettings,
    ParallelSettings,
    StageOneSettings,
    TuneSettings,
)
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.layer_map import LayerRole, positions
from scaleot_ray.emulator.reduced_rank import RegressionSums, reduced_rank_regression, regression_bytes, sums_bytes
from scaleot_ray.errors import ConfigError, ResourcesMissing
from scaleot_ray.families import family_of
from scaleot_ray.planner.emulator import EmulatorShape
from scaleot_ray.planner.live_bytes import LiveBytes, peak_bytes
from scaleot_ray.planner.plan import PROCESS, Plan, Room, shortages
from scaleot_ray.planner.requirements import Build, check_build
from scaleot_ray.planner.tuning import tuning_process
from scaleot_ray.progress import Progress
from scaleot_ray.stages.build import build
from scaleot_ray.tuning.trainer import tune
from tests.tiny_models import TINY, tiny_tokenizer

CONFIG = transformers.LlamaConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
"""Large enough for matrices to outweigh what is not planned: position numbers, masks, losses."""

STAGE_ONE = StageOneSettings(
    steps=3, score_every=2, candidates=2, harmonizer_rank=32, start_tokens=4096, block_size=64, generated_tokens=512
)
EMULATOR = EmulatorSettings(plug_in_layers=2, fit_tokens=8192, fit_steps=3)
SEVEN_B = transformers.LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
WIDE = transformers.LlamaConfig(**{**SEVEN_B.to_dict(), "num_hidden_layers": 8})
"""A quarter of its layers: each takes time to plan."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(CONFIG).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = "the owner tunes the plug-in layers on the data that never leaves the machine. "
    (folder / "public.txt").write_text("\n".join(text * 3 + str(number) for number in range(600)))
    return folder


def _build(model: Path, stream: bool, **emulator: Any) -> Build:
    stage_one = STAGE_ONE.model_copy(update={"steps": 0, "generated_tokens": 0}) if stream else STAGE_ONE
    settings = ModelSettings(path=str(model), device="cpu", dtype="float32")
    return Build(CONFIG, "float32", settings, stage_one, EMULATOR.model_copy(update=emulator), stream)


def _planned(plan: Plan) -> dict[str, int]:
    (process,) = plan.processes
    return {phase.name: process.memory_of(phase) - PROCESS for phase in process.phases}


class _Stages:
    """The most bytes that lived in each stage of a build."""

    def __init__(self, counted: LiveBytes) -> None:
        self.counted = counted
        self.peaks: dict[str, int] = {}

    def __call__(self, progress: Progress) -> None:
        counted, stage = self.counted, progress.stage
        self.peaks[stage] = max(self.peaks.get(stage, 0), counted.peak)
        counted.peak = counted.live


@pytest.mark.parametrize("stream", [False, True], ids=["in memory", "streamed"])
def test_a_build_needs_what_was_planned(model: Path, stream: bool, tmp_path: Path) -> None:
    asked = _build(model, stream)
    planned, wrong = _planned(asked.plan()), _planned(_build(model, stream, fit_tokens=32768).plan())
    public = DataSettings(path=str(model / "public.txt"))
    with LiveBytes() as counted:
        stages = _Stages(counted)
        made = build(
            asked.model,
            public,
            asked.stage_one,
            asked.emulator,
            tmp_path / "emulator",
            cache=tmp_path / "cache",
            stream=stream,
            on_progress=stages,
        )
    compared = {"layer damage", "fit in order", *(() if stream else ("calibrate", "stage 1"))}
    for stage in compared:
        assert stages.peaks[stage] == pytest.approx(planned[stage], rel=0.15), stage
    assert max(stages.peaks.values()) == pytest.approx(max(planned.values()), rel=0.15)
    assert stages.peaks["fit in order"] != pytest.approx(wrong["fit in order"], rel=0.15)
    size = sum(file.stat().st_size for file in made.directory.glob("*.safetensors"))
    assert size == pytest.approx(asked.plan().emulator, rel=0.01)


class _Text:
    def batches(self, start: int = 0) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(start)
        while True:
            ids = torch.randint(3, 2000, (4, 64), generator=generator)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["layers", "lora", "bottleneck"])
@pytest.mark.parametrize("recompute", [False, True])
def test_tuning_needs_what_was_planned(dtype: torch.dtype, method: Any, recompute: bool) -> None:
    shape = EmulatorShape(CONFIG, dtype, STAGE_ONE, EMULATOR)
    layers = positions(shape.roles, LayerRole.PLUG_IN)
    settings = TuneSettings(method=method, steps=2, block_size=64, gradient_checkpointing=recompute)
    (phase,) = tuning_process(shape.model(), layers, settings).phases
    emulator = _filled(shape.model(), dtype)
    with LiveBytes() as counted:
        tune(emulator, family_of(CONFIG), layers, _Text(), settings)
    assert counted.peak == pytest.approx(sum(phase.device.values()), rel=0.15)


def _filled(model: Any, dtype: torch.dtype) -> Any:
    """A model with values in the place of what is on the meta device."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                values = torch.full(value.shape, 0.01, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=False)
    model.tie_weights()
    return model


@pytest.mark.parametrize(("inputs", "outputs", "rank"), [(300, 300, 40), (300, 100, 20), (1100, 1100, 64)])
def test_a_regression_needs_what_was_planned(inputs: int, outputs: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2 * inputs, width, generator=generator) for width in (inputs, outputs))
    sums = RegressionSums(inputs, outputs)
    sums.update(x, y)
    kept = [sums.sum_x, sums.sum_y, sums.xx, sums.xy, sums.yy]
    assert sum(tensor.nbytes for tensor in kept) == sums_bytes(inputs, outputs)
    measured = peak_bytes(lambda: reduced_rank_regression(*sums.moments(), rank, 1e-3))
    assert measured == pytest.approx(regression_bytes(inputs, outputs, rank), rel=0.15)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_can_be_planned(name: str) -> None:
    config = TINY[name]()
    stage_one = STAGE_ONE.model_copy(update={"block_size": 16})
    settings = ModelSettings(path="model", dtype="float32")
    asked = Build(config, "float32", settings, stage_one, EMULATOR)
    assert asked.plan().emulator > 0
    streamed = replace(asked, stream=True, stage_one=stage_one.model_copy(update={"steps": 0, "generated_tokens": 0}))
    assert streamed.plan().memory > PROCESS
    for method in ("layers", "lora", "bottleneck"):
        assert asked.tuning(TuneSettings(method=method, block_size=16)).memory > PROCESS


def _wide(config: Any = WIDE, **settings: Any) -> Build:
    model = ModelSettings(path="model", dtype="bfloat16")
    return Build(config, "bfloat16", model, StageOneSettings(), EmulatorSettings(plug_in_layers=2), **settings)


def test_a_streamed_build_of_seven_b_needs_a_fraction() -> None:
    whole, streamed = _wide(SEVEN_B, gpu=True).plan(), _wide(SEVEN_B, stream=True).plan()
    assert whole.gpu_memory > 20e9
    assert streamed.memory < 8e9
    assert 5e9 < streamed.emulator == whole.emulator < 9e9


def test_what_cannot_fit_is_refused_with_what_does() -> None:
    asked = _wide(SEVEN_B)
    needed, streamed = asked.plan().memory, _wide(SEVEN_B, stream=True).plan().memory
    check_build(asked, Room(memory=needed))
    with pytest.raises(ResourcesMissing, match=r"needs about .* GB of memory, there are") as raised:
        check_build(asked, Room(memory=int(1.01 * streamed)))
    assert "With --stream it would fit" in raised.value.remedy
    with pytest.raises(ResourcesMissing) as raised:
        check_build(_wide(stream=True), Room(memory=10**9))
    assert "No setting makes it fit" in raised.value.remedy


def test_zero_and_offloading_move_what_they_should() -> None:
    group = ParallelSettings(workers=4, gpus=1, zero=1)
    plain = _wide(parallel=group).plan()
    spread = _wide(parallel=group.model_copy(update={"zero": 3})).plan()
    offload = {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}
    offloaded = _wide(parallel=group.model_copy(update={"zero": 3}), deepspeed=offload).plan()
    assert plain.gpu_memory > spread.gpu_memory > offloaded.gpu_memory
    assert offloaded.processes[1].memory > spread.processes[1].memory
    recomputed = _wide(parallel=group.model_copy(update={"gradient_checkpointing": True})).plan()
    assert recomputed.gpu_memory < plain.gpu_memory
    # On a machine whose GPUs hold what ZeRO-3 leaves them, that is what is proposed.
    room = Room(gpu_memory=spread.gpu_memory)
    assert set(shortages(plain, room)) == {"GPU memory"}
    with pytest.raises(ResourcesMissing) as raised:
        check_build(_wide(parallel=group), room)
    assert "With --zero 3" in raised.value.remedy


def test_what_cannot_be_built_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match=r"emulator\.alpha"):
        replace(_wide(), emulator=EmulatorSettings(alpha=0.0)).plan()
    with pytest.raises(ConfigError, match=r"full_model|privacy"):
        replace(_wide(stream=True), emulator=EmulatorSettings(privacy="low")).plan()
