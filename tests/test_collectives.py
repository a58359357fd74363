"""Wishes about how devices talk: what a platform grants changes its compiled program as wished, the rest is said."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from artifex import train
from artifex.config import CollectivesConfig, Config, ConfigError
from artifex.scaling.collectives import KINDS, settings
from artifex.scaling.communication import Communication, communication
from artifex.training.memory import compile_step
from artifex.training.state import blueprint, planned
from artifex.training.task import batch_shapes

ROOT = pathlib.Path(__file__).parent.parent
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
GPU = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs jax-cuda13-plugin")
SMALL = {"name": "llama-nano", "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 64}


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a GPU as says where it is."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"


def mesh(hosts, each, **axes) -> Mesh:
    devices = [Device(number, number // each) for number in range(hosts * each)]
    return Mesh(np.array(devices, dtype=object).reshape(tuple(axes.values())), tuple(axes))


def wished(platform="gpu", where=None, **wishes):
    return settings(CollectivesConfig(**wishes), platform, where or mesh(2, 4, data=2, fsdp=4))


# ---- what is typed


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_a_text_and_another_order_are_one_wish(kind):
    forms = ({"tensor": "tree", "data": "ring"}, "data=ring,tensor=tree", " tensor=tree , data=ring")
    assert {getattr(CollectivesConfig(**{kind: form}), kind) for form in forms} == {"data=ring,tensor=tree"}


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"all_reduce": "dat=ring"}, "collectives.all_reduce has 'dat', which is unknown; did you mean data?"),
        (
            {"all_gather": "data=rng"},
            "collectives.all_gather has 'data=rng', which is unknown; did you mean data=ring?",
        ),
        ({"all_reduce": "ring"}, "collectives.all_reduce must be pairs of mesh axes and values, as in 'data=ring,"),
        ({"all_reduce": {}}, "collectives.all_reduce must be pairs of mesh axes"),
        ({"all_to_all": "data=ring,data=tree"}, "collectives.all_to_all names 'data' twice"),
        ({"fuse_mb": -1}, "collectives.fuse_mb must be in MB, from 0 to 1000000, got -1"),
        ({"fuse_mb": "all_reduce=nan"}, "collectives.fuse_mb must be in MB, from 0 to 1000000, got 'nan'"),
        ({"fuse_mb": True}, "collectives.fuse_mb must be in MB"),
        ({"fuse_mb": 10**400}, "collectives.fuse_mb must be in MB"),
        ({"all_reduce": {"data": ["ring"]}}, "collectives.all_reduce has \"data=['ring']\", which is unknown; "),
        ({"fuse_mb": "all_to_all=3"}, "collectives.fuse_mb has 'all_to_all', which is unknown; "),
        ({"overlap": "yes"}, "collectives.overlap must be 'auto', 'on' or 'off', got 'yes'"),
    ],
)
def test_a_wish_that_is_none_is_an_error(wish, says):
    with pytest.raises(ConfigError) as error:
        Config.from_dict({"collectives": wish})
    assert str(error.value).startswith(says)


def test_a_saved_configuration_holds_the_same_wishes(tmp_path):
    config = Config.from_dict({"collectives": {"all_reduce": {"data": "tree"}, "fuse_mb": 2.5, "overlap": "off"}})
    config.save(tmp_path / "c.yaml")
    assert Config.from_file(tmp_path / "c.yaml") == config


# ---- what is granted


def test_nothing_wished_is_nothing_set():
    for platform in ("cpu", "gpu", "tpu"):
        assert wished(platform).lines == []


def test_nccl_is_told_by_collective_and_the_user_that_it_cannot_tell_axes_apart():
    both = wished(all_reduce="data=tree,fsdp=tree", all_gather="fsdp=ring")
    assert both.environment == {"NCCL_ALGO": "AllReduce:Tree;AllGather:Ring"}
    assert both.unmet == ("all_gather ring holds for data as well: NCCL cannot tell axes apart",)
    (line,) = wished(all_reduce="data=tree,fsdp=ring").unmet
    assert "data=tree,fsdp=ring" in line and "cannot tell axes apart" in line


def test_what_the_environment_says_already_stays(monkeypatch):
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    found = wished(all_reduce="data=tree,fsdp=tree")
    assert found.environment == {} and "NCCL_ALGO=Ring is set outside and stays" in found.unmet[0]


@pytest.mark.parametrize(
    ("hosts", "axes", "reason"),
    [
        (1, {"data": 8}, "data lies within a host"),
        (2, {"data": 2, "fsdp": 4}, "data has one device of each host"),
        (2, {"fsdp": 4, "data": 2}, "data lies within a host"),
        (8, {"data": 8}, "data has one device of each host"),
    ],
)
def test_hosts_that_do_not_divide_an_axis_are_named(hosts, axes, reason):
    found = wished(where=mesh(hosts, 8 // hosts, **axes), all_reduce="data=hierarchical")
    assert found.options == {} and found.unmet == (f"all_reduce data=hierarchical changes nothing: {reason}",)


def test_hosts_whose_devices_are_not_neighbours_are_no_hierarchy():
    devices = [Device(number, number % 2) for number in range(8)]
    (line,) = wished(where=Mesh(np.array(devices, dtype=object), ("data",)), all_reduce="data=hierarchical").unmet
    assert "next to each other" in line


def test_a_process_to_each_gpu_makes_no_host_of_each():
    devices = [Device(number, process_index=number, slice_index=number // 4) for number in range(8)]
    where = Mesh(np.array(devices, dtype=object), ("data",))
    (found,) = wished(where=where, all_reduce="data=hierarchical").options.values()
    assert found == 4


def test_every_wish_without_a_setting_is_said():
    every = dict.fromkeys(KINDS, "data=ring") | {"fuse_mb": 8, "overlap": "on"}
    cpu = wished("cpu", **every)
    assert (cpu.options, cpu.environment) == ({}, {})
    for word in (*KINDS, "fuse_mb", "overlap"):
        assert any(line.startswith(word) and "cannot be granted" in line for line in cpu.unmet), word
    tpu = wished("tpu", **every)
    assert all(any(line.startswith(f"{kind} data=ring cannot") for line in tpu.unmet) for kind in KINDS)
    assert any("all_gather, reduce_scatter, collective_permute cannot" in line for line in tpu.unmet)
    gpu = wished("gpu", **every)
    assert [line for line in gpu.unmet if "cannot be granted" in line] == [
        "all_to_all data=ring cannot be granted: NCCL sends each part straight to its device"
    ]
    assert "is about no axis of this mesh, which has data, fsdp" in wished(all_reduce="tensor=ring").unmet[0]
    (one,) = wished(where=mesh(1, 1, data=1), all_reduce="data=ring").unmet
    assert one.startswith("one device sends nothing")


def small(**sections) -> Config:
    defaults = {"model": SMALL, "data": {"sequence_length": 16}, "training": {"batch_size": 8}}
    return Config.from_dict(defaults | {"device": {"data": 8}} | sections)


def test_a_run_says_what_it_could_not_set():
    text = train.dry_run(small(collectives={"all_reduce": "data=tree", "overlap": "on"}))
    tree, overlap = text.splitlines()[-2:]
    assert tree.startswith("collectives: all_reduce data=tree cannot be granted: devices of a CPU share its memory")
    assert overlap == "collectives: overlap=on cannot be granted: XLA for CPUs has no such setting"


def test_a_compiler_without_the_setting_is_named(monkeypatch):
    monkeypatch.setattr("artifex.scaling.collectives._THRESHOLDS", {"cpu": {"all_reduce": "xla_no_such_threshold"}})
    config = small(collectives={"fuse_mb": "all_reduce=1"})
    plan = planned(config, 8)
    blue = blueprint(config, plan, plan.make_mesh(jax.devices()))
    with pytest.raises(ValueError, match=r"'xla_no_such_threshold', which `collectives` sets .* leave the wish out"):
        compile_step(blue, batch_shapes(config))


# ---- what it does to the program of a machine that is not there


def program(target, sizes, collectives, folder) -> tuple[str, Communication]:
    """The compiled step of two layers of Llama 3.2 1B, and what it sends."""
    shape = {"model": {"num_layers": 2, "vocab_size": 8_192}, "collectives": collectives}
    words = ["--mesh", ",".join(f"{axis}={size}" for axis, size in sizes.items()), "--batch", "16"]
    words += ["--sequence", "512", "--set", json.dumps(shape), "--text", str(folder / "program")]
    command = [sys.executable, "benchmarks/target_memory.py", target, "llama3.2-1b", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    text = (folder / "program").read_text()
    return text, communication(text, sizes)


def times(sends: Communication, kind: str) -> int:
    return sum(row.times for row in sends.rows if row.kind == kind)


@pytest.mark.slow
@GPU
def test_hosts_send_each_other_a_part_of_what_they_send_without_a_hierarchy(tmp_path):
    _, flat = program("h100:2x4", {"data": 8}, {}, tmp_path)
    _, found = program("h100:2x4", {"data": 8}, {"all_reduce": "data=hierarchical"}, tmp_path)
    whole = flat.sent(kind="all-reduce") * 8 / 7 / 2  # bytes that are summed
    within = found.sent(kind="reduce-scatter"), found.sent(kind="all-gather")
    assert within == pytest.approx((whole * 3 / 4, whole * 3 / 4), rel=0.01)
    # between two hosts, each device the quarter that is its own
    assert found.sent(kind="all-reduce") == pytest.approx(2 * whole / 4 / 2, rel=0.01)


@pytest.mark.slow
@GPU
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_gpu_fuses_what_is_smaller_than_the_threshold(kind, tmp_path):
    sizes, name = {"data": 2, "fsdp": 4}, kind.replace("_", "-")
    none, all_of_them = (program("h100:2x4", sizes, {"fuse_mb": f"{kind}={mb}"}, tmp_path)[1] for mb in (0, 10_000))
    assert times(none, name) > 2 * times(all_of_them, name)
    assert math.isclose(none.sent(), all_of_them.sent(), rel_tol=0.01)


@pytest.mark.slow
@GPU
def test_a_gpu_overlaps_as_wished(tmp_path):
    sizes = {"data": 2, "fsdp": 4}
    text = {how: program("h100:2x4", sizes, {"overlap": how}, tmp_path)[0] for how in ("off", "auto", "on")}
    started = {how: text[how].count("-start(") for how in text}
    waits = {how: text[how].count('"is_sync":true') for how in text}
    assert waits["on"] < waits["auto"] < waits["off"] and waits["off"] >= started["off"], (waits, started)


@pytest.mark.slow
@TPU
def test_a_tpu_fuses_all_reduces_and_stops_overlapping_as_wished(tmp_path):
    sizes = {"data": 4, "fsdp": 4}
    (text, plain), (apart, found) = (
        program("v5e:4x4", sizes, wish, tmp_path) for wish in ({}, {"fuse_mb": "all_reduce=0", "overlap": "off"})
    )
    assert times(found, "all-reduce") > 2 * times(plain, "all-reduce")
    assert "async_collective_fusion" in text and "async_collective_fusion" not in apart
