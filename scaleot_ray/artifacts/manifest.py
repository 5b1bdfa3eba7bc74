"""The manifest: what an artefact says about itself, and everything that is checked against it.

A manifest is plain JSON. Whoever builds one, from Python or from a file, goes through the checks
here: kinds, roles and types are closed lists, digests are hex, and no file name leads out of the
artefact's directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from scaleot_ray.artifacts.provenance import check_licence, check_model_name
from scaleot_ray.artifacts.raw_bytes import DTYPES
from scaleot_ray.artifacts.untrusted import is_finite_number, quoted
from scaleot_ray.errors import ArtifactRefused

SCHEMA_VERSION = 1
KINDS = ("emulator", "delta", "metrics")
ROLES = ("plug_in", "kept", "replaced", "dropped")

MANIFEST_FILE = "manifest.json"
CHECKSUM_FILE = "manifest.sha256"

Kind = Literal["emulator", "delta", "metrics"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,64}$")]
Version = Annotated[
    str,
    Field(pattern=r"^[0-9]{1,4}(\.[0-9]{1,4}){1,3}((a|b|rc)[0-9]{1,4})?(\.post[0-9]{1,4})?(\.dev[0-9]{1,4})?$"),
]

_FILE_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_CREATED = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?(Z|\+00:00)$"


_DIMENSIONS = 8
_COUNTS = 1 << 63
Count = Annotated[int, Field(ge=0, lt=_COUNTS)]
"""What is counted in a manifest: no more than torch and an operating system can count."""


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def _finite_number(what: str, value: Any) -> Any:
    if not is_finite_number(value):
        raise ArtifactRefused(
            f"{what} is {quoted(value)}, not a finite number.",
            "Leave out what could not be measured; find out why it is not finite where it could.",
        )
    return value


class TensorEntry(_Checked):
    """One tensor: its type (``float32`` …), shape, SHA-256 of its raw bytes, the file that holds it."""

    dtype: str
    shape: Annotated[list[Count], Field(max_length=_DIMENSIONS)]
    sha256: Digest
    file: str

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"{quoted(value)} is none of {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _can_be_made(self) -> TensorEntry:
        # Strides count dimensions of no values as one.
        if math.prod(max(size, 1) for size in self.shape) * DTYPES[self.dtype].itemsize >= _COUNTS:
            raise ValueError(f"shape {self.shape} has more bytes than any tensor")
        return self

    @property
    def parameters(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the raw values."""
        return self.parameters * DTYPES[self.dtype].itemsize


class FileEntry(_Checked):
    """One file that is no tensor file: its size and SHA-256."""

    bytes: Count
    sha256: Digest


class HarmonizerSpec(_Checked):
    """Shape of the harmonizers ``x + W_up · act(W_down x + b_d) + b_u``; ``rank`` is the rows of W_down."""

    rank: Annotated[Count, Field(ge=1)]
    activation: Word


class StageOneSpec(_Checked):
    """How stage 1 learnt harmonizers and scores: their ``start``, its ``objective``, harmonizer ``steps`` done.

    ``generated_tokens``: text that the model generated itself and that was used beside public text.
    """

    start: Word
    objective: Word
    steps: Count
    generated_tokens: Count = 0


