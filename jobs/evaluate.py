"""Measure models as a Ray job: models, artefacts and test rows → the standard table.

ray job submit --working-dir jobs --entrypoint-num-cpus 4 --entrypoint-num-gpus 1 -- \\
    bash -c 'python evaluate.py /shared/owner/evaluate.yaml --format json > /shared/owner/table.json'

Without the redirection the table is in the job's log, together with its progress. Ray copies the
folder jobs to the cluster, these scripts and nothing else; the YAML and every path in it are absolute,
on a disk that the nodes share. The job computes with as many threads as --entrypoint-num-cpus says;
without it Ray allows it a single one. The same as `scaleot eval`.
"""

from scaleot_ray.cli.evaluate import evaluate
from scaleot_ray.cli.main import job
from scaleot_ray.cli.settings import EvaluateSettings

if __name__ == "__main__":
    job(EvaluateSettings, evaluate, __doc__)
