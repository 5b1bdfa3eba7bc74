from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scaleot_ray import checkpoints
from scaleot_ray.errors import ConfigError, ResourcesMissing, RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.progress import Progress
from scaleot_ray.tuning import METHODS, Tuned, tune
from scaleot_ray.tuning.checkpoint import model_fingerprint, read_checkpoint
from tests.full_disk import largest_file
from tests.tiny_models import tiny_model, tiny_tokens
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_batches, tiny_settings


def run(model: Any, checkpoint: Path | None, data_seed: int = 0, stop_at: int | None = None, **options: Any) -> Tuned:
    """A run of 12 steps with dropout (gpt2), accumulation and evaluations; Ctrl-C after step ``stop_at``."""
    ids = tiny_tokens().to(model.device)

    def on_progress(progress: Progress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    resume, sign = options.pop("resume", True), options.pop("sign", 1)
    values = {"steps": 12, "accumulate": 2, "evaluate_every": 2, "patience": 3, "checkpoint_every": 3, **options}
    return tune(
        model,
        family_of(model.config),
        POSITIONS,
        tiny_batches(2, data_seed),
        tiny_settings(**values),
        evaluate=lambda: sign * model(ids, labels=ids).loss.item(),
        checkpoint=checkpoint,
        resume=resume,
        on_progress=on_progress,
    )


def stopped(model: Any, checkpoint: Path, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, checkpoint, **options)


def same(first: Tuned, second: Tuned) -> bool:
    one, two = first.delta.tensors, second.delta.tensors
    return first.history == second.history and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("method", "precision"),
    [
        *((method, "float32 weights") for method in METHODS),
        ("layers", "bfloat16 weights"),
        ("layers", "float16 weights"),
        ("lora", "bfloat16 arithmetic"),
    ],
)
def test_stopped_and_resumed_ends_bit_for_bit_where_an_uninterrupted_run_ends(
    method: str, precision: str, tmp_path: Path
) -> None:
    kind, _, what = precision.partition(" ")
    dtype = getattr(torch, kind) if what == "weights" else torch.float32
    options = {"method": method, "precision": "bfloat16" if what == "arithmetic" else "float32"}

    def model() -> Any:
        return tiny_model("gpt2").to(dtype)

    whole = run(model(), tmp_path / "whole", **options)
    interrupted = model()
    before = bits(interrupted)
    stopped(interrupted, tmp_path / "parts", stop_at=5, **options)
    assert all(torch.equal(value, before[name]) for name, value in bits(interrupted).items())
    stopped(model(), tmp_path / "parts", stop_at=9, **options)
    assert read_checkpoint(tmp_path / "parts").record["history"]["losses"] == whole.history.losses[:9]  # type: ignore[union-attr]
    assert same(whole, run(model(), tmp_path / "parts", **options))
    assert same(whole, run(model(), None, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.parametrize("left_out", ["value.", "best.", "random.", "optimizer."])
def test_every_part_of_the_checkpoint_counts(left_out: str, tmp_path: Path) -> None:
    """The check above can fail: with one part of the state put back wrongly the run ends elsewhere."""
    # Where a higher loss is "better", the best state is that of step 2.
    options = {"learning_rate": 0.05, "patience": 9, "sign": -1}
    whole = run(tiny_model("gpt2"), None, **options)
    assert whole.history.best is not None
    assert whole.history.best[0] == 2
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=6, **options)
    saved = read_checkpoint(path)
    assert saved is not None
    for name, tensor in saved.tensors.items():
        if name.startswith(left_out):
            saved.tensors[name] = torch.get_rng_state() if left_out == "random." else torch.zeros_like(tensor)
    saved.write(path)
    resumed = run(tiny_model("gpt2"), path, **options)
    assert not same(whole, resumed)


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    first = run(tiny_model("gpt2"), tmp_path / "checkpoint")
    reports: list[Progress] = []
    model = tiny_model("gpt2")
    again = tune(
        model,
        family_of(model.config),
        POSITIONS,
        tiny_batches(2),
        tiny_settings(steps=12, accumulate=2, evaluate_every=2, patience=3),
        evaluate=lambda: pytest.fail("evaluated again"),
        checkpoint=tmp_path / "checkpoint",
        on_progress=reports.append,
    )
    assert same(first, again)
    assert not reports


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 1e-3}, "tune.learning_rate was None, is 0.001"),
        ({"steps": 13}, "tune.steps was 12, is 13"),
        ({"method": "lora"}, "tune.method was 'layers', is 'lora'"),
        ({"data_seed": 1}, "its data are not these"),
        ({"model_seed": 1}, "model was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=4)
    written = path.read_bytes()
    seed = options.pop("model_seed", 0)
    with pytest.raises(ConfigError, match=message) as refused:
        run(tiny_model("gpt2", seed), path, **options)
    assert str(path) in refused.value.problem
    assert "delete the checkpoint" in refused.value.remedy
    assert path.read_bytes() == written


def test_how_often_it_is_written_may_change(tmp_path: Path) -> None:
    stopped(tiny_model("gpt2"), tmp_path / "checkpoint", stop_at=4)
    resumed = run(tiny_model("gpt2"), tmp_path / "checkpoint", checkpoint_every=5)
    assert same(resumed, run(tiny_model("gpt2"), None))


def test_a_run_shorter_than_its_checkpoints_are_apart_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=5, checkpoint_every=50)
    assert not path.exists()  # five quick steps are no loss
    monkeypatch.setattr(checkpoints, "LONGEST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "_WRITING_SHARE", float("inf"))
    stopped(tiny_model("gpt2"), path, stop_at=5, checkpoint_every=50)
    saved = read_checkpoint(path)
    assert saved is not None
    assert len(saved.record["history"]["losses"]) == 5
    assert same(run(tiny_model("gpt2"), path, checkpoint_every=50), run(tiny_model("gpt2"), None))


def test_without_resume_it_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=4)
    fresh = run(tiny_model("gpt2"), path, resume=False, learning_rate=1e-3)
    assert same(fresh, run(tiny_model("gpt2"), None, learning_rate=1e-3))


