"""Pictures of what a run spends and how it went: closed forms of bubbles, bytes and metrics, no words over others."""

import dataclasses
import itertools
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from drawn import gids, overlapping, svg_words, texts
from flax import nnx
from matplotlib.patches import Rectangle
from PIL import Image

from artifex import visualize
from artifex.evaluation.grids import save_grid
from artifex.models.layers import Linear
from artifex.scaling.autodist import AutoDistConfig, plan
from artifex.scaling.pipeline.schedules import Schedule
from artifex.training.run_folder import RunFolder

GIB = 2**30
SCHEDULES = [Schedule("gpipe", 4, 8), Schedule("1f1b", 4, 8), Schedule("interleaved", 4, 8, 2)]


def test_schedules_share_one_axis_of_time_and_say_how_long_they_are_idle():
    figure = visualize.plot_schedule(SCHEDULES, forward=1.0, backward=3.0)
    assert overlapping(figure) == []
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    for axes, schedule in zip(figure.axes, SCHEDULES, strict=True):
        S, M, V = schedule.devices, schedule.microbatches, schedule.stages_per_device
        share = (S - 1) / (V * M + S - 1)
        assert axes.get_title("left").endswith(f"idle {share:.0%}")
        idle, *cells = (patch for patch in axes.patches if isinstance(patch, Rectangle))
        assert idle.get_hatch() and not any(cell.get_hatch() for cell in cells)
        busy = sum(cell.get_width() for cell in cells)
        assert busy == pytest.approx(S * M * (1 + 3)), "the same work whatever the stages"
        assert 1 - busy / (S * idle.get_width()) == pytest.approx(share)
    assert {"forward: light number", "backward: dark number", "idle"} <= set(texts(figure))


def test_forward_and_backward_differ_in_greyscale():
    figure = visualize.plot_schedule(SCHEDULES[2])
    grey = {"forward": [], "backward": []}
    for cell in figure.axes[0].patches[1:]:
        grey[str(cell.get_gid()).split()[0]].append(np.dot(cell.get_facecolor()[:3], (0.299, 0.587, 0.114)))
    assert max(grey["forward"]) + 0.15 < min(grey["backward"])


@pytest.mark.parametrize(
    "schedule", [Schedule("gpipe", 2, 1), Schedule("1f1b", 8, 64), Schedule("1f1b", 4, 300)], ids=str
)
def test_long_schedules_have_no_words_over_others(schedule):
    figure = visualize.plot_schedule(schedule)
    assert overlapping(figure) == []
    assert figure.get_size_inches()[0] <= 24


