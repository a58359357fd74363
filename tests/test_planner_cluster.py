"""What the planner knows of machines: names, the links between devices by layouts worked out by hand, and times."""

import dataclasses
import math
import subprocess
import sys

import pytest

from artifex.scaling.autodist.cluster import HARDWARE, KINDS, Cluster
from artifex.scaling.targets import GiB, Target

TWO_BY_EIGHT = Cluster.parse("gpu:h100:2x8")
H100 = HARDWARE["gpu:h100"]
POD = Cluster.parse("tpu:v5e:16x16")


def test_every_machine_names_its_source_and_has_numbers_above_zero():
    assert {"tpu:v5e", "tpu:v5p", "tpu:v6e", "tpu:tpu7x", "gpu:a100", "gpu:h100", "gpu:h200", "cpu"} == set(HARDWARE)
    for name, one in HARDWARE.items():
        assert one.name == name and ("https://" in one.source or "measured" in one.source)
        rates = (one.bandwidth, one.memory, one.inside, one.between, *one.flops.values(), *one.links)
        assert min(*rates, one.latency_inside, one.latency_between) > 0 and 0 < one.efficiency <= 1
        assert set(one.flops) == {"bfloat16", "float32"} and one.inside >= one.between


@pytest.mark.parametrize(
    ("text", "hosts", "each", "target"),
    [
        ("gpu:h100:4x8", 4, 8, "gpu:h100:4x8"),
        ("GPU:H100:2x8 ", 2, 8, "gpu:h100:2x8"),
        ("gpu:a100:1x8", 1, 8, None),
        ("gpu:h200:2x8", 2, 8, None),
        ("tpu:v5e:16x16", 32, 8, "tpu:v5e:16x16"),
        ("tpu:v5e:2x2", 1, 4, "tpu:v5e:2x2"),
        ("tpu:v5p:2x2x4", 4, 4, "tpu:v5p:2x2x4"),
        ("tpu:tpu7x:2x2x1", 1, 8, "tpu:tpu7x:2x2x1"),  # four chips of two devices
        ("cpu:8", 1, 8, "cpu:8"),
    ],
)
def test_a_name_says_hosts_devices_and_what_compiles_for_it(text, hosts, each, target):
    cluster = Cluster.parse(text)
    assert (cluster.hosts, cluster.devices_per_host, cluster.target) == (hosts, each, target)
    if target:
        assert Target.parse(target).device_count == cluster.device_count


