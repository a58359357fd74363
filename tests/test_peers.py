"""The comparison with peers: its statistics, its page, and what becomes of that which fails."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Their modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def environment() -> dict[str, str]:
    """As a user has it: one device, JAX's own promotion rules."""
    ours = ("JAX_NUM_CPU_DEVICES", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "NPROC")
    return {name: value for name, value in os.environ.items() if name not in ours}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10])
def test_quartiles_and_ratios_are_those_of_numpy(benchmarks, count):
    import report

    draw = np.random.default_rng(count)
    ours, theirs = draw.uniform(1, 2, count).tolist(), draw.uniform(1, 2, count).tolist()
    made = report.record("x", {"a": ours, "b": theirs}, work=8, unit="rows", ratios=[("a", "b")])
    assert made["variants"]["a"]["median"] == pytest.approx(np.median(ours))
    assert made["variants"]["a"]["quartiles"] == pytest.approx(np.percentile(ours, [25, 75]))
    (pair,) = made["ratios"]
    assert pair["ratio"] == pytest.approx(np.median(ours) / np.median(theirs))
    assert pair["quartiles"] == pytest.approx(np.percentile(np.divide(ours, theirs), [25, 75]))


def test_the_fastest_variant_of_a_rival_is_the_one_compared_with(benchmarks):
    import report

    seconds = {"ours": [1.0], "PyTorch": [3.0, 9.0, 4.0], "PyTorch, compiled": [5.0, 1.0, 3.0], "PyTorch, broken": []}
    assert report.fastest(seconds, "PyTorch") == "PyTorch, compiled"
    assert report.fastest(seconds, "bare JAX") is None


def found(**changes: object) -> dict:
    rows = {
        "ours": {"median": 0.5, "quartiles": [0.4, 0.6], "seconds": [0.4, 0.5, 0.6], "first": 9.25, "memory": None}
        | {"computed": {"loss": 5.5}},
        "PyTorch": {"median": 1.0, "quartiles": [0.9, 1.1], "seconds": [1.1, 1.0, 0.9], "computed": {"loss": 5.5}},
        "PyTorch, compiled": {"failed": "no C++ compiler"},
    }
    pair = {"of": "ours", "to": "PyTorch", "ratio": 0.5, "quartiles": [0.36, 0.67]}
    record = {"benchmark": "decoder", "name": "decoder step", "work": 4_096, "unit": "tokens", "variants": rows}
    lost = {"benchmark": "vae", "name": "image_step.py vae", "failed": "exit code -9"}
    machine = {"system": "Linux x86_64", "cpu": "a CPU", "vectors": "avx2", "cores": 2, "memory_gib": 8.0, "load": 0.1}
    environments = {"ours": {"versions": {"jax": "0.12.0"}}, "levanter": {"failed": "not installed: no wheel"}}
    made = {"when": "2026-11-29", "machine": machine, "quick": False, "conditions": "Alone.", "records": [lost]}
    return made | {"environments": environments, "records": [record | {"ratios": [pair]}, lost]} | changes


