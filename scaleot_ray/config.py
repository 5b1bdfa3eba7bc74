"""Typed settings of every stage and of a whole run.

One YAML file describes a run; each section is one of the classes below and may be used alone from
Python. An unknown key is an error that names the nearest known one. Overrides of the form
``tune.learning_rate=5e-5`` reach any key.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scaleot_ray.errors import ConfigError
from scaleot_ray.result_folder import ResultFolder


def _number(value: Any) -> Any:
    # YAML 1.1 reads 5e-5 as a string; people write it as a number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Settings):
    """The base model: its weights, its tokenizer, the type its tensors are loaded as."""

    path: str = Field(description="Hugging Face directory or id, or a .gguf file")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="type the weights are loaded as"
    )
    tokenizer: str | None = Field(None, description="directory or id of the tokenizer; default: the model's own")
    device: str = Field(
        "auto",
        description="cpu, cuda, cuda:1 …; auto takes a GPU where there is one; in a run, cuda is the GPU that an actor "
        "is given by owner_gpus or tenants.N.gpus",
    )
    licence: str | None = Field(
        None, description="licence notice for the artefact's card; default: what the model says"
    )


class DataSettings(Settings):
    """A dataset and how its rows become tokens."""

    path: str = Field(description="file, folder of files, or a folder written by datasets.save_to_disk")
    format: Literal["auto", "text", "jsonl", "parquet", "arrow", "hf"] = Field(
        "auto", description="file format; auto goes by the file's ending"
    )
    task: Literal["text", "completion", "choice", "chat"] = Field(
        "text",
        description="text: every token counts; completion: loss on the completion only; choice: one right answer "
        "among several; chat: messages through the tokenizer's template, loss on the assistant's turns",
    )
    split: str | None = Field(None, description="split of a dataset folder that holds several")
    text_column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    messages_column: str = "messages"
    choices_column: str = "choices"
    label_column: str = Field("label", description="the right choice: its index from 0, its text or its letter")
    prompt_template: str | None = Field(
        None, description="for choice and completion: the prompt, with {column} for a column's value"
    )
    choices: tuple[str, ...] | None = Field(
        None, description="for choice: the same answers for every row, in the order of the labels"
    )
    max_examples: int | None = Field(None, ge=1, description="use at most so many rows")


class StageOneSettings(Settings):
    """Stage 1: harmonizers and layer scores by Dynamic LayerReplace (ScaleOT §3.2)."""

    harmonizer_rank: int = Field(128, ge=2, description="hidden units of a harmonizer, r in W_down ∈ R^{r×d}")
    activation: Literal["silu", "gelu", "relu", "identity"] = Field(
        "identity",
        description="identity: harmonizers are linear maps of rank harmonizer_rank, which emulator.fit_tokens fits "
        "anew; of others it keeps the hidden units that stage 1 trained, which pays where steps are many. silu: the "
        "paper's kind",
    )
    start: Literal["closed_form", "random"] = Field(
        "closed_form", description="closed_form: reduced-rank ridge regression; random: the paper's start"
    )
    start_tokens: int = Field(
        16384, ge=1, description="public tokens of the closed-form start and of activation-aware compression"
    )
    generated_tokens: int = Field(
        32768,
        ge=0,
        description="tokens of text that the model generates itself; every second batch of stage 1 and of the "
        "emulator's fit comes from it, since nobody knows the data owners' domains; 0: public text alone",
    )
    score_start: Literal["single_layer", "zero"] = Field(
        "single_layer",
        description="single_layer: from the damage of replacing each layer alone; zero: the paper's start",
    )
    ridge: Number = Field(1e-3, gt=0, description="ridge relative to the mean squared activation")
    objective: Literal["distill", "lm"] = Field(
        "distill", description="distill: KL to the full model's logits; lm: the paper's language-model loss"
    )
    steps: int = Field(20, ge=0, description="harmonizer (DL) steps")
    batch_size: int = Field(4, ge=1)
    block_size: int = Field(128, ge=8, description="tokens per sequence")
    learning_rate: Number = Field(1e-3, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    group_size: int = Field(4, ge=2, description="neighbouring middle layers per group")
    masked_fraction: Number = Field(
        0.5,
        gt=0,
        lt=1,
        description="share of every group that a sampled mask replaces; the paper's half prepares for any alpha, "
        "a share near the alpha to be built spends the steps on that",
    )
    score_every: int = Field(5, ge=1, description="harmonizer steps between two score (RL) steps")
    candidates: int = Field(4, ge=2, description="masks scored in one RL step, N_c")
    score_learning_rate: Number = Field(1.0, gt=0, description="η of the score update, on standardised rewards")
    shuffle_rewards: bool = Field(False, description="negative control: breaks the link from mask to reward")
    checkpoint_every: int = Field(
        20, ge=1, description="steps between two checkpoints; one is also written after every minute"
    )
    seed: int = 0

    def decisive(self) -> dict[str, Any]:
        """The keys that a result depends on, as plain values: equal ones give the same harmonizers and scores."""
        return self.model_dump(mode="json", exclude={"checkpoint_every"})  # changes when something is written, not what


class EmulatorSettings(Settings):
    """Stage 2: which emulator to build. Triplet (N_a, α, β) of ScaleOT, or one privacy level."""

    plug_in_layers: int = Field(
        4, ge=1, description="N_a, layers the data owner tunes; with 1 the model's last layer is never replaced"
    )
    layout: Literal["ends", "spread", "last"] = Field(
        "ends",
        description="where the plug-in layers are. ends: the first and last N_a/2 layers; spread: evenly over the "
        "depth (CRaSh); last: the last N_a layers",
    )
    alpha: Number = Field(0.5, ge=0, le=1, description="fraction of the middle layers that is replaced, rounded up")
    beta: Number = Field(0.8, ge=0, lt=1, description="rank reduction of the kept layers' attention weights")
    privacy: Literal["low", "medium", "high"] | None = Field(
        None, description="choose α and β from a minimum loss margin and a maximum verbatim share instead"
    )
    compression: Literal["activation_aware", "svd"] = Field(
        "activation_aware",
        description="activation_aware: least error on the inputs that public text causes; svd: the paper's "
        "(and what uniform_drop uses, which has seen no text)",
    )
    fit_tokens: int = Field(
        65536,
        ge=0,
        description="public tokens on which harmonizers and compressed attention are fitted once more, in order of "
        "depth, each on what the emulator itself passes on; 0: not at all, as in the paper",
    )
    fit_steps: int = Field(
        40,
        ge=0,
        description="of that fit: gradient steps for each kept layer's compressed attention, which then follows the "
        "full model's more closely; 0: closed form only",
    )
    builder: Literal["scaleot", "uniform_drop"] = "scaleot"
    allow_unprotected: bool = Field(
        False, description="build what hides nothing, for experiments; such an artefact is never sent"
    )

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> EmulatorSettings:
        beside = [name for name in ("alpha", "beta") if name in self.model_fields_set]
        if self.privacy is not None and beside:
            raise ValueError(
                f"privacy={self.privacy} chooses alpha and beta, but {' and '.join(beside)} "
                f"{'is' if len(beside) == 1 else 'are'} given too; leave out privacy, or alpha and beta"
            )
        return self


PAPER: dict[str, dict[str, Any]] = {
    "stage_one": {
        "activation": "silu",
        "start": "random",
        "score_start": "zero",
        "objective": "lm",
        "masked_fraction": 0.5,
        "generated_tokens": 0,
    },
    "emulator": {"layout": "ends", "compression": "svd", "fit_tokens": 0},
}
"""ScaleOT as its paper (arXiv 2412.09812) describes it; what it does not say (steps, rates, ranks) stays ours."""


class OwnerSettings(Settings):
    """What a model owner decides, whichever command builds the emulator."""

    model: ModelSettings
    public: DataSettings = Field(description="the model owner's public text: stage 1 and the loss margin")
    stage_one: StageOneSettings = StageOneSettings()
    emulator: EmulatorSettings = EmulatorSettings()
    recipe: Literal["default", "paper"] = Field(
        "default",
        description="paper: what stage_one and emulator do not say follows the ScaleOT paper instead of what was found "
        "to work best",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("recipe") != "paper":
            return values
        given = {name: values.get(name) or {} for name in PAPER}
        sections = {
            name: section.model_dump(exclude_unset=True) if isinstance(section, Settings) else section
            for name, section in given.items()
        }
        return {
            **values,
            **{name: {**PAPER[name], **found} for name, found in sections.items() if isinstance(found, dict)},
        }


class TuneSettings(Settings):
    """A data owner's tuning of the plug-in layers."""

    method: Literal["layers", "lora", "bottleneck"] = "layers"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: Number = Field(32.0, gt=0)
    bottleneck_width: int = Field(64, ge=1)
    steps: int = Field(100, ge=1, description="optimizer steps")
    batch_size: int = Field(4, ge=1, description="sequences per forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    block_size: int = Field(128, ge=8, description="tokens per sequence; longer ones are split (text) or refused")
    too_long: Literal["error", "truncate"] = Field(
        "error",
        description="prompt + completion rows longer than block_size: stop, or cut the prompt's start",
    )
    learning_rate: Number | None = Field(None, gt=0, description="default: 2e-4 for layers, 1e-3 for lora, bottleneck")
    weight_decay: Number = Field(0.0, ge=0)
    warmup_fraction: Number = Field(0.1, ge=0, le=1)
    max_grad_norm: Number = Field(1.0, gt=0)
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="arithmetic of the forward pass; weights keep the type they arrived in"
    )
    gradient_checkpointing: bool = False
    evaluate_every: int | None = Field(None, ge=1, description="steps between two evaluations on validation rows")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations without improvement, and take the weights of the best one",
    )
    validation_fraction: Number = Field(
        0.1,
        gt=0,
        lt=1,
        description="with evaluate_every and without validation rows of their own: share of the training rows "
        "(whole rows or documents, drawn by seed) that is kept out of training for them",
    )
    checkpoint_every: int = Field(
        50, ge=1, description="steps between two checkpoints; one is also written after every minute"
    )
    seed: int = 0

    def decisive(self) -> dict[str, Any]:
        """The keys that a result depends on, as plain values: equal ones give the same delta."""
        unused = {"checkpoint_every"}  # changes when something is written, not what
        if self.evaluate_every is None:
            unused.add("validation_fraction")
        return self.model_dump(mode="json", exclude=unused)


