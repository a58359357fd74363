"""`python -m artifex.tune`: which settings run this model fastest on the devices that are here, by measuring them.

    python -m artifex.tune configs/quickstart.yaml --budget 10
    python -m artifex.tune llama-nano --space "attention unroll=auto,1 batch_size=16,32"

Writes the best as a configuration, a table of all and every measurement into a folder; the same command again goes on
where it stood. What takes time to import is imported inside the functions.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.config import Config
from artifex.config_io import SUFFIXES, ConfigError, nearest, read_mapping
from artifex.training.signals import ending_at_once

if TYPE_CHECKING:
    from artifex.tuning.tuned import Tuned

PROGRAM = "python -m artifex.tune"
SOURCE = "command line"
OPTIONS = {
    "--budget": ("MINUTES", "for all of it: planning, building and measuring (default: 10)"),
    "--objective": (
        "throughput|latency|memory",
        "most tokens or images a second; the shortest step; the fewest bytes "
        "of a device at no less than --share of the throughput as configured (default: throughput)",
    ),
    "--share": ("SHARE", "see --objective (default: 0.9)"),
    "--space": (
        "SPACE",
        "what may vary, in one word of the shell: names, each with its values or, without, the usual "
        "ones, as in 'attention unroll=auto,1 batch_size=16,32 axes=data,fsdp'; values of remat have + for a comma; "
        "'mixed' adds every mesh axis to the usual (default: what fits the devices)",
    ),
    "--cluster": ("CLUSTER", "what the devices must be, such as cpu:8; it measures, and simulates nothing"),
    "--candidates": ("COUNT", "of the planner's meshes that are tried (default: 6)"),
    "--time-limit": ("SECONDS", "to build one candidate (default: 300)"),
    "--out": ("PATH", "folder of measurements, best.yaml, table.txt and tuned.json (default: tunes/CONFIG-DEVICES)"),
    "--profile-dir": ("PATH", "where the planner keeps what devices reach (default: ~/.cache/artifex/autodist/1.0)"),
}
FLAGS = {
    "--start-anew": "set aside what the folder has and measure from the beginning",
    "--help": "print this and stop",
}


@dataclasses.dataclass(frozen=True)
class Command:
    """What `python -m artifex.tune` was asked: the run, and the arguments of `auto_tune`."""

    config: Config
    how: Mapping[str, Any]


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 where nothing ran, and with
    128 + its number after a signal, with everything measured kept and the table so far printed."""
    from artifex.cli import fail, program, user_errors

    with program():
        with ending_at_once(": nothing was measured"), user_errors():
            command = parse(sys.argv[1:] if argv is None else argv)
        try:
            with user_errors():
                found = tuned(command)
        except KeyboardInterrupt:
            fail("stopped by a second SIGINT; what was measured is kept", code=130)
        print(f"\n{found}\n")
        for name in ("best.yaml", "table.txt", "tuned.json"):
            print(found.folder / name)
        print(f"train by it:   python -m artifex.train {shlex.quote(str(found.folder / 'best.yaml'))}")
        if found.stopped:
            import signal

            raise SystemExit(128 + signal.Signals[found.stopped])
        if all(row.seconds is None for row in found.rows):
            raise SystemExit(1)


def tuned(command: Command) -> Tuned:
    """Tune as asked, saying what goes on."""
    from artifex.tuning.tuner import auto_tune

    return auto_tune(command.config, say=lambda line: print(line, flush=True), **command.how)


def parse(words: list[str]) -> Command:
    """Read the command line. Raises `ConfigError`; exits with 0 after `--help`."""
    from artifex.cli import model_name, options, resolve, split

    files, given = split(words, tuple(FLAGS))
    if "--help" in given:
        print(help_page())
        raise SystemExit(0)
    if len(files) > 1:
        raise ConfigError(f"there can be one CONFIG, got {' and '.join(files)}", source=SOURCE)
    own = {flag: " ".join(given.pop(flag)) for flag in OPTIONS if flag in given}
    anew = given.pop("--start-anew", None) is not None
    _check_known(given)
    file = files[0] if files and Path(files[0]).suffix in SUFFIXES else ""
    name, values = Path(file).stem or "quickstart", read_mapping(file) if file else {}
    if files and not file:
        from artifex.tuning.presets import run_of_preset

        name, values = files[0], run_of_preset(files[0])
    config = resolve(values, given, options(model_name(values, given, file)), file)
    how: dict[str, Any] = {"start_anew": anew, "name": name}
    for flag, kind in (("--budget", float), ("--share", float), ("--time-limit", float), ("--candidates", int)):
        if flag in own:
            how[flag[2:].replace("-", "_")] = _number(flag, own.pop(flag), kind)
    return Command(config, how | {flag[2:].replace("-", "_"): text for flag, text in own.items()})


def _check_known(given: Mapping[str, list[str]]) -> None:
    """Raise `ConfigError` for an option that is neither ours nor a field of the run."""
    unknown = next((flag for flag in given if "." not in flag), None)
    if unknown is not None:
        near = nearest(unknown.lstrip("-"), [name[2:] for name in (*OPTIONS, *FLAGS)])
        hint = f"did you mean --{near}?" if near else f"{PROGRAM} --help lists the options"
        raise ConfigError(f"{unknown} is unknown; {hint}", source=SOURCE)


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = -1
    if not 0 < number < 1e9:
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"{flag} is {text!r}; expected {what} above 0", source=SOURCE)
    return number


def help_page() -> str:
    """The options of a tune; those of the run are `python -m artifex.train --help`'s."""
    import textwrap

    lines = [f"usage: {PROGRAM} [CONFIG or PRESET] [--OPTION VALUE ...] [--section.field VALUE ...]", ""]
    entries = [(f"{flag} {kind}", what) for flag, (kind, what) in OPTIONS.items()] + list(FLAGS.items())
    for head, what in entries:
        lines.append(f"  {head}")
        lines += textwrap.wrap(what, 90, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, "", "and fields of the run: python -m artifex.train --help"])


if __name__ == "__main__":
    main()
