"""All benchmarks beside all peers, by one command, to one file of JSON and the tables of `docs/benchmarks.md`.

    python benchmarks/peers.py                                   # environments, benchmarks, tables
    python benchmarks/peers.py --only unet vae --python python3.13 --rounds 9
    python benchmarks/peers.py --page FILE                       # put the tables of a file into the page

Ours and each peer have an environment of their own in `--environments`, made once; `--use NAME=PYTHON` takes one that
is there instead. What is not installed or fails becomes a row with its reason, and the rest goes on. Ctrl-C ends it
with what was measured, which is written after every benchmark. Needs the standard library alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Peer(NamedTuple):
    """An environment: what pip installs into it, and a module that is there when that succeeded."""

    packages: tuple[str, ...]
    module: str


PEERS = {
    "ours": Peer(("-e", f"{ROOT}[images]"), "artifex"),
    # with ours beside it: a worker takes the parameters from the same model
    "pytorch": Peer(("-e", f"{ROOT}[parity]", "torch==2.13.0"), "diffusers"),
}
VERSIONS = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "diffusers")


class Benchmark(NamedTuple):
    """A script with its options; `quick`: those that make it tiny; `peers`: whether PyTorch runs beside it."""

    command: tuple[str, ...]
    quick: tuple[str, ...] = ("--small",)
    peers: bool = True
    rounds: bool = True


BENCHMARKS = {
    "decoder": Benchmark(("train_step.py", "decoder")),
    "moe": Benchmark(("train_step.py", "moe")),
    "dit": Benchmark(("image_step.py", "dit")),
    "unet": Benchmark(("image_step.py", "unet")),
    "vae": Benchmark(("image_step.py", "vae")),
    "generation": Benchmark(("generate.py",)),
    "checkpoint": Benchmark(("checkpoint.py",), peers=False),
    "loader": Benchmark(("data_loader.py",), ("--steps", "20"), peers=False, rounds=False),
    "startup": Benchmark(("startup.py",)),
    "compilation": Benchmark(("compile_depth.py",)),
}
GPU = {
    "gpu": Benchmark(("gpu.py",), ("--only", "decoder-124m-1024")),
    "gpu-dry": Benchmark(("gpu.py", "--dry-run"), ("--only", "decoder-124m-1024", "dit-xl2")),
}


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    if args.page:
        page.rewrite(args.page)
        return
    found = {"when": datetime.date.today().isoformat(), "machine": machine(), "quick": args.quick, "records": []}
    found |= {"environments": {}, "conditions": args.conditions}
    try:
        fill(found, args)
    except KeyboardInterrupt:
        print("\nended; what was measured is kept", flush=True)
    write(args.json, found)
    print(page.tables(found))
    print(f"\nwritten to {args.json}; `python benchmarks/peers.py --page {args.json}` puts it into the page")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = BENCHMARKS | GPU
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    options.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"any of {', '.join(known)}")
    options.add_argument("--gpu", action="store_true", help="the benchmark of a GPU instead, as by --only gpu")
    options.add_argument("--rounds", type=int, default=7, help="times that each variant is timed (default: 7)")
    options.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options.add_argument("--json", type=Path, default=Path("peers.json"), help="what to write (default: peers.json)")
    options.add_argument("--environments", type=Path, default=cache / "artifex" / "peers", help="where they are made")
    options.add_argument("--python", default=sys.executable, help="what our environment is made of (default: this)")
    options.add_argument("--use", nargs="+", default=[], metavar="NAME=PYTHON", help="environments that are there")
    options.add_argument(
        "--peers", nargs="*", choices=set(PEERS) - {"ours"}, default=["pytorch"], help="what to install"
    )
    options.add_argument("--install-limit", type=float, default=720, help="seconds for an environment (default: 720)")
    options.add_argument("--limit", type=float, default=7_200, help="seconds for a benchmark (default: 7200)")
    options.add_argument("--conditions", default="", help="a sentence about what else the machine did")
    options.add_argument("--page", type=Path, metavar="FILE", help="measure nothing; put its tables into the page")
    args = options.parse_args(argv)
    args.use = dict(entry.split("=", 1) if "=" in entry else (entry, "") for entry in args.use)
    for name, python in args.use.items():
        if name not in PEERS or not python:
            options.error(f"--use {name}={python} is no NAME=PYTHON of {', '.join(PEERS)}")
    return args


def fill(found: dict[str, Any], args: argparse.Namespace) -> None:
    """Make the environments, run the benchmarks, and note what came out as it comes."""
    environments = found["environments"]
    for name in ("ours", *args.peers):
        environments[name] = environment(name, args)
        print(f"{name}: {environments[name].get('failed') or environments[name]['versions']}", flush=True)
        write(args.json, found)
    for name in args.only or (["gpu"] if args.gpu else BENCHMARKS):
        for record in run((BENCHMARKS | GPU)[name], environments, args):
            found["records"].append({"benchmark": name, **record})
        write(args.json, found)
        if any(record.get("interrupted") for record in found["records"]):
            raise KeyboardInterrupt


def environment(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The Python and the versions of an environment, which is made where it is not there; or why there is none."""
    python = args.use.get(name)
    if python is None:
        base = args.python if name == "ours" else sys.executable
        version = output([base, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
        folder = args.environments.resolve() / f"{name}-{version}"
        python = str(folder / "bin" / "python")
        try:
            if not (folder / "whole").exists():
                output([base, "-m", "venv", "--clear", str(folder)])
                command = [python, "-m", "pip", "install", "--quiet", *PEERS[name].packages]
                output(command, limit=args.install_limit)
                (folder / "whole").touch()
        except RuntimeError as error:
            return {"failed": f"not installed: {error}"}
    try:
        output([python, "-c", f"import {PEERS[name].module}"])
        return {"python": python, "versions": json.loads(output([python, "-c", ASK, *VERSIONS]))}
    except RuntimeError as error:
        return {"failed": f"does not import: {error}"}


ASK = """
import importlib.metadata as found, json, platform, sys
def version(name):
    try: return found.version(name)
    except found.PackageNotFoundError: return None
known = {name: version(name) for name in sys.argv[1:]}
print(json.dumps({"Python": platform.python_version(), **{name: text for name, text in known.items() if text}}))
"""


def output(command: list[str], limit: float = 300) -> str:
    """What it prints. Raises `RuntimeError` with the last line of what it complains about."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done within {limit:g} s") from None
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300])
    return done.stdout


def run(benchmark: Benchmark, environments: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The records of a benchmark, in which PyTorch's rows say why there are none where that is so."""
    script, *rest = benchmark.command
    absent = environments["ours"].get("failed")
    if absent:
        return [{"name": " ".join(benchmark.command), "failed": f"ours is {absent}"}]
    command = [environments["ours"]["python"], str(HERE / script), *rest]
    command += ["--rounds", str(args.rounds)] if benchmark.rounds else []
    command += benchmark.quick if args.quick else []
    torch = environments.get("pytorch", {"failed": "not asked for"})
    if benchmark.peers:
        command += ["--no-torch"] if "failed" in torch else ["--torch-python", torch["python"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        process = subprocess.Popen([*command, "--json", str(path)], env=os.environ | {"PYTHONPATH": str(ROOT)})
        problem = waited(process, args.limit)
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if not records:
        reason = problem or f"exit code {process.returncode}"
        return [{"name": " ".join(benchmark.command), "failed": reason, "interrupted": "Ctrl-C" in reason}]
    for record in records:
        if benchmark.peers and "failed" in torch:
            record["variants"]["PyTorch"] = {"failed": torch["failed"]}
    return records


def waited(process: subprocess.Popen[bytes], limit: float) -> str:
    """Wait for a benchmark to end, which Ctrl-C has write what it has; why it was ended, if it was."""
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait(60)
        return f"not done within {limit:g} s"
    except KeyboardInterrupt:
        process.wait(60)
        return "ended by Ctrl-C"
    return ""


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    wide = [name for name in ("avx2", "avx512f", "amx_tile") if name in fields.get("flags", "").split()]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": fields.get("model name", platform.processor()),
        "vectors": wide[-1] if wide else "",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": os.getloadavg()[0],
    }


def write(path: Path, found: dict[str, Any]) -> None:
    """The file, whole or as it was."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main()
