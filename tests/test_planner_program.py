"""What the planner reads off a traced step, against XLA's compiled one, counts by hand and the pages' formulas."""

import itertools
import json
import math
import random
from pathlib import Path

import budgets
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from planned import CLUSTER, DEVICES, Remembered, compiled, predicted, spread_of, subject

from artifex.config import Config
from artifex.scaling.autodist.estimate import estimate
from artifex.scaling.autodist.heap import ALIGNED, heap_bytes
from artifex.scaling.autodist.liveness import Buffer
from artifex.scaling.autodist.modules import ModuleSubject
from artifex.scaling.autodist.spread import Spread
from artifex.scaling.flops import flops

COMPILED = [
    ("decoder", "data 8", {}, True),
    ("decoder", "fsdp 8", {}, True),
    ("moe", "fsdp 2 x expert 4", {}, True),
    ("dit", "data 2 x fsdp 2 x tensor 2", {"accumulation": 2}, False),
    ("decoder", "data 8", {"zero": 1, "accumulation": 2}, False),
    ("decoder", "fsdp 4 x tensor 2", {"remat": "full"}, False),
    ("decoder", "data 2 x context 4", {}, False),
    ("decoder", "pipeline 2 x data 4", {"microbatches": 2}, False),
    ("vae", "fsdp 8", {}, False),
    ("vq", "data 4 x fsdp 2", {"zero": 2}, False),
    ("unet", "data 8", {"zero": 1}, False),
]
"""Family, mesh, settings, and whether the default suite compiles it."""

# models this small have little but what a compiler adds of its own; the grid of benchmarks/planner has larger ones
FAR: tuple[str, ...] = ()


def params(chosen) -> list:
    """The rows of a table, the slow suite's marked."""
    return [
        pytest.param(family, spread, id=f"{family} {spread}", marks=[pytest.mark.slow] * (not quick))
        for family, mesh, settings, quick in chosen
        for spread in [spread_of(mesh, **settings)]
    ]


@pytest.mark.parametrize(("family", "spread"), params(COMPILED))
def test_a_compiled_step_takes_the_state_that_was_predicted_to_the_byte_and_about_the_memory(family, spread):
    found, xla = predicted(spread, family).estimate, compiled(spread, family)
    assert found.state == xla.arguments
    if str(spread) not in FAR:
        assert found.whole == pytest.approx(xla.whole, rel=0.15)


@pytest.mark.slow
def test_the_state_of_every_plan_of_the_grid_is_exact():
    """XLA's answers are recorded: `benchmarks/planner/oracle.py`."""
    import sys

    folder = Path(__file__).parents[1] / "benchmarks" / "planner"
    sys.path.insert(0, str(folder))
    try:
        import grid
    finally:
        sys.path.remove(str(folder))
    rows = [json.loads(line) for line in (folder / "grid.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = []
    for row in (row for row in rows if "refused" not in row):
        config = Config.from_dict(grid.case_of(row["family"], row["settings"]))
        how = config.training
        of = {"remat": how.remat, "accumulation": how.gradient_accumulation, "rows": how.batch_size}
        spread = Spread.of_sections(config.device, DEVICES, **of)
        state = estimate(Remembered(config).traced(spread, "cpu"), CLUSTER).state
        if state != row["argument"]:
            wrong.append((row["family"], str(spread), state, row["argument"]))
    assert not wrong


def test_a_step_is_predicted_alike_each_time_it_is_read():
    spread = spread_of("data 8", remat="dots")
    step = subject().traced(spread, "cpu")
    assert len({estimate(step, CLUSTER).own for _ in range(8)}) == 1


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        *itertools.product(["decoder", "dit", "vae"], ["data 8", "fsdp 8"]),
        ("decoder", "data 2 x tensor 4"),  # of an image model it leaves some products whole
        ("decoder", "fsdp 4 x tensor 2"),
    ],
)
def test_devices_that_divide_all_work_compute_the_whole_together(family, mesh):
    spread = spread_of(mesh)
    whole = flops(subject(family).traced(spread, "cpu").jaxpr).total
    assert DEVICES * predicted(spread, family).estimate.flops == pytest.approx(whole, rel=0.01)


