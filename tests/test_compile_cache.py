"""Compiled programs kept for the next start: the same numbers, a miss for whatever differs, and no code of others."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key
from jax._src import compilation_cache as of_jax
from jax._src import config as settings
from tiny_run import tiny, written

from artifex import train
from artifex.cli import parse_train
from artifex.training import compile_cache
from artifex.training.compile_cache import CompileCache
from artifex.training.memory import compile_step
from artifex.training.run_folder import RunFolder
from artifex.training.state import Blueprint, blueprint, planned
from artifex.training.task import batch_shapes

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return written(tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    """One of the test's own, where the key lies."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.fixture(scope="module")
def events():
    """What JAX counts itself: programs that it found in a cache, and that it wrote to one."""
    seen: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
    return seen


def compiled(folder, *, scale=2.0, options=None, limit=compile_cache.LIMIT, begin=True):
    """A program by way of the cache: what it is, whether it was found, and what was said."""
    said: list[str] = []
    cache = CompileCache(folder, said.append, limit=limit)
    jax.clear_caches()
    with cache:
        made = jax.jit(lambda x: jnp.cumsum(x * scale, 0), donate_argnums=0).lower(X).compile(compiler_options=options)
        if begin:
            cache.begin()
    given = jnp.array(X)
    np.testing.assert_array_equal(made(given), np.cumsum(X * scale, 0))
    assert given.is_deleted(), "it was given away, whether the program was found or not"
    return made, cache.found == 1, said


def operations(text: str) -> list[str]:
    """A program's, without the places in Python that they are from, which are no part of the key."""
    return [re.sub(r", metadata=\{.*?\}(?=,|$)", "", line) for line in text.splitlines() if " = " in line]


def losses(run: Path) -> list[tuple[str, int, float]]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["split"], r["step"], r["loss"]) for r in records if r["split"] in ("train", "validation")]


def test_a_start_that_compiles_nothing_makes_the_same_numbers(source, tmp_path, events):
    runs = {}
    for name, where in {"off": "off", "first": "run", "second": str(tmp_path / "first/cache/programs")}.items():
        jax.clear_caches()
        events.clear()
        short = {"compile_cache": where, "steps": 2, "validate_every": 1, "sample_tokens": 0}
        runs[name] = train.train(tiny(source, training=short, checkpoint={"every": 0}), tmp_path / name)
        hits = events.count("cache_hits")
        assert (hits > 0) == (name == "second") or name == "first", name
        if name == "second":
            assert not events.count("cache_misses"), "every program was found"
    assert losses(runs["off"]) == losses(runs["first"]) == losses(runs["second"])
    weights = {name: (run / "weights/model.safetensors").read_bytes() for name, run in runs.items()}
    assert weights["off"] == weights["first"] == weights["second"]
    assert not (tmp_path / "off/cache/programs").exists() and not (tmp_path / "second/cache/programs").exists()


def test_a_thread_keeps_its_program_when_who_started_it_is_out_of_the_block(tmp_path):
    cache, inside, outside = CompileCache(tmp_path, print), threading.Event(), threading.Event()
    before = of_jax._cache

    def compiles():
        with cache:
            inside.set()
            assert outside.wait(60)
            jax.jit(lambda x: x * 3.5).lower(1.0).compile()

    with ThreadPoolExecutor(1) as pool:
        with cache:
            compiled = pool.submit(compiles)
            assert inside.wait(60)
        assert of_jax._cache is cache
        outside.set()
        compiled.result()
    assert of_jax._cache is before
    cache.begin()
    assert len(list(tmp_path.glob("*.program"))) == 1


def test_a_state_that_does_not_fit_is_said_before_the_first_step_and_leaves_nothing(source, tmp_path, monkeypatch):
    class TooLarge:
        def lower(self):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(Blueprint, "initializer", lambda self: TooLarge())
    run = train.open_run(tiny(source), tmp_path / "run")
    with pytest.raises(
        MemoryError, match=r"^out of memory while the state was made \(Out of memory allocating 7 bytes"
    ):
        train.prepare(run)
    assert not (tmp_path / "run").exists()


def test_a_program_that_was_found_says_of_itself_what_the_compiled_one_says(source, tmp_path):
    how = tiny(source, device={"fsdp": 4, "data": 2})
    plan = planned(how, 8)
    steps = []
    for _ in range(2):
        jax.clear_caches()
        with CompileCache(tmp_path, print) as cache:
            steps.append(compile_step(blueprint(how, plan, plan.make_mesh()), batch_shapes(how)))
            cache.begin()
    assert cache.found and steps[0].whole == steps[1].whole > 0 and steps[0].own == steps[1].own
    texts = [operations(step.compiled.as_text()) for step in steps]
    assert texts[0] == texts[1] and any(" all-reduce(" in line for line in texts[0])
    assert str(steps[0].sends()) == str(steps[1].sends())


