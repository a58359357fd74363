"""Several real processes on one machine train as one: same losses, one writer, checkpoints that open anywhere."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import artifex
from artifex import sample, train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.models.weights import from_pretrained, save_pretrained
from artifex.scaling.manifest import CheckpointError
from artifex.training import run_folder

ROOT = Path(__file__).parents[1]
SMALL = {"embed_dim": 32, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "mlp_dim": 64, "sequence_length": 64}
SECTIONS = {
    "model": {"name": "llama-nano", **SMALL},
    "data": {"source": "source", "sequence_length": 32},
    "training": {"batch_size": 16, "validate_every": 2, "validation_batches": 1, "sample_tokens": 4},
    "optimizer": {"name": "adamw", "warmup_steps": 1},
    "checkpoint": {"every": 2},
    "logging": {"every": 1, "progress": False},
}
FSDP_TENSOR = ["--device.fsdp", "4", "--device.tensor", "2"]


class Together:
    """Processes of one run, started at once; whatever is left of them is ended at the end of the test."""

    def __init__(
        self, count, devices, words, *, folder, program="train", each=lambda process: [], where=None, env=None
    ):
        begin = ["-c", program] if "\n" in program else ["-m", f"artifex.{program}"]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        settings = {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        settings |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | (env or {})
        self.processes = []
        for process in range(count):
            meeting = f"--device.coordinator=127.0.0.1:{port} --device.processes={count} --device.process-id={process}"
            command = [sys.executable, *begin, *words, *meeting.split(), *each(process)]
            cwd = folder if where is None else where(process)
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes.append(subprocess.Popen(command, cwd=cwd, env=os.environ | settings, text=True, **pipes))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def ended(self, timeout=300):
        """(exit code, stdout, stderr) of each."""
        until = time.monotonic() + timeout
        told = [process.communicate(timeout=max(until - time.monotonic(), 1)) for process in self.processes]
        return [(process.returncode, *said) for process, said in zip(self.processes, told, strict=True)]


def losses(run) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] != "goodput"]
    found = {(line["step"], line["split"]): line["loss"] for line in lines}
    assert len(found) == len(lines), "a line is written twice"
    return found


def close(some, others, within=1e-6):
    assert some.keys() == others.keys()
    assert max(abs(some[key] / others[key] - 1) for key in some) < within


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a configuration and its text."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "source").mkdir()
    for index in range(4):
        lines = (f"It was day {day} in harbour {index}, and the boats lay still.\n" for day in range(60))
        (folder / "source" / f"{index}.txt").write_text("".join(lines))
    (folder / "c.json").write_text(json.dumps(SECTIONS))
    return folder


def in_one(folder, run, words):
    """The run of a command line by this process alone, on its eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = parse_train(["c.json", "--run-dir", str(run), *words])
        return train.train(command.config, command.run_dir)


@pytest.fixture(scope="module")
def pair(folder):
    """Two processes of four devices go on with what one process of eight began; and what the one makes of it."""
    one, both = folder / "one", folder / "both"
    in_one(folder, one, [*FSDP_TENSOR, "--training.steps", "2"])
    shutil.copytree(one, both)
    with Together(2, 4, ["c.json", "--run-dir", "both", *FSDP_TENSOR, "--training.steps", "4"], folder=folder) as them:
        in_one(folder, one, [*FSDP_TENSOR, "--training.steps", "4"])
        return one, both, them.ended()


def test_two_processes_resume_what_one_saved_with_the_losses_of_one(pair):
    one, both, ended = pair
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "resumed from step 2" in ended[0][1]
    assert (4, "train") in losses(both) and (4, "validation") in losses(both)
    close(losses(both), losses(one))


def test_one_process_prints_and_writes(pair):
    one, both, ended = pair
    (_, said, warned), (_, said_by_the_other, warned_by_the_other) = ended
    assert said_by_the_other == warned == warned_by_the_other == ""
    assert "step 4/4" in said and "Gloo" not in said
    assert (both / "config.json").read_bytes() == (one / "config.json").read_bytes()

    def files(run):
        found = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
        return {path for path in found if path.parts[0] not in ("checkpoints", "cache")}

    assert files(both) == files(one)
    assert (both / "samples/step-0000004.txt").read_text().startswith("It was day")


