"""Data owners that share a model in one pass come out as each would alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray.data.batches import Batch, Batches, TokenBatches, stacked
from scaleot_ray.data.examples import IGNORED, TokenExample
from scaleot_ray.errors import ConfigError, DataError, RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.plugin import plug
from scaleot_ray.progress import Progress
from scaleot_ray.tuning import Tuned, tune
from scaleot_ray.tuning.checkpoint import read_checkpoint
from scaleot_ray.tuning.method import is_attached
from scaleot_ray.tuning.packed import PackedTenant, tune_packed
from scaleot_ray.tuning.packed_lora import PackedProjection
from tests.tiny_models import tiny_model, tiny_tokens
from tests.tuning.test_trainer import calls_of_first_norm
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_batches, tiny_examples, tiny_settings

FAMILIES = ["llama", "mistral-sliding", "gemma3", "phi3-sliding", "gpt2", "opt", "opt-post-norm", "neox"]
DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "attention_dropout", "hidden_dropout")


def repeatable(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model whose training draws no random number."""
    model = tiny_model(name)
    config = model.config
    for key in DROPOUT:
        if getattr(config, key, 0):
            setattr(config, key, 0.0)
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    return fresh.to(dtype).eval()


def long_batches(batch_size: int, seed: int) -> TokenBatches:
    """Sequences of 40 to 60 tokens: beside them the other tiny batches are mostly padding."""
    examples = [TokenExample(ids := tiny_tokens(1, 40 + 2 * number, number)[0].tolist(), ids) for number in range(10)]
    return TokenBatches(examples, batch_size, pad_id=0, seed=seed)


def tenant(name: str, batches: Batches | None = None, **options: Any) -> PackedTenant:
    given = {key: options.pop(key) for key in ("start", "evaluate", "checkpoint", "on_progress") if key in options}
    return PackedTenant(name, batches or tiny_batches(), tiny_settings("lora", **options), **given)


def unlike() -> list[PackedTenant]:
    """Four data owners who have nothing in common but the model."""
    return [
        tenant("alice", tiny_batches(4, 1), seed=1),
        tenant("bob", tiny_batches(2, 2), seed=2, steps=9, lora_rank=5, learning_rate=5e-3, weight_decay=0.1),
        tenant("carol", long_batches(1, 3), seed=3, steps=4, lora_alpha=1.0, max_grad_norm=0.05, warmup_fraction=0.5),
        tenant("dave", tiny_batches(3, 4), seed=4, steps=5, accumulate=2, block_size=64),
    ]


def alone(model: Any, one: PackedTenant) -> Tuned:
    options = {"start": one.start, "evaluate": one.evaluate, "checkpoint": one.checkpoint, "resume": one.resume}
    return tune(
        model, family_of(model.config), POSITIONS, one.batches, one.settings, on_progress=one.on_progress, **options
    )


def packed(model: Any, tenants: Sequence[PackedTenant]) -> tuple[dict[str, Tuned], dict[str, Exception]]:
    results: dict[str, Tuned] = {}
    errors: dict[str, Exception] = {}
    family = family_of(model.config)
    tune_packed(model, family, POSITIONS, tenants, finished=results.__setitem__, failed=errors.__setitem__)
    return results, errors


def all_packed(model: Any, tenants: Sequence[PackedTenant]) -> dict[str, Tuned]:
    results, errors = packed(model, tenants)
    assert not errors, errors
    assert sorted(results) == sorted(one.name for one in tenants)
    return results


