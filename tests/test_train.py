"""A whole run: what it writes, how it goes on, what stops it, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from artifex import sample, train
from artifex.config import Config
from artifex.data.text import load_text
from artifex.data.tokenizers import ByteTokenizer, save_tokenizer
from artifex.models import weights
from artifex.scaling.checkpoints import Checkpoints
from artifex.training import loop
from artifex.training.state import blueprint

TEXT = "\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for index in range(6):
        (folder / f"part{index}.py").write_text(TEXT[index * 300 :])
    return str(folder)


def settings(source: str, **sections) -> dict:
    base = {
        "model": {"name": "llama-nano", "embed_dim": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4, "mlp_dim": 32},
        "data": {"source": source, "sequence_length": 32},
        "training": {
            "steps": 20,
            "batch_size": 8,
            "validate_every": 10,
            "validation_batches": 2,
            "sample_tokens": 20,
            "sample_prompt": "def ",
        },
        "optimizer": {"name": "adamw", "warmup_steps": 2, "learning_rate": 1e-2},
        "checkpoint": {"every": 10, "keep": 2},
        "logging": {"every": 5, "progress": False},
    }
    return {key: base.get(key, {}) | sections.get(key, {}) for key in {**base, **sections}}


def config(source: str, **sections) -> Config:
    return Config.from_dict(settings(source, **sections))


def final_params(run_dir, cfg: Config, step: int):
    plan = train.plan_of(cfg, jax.device_count())
    blue = blueprint(cfg, plan, plan.make_mesh())
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        return jax.device_get(checkpoints.restore(step, blue.state))


def assert_bit_equal(first, second):
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        other = dict(jax.tree_util.tree_leaves_with_path(second))[path]
        assert leaf.dtype == other.dtype and leaf.tobytes() == other.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """One run of 20 steps on (4, 2), used by many tests."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    cfg = config(source, device={"fsdp": 4, "tensor": 2})
    return train.train(cfg, folder), cfg


def test_a_run_folder_holds_what_the_readme_promises(run):
    folder, cfg = run
    assert Config.from_file(folder / "config.json") == cfg
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train_lines = [record for record in records if record["split"] == "train"]
    validation = [record for record in records if record["split"] == "validation"]
    assert [record["step"] for record in train_lines] == [5, 10, 15, 20]
    assert [record["step"] for record in validation] == [10, 20]
    assert train_lines[-1]["loss"] < train_lines[0]["loss"] < 6
    assert train_lines[-1]["tokens_per_second"] > 0 and train_lines[-1]["data_wait_seconds"] >= 0
    np.testing.assert_allclose(validation[0]["bits_per_byte"], validation[0]["loss"] / np.log(2))
    held_out = load_text(cfg.data.source).validation
    assert [record["targets"] for record in validation] == [2 * 8 * 32, len(held_out) - 1]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000010.txt", "step-0000020.txt"]
    assert (folder / "samples" / "step-0000020.txt").read_text().startswith("def ")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "20"]


def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(run, source, tmp_path):
    _, cfg = run
    halfway = cfg.model_copy(deep=True)
    halfway.checkpoint.keep = 9
    # the schedule belongs to the whole run, so the first half is stopped, not configured to be shorter
    opened = train.open_run(halfway, tmp_path / "half")
    stopper = StopAt(opened, 10)
    with pytest.raises(SystemExit) as stopped:
        train.run_steps(stopper.run, train.prepare(stopper.run))
    assert stopped.value.code == 128 + signal.SIGTERM
    lines = (tmp_path / "half" / "metrics.jsonl").read_text()
    (tmp_path / "half" / "metrics.jsonl").write_text(lines + '{"step": 11, "split": "train", "loss": 1.0}\n{"ste')
    train.train(halfway, tmp_path / "half")
    assert_bit_equal(final_params(tmp_path / "half", cfg, 20), final_params(run[0], cfg, 20))
    records = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["split"] != "goodput"]
    assert steps == [5, 10, 10, 15, 20, 20]


class StopAt:
    """An opened run that gets SIGTERM while it saves step `step`."""

    def __init__(self, opened, step):
        self.run, self.step, save = opened, step, opened.checkpoints.save

        def saving(at, state, metadata):
            save(at, state, metadata)
            if at == step:
                os.kill(os.getpid(), signal.SIGTERM)

        opened.checkpoints.save = saving


UNION = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    "device", [{"fsdp": 8}, {"mesh_shape": (2, 4)}, {"data": 8}, {"data": 4, "pipeline": 2}, UNION], ids=str
)
def test_a_run_opens_under_another_mesh_with_every_array_bit_equal(run, source, device):
    folder, cfg = run
    other = config(source, device=device)
    assert_bit_equal(final_params(folder, other, 20), final_params(folder, cfg, 20))


