"""Before a run on a cluster: model and data are looked at on the nodes that have them, and only there.

What a node tells us is a model's size, a tokenizer (which goes with the emulator anyway), the bytes of a
dataset and errors; no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from scaleot_ray.artifacts.audit import MODEL_OWNER, data_owner, evaluator
from scaleot_ray.config import RunSettings
from scaleot_ray.errors import ResourcesMissing
from scaleot_ray.families.size import ModelSize, model_size
from scaleot_ray.families.tokenizer import load_tokenizer, tokenizer_files
from scaleot_ray.resources.data_check import TenantCheck, check_public, model_tokenizer, tenant_checks
from scaleot_ray.resources.failure import actor_failure

AT_ONCE = 8
"""Looks under way at the same time; each has a process of its own on its node."""

_SECONDS = 300.0

Ask = Callable[[], ray.ObjectRef]


@dataclass(frozen=True)
class OwnerFacts:
    """What the model owner's node tells.

    Attributes:
        size: of the model.
        tokenizer: its files.
    """

    size: ModelSize
    tokenizer: dict[str, bytes]


def look_at_owner(settings: RunSettings) -> OwnerFacts:
    """Looks at model and public text on a node that may hold them.

    Raises:
        ConfigError, DataError: they are not there, or not what the settings say.
        ResourcesMissing: no node with its labels answers.
    """
    labels = settings.placement.owner_labels
    # Of the data owners it is told nothing.
    own = settings.model_copy(update={"tenants": ()})
    asked = partial(_look_at_owner.options(**_on(labels)).remote, own)
    facts: OwnerFacts = _answers({MODEL_OWNER: asked})[MODEL_OWNER]
    return facts


def look_at_tenants(settings: RunSettings, owner: OwnerFacts) -> dict[str, int]:
    """Looks at each data owner's datasets on a node with its labels; gives their bytes on disk.

    With evaluators, which hold the full model, also on a node that may have that: they read the same rows.

    Raises:
        ConfigError, DataError: they are not there, or not what the settings say.
        ResourcesMissing: no node with its labels answers.
    """
    asked, places = dict[str, Ask](), settings.placement
    for check in tenant_checks(settings):
        name = check.tenant.name
        ask = _look_at_tenant.options(**_on(check.tenant.node_labels)).remote
        asked[data_owner(name)] = partial(ask, check, owner)
        if settings.evaluator:
            ask = _look_at_tenant.options(**_on(places.owner_labels)).remote
            asked[evaluator(name)] = partial(ask, check, owner)
    found = _answers(asked)
    return {tenant.name: found[data_owner(tenant.name)] for tenant in settings.tenants}


@ray.remote(num_cpus=0, max_retries=2)
def _look_at_owner(settings: RunSettings) -> OwnerFacts:
    size, tokenizer = model_size(settings.model), model_tokenizer(settings.model)
    check_public(settings, size.context, tokenizer)
    return OwnerFacts(size, tokenizer_files(tokenizer))


@ray.remote(num_cpus=0, max_retries=2)
def _look_at_tenant(check: TenantCheck, owner: OwnerFacts) -> int:
    size = check.sources()
    check.rows(owner.size.context, load_tokenizer(owner.tokenizer))
    return size


def _on(labels: Mapping[str, str]) -> dict[str, Any]:
    return {"label_selector": dict(labels)} if labels else {}


def _answers(asked: Mapping[str, Ask]) -> dict[str, Any]:
    """What each says; so many are asked at a time that their processes, which claim nothing, fill no node's memory."""
    found, waiting = dict[str, Any](), iter(asked.items())
    answers = {role: ask() for role, ask in islice(waiting, AT_ONCE)}
    for role in asked:
        try:
            found[role] = ray.get(answers.pop(role), timeout=_SECONDS)
        except GetTimeoutError as error:
            raise ResourcesMissing(
                f"{role}: no node answered within {_SECONDS:g} seconds when asked for its data.",
                "Look with `ray status` whether a node with its labels (tenants.N.node_labels, placement.owner_labels) "
                "is there and alive.",
            ) from error
        except Exception as error:  # the task's own, or one of Ray's many
            raise actor_failure(error, role, None, Path()) from error
        answers |= {role: ask() for role, ask in islice(waiting, 1)}
    return found
