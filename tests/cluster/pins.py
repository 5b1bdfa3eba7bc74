"""What every file in ``cluster/`` must agree on."""

from __future__ import annotations

import re

from packaging.version import Version

from scaleot_ray import __version__
from tests.cli.command import PROJECT

CONTAINERFILE = (PROJECT / "cluster" / "Containerfile").read_text()

RAY = Version(re.findall(r"^FROM \S+/ray:([\d.]+)-", CONTAINERFILE, flags=re.M)[-1])
"""The version of Ray in the image; everything else has to follow it."""

IMAGE = f"registry.example.com/scaleot-ray:{__version__}-ray{RAY}"
"""The image: version of the package and of Ray, so that no two builds go by one name."""
