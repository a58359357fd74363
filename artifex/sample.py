"""`python -m artifex.sample RUN_OR_WEIGHTS`: text, or a picture grid, from a run or from a folder of weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifex.cli import START, fail, program, sizes_of, start_of, user_errors, versions
from artifex.data.classes import find_class, load_classes
from artifex.scaling import processes
from artifex.scaling.manifest import CheckpointError
from artifex.training.signals import ending_at_once

if TYPE_CHECKING:
    import numpy as np

    from artifex.training.runner import Runner

TEXT = ("prompt", "num_tokens", "temperature", "top_k", "top_p")
IMAGES = ("labels", "guidance", "steps", "sampler", "out")


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend, with 1 for a damaged checkpoint."""
    with program(), ending_at_once():
        args = _parser().parse_args(argv)
        with user_errors():
            meeting = {flag: [value] for flag in START if (value := vars(args).pop(flag)) is not None}
            asks = {name: value and str(value) for name, value in vars(args).items()}
            processes.start(start_of(meeting), asks | versions())
        with processes.ending_together():
            try:
                with user_errors():
                    _draw(args)
            except CheckpointError as error:
                fail(str(error), code=1)


def _draw(args: argparse.Namespace) -> None:
    from artifex.training.memory import explained

    if processes.count() > 1 and args.mesh is None:
        raise ValueError(f"{processes.count()} processes draw on all their devices together; give --mesh, as in fsdp=8")
    with explained("out of memory; draw fewer at once with --num-samples"):
        loaded = load_to_run(args.path, args.step, mesh=args.mesh and sizes_of(args.mesh))
        cfg, given = loaded.model.cfg, {name: value for name, value in vars(args).items() if value is not None}
        wrong = [name for name in (IMAGES if cfg.reads == "text" else TEXT) if name in given]
        if wrong:
            flag = wrong[0].replace("_", "-")
            raise ValueError(f"--{flag} does not apply: {args.path} holds a model of {cfg.reads}")
        how = {name: given[name] for name in (*TEXT, *IMAGES, "num_samples", "seed") if name in given}
        if cfg.reads == "text":
            prompt = how.pop("prompt", None)
            texts = loaded.run(lambda model: continuations(args.path, model, prompt, **how))
        else:
            names = load_classes(args.path, cfg.num_classes)
            texts = [loaded.run(lambda model: picture(model, names=names, **how))]
    if not processes.is_first():
        return
    for index, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {index + 1} of {len(texts)}")
        sys.stdout.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m artifex.sample",
        description="Draw from a trained model: continue a prompt, or make a picture grid, one row for each class.",
    )
    parser.add_argument("path", metavar="RUN_OR_WEIGHTS", type=Path, help="a run folder, or a folder of weights")
    parser.add_argument("--num-samples", type=int, help="texts, or images (of each class) (default: 1 text, 8 images)")
    parser.add_argument("--seed", type=int, help="the same seed draws the same (default: 0)")
    parser.add_argument("--step", type=int, help="checkpoint of a run to sample from (default: the newest)")
    parser.add_argument(
        "--mesh", help="devices to draw on, as in fsdp=4,tensor=2: axes of the device section (default: one device)"
    )
    text = parser.add_argument_group("models of text")
    text.add_argument("--prompt", help="text to continue (default: the one of the run's own samples)")
    text.add_argument("--num-tokens", type=int, help="new tokens (default: as many as fit, at most 400)")
    text.add_argument("--temperature", type=float, help="0 is greedy (default: 0.7)")
    text.add_argument("--top-k", type=int, help="keep the k likeliest tokens (default: all)")
    text.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability (default: 0.95)")
    images = parser.add_argument_group("models of images")
    images.add_argument("--labels", nargs="+", help="classes to draw, by name or number, a row each (default: all)")
    images.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: the model's)")
    images.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    images.add_argument("--sampler", help="ddpm, ddim, euler, heun or dpm_solver_pp_2m (default: the model's)")
    images.add_argument("--out", type=Path, help="the .png to write (default: samples.png)")
    together = parser.add_argument_group("several processes, as in training")
    for flag, option in START.items():
        together.add_argument(flag, dest=flag, help=option.help)
    parser.error = fail  # one line, as everywhere
    return parser


def sample(path: str | Path, prompt: str | None = None, *, step: int | None = None, **how: Any) -> list[str]:
    """Continuations of `prompt` by the model of a run folder (its newest checkpoint, or `step`) or of weights.

    `prompt` None is that of the run's own samples, or a newline where the folder names none. `how` is that of
    `continuations`. Raises `ValueError` or `FileNotFoundError` for what cannot be sampled.
    """
    loaded = load_to_run(path, step)
    if (reads := loaded.model.cfg.reads) != "text":
        raise ValueError(f"{path} holds a model of {reads}; load it and call model.sample(key, count=...)")
    return loaded.run(lambda model: continuations(path, model, prompt, **how))