@pytest.mark.parametrize("damage", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "cut", "flipped"])
def test_a_damaged_checkpoint_is_refused(damage: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=4)
    whole = path.read_bytes()
    damages = {"cut": whole[:-100], "flipped": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]}
    path.write_bytes(damages[damage] if isinstance(damage, str) else damage)
    with pytest.raises(RunFailed, match="no readable checkpoint of a tuning run") as failed:
        run(tiny_model("gpt2"), path)
    assert "Delete it" in failed.value.remedy


def test_a_failed_run_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    options = {"evaluate_every": None, "patience": None, "learning_rate": 1e30, "checkpoint_every": 1}
    with pytest.raises(RunFailed, match="Step 2: the loss"):
        run(tiny_model("llama"), path, warmup_fraction=0, **options)
    saved = read_checkpoint(path)
    assert saved is not None
    assert len(saved.record["history"]["losses"]) == 1
    assert all(tensor.isfinite().all() for tensor in saved.tensors.values())
    with pytest.raises(RunFailed, match="Step 2: the loss"):
        run(tiny_model("llama"), path, warmup_fraction=0, **options)


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    stopped(tiny_model("gpt2"), path, stop_at=4)
    written = path.read_bytes()
    with largest_file(10_000), pytest.raises(ResourcesMissing, match="no room to write a checkpoint"):
        run(tiny_model("gpt2"), path)
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path]
    assert same(run(tiny_model("gpt2"), path), run(tiny_model("gpt2"), None))


@pytest.mark.parametrize("place", ["file/checkpoint", "folder"])
def test_a_place_that_cannot_be_written_is_said_before_the_first_step(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="a checkpoint cannot be written there"):
        run(tiny_model("gpt2"), tmp_path / place, stop_at=1)


def test_the_folder_is_made(tmp_path: Path) -> None:
    run(tiny_model("gpt2"), tmp_path / "run" / "one" / "checkpoint")
    assert read_checkpoint(tmp_path / "run" / "one" / "checkpoint") is not None


def test_fingerprint_tells_models_apart() -> None:
    model = tiny_model("llama")
    fingerprint = model_fingerprint(model)
    assert fingerprint == model_fingerprint(tiny_model("llama"))
    with torch.no_grad():
        weight = model.model.layers[3].mlp.up_proj.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    assert fingerprint != model_fingerprint(model)
    assert model_fingerprint(tiny_model("llama").bfloat16()) != fingerprint
