"""The configuration of a run: sections of checked values, from code, dicts and JSON or YAML files.

    config = Config.from_file("configs/quickstart.yaml")
    config.device.mesh_shape = (2, 4)
    config.save("mine.json")

The defaults are the quickstart. Importing this module imports no JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from artifex.config_collectives import CollectivesConfig
from artifex.config_device import DeviceConfig
from artifex.config_io import (
    ConfigError,
    ConfigTypeError,
    dump_yaml,
    read_mapping,
    shown,
    write_mapping,
)
from artifex.config_logging import LoggingConfig
from artifex.config_model import ModelConfig
from artifex.config_plan import with_plan
from artifex.config_section import Int, Section
from artifex.scaling.remat import canonical


class DataConfig(Section):
    """What the model reads."""

    source: str = Field(
        default="stdlib",
        min_length=1,
        description="text: 'stdlib', 'package:NAME' (an installed one's Python sources), a file, a folder or a .npy of "
        "tokens; images: 'digits', a folder of PNG or JPEG, .npz, .npy, IDX, CIFAR's binary files or a saved Hugging "
        "Face data set",
    )
    tokenizer: str = Field(
        default="bytes", description="'bytes', 'bpe' (trained on the training files), or a tokenizer .json file"
    )
    bpe_vocab_size: Int = Field(default=4_096, ge=257, description="entries of a trained 'bpe' tokenizer, at least 257")
    sequence_length: Int = Field(default=256, ge=1, description="tokens a row, at most the model's sequence_length")
    validation_fraction: float = Field(
        default=0.05,
        gt=0,
        lt=1,
        description="part of the files or images never trained on, above 0 and below 1; chosen by a hash",
    )
    flip: bool = Field(default=False, description="images: mirror every other one, left to right")
    crop: Int = Field(default=0, ge=0, description="images: pixels of padding that a random crop takes away again")
    corrupt: Literal["refuse", "skip"] = Field(
        default="refuse", description="images: what to do with files that cannot be read; skipped ones are counted"
    )
    cache_latents: bool = Field(
        default=False,
        description="latent diffusion: encode every image once, to the run's cache folder, instead of in every step",
    )
    classes: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="images: the classes to learn, numbered anew from 0 in this order; none keeps all",
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_as_tuple(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and len(set(map(str, value))) < len(value):
            raise ConfigError(f"names a class twice: {shown(tuple(value))}")
        return tuple(value) if isinstance(value, list) else value

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        if value not in ("bytes", "bpe") and not value.endswith(".json"):
            raise ConfigError(f"must be 'bytes', 'bpe' or a tokenizer .json file, got {shown(value)}")
        return value


class TrainingConfig(Section):
    """How long, how much at a time, and in which precision."""

    steps: Int = Field(default=1_200, ge=1, description="optimizer steps in the whole run, at least 1")
    batch_size: Int = Field(default=16, ge=1, description="rows a step, over all devices, at least 1")
    gradient_accumulation: Int = Field(default=1, ge=1, description="microbatches a step; divides batch_size")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of parameters, batches and dropout, 0 to 2^32 - 1")
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="folder with the weights that a new run begins with: a run, one step of it, weights of ours, of "
        "transformers or of diffusers; none begins with random ones",
    )
    start_from_partial: bool = Field(
        default=False, description="leave fresh, and list, what start_from lacks or has in another shape"
    )
    start_from_rows: bool = Field(
        default=False,
        description="with start_from_partial: where only the vocabulary has another size, take the rows of the tokens "
        "that both have, which must have the same ids",
    )
    freeze: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="parameters that stay as they are, by patterns of their paths, as in 'embed/*,norm/*'",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of the parameters between steps; in bfloat16 an update below 1/256 of a weight is rounded away",
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of activations, and of parameters where they are multiplied"
    )
    gradient_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of gradients as microbatches add them up and the optimizer takes them"
    )
    reduce_dtype: Literal["float32"] | None = Field(
        default=None,
        description="of sums across devices of the products of linear maps and of the head; none leaves it to the "
        "compiler, which takes compute_dtype",
    )
    remat: str = Field(
        default="none",
        description="what a layer's backward pass computes again: none, dots (all but matrix products and attention), "
        "full, or what is kept by name, as in 'qkv=keep,block=offload'",
    )
    unroll: Annotated[Int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="layers run per scan iteration, at least 1; 'auto': all of up to 16 on one CPU device, else 1",
    )
    attention: Literal["auto", "tiles", "blockwise", "splash", "cudnn"] = Field(
        default="auto",
        description="how attention is computed; 'auto': splash on a TPU, cudnn on a GPU for what it takes, tiles on "
        "one CPU device, else blockwise",
    )
    spill_threshold_mb: float | None = Field(
        default=None,
        ge=0,
        description="optimizer state and averages whose part on a device has so many MB lie in the host's memory "
        "between updates; 0: all, none: nothing does; not on CPUs",
    )
    compile_cache: str = Field(
        default="run",
        min_length=1,
        description="where compiled programs are kept for the next start: 'run', the run's cache folder; 'off'; or a "
        "folder that runs of this user share",
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="of a running mean of parameters and codebooks, 0 to 1; none is off"
    )
    not_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="at a loss or gradient that is not finite: end the run, or leave the step out, say so and count it",
    )
    skips_in_a_row: Int = Field(
        default=5, ge=1, description="steps in a row that are skipped so; one more ends the run; at least 1"
    )
    validate_every: Int = Field(
        default=200, ge=0, description="steps from one validation to the next; 0 validates at the end alone"
    )
    validation_batches: Int = Field(
        default=20,
        ge=1,
        description="batches of each validation but the last, spread over what is held out; at least 1",
    )
    final_validation_batches: Int | None = Field(
        default=None, ge=1, description="batches of the last validation; none is all that is held out"
    )
    sample_tokens: Int = Field(default=400, ge=0, description="tokens drawn at each checkpoint, to look at; 0 is none")
    sample_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="what the sample continues, not empty; none: 'def ' for the source 'stdlib', else how the held-out "
        "text begins",
    )
    sample_images: Int = Field(
        default=40, ge=0, description="images drawn at each checkpoint, to look at, the same draw; 0 is none"
    )
    score_images: Int = Field(
        default=500,
        ge=0,
        description="images drawn at the end and scored by a classifier of the held-out ones, if they have labels; 0 "
        "is none",
    )

    @field_validator("remat", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A mapping from name to fate may stand for the text."""
        if not isinstance(value, str | dict):
            return value
        try:
            return canonical(value)
        except ValueError as error:
            raise ConfigError(str(error).removeprefix("remat ")) from None

    @field_validator("freeze", mode="before")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        """One pattern may stand alone; a list, as files have it, is a tuple."""
        return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _something_to_be_partial_about(self) -> Self:
        if self.start_from_partial and self.start_from is None:
            raise ConfigError("is true without start_from; name the folder, or leave it false", ("start_from_partial",))
        if self.start_from_rows and not self.start_from_partial:
            raise ConfigError("is true without start_from_partial; set that too", ("start_from_rows",))
        return self


