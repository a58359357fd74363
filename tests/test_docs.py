"""Every python block of the documentation runs, in order, and prints what the page says it prints."""

import json
import platform
import re
import runpy
import shlex
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from test_roll_call import beside_another_program, free_port, meet

from artifex.cli import START, parse_train, text_of
from artifex.config import Config, DeviceConfig
from artifex.data.text import load_text
from artifex.scaling import remat, sharding
from artifex.scaling.autodist import AutoDistConfig
from artifex.scaling.axes import ACTIVATION_AXES, WEIGHT_AXES
from artifex.scaling.mesh_utils import create_device_mesh, setup_mesh
from artifex.scaling.plan import Plan
from artifex.scaling.processes import Start
from artifex.train import dry_run, plan_of, train
from artifex.training.state import blueprint

ROOT = Path(__file__).parents[1]
MODELS, SCALING = (
    sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / folder).glob("*.md"))
    for folder in ("docs/models", "docs/scaling")
)
PAGES = [
    page
    for page in ("README.md", "docs/quickstart.md", "docs/visualize.md", *SCALING, *MODELS)
    if (ROOT / page).exists() and "```python" in (ROOT / page).read_text()
]
ON_A_LAPTOP = "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python -m artifex.train"
DOCUMENT = ROOT / "tests/data/scaling_document_blocks.md"
SHOWN = re.compile(r"^ *print\(.*\)(?:  |\n *)# (.+)$", re.MULTILINE)  # a result stands behind its print, or below it


def blocks(page: Path) -> list[str]:
    """The python blocks of a page, each behind as many newlines as it has lines before it, for tracebacks."""
    text = page.read_text()
    found = re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in found]


def run(page: Path, code: str, namespace: dict) -> None:
    exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_and_prints_what_the_page_shows(page, tmp_path, monkeypatch, capsys):
    if page == "docs/scaling/pytorch.md":
        pytest.importorskip("torch", reason="the page needs: pip install -e '.[torch]'")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code in blocks(ROOT / page):
        run(ROOT / page, code, namespace)
        printed = iter(capsys.readouterr().out.splitlines())
        for shown in SHOWN.findall(code):
            assert shown in printed, f"{page} shows {shown!r}, which is not printed, or not in this order"


