"""Weights that stay in their files, and are in memory in float32 only while they are computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from scaleot_ray.families import Family


@contextmanager
def at_work(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """The modules' own parameters and buffers are on ``device``, floating ones in float32, while inside.

    Afterwards they are what they were before. Parameters that were put in their places meanwhile stay; what is in
    float32 on ``device`` already is not copied, and a tensor that several modules share is copied once.

    Args:
        modules: what they contain does not count; see :meth:`torch.nn.Module.modules`.
    """
    copies: dict[int, torch.Tensor] = {}
    swapped: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
    try:
        for module in modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for slots in tables:
                for name, value in slots.items():
                    if value is None:
                        continue
                    dtype = torch.float32 if value.is_floating_point() else value.dtype
                    if value.device == device and value.dtype == dtype:
                        continue
                    if id(value) not in copies:
                        wide = value.detach().to(device, dtype)
                        copies[id(value)] = nn.Parameter(wide, False) if isinstance(value, nn.Parameter) else wide
                    swapped.append((slots, name, value, copies[id(value)]))
                    slots[name] = copies[id(value)]
        yield
    finally:
        for slots, name, value, copy in swapped:
            if slots[name] is copy:
                slots[name] = value


@contextmanager
def front_at_work(model: Any, family: Family, device: torch.device) -> Iterator[None]:
    """What runs before and between the decoder layers is at work, but for embeddings.

    Of an embedding a few rows are read: it stays where it is, and what it gives is brought to ``device`` in float32.
    """

    def widened(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(device, torch.float32)

    def near(value: Any) -> Any:
        return value.cpu() if isinstance(value, torch.Tensor) else value

    def brought(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(near(value) for value in inputs), {name: near(value) for name, value in named.items()}

    others = outside_layers(model.base_model, family.layers(model))
    embeddings = [module for module in others if isinstance(module, nn.Embedding)]
    with ExitStack() as stack:
        for embedding in embeddings:
            for handle in (
                embedding.register_forward_pre_hook(brought, with_kwargs=True),
                embedding.register_forward_hook(widened),
            ):
                stack.callback(handle.remove)
        stack.enter_context(at_work([module for module in others if module not in embeddings], device))
        yield


@contextmanager
def head_at_work(model: Any, family: Family) -> Iterator[None]:
    """What runs behind the decoder layers, the head included, is at work on the CPU, and so is the front."""
    cpu, embedding = torch.device("cpu"), model.get_input_embeddings()
    others = [module for module in outside_layers(model, family.layers(model)) if module is not embedding]
    with front_at_work(model, family, cpu), at_work(others, cpu):
        yield


def outside_layers(model: nn.Module, layers: nn.ModuleList) -> list[nn.Module]:
    """All modules of a model but its decoder layers."""
    inside = {id(module) for module in layers.modules()}
    return [module for module in model.modules() if id(module) not in inside]
