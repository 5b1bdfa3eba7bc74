"""Server optimizers: the mean of a round's deltas as a gradient (Reddi et al., arXiv 2003.00295)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from scaleot_ray.checkpoints import read_state, write_state
from scaleot_ray.config import AggregationSettings
from scaleot_ray.errors import ArtifactRefused

_KEY = "scaleot-server"


@dataclass
class ServerState:
    """What a server optimizer keeps between rounds.

    Attributes:
        rounds: rounds so far.
        tensors: running values by name: ``momentum/<tensor>``, and for FedAdam ``variance/<tensor>``.
    """

    rounds: int
    tensors: dict[str, torch.Tensor]

    def write(self, path: Path) -> None:
        """Writes it as one file, whole or not at all; raises OSError."""
        write_state(path, self.tensors, _KEY, json.dumps({"rounds": self.rounds}))

    @classmethod
    def read(cls, path: Path) -> ServerState:
        """Reads what :meth:`write` wrote.

        Raises:
            ArtifactRefused: the file is damaged.
        """
        try:
            tensors, text = read_state(path, _KEY)
            return cls(int(json.loads(text)["rounds"]), tensors)
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise ArtifactRefused(
                f"{path}: the server optimizer's state cannot be read ({error}).",
                "Restore the file from a copy, or remove it: the optimizer then starts anew with this round.",
            ) from error


def server_step(
    settings: AggregationSettings, gradient: Mapping[str, torch.Tensor], state: ServerState | None
) -> tuple[dict[str, torch.Tensor], ServerState]:
    """One step: what is added to the aggregate so far, and the state after it.

    FedAvgM: m ← β·m + Δ, step η·m. FedAdam: m ← β₁·m + (1 − β₁)·Δ, v ← β₂·v + (1 − β₂)·Δ², step
    η·m / (√v + τ), without bias correction as in the paper.

    Args:
        settings: ``server`` is ``momentum`` or ``adam``.
        gradient: Δ, the round's combined delta, float64.
        state: of the round before; None in the first.

    Raises:
        ArtifactRefused: the state is of other tensors.
    """
    if state is None:
        prefixes = ("momentum/",) if settings.server == "momentum" else ("momentum/", "variance/")
        state = ServerState(
            0, {prefix + name: torch.zeros_like(value) for prefix in prefixes for name, value in gradient.items()}
        )
    step, tensors = {}, {}
    for name, delta in gradient.items():
        momentum, variance = state.tensors.get(f"momentum/{name}"), state.tensors.get(f"variance/{name}")
        if momentum is None or momentum.shape != delta.shape or (variance is None) != (settings.server == "momentum"):
            raise ArtifactRefused(
                f"The server optimizer's state does not fit {name!r}.",
                "Keep aggregation.server and tune.method over all rounds, or begin a new run.",
            )
        if variance is None:
            momentum = settings.server_momentum * momentum + delta
            step[name] = settings.server_learning_rate * momentum
        else:
            momentum = torch.lerp(delta, momentum, settings.server_momentum)
            variance = torch.lerp(delta.square(), variance, settings.server_beta2)
            step[name] = settings.server_learning_rate * momentum / (variance.sqrt() + settings.server_epsilon)
            tensors[f"variance/{name}"] = variance
        tensors[f"momentum/{name}"] = momentum
    return step, ServerState(state.rounds + 1, tensors)
