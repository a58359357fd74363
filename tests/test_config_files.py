"""Configuration files: the hostile and the hasty are answered in one line, and those we ship say what they should."""

import dataclasses
import os
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from artifex import models
from artifex.cli import fields_of
from artifex.config import Config, DeviceConfig, TrainingConfig, sections
from artifex.config_io import MAX_BYTES, ConfigError
from artifex.models.transformer.config import DecoderConfig

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").iterdir())


def refused_file(path: Path, content: bytes | str) -> str:
    """The error's line, without the file's name at its head."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        Config.from_file(path)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{n}: &{n} [*{p}, *{p}, *{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = {
    "empty json": ("json", "", "is empty"),
    "blank json": ("json", " \n", "is empty"),
    "empty yaml": ("yaml", "", "is empty"),
    "comment": ("yaml", "# nothing\n", "must hold a mapping of sections, got None"),
    "bare document": ("yaml", "---\n", "must hold a mapping of sections, got None"),
    "list json": ("json", "[1, 2]", "must hold a mapping of sections, got [1, 2]"),
    "number yaml": ("yaml", "3", "must hold a mapping of sections, got 3"),
    "text yaml": ("yaml", "training", "must hold a mapping of sections, got 'training'"),
    "latin-1": ("yaml", b"description: \xfc", "is not UTF-8 text: byte 13 is 0xfc"),
    "utf-16": ("json", b"\xff\xfe{\x00}\x00", "is not UTF-8 text: byte 0 is 0xff"),
    "binary": ("yaml", bytes(range(256)), "is not UTF-8 text"),
    "nul": ("json", b"{}\0\0", "is a binary file"),
    "bell": ("yaml", "description: \x07", "is not valid YAML: unacceptable character"),
    "large": ("json", '{"description": "' + "x" * MAX_BYTES + '"}', "is larger than 65536 bytes"),
    "broken json": ("json", '{"training": }', "is not valid JSON: Expecting value at line 1, column 14"),
    "comma json": ("json", '{"training": {},}', "is not valid JSON"),
    "two jsons": ("json", "{} {}", "is not valid JSON: Extra data at line 1, column 4"),
    "broken yaml": ("yaml", "training: {steps: 3\n", "is not valid YAML: expected ',' or '}'"),
    "tab yaml": ("yaml", "training:\n\tsteps: 3\n", "is not valid YAML: found character '\\t'"),
    "huge escape": ("yaml", 'description: "\\UFFFFFFFF"', "is not valid YAML"),
    "huge version": ("yaml", f"%YAML 1.{'9' * 5000}\n---\na: 1", "is not valid YAML"),
    "two documents": ("yaml", "training: {}\n---\ndata: {}\n", "holds more than one YAML document"),
    "twice json": ("json", '{"training": {"steps": 1, "steps": 2}}', "training.steps is given twice"),
    "twice section": ("json", '{"training": {}, "training": {}}', "training is given twice"),
    "twice yaml": ("yaml", "training:\n  steps: 200\n  steps: 300\n", "training.steps is given twice"),
    "twice quoted": ("yaml", "{training: {steps: 200, 'steps': 300}}", "training.steps is given twice"),
    "deep json": ("json", '{"a":' * 3000 + "1" + "}" * 3000, "is nested deeper than 16 levels"),
    "deep open json": ("json", "[" * 3000, "is nested deeper than 16 levels"),
    "deep text json": ("json", '{"description": "' + "[" * 3000 + '"} x', "is not valid JSON: Extra data"),
    "deep flow": ("yaml", "a: " + "[" * 3000 + "]" * 3000, "a.0.0 is nested deeper than 16 levels"),
    "deep block": ("yaml", "- " * 3000 + "x", "0.0.0 is nested deeper than 16 levels"),
    "deep maps": ("yaml", "\n".join(" " * i + "a:" for i in range(300)), "a.a.a is nested deeper than 16 levels"),
    "bomb": ("yaml", BOMB, "a has a YAML anchor or alias ('a') at line 1; write the value out"),
    "loop": ("yaml", "training: &x {steps: *x}", "training has a YAML anchor or alias"),
    "key anchor": ("yaml", "&x training: {}", "has a YAML anchor or alias ('x')"),
    "key alias": ("yaml", "training: {*x : 3}", "training has a YAML anchor or alias ('x')"),
    "merge": ("yaml", "training:\n  <<: {steps: 3}\n", "training.<< is unknown"),
    "tag": ("yaml", "training: {steps: !!int '3'}", "training.steps has a YAML tag ('tag:yaml.org,2002:int')"),
    "key tag": ("yaml", "!!str training: {}", "has a YAML tag"),
    "own tag": ("yaml", "training: !mine {steps: 3}", "training has a YAML tag ('!mine') at line 1"),
    "list as key": ("yaml", "? [training]\n: {}\n", "has a list or mapping as a key at line 1"),
    "number as key": ("yaml", "3: {}", "3 is unknown"),
    "unknown": ("yaml", "optimizer: {lr_schedule: cosine}", "optimizer.lr_schedule is unknown; did you mean schedule?"),
    "line break in key": ("json", '{"a\\nb": 1}', "a\\nb is unknown"),
    "surrogate": ("json", '{"\\ud800": 1}', "must be a valid string"),
    "long key": ("json", '{"' + "k" * 5000 + '": 1}', "k" * 57 + "... is unknown"),
    "nan json": ("json", '{"optimizer": {"eps": NaN}}', "optimizer.eps must be a finite number, got nan"),
    "infinity json": ("json", '{"optimizer": {"eps": -Infinity}}', "optimizer.eps must be a finite number, got -inf"),
    "1e400 json": ("json", '{"optimizer": {"eps": 1e400}}', "optimizer.eps must be a finite number, got inf"),
    "long json": (
        "json",
        '{"training": {"steps": ' + "9" * 5000 + "}}",
        "training.steps must be a valid integer, got inf",
    ),
    "nan yaml": ("yaml", "model: {dropout: .nan}", "model.dropout must be a finite number, got nan"),
    "infinity yaml": (
        "yaml",
        "optimizer: {clip_norm: .inf}",
        "optimizer.clip_norm must be a finite number or null, got inf",
    ),
    "minus infinity yaml": ("yaml", "optimizer: {eps: -.Inf}", "optimizer.eps must be a finite number, got -inf"),
    "1e400 yaml": ("yaml", "optimizer: {eps: 1e400}", "optimizer.eps must be a finite number, got inf"),
    "long yaml": ("yaml", f"training: {{steps: {'9' * 5000}}}", "training.steps must be a valid integer, got inf"),
    "word nan": ("yaml", "optimizer: {eps: nan}", "optimizer.eps must be a valid number, got 'nan'"),
    "negative": (
        "yaml",
        "training: {batch_size: -5}",
        "training.batch_size must be greater than or equal to 1, got -5",
    ),
    "negative size": ("json", '{"model": {"embed_dim": -8}}', "model.embed_dim is -8; it must be at least 1"),
    "empty section": ("yaml", "training:\n", "training must be a section of keys and values, got None"),
    "quoted number": ("yaml", "training: {steps: '300'}", "training.steps must be a valid integer, got '300'"),
    "underscores": ("yaml", "training: {steps: 1_000}", "training.steps must be a valid integer, got '1_000'"),
    "base 60": ("yaml", "training: {steps: 1:30}", "training.steps must be a valid integer, got '1:30'"),
    "yes": ("yaml", "logging: {progress: yes}", "logging.progress must be a valid boolean, got 'yes'"),
    "shape": ("json", '{"device": {"mesh_shape": "2x4"}}', "device.mesh_shape must be a tuple of integers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_answered_in_one_line_that_names_it(name, tmp_path):
    suffix, content, says = HOSTILE[name]
    assert refused_file(tmp_path / f"bad.{suffix}", content).startswith(says)


def test_what_is_no_file_is_answered_in_one_line(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    for name, says in (
        ("none.yaml", "cannot be read: No such file"),
        ("folder.yaml", "is not a regular file"),
        ("pipe.yaml", "is not"),
    ):
        with pytest.raises(ConfigError, match=f"{name}: {says}"):
            Config.from_file(tmp_path / name)
    with pytest.raises(ConfigError, match="File name too long"):
        Config.from_file(tmp_path / f"{'x' * 5000}.yaml")


def test_any_mangled_file_is_read_or_answered_in_one_short_line(tmp_path):
    draw = random.Random(0)
    parts = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b":",
        b"\n",
        b" ",
        b"&a",
        b"*a",
        b"!!x",
        b"%YAML 9.9\n",
        b"---",
        b"...",
        b"|",
        b">",
    ]
    parts += [
        b"\\U",
        b"\\x",
        b"\xff",
        b"\t",
        b"? ",
        b"- ",
        b"1e999",
        b"NaN",
        b"9" * 5000,
        b"\0",
        b"#",
        b"@",
        b"<<",
        b"\\ud83d",
    ]
    for name in CONFIGS:
        whole = (ROOT / "configs" / name).read_bytes()
        for _ in range(80):
            data = bytearray(whole[: draw.choice([40, 400, len(whole)])])
            for _ in range(draw.randrange(1, 5)):
                at = draw.randrange(len(data) + 1)
                data[at : at + draw.choice([0, 0, 9])] = draw.choice(parts) * draw.choice([1, 1, 40])
            path = tmp_path / name
            path.write_bytes(data)
            try:
                Config.from_file(path)
            except ConfigError as error:
                line = str(error)
                plan = "a configuration file ends in" in line  # `device.plan: null` became the name of one
                assert line.startswith(f"{path}: ") or plan
                assert line.isprintable() and len(line) < 1000


OPENED: list[list[str]] = []


def note_opened(event: str, args: tuple) -> None:
    if OPENED and event == "open":
        OPENED[-1].append(str(args[0]))
    if OPENED and event in ("os.system", "subprocess.Popen", "exec", "import"):
        OPENED[-1].append(event)


sys.addaudithook(note_opened)


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system ['touch {0}']",
        "training: !!python/object/new:os.system ['touch {0}']",
        "training: !!python/name:os.system\n",
        "training: !include {1}\n",
        "!include {1}\n",
        "include: {1}\n",
        "description: ${{file:{1}}} {{{{1}}}}\n",
    ],
)
def test_nothing_is_executed_and_no_other_file_is_read(content, tmp_path):
    (tmp_path / "secret.yaml").write_text("training: {steps: 77}")
    path = tmp_path / "bad.yaml"
    path.write_text(content.format(tmp_path / "touched", tmp_path / "secret.yaml"))
    Config.from_file(ROOT / "configs/quickstart.yaml")  # so that Python has loaded the codecs it needs
    OPENED.append([])
    try:
        config = Config.from_file(path)
        assert config.training == TrainingConfig() and config.description.startswith("${file:")
    except ConfigError as error:
        assert "YAML tag" in str(error) or "include is unknown" in str(error)
    finally:
        seen = OPENED.pop()
    assert seen == [str(path)]


def test_yaml_is_read_as_version_1_2_has_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "\ufeffdescription: no\ndata: {source: on}\noptimizer: {learning_rate: 1e-3, eps: 1E-8, clip_norm: ~}\n"
    )
    config = Config.from_file(path)
    assert (config.description, config.data.source) == ("no", "on")
    assert (config.optimizer.learning_rate, config.optimizer.eps, config.optimizer.clip_norm) == (0.001, 1e-8, None)


# The files beside the code


def test_quickstart_is_the_default():
    config = Config.from_file(ROOT / "configs/quickstart.yaml")
    assert {**config.to_dict(), "description": ""} == Config().to_dict()
    written = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    assert {key: list(part) for key, part in written.items() if key in sections()} == {
        key: list(part.model_fields) for key, part in sections().items()
    }


def test_aethers_two_examples_say_what_its_document_says():
    plain = Config.from_file(ROOT / "configs/linear_config.json")
    assert plain.model.name == "minigpt-linear" and plain.model.vocab_size == 50_257
    assert plain.device.mesh_shape is None and plain.device.auto_detect_mesh
    large = Config.from_file(ROOT / "configs/large_model_custom_mesh.json")
    assert (large.model.name, large.model.embed_dim, large.model.vocab_size) == ("minigpt-linear", 1024, 50_257)
    assert large.training.batch_size == 64
    assert large.device == DeviceConfig(mesh_shape=(2, 4), auto_detect_mesh=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_shipped_file_states_its_command(name):
    assert f"python -m artifex.train configs/{name}" in Config.from_file(ROOT / "configs" / name).description


def test_the_reference_page_is_what_its_generator_gives():
    page = runpy.run_path(str(ROOT / "docs/_generate_config_reference.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text() == page, "run python docs/_generate_config_reference.py"
    fields = [field for section in sections().values() for field in section.model_fields]
    fields += [field.name for field in dataclasses.fields(DecoderConfig)]
    assert [field for field in fields if f"\n| `{field}` |" not in page] == []


@pytest.mark.parametrize("preset", models.list_models())
def test_every_field_of_a_preset_is_an_option_with_words_of_its_own(preset):
    assert [option.flag for option in fields_of(models.PRESETS[preset], ("model",)) if not option.help] == []


def test_the_reference_pages_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/configuration.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "configuration.md", "exec"), {})


def test_the_reference_pages_yaml_and_error_are_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/configuration.md").read_text()
    Path("mine.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    assert Config.from_file("mine.yaml").device.mesh_shape == (2, 4)
    Path("mine.yaml").write_text("optimizer: {lerning_rate: 1e-3}")
    with pytest.raises(ConfigError) as caught:
        Config.from_file("mine.yaml")
    assert f"\nerror: {caught.value}\n" in page
