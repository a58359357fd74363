"""The diffusion model's configuration and presets. Imports no JAX, so that configuration errors answer at once."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from artifex.models.diffusion.networks import DIT, UNET, DiTConfig, MMDiTConfig, UNetConfig

if TYPE_CHECKING:
    from flax import nnx

    from artifex.models.diffusion.model import Diffusion

TRAINING_TIMES: dict[str, tuple[str, ...]] = {
    "ddpm_linear": ("uniform",),
    "ddpm_cosine": ("uniform",),
    "edm": ("log_normal",),
    "flow": ("uniform", "logit_normal"),
}

DRAWN_VALUES = 2**22  # pixels times channels that are drawn at once; activations are some 1,000 times as many


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """A network, the process it undoes, what it predicts and how samples are drawn.

    A network with twice as many channels out as in learns the variance of the ancestral step: `variance.py`. With an
    autoencoder the network works on its latents. Raises `ValueError` for parts that do not fit together.
    """

    network: UNetConfig | DiTConfig | MMDiTConfig = UNET["unet-digits"]  # what predicts: UNet, DiT or MMDiT
    process: Literal["ddpm_linear", "ddpm_cosine", "edm", "flow"] = "flow"  # how data becomes noise
    prediction: Literal["x0", "eps", "v", "velocity", "edm"] = "velocity"  # what the network puts out
    weighting: Literal["simple", "min_snr", "edm"] = "simple"  # of squared errors over time
    training_times: Literal["uniform", "logit_normal", "log_normal"] = "uniform"  # how times are drawn in training
    sigma_data: float = 0.5  # standard deviation of the data, which the process, prediction and weighting "edm" expect
    sampler: Literal["ddpm", "ddim", "euler", "heun", "dpm_solver_pp_2m"] = "heun"  # how noise becomes data
    sampling_steps: int = 20  # steps of the sampler; heun calls the network twice a step, the others once
    guidance: float = 1.0  # classifier-free guidance while sampling; 1: none, above 1: sharper than the data
    condition_dropout: float = 0.1  # share of examples trained without their label or text, which guidance needs
    levels: int | None = None  # values a channel of the data takes, for the bound of a learned variance; none: any
    autoencoder: Any = None  # configuration of the frozen autoencoder of a latent model; none: works on pixels
    autoencoder_weights: str = ""  # folder that training starts the frozen autoencoder from

    reads: ClassVar[Literal["text", "images"]] = "images"

    def __post_init__(self) -> None:
        self._check_corruption()
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps is {self.sampling_steps}; it must be at least 1")
        if self.process.startswith("ddpm") and self.sampling_steps > 1_000:
            raise ValueError(f"sampling_steps is {self.sampling_steps}; {self.process} has 1000, ask for at most those")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout {self.condition_dropout} is not in [0, 1)")
        if self.guidance != 1:
            if not (0 <= self.guidance < float("inf")):
                raise ValueError(f"guidance is {self.guidance}; expected 1 for none, or a number from 0 up")
            if not self.conditional:
                raise ValueError(f"guidance is {self.guidance} but the network has no classes; set it to 1")
            if not self.condition_dropout:
                raise ValueError(
                    f"guidance is {self.guidance} but with condition_dropout 0 the network never learns to do without "
                    "a condition; set condition_dropout above 0, or guidance to 1"
                )
        self._check_network()

    def _check_corruption(self) -> None:
        if self.process not in TRAINING_TIMES:
            raise ValueError(f"process {self.process!r} is unknown; choose among {', '.join(TRAINING_TIMES)}")
        if self.training_times not in (fitting := TRAINING_TIMES[self.process]):
            raise ValueError(
                f"training_times {self.training_times!r} does not go with process {self.process!r}; "
                f"choose {' or '.join(map(repr, fitting))}"
            )
        if self.process == "flow" and self.prediction == "eps":
            raise ValueError(
                "prediction 'eps' says nothing of the data at t = 1 of process 'flow', which is noise alone; "
                "choose 'velocity', 'v' or 'x0'"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data {self.sigma_data} is not positive")
        if self.sigma_data != 0.5 and "edm" not in (self.process, self.prediction, self.weighting):
            raise ValueError(
                f"sigma_data {self.sigma_data} has no effect without an 'edm' process, prediction or weighting; leave "
                "it at 0.5"
            )

    def _check_network(self) -> None:
        net = self.network
        if net.out_channels not in (net.in_channels, 2 * net.in_channels):
            raise ValueError(
                f"network puts out {net.out_channels} channels for {net.in_channels}; expected as many, or twice as "
                "many where a variance stands beside the prediction"
            )
        if self.learns_variance and not self.process.startswith("ddpm"):
            raise ValueError(
                f"network puts out a variance behind its prediction, which process {self.process!r} has no use for; "
                f"choose process 'ddpm_linear' or 'ddpm_cosine', or network.out_channels {net.in_channels}"
            )
        if self.levels is not None:
            if not self.learns_variance or self.autoencoder is not None:
                raise ValueError(
                    f"levels {self.levels} has no effect but on the bound of a learned variance over pixels; leave it "
                    "out"
                )
            if self.levels < 2:
                raise ValueError(f"levels is {self.levels}; a channel takes at least 2 values")
        if self.autoencoder is None:
            if self.autoencoder_weights:
                raise ValueError(f"autoencoder_weights {self.autoencoder_weights!r} have no autoencoder; give one")
            return
        if not hasattr(self.autoencoder, "latent_channels"):
            raise ValueError(f"autoencoder is {self.autoencoder!r}; expected an autoencoder's configuration")
        latent = (self.autoencoder.latent_size, self.autoencoder.latent_channels)
        if (net.image_size, net.in_channels) != latent:
            raise ValueError(
                f"network takes {net.image_size} x {net.image_size} x {net.in_channels}, but the autoencoder's latents "
                f"are {latent[0]} x {latent[0]} x {latent[1]}; make them equal"
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the network puts out a variance behind its prediction."""
        return self.network.out_channels > self.network.in_channels

    @property
    def draws_at_once(self) -> int:
        """Images that are drawn together: of 32 x 32 x 3 pixels 1,024, of 256 x 256 x 3 16.

        Samples do not depend on the devices, so neither does it; it is a power of two, which most meshes divide.
        """
        fitting = max(DRAWN_VALUES // (self.image_size**2 * self.channels), 1)
        return min(max(1 << (fitting.bit_length() - 1), 8), 1024)

    @property
    def image_size(self) -> int:
        """Height and width of the data in pixels."""
        return (self.autoencoder or self.network).image_size

    @property
    def channels(self) -> int:
        """Channels of the data."""
        return self.network.in_channels if self.autoencoder is None else self.autoencoder.channels

    @property
    def num_classes(self) -> int:
        """Classes that it is conditioned on; 0: none."""
        return self.network.num_classes

    @property
    def conditional(self) -> bool:
        """Whether it is conditioned on labels or on text."""
        return self.num_classes > 0 or isinstance(self.network, MMDiTConfig)

    def build(self, rngs: nnx.Rngs) -> Diffusion:
        """The model with fresh parameters."""
        from artifex.models.diffusion.model import Diffusion

        return Diffusion(self, rngs=rngs)


_DDPM: dict = {"process": "ddpm_linear", "prediction": "eps", "sampler": "ddpm"}
_IDDPM: dict = {**_DDPM, "process": "ddpm_cosine"}
_FLOW_DIGITS: dict = {"training_times": "logit_normal", "guidance": 2.0}
_EDM: dict = {"process": "edm", "prediction": "edm", "weighting": "edm", "training_times": "log_normal"}

PRESETS: dict[str, DiffusionConfig] = {
    # Ho et al. 2020 (arXiv:2006.11239)
    "ddpm-cifar": DiffusionConfig(network=UNET["ddpm-cifar"], sampling_steps=1_000, **_DDPM),
    # Peebles and Xie 2022 (arXiv:2212.09748), on 32 x 32 x 4 latents of 256 x 256 images
    **{
        name: DiffusionConfig(network=DIT[name], sampling_steps=250, guidance=1.5, **_DDPM)
        for name in ("dit-s2", "dit-b2", "dit-l2", "dit-xl2")
    },
    "unet-digits": DiffusionConfig(network=UNET["unet-digits"], **_FLOW_DIGITS),
    "dit-digits": DiffusionConfig(network=DIT["dit-digits"], **_FLOW_DIGITS),
    # Nichol and Dhariwal 2021 (arXiv:2102.09672): a learned variance over the cosine schedule, few ancestral steps
    "iddpm-digits": DiffusionConfig(network=UNET["iddpm-digits"], sampling_steps=50, guidance=2.0, levels=17, **_IDDPM),
    # Karras et al. 2022 (arXiv:2206.00364): 18 steps of Heun
    "edm-digits": DiffusionConfig(
        network=UNET["unet-digits"], sampling_steps=18, guidance=2.0, sigma_data=0.75, **_EDM
    ),
}
