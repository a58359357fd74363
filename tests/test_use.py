"""Utilisation and memory of a run, as its lines tell them."""

import types

import numpy as np
import pytest

from artifex.training import use
from artifex.training.progress import fitting
from artifex.training.use import in_words


class Device:
    """A device that says what it holds."""

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def run_on(*stats):
    devices = [Device(one) for one in stats]
    return types.SimpleNamespace(mesh=types.SimpleNamespace(local_devices=devices))


def test_the_device_that_holds_most_is_told_else_what_the_step_takes(monkeypatch):
    monkeypatch.setattr(use, "share_of_peak", lambda blue: None)
    told = [run_on({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}), run_on(None, None), run_on({})]
    assert [use.use(blue, 1.0, 7) for blue in told] == [{"peak_bytes_in_use": 9}, {"step_bytes": 7}, {"step_bytes": 7}]
    assert use.use(run_on(None), None, 0) == {}


def test_utilisation_is_the_flops_of_the_steps_of_a_second_over_the_peak(monkeypatch):
    """A step of 6e9 FLOPs, 4 in a second, at 1e11 FLOP/s."""
    monkeypatch.setattr(use, "_of_peak", {})
    monkeypatch.setattr("artifex.training.model_flops.model_flops", lambda config: 6e9)
    found = types.SimpleNamespace(flops=1e11)
    monkeypatch.setattr("artifex.scaling.peak.peak", lambda devices, dtype: found)
    blue = run_on(None)
    blue.config = types.SimpleNamespace(training=types.SimpleNamespace(compute_dtype="float32"))
    blue.mesh.devices = np.array([None])
    assert use.use(blue, 4.0, 0) == {"mfu": pytest.approx(0.24)}
    assert in_words({"mfu": 0.24, "peak_bytes_in_use": 3 * 2**30}, 0.01) == "  MFU 24.0%  data wait 1.0%  3 GiB"
    monkeypatch.setattr("artifex.scaling.peak.peak", lambda devices, dtype: None)
    monkeypatch.setattr(use, "_of_peak", {})
    assert use.use(blue, 4.0, 0) == {}, "where no peak is known it is absent"


def test_beside_the_bar_stands_what_there_is_room_for():
    status = "loss 1.234  12,345 tokens/s  MFU 41.2%  data wait 0.0%"
    for width in range(100):
        shown = fitting(status, width)
        assert len(shown) <= width or shown == "loss 1.234"
        assert status == shown or status.startswith(f"{shown}  ")
    assert fitting(status, len(status)) == status