class TenantSettings(Settings):
    """One data owner of a run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
    train: DataSettings
    test: DataSettings
    validation: DataSettings | None = Field(
        None, description="rows for tune.evaluate_every; default: tune.validation_fraction of train"
    )
    cpus: int = Field(1, ge=1, description="processors it tunes with, and the evaluator measures its rows with")
    gpus: Number = Field(
        0.0, ge=0, le=1, description="one GPU (1) or a share of it, for the same; an actor computes on one GPU at most"
    )
    tune: TuneSettings | None = Field(
        None, description="keys that differ for this data owner; the others come from the run's tune section"
    )


class RunSettings(OwnerSettings):
    """A whole run in the environment ``local``: one owner, its emulator, several data owners."""

    tune: TuneSettings = TuneSettings()
    tenants: tuple[TenantSettings, ...] = Field(min_length=1)
    output: ResultFolder = Field(
        "scaleot-runs/run", description="folder of artefacts, audit log and report", validate_default=True
    )
    evaluator: bool = Field(
        False,
        description="declare an evaluator that holds the full model and the tenants' test data; "
        "without it the rows that need both secrets stay empty",
    )
    evaluate_examples: int | None = Field(
        None, ge=1, description="at most so many test rows or blocks per tenant, and so many for validation"
    )
    owner_cpus: int = Field(2, ge=1, description="processors the model owner builds with")
    owner_gpus: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="one GPU (1) or a share of it, that the model owner builds with; an actor computes on one GPU "
        "at most",
    )

    @model_validator(mode="after")
    def _distinct_tenants(self) -> RunSettings:
        names = [tenant.name for tenant in self.tenants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tenants: the name {twice[0]!r} is used twice; give each data owner its own name")
        return self

    @model_validator(mode="after")
    def _validation_is_used(self) -> RunSettings:
        for index, tenant in enumerate(self.tenants):
            if tenant.validation is not None and self.tune_of(tenant).evaluate_every is None:
                raise ValueError(
                    f"tenants.{index}.validation: nothing evaluates on these rows; "
                    "set tune.evaluate_every, or leave validation out"
                )
        return self

    @model_validator(mode="after")
    def _device_is_given(self) -> RunSettings:
        device, (kind, _, index) = self.model.device, self.model.device.partition(":")
        if kind == "cpu" and self.owner_gpus:
            raise ValueError(
                f"model.device is {device}, so the model owner does not use the GPU of owner_gpus; "
                "set owner_gpus to 0, or model.device to auto"
            )
        if kind != "cuda":
            return self
        if index not in ("", "0"):
            raise ValueError(
                f"model.device is {device}, but an actor of a run sees only the GPU that it is given, as cuda; "
                "set model.device to cuda, and choose the run's GPUs with the environment variable "
                "CUDA_VISIBLE_DEVICES"
            )
        # Whoever holds the full model: with no GPU of its own, it would fail when its turn comes.
        given = {"owner_gpus": self.owner_gpus}
        if self.evaluator:
            given |= {f"tenants.{number}.gpus": tenant.gpus for number, tenant in enumerate(self.tenants)}
        without = [key for key, gpus in given.items() if not gpus]
        if without:
            keys = " and ".join(without)
            holder = "the model owner" if without[0] == "owner_gpus" else "the evaluator"
            raise ValueError(
                f"model.device is {device}, but {keys} {'is' if len(without) == 1 else 'are'} 0, "
                f"so {holder} has no GPU for the full model; "
                f"set {keys} to 1 or to a share of a GPU, or model.device to auto, which takes the CPU where none is "
                "given"
            )
        return self

    def tune_of(self, tenant: TenantSettings) -> TuneSettings:
        """How a data owner tunes: the run's section, with the keys that the data owner's own section gives."""
        if tenant.tune is None:
            return self.tune
        return self.tune.model_copy(update={key: getattr(tenant.tune, key) for key in tenant.tune.model_fields_set})


Section = TypeVar("Section", bound=Settings)


def parse(section: type[Section], values: dict[str, Any], source: str = "settings") -> Section:
    """Values as a typed section.

    Args:
        section: the class to build, e.g. :class:`RunSettings`.
        values: nested plain values, as YAML or JSON gives them.
        source: the file or option the values come from, for messages.

    Raises:
        ConfigError: a key is unknown (with the nearest known one), missing, or its value is not
            what the key takes; the message has the full key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # A misspelt key is unknown and leaves the right one missing: the unknown one says more.
        errors = error.errors()
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            known = _known_keys(section, first["loc"][:-1])
            near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys there: {', '.join(sorted(known))}."
            raise ConfigError(f"{source}: unknown key {key!r}.", hint) from None
        if first["type"] == "missing":
            raise ConfigError(f"{source}: {key!r} is missing.", f"Add it: {_describe(section, first['loc'])}") from None
        if first["type"] == "value_error":  # of our own validators: problem; remedy
            problem, _, remedy = first["msg"].removeprefix("Value error, ").partition("; ")
            place = f"{source}: {key}" if first["loc"] else source
            way_out = f"{remedy[:1].upper()}{remedy[1:]}." if remedy else _describe(section, first["loc"])
            raise ConfigError(f"{place}: {problem}.", way_out) from None
        problem = f"{source}: {key}: {first['msg']}, found {first['input']!r}."
        raise ConfigError(problem, _describe(section, first["loc"])) from None


