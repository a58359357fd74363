"""The matrix: every family trained by every strategy and union on eight devices is that family trained on one.

A cell is five steps of a run on its own data, in its own order, with dropout where the family has it. Either it equals
one device with as many microbatches, shares the work and the memory, and holds the bytes that its plan says, or it is
refused before anything is compiled. `pytest -m slow tests/test_matrix.py` runs them all, `docs/_generate_matrix.py`
writes what they find to docs/scaling/matrix.md.
"""

import re
from pathlib import Path

import cells
import pytest
from cells import FAMILIES, MIXTURES, STRATEGIES

PAGE = Path(__file__).parents[1] / "docs/scaling/matrix.md"

TRANSFORMERS = [*list(FAMILIES)[: list(FAMILIES).index("UNet")]]
CONVOLUTIONS = ["UNet", "VAE", "VQ-VAE", "KL autoencoder"]


def refusal(family: str, strategy: str) -> str | None:
    """Why a pair is refused, as a fragment of what the code says; None: it is not."""
    if "expert" in strategy and family not in MIXTURES:
        return "has none; set device.expert=1"
    if "pipeline" in strategy and family in CONVOLUTIONS:
        return "has no stack of repeated blocks that stages could divide"
    if "context" in strategy and family in CONVOLUTIONS:
        return "is made of convolutions, which have none; set device.context=1"
    return None


REFUSED = [(family, strategy) for family in FAMILIES for strategy in STRATEGIES if refusal(family, strategy)]
TRAINED = [(family, strategy) for family in FAMILIES for strategy in STRATEGIES if not refusal(family, strategy)]
FIRST_REFUSED = {strategy: family for family, strategy in reversed(REFUSED)}
EVERY_DAY = [
    ("llama", "zero 2, data 8"),
    ("llama", "fsdp 2 x context 2 x tensor 2"),
    ("gpt2, dropout", "pipeline 2 x fsdp 4, interleaved"),
    ("mixture", "data 2 x expert 2 x tensor 2"),
    ("VAE", "fsdp 8"),
]


def most_work(family: str, strategy: str) -> float:
    """The share of one device's FLOPs that each of eight may have."""
    device = STRATEGIES[strategy]
    # attention computes its scores again going backwards, which XLA merges with the first time on one device; what is
    # smaller than the devices, such as a class's vector, is computed by each
    share = 8 / 7 / 8
    if "pipeline" in device:
        S, V, M = device["pipeline"], device.get("stages_per_device", 1), cells.PARTS
        # a backward turn computes its stage again: 4 forwards in place of 3; idle devices compute for nobody
        share *= 4 / 3 * (V * M + S - 1) / (V * M)
    if family in MIXTURES and "tensor" in device:
        share *= 1.05  # each routes every token
    if family == "masked diffusion" and "whole stream" in strategy:
        share *= 1.25  # a vocabulary of 257 does not divide, so that each computes the head for all positions
    if family == "mixture" and "expert" in device:
        share *= 2  # the rows of its experts are counted as if all tokens came
    if family == "latent DiT" and strategy == "context 8, ring":
        share *= 1.4  # of 16 positions a device has two parts of one, which its blocks fill up
    if family == "latent DiT" and "interleaved" in strategy:
        share *= 1.1  # 4 rows of a microbatch do not divide over 8 devices: two encode each
    return share


@pytest.mark.parametrize(
    ("family", "strategy"),
    [pytest.param(*pair, marks=() if pair in EVERY_DAY else pytest.mark.slow) for pair in TRAINED],
)
def test_eight_devices_train_as_one(family, strategy):
    cell = cells.cell(family, strategy)
    assert cell.refused is None
    assert cell.loss < 1e-5 and cell.gradient < 1e-4 and cell.params < 1e-3, cell
    assert cell.argument_bytes == cell.placed_bytes, "state and batch, to the byte"
    assert cell.work < most_work(family, strategy), cell
    assert cell.temporary < 1, cell
    assert cell.anew == (), cell


@pytest.mark.parametrize(
    ("family", "strategy"),
    # every day the first family that a strategy refuses
    [pytest.param(*pair, marks=() if FIRST_REFUSED[pair[1]] == pair[0] else pytest.mark.slow) for pair in REFUSED],
)
def test_what_is_refused_is_refused_with_its_reason(family, strategy):
    device = STRATEGIES[strategy]
    with cells.presets(), pytest.raises(ValueError, match=re.escape(refusal(family, strategy))):
        cells.built(family, device, cells.PARTS if "pipeline" in device else 1, 8)


def test_the_page_has_a_row_for_each_strategy_and_a_column_for_each_family():
    tables = re.findall(r"(?:^\|.*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(tables) == 2
    for found in tables:
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
        assert head[1:] == list(FAMILIES) and [row[0] for row in rows] == list(STRATEGIES)
        assert all(len(row) == len(head) for row in rows) and "**fails**" not in found
    for row in [line for line in tables[0].splitlines() if "refused" in line]:
        strategy, *found = [cell.strip() for cell in row.strip("|").split("|")]
        for family, cell in zip(FAMILIES, found, strict=True):
            assert cell.startswith("refused") == bool(refusal(family, strategy)), (family, strategy)
