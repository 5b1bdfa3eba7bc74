"""Put a delta into the full model as a Ray job → a Hugging Face checkpoint or a PEFT adapter.

ray job submit --working-dir jobs --entrypoint-num-cpus 4 -- \\
    python plug_in.py /shared/owner/plug.yaml

Ray copies the folder jobs to the cluster, these scripts and nothing else; the YAML and every path in
it are absolute, on a disk that the nodes share. The job computes with as many threads as
--entrypoint-num-cpus says; without it Ray allows it a single one. The same as `scaleot plug`.
"""

from scaleot_ray.cli.main import job
from scaleot_ray.cli.plug import plug
from scaleot_ray.cli.settings import PlugSettings

if __name__ == "__main__":
    job(PlugSettings, plug, __doc__)
