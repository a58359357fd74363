"""Measured times: written once, used again, measured again when asked; failures stay failures."""

import json
import math

import jax
import pytest

from artifex.scaling.autodist.cluster import HARDWARE, RINGS
from artifex.scaling.autodist.profile import COLLECTIVES, FILE, Measured, Row, Sizes, _program, default_dir, measure
from artifex.scaling.communication import communication

TINY = Sizes(products=(8, 16), dtypes=("float32",), elementwise=(1_024,), collectives=(4_096,), turns=2, repeats=2)
ONE = Sizes(products=(8,), dtypes=("float32",), elementwise=(1_024,), collectives=(), turns=1, repeats=1)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A folder measured on eight devices, and what came of it."""
    folder = tmp_path_factory.mktemp("eight")
    return folder, measure(folder=folder, sizes=TINY)


def test_everything_asked_for_is_measured_and_positive(eight):
    _, measured = eight
    assert not measured.failed and len({row.key for row in measured.rows}) == len(measured.rows)
    assert all(row.seconds is not None and 0 < row.seconds < 60 and row.rate > 0 for row in measured.rows)
    kinds = {(row.what, row.devices) for row in measured.rows}
    assert kinds == {("product", 8), ("elementwise", 8)} | {(kind, n) for kind in COLLECTIVES for n in (2, 4, 8)}


def test_bytes_are_those_that_a_ring_sends(eight):
    """Of 4,096 asked for among 4: each of an all-gather has 1,365 bytes, in whole float32 for each of 4: 1,360."""
    sizes = {row.what: row.size for row in eight[1].rows if row.devices == 4 and row.size > 1_000}
    assert sizes["all-gather"] == 1_360 * 3
    assert sizes["collective-permute"] == 4_096
    for kind, size in sizes.items():
        assert abs(size - 4_096) <= 4 * 4 * COLLECTIVES[kind](4) / 2


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_program_sends_what_its_row_says(optimised, kind):
    """As XLA's text of it has it, where nothing was optimised away."""
    program, given = _program((kind, "float32", 12 * 1_024, 4), jax.devices(), turns=3)
    (row,) = communication(program.lower(given).compile().as_text(), {"groups": 2, "group": 4}).rows
    assert (row.kind, row.times, row.axes, row.sent) == (kind, 3, ("group",), 3 * 12 * 1_024)
    assert row.devices == (2 if kind == "collective-permute" else 4)  # sender and receiver


def test_what_was_written_is_read(eight):
    folder, measured = eight
    assert Measured.load(folder) == measured
    text = json.loads((folder / FILE).read_text())
    assert (text["schema"], text["device"], text["jax"]) == (1, "cpu", jax.__version__)


def test_what_is_there_is_not_measured_again(eight):
    folder, measured = eight
    before = (folder / FILE).stat().st_mtime_ns
    assert measure(folder=folder, sizes=TINY) == measured
    assert (folder / FILE).stat().st_mtime_ns == before
    assert [path.name for path in folder.iterdir()] == [FILE]


def test_what_is_missing_is_added_and_again_replaces_all(tmp_path):
    first = measure(jax.devices()[:1], folder=tmp_path, sizes=ONE)
    assert [row.what for row in first.rows] == ["product", "elementwise"]
    more = measure(jax.devices()[:1], folder=tmp_path, sizes=Sizes((8, 16), ("float32",), (), (), 1, 1))
    assert [row.size for row in more.rows] == [8, 16] and more.rows[0] == first.rows[0]
    assert set(Measured.load(tmp_path).rows) == {*first.rows, *more.rows}
    again = measure(jax.devices()[:1], folder=tmp_path, sizes=ONE, again=True)
    assert Measured.load(tmp_path) == again
    assert [row.key for row in again.rows] == [row.key for row in first.rows] and again.rows != first.rows


def test_all_devices_compute_at_once_or_one_alone(tmp_path):
    devices = jax.devices()[:4]
    assert {row.devices for row in measure(devices, folder=tmp_path, sizes=ONE).rows} == {4}
    assert {row.devices for row in measure(devices, folder=tmp_path, sizes=ONE, parallel=False).rows} == {1}


def test_a_failure_is_kept_as_its_error(tmp_path):
    sizes = Sizes((8,), ("float32", "float12"), (1_024, 2**55), (), 1, 1)  # no such dtype, and no such memory
    measured = measure(jax.devices()[:1], folder=tmp_path, sizes=sizes)
    dtype, memory = measured.failed
    assert (dtype.what, dtype.dtype, dtype.seconds) == ("product", "float12", None)
    assert "float12" in dtype.error
    assert (memory.what, memory.size, memory.seconds) == ("elementwise", 2**55, None)
    assert "memory" in memory.error
    assert repr(measured).count("failed: ") == 2 and repr(measured).count("/s") == 2
    assert measure(jax.devices()[:1], folder=tmp_path, sizes=sizes) == measured
    found = measured.hardware(HARDWARE["cpu"])
    assert found.flops["bfloat16"] == HARDWARE["cpu"].flops["bfloat16"] and "float12" not in found.flops
    assert math.isfinite(found.bandwidth)


