from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import nn

from scaleot_ray.data.batches import Batch, Batches, TokenBatches
from scaleot_ray.data.examples import TokenExample
from scaleot_ray.errors import ConfigError, DataError, RunFailed
from scaleot_ray.families import family_of
from scaleot_ray.progress import Progress
from scaleot_ray.tuning import METHODS, Tuned, tune
from scaleot_ray.tuning.optimization import BETAS, learning_rate
from tests.tiny_models import tiny_model, tiny_tokens
from tests.tuning.test_methods import structure
from tests.tuning.tiny_batches import POSITIONS, bits, tiny_batches, tiny_examples, tiny_settings


def run(model: Any, batches: Batches | None = None, method: str = "layers", **options: Any) -> Tuned:
    names = {"evaluate", "checkpoint", "resume", "on_progress", "stage"}
    given = {name: options.pop(name) for name in names & options.keys()}
    settings = tiny_settings(method, **options)
    return tune(model, family_of(model.config), POSITIONS, batches or tiny_batches(), settings, **given)


def same(first: Tuned, second: Tuned) -> bool:
    one, two = first.delta.tensors, second.delta.tensors
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def close(first: Tuned, second: Tuned, rtol: float = 1e-3, atol: float = 1e-6) -> bool:
    one, two = first.delta.tensors, second.delta.tensors
    return all(torch.allclose(one[name], two[name], rtol=rtol, atol=atol) for name in one)


def test_it_does_what_a_plain_loop_does() -> None:
    ours = run(tiny_model("llama"), weight_decay=0.1, max_grad_norm=0.5)
    model = tiny_model("llama")
    before = bits(model)
    trained = [p for n, p in model.named_parameters() if n.startswith(tuple(f"model.layers.{i}." for i in POSITIONS))]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    losses = []
    for step, batch in enumerate(islice(tiny_batches().batches(), 6), 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, 6, 0.1, 2e-4)
        optimizer.step()
        losses.append(loss.item())
    assert ours.history.losses == pytest.approx(losses, rel=1e-5)
    for name, value in ours.delta.tensors.items():
        torch.testing.assert_close(value, model.get_parameter(name) - before[name], rtol=1e-2, atol=2e-7)


