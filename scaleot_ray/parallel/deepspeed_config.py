"""The DeepSpeed configuration of stage 1: what the user's file says, as far as it agrees with our settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaleot_ray.config import ModelSettings, ParallelSettings, StageOneSettings
from scaleot_ray.errors import ConfigError
from scaleot_ray.parallel.zero import check_zero_section

KEY = "parallel.deepspeed"
_AUTO = "auto"  # what transformers' users write where a value follows from elsewhere
_OURS = {
    "optimizer": "stage 1 has its own, AdamW that leaves masked-out harmonizers alone (stage_one.learning_rate, "
    "stage_one.weight_decay)",
    "scheduler": "stage 1 has its own, a warm-up and half a cosine",
    "gradient_clipping": "stage 1 does not clip gradients, in one process or in many",
    **dict.fromkeys(
        ("amp", "torch_autocast", "data_types", "communication_data_type"),
        "the model has the type of model.dtype, and harmonizers are float32",
    ),
}
_BUCKET = 1 << 24
"""Numbers exchanged at once. By default DeepSpeed allocates buckets of 5e8, more than all harmonizers together have."""

_ONE_AHEAD = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")


def deepspeed_config(parallel: ParallelSettings, stage_one: StageOneSettings, model: ModelSettings) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    The frozen model has the type of ``model.dtype``, and harmonizers are at least float32 as in one process, so
    DeepSpeed's own mixed precision is off: ``fp16`` and ``bf16`` of the file are checked and left out.

    With ZeRO-3 DeepSpeed records the order in which layers are used and fetches ahead by it. Ours changes with the
    mask, in every step: what is fetched ahead would be layers of the mask before, and what is kept for its next use
    would stay for nothing. So both are off, and exactly the layers that run are gathered, when they do.

    Raises:
        ConfigError: the file cannot be read, has a key in ``zero_optimization`` that DeepSpeed does not know, or does
            not agree with the settings; names key and remedy.
    """
    if stage_one.batch_size % parallel.workers:
        raise ConfigError(
            f"stage_one.batch_size: {stage_one.batch_size} sequences cannot be shared evenly by {parallel.workers} "
            "workers (parallel.workers).",
            f"Set stage_one.batch_size to a multiple of {parallel.workers}, or parallel.workers to a divisor of it.",
        )
    if parallel.deepspeed is not None and not parallel.zero:
        raise ConfigError(
            f"{KEY}: {parallel.deepspeed} would have no effect, since with parallel.zero 0 the workers do without "
            "DeepSpeed.",
            "Set parallel.zero to 1, 2 or 3, or leave parallel.deepspeed out.",
        )
    given = _read(Path(parallel.deepspeed)) if parallel.deepspeed is not None else {}
    for key, why in _OURS.items():
        if given.pop(key, _AUTO) not in (_AUTO, None, 0, 0.0):
            raise ConfigError(f"{KEY}: {key} is set in {parallel.deepspeed}, but {why}.", f"Take {key} out of it.")
    _check_precision(given, parallel, model)
    config = {key: value for key, value in given.items() if value != _AUTO}
    agreed = {
        "train_batch_size": (stage_one.batch_size, "stage_one.batch_size"),
        "train_micro_batch_size_per_gpu": (
            stage_one.batch_size // parallel.workers,
            "stage_one.batch_size / parallel.workers",
        ),
        "gradient_accumulation_steps": (1, "stage 1, which does not accumulate"),
    }
    for key, (ours, setting) in agreed.items():
        _check_agrees(key, config.get(key, ours), ours, setting, parallel)
        config[key] = ours
    zero = {key: value for key, value in _section(config, "zero_optimization", parallel).items() if value != _AUTO}
    _check_agrees("zero_optimization.stage", zero.get("stage", parallel.zero), parallel.zero, "parallel.zero", parallel)
    for key in _ONE_AHEAD:
        _check_agrees(f"zero_optimization.{key}", zero.get(key, 0), 0, "stage 1, whose layers change", parallel)
    offload = _section(zero, "offload_param", parallel)
    if offload.get("device") == "nvme" and model.dtype != "float32":
        raise ConfigError(
            f"{KEY}: offload_param.device is nvme in {parallel.deepspeed}, where DeepSpeed has one type for all "
            f"weights: float32, as harmonizers have it, but model.dtype is {model.dtype}.",
            "Offload to memory (device: cpu), or set model.dtype to float32.",
        )
    buckets = {"reduce_bucket_size": _BUCKET, "allgather_bucket_size": _BUCKET}
    config["zero_optimization"] = buckets | zero | {"stage": parallel.zero} | dict.fromkeys(_ONE_AHEAD, 0)
    if parallel.zero:
        check_zero_section(config["zero_optimization"], f"{KEY}: zero_optimization in {parallel.deepspeed}")
    return {
        "steps_per_print": 1 << 40,
        **config,
        "gradient_clipping": 0.0,  # where nothing is said DeepSpeed clips at 1
        # Our optimizer is torch's AdamW with a mask; DeepSpeed knows it under no name.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{KEY}: {path} cannot be read ({error.strerror or error}).",
            "Give the path of a DeepSpeed configuration; cluster/deepspeed has examples.",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{KEY}: {path} is no JSON ({error}).", "Correct it where the message points.") from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{KEY}: {path} holds no JSON object.", "Give a DeepSpeed configuration; cluster/deepspeed has examples."
        )
    return found


def _section(config: dict[str, Any], key: str, parallel: ParallelSettings) -> dict[str, Any]:
    found = config.get(key, {})
    if not isinstance(found, dict):
        raise ConfigError(
            f"{KEY}: {key} in {parallel.deepspeed} is no object.", f'Write {{"{key}": {{…}}}}, or leave it out.'
        )
    return found


def _check_precision(given: dict[str, Any], parallel: ParallelSettings, model: ModelSettings) -> None:
    for key, dtype in (("fp16", "float16"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")):
        on = _section(given, key, parallel).get("enabled", _AUTO)
        given.pop(key, None)
        if on not in (_AUTO, False) and model.dtype != dtype:
            raise ConfigError(
                f"{KEY}: {key}.enabled in {parallel.deepspeed} asks for {dtype}, but model.dtype is {model.dtype}.",
                f"Set model.dtype to {dtype}, or take {key} out of the file.",
            )


def _check_agrees(key: str, found: Any, ours: int, setting: str, parallel: ParallelSettings) -> None:
    if found not in (ours, _AUTO):
        raise ConfigError(
            f"{KEY}: {key} is {found} in {parallel.deepspeed}, but {ours} by {setting}.",
            f"Take {key} out of the file, or set it to {ours}.",
        )
