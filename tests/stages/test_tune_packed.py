"""Several data owners tuned on one emulator: what each finds in its folder, and what stays its own business."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.audit import AuditLog
from scaleot_ray.artifacts.gate import check_crossing
from scaleot_ray.artifacts.storage import read_artifact
from scaleot_ray.config import DataSettings, EmulatorSettings, ModelSettings
from scaleot_ray.emulator.build import FullModelFacts, build_emulator
from scaleot_ray.errors import ConfigError
from scaleot_ray.families.loading import load_base_model, model_digest
from scaleot_ray.progress import Progress
from scaleot_ray.stages.tune import TuneRequest, TuneResult, tune_emulator
from scaleot_ray.stages.tune_packed import tune_emulator_packed
from tests.stages.conftest import Built
from tests.tiny_models import save_tiny


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def requests(built: Built, output: Path, **changes: Any) -> list[TuneRequest]:
    """Alice and Bob, who tune unlike; ``changes`` are to the settings of both."""
    common = {"method": "lora", "steps": 8, "lora_rank": 4, **changes}
    own: dict[str, dict[str, Any]] = {"alice": {}, "bob": {"steps": 11, "batch_size": 2, "block_size": 16, "seed": 3}}
    return [
        TuneRequest(
            tenant.name,
            tenant.train,
            built.settings.tune.model_copy(update={**common, **own[tenant.name]}),
            output / tenant.name,
            test=tenant.test,
            evaluate_examples=12,
        )
        for tenant in built.settings.tenants
    ]


def packed(emulator: Artifact, asked: list[TuneRequest]) -> tuple[dict[str, TuneResult], dict[str, Exception]]:
    results: dict[str, TuneResult] = {}
    errors: dict[str, Exception] = {}
    tune_emulator_packed(emulator, asked, finished=results.__setitem__, failed=errors.__setitem__, device="cpu")
    return results, errors


def alone(emulator: Artifact, request: TuneRequest, **options: Any) -> TuneResult:
    return tune_emulator(
        emulator,
        request.train,
        request.tune,
        request.output,
        name=request.name,
        test=request.test,
        validation=request.validation,
        evaluate_examples=request.evaluate_examples,
        start=request.start,
        device="cpu",
        **options,
    )


def agree(one: Artifact, two: Artifact) -> bool:
    """Whether two deltas are the same but for fp32's last digits, and say the same about themselves."""
    first, second = one.tensors, two.tensors
    assert first.keys() == second.keys()
    apart = [((first[name] - second[name]).norm() / second[name].norm()).item() for name in first]
    return max(apart) < 1e-3 and one.manifest.content == two.manifest.content


def test_each_folder_is_as_if_tuned_alone(built: Built, tmp_path: Path) -> None:
    results, errors = packed(built.emulator, requests(built, tmp_path / "packed"))
    assert not errors
    assert list(results) == ["alice", "bob"]
    for request in requests(built, tmp_path / "alone"):
        by_itself, result = alone(built.emulator, request), results[request.name]
        folder = tmp_path / "packed" / request.name
        assert sorted(path.name for path in folder.iterdir()) == ["delta", "metrics", "tune.json"]
        for part in ("delta", "metrics"):
            check_crossing(read_artifact(folder / part, expected_kind=part), parent=built.emulator.manifest)
        assert agree(result.delta, by_itself.delta)
        assert result.metrics == pytest.approx(by_itself.metrics, rel=1e-5)
        assert result.metrics["emulator_tuned"] < result.metrics["emulator_zero_shot"]
        assert result.steps == request.tune.steps
        records = [json.loads((place / "tune.json").read_text()) for place in (folder, request.output)]
        assert records[0]["key"] == records[1]["key"]
    assert not agree(results["alice"].delta, alone(built.emulator, replace(request, output=tmp_path / "x")).delta)


@pytest.mark.parametrize("first", ["alone", "packed"])
def test_what_one_way_has_finished_the_other_takes(built: Built, tmp_path: Path, first: str) -> None:
    asked = requests(built, tmp_path, steps=2)
    if first == "alone":
        done = {request.name: alone(built.emulator, request) for request in asked}
        found, _ = packed(built.emulator, asked)
    else:
        done, _ = packed(built.emulator, asked)
        found = {request.name: alone(built.emulator, request) for request in asked}
    assert {name: result.delta.digest for name, result in found.items()} == {
        name: result.delta.digest for name, result in done.items()
    }


def test_a_finished_one_is_taken_while_the_others_tune(built: Built, tmp_path: Path) -> None:
    alice, bob = requests(built, tmp_path, steps=3)
    before = alone(built.emulator, alice)
    heard: list[tuple[str, str]] = []
    order: list[str] = []
    tune_emulator_packed(
        built.emulator,
        [bob, alice],
        finished=lambda name, result: order.append(f"{name} {result.steps}"),
        failed=lambda name, error: pytest.fail(str(error)),
        on_progress=lambda name, progress: heard.append((name, progress.stage)),
        device="cpu",
    )
    assert order == ["alice 3", "bob 11"]
    assert {name for name, _ in heard} == {"bob"}
    assert {stage for _, stage in heard} == {"emulator zero shot bob", "tune bob", "emulator tuned bob"}
    assert read_artifact(alice.output / "delta").digest == before.delta.digest


