"""Settings: what is refused says which key and what to do; what people write is understood."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scaleot_ray.cli.settings import BuildSettings, TuneCommandSettings
from scaleot_ray.config import (
    DataSettings,
    EmulatorSettings,
    ModelSettings,
    OwnerSettings,
    RunSettings,
    Settings,
    StageOneSettings,
    TuneSettings,
    load_yaml,
    override,
    parse,
)
from scaleot_ray.errors import ConfigError
from tests.cli.command import PROJECT


def run_values() -> dict[str, Any]:
    return {
        "model": {"path": "model"},
        "public": {"path": "public.txt"},
        "tenants": [
            {"name": "alice", "train": {"path": "a.jsonl"}, "test": {"path": "a-test.jsonl"}},
            {"name": "bob", "train": {"path": "b.jsonl"}, "test": {"path": "b-test.jsonl"}},
        ],
    }


def test_defaults_make_a_run() -> None:
    settings = parse(RunSettings, run_values())
    assert settings.tune.steps == 100
    assert settings.evaluator is False
    assert [tenant.name for tenant in settings.tenants] == ["alice", "bob"]


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"tune": {"learning_rte": 1e-4}}, "tune.learning_rte", "learning_rate"),
        ({"emulatr": {}}, "emulatr", "emulator"),
        ({"stage_one": {"harmoniser_rank": 8}}, "stage_one.harmoniser_rank", "harmonizer_rank"),
        ({"model": {"path": "m", "dtyp": "float32"}}, "model.dtyp", "dtype"),
    ],
)
def test_unknown_key_names_the_nearest(values: dict[str, Any], key: str, near: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(RunSettings, {**run_values(), **values}, "run.yaml")
    assert caught.value.problem == f"run.yaml: unknown key {key!r}."
    assert caught.value.remedy == f"Did you mean {near!r}?"
    assert caught.value.exit_code == 2


def test_unknown_key_inside_a_list_entry() -> None:
    values = run_values()
    values["tenants"][1]["train"]["promt_column"] = "question"
    with pytest.raises(ConfigError) as caught:
        parse(RunSettings, values, "run.yaml")
    assert "'tenants.1.train.promt_column'" in caught.value.problem
    assert "'prompt_column'" in caught.value.remedy


def test_unknown_key_without_a_neighbour_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(ModelSettings, {"path": "m", "zzzzzz": 1}, "m.yaml")
    assert "Known keys there: device, dtype" in caught.value.remedy


def test_missing_key_says_what_it_is() -> None:
    values = run_values()
    del values["public"]
    with pytest.raises(ConfigError) as caught:
        parse(RunSettings, values, "run.yaml")
    assert caught.value.problem == "run.yaml: 'public' is missing."
    assert "public text" in caught.value.remedy

    values = run_values()
    del values["tenants"][1]["test"]["path"]
    with pytest.raises(ConfigError, match=r"'tenants\.1\.test\.path' is missing"):
        parse(RunSettings, values, "run.yaml")


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (EmulatorSettings, {"alpha": 2}, "alpha"),
        (EmulatorSettings, {"alpha": -0.1}, "alpha"),
        (EmulatorSettings, {"beta": 1}, "beta"),
        (EmulatorSettings, {"beta": float("nan")}, "beta"),
        (TuneSettings, {"learning_rate": float("inf")}, "learning_rate"),
        (EmulatorSettings, {"plug_in_layers": 0}, "plug_in_layers"),
        (EmulatorSettings, {"layout": "middle"}, "layout"),
        (EmulatorSettings, {"privacy": "extreme"}, "privacy"),
        (TuneSettings, {"steps": 0}, "steps"),
        (TuneSettings, {"steps": 1.5}, "steps"),
        (TuneSettings, {"learning_rate": "fast"}, "learning_rate"),
        (TuneSettings, {"learning_rate": 0}, "learning_rate"),
        (TuneSettings, {"method": "prefix"}, "method"),
        (StageOneSettings, {"harmonizer_rank": "many"}, "harmonizer_rank"),
        (DataSettings, {"path": "x", "task": "translation"}, "task"),
        (ModelSettings, {"path": "x", "dtype": "int4"}, "dtype"),
    ],
)
def test_values_out_of_range_are_refused_by_key(section: Any, values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(section, values, "settings")
    assert caught.value.problem.startswith(f"settings: {key}: ")
    assert f"found {values[key]!r}" in caught.value.problem
    assert caught.value.remedy.startswith(key) or repr(key) in caught.value.remedy


def test_two_tenants_of_one_name_are_refused() -> None:
    values = run_values()
    values["tenants"][1]["name"] = "alice"
    with pytest.raises(ConfigError, match="'alice' is used twice"):
        parse(RunSettings, values)


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a b", ".hidden", "x" * 64])
def test_tenant_names_are_file_names(name: str) -> None:
    values = run_values()
    values["tenants"][0]["name"] = name
    with pytest.raises(ConfigError, match=r"tenants\.0\.name"):
        parse(RunSettings, values)


def test_a_run_needs_a_tenant() -> None:
    with pytest.raises(ConfigError, match="tenants"):
        parse(RunSettings, {**run_values(), "tenants": []})


class TestGpus:
    """What cannot come out well is refused by key before anything starts, not by an actor after stage 1."""

    def run(self, device: str, owner: float, alice: float, bob: float, evaluator: bool = False) -> RunSettings:
        values = run_values()
        values["model"]["device"] = device
        values["tenants"][0]["gpus"], values["tenants"][1]["gpus"] = alice, bob
        return parse(RunSettings, {**values, "owner_gpus": owner, "evaluator": evaluator}, "run.yaml")

    @pytest.mark.parametrize(
        "values", [("auto", 0, 0, 0), ("auto", 1, 0, 0.5), ("cpu", 0, 1, 1), ("cuda:0", 0.5, 1, 1)]
    )
    def test_what_goes_together(self, values: tuple[str, float, float, float]) -> None:
        assert self.run(*values, evaluator=True).model.device == values[0]

    def test_data_owners_need_no_gpu_for_the_full_model_where_nobody_evaluates(self) -> None:
        assert self.run("cuda", 1, 0, 0).owner_gpus == 1

    @pytest.mark.parametrize(
        ("gpus", "missing", "who"),
        [
            ((0, 1, 1), "owner_gpus is 0", "the model owner has no GPU"),
            ((1, 1, 0), "tenants.1.gpus is 0", "the evaluator has no GPU"),
            ((1, 0, 0), "tenants.0.gpus and tenants.1.gpus are 0", "the evaluator has no GPU"),
        ],
    )
    def test_a_named_gpu_that_its_user_is_not_given(
        self, gpus: tuple[float, float, float], missing: str, who: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            self.run("cuda", *gpus, evaluator=True)
        assert caught.value.problem == f"run.yaml: model.device is cuda, but {missing}, so {who} for the full model."
        assert "or model.device to auto" in caught.value.remedy

    def test_a_given_gpu_that_is_not_used(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.device is cpu, so") as caught:
            self.run("cpu", 1, 0, 0)
        assert caught.value.remedy == "Set owner_gpus to 0, or model.device to auto."

    def test_an_actor_sees_its_own_gpu_alone(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.device is cuda:1, but") as caught:
            self.run("cuda:1", 1, 1, 1)
        assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy

    @pytest.mark.parametrize("gpus", [1.5, 2, -1])
    def test_an_actor_computes_on_one(self, gpus: float) -> None:
        for (owner, alice), key in (((gpus, 0), "owner_gpus"), ((1, gpus), "tenants.0.gpus")):
            with pytest.raises(ConfigError) as caught:
                self.run("auto", owner, alice, 0)
            assert caught.value.problem.startswith(f"run.yaml: {key}: ")
            assert f"found {gpus!r}" in caught.value.problem
            assert "one GPU (1) or a share of one" in caught.value.remedy
            assert "at most one GPU" in caught.value.remedy


class TestTuneOfTenant:
    def test_keys_that_are_not_given_come_from_the_run(self) -> None:
        values = run_values()
        values["tune"] = {"steps": 7, "learning_rate": 1e-3, "evaluate_every": 5}
        values["tenants"][1]["tune"] = {"method": "lora", "evaluate_every": None}
        settings = parse(RunSettings, values)
        alice, bob = (settings.tune_of(tenant) for tenant in settings.tenants)
        assert alice == settings.tune
        assert (bob.method, bob.steps, bob.learning_rate, bob.evaluate_every) == ("lora", 7, 1e-3, None)

    def test_a_default_that_is_given_counts(self) -> None:
        values = run_values()
        values["tune"] = {"steps": 7}
        values["tenants"][0]["tune"] = {"steps": 100}
        settings = parse(RunSettings, values)
        assert settings.tune_of(settings.tenants[0]).steps == 100

    def test_it_survives_the_way_to_an_actor(self) -> None:
        values = run_values()
        values["tune"] = {"steps": 7}
        values["tenants"][0]["tune"] = {"method": "lora"}
        settings = pickle.loads(pickle.dumps(parse(RunSettings, values)))
        assert settings.tune_of(settings.tenants[0]).steps == 7

    def test_validation_rows_that_nothing_uses(self) -> None:
        values = run_values()
        values["tenants"][1]["validation"] = {"path": "v.jsonl"}
        with pytest.raises(ConfigError, match=r"tenants\.1\.validation: nothing evaluates on these rows") as caught:
            parse(RunSettings, values)
        assert caught.value.remedy.startswith("Set tune.evaluate_every")
        values["tenants"][1]["tune"] = {"evaluate_every": 5}
        assert parse(RunSettings, values).tenants[1].validation is not None


def test_a_result_depends_on_the_decisive_keys_only() -> None:
    plain = TuneSettings()
    assert plain.decisive() == TuneSettings(checkpoint_every=3, validation_fraction=0.3).decisive()
    assert plain.decisive() != TuneSettings(steps=3).decisive()
    with_part = [TuneSettings(evaluate_every=5, validation_fraction=share).decisive() for share in (0.1, 0.3)]
    assert with_part[0] != with_part[1]


def test_a_rank_reduction_that_hides_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"beta: a rank reduction of 0\.001") as caught:
        parse(EmulatorSettings, {"beta": 0.001}, "settings")
    assert caught.value.remedy == "Set 0, or 0.05 or more."
    assert [parse(EmulatorSettings, {"beta": beta}, "settings").beta for beta in (0, 0.05)] == [0, 0.05]


@pytest.mark.parametrize("beside", [{"alpha": 0.5}, {"beta": 0.2}, {"alpha": 0.25, "beta": 0.2}])
def test_a_privacy_level_and_its_outcome_exclude_each_other(beside: dict[str, float]) -> None:
    # 0.5 is the default of alpha: that it was given counts, not its value.
    values = {**run_values(), "emulator": {"privacy": "medium", **beside}}
    with pytest.raises(ConfigError, match=rf"run\.yaml: emulator: privacy=medium .* {' and '.join(beside)} ") as caught:
        parse(RunSettings, values, "run.yaml")
    assert caught.value.remedy == "Leave out privacy, or alpha and beta."
    assert parse(EmulatorSettings, {"privacy": "medium"}).privacy == "medium"
    assert parse(EmulatorSettings, {"privacy": None, **beside}).privacy is None


def test_settings_are_immutable() -> None:
    settings = parse(TuneSettings, {})
    with pytest.raises(ValueError, match="frozen"):
        settings.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["5e-5", "5E-5", "0.00005", "'5e-5'", "5.0e-05"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_values()) + f"tune:\n  learning_rate: {text}\n")
    assert load_yaml(RunSettings, path).tune.learning_rate == pytest.approx(5e-5)
    assert load_yaml(RunSettings, path, ["tune.learning_rate=5e-5"]).tune.learning_rate == pytest.approx(5e-5)


class TestOverrides:
    def test_reach_nested_keys_and_make_sections(self) -> None:
        values = override({"model": {"path": "m"}}, ["tune.learning_rate=5e-5", "tune.steps=7", "model.path=n"])
        assert values == {"model": {"path": "n"}, "tune": {"learning_rate": "5e-5", "steps": 7}}
        assert parse(TuneSettings, values["tune"]).learning_rate == pytest.approx(5e-5)

    def test_leave_the_original_alone(self) -> None:
        original = run_values()
        override(original, ["tenants.0.name=carol", "model.path=other"])
        assert original == run_values()

    def test_reach_list_entries_by_index(self) -> None:
        settings = parse(RunSettings, override(run_values(), ["tenants.1.name=carol", "tenants.1.tune.steps=3"]))
        assert settings.tenants[1].name == "carol"
        assert settings.tenants[1].tune is not None
        assert settings.tenants[1].tune.steps == 3
        assert settings.tenants[0].tune is None

    def test_the_last_one_wins(self) -> None:
        assert override({}, ["a=1", "a=2"]) == {"a": 2}

    def test_values_are_yaml(self) -> None:
        values = override({}, ["a=true", "b=null", "c=[x, y]", "d=a=b", "e="])
        assert values == {"a": True, "b": None, "c": ["x", "y"], "d": "a=b", "e": None}

    @pytest.mark.parametrize("item", ["tune.steps", "=3", "", "steps 3"])
    def test_without_an_equals_sign(self, item: str) -> None:
        with pytest.raises(ConfigError, match="expected key=value") as caught:
            override({}, [item])
        assert "--set" in caught.value.remedy

    @pytest.mark.parametrize("item", ["tenants.2.name=x", "tenants.alice.name=x", "tenants.-1.name=x", "tenants.5=x"])
    def test_an_index_that_is_not_there(self, item: str) -> None:
        with pytest.raises(ConfigError) as caught:
            override(run_values(), [item])
        assert item.partition("=")[0] in caught.value.problem

    @pytest.mark.parametrize("item", ["model.path.deeper=x", "output.a.b=x"])
    def test_through_something_that_is_no_section(self, item: str) -> None:
        with pytest.raises(ConfigError, match=item.partition("=")[0].replace(".", r"\.")):
            override({"model": {"path": "m"}, "output": "o"}, [item])

    def test_broken_yaml_in_a_value(self) -> None:
        with pytest.raises(ConfigError, match="--set a"):
            override({}, ["a=[1, 2"])

    def test_an_unknown_key_is_refused_by_its_full_name(self) -> None:
        with pytest.raises(ConfigError, match=r"'tune\.learning_rat'") as caught:
            parse(RunSettings, override(run_values(), ["tune.learning_rat=1"]), "--set")
        assert "'learning_rate'" in caught.value.remedy

    @given(st.floats(min_value=1e-12, max_value=1e3, allow_nan=False))
    def test_any_number_survives_its_text(self, number: float) -> None:
        values = override({}, [f"learning_rate={number!r}"])
        assert parse(TuneSettings, values).learning_rate == number


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
            load_yaml(RunSettings, tmp_path / "none.yaml")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            load_yaml(RunSettings, tmp_path)

    @pytest.mark.parametrize("text", ["", "just text", "- a\n- b\n"])
    def test_no_mapping(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no settings"):
            load_yaml(RunSettings, path)

    def test_broken_yaml(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("model: {path: m\ntune: 3")
        with pytest.raises(ConfigError, match="is not valid YAML") as caught:
            load_yaml(RunSettings, path)
        assert "line" in caught.value.problem

    def test_binary(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ConfigError, match=r"run\.yaml"):
            load_yaml(RunSettings, path)

    def test_python_objects_are_not_made(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("model: !!python/object/apply:os.system ['true']\n")
        with pytest.raises(ConfigError, match="is not valid YAML"):
            load_yaml(RunSettings, path)

    def test_errors_name_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**run_values(), "emulator": {"alpha": 2}}))
        with pytest.raises(ConfigError) as caught:
            load_yaml(RunSettings, path)
        assert str(path) in caught.value.problem
        assert "emulator.alpha" in caught.value.problem
        assert "fraction of the middle layers" in caught.value.remedy


def test_every_field_that_needs_words_has_them() -> None:
    """A section's own class says what it is; every other field says it itself."""
    sections = [section for part in _page()["SECTIONS"].values() for _, section in part]
    assert RunSettings in sections
    assert BuildSettings in sections
    for section in sections:
        for name, field in section.model_fields.items():
            described = field.description or _is_section(field.annotation)
            assert described, f"{section.__name__}.{name} has no description"


