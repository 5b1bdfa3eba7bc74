"""``scaleot``: one model owner, many data owners, from the command line.

This file puts the commands together and is the one place where an exception becomes an exit code:
0 done · 2 usage or configuration · 3 artefact refused · 4 resources missing · 5 run failed · 130 interrupted.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from scaleot_ray import __version__
from scaleot_ray.cli.build import build_command
from scaleot_ray.cli.demo import demo_command
from scaleot_ray.cli.doctor import doctor_command
from scaleot_ray.cli.evaluate import evaluate_command
from scaleot_ray.cli.inspect import inspect_command
from scaleot_ray.cli.options import DebugOption, Format, FormatOption, set_option
from scaleot_ray.cli.output import Output, working
from scaleot_ray.cli.plug import plug_command
from scaleot_ray.cli.run import run_command
from scaleot_ray.cli.status import status_command
from scaleot_ray.cli.tenants import revoke_command, tenants_command
from scaleot_ray.cli.tune import tune_command
from scaleot_ray.config import Settings, load_yaml
from scaleot_ray.errors import ConfigError, Interrupted, ScaleOTError

# click's UsageError, or that of the copy of click that newer versions of typer bring.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_INTERRUPTED = Interrupted.exit_code

Section = TypeVar("Section", bound=Settings)


def _new_app() -> typer.Typer:
    return typer.Typer(
        rich_markup_mode="rich",
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )


def build_app() -> typer.Typer:
    """The application with all commands."""
    app = _new_app()

    @app.callback(invoke_without_command=True)
    def scaleot(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    ) -> None:
        """Offsite tuning of large language models between a model owner and many data owners.

        The owner compresses its model into an emulator, data owners tune the
        plug-in layers on it with data that never leaves them, and what they
        tuned works in the owner's full model.

        Start with:

          scaleot doctor    is this machine ready?

          scaleot demo      the whole method on a small model, one table at the end

        Step by step: build (model owner), tune (data owner), then plug and eval
        (model owner). Each command's --help has examples.

        Exit codes: 0 done, 2 usage or configuration, 3 artefact refused,
        4 resources missing, 5 run failed, 130 interrupted.
        """
        if version:
            typer.echo(f"scaleot {__version__}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    app.command("demo")(demo_command)
    app.command("doctor")(doctor_command)
    app.command("build")(build_command)
    app.command("tune")(tune_command)
    app.command("plug")(plug_command)
    app.command("eval")(evaluate_command)
    app.command("run")(run_command)
    app.command("status")(status_command)
    app.command("tenants")(tenants_command)
    app.command("revoke")(revoke_command)
    app.command("inspect")(inspect_command)
    return app


def execute(app: typer.Typer, arguments: Sequence[str], name: str = "scaleot") -> int:
    """Runs an application and returns its exit code; errors end on the screen without a stack trace."""
    output = Output()
    # An unknown option is an error before any option is read, and must come out in the form asked for.
    output.json = _asks_for_json(arguments)
    output.debug = "--debug" in arguments
    try:
        code = typer.main.get_command(app).main(args=list(arguments), prog_name=name, standalone_mode=False, obj=output)
    except ScaleOTError as error:
        return output.failure(error)
    except _UsageError as error:
        return output.failure(_usage(error, name))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else ConfigError.exit_code
    except Exception as error:
        # The last line of defence: everything unexpected becomes exit code 5 and a trace in a file.
        return output.failure(error)
    if code == _INTERRUPTED:
        return output.failure(Interrupted(f"{name} was interrupted.", "Run the same command again."))
    return code if isinstance(code, int) else 0


def job(settings: type[Section], do: Callable[[Section, Output], None], description: str) -> NoReturn:
    """The main program of a script in ``jobs/``: a YAML file and ``--set`` instead of a command's options.

    Args:
        settings: what the YAML file holds.
        do: the command's own function.
        description: the script's help text.
    """
    app = _new_app()

    @app.command(help=description)
    def run_job(
        context: typer.Context,
        config: Annotated[str, typer.Argument(help="YAML file with the job's settings.", metavar="CONFIG.yaml")],
        overrides: Annotated[list[str], set_option()] = [],  # noqa: B006  typer copies it
        format: FormatOption = Format.text,
        debug: DebugOption = False,
    ) -> None:
        with working(context, "Submit the same job again; what was finished is reused.") as output:
            do(load_yaml(settings, config, overrides), output)

    sys.exit(execute(app, sys.argv[1:], sys.argv[0]))


def main() -> NoReturn:
    """Entry point of ``scaleot``."""
    sys.exit(execute(build_app(), sys.argv[1:]))


def _asks_for_json(arguments: Sequence[str]) -> bool:
    return "--format=json" in arguments or ("--format", "json") in itertools.pairwise(arguments)


def _usage(error: Any, name: str) -> ConfigError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else name
    message: str = error.format_message()
    return ConfigError(
        message if message.endswith((".", "?")) else f"{message}.", f"`{command} --help` shows what there is."
    )