class OptimizerConfig(Section):
    """The update rule and its schedule."""

    name: Literal["adamw", "lion", "adafactor", "muon", "sgd"] = Field(default="muon", description="update rule")
    learning_rate: float = Field(default=1e-2, gt=0, description="the highest of the schedule, above 0")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="linear", description="of the learning rate, after warm-up"
    )
    warmup_steps: Int = Field(default=40, ge=0, description="steps of linear warm-up, 0 to training.steps")
    final_learning_rate_fraction: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="of learning_rate, reached at the last step of 'cosine' and 'linear', 0 to 1",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="of matrices, times the learning rate, a step; at least 0"
    )
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment, from 0 to below 1")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment, from 0 to below 1")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator, above 0")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="of 'muon' and 'sgd', from 0 to below 1")
    clip_norm: float | None = Field(
        default=1.0, gt=0, description="largest norm of the whole gradient, above 0; none is off"
    )


class CheckpointConfig(Section):
    """When the run is saved, and how much of it is kept."""

    every: Int = Field(default=400, ge=0, description="steps from one checkpoint to the next; 0 saves at the end alone")
    keep: Int = Field(default=3, ge=1, description="checkpoints kept, the newest, at least 1")
    keep_every: Int = Field(
        default=0, ge=0, description="checkpoints of steps that this divides are kept for good; 0: none"
    )
    keep_best: Int = Field(
        default=0,
        ge=0,
        description="checkpoints kept besides: those whose validation had the lowest best_metric, of equal ones the "
        "earlier; 0: none",
    )
    best_metric: str = Field(
        default="loss", min_length=1, description="of a validation, as metrics.jsonl calls it; lower is better"
    )
    on_failure: Literal["stop", "go_on"] = Field(
        default="stop", description="where one cannot be saved: end the run, or say so and go on to the next"
    )


ABOUT: dict[tuple[str, str], Literal["text", "images"]] = {
    **dict.fromkeys([("data", field) for field in ("tokenizer", "bpe_vocab_size", "sequence_length")], "text"),
    **dict.fromkeys([("training", field) for field in ("sample_tokens", "sample_prompt")], "text"),
    **dict.fromkeys([("data", field) for field in ("flip", "crop", "corrupt", "cache_latents", "classes")], "images"),
    **dict.fromkeys([("training", field) for field in ("sample_images", "score_images")], "images"),
}
"""Fields that only a model of text or only one of images makes use of."""