def agree(one: Tuned, two: Tuned, tolerance: float = 1e-9) -> bool:
    """Whether two deltas differ by no more than ``tolerance``, relative to the delta's norm, tensor by tensor."""
    first, second = one.delta.tensors, two.delta.tensors
    assert first.keys() == second.keys()
    apart = [((first[name] - second[name]).norm() / second[name].norm()).item() for name in first]
    return max(apart) <= tolerance and one.history.losses == pytest.approx(two.history.losses, rel=tolerance)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_each_comes_out_as_alone(architecture: str) -> None:
    model = repeatable(architecture)
    before, state = bits(model), torch.get_rng_state()
    results = all_packed(model, unlike())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not is_attached(model)
    assert not any(isinstance(module, PackedProjection) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    for one in unlike():
        by_itself = alone(model, one)
        assert agree(results[one.name], by_itself), one.name
        assert results[one.name].delta.settings == by_itself.delta.settings
        assert results[one.name].history.steps == one.settings.steps


def test_what_is_compared_can_differ() -> None:
    """The check above fails where a row goes through another's pair, or a seed is another."""
    model = repeatable("llama")
    one = tenant("alice", seed=1)
    by_itself = alone(model, one)
    assert not agree(alone(model, replace(one, settings=tiny_settings("lora", seed=2))), by_itself)
    nudged = alone(model, replace(one, settings=tiny_settings("lora", seed=1, learning_rate=1.000001e-3)))
    assert not agree(nudged, by_itself)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom", "gpt2"])
def test_in_fp32_they_agree_to_fp32(architecture: str) -> None:
    """Gemma 2 and BLOOM take their softmax in fp32 whatever the model's type, so they are not looked at above."""
    model = repeatable(architecture, torch.float32)
    results = all_packed(model, unlike())
    for one in unlike():
        by_itself = alone(model, one)
        assert results[one.name].history.losses == pytest.approx(by_itself.history.losses, rel=1e-5)
        assert agree(results[one.name], by_itself, 1e-2)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "float32"), (torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.float16, "float32")],
)
def test_lower_precision_agrees_to_its_own(dtype: torch.dtype, precision: str) -> None:
    model, exact = repeatable("llama", dtype), precision == "float32" and dtype is torch.float32
    tenants = [replace(one, settings=one.settings.model_copy(update={"precision": precision})) for one in unlike()]
    results = all_packed(model, tenants)
    for one in tenants:
        found = results[one.name].history.losses
        assert found == pytest.approx(alone(model, one).history.losses, rel=1e-5 if exact else 1e-2)
        assert {value.dtype for value in results[one.name].delta.tensors.values()} == {torch.float32}


def test_arithmetic_may_differ_between_data_owners() -> None:
    model = repeatable("llama", torch.float32)
    half = replace(tenant("bob", seed=2), settings=tiny_settings("lora", seed=2, precision="bfloat16"))
    results = all_packed(model, [tenant("alice", seed=1), half])
    assert agree(results["alice"], alone(model, tenant("alice", seed=1)), 0.0)
    assert agree(results["bob"], alone(model, half), 0.0)


def test_a_batch_beyond_longrope_does_not_turn_the_others_angles() -> None:
    model = tiny_model("phi3")
    config = model.config
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 32,
    }
    config.original_max_position_embeddings = 32
    model = type(model)(config).double().eval()
    tenants = [tenant("alice", tiny_batches(2, 1)), tenant("bob", long_batches(2, 1))]
    results = all_packed(model, tenants)
    assert all(agree(results[one.name], alone(model, one)) for one in tenants)
    # What is kept apart would matter: padded to a longer length, a row has another loss.
    batch = next(tiny_batches(2, 1).batches())
    padded = {name: value[:2] for name, value in stacked([batch, next(long_batches(1, 1).batches())]).items()}
    assert abs(model(**batch).loss.item() - model(**padded).loss.item()) > 1e-6