def load_yaml(section: type[Section], path: str | Path, overrides: Iterable[str] = ()) -> Section:
    """A section from a YAML file, with ``a.b=c`` overrides applied on top.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or :func:`parse` refuses its values.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).", "Give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text.", "Give the path of a YAML file.") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}.", "Correct the line it names.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no settings.", "A run file starts with 'model:', 'public:' and 'tenants:'.")
    return parse(section, override(values, overrides), str(path))


def override(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``values`` with each ``a.b=c`` set; list entries are reached by index (``tenants.0.name=x``).

    Raises:
        ConfigError: an override has no ``=``, or leads through something that is no section.
    """
    result = yaml.safe_load(yaml.safe_dump(values)) if values else {}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {item}: expected key=value.", "For example --set tune.learning_rate=5e-5.")
        place: Any = result
        *path, last = key.split(".")
        for part in path:
            place = _enter(place, part, key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {key}: {text!r} is not valid YAML.", "Put quotes around it.") from None
        if isinstance(place, list):
            place[_index(place, last, key)] = value
        elif isinstance(place, dict):
            place[last] = value
        else:
            raise ConfigError(f"--set {key}: there is no section to set {last!r} in.", "Check the dotted path.")
    return result


def _enter(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise ConfigError(f"--set {key}: {part!r} is not a section.", "Check the dotted path.")


def _index(place: list[Any], part: str, key: str) -> int:
    if part.isdigit() and int(part) < len(place):
        return int(part)
    raise ConfigError(f"--set {key}: {part!r} is no entry of a list of {len(place)}.", "Entries count from 0.")


def _section_at(section: type[BaseModel], location: Iterable[int | str]) -> type[BaseModel]:
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        inner = _settings_inside(section.model_fields[part].annotation)
        if inner is not None:
            section = inner
    return section


def _settings_inside(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _settings_inside(argument)
        if found is not None:
            return found
    return None


def _known_keys(section: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    return list(_section_at(section, location).model_fields)


def _describe(section: type[BaseModel], location: tuple[int | str, ...]) -> str:
    names = [part for part in location if isinstance(part, str)]
    if not names:
        return "Correct it."
    field = _section_at(section, location[:-1]).model_fields.get(names[-1])
    if field is None or not field.description:
        return f"Correct {names[-1]!r}."
    return f"{names[-1]}: {field.description}."
