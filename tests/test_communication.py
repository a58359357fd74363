"""Collectives of a program are told with their axes and bytes, as CPUs, GPUs and TPUs write them."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from artifex import train
from artifex.config import Config
from artifex.scaling.communication import axes_of, collectives, communication, groups_of
from artifex.scaling.compiler_log import laid_out_anew

SIZES = {"a": 2, "b": 4}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[8], to_apply=%add", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={3}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=[1,8]<=[8]", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1, replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y'}, use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (
            "replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}, dimensions={0}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        # of an axis of 4 the outer half, and the inner one
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'y':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y':(2)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,4},{4,0},{1,5}}, metadata={a={{0,3}}}", [[0, 4], [4, 0], [1, 5]]),
    ],
)
def test_devices_that_take_part_together_are_read_from_every_way_to_write_them(written, groups):
    assert groups_of(written, 8) == groups


def test_groups_that_are_written_in_an_unknown_way_are_refused():
    with pytest.raises(ValueError, match="unknown replica groups"):
        groups_of("replica_groups=something[8]", 8)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("a",)),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("b",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("b",)),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], ("a", "b")),
        ([[0, 5], [1, 4]], ("a", "b")),
        ([[0], [1]], ()),
    ],
)
def test_axes_are_those_along_which_devices_of_a_group_differ(groups, axes):
    assert axes_of(groups, SIZES) == axes


def test_bytes_are_those_of_the_collectives_times_the_loops(mesh):
    def body(carry, _):
        gathered = jax.lax.all_gather(carry, "b")  # 4 parts of 1,024 bytes, to 4 devices
        exchanged = jax.lax.all_to_all(gathered, "b", 0, 0)
        passed = jax.lax.ppermute(exchanged[0], "a", [(0, 1), (1, 0)])
        return jax.lax.psum(passed, ("a", "b")), None

    def looped(x):
        return jax.lax.scan(body, x, None, length=3)[0]

    program = jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    found = communication(program.lower(jnp.zeros(256, jnp.float32)).compile().as_text(), mesh)
    assert {(row.kind, row.axes, row.times, row.sent) for row in found.rows} == {
        ("all-gather", ("b",), 3, 3 * 3 * 1024),
        ("all-to-all", ("b",), 3, 3 * 3 * 1024),
        ("collective-permute", ("a",), 3, 3 * 1024),
        ("all-reduce", ("a", "b"), 3, 3 * 2 * 7 / 8 * 1024),
    }
    assert found.sent("b") == 18 * 1024 and found.sent("b", kind="all-gather") == 9 * 1024
    assert found.sent("b", "a") == 3 * 2 * 7 / 8 * 1024 and found.sent("a", kind="all-reduce") == 0


def test_a_branch_counts_where_it_is_taken_and_at_most_always(mesh):
    def turn(carry, row):
        return jax.lax.cond(row > 0, lambda x: jax.lax.psum(x, "b"), lambda x: jax.lax.pmax(x, "a"), carry), None

    def looped(x, rows):
        return jax.lax.scan(turn, x, rows)[0]

    program = jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    text = program.lower(jnp.zeros(256, jnp.float32), jnp.zeros(6, jnp.int32)).compile().as_text()
    unknown = {row.axes: (row.times, row.bound) for row in communication(text, mesh).rows}
    assert unknown == {("b",): (6, "at most"), ("a",): (6, "at most")}
    known = {row.axes: (row.times, row.bound) for row in communication(text, mesh, {6: (2,)}).rows}
    assert known == {("b",): (2, ""), ("a",): (4, "")}


# of the step of a small Llama for 8 TPU v5e, fsdp=4 and tensor=2: a loop that runs 4 times, by steps of 2, as nobody
# says, a gather that goes on in two fusions, and a reduce-scatter written as a sum and a part of it
TPU = """
%all-reduce-scatter.5 (input.5: bf16[8,1024,256]) -> bf16[8,512,256] {
  %input.5 = bf16[8,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.84 = bf16[8,1024,256]{2,1,0:T(8,128)(2,1)} all-reduce(%input.5), channel_id=138, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, to_apply=%region_0.0.clone
  %constant.1961 = u32[] constant(0)
  ROOT %dynamic-slice.596 = bf16[8,512,256]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.84, %constant.1961)
}

