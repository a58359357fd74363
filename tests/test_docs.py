"""Every python block of the documentation runs, in order, and prints what the page says it prints."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

ROOT = Path(__file__).parents[1]
MODELS = sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs/models").glob("*.md"))
PAGES = [page for page in ("README.md", "docs/quickstart.md", "docs/scaling.md", *MODELS) if (ROOT / page).exists()]
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
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code in blocks(ROOT / page):
        run(ROOT / page, code, namespace)
        printed = iter(capsys.readouterr().out.splitlines())
        for shown in SHOWN.findall(code):
            assert shown in printed, f"{page} shows {shown!r}, which is not printed, or not in this order"


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
