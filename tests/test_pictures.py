"""Pictures show what is: each device's filled part is the slice that JAX gives it, a schedule's cells are its turns."""

import itertools

import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.pictures import draw_schedule, draw_shards
from artifex.scaling.pipeline.schedules import Schedule

SIZES = {"data": 2, "fsdp": 2, "tensor": 2}


def drawn(spec, shape, mesh, names):
    axes = Figure().subplots()
    draw_shards(axes, spec, shape, mesh, names)
    return axes


def filled(axes):
    """Device -> (left, right, top, bottom) of its filled part in fractions of its frame, and its colour."""
    parts = {}
    for held, frame in zip(axes.patches[::2], axes.patches[1::2], strict=True):
        x, y = (held.get_x() - frame.get_x()) / frame.get_width(), (held.get_y() - frame.get_y()) / frame.get_height()
        wide, high = held.get_width() / frame.get_width(), held.get_height() / frame.get_height()
        parts[held.get_gid()] = ((x, x + wide, y, y + high), to_hex(held.get_facecolor()))
    return parts


@pytest.mark.parametrize(
    "spec",
    [P(), P("data"), P(None, "tensor"), P("fsdp", "tensor"), P(("data", "fsdp")), P(("tensor", "data"), "fsdp")],
    ids=str,
)
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
def test_each_device_is_filled_where_jax_puts_its_slice_and_copies_share_a_colour(spec, reverse):
    mesh = create_device_mesh(tuple(SIZES.values()), tuple(SIZES))
    if reverse:
        mesh = Mesh(mesh.devices[::-1, ::-1, ::-1], mesh.axis_names)
    shape = (8, 16)
    parts = filled(drawn(spec, shape, mesh, ("embed", "mlp")))
    colours = {}
    for device, slices in NamedSharding(mesh, spec).devices_indices_map(shape).items():
        (top, bottom, _), (left, right, _) = (part.indices(size) for part, size in zip(slices, shape, strict=True))
        box, colour = parts[f"device {device.id}"]
        assert box == pytest.approx((left / 16, right / 16, top / 8, bottom / 8))
        assert colours.setdefault((top, left), colour) == colour
    assert len(set(colours.values())) == len(colours)


def test_a_mesh_may_be_sizes_alone_larger_than_this_machine():
    parts = filled(drawn(P("fsdp", "tensor"), (1024, 4096), {"fsdp": 16, "tensor": 4}, ("embed", "mlp")))
    assert len(parts) == 64 and len({colour for _, colour in parts.values()}) == 64


def test_split_dims_are_drawn_before_larger_whole_ones():
    axes = drawn(P("pipeline", None, None, "tensor"), (4, 512, 8, 64), {"pipeline": 2, "tensor": 2}, (None,) * 4)
    assert axes.get_xlabel() == "devices: pipeline ↓, tensor →\nin each frame: dim 4 ↓, dim 64 →"


def test_of_three_split_dims_the_two_most_split_are_drawn_and_the_third_is_said():
    sizes, shape = {"data": 2, "fsdp": 4, "tensor": 4}, (2, 8, 16)
    axes = drawn(P("data", "fsdp", "tensor"), shape, sizes, ("layers", "embed", "mlp"))
    parts = filled(axes)
    assert len({colour for _, colour in parts.values()}) == 32  # no two devices hold the same part
    labels = [text.get_text() for text in axes.texts]
    for number, (data, fsdp, tensor) in enumerate(itertools.product(range(2), range(4), range(4))):
        box, _ = parts[f"device {number}"]
        assert box == pytest.approx((tensor / 4, (tensor + 1) / 4, fsdp / 4, (fsdp + 1) / 4))
        assert labels[number] == f"{number}:{data}"
    assert axes.get_xlabel().endswith("\nbehind a device's number, its part of: layers 2 split 2 ways by data")


def test_frames_of_one_mesh_never_overlap():
    for names in (("data",), ("fsdp", "tensor"), ("data", "fsdp", "tensor"), ("pipeline", "data", "fsdp", "tensor")):
        sizes = dict.fromkeys(names, 3)
        frames = [patch.get_bbox() for patch in drawn(P(names[0]), (6, 9), sizes, ("embed", "mlp")).patches[1::2]]
        assert len(frames) == 3 ** len(names)
        assert frames[0].count_overlaps(frames) == 1  # itself


@pytest.mark.parametrize(
    ("spec", "shape", "says"),
    [
        (P(), (), "a scalar has no dims"),
        (P("data", "fsdp"), (4,), "2 entries"),
        (P("model"), (4,), "'model', but the mesh has"),
    ],
)
def test_what_cannot_be_drawn_is_said(spec, shape, says):
    with pytest.raises(ValueError, match=says):
        drawn(spec, shape, SIZES, (None,) * len(shape))


@pytest.mark.parametrize(
    "schedule", [Schedule("gpipe", 4, 6), Schedule("1f1b", 4, 6), Schedule("interleaved", 3, 6, 2)], ids=str
)
def test_a_schedule_is_drawn_with_each_microbatch_once_forwards_and_backwards_in_every_stage(schedule):
    axes = Figure().subplots()
    draw_schedule(axes, schedule)
    idle, *cells = axes.patches
    S, M, stages = schedule.devices, schedule.microbatches, schedule.stages
    every = {(way, m, g) for way in ("forward", "backward") for m in range(M) for g in range(stages)}
    seen, spans = set(), {}
    for cell, text in zip(cells, axes.texts, strict=True):
        way, m, _, g = cell.get_gid().split()
        seen.add((way, int(m), int(g)))
        assert cell.get_y() == int(g) % S and text.get_text() == m
        assert cell.get_x() < text.get_position()[0] < cell.get_x() + cell.get_width()
        spans[way, int(m), int(g)] = (cell.get_x(), cell.get_x() + cell.get_width())
    assert seen == every and len(cells) == len(every)
    for way, m, g in every:  # nothing begins before what it waits for has ended
        if way == "forward" and g:
            assert spans["forward", m, g - 1][1] <= spans[way, m, g][0]
        if way == "backward":
            before = ("forward", m, g) if g == stages - 1 else ("backward", m, g + 1)
            assert spans[before][1] <= spans[way, m, g][0]
    for device in range(S):  # and no device does two things at once
        of = sorted(span for (_, _, g), span in spans.items() if g % S == device)
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(of))
    area = sum(cell.get_width() for cell in cells)
    bubble = (S - 1) / (schedule.stages_per_device * M + S - 1)
    assert 1 - area / (S * idle.get_width()) == pytest.approx(bubble)
