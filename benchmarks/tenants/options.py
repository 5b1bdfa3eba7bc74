"""Options that several of the benchmarks take, and what is wrong with their values."""

from __future__ import annotations

import argparse

from scaleot_ray.config import TuneSettings
from scaleot_ray.errors import ConfigError


def whole_number(options: argparse.Namespace, name: str, least: int, why: str) -> int:
    """The value of an option that has a smallest one.

    Raises:
        ConfigError: it is below that; names the option.
    """
    value = int(getattr(options, name))
    if value < least:
        raise ConfigError(f"--{name.replace('_', '-')}: {value} is too few, {why}.", f"Give {least} or more.")
    return value


def tenant_numbers(options: argparse.Namespace) -> list[int]:
    """The numbers of data owners in ``--tenants``.

    Raises:
        ConfigError: they are none.
    """
    numbers = [int(number) for number in options.tenants.split(",") if number.isdecimal() and int(number)]
    if ",".join(map(str, numbers)) != options.tenants:
        raise ConfigError(f"--tenants: {options.tenants!r} are no numbers of data owners.", "Give e.g. 1,2,4,8.")
    return numbers


def add_small_model(parser: argparse.ArgumentParser) -> None:
    """Options of a random model that the benchmark makes itself; see :class:`benchmarks.tenants.subject.Subject`."""
    parser.add_argument("--hidden", type=int, default=512, help="width of the random model; default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="its layers, of which 4 are tuned; default: %(default)s")


def add_run(parser: argparse.ArgumentParser, steps: int) -> None:
    """Options of whole runs on such a model."""
    add_small_model(parser)
    parser.set_defaults(threads=1)  # of every actor
    parser.add_argument("--steps", type=int, default=steps, help="of each data owner; default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="of each data owner")
    parser.add_argument("--block-size", type=int, default=32)


def tune_settings(options: argparse.Namespace) -> TuneSettings:
    """How every data owner of such a run tunes: whole plug-in layers."""
    steps = whole_number(options, "steps", 1, "each data owner has to tune")
    return TuneSettings(steps=steps, batch_size=options.batch_size, block_size=options.block_size)
