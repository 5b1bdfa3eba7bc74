"""Tune plug-in layers as a Ray job: an emulator and private data → a delta.

ray job submit --working-dir jobs --entrypoint-num-cpus 4 --entrypoint-num-gpus 1 -- \\
    python tune.py /shared/alice/tune.yaml --set tune.steps=500

Ray copies the folder jobs to the cluster, these scripts and nothing else: never name a folder with
private data as --working-dir. The YAML and every path in it are absolute, on a disk that the nodes
share. The same as `scaleot tune`; without --entrypoint-num-gpus it runs on a CPU, with as many threads
as --entrypoint-num-cpus says; without that Ray allows it a single one. A job that was stopped goes on
from its last checkpoint when it is submitted again.
"""

from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import TuneCommandSettings
from scaleot_ray.cli.tune import tune

if __name__ == "__main__":
    job(TuneCommandSettings, tune, __doc__)
