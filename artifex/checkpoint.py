"""`python -m artifex.checkpoint`: what saved steps hold, whether they are whole, how two differ; weights out of one.

    python -m artifex.checkpoint ls runs/quickstart
    python -m artifex.checkpoint show runs/quickstart --mesh fsdp=4,tensor=2
    python -m artifex.checkpoint verify runs/quickstart
    python -m artifex.checkpoint diff runs/quickstart/checkpoints/400 runs/other
    python -m artifex.checkpoint export runs/quickstart weights --step 400

PATH is a run, its checkpoints, or one step of them. Only `export` writes, and nothing where anything is.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from artifex.cli import fail, program, sizes_of, user_errors
from artifex.scaling.manifest import CheckpointError
from artifex.training.signals import ending_at_once

BESIDE = ("tokenizer.json", "prompt.txt", "classes.json")
"""Files of a run that go with its weights."""


@ending_at_once()
def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a damaged step, and where
    `diff` finds a difference."""
    with program():
        args = _parser().parse_args(argv)
        try:
            with user_errors():
                whole = args.do(args)
        except CheckpointError as error:
            fail(str(error), code=1)
        if not whole:
            raise SystemExit(1)


def ls(args: argparse.Namespace) -> bool:
    """Print a line for each step."""
    from artifex.training.saved_steps import listing

    print("\n".join(listing(args.path)))
    return True


def show(args: argparse.Namespace) -> bool:
    """Print the tree of a step."""
    from artifex.training.saved_steps import shown

    print("\n".join(shown(args.path, args.step, args.mesh and sizes_of(args.mesh))))
    return True


def verify(args: argparse.Namespace) -> bool:
    """Read all of a step, or of every step, and print what is damaged."""
    from artifex.training.saved_steps import verified

    lines, whole = verified(args.path, args.step)
    print("\n".join(lines))
    return whole


def diff(args: argparse.Namespace) -> bool:
    """Print how two steps differ."""
    from artifex.training.saved_steps import chosen, differences

    a, b = chosen(args.a, args.step), chosen(args.b, args.step)
    lines = differences(a, b)
    names = " and ".join(str(folder / str(step)) for folder, step in (a, b))
    print("\n".join([f"{names}: {'as follows' if lines else 'the same, bit for bit'}", *lines]))
    return not lines


def export(args: argparse.Namespace) -> bool:
    """Write the weights of a step to a folder, as the end of a run does."""
    from artifex.models.weights import save_pretrained
    from artifex.training.restore import restore_weights

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} is there and not empty; choose another folder for the weights")
    saved, tree = restore_weights(args.path, args.step, average=not args.raw)
    save_pretrained(args.out, saved.config.model.name, saved.config.model.spec(), tree, layout=args.layout)
    for name in BESIDE:
        if (saved.folder.parent / name).is_file():
            shutil.copyfile(saved.folder.parent / name, args.out / name)
    print(f"{args.out}: {', '.join(sorted(path.name for path in args.out.iterdir()))}, of step {saved.step}")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m artifex.checkpoint",
        description="Look into saved steps: list, show, verify, compare them, and export weights.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    path = "a run folder, its checkpoints, or one step of them"

    def command(name: str, do: object, text: str, *paths: str, step: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(do=do)
        for each in paths:
            one.add_argument(each, metavar=each.upper(), type=Path, help=path)
        if step:
            one.add_argument("--step", type=int, help=step)
        one.error = fail  # one line, as everywhere
        return one

    newest = "which step (default: the newest)"
    command("ls", ls, "every step with its size, and what was set aside or never finished", "path", step="")
    shows = command("show", show, "the tree of a step, with names and sizes", "path", step=newest)
    shows.add_argument("--mesh", help="what a device holds on such a mesh, as in fsdp=4,tensor=2; it need not be there")
    command(
        "verify", verify, "read every file and compare it with its checksum", "path", step="one step (default: all)"
    )
    command("diff", diff, "whether two steps differ, and where: digests first, then values", "a", "b", step=newest)
    out = command("export", export, "the weights of a step, as safetensors", "path", step=newest)
    out.add_argument("out", metavar="OUT", type=Path, help="the folder to write, which must not be there or be empty")
    out.add_argument("--layout", default="artifex", help="artifex, huggingface, or an architecture (default: artifex)")
    out.add_argument("--raw", action="store_true", help="the raw parameters, where the run keeps a running mean")
    parser.error = fail
    return parser


if __name__ == "__main__":
    main()
