"""A run whose emulator is still being built answers an administrator at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from scaleot_ray.errors import ScaleOTError
from scaleot_ray.federation.folder import RunFolder
from scaleot_ray.federation.rounds.administration import Request, administer
from scaleot_ray.federation.run import run_local
from scaleot_ray.progress import Progress
from tests.tiny_run import write_tiny_run


@pytest.mark.usefixtures("connected_ray")
def test_who_asks_while_the_owner_builds_is_answered(tmp_path: Path) -> None:
    settings = write_tiny_run(tmp_path, evaluator=False, tune={"steps": 3})
    folder, asked, refused = RunFolder(Path(settings.output)), list[threading.Thread](), list[ScaleOTError]()

    def ask() -> None:
        try:
            administer(folder, Request("cancel", "bob", "too early"), seconds=60)
        except ScaleOTError as error:
            refused.append(error)

    def on_progress(progress: Progress) -> None:
        if progress.stage == "stage 1" and not asked:
            asked.append(threading.Thread(target=ask))
            asked[0].start()
            while not list(folder.requests.glob("*.ask.json")):
                time.sleep(0.01)

    report = run_local(settings, on_progress=on_progress).as_json()
    asked[0].join()
    assert "the run that is under way builds its emulator" in refused[0].problem
    assert report["rounds"][0]["submitted"] == ["alice", "bob"]