def test_what_processes_saved_opens_anywhere_bit_equal_and_is_what_they_exported(pair):
    _, both, _ = pair
    exported = load_file(both / "weights" / "model.safetensors")
    for mesh in (None, {"fsdp": 8}, {"data": 2, "tensor": 4}):
        restored = artifex.restore(both, mesh=mesh)
        assert restored.step == 4
        leaves = jax.tree_util.tree_leaves_with_path(restored.state.params)
        found = {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
        assert found.keys() == exported.keys()
        assert all(np.array_equal(found[name], exported[name]) for name in found)
    assert sample.sample(both / "weights", num_tokens=2)[0].startswith("It was day")


def test_processes_that_were_asked_for_different_runs_both_end_and_say_so(folder):
    began = time.monotonic()
    each = lambda process: [f"--training.seed={process}"]  # noqa: E731
    with Together(2, 1, ["c.json", "--run-dir", "none"], each=each, folder=folder) as them:
        ended = them.ended(60)
    assert time.monotonic() - began < 30
    says = "error: process 1 was asked for something else than process 0: training.seed is 1 there and 0 here; "
    assert all(code == 2 and out == "" and err.startswith(says) and err.count("\n") == 1 for code, out, err in ended)
    assert not (folder / "none").exists()


def test_a_folder_that_another_process_does_not_see_is_an_error_on_all(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    run_folder.check_seen(tmp_path / "config.json")
    monkeypatch.setattr(run_folder, "all_say", lambda sees: [sees, False, sees, False])
    with pytest.raises(
        CheckpointError, match="which process 0 wrote, is not seen by process 1, 3; give a --run-dir on"
    ):
        run_folder.check_seen(tmp_path / "config.json")


# ---- longer

PIPELINE = ["--device.pipeline", "2", "--device.microbatches", "4"]
MIXTURE = ["--model.name", "moe-nano", "--model.mlp-dim", "none", "--model.expert-mlp-dim", "32"]
UNIONS = {  # four processes of two devices: what an axis of more than two divides lies in several of them
    "data": ["--device.data", "8"],
    "zero 2": ["--device.data", "8", "--device.zero", "2"],
    "fsdp": ["--device.fsdp", "8"],
    "tensor": ["--device.tensor", "8", "--model.num-kv-heads", "8"],
    "context, by a ring": ["--device.context", "4", "--device.data", "2"],
    "context, by exchange": ["--device.context", "4", "--device.fsdp", "2", "--device.context-attention", "ulysses"],
    "expert": ["--device.expert", "4", "--device.fsdp", "2", *MIXTURE],
    "pipeline": ["--device.pipeline", "4", "--device.microbatches", "4", "--device.data", "2"],
    "pipeline x fsdp x tensor": [*PIPELINE, "--device.fsdp", "2", "--device.tensor", "2"],
}
SHORT = ["--training.steps", "3", "--training.validate-every", "0", "--training.sample-tokens", "0"]
ONE_AFTER_THE_OTHER = """
import json, sys
from artifex import train
from artifex.cli import parse_train
from artifex.scaling import processes

runs = json.loads(sys.argv[1])
processes.start(parse_train(sys.argv[2:]).start, {"runs": runs})
with processes.ending_together():
    for name, words in runs.items():
        train.train(parse_train(["c.json", *words]).config, name)
"""


@pytest.fixture(scope="module")
def unions(folder):
    """The run of each union by the same four processes."""
    runs = json.dumps({f"unions/{name}": [*words, *SHORT] for name, words in UNIONS.items()})
    with Together(4, 2, [runs], folder=folder, program=ONE_AFTER_THE_OTHER) as them:
        ended = them.ended(1800)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    return folder / "unions"


@pytest.mark.slow
@pytest.mark.parametrize("union", UNIONS)
def test_a_union_over_processes_has_the_losses_of_one_process(union, unions, folder, tmp_path):
    one = in_one(folder, tmp_path / "one", [*UNIONS[union], *SHORT])
    close(losses(unions / union), losses(one), within=5e-6)  # tensor over four processes: 2.5e-6; data, fsdp: 1e-7


@pytest.mark.slow
def test_a_checkpoint_of_four_processes_opens_in_two_and_in_one_bit_equal(folder, tmp_path):
    run, words = tmp_path / "run", ["--training.steps", "4"]
    command = ["c.json", "--run-dir", str(run), *words]
    with Together(4, 2, [*command, *FSDP_TENSOR], folder=folder) as them:
        ended = them.ended(600)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    written = (run / "weights" / "model.safetensors").read_bytes()

    def forget():  # what a finished run has besides its checkpoint is made again from that
        shutil.rmtree(run / "weights")
        (run / "loss.png").unlink()

    forget()
    with Together(2, 1, [*command, "--device.fsdp", "2"], folder=folder) as them:
        ended = them.ended(600)
    assert [code for code, _, _ in ended] == [0] * 2, ended
    assert "makes what is missing" in ended[0][1]
    assert (run / "weights" / "model.safetensors").read_bytes() == written
    forget()
    in_one(folder, run, [*words, "--device.fsdp", "8"])
    assert (run / "weights" / "model.safetensors").read_bytes() == written


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "weights"])
def test_samples_of_two_processes_are_those_of_one(part, pair, folder, capsys):
    words = ["both/" + part, "--num-tokens", "8", "--seed", "3", "--mesh", "fsdp=4,tensor=2"]
    with Together(2, 4, words, folder=folder, program="sample") as them:
        first, second = them.ended()
    sample.main([str(folder / words[0]), *words[1:]])
    assert (first[:2], second[:2]) == ((0, capsys.readouterr().out), (0, ""))
    with Together(2, 4, words[:-2], folder=folder, program="sample") as them:
        assert [(code, "give --mesh" in err) for code, _, err in them.ended()] == [(2, True)] * 2


