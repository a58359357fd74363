"""Profiles against closed forms, what XLA says of the same program, and a browser that opens the page."""

import html.parser
import itertools
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import artifex
from artifex.config import Config
from artifex.profiling import scopes
from artifex.profiling.graph import graph
from artifex.profiling.profiler import profile
from artifex.profiling.trace import covered, read
from artifex.scaling.communication import Collective
from artifex.scaling.mesh_utils import create_device_mesh
from artifex.scaling.peak import Peak
from artifex.training.opening import open_run

TINY = {
    "model": {"name": "llama-nano", "num_layers": 2, "embed_dim": 64},
    "data": {"sequence_length": 64},
    "training": {"batch_size": 8, "steps": 100},
    "logging": {"progress": False},
    "device": {"fsdp": 4, "tensor": 2},
}


@pytest.fixture(scope="module")
def of_run(tmp_path_factory):
    """The profile of a run over eight devices."""
    run = open_run(Config.from_dict(TINY), tmp_path_factory.mktemp("profile") / "run")
    with run.lock, run.checkpoints, artifex.profile(run, peak=Peak(1e12, "given")) as prof:
        prof.train(7)
    return prof, run


@pytest.mark.parametrize(
    ("op_name", "path", "during"),
    [
        ("jit(step)/jvp(Decoder)/while/body/closed_call/Block/Linear/dot_general", "Decoder/Block/Linear", "forward"),
        ("jit(step)/transpose(jvp(Decoder))/while/body/closed_call/Block/mul", "Decoder/Block", "backward"),
        ("jit(f)/transpose(jvp(UNet))/checkpoint/rematted_computation/Conv/conv", "UNet/Conv", "recomputed"),
        ("jit(step)/optimizer/vmap()/closed_call/mul", "optimizer", "optimizer"),
        ("jit(step)/jvp(Decoder)/Block/Block/GatedMLP/mul", "Decoder/Block/GatedMLP", "forward"),
        ("jit(step)/transpose(jvp(Decoder))/Block/(Attention/Linear/dot:RMSNorm/sum)", "Decoder/Block", "backward"),
        ("jit(step)/add", "other", "other"),
        ("", "other", "other"),
    ],
)  # fmt: skip
def test_an_operation_belongs_to_the_modules_around_it(op_name, path, during):
    place = scopes.place_of(op_name)
    assert (place.path, place.during) == (path, during)


def test_modules_and_passes_of_a_run_have_all_its_time(of_run):
    found = of_run[0].result
    whole = sum(one.seconds for one in found.operations)
    assert whole > 0
    for what in ("place", "during", "kind", "name"):
        assert sum(found.time_by(what).values()) == pytest.approx(whole)
    assert {"forward", "backward", "optimizer"} <= set(found.time_by("during"))
    places = set(found.time_by("place"))
    assert {"Decoder/Block/Attention/Linear", "Decoder/Block/GatedMLP/Linear", "optimizer"} <= places
    assert {one.device for one in found.operations} == set(range(8))


def test_an_operation_runs_as_often_as_its_loop_turns(of_run):
    """Products of the two scanned layers run twice in a step on each device."""
    found = of_run[0].result
    inside = [one for one in found.operations if "Block/GatedMLP/Linear" in one.place and one.kind == "matrix products"]
    assert inside and {one.times for one in inside} == {2.0}


