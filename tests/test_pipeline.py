"""Pipelines: schedules keep their order, tables lead every microbatch through every stage, and training is that of one
device that computes the same microbatches one after the other."""

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from artifex.config import Config
from artifex.scaling.pipeline.executor import Layers
from artifex.scaling.pipeline.schedules import Schedule, tables
from artifex.scaling.plan import Plan
from artifex.scaling.sharding import PipelineParallelStrategy
from artifex.training.state import blueprint
from artifex.training.step import make_evaluate, make_step

SCHEDULES = [
    Schedule(kind, devices, microbatches, stages)
    for devices in (1, 2, 3, 4, 8)
    for microbatches in (devices, 3 * devices, 24)
    for kind, stages in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3))
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_stage_waits_for_the_one_before_it_and_going_back_for_the_one_behind(schedule):
    forward, backward = {}, {}
    for tick, row in enumerate(schedule.turns):
        for device, turns in enumerate(row):
            for ticks, turn in zip((forward, backward), turns, strict=True):
                if turn is not None:
                    assert turn not in ticks and turn[1] % schedule.devices == device
                    ticks[turn] = tick
    last, every = schedule.stages - 1, schedule.microbatches * schedule.stages
    assert len(forward) == len(backward) == every
    for (m, g), tick in forward.items():
        assert g == 0 or forward[m, g - 1] < tick
        assert backward[m, g] >= tick if g == last else backward[m, g] > backward[m, g + 1]
    if schedule.kind == "gpipe":
        assert max(forward.values()) < min(backward.values())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_bubble_is_that_of_the_textbook(schedule):
    S, V, M = schedule.devices, schedule.stages_per_device, schedule.microbatches
    for backward in (1.0, 2.0, 3.0):
        np.testing.assert_allclose(schedule.bubble(backward=backward), (S - 1) / (V * M + S - 1), atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_tables_lead_every_microbatch_through_all_stages_and_back(schedule):
    """Played by hand: a stream is the list of stages it has passed, and a gradient too."""
    S, G, table = schedule.devices, schedule.stages, tables(schedule)
    streams = [[None] * (table.streams + 1) for _ in range(S)]
    gradients = [[None] * (table.gradients + 1) for _ in range(S)]
    sent = returned = [None] * S
    ended, done = [], []
    for t in range(len(schedule.turns)):
        of = {name: column[t] for name, column in table.columns.items()}
        for s in range(S):
            streams[s][of["stream_to"][s]] = sent[(s - 1) % S]
            gradients[s][of["gradient_to"][s]] = returned[(s + 1) % S]
        sent, returned = [None] * S, [None] * S
        for s in range(S):
            m, g = int(of["forward_m"][s]), int(of["forward_v"][s]) * S + s
            before = (m, ()) if g == 0 else streams[s][of["forward_from"][s]]
            if before is not None and before[0] == m and before[1] == tuple(range(g)):
                sent[s] = (m, (*before[1], g))
        if of["ends"][0]:
            assert sent[S - 1] == (of["ended"][0], tuple(range(G)))
            ended.append(int(of["ended"][0]))
            gradients[S - 1][of["end_to"][S - 1]] = (ended[-1], ())
        for s in range(S):
            if of["backward"][s]:
                m, g = int(of["backward_m"][s]), int(of["backward_v"][s]) * S + s
                before = (m, ()) if g == 0 else streams[s][of["backward_from"][s]]
                assert before == (m, tuple(range(g))), "the stream that entered the stage is still there"
                back = gradients[s][of["gradient_from"][s]]
                assert back == (m, tuple(range(G - 1, g, -1))), "the gradient of what left it has come"
                returned[s] = (m, (*back[1], g))
                done += [m] if g == 0 else []
    assert sorted(ended) == sorted(done) == list(range(schedule.microbatches))


def test_1f1b_keeps_as_many_streams_for_any_number_of_microbatches_and_gpipe_all():
    kept = {kind: [tables(Schedule(kind, 4, M)).streams for M in (8, 64)] for kind in ("1f1b", "gpipe")}
    assert kept == {"1f1b": [5, 5], "gpipe": [8, 64]}
    assert [tables(Schedule("interleaved", 4, M, 2)).streams for M in (8, 64)] == [9, 9]


@pytest.mark.parametrize(
    "sizes, message",
    [
        (("zigzag", 2, 4), "'zigzag' is unknown; choose gpipe, 1f1b or interleaved"),
        (("1f1b", 2, 4, 2), "2 stages a device with schedule '1f1b'; 'interleaved' needs at least 2"),
        (("interleaved", 2, 4, 1), "1 stages a device with schedule 'interleaved'"),
        (("interleaved", 4, 6, 2), "6 microbatches do not divide by the 4 devices .*; 4 would, or 8"),
        (("1f1b", 2, 0), "0 microbatches"),
    ],
)
def test_schedules_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*sizes)


