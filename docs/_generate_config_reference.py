"""Writes configuration.md, beside this file, from the fields of the configuration. Run it after changing one."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

from artifex import models
from artifex.cli import Option, fields_of, kind_of, options, text_of, value_of
from artifex.config import Config, sections
from artifex.config_model import ModelConfig

PAGE = Path(__file__).with_name("configuration.md")
CONFIGS = Path(__file__).parents[1] / "configs"

INTRODUCTION = """\
# Configuration

<!-- Written by docs/_generate_config_reference.py from artifex/config.py. Change those, then run the former. -->

One `Config` describes a run. It has a section for each concern, every field has a default, and the defaults
together are the quickstart. It is given as a file, on the command line, or from Python.

## Files

A configuration is a `.json`, `.yaml` or `.yml` file that holds what differs from the defaults.

```yaml
description: A wider model on two groups of four devices.
model:
  name: minigpt-linear
  embed_dim: 1024
  num_heads: 16
training:
  batch_size: 64
device:
  mesh_shape: [2, 4]
  auto_detect_mesh: false
```

`configs/` has some to start from. `quickstart.yaml` writes out every default; each says in its `description` which
command starts it and what it should reach.

{CONFIGS}

A file is data and nothing more: no part of it is executed, and no other file is read. It has at most 65,536
bytes of UTF-8 text and 16 levels; a key stands once. YAML is read as version 1.2 has it, so `1e-3` is a number
and `no`, `on` and `yes` are words; tags, anchors, aliases and further documents are refused. Types are strict:
`"3"`, `3.0` and `true` are no integers, and nan and infinities, `1e400` among them, are no numbers. An unknown
key is refused with the nearest known one. Every fault is one line that begins with the file and the key:

```text
error: mine.yaml: optimizer.lerning_rate is unknown; did you mean learning_rate?
```

## Command line

```bash
python -m artifex.train configs/linear_config.json --training.steps 500 --device.mesh-shape 2 4 --run-dir runs/wide
```

Every field is an option `--section.field VALUE` or `--section.field=VALUE`, with hyphens or underscores, and
wins over the file. Where a field may be `none`, `none` is how it is typed (`null` in a file). `--print-config`
prints the whole result as YAML, `--dry-run` what it would take, `--help` every option; all answer to the same
file and options as the run would. How [many processes](scaling/processes.md) meet is said on the command line
alone, because it differs between them: `--device.coordinator` and its neighbours. Words of other programs are
answered with ours: `--lr` with `--optimizer.learning-rate`.

| exit code | means |
| --- | --- |
| 0 | the run is done, its weights, scores and curve are made; a reader who left, such as `head`, is no error |
| 2 | something to mend: one line says what. The run's folder is as it was |
| 1 | the run failed: a loss that is not finite, memory, damaged checkpoints, a full disk. What was saved stays |
| 130, 143 | Ctrl-C or SIGTERM (128 + its number) |

A signal before the first step, or while a finished run is scored, ends the program at once, also in the middle of a
compilation. While it trains, the step at hand is finished and saved first; a second signal, a second later, does not
wait for that. The same command goes on, and makes what is missing of a finished run. Where all checkpoints are
damaged, or the folder shows that there were some and they are gone, a run does not start anew by itself:
`--start-anew` does. It renames what is there, and moves the lines of metrics to `metrics.left-1.jsonl`.

Model, data, seed and optimizer of a run stay what they were: a start that changes one of them is refused, by name. So
is another batch size, unless `--other-batch-size` is given: the order of rows does not depend on it, and the run goes
on from the row where it stands.

What XLA logs is not shown; `TF_CPP_MIN_LOG_LEVEL=0` shows it.

## Python