def _page() -> dict[str, Any]:
    return runpy.run_path(str(PROJECT / "docs" / "write_configuration.py"))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


@pytest.mark.parametrize("section", [RunSettings, BuildSettings])
def test_the_papers_recipe_is_one_key(section: type[OwnerSettings]) -> None:
    plain: dict[str, Any] = {"model": {"path": "m"}, "public": {"path": "p"}, "output": "o"}
    if section is RunSettings:
        data = {"path": "d"}
        plain["tenants"] = [{"name": "a", "train": data, "test": data}]
    default, paper = parse(section, plain), parse(section, {**plain, "recipe": "paper"})
    stage_one, emulator = paper.stage_one, paper.emulator
    assert (stage_one.start, stage_one.score_start, stage_one.objective) == ("random", "zero", "lm")
    assert (stage_one.activation, stage_one.masked_fraction, stage_one.generated_tokens) == ("silu", 0.5, 0)
    assert (emulator.compression, emulator.fit_tokens, emulator.layout) == ("svd", 0, "ends")
    # What the paper does not say is as it is otherwise.
    assert stage_one.steps == default.stage_one.steps
    assert (emulator.alpha, emulator.beta) == (default.emulator.alpha, default.emulator.beta)
    assert default.stage_one.start == "closed_form"
    # What is said oneself counts.
    own = parse(
        section, {**plain, "recipe": "paper", "stage_one": {"objective": "distill"}, "emulator": {"alpha": 0.3}}
    )
    assert (own.stage_one.objective, own.stage_one.start) == ("distill", "random")
    assert (own.emulator.alpha, own.emulator.compression) == (0.3, "svd")
    typed = parse(section, {**plain, "recipe": "paper", "emulator": EmulatorSettings(fit_tokens=64)})
    assert (typed.emulator.fit_tokens, typed.emulator.compression) == (64, "svd")


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe.*'papr'"):
        parse(BuildSettings, {"model": {"path": "m"}, "public": {"path": "p"}, "output": "o", "recipe": "papr"})


@pytest.mark.parametrize("key", ["emulator", "output"])
def test_an_unset_shell_variable_names_no_folder(key):
    values = {"emulator": "e", "train": {"path": "t.jsonl"}, "output": "o", key: ""}
    with pytest.raises(ConfigError, match=f"{key}: String should have at least 1 character"):
        parse(TuneCommandSettings, values, "tune.yaml")
