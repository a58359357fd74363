"""Greedy decoding with a cache: ours, bare JAX, and `generate` of `transformers` in PyTorch, in turn.

Prints for each batch size how many tokens agree with ours: they must all, in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import bare
import jax
import jax.numpy as jnp
import numpy as np
import report
import setups
from flax import nnx
from workers import Built, Variant


def main() -> None:
    args = setups.parser(__doc__).parse_args()
    setup = setups.chosen(args)
    sizes = [args.batch] if args.batch else [1, 8]
    report.finish(args, (compare(dataclasses.replace(setup, batch=rows), args) for rows in sizes))


def compare(setup: setups.Setup, args: argparse.Namespace) -> report.Record:
    """Time all variants on one batch."""
    variants = {"ours": Variant(ours, (setup,)), "bare JAX": setups.bare(bare_jax, setup)}
    variants |= setups.in_torch(args, pytorch, (setup,))
    variants |= setups.against(args, variants["ours"])
    name = f"generation, {setup.batch} row{'s' * (setup.batch > 1)}"
    work, tolerance = setup.batch * setup.new_tokens, 0 if setup.dtype == "float32" else 1
    return report.compared(name, variants, args.rounds, work=work, unit="tokens", tolerance=tolerance)


def our_model(setup: setups.Setup) -> tuple[Any, Any]:
    """The model and its parameters, the same in every process."""
    model = setup.decoder.build(nnx.Rngs(0))
    params = jax.tree.map(lambda value: value.astype(setup.dtype), nnx.to_pure_dict(nnx.state(model)))
    nnx.update(model, params)
    return model, params


def prompt(setup: setups.Setup) -> np.ndarray:
    """Random tokens, int32 (batch, prompt)."""
    shape = (setup.batch, setup.prompt)
    return np.random.default_rng(0).integers(0, setup.decoder.vocab_size, shape, dtype=np.int32)


def ours(setup: setups.Setup) -> Built:
    (model, _), key, prompt_BP = our_model(setup), jax.random.key(0), jnp.asarray(prompt(setup))
    return built(lambda: model.sample(key, prompt=prompt_BP, num_tokens=setup.new_tokens, temperature=0))


def bare_jax(setup: setups.Setup) -> Built:
    cfg, matrices, prompt_BP = (
        setup.decoder,
        bare.from_model(our_model(setup)[1], join=True),
        jnp.asarray(prompt(setup)),
    )
    how = {"num_tokens": setup.new_tokens, "heads": cfg.num_heads, "head_dim": cfg.per_head}
    return built(lambda: bare.generate(matrices, prompt_BP, **how))


def pytorch(setup: setups.Setup, compiled: bool) -> Built:
    import pytorch

    model = pytorch.build(setup.decoder, bare.from_model(our_model(setup)[1], join=True))
    return built(pytorch.make_generate(model, prompt(setup), setup.new_tokens, setup.dtype, compiled=compiled))


def built(call: Callable[[], Any]) -> Built:
    return Built(call, {"tokens": np.asarray(call()).ravel().tolist()})


if __name__ == "__main__":
    main()
