"""A streamed build gives what a build in memory gives, on tiny random models of every family."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from scaleot_ray.artifacts import Artifact
from scaleot_ray.checkpoints import CheckpointPace
from scaleot_ray.config import EmulatorSettings, StageOneSettings
from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.assemble import assemble
from scaleot_ray.emulator.build import FullModelFacts, build_emulator
from scaleot_ray.emulator.layer_map import LayerRole
from scaleot_ray.emulator.layer_replace import train_stage_one
from scaleot_ray.emulator.sequential_fit import SequentialFit
from scaleot_ray.emulator.stage_one import StageOne
from scaleot_ray.emulator.streaming.at_work import at_work, front_at_work
from scaleot_ray.emulator.streaming.build import build_streamed
from scaleot_ray.emulator.streaming.stage_one import streamed_stage_one
from scaleot_ray.errors import RunFailed
from scaleot_ray.evaluation.loss import evaluate_loss
from scaleot_ray.families import family_of
from scaleot_ray.families.loading import BaseModel
from scaleot_ray.progress import Progress
from tests.emulator.token_stream import RandomTokens
from tests.tiny_models import TINY, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
TEXT = RandomTokens(batch=8, time=16)
HELD_OUT = TEXT.fixed(2)
STAGE_ONE = StageOneSettings(
    harmonizer_rank=8, start_tokens=1024, steps=0, generated_tokens=0, batch_size=8, block_size=16
)
EMULATOR = EmulatorSettings(plug_in_layers=2, alpha=0.5, beta=0.6, fit_tokens=1024, fit_steps=3)


def base_of(name: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    model = tiny_model(name).requires_grad_(False).to(dtype)
    return BaseModel(model, tiny_tokenizer(), family_of(model.config), name, "Apache-2.0")


def text(count: int = 8) -> list[Batch]:
    stream = TEXT.batches()
    return [next(stream) for _ in range(count)]


def first_pass(base: BaseModel, checkpoint: Path | None = None, stop_behind: int | None = None) -> StageOne:
    return streamed_stage_one(base, text(), HELD_OUT[0], STAGE_ONE, CPU, checkpoint, _stopping(stop_behind))


def second_pass(
    base: BaseModel,
    stage_one: StageOne,
    folder: Path | None = None,
    settings: EmulatorSettings = EMULATOR,
    stop_behind: int | None = None,
) -> Artifact:
    public = TEXT.batches()
    return build_streamed(base, stage_one, settings, public, HELD_OUT, CPU, folder, _stopping(stop_behind))[0]


class Stopped(Exception):
    """In place of a kill."""


def _stopping(layer: int | None):  # type: ignore[no-untyped-def]
    def hear(progress: Progress) -> None:
        if progress.step == layer:
            raise Stopped

    return hear


@pytest.mark.parametrize("name", list(TINY))
def test_equals_the_build_in_memory(name: str) -> None:
    base = base_of(name)
    found, expected = first_pass(base), train_stage_one(base.model, base.family, TEXT, HELD_OUT, STAGE_ONE)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.fit == pytest.approx(expected.fit, abs=1e-4)
    streamed = second_pass(base, found)
    # Without held-out text it takes the fit in any case; on random tokens it may be worse than none.
    whole, _ = build_emulator(base, expected, EMULATOR, FullModelFacts(base.digest), (), TEXT.batches())
    assert streamed.tensors.keys() == whole.tensors.keys()
    for tensor, value in whole.tensors.items():
        assert torch.allclose(streamed.tensors[tensor], value, atol=1e-4), tensor
    content = streamed.manifest.content
    assert content.full_loss == pytest.approx(evaluate_loss(base.model, HELD_OUT).value, abs=1e-5)  # type: ignore[union-attr]
    assert content.emulator_loss == pytest.approx(evaluate_loss(assemble(streamed), HELD_OUT).value, abs=1e-5)  # type: ignore[union-attr]
    losses = {"full_loss", "emulator_loss"}
    described = whole.manifest.content.model_dump(exclude=losses)
    described["stage_one"]["generated_tokens"] = 0
    assert content.model_dump(exclude=losses) == described


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.3}, {"alpha": 0.0, "allow_unprotected": True}])
def test_whatever_is_cut_or_replaced(settings: dict[str, float]) -> None:
    base, changed = base_of("neox"), EMULATOR.model_copy(update=settings)
    stage_one = first_pass(base)
    whole, _ = build_emulator(base, stage_one, changed, FullModelFacts(base.digest), (), TEXT.batches())
    streamed = second_pass(base, stage_one, settings=changed)
    assert streamed.tensors.keys() == whole.tensors.keys()
    if changed.beta > 0:  # else there are no moments for the factors that nothing is fitted in place of
        assert all(torch.allclose(streamed.tensors[name], value, atol=1e-4) for name, value in whole.tensors.items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_whatever_is_stored(name: str, dtype: torch.dtype) -> None:
    narrow = base_of(name, dtype)
    wide = base_of(name, dtype)
    wide.model.float()  # the same values
    stage_one, expected = first_pass(narrow), first_pass(wide)
    assert stage_one.scores == pytest.approx(expected.scores, abs=1e-3)
    emulator, reference = second_pass(narrow, stage_one), second_pass(wide, expected)
    assert {tensor.dtype for tensor in emulator.tensors.values()} == {dtype}
    assert all(parameter.dtype == dtype for parameter in narrow.model.parameters()), "the model is as it was"
    loss, other = (one.manifest.content.emulator_loss for one in (emulator, reference))  # type: ignore[union-attr]
    assert loss == pytest.approx(other, abs=0.02)
    assert loss != other


@pytest.mark.parametrize("layer", [1, 4, 7])
def test_a_stopped_pass_goes_on_and_ends_the_same(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointPace, "due", lambda *_: True)
    base = base_of("llama", torch.bfloat16)
    checkpoint, folder = tmp_path / "stage_one.safetensors", tmp_path / "emulator"
    with pytest.raises(Stopped):
        first_pass(base, checkpoint, stop_behind=layer)
    heard: list[int] = []
    stage_one = streamed_stage_one(
        base, text(), HELD_OUT[0], STAGE_ONE, CPU, checkpoint, lambda progress: heard.append(progress.step)
    )
    # The report comes before the state is written: the layer behind the last written one is done again.
    assert heard == list(range(layer, 9))
    expected = first_pass(base)
    assert stage_one.scores == expected.scores
    assert all(
        torch.equal(value, expected.harmonizers[index][name])
        for index, own in stage_one.harmonizers.items()
        for name, value in own.items()
    )
    with pytest.raises(Stopped):
        second_pass(base, stage_one, folder, stop_behind=layer)
    assert second_pass(base, stage_one, folder).digest == second_pass(base, expected).digest


def test_nothing_is_done_again_behind_the_last_layer(tmp_path: Path) -> None:
    base = base_of("llama")
    checkpoint, folder = tmp_path / "stage_one.safetensors", tmp_path / "emulator"
    first, again = first_pass(base, checkpoint), first_pass(base, checkpoint, stop_behind=1)
    assert again.scores == first.scores
    with pytest.raises(Stopped):  # while losses are measured
        build_streamed(base, first, EMULATOR, TEXT.batches(), HELD_OUT, CPU, folder, _stopping_in("measure fit"))
    found, _ = build_streamed(
        base, first, EMULATOR, TEXT.batches(), HELD_OUT, CPU, folder, _stopping_in("fit in order")
    )
    assert found.digest == second_pass(base, first).digest


def _stopping_in(stage: str):  # type: ignore[no-untyped-def]
    def hear(progress: Progress) -> None:
        if progress.stage == stage and progress.step:
            raise Stopped

    return hear


@pytest.mark.parametrize("name", list(TINY))
def test_streams_are_held_once(name: str) -> None:
    base = base_of(name)
    fit = SequentialFit(base.model, base.model, base.family, [LayerRole.KEPT] * 8, 0.0, 1e-3)
    streams = fit.begin(text(2))
    before = [weakref.ref(stream.full) for stream in streams]
    fit.step(0, streams)
    assert all(stream() is None for stream in before)


def test_damaged_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointPace, "due", lambda *_: True)
    base = base_of("llama")
    stage_one = first_pass(base)
    with pytest.raises(Stopped):
        second_pass(base, stage_one, tmp_path, stop_behind=6)
    layer = sorted(tmp_path.glob("layer-*"))[0]
    for damaged in (_with_one_bit_flipped(layer.read_bytes()), b"no tensors"):
        layer.unlink()  # mapped pages are not changed
        layer.write_bytes(damaged)
        with pytest.raises(RunFailed, match=layer.name):
            second_pass(base, stage_one, tmp_path)
    (tmp_path / "position.safetensors").write_bytes(b"nor here")
    with pytest.raises(RunFailed, match=r"position\.safetensors"):
        second_pass(base, stage_one, tmp_path)


def test_a_pass_for_other_layers_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointPace, "due", lambda *_: True)
    base = base_of("llama")
    stage_one = first_pass(base)
    with pytest.raises(Stopped):
        second_pass(base, stage_one, tmp_path, stop_behind=6)
    # As if stage 1 had been deleted and done again elsewhere.
    other = replace(stage_one, scores={index: -score for index, score in stage_one.scores.items()})
    assert second_pass(base, other, tmp_path).digest == second_pass(base, other).digest


def _with_one_bit_flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e38])
def test_a_model_whose_output_is_not_finite(weight: float) -> None:
    base = base_of("llama")
    base.family.layers(base.model)[5].mlp.down_proj.weight.fill_(weight)
    with pytest.raises(RunFailed, match="not finite"):
        first_pass(base)


def test_a_layer_that_cannot_be_replaced_on_text_it_was_not_fitted_on() -> None:
    base = base_of("llama-untied-bias")
    unseen = 96
    public = [{**batch, "input_ids": batch["input_ids"].clamp(max=unseen - 1)} for batch in text()]
    held_out = {**HELD_OUT[0], "input_ids": HELD_OUT[0]["input_ids"].clone()}
    held_out["input_ids"][0, 3] = unseen
    base.model.get_input_embeddings().weight[unseen] = 3e38  # the model's norms take it, a linear map does not
    assert base.model(held_out["input_ids"]).logits.isfinite().all()
    with pytest.raises(RunFailed, match="with layer 1 replaced"):
        streamed_stage_one(base, public, held_out, STAGE_ONE, CPU)


def test_at_work_changes_nothing_for_good() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16).requires_grad_(False)
    module[1].weight = module[0].weight
    before = module[0].weight
    with at_work(module.modules(), CPU):
        assert module[0].weight.dtype == torch.float32
        assert module[0].weight is module[1].weight, "what is shared is copied once"
        module[1].bias = nn.Parameter(torch.ones(4), requires_grad=False)
    assert module[0].weight is before
    assert module[1].weight is before
    assert module[1].bias.dtype == torch.float32, "what was put in meanwhile stays"
    with pytest.raises(Stopped), at_work(module.modules(), CPU):
        raise Stopped
    assert module[0].weight is before


def test_embeddings_are_not_copied() -> None:
    base = base_of("gpt2", torch.bfloat16)
    embedding = base.model.get_input_embeddings()
    with front_at_work(base.model, base.family, CPU):
        assert embedding.weight.dtype == torch.bfloat16
        assert embedding(torch.tensor([[3]])).dtype == torch.float32
    assert embedding(torch.tensor([[3]])).dtype == torch.bfloat16


class _Elsewhere(torch.Tensor):
    """In place of a tensor on a GPU: no embedding on the CPU takes it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        if function is nn.functional.embedding:
            raise RuntimeError("on two devices")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_an_embedding_is_given_by_name_is_brought_to_it_too() -> None:
    base = base_of("opt")
    embedding = base.model.base_model.decoder.embed_positions
    mask = torch.ones(1, 4, dtype=torch.long).as_subclass(_Elsewhere)
    with pytest.raises(RuntimeError, match="two devices"):
        embedding(mask, 0, position_ids=mask)
    with front_at_work(base.model, base.family, CPU):
        assert embedding(mask, 0, position_ids=mask).shape == (1, 4, 32)
