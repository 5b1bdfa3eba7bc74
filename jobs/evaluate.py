"""Measure models as a Ray job: models, artefacts and test rows → the standard table.

ray job submit --working-dir . --entrypoint-num-cpus 4 --entrypoint-num-gpus 1 -- \\
    python jobs/evaluate.py examples/evaluate.yaml --format json

It computes with as many threads as --entrypoint-num-cpus says; without it Ray allows it a single one.
The same as `scaleot eval`; with --format json the job's output is the object of docs/json.md.
"""

from scaleot_ray.cli.evaluate import evaluate
from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import EvaluateSettings

if __name__ == "__main__":
    job(EvaluateSettings, evaluate, __doc__)
