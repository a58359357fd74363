"""Corruption processes: how data x_0 becomes noise, and the times at which a network learns and samples.

    x_t = alpha_t x_0 + sigma_t eps,   eps ~ N(0, I),   t from 0 (data) to 1 (noise)               (1)
    snr_t = alpha_t^2 / sigma_t^2, falling in t                                                    (2)
    dx_t / dt = alpha'_t x_0 + sigma'_t eps                                                        (3)

A process is a value: alpha and sigma elementwise in t, what the network is given for t and x_t, the inverse cumulative
distribution of its training times, and the times that a sampler visits. All in float32.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

INSIDE = 1e-6  # quantiles are kept this far from 0 and 1, where a normal deviate would be infinite


class Process(Protocol):
    """What objectives and samplers ask of a process; `t` may have any shape."""

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data, for EDM's preconditioning and weighting."""
        ...

    def alpha(self, t: jax.Array) -> jax.Array:
        """The signal's factor in equation (1)."""
        ...

    def sigma(self, t: jax.Array) -> jax.Array:
        """The noise's factor in equation (1)."""
        ...

    def network_time(self, t: jax.Array) -> jax.Array:
        """What the network is told for t."""
        ...

    def input_scale(self, t: jax.Array) -> jax.Array:
        """What x_t is multiplied with before the network sees it."""
        ...

    def training_time(self, u: jax.Array) -> jax.Array:
        """The training time at quantile u in (0, 1)."""
        ...

    def times(self, steps: int) -> np.ndarray:
        """The times (steps,) at which a sampler of so many steps starts each of them, falling."""
        ...


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Variance preserving, alpha_t^2 = alpha_bar_i and sigma_t^2 = 1 - alpha_bar_i at t = i / 999, i = 0 ... 999.

    alpha_bar_i = prod_{j <= i} (1 - beta_j), with beta rising evenly from 1e-4 to 0.02 ("linear": Ho et al. 2020,
    arXiv:2006.11239, section 4) or from alpha_bar = cos^2(((i + 1) / 1000 + s) / (1 + s) pi / 2), s = 0.008, with beta
    at most 0.999 ("cosine": Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17). Between table entries
    log alpha_bar is linear. Training times are the 1,000 entries, the network's times their indices.
    """

    betas: Literal["linear", "cosine"] = "linear"
    sigma_data: float = 0.5

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.exp(0.5 * self._log_alpha_bar(t))

    def sigma(self, t: jax.Array) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(self._log_alpha_bar(t)))

    def network_time(self, t: jax.Array) -> jax.Array:
        return 999.0 * t

    def input_scale(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def training_time(self, u: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.floor(1000.0 * u), 999.0) / 999.0

    def times(self, steps: int) -> np.ndarray:
        """The last entry of each of `steps` equal parts of the table: "trailing" spacing, so that the first is 999."""
        if steps > 1_000:
            raise ValueError(f"{steps} sampling steps are more than the 1000 entries of the schedule; ask for fewer")
        return ((np.rint(1_000 - 1_000 / steps * np.arange(steps)) - 1) / 999).astype(np.float32)

    def _log_alpha_bar(self, t: jax.Array) -> jax.Array:
        table = jnp.asarray(log_alpha_bar(self.betas))
        index = 999.0 * t
        # i / 999 * 999 misses i by up to 6e-5, and the cosine table falls by 6.9 over its last entry
        near = jnp.round(index)
        index = index + jax.lax.stop_gradient(jnp.where(jnp.abs(near - index) < 1e-3, near - index, 0.0))
        low = jnp.clip(jnp.floor(jax.lax.stop_gradient(index)), 0.0, 998.0)
        at = low.astype(jnp.int32)
        return table[at] + (index - low) * (table[at + 1] - table[at])


@functools.lru_cache
def log_alpha_bar(betas: Literal["linear", "cosine"]) -> np.ndarray:
    """log alpha_bar_i, (1000,) float32 from sums in float64."""
    if betas == "linear":
        beta = np.linspace(1e-4, 0.02, 1_000)
    else:
        alpha_bar = np.cos((np.arange(1_001) / 1_000 + 0.008) / 1.008 * np.pi / 2) ** 2
        beta = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumsum(np.log1p(-beta)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class EDM:
    """Variance exploding, alpha_t = 1, of Karras et al. 2022 (arXiv:2206.00364).

    sigma_t = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho, so that even steps in t are the grid
    of their equation 5. The network is given c_in x_t and c_noise = ln(sigma) / 4 (table 1); training noise levels are
    log-normal: ln sigma ~ N(mean, deviation^2), cut at sigma_min and sigma_max.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    mean: float = -1.2
    deviation: float = 1.2

    def alpha(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def sigma(self, t: jax.Array) -> jax.Array:
        low, high = self._roots()
        return (low + t * (high - low)) ** self.rho

    def network_time(self, t: jax.Array) -> jax.Array:
        return jnp.log(self.sigma(t)) / 4

    def input_scale(self, t: jax.Array) -> jax.Array:
        return jax.lax.rsqrt(jnp.square(self.sigma(t)) + self.sigma_data**2)

    def training_time(self, u: jax.Array) -> jax.Array:
        low, high = self._roots()
        sigma = jnp.exp(self.mean + self.deviation * ndtri(jnp.clip(u, INSIDE, 1 - INSIDE)))
        return (jnp.clip(sigma, self.sigma_min, self.sigma_max) ** (1 / self.rho) - low) / (high - low)

    def times(self, steps: int) -> np.ndarray:
        """Both ends included: the step after sigma_min goes to clean data, as theirs does."""
        return np.linspace(1, 0, steps, dtype=np.float32)

    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Straight paths, alpha_t = 1 - t and sigma_t = t.

    Lipman et al. 2022 (arXiv:2210.02747), Liu et al. 2022 (arXiv:2209.03003). Training times are uniform, or
    logit-normal: the logistic function of a standard normal deviate (Esser et al. 2024, arXiv:2403.03206, section 3.1),
    whose convention of 1000 t as the network's time this keeps.
    """

    training_times: Literal["uniform", "logit_normal"] = "uniform"
    sigma_data: float = 0.5

    def alpha(self, t: jax.Array) -> jax.Array:
        return 1.0 - t

    def sigma(self, t: jax.Array) -> jax.Array:
        return t

    def network_time(self, t: jax.Array) -> jax.Array:
        return 1000.0 * t

    def input_scale(self, t: jax.Array) -> jax.Array:
        return jnp.ones_like(t)

    def training_time(self, u: jax.Array) -> jax.Array:
        u = jnp.clip(u, INSIDE, 1 - INSIDE)
        return u if self.training_times == "uniform" else jax.nn.sigmoid(ndtri(u))

    def times(self, steps: int) -> np.ndarray:
        return np.linspace(1, 0, steps + 1, dtype=np.float32)[:-1]


def rates(process: Process, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(alpha'_t, sigma'_t) of equation (3)."""
    one = jnp.ones_like(t)
    return jax.jvp(process.alpha, (t,), (one,))[1], jax.jvp(process.sigma, (t,), (one,))[1]


def corrupt(process: Process, x0: jax.Array, eps: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t of equation (1), one time for each example."""
    return per_example(process.alpha(t_B), x0) * x0 + per_example(process.sigma(t_B), x0) * eps


def per_example(value_B: jax.Array, x: jax.Array) -> jax.Array:
    """`value_B` with trailing dims of size 1, up to those of x."""
    return value_B.reshape(value_B.shape + (1,) * (x.ndim - value_B.ndim))
