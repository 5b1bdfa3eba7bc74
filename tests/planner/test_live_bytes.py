"""Bytes of living tensors, counted as they come and go, whether they are real or fake."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from scaleot_ray.planner.live_bytes import LiveBytes, peak_bytes

_MATRIX = 4 * 100 * 100


def test_what_has_gone_does_not_count() -> None:
    def work() -> None:
        first = torch.zeros(100, 100)
        second = first + 1
        del first
        second * 2

    assert peak_bytes(work) == 2 * _MATRIX


def test_views_and_what_was_there_before_do_not_count() -> None:
    before = torch.zeros(100, 100)

    def work() -> None:
        before.view(-1).add_(1)
        before.t().unsqueeze(0)

    assert peak_bytes(work) == 0


def test_what_stays_is_still_counted() -> None:
    kept = []
    with LiveBytes() as counted:
        kept.append(torch.zeros(100, 100))
        kept.append(kept[0].t())
    assert counted.live == _MATRIX


def test_a_training_step_takes_the_same_real_and_fake() -> None:
    def step() -> None:
        layer, x = nn.Linear(100, 100, bias=False), torch.ones(100, 100)
        layer(x).relu().square().sum().backward()

    real = peak_bytes(step)
    with FakeTensorMode():
        assert peak_bytes(step) == real > 3 * _MATRIX


def test_tensors_without_storage_do_not_count() -> None:
    assert peak_bytes(lambda: torch.zeros(100, 100, device="meta")) == 0
