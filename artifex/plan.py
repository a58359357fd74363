"""`python -m artifex.plan`: how is this run best spread over a cluster that need not be there, and what would it need.

    python -m artifex.plan configs/quickstart.yaml --cluster gpu:h100:2x8 --memory 60 --top 5
    python -m artifex.plan profile

Writes the plan, its table and a picture of memory against time into a folder; a run follows the plan by
`--device.plan`. What takes time to import is imported inside the functions.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.config import Config
from artifex.config_io import ConfigError, nearest, read_mapping
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.training.signals import ending_at_once

if TYPE_CHECKING:
    from artifex.scaling.autodist.planned import Planned

PROGRAM = "python -m artifex.plan"
SOURCE = "command line"
FLAGS = {
    "--verify": "compile the training step of the leading candidates for the cluster, each in a process of its own "
    "(default for GPUs)",
    "--no-verify": "compile nothing",
    "--help": "print this and stop",
}
CLUSTER = ("mesh_row", "mesh_col", "world_size", "device")
"""Options that name a cluster; without them and without `--cluster` it is the devices present."""

SHORT = {"--memory": "memory_constraint", "--top": "topk"}
TIME_LIMIT = 600.0
LEADING = 3
"""Candidates that are compiled side by side before others are."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What `python -m artifex.plan` was asked."""

    config: Config
    options: AutoDistConfig
    cluster: str | None
    folder: Path
    verify: bool | None
    seconds: float
    run: tuple[str, ...] = ()
    """The run as `python -m artifex.train` takes it: the file, and the options that were given."""


