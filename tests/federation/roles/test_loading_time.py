"""What takes seconds to load is loaded by those who use it: every process of a run pays for what its role imports."""

from __future__ import annotations

import pytest

from tests.cli.command import python

PEFT, MODELS = "peft", "transformers.modeling_utils"


@pytest.mark.parametrize(("role", "unused"), [("coordinator", (PEFT, MODELS)), ("evaluator", (PEFT,))])
def test_no_role_loads_what_it_may_not_need(role: str, unused: tuple[str, ...]) -> None:
    # The evaluator's module imports the data owner's and the coordinator's.
    code = f"import sys, scaleot_ray.federation.roles.{role}; print([n for n in {unused} if n in sys.modules])"
    assert python("-c", code).out.strip() == "[]"
