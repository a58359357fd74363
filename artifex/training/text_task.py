"""Learning from text: windows of tokens, bits per byte, a continued prompt to look at."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from artifex.config import Config
from artifex.data.batches import Batches, validation_batches
from artifex.data.text import TextCorpus, load_text
from artifex.data.tokenizers import REPLACEMENT, save_tokenizer
from artifex.scaling.processes import by_first, fetched, is_first
from artifex.training.run_folder import RunFolder
from artifex.training.task import Batch, Metrics, Score

PROMPT = 40  # characters of the held-out text that a prompt has at most


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A corpus for a model of tokens."""

    config: Config
    corpus: TextCorpus
    noun: str = "tokens"
    shift: int = 0

    @classmethod
    def open(cls, config: Config, folder: RunFolder) -> TextTask:
        """Read the configured text. Raises `ValueError` for a source that is none, for text shorter than a window, and
        for a vocabulary too small."""
        corpus = load_text(
            config.data.source,
            tokenizer=config.data.tokenizer,
            bpe_vocab_size=config.data.bpe_vocab_size,
            validation_fraction=config.data.validation_fraction,
            cache_dir=folder.cache,
        )
        rows = config.model.spec().vocab_size
        if corpus.vocab_size > rows:
            raise ValueError(
                f"model.vocab_size is {rows}, but data.tokenizer {config.data.tokenizer!r} has {corpus.vocab_size} "
                f"tokens; set model.vocab_size to at least {corpus.vocab_size}"
            )
        task = cls(config, corpus)
        task.windows()  # a text shorter than one is refused here
        return task

    @property
    def per_step(self) -> int:
        """Targets of one step."""
        return self.config.training.batch_size * self.config.data.sequence_length

    def batches(self, start: int, part: tuple[int, int] = (0, 1)) -> Any:
        """Windows in the order of (seed, step)."""
        return self.windows(part).stream(start)

    def windows(self, part: tuple[int, int] = (0, 1)) -> Batches:
        """Every training batch, by its step."""
        return Batches(
            self.corpus.train,
            batch_size=self.config.training.batch_size,
            sequence_length=self.config.data.sequence_length,
            seed=self.config.training.seed,
            vocab_size=self.corpus.vocab_size,
            shift=self.shift,
            process_index=part[0],
            process_count=part[1],
        )

    def validation(self, count: int | None, part: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """Windows spread over the held-out files, `count` batches of them; None: each held-out token but the first."""
        return validation_batches(
            self.corpus.validation,
            batch_size=self.config.training.batch_size,
            sequence_length=self.config.data.sequence_length,
            count=count,
            vocab_size=self.corpus.vocab_size,
            process_index=part[0],
            process_count=part[1],
        )

    def score(self, metrics: Metrics) -> Score:
        """Bits per byte where the bytes of a token are known, else bits per token."""
        field, known = "nats" if "nats" in metrics else "loss", self.corpus.bytes_per_token["validation"]
        if known:
            return Score(field, 1 / math.log(2) / known, "bits per byte")
        return Score(field, 1 / math.log(2), "bits per token")

    @property
    def prompt(self) -> str:
        """What samples continue: as configured, or how the held-out text begins, up to a word's end."""
        if self.config.training.sample_prompt is not None:
            return self.config.training.sample_prompt
        if self.corpus.source == "stdlib":
            return "def "
        text = self.corpus.tokenizer.decode(self.corpus.validation[: 4 * PROMPT]).rstrip(REPLACEMENT)
        if self.corpus.validation_files[0].endswith("]"):  # the end of a file that was cut, anywhere
            text = next((rest for mark in "\n " if (rest := text.partition(mark)[2].strip())), text)
        line = text.strip().partition("\n")[0][:PROMPT]
        return line.rpartition(" ")[0] or line or "\n"

    @by_first
    def save_beside(self, folder: str | Path) -> None:
        """The tokenizer, and the prompt."""
        save_tokenizer(self.corpus.tokenizer, Path(folder) / RunFolder.TOKENIZER)
        (Path(folder) / RunFolder.PROMPT).write_text(self.prompt, encoding="utf-8")

    def look(self, model: Any, folder: RunFolder, step: int) -> None:
        """A continuation of the prompt."""
        text = self.continuation(model)
        if is_first():
            folder.sample(step, ".txt").write_text(text, encoding="utf-8")

    def continuation(self, model: Any) -> str:
        """The prompt and what the model makes of it; empty where no room is left for new tokens."""
        cfg, tokenizer = self.config.training, self.corpus.tokenizer
        prompt = tokenizer.encode(self.prompt)[None]
        room = min(cfg.sample_tokens, self.config.model.spec().sequence_length - prompt.shape[1])
        if room < 1:
            return ""
        drawn = model.sample(jax.random.key(cfg.seed), prompt=prompt, num_tokens=room, temperature=0.7, top_p=0.95)
        return self.prompt + tokenizer.decode(fetched(drawn)[0])

    def conclude(self, model: Any, folder: RunFolder, step: int) -> tuple[Metrics, list[str]]:
        """The last sample, and the command that draws more."""
        if not is_first():
            return {}, []
        text = folder.sample(step, ".txt").read_text(encoding="utf-8").rstrip()
        command = f"python -m artifex.sample {folder.path} --prompt {shlex.quote(self.prompt)}"
        return {}, ([f"\n{text}\n"] if text else []) + [f"sample from it:  {command}"]