class Config(Section):
    """One run. Equal configurations, seeds and versions make equal runs."""

    description: str = Field(
        default="", description="what the run is for, the command that starts it and what it should reach"
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    device: DeviceConfig = Field(default_factory=DeviceConfig)
    collectives: CollectivesConfig = Field(default_factory=CollectivesConfig)

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**with_plan(values))
        self.check()

    def check(self) -> None:
        """Raise `ConfigError` where two sections contradict each other.

        Done when a `Config` is made. Not when a field is assigned, so that two can be changed one after the other.
        """
        if (reads := self.model.reads) == "text":
            longest = self.model.spec().sequence_length
            _check_most("data.sequence_length", self.data.sequence_length, "model.sequence_length", longest)
            if self.data.tokenizer == "bpe":
                ids = self.model.spec().vocab_size
                _check_most("data.bpe_vocab_size", self.data.bpe_vocab_size, "model.vocab_size", ids)
        elif self.data.source == "stdlib" or self.data.source.startswith("package:"):
            raise ConfigError(f"must be images for {self.model.name!r}, such as 'digits', got text", ("data", "source"))
        for (section, field), of in ABOUT.items():
            default = type(getattr(self, section)).model_fields[field].default
            if of != reads and getattr(getattr(self, section), field) != default:
                says = f"is about {of}, but {self.model.name!r} learns from {reads}; leave it at {shown(default)}"
                raise ConfigError(says, (section, field))
        if self.data.cache_latents and getattr(self.model.spec(), "autoencoder", None) is None:
            says = f"is about latents, but {self.model.name!r} has no autoencoder; leave it at false"
            raise ConfigError(says, ("data", "cache_latents"))
        if self.data.cache_latents and self.data.crop:
            says = f"must be 0 with data.cache_latents, got {self.data.crop}: each shift of an image has other latents"
            raise ConfigError(says, ("data", "crop"))
        if self.checkpoint.keep_best and not self._validates_what_it_saves():
            says = (
                f"judges by validations, but steps are saved every {self.checkpoint.every} and validated every "
                f"{self.training.validate_every}; make checkpoint.every a multiple of training.validate_every"
            )
            raise ConfigError(says, ("checkpoint", "keep_best"))
        _check_most("optimizer.warmup_steps", self.optimizer.warmup_steps, "training.steps", self.training.steps)
        if self.training.batch_size % (parts := self.training.gradient_accumulation):
            says = f"must divide training.batch_size {self.training.batch_size}, got {parts}"
            raise ConfigError(says, ("training", "gradient_accumulation"))

    def _validates_what_it_saves(self) -> bool:
        every, validate = self.checkpoint.every, self.training.validate_every
        return bool(every and validate) and every % validate == 0

    @classmethod
    def known_keys(cls) -> list[str]:
        """The sections, and every field by its full path."""
        nested = (f"{key}.{field}" for key, section in sections().items() for field in section.model_fields)
        return [*cls.model_fields, *nested]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "") -> Self:
        """Sections and fields that are left out have their defaults; `source` heads the error's line."""
        try:
            if not isinstance(values, Mapping):
                raise ConfigTypeError(f"must be a mapping of sections, got {shown(values)}", ("configuration",))
            _check_keys(values, ("configuration",))
            for key, section in values.items():
                if isinstance(section, Mapping):
                    _check_keys(section, (key,))
            return cls(**values)
        except ConfigError as error:
            raise error.within(source=source) from None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a `.json`, `.yaml` or `.yml` file. Every fault is a `ConfigError` that names the file."""
        return cls.from_dict(read_mapping(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values by section; `from_dict` of it is equal to this."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """YAML text that `from_file` reads."""
        return dump_yaml(self.to_dict())

    def save(self, path: str | Path) -> None:
        """Write a `.json`, `.yaml` or `.yml` file that `from_file` reads."""
        write_mapping(path, self.to_dict())


def sections() -> dict[str, type[Section]]:
    """Key -> class of each section of `Config`, in order."""
    found = {key: field.annotation for key, field in Config.model_fields.items()}
    return {key: kind for key, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _check_keys(values: Mapping[Any, Any], key: tuple[str, ...]) -> None:
    for name in values:
        if not isinstance(name, str):
            raise ConfigTypeError(f"must have text as keys, got {shown(name)}", key)


def _check_most(name: str, value: int, limit_name: str, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"must be at most {limit_name} {limit}, got {value}", tuple(name.split(".")))