def test_memory_is_the_targets_or_what_jax_takes_of_a_gpu_or_what_is_given(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    for name in ("gpu:h100:1x8", "tpu:v5e:4x4", "tpu:v5p:4x4x4"):
        assert Cluster.parse(name).memory == Target.parse(name).memory
    assert Cluster.parse("gpu:a100:1x8").memory == int(0.75 * HARDWARE["gpu:a100"].memory)
    assert Cluster.parse("cpu:8").memory == HARDWARE["cpu"].memory
    assert Cluster.parse("gpu:a100:1x8", memory=32).memory == 32 * 2**30
    assert Cluster.of("tpu:v5e", 1, 8, memory=0.5).memory == GiB // 2


def test_rows_are_hosts_and_columns_their_devices():
    both = Cluster.of("gpu:h200", 2, 8), Cluster.of("cpu", 2, 4)
    assert [(one.hosts, one.devices_per_host) for one in both] == [(2, 8), (2, 4)]
    assert both[1].target == "cpu:8"
    assert Cluster.of("gpu:h100", 4, 8) == Cluster.parse("gpu:h100:4x8")


@pytest.mark.parametrize(
    ("name", "row", "col", "target"),
    [
        ("tpu:v5e", 4, 8, "tpu:v5e:4x8"),
        ("tpu:v5e", 1, 4, "tpu:v5e:2x2"),
        ("tpu:v6e", 32, 8, "tpu:v6e:16x16"),
        ("tpu:v5p", 1, 4, "tpu:v5p:2x2x1"),
        ("tpu:v5p", 8, 4, "tpu:v5p:2x4x4"),
        ("tpu:tpu7x", 2, 8, "tpu:tpu7x:2x2x2"),
    ],
)
def test_so_many_chips_are_the_most_even_slice(name, row, col, target):
    cluster = Cluster.of(name, row, col)
    assert (cluster.target, cluster.device_count) == (target, row * col)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu:h10:2x8", "did you mean gpu:h100:2x8?"),
        ("h200:2x8", "did you mean gpu:h200:2x8?"),
        ("tpu:v5:4x4", "did you mean tpu:v5"),
        ("abacus", "known are tpu:v5e, "),
        ("gpu:h100", "has the shape ''; expected hosts and GPUs of each, such as gpu:h100:2x8"),
        ("gpu:a100:16", "has the shape '16'"),
        ("tpu:v5e:16", "expected 2 sizes of a slice, such as tpu:v5e:4x4"),
        ("tpu:v5p:4x4", "expected 3 sizes of a slice, such as tpu:v5p:4x4x4"),
        ("cpu", "expected a number of devices, such as cpu:8"),
        ("gpu:h100:0x8", "has the shape '0x8'"),
    ],
)
def test_a_name_that_is_none_is_one_line_with_one_that_is(text, says):
    with pytest.raises(ValueError) as caught:
        Cluster.parse(text)
    assert says in str(caught.value) and repr(text) in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_is_refused():
    for memory in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="expected a number above 0"):
            Cluster.parse("cpu:8", memory=memory)
    with pytest.raises(ValueError, match="'gpu:h1000' is not known; did you mean gpu:h100"):
        Cluster.of("gpu:h1000")
    with pytest.raises(ValueError, match="expected 1 or more of each"):
        Cluster.of("cpu", 0, 8)
    with pytest.raises(ValueError, match="2 devices in a chip, got 3"):
        Cluster.of("tpu:tpu7x", 1, 3)
    with pytest.raises(ValueError, match="'expert' is none of the mesh; it has data, tensor"):
        TWO_BY_EIGHT.link({"data": 2, "tensor": 8}, "expert")
    with pytest.raises(ValueError, match="has 8 devices; expected 16"):
        TWO_BY_EIGHT.link({"data": 8}, "data")
    with pytest.raises(ValueError, match="did you mean all-reduce"):
        TWO_BY_EIGHT.seconds("allreduce", 1, "data", {"data": 16})
    with pytest.raises(ValueError, match="no FLOP/s of 'float64'; expected one of bfloat16, float32"):
        TWO_BY_EIGHT.compute_seconds(1, 1, "float64")


INSIDE, BETWEEN = (H100.inside, H100.latency_inside), (H100.between, H100.latency_between)


@pytest.mark.parametrize(
    ("sizes", "axis", "expected", "neighbours"),
    [
        # devices 0 to 7 on one host, 8 to 15 on the other; the last axis is the fastest
        ({"data": 2, "tensor": 8}, "tensor", INSIDE, 8),  # 0 1 .. 7
        ({"data": 2, "tensor": 8}, "data", BETWEEN, 1),  # 0 8
        ({"tensor": 8, "data": 2}, "data", INSIDE, 2),  # 0 1
        ({"tensor": 8, "data": 2}, "tensor", BETWEEN, 4),  # 0 2 4 6 | 8 ..
        ({"tensor": 16}, "tensor", BETWEEN, 8),
        ({"data": 4, "tensor": 4}, "data", BETWEEN, 2),  # 0 4 | 8 12
        ({"data": 2, "fsdp": 2, "tensor": 4}, "fsdp", INSIDE, 2),  # 0 4
        ({"data": 2, "fsdp": 2, "tensor": 4}, ("fsdp", "tensor"), INSIDE, 8),
        ({"data": 2, "fsdp": 2, "tensor": 4}, ("data", "tensor"), BETWEEN, 4),  # 0 1 2 3 | 8 9 10 11
        ({"data": 2, "fsdp": 2, "tensor": 4}, ("tensor", "data"), BETWEEN, 4),  # in any order
        ({"data": 1, "tensor": 16}, "data", INSIDE, 1),  # a group of one
    ],
)
def test_devices_of_one_host_are_inside_and_others_between(sizes, axis, expected, neighbours):
    link = TWO_BY_EIGHT.link(sizes, axis)
    assert (link.bandwidth, link.latency) == expected
    assert link.neighbours == neighbours


