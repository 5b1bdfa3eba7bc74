"""How long a data owner has tuned in a round."""

from __future__ import annotations

from tests.federation.driver.test_packs import owner


def test_attempts_of_a_round_count_together_and_waiting_does_not() -> None:
    tenant = owner("alice")
    tenant.begin_tuning(1, 100)
    assert tenant.tuned_for(107) == 7
    tenant.end_tuning(110)  # its process died
    assert (tenant.attempts, tenant.tuning, tenant.tuned_for(500)) == (1, None, 10)
    tenant.begin_tuning(1, 500)
    assert (tenant.attempts, tenant.tuned_for(505)) == (2, 15)
    tenant.end_tuning(506)
    tenant.end_tuning(900)  # has ended before
    assert tenant.tuned_for(900) == 16
    tenant.begin_round()
    assert (tenant.attempts, tenant.tuned_for(900)) == (0, 0)


def test_what_is_late_goes_on_counting_in_the_next_round() -> None:
    tenant = owner("alice")
    tenant.begin_tuning(1, 100)
    tenant.begin_round()
    assert tenant.tuned_for(140) == 40