%fused_computation.606 (param_0.2125: bf16[1,256,64]) -> (bf16[1,256,64], bf16[1,256,256]) {
  %param_0.2125 = bf16[1,256,64]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.260 = bf16[1,256,256]{1,2,0:T(8,128)(2,1)} all-gather(%param_0.2125), channel_id=174, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  ROOT %custom-call.25 = (bf16[1,256,64]{1,2,0:T(8,128)(2,1)S(1)}, bf16[1,256,256]{1,2,0:T(8,128)(2,1)S(1)}) \
custom-call(%all-gather.260), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.829 (param_0.2130: bf16[1,256,64], param_1.2090: bf16[8,64]) -> (bf16[1,256,256], bf16[8,64]) {
  %param_0.2130 = bf16[1,256,64]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.2090 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %all-gather.262 = bf16[1,256,256]{1,2,0:T(8,128)(2,1)S(1)} all-gather(%param_0.2130), channel_id=174, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  ROOT %tuple.304 = (bf16[1,256,256]{1,2,0}, /*index=1*/bf16[8,64]{1,0}) tuple(%all-gather.262, %param_1.2090)
}

%fused_computation.610 (param_0.2147: bf16[1,256,64]) -> bf16[1,256,256] {
  %param_0.2147 = bf16[1,256,64]{1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.268 = bf16[1,256,256]{1,2,0:T(8,128)(2,1)} all-gather(%param_0.2147), channel_id=174, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="5"}
  ROOT %custom-call.27 = bf16[1,256,256]{1,2,0:T(8,128)(2,1)S(1)} custom-call(%param_0.2147, %all-gather.268), \
custom_call_target="AsyncCollectiveDone"
}

%body (param: (s32[], bf16[1,256,64], bf16[8,1024,256])) -> (s32[], bf16[1,256,64], bf16[8,1024,256]) {
  %param = (s32[]{:T(128)}, bf16[1,256,64]{1,2,0}, bf16[8,1024,256]{2,1,0}) parameter(0)
  %get-tuple-element.1 = bf16[1,256,64]{1,2,0} get-tuple-element(%param), index=1
  %get-tuple-element.2 = bf16[8,1024,256]{2,1,0} get-tuple-element(%param), index=2
  %async-collective-start.5 = (bf16[1,256,64]{1,2,0}, bf16[1,256,256]{1,2,0}) fusion(%get-tuple-element.1), \
kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.606
  %fusion.829 = (bf16[1,256,256]{1,2,0}, bf16[8,64]{1,0}) fusion(%get-tuple-element.1), kind=kOutput, \
calls=%async_collective_fusion.829
  %async-collective-done.5 = bf16[1,256,256]{1,2,0} fusion(%get-tuple-element.1), kind=kCustom, \
calls=%fused_computation.610
  %fusion.754 = bf16[8,512,256]{2,1,0} fusion(%get-tuple-element.2), kind=kCustom, calls=%all-reduce-scatter.5
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%param), index=0
  %constant.3229..sunk.2 = s32[]{:T(128)} constant(2)
  %add.6 = s32[]{:T(128)} add(%get-tuple-element.3, %constant.3229..sunk.2)
  ROOT %tuple.9 = (s32[]{:T(128)}, bf16[1,256,64]{1,2,0}, bf16[8,1024,256]{2,1,0}) tuple(%add.6, \
%get-tuple-element.1, %get-tuple-element.2)
}

%wide.region_4.8_spmd.clone (wide.param.108: (s32[], bf16[1,256,64], bf16[8,1024,256])) -> pred[] {
  %constant.333.clone.4 = s32[]{:T(128)} constant(8)
  %wide.param.108 = (s32[]{:T(128)}, bf16[1,256,64]{1,2,0}, bf16[8,1024,256]{2,1,0}) parameter(0)
  %get-tuple-element.1646 = s32[]{:T(128)} get-tuple-element(%wide.param.108), index=0
  ROOT %lt.75 = pred[]{:T(512)} compare(%get-tuple-element.1646, %constant.333.clone.4), direction=LT
}