@pytest.mark.parametrize(("arguments", "says"), [(([],), "no schedule"), ((SCHEDULES, 0.0), "both are above 0")])
def test_a_schedule_that_cannot_be_drawn_is_said(arguments, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_schedule(*arguments)


PARTS = {
    "XLA": {"parameters": 2 * GIB, "optimizer": 4 * GIB, "activations": 6 * GIB, "collectives": GIB / 50},
    "predicted": {"parameters": 2 * GIB, "optimizer": 4 * GIB, "activations": 5 * GIB},
}


def test_bars_are_as_long_as_their_bytes_and_the_limit_is_a_line():
    figure = visualize.plot_memory(PARTS, 16 * GIB)
    (axes,) = figure.axes
    assert overlapping(figure) == []
    bars = gids(figure, "part")
    assert len(bars) == 7
    for label, parts in PARTS.items():
        ends = [0, *itertools.accumulate(parts.values())]
        for (name, size), left in zip(parts.items(), ends, strict=False):
            bar = bars[f"part {label} {name}"]
            assert (bar.get_x(), bar.get_width()) == pytest.approx((left, size))
            assert bar.get_hatch() == bars[f"part XLA {name}"].get_hatch()
    assert len({bars[f"part XLA {name}"].get_hatch() for name in PARTS["XLA"]}) == 4, "told apart without colour"
    assert set(gids(figure)["limit"].get_xdata()) == {16 * GIB} and axes.get_xlim()[1] > 16 * GIB
    assert gids(figure)["total 0"].get_text() == "12.02 GiB, 75% of the limit"
    seen = texts(figure)
    assert "optimizer\n4 GiB" in seen and " limit 16 GiB" in seen and "collectives" in seen


def test_one_bar_has_its_sizes_in_the_legend_and_may_pass_the_limit():
    figure = visualize.plot_memory({f"part {n}": 2.0**n for n in range(12)}, 1024)
    assert {f"part {n}: {2**n} B" for n in range(10)} <= set(texts(figure))
    assert any(text.endswith("400% of the limit") for text in texts(figure))
    assert overlapping(figure) == []
    assert overlapping(visualize.plot_memory({"nothing": 0})) == []


@pytest.mark.parametrize(
    ("parts", "limit", "says"),
    [
        ({}, None, "a bar without parts"),
        ({"a": 1, "b": {"c": 2}}, None, "mixes bytes and mappings"),
        ({"a": -1}, None, "part 'a' has -1 bytes"),
        ({"a": math.nan}, None, "finite and at least 0"),
        ({"a": 1}, 0, "limit is 0 bytes"),
    ],
)
def test_memory_that_cannot_be_is_refused(parts, limit, says):
    with pytest.raises(ValueError, match=says):
        visualize.plot_memory(parts, limit)


@pytest.fixture(scope="module")
def found():
    """What the planner finds for two layers on eight GPUs."""

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.up = Linear((256, 1024), ("embed", "mlp"), rngs=rngs)
            self.down = Linear((1024, 256), ("mlp", "embed"), rngs=rngs)

    def loss(model, batch):
        return jnp.mean((model.down(model.up(batch["x"])) - batch["y"]) ** 2)

    batch: dict[str, Any] = dict.fromkeys(("x", "y"), ((64, 256), "float32"))
    options = AutoDistConfig(device="gpu:h100", mesh_col=8, topk=3)
    return plan(lambda: Two(nnx.Rngs(0)), options, batch=batch, loss=loss)


def candidates(found, points):
    """The answer with a candidate at each (bytes, seconds), each its own spread; the first is the best."""
    made = []
    for number, (size, seconds) in enumerate(points):
        estimate = dataclasses.replace(
            found.estimate, held={"parameters": size}, own=0.0, seconds_of={"compute": seconds}
        )
        spread = dataclasses.replace(found.spread, accumulation=number + 1)
        made.append(dataclasses.replace(found.best, spread=spread, estimate=estimate))
    return dataclasses.replace(found, best=made[0], runners=tuple(made[1:]), over=(), proofs={})


@pytest.mark.parametrize("closeness", [1.0, 0.01, 1e-4])
def test_unbeaten_strategies_are_numbered_and_named_and_no_number_covers_another(found, closeness):
    unbeaten = [(GIB * (4 + closeness * n), 0.2 - 0.02 * closeness * n) for n in range(8)]
    beaten = [(GIB * (4 + closeness * n), 0.21) for n in range(1, 8)] + [(GIB * 6, 0.3)]
    figure = visualize.plot_frontier(candidates(found, [*unbeaten[::-1], *beaten]))
    numbers = gids(figure, "strategy")
    assert [numbers[f"strategy {n}"].get_text() for n in range(1, 9)] == [str(n) for n in range(1, 9)]
    for number, (size, seconds) in enumerate(unbeaten, 1):
        assert numbers[f"strategy {number}"].xy == pytest.approx((size / GIB, seconds * 1000))
    mesh = str(found.spread)  # the best is the last of the unbeaten, and the others have more microbatches
    assert [text.split(": ")[0] for text in texts(figure)[-8:]] == [
        *(f"{mesh}, {n} microbatches" for n in range(8, 1, -1)),
        mesh,
    ]
    assert overlapping(figure) == []


def test_the_frontier_of_what_the_planner_found_is_written(found, tmp_path):
    figure = visualize.plot_frontier(found, tmp_path / "frontier.svg")
    assert (tmp_path / "frontier.svg").read_text(encoding="utf-8") == visualize.svg(figure)
    assert overlapping(figure) == [] and any(word.startswith("chosen: ") for word in svg_words(figure))


def run_folder(path, factor=1.0, noun="tokens", restarts=()):
    """A run of 100 steps: the loss is factor / step, a line each 10 steps, 3 seconds a step from each start."""
    folder = RunFolder(path)
    began = 0
    for step in range(10, 101, 10):
        seconds = 3.0 * (step - began)
        folder.lines.append(
            {"step": step, "split": "train", "loss": factor / step, noun: step * 512, "elapsed_seconds": seconds}, print
        )
        if step % 50 == 0:
            record = {"step": step, "split": "validation", "loss": 2 * factor / step, "elapsed_seconds": seconds + 1}
            folder.lines.append(record, print)
        if step in restarts:
            began = step
    return path


def test_losses_of_several_runs_are_drawn_at_their_steps_and_named(tmp_path):
    folders = [run_folder(tmp_path / name, factor) for name, factor in (("one", 1.0), ("two", 1.001), ("three", 3.0))]
    figure = visualize.plot_runs(folders, path=tmp_path / "runs.png")
    with Image.open(tmp_path / "runs.png") as image:
        assert image.format == "PNG"
    lines = gids(figure)
    for name, factor in (("one", 1.0), ("two", 1.001), ("three", 3.0)):
        train, validation = lines[f"train {name}"], lines[f"validation {name}"]
        assert [*train.get_xdata()] == [*range(10, 101, 10)]
        assert [*train.get_ydata()] == [factor / step for step in range(10, 101, 10)]
        assert [*validation.get_xdata()] == [50, 100] and validation.get_marker() != "None"
        assert lines[f"name {name}"].get_text() == name
    assert len({str(lines[f"train {name}"]._dash_pattern) for name in ("one", "two", "three")}) == 3
    assert len({lines[f"validation {name}"].get_marker() for name in ("one", "two", "three")}) == 3
    assert "one, train, last 0.01" in texts(figure)
    assert overlapping(figure) == [], "runs that end at one loss too"


def test_seconds_go_on_over_restarts_and_rows_are_those_learned_from(tmp_path):
    folder = run_folder(tmp_path / "run", restarts=(30, 60))
    seconds = gids(visualize.plot_runs(folder, against="seconds"))
    # validation ends a second after the line of its step, and a restart goes on from there
    assert [*seconds["train run"].get_xdata()] == pytest.approx([3.0 * step for step in range(10, 101, 10)], abs=1.01)
    tokens = gids(visualize.plot_runs(str(folder), against="tokens"))
    assert [*tokens["train run"].get_xdata()] == [512 * step for step in range(10, 101, 10)]
    assert [*tokens["validation run"].get_xdata()] == [512 * 50, 512 * 100], "between the lines of training"


def test_a_loss_that_was_not_finite_is_a_gap(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for step, loss in enumerate((1.0, math.nan, 0.5), 1):
        folder.lines.append({"step": step, "split": "train", "loss": loss}, print)
    values = gids(visualize.plot_runs(folder.path))["train run"].get_ydata()
    assert values[0] == 1.0 and math.isnan(values[1]) and values[2] == 0.5


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    folders = [run_folder(tmp_path / name / "run") for name in ("a", "b")]
    assert {"name a/run", "name b/run"} <= set(gids(visualize.plot_runs(folders)))


def test_what_runs_do_not_have_is_said(tmp_path):
    folder = run_folder(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for arguments, says in [
        (([],), "no run to draw"),
        ((tmp_path / "no",), "is no folder"),
        ((tmp_path / "empty",), "has no metrics.jsonl"),
        ((folder, "speed"), "no metric 'speed': it has elapsed_seconds, loss, tokens"),
        ((folder, None, "images"), "counts no images; it has tokens"),
        ((folder, None, "days"), "against is 'days'; choose step"),
    ]:
        with pytest.raises(ValueError, match=says):
            visualize.plot_runs(*arguments)
    for arguments, how, says in [((folder,), {}, "has no samples"), ((folder,), {"rows": 1}, "rows is 1")]:
        with pytest.raises(ValueError, match=says):
            visualize.plot_samples(*arguments, **how)


def test_samples_are_a_column_a_run_from_the_first_step_to_the_last(tmp_path):
    text, image = run_folder(tmp_path / "text"), run_folder(tmp_path / "image", noun="images")
    for step in range(10, 101, 10):
        file = RunFolder(text).sample(step, ".txt")
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"at {step}: $x_1 costs $2\n" + "a long line " * 30 + "\n" * 20, encoding="utf-8")
    for step in (50, 100):
        value = np.full((4, 8, 8, 1), step / 100)
        save_grid(value, RunFolder(image).sample(step, ".png"))
        save_grid(value, RunFolder(image).sample(step, "-reconstructions.png"))
    figure = visualize.plot_samples([text, image], rows=4)
    shown = [gid.split()[1:] for gid in gids(figure, "sample")]
    assert sorted(step for name, step in shown if name == "text") == ["10", "100", "40", "70"]
    assert [step for name, step in shown if name == "image"] == ["50", "100"]
    assert [len(axes.images) for axes in figure.axes if (axes.get_gid() or "").startswith("sample image")] == [1, 1]
    seen = texts(figure)
    assert "text, step 10" in seen and "step 100" in seen and any(one.startswith("at 40: $x_1") for one in seen)
    assert overlapping(figure) == []
    for name in ("a", "b"):
        (tmp_path / f"{name}.svg").write_text(visualize.svg(visualize.plot_samples(image)), encoding="utf-8")


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    folder = run_folder(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "split": "tr')
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["step"] == 10
    assert len(gids(visualize.plot_runs(folder))["train run"].get_xdata()) == 10
