import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaleot_ray.emulator.importance import LayerScores


@given(st.integers(1, 40), st.integers(2, 6), st.integers(0, 10))
def test_masks_replace_about_half_of_every_group(count, group_size, seed):
    scores = LayerScores(range(1, count + 1), group_size, seed=seed)
    mask = scores.sample()
    assert mask <= set(scores.middle)
    for group in scores.groups:
        replaced = sum(scores.middle[index] in mask for index in group)
        assert len(group) // 2 <= replaced <= (len(group) + 1) // 2


@pytest.mark.parametrize("fraction", [0.25, 0.3, 0.5, 0.8])
def test_the_masked_share_holds_on_average(fraction):
    scores = LayerScores(range(10), 4, fraction)
    replaced = [len(scores.sample()) for _ in range(2000)]
    assert sum(replaced) / len(replaced) == pytest.approx(10 * fraction, abs=0.15)


@pytest.mark.parametrize(("layers", "fraction"), [(12, 0.1), (6, 0.2), (4, 0.25), (1, 0.5), (30, 0.01)])
def test_a_mask_replaces_one_layer_at_least(layers, fraction):
    scores = LayerScores(range(layers), 4, fraction)
    assert all(scores.sample() for _ in range(300))


def test_a_single_layer_has_a_score():
    scores = LayerScores([1], 4)
    scores.start_from([0.3])
    assert scores.by_position() == {1: 0.0}
    assert scores.sample() == {1}


def test_masks_explore_and_low_scores_are_replaced_more_often():
    scores = LayerScores(range(8), 4, seed=1)
    scores.values = torch.tensor([2.0, 0, 0, -2, 2, 0, 0, -2], dtype=torch.float64)
    counts = torch.zeros(8)
    for _ in range(2000):
        for index in scores.sample():
            counts[index] += 1
    assert counts.min() > 0
    assert counts[3] > counts[1] > counts[0]


def _train(scores: LayerScores, worth: dict[int, float], steps: int, shuffle: bool = False) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        masks = [scores.sample() for _ in range(4)]
        losses = [3 + 0.01 * sum(worth[index] for index in mask) for mask in masks]
        if shuffle:
            losses = [losses[index] for index in torch.randperm(4, generator=generator).tolist()]
        scores.update(masks, losses, rate=1.0)


def _lowest_two(scores: LayerScores) -> set[int]:
    values = scores.by_position()
    return set(sorted(values, key=values.__getitem__)[:2])


@pytest.mark.parametrize("seed", range(3))
def test_scores_order_layers_by_what_their_loss_costs(seed):
    worth = {1: 1.0, 2: 0.1, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 7: 0.1, 8: 1.0}
    scores = LayerScores(tuple(worth), 4, seed=seed)
    _train(scores, worth, steps=80)
    assert _lowest_two(scores) == {2, 7}


def test_shuffled_rewards_do_not():
    worth = {1: 1.0, 2: 0.1, 3: 1.0, 4: 1.0, 5: 1.0, 6: 1.0, 7: 0.1, 8: 1.0}
    found = []
    for seed in range(6):
        scores = LayerScores(tuple(worth), 4, seed=seed)
        _train(scores, worth, steps=80, shuffle=True)
        found.append(_lowest_two(scores) == {2, 7})
    assert sum(found) <= 2


def test_equal_rewards_move_nothing():
    scores = LayerScores(range(1, 9), 4)
    scores.update([scores.sample() for _ in range(4)], [2.0] * 4, rate=1.0)
    assert scores.values.abs().max() == 0


def test_scores_start_from_single_layer_damage():
    scores = LayerScores((1, 2, 3, 4), 4)
    scores.start_from([0.5, 0.01, 0.2, 0.02])
    assert _lowest_two(scores) == {2, 4}
    assert scores.values.mean().item() == pytest.approx(0, abs=1e-9)
