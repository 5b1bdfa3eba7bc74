"""A whole run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from scaleot_ray.config.aggregation import AggregationSettings
from scaleot_ray.config.inputs import DataSettings
from scaleot_ray.config.owner import OwnerSettings
from scaleot_ray.config.placement import Labels, PlacementSettings
from scaleot_ray.config.rounds import RoundSettings
from scaleot_ray.config.settings import Number, Settings
from scaleot_ray.config.tune import TuneSettings
from scaleot_ray.result_folder import ResultFolder, ResultPlace


class TenantSettings(Settings):
    """One data owner of a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$",
        description="at most 63 letters, digits, _, . and -, of which the first is a letter or digit; also the name "
        "of its folder",
    )
    train: DataSettings = Field(description="private rows to tune on")
    test: DataSettings = Field(description="private rows to measure on, before and after tuning")
    validation: DataSettings | None = Field(
        None, description="rows for tune.evaluate_every; default: tune.validation_fraction of train"
    )
    cpus: int = Field(1, ge=1, description="processors for its tuning, and for the evaluator of its rows")
    gpus: Number = Field(
        0.0, ge=0, le=1, description="one GPU (1) or a share of one, for the same; an actor uses at most one GPU"
    )
    memory_gb: Number | None = Field(
        None, gt=0, description="memory requested for its part, in 10^9 bytes; default: estimated from model and batch"
    )
    node_labels: Labels = Field(
        {}, description="on a cluster: labels (ray start --labels key=value) of the nodes that have its data"
    )
    deadline: Number | None = Field(
        None,
        gt=0,
        description="seconds that its tuning may take in a round, all attempts together; the round then goes on "
        "without it",
    )
    weight: Number = Field(
        1.0,
        ge=0,
        description="of its delta in the aggregate, e.g. its number of rows; 0: it enters no aggregate and has only "
        "its own plug-in",
    )
    tune: TuneSettings | None = Field(
        None, description="keys that differ for this data owner; the others come from the run's tune section"
    )


class RunSettings(OwnerSettings):
    """A whole run: one owner, its emulator, several data owners."""

    environment: Literal["local", "cluster"] = Field(
        "local",
        description="local: all on this machine; cluster: on any node of the Ray that RAY_ADDRESS names, or that the "
        "job was submitted to",
    )
    placement: PlacementSettings = Field(
        PlacementSettings(), description="where parts go on a cluster, and how long they wait for room"
    )
    tune: TuneSettings = Field(TuneSettings(), description="how data owners tune the plug-in layers")
    rounds: RoundSettings = Field(
        RoundSettings(), description="how often data owners tune, and how long they are waited for"
    )
    aggregation: AggregationSettings | None = Field(
        None, description="also combine all data owners' deltas into one plug-in; without it each only has its own"
    )
    tenants: tuple[TenantSettings, ...] = Field(
        min_length=1, description="data owners, one or more; each has a section of its own, as below"
    )
    output: ResultFolder = Field(
        "scaleot-runs/run", description="folder of artefacts, audit log and report", validate_default=True
    )
    tenants_at_once: int | None = Field(
        None, ge=1, description="at most so many data owners tune at the same time; default: as many as fit"
    )
    tenants_per_process: int = Field(
        1,
        ge=1,
        description="at most so many data owners with tune.method=lora share one process and one pass through the "
        "emulator's frozen weights (packed), provided that their cpus, gpus and node_labels are the same "
        "and their memory together fits",
    )
    evaluator: bool = Field(
        False,
        description="declare an evaluator that holds the full model and the tenants' test data; "
        "without it the rows that need both secrets stay empty",
    )
    registry: str | None = Field(
        None,
        description="folder of the registry, on a local disk of the job's node; default: coordinator/ in output",
    )
    artifacts: ResultPlace | None = Field(
        None,
        description="folder or URI (s3://bucket/folder, gs://, abfss://, hdfs://, file:///) that accepted deltas and "
        "aggregates are kept in; default: coordinator/ in output",
    )
    evaluate_examples: int | None = Field(
        None, ge=1, description="at most so many test rows or blocks per tenant, and so many for validation"
    )
    owner_cpus: int = Field(2, ge=1, description="processors for the model owner's build")
    owner_gpus: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="one GPU (1) or a share of one for the model owner's build; an actor uses at most one GPU",
    )

    @model_validator(mode="after")
    def _distinct_tenants(self) -> RunSettings:
        names = [tenant.name for tenant in self.tenants]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"tenants: the name {twice[0]!r} is used twice; give each data owner its own name")
        return self

    @model_validator(mode="after")
    def _placement_has_nodes(self) -> RunSettings:
        labelled = [f"tenants.{index}.node_labels" for index, tenant in enumerate(self.tenants) if tenant.node_labels]
        asked = [*labelled, *(["placement"] if self.placement != PlacementSettings() else [])]
        if asked and self.environment == "local":
            raise ValueError(
                f"{asked[0]} is about a cluster's nodes, but the environment is local; set environment to cluster, or "
                f"leave {asked[0]} out"
            )
        return self

    @model_validator(mode="after")
    def _packs_share(self) -> RunSettings:
        methods = {tenant.name: self.tune_of(tenant).method for tenant in self.tenants}
        name = next((name for name, method in methods.items() if method != "lora"), None)
        if self.tenants_per_process > 1 and name is not None:
            raise ValueError(
                f"tenants_per_process is {self.tenants_per_process}, but {name} tunes with {methods[name]}: only "
                "low-rank pairs stand beside frozen weights that others share; set tune.method to lora, or leave "
                "tenants_per_process out"
            )
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> RunSettings:
        if self.rounds.count > 1 and self.aggregation is None:
            raise ValueError(
                f"rounds.count is {self.rounds.count}, but without aggregation a round has nothing to begin with; "
                "add a section aggregation (aggregation: {method: mean}), or leave rounds.count out"
            )
        if self.rounds.quorum is not None and self.rounds.quorum > len(self.tenants):
            raise ValueError(
                f"rounds.quorum is {self.rounds.quorum}, but there are {len(self.tenants)} data owners; "
                f"set it to {len(self.tenants)} or less"
            )
        if self.aggregation is not None and not sum(tenant.weight for tenant in self.tenants):
            raise ValueError("the weights of all tenants are 0, so no delta counts; give one of them a weight above 0")
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
