"""`python -m artifex.sample RUN_OR_WEIGHTS`: text from a run folder or from a folder of weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from artifex.cli import fail, user_errors


def main(argv: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one line for anything the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m artifex.sample", description="Continue a prompt with a trained model."
    )
    parser.add_argument("path", metavar="RUN_OR_WEIGHTS", type=Path, help="a run folder, or a folder of weights")
    parser.add_argument("--prompt", default="def ", help="text to continue (default: %(default)r)")
    parser.add_argument(
        "--num-tokens", type=int, help="new tokens (default: as many as the model has room for, at most 400)"
    )
    parser.add_argument("--num-samples", type=int, default=1, help="continuations (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="keep the k likeliest tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="keep the likeliest tokens up to this probability (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same text (default: %(default)s)")
    parser.add_argument("--step", type=int, help="checkpoint of a run to sample from (default: the newest)")
    parser.error = fail  # one line, as everywhere
    args = parser.parse_args(argv)
    with user_errors():
        texts = sample(
            args.path,
            args.prompt,
            num_tokens=args.num_tokens,
            num_samples=args.num_samples,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed,
            step=args.step,
        )
    for index, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {index + 1} of {len(texts)}")
        sys.stdout.write(text + "\n")


def sample(
    path: str | Path,
    prompt: str,
    *,
    num_tokens: int | None = None,
    num_samples: int = 1,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """`num_samples` continuations of `prompt`, each with the prompt before it, a pure function of `seed`.

    `path` is a run folder (its newest checkpoint, or `step`) or a folder of weights. `num_tokens` None fills the
    model's sequence length, up to 400. Raises `ValueError` or `FileNotFoundError` for what cannot be sampled.
    """
    import jax
    import numpy as np

    from artifex.data.tokenizers import load_tokenizer

    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; ask for at least 1")
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run folder or a folder of weights")
    model = load(path, step)
    tokenizer = load_tokenizer(path / "tokenizer.json")
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
    return [prompt + tokenizer.decode(row) for row in jax.device_get(drawn)]


def load(path: Path, step: int | None = None) -> Any:
    """The model of a run folder (its average of weights where it keeps one) or of a folder of weights."""
    import jax
    from flax import nnx

    from artifex.config import Config
    from artifex.models.weights import TENSORS, from_pretrained
    from artifex.scaling.checkpoints import Checkpoints

    if (path / TENSORS).exists():
        if step is not None:
            raise ValueError(f"{path} holds weights alone, so there is no step {step}; give the run folder instead")
        return from_pretrained(path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} holds no config.json; expected a run folder or a folder of weights")
    config = Config.from_file(path / "config.json")
    with Checkpoints(path / "checkpoints") as checkpoints:
        if step is None:
            step, _ = checkpoints.newest_restorable()
        if step is None:
            raise FileNotFoundError(f"{path} holds no complete checkpoint yet; train it further first")
        if step not in checkpoints.steps():
            raise ValueError(f"{path} holds no checkpoint of step {step}; it has {checkpoints.steps()}")
        graphdef, state = nnx.split(nnx.eval_shape(lambda: config.model.spec().build(nnx.Rngs(0))))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), nnx.to_pure_dict(state)
        )
        part = "params" if config.training.ema_decay is None else "ema"
        return nnx.merge(graphdef, checkpoints.restore(step, target, under=part))


if __name__ == "__main__":
    main()
