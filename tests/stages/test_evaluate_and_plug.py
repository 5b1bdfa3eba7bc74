"""The standard table's rows, and the model owner's plug-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.config import DataSettings
from scaleot_ray.data import HoldOut, open_rows
from scaleot_ray.errors import ArtifactRefused, ConfigError, RunFailed, ScaleOTError
from scaleot_ray.evaluation.table import AGGREGATE, ROWS, TenantTable, table_json
from scaleot_ray.families import loading
from scaleot_ray.families.loading import BaseModel, load_base_model, model_digest
from scaleot_ray.families.tokenizer import read_tokenizer
from scaleot_ray.progress import Progress
from scaleot_ray.stages import evaluate as evaluate_stage
from scaleot_ray.stages.evaluate import evaluate_rows
from scaleot_ray.stages.plug import plug_in
from scaleot_ray.stages.tune import tune_emulator
from tests.stages.conftest import Built
from tests.tiny_models import save_tiny, swapped_tokenizer, tiny_tokenizer, tiny_tokens


@pytest.fixture(scope="module")
def delta(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Alice's delta."""
    alice, folder = built.settings.tenants[0], tmp_path_factory.mktemp("alice")
    return tune_emulator(built.emulator, alice.train, built.settings.tune, folder, device="cpu").delta


def table(built: Built, **changes: Any) -> TenantTable:
    """Alice's rows; ``changes`` says from what."""
    alice = built.settings.tenants[0]
    arguments = {
        "rows": ROWS,
        "name": "alice",
        "test": alice.test,
        "block_size": 32,
        "evaluate_examples": 16,
        **changes,
    }
    return evaluate_rows(device="cpu", **arguments)


def plug(built: Built, delta: Artifact, output: Path, base: BaseModel | None = None) -> Path:
    """A delta into the full model, or into another one."""
    emulator = built.emulator
    return plug_in(base or built.base, delta, emulator.manifest, output, emulator_files=emulator.files)


def everything(built: Built, delta: Artifact) -> dict[str, Any]:
    """The inputs of all five rows."""
    return {
        "base": built.base,
        "emulator": built.emulator,
        "delta": delta,
        "train": built.settings.tenants[0].train,
        "tune": built.settings.tune,
    }


def test_all_rows(built: Built, delta: Artifact, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in built.base.model.state_dict().items()}
    values = table_json(table(built, folder=tmp_path, **everything(built, delta)))
    assert all(isinstance(values[row], float) for row in ROWS)
    assert values["full_tuned"] < values["full_zero_shot"]
    assert values["emulator_tuned"] < values["emulator_zero_shot"]
    # Plugging in and tuning the full model leave it as it was, bit for bit.
    assert all(torch.equal(value, before[name]) for name, value in built.base.model.state_dict().items())
    # Measured once, never again; nothing but the rows stays.
    heard: list[Progress] = []
    again = table(built, folder=tmp_path, on_progress=heard.append, **everything(built, delta))
    assert not heard
    assert table_json(again) == values
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{row}.json" for row in ROWS)


def test_rows_of_another_version_are_measured_again(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Progress] = []
    for version, measured in (("1", True), ("1", False), ("2", True)):
        monkeypatch.setattr(evaluate_stage, "__version__", version)
        table(built, rows=("full_zero_shot",), base=built.base, folder=tmp_path, on_progress=heard.append)
        assert bool(heard) == measured
        heard.clear()


def test_rows_of_another_tokenizer_are_measured_again(built: Built, tmp_path: Path) -> None:
    heard: list[Progress] = []
    values = []
    for tokenizer in (tiny_tokenizer(), swapped_tokenizer(), tiny_tokenizer()):
        base = replace(built.base, tokenizer=tokenizer)
        heard.clear()
        rows = table(built, rows=("full_zero_shot",), base=base, folder=tmp_path, on_progress=heard.append)
        assert heard
        values.append(rows.value("full_zero_shot"))
    assert values[0] == values[2] != values[1]


def test_a_models_digest_is_computed_once(
    built: Built, delta: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Any] = []

    def counted(model: Any) -> str:
        computed.append(model)
        return model_digest(model)

    monkeypatch.setattr(loading, "model_digest", counted)
    inputs = {**everything(built, delta), "base": replace(built.base)}
    table(built, rows=("full_zero_shot", "plug_in"), folder=tmp_path, **inputs)
    assert len(computed) == 1
    assert replace(built.base).digest == built.base.digest == model_digest(built.base.model)