def table(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """The cells of the number-th table below a heading of a page, without its head."""
    section = f"\n{(ROOT / page).read_text()}".split(f"\n{heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[number].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_page_on_memory_names_what_remat_may_keep():
    assert [cell.strip("`") for cell, _ in table("docs/memory.md", "## Remat by name")] == list(remat.RESIDUALS)
    shown = {row[0] for row in table("docs/memory.md", "## Remat by name", 1)}
    assert {remat.canonical(setting) for setting in shown} == shown


def on_a_laptop() -> list[tuple[str, list[str]]]:
    """(page, options) of each command of the pages on scaling that starts a run on eight simulated devices."""
    found = []
    for page in SCALING:
        for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
            commands = block.replace("\\\n", " ").splitlines()
            found += [(page, shlex.split(one[len(ON_A_LAPTOP) :])) for one in commands if one.startswith(ON_A_LAPTOP)]
    return found


def test_every_strategy_has_a_page_with_a_command_that_starts_it():
    started = {Path(page).stem: [*options] for page, options in on_a_laptop()}
    assert {"data", "fsdp", "tensor", "expert", "context", "pipeline", "choosing"} <= set(started)
    for page, options in started.items():
        assert page in ("choosing", "communication") or f"--device.{page}" in options


@pytest.mark.parametrize(("page", "options"), on_a_laptop(), ids=lambda value: str(value)[:80])
def test_each_command_of_the_scaling_pages_fits_eight_devices(page, options):
    config = parse_train(options).config
    plan = plan_of(config, 8)
    assert plan.device_count == 8
    blueprint(config, plan, plan.make_mesh())


@pytest.mark.slow
@pytest.mark.parametrize(("page", "options"), on_a_laptop(), ids=lambda value: str(value)[:80])
def test_each_command_of_the_scaling_pages_ends_with_the_loss_of_one_device(page, options, tmp_path, monkeypatch):
    def last_loss(config, name, devices):
        present = jax.devices()[:devices]
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_: present)
            patch.setattr(jax, "device_count", lambda *_: devices)
            run = train(config, tmp_path / name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return next(line["loss"] for line in reversed(lines) if line["split"] == "train")

    alone = [
        each
        for pair in zip(options[::2], options[1::2], strict=True)
        if not pair[0].startswith("--device.")
        for each in pair
    ]
    spread = last_loss(parse_train(options).config, "eight", 8)
    assert spread == pytest.approx(last_loss(parse_train(alone).config, "one", 1), rel=1e-4)
    shown = re.findall(r"`loss ([\d.]+)`|end with ([\d.]+) and ([\d.]+)", (ROOT / page).read_text())
    assert f"{spread:.3f}" in {figure for each in shown for figure in each}


def on_a_mesh(**strategies):
    """Strategies on the mesh ("data", "model") of 4 x 2 devices."""
    return sharding.MultiDimensionalStrategy(
        strategies, sharding.ParallelismConfig.from_sharding_config(sharding.ShardingConfig(4, 2))
    )


data, tensor = sharding.DataParallelStrategy("data"), sharding.TensorParallelStrategy("model")
PROVOKED = [  # one for each row of the page's table of errors
    lambda: create_device_mesh((2, 4), ("data", "model"), devices=jax.devices()[:4]),
    lambda: DeviceConfig(mesh_shape=(2.0, 4)),
    lambda: DeviceConfig(mesh_shape=(8,)),
    lambda: Config.from_dict({"device": {"mesh_shape": [2, 4], "data": 2}}),
    lambda: DeviceConfig(data=-1, tensor=-1),
    lambda: setup_mesh(device_config=DeviceConfig(data=2, tensor=2)),
    lambda: setup_mesh(device_config=DeviceConfig(auto_detect_mesh=False)),
    lambda: Plan.from_device(DeviceConfig(fsdp=8), 8).check_batch(12),
    lambda: dry_run(
        Config.from_dict(
            {
                "model": {"name": "unet-digits", "network": {"block_channels": [6, 6], "groups": 2}},
                "data": {"source": "digits"},
                "device": {"tensor": 8},
            },
        )
    ),
    lambda: dry_run(Config.from_dict({"model": {"num_heads": 6, "embed_dim": 96}, "device": {"data": 2, "tensor": 4}})),
    lambda: sharding.combine({"data": data, "tensor": sharding.TensorParallelStrategy("data")}),
    lambda: sharding.combine({"wide": tensor, "narrow": sharding.TensorParallelStrategy("narrow")}),
    lambda: on_a_mesh(data=data, tensor=tensor, pipe=sharding.PipelineParallelStrategy("pipeline")),
    lambda: on_a_mesh(data=data),
    lambda: Plan((8,), ("data",), sharding.TensorParallelStrategy("tensor").rules),
    lambda: data.get_partition_spec(("batch", None), shape=(6, 3), mesh={"data": 4}),
    lambda: data.get_partition_spec(("embedd",)),
    lambda: data.get_partition_spec(("batch", "embed")),
    lambda: sharding.PipelineParallelStrategy(num_stages=8).assign_layers_to_stages(5),
]


def test_each_error_on_the_scaling_page_is_what_the_code_says():
    for (message, _), provoke in zip(table("docs/scaling/index.md", "## Errors and remedies"), PROVOKED, strict=True):
        with pytest.raises((ValueError, TypeError)) as caught:
            provoke()
        shown = re.escape(message.strip("`")).replace(re.escape("..."), ".+")
        assert re.match(shown, str(caught.value)), f"the page shows {message}, the code says {caught.value}"


SAME = {"training.seed": 0}
MET = [  # by each row of that page's table: what each of some processes is told, and what the first of them says
    lambda port: meet(port, (0, 4, SAME), (2, 4, SAME), wait=1.0)[0],
    lambda port: meet(port, (1, 2, SAME), wait=1.0)[0],
    lambda port: beside_another_program(port, b"220 ready\r\n", (1, 2, SAME)),
    lambda port: beside_another_program(port, b"", (0, 2, SAME)),
    lambda port: meet(port, (0, 2, SAME), (1, 4, SAME))[0],
    lambda port: meet(port, (0, 3, SAME), (1, 3, SAME), (1, 3, SAME, 0.2))[0],
    lambda port: meet(port, (0, 2, SAME), (1, 2, {"training.seed": 1}))[0],
]


def test_each_error_on_the_page_on_processes_is_what_they_say():
    for (message, _), said in zip(table("docs/scaling/processes.md", "## Before JAX starts"), MET, strict=True):
        port = free_port()
        shown, said = message.strip("`").replace("1234", str(port)), said(port)
        assert said.startswith(shown), f"the page shows {message}, a process says {said}"


def test_the_page_on_processes_has_each_option_with_its_default():
    rows = table("docs/scaling/processes.md", "## Two processes on one machine")
    assert [row[0].strip("`") for row in rows] == list(START)
    assert rows[0][2] == f"`{Start().distributed}`"
    assert [row[2] for row in rows[-3:]] == [str(Start().wait), str(Start().lost_after), str(Start().stuck_after)]


def test_the_page_on_the_planner_has_each_option_with_its_default():
    rows = table("docs/scaling/planner.md", "## Every option")
    assert [(row[0].strip("| `"), row[1].strip("`")) for row in rows] == [
        (name, text_of(field.default)) for name, field in AutoDistConfig.model_fields.items()
    ]


def test_the_scaling_page_has_each_name_with_its_sentence():
    for number, axes in enumerate([WEIGHT_AXES, ACTIVATION_AXES]):
        assert table("docs/scaling/index.md", "## Names", number) == [
            [f"`{name}`", what] for name, what in axes.items()
        ]


def test_the_quickstarts_figures_are_above_those_of_the_compressors_on_this_python():
    rows = table("README.md", "## Train")
    assert rows == table("docs/quickstart.md", "# Quickstart"), "one table on both pages"
    minor = ".".join(platform.python_version_tuple()[:2])
    if minor not in {version for version, *_ in rows}:
        pytest.skip(f"the pages have no figures of Python {minor}")
    ours, *shown = next([float(cell.strip("*")) for cell in cells] for version, *cells in rows if version == minor)
    compressors = runpy.run_path(str(ROOT / "benchmarks/compressors.py"))["COMPRESSORS"]
    content = load_text("stdlib").validation.tobytes()
    for name, figure in zip(("xz -9e", "bz2", "gzip -9"), shown, strict=True):
        # 0.04: other patch releases have other bytes, and Debian leaves modules out: 1.489 for xz on its 3.11.2
        assert figure == pytest.approx(8 * len(compressors[name](content)) / len(content), abs=0.04), name
        assert ours < figure


def test_the_install_page_has_every_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name for name, *_ in table("docs/install.md", "## Extras")} == {f"`{name}`" for name in extras}


def undefined():
    """The variables that the Scaling document uses without making them. 840 divides by every count up to 8."""
    weights = {"up": jnp.ones((840, 1680)), "bias": jnp.ones(1680), "scale": jnp.ones(3)}
    return {
        "__name__": "__main__",
        "batch_data": jnp.ones((840, 4, 2)),
        "large_weight_matrix": jnp.ones((256, 4096)),
        "weights": weights,
    }


def test_every_block_of_the_scaling_document_gives_what_it_says(capsys):
    made = undefined()
    for code in blocks(DOCUMENT):
        run(DOCUMENT, code, made)
    assert capsys.readouterr().out.splitlines() == [
        "Available devices: 8",
        "Mesh shape: (2, 4)",
        "Axis names: ('data', 'model')",
        "Optimal shape for 8 devices: (2, 4)",
        "Optimal shape for 7B model: (4, 2)",
        "Optimal shape for 70B model: (4, 8)",
        "Configuration valid: True",
        "Mesh shape: (4, 2)",
        "Axis names: ('data', 'model')",
    ]
    assert made["spec"] == P("data", None, None)
    assert made["sharded_data"].sharding.spec == P("data", None, None)
    assert made["should_shard"] is True
    assert made["sharded_weights"]["up"].sharding.spec == P(None, "data")
    assert made["qkv_spec"] == P(None, "model") and made["output_spec"] == P("model", None)
    assert made["linear_spec"] == P(None, "model")
    assert made["layer_assignments"] == [6, 6, 6, 6]
    assert made["combined_spec"] == P("data", None, None)
    assert made["total_devices"] == 8 and made["is_valid"] is True


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_blocks_of_the_scaling_document_that_name_no_count_run_on_any(count, monkeypatch):
    present = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: present)
    namespace = undefined()
    quick_start, *others = blocks(DOCUMENT)
    run(DOCUMENT, quick_start, namespace)
    assert set(namespace["mesh"].devices.flat) == set(present)
    for code in others:
        if "apply_sharding" in code:
            run(DOCUMENT, code, namespace)
    assert set(namespace["sharded_data"].devices()) == set(present)
    assert set(namespace["sharded_weights"]["up"].devices()) == set(present)
