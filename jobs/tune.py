"""Tune plug-in layers as a Ray job: an emulator and private data → a delta.

ray job submit --working-dir . --entrypoint-num-cpus 4 --entrypoint-num-gpus 1 -- \\
    python jobs/tune.py examples/tune.yaml --set tune.steps=500

The same as `scaleot tune`; without --entrypoint-num-gpus it runs on a CPU, with as many threads as
--entrypoint-num-cpus says; without that Ray allows it a single one. A job that was stopped goes
on from its last checkpoint when it is submitted again, as long as its output folder is shared.
"""

from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import TuneCommandSettings
from scaleot_ray.cli.tune import tune

if __name__ == "__main__":
    job(TuneCommandSettings, tune, __doc__)
