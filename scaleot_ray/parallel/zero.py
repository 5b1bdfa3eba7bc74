"""Harmonizers trained under DeepSpeed ZeRO (Rajbhandari et al., arXiv 1910.02054), in a process of a group.

ZeRO 1 and 2 spread moments and gradients of the harmonizers over the processes, which each hold all of the model.
ZeRO-3 spreads every parameter, those of the frozen model too: a layer's weights are gathered when it runs, in every
process at the same time, and freed behind it. Which layers run is decided by the mask, which is the same everywhere
(:class:`~scaleot_ray.ranks.Ranks` makes sure), so all processes ask for the same weights in the same order: nothing
hangs, and the layers that harmonizers stand in for are not gathered.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pydantic import ValidationError
from torch import distributed, nn

from scaleot_ray.emulator.harmonizer import Harmonizer, SwitchableLayer
from scaleot_ray.emulator.layer_replace_steps import MakeTraining
from scaleot_ray.emulator.masked_adam import MOMENTS, STEP, MaskedAdamW
from scaleot_ray.errors import ConfigError


def use_group() -> None:
    """DeepSpeed in the group that this process has joined.

    Raises:
        ConfigError: it is not installed.
    """
    # It would look for GPUs that this process was not given.
    os.environ["DS_ACCELERATOR"] = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    os.environ["LOCAL_RANK"] = "0"  # of the GPUs that this process sees there is one
    deepspeed = _deepspeed()
    # At every exchange, torch advises DeepSpeed's authors of new names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # An operation for inference that would be compiled for a minute when it starts, and hang where a process dies.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def under_zero(config: dict[str, Any]) -> MakeTraining:
    """Training as ``config`` says, a DeepSpeed configuration; the process is in a group."""

    def make(model: nn.Module, harmonizers: Mapping[int, Harmonizer], adam: MaskedAdamW) -> ZeroTraining:
        return ZeroTraining(model, harmonizers, adam, config)

    return make


def spread_over_group(model: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Leaves of each parameter this process's part on ``device``, or where ``config`` offloads it to (ZeRO-3).

    Parameters are taken one at a time: of a model that lies in files there is never more than that in memory.
    """
    deepspeed = _deepspeed()
    offload = config["zero_optimization"].get("offload_param") or {}
    deepspeed.zero.Init(module=model, config_dict_or_path=config, remote_device=offload.get("device"))
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(device)


class ZeroTraining:
    """See :class:`~scaleot_ray.emulator.layer_replace_steps.Training`.

    Args:
        model: with its switches in place; for ZeRO-3 spread already.
        harmonizers: in it.
        adam: their optimizer.
        config: DeepSpeed's.
    """

    def __init__(
        self, model: nn.Module, harmonizers: Mapping[int, Harmonizer], adam: MaskedAdamW, config: dict[str, Any]
    ) -> None:
        deepspeed = _deepspeed()
        self._model, self._harmonizers, self._adam = model, harmonizers, adam
        self.spread = config["zero_optimization"]["stage"] == 3
        self._engine = deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]
        # DeepSpeed takes moments for known that are there after the first update of a first group.
        adam.begin_moments()

    def step(self, loss: torch.Tensor) -> None:
        """Backward pass, mean over processes, update."""
        self._engine.backward(loss * self._adam.gradient_scale)
        self._engine.step()

    def harmonizers(self) -> dict[int, dict[str, torch.Tensor]]:
        """Gathered, on the CPU."""
        found = {}
        for index, module in self._harmonizers.items():
            with self._whole(module):
                found[index] = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        return found

    def moments(self) -> dict[str, torch.Tensor]:
        """Gathered, on the CPU."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found = {}
        for index, module in self._harmonizers.items():
            for name, parameter in module.named_parameters():
                prefix = f"{index}.{name}."
                found[prefix + STEP] = torch.tensor(float(self._adam.updates[index]))
                for key in MOMENTS:
                    value = safe_get_full_optimizer_state(parameter, key)
                    found[prefix + key] = value.detach().cpu().reshape(self._shape(parameter)).clone()
        return found

    def restore(self, moments: Mapping[str, torch.Tensor]) -> None:
        """Puts them back, to each process its part."""
        if not moments:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        self._update_nothing()
        for index, module in self._harmonizers.items():
            for name, parameter in module.named_parameters():
                prefix = f"{index}.{name}."
                self._adam.updates[index] = int(moments[prefix + STEP])
                for key in MOMENTS:
                    safe_set_full_optimizer_state(parameter, moments[prefix + key].to(self._engine.device), key)

    def _update_nothing(self) -> None:
        """A step without layers: until its first one DeepSpeed has no moments that could be set."""
        switches = [module for module in self._model.modules() if isinstance(module, SwitchableLayer)]
        for switch in switches:
            switch.replaced = True
        self._adam.prepare((), 0.0)
        ids = torch.zeros((1, 2), dtype=torch.int64, device=self._engine.device)
        self.step(self._model(input_ids=ids, use_cache=False).logits.sum() * 0.0)

    def _whole(self, module: nn.Module) -> AbstractContextManager[Any]:
        if not self.spread:
            return nullcontext()
        gathered: AbstractContextManager[Any] = _deepspeed().zero.GatheredParameters(list(module.parameters()))
        return gathered

    @staticmethod
    def _shape(parameter: Any) -> torch.Size:
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape


def check_zero_section(section: dict[str, Any], name: str) -> None:
    """Whether DeepSpeed knows all keys of a section ``zero_optimization``, and their values are in range.

    Raises:
        ConfigError: it does not, with ``name`` in front; or DeepSpeed is not installed.
    """
    _deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {where}: {first['msg']}.", f"Correct {where}, or take it out.") from error


def _deepspeed() -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise ConfigError(
            f"parallel: a group of workers trains under DeepSpeed, which is not there ({error}).",
            "Install it on every node: pip install 'scaleot_ray[deepspeed]'; or set parallel.zero to 0.",
        ) from error
    return deepspeed
