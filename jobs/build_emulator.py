"""Build an emulator as a Ray job: the model owner's full model and public text → an emulator.

ray job submit --working-dir . --entrypoint-num-cpus 8 -- \\
    python jobs/build_emulator.py examples/build.yaml

With GPUs: add --entrypoint-num-gpus 1. The job runs where Ray has these resources; paths in the YAML
must be there too (a shared folder). It computes with as many threads as --entrypoint-num-cpus says;
without it Ray allows it a single one. The same as `scaleot build`.
"""

from scaleot_ray.cli.build import build_emulator
from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import BuildSettings

if __name__ == "__main__":
    job(BuildSettings, build_emulator, __doc__)
