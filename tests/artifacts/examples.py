"""Small artefacts of every kind, made from the tiny models."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scaleot_ray.artifacts import Artifact, DeltaContent, EmulatorContent, HarmonizerSpec, Manifest, MetricsContent
from scaleot_ray.artifacts.manifest_json import render_manifest
from scaleot_ray.families import family_of, hidden_size
from tests.tiny_models import tiny_model

MAP = ["plug_in", "kept", "replaced", "kept", "replaced", "dropped", "kept", "plug_in"]
RANK = 4

model = functools.lru_cache(maxsize=None)(tiny_model)


def small() -> Artifact:
    """A delta-shaped artefact of a few hundred bytes with several types, a scalar and an empty tensor."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(3, 4, generator=generator),
        "b.weight": torch.randn(5, generator=generator).bfloat16(),
        "c.count": torch.tensor(7),
        "d.empty": torch.zeros(0, 3),
    }
    content = DeltaContent(method="layers", positions=[0, 7])
    return Artifact.create("delta", content, tensors, {"README.md": b"# card\n", "more/notes.txt": b"x"})


def emulator(name: str = "llama", layer_map: Sequence[str] = MAP, beta: float = 0.0, **content: Any) -> Artifact:
    """An emulator of a tiny model; with ``beta`` the kept layers' attention is factored at rank 2.

    Args:
        content: fields of :class:`EmulatorContent` that are to say something else.
    """
    full = model(name)
    family, width = family_of(full.config), hidden_size(full.config)
    own = dict(full.named_parameters())
    tensors, verbatim = {}, 0
    prefixes = [family.layer_prefix(index) for index in range(len(layer_map))]
    for parameter, value in own.items():
        layer = next((index for index, prefix in enumerate(prefixes) if parameter.startswith(prefix)), None)
        role = "outside" if layer is None else layer_map[layer]
        if role in ("replaced", "dropped"):
            continue
        path = parameter.removesuffix(".weight")
        if role == "kept" and beta and any(path.endswith(f".{projection.path}") for projection in family.attention):
            out_features, in_features = reversed(value.shape) if family.transposed else value.shape
            tensors[f"{path}.down"], tensors[f"{path}.up.0"] = torch.ones(2, in_features), torch.ones(out_features, 2)
            continue
        tensors[parameter] = value.detach()
        verbatim += value.numel()
    for index, role in enumerate(layer_map):
        if role == "replaced":
            for part, shape in {
                "down.weight": (RANK, width),
                "down.bias": (RANK,),
                "up.weight": (width, RANK),
                "up.bias": (width,),
            }.items():
                tensors[prefixes[index] + part] = torch.ones(shape)
    hidden = {"replaced", "dropped"} & set(layer_map)
    fields = {
        "plug_in_layers": list(layer_map).count("plug_in"),
        "alpha": 0.5,
        "beta": beta,
        "layout": "ends",
        "layer_map": list(layer_map),
        "builder": "scaleot",
        "harmonizer": HarmonizerSpec(rank=RANK, activation="silu") if "replaced" in layer_map else None,
        "full_parameters": sum(value.numel() for value in own.values()),
        "verbatim_parameters": verbatim,
        "full_bytes": sum(value.nbytes for value in own.values()),
        "base_digest": "0" * 64,
        "full_loss": 3.0,
        "emulator_loss": 4.25,
        "protected": bool(hidden),
    }
    return Artifact.create(
        "emulator",
        EmulatorContent(**{**fields, **content}),
        tensors,
        {"tokenizer.json": b"{}"},
        family.name,
        full.config.to_dict(),
        base_model="some/model",
        licence="Apache-2.0\nCopyright Somebody",
    )


def delta(parent: Manifest, method: str = "layers", **changes: Any) -> Artifact:
    """A delta of zeros on the emulator ``parent``.

    Args:
        changes: ``positions``, ``settings``, ``parent_digest``, ``family`` or ``tensors`` other than right;
            ``size``: the rank or width.
    """
    assert isinstance(parent.content, EmulatorContent)
    full = model({"neox": "neox", "gpt2": "gpt2"}.get(parent.family or "", "llama"))
    family, width = family_of(full.config), hidden_size(full.config)
    positions = changes.get("positions", parent.content.plug_in_positions)
    settings, tensors = {}, {}
    rank, narrow = changes.get("size", 3), changes.get("size", 5)
    for index in positions:
        prefix = family.layer_prefix(index)
        if method == "layers":
            tensors |= {name: torch.zeros(e.shape) for name, e in parent.tensors.items() if name.startswith(prefix)}
        elif method == "lora":
            target = family.attention[0].path
            settings = {"rank": rank, "alpha": 6.0, "targets": [target]}
            shape = parent.tensors[f"{prefix}{target}.weight"].shape
            out_features, in_features = reversed(shape) if family.transposed else shape
            tensors[f"{prefix}{target}.lora_A"] = torch.zeros(rank, in_features)
            tensors[f"{prefix}{target}.lora_B"] = torch.zeros(out_features, rank)
        else:
            settings = {"width": narrow, "activation": "gelu"}
            tensors[f"{prefix}bottleneck.down.weight"] = torch.zeros(narrow, width)
            tensors[f"{prefix}bottleneck.down.bias"] = torch.zeros(narrow)
            tensors[f"{prefix}bottleneck.up.weight"] = torch.zeros(width, narrow)
            tensors[f"{prefix}bottleneck.up.bias"] = torch.zeros(width)
    content = DeltaContent(method=method, positions=positions, settings=changes.get("settings", settings))
    return Artifact.create(
        "delta",
        content,
        {**tensors, **changes.get("tensors", {})},
        family=changes.get("family", parent.family),
        parent_digest=changes.get("parent_digest", parent.digest()),
        base_model=parent.base_model,
        licence=parent.licence,
    )


def metrics(values: Mapping[str, float] | None = None, parent: Manifest | None = None) -> Artifact:
    """Two numbers, measured on the emulator ``parent`` where there is one."""
    content = MetricsContent(values=dict(values or {"emulator_zero_shot": 2.5, "emulator_tuned": 2}))
    return Artifact.create("metrics", content, {}) if parent is None else Artifact.made_from(parent, "metrics", content)


def rewrite_manifest(directory: Path, manifest: Manifest) -> None:
    """Puts another manifest in place of an artefact's, without its checksum (as someone who edits it would)."""
    (directory / "manifest.json").write_bytes(render_manifest(manifest))
