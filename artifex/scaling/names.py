"""The vocabulary of logical axes: what a model may call the dims of its weights and activations, a sentence each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

WEIGHT_AXES: dict[str, str] = {
    "vocab": "entries of a token table or of an output head",
    "embed": "the width of the residual stream, as weights read and write it",
    "heads": "query heads",
    "kv_heads": "key and value heads; fewer than query heads under grouped-query attention",
    "head_dim": "the features of one head",
    "mlp": "the hidden width of a feed-forward layer",
    "experts": "the experts of a mixture",
    "expert_mlp": "the hidden width of one expert",
    "layers": "repeated blocks, stacked",
    "positions": "entries of a learned position table",
    "conv_in": "input channels of a convolution",
    "conv_out": "output channels of a convolution",
    "conv_hidden": "channels between the two convolutions of a residual block",
    "kernel": "a spatial extent of a convolution's window",
    "latent": "channels of an autoencoder's latent",
    "codes": "entries of a codebook",
    "classes": "entries of a class-label table",
    "frequencies": "sinusoids that a diffusion time is turned into",
    "condition": "the width of a conditioning vector made of time, class or text",
    "modulation": "the shifts, scales and gates that a conditioning vector makes",
    "context": "the width of the conditioning sequence, such as embedded text",
    "in_features": "inputs of a linear layer of the user's own",
    "out_features": "outputs of a linear layer of the user's own",
}
ACTIVATION_AXES: dict[str, str] = {
    "batch": "examples",
    "sequence": "positions in a sequence",
    "hidden": "the residual stream",
    "act_heads": "query heads of an activation",
    "act_kv_heads": "key and value heads of an activation",
    "act_mlp": "the hidden width inside a feed-forward layer",
    "act_vocab": "logits",
    "act_experts": "experts of a routed activation",
    "height": "rows of an image or latent",
    "width": "columns of an image or latent",
    "channels": "channels of an image or latent",
    "act_channels": "channels that a convolution computes, or sums over, each device its own",
}
VOCABULARY: dict[str, str] = WEIGHT_AXES | ACTIVATION_AXES
"""Every logical axis, with a sentence. Weights and activations never share a name: FSDP splits `embed` of a weight over
the devices that also split `batch` of an activation, so one shared name would ask for one mesh axis twice."""

SHARED_BY_STRATEGIES = frozenset({"batch", "sequence"})
"""Names that several strategies may split together: data parallelism and FSDP both divide the examples, context
parallelism and tensor parallelism the positions."""

Names = Sequence[str | None]


def check_name(name: str, known: Iterable[str] = VOCABULARY) -> str:
    """Return `name`, or raise `ValueError` with the nearest known one."""
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"unknown logical axis {name!r}: {hint}")


def check_names(names: Names, shape: Sequence[int], what: str = "tensor") -> None:
    """Raise `ValueError` unless `names` has one known name (or None) for each dim of `shape`."""
    for name in names:
        if name is not None:
            check_name(name)
    if len(names) != len(shape):
        raise ValueError(
            f"{what} of shape {tuple(shape)} has {len(shape)} dims but {len(names)} logical axes {tuple(names)}; "
            "give one name, or None, for each dim"
        )
