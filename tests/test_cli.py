"""The command line: every field is an option, what is typed is what is configured, and a mistake is one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from artifex import models
from artifex.cli import fail, options, parse_train, user_errors
from artifex.config import Config, sections
from artifex.config_aliases import ALIASES
from artifex.config_io import nearest
from artifex.models.transformer.config import DecoderConfig

ROOT = Path(__file__).parents[1]


def config_of(*argv: str) -> Config:
    return parse_train(list(argv)).config


@pytest.fixture
def refused(capsys):
    """Runs a command line that must end with exit code 2; returns the one line on stderr, without "error: "."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse_train(list(argv))
        out, err = capsys.readouterr()
        assert caught.value.code == 2 and out == ""
        assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable()
        return err[len("error: ") : -1]

    return run


@pytest.fixture
def help_page(capsys, monkeypatch):
    """Runs a command line that must print help and end with exit code 0; returns the page, 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            parse_train(list(argv))
        out, err = capsys.readouterr()
        assert caught.value.code == 0 and err == ""
        return out

    return run


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_no_words_are_the_quickstart():
    command = parse_train([])
    assert command.config == Config() and command.run_dir == Path("runs/quickstart")
    assert not command.print_config and not command.dry_run


def test_the_processs_own_words_are_read_where_none_are_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--training.seed", "7", "--dry-run"])
    command = parse_train()
    assert command.config.training.seed == 7 and command.dry_run


def test_options_win_over_the_file_and_the_file_over_defaults(file):
    mine = file("training: {seed: 1, steps: 300}\ndevice: {data: 2}\n")
    config = config_of(mine, "--training.seed", "2")
    assert (config.training.seed, config.training.steps, config.device.data) == (2, 300, 2)
    assert config.training.batch_size == Config().training.batch_size


def test_the_run_folder_is_named_after_the_file_unless_given(file):
    mine = file("{}")
    assert parse_train([mine]).run_dir == Path("runs/mine")
    assert parse_train([mine, "--run-dir", "elsewhere/one"]).run_dir == Path("elsewhere/one")
    assert parse_train(["--run_dir=there"]).run_dir == Path("there")


@pytest.mark.parametrize(
    "words",
    [
        ["--device.mesh-shape", "2", "4", "FILE"],
        ["--device.mesh_shape", "2", "4", "FILE"],
        ["FILE", "--device.mesh-shape=2,4"],
        ["--device.mesh-shape", "2,4", "FILE"],
        ["--device.mesh-shape", "2", "4", "--print-config", "FILE"],
    ],
)
def test_a_mesh_shape_is_typed_in_any_of_these_ways_and_leaves_the_file_alone(words, file):
    mine = file("training: {seed: 5}")
    config = config_of(*[mine if word == "FILE" else word for word in words])
    assert config.device.mesh_shape == (2, 4) and config.training.seed == 5


@pytest.mark.parametrize(
    ("words", "section", "field", "value"),
    [
        ("--device.data=2", "device", "data", 2),
        ("--device.fsdp 2", "device", "fsdp", 2),
        ("--device.tensor -1", "device", "tensor", -1),
        ("--device.fsdp_min_weight_size 4096", "device", "fsdp_min_weight_size", 4096),
        ("--optimizer.clip-norm none", "optimizer", "clip_norm", None),
        ("--optimizer.clip-norm=null", "optimizer", "clip_norm", None),
        ("--device.mesh-shape none", "device", "mesh_shape", None),
        ("--logging.progress false", "logging", "progress", False),
        ("--device.auto-detect-mesh=true", "device", "auto_detect_mesh", True),
        ("--training.remat none", "training", "remat", "none"),
        ("--training.unroll auto", "training", "unroll", "auto"),
        ("--training.unroll 3", "training", "unroll", 3),
        ("--training.ema-decay .999", "training", "ema_decay", 0.999),
        ("--optimizer.learning-rate 1e-3", "optimizer", "learning_rate", 0.001),
        ("--optimizer.weight-decay 0", "optimizer", "weight_decay", 0.0),
        ("--data.source 2024", "data", "source", "2024"),
        ("--data.source null", "data", "source", "null"),
        ("--data.source=--odd=name", "data", "source", "--odd=name"),
    ],
)
def test_a_value_is_read_as_its_field_takes_it(words, section, field, value):
    read = getattr(getattr(config_of(*words.split()), section), field)
    assert read == value and type(read) is type(value)


def test_the_models_fields_are_those_of_the_chosen_preset(file):
    assert config_of("--model.num-layers", "4", "--model.name", "gpt2-nano").model.spec() == models.preset(
        "gpt2-nano", num_layers=4
    )
    mine = file("model: {name: minigpt-linear, embed_dim: 1024}")
    assert config_of("--model.tied_head=false", mine).model.spec() == models.preset(
        "minigpt-linear", embed_dim=1024, tied_head=False
    )
    assert config_of(mine, "--model.name=gpt2-nano").model.spec() == models.preset("gpt2-nano", embed_dim=1024)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--training.step 5", "--training.step is unknown; did you mean --training.steps?"),
        ("--steps 5", "--steps is unknown; did you mean --training.steps?"),
        ("--lr 1e-3", "--lr is unknown; did you mean --optimizer.learning-rate?"),
        ("--optimizer.lr 1e-3", "--optimizer.lr is unknown; did you mean --optimizer.learning-rate?"),
        ("--block_size 5", "--block-size is unknown; did you mean --data.sequence-length?"),
        ("--data a.txt", "--data is unknown; did you mean --data.source?"),
        ("--out here", "--out is unknown; did you mean --run-dir?"),
        ("--dryrun x", "--dryrun is unknown; did you mean --dry-run?"),
        ("--qqq 5", "--qqq is unknown; python -m artifex.train --help lists the options"),
        ("-x 5", "-x is unknown; python -m artifex.train --help lists the options"),
        ("--model.name gpt2-nan", "model.name 'gpt2-nan' is unknown; did you mean gpt2-nano?"),
        ("--model.num-layer 4", "--model.num-layer is unknown; did you mean --model.num-layers?"),
        ("--model.embed-dim -8", "model.embed_dim is -8; it must be at least 1"),
        ("--training.steps", "--training.steps needs a value, as in --training.steps=VALUE"),
        ("--training.steps --dry-run", "--training.steps needs a value, as in --training.steps=VALUE"),
        ("--training.steps 5 6", "training.steps takes one value, got 5 6"),
        ("--training.steps 300 --training.steps=300", "--training.steps is given twice; keep one of them"),
        ("--dry-run=yes", "--dry-run takes no value, got 'yes'"),
        ("--run-dir=", "--run-dir is empty; name a folder"),
        ("--training.steps=", "training.steps must be a valid integer, got ''"),
        ("--optimizer.clip-norm=", "optimizer.clip_norm must be a valid number or null, got ''"),
        ("--training.steps many", "training.steps must be a valid integer, got 'many'"),
        ("--training.steps 3.0", "training.steps must be a valid integer, got 3.0"),
        ("--training.steps -5", "training.steps must be greater than or equal to 1, got -5"),
        ("--optimizer.learning-rate nan", "optimizer.learning_rate must be a valid number, got 'nan'"),
        ("--optimizer.learning-rate .nan", "optimizer.learning_rate must be a finite number, got nan"),
        ("--optimizer.learning-rate 1e400", "optimizer.learning_rate must be a finite number, got inf"),
        ("--optimizer.learning-rate -1e-3", "optimizer.learning_rate must be greater than 0, got -0.001"),
        ("--logging.progress yes", "logging.progress must be a valid boolean, got 'yes'"),
        ("--device.mesh-shape 2x4", "device.mesh_shape must be a tuple of integers"),
        ("--device.mesh-shape 2.0,4", "device.mesh_shape must be a tuple of integers"),
        ("--device.mesh-shape 0 4", "device.mesh_shape must be at least 1 on both axes, got (0, 4)"),
        ("--device.mesh-shape 8", "device.mesh_shape must have two axes, (batch, model), got (8,)"),
        (
            "--device.mesh-shape 2 4 --device.data 2",
            "device.mesh_shape (2, 4) stands beside data 2; give the shape or the sizes",
        ),
        ("--training.steps 30", "optimizer.warmup_steps must be at most training.steps 30, got 40"),
        ("one.yaml two.yaml", "there can be one CONFIG, got one.yaml and two.yaml"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_with_the_key_and_the_nearest(words, says, refused):
    assert refused(*words.split()) == f"command line: {says}"


def test_every_alias_is_of_a_key_that_is_there_and_is_none_itself():
    known = {".".join(option.key) for name in ("llama-nano", "dit-digits") for option in options(name)} | {"run_dir"}
    assert set(ALIASES) <= known
    words = [alias for aliases in ALIASES.values() for alias in aliases.split()]
    assert len(words) == len(set(words)) and not known & set(words)
    for key, aliases in ALIASES.items():
        assert {nearest(alias, ["other", key]) for alias in aliases.split()} == {key}


def test_an_alias_in_a_file_is_answered_as_well(file, refused):
    assert refused(file("optimizer: {lr: 1e-3}")).endswith("optimizer.lr is unknown; did you mean learning_rate?")
    assert refused(file("lr: 1e-3")).endswith("lr is unknown; did you mean optimizer.learning_rate?")


def test_an_error_names_whoever_made_it(file, refused):
    bad = file("training: {steps: 0}\n")
    assert refused(bad, "--training.seed", "1") == f"{bad}: training.steps must be greater than or equal to 1, got 0"
    assert config_of(bad, "--training.steps", "300").training.steps == 300
    good = file("optimizer: {warmup_steps: 150}\n")
    assert refused(good, "--training.steps", "120").startswith("command line: optimizer.warmup_steps must be at most")
    assert refused(good, "--data.source=").startswith("command line: data.source must")
    assert refused(file("model: {name: gpt5}")).endswith("mine.yaml: model.name 'gpt5' is unknown; did you mean gpt2?")
    assert refused(file("model: 3"), "--model.bias=true").endswith(
        "mine.yaml: model must be a section of keys and values, got 3"
    )


def test_a_file_that_cannot_be_used_is_one_line(file, refused):
    assert refused("missing.yaml") == "missing.yaml: cannot be read: No such file or directory"
    assert refused("setup.toml") == "setup.toml: a configuration file ends in .json, .yaml, .yml"
    assert refused("").endswith(": a configuration file ends in .json, .yaml, .yml")
    assert refused("line\nbreak\udcff.yaml") == r"line\nbreak\udcff.yaml: cannot be read: No such file or directory"
    assert refused(file("!!python/object/apply:os.system [exit]"), "--help").endswith("at line 1; plain values only")


def test_help_lists_every_option_with_its_kind_default_and_description(help_page):
    page = help_page("-h")
    assert help_page("--help") == page
    flat = " ".join(page.split())
    for key, section in sections().items():
        assert f"\n\n{key}: " in page
        for name, field in section.model_fields.items():
            assert f"  --{key}.{name} ".replace("_", "-") in page
            assert field.description is not None and field.description in flat
    for name in (field.name for field in dataclasses.fields(DecoderConfig)):
        assert f"  --model.{name} ".replace("_", "-") in page
    for line in (
        "--training.steps INT optimizer steps in the whole run, at least 1 (default: 1200)",
        "--optimizer.name adamw|lion|adafactor|muon|sgd update rule (default: muon)",
        "--optimizer.clip-norm FLOAT|none largest norm of the whole gradient, above 0; none is off (default: 1.0)",
        "--training.unroll INT|auto layers run per scan iteration, at least 1; 'auto': all of up to 16 on one CPU "
        "device, else 1 (default: auto)",
        "--logging.progress true|false show a progress bar (default: true)",
        "--model.head-dim INT|none features of a head; none: embed_dim / num_heads (default: none)",
        "--description TEXT what the run is for, the command that starts it and what it should reach (default: '')",
    ):
        assert line in flat
    assert "--device.mesh-shape INT INT|none (batch, model)" in flat
    assert all(flag in page for flag in ("--run-dir PATH", "--start-anew", "--print-config", "--dry-run", "--help"))


def test_help_fits_the_terminal_up_to_100_columns(help_page, monkeypatch):
    for columns, widest in (("300", 100), ("100", 100), ("90", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(len(line) for line in help_page("--help").splitlines()[1:]) <= min(int(columns), widest)


def test_help_shows_the_values_of_the_file_and_the_fields_of_the_named_model(help_page, file):
    mine = file("training: {steps: 777}\nmodel: {name: gpt2, embed_dim: 1536}\n")
    page = " ".join(help_page(mine, "--training.seed", "9", "--help").split())
    assert (
        "at least 1 (default: 777)" in page
        and "--model.embed-dim INT width of the residual stream (default: 1536)" in page
    )
    assert "0 to 2^32 - 1 (default: 0)" in page
    assert "--model.num-layers INT blocks (default: 48)" in " ".join(
        help_page("--model.name=gpt2-xl", "--help").split()
    )


@pytest.mark.parametrize("name", [None, "quickstart.yaml", "linear_config.json", "large_model_custom_mesh.json"])
def test_a_printed_configuration_can_be_given_back(name, tmp_path):
    words = [] if name is None else [str(ROOT / "configs" / name)]
    command = parse_train([*words, "--optimizer.clip-norm", "none", "--print-config"])
    assert command.print_config
    (tmp_path / "again.yaml").write_text(command.config.to_yaml())
    assert config_of(str(tmp_path / "again.yaml")) == command.config
    assert yaml.safe_load(command.config.to_yaml())["optimizer"]["clip_norm"] is None


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("mesh (2, 4) needs 8 devices,\n4 are present"), "mesh (2, 4) needs 8 devices, 4 are present"),
        (ImportError("the digits need scikit-learn"), "the digits need scikit-learn"),
        (FileNotFoundError(2, "No such file or directory", "x.npy"), "[Errno 2] No such file or directory: 'x.npy'"),
    ],
)
def test_what_a_user_can_mend_ends_with_one_line_and_code_2(error, line, capsys):
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.code == 2 and capsys.readouterr().err == f"error: {line}\n"
    with pytest.raises(SystemExit) as caught:
        fail(str(error))
    assert caught.value.code == 2


def test_what_a_user_cannot_mend_keeps_its_traceback():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("ours")


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 0), (["--print-config"], 0), (["--trainig.steps=1"], 2), (["nowhere.yaml"], 2)]
)
def test_answers_import_no_jax(words, code):
    script = (
        "import sys\n"
        "from artifex.cli import parse_train\n"
        "try:\n"
        "    parse_train(sys.argv[1:])\n"
        "    code = 0\n"
        "except SystemExit as done:\n"
        "    code = done.code\n"
        "slow = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == (code == 2)
