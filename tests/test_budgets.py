"""What a step sends over each axis of the mesh is what the strategies' pages say, within one in a hundred."""

import json
import math
from pathlib import Path

import budgets
import pytest
from test_targets import GPU, TPU, compiled

from artifex.config import DeviceConfig
from artifex.scaling.communication import Communication, communication
from artifex.scaling.mesh_utils import SIZE_AXES
from artifex.scaling.plan import Plan

# the slow suite has those that hardly differ from another
OF_CPUS = [
    pytest.param(of, id=str(of), marks=[pytest.mark.slow] * (of.setting in ("zero: 1", "stream whole")))
    for of in budgets.BUDGETS
]


@pytest.mark.parametrize("of", OF_CPUS)
def test_a_step_sends_over_each_axis_what_the_page_says(of):
    step = budgets.compiled(of)
    model = budgets.MIXTURE if of.mixture else budgets.DECODER
    known = budgets.symbols_of(model, step.plan, budgets.ROWS, budgets.TOKENS, w=4, b=5)
    expected = budgets.allowed(of, step.plan.sizes, known, cpu=True)
    found = {key: step.sends.sent(*key[0], kind=key[1]) for key in expected}
    assert found == {key: pytest.approx(size, rel=0.01) for key, size in expected.items()}
    rest = step.sends.sent() - math.fsum(found.values())
    assert rest < 0.01 * step.sends.sent(), step.sends


@pytest.mark.parametrize("of", OF_CPUS)
def test_nothing_is_laid_out_anew_through_all_of_it_on_every_device(of):
    assert budgets.compiled(of).anew == ()


WIDE = {**budgets.DECODER, "embed_dim": 512, "head_dim": 64, "mlp_dim": 1_024, "vocab_size": 8_192}
FOR_TARGETS = {"rows": 32, "tokens": 1_024, "w": 2, "b": 2}


def sent_by(
    target: str, of: budgets.Budget, folder: Path, compiler: dict[str, int] | None = None
) -> tuple[Communication, dict[str, float], dict[str, int]]:
    """What the step of a budget's run sends where it is compiled for a machine that is not there, and the letters."""
    sizes = {name: size for name, size in of.device if isinstance(size, int) and name in SIZE_AXES}
    model = WIDE | ({"expert_mlp_dim": 512} if of.mixture else {})
    fields = {name: value for name, value in model.items() if name != "name"}
    sections = {"model": fields, "device": {name: value for name, value in of.device if name not in sizes}}
    base = "mixtral-8x7b" if of.mixture else "llama3.2-1b"
    shape = ("--batch", str(FOR_TARGETS["rows"]), "--sequence", str(FOR_TARGETS["tokens"]), "--remat", "none")
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    how = ("--set", json.dumps(sections), "--compiler", json.dumps(compiler or {}))
    compiled(target, base, "--mesh", mesh, *shape, *how, "--text", str(folder / "step.txt"))
    plan = Plan.from_device(DeviceConfig(**dict(of.device)), 8)
    text = (folder / "step.txt").read_text(encoding="utf-8")
    sends = communication(text, plan.sizes, plan.pipeline and plan.pipeline.taken)
    return sends, budgets.symbols_of(model, plan, **FOR_TARGETS), plan.sizes


@pytest.mark.slow
@GPU
@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_a_gpus_step_sends_what_the_page_says(of, tmp_path):
    sends, known, sizes = sent_by("h100:1x8", of, tmp_path)
    expected = budgets.allowed(of, sizes, known, cpu=False)
    found = {key: sends.sent(*key[0], kind=key[1]) for key in expected}
    most = 0.04 if of.setting == "ring" else 0.01  # of the 28 parts of a layer's keys that go round it sends 27
    assert found == {key: pytest.approx(size, rel=most) for key, size in expected.items()}
    assert sends.sent() - math.fsum(found.values()) < 0.01 * sends.sent(), sends


# without products that pass parts on meanwhile, and without sums joined to others that are not scattered
PLAIN = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000, "xla_jf_crs_combiner_threshold_in_bytes": 0}


@pytest.mark.slow
@TPU
@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_a_tpus_step_sends_what_the_page_says(of, tmp_path):
    sends, known, sizes = sent_by("v5e:4x2", of, tmp_path, PLAIN)
    expected = budgets.allowed(of, sizes, known, cpu=False)
    found = {key: sends.sent(*key[0], kind=key[1]) for key in expected}
    rest = sends.sent() - math.fsum(found.values())
    # this compiler scatters no sum whose parts are of the last dim, which sends twice as much
    for axes, kind in expected:
        if kind == "reduce-scatter" and (axes, "all-reduce") not in expected:
            whole = sends.sent(*axes, kind="all-reduce")
            found[axes, kind] += whole / 2
            rest -= whole
    most = {"hybrid": 0.04, "exchange": 0.04, "ring": 0.07}.get(of.setting, 0.07 if of.page == "pipeline" else 0.02)
    assert found == {key: pytest.approx(size, rel=most) for key, size in expected.items()}
    assert rest < 0.015 * sends.sent(), sends


@pytest.mark.slow
@TPU
def test_a_tpu_passes_parts_on_while_it_multiplies_those_that_came(tmp_path):
    (of,) = (each for each in budgets.BUDGETS if each.setting == "fsdp")
    sends, known, sizes = sent_by("v5e:4x2", of, tmp_path)
    # of the layers' gathers and their gradients: in both directions at once, and so some parts twice
    n, layers = sizes["fsdp"], 3 * known["w"] * known["P"]
    assert 1 <= sends.sent("fsdp", kind="collective-permute") / (layers * (n - 1) / n) <= 1.5
    assert sends.sent("fsdp", kind="all-gather") == pytest.approx(known["w"] * known["H"] * (n - 1) / n, rel=0.02)
