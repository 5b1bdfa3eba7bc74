"""``lora``: low-rank updates of the attention and MLP projections inside the plug-in layers (PEFT)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ArtifactRefused
from scaleot_ray.families import Family, dense_weight
from scaleot_ray.tuning.delta import MethodSettings
from scaleot_ray.tuning.method import PlugInMethod, delta_dtype

# PEFT loads slowly, with every method it has and the trainers of transformers; every process of a run imports
# this file, and only those that attach pairs need PEFT.
if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"


class LowRank(PlugInMethod):
    """W + (alpha / rank) · B·A on every projection of the plug-in layers; B starts at zero.

    The factors are fp32 even where the weights are fp16 or bf16 (fp64 for an fp64 model). A fused
    projection (GPT-2 ``c_attn``, NeoX ``query_key_value``, Phi-3 ``qkv_proj``) gets one pair as a whole.
    """

    name: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 1e-3

    def __init__(self) -> None:
        super().__init__()
        self._targets: list[str] = []

    @staticmethod
    def settings(tune: TuneSettings, family: Family) -> MethodSettings:
        targets = [projection.path for projection in family.attention + family.mlp]
        return {"rank": tune.lora_rank, "alpha": float(tune.lora_alpha), "targets": targets}

    @staticmethod
    def shapes(
        model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, torch.Size]:
        rank, result = rank_of(settings), {}
        alpha_of(settings)
        for name in target_modules(family, positions, settings):
            out_features, in_features = dense_weight(_projection(model, name)).shape
            result[f"{name}.lora_A"] = torch.Size((rank, in_features))
            result[f"{name}.lora_B"] = torch.Size((out_features, rank))
        return result

    def _attach(
        self, model: nn.Module, family: Family, positions: tuple[int, ...], settings: MethodSettings
    ) -> dict[str, nn.Parameter]:
        from peft import inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = target_modules(family, positions, settings)
        dtypes = [dense_weight(_projection(model, name)).dtype for name in targets]
        dtype = delta_dtype(dtypes[0])
        self._targets = targets
        inject_adapter_in_model(peft_config(model, self._targets, settings), model, ADAPTER)
        parameters = {}
        for name in self._targets:
            layer = model.get_submodule(name)
            assert isinstance(layer, LoraLayer), f"PEFT left {name} as it was"
            for part, factor in (("lora_A", layer.lora_A[ADAPTER]), ("lora_B", layer.lora_B[ADAPTER])):
                factor.weight.data = factor.weight.data.to(dtype)
                factor.weight.requires_grad_(True)
                parameters[f"{name}.{part}"] = factor.weight
        return parameters

    def _load(self, tensors: Mapping[str, torch.Tensor], scale: float) -> None:
        for name, parameter in self.parameters.items():
            factor = scale if name.endswith(".lora_B") else 1.0
            parameter.copy_(tensors[name].to(parameter.device, parameter.dtype) * factor)

    def changes(self, values: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        values = self.parameters if values is None else values
        return {name: value.detach().clone() for name, value in values.items()}

    def _detach(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer

        for name in self._targets:
            layer = model.get_submodule(name)
            if isinstance(layer, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
        model.__dict__.pop("peft_config", None)  # PEFT leaves a copy of its settings on the model
        self._targets = []


def rank_of(settings: MethodSettings) -> int:
    """Rank r of a ``lora`` delta."""
    rank = settings.get("rank")
    if not isinstance(rank, int) or rank < 1:
        raise _refused("rank", rank, "a whole number above zero")
    return rank


def alpha_of(settings: MethodSettings) -> float:
    """alpha of a ``lora`` delta; B·A counts alpha / rank times."""
    alpha = settings.get("alpha")
    try:
        if isinstance(alpha, int | float) and 0 < float(alpha) < math.inf:
            return float(alpha)
    except OverflowError:  # a whole number beyond every float
        pass
    raise _refused("alpha", alpha, "a number above zero")


def target_modules(family: Family, positions: tuple[int, ...], settings: MethodSettings) -> list[str]:
    """Full names of the modules that carry a pair, e.g. ``model.layers.3.self_attn.q_proj``.

    Raises:
        ArtifactRefused: a target is no projection of the family.
    """
    targets = settings.get("targets")
    known = [projection.path for projection in family.attention + family.mlp]
    if not isinstance(targets, list) or not targets or not set(targets) <= set(known):
        raise ArtifactRefused(
            f"Delta (lora): targets {targets!r} are no projections of {family.name} ({', '.join(known)}).",
            "Use the delta with the model whose emulator it was tuned on.",
        )
    return [family.layer_prefix(position) + target for position in positions for target in targets]


def peft_config(model: nn.Module, targets: list[str], settings: MethodSettings) -> LoraConfig:
    """PEFT's settings of the same pairs, restricted to ``targets`` by full module names."""
    from peft import LoraConfig

    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
    return LoraConfig(
        r=rank_of(settings),
        lora_alpha=alpha_of(settings),
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def _projection(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear | Conv1D):
        raise ArtifactRefused(
            f"{name} is no plain projection in this model but a {type(module).__name__}.",
            "Plug-in layers must be those of the emulator, where they are raw.",
        )
    return module


def _refused(key: str, value: object, expected: str) -> ArtifactRefused:
    return ArtifactRefused(
        f"Delta (lora): setting {key!r} is {value!r}, expected {expected}.",
        "Take the delta as `scaleot tune` wrote it.",
    )