class Linear(nnx.Module):
    """y = x W."""

    def __init__(self, inputs: int, outputs: int, names: tuple[str, str] | None = ("embed", "mlp")) -> None:
        kernel = jnp.zeros((inputs, outputs))
        self.kernel = nnx.Param(kernel) if names is None else nnx.Param(kernel, out_sharding=names)

    def loss(self, batch):
        return jnp.sum((batch["x"] @ self.kernel[...]) ** 2)


B, D, F = 32, 64, 128  # rows, inputs, outputs
W = 4 * D * F  # bytes of the weights
SHARE = (DEVICES - 1) / DEVICES
LINEAR = {
    # mesh -> bytes that a device sends; of a CPU, which sums where others scatter
    "data 8": {"all-reduce": 2 * W * SHARE},
    "fsdp 8": {"all-gather": W * SHARE, "all-reduce": 2 * W * SHARE},
    "tensor 8": {},
}


@pytest.mark.parametrize("mesh", LINEAR)
def test_a_linear_layer_computes_and_sends_what_one_counts_by_hand(mesh):
    of = ModuleSubject(lambda: Linear(D, F), {"x": ((B, D), "float32")})
    found = estimate(of.traced(spread_of(mesh), "cpu"), CLUSTER)
    # forwards x W, backwards x^T dy: the gradient of x is nobody's
    assert found.flops == 4 * B * D * F / DEVICES
    by_kind = {kind: sum(one.bytes for one in found.sends if one.kind == kind) for kind in LINEAR[mesh]}
    assert by_kind == {kind: pytest.approx(size, rel=1e-3) for kind, size in LINEAR[mesh].items()}
    assert found.sent() - math.fsum(by_kind.values()) <= 2 * 4 * 2  # besides, the sum of the loss
    held = W / (1 if mesh == "data 8" else DEVICES)
    assert (found.held["parameters"], found.held["optimizer state"]) == (held, 2 * held + 4)


def sent_of(of: budgets.Budget, platform: str) -> tuple[dict[tuple, float], dict[tuple, float]]:
    """What the step of a budget's run is predicted to send by (mesh axes, collective), and what its page says."""
    config = budgets.config_of(of)
    how = {"remat": "none", "accumulation": 1, "rows": budgets.ROWS}
    spread = Spread.of_sections(config.device, DEVICES, **how)
    found: dict[tuple, float] = {}
    for one in estimate(Remembered(config).traced(spread, platform), CLUSTER).sends:
        found[one.axes, one.kind] = found.get((one.axes, one.kind), 0.0) + one.bytes * one.times
    plan, model = spread.plan(budgets.ROWS), budgets.MIXTURE if of.mixture else budgets.DECODER
    # b: what query, key and value read, and gate and up, is summed one by one in the step as it is traced
    known = budgets.symbols_of(model, plan, budgets.ROWS, budgets.TOKENS, w=4, b=5)
    return found, budgets.allowed(of, plan.sizes, known, cpu=platform == "cpu")


@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_a_step_is_predicted_to_send_over_each_axis_what_the_page_says(of):
    found, expected = sent_of(of, "cpu")
    assert {key: found.get(key, 0.0) for key in expected} == {
        key: pytest.approx(size, rel=0.01) for key, size in expected.items()
    }
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=0.01)