def test_what_the_compiler_warned_of_is_told_again_where_the_program_is_found(tmp_path):
    for anew, told in ((["f32[8]"], ("f32[8]",)), ([], ("f32[8]",))):
        cache = CompileCache(tmp_path, print)
        jax.clear_caches()
        with cache:
            jax.jit(lambda x: x + 1).lower(X).compile()
            assert compile_cache.said(anew) == told
            cache.begin()
    assert compile_cache.said(["outside"]) == ("outside",)


def test_another_plan_misses(source, tmp_path):
    for devices in ({"data": 8}, {"fsdp": 8}):
        how = tiny(source, device=devices)
        plan = planned(how, 8)
        jax.clear_caches()
        with CompileCache(tmp_path, print) as cache:
            compile_step(blueprint(how, plan, plan.make_mesh()), batch_shapes(how))
            cache.begin()
        assert (cache.found, cache.missed) == (0, 1), devices


def test_whatever_differs_misses_and_what_is_alike_is_found(tmp_path, monkeypatch):
    assert not compiled(tmp_path)[1] and compiled(tmp_path)[1]
    assert not compiled(tmp_path, scale=3.0)[1]
    assert not compiled(tmp_path, options={"xla_cpu_enable_fast_min_max": True})[1]
    with monkeypatch.context() as other:
        other.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert not compiled(tmp_path)[1]
    with monkeypatch.context() as other:
        other.setattr(cache_key, "jaxlib_version_str", "0.0.1")
        assert not compiled(tmp_path)[1]
    with monkeypatch.context() as other:
        other.setattr(compile_cache, "machine", lambda: "another")
        assert not compiled(tmp_path)[1]
    assert compiled(tmp_path)[1]


def test_an_entry_that_is_damaged_or_half_there_is_a_miss_and_is_mended(tmp_path):
    compiled(tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 31, 32, 40, len(whole) - 1)]
    cut = [whole[:size] for size in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1)]
    for bad in [*flipped, *cut, whole + b"\0", os.urandom(len(whole))]:
        entry.write_bytes(bad)
        _, found, said = compiled(tmp_path)
        assert (
            not found and len(said) == 1 and re.match(r"warning: .* is damaged, or not written by this user", said[0])
        )
        assert compiled(tmp_path)[1:] == (True, []), "what was compiled instead is kept"


def test_code_that_another_user_wrote_or_that_has_another_name_is_not_loaded(tmp_path, home):
    compiled(tmp_path / "a")
    compiled(tmp_path / "b", scale=3.0)
    (mine,), (other,) = ((tmp_path / name).iterdir() for name in "ab")
    mine.write_bytes(other.read_bytes())
    assert not compiled(tmp_path / "a")[1]
    (home / ".cache/artifex" / compile_cache.SECRET).unlink()
    assert not compiled(tmp_path / "b", scale=3.0)[1]
    assert (home / ".cache/artifex" / compile_cache.SECRET).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["folder", "key"])
def test_what_cannot_be_written_costs_one_line(tmp_path, home, where):
    blocked = tmp_path / "programs" if where == "folder" else home / ".cache"
    blocked.write_text("a file where a folder should be")
    _, found, said = compiled(tmp_path / "programs")
    assert not found and len(said) == 1 and said[0].startswith("warning: ") and "compile" in said[0]


def test_the_folder_stays_within_its_limit_and_what_was_used_last_stays(tmp_path):
    compiled(tmp_path)
    (oldest,) = tmp_path.iterdir()
    size = oldest.stat().st_size
    (tmp_path / "a file of somebody else").write_text("stays")
    for index, scale in enumerate((3.0, 4.0, 5.0)):
        for file in tmp_path.glob("*.program"):
            os.utime(file, (index, index))
        assert compiled(tmp_path)[1], "used, so that it is no longer the oldest"
        compiled(tmp_path, scale=scale, limit=int(2.5 * size))
        assert sum(file.stat().st_size for file in tmp_path.glob("*.program")) <= 2.5 * size
    assert compiled(tmp_path)[1] and not compiled(tmp_path, scale=3.0)[1]
    assert (tmp_path / "a file of somebody else").exists()


def test_only_a_run_that_takes_a_step_writes(source, tmp_path):
    folder = tmp_path / "programs"
    compiled(folder, begin=False)
    assert not folder.exists()
    with pytest.raises(ValueError, match="best_metric"):  # the state is made by then
        train.train(tiny(source, checkpoint={"keep_best": 1, "best_metric": "none"}), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not folder.exists()


def test_a_folder_that_the_user_gave_jax_is_left_to_jax(tmp_path):
    with settings.compilation_cache_dir(str(tmp_path / "jax")):
        assert not CompileCache(tmp_path / "ours", print).on
    assert CompileCache(tmp_path / "ours", print).on


def test_the_setting_says_where(tmp_path):
    folder = RunFolder(tmp_path / "run")
    words = {None: folder.cache / "programs", "off": None, "shared": Path("shared")}
    for given, where in words.items():
        command = parse_train([] if given is None else ["--training.compile-cache", given])
        assert folder.programs(command.config.training.compile_cache) == where