@ending_at_once(": nothing was written")
def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 where nothing fits."""
    from artifex.cli import fail, program, user_errors

    words = sys.argv[1:] if argv is None else argv
    with program():
        if words[:1] == ["profile"]:
            with user_errors():
                print(profile(words[1:]))
            return
        with user_errors():
            command = parse(words)
        try:
            found = planned(command, say=print)
        except (ConfigError, ImportError, OSError) as error:
            fail(str(error))
        except ValueError as error:
            fail(str(error), code=1)
        paths = write(found, command.folder)  # before anything is printed: a reader may leave early
        print(f"\n{found}\n")
        for path in paths:
            print(path)
        if command.options.is_train:
            words = (*command.run, "--device.plan", str(command.folder / "plan.yaml"))
            print(f"train by it:   python -m artifex.train {shlex.join(words)}")


def parse(words: list[str]) -> Command:
    """Read the command line. Raises `ConfigError`; exits with 0 after `--help`."""
    from artifex.cli import model_name, options, resolve, split

    files, given = split(words, tuple(FLAGS))
    if "--help" in given:
        print(help_page())
        raise SystemExit(0)
    if len(files) > 1:
        raise ConfigError(f"there can be one CONFIG, got {' and '.join(files)}", source=SOURCE)
    file = files[0] if files else ""
    flags = {flag: given.pop(flag, None) is not None for flag in FLAGS}
    if flags["--verify"] and flags["--no-verify"]:
        raise ConfigError("--verify and --no-verify are both given; give one", source=SOURCE)
    cluster = given.pop("--cluster", None)
    seconds = _number(given.pop("--time-limit", [str(TIME_LIMIT)]), "--time-limit")
    out = given.pop("--out", None)
    planner = _options(given)
    if flags["--verify"] and not planner.is_train:
        raise ConfigError(
            "--verify compiles steps of training, but is_train is false; leave one of them out", source=SOURCE
        )
    values = read_mapping(file) if file else {}
    name = model_name(values, given, file)
    config = resolve(values, given, options(name), file)
    kind = (cluster[0] if cluster else "devices").replace(":", "-")
    folder = Path(" ".join(out)) if out else Path("plans") / f"{Path(file).stem or 'quickstart'}-{kind}"
    verify = True if flags["--verify"] else False if flags["--no-verify"] else None
    run = (*files, *_typed(given))
    return Command(config, planner, " ".join(cluster) if cluster else None, folder, verify, seconds, run)


def planned(command: Command, say: Callable[[str], None] = lambda line: None) -> Planned:
    """The plan that was asked for, proved by compiling where that is asked for, or cheap. Raises `ValueError` where
    nothing fits."""
    from artifex.scaling.autodist.cluster import Cluster
    from artifex.scaling.autodist.planner import plan
    from artifex.training.planning import RunSubject, proved

    options, cluster = command.options, None
    if command.cluster is None:
        options = present(options)
    else:
        memory = options.memory_constraint if "memory_constraint" in options.model_fields_set else None
        try:
            cluster = Cluster.parse(command.cluster, memory)
        except ValueError as error:
            raise ConfigError(str(error), source=SOURCE) from None
        sizes = {"mesh_row": cluster.hosts, "mesh_col": cluster.devices_per_host, "world_size": cluster.device_count}
        options = AutoDistConfig(**{**_given(options), **sizes, "memory_constraint": cluster.memory / 2**30})
    subject = RunSubject(command.config)
    found = plan(subject, options, cluster=cluster, say=say)
    verify, target = command.verify, found.cluster.target
    if verify and target is None:
        raise ConfigError(f"--verify: no compiler knows {found.cluster_name}; leave it out", source=SOURCE)
    if verify is None and target is not None and target.startswith("gpu"):
        why = _uncompiled(target) if options.is_train else "is_train is false, and only steps of training are"
        verify = not why
        if why:
            found = dataclasses.replace(found, notes=(*found.notes, f"not compiled: {why}"))
    if verify:
        count = min(LEADING, 1 + len(found.runners)) if target is not None and target.startswith("gpu") else 1
        say(f"compiling the first {count} for {target}")
        found = proved(found, subject, count=count, seconds=command.seconds, nproc=max(options.nproc, min(count, 2)))
    return found


def _uncompiled(target: str) -> str:
    """Why nothing can be compiled for a target, empty where it can."""
    from artifex.scaling.targets import Target

    try:
        Target.parse(target).check_compiler()
    except ImportError as error:
        return str(error)
    return ""


def present(options: AutoDistConfig) -> AutoDistConfig:
    """The options for the devices that are present, of all processes, where they name no cluster of their own."""
    import jax

    from artifex.scaling.autodist.planner import cluster_of

    if options.model_fields_set & {*CLUSTER}:
        return options
    sizes = {"mesh_row": jax.process_count(), "mesh_col": jax.local_device_count()}
    found = AutoDistConfig(**{**_given(options), **sizes})
    if "memory_constraint" in options.model_fields_set:
        return found
    reported = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    name = cluster_of(found.model_copy(update={"re_profile": False})).hardware.name
    memory = memory_of(name, reported)
    return found if memory is None else AutoDistConfig(**{**_given(found), "memory_constraint": memory})


def memory_of(hardware: str, reported: int | None) -> float | None:
    """GB of a device that is present: what it reports, else what JAX takes of such a one; None of a CPU, which has
    no memory of its own."""
    from artifex.scaling.autodist.cluster import HARDWARE, Cluster

    if reported is not None:
        return reported / 2**30
    if hardware == "cpu":
        return None
    return Cluster.of(hardware, mesh_col=HARDWARE[hardware].host).memory / 2**30


def write(found: Planned, folder: str | Path) -> list[Path]:
    """Plan, table and picture, as files of `folder`."""
    from artifex.scaling.autodist.pictures import draw_frontier

    folder = Path(folder)

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("plan.yaml", "plan.txt", "frontier.png")]
    found.save(paths[0])
    paths[1].write_text(f"{found}\n", encoding="utf-8")
    draw_frontier(found, paths[2])
    return paths


def profile(words: list[str]) -> str:
    """Measure the devices present, and say what was found."""
    from artifex.cli import split
    from artifex.scaling.autodist.profile import FILE, measure

    files, given = split(words, ("--help",))
    if "--help" in given:
        return (
            f"usage: {PROGRAM} profile [--profile-dir PATH] [--re-profile true] [--parallel-profile false]\n\n"
            "Measures the devices present into PATH/KIND/profile.json, where a plan with the same --profile-dir looks "
            "(default: ~/.cache/artifex/autodist/1.0)"
        )
    if files:
        raise ConfigError(f"profile takes no file, got {files[0]}", source=SOURCE)
    options = _options(given)
    if given:
        raise ConfigError(f"{next(iter(given))} is unknown to profile; {PROGRAM} profile --help", source=SOURCE)
    import jax

    folder = options.profile_folder(jax.local_devices()[0].device_kind)
    measured = measure(folder=folder, parallel=options.parallel_profile, again=options.re_profile)
    return f"{measured}\n{folder / FILE}"


def _given(options: AutoDistConfig) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.model_fields_set}


def _typed(given: Mapping[str, list[str]]) -> list[str]:
    """The options of the run that were given, but for those that a plan says."""
    from artifex.scaling.autodist.plan_file import FOLLOWED

    decided = {f"--training.{name}".replace("_", "-") for name in FOLLOWED}
    kept = [flag for flag in given if flag not in decided and not flag.startswith("--device.")]
    return [word for flag in kept for word in (flag, *given[flag])]


def _options(given: dict[str, list[str]]) -> AutoDistConfig:
    """The planner's options, taken out of `given`; ZeRO is the planner's choice unless it is said."""
    from artifex.cli import Option, value_typed

    values: dict[str, Any] = {"zero_stage": "auto", "topk": 5}
    for name, field in AutoDistConfig.model_fields.items():
        option = Option((name,), field.annotation, field.description or "")
        words = given.pop(option.flag, None)
        if words is not None:
            values[name] = _listed(words) if name == "search_space" else value_typed(option, words)
    for flag, name in SHORT.items():
        if flag in given:
            values[name] = value_typed(
                Option((name,), AutoDistConfig.model_fields[name].annotation, ""), given.pop(flag)
            )
    unknown = [flag for flag in given if "." not in flag]
    if unknown:
        known = [*FLAGS, *SHORT, "--cluster", "--out", "--time-limit"]
        known += [f"--{name.replace('_', '-')}" for name in AutoDistConfig.model_fields]
        near = nearest(unknown[0].lstrip("-"), [name[2:] for name in known])
        hint = f"did you mean --{near}?" if near else f"{PROGRAM} --help lists the options"
        raise ConfigError(f"{unknown[0]} is unknown; {hint}", source=SOURCE)
    try:
        return AutoDistConfig(**values)
    except ConfigError as error:
        raise error.within(source=SOURCE) from None


def _listed(words: list[str]) -> Any:
    parts = [part for word in words for part in word.split(",")]
    return parts[0] if len(parts) == 1 else parts


def _number(words: list[str], flag: str) -> float:
    try:
        number = float(" ".join(words))
    except ValueError:
        number = -1.0
    if not 0 < number < 1e9:
        raise ConfigError(f"{flag} is {' '.join(words)!r}; expected seconds above 0", source=SOURCE)
    return number


def help_page() -> str:
    """The options of the planner; those of the run are `python -m artifex.train --help`'s."""
    from artifex.cli import kind_of, text_of

    lines = [f"usage: {PROGRAM} [CONFIG] --cluster CLUSTER [--memory GB] [--top N] [--OPTION VALUE ...]", ""]
    lines += ["  --cluster CLUSTER  gpu:h100:4x8 (hosts x GPUs), tpu:v5e:16x16, cpu:8; without it the devices present,"]
    lines += ["                     or --mesh-row x --mesh-col of --device"]
    lines += ["  --out PATH  folder for plan.yaml, plan.txt and frontier.png (default: plans/CONFIG-CLUSTER)"]
    lines += [f"  --time-limit SECONDS  of one compilation (default: {TIME_LIMIT:g})"]
    lines += [f"  {flag}  {what}" for flag, what in FLAGS.items()]
    lines += [f"  {flag}  as --{name.replace('_', '-')}" for flag, name in SHORT.items()]
    lines += ["", "the planner's options (docs/scaling/planner.md):"]
    defaults: Mapping[str, Any] = {"zero_stage": "auto", "topk": 5}
    for name, field in AutoDistConfig.model_fields.items():
        default = text_of(defaults.get(name, field.default))
        kind = "TEXT" if name == "search_space" else kind_of(field.annotation)
        lines.append(f"  --{name.replace('_', '-')} {kind}  {field.description} (default: {default})")
    return "\n".join([*lines, "", "and those of the run: python -m artifex.train --help"])


if __name__ == "__main__":
    main()
