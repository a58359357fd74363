"""The lines of `metrics.jsonl` also for TensorBoard and Weights & Biases, in the run's folder, each step once.

A number of a line is "split/name" at the line's step. What fails later costs the tracker and one line, never the run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from artifex.training.metrics_file import write_whole

Record = Mapping[str, Any]
TOLD = "told.json"  # beside the runs of wandb: which run this is, and what it was told


class Tracker(Protocol):
    """Something that takes the lines of a run, in their order."""

    def log(self, record: Record) -> None:
        """Take one. Raises whatever it likes, and is then left."""
        ...

    def close(self) -> None:
        """Write what is outstanding."""
        ...


def check_installed(names: Sequence[str]) -> None:
    """Raise `ImportError`, one line, for a tracker whose package is not there."""
    for name in names:
        if name == "tensorboard":
            package, there = "tensorboardX", importlib.util.find_spec("tensorboardX")
        else:
            package, there = "wandb", importlib.util.find_spec("wandb")
        if there is None:
            raise ImportError(f"logging.track {name!r} needs {package}: pip install 'artifex[{name}]', or leave it out")


class TensorBoard:
    """Event files in `folder`. Those of an earlier start are written anew from the `records` that the run goes on from,
    so that no step is there twice."""

    def __init__(self, folder: str | Path, records: Iterable[Record]):
        # not its SummaryWriter, whose thread dies of a full disk, and lets the one that tells it wait for ever
        from tensorboardX.event_file_writer import EventsWriter

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for before in folder.glob("events.out.tfevents.*"):
            before.unlink()
        self.writer = EventsWriter(str(folder / "events"))
        for record in records:
            self._write(record)
        self.writer.flush()

    def log(self, record: Record) -> None:
        """Write a line's numbers, to the disk."""
        self._write(record)
        self.writer.flush()

    def _write(self, record: Record) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        of: Any = summary_pb2  # whose classes are made when it is imported
        event: Any = event_pb2
        values = [of.Summary.Value(tag=tag, simple_value=number) for tag, number in numbers(record).items()]
        summary = of.Summary(value=values)
        self.writer.write_event(event.Event(wall_time=time.time(), step=record["step"], summary=summary))

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class WandB:
    """A run of Weights & Biases below `folder`/wandb, offline unless `WANDB_MODE` says otherwise.

    It takes back no step, so a run that goes on tells it what it has not been told: the lines of a split up to the
    step that it was told of last are left out, which a resumed run makes again, bit for bit.
    """

    def __init__(self, folder: str | Path, records: Iterable[Record], config: Mapping[str, Any], start: int):
        import wandb  # pyright: ignore[reportMissingImports]

        folder = Path(folder)
        self.file = folder / "wandb" / TOLD
        self.file.parent.mkdir(parents=True, exist_ok=True)
        known = _told(self.file) if start else None
        self.id, self.before = known or (secrets.token_hex(4), {})
        self.told = dict(self.before)
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        again: Any = {"resume": "allow"} if known and mode == "online" else {}
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "artifex"),
            name=folder.name,
            id=self.id,
            dir=folder,
            mode=mode,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
            **again,
        )
        for record in records:
            self._tell(record)
        self._keep()

    def log(self, record: Record) -> None:
        """Tell it a line's numbers, unless it knows that step."""
        self._tell(record)
        self._keep()

    def _tell(self, record: Record) -> None:
        step, split = record["step"], record["split"]
        if step <= self.before.get(split, -1):
            return
        self.run.log(numbers(record), step=step)
        self.told[split] = step

    def _keep(self) -> None:
        write_whole(self.file, json.dumps({"id": self.id, "told": self.told}).encode())

    def close(self) -> None:
        """End the run, once all is written."""
        self.run.finish()


class Trackers:
    """The trackers `names` of a run in `folder`, whose configuration is `config`, from step `start` on.

    `records` are the lines up to there. What fails is said once by `say` and left.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: str | Path,
        *,
        records: Sequence[Record],
        config: Mapping[str, Any],
        start: int,
        say: Callable[[str], None],
    ):
        self.say = say
        self.there: dict[str, Tracker] = {}
        open_one: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(Path(folder) / "tensorboard", records),
            "wandb": lambda: WandB(folder, records, config, start),
        }
        for name in names:
            if (tracker := self._attempt(name, open_one[name])) is not None:
                self.there[name] = tracker

    def log(self, record: Record) -> None:
        """Tell all a line."""
        for name, tracker in [*self.there.items()]:
            self._attempt(name, tracker.log, record)

    def close(self) -> None:
        """Let all write what is outstanding."""
        for name, tracker in [*self.there.items()]:
            self._attempt(name, tracker.close)
        self.there.clear()

    def _attempt(self, name: str, what: Callable[..., Any], *given: Any) -> Any:
        """`what(*given)`; where it fails None, and the tracker is told no more."""
        try:
            return what(*given)
        except Exception as error:  # noqa: BLE001  a tracker is another's program, and no reason to end a run
            self.there.pop(name, None)
            self.say(f"warning: {name} is told no more: {' '.join(str(error).split()) or type(error).__name__}")
            return None


def numbers(record: Record) -> dict[str, float]:
    """The numbers of a line by "split/name"."""
    return {
        f"{record['split']}/{name}": float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _told(file: Path) -> tuple[str, dict[str, int]] | None:
    try:
        known = json.loads(file.read_bytes())
        return str(known["id"]), {str(split): int(step) for split, step in known["told"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