@pytest.mark.parametrize("count, devices, each", [(24, 4, 1), (10, 4, 1), (7, 2, 2), (8, 2, 4), (3, 3, 1)])
def test_every_layer_has_one_place_and_stages_differ_by_one_at_most(count, devices, each):
    schedule = Schedule("interleaved" if each > 1 else "1f1b", devices, devices, each)
    place = Layers(count, schedule)
    layer, there = place.places()
    sizes = there.sum(-1).T.reshape(-1)
    assert sizes.max() - sizes.min() <= 1 and sorted(layer[there]) == list(range(count))
    leaf = np.arange(count * 3.0).reshape(count, 3)
    np.testing.assert_array_equal(place.joined(place.by_stage(leaf)), leaf)


# Training

SMALL = {"embed_dim": 32, "num_layers": 4, "num_heads": 4, "mlp_dim": 48, "sequence_length": 16, "vocab_size": 64}
MODELS = {
    "llama-nano": {**SMALL, "num_kv_heads": 2},
    "gpt2-nano": {**SMALL, "dropout": 0.1},  # learned positions, a tied head
    "moe-nano": {**SMALL, "num_kv_heads": 2, "expert_mlp_dim": 16},
    "linear-nano": {**SMALL, "num_kv_heads": 4},
    "masked-nano": {"decoder": {**SMALL, "num_kv_heads": 2, "vocab_size": 65}},
    "dit-digits": {"network": {"num_layers": 4, "embed_dim": 32}},
    "latent-dit-digits": {"network": {"num_layers": 4, "embed_dim": 32}},
}
ROWS, STEPS = 16, 4


def run_config(preset, device, parts, **training):
    text = "digits" not in preset
    model = json.loads(json.dumps(MODELS[preset]))
    if layers := training.pop("num_layers", None):
        (model if "num_layers" in model else next(iter(model.values())))["num_layers"] = layers
    return Config.from_dict(
        {
            "model": {"name": preset, **model},
            "data": {"source": "stdlib", "sequence_length": 16} if text else {"source": "digits"},
            "training": {"batch_size": ROWS, "gradient_accumulation": parts, "ema_decay": 0.9} | training,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "clip_norm": 0.5},
            "device": device,
        }
    )


def built(config):
    sizes = [getattr(config.device, axis) for axis in ("data", "fsdp", "tensor", "expert", "context", "pipeline")]
    count = int(np.prod(sizes))
    parts = config.training.gradient_accumulation
    plan = Plan.from_device(config.device, count, microbatches=parts, batch_size=ROWS)
    plan.check_batch(ROWS)
    return blueprint(config, plan, plan.make_mesh(jax.devices()[:count]))


def batch_of(preset, step):
    draw = np.random.default_rng(step)
    if "dit" in preset:
        image = draw.uniform(-1, 1, (ROWS, 8, 8, 1)).astype(np.float32)
        return {"image": image, "label": draw.integers(0, 10, ROWS).astype(np.int32)}
    tokens = draw.integers(0, 64, (ROWS, 17)).astype(np.int32)
    # rows count differently, so that every microbatch has a weight of its own
    mask = (np.arange(16) < draw.integers(1, 17, (ROWS, 1))).astype(np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def trained(config, steps=STEPS):
    blue = built(config)
    state, step, seen = blue.init(), make_step(blue), []
    for index in range(steps):
        batch = batch_of(config.model.name, index)
        state, metrics = step(state, jax.device_put(batch, blue.batch_sharding(batch)))
        seen.append(jax.device_get(metrics))
    return blue, state, seen


@functools.cache
def one_after_the_other(preset, parts, **training):
    return trained(run_config(preset, {}, parts, **dict(training)))


def assert_same(one, other):
    for first, second in zip(one[2], other[2], strict=True):
        assert first.keys() == second.keys()
        np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-5)
        np.testing.assert_allclose(second["grad_norm"], first["grad_norm"], rtol=1e-4)
        for name in first:
            np.testing.assert_allclose(second[name], first[name], rtol=2e-4, atol=1e-6, err_msg=name)
    for tree in ("params", "ema"):
        here, there = (jax.device_get(getattr(run[1], tree)) for run in (one, other))
        away = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (here, there)), strict=True)]
        assert max(away) < 2e-3, "AdamW divides by the gradient's own size, so a zero gradient's sign is noise"


