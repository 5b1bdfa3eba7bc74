"""The card of an artefact: a short README that says what it is, where it comes from and what it reveals.

A card follows from the manifest alone, to the byte: whoever receives an artefact can tell that its card
says this and nothing else.
"""

from __future__ import annotations

from scaleot_ray.artifacts.artifact import Artifact
from scaleot_ray.artifacts.inspect import layer_picture, parameters_by_role
from scaleot_ray.artifacts.manifest import DeltaContent, EmulatorContent, Manifest, MetricsContent
from scaleot_ray.plain_text import plain_text

CARD_FILE = "README.md"
CARD_LIMIT = 64 << 10

_CUT = "\n\n[…] cut here: the rest is in the manifest.\n"


def with_card(artifact: Artifact) -> Artifact:
    """The artefact with its card, ``README.md``, in place of an earlier one."""
    return artifact.with_files({CARD_FILE: model_card(artifact.manifest).encode()})


def model_card(manifest: Manifest) -> str:
    """Markdown text of an artefact's card, at most ``CARD_LIMIT`` bytes; the files of ``manifest`` do not matter.

    What would steer a terminal on which it is read is replaced (:func:`~scaleot_ray.plain_text.plain_text`).
    """
    content = manifest.content
    if isinstance(content, EmulatorContent):
        title, parts = "Emulator", _emulator(manifest, content)
    elif isinstance(content, DeltaContent):
        title, parts = "Delta", _delta(manifest, content)
    else:
        title, parts = "Metrics", _metrics(manifest, content)
    name = f"`{manifest.base_model}`" if manifest.base_model is not None else "a model that is not named"
    notice = "\n".join(f"> {line}".rstrip() for line in (manifest.licence or "not stated").strip().splitlines())
    base = (
        f"Base model: {name} (family {manifest.family or 'not stated'}).\n"
        f"Its licence notice, which also applies to what is made from it:\n\n{notice}"
    )
    return _short(plain_text("\n\n".join([f"# {title} for {name}", base, *parts]) + "\n"))


def _emulator(manifest: Manifest, content: EmulatorContent) -> list[str]:
    triplet = f"({content.plug_in_layers}, {content.alpha:g}, {content.beta:g})"
    built = [
        f"- Builder `{content.builder}`, triplet (plug-in layers, α, β) = {triplet}, layout `{content.layout}`.",
    ]
    if content.harmonizer is not None:
        built.append(
            f"- Replaced layers have a harmonizer each: x + W_up · act(W_down x + b_d) + b_u, rank "
            f"{content.harmonizer.rank}, {content.harmonizer.activation}, fitted on the owner's public text."
        )
    if (learnt := _learnt(content)) is not None:
        built.append(f"- {learnt}")
    built.append(f"- {_loss(content)}")
    return [
        "## How it was built",
        "\n".join(built),
        f"Layers, from the input on:\n\n```\n{layer_picture(content.layer_map)}\n```",
        "## What it reveals",
        "\n".join(f"- {line}" for line in _revealed(manifest, content)),
        "## What it is for",
        "A data owner tunes the plug-in layers on it with data that stays at home, and returns only what changed "
        "(a delta). The delta then goes into the full model. The emulator is no replacement for the full model.",
    ]


def _learnt(content: EmulatorContent) -> str | None:
    parts = []
    if (stage_one := content.stage_one) is not None:
        parts.append(
            f"Stage 1: start `{stage_one.start}`, objective `{stage_one.objective}`, {stage_one.steps:,} steps."
        )
        if stage_one.generated_tokens:
            parts.append(f"Beside public text, {stage_one.generated_tokens:,} tokens that the model generated itself.")
    if content.compression is not None:
        parts.append(f"Rank compression: `{content.compression}`.")
    if content.fit_tokens:
        steps = f", with {content.fit_steps} gradient steps for each layer's attention" if content.fit_steps else ""
        parts.append(f"Fitted in order of depth on {content.fit_tokens:,} tokens{steps}.")
    return " ".join(parts) or None