class EmulatorContent(_Checked):
    """How an emulator was built and what it reveals (ScaleOT, arXiv 2412.09812).

    Attributes:
        plug_in_layers: N_a; ``alpha``: fraction of the middle layers replaced; ``beta``: rank reduction.
        layout: where the plug-in layers lie: ``ends``, ``spread``, ``last`` or ``block``.
        layer_map: one role per decoder layer: ``plug_in``, ``kept``, ``replaced`` or ``dropped``.
        full_parameters, full_bytes: size of the full model.
        verbatim_parameters: parameters of the full model that are in the emulator unchanged.
        base_digest: digest of the full model.
        full_loss, emulator_loss: nats per token on public held-out text.
        protected: False for one that was built to hide nothing; the gate never lets it pass.
        compression: what kept layers' attention is cut in rank by, ``activation_aware`` or ``svd``; None
            where nothing is cut.
        stage_one: None where the builder needs no stage 1.
        fit_tokens: tokens, of public and generated text, that the finished emulator was fitted on in order of depth; 0
            where it was not. ``fit_steps``: gradient steps of that fit for each kept layer's attention.
            Manifests of before have none of the four.
    """

    plug_in_layers: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(ge=0, le=1)]
    beta: Annotated[float, Field(ge=0, lt=1)]
    layout: Word
    layer_map: list[str]
    builder: Word
    harmonizer: HarmonizerSpec | None = None
    full_parameters: Annotated[Count, Field(ge=1)]
    verbatim_parameters: Count
    full_bytes: Annotated[Count, Field(ge=1)]
    base_digest: Digest
    full_loss: float | None = None
    emulator_loss: float | None = None
    protected: bool
    compression: Word | None = None
    stage_one: StageOneSpec | None = None
    fit_tokens: Count = 0
    fit_steps: Count = 0

    @field_validator("full_loss", "emulator_loss", mode="before")
    @classmethod
    def _finite(cls, value: Any, info: ValidationInfo) -> Any:
        return None if value is None else _finite_number(str(info.field_name), value)

    @model_validator(mode="after")
    def _consistent(self) -> EmulatorContent:
        unknown = sorted(set(self.layer_map) - set(ROLES))
        if unknown:
            raise ValueError(f"layer_map has the role {quoted(unknown[0])}; known are {', '.join(ROLES)}")
        count = self.layer_map.count("plug_in")
        if count != self.plug_in_layers:
            raise ValueError(f"plug_in_layers is {self.plug_in_layers}, but layer_map has {count} of them")
        if "replaced" in self.layer_map and self.harmonizer is None:
            raise ValueError("layer_map has replaced layers, but harmonizer is missing")
        if self.verbatim_parameters > self.full_parameters:
            raise ValueError("verbatim_parameters exceeds full_parameters")
        return self

    @property
    def plug_in_positions(self) -> tuple[int, ...]:
        """Indices of the plug-in layers P."""
        return tuple(index for index, role in enumerate(self.layer_map) if role == "plug_in")

    @property
    def verbatim_share(self) -> float:
        """Share of the full model's parameters that leave unchanged, 0 to 1."""
        return self.verbatim_parameters / self.full_parameters

    @property
    def loss_margin(self) -> float | None:
        """Emulator loss − full loss on public held-out text, nats per token; None where not measured."""
        if self.full_loss is None or self.emulator_loss is None:
            return None
        return self.emulator_loss - self.full_loss


class DeltaContent(_Checked):
    """What tuning changed in the plug-in layers.

    Attributes:
        method: ``layers``, ``lora`` or ``bottleneck``.
        positions: indices of the plug-in layers it belongs to.
        settings: the method's own numbers (lora: rank, alpha, targets; bottleneck: width, activation).
        start: digest of the delta that tuning began with, of an earlier round; None for the emulator as it
            was received. The delta is the whole change, what it began with included.
    """

    method: Word
    positions: list[Count]
    settings: dict[str, int | float | str | list[str]] = {}
    start: Digest | None = None


class MetricsContent(_Checked):
    """Numbers by name, nothing else."""

    values: dict[str, float]

    @field_validator("values", mode="before")
    @classmethod
    def _finite(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: _finite_number(f"metric {quoted(name)}", value) for name, value in values.items()}
        return values


Content = EmulatorContent | DeltaContent | MetricsContent
CONTENT: dict[str, type[EmulatorContent] | type[DeltaContent] | type[MetricsContent]] = {
    "emulator": EmulatorContent,
    "delta": DeltaContent,
    "metrics": MetricsContent,
}


