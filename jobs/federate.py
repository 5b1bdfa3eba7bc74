"""A whole run as a Ray job: one model owner, several data owners at once → artefacts, table, report.

ray job submit --working-dir jobs -- python federate.py /shared/owner/run.yaml

Ray copies the folder jobs to the cluster, these scripts and nothing else; the YAML and every path in
it are absolute. With `environment: cluster` the actors work on any node that has room and the labels that
the YAML asks for (examples/cluster.yaml); else all of them on the node that the job was put on, which then
must have the processors and GPUs that the YAML gives them. The actors claim what they use, so the job itself
needs no --entrypoint-num-cpus. The same as `scaleot run`.
"""

from scaleot_ray.cli.main import job
from scaleot_ray.cli.run import run
from scaleot_ray.config import RunSettings

if __name__ == "__main__":
    job(RunSettings, run, __doc__)