INTERLEAVED = {"schedule": "interleaved", "stages_per_device": 2}
CASES = {
    "llama 2 x data 2 x tensor 2": ("llama-nano", {"pipeline": 2, "data": 2, "tensor": 2}, 4, {}),
    "moe 4 stages of 5 layers": ("moe-nano", {"pipeline": 4, "fsdp": 2}, 2, {"num_layers": 5}),
}
SLOW = {
    "gpt2 dropout interleaved x fsdp 2": ("gpt2-nano", {"pipeline": 2, "fsdp": 2, **INTERLEAVED}, 4, {}),
    "dit 4 x data 2": ("dit-digits", {"pipeline": 4, "data": 2}, 4, {}),
    "gpipe": ("llama-nano", {"pipeline": 4, "schedule": "gpipe"}, 8, {}),
    "rows that stages cannot share": ("llama-nano", {"pipeline": 4}, 8, {}),
    "zero 2": ("llama-nano", {"pipeline": 2, "data": 2, "zero": 2}, 4, {}),
    "context": ("llama-nano", {"pipeline": 2, "context": 2}, 4, {}),
    "sequence": ("llama-nano", {"pipeline": 2, "tensor": 2, "data": 2, "sequence_parallel": True}, 4, {}),
    "remat": ("llama-nano", {"pipeline": 2, "fsdp": 4}, 4, {"remat": "full"}),
    "moe expert": ("moe-nano", {"pipeline": 2, "expert": 4}, 4, {}),
    "linear": ("linear-nano", {"pipeline": 4, "fsdp": 2}, 4, {}),
    "masked": ("masked-nano", {"pipeline": 2, "fsdp": 2, "tensor": 2}, 4, {}),
    "latent": ("latent-dit-digits", {"pipeline": 4, "fsdp": 2}, 4, {}),
    "dit padded interleaved": ("dit-digits", {"pipeline": 2, "fsdp": 2, **INTERLEAVED}, 4, {"num_layers": 5}),
}


@pytest.mark.parametrize(
    "case",
    [*CASES.values(), *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW.values())],
    ids=[*CASES, *SLOW],
)
def test_a_pipeline_trains_as_one_device_with_the_same_microbatches(case):
    preset, device, parts, training = case
    one = trained(run_config(preset, {}, parts, **training))
    assert_same(one, trained(run_config(preset, device | {"microbatches": parts}, 1, **training)))


@pytest.mark.slow
def test_accumulation_runs_the_pipeline_for_each_part():
    device = {"pipeline": 2, "microbatches": 2}
    plain = trained(run_config("llama-nano", {}, 4))
    assert_same(plain, trained(run_config("llama-nano", device, 2)))


@pytest.mark.slow
def test_frozen_parameters_stay_and_the_others_train_as_on_one_device():
    frozen = {"freeze": ["embed/*", "layers/attention/*"]}
    one = trained(run_config("llama-nano", {}, 4, **frozen))
    other = trained(run_config("llama-nano", {"pipeline": 2, "fsdp": 2, "microbatches": 4}, 1, **frozen))
    assert_same(one, other)
    fresh = built(run_config("llama-nano", {}, 4, **frozen)).init()
    np.testing.assert_array_equal(other[1].params["embed"]["table"], fresh.params["embed"]["table"])


@pytest.fixture(scope="module")
def spread():
    return built(run_config("llama-nano", {"pipeline": 4, "fsdp": 2, "microbatches": 4}, 1))


def test_each_stage_passes_on_to_the_next_and_gradients_back(spread):
    batch = batch_of("llama-nano", 0)
    where = spread.batch_sharding(batch)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in batch.items()}
    text = make_step(spread).lower(spread.state, shapes).compile().as_text()
    found = set(re.findall(r"collective-permute\(.*source_target_pairs={([0-9,{}]*)}", text))
    strategy = PipelineParallelStrategy(num_stages=4)
    devices = np.arange(8).reshape(4, 2)  # (pipeline, fsdp)
    for pattern in (strategy.get_forward_communication_pattern(), strategy.get_backward_communication_pattern()):
        pairs = {(int(devices[a, i]), int(devices[b, i])) for a, b in pattern for i in range(2)}
        assert any({tuple(map(int, p)) for p in re.findall(r"{(\d+),(\d+)}", f"{{{one}}}")} == pairs for one in found)


def test_a_program_of_32_layers_is_as_long_as_one_of_8():
    def length(layers):
        config = run_config("llama-nano", {"pipeline": 4, "fsdp": 2, "microbatches": 4}, 1, num_layers=layers)
        blue = built(config)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_of("llama-nano", 0).items()}
        return len(make_step(blue).lower(blue.state, shapes).as_text().splitlines())

    assert length(32) == length(8)