@pytest.mark.parametrize(("field", "value"), [("device", "TPU v5e"), ("jax", "0.1.0"), ("schema", 7)])
def test_another_device_version_or_schema_says_to_measure_again(tmp_path, field, value):
    measure(jax.devices()[:1], folder=tmp_path, sizes=ONE)
    text = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(text | {field: value}))
    with pytest.raises(ValueError, match="give re_profile") as caught:
        measure(jax.devices()[:1], folder=tmp_path, sizes=ONE)
    assert str(value) in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert measure(jax.devices()[:1], folder=tmp_path, sizes=ONE, again=True) == Measured.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 1, "device": "cpu", "jax": "1", "rows": [{}]}',
        '{"schema": 1, "device": "cpu", "jax": "1", "rows": [["product", "float32", 8, 1, 0.1, ""]]}',
    ],
)
def test_a_file_that_is_no_profile_says_to_measure_again(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=r"profile.json is no profile: .*; give re_profile"):
        Measured.load(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        ("product", "float32", 8, 1, 0.0),
        ("product", "float32", 8, 1, -1.0),
        ("product", "float32", 8, 1, math.nan),
        ("product", "float32", 8, 1, None),
        ("product", "float32", 8, 1, 1.0, "and yet it failed"),
        ("product", "float32", 0, 1, 1.0),
        ("product", "float32", 8, 1.0, 1.0),
        ("sum", "float32", 8, 1, 1.0),
    ],
)
def test_a_row_has_a_time_above_zero_or_an_error(row):
    with pytest.raises(ValueError, match="is no measurement"):
        Row(*row)


def made(*rows):
    return Measured("cpu", "1", tuple(Row(*row) for row in rows))


def test_times_between_sizes_lie_on_a_line_of_logarithms():
    measured = made(
        ("all-reduce", "float32", 100, 8, 1.0),
        ("all-reduce", "float32", 10_000, 8, 4.0),
        ("all-reduce", "float32", 1_000, 2, 0.5),
        ("all-gather", "float32", 100, 8, None, "lost"),
    )
    assert measured.seconds("all-reduce", 1_000, 8) == pytest.approx(2.0)  # half way: the root of 1 times 4
    assert measured.seconds("all-reduce", 100, 8) == pytest.approx(1.0)
    assert measured.seconds("all-reduce", 10_000, 8) == pytest.approx(4.0)
    assert measured.seconds("all-reduce", 1, 8) == pytest.approx(1.0)  # its start
    assert measured.seconds("all-reduce", 30_000, 8) == pytest.approx(12.0)  # its bytes
    assert measured.seconds("all-reduce", 1_000, 16) == pytest.approx(2.0)  # the nearest number of devices
    assert measured.seconds("all-reduce", 1_000, 3) == pytest.approx(0.5)
    assert measured.seconds("all-reduce", 0, 8) == measured.seconds("all-reduce", 1_000, 1) == 0
    with pytest.raises(ValueError, match="no all-gather was measured on cpu: lost; give re_profile"):
        measured.seconds("all-gather", 100, 8)
    with pytest.raises(ValueError, match="no all-to-all was measured on cpu: it was not asked for"):
        measured.seconds("all-to-all", 100, 8)


def test_hardware_has_what_was_measured_in_its_place():
    base = HARDWARE["gpu:h100"]
    found = made(
        ("product", "bfloat16", 100, 8, 1e-6),  # 2e6 FLOP: 2e12 a second
        ("product", "bfloat16", 200, 8, 4e-6),  # 16e6: 4e12
        ("product", "bfloat16", 200, 1, 1e-9),  # alone; a step has all at once
        ("elementwise", "float32", 1_000, 8, 1e-9),  # in a cache
        ("elementwise", "float32", 4_000, 8, 1e-9),
        ("all-reduce", "float32", 1_400, 8, 1.4e-4),  # 14 steps of 10 us
        ("all-gather", "float32", 7_000, 8, 1.4e-4),  # 7 of 20 us; 5e7 bytes/s
        ("all-gather", "float32", 7_000, 2, 1e-9),
    ).hardware(base)
    assert found.efficiency == 1
    assert found.flops["bfloat16"] == pytest.approx(4e12)
    assert found.flops["float32"] == pytest.approx(base.flops["float32"] * base.efficiency)  # was not measured
    assert found.bandwidth == pytest.approx(4e12)
    assert found.inside == pytest.approx(5e7)
    assert found.latency_inside == pytest.approx(1e-5)
    assert (found.between, found.memory, found.name) == (base.between, base.memory, base.name)
    assert found.source.startswith("measured on cpu with JAX 1: product") and base.source in found.source


def test_a_device_alone_has_no_collectives(tmp_path):
    measured = measure(jax.devices()[:1], folder=tmp_path, sizes=TINY)
    assert {row.what for row in measured.rows} == {"product", "elementwise"}
    found = measured.hardware(HARDWARE["cpu"])
    assert (found.inside, found.latency_inside) == (HARDWARE["cpu"].inside, HARDWARE["cpu"].latency_inside)


def test_a_number_of_devices_that_is_no_power_of_two_talks_all_together(tmp_path):
    sizes = Sizes((), (), (), (4_096,), 1, 1)
    measured = measure(jax.devices()[:6], folder=tmp_path, sizes=sizes)
    assert {row.devices for row in measured.rows} == {2, 6} and not measured.failed
    assert set(RINGS) & {row.what for row in measured.rows}


def test_each_kind_of_device_has_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_dir() == tmp_path / ".cache/artifex/autodist/1.0/cpu"
    assert default_dir("NVIDIA H100 80GB HBM3").name == "NVIDIA-H100-80GB-HBM3"
