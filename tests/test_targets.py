"""Our own training step, compiled for accelerators that are not there: what it holds, and that nothing grows with T x T
or T x V; and large runs as the command answers for them. Each compile is a process, of 4 to 150 s on two cores."""

import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
GPU = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs jax-cuda13-plugin")
pytestmark = pytest.mark.slow


def compiled(target, model, *options):
    """What the benchmark prints of a compile."""
    command = [sys.executable, "benchmarks/target_memory.py", target, model, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return json.loads(done.stdout.splitlines()[-1])


def of(tokens, length):
    """16 devices with 8,192 tokens each, in rows of `length`."""
    return "--batch", str(16 * tokens // length), "--sequence", str(length)


@TPU
@pytest.mark.parametrize("length", [2_048, 4_096, 8_192])
def test_a_tpu_step_does_not_grow_with_the_length_of_its_rows(length):
    assert compiled("v5e:4x4", "llama3.2-1b", *of(8_192, length))["temporary_GiB"] <= 3.3


@TPU
def test_8b_fits_on_16_chips_of_16_gib():
    used = compiled("v5e:4x4", "llama3-8b", *of(8_192, 2_048))
    assert used["state_GiB"] + used["temporary_GiB"] < 14.5


@TPU
def test_muon_and_adafactor_need_little_more_than_adamw():
    shape = ("v5e:4x4", "llama3.2-1b", *of(8_192, 2_048))
    names = ("adamw", "muon", "adafactor")
    adamw, *others = (compiled(*shape, "--optimizer", name)["temporary_GiB"] for name in names)
    assert max(others) < adamw + 0.6, others


@TPU
def test_what_is_offloaded_leaves_the_chip():
    shape = ("v5e:4x4", "llama3.2-1b", *of(8_192, 2_048))
    kept = compiled(*shape, "--remat", "qkv=keep")["temporary_GiB"]
    away = compiled(*shape, "--remat", "qkv=offload")["temporary_GiB"]
    # queries, keys and values of 16 layers: 8,192 x (2,048 + 2 x 512) x 2 bytes each
    assert kept - away > 0.8 * 16 * 8_192 * 3_072 * 2 / 2**30


@GPU
@pytest.mark.parametrize(
    ("model", "mesh", "length", "most"),
    [
        ("llama3.2-1b", "fsdp=16", 2_048, 2.2),
        ("llama3.2-1b", "fsdp=16", 8_192, 2.2),
        ("gemma2-2b", "fsdp=16", 2_048, 6.5),  # a softcap, which cuDNN refuses
        ("gemma2-2b", "fsdp=16", 8_192, 6.5),
        ("llama3-8b", "fsdp=4,tensor=4", 2_048, 7),
    ],
)
def test_a_gpu_step_fits(model, mesh, length, most):
    assert compiled("h100:2x8", model, "--mesh", mesh, *of(8_192, length))["temporary_GiB"] <= most


@pytest.mark.parametrize(
    ("target", "model", "length", "vocab"),  # a length that is no dim of the model
    [
        pytest.param("h100:2x8", "llama3.2-1b", 3_072, 128_256, marks=GPU),
        pytest.param("h100:2x8", "gemma2-2b", 5_120, 256_000, marks=GPU),
        pytest.param("v5e:4x4", "llama3.2-1b", 3_072, 128_256, marks=TPU),
    ],
)
def test_nothing_in_the_program_grows_with_t_x_t_or_t_x_v(target, model, length, vocab, tmp_path):
    batch = ("--batch", "32", "--sequence", str(length))
    compiled(target, model, *batch, "--text", str(tmp_path / "program.txt"))
    shapes, constants = set(), {()}
    for line in (tmp_path / "program.txt").read_text().splitlines():
        found = {
            tuple(map(int, dims.split(",")))
            for dims in re.findall(r"(?:f32|bf16|pred|s32|u32)\[([\d,]+)\]", line.split(" metadata=")[0])
        }
        shapes |= found
        constants |= found if " constant(" in line else set()
    assert length in {size for shape in shapes for size in shape}, "it is this program"
    assert [shape for shape in shapes if shape.count(length) > 1] == []
    assert [shape for shape in shapes if {length, 2 * length} & set(shape) and vocab in shape] == []
    # no mask, and no table of angles
    assert max(map(math.prod, constants)) < 16 * length


@GPU
def test_a_program_of_80_layers_is_as_long_as_one_of_8(tmp_path):
    lengths = []
    for count in (8, 80):
        text, layers = tmp_path / str(count), json.dumps({"model": {"num_layers": count}})
        compiled("h100:2x8", "llama3-8b", *of(8_192, 2_048), "--set", layers, "--text", str(text))
        lengths.append(len(text.read_text().splitlines()))
    assert lengths[1] < 1.05 * lengths[0]


@GPU
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_gradients_are_summed_across_devices_in_the_reduce_dtype(dtype, tmp_path):
    sections = {"training": {"reduce_dtype": dtype}, "model": {"num_layers": 2}}
    shape = (*of(8_192, 2_048), "--set", json.dumps(sections), "--text", str(tmp_path / "program.txt"))
    compiled("h100:2x8", "llama3.2-1b", *shape)
    lines = re.findall(r"= (.*) reduce-scatter-start\(", (tmp_path / "program.txt").read_text())
    kernels = {kind for line in lines for kind in re.findall(r"(bf16|f32)\[\d+,[\d,]+\]", line)}
    assert kernels == {"f32" if dtype else "bf16"}


@GPU
@pytest.mark.parametrize("split", [True, False])
def test_tensor_parallelism_moves_a_gpus_stream_as_often_as_megatron_does(split, tmp_path):
    how = json.dumps({"device": {"sequence_parallel": split}, "model": {"num_layers": 8}})
    shape = ("--mesh", "fsdp=4,tensor=4", *of(8_192, 2_048), "--set", how, "--text", str(tmp_path / "program.txt"))
    compiled("h100:2x8", "llama3-8b", *shape)
    text = (tmp_path / "program.txt").read_text()

    def count(kind, tokens):
        return len(re.findall(rf"bf16\[16,{tokens},4096\][^=]* {kind}-start\(", text))

    # a layer forward 2 and 2; backward, recomputed, 2 and 1, and 2 gradients each way; one gather before the loss and
    # one of the words' gradient, one sum of words
    gathers, sums = 2 + 2 + 2 + 2, 2 + 1 + 2 + 1
    assert (count("all-gather", 2_048), count("reduce-scatter", 512)) == ((gathers, sums) if split else (0, 0))
    assert count("all-reduce", 2_048) == (0 if split else sums)


@GPU
@pytest.mark.parametrize("mesh", ["fsdp=2,expert=8", "fsdp=16"])
def test_mixtral_on_16_gpus_multiplies_rows_by_their_own_experts(mesh, tmp_path):
    text = tmp_path / "program.txt"
    used = compiled("h100:2x8", "mixtral-8x7b", "--mesh", mesh, "--batch", "16", "--text", str(text))
    assert used["temporary_GiB"] <= 20
    program = text.read_text()
    # with expert parallelism no GPU holds all experts of a layer
    assert ("[8,4096,14336]" in program) == (mesh == "fsdp=16")
    # a dense expansion sums over all experts' inputs: 8 x 4,096 or 8 x 14,336
    assert not re.search(r"\[(4096|2048),(32768|114688)\]", program)
    assert "all-to-all" in program and "__gpu$xla.gpu.triton" in program


@TPU
def test_a_tpu_has_one_kernel_for_rows_and_their_experts(tmp_path):
    text, small = tmp_path / "program.txt", json.dumps({"model": {"num_layers": 2}})
    compiled("v5e:4x4", "mixtral-8x7b", "--batch", "16", "--set", small, "--text", str(text))
    assert re.search(r"ragged-dot\S* = bf16\[4096,14336\].* custom-call\(", text.read_text())


V5E, V5P, H100 = "v5e:4x4", "v5p:4x4x4", "h100:2x8"
GIB = {V5E: 16, V5P: 95, H100: 80}  # of a device
LLAMA = "--data.sequence-length 2048 --model.sequence-length 2048"
STEP = "--training.compute-dtype bfloat16 --optimizer.name adamw"
LEAN = f"--training.remat full {STEP}"
RUNS = {  # name -> target, what is typed besides, GiB of a device that it needs at most
    "8B on 16 v5e": ("tpu:v5e:4x4", f"--model.name llama3-8b {LLAMA} --training.batch-size 64 --device.fsdp 16", 12),
    "8B on 16 v6e": ("tpu:v6e:4x4", f"--model.name llama3-8b {LLAMA} --training.batch-size 64 --device.fsdp 16", 31.25),
    "70B on 256 v5p": (
        "tpu:v5p:8x8x4",
        f"--model.name llama3-70b {LLAMA} --training.batch-size 1024 --device.fsdp 256",
        20,
    ),
    "Mixtral 8x7B on 64 v5p": (
        "tpu:v5p:4x4x4",
        f"--model.name mixtral-8x7b {LLAMA} --training.batch-size 64 --device.fsdp 8 --device.expert 8",
        95.74,
    ),
    "DiT-XL/2 on 16 v5e": (
        "tpu:v5e:4x4",
        "--model.name latent-dit-xl2 --data.source digits --data.cache-latents true --training.batch-size 256 "
        "--device.fsdp 16",
        2,
    ),
    "8B on 16 H100": ("gpu:h100:2x8", f"--model.name llama3-8b {LLAMA} --training.batch-size 64 --device.fsdp 16", 12),
    "70B on 1,024 H100": (
        "gpu:h100:128x8",
        f"--model.name llama3-70b {LLAMA} --training.batch-size 1024 --device.fsdp 128 --device.tensor 8",
        8,
    ),
}


def answer(target, words, step=LEAN):
    """What the command prints about a target, and its exit code."""
    command = [sys.executable, "-m", "artifex.train", "--dry-run", "--target", target, *words.split(), *step.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2_000, check=False)
    assert done.stdout, done.stderr[-2_000:]
    return done.stdout, done.returncode


@pytest.mark.parametrize(
    ("target", "words", "most"),
    [pytest.param(*run, id=name, marks=TPU if "tpu" in run[0] else GPU) for name, run in RUNS.items()],
)
def test_a_large_run_fits_a_machine_that_is_not_there(target, words, most):
    text, code = answer(target, words)
    needs = re.search(r"^fits: ([\d.]+) GiB of", text, re.MULTILINE)
    assert code == 0 and needs and float(needs[1]) < most, text
    assert all(
        word in text
        for word in ("optimizer state", "batch", "FLOPs per device", "compiled in", "communication per device")
    )


@GPU
def test_a_run_that_no_gpu_holds_is_answered_with_figures():
    words = f"--model.name llama3-8b {LLAMA} --training.batch-size 8 --device.data 8"
    text, code = answer("gpu:h100:1x8", words)
    # 8.03e9 parameters of 12 bytes, whole on each: 89.75 GiB; eight share them
    assert code == 1 and "does not fit: parameters and optimizer state take 89.75 GiB on each device" in text
    assert "--device.fsdp=-1 leaves 11.22 GiB of it on each" in text


TOO_LARGE = {
    "8B on 8 H100, long rows": (
        "gpu:h100:1x8",
        "--model.name llama3-8b --data.sequence-length 8192 --training.batch-size 64 --device.fsdp 8",
    ),
    "1B on 16 v5e": (
        "tpu:v5e:4x4",
        "--model.name llama3.2-1b --data.sequence-length 2048 --training.batch-size 64 --device.fsdp 16",
    ),
}


@pytest.mark.parametrize(
    ("target", "words"),
    [pytest.param(*run, id=name, marks=TPU if "tpu" in run[0] else GPU) for name, run in TOO_LARGE.items()],
)
def test_where_a_run_does_not_fit_what_is_proposed_does(target, words):
    text, code = answer(target, words, STEP)
    proposed = re.search(r"^(--.+) fits: its step, compiled, needs ([\d.]+ GiB)$", text, re.MULTILINE)
    assert code == 1 and proposed and re.search(r"^does not fit: needs [\d.]+ GiB, a device has", text, re.MULTILINE), (
        text
    )
    again, code = answer(target, f"{words} {proposed[1]}", STEP)
    assert code == 0 and f"\nfits: {proposed[2]} of" in again, again


UNIONS = [
    pytest.param(V5E, "gemma2-2b", "fsdp=4,tensor=4", 16, "all-gather", marks=TPU),
    pytest.param(V5E, "mixtral-8x7b", "fsdp=2,expert=8", 16, "all-to-all", marks=TPU),
    pytest.param(V5E, "dit-xl2", "data=4,fsdp=4", 64, "all-gather", marks=TPU),
    pytest.param(V5P, "gemma2-2b", "fsdp=8,context=4,tensor=2", 16, "collective-permute", marks=TPU),
    pytest.param(V5P, "mixtral-8x7b", "fsdp=8,expert=8", 64, "all-to-all", marks=TPU),
    pytest.param(V5P, "dit-xl2", "pipeline=4,fsdp=16", 256, "collective-permute", marks=TPU),
    pytest.param(H100, "gemma2-2b", "pipeline=2,fsdp=4,tensor=2", 64, "collective-permute", marks=GPU),
    pytest.param(H100, "mixtral-8x7b", "pipeline=2,expert=8", 64, "all-to-all", marks=GPU),
    pytest.param(H100, "dit-xl2", "pipeline=4,fsdp=4", 64, "collective-permute", marks=GPU),
]


@pytest.mark.parametrize(("target", "model", "mesh", "batch", "collective"), UNIONS)
def test_unions_compile_for_machines_that_are_not_there(target, model, mesh, batch, collective, tmp_path):
    length, text = 3_072, tmp_path / "program.txt"  # a length that is no dim of these models
    how = ("--mesh", mesh, "--batch", str(batch), "--sequence", str(length), "--text", str(text))
    if (target, model) == (V5E, "mixtral-8x7b"):  # whose 32 layers have twice as much state as 16 chips
        how += ("--set", json.dumps({"model": {"num_layers": 4}}))
    assert compiled(target, model, *how)["temporary_GiB"] < GIB[target]
    program = text.read_text()
    assert collective in program
    if model != "dit-xl2":
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", program)}
        assert [shape for shape in shapes if shape.count(length) > 1] == []
