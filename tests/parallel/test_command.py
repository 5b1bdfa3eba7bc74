"""``scaleot build --workers``: as people run it, killed and run again, and with what cannot work."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from scaleot_ray.config import EmulatorSettings, ModelSettings, StageOneSettings
from scaleot_ray.emulator.stage_one import StageOne, steps_done
from scaleot_ray.stages.build import build
from tests.cli.command import scaleot, started
from tests.tiny_run import write_tiny_run

STEPS = 60
SETTINGS = {
    "harmonizer_rank": 8,
    "start_tokens": 256,
    "generated_tokens": 128,
    "block_size": 16,
    "score_every": 10,
    "steps": STEPS,
    "checkpoint_every": 5,
    "learning_rate": 1e-4,
}
BUILD = [
    *("build", "--model=model", "--public=public.jsonl", "--output=emulator", "--plug-in-layers=2", "--device=cpu"),
    *(f"--set=stage_one.{key}={value}" for key, value in SETTINGS.items()),
    "--set=emulator.fit_tokens=256",
]
GROUP = [*BUILD, "--workers=2", "--zero=3", "--set=stage_one.batch_size=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and public text."""
    folder = tmp_path_factory.mktemp("place")
    write_tiny_run(folder)
    return folder


def kept(cache: Path) -> StageOne:
    """What stage 1 left."""
    (file,) = cache.glob("*/stage_one.safetensors")
    return StageOne.load(file, with_moments=False)[0]


def reached(cache: Path) -> int:
    """Steps that stage 1 has kept."""
    return next((steps_done(file) or 0 for file in cache.glob("*/stage_one.safetensors")), 0)


def test_a_killed_build_leaves_no_process_and_goes_on(place: Path) -> None:
    with started(*GROUP, cwd=place) as process:
        while not reached(place / "emulator-cache"):
            assert process.poll() is None
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(children) > 3
    _, left = psutil.wait_procs(children, timeout=20)
    assert left == []
    before = reached(place / "emulator-cache")
    assert 0 < before < STEPS

    done = scaleot(*GROUP, "--format=json", cwd=place)
    assert done.code == 0, done.err
    steps = [int(line.split()[2].split("/")[0]) for line in done.err.splitlines() if line.startswith("stage 1:")]
    assert steps[0] > before
    assert "calibrate" not in done.err
    assert not done.json["reused_stage_one"]

    alone = _by_one_process(place)
    found = kept(place / "emulator-cache")
    masks = [[one["replaced"] for one in result.history if "replaced" in one] for result in (found, alone)]
    assert len(masks[0]) == STEPS
    assert masks[0] == masks[1]
    losses = [[one["loss"] for one in result.history if "loss" in one] for result in (found, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert found.scores == pytest.approx(alone.scores, abs=1e-2)


def _by_one_process(place: Path) -> StageOne:
    emulator = EmulatorSettings(plug_in_layers=2, fit_tokens=256)
    model = ModelSettings(path=str(place / "model"), device="cpu")
    public = write_tiny_run(place).public
    build(model, public, StageOneSettings(**SETTINGS), emulator, place / "alone", cache=place / "alone-cache")
    return kept(place / "alone-cache")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--zero=2"], 2, "parallel.workers"),
        (["--workers=0"], 2, "parallel.workers"),
        (["--workers=2", "--zero=4"], 2, "parallel.zero"),
        (["--workers=3"], 2, "stage_one.batch_size: 4 sequences cannot be shared evenly by 3 workers"),
        (["--workers=2", "--set=parallel.deepspeed=absent.json"], 2, "parallel.deepspeed: absent.json cannot be read"),
        (["--workers=2", "--set=parallel.gpu=1"], 2, "unknown key 'parallel.gpu'. → Did you mean 'gpus'?"),
        (["--workers=2", "--set=parallel.cpus=512"], 4, "parallel.cpus: 2 workers ask for 1024 processors together"),
    ],
)
def test_what_cannot_work_is_named_before_anything_starts(
    place: Path, options: list[str], code: int, said: str
) -> None:
    arguments = [argument for argument in BUILD if not argument.startswith("--output")]
    done = scaleot(*arguments, "--output=refused", *options, cwd=place)
    assert done.code == code, done.err
    assert said in " ".join(done.err.split())
    assert not (place / "refused").exists()
    assert not (place / "refused-cache").exists()
