"""What takes seconds to load is loaded by those who use it: every process of a run pays for what its role imports."""

from __future__ import annotations

from tests.cli.command import python

LOADED = """
import sys
import scaleot_ray.federation.roles.coordinator
print([name for name in ("peft", "transformers.modeling_utils") if name in sys.modules])
import scaleot_ray.federation.roles.evaluator, scaleot_ray.federation.roles.model_owner  # and the data owner's
print([name for name in ("peft",) if name in sys.modules])
"""


def test_no_role_loads_what_it_may_not_need() -> None:
    assert python("-c", LOADED).out.splitlines() == ["[]", "[]"]
