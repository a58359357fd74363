"""Pictures show what is: parts as large as what they stand for, everything in words too, no words over others."""

import itertools
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import gids, overlapping, svg_words, texts
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.patches import Rectangle
from PIL import Image

from artifex import models, visualize
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.strategies import FSDPStrategy, TensorParallelStrategy, combine, strategies_for

SMALL = {"embed_dim": 32, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 64}
RING = {(i, (i + 1) % 4): 1000.0 * (i + 1) for i in range(4)}


@pytest.fixture(scope="module")
def model():
    return nnx.eval_shape(lambda: models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL))


PICTURES = {
    "sharding": lambda path: visualize.plot_sharding((8, 16), P("data"), {"data": 4}, path=path),
    "tree": lambda path: visualize.plot_tree({"w": jnp.ones((4, 8))}, path=path),
    "utilization": lambda path: visualize.plot_device_utilization({0: 0.5, 1: 1.0}, (2,), path),
    "graph": lambda path: visualize.plot_communication_graph(RING, (4,), path),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_is_written_as_png_or_svg_by_its_ending_and_shows_itself(kind, tmp_path):
    figure = PICTURES[kind](tmp_path / "new" / "picture.PNG")
    with Image.open(tmp_path / "new" / "picture.PNG") as image:
        assert image.format == "PNG" and min(image.size) > 100
    assert figure._repr_png_() == (tmp_path / "new" / "picture.PNG").read_bytes()
    PICTURES[kind](tmp_path / "picture.svg")
    written = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert written == visualize.svg(figure), "the same figure gives the same text"
    seen = {line for text in texts(figure) for line in text.splitlines()}
    assert seen <= set(svg_words(figure)), "words stay words"
    assert overlapping(figure) == []


@pytest.mark.parametrize("kind", PICTURES)
def test_another_ending_is_refused_before_anything_is_drawn(kind, tmp_path):
    with pytest.raises(ValueError, match=r"picture 'x.pdf' ends with neither .png nor .svg"):
        PICTURES[kind](tmp_path / "x.pdf")
    assert list(tmp_path.iterdir()) == []


def test_two_pictures_on_one_page_share_no_identifier():
    one, other = (
        set(re.findall(r'\bid="([^"]+)"', visualize.svg(PICTURES[kind](None)))) for kind in ("graph", "utilization")
    )
    assert one and other and not one & other
    text = visualize.svg(PICTURES["utilization"](None))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert used <= other
    assert text.startswith('<svg role="img" aria-label="utilization: mean 75%')


def test_pictures_leave_pyplot_alone_and_artifex_imports_them_when_asked():
    program = (
        "import sys, artifex; assert 'matplotlib' not in sys.modules\n"
        "artifex.visualize.plot_device_utilization({0: 1.0}, (1,))._repr_png_()\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_array_is_drawn_where_its_own_sharding_puts_it():
    mesh = create_device_mesh((2, 4), ("fsdp", "tensor"))
    placed = jax.device_put(np.zeros((8, 16), np.float32), NamedSharding(mesh, P("fsdp", "tensor")))
    figure = visualize.plot_sharding(placed)
    (axes,) = figure.axes
    frames, patches = {}, [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    for held, frame in zip(patches[::2], patches[1::2], strict=True):
        frames[held.get_gid()] = (held.get_x() - frame.get_x(), (held.get_y() - frame.get_y()) / frame.get_height())
    for shard in placed.addressable_shards:
        rows, columns = shard.index
        expected = ((columns.start or 0) / 16, (rows.start or 0) / 8)
        assert frames[f"device {shard.device.id}"] == pytest.approx(expected)
    assert axes.get_title("left") == "8x16 as (fsdp, tensor)\n8 parts, each on one device"
    abstract = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    assert visualize.plot_sharding(abstract).axes[0].get_title("left").endswith("2 parts, each on 4 devices")
    assert texts(visualize.plot_sharding(jnp.float32(1)))[0]


def test_a_sharding_of_three_dims_a_scalar_and_many_devices_have_no_words_over_others():
    sizes = {"data": 2, "fsdp": 4, "tensor": 4}
    for shape, spec in (((8, 64, 128), P("data", "fsdp", "tensor")), ((), P()), ((64, 64), P(("data", "tensor")))):
        assert overlapping(visualize.plot_sharding(shape, spec, sizes)) == []
    assert overlapping(visualize.plot_sharding((256, 256), P("a", "b"), {"a": 16, "b": 16})) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (((8, 16),), "how an array of shape .8, 16. lies is not known"),
        (((8, 16), P("data")), "give spec and mesh"),
        (((8, 16), P("model"), {"data": 2}), "names mesh axis 'model'"),
        (((8,), P(), {}), "has no axes"),
    ],
)
def test_an_array_of_unknown_layout_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_sharding(*arguments)


def test_a_tree_has_a_row_for_each_parameter_with_the_bytes_that_jax_puts_on_a_device(model):
    mesh = create_device_mesh((2, 4), ("fsdp", "tensor"))
    rules = combine({"fsdp": FSDPStrategy("fsdp", min_weight_size=0), "tensor": TensorParallelStrategy("tensor")})
    figure = visualize.plot_tree(model, rules, mesh)
    assert overlapping(figure) == []
    paths = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    dims, up = gids(figure, "row"), paths.index("layers/mlp/up/kernel")
    layers, embed, mlp = (dims[f"row {up} dim {dim}"].get_hatch() for dim in range(3))
    assert layers is None and embed and mlp and embed != mlp, "told apart without colour"
    seen = texts(figure)
    assert "embed 32 / fsdp" in seen and "mlp 64 / tensor" in seen and "layers 2" in seen
    held = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = "/".join(map(str, path))
        spec = rules_spec(variable, mesh)
        held[name] = math.prod(NamedSharding(mesh, spec).shard_shape(variable.shape)) * 4
    assert sorted(paths) == sorted(held)
    assert [held[path] for path in paths] == sorted(held.values(), reverse=True), "largest first"
    for row, path in enumerate(paths):
        width = gids(figure, "bytes of")[f"bytes of row {row}"].get_width()
        assert width == pytest.approx(held[path] / max(held.values()))
    assert "2 KiB, 1/8" in seen


def rules_spec(variable, mesh):
    """By hand: fsdp splits embed and else nothing; tensor what is wide and divides by its size."""
    wide, spec = ("heads", "mlp", "vocab"), []
    for name, size in zip(variable.get_metadata()["out_sharding"], variable.shape, strict=True):
        axis = "fsdp" if name == "embed" else "tensor" if name in wide else None
        spec.append(axis if axis and size % mesh.shape[axis] == 0 else None)
    return P(*spec)


def test_blocks_of_a_tree_share_a_row_and_what_is_small_is_summed_up():
    mesh = create_device_mesh((8,), ("fsdp",))
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    tree = {
        "blocks": {str(n): {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)} for n in range(4)},
        "head": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=whole),
        "bias": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=whole),
        "scale": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=whole),
    }
    figure = visualize.plot_tree(tree, rows=2)
    bars = gids(figure, "bytes of")
    sizes = [4 * 64 * 32 * 4 / 8, 64, 24]
    assert [bars[f"bytes of row {row}"].get_width() for row in range(3)] == pytest.approx([n / 4096 for n in sizes])
    assert bars["bytes of row 1"].get_hatch() and not bars["bytes of row 0"].get_hatch(), "whole ones are marked"
    seen = texts(figure)
    assert {"blocks/*/w x 4", "4 KiB, 1/8", "64 B, whole", "24 B in 2 more"} <= set(seen)
    assert "split by fsdp" in seen
    assert (
        figure.get_suptitle() == "7 parameters on fsdp 8, 8 devices: 4.086 KiB of 32.09 KiB on each; 3 whole everywhere"
    )