@pytest.mark.parametrize("method", METHODS)
def test_tuning_learns_and_leaves_the_model_as_it_was(method: str) -> None:
    model = tiny_model("llama")
    before, flags = bits(model), [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    tuned = run(model, tiny_batches(count=4), method, steps=30, learning_rate=1e-2)
    assert tuned.history.losses[-1] < tuned.history.losses[0] - 0.2
    assert not tuned.delta.changes_nothing
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.training
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert not model.lm_head._forward_pre_hooks


class Halves:
    """The rows of each batch two by two, as a smaller batch would hold them."""

    def __init__(self, whole: TokenBatches, rows: int) -> None:
        self.whole, self.rows = whole, rows

    def batches(self, start: int = 0) -> Iterator[Batch]:
        def parts() -> Iterator[Batch]:
            for batch in self.whole.batches():
                for row in range(0, len(batch["input_ids"]), self.rows):
                    yield {name: value[row : row + self.rows] for name, value in batch.items()}

        return islice(parts(), start, None)


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_batches_equal_a_larger_one(method: str) -> None:
    whole = run(tiny_model("llama").double(), tiny_batches(8), method)
    parts = run(tiny_model("llama").double(), Halves(tiny_batches(8), 2), method, accumulate=4)
    assert parts.history.losses == pytest.approx(whole.history.losses, rel=1e-12)
    assert close(whole, parts, rtol=1e-6, atol=1e-10)
    # The mean of the parts' means, each over its own number of labels, is another number.
    model, batch = tiny_model("llama").double(), next(tiny_batches(8).batches())
    means = [model(**part).loss.item() for part in islice(Halves(tiny_batches(8), 2).batches(), 4)]
    assert sum(means) / 4 != pytest.approx(whole.history.losses[0], rel=1e-6)
    assert model(**batch).loss.item() == pytest.approx(whole.history.losses[0], rel=1e-7)


def calls_of_first_norm(layer: nn.Module, counts: list[int]) -> None:
    """Counts in ``counts[0]`` how often a layer runs: its norm lies inside, so recomputing calls it again."""

    def count(*_: Any) -> None:
        counts[0] += 1

    norm = next(module for name, module in layer.named_modules() if "norm" in name or "ln" in name)
    norm.register_forward_hook(count)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing_but_recomputes(method: str, architecture: str) -> None:
    results, counts = [], []
    for recompute in (False, True):
        model, calls = tiny_model(architecture), [0]
        before = structure(model)
        run(model, method=method, gradient_checkpointing=recompute)
        assert structure(model)[:2] == before[:2]
        assert not model.is_gradient_checkpointing
        calls_of_first_norm(family_of(model.config).layers(model)[7], calls)
        results.append(run(model, method=method, gradient_checkpointing=recompute))
        counts.append(calls[0])
    assert counts == [6, 12]
    assert results[0].history.losses == results[1].history.losses
    assert same(*results)


def test_gradient_checkpointing_does_not_reach_below_the_first_plug_in_layer() -> None:
    model = tiny_model("llama")
    calls: list[list[int]] = [[0] for _ in range(8)]
    for layer, count in zip(model.model.layers, calls, strict=True):
        calls_of_first_norm(layer, count)
    wanted = []
    model.model.layers[4].register_forward_hook(lambda module, inputs, output: wanted.append(output.requires_grad))
    settings = tiny_settings(gradient_checkpointing=True, steps=2)
    tune(model, family_of(model.config), (5, 7), tiny_batches(), settings)
    assert wanted == [False, False]
    assert [count[0] for count in calls] == [2, 2, 2, 2, 2, 4, 4, 4]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_arithmetic(method: str) -> None:
    exact = run(tiny_model("llama"), method=method)
    rounded = run(tiny_model("llama"), method=method, precision="bfloat16")
    assert rounded.history.losses != exact.history.losses
    assert rounded.history.losses == pytest.approx(exact.history.losses, abs=0.05)
    assert {value.dtype for value in rounded.delta.tensors.values()} == {torch.float32}


def test_float16_arithmetic_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="float16 arithmetic needs a GPU") as refused:
        run(tiny_model("llama"), precision="float16")
    assert "bfloat16" in refused.value.remedy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_summed_up_in_fp32(dtype: torch.dtype) -> None:
    exact = run(tiny_model("llama"), steps=20, learning_rate=2e-6)
    model = tiny_model("llama").to(dtype)
    before = bits(model)
    tuned = run(model, steps=20, learning_rate=2e-6)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    name = "model.layers.0.mlp.down_proj.weight"
    change = tuned.delta.tensors[name]
    assert change.dtype is torch.float32
    similar = torch.cosine_similarity(change.flatten(), exact.delta.tensors[name].flatten(), dim=0)
    assert similar > 0.7
    # Stepping the weights themselves would have lost most of it: one step's change rounds to nothing.
    lost = (before[name] + (change / 20).to(dtype) == before[name]).float().mean()
    assert lost > 0.5


def test_float16_weights_survive_small_gradients() -> None:
    """Gradients below 6e-8 vanish in fp16; the loss is scaled up so that they do not."""
    model = tiny_model("llama-untied-bias")
    model.lm_head.weight.data *= 1e-4
    tuned = run(model.half(), steps=12)
    moved = [(value != 0).float().mean() for name, value in tuned.delta.tensors.items() if "k_proj.bias" not in name]
    assert min(moved) > 0.9


def evaluations(values: list[float]) -> Any:
    left = iter(values)
    return lambda: next(left)


def test_evaluation_sees_the_tuned_model_in_evaluation_mode() -> None:
    model, ids = tiny_model("gpt2"), tiny_tokens()
    seen = []

    def evaluate() -> float:
        assert not model.training
        assert not torch.is_grad_enabled()
        seen.append(model(ids, labels=ids).loss.item())
        assert seen[-1] == model(ids, labels=ids).loss.item()
        return seen[-1]

    tuned = run(model, evaluate=evaluate, evaluate_every=4, steps=10, learning_rate=1e-3)
    assert tuned.history.evaluations == [(4, seen[0]), (8, seen[1]), (10, seen[2])]
    assert len(set(seen)) == 3


