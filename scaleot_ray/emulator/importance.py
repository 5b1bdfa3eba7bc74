"""Layer importance by reinforcement learning: scores, sampled masks, rewards (ScaleOT §3.2).

Each middle layer has a score s_i; p_i = σ(s_i) is how much it wants to stay. Masks replace about half
of every group of neighbouring layers; a mask's reward is e^{−loss}. The update is the rule that the
same first author published for IST (arXiv 2410.11772).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerScores:
    """Scores of the middle layers.

    Args:
        middle: positions of the middle layers, in order.
        group_size: neighbouring layers per group.
        fraction: share of each group that a mask replaces.
        seed: of the generator that samples masks.
    """

    def __init__(self, middle: Sequence[int], group_size: int, fraction: float = 0.5, seed: int = 0) -> None:
        self.middle, self.fraction = tuple(middle), fraction
        self.values = torch.zeros(len(self.middle), dtype=torch.float64)
        self.groups = [
            list(range(start, min(start + group_size, len(self.middle))))
            for start in range(0, len(self.middle), group_size)
        ]
        self.generator = torch.Generator().manual_seed(seed)

    def sample(self) -> frozenset[int]:
        """A random mask: the positions to replace, the fraction (about half in the paper) of each group; one at least.

        Layers are drawn without return with probability proportional to σ(−s): low scores are
        replaced more often and every mask stays possible. Taking the lower half outright would
        never explore: all rewards would be equal and no score would move.
        """
        chosen: list[int] = []
        for group in self.groups:
            share = self.fraction * len(group)
            # What is left of a whole layer is a coin toss, so that the share holds on average.
            count = int(share) + int(torch.rand((), generator=self.generator).item() < share % 1)
            if count == 0:
                continue
            weights = torch.sigmoid(-self.values[group])
            drawn = torch.multinomial(weights, count, generator=self.generator)
            chosen.extend(group[index] for index in drawn.tolist())
        if not chosen:  # every toss said no; a mask that replaces nothing would train and tell nothing
            weights = torch.sigmoid(-self.values)
            chosen = torch.multinomial(weights, 1, generator=self.generator).tolist()
        return frozenset(self.middle[index] for index in chosen)

    def update(self, masks: Sequence[frozenset[int]], losses: Sequence[float], rate: float) -> None:
        """One score step from the held-out losses of sampled masks.

        s_i += η · mean_j r_j · p_i (1 − p_i) over the masks j that keep layer i raw, with r_j the
        reward e^{−L_j}, centred and scaled to unit deviation over the masks: rewards of one step
        differ by about 1e-3, and unscaled they would move nothing (the scaling is ours).

        Args:
            masks: positions replaced in each candidate.
            losses: nats per token, one for each mask.
            rate: η.
        """
        rewards = torch.exp(-torch.tensor(losses, dtype=torch.float64))
        deviation = rewards.std()
        if not deviation > 0:
            return
        rewards = (rewards - rewards.mean()) / deviation
        probability = torch.sigmoid(self.values)
        step = torch.zeros_like(self.values)
        for mask, reward in zip(masks, rewards, strict=True):
            kept = torch.tensor([index not in mask for index in self.middle])
            step += reward * kept
        self.values += rate * step / len(masks) * probability * (1 - probability)

    def start_from(self, damage: Sequence[float]) -> None:
        """Scores from the loss increase that each layer causes when it alone is replaced (ours).

        Standardised logarithms of the increase: few masks then suffice to refine the order. The score of a single
        layer is 0.
        """
        if len(damage) < 2:
            return
        increase = torch.tensor(damage, dtype=torch.float64).clamp_min(1e-5).log()
        self.values = (increase - increase.mean()) / increase.std().clamp_min(1e-9)

    def by_position(self) -> dict[int, float]:
        """Score of each middle layer."""
        return dict(zip(self.middle, self.values.tolist(), strict=True))
