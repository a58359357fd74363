"""The planner's one function: from a model and a cluster to a plan.

found = plan(model, AutoDistConfig(mesh_col=8, memory_constraint=16, zero_stage="auto"), batch=shapes)
print(found); found.save("plan.yaml")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from artifex.scaling.autodist import plan_file
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.config import AutoDistConfig
from artifex.scaling.autodist.errors import nothing_fits
from artifex.scaling.autodist.limits import Limiting
from artifex.scaling.autodist.look import Candidate, Look, platform_of
from artifex.scaling.autodist.modules import ModuleSubject
from artifex.scaling.autodist.planned import Planned
from artifex.scaling.autodist.search import search
from artifex.scaling.autodist.subject import Infers, Subject


def plan(
    what: Any,
    config: AutoDistConfig | None = None,
    *,
    batch: Mapping[str, Any] | None = None,
    loss: Callable[..., Any] | None = None,
    cluster: Cluster | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Planned:
    """The plan for `what`: an NNX module, abstract or not, or a function that builds one, with the shapes of a `batch`,
    name -> (shape, dtype) or array; or a `Subject`, such as a run's.

    `loss(model, batch)` is what is trained, `model.loss(batch, rngs)` where it is not given. `cluster` goes before the
    options' `device`, `mesh_row` and `mesh_col`. `say` is told what goes on. Raises `ValueError` in one line where
    nothing fits, with what is missing and what would do, where the loss cannot be traced, and where options, model
    and batch do not go together.
    """
    config = config or AutoDistConfig()
    subject: Subject = what if hasattr(what, "traced") else ModuleSubject(what, batch, loss, trains=config.is_train)
    if not config.is_train and isinstance(what, Infers):
        subject = what.inferring()
    cluster = cluster or cluster_of(config)
    if cluster.device_count != config.devices:
        config = config.model_copy(update={"world_size": cluster.device_count})
    config.check_cluster()
    check_batch(subject, config)
    limiting = Limiting.of(config, subject.leaves, subject.blocks)
    if config.load_plan_path:
        found = plan_file.load(config.load_plan_path, subject, cluster, config)
    else:
        found = _searched(subject, cluster, config, limiting, say)
    if config.save_plan_path:
        found.save(config.save_plan_path)
    return found


def _searched(
    subject: Subject, cluster: Cluster, config: AutoDistConfig, limiting: Limiting, say: Callable[[str], None]
) -> Planned:
    found = search(subject, cluster, config, limiting, say)
    if not found.best:
        raise ValueError(nothing_fits(subject, cluster, config, found))
    notes = list(limiting.notes)
    if subject.unnamed:
        notes.append(f"without names, so whole on every device: {', '.join(subject.unnamed)}")
    return Planned(
        config.task_name,
        subject.about(),
        cluster,
        name_of(cluster, config),
        config.memory_bytes,
        found.best[0],
        found.best[1:],
        found.over,
        f"{found.meshes:,} {'mesh' if found.meshes == 1 else 'meshes'}, {found.guessed:,} solved for, "
        f"{len(found.best) + len(found.over)} traced, in {found.seconds:.1f} s",
        (config.partition_constraints_path,) if config.partition_constraints_path else (),
        tuple(notes),
        names=frozenset(name for leaf in subject.leaves for name in leaf.names),
    )


def predict(subject: Subject, cluster: Cluster, spread: Any) -> Candidate:
    """One spread, traced and estimated. Raises `ValueError` where it does not fit the model."""
    return Candidate(spread, Look(subject, cluster, platform_of(cluster))(spread))


def cluster_of(config: AutoDistConfig) -> Cluster:
    """The cluster that the options name, by published figures; or that of the devices present, by what was measured on
    them where `profile_dir` has that, or is to be measured anew."""
    rows = config.mesh_row * config.scale_factor
    if config.device is not None:
        return Cluster.of(config.device, rows, config.mesh_col, config.memory_constraint)
    import jax

    from artifex.scaling.autodist.profile import FILE, Measured, measure

    kind = jax.devices()[0]
    name = "cpu" if kind.platform == "cpu" else _named(kind)
    cluster = Cluster.of(name, rows, config.mesh_col, config.memory_constraint)
    folder = config.profile_folder(kind.device_kind)
    if config.re_profile:
        measured = measure(folder=folder, parallel=config.parallel_profile, again=True)
    elif (folder / FILE).exists():
        measured = Measured.load(folder)
    else:
        return cluster
    return dataclasses.replace(cluster, hardware=measured.hardware(cluster.hardware, cluster.device_count))


def _named(device: Any) -> str:
    from artifex.scaling.autodist.cluster import HARDWARE

    kind = device.device_kind.lower().replace(" ", "")
    platform = "tpu" if device.platform == "tpu" else "gpu"
    return next((name for name in HARDWARE if name.split(":")[-1] in kind), f"{platform}:{kind}")


def name_of(cluster: Cluster, config: AutoDistConfig) -> str:
    """What a plan calls its cluster."""
    return cluster.target or f"{cluster.hardware.name}:{cluster.hosts}x{cluster.devices_per_host}"


def check_batch(subject: Subject, config: AutoDistConfig) -> None:
    """Raise `ValueError` where micro_batch_size and update_freq are both given and make another batch."""
    both = {"micro_batch_size", "update_freq"} <= config.model_fields_set
    if both and config.batch_size != subject.rows:
        raise ValueError(
            f"micro_batch_size {config.micro_batch_size} x update_freq {config.update_freq} are batches of "
            f"{config.batch_size} rows, but the batch has {subject.rows}; make both the same"
        )
