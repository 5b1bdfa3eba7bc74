"""Build an emulator as a Ray job: the model owner's full model and public text → an emulator.

ray job submit --working-dir jobs --entrypoint-num-cpus 8 -- \\
    python build_emulator.py /shared/owner/build.yaml

With GPUs: add --entrypoint-num-gpus 1. Ray copies the folder jobs to the cluster, these scripts and
nothing else; the YAML and every path in it are absolute, on a disk that the nodes share. The job
computes with as many threads as --entrypoint-num-cpus says; without it Ray allows it a single one.
The same as `scaleot build`.
"""

from scaleot_ray.cli.build import build_emulator
from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import BuildSettings

if __name__ == "__main__":
    job(BuildSettings, build_emulator, __doc__)
