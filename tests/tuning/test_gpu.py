from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.tuning.test_packed import agree, all_packed, repeatable, unlike
from tests.tuning.test_packed import alone as tuned_alone
from tests.tuning.test_resume import run, same, stopped
from tests.tuning.test_trainer import close
from tests.tuning.test_trainer import run as plain_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("method", ["layers", "lora", "bottleneck"])
def test_the_gpu_gives_what_the_cpu_gives(method: str) -> None:
    on_cpu = plain_run(tiny_model("llama").double(), method=method)
    on_gpu = plain_run(tiny_model("llama").double().cuda(), method=method)
    on_gpu.delta.tensors = {name: tensor.cpu() for name, tensor in on_gpu.delta.tensors.items()}
    assert on_gpu.history.losses == pytest.approx(on_cpu.history.losses, rel=1e-6)
    assert close(on_cpu, on_gpu)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_stopped_and_resumed_on_a_gpu(precision: str, tmp_path: Path) -> None:
    whole = run(tiny_model("gpt2").cuda(), None, precision=precision)
    stopped(tiny_model("gpt2").cuda(), tmp_path / "checkpoint", stop_at=5, precision=precision)
    assert same(whole, run(tiny_model("gpt2").cuda(), tmp_path / "checkpoint", precision=precision))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_as_fp32_does(precision: str) -> None:
    exact = plain_run(tiny_model("llama").cuda(), steps=20, learning_rate=1e-3)
    mixed = plain_run(tiny_model("llama").cuda(), steps=20, learning_rate=1e-3, precision=precision)
    assert mixed.history.losses == pytest.approx(exact.history.losses, abs=0.05)


def test_packed_on_a_gpu_each_comes_out_as_alone() -> None:
    model = repeatable("llama").cuda()
    results = all_packed(model, unlike())
    assert all(agree(results[one.name], tuned_alone(model, one)) for one in unlike())
