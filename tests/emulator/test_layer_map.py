import pytest

from scaleot_ray.emulator.layer_map import (
    LayerRole,
    layer_map,
    middle_layers,
    plug_in_positions,
    positions,
    replaced_count,
)
from scaleot_ray.errors import ConfigError


def test_ends_layout_takes_the_first_and_last_layers():
    assert plug_in_positions(30, 4, "ends") == (0, 1, 28, 29)
    assert plug_in_positions(30, 3, "ends") == (0, 1, 29)
    assert plug_in_positions(30, 1, "ends") == (0,)


def test_spread_layout_covers_the_depth_as_crash_does():
    # CRaSh spreads its layers over OPT-1.3B's 24; the end points are always plug-in layers.
    assert plug_in_positions(24, 4, "spread") == (0, 8, 15, 23)
    assert plug_in_positions(30, 2, "spread") == (0, 29)
    for count in range(1, 29):
        assert len(set(plug_in_positions(30, count, "spread"))) == count


def test_last_layout_takes_the_last_layers():
    assert plug_in_positions(30, 4, "last") == (26, 27, 28, 29)
    assert plug_in_positions(30, 1, "last") == (29,)


@pytest.mark.parametrize(
    ("count", "alpha", "first"),
    [(4, 0.0, 13), (4, 0.25, 13), (4, 0.46, 13), (4, 0.5, 12), (4, 0.75, 5), (4, 0.96, 0), (4, 1.0, 0), (1, 0.25, 14)],
)
def test_block_layout_has_room_behind_it_for_all_that_is_replaced(count, alpha, first):
    found = plug_in_positions(30, count, "block", alpha)
    assert found == tuple(range(first, first + count))
    behind = 30 - 1 - (found[-1] + 1)  # the last layer stays
    assert behind >= replaced_count(30 - count, alpha) or first == 0


@pytest.mark.parametrize("count", [29, 30, 31, 100])
def test_too_many_plug_in_layers_name_the_key_and_the_limit(count):
    with pytest.raises(ConfigError, match=r"plug_in_layers.*\n.*at most 28"):
        plug_in_positions(30, count)


def test_middle_layers_and_plug_in_layers_make_the_whole():
    plug_in = plug_in_positions(30, 4)
    middle = middle_layers(30, plug_in)
    assert sorted((*plug_in, *middle)) == list(range(30))


@pytest.mark.parametrize(("alpha", "count"), [(0, 0), (0.01, 1), (0.25, 7), (0.5, 13), (1, 26)])
def test_alpha_counts_middle_layers_and_never_hides_less(alpha, count):
    assert replaced_count(26, alpha) == count


def test_roles_by_position_and_back():
    roles = layer_map(8, (0, 7), (2, 5))
    assert positions(roles, LayerRole.REPLACED) == (2, 5)
    assert positions(roles, LayerRole.PLUG_IN) == (0, 7)
    assert positions([role.value for role in roles], LayerRole.KEPT) == (1, 3, 4, 6)


def test_a_plug_in_layer_cannot_be_replaced():
    with pytest.raises(ValueError, match="plug-in"):
        layer_map(8, (0, 7), (0,))