def test_sizes_of_one_make_the_plain_step():
    """No axis, no schedule and no collective: what is off costs nothing."""
    config = run_config("moe-nano", dict.fromkeys(("data", "fsdp", "tensor", "expert", "context", "pipeline"), 1), 1)
    blue = built(config)
    assert blue.plan.pipeline is None
    batch = batch_of("moe-nano", 0)
    text = make_step(blue).lower(blue.state, batch).compile().as_text()
    assert not re.search(r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)\(", text)


def test_the_state_is_divided_over_the_stages(spread):
    for leaf in jax.tree.leaves((spread.state.params, spread.state.optimizer)):
        if leaf.size > 64:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, leaf


def test_validation_and_samples_are_those_of_one_device(spread):
    one = built(run_config("llama-nano", {}, 1))
    batch = batch_of("llama-nano", 0)
    drawn, scores = [], []
    for blue in (one, spread):
        state = blue.init()
        scores.append(float(make_evaluate(blue)(state, jax.device_put(batch, blue.batch_sharding(batch)))["loss"]))
        prompt = np.full((ROWS, 4), 7)
        draw = lambda model, prompt=prompt: model.sample(jax.random.key(0), prompt=prompt, num_tokens=4)  # noqa: E731
        drawn.append(np.asarray(blue.run(state, draw)))
    np.testing.assert_allclose(*scores, rtol=1e-5)
    np.testing.assert_array_equal(*drawn)


@pytest.mark.slow
def test_memory_of_1f1b_stays_while_that_of_gpipe_grows():
    def temporary(kind, microbatches):
        rows = 4 * microbatches
        wide = {**MODELS["llama-nano"], "embed_dim": 64, "mlp_dim": 256}
        config = Config.from_dict(
            {
                "model": {"name": "llama-nano", **wide},
                "data": {"source": "stdlib", "sequence_length": 16},
                "training": {"batch_size": rows},
                "device": {"pipeline": 4, "microbatches": microbatches, "schedule": kind},
            }
        )
        plan = Plan.from_device(config.device, 4)
        blue = blueprint(config, plan, plan.make_mesh(jax.devices()[:4]))
        shapes = {name: jax.ShapeDtypeStruct((rows, 16), np.int32) for name in ("tokens", "targets")}
        memory = make_step(blue).lower(blue.state, shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes

    of = {kind: [temporary(kind, count) for count in (4, 64)] for kind in ("1f1b", "gpipe")}
    assert of["1f1b"][1] < 1.05 * of["1f1b"][0] and of["gpipe"][1] > 2 * of["gpipe"][0], of


@pytest.mark.slow
def test_sixteen_layers_train_under_mixed_parallelism_on_sixteen_devices(tmp_path):
    """The closing example of the specification on mixed parallelism: data 4 x tensor 2 x pipeline 2, by GPipe."""
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "artifex.train", str(root / "configs/mixed_parallelism.yaml")]
    command += ["--training.steps", "20", "--training.sample-tokens", "0", "--run-dir", str(tmp_path / "run")]
    sixteen = os.environ | {"JAX_NUM_CPU_DEVICES": "16", "NPROC": "64", "PYTHONPATH": str(root)}
    subprocess.run(command, check=True, env=sixteen, capture_output=True, timeout=1_200)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


# Errors


@pytest.mark.parametrize(
    "preset, device, message",
    [
        (
            "llama-nano",
            {"pipeline": 8},
            "8 stages, but 'llama-nano' has 4 repeated blocks; set device.pipeline=4 and device.data=2, or",
        ),
        ("llama-nano", {"pipeline": 4, **INTERLEAVED}, "are 8 stages, but 'llama-nano' has 4"),
        ("llama-nano", {"pipeline": 2, "microbatches": 5}, "batch_size 16 does not divide .* in 5 microbatches"),
        ("unet-digits", {"pipeline": 2}, "'unet-digits' has no stack of repeated blocks"),
        ("vae-digits", {"pipeline": 4}, "'vae-digits' has no stack of repeated blocks"),
    ],
)
def test_pipelines_that_do_not_fit_are_refused_by_name(preset, device, message, monkeypatch):
    monkeypatch.setitem(MODELS, preset, MODELS.get(preset, {}))
    with pytest.raises(ValueError, match=message):
        built(run_config(preset, device, 1))


@pytest.mark.parametrize(
    "device, message",
    [
        ({"schedule": "gpipe"}, "schedule is 'gpipe', but pipeline is 1"),
        ({"pipeline": 2, "stages_per_device": 2}, "is 2 with schedule '1f1b'"),
        ({"pipeline": 2, "schedule": "interleaved"}, "is 1 with schedule 'interleaved'"),
    ],
)
def test_settings_without_a_pipeline_that_uses_them_are_refused(device, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict({"device": device})