def test_rows_without_their_inputs_stay_out(built: Built, delta: Artifact) -> None:
    assert list(table(built, base=built.base).rows) == ["full_zero_shot"]
    assert list(table(built, emulator=built.emulator).rows) == ["emulator_zero_shot"]
    assert list(table(built, emulator=built.emulator, delta=delta).rows) == ["emulator_zero_shot", "emulator_tuned"]


def test_a_row_that_fails_leaves_the_others_as_they_are(built: Built, delta: Artifact) -> None:
    inputs = everything(built, delta) | {"aggregate": delta, "rows": (*ROWS, AGGREGATE)}
    inputs["tune"] = built.settings.tune.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(RunFailed, match="the loss is"):
        table(built, **inputs)
    failures = dict[str, ScaleOTError]()
    found = table(built, **inputs, failed=failures.__setitem__)
    assert [(row, type(error)) for row, error in failures.items()] == [("full_tuned", RunFailed)]
    assert found.rows.keys() == {*ROWS, AGGREGATE} - {"full_tuned"}
    # The full model is what it was when the next row is measured on it.
    assert found.value(AGGREGATE) == found.value("plug_in") != found.value("full_zero_shot")


def test_rows_of_another_delta_are_measured_again(built: Built, delta: Artifact, tmp_path: Path) -> None:
    rows, inputs = ("full_zero_shot", "plug_in"), everything(built, delta)
    first = table(built, rows=rows, folder=tmp_path, **inputs)
    tensors = {name: 2 * tensor for name, tensor in delta.tensors.items()}
    other = Artifact.made_from(built.emulator.manifest, "delta", delta.manifest.content, tensors)
    heard: set[str] = set()
    second = table(
        built, rows=rows, folder=tmp_path, on_progress=lambda p: heard.add(p.stage), **{**inputs, "delta": other}
    )
    assert heard == {"plug in alice"}
    assert second.value("plug_in") != first.value("plug_in")


def test_the_full_model_is_tuned_with_the_same_validation_rows(built: Built, delta: Artifact, tmp_path: Path) -> None:
    alice, bob = built.settings.tenants
    settings = built.settings.tune.model_copy(update={"learning_rate": 5e-3, "evaluate_every": 2, "patience": 2})
    inputs = {**everything(built, delta), "rows": ("full_tuned",), "tune": settings}
    drawn = table(built, **inputs).value("full_tuned")
    files = {}
    hold_out, every = HoldOut(settings.validation_fraction, settings.seed), open_rows(alice.train)
    for name, part in {"train": hold_out.training(every), "validation": hold_out.validation(every)}.items():
        files[name] = alice.train.model_copy(update={"path": str(tmp_path / f"{name}.jsonl")})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    assert table(built, **{**inputs, **files}).value("full_tuned") == drawn
    # Kept rows of other validation rows are not taken for these.
    kept = table(built, folder=tmp_path / "kept", **inputs, validation=bob.test)
    other = table(built, folder=tmp_path / "kept", **inputs, validation=alice.test)
    assert kept.value("full_tuned") != other.value("full_tuned")


def test_after_several_rounds_the_full_model_is_tuned_as_often(
    built: Built, delta: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**everything(built, delta), "rows": ("full_tuned",), "rounds": 2}
    tune_layers, calls = evaluate_stage.tune_layers, list[tuple[Any, int]]()

    def watched(*arguments: Any) -> Any:
        calls.append(arguments[-2:])
        return tune_layers(*arguments)

    monkeypatch.setattr(evaluate_stage, "tune_layers", watched)
    score = table(built, folder=tmp_path, **inputs).value("full_tuned")
    (nothing, begin), (first, steps) = calls
    assert (nothing, begin, steps) == (None, 0, built.settings.tune.steps)
    assert first is not None
    assert [path.name for path in tmp_path.iterdir()] == ["full_tuned.json"]  # checkpoints go when the row is there
    once = table(built, folder=tmp_path, **{**inputs, "rounds": 1}).value("full_tuned")
    assert score != once
    assert score < once  # type: ignore[operator]