# what a region sums, and only a part of which is read, a GPU's compiler scatters: not seen in the traced step
SUMMED_IN_REGIONS = ("expert", "pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("of", budgets.BUDGETS, ids=str)
def test_for_a_gpu_it_scatters_what_a_cpu_sums(of):
    found, expected = sent_of(of, "gpu")
    most = 0.05 if of.page in SUMMED_IN_REGIONS else 0.01
    assert sum(found.values()) == pytest.approx(sum(expected.values()), rel=most)


def buffers(*rows: tuple[int, int, int]) -> list[Buffer]:
    """Of (begin, end, units of the alignment)."""
    return [Buffer(begin, end, ALIGNED * size, "") for begin, end, size in rows]


def most_alive(of: list[Buffer]) -> float:
    """The largest sum of what is alive at one moment, each moment looked at."""
    moments = range(max(one.end for one in of) + 1)
    return max(sum(one.size for one in of if one.begin <= now <= one.end) for now in moments)


def test_a_heap_holds_at_least_what_is_alive_at_once_and_at_most_all():
    rng = random.Random(0)
    for _ in range(200):
        of = buffers(*((begin, begin + rng.randint(0, 6), rng.randint(1, 9)) for begin in rng.choices(range(12), k=9)))
        assert most_alive(of) <= heap_bytes(of) <= sum(one.size for one in of)


def test_a_heap_of_nested_lifetimes_has_no_gaps():
    rng = random.Random(1)

    def nested(begin: int, end: int):
        yield begin, end, rng.randint(1, 9)
        inner = sorted(rng.sample(range(begin + 1, end), min(4, end - begin - 1) // 2 * 2)) if end - begin > 4 else []
        for first, last in itertools.batched(inner, 2) if hasattr(itertools, "batched") else zip(*[iter(inner)] * 2):  # noqa: B905
            yield from nested(first, last)

    for _ in range(50):
        of = buffers(*nested(0, 40))
        assert heap_bytes(of) == most_alive(of)


def test_a_heap_is_no_smaller_than_the_best_of_all_orders_and_seldom_larger():
    rng, larger = random.Random(2), 0

    def placed(order) -> float:
        at: list[tuple[Buffer, float]] = []
        for one in order:
            meets = sorted(((low, low + o.size) for o, low in at if o.begin <= one.end and one.begin <= o.end))
            low = 0.0
            for begin, end in meets:
                if begin - low >= one.size:
                    break
                low = max(low, end)
            at.append((one, low))
        return max(low + one.size for one, low in at)

    for _ in range(40):
        of = buffers(*((begin, begin + rng.randint(0, 4), rng.randint(1, 9)) for begin in rng.choices(range(8), k=5)))
        best = min(map(placed, itertools.permutations(of)))
        assert heap_bytes(of) >= best
        larger += heap_bytes(of) > best
    assert larger <= 4


def test_a_heap_of_nothing_is_nothing():
    assert heap_bytes([]) == 0 == heap_bytes(buffers((0, 3, 0)))


def test_what_nothing_reads_is_neither_computed_nor_held():
    class Wasteful(Linear):
        def loss(self, batch):
            _ = batch["unread"] @ batch["unread"].T
            return super().loss(batch)

    shapes = {"x": ((B, D), "float32"), "unread": ((B, 4 * D), "float32")}
    step = ModuleSubject(lambda: Wasteful(D, F), shapes).traced(spread_of("data 8"), "cpu")
    found = estimate(step, CLUSTER)
    assert found.flops == 4 * B * D * F / DEVICES
    assert found.held["batch"] == 4 * B * D / DEVICES


def test_a_loop_counts_as_often_as_it_turns():
    class Repeated(Linear):
        def loss(self, batch):
            total = lambda sum, _: (sum + jnp.sum(batch["x"] @ self.kernel[...]), None)  # noqa: E731
            return jax.lax.scan(total, 0.0, None, length=5)[0]

    step = ModuleSubject(lambda: Repeated(D, F), {"x": ((B, D), "float32")}, trains=False)
    assert estimate(step.traced(spread_of("data 8"), "cpu"), CLUSTER).flops == 5 * 2 * B * D * F / DEVICES