```python
from artifex.config import Config, DeviceConfig

config = Config.from_dict({"model": {"name": "gpt2-nano", "num_layers": 4}, "device": {"mesh_shape": [2, 4]}})
assert config.device.mesh_shape == (2, 4)
config.device = DeviceConfig(data=2, fsdp=-1)
config.optimizer.learning_rate = 1e-3  # checked: -1 would raise
config.model.embed_dim = 256  # a field of the model's family
config.save("mine.yaml")
assert Config.from_file("mine.yaml") == config
```

An assignment checks its section at once and changes nothing where it is refused. What concerns two sections (a
row no longer than the model's sequence, a warm-up within the run, microbatches that divide the batch) is
checked when a `Config` is made and when it is used, or by `config.check()`.
"""

MODEL = """\
A model is the name of a preset and, beside it, whatever fields of its family's configuration are to differ.
They are checked against the family: its fields, their types, and that the sizes fit together.
`python -m artifex.train --model.name NAME --help` prints a preset's own values.
"""


def page() -> str:
    """The page as Markdown."""
    defaults = Config()
    known = options(defaults.model.name)
    introduction = INTRODUCTION.replace("{CONFIGS}", _configs())
    parts = [introduction, "## Fields", _table([option for option in known if len(option.key) == 1], defaults)]
    for key, section in sections().items():
        parts += [f"### {key}", (section.__doc__ or "").splitlines()[0]]
        own = [o for o in known if o.key[0] == key and len(o.key) == 2 and o.key[-1] in section.model_fields]
        parts.append(_table(own, defaults))
        if section is ModelConfig:
            parts.append(MODEL)
            for family in dict.fromkeys(type(spec) for spec in models.PRESETS.values()):
                parts += _family(family)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _configs() -> str:
    """A row for each shipped file: the sentence of its description that follows the command."""
    rows = []
    for path in sorted(CONFIGS.iterdir()):
        what = Config.from_file(path).description.split(": ", 1)[1].split(". ")[0]
        rows.append(f"| `{path.name}` | {_cell(what)} |")
    return "\n".join(["| file | what it trains |", "| --- | --- |", *rows])


def _family(family: type) -> list[str]:
    specs = {name: spec for name, spec in models.PRESETS.items() if type(spec) is family}
    rows, parts = _rows(next(iter(specs.values()))), {}
    for spec in specs.values():  # presets of one family may hold configurations of several kinds
        for field in dataclasses.fields(spec):
            if dataclasses.is_dataclass(part := getattr(spec, field.name)):
                parts.setdefault((field.name, type(part)), part)
    own = {type(spec) for spec in models.PRESETS.values()}
    for field, kind in parts:
        where = f"[{kind.__name__}](#{kind.__name__.lower()})" if kind in own else f"{kind.__name__}, below"
        rows.append(f"| `{field}.` ... | | a field of {where} |")
    tables = [
        f"Fields of `{field}` where it is a {kind.__name__}:\n\n" + "\n".join([*HEAD, *_rows(part)])
        for (field, kind), part in parts.items()
        if kind not in own
    ]
    return [
        f"#### {family.__name__}",
        (inspect.getdoc(family) or "").splitlines()[0],
        f"Presets: {', '.join(f'`{name}`' for name in specs)}.",
        "\n".join([*HEAD, *rows]),
        *tables,
    ]


HEAD = ["| field | values | meaning |", "| --- | --- | --- |"]


def _rows(spec: object) -> list[str]:
    """A row for each plain field of a frozen configuration."""
    found = [option for option in fields_of(spec, ()) if len(option.key) == 1]
    return [f"| `{option.key[0]}` | {_values(option)} | {_cell(option.help)} |" for option in found]


def _table(fields: list[Option], defaults: Config) -> str:
    rows = [
        f"| `{option.key[-1]}` | {_values(option)} | `{text_of(value_of(defaults, option))}` | {_cell(option.help)} |"
        for option in fields
    ]
    return "\n".join(["| field | values | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _values(option: Option) -> str:
    return ", ".join(f"`{kind}`" for kind in kind_of(option.annotation).split("|"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
