"""The same decoder by KerasHub on JAX, with our parameters, by way of a checkpoint in the layout of `transformers`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from artifex.models.transformer.config import DecoderConfig
from artifex.models.weights import save_pretrained

os.environ["KERAS_BACKEND"] = "jax"


def make_step(
    cfg: DecoderConfig, params: Any, tokens: np.ndarray, targets: np.ndarray, rate: float, adamw: dict[str, float]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """One training step as a call that returns the loss, and the loss alone. In float32."""
    import keras
    import keras_hub

    ours = cfg.build(nnx.Rngs(0))
    nnx.update(ours, params)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, ours, layout="huggingface")
        backbone = keras_hub.models.LlamaBackbone.from_preset(folder)
    logits_BTV = backbone.token_embedding(backbone.output, reverse=True)
    model = keras.Model(backbone.input, logits_BTV)
    optimizer = keras.optimizers.AdamW(
        rate, adamw["weight_decay"], beta_1=adamw["b1"], beta_2=adamw["b2"], epsilon=adamw["eps"]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=True)
    given = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return lambda: float(model.train_on_batch(given, targets)), lambda: float(model.test_on_batch(given, targets))