def test_hosts_that_an_axis_does_not_fill_evenly_count_by_the_worst():
    three = Cluster.parse("gpu:h100:3x2")  # 0 1 2 | 3 4 5 are on the hosts 0 0 1 | 1 2 2
    link = three.link({"data": 2, "tensor": 3}, "tensor")
    assert (link.bandwidth, link.neighbours) == (H100.between, 1)


def test_times_are_bytes_over_bandwidth_and_a_latency_for_each_step():
    sizes, sent, a = {"data": 2, "tensor": 8}, 1e9, H100.latency_inside
    steps = {"all-reduce": 14, "all-gather": 7, "reduce-scatter": 7, "all-to-all": 7, "collective-permute": 1}
    for kind, count in steps.items():
        for times in (1, 5):
            found = TWO_BY_EIGHT.seconds(kind, sent, "tensor", sizes, times)
            assert found == pytest.approx(sent / H100.inside + times * count * a)
            assert TWO_BY_EIGHT.seconds(kind, sent, "data", sizes | {"data": 1, "tensor": 16}, times) == 0
    found = TWO_BY_EIGHT.seconds("all-reduce", sent, "data", sizes)
    assert found == pytest.approx(sent / H100.between + 2 * H100.latency_between)


def test_a_ring_over_two_hosts_leaves_each_with_an_eighth_of_what_its_devices_send():
    sizes, sent = {"fsdp": 16}, 8e9
    # 8 rings, one leaving by the network link of each device; 7 of 8 steps stay on the host, of 15 all but one do
    expected = max(1e9 / H100.between, 7e9 / H100.inside) + 14 * H100.latency_inside + H100.latency_between
    assert TWO_BY_EIGHT.seconds("all-gather", sent, "fsdp", sizes) == pytest.approx(expected)
    # 8 of the 15 others are elsewhere
    expected = sent * 8 / 15 / H100.between + 8 * H100.latency_between
    assert TWO_BY_EIGHT.seconds("all-to-all", sent, "fsdp", sizes) == pytest.approx(expected)
    # device 7 sends all of its own to device 8
    expected = sent / H100.between + H100.latency_between
    assert TWO_BY_EIGHT.seconds("collective-permute", sent, "fsdp", sizes) == pytest.approx(expected)


def test_two_levels_of_a_sum_cost_no_more_than_one_ring_over_all():
    """A reduce-scatter inside, an all-reduce of the parts between and an all-gather inside send W in all as a ring of
    16 does: what leaves the hosts is W / 8 twice, either way."""
    sizes, whole = {"data": 2, "fsdp": 8}, 16e9
    parts = sum(TWO_BY_EIGHT.seconds(kind, whole * 7 / 8, "fsdp", sizes) for kind in ("reduce-scatter", "all-gather"))
    parts += TWO_BY_EIGHT.seconds("all-reduce", whole / 8, "data", sizes)
    ring = TWO_BY_EIGHT.seconds("all-reduce", 2 * whole * 15 / 16, "fsdp", {"data": 1, "fsdp": 16}, 1)
    ring_over_all = TWO_BY_EIGHT.seconds("all-reduce", 2 * whole * 15 / 16, ("data", "fsdp"), sizes)
    assert ring == ring_over_all
    assert 0.5 < ring_over_all / parts < 1.0  # both links at once, against one after the other


