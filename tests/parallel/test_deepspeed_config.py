"""A DeepSpeed configuration is passed on, as far as it agrees with the settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scaleot_ray.config import ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.parallel.deepspeed_config import deepspeed_config

EXAMPLES = sorted((Path(__file__).parents[2] / "cluster" / "deepspeed").glob("*.json"))


def made(content: Any = None, file: Path | None = None, dtype: str = "bfloat16", zero: int = 3) -> dict[str, Any]:
    """The configuration for two workers and batches of four."""
    if file is not None and content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    parallel = ParallelSettings(workers=2, zero=zero, deepspeed=None if file is None else str(file))
    return deepspeed_config(
        parallel,
        StageOneSettings(batch_size=4),
        ModelSettings(path="m", dtype=dtype),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_without_a_file_the_settings_say_it_all(zero: int) -> None:
    config = made(zero=zero)
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (4, 2)
    assert config["zero_optimization"]["stage"] == zero
    assert config["zero_optimization"]["stage3_prefetch_bucket_size"] == 0
    assert config["gradient_clipping"] == 0
    assert not {"fp16", "bf16"} & config.keys()  # the model has its type, harmonizers are float32


def test_everything_else_in_a_file_is_passed_on(tmp_path: Path) -> None:
    config = made(
        {
            "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}, "stage3_max_live_parameters": 5},
            "bf16": {"enabled": True},
            "train_batch_size": "auto",
            "gradient_accumulation_steps": 1,
            "gradient_clipping": "auto",
            "wall_clock_breakdown": True,
        },
        tmp_path / "ds.json",
    )
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert config["zero_optimization"]["stage3_max_live_parameters"] == 5
    assert config["wall_clock_breakdown"] is True
    assert config["train_batch_size"] == 4


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_taken(example: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    stage = json.loads(example.read_text())["zero_optimization"]["stage"]
    config = made(file=example, zero=stage, dtype="float32" if "nvme" in example.stem else "bfloat16")
    DeepSpeedZeroConfig(**config["zero_optimization"])  # an unknown key, or a value out of range, is an error there


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"zero2", "zero3", "zero3_offload_memory", "zero3_offload_nvme"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train_batch_size": 8}, "train_batch_size is 8"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2"),
        ({"zero_optimization": {"stage3_prefetch_bucket_size": 5}}, "stage3_prefetch_bucket_size is 5"),
        ({"zero_optimization": []}, "zero_optimization in"),
        ({"fp16": {"enabled": True}}, "asks for float16, but model.dtype is bfloat16"),
        ({"bf16": True}, "bf16 in"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is set"),
        ({"amp": {"enabled": True}}, "amp is set"),
        ({"communication_data_type": "fp16"}, "communication_data_type is set"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com: Extra inputs are not permitted"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "model.dtype is bfloat16"),
        ("{", "no JSON"),
        ("[]", "no JSON object"),
    ],
)
def test_what_does_not_agree_is_named(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        made(content, tmp_path / "ds.json")
    assert said in caught.value.problem
    assert "parallel.deepspeed" in caught.value.problem
    assert caught.value.remedy


def test_without_deepspeed_its_configuration_would_have_no_effect(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would have no effect"):
        made({}, tmp_path / "ds.json", zero=0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        made(file=tmp_path / "nowhere.json")


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_config(ParallelSettings(workers=3), StageOneSettings(batch_size=4), ModelSettings(path="m"))
    assert "stage_one.batch_size: 4 sequences cannot be shared evenly by 3 workers" in caught.value.problem