@pytest.mark.slow
def test_a_signal_to_one_process_saves_the_step_and_ends_both(folder, tmp_path):
    run = tmp_path / "run"
    words = ["c.json", "--run-dir", str(run), "--training.steps=100000", "--checkpoint.every=0", "--logging.every=5"]
    with Together(2, 4, words, folder=folder) as them:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < until:
            time.sleep(0.2)
        them.processes[1].send_signal(signal.SIGTERM)
        ended = them.ended(120)
    assert [code for code, _, _ in ended] == [143, 143], ended
    (saved,) = (run / "checkpoints").iterdir()
    assert f"stopped by SIGTERM at step {saved.name}, which is saved" in ended[0][1]
    assert int(saved.name) % 5 == 0 and artifex.restore(run).step == int(saved.name)


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_while_the_step_is_compiled_ends_both(stopped, folder, tmp_path):
    words = ["c.json", "--run-dir", str(tmp_path / "run"), "--model.num-layers=64", "--training.unroll=64"]
    with Together(2, 1, [*words, "--device.data=2"], folder=folder) as them:
        assert "parameters" in them.processes[0].stdout.readline()
        time.sleep(2)
        them.processes[stopped].send_signal(signal.SIGTERM)
        began = time.monotonic()
        ended = them.ended(60)
        assert time.monotonic() - began < 10
    assert [code for code, _, _ in ended] == [143, 143], ended
    said = "stopped by SIGTERM: nothing is lost, give the same command again\n"
    assert ended[stopped][2] == said and ended[1 - stopped][2] == f"error: process {stopped} has ended: {said}"
    assert not (tmp_path / "run").exists()


def elsewhere(folder, tmp_path, change):
    """Where each of two processes is started: the second beside data of its own."""
    other = tmp_path / "other"
    shutil.copytree(folder / "source", other / "source")
    shutil.copy(folder / "c.json", other)
    change(other / "source")
    return lambda process: other if process else folder


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_who_name_it(folder, tmp_path):
    where = elsewhere(folder, tmp_path, shutil.rmtree)
    with Together(2, 1, ["c.json", "--run-dir", str(tmp_path / "run")], folder=folder, where=where) as them:
        began = time.monotonic()
        (code, out, err), (its_code, its_out, its_err) = them.ended(60)
        assert time.monotonic() - began < 40
    assert code == its_code == 2 and out == its_out == ""
    assert its_err.startswith("error: ") and its_err.count("\n") == 1 and "source" in its_err
    assert err == f"error: process 1 has ended: {its_err.removeprefix('error: ')}"


@pytest.mark.slow
def test_data_that_differ_between_processes_are_an_error_on_both(folder, tmp_path):
    where = elsewhere(folder, tmp_path, lambda source: (source / "0.txt").write_text("something else\n" * 100))
    with Together(2, 1, ["c.json", "--run-dir", str(tmp_path / "run")], folder=folder, where=where) as them:
        ended = them.ended(60)
    says = "error: process 1 has another data set than process 0: "
    assert all(code == 2 and out == "" and err.startswith(says) and err.count("\n") == 1 for code, out, err in ended)