ENTRY %main.1 (x: bf16[1,256,64], y: bf16[8,1024,256]) -> (s32[], bf16[1,256,64], bf16[8,1024,256]) {
  %x = bf16[1,256,64]{1,2,0} parameter(0)
  %y = bf16[8,1024,256]{2,1,0} parameter(1)
  %constant.1 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%constant.1)
  %collective-permute-start.35 = (bf16[1,256,64]{1,2,0}, bf16[1,256,64]{1,2,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=5, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %tuple.327 = (s32[]{:T(128)}, bf16[1,256,64]{1,2,0}, bf16[8,1024,256]{2,1,0}) tuple(%copy.1, %x, %y)
  ROOT %while.77 = (s32[]{:T(128)}, bf16[1,256,64]{1,2,0}, bf16[8,1024,256]{2,1,0}) while(%tuple.327), \
condition=%wide.region_4.8_spmd.clone, body=%body
}
"""


def test_a_tpus_asynchronous_collective_counts_once_and_its_fused_sum_is_a_reduce_scatter():
    found = communication(TPU.replace("\\\n", ""), {"fsdp": 4, "tensor": 2})
    assert {(row.kind, row.axes, row.times, row.sent) for row in found.rows} == {
        ("all-gather", ("fsdp",), 4, 4 * 3 / 4 * 256 * 256 * 2),
        ("reduce-scatter", ("tensor",), 4, 4 * 1 / 2 * 8 * 1024 * 256 * 2),
        ("collective-permute", ("fsdp",), 1, 256 * 64 * 2),
    }


def test_a_collective_that_goes_on_through_a_loop_inside_counts_once():
    text = TPU.replace("\\\n", "")
    line = next(line for line in text.splitlines() if line.startswith("  %fusion.829 = "))
    inside = """
%inside (inside.1: bf16[1,256,64]) -> bf16[1,256,64] {
  %inside.1 = bf16[1,256,64]{1,2,0} parameter(0)
  LINE
  ROOT %copy.1 = bf16[1,256,64]{1,2,0} copy(%inside.1)
}

%goes_on (goes_on.1: bf16[1,256,64]) -> pred[] {
  %goes_on.1 = bf16[1,256,64]{1,2,0} parameter(0)
  ROOT %goes_on.2 = pred[] constant(true)
}

""".replace("LINE", line.strip().replace("%get-tuple-element.1", "%inside.1"))
    loop = "  %while.9 = bf16[1,256,64]{1,2,0} while(%get-tuple-element.1), condition=%goes_on, body=%inside"
    nested = inside.lstrip("\n") + text.lstrip("\n").replace(line, loop)
    sizes = {"fsdp": 4, "tensor": 2}
    assert communication(nested, sizes) == communication(text, sizes)


# of the same for 8 H100, pipeline=4 and data=2, and fsdp=2 and tensor=4
GPU = """
ENTRY %main (a: bf16[1,1024,256], b: s32[1,1024], c: bf16[256,64,2], d: f32[9], e: bf16[16,8]) -> f32[9] {
  %a = bf16[1,1024,256]{2,1,0} parameter(0)
  %b = s32[1,1024]{1,0} parameter(1)
  %c = bf16[256,64,2]{1,2,0} parameter(2)
  %d = f32[9]{0} parameter(3)
  %e = bf16[16,8]{1,0} parameter(4)
  %all-gather-start = ((bf16[1,1024,256]{2,1,0}, s32[1,1024]{1,0}), (bf16[2,1024,256]{2,1,0}, s32[2,1024]{1,0})) \
all-gather-start(%a, %b), channel_id=14, replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true
  %all-gather-done = (bf16[2,1024,256]{2,1,0}, s32[2,1024]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter-start.3 = ((bf16[256,64,2]{1,2,0}, bf16[256,64,2]{1,2,0}), (bf16[128,64,2]{1,2,0}, \
/*index=3*/bf16[128,64,2]{1,2,0})) reduce-scatter-start(%c, /*index=1*/%c), channel_id=9, \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done.3 = (bf16[128,64,2]{1,2,0}, bf16[128,64,2]{1,2,0}) reduce-scatter-done(%reduce-scatter-start.3)
  %collective-permute-start = (bf16[1,1024,256]{2,1,0}, bf16[1,1024,256]{2,1,0}) collective-permute-start(%a), \
channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{1,3},{3,5},{5,7}}
  %collective-permute-done = bf16[1,1024,256]{2,1,0} collective-permute-done(%collective-permute-start)
  %all-to-all-start = ((bf16[16,8]{1,0}), bf16[16,8]{1,0}) async-start(%e), calls=%wrapped_all_to_all
  %all-to-all-done = bf16[16,8]{1,0} async-done(%all-to-all-start), calls=%wrapped_all_to_all
  %all-reduce-start.3 = f32[9]{0} all-reduce-start(%d), channel_id=117, replica_groups={{0,1,2,3,4,5,6,7}}, \
use_global_device_ids=true, to_apply=%add
  ROOT %all-reduce-done.3 = f32[9]{0} all-reduce-done(%all-reduce-start.3)
}

%wrapped_all_to_all (param: bf16[16,8]) -> bf16[16,8] {
  %param = bf16[16,8]{1,0} parameter(0)
  ROOT %all-to-all = bf16[16,8]{1,0} all-to-all(%param), channel_id=2, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}
"""


def test_a_gpus_combined_collectives_count_what_is_given_to_their_start():
    found = collectives(GPU.replace("\\\n", ""), {"pipeline": 4, "data": 2})
    assert [(one.kind, one.axes, one.devices, one.sent) for one in found] == [
        ("all-gather", ("data",), 2, 1024 * 256 * 2 + 1024 * 4),
        ("reduce-scatter", ("data",), 2, 256 * 64 * 2 * 2),
        ("collective-permute", ("pipeline",), 2, 1024 * 256 * 2),
        ("all-to-all", ("pipeline",), 4, 3 / 4 * 16 * 8 * 2),
        ("all-reduce", ("pipeline", "data"), 8, 2 * 7 / 8 * 9 * 4),
    ]


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no program"):
        communication("HloModule empty", SIZES)


def test_the_table_has_a_line_for_each_axis_and_kind():
    lines = str(communication(GPU.replace("\\\n", ""), {"pipeline": 4, "data": 2})).splitlines()
    assert lines[0].split() == ["mesh", "axes", "collective", "times", "a", "device", "sends"]
    assert lines[1].split() == ["data", "all-gather", "1", "516", "KiB"]
    assert "pipeline x data  all-reduce" in str(lines) and lines[-1].startswith("in all")
    assert str(communication("ENTRY %main () -> f32[] {\n}", SIZES)) == "the devices send each other nothing"


def test_a_dry_run_says_what_each_axis_carries_below_the_memory():
    model = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "sequence_length": 32, "tied_head": False}
    cfg = Config.from_dict(
        {
            "model": {"name": "llama-nano", **model},
            "data": {"sequence_length": 32},
            "optimizer": {"name": "sgd"},
            "training": {"batch_size": 16},
            "device": {"data": 8},
        }
    )
    text = train.dry_run(cfg)
    below = text[text.index("memory per device") :]
    (row,) = [line.split() for line in below.splitlines() if line.startswith("  data ")]
    # one gradient of float32 for each parameter, summed over 8, and a few scalars
    count = int(text[: text.index(" parameters")].split()[-1].replace(",", ""))
    assert row[1] == "all-reduce" and row[-1] == "KiB"
    assert float(row[-2]) * 1024 == pytest.approx(2 * 7 / 8 * 4 * count, rel=0.02)


def test_what_xla_lays_out_anew_everywhere_is_said_in_our_words(mesh, capfd):
    split, other = (NamedSharding(mesh, spec) for spec in (P(("a", "b"), None, None), P(None, None, "b")))

    def turned(x):
        return jax.lax.with_sharding_constraint(x, other)

    lowered = jax.jit(turned).lower(jax.ShapeDtypeStruct((16, 8, 32), jnp.float32, sharding=split))
    with laid_out_anew() as found:
        lowered.compile()
        os.write(2, b"something else\n")
    assert found == ["f32[2,8,32]"]
    assert capfd.readouterr().err == "something else\n"


def test_what_is_on_its_way_to_stderr_is_not_lost_where_a_signal_ends_the_process():
    program = """
import os, signal, time
from artifex.scaling import compiler_log
from artifex.training.signals import ending_at_once

slow, one = 0.3, compiler_log._one
compiler_log._one = lambda *line: (time.sleep(slow), one(*line))
with ending_at_once(": said"), compiler_log.laid_out_anew():
    os.write(2, b"before\\n")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "before\nstopped by SIGTERM: said\n")


def test_a_closed_stderr_is_no_matter():
    program = "import os; os.close(2)\nfrom artifex.scaling.compiler_log import laid_out_anew\n"
    program += "with laid_out_anew() as found: pass\nprint(found)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