def continuations(
    path: str | Path,
    model: Any,
    prompt: str | None = None,
    *,
    num_tokens: int | None = None,
    num_samples: int = 1,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> list[str]:
    """`num_samples` continuations of `prompt`, each with the prompt before it, a pure function of `seed`.

    `path` holds the tokenizer, and the prompt where it is None. `num_tokens` None fills the model's sequence length, up
    to 400.
    """
    import jax
    import numpy as np

    from artifex.data.tokenizers import load_tokenizer

    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; ask for at least 1")
    path = Path(path)
    if not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no tokenizer.json, without which a prompt is no tokens; copy it there, or write it along: "
            "save_pretrained(..., tokenizer=...)"
        )
    tokenizer = load_tokenizer(path / "tokenizer.json")
    if prompt is None:
        own = path / "prompt.txt"
        prompt = own.read_text(encoding="utf-8") if own.exists() else "\n"
    ids = np.asarray(tokenizer.encode(prompt))
    if ids.size == 0:
        raise ValueError("the prompt is empty; give at least one token to continue, a newline will do")
    if num_tokens is None:
        num_tokens = max(1, min(400, model.cfg.sequence_length - ids.size))
    drawn = model.sample(
        jax.random.key(seed),
        prompt=np.tile(ids, (num_samples, 1)),
        num_tokens=num_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return [prompt + tokenizer.decode(row) for row in processes.fetched(drawn)]


def picture(
    model: Any,
    *,
    out: str | Path = "samples.png",
    labels: Sequence[str | int] | None = None,
    names: Sequence[str] | None = None,
    num_samples: int = 8,
    seed: int = 0,
    **how: Any,
) -> str:
    """Write a grid of `num_samples` images, one such row for each class of a model that has classes.

    `labels` are numbers of classes or, where `names` are given, their names; the rows are titled by name. `how` goes to
    `model.sample`: guidance, steps, sampler. Returns a line on what was written.
    """
    from artifex.evaluation.grids import save_grid

    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; ask for at least 1")
    out = Path(out)
    if out.suffix != ".png":
        raise ValueError(f"--out {out} is no .png file")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of --out {out} does not exist; make it first")
    names = list(map(str, range(model.cfg.num_classes))) if names is None else names
    chosen = None
    if labels is not None:  # of a model without classes, whatever they are, they are refused below
        chosen = [find_class(str(label), names) for label in labels] if names else []
    images, numbers = rows_of(model, chosen, num_samples, seed, **how)
    rows = None if numbers is None else [names[number] for number in numbers]
    processes.by_first(save_grid)(images, out, columns=num_samples if rows else None, row_labels=rows)
    what = f", one row for each of {len(rows)} classes" if rows else ""
    return f"{out}: {len(images)} images{what}"


def rows_of(
    model: Any, labels: list[int] | None, columns: int, seed: int, **how: Any
) -> tuple[np.ndarray, list[int] | None]:
    """Images (count, H, W, C), class by class where the model has classes, and the class of each row."""
    import inspect

    import jax
    import numpy as np

    known = inspect.signature(model.sample).parameters
    for name in how:
        if name not in known:
            raise ValueError(f"--{name} does not apply to {type(model).__name__}; leave it out")
    if not model.cfg.num_classes:
        if labels is not None:
            raise ValueError("--labels does not apply: the model has no classes; leave it out")
        return processes.fetched(model.sample(jax.random.key(seed), count=columns, **how)), None
    chosen = list(range(model.cfg.num_classes)) if labels is None else labels
    each = np.repeat(np.asarray(chosen, np.int32), columns)
    images = model.sample(jax.random.key(seed), count=len(each), labels=each, **how)
    return processes.fetched(images), chosen


def load(path: str | Path, step: int | None = None) -> Any:
    """The model of a run folder (its average of weights where it keeps one), in its compute dtype, or of a folder of
    weights, in float32; on one device.

    Of a run, `step` None is the newest that is whole; one that is damaged is named on stderr. Raises
    `FileNotFoundError` and `ValueError` for what holds neither and a step that is not there, `CheckpointError` where
    none is whole.
    """
    return load_to_run(path, step).model


def load_to_run(path: str | Path, step: int | None = None, *, mesh: Mapping[str, int] | None = None) -> Runner:
    """The model of `load` and how it runs: `load_to_run(path).run(lambda model: model.sample(...))`.

    On one device, or on a mesh of such sizes, `{"fsdp": 4, "tensor": 2}`; of a run in its compute dtype. Raises as
    `load`, and `ValueError` for a mesh that does not fit.
    """
    from artifex.training.restore import pretrained_model, restore_model

    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run folder or a folder of weights")
    if (path / "checkpoints").is_dir():
        return restore_model(path, step, mesh=mesh)
    if step is not None:
        raise ValueError(f"{path} holds weights alone, so there is no step {step}; give the run folder instead")
    return pretrained_model(path, mesh=mesh)


if __name__ == "__main__":
    main()