def faulty(alice: TuneRequest, fault: str, folder: Path) -> TuneRequest:
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"text": "the owner"}) + "\n" + json.dumps({"letter": "the data"}) + "\n")
    bad = DataSettings(path=str(rows))
    if fault == "settings":
        return replace(alice, tune=alice.tune.model_copy(update={"method": "layers"}))
    if fault == "missing":
        return replace(alice, train=DataSettings(path=str(folder / "none.jsonl")))
    if fault == "folder":
        (alice.output / "delta").mkdir(parents=True)
        (alice.output / "delta" / "thesis.txt").write_text("years of work")
        return alice
    if fault == "explodes":
        return replace(alice, tune=alice.tune.model_copy(update={"learning_rate": 1e30, "warmup_fraction": 0.0}))
    return replace(alice, **{fault: bad})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("train", "train: .*rows.jsonl"),
        ("test", "test: .*rows.jsonl"),
        ("missing", r"train\.path: "),
        ("settings", "only with tune.method=lora"),
        ("folder", "holds the result of another tuning|holds no manifest.json"),
        ("explodes", "the loss is"),
    ],
)
def test_what_is_wrong_with_one_stops_no_other(built: Built, tmp_path: Path, fault: str, message: str) -> None:
    alice, bob = requests(built, tmp_path, steps=4)
    results, errors = packed(built.emulator, [faulty(alice, fault, tmp_path), bob])
    assert list(errors) == ["alice"]
    with pytest.raises(type(errors["alice"]), match=message):
        raise errors["alice"]
    assert list(results) == ["bob"]
    assert not (tmp_path / "alice" / "tune.json").exists()
    assert agree(results["bob"].delta, alone(built.emulator, replace(bob, output=tmp_path / "by_itself")).delta)


@pytest.mark.parametrize("then", ["alone", "packed"])
def test_interrupted_it_goes_on_where_each_was(built: Built, tmp_path: Path, then: str) -> None:
    validated = {"evaluate_every": 3, "patience": 4, "validation_fraction": 0.2, "checkpoint_every": 2}
    whole, _ = packed(built.emulator, requests(built, tmp_path / "whole", **validated))
    asked = requests(built, tmp_path / "parts", **validated)

    def stop(name: str, progress: Progress) -> None:
        if progress.stage == "tune bob" and progress.step == 5:
            raise Stopped

    with pytest.raises(Stopped):
        tune_emulator_packed(
            built.emulator,
            asked,
            finished=lambda name, _: pytest.fail(name),
            failed=lambda name, error: pytest.fail(str(error)),
            on_progress=stop,
            device="cpu",
        )
    assert list((tmp_path / "parts" / "bob" / "checkpoint").iterdir())
    if then == "packed":
        rest, _ = packed(built.emulator, asked)
    else:
        rest = {request.name: alone(built.emulator, request) for request in asked}
    for name, result in rest.items():
        if then == "packed":
            assert result.delta.digest == whole[name].delta.digest
            assert result.validation == whole[name].validation
        assert agree(result.delta, whole[name].delta)
        assert dict(result.validation) == pytest.approx(dict(whole[name].validation), rel=1e-5)
        assert not (tmp_path / "parts" / name / "checkpoint").exists()


def test_a_later_round_and_an_audit_log(built: Built, tmp_path: Path) -> None:
    first, _ = packed(built.emulator, requests(built, tmp_path / "first", steps=2))
    audit = AuditLog(tmp_path / "audit.jsonl")
    asked = [
        replace(request, start=first[request.name].delta, audit=audit)
        for request in requests(built, tmp_path / "second", steps=2)
    ]
    results, errors = packed(built.emulator, asked)
    assert not errors
    for name, result in results.items():
        assert result.delta.manifest.content.start == first[name].delta.digest
    senders = [(line["sender"], line["kind"], line["decision"]) for line in audit.read()]
    assert sorted(senders) == [
        (f"data owner {name}", kind, "sent") for name in ("alice", "bob") for kind in ("delta", "metrics")
    ]


def test_what_the_receiver_of_a_result_raises_is_that_owners_failure(built: Built, tmp_path: Path) -> None:
    errors: dict[str, Exception] = {}
    taken: list[str] = []

    def finished(name: str, _: TuneResult) -> None:
        if name == "alice":
            raise RuntimeError("not taken")
        taken.append(name)

    asked = requests(built, tmp_path, steps=2)
    tune_emulator_packed(built.emulator, asked, finished=finished, failed=errors.__setitem__, device="cpu")
    assert taken == ["bob"]
    assert {name: str(error) for name, error in errors.items()} == {"alice": "not taken"}
    assert packed(built.emulator, asked)[0].keys() == {"alice", "bob"}  # its result was written, and is taken now


@pytest.mark.parametrize("change", [{"name": "bob"}, {"output": "bob"}])
def test_two_owners_are_kept_apart(built: Built, tmp_path: Path, change: dict[str, str]) -> None:
    alice, bob = requests(built, tmp_path)
    other = replace(alice, output=bob.output) if "output" in change else replace(alice, name="bob")
    with pytest.raises(ConfigError, match="of their own"):
        packed(built.emulator, [other, bob])
    assert not tmp_path.joinpath("bob").exists()


def test_an_emulator_with_dropout_is_refused_before_rows_are_scored(built: Built, tmp_path: Path) -> None:
    base = load_base_model(ModelSettings(path=str(save_tiny(tmp_path / "model", "gpt2")), device="cpu"))
    settings = EmulatorSettings(plug_in_layers=2, alpha=0, beta=0, allow_unprotected=True)
    emulator = build_emulator(base, None, settings, FullModelFacts(model_digest(base.model)))[0]
    heard: list[str] = []
    with pytest.raises(ConfigError, match="GPT2LMHeadModel trains with dropout"):
        tune_emulator_packed(
            emulator,
            requests(built, tmp_path),
            finished=lambda name, _: pytest.fail(name),
            failed=lambda name, error: pytest.fail(str(error)),
            on_progress=lambda name, _: heard.append(name),
            device="cpu",
        )
    assert not heard
