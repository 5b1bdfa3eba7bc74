"""One forward pass over public text, and what is kept of it: second moments, never the text.

Two things are watched. Residual statistics of each layer give harmonizers a closed-form start; input
moments E[x xᵀ] of each attention projection tell rank compression which directions its input uses.
Both are sums over tokens, so any amount of text streams through.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaleot_ray.data.batches import Batch
from scaleot_ray.emulator.closed_form import ResidualStatistics
from scaleot_ray.families import Family, hidden_size
from scaleot_ray.progress import OnProgress, ProgressMeter


@dataclass
class Calibration:
    """What one pass over public text leaves.

    Attributes:
        residuals: statistics of x and y − x, by layer.
        moments: E[x xᵀ] (in, in) of the input of attention projections, by layer and by the path of
            the first projection that has this input.
        leader: for every attention projection the path whose moment is also its own (query, key and
            value read the same input; it is kept once).
    """

    residuals: dict[int, ResidualStatistics]
    moments: dict[int, dict[str, torch.Tensor]]
    leader: dict[str, str]


def calibrate(
    model: nn.Module,
    family: Family,
    positions: Iterable[int],
    batches: Iterable[Batch],
    steps: int,
    on_progress: OnProgress | None = None,
    stage: str = "calibrate",
) -> Calibration:
    """Runs the model over ``steps`` public batches and watches the layers at ``positions``.

    Args:
        batches: ``input_ids`` and ``attention_mask`` (batch, time); padding does not count.
        stage: name of the work in progress reports.
    """
    layers, watched = family.layers(model), tuple(positions)
    device = next(model.parameters()).device
    residuals = {index: ResidualStatistics(hidden_size(model.config), device) for index in watched}
    inputs = _InputMoments()
    real = torch.empty(0, dtype=torch.bool)

    def watch_layer(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            residuals[index].update(hidden[real], family.layer_output(output)[real])

        return hook

    def watch_projection(index: int, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs.update(index, path, args[0], real)

        return hook

    handles = [layers[index].register_forward_hook(watch_layer(index), with_kwargs=True) for index in watched]
    for index in watched:
        for projection in family.attention:
            module = layers[index].get_submodule(projection.path)
            handles.append(module.register_forward_pre_hook(watch_projection(index, projection.path)))
    meter = ProgressMeter(stage, steps, on_progress)
    try:
        with torch.no_grad():
            for _, batch in zip(range(steps), batches, strict=False):
                ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                real = mask.bool()
                model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # type: ignore[operator]
                meter.advance(tokens=ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    return Calibration(residuals, inputs.means(), inputs.leader)


class _InputMoments:
    def __init__(self) -> None:
        self.leader: dict[str, str] = {}
        self._sums: dict[int, dict[str, torch.Tensor]] = {}
        self._tokens: dict[int, int] = {}
        self._latest: tuple[str, torch.Tensor] | None = None

    def update(self, index: int, path: str, x: torch.Tensor, real: torch.Tensor) -> None:
        """Adds a projection's input (batch, time, in), unless the projection before had the very same."""
        if self._latest is not None and self._latest[1] is x:
            self.leader[path] = self._latest[0]
            return
        self._latest = (path, x)
        self.leader[path] = path
        # Some families flatten (batch, time) before their projections.
        rows = x.detach().reshape(*real.shape, x.shape[-1])[real].float()
        sums = self._sums.setdefault(index, {})
        moment = rows.T @ rows
        sums[path] = sums[path] + moment if path in sums else moment
        if path == next(iter(sums)):
            self._tokens[index] = self._tokens.get(index, 0) + len(rows)

    def means(self) -> dict[int, dict[str, torch.Tensor]]:
        """E[x xᵀ] by layer and leading projection, on the CPU; the sums are not there any more."""
        return {
            index: {path: total.div_(self._tokens[index]).cpu() for path, total in sums.items()}
            for index, sums in self._sums.items()
        }