def test_a_tree_of_eighty_rows_has_no_words_over_others():
    rules = combine(strategies_for(["fsdp"]))
    large = nnx.eval_shape(lambda: models.create("dit-digits", rngs=nnx.Rngs(0)))
    assert overlapping(visualize.plot_tree(large, rules, {"fsdp": 8}, rows=80)) == []
    mesh = create_device_mesh((8,), ("fsdp",))
    names = ["".join(pair) * 12 for pair in itertools.product("abcdefghij", "klmnopqr")]
    leaf = jax.ShapeDtypeStruct((8, 8, 8, 8), jnp.float32, sharding=NamedSharding(mesh, P(None, None, None, "fsdp")))
    assert overlapping(visualize.plot_tree(dict.fromkeys(names, leaf), rows=80)) == []


@pytest.mark.parametrize(
    ("arguments", "how", "says"),
    [
        (({"w": np.ones(3)},), {}, "lies is not known"),
        (({},), {}, "the tree has no arrays"),
        (({"w": np.ones(3)}, "plan"), {}, "names no logical axes"),
        (({"w": np.ones(3)},), {"rows": 0}, "rows is 0"),
    ],
)
def test_a_tree_that_cannot_be_drawn_is_said(arguments, how, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_tree(*arguments, **how)


@pytest.mark.parametrize("device_mesh", [(2, 4), {"data": 2, "tensor": 4}, "mesh"], ids=str)
def test_cells_are_filled_as_far_as_devices_are_busy_and_stand_as_in_the_mesh(device_mesh):
    given = device_mesh
    order = np.arange(8).reshape(2, 4)
    if device_mesh == "mesh":
        mesh = create_device_mesh((2, 4), ("data", "tensor"))
        given = Mesh(mesh.devices[::-1], mesh.axis_names)
        order = np.vectorize(lambda device: device.id)(given.devices)
    shares = {n: {"compute": n / 10, "communication": 0.25} for n in range(8)}
    figure = visualize.plot_device_utilization(shares, given)
    parts, frames = gids(figure, "device"), gids(figure, "frame")
    for (row, column), device in np.ndenumerate(order):
        compute, talk = parts[f"device {device} compute"], parts[f"device {device} communication"]
        frame = frames[f"frame {device}"]
        assert (frame.get_x() // 1, frame.get_y() // 1) == (column, row)
        assert compute.get_height() / frame.get_height() == pytest.approx(device / 10)
        assert talk.get_height() / frame.get_height() == pytest.approx(0.25)
        assert compute.get_y() + compute.get_height() == pytest.approx(frame.get_y() + frame.get_height())
        assert talk.get_y() + talk.get_height() == pytest.approx(compute.get_y()), "stacked"
        assert gids(figure)[f"share {device} compute"].get_text() == f"{device * 10}%"
    assert {"compute", "communication"} <= set(texts(figure))
    assert compute.get_hatch() != talk.get_hatch()
    assert overlapping(figure) == []


def test_a_device_that_was_not_measured_is_said_and_a_long_row_is_folded():
    figure = visualize.plot_device_utilization({n: n / 64 for n in range(60)}, (64,))
    assert texts(figure).count("not\nmeasured") == 4
    frames = gids(figure, "frame").values()
    assert len({frame.get_x() for frame in frames}) == 16 and len({frame.get_y() for frame in frames}) == 4
    assert overlapping(figure) == []
    three = {n: {"compute": 0.02, "wait": 0.01, "send": 0.0} for n in range(2)}
    assert overlapping(visualize.plot_device_utilization(three, (2,))) == []


@pytest.mark.parametrize(
    ("shares", "mesh", "says"),
    [
        ({}, (2,), "names no device"),
        ({5: 0.1}, (2,), "names device 5, but the mesh"),
        ({0: 1.2}, (2,), "device 0 has the shares 1.2"),
        ({0: math.nan}, (2,), "device 0 has the shares nan"),
        ({0: {"a": 0.7, "b": 0.6}}, (2,), "so is their sum"),
        ({0: 0.1}, (), "at least one axis"),
        ({0: 0.1}, (2, 0), "integer size from 1"),
    ],
)
def test_a_utilization_that_cannot_be_is_refused(shares, mesh, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_device_utilization(shares, mesh)


def test_arrows_are_as_wide_as_their_bytes_and_drawn_by_mesh_axis():
    graph = {(0, 1): 3e6, (1, 0): 1e6, (0, 2): 2e6, (1, 3): 0.0, (0, 3): 5e5}
    figure = visualize.plot_communication_graph(graph, {"data": 2, "tensor": 2})
    arrows = gids(figure, "send")
    assert set(arrows) == {"send 0 1", "send 1 0", "send 0 2", "send 0 3"}, "nothing is sent from 1 to 3"
    widths = {gid: arrow.get_linewidth() for gid, arrow in arrows.items()}
    least = widths["send 0 1"] - 2.4
    for pair, size in graph.items():
        if size:
            assert widths[f"send {pair[0]} {pair[1]}"] - least == pytest.approx(2.4 * size / 3e6)
    style = {gid: arrow.get_linestyle() for gid, arrow in arrows.items()}
    assert style["send 0 1"] == style["send 1 0"] and len({str(one) for one in style.values()}) == 3
    seen = texts(figure)
    assert {"tensor: 3.815 MiB", "data: 1.907 MiB", "data+tensor: 488.3 KiB"} <= set(seen)
    labels = {gid: text.get_text() for gid, text in gids(figure, "bytes").items()}
    assert labels["bytes 0 1"] == "2.861 MiB" and len(labels) == 4
    assert overlapping(figure) == []


def neighbours(sizes):
    """Each device sends to the next along each axis, both ways."""
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    graph = {}
    for axis in range(len(sizes)):
        for one, other in zip(ids.flat, np.roll(ids, -1, axis).flat, strict=True):
            graph |= {(int(one), int(other)): 1e6, (int(other), int(one)): 2e6} if one != other else {}
    return graph


@pytest.mark.parametrize("sizes", [(2,), (4,), (8,), (2, 2), (2, 4), (4, 4), (2, 2, 4), (8, 8), (64,)], ids=str)
def test_graphs_of_two_to_sixty_four_devices_have_no_words_over_others_and_all_arrows_inside(sizes):
    graph = neighbours(sizes)
    figure = visualize.plot_communication_graph(graph, sizes)
    assert overlapping(figure) == []
    assert len(gids(figure, "send")) == len(graph)
    assert len(gids(figure, "node")) == math.prod(sizes)
    (axes,) = figure.axes
    inside = axes.get_window_extent()
    for arrow in gids(figure, "send").values():
        box = arrow.get_window_extent()
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    labelled = len(gids(figure, "bytes"))
    assert labelled == (len(graph) if len(graph) <= 16 else labelled)


@pytest.mark.parametrize(
    ("graph", "mesh", "says"),
    [
        ({(0, 1): 1.0}, (65,), "draw the part of the mesh that matters"),
        ({(0, 9): 1.0}, (2,), "the graph names device 9"),
        ({(1, 1): 1.0}, (2,), "send to itself"),
        ({(0, 1): -1.0}, (2,), "finite and at least 0"),
        ({(0, 1): math.inf}, (2,), "finite and at least 0"),
    ],
)
def test_a_graph_that_cannot_be_drawn_is_refused(graph, mesh, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_communication_graph(graph, mesh)