def test_a_run_goes_on_under_another_mesh_from_where_it_stood(run, source, tmp_path, capsys):
    folder, _ = run
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    train.train(config(source, training={"steps": 25}, device={"mesh_shape": (2, 4)}), copy)
    out = capsys.readouterr().out
    assert "resumed from step 20" in out and "changed since it was saved: training.steps was 20, now 25" in out
    assert json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 25
    train.train(Config.from_file(copy / "config.json"), copy)
    assert "nothing left to train" in capsys.readouterr().out


def test_samples_come_from_runs_and_from_weights_alike(run, capsys):
    folder, _ = run
    texts = [sample.sample(path, "def f", num_tokens=9, seed=3) for path in (folder, folder / "weights")]
    assert texts[0] == texts[1] and texts[0][0].startswith("def f")
    assert sample.sample(folder, "def f", num_tokens=9, num_samples=3, temperature=0) == 3 * [
        sample.sample(folder, "def f", num_tokens=9, temperature=0)[0]
    ]
    sample.main([str(folder), "--num-tokens", "9", "--num-samples", "2", "--step", "10"])
    assert "--- sample 2 of 2\ndef " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--step", "7"], "no checkpoint of step 7; it has [10, 20]"),
        (["{run}/weights", "--step", "10"], "holds weights alone"),
        (["{run}/samples"], "holds no config.json"),
        (["{run}/nowhere"], "is no folder"),
        (["{run}", "--prompt", ""], "prompt is empty"),
        (["{run}", "--num-tokens", "999"], "need 1003 positions, the model has 256"),
        (["{run}", "--temperature", "-1"], "temperature is -1.0"),
        (["{run}", "--num-samples", "0"], "num_samples is 0"),
        (["{run}", "--temperatur", "x"], "temperatur"),
    ],
)
def test_sampling_answers_mistakes_with_one_line_and_code_2(run, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sample.main([argument.format(run=run[0]) for argument in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_weights_that_do_not_fit_are_refused_by_name(run, tmp_path):
    folder = run[0] / "weights"
    model = weights.from_pretrained(folder)
    assert model.cfg == run[1].model.spec()
    described = json.loads((folder / "config.json").read_text())
    described["model"]["mlp_dim"] = 33
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"layers.mlp.down.kernel is float32\[2, 32, 16\], expected float32\[2, 33, 16\]"
    ):
        weights.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="no safetensors file"):
        weights.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="describes no model"):
        weights.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"mlp_dim": 64}}, "model.mlp_dim was 32, now 64"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length was 32, now 16"),
        ({"training": {"seed": 5}}, "training.seed was 0, now 5"),
        ({"optimizer": {"name": "lion"}}, "optimizer.name was adamw, now lion"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(run, source, change, message):
    base = settings(source, device={"fsdp": 4, "tensor": 2})
    cfg = Config.from_dict(base | {key: base[key] | change[key] for key in change})
    with pytest.raises(ValueError, match=message):
        train.train(cfg, run[0])


def test_changed_data_is_refused(run, source, tmp_path):
    other = tmp_path / "data"
    subprocess.run(["cp", "-r", source, str(other)], check=True)
    cfg = config(str(other))
    folder = tmp_path / "run"
    train.train(cfg, folder)
    (other / "part3.py").write_text("print('changed')\n" * 99)
    with pytest.raises(ValueError, match="the data changed: step 20"):
        train.train(cfg, folder)


def test_a_run_that_could_not_start_leaves_its_folder_free(source, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        train.train(config(str(tmp_path / "nothing")), tmp_path / "run")
    (tmp_path / "short.txt").write_text("shorter than a window")
    with pytest.raises(ValueError, match=r"the training tokens are 20, but one window needs sequence_length \+ 1 = 33"):
        train.train(config(str(tmp_path / "short.txt")), tmp_path / "run")
    with pytest.raises(MemoryError, match=r"out of memory: parameters and optimizer state take .* TiB on each device"):
        train.train(config(source, model={"mlp_dim": 2**30, "embed_dim": 2**15}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train.open_run(config(source), tmp_path / "run")


def test_a_vocabulary_too_large_for_the_model_is_refused_before_it_is_trained(source):
    bpe = {"tokenizer": "bpe", "bpe_vocab_size": 300}
    with pytest.raises(ValueError, match=r"data.bpe_vocab_size must be at most model.vocab_size 256, got 300"):
        config(source, data=bpe)
    config(source, data=bpe, model=settings(source)["model"] | {"vocab_size": 300})


def test_a_folder_that_holds_something_else_is_refused(source, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no run"):
        train.train(config(source), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(source, tmp_path):
    wild = {"name": "sgd", "learning_rate": 1e30, "clip_norm": None, "warmup_steps": 0}
    cfg = config(source, optimizer=wild, checkpoint={"every": 1})
    with pytest.raises(FloatingPointError, match=r"(loss|grad_norm) is (nan|inf) at step 2"):
        train.train(cfg, tmp_path / "run")
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1]
    saved = final_params(tmp_path / "run", cfg, 1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


def test_tokens_outside_the_models_vocabulary_are_refused(source, tmp_path):
    cfg = config(source, model=settings(source)["model"] | {"vocab_size": 100})
    with pytest.raises(ValueError, match=r"model.vocab_size is 100, but data.tokenizer 'bytes' has 256 tokens"):
        train.train(cfg, tmp_path / "run")


def test_a_dry_run_counts_parameters_and_memory_and_trains_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = config(source, device={"fsdp": 4, "tensor": 2})
    text = train.dry_run(cfg)
    blue = blueprint(cfg, train.plan_of(cfg, 8), train.plan_of(cfg, 8).make_mesh())
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(blue.state.params))
    assert f"{count:,} parameters in 11 tensors" in text
    assert "layers/mlp/up/kernel" in text and "(-, fsdp, tensor)" in text and "memory per device" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", [{"fsdp": 16}, {"mesh_shape": (2, 8)}, {"data": 4, "tensor": 4}], ids=str)
def test_a_mesh_larger_than_a_cpu_shows_says_how_to_simulate_it(source, device):
    with pytest.raises(ValueError, match=r"or simulate 16 on a CPU: JAX_NUM_CPU_DEVICES=16$"):
        train.plan_of(config(source, device=device), 8)


def test_a_mesh_smaller_than_the_devices_is_not_to_be_simulated(source):
    with pytest.raises(ValueError, match=r"set data=2 or data=-1$"):
        train.plan_of(config(source, device={"fsdp": 4}), 8)


def test_the_command_line_trains_and_a_kill_leaves_a_run_that_goes_on(source, tmp_path):
    cfg = config(source, training={"steps": 100_000, "sample_tokens": 0}, checkpoint={"every": 20})
    cfg.save(tmp_path / "mine.yaml")
    command = [sys.executable, "-m", "artifex.train", str(tmp_path / "mine.yaml"), "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "40" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM at step" in out, out
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        step, skipped = checkpoints.newest_restorable()
    assert not skipped and f"at step {step}, which is saved" in out


@pytest.mark.parametrize(
    ("rows", "length"),
    [(16, 64), *(pytest.param(*shape, marks=pytest.mark.slow) for shape in ((8, 128), (40, 32)))],
)
def test_validation_of_masked_diffusion_is_an_estimate_at_any_batch_shape(source, tmp_path, rows, length):
    decoder = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32, "sequence_length": length}
    training = {"batch_size": rows, "validation_batches": 50}
    sections = settings(source, data={"sequence_length": length}, training=training)
    run = train.open_run(Config.from_dict(sections | {"model": {"name": "masked-nano", "decoder": decoder}}), tmp_path)
    found, weight = loop.make_validate(run)(run.state, final=True)
    batches = list(run.task.validation(None))
    assert 0 < batches[-1]["mask"][:, 0].sum() < rows, "the last batch is partly filled"
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}

    def fresh(key):
        def one(batch_and_key):
            value, (metrics, _) = run.blue.loss(run.state.params, run.state.buffers, *batch_and_key)
            return value * metrics["weight"]

        return jnp.sum(jax.lax.map(one, (stacked, jax.random.split(key, len(batches))))) / weight

    estimates = np.asarray(jax.jit(lambda keys: jax.lax.map(fresh, keys))(jax.random.split(jax.random.key(1), 40)))
    assert abs(found["loss"] - estimates.mean()) < 3 * estimates.std(ddof=1)
    assert 0 < estimates.std() < 0.005


def test_a_token_that_no_check_at_the_start_saw_ends_the_run_with_one_line(tmp_path, capsys):
    tokens = np.full(2_000_000, 300, np.uint16)
    for start in np.linspace(0, len(tokens) - 4096, 64).astype(
        int
    ):  # where a token file is looked at when it is opened
        tokens[start : start + 4096] = 65
    np.save(tmp_path / "tokens.npy", tokens)
    save_tokenizer(ByteTokenizer(), tmp_path / "bytes.json")
    data = {"source": str(tmp_path / "tokens.npy"), "tokenizer": str(tmp_path / "bytes.json")}
    config("", data=data).save(tmp_path / "run.json")
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path / "run.json"), "--run-dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2, "no step was taken"
    assert error == "error: the tokens hold id 300, outside [0, 256); give the tokenizer they were made with\n"
