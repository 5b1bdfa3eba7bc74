"""Runs ``scaleot`` commands in forks of a process that has the libraries loaded already.

Loading torch and transformers takes most of a tiny command's time. Each command is still a process of
its own with its own stdout, stderr and exit code. Reads one JSON request per line on stdin and answers
with the exit code.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any


def load() -> None:
    """Imports what the commands import, at once or where they need it; computes nothing, so that forking is safe."""
    import peft  # noqa: F401
    import transformers.modeling_utils
    import transformers.models.llama.modeling_llama  # noqa: F401

    import scaleot_ray.cli.main
    import scaleot_ray.stages.build
    import scaleot_ray.stages.evaluate
    import scaleot_ray.stages.plug
    import scaleot_ray.stages.tune  # noqa: F401


def serve() -> None:
    """Answers requests until stdin ends."""
    load()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def work(request: dict[str, Any]) -> None:
    """Runs one command or script in this process and ends it."""
    os.chdir(request["cwd"])
    for number, path in ((1, request["out"]), (2, request["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["arguments"]
    try:
        if sys.argv[0] == "scaleot":
            from scaleot_ray.cli.main import main

            main()
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(error.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    serve()
