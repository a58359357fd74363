"""`python -m artifex.profile CONFIG`: where do the time and the memory of a step of this run go.

    python -m artifex.profile configs/quickstart.yaml --steps 20
    python -m artifex.profile configs/quickstart.yaml --device.fsdp 4 --device.tensor 2

Trains some steps on the run's own data, in a folder of its own that is gone afterwards, and writes what it found as
text, JSON and a page of HTML. As a function, `artifex.profile(step)` is the context of `artifex.profiling`. What takes
time to import is imported inside the functions.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes time to import
    from artifex.host_memory import begin_again

    begin_again()

import dataclasses
import sys
import tempfile
import types
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from artifex.config import Config
from artifex.config_io import ConfigError, nearest, read_mapping, scalar
from artifex.config_section import checked
from artifex.training.signals import ending_at_once

PROGRAM = "python -m artifex.profile"
SOURCE = "command line"
STEPS = 20
FLAGS = {"--no-trace": "do not trace: times, memory and communication alone", "--help": "print this and stop"}
USAGE = f"""usage: {PROGRAM} [CONFIG] [--steps N] [--out PATH] [--no-trace] [--section.field VALUE ...]

  --steps N     steps that are taken, at least 4: the first is not timed, the next two are traced (default: {STEPS})
  --out PATH    folder for profile.txt, profile.json and profile.html (default: profiles/CONFIG)
  --no-trace    {FLAGS["--no-trace"]}

and the options of the run: python -m artifex.train --help"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What `python -m artifex.profile` was asked."""

    config: Config
    steps: int
    out: Path
    trace: bool


class _Callable(types.ModuleType):
    """This module, which is `artifex.profile` once it is imported, is the function of that name too."""

    def __call__(self, what: Any, **how: Any) -> Any:
        from artifex.profiling import profile

        return profile(what, **how)


sys.modules[__name__].__class__ = _Callable


@ending_at_once(": nothing was written")
def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a run that failed."""
    from artifex.cli import fail, program, user_errors

    with program():
        with user_errors():
            command = parse(sys.argv[1:] if argv is None else argv)
        try:
            with user_errors():
                found = measured(command)
                paths = found.save(command.out)
        except FloatingPointError as error:
            fail(str(error), code=1)
        print(f"{found.summary()}\n")
        for path in paths:
            print(path)


def parse(words: list[str]) -> Command:
    """Read the command line. Raises `ConfigError`; exits with 0 after `--help`."""
    from artifex.cli import model_name, options, resolve, split

    files, given = split(words, tuple(FLAGS))
    if "--help" in given:
        print(USAGE)
        raise SystemExit(0)
    if len(files) > 1:
        raise ConfigError(f"there can be one CONFIG, got {' and '.join(files)}", source=SOURCE)
    file = files[0] if files else ""
    trace = given.pop("--no-trace", None) is None
    steps = scalar(" ".join(given.pop("--steps", [str(STEPS)])))
    steps = checked(steps, Annotated[int, Field(ge=4)], ("--steps",))
    out = Path(" ".join(given.pop("--out", [f"profiles/{Path(file).stem or 'quickstart'}"])))
    known = ["steps", "out", *(flag[2:] for flag in FLAGS)]
    if unknown := next((flag for flag in given if "." not in flag), None):
        near = nearest(unknown.lstrip("-"), known)
        hint = f"did you mean --{near}?" if near else f"{PROGRAM} --help lists the options"
        raise ConfigError(f"{unknown} is unknown; {hint}", source=SOURCE)
    values = read_mapping(file) if file else {}
    config = resolve(values, given, options(model_name(values, given, file)), file)
    return Command(config, steps, out, trace)


def measured(command: Command) -> Any:
    """The run's first steps, profiled. Raises as a run that is started does."""
    from artifex.profiling import profile
    from artifex.training.opening import open_run

    config = command.config
    config.training.steps = max(config.training.steps, command.steps)
    config.logging.progress = False
    with tempfile.TemporaryDirectory(prefix="artifex-profile-") as folder:
        run = open_run(config, Path(folder) / "run")
        with run.lock, run.checkpoints, profile(run, profile_compute=command.trace) as prof:
            prof.train(command.steps)
    return prof.result


if __name__ == "__main__":
    main()
