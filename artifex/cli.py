"""The command line `python -m artifex.train [CONFIG] --section.field VALUE ...`, made from the configuration's fields.

A parser of our own: it must learn which model is meant before it knows its options, and answers every mistake in one
line. Imports no JAX.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

import artifex
from artifex.cli_options import Option, fields_of, kind_of, members_of, options, text_of, value_of
from artifex.config import Config, sections
from artifex.config_io import ConfigError, nearest, one_line, read_mapping, scalar
from artifex.config_model import ModelConfig
from artifex.config_section import checked
from artifex.scaling.processes import Start
from artifex.scaling.targets import Target

SOURCE = "command line"
PROGRAM = "python -m artifex.train"
USAGE = f"{PROGRAM} [CONFIG] [--section.field VALUE ...] [--run-dir PATH] [--start-anew] [--print-config] [--dry-run]"
ABOUT = (
    "Train a model. CONFIG is a .json or .yaml file that holds what differs from the defaults; without one the "
    "quickstart is trained. Options win over the file."
)
FLAGS = {
    "--print-config": "print the resolved configuration, which can be given as CONFIG, and stop",
    "--dry-run": "print parameter count, shardings and memory per device, and stop",
    "--start-anew": "begin at step 0 where the run folder has checkpoints; they are renamed and stay",
    "--other-batch-size": "go on in a run folder with another training.batch_size, from the sample where it stands",
    "--take-over": "train in a folder that a process of another host holds, which has ended; of this host it is known",
    "--help": "print this, with the values of CONFIG and the fields of --model.name, and stop",
}
TIME_LIMIT = 1_800.0  # seconds: 70B for a thousand chips takes some minutes on two cores
VALUES = {
    "--replay STEP": "CONFIG is the folder of a run: take this step again, from the newest checkpoint before it and "
    "with its batch if that was kept, and say what it makes; nothing is written",
    "--target TARGET": "with --dry-run: a machine that need not be there, tpu:v5e:4x4, gpu:h100:2x8 or cpu:8; the step "
    "is compiled for it and what it would need and send is printed",
    "--time-limit SECONDS": f"with --target: when to give up (default: {TIME_LIMIT:g})",
}
_INTEGER = re.compile(r"[-+]?[0-9]+")


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """What `python -m artifex.train` was asked to do."""

    config: Config
    run_dir: Path
    print_config: bool
    dry_run: bool
    start_anew: bool = False
    take_over: bool = False
    other_batch_size: bool = False
    target: Target | None = None
    time_limit: float = TIME_LIMIT
    replay: int | None = None
    start: Start = dataclasses.field(default_factory=Start)

    def asks(self) -> dict[str, Any]:
        """What it was asked for, by name: what the processes of one run must be asked for alike."""
        told = {"run-dir": str(self.run_dir), "start-anew": self.start_anew, "dry-run": self.dry_run}
        told |= {"replay": self.replay, "other-batch-size": self.other_batch_size}
        fields = {option.flag: value_of(self.config, option) for option in options(self.config.model.name)}
        return told | {flag.lstrip("-"): value for flag, value in fields.items()} | versions()


def fail(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr and exit: 2 for what the user can mend, 1 for a run that failed."""
    print(f"error: {one_line(' '.join(message.splitlines()))}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Answer what a user can mend with one line and exit code 2: `ValueError` (so `ConfigError`), `OSError`,
    `MemoryError`, and `ImportError`, of a package that only some runs need."""
    try:
        yield
    except BrokenPipeError:  # no mistake: see `program`
        raise
    except (ValueError, OSError, MemoryError, ImportError) as error:
        fail(str(error))


@contextlib.contextmanager
def program() -> Iterator[None]:
    """What `python -m` runs: XLA's own log stays off, and a reader who leaves (`| head`) is no error.

    What XLA logs is about XLA, its errors come as exceptions, and what ends the process is printed at any level.
    TF_CPP_MIN_LOG_LEVEL=0 shows all of it. JAX reads this when it is imported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        yield
    except BrokenPipeError:
        silence()
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            silence()


def silence() -> None:
    """Let what is still printed, and what Python flushes at its end, go nowhere: nobody reads it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def parse_train(argv: list[str] | None = None) -> TrainCommand:
    """Read the command line (None: the process's own). Exits with 0 after `--help`, with 2 for anything wrong."""
    with user_errors():
        files, given = split(sys.argv[1:] if argv is None else argv)
        if len(files) > 1:
            raise ConfigError(f"there can be one CONFIG, got {' and '.join(files)}", source=SOURCE)
        file = files[0] if files else ""
        if (replay := _replay(given, file)) is not None:
            given["--run-dir"], file = [file], str(Path(file, "config.json"))
        values = read_mapping(file) if files else {}
        known = options(model_name(values, given, file))
        if "--help" in given:
            name = {flag: words for flag, words in given.items() if flag == "--model.name"}
            print(format_help(resolve(values, name, known, file), known))
            raise SystemExit(0)
        flags = {flag: given.pop(flag, None) is not None for flag in FLAGS}
        default = f"runs/{Path(file).stem or 'quickstart'}"
        run_dir = " ".join(given.pop("--run-dir", [default]))
        if not run_dir:
            raise ConfigError("--run-dir is empty; name a folder", source=SOURCE)
        target, limit = _target(given, dry_run=flags["--dry-run"])
        start = start_of({flag: given.pop(flag) for flag in [*given] if flag in START})
        config = resolve(values, given, known, file)
        return TrainCommand(
            config,
            Path(run_dir),
            print_config=flags["--print-config"],
            dry_run=flags["--dry-run"],
            start_anew=flags["--start-anew"],
            take_over=flags["--take-over"],
            other_batch_size=flags["--other-batch-size"],
            target=target,
            time_limit=limit,
            replay=replay,
            start=start,
        )


def _replay(given: dict[str, list[str]], folder: str) -> int | None:
    """The step to be taken again, out of the options that were given."""
    words = given.pop("--replay", None)
    if words is None:
        return None
    if not folder or "--run-dir" in given:
        raise ConfigError("--replay is for the folder of a run alone, as in RUN --replay STEP", source=SOURCE)
    return checked(scalar(" ".join(words)), Annotated[int, Field(ge=1)], ("--replay",))


def _target(given: dict[str, list[str]], *, dry_run: bool) -> tuple[Target | None, float]:
    """The machine to compile for and the seconds that it may take, out of the options that were given."""
    limit, name = given.pop("--time-limit", None), given.pop("--target", None)
    for flag, words, needed in (("--target", name, dry_run), ("--time-limit", limit, name is not None)):
        if words is not None and not needed:
            other = "--dry-run" if flag == "--target" else "--target"
            raise ConfigError(f"{flag} is for {other}, which is not given; add it, or leave {flag} out", source=SOURCE)
    seconds = scalar(" ".join(limit)) if limit else TIME_LIMIT
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ConfigError(f"--time-limit is {' '.join(limit or [])!r}; expected seconds above 0", source=SOURCE)
    return None if name is None else Target.parse(" ".join(name)), float(seconds)


def start_of(given: Mapping[str, list[str]]) -> Start:
    """How processes meet, by the options of `START` that were given, as words."""
    values = {}
    for flag, words in given.items():
        option = START[flag]
        values[option.key[-1]] = checked(value_typed(option, words), option.annotation, option.key)
    return Start(**values)


def sizes_of(text: str) -> dict[str, int]:
    """`fsdp=4,tensor=2` as a mapping."""
    parts = [part.strip().partition("=") for part in text.split(",")]
    if not all(axis and size.isdecimal() and int(size) for axis, _, size in parts):
        raise ValueError(f"--mesh {text!r} is no list of axes with their devices; expected one as in fsdp=4,tensor=2")
    return {axis: int(size) for axis, _, size in parts}


def versions() -> dict[str, str]:
    """What computes a run, by name: other versions may compute it otherwise."""
    others = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"artifex": artifex.__version__, "python": platform.python_version(), **others}


def format_help(config: Config, known: list[Option]) -> str:
    """The help page: every option with its value in `config`, grouped by section."""
    width = min(shutil.get_terminal_size((100, 0)).columns, 100)
    lines = [f"usage: {USAGE}", "", *textwrap.wrap(ABOUT, width), "", "run"]
    default = "default: runs/ and the name of CONFIG"
    lines += _entry("--run-dir PATH", f"folder of the run; one that is there already goes on ({default})", width)
    for flag, what in (*VALUES.items(), *FLAGS.items()):
        lines += _entry(flag, what, width)
    for option in START.values():
        default = getattr(Start(), option.key[-1])
        lines += _entry(
            f"{option.flag} {kind_of(option.annotation)}", f"{option.help} (default: {text_of(default)})", width
        )
    section = ""
    for option in known:
        if len(option.key) > 1 and option.key[0] != section:
            section = option.key[0]
            what = (sections()[section].__doc__ or "").splitlines()[0]
            lines += ["", *textwrap.wrap(f"{section}: {what}", width, subsequent_indent="  ")]
        text = f"{option.help} (default: {text_of(value_of(config, option))})".strip()
        lines += _entry(f"{option.flag} {kind_of(option.annotation)}", text, width)
    return "\n".join(lines)


def _entry(head: str, text: str, width: int, column: int = 42) -> list[str]:
    unbroken = text.replace("(default: ", "(default:\xa0")
    wrapped = textwrap.wrap(unbroken, max(width - column, 30), break_on_hyphens=False)
    wrapped = [line.replace("\xa0", " ") for line in wrapped]
    if len(head) + 4 > column:
        return [f"  {head}", *(" " * column + line for line in wrapped)]
    return [f"  {head:<{column - 2}}{wrapped[0]}", *(" " * column + line for line in wrapped[1:])]


def split(argv: list[str], flags: Collection[str] = tuple(FLAGS)) -> tuple[list[str], dict[str, list[str]]]:
    """Words that are no options, and option -> its words: what follows `=`, or the next word and integers after it."""
    files: list[str] = []
    given: dict[str, list[str]] = {}
    words = list(reversed(argv))
    while words:
        word = words.pop()
        if not word.startswith("-"):
            files.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = "--help" if flag == "-h" else flag.replace("_", "-")
        if flag in given:
            raise ConfigError(f"{flag} is given twice; keep one of them", source=SOURCE)
        given[flag] = [value] if equals else []
        if flag in flags:
            if equals:
                raise ConfigError(f"{flag} takes no value, got {value!r}", source=SOURCE)
        elif not equals:
            if not words or words[-1].startswith("--"):
                raise ConfigError(f"{flag} needs a value, as in {flag}=VALUE", source=SOURCE)
            given[flag].append(words.pop())
            while words and _INTEGER.fullmatch(words[-1]):
                given[flag].append(words.pop())
    return files, given


def model_name(values: Mapping[str, Any], given: Mapping[str, list[str]], file: str) -> str:
    """The preset meant, known before anything else is read, as its family decides which options there are."""
    section = values.get("model", {})
    name = section.get("name", ModelConfig().name) if isinstance(section, Mapping) else ModelConfig().name
    if typed := given.get("--model.name"):
        name = " ".join(typed)
    try:
        return ModelConfig(name=name).name
    except ConfigError as error:
        raise error.within("model", source=SOURCE if typed else file) from None


def resolve(values: Mapping[str, Any], given: Mapping[str, list[str]], known: list[Option], file: str) -> Config:
    """The file's values, replaced by the given ones. An error is the file's where the file alone has it too."""
    by_flag = {option.flag: option for option in known}
    merged = copy.deepcopy(dict(values))
    for flag, words in given.items():
        if flag not in by_flag:
            others = (*FLAGS, *START, *(flag.split()[0] for flag in VALUES), "--run-dir")
            near = nearest(flag.lstrip("-"), [name[2:] for name in (*by_flag, *others)])
            hint = f"did you mean --{near}?" if near else f"{PROGRAM} --help lists the options"
            raise ConfigError(f"{flag} is unknown; {hint}", source=SOURCE)
        option = by_flag[flag]
        *outer, name = option.key
        target: Any = merged
        for part in outer:
            target = target.setdefault(part, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):  # a section that is none is refused below
            target[name] = value_typed(option, words)
    try:
        return Config.from_dict(merged)
    except ConfigError as error:
        if file:
            try:
                Config.from_dict(values)
            except ConfigError as alone:
                if str(alone) == str(error):
                    raise error.within(source=file) from None
        raise error.within(source=SOURCE) from None


def value_typed(option: Option, words: list[str]) -> Any:
    """The typed words as a value of the option's kind, or as near to one as they are: the section checks it."""
    members = members_of(option.annotation)
    if types.NoneType in members and words in (["none"], ["null"]):
        return None
    if any(typing.get_origin(member) is tuple for member in members):
        parts = [scalar(part) for word in words for part in word.split(",")]
        return parts if len(parts) > 1 or isinstance(parts[0], int) else parts[0]
    if len(words) > 1:
        raise ConfigError(f"takes one value, got {' '.join(words)}", option.key, SOURCE)
    # an empty word is what an unset shell variable leaves behind, and not null
    return words[0] if str in members or not words[0] else scalar(words[0])


START = {option.flag: option for option in fields_of(Start(), ("device",))}
"""The options that say how processes meet. They are no fields of a configuration: each process has its own."""
