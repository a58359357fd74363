"""What the backward pass of a repeated block finds kept, fetches from the host, or computes again, by name.

A model marks what may be kept by `jax.ad_checkpoint.checkpoint_name(x, name)`, with a name of `RESIDUALS`. A setting is
text: "none" keeps everything, "full" keeps the stream between blocks alone, "dots" also every matrix product and the
output of attention, and "qkv=keep,block=offload" what it says, the rest as "full". Importing this imports no JAX.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

RESIDUALS: dict[str, str] = {
    "qkv": "queries, keys and values, as attention takes them",
    "attention": "the output of attention before its projection, and what its own backward pass needs besides",
    "hidden": "the products that a feed-forward layer's activation reads",
    "branch": "what a layer adds to the stream: where it is kept, no sum over tensor devices is taken again",
    "block": "the stream between blocks, from which the rest is computed again",
}
"""What a setting may name, a sentence each."""

SHORT = ("none", "dots", "full")
FATES = ("keep", "offload", "recompute")


def canonical(setting: str | Mapping[str, str]) -> str:
    """The one text of a setting, given as text or as a mapping from name to fate.

    Raises `ValueError` for an unknown name or fate, a name given twice, and for "block=recompute": there would be
    nothing to compute it from.
    """
    if isinstance(setting, str) and setting in SHORT:
        return setting
    fates = _fates(setting)
    return ",".join(f"{name}={fates[name]}" for name in RESIDUALS if fates.get(name, "recompute") != "recompute") or (
        "full"
    )


def offloaded(setting: str) -> tuple[str, ...]:
    """What a setting sends to the host."""
    return () if setting in SHORT else tuple(name for name, fate in _fates(setting).items() if fate == "offload")


def policy(setting: str) -> Callable[..., Any] | None:
    """The policy of `jax.checkpoint` for a setting other than "none"; None recomputes all."""
    import jax

    if setting == "full":
        return None
    policies = jax.checkpoint_policies
    if setting == "dots":
        return policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _keeping(("attention",)))
    fates = _fates(setting)
    kept = tuple(name for name, fate in fates.items() if fate == "keep")
    away = offloaded(setting)
    if not away:
        return _keeping(kept)
    by_name = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept),
        names_which_can_be_offloaded=list(away),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return policies.save_from_both_policies(by_name, _fused) if "attention" in kept else by_name


def _keeping(names: tuple[str, ...]) -> Callable[..., Any]:
    import jax

    by_name = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint_policies.save_from_both_policies(by_name, _fused) if "attention" in names else by_name


def _fused(prim: Any, *_: Any, **__: Any) -> bool:
    """Whether this is cuDNN's attention: its logsumexp has no name, and the output's alone would not do."""
    return prim.name == "dot_product_attention_fwd_wrapper"


def _fates(setting: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(setting, str):
        pairs = [part.strip().partition("=")[::2] for part in setting.split(",")]
    else:
        pairs = list(setting.items())
    fates: dict[str, str] = {}
    for name, fate in pairs:
        if name not in RESIDUALS:
            near = difflib.get_close_matches(name, [*SHORT, *RESIDUALS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"name some of {', '.join(RESIDUALS)}"
            raise ValueError(
                f"remat {setting!r} has {name!r}; expected none, dots, full, or pairs such as qkv=keep: {hint}"
            )
        if fate not in FATES:
            raise ValueError(f"remat says {name}={fate!r}; choose keep, offload or recompute")
        if name in fates:
            raise ValueError(f"remat {setting!r} names {name!r} twice; name it once")
        fates[name] = fate
    if fates.get("block") == "recompute":
        raise ValueError(
            "remat says block=recompute, but the stream between blocks is what the rest is computed again from; keep "
            "or offload it"
        )
    return fates
