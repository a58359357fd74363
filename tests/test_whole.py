"""What `device.whole` names is whole on every device but for what is claimed, and trains, saves and reads as ever."""

import functools
import json

import budgets
import jax
import numpy as np
import pytest
from flax import nnx

from artifex.cli import parse_train
from artifex.config import Config, ConfigError, DeviceConfig
from artifex.models import cross_entropy
from artifex.scaling.axes import Rules
from artifex.scaling.checkpoints import Checkpoints
from artifex.scaling.placement import bytes_on_device, explain
from artifex.scaling.plan import Plan
from artifex.training.state import blueprint
from artifex.training.step import make_evaluate, make_step

L, D, F, V, ROWS = 4, 32, 48, 64, 8
SIZES = {"vocab_size": V, "embed_dim": D, "num_layers": L, "num_heads": 8, "head_dim": 4, "mlp_dim": F}
MODEL = {"name": "llama-nano", "sequence_length": 16, "tied_head": False, **SIZES}
MIXTURE = {**MODEL, "name": "moe-nano", "expert_mlp_dim": 16}
WHOLE = ("embed/*", "*norm*", "layers/attention/*", "head/*")


def built(device=None, *, model=None, optimizer="adamw", **training):
    device = device or {}
    config = Config.from_dict(
        {
            "model": model or MODEL,
            "data": {"sequence_length": 16},
            "training": {"batch_size": ROWS, "ema_decay": 0.9, **training},
            "optimizer": {"name": optimizer, "warmup_steps": 5, "learning_rate": 3e-3},
            "device": device,
        }
    )
    count = int(np.prod([size for name, size in device.items() if name in ("data", "fsdp", "tensor", "expert")]))
    count *= device.get("context", 1) * device.get("pipeline", 1)
    parts = config.training.gradient_accumulation
    plan = Plan.from_device(config.device, count, microbatches=parts, batch_size=ROWS)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))


def batch(blue, step: int):
    draw = np.random.default_rng(step).integers(0, V, (ROWS, 17), dtype=np.int32)
    data = {"tokens": draw[:, :-1], "targets": draw[:, 1:]}
    return jax.device_put(data, blue.batch_sharding(data))


def trained(blue, steps: int = 3):
    """The state after some steps, their losses, and then that of validation."""
    step, state, losses = make_step(blue), blue.init(), []
    for index in range(steps):
        state, metrics = step(state, batch(blue, index))
        losses.append(float(metrics["loss"]))
    evaluated = make_evaluate(blue)(state, batch(blue, steps))
    return state, [*losses, float(evaluated["loss"] / evaluated["weight"])]


@functools.cache
def one_device(text: str = "{}"):
    return trained(built(**json.loads(text)))[1]


CASES = {
    "fsdp": ({"fsdp": 8}, {}),
    "zero 2 x fsdp x tensor, muon": ({"data": 2, "zero": 2, "fsdp": 2, "tensor": 2}, {"optimizer": "muon"}),
    "context": ({"fsdp": 2, "context": 4}, {}),
    "experts": ({"fsdp": 2, "expert": 4}, {"model": MIXTURE}),
    "accumulated": ({"fsdp": 4, "tensor": 2}, {"gradient_accumulation": 2}),
}
EVERY_DAY = ("fsdp", "zero 2 x fsdp x tensor, muon")


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[name], id=name, marks=() if name in EVERY_DAY else pytest.mark.slow) for name in CASES],
)
def test_training_is_that_of_one_device_and_of_all_divided(case):
    device, how = case
    state, losses = trained(spread := built({**device, "whole": WHOLE}, **how))
    np.testing.assert_allclose(losses, one_device(json.dumps(how)), rtol=1e-5)
    if device == {"fsdp": 8}:
        np.testing.assert_allclose(losses, trained(built(device, **how))[1], rtol=1e-5)
    placed = zip(*map(jax.tree.leaves, (state, spread.shardings)), strict=True)
    assert all(leaf.sharding == where for leaf, where in placed)


@pytest.mark.parametrize(
    "more",
    [{"fsdp": 2}, *(pytest.param(more, marks=pytest.mark.slow) for more in ({"tensor": 2}, {"data": 2, "zero": 2}))],
    ids=str,
)
def test_a_pipeline_trains_as_one_device_with_the_same_microbatches(more):
    device = {"pipeline": 2, "microbatches": 4, **more, "whole": ("embed/*", "layers/attention/*", "norm/*")}
    blue = built(device)
    state, losses = trained(blue)
    np.testing.assert_allclose(losses, one_device('{"gradient_accumulation": 4}'), rtol=1e-5)
    by_stage = state.params["layers"]["attention"]["query"]["kernel"].sharding.spec
    heads = "tensor" if "tensor" in more else None
    assert (
        tuple(by_stage) == ("pipeline", None, heads, None) and state.params["embed"]["table"].sharding.spec[1] is None
    )
    running = blue.plan.of_path("layers/attention/query/kernel").running
    assert {rule.name: rule.axes for rule in running.params}.get("heads") == (heads and (heads,))


def test_the_state_of_a_device_is_what_sizes_say():
    attention, table, mlp, norms = L * 4 * D * D, V * D, L * 3 * D * F, (2 * L + 1) * D
    for device, parts in (
        ({"fsdp": 8}, attention + norms + (2 * table + mlp) / 8),
        # of attention, tensor parallelism claims the heads; norms have none
        ({"fsdp": 4, "tensor": 2}, attention / 2 + norms + (2 * table + mlp) / 8),
    ):
        state = built({**device, "whole": ("*norm*", "layers/attention/*")}).state
        assert bytes_on_device((state.params, state.ema)) == 2 * 4 * parts
        assert 0 <= bytes_on_device(state.optimizer) - 2 * 4 * parts <= 16  # and its counts
    by_zero = built({"data": 8, "zero": 1, "whole": ("*norm*", "layers/attention/*")}).state
    assert 0 <= bytes_on_device(by_zero.optimizer) - 2 * 4 * (attention + norms + (2 * table + mlp) / 8) <= 16


