"""`--dry-run --target`: what a target is, answers whatever becomes of the process that compiles, FLOPs by hand."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import flops as flops_of_text
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from artifex import train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.scaling import targets
from artifex.scaling.flops import flops
from artifex.scaling.targets import Target
from artifex.training import for_target
from artifex.training.state import blueprint, planned
from artifex.training.step import make_step
from artifex.training.task import batch_shapes

WRONG = [
    ("v5e:4x4", r"names no platform; did you mean tpu:v5e:4x4\?"),
    ("fpga:4", r"no platform that is known; a target is tpu:CHIP"),
    ("", r"no platform that is known"),
    ("tpu", r"'tpu' names no chip; expected one of v5e, v5p, v6e, tpu7x"),
    ("tpu:v5:4x4", r"of 'v5', no TPU that is known; expected one of v5e, v5p, v6e, tpu7x"),
    ("gpu:h200:2x8", r"of 'h200', no GPU that is known; expected one of h100"),
    ("tpu:h100:2x8", r"of 'h100', no TPU"),
    ("gpu:h100", r"the shape ''; expected the hosts and GPUs of each, such as gpu:h100:2x8"),
    ("gpu:h100:16", r"the shape '16'; expected the hosts"),
    ("tpu:v5e:4x4x4", r"the shape '4x4x4'; expected the 2 sizes of the slice, such as tpu:v5e:4x4"),
    ("tpu:v5p:8x8", r"expected the 3 sizes of the slice, such as tpu:v5p:4x4x4"),
    ("tpu:v5e:0x4", r"the shape '0x4'"),
    ("tpu:v5e:4x4:2", r"the shape '4x4:2'"),
    ("cpu", r"has '' simulated devices; expected a number from 1 to 4,096, such as cpu:8"),
    ("cpu:2x4", r"has '2x4' simulated devices"),
    ("cpu:0", r"has '0' simulated devices"),
    ("cpu:10000000", r"expected a number from 1 to 4,096"),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_a_name_that_is_no_target_is_refused_with_one_that_is(name, message):
    with pytest.raises(ValueError, match=message):
        Target.parse(name)


def test_the_process_that_compiles_ends_with_the_one_that_asked():
    compiles = "import os, sys, time; from artifex.training.for_target import end_with; end_with(int(sys.argv[1]))"
    asks = (
        "import os, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {compiles!r}, str(os.getpid())], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        process.kill()
    until = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize(
    ("name", "platform", "count", "gib"),
    [
        ("tpu:v5e:4x4", "tpu", 16, 15.75),  # GiB that libtpu names when it refuses a program
        ("tpu:v5p:8x8x16", "tpu", 1024, 95.74),
        ("TPU:v6e:4x4", "tpu", 16, 31.25),
        ("tpu:tpu7x:2x2x1", "tpu", 8, 94.75),  # two devices a chip
        ("gpu:h100:2x8", "gpu", 16, 0.75 * 79.11),
        ("cpu:8", "cpu", 8, None),
    ],
)
def test_a_target_has_so_many_devices_with_so_much_memory(name, platform, count, gib, monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    target = Target.parse(name)
    assert (target.platform, target.device_count) == (platform, count)
    assert target.memory is None if gib is None else target.memory == pytest.approx(gib * 2**30, rel=1e-3)


def test_a_gpu_gives_the_share_that_jax_is_told_to_take(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    target = Target.parse("gpu:h100:1x8")
    assert target.memory == pytest.approx(0.9 * 79.11 * 2**30, rel=1e-3) and "90%" in target.memory_source


@pytest.mark.parametrize(("name", "extra"), [("tpu:v5e:4x4", "tpu"), ("gpu:h100:2x8", "gpu-targets")])
def test_a_missing_compiler_is_named_with_the_extra_that_brings_it(name, extra, monkeypatch, capsys):
    there = importlib.util.find_spec
    missing = ("libtpu", "jax_plugins")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else there(name))
    with pytest.raises(SystemExit, match="2"):
        train.main(["--dry-run", "--target", name])
    assert re.fullmatch(rf"error: target {name} needs .* pip install 'artifex\[{extra}\]'\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--target cpu:8", "--target is for --dry-run, which is not given; add it, or leave --target out"),
        ("--dry-run --time-limit 3", "--time-limit is for --target, which is not given"),
        ("--dry-run --target cpu:8 --time-limit soon", "--time-limit is 'soon'; expected seconds above 0"),
        ("--dry-run --target cpu:8 --time-limit 0", "--time-limit is '0'; expected seconds above 0"),
        ("--dry-run --target v5e:4x4", "did you mean tpu:v5e:4x4?"),
        ("--dry-run --targt cpu:8", "--targt is unknown; did you mean --target?"),
    ],
)
def test_mistakes_of_the_command_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_train(words.split())
    assert message in capsys.readouterr().err


def config(**sections) -> Config:
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "mlp_dim": 32, "sequence_length": 32}
    base = {
        "model": {"name": "llama-nano", **sizes},
        "data": {"sequence_length": 32},
        "training": {"batch_size": 64},
        "optimizer": {"name": "sgd"},
    }
    return Config.from_dict({key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}})


@pytest.fixture
def told(monkeypatch):
    """What a compile in this process, for the simulated devices there are, says: part -> text."""

    def examine(cfg: Config, have: int | None = None) -> dict:
        found = {}
        if have is not None:
            monkeypatch.setattr(Target, "memory", have)
        for_target.examine(cfg, Target.parse("cpu:8"), lambda **parts: found.update(parts))
        return found

    return examine


def test_a_run_that_fits_has_its_memory_by_part_its_flops_and_says_that_a_cpu_estimates(told):
    found = told(config(device={"fsdp": 8}))
    # 256 x 16 embedding, tied; two layers of 4 x 16 x 16, 3 x 16 x 32 and two norms; a norm: float32, by eight devices
    assert (
        f"parameters        {(256 * 16 + 2 * (4 * 256 + 3 * 512 + 32) + 16) * 4 // 8 / 1024:.4g} KiB" in found["memory"]
    )
    assert "batch             2 KiB" in found["memory"]  # tokens and targets, 8 rows of 32 int32
    assert found["fits"] and found["verdict"].startswith("fits: ") and "an estimate" in found["verdict"]
    assert "8 devices that a CPU simulates" in found["machine"]
    assert re.match(r"traced and lowered in .* s, compiled in .* s \(jax ", found["took"])
    assert "all-gather" in found["program"]


def test_a_run_that_does_not_fit_is_told_settings_that_do(told):
    whole = re.search(r"in all +([\d.]+) MiB", told(config())["memory"])
    found = told(config(), have=int(0.7 * float(whole[1]) * 2**20))
    assert found["verdict"].startswith("does not fit: needs") and "fits" not in found
    assert re.search(r"--\S+=\S+ fits: its step, compiled, needs ", found["remedy"])


SAID = [
    "the training step does not compile (XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    "18.40G of 15.75G hbm. Exceeded hbm capacity by 2.65G)",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (18.40G) exceeds available HBM (15.75G)",
]


@pytest.mark.parametrize("said", SAID)
def test_what_a_tpus_compiler_refuses_is_read(said):
    text = for_target.refused(MemoryError(said), Target.parse("tpu:v5e:4x4"))
    assert text == "does not fit: needs 18.40 GiB, a device has 15.75"


def test_a_refusal_without_figures_is_passed_on():
    text = for_target.refused(MemoryError("no room"), Target.parse("tpu:v5e:4x4"))
    assert text == "does not fit: no room"


def test_settings_that_do_not_fit_the_targets_devices_are_refused_with_their_count(capsys):
    words = "--dry-run --target cpu:6 --device.fsdp 4 --device.data 2 --training.batch-size 24"
    with pytest.raises(SystemExit, match="2"):
        train.main(words.split())
    err = capsys.readouterr().err
    assert err.startswith("error: sizes data=2, fsdp=4 multiply to 8, not to the 6 devices; set ")
    assert "simulate" not in err


PROCESSES = [
    ("import os; os.abort()", 60, "no answer: the compiler ended its process by SIGABRT"),
    ("import time; time.sleep(60)", 0.2, "no answer: not done within 0.2 s; --time-limit allows more"),
    (
        "import sys; print('LLVM ERROR: out of registers', file=sys.stderr); sys.exit(3)",
        60,
        "no answer: the compiler ended its process with exit code 3 (LLVM ERROR: out of registers)",
    ),
]


@pytest.mark.parametrize(("code", "seconds", "answer"), PROCESSES)
def test_an_abort_and_a_time_out_are_answers(code, seconds, answer, monkeypatch):
    monkeypatch.setattr(for_target, "CHILD", code)
    found = for_target.ask(Config(), Target.parse("cpu:8"), seconds)
    assert found.text == answer and not found.fits


def test_what_was_found_before_an_abort_is_part_of_the_answer(monkeypatch):
    lines = [json.dumps({"machine": "a slice", "memory": "state"}), '{"flops": 3']  # the last one is cut short
    code = f"import os, sys; open(sys.argv[1], 'w').write({chr(10).join(lines)!r}); os.abort()"
    monkeypatch.setattr(for_target, "CHILD", code)
    found = for_target.ask(Config(), Target.parse("cpu:8"), 60)
    assert found.text.splitlines()[:2] == ["a slice", "state"] and "SIGABRT" in found.text


def test_a_mistake_of_ours_in_the_process_is_no_answer(monkeypatch):
    monkeypatch.setattr(for_target, "CHILD", "raise KeyError('step')")
    with pytest.raises(RuntimeError, match=r"KeyError: 'step'"):
        for_target.ask(Config(), Target.parse("cpu:8"), 60)


def test_a_compile_for_a_target_touches_no_accelerator_and_no_cache():
    for name in ("tpu:v5e:4x4", "gpu:h100:2x8", "cpu:8"):
        said = Target.parse(name).environment()
        assert (said["JAX_PLATFORMS"], said["JAX_ENABLE_COMPILATION_CACHE"]) == ("cpu", "false")


def test_the_module_of_targets_imports_no_jax():
    assert not any(name == "jax" for name in vars(targets)) and "jax" in sys.modules


def counted(function, *shapes):
    return flops(jax.jit(function).trace(*map(jnp.ones, shapes)).jaxpr)


def test_loops_count_as_often_as_they_run():
    a, b = (8, 16), (16, 16)
    once = 2 * 8 * 16 * 16
    assert counted(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=5)[0], a, b).total == 5 * once
    assert counted(lambda x, w: jax.lax.fori_loop(2, 9, lambda _, c: c @ w, x), a, b).total == 7 * once
    known = jax.lax.while_loop
    assert counted(lambda x, w: known(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] @ w), (1, x)), a, b).total == (
        3 * once
    )
    open_loop = counted(lambda x, w: known(lambda c: c.sum() < 4, lambda c: c @ w, x), a, b)
    assert (open_loop.total, open_loop.open_loops) == (once, 1)


def test_products_of_groups_count_every_row_once():
    def loss(x, w):
        return jnp.sum(jax.lax.ragged_dot(x, w, jnp.array([3, 5, 0, 0], jnp.int32)) ** 2)

    # rows by their own matrices, and back to both of them
    assert counted(jax.grad(loss, (0, 1)), (8, 16), (4, 16, 32)).total == 3 * 2 * 8 * 16 * 32


def test_a_part_that_is_divided_by_hand_counts_on_every_device():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    part = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    assert counted(part, (8, 16), (16, 16)).total == 2 * 8 * 16 * 16


@pytest.mark.parametrize("model", ["llama-nano", pytest.param("unet-digits", marks=pytest.mark.slow)])
def test_a_step_on_one_device_counts_what_its_compiled_text_has(model):
    cfg = (
        config()
        if model == "llama-nano"
        else Config.from_dict({"model": {"name": model}, "data": {"source": "digits"}, "training": {"batch_size": 4}})
    )
    plan = planned(cfg, 1)
    blue = blueprint(cfg, plan, plan.make_mesh(jax.devices()[:1]))
    batch = {name: jax.ShapeDtypeStruct(*kind) for name, kind in batch_shapes(cfg).items()}
    traced = make_step(blue).trace(blue.state, batch)
    text = flops_of_text(traced.lower().compile().as_text())
    # the text is without what meets padding; convolutions of 8 x 8 images by 3 x 3 kernels have some of that
    low, high = (0.98, 1.02) if model == "llama-nano" else (1.0, 1.35)
    assert low * text <= flops(traced.jaxpr).total <= high * text
    assert np.isfinite(text) and text > 0
