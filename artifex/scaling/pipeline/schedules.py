"""Pipeline schedules as tables: which device works on which microbatch of which stage at each tick, and where it lies.

S devices hold V stages each, device s the stages s, S + s, 2 S + s, ...; stage g takes microbatch m forwards and,
later, backwards. All devices take a tick together: what is done in one is received by the neighbour before the next.
Forwards microbatches follow each other at every device without a gap, in groups of S for each of its stages in turn
(Narayanan et al. 2021, arXiv:2104.04473, figure 4), so that with idx(m, v) = (m // S) S V + v S + m % S, from 0 on,

    forward tick of stage v S + s:   s + idx(m, v)                                                        (1)
    backward tick:                   first + (S - 1 - s) + idx(m, V - 1 - v)                              (2)

where `first` is the tick in which the last stage ends microbatch 0 ("1f1b", "interleaved"), or all of them ("gpipe",
Huang et al. 2018, arXiv:1811.06965). Either way a device stands idle for S - 1 of its V M + S - 1 turns.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from artifex.scaling.strategies import PipelineParallelStrategy

Kind = Literal["gpipe", "1f1b", "interleaved"]
Turn = tuple[int, int]  # a microbatch and a stage


@dataclasses.dataclass(frozen=True)
class Schedule:
    """`devices` in a row with `stages_per_device` stages each, and `microbatches` that pass through all of them.

    Raises `ValueError` for an unknown kind or sizes that do not fit it.
    """

    kind: Kind
    devices: int
    microbatches: int
    stages_per_device: int = 1

    def __post_init__(self) -> None:
        S, M, V = self.devices, self.microbatches, self.stages_per_device
        if self.kind not in ("gpipe", "1f1b", "interleaved"):
            raise ValueError(f"pipeline schedule {self.kind!r} is unknown; choose gpipe, 1f1b or interleaved")
        if min(S, M, V) < 1:
            raise ValueError(f"pipeline of {S} devices, {M} microbatches and {V} stages a device; each is at least 1")
        if (V > 1) != (self.kind == "interleaved"):
            raise ValueError(
                f"{V} stages a device with schedule {self.kind!r}; 'interleaved' needs at least 2, the others 1"
            )
        if V > 1 and M % S:
            near = max(M // S, 1) * S
            raise ValueError(
                f"{M} microbatches do not divide by the {S} devices of an interleaved pipeline; {near} would, or "
                f"{near + S}"
            )

    def __str__(self) -> str:
        more = f" of {self.stages_per_device} stages each" if self.stages_per_device > 1 else ""
        return f"{self.kind} pipeline of {self.devices} devices{more}, {self.microbatches} microbatches"

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline."""
        return self.devices * self.stages_per_device

    def forward_tick(self, turn: Turn) -> int:
        """When a stage takes a microbatch forwards: equation (1)."""
        microbatch, stage = turn
        v, s = divmod(stage, self.devices)
        return s + self._index(microbatch, v)

    def backward_tick(self, turn: Turn) -> int:
        """When a stage takes a microbatch backwards: equation (2)."""
        microbatch, stage = turn
        v, s = divmod(stage, self.devices)
        first = self.forward_tick((self.microbatches - 1 if self.kind == "gpipe" else 0, self.stages - 1))
        first += self.kind == "gpipe"
        return first + (self.devices - 1 - s) + self._index(microbatch, self.stages_per_device - 1 - v)

    def _index(self, microbatch: int, v: int) -> int:
        group, place = divmod(microbatch, self.devices)
        return (group * self.stages_per_device + v) * self.devices + place

    @functools.cached_property
    def turns(self) -> tuple[tuple[tuple[Turn | None, Turn | None], ...], ...]:
        """For each tick and device the turn it takes forwards and the one it takes backwards, None where it is idle."""
        every = [(m, g) for m in range(self.microbatches) for g in range(self.stages)]
        length = 1 + max(self.backward_tick(turn) for turn in every)
        grid: list = [[[None, None] for _ in range(self.devices)] for _ in range(length)]
        for turn in every:
            for way, tick in enumerate((self.forward_tick(turn), self.backward_tick(turn))):
                assert grid[tick][turn[1] % self.devices][way] is None, "a device takes one turn each way"
                grid[tick][turn[1] % self.devices][way] = turn
        return tuple(tuple(tuple(pair) for pair in row) for row in grid)

    @property
    def taken(self) -> dict[int, tuple[int, int, int]]:
        """Of so many ticks, in how many some device goes forwards, the last stage ends a microbatch, and some device
        goes backwards: the conditionals of a tick, in their order."""
        forwards, backwards = (sum(any(pair[way] for pair in row) for row in self.turns) for way in (0, 1))
        return {len(self.turns): (forwards, self.microbatches, backwards)}

    def sends(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(sender, receiver) of streams and of gradients; with several stages each, the last device goes on at the
        first."""
        strategy = PipelineParallelStrategy(num_stages=self.devices)
        around = [(self.devices - 1, 0)] if self.stages_per_device > 1 else []
        on, back = strategy.get_forward_communication_pattern(), strategy.get_backward_communication_pattern()
        return on + around, back + [(receiver, sender) for sender, receiver in around]

    def time(self, forward: float = 1.0, backward: float = 2.0) -> float:
        """How long all ticks take, where a stage takes `forward` and `backward` for a microbatch: a tick waits for its
        slowest device, so it costs either where any device has such a turn."""
        return sum(
            forward * any(pair[0] for pair in row) + backward * any(pair[1] for pair in row) for row in self.turns
        )

    def bubble(self, forward: float = 1.0, backward: float = 2.0) -> float:
        """The share of the time in which a device is idle."""
        busy = self.microbatches * self.stages_per_device * (forward + backward)
        return 1 - busy / self.time(forward, backward)


@dataclasses.dataclass(frozen=True)
class Tables:
    """A schedule for the executor: rows are ticks, columns devices. Slots are places where a device keeps the streams
    that came from the device before it (`streams` of them) and the gradients that came from the one behind it
    (`gradients`); one more slot, the last, takes what nobody needs."""

    streams: int
    gradients: int
    columns: dict[str, np.ndarray]  # int32, (ticks, devices)


def tables(schedule: Schedule) -> Tables:
    """What each device does, and in which slots it finds and keeps what it needs: the schedule played through by hand.

    `forward_v`, `forward_m`, `forward_from`: stage of the device, microbatch, slot of its stream; idle devices repeat
    stage 0 and microbatch 0 from the last slot, and nobody takes what they send. `backward`: 1 where there is such a
    turn, then `backward_v`, `backward_m`, `backward_from`, and `gradient_from` its slot of the gradient. `stream_to`,
    `gradient_to`: where what arrives goes. `ends`: 1 where the last stage has taken `ended` forwards, on all devices
    alike; `end_to`: the slot of the gradient of its stream. `any_forward`, `any_backward`: on all devices alike.
    """
    S, G, length = schedule.devices, schedule.stages, len(schedule.turns)
    own = ("forward_v", "forward_m", "forward_from", "backward", "backward_v", "backward_m", "backward_from")
    names = (
        *own,
        "gradient_from",
        "stream_to",
        "gradient_to",
        "ends",
        "ended",
        "end_to",
        "any_forward",
        "any_backward",
    )
    columns = {name: np.zeros((length, S), np.int32) for name in names}
    none = -1  # the last slot, until it is known how many there are
    for name in ("forward_from", "backward_from", "gradient_from", "stream_to", "gradient_to", "end_to"):
        columns[name][:] = none
    most = [0, 0]
    for s in range(S):
        streams, gradients = _Slots(), _Slots()
        for t, row in enumerate(schedule.turns):
            before = schedule.turns[t - 1] if t else ((None, None),) * S
            sent, returned = before[(s - 1) % S][0], before[(s + 1) % S][1]
            if sent is not None and sent[1] + 1 < G:
                columns["stream_to"][t, s] = streams.take((sent[0], sent[1] + 1))
            if returned is not None and returned[1] > 0:
                columns["gradient_to"][t, s] = gradients.take((returned[0], returned[1] - 1))
            forward, backward = row[s]
            if forward is not None:
                columns["forward_m"][t, s], columns["forward_v"][t, s] = forward[0], forward[1] // S
                if forward[1] > 0:  # what enters the first stage is made from its microbatch
                    columns["forward_from"][t, s] = streams.where[forward]
                if forward[1] == G - 1:
                    columns["ends"][t, :], columns["ended"][t, :] = 1, forward[0]
                    columns["end_to"][t, s] = gradients.take(forward)
            if backward is not None:
                columns["backward"][t, s], columns["backward_m"][t, s] = 1, backward[0]
                columns["backward_v"][t, s] = backward[1] // S
                if backward[1] > 0:
                    columns["backward_from"][t, s] = streams.free(backward)
                columns["gradient_from"][t, s] = gradients.free(backward)
        assert not streams.where and not gradients.where, "all that is kept is used"
        most = [max(most[0], streams.most), max(most[1], gradients.most)]
    for name, last in zip(
        ("stream_to", "forward_from", "backward_from", "gradient_to", "gradient_from", "end_to"),
        (most[0], most[0], most[0], most[1], most[1], most[1]),
        strict=True,
    ):
        columns[name][columns[name] == none] = last
    columns["any_forward"][:] = np.array([[any(pair[0] for pair in row)] for row in schedule.turns])
    columns["any_backward"][:] = np.array([[any(pair[1] for pair in row)] for row in schedule.turns])
    return Tables(most[0], most[1], columns)


class _Slots:
    """Numbered places, the one freed last taken first."""

    def __init__(self) -> None:
        self.where: dict[Turn, int] = {}
        self.unused: list[int] = []
        self.most = 0

    def take(self, turn: Turn) -> int:
        if not self.unused:
            self.unused.append(self.most)
            self.most += 1
        self.where[turn] = self.unused.pop()
        return self.where[turn]

    def free(self, turn: Turn) -> int:
        slot = self.where.pop(turn)
        self.unused.append(slot)
        return slot