def test_early_stopping_restores_the_best_state() -> None:
    best = run(tiny_model("llama"), steps=20, evaluate_every=2, evaluate=evaluations([3.0, 2.0] + [9.0] * 8))
    values = [3.0, 2.0, 2.5, 2.0, 2.1, 1.0]
    stopped = run(tiny_model("llama"), steps=20, evaluate_every=2, patience=3, evaluate=evaluations(values))
    assert stopped.history.stopped_early
    assert stopped.history.steps == 10
    assert stopped.history.best == (4, 2.0)
    assert not same(best, stopped)
    snapshots: dict[int, dict[str, torch.Tensor]] = {}
    model = tiny_model("llama")
    received = bits(model)

    def keep(progress: Progress) -> None:
        snapshots[progress.step] = bits(model)

    tuned = run(model, steps=20, evaluate_every=2, patience=3, evaluate=evaluations(values), on_progress=keep)
    for name, value in tuned.delta.tensors.items():
        assert torch.equal(value, snapshots[4][name] - received[name])
        assert not value.any() or not torch.equal(value, snapshots[10][name] - received[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 2}, "tune.evaluate_every is not set"),
        ({"evaluate_every": 2}, "no validation rows"),
    ],
)
def test_settings_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny_model("llama"), **options)


def test_an_infinite_loss_names_step_and_remedy() -> None:
    model = tiny_model("llama")
    before = bits(model)
    with pytest.raises(RunFailed, match=r"Step 2: the loss is (nan|inf)") as failed:
        run(model, learning_rate=1e30, warmup_fraction=0)
    assert "tune.learning_rate (now 1e+30)" in failed.value.remedy
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert not model.training


def test_an_infinite_gradient_stops_before_it_reaches_the_weights() -> None:
    model, seen = tiny_model("llama"), []

    def poison(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            seen.append(output)
            if len(seen) == 3:
                output.register_hook(lambda gradient: gradient * float("nan"))

    model.model.layers[7].register_forward_hook(poison)
    with pytest.raises(RunFailed, match="Step 3: the gradient's norm is nan"):
        run(model)


def test_a_bad_evaluation_is_said() -> None:
    with pytest.raises(RunFailed, match="Step 2: the evaluation gave nan"):
        run(tiny_model("llama"), evaluate_every=2, evaluate=lambda: float("nan"))


def test_batches_without_a_label() -> None:
    examples = [TokenExample([5, 6, 7], [-100] * 3)]
    with pytest.raises(DataError, match="Step 1: no token of its batches has a label"):
        run(tiny_model("llama"), TokenBatches(examples, 2, 0, seed=0))


def test_a_part_without_a_label_does_not_disturb() -> None:
    class Some:
        def batches(self, start: int = 0) -> Iterator[Batch]:
            for batch in islice(tiny_batches().batches(), start, None):
                yield batch
                yield {**batch, "labels": torch.full_like(batch["labels"], -100)}

    assert same(run(tiny_model("llama"), Some(), accumulate=2), run(tiny_model("llama")))


def test_batches_that_end() -> None:
    class Ends:
        def batches(self, start: int = 0) -> Iterator[Batch]:
            return islice(tiny_batches().batches(), start, 3)

    with pytest.raises(DataError, match="Step 4: the batches have come to an end"):
        run(tiny_model("llama"), Ends())


def test_the_seed_decides() -> None:
    first, again, other = (run(tiny_model("gpt2"), method="lora", seed=seed) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_progress_counts_real_tokens() -> None:
    reports: list[Progress] = []
    batches = tiny_batches()
    tuned = run(tiny_model("llama"), batches, on_progress=reports.append, stage="tune alice", accumulate=2)
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    assert [report.loss for report in reports] == tuned.history.losses
    assert {report.stage for report in reports} == {"tune alice"}
    assert all(report.tokens_per_second for report in reports)
    assert reports[-1].seconds_left == 0


def test_learning_rate_warms_up_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 0.1, 1.0) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5, abs=1e-6)
    assert all(late < early for early, late in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(1, 1, 0.1, 1.0) == 1.0
    assert [learning_rate(step, 2, 1.0, 1.0) for step in (1, 2)] == [0.5, 1.0]


def test_examples_are_uneven() -> None:
    """What the accumulation test rests on."""
    lengths = {len(example.input_ids) for example in tiny_examples()}
    assert len(lengths) > 5