def test_utilisation_and_rate_are_quotients_of_the_median(of_run):
    found, (cfg, tokens) = of_run[0].result, (Config.from_dict(TINY).model.spec(), 8 * 64)
    middle = sorted(found.times)[len(found.times) // 2]
    assert len(found.times) == 7 - 3 and found.times[0] > 0
    weights = cfg.num_layers * (4 * 64**2 + 3 * 64 * cfg.mlp_dim) + cfg.vocab_size * 64
    flops = 6 * weights * tokens + 12 * cfg.num_layers * 64 * 64 * tokens
    assert found.model_flops == flops
    assert found.utilisation == pytest.approx(flops / found.median / 1e12)
    assert found.rate == pytest.approx(tokens / found.median)
    assert found.median <= middle


def test_memory_by_part_is_what_the_devices_hold(of_run):
    prof, run = of_run
    memory, first = prof.result.memory, run.blue.mesh.devices.flat[0]

    def there(tree):
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert memory.held["parameters"] == there(prof.state.params)
    assert memory.held["optimizer"] == there(prof.state.optimizer)
    assert memory.gradients == there(prof.state.params), "float32, laid out as what they change"
    used = prof.compiled.memory_analysis()
    assert memory.own == used.temp_size_in_bytes
    assert sum(memory.parts.values()) == memory.whole
    assert memory.whole == pytest.approx(used.argument_size_in_bytes + used.temp_size_in_bytes, rel=0.01)
    assert 0 < memory.parts["activations"] <= memory.own
    assert memory.predicted["parameters"] == memory.held["parameters"]


def test_activations_are_what_jax_keeps_between_the_passes():
    """Where each block keeps its stream alone: layers x rows x positions x width, and what lies outside of the stack,
    which is the same with one layer more."""
    from artifex.profiling.kept import kept_bytes
    from artifex.training.memory import CompiledStep
    from artifex.training.state import blueprint, planned
    from artifex.training.task import batch_shapes

    def kept(layers):
        values = TINY | {"model": TINY["model"] | {"num_layers": layers}, "device": {"fsdp": 8}}
        config = Config.from_dict(values | {"training": TINY["training"] | {"remat": "full"}})
        plan = planned(config, 8)
        step = CompiledStep(None, blueprint(config, plan, plan.make_mesh()), batch_shapes(config), 0, 0)
        return kept_bytes(step) or 0

    assert kept(3) - kept(2) == 8 * 64 * 64 * 4 / 8
    assert kept(2) >= 2 * 8 * 64 * 64 * 4 / 8


def test_what_is_sent_over_a_dimension_is_a_closed_form():
    """A product whose summed dim is divided: its result, whole on each device, is all-reduced over that axis."""
    mesh = create_device_mesh((2, 4), ("data", "tensor"))
    a, b = np.ones((16, 64), np.float32), np.ones((64, 32), np.float32)
    left = jax.device_put(a, NamedSharding(mesh, PartitionSpec("data", "tensor")))
    right = jax.device_put(b, NamedSharding(mesh, PartitionSpec("tensor", None)))
    product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec("data", None)))
    with profile(product, per_step=16) as prof:
        for _ in range(5):
            prof.step(left, right)
    sent = 2 * 3 / 4 * (8 * 32 * 4)
    assert prof.communication_by_dimension() == {"data": 0.0, "tensor": sent}
    edges = prof.communication_graph()
    assert sorted(edges) == [(0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4)]
    assert set(edges.values()) == {sent}
    assert prof.result.rate == pytest.approx(16 / prof.result.median)
    assert {one.kind for one in prof.result.operations} >= {"matrix products", "communication"}
    shares = prof.device_utilization_map()
    assert set(shares) == set(range(8))
    assert all(0 <= sum(of.values()) <= 1 + 1e-9 for of in shares.values())