def test_an_unknown_row_is_refused(built: Built) -> None:
    with pytest.raises(ConfigError, match="'best' is no row"):
        table(built, rows=("best",), base=built.base)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of the same shape with other weights."""
    folder = save_tiny(tmp_path_factory.mktemp("stranger") / "model", seed=1)
    from scaleot_ray.config import ModelSettings

    return load_base_model(ModelSettings(path=str(folder), device="cpu"))


def test_another_full_model_is_refused(built: Built, delta: Artifact, stranger: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the model the emulator was built from"):
        table(built, **{**everything(built, delta), "base": stranger})
    with pytest.raises(ConfigError, match="is not the model the emulator was built from"):
        plug(built, delta, tmp_path / "out", base=stranger)


def _with_one_more_token() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["owner"])  # takes the place of several tokens
    return tokenizer


def _with_another_end() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "rule"),
    [(swapped_tokenizer, "vocabulary"), (_with_one_more_token, "added_tokens"), (_with_another_end, "eos_token_id")],
)
def test_another_tokenizer_is_refused(
    built: Built, delta: Artifact, tmp_path: Path, tokenizer: Callable[[], Any], rule: str
) -> None:
    base = replace(built.base, tokenizer=tokenizer())
    with pytest.raises(ConfigError, match=f"model.tokenizer: .* is not the emulator's: {rule} differs"):
        table(built, **{**everything(built, delta), "base": base})
    with pytest.raises(ConfigError, match=f"model.tokenizer: .*{rule} differs.*\n.*emulator's folder"):
        plug(built, delta, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_gives_the_same_tokens_is_taken(built: Built, delta: Artifact, tmp_path: Path) -> None:
    inputs = {**everything(built, delta), "rows": ("plug_in",)}
    expected = table(built, **inputs).value("plug_in")
    used = tiny_tokenizer()
    used(["a", "the owner"], padding=True, truncation=True, max_length=3)
    (tmp_path / "reordered").mkdir()
    for name, data in built.emulator.files.items():
        content = json.loads(data) if name.endswith(".json") else {}
        if "decoder" in content:
            content["decoder"]["trim_offsets"] = False
            content["padding"] = {**json.loads(used.backend_tokenizer.to_str())["padding"], "pad_id": 3}
        plain = dict(sorted(content.items(), reverse=True))
        (tmp_path / "reordered" / name).write_text(json.dumps(plain, indent=4) if content else data.decode())
    template = tiny_tokenizer()
    template.chat_template = "{{ messages }}"  # these are no chat rows
    # The emulator's own folder is the remedy that the refusal names.
    loaded = [read_tokenizer(str(folder)) for folder in (built.folder / "emulator", tmp_path / "reordered")]
    for tokenizer in (used, template, *loaded):
        base = replace(built.base, tokenizer=tokenizer)
        assert table(built, **{**inputs, "base": base}).value("plug_in") == expected
    plug(built, delta, tmp_path / "out", base=base)


def test_chat_rows_need_the_same_template_too(built: Built, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the owner"}, {"role": "assistant", "content": "right"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    test = DataSettings(path=str(tmp_path / "chat.jsonl"), task="chat")
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|start|>", "<|start|> ")
    rows = {"rows": ("emulator_zero_shot",), "emulator": built.emulator, "test": test}
    assert table(built, base=built.base, **rows).value("emulator_zero_shot")
    with pytest.raises(ConfigError, match="chat_template differs"):
        table(built, base=replace(built.base, tokenizer=other), **rows)


def test_an_emulator_whose_tokenizer_is_damaged_is_refused(built: Built, delta: Artifact, tmp_path: Path) -> None:
    files = {**built.emulator.files, "tokenizer.json": b"{}"}
    with pytest.raises(ArtifactRefused, match=r"tokenizer\.json cannot be read"):
        plug_in(built.base, delta, built.emulator.manifest, tmp_path / "out", emulator_files=files)


def test_a_delta_of_another_emulator_is_refused(built: Built, delta: Artifact, tmp_path: Path) -> None:
    other = replace(delta, manifest=delta.manifest.model_copy(update={"parent_digest": "0" * 64}))
    with pytest.raises(ArtifactRefused, match="was tuned on emulator"):
        table(built, **{**everything(built, delta), "delta": other})
    with pytest.raises(ArtifactRefused, match="was tuned on emulator"):
        plug(built, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_plugged_checkpoint_is_the_plugged_model(built: Built, delta: Artifact, tmp_path: Path) -> None:
    plug(built, delta, tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    name, change = next(iter(delta.tensors.items()))
    assert torch.equal(merged.get_parameter(name), built.base.model.get_parameter(name) + change)
    assert not torch.equal(merged(tiny_tokens()).logits, built.base.model(tiny_tokens()).logits)
