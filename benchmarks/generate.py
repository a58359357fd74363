"""Greedy decoding with a cache: ours, bare JAX, and `generate` of `transformers` in PyTorch, in turn.

Prints for each batch size how many tokens agree with ours: they must all, in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import bare
import interleave
import jax
import jax.numpy as jnp
import numpy as np
import setups
from flax import nnx


def main() -> None:
    args = setups.parser(__doc__).parse_args()
    setup = setups.chosen(args)
    for rows in [args.batch] if args.batch else [1, 8]:
        compare(dataclasses.replace(setup, batch=rows), args.rounds, args.torch)


def compare(setup: setups.Setup, rounds: int, with_torch: bool) -> None:
    """Time all variants on one batch."""
    cfg, new = setup.decoder, setup.new_tokens
    model = cfg.build(nnx.Rngs(0))
    params = jax.tree.map(lambda value: value.astype(setup.dtype), nnx.to_pure_dict(nnx.state(model)))
    nnx.update(model, params)
    matrices = bare.from_model(params, join=True)
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, (setup.batch, setup.prompt), dtype=np.int32)
    prompt_BP, key = jnp.asarray(prompt), jax.random.key(0)
    heads: dict[str, Any] = {"heads": cfg.num_heads, "head_dim": cfg.per_head}
    calls = {
        "ours": lambda: model.sample(key, prompt=prompt_BP, num_tokens=new, temperature=0),
        "bare JAX": lambda: bare.generate(matrices, prompt_BP, num_tokens=new, **heads),
    }
    if with_torch:
        import pytorch

        calls["PyTorch"] = pytorch.make_generate(pytorch.build(cfg, matrices), prompt, new, setup.dtype)

    print(f"batch {setup.batch}, {setup.prompt} + {new} tokens")
    tokens = {name: np.asarray(call()) for name, call in calls.items()}
    seconds = interleave.interleave(calls, rounds)
    print(interleave.table(seconds, setup.batch * new, "tokens"))
    for rival in list(calls)[1:]:
        print(interleave.ratio(seconds, "ours", rival))
        print(f"{100 * np.mean(tokens[rival] == tokens['ours']):.1f} % of the tokens of {rival} are ours")


if __name__ == "__main__":
    main()