@pytest.mark.parametrize(
    ("cluster", "sizes", "axis", "ways"),
    [
        (POD, {"data": 16, "tensor": 16}, "tensor", 2),  # a whole axis of a pod is a ring, used both ways
        (POD, {"data": 16, "tensor": 16}, "data", 2),
        (POD, {"fsdp": 256}, "fsdp", 4),  # both axes
        (POD, {"data": 64, "tensor": 4}, "tensor", 1),  # a quarter of an axis is a line
        (POD, {"data": 64, "tensor": 4}, "data", 2),  # one axis, and every fourth of the other, shared with 3 groups
        (Cluster.parse("tpu:v5e:4x4"), {"data": 4, "tensor": 4}, "tensor", 1),  # rings close at 16
        (Cluster.parse("tpu:v5e:8x16"), {"data": 8, "tensor": 16}, "tensor", 2),
        (Cluster.parse("tpu:v5e:8x16"), {"data": 8, "tensor": 16}, "data", 1),
        (Cluster.parse("tpu:v5p:4x4x8"), {"data": 4, "fsdp": 4, "tensor": 8}, "fsdp", 2),  # cubes of 4 close
        (Cluster.parse("tpu:v5p:4x4x8"), {"data": 4, "fsdp": 4, "tensor": 8}, ("data", "fsdp"), 4),
        (Cluster.parse("tpu:v5p:2x4x4"), {"data": 2, "fsdp": 4, "tensor": 4}, "fsdp", 1),  # less than a cube
        (Cluster.parse("tpu:tpu7x:4x4x4"), {"data": 64, "tensor": 2}, "tensor", 12),  # the cores of a chip
        (Cluster.parse("tpu:tpu7x:4x4x4"), {"data": 64, "tensor": 2}, "data", 6),
    ],
)
def test_a_slice_has_the_links_of_the_axes_that_a_group_spans(cluster, sizes, axis, ways):
    assert cluster.link(sizes, axis).bandwidth == ways * cluster.hardware.links[0]


def test_in_a_torus_a_permutation_goes_one_way_and_an_all_to_all_further():
    sizes, one = {"data": 16, "tensor": 16}, POD.hardware
    hop = one.latency_inside
    assert POD.seconds("collective-permute", 1e9, "tensor", sizes) == pytest.approx(1e9 / 50e9 + hop)
    assert POD.seconds("all-gather", 1e9, "tensor", sizes) == pytest.approx(1e9 / 100e9 + 15 * hop)
    # the book's bytes / 4 of the whole array over both ways: each of 16 sends a sixteenth, 4 links far
    assert POD.seconds("all-to-all", 1e9, "tensor", sizes) == pytest.approx(16e9 / 4 / 100e9 + 8 * hop)


def test_computing_takes_as_long_as_its_products_or_its_memory():
    peak = H100.flops["bfloat16"] * H100.efficiency
    assert TWO_BY_EIGHT.compute_seconds(1e15, 1e9, "bfloat16") == pytest.approx(1e15 / peak)
    assert TWO_BY_EIGHT.compute_seconds(1e9, 1e12, "bfloat16") == pytest.approx(1e12 / H100.bandwidth)
    assert TWO_BY_EIGHT.compute_seconds(1e15, 0, "float32") > TWO_BY_EIGHT.compute_seconds(1e15, 0, "bfloat16")


def test_faster_links_never_take_longer():
    faster = dataclasses.replace(H100, inside=2 * H100.inside, between=2 * H100.between)
    other = dataclasses.replace(TWO_BY_EIGHT, hardware=faster)
    for kind in KINDS:
        for sizes in ({"data": 2, "tensor": 8}, {"data": 4, "tensor": 4}, {"data": 1, "tensor": 16}):
            for axes in ("tensor", ("data", "tensor")):
                times = [one.seconds(kind, 1e8, axes, sizes) for one in (other, TWO_BY_EIGHT)]
                assert 0 < times[0] < times[1]


def test_the_file_imports_no_jax():
    code = "import sys, artifex.scaling.autodist.cluster; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