@pytest.mark.parametrize("kind", ["all-reduce", "all-to-all", "collective-permute"])
def test_a_device_sends_over_its_edges_what_the_collective_sends(kind):
    edges = graph([Collective(kind, ("a", "c"), 4, 1, 60.0)], {"a": 2, "b": 3, "c": 2})
    for device in range(12):
        out = sum(size for (sender, _), size in edges.items() if sender == device)
        into = sum(size for (_, receiver), size in edges.items() if receiver == device)
        assert out == pytest.approx(60.0) and into == pytest.approx(60.0)
    assert all((one // 2) % 3 == (other // 2) % 3 for one, other in edges), "b is the same on both sides"


def test_spans_that_overlap_count_once():
    rng = np.random.default_rng(0)
    begins, sizes = rng.integers(0, 80, 30).tolist(), rng.integers(1, 9, 30).tolist()
    spans = [(begin, begin + size) for begin, size in zip(begins, sizes, strict=True)]
    ticks = set(itertools.chain.from_iterable(range(*span) for span in spans))
    assert covered(spans) == len(ticks)


SPACES = {
    "gpu": """
planes { name: "/device:GPU:1"
  lines { name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 5000000 duration_ps: 2000000 stats { metadata_id: 1 str_value: "fusion.7" } } }
  lines { name: "XLA Modules"
    events { metadata_id: 2 duration_ps: 9000000 stats { metadata_id: 1 str_value: "fusion.7" } } }
  event_metadata { key: 1 value { id: 1 name: "loop_add_kernel" } }
  event_metadata { key: 2 value { id: 2 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 1 } }
  event_metadata { key: 1 value { id: 1 name: "fusion.7" } } }""",
    "tpu": """
planes { name: "/device:TPU:1"
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 5000000 duration_ps: 2000000 } }
  lines { name: "Steps" events { metadata_id: 2 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "%fusion.7 = f32[8]{0} fusion(f32[8]{0} %p), kind=kLoop" } }
  event_metadata { key: 2 value { id: 2 name: "0" } } }""",
}


@pytest.mark.parametrize("backend", SPACES)
def test_a_trace_of_an_accelerator_names_devices_and_operations(backend, tmp_path):
    """By the lines that the two backends write; no trace of one was there to try."""
    space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(SPACES[backend])
    (tmp_path / "host.xplane.pb").write_bytes(space)
    (event,) = read(tmp_path)
    assert (event.device, event.operation) == (1, "fusion.7")
    assert event.begin == pytest.approx(6e-6) and event.seconds == pytest.approx(2e-6)
    assert not read(tmp_path, {"fusion.7"})
    with pytest.raises(FileNotFoundError, match="has no trace"):
        read(tmp_path / "nowhere")


def test_waiting_for_data_and_saving_are_beside_the_steps(of_run):
    waits = of_run[0].result.waits
    assert waits["data"].times == 6, "the first batch starts what reads them"
    assert waits["checkpoint"].every == 400 and waits["checkpoint"].seconds > 0
    assert waits["checkpoint"].each_step == waits["checkpoint"].seconds / 400


def test_what_cannot_be_profiled_is_told():
    with pytest.raises(TypeError, match=r"give a function of jax\.jit"):
        artifex.profile(lambda x: x)
    with artifex.profile(jax.jit(jnp.sin)) as prof, pytest.raises(RuntimeError, match=r"after the `with` block"):
        for _ in range(3):
            prof.step(jnp.ones(3))
        prof.summary()
    with pytest.raises(RuntimeError, match="inside of"):
        prof.step(jnp.ones(3))
    with pytest.raises(ValueError, match="run some more"), artifex.profile(jax.jit(jnp.sin)) as prof:
        prof.step(jnp.ones(3))


def test_json_has_what_the_summary_says(of_run, tmp_path):
    found = of_run[0].result
    txt, read, _ = found.save(tmp_path)
    read = json.loads(read.read_text())
    assert read["seconds"]["steps"] == list(found.times)
    assert read["communication_by_dimension"] == found.communication_by_dimension()
    assert sum(read["memory"]["held"].values()) + read["memory"]["own"] == read["memory"]["whole"]
    text = txt.read_text()
    for word in ("fsdp 4 x tensor 2", "tokens a second", "utilisation", "by module", "all-gather", "checkpoint"):
        assert word in text


class Links(html.parser.HTMLParser):
    """What a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href") and value != "data:,"]
        self.found += [tag] if tag in ("script", "iframe", "object") else []


def test_the_page_needs_nothing_else(of_run, tmp_path):
    page = of_run[0].save(tmp_path)[2].read_text()
    links = Links()
    links.feed(page)
    assert not links.found
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", page)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
def test_a_browser_shows_the_page(of_run, tmp_path):
    page = of_run[0].save(tmp_path)[2]

    def browse(*how):
        fixed = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'own'}",
        ]
        command = ["chromium", *fixed, *how, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    seen, picture = browse("--enable-logging=stderr", "--dump-dom"), tmp_path / "page.png"
    assert "CONSOLE" not in seen.stderr
    for title in ("Steps", "A step of the run", "Memory", "Communication", "Time by module", "Operations"):
        assert f"<h2>{title}" in seen.stdout
    browse("--window-size=1100,1400", f"--screenshot={picture}")
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).sum()
    assert blue > 5_000, "bars are drawn"
    assert pixels[:, -20:].min() > 240, "nothing runs over the edge"


def test_the_program_profiles_a_configuration(tmp_path):
    options = "--model.num-layers 1 --model.embed-dim 32 --data.sequence-length 32 --training.batch-size 8 --steps 4"
    command = [sys.executable, "-m", "artifex.profile", *options.split(), "--out", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "by module" in ran.stdout and "utilisation" in ran.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["profile.html", "profile.json", "profile.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "2"], "--steps"),
        (["--stepz", "9"], "--stepz is unknown; did you mean --steps?"),
        (["a.yaml", "b.yaml"], "there can be one CONFIG"),
        (["none.yaml"], "none.yaml"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    from artifex.profile import main

    with pytest.raises(SystemExit) as left:
        main(words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and says in error