def test_the_page_has_what_the_file_has_and_what_was_written_by_hand(benchmarks, tmp_path):
    import page

    blocks = "\n".join(
        f"Before {name}.\n<!-- peers: {name} -->\nold\n<!-- end -->"
        for name in ("machine", "goals", "decoder", "vae", "dit")
    )
    (tmp_path / "page.md").write_text(f"# By hand\n{blocks}\nThe end.\n")
    (tmp_path / "found.json").write_text(json.dumps(found()))
    page.rewrite(tmp_path / "found.json", tmp_path / "page.md")
    once = (tmp_path / "page.md").read_text()
    page.rewrite(tmp_path / "found.json", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == once
    assert once.startswith("# By hand\nBefore machine.\n") and once.endswith("<!-- end -->\nThe end.\n")
    assert "\nold\n" not in once and "Not measured yet." in once.partition("Before dit")[2]
    assert "| ours | 500 | 400 to 600 | 8,192 | 9.2 | 5.5 |" in once
    assert "| PyTorch, compiled | no C++ compiler |" in once
    assert "- ours / PyTorch = **0.500** (0.36 to 0.67)" in once
    assert "`image_step.py vae` failed: exit code -9." in once
    assert "2 cores, 8 GiB, a CPU, avx2" in once and "| levanter | not installed: no wheel |" in once
    tables = re.findall(r"(?:^\|.*\n)+", once, re.MULTILINE)
    assert all(len({line.count("|") for line in table.splitlines()}) == 1 for table in tables), "rows of one length"


@pytest.mark.parametrize(("ratio", "verdict"), [(0.69, "met"), (0.7, "met"), (0.71, "**missed**")])
def test_a_goal_is_met_up_to_its_figure(benchmarks, ratio, verdict):
    import page

    made = found()
    made["records"][0]["ratios"][0]["ratio"] = ratio
    line = next(
        line for line in page.table(made, "goals").splitlines() if "decoder step: at most 0.7 of PyTorch" in line
    )
    assert line.endswith(f"| {verdict} |")
    assert "unet step: at most 1.2 of PyTorch |  | not measured |" in page.table(made, "goals")


def test_what_was_measured_tiny_is_not_put_into_the_page(benchmarks, tmp_path):
    import page

    (tmp_path / "found.json").write_text(json.dumps(found(quick=True)))
    with pytest.raises(ValueError, match="measured with --quick"):
        page.rewrite(tmp_path / "found.json", tmp_path / "page.md")


def test_the_page_in_the_tree_is_what_the_results_in_the_tree_make(benchmarks, tmp_path):
    import page

    (tmp_path / "page.md").write_text(page.PAGE.read_text())
    page.rewrite(BENCHMARKS / "results.json", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page.PAGE.read_text()


def test_the_command_its_report_and_its_page_need_the_standard_library_alone():
    outside = "{'jax', 'flax', 'numpy', 'torch', 'artifex'} & set(sys.modules)"
    program = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import peers, report; print({outside})"
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_environment_that_is_not_there_is_a_row_with_its_reason(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "peers.py", "--only", "loader", "--quick", "--json", out]
    command += ["--use", f"ours={tmp_path}/python", f"pytorch={tmp_path}/python"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    assert {name: one["failed"].partition(":")[0] for name, one in made["environments"].items()} == dict.fromkeys(
        ("ours", "pytorch"), "does not import"
    )
    assert "cannot be started: No such file" in made["records"][0]["failed"]


def fine():
    from workers import Built

    return Built(lambda: time.sleep(0.01), {"loss": 2.0})


def broken():
    raise ArithmeticError("no such number\nand more")


def other():
    return fine()._replace(computed={"loss": 2.1})


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def dies_later():
    calls = iter(range(100))
    return fine()._replace(call=lambda: killed() if next(calls) > 4 else None)


@pytest.mark.slow
def test_a_variant_that_fails_is_a_row_and_the_rest_is_timed(benchmarks):
    import report
    from workers import Variant

    builds = {"ours": fine, "PyTorch": fine, "broken": broken, "other": other, "killed": killed, "dies": dies_later}
    variants = {name: Variant(build, ()) for name, build in builds.items()}
    made = report.compared("x", variants, 3, work=1, unit="rows", rivals=("PyTorch", "nobody"))
    rows = made["variants"]
    assert {name for name, row in rows.items() if "failed" in row} == {"broken", "other", "killed", "dies"}
    assert rows["broken"]["failed"].endswith("ArithmeticError: no such number")
    assert "loss is 2.1, ours 2" in rows["other"]["failed"]
    assert "exit code -9" in rows["killed"]["failed"] and "ended in round 2" in rows["dies"]["failed"]
    assert all(len(rows[name]["seconds"]) == 3 for name in ("ours", "PyTorch"))
    assert [(pair["of"], pair["to"]) for pair in made["ratios"]] == [("ours", "PyTorch")]


@pytest.mark.slow
def test_one_case_end_to_end(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "peers.py", "--quick", "--rounds", "2", "--only", "vae", "--json", out]
    command += ["--use", f"ours={sys.executable}", f"pytorch={sys.executable}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    (record,) = made["records"]
    rows = record["variants"]
    timed = {name: row for name, row in rows.items() if "failed" not in row}
    assert {"ours", "bare JAX"} <= timed.keys()
    if "failed" not in made["environments"]["pytorch"]:
        assert {"PyTorch", "PyTorch, compiled", "PyTorch, channels last"} <= timed.keys()
    for row in timed.values():
        assert row["computed"]["loss"] == pytest.approx(rows["ours"]["computed"]["loss"], rel=1e-5)
        assert row["median"] == pytest.approx(statistics.median(row["seconds"])) and len(row["seconds"]) == 2
    assert "## vae" in done.stdout and "| vae step |" in done.stdout