def test_a_later_round_begins_with_a_delta() -> None:
    model = repeatable("llama")
    first = all_packed(model, unlike())
    again = [replace(one, start=first[one.name].delta) for one in unlike()]
    results = all_packed(model, again)
    assert all(agree(results[one.name], alone(model, one)) for one in again)
    mixed = [replace(again[0], start=first["bob"].delta), again[1]]
    kept, errors = packed(model, mixed)
    assert isinstance(errors["alice"], ConfigError)
    assert "same rank" in errors["alice"].remedy
    assert agree(kept["bob"], results["bob"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(architecture: str) -> None:
    model, calls = repeatable(architecture), [0]
    plain = all_packed(model, unlike())
    calls_of_first_norm(family_of(model.config).layers(model)[7], calls)
    all_packed(model, unlike())
    once, calls[0] = calls[0], 0
    saving = unlike()
    saving[1] = replace(saving[1], settings=saving[1].settings.model_copy(update={"gradient_checkpointing": True}))
    results = all_packed(model, saving)
    assert calls[0] > 1.8 * once
    assert not model.is_gradient_checkpointing
    assert all(agree(results[name], plain[name], 1e-12) for name in plain)


def evaluating(model: Any, value: Any = None, **options: Any) -> dict[str, Any]:
    ids = tiny_tokens().to(model.device)

    def evaluate() -> float:
        assert not model.training
        return model(ids, labels=ids).loss.item() if value is None else value()

    return {"evaluate": evaluate, "evaluate_every": 2, **options}


def evaluated(tuned: Tuned) -> dict[int, float]:
    return dict(tuned.history.evaluations)


def test_each_is_evaluated_with_its_own_pairs_and_stops_by_itself() -> None:
    model = repeatable("gpt2")

    def tenants() -> list[PackedTenant]:
        rising = iter([3.0, 2.0, 2.5, 9.0, 9.0])
        return [
            tenant("alice", tiny_batches(4, 1), seed=1, steps=7, **evaluating(model, learning_rate=1e-2)),
            tenant("bob", tiny_batches(2, 2), seed=2, steps=20, **evaluating(model, lambda: next(rising), patience=2)),
            tenant("carol", long_batches(1, 3), seed=3, steps=10),
        ]

    results = all_packed(model, tenants())
    for one in tenants():
        by_itself = alone(model, one)
        assert agree(results[one.name], by_itself)
        assert evaluated(results[one.name]) == pytest.approx(evaluated(by_itself), rel=1e-9)
    assert results["bob"].history.stopped_early
    assert results["bob"].history.steps == 8
    assert results["bob"].history.best == (4, 2.0)
    assert len({value for _, value in results["alice"].history.evaluations}) == 4


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tuned]:
    """What the four come to when nothing goes wrong."""
    return all_packed(repeatable("llama"), unlike())


class Ends:
    """Three batches."""

    def batches(self, start: int = 0) -> Iterator[Batch]:
        return islice(tiny_batches().batches(), start, 3)


def unlabelled() -> TokenBatches:
    return TokenBatches([TokenExample([5, 6, 7], [IGNORED] * 3)], 2, 0, seed=0)


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "explodes": ({"learning_rate": 1e30, "warmup_fraction": 0}, RunFailed, r"Step 2: the loss is (nan|inf)"),
    "no label": ({"batches": unlabelled()}, DataError, "Step 1: no token of its batches has a label"),
    "ends": ({"batches": Ends()}, DataError, "Step 4: the batches have come to an end"),
    "evaluates to nan": (
        {"evaluate": lambda: float("nan"), "evaluate_every": 3},
        RunFailed,
        "Step 3: the evaluation gave nan",
    ),
    "no validation rows": ({"evaluate_every": 3}, ConfigError, "no validation rows"),
    "another method": ({"method": "layers"}, ConfigError, "share a model only with tune.method=lora"),
    "no gpu": ({"precision": "float16"}, ConfigError, "float16 arithmetic needs a GPU"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_one_data_owners_alone(fault: str, undisturbed: dict[str, Tuned]) -> None:
    options, kind, message = FAULTS[fault]
    given = {key: options[key] for key in ("batches", "evaluate") if key in options}
    values = {key: value for key, value in options.items() if key not in given}
    mallory = PackedTenant(
        "mallory", **{"batches": tiny_batches(), **given}, settings=tiny_settings(**{"method": "lora", **values})
    )
    first, *others = unlike()
    results, errors = packed(repeatable("llama"), [first, mallory, *others])
    assert list(errors) == ["mallory"]
    assert isinstance(errors["mallory"], kind)
    with pytest.raises(kind, match=message):
        raise errors["mallory"]
    assert sorted(results) == sorted(undisturbed)
    assert all(agree(results[name], undisturbed[name]) for name in undisturbed)


def test_rows_that_are_not_finite_touch_no_other_gradient() -> None:
    """The very step that fails is one that the others make."""
    model = repeatable("llama")
    wild = tenant("mallory", learning_rate=1e30, warmup_fraction=0, steps=2)
    others = [replace(one, settings=one.settings.model_copy(update={"steps": 2})) for one in unlike()]
    results, errors = packed(model, [wild, *others])
    assert isinstance(errors["mallory"], RunFailed)
    for one in others:
        assert all(tensor.isfinite().all() for tensor in results[one.name].delta.tensors.values())
        assert agree(results[one.name], alone(model, one))


def test_a_callback_can_end_one_data_owners_tuning() -> None:
    def cancel(progress: Progress) -> None:
        if progress.step == 3:
            raise RuntimeError("cancelled")

    model = repeatable("llama")
    heard: list[Progress] = []
    results, errors = packed(
        model, [tenant("mallory", on_progress=cancel), tenant("alice", seed=1, on_progress=heard.append)]
    )
    assert str(errors["mallory"]) == "cancelled"
    assert agree(results["alice"], alone(model, tenant("alice", seed=1)))
    assert [progress.step for progress in heard] == [1, 2, 3, 4, 5, 6]


def test_results_come_as_soon_as_they_are_there_on_a_bare_model() -> None:
    model, order = repeatable("llama"), []
    ids = tiny_tokens()
    untouched = model(ids).logits

    def finished(name: str, tuned: Tuned) -> None:
        order.append(name)
        assert not model.training
        assert not is_attached(model)
        assert torch.equal(model(ids).logits, untouched)
        with plug(model, family_of(model.config), tuned.delta):
            assert not torch.equal(model(ids).logits, untouched)
        if name == "bob":
            raise RuntimeError("no room")

    errors: dict[str, Exception] = {}
    tune_packed(model, family_of(model.config), POSITIONS, unlike(), finished=finished, failed=errors.__setitem__)
    assert order == ["carol", "alice", "bob", "dave"]
    assert {name: str(error) for name, error in errors.items()} == {"bob": "no room"}


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_a_model_with_dropout_is_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    with pytest.raises(ConfigError, match="trains with dropout") as refused:
        packed(model, unlike())
    assert "one by one" in refused.value.remedy
    assert not model.training


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="names of their own"):
        packed(repeatable("llama"), [tenant("alice"), tenant("alice")])


def test_a_model_that_carries_a_plug_in_is_refused_to_each() -> None:
    model = repeatable("llama")
    delta = alone(model, tenant("alice")).delta
    with plug(model, family_of(model.config), delta), pytest.raises(ConfigError, match="carries a plug-in already"):
        packed(model, unlike())


def test_batches_below_one_another() -> None:
    first, second = next(tiny_batches(2).batches()), next(long_batches(1, 0).batches())
    assert stacked([first]) is first
    both = stacked([first, second])
    length = first["input_ids"].shape[1]
    assert {value.shape for value in both.values()} == {(3, second["input_ids"].shape[1])}
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        assert torch.equal(both[name][:2, :length], first[name])
        assert torch.equal(both[name][2:], second[name])
        assert (both[name][:2, length:] == filler).all()
    bare = stacked([{name: first[name] for name in ("input_ids", "labels")}, second])
    assert (bare["attention_mask"][:2, :length] == 1).all()


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def stopped_at(step: int) -> Any:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise Stopped

    return on_progress


def resumable(folder: Path, model: Any, **options: Any) -> list[PackedTenant]:
    """Two data owners with checkpoints, evaluations and patience."""
    common = {"steps": 12, "checkpoint_every": 2, "patience": 9, **options}
    folder.mkdir(exist_ok=True)
    return [
        tenant(name, tiny_batches(2, seed), seed=seed, checkpoint=folder / name, **evaluating(model), **common)
        for seed, name in enumerate(("alice", "bob"))
    ]


def test_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    model = repeatable("gpt2")
    whole = all_packed(model, resumable(tmp_path / "whole", model))
    first, second = resumable(tmp_path / "parts", model)
    before = bits(model)
    with pytest.raises(Stopped):
        packed(model, [first, replace(second, on_progress=stopped_at(7))])
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    saved = read_checkpoint(tmp_path / "parts" / "bob")
    assert saved is not None
    assert saved.record["history"]["losses"] == whole["bob"].history.losses[:6]
    results = all_packed(model, [first, second])
    for name, result in results.items():
        assert result.history == whole[name].history
        assert all(torch.equal(value, whole[name].delta.tensors[key]) for key, value in result.delta.tensors.items())
    again = all_packed(model, [first, second])  # finished ones give their results without a step
    assert all(again[name].history == whole[name].history for name in again)


@pytest.mark.parametrize("first", ["alone", "packed"])
def test_a_checkpoint_goes_from_one_way_of_tuning_to_the_other(first: str, tmp_path: Path) -> None:
    model = repeatable("gpt2")
    whole = [alone(model, one) for one in resumable(tmp_path / "whole", model)]
    tenants = [replace(one, on_progress=stopped_at(5)) for one in resumable(tmp_path / "parts", model)]
    if first == "packed":
        with pytest.raises(Stopped):
            packed(model, [replace(tenants[0], on_progress=None), tenants[1]])
        results = [alone(model, replace(one, on_progress=None)) for one in tenants]
    else:
        for one in tenants:
            with pytest.raises(Stopped):
                alone(model, one)
        by_name = all_packed(model, [replace(one, on_progress=None) for one in tenants])
        results = [by_name[one.name] for one in tenants]
    for result, expected in zip(results, whole, strict=True):
        assert agree(result, expected)
        assert evaluated(result) == pytest.approx(evaluated(expected), rel=1e-9)
    # Both ways leave the same file, the state of the random generator included.
    left, right = read_checkpoint(tmp_path / "whole" / "alice"), read_checkpoint(tmp_path / "parts" / "alice")
    assert left is not None
    assert right is not None
    assert left.run == right.run
    assert left.tensors.keys() == right.tensors.keys()
    assert torch.equal(left.tensors["random.cpu"], right.tensors["random.cpu"])


def test_a_checkpoint_of_other_data_is_its_owners_own_failure(tmp_path: Path) -> None:
    model = repeatable("llama")
    first, second = resumable(tmp_path, model)
    whole = all_packed(model, [first, second])
    results, errors = packed(model, [replace(first, batches=tiny_batches(2, 5)), second])
    assert "its data are not these" in str(errors["alice"])
    assert results["bob"].history == whole["bob"].history


def test_fewer_labels_than_batches() -> None:
    """A part of a step without a label is passed over, as alone."""

    class Some:
        def batches(self, start: int = 0) -> Iterator[Batch]:
            for batch in islice(tiny_batches().batches(), start, None):
                yield batch
                yield {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    model = repeatable("llama")
    some = tenant("alice", Some(), accumulate=2)
    results = all_packed(model, [some, tenant("bob", seed=2)])
    assert agree(results["alice"], alone(model, some))
    assert agree(results["alice"], alone(model, tenant("alice")))


def test_examples_are_of_unlike_length() -> None:
    """What the tests of padding rest on."""
    longest = max(len(example.input_ids) for example in tiny_examples())
    assert longest <= 20 < 40 <= next(long_batches(1, 0).batches())["input_ids"].shape[1]