class Manifest(_Checked):
    """What an artefact is: its kind, its content's description and a fingerprint of every part.

    Attributes:
        created: ISO 8601 in UTC; the one field that :meth:`digest` leaves out.
        model_config_json: the Hugging Face config's ``to_dict()``, so that a data owner can assemble
            the emulator from the artefact alone.
        dtype: type of most of its parameters.
        parent_digest: digest of the artefact it was made from (a delta's emulator).
        base_model, licence: name of the base model and its licence notice, see
            :mod:`~scaleot_ray.artifacts.provenance`; None where they are not known.
    """

    schema_version: Literal[1]
    kind: Kind
    library_version: Version
    created: Annotated[str, Field(pattern=_CREATED)]
    family: Word | None = None
    model_config_json: dict[str, Any] | None = None
    dtype: str | None = None
    content: Content
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    parent_digest: Digest | None = None
    base_model: str | None = None
    licence: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _checked_again(cls, value: Any) -> Any:
        # A content put together with model_copy(update=…) has skipped its own checks.
        return type(value).model_validate(value.model_dump()) if isinstance(value, _Checked) else value

    @field_validator("model_config_json")
    @classmethod
    def _plain_json(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        # Integer keys (id2label) and tuples become what JSON makes of them, else the digest of a
        # manifest would differ from that of its own file.
        return None if value is None else json.loads(json.dumps(value, allow_nan=False))

    @field_validator("base_model")
    @classmethod
    def _short_name(cls, value: str | None) -> str | None:
        if value is not None:
            check_model_name(value)
        return value

    @field_validator("licence")
    @classmethod
    def _short_notice(cls, value: str | None) -> str | None:
        if value is not None:
            check_licence(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if not isinstance(self.content, CONTENT[self.kind]):
            raise ValueError(f"kind is {self.kind!r}, but content describes something else")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype {quoted(self.dtype)} is none of {', '.join(DTYPES)}")
        for name, entry in self.tensors.items():
            if not _TENSOR_NAME.fullmatch(name) or name == "__metadata__":
                raise ArtifactRefused(f"tensor name {quoted(name)} is not allowed.", _NAMES_REMEDY)
            check_file_name(entry.file)
            if "/" in entry.file or not entry.file.endswith(".safetensors"):
                raise ArtifactRefused(
                    f"tensor {name!r}: its file {entry.file!r} is no .safetensors file beside the manifest.",
                    "Ask the sender for the artefact as scaleot_ray wrote it.",
                )
        for name in self.files:
            check_file_name(name)
        self._check_collisions()
        return self

    def _check_collisions(self) -> None:
        # Names that fall together on a file system that ignores case, or where one would be both a
        # file and a folder, make two parties see different artefacts.
        names = [MANIFEST_FILE, CHECKSUM_FILE, *{entry.file for entry in self.tensors.values()}, *self.files]
        seen = Counter(name.casefold() for name in names)
        for name in names:
            parents = name.casefold().split("/")[:-1]
            folders = ["/".join(parents[: depth + 1]) for depth in range(len(parents))]
            if seen[name.casefold()] > 1 or any(folder in seen for folder in folders):
                raise ArtifactRefused(f"file name {name!r} collides with another of the artefact.", _NAMES_REMEDY)

    def digest(self) -> str:
        """SHA-256 (hex) of the manifest as canonical JSON without ``created``; names the artefact."""
        values = self.model_dump(mode="json", exclude={"created"})
        content = values["content"]
        # Fields that came later count only where they say something: older artefacts keep their digests.
        for part, later in (
            (values, ("base_model", "licence")),
            (content, ("compression", "stage_one", "start", "fit_tokens", "fit_steps")),
            (content.get("stage_one") or {}, ("generated_tokens",)),
        ):
            for name in later:
                if part.get(name) in (None, 0):
                    part.pop(name, None)
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and files, without the manifest itself."""
        return sum(entry.nbytes for entry in self.tensors.values()) + sum(entry.bytes for entry in self.files.values())


_NAMES_REMEDY = "Letters, digits, '_', '.', '+' and '-' are allowed, with '/' between folders; refuse such an artefact."


def check_file_name(name: str) -> None:
    """Refuses a file name that could lead out of the artefact's directory.

    Raises:
        ArtifactRefused: it is absolute, has ``..``, a backslash or an unusual character.
    """
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
        raise ArtifactRefused(
            f"file name {quoted(name)} leads out of the artefact's directory.",
            "Do not use this artefact; ask its sender where it comes from.",
        )
    if len(parts) > 8 or not all(_FILE_NAME_PART.fullmatch(part) for part in parts):
        raise ArtifactRefused(f"file name {quoted(name)} is not allowed.", _NAMES_REMEDY)