@pytest.mark.slow
def test_what_slurm_says_is_enough(folder, monkeypatch):
    jobs = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    environment = os.environ | jobs | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "artifex.train", "c.json", "--dry-run"]
    running = [
        subprocess.Popen(
            [*command, *FSDP_TENSOR],
            cwd=folder,
            env=environment | {"SLURM_PROCID": process, "SLURM_LOCALID": process},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in ("0", "1")
    ]
    (out, err), (its_out, its_err) = (process.communicate(timeout=120) for process in running)
    assert [process.returncode for process in running] == [0, 0], (err, its_err)
    assert "mesh fsdp=4 x tensor=2" in out and its_out == ""


@pytest.mark.slow
def test_images_are_drawn_and_scored_over_processes(tmp_path):
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    images = (generator.random((200, 8, 8, 1)) * 100 + 100 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    sections = {
        "model": {"name": "vae-digits", "block_channels": [16, 32], "levels": 256},
        "data": {"source": "images.npz", "validation_fraction": 0.2},
        "training": {"steps": 2, "batch_size": 16, "validate_every": 1, "score_images": 20, "sample_images": 4},
        "optimizer": {"warmup_steps": 1},
        "checkpoint": {"every": 1},
        "logging": {"every": 1, "progress": False},
    }
    (tmp_path / "c.json").write_text(json.dumps(sections))
    words, optimised = ["c.json", "--run-dir", "both", "--device.fsdp", "8"], {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    with Together(2, 4, words, folder=tmp_path, env=optimised) as them:  # the judge trains for 500 steps
        ended = them.ended(600)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "20 samples: " in ended[0][1] and ended[1][1] == ""
    one = in_one(tmp_path, tmp_path / "one", ["--device.fsdp", "8", "--training.score-images", "0"])
    assert sorted(path.name for path in (one / "samples").iterdir()) == sorted(
        path.name for path in (tmp_path / "both" / "samples").iterdir()
    )
    from_pretrained(tmp_path / "both" / "weights")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["--device.fsdp", "8"], ["--device.fsdp", "2", "--device.tensor", "4"]])
def test_latents_that_two_processes_cached_are_those_of_one(layout, tmp_path):
    images = (np.random.default_rng(0).random((90, 8, 8, 1)) * 255).astype(np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(90) % 10)
    small = {"block_channels": [8, 8], "mid_attention": False}
    sections = {
        "model": {
            "name": "latent-dit-digits",
            "network": {"embed_dim": 16, "num_layers": 1, "num_heads": 4},
            "autoencoder": {**small, "latent_shift": None, "latent_scale": None},
            "autoencoder_weights": str(tmp_path / "kl"),
            "sampling_steps": 2,
        },
        "data": {"source": "images.npz", "validation_fraction": 0.2, "flip": True, "cache_latents": True},
        "training": {"steps": 2, "batch_size": 16, "validate_every": 1, "score_images": 0, "sample_images": 0},
        "optimizer": {"name": "adamw", "warmup_steps": 1},
        "logging": {"every": 1, "progress": False},
    }
    (tmp_path / "c.json").write_text(json.dumps(sections))
    kl = Config.from_dict({"model": {"name": "kl-digits", **small}, "data": {"source": "digits"}}).model.spec()
    save_pretrained(tmp_path / "kl", "kl-digits", kl, nnx.to_pure_dict(nnx.state(kl.build(nnx.Rngs(0)))))
    with Together(2, 4, ["c.json", "--run-dir", "both", *layout], folder=tmp_path) as them:
        ended = them.ended(300)
    assert [code for code, _, _ in ended] == [0, 0], ended
    one = in_one(tmp_path, tmp_path / "one", layout)
    ours, theirs = ({file.name: file for file in (run / "cache").glob("*.npy")} for run in (one, tmp_path / "both"))
    assert ours.keys() == theirs.keys() and ours
    for name, file in ours.items():
        np.testing.assert_allclose(np.load(theirs[name]), np.load(file), rtol=1e-5, atol=1e-6)
    close(losses(tmp_path / "both"), losses(one), within=1e-5)
