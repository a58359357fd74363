"""Seconds until something happens: imports, and the first training step of the quickstart, cold and warm.

Every time is that of a fresh process, in turn. The first step of ours is `first_step_seconds` of `metrics.jsonl`, which
counts from when the process began to when the step is computed: cold in a new folder, warm when the same command is
given once more. PyTorch's is a step of a model of the same size, from the beginning of its process too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import report
from workers import ROOT, timed

IMPORTS = {
    "import artifex.models": "import artifex.models",
    "import artifex.training.loop": "import artifex.training.loop",
    "import jax": "import jax",
}
TORCH_IMPORTS = {
    "import torch": "import torch",
    "import transformers' Llama": "from transformers import LlamaForCausalLM",
}
TORCH_STEP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
tokens = torch.randint(256, (16, 256))
forward = torch.compile(model) if compiled else model
forward(tokens, labels=tokens).loss.backward()
optimizer.step()
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7, help="times that each is timed")
    options.add_argument("--no-torch", dest="torch", action="store_false", help="leave out PyTorch")
    options.add_argument("--torch-python", default=sys.executable, metavar="PYTHON", help="that of its environment")
    options.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    options.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    report.add_json(options)
    args = options.parse_args()
    tiny = ["--model.num-layers", "1", "--training.batch-size", "2", "--data.sequence-length", "32"]
    report.finish(args, (make(args, tiny if args.small else []) for make in (imports, first_steps)))


def imports(args: argparse.Namespace, _: list[str]) -> report.Record:
    """Seconds of imports, Python's own start not counted."""
    calls = {name: lambda code=code: importing(sys.executable, code) for name, code in IMPORTS.items()}
    if args.torch:
        calls |= {name: lambda code=code: importing(args.torch_python, code) for name, code in TORCH_IMPORTS.items()}
    return in_order("imports", calls, args.rounds)


def importing(python: str, code: str) -> float:
    """Seconds that a new process takes for an import."""
    timed = f"import time; start = time.perf_counter()\n{code}\nprint(time.perf_counter() - start)"
    return float(output([python, "-c", timed]).split()[-1])


def environment() -> dict[str, str]:
    """This one, with the package of this checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


def output(command: list[str]) -> str:
    """What a process of this checkout's package prints."""
    done = subprocess.run(
        command,
        env=environment(),
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def first_steps(args: argparse.Namespace, settings: list[str]) -> report.Record:
    """Seconds from the start of a process to its first training step."""
    with tempfile.TemporaryDirectory() as folder:
        index = 0

        def cold() -> float:
            nonlocal index
            index += 1
            return first_step(Path(folder) / str(index), settings)

        def warm() -> float:
            return first_step(Path(folder) / str(index), settings)  # goes on where the cold start stood

        calls: dict[str, Callable[[], float]] = {"ours, cold": cold, "ours, warm": warm}
        if args.torch:
            for name in ("PyTorch", *(["PyTorch, compiled"] if args.compile else [])):
                command = [args.torch_python, "-c", f"compiled = {name != 'PyTorch'}{TORCH_STEP}"]
                calls[name] = lambda command=command: timed(lambda: output(command))
        return in_order("first training step", calls, args.rounds)


def first_step(folder: Path, settings: list[str]) -> float:
    """Start the quickstart in this folder, end it after its first step, and read when that was computed."""
    command = [sys.executable, "-m", "artifex.train", "--run-dir", str(folder), *settings]
    metrics, before = folder / "metrics.jsonl", len(starts(folder / "metrics.jsonl"))
    began = time.time()
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=folder.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        # SIGTERM ends a run after the step, with everything saved; the first step is when a run begins to write
        while process.poll() is None and not has_stepped(folder, began):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate()[1]
    found = starts(metrics)
    if len(found) == before:
        raise RuntimeError((errors.strip().splitlines() or ["no first step"])[-1])
    return found[-1]


def has_stepped(folder: Path, began: float) -> bool:
    """Whether the configuration was written since: a run does so when its first step is computed."""
    return (folder / "config.json").exists() and (folder / "config.json").stat().st_mtime >= began


def starts(metrics: Path) -> list[float]:
    """`first_step_seconds` of every line that has it."""
    if not metrics.exists():
        return []
    lines = (json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return [line["first_step_seconds"] for line in lines if line.get("first_step_seconds") is not None]


def in_order(name: str, calls: dict[str, Callable[[], float]], rounds: int) -> report.Record:
    """What each call says once a round, always in this order; one that fails does not come again."""
    print(f"\n{name}", flush=True)
    seconds: dict[str, list[float]] = {key: [] for key in calls}
    failed: dict[str, str] = {}
    with contextlib.suppress(KeyboardInterrupt):
        for _ in range(rounds):
            for key, call in calls.items():
                if key not in failed:
                    try:
                        seconds[key].append(call())
                    except RuntimeError as error:
                        failed[key] = str(error)[:300]
    whole = min((len(times) for key, times in seconds.items() if key not in failed), default=0)
    kept = {key: times[:whole] for key, times in seconds.items() if key not in failed}
    pairs = [(ours, theirs) for ours in kept for theirs in kept if ours.startswith("ours") and theirs == "PyTorch"]
    made = report.record(name, kept, work=1, unit="starts", ratios=pairs, failed=failed)
    if whole < rounds:
        made["interrupted"] = True
    report.show(made)
    return made


if __name__ == "__main__":
    main()