def _loss(content: EmulatorContent) -> str:
    if content.full_loss is None or content.emulator_loss is None or content.loss_margin is None:
        return "Its loss on public text was not measured."
    return (
        f"Loss on public held-out text, nats per token: full model {content.full_loss:.3f}, "
        f"emulator {content.emulator_loss:.3f}, margin {content.loss_margin:+.3f}."
    )


def _revealed(manifest: Manifest, content: EmulatorContent) -> list[str]:
    counts = parameters_by_role(manifest)
    kept = [index for index, role in enumerate(content.layer_map) if role == "kept"]
    lines = [
        f"{100 * content.verbatim_share:.1f} % of the full model's parameters are in it verbatim "
        f"({content.verbatim_parameters:,} of {content.full_parameters:,}).",
        f"Embeddings, output head and final norm leave verbatim ({counts['outside_layers']:,} parameters).",
        f"Plug-in layers leave verbatim: {_numbers(content.plug_in_positions)} ({counts['plug_in']:,} parameters).",
    ]
    if kept and content.beta > 0:
        lines.append(
            f"Kept layers {_numbers(kept)}: attention weights are cut in rank by β = {content.beta:g}; "
            f"their MLP, norms and biases leave verbatim ({counts['kept']:,} parameters)."
        )
    elif kept:
        lines.append(f"Kept layers leave verbatim: {_numbers(kept)} ({counts['kept']:,} parameters).")
    if "replaced" in content.layer_map:
        lines.append("Of replaced layers nothing leaves but what a harmonizer learnt of their behaviour.")
    if "dropped" in content.layer_map:
        lines.append("Of dropped layers nothing leaves.")
    if not content.protected:
        lines.append("**It hides nothing and must not be sent**; it was built for an experiment.")
    lines.append(
        "A loss margin is no proof: whoever holds the emulator can go on training it on public text and win "
        "back part of what is missing."
    )
    return lines


def _delta(manifest: Manifest, content: DeltaContent) -> list[str]:
    settings = ", ".join(
        f"{key} {', '.join(value) if isinstance(value, list) else value}" for key, value in content.settings.items()
    )
    parameters = sum(entry.parameters for entry in manifest.tensors.values())
    return [
        "## How it was made",
        f"Plug-in layers {_numbers(content.positions)} tuned by the method `{content.method}`"
        + (f" ({settings})" if settings else "")
        + f" on emulator `{manifest.parent_digest}`"
        + (f", beginning with delta `{content.start}`, which it includes." if content.start else "."),
        "## What it reveals",
        f"{parameters:,} numbers that tuning on private data changed, and nothing else. Such numbers can still "
        "tell something about the data they were tuned on; this artefact claims no differential privacy.",
        "## What it is for",
        "It goes into the full model whose emulator it was tuned on, and into no other.",
    ]


def _metrics(manifest: Manifest, content: MetricsContent) -> list[str]:
    source = f" on emulator `{manifest.parent_digest}`" if manifest.parent_digest else ""
    shown = ", ".join(content.values) or "none"
    return [
        "## How it was made",
        f"Measured by the data owner on test rows of its own{source}.",
        "## What it reveals",
        f"{len(content.values)} numbers about these rows, and nothing else: {shown}.",
        "## What it is for",
        "It tells the model owner how well the tuning went.",
    ]


def _short(text: str) -> str:
    """``text`` as it is, or as much of it as a card may have."""
    data = text.encode()
    if len(data) <= CARD_LIMIT:
        return text
    return data[: CARD_LIMIT - len(_CUT.encode())].decode(errors="ignore") + _CUT


def _numbers(values: tuple[int, ...] | list[int]) -> str:
    """Layer numbers with runs drawn together, e.g. ``0-1, 5, 28-29``."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