def sent(compile_=budgets.compiled, **device):
    sends = compile_(budgets.budget("fsdp", "fsdp", fsdp=8, **device)).sends
    return {kind: sends.sent("fsdp", kind=kind) for kind in ("all-gather", "all-reduce", "all-to-all")}


def test_what_is_whole_is_not_gathered_and_its_words_do_not_travel():
    """A CPU's program has an all-reduce of gradients either way: 2 W (n - 1) / n."""
    layers, width, hidden, words = (
        budgets.DENSE[name] for name in ("num_layers", "embed_dim", "mlp_dim", "vocab_size")
    )
    share, plain = 7 / 8, sent()
    W = 4 * layers * 3 * width * hidden
    kernels = sent(whole=("layers/mlp/*",))
    assert plain["all-gather"] - kernels["all-gather"] == pytest.approx(2 * W * share, rel=0.01)
    assert kernels["all-reduce"] == pytest.approx(plain["all-reduce"], rel=0.01)
    assert kernels["all-to-all"] == pytest.approx(plain["all-to-all"], rel=0.01)

    W, S = 4 * words * width, 4 * budgets.ROWS * budgets.TOKENS * width / 8
    table = sent(whole=("embed/*",))
    assert plain["all-to-all"] - table["all-to-all"] == pytest.approx(2 * S * share, rel=0.01)
    assert table["all-reduce"] - plain["all-reduce"] == pytest.approx(2 * W * share, rel=0.01)
    assert table["all-gather"] == pytest.approx(plain["all-gather"], rel=0.01)


def test_a_head_that_is_whole_is_not_gathered_by_blocks_either(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 2**20)
    plain, head = (sent(budgets.compiled.__wrapped__, **how) for how in ({}, {"whole": ("head/*",)}))
    W = 4 * budgets.DENSE["vocab_size"] * budgets.DENSE["embed_dim"]
    assert plain["all-gather"] - head["all-gather"] == pytest.approx(2 * W * 7 / 8, rel=0.01)
    assert head["all-reduce"] == pytest.approx(plain["all-reduce"], rel=0.01)


def test_a_checkpoint_saved_whole_opens_divided_and_back(tmp_path):
    state, other = built({"fsdp": 8, "whole": WHOLE}).init(), built({"fsdp": 4, "tensor": 2})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        opened = checkpoints.restore(1, other.state)
        back = checkpoints.restore(1, built({"fsdp": 8, "whole": ("norm/*",)}).state)
    assert opened.params["head"]["kernel"].sharding == other.shardings.params["head"]["kernel"]
    for found in (opened, back):
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((found, state)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("embd/*", r"device.whole 'embd/\*' matches no parameter; did you mean 'embed/\*'"),
        ("layers/mlp/upp/kernel", "did you mean 'layers/mlp/up/kernel'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_the_nearest_path(pattern, message):
    with pytest.raises(ValueError, match=message):
        built({"fsdp": 8, "whole": ("norm/*", pattern)})


@pytest.mark.parametrize("device", [{}, {"data": 2, "tensor": 4}, {"mesh_shape": (2, 4)}])
def test_where_nothing_is_divided_unasked_it_has_no_effect(device):
    with pytest.raises(ConfigError, match="whole has no effect"):
        Config.from_dict({"device": {**device, "whole": ["norm/*"]}})


@pytest.mark.parametrize("given", ["norm/*", ["norm/*"], ("norm/*",)])
def test_one_pattern_may_stand_alone_and_a_list_is_a_tuple(given):
    config = Config.from_dict({"device": {"data": 2, "zero": 1, "whole": given}})
    assert config.device.whole == ("norm/*",) and Config.from_dict(config.to_dict()) == config


def test_on_the_command_line_patterns_are_told_apart_by_commas():
    assert parse_train(["--device.fsdp", "8", "--device.whole", "norm/*,embed/*"]).config.device.whole == (
        "norm/*",
        "embed/*",
    )


def test_explain_says_what_left_a_parameter_whole():
    blue = built({"fsdp": 4, "tensor": 2, "whole": ("layers/attention/*", "norm/*")})
    abstract = nnx.eval_shape(lambda: blue.config.model.spec().build(nnx.Rngs(0)))
    rows = {row.path: row.resolution for row in explain(abstract, blue.plan, blue.plan.sizes).rows}
    said = {path for path, of in rows.items() if "device.whole says so" in of.notes}
    assert said == {path for path in rows if path.startswith(("layers/attention/", "norm/"))}
    assert tuple(rows["layers/attention/query/kernel"].spec) == (None, None, "tensor", None)


def test_rules_keep_their_patterns_and_without_any_stay_what_they_were():
    plain = Plan.from_device(DeviceConfig(fsdp=4, context=2), 8).rules
    kept = Plan.from_device(DeviceConfig(fsdp=4, context=2, whole=("norm/*",)), 8).rules
    for change in (lambda rules: rules.without("embed"), Rules.by_rows, lambda rules: rules.union(Rules())):
        assert change(kept).whole == ("norm/*",)
    assert kept.of_path("embed/table") is kept and not kept.of_path("norm/scale").params
    assert plain.of_path("norm/scale") is plain and repr(plain).count("rest") == repr(plain).count("whole") == 0
