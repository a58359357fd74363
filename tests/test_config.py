"""The configuration in Python: what is refused, in which words, and that nothing is lost on the way to a file."""

import copy
import dataclasses
import json
import pickle

import pytest
import yaml

from artifex import models
from artifex.config import Config, DeviceConfig, ModelConfig, OptimizerConfig, TrainingConfig, sections
from artifex.config_io import ConfigError


def refused(values, source="") -> str:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(values, source=source)
    return str(caught.value)


# Aether's promises


def test_a_configuration_without_a_device_section_detects_the_mesh():
    for config in (Config(), Config.from_dict({}), Config.from_dict({"training": {"steps": 200}})):
        assert config.device.mesh_shape is None and config.device.auto_detect_mesh is True


def test_mesh_shape_is_a_tuple_however_it_was_given():
    config = Config.from_dict({"device": {"mesh_shape": [2, 4], "auto_detect_mesh": False}})
    assert config.device.mesh_shape == (2, 4) and config.device.auto_detect_mesh is False
    config.device = DeviceConfig(mesh_shape=(1, 8), auto_detect_mesh=False)
    assert config.device.mesh_shape == (1, 8)
    config.device.mesh_shape = [4, 2]  # pyright: ignore[reportAttributeAccessIssue]
    assert config.device.mesh_shape == (4, 2)
    assert config.to_dict()["device"]["mesh_shape"] == (4, 2)


@pytest.mark.parametrize("shape", ["2x4", "", 8, 2.0, True, (2.0, 4), (True, 4), ("2", "4"), (None, 4), {2: 4}, {2, 4}])
def test_what_is_no_tuple_of_integers_is_a_type_error_word_for_word(shape):
    config = Config()
    with pytest.raises(TypeError) as made:
        DeviceConfig(mesh_shape=shape)
    with pytest.raises(TypeError) as assigned:
        config.device.mesh_shape = shape
    assert str(made.value) == str(assigned.value) == "mesh_shape must be a tuple of integers"
    assert refused({"device": {"mesh_shape": shape}}) == "device.mesh_shape must be a tuple of integers"
    assert config == Config()


@pytest.mark.parametrize("shape", [(0, 4), (2, -4), (-2, -4), (), (8,), (2, 2, 2)])
def test_zeros_negatives_and_wrong_ranks_are_value_errors_that_show_the_shape(shape):
    with pytest.raises(ValueError, match=r"^mesh_shape must (be at least 1 on both axes|have two axes)") as caught:
        DeviceConfig(mesh_shape=shape)
    assert not isinstance(caught.value, TypeError) and str(caught.value).endswith(f"got {shape}")


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": -1}, {"tensor": 2, "data": 2}])
def test_a_shape_and_strategy_sizes_exclude_each_other(sizes):
    assert "give the shape or the sizes" in refused({"device": {"mesh_shape": [2, 4], **sizes}})
    device = Config.from_dict({"device": sizes}).device
    before = device.model_copy()
    with pytest.raises(ValueError, match=r"^mesh_shape \(2, 4\) stands beside"):
        device.mesh_shape = (2, 4)
    assert device == before


@pytest.mark.parametrize("name", ["data", "fsdp", "tensor"])
def test_a_strategy_size_is_a_positive_integer_or_minus_one(name):
    assert getattr(Config.from_dict({"device": {name: -1}}).device, name) == -1
    for size in (0, -2, 2.0, "2", True, None):
        assert refused({"device": {name: size}}).startswith(f"device.{name} must be")


def test_one_size_at_most_takes_the_rest():
    assert refused({"device": {"data": -1, "fsdp": -1}}).startswith("device.data is -1, and so is fsdp")


# Every field


FIELDS = [(key, name, field) for key, part in sections().items() for name, field in part.model_fields.items()]
INTEGERS = [(key, name) for key, name, field in FIELDS if field.annotation is int]
NUMBERS = [(key, name) for key, name, field in FIELDS if field.annotation in (float, float | None)]


@pytest.mark.parametrize(("section", "field"), INTEGERS)
def test_no_integer_field_takes_what_is_no_integer_in_range(section, field):
    for value in ("3", True, 3.0, 3.5, None, float("inf"), float("nan"), [3], {}, 2**40, -5):
        assert refused({section: {field: value}}).startswith(f"{section}.{field} must be")


@pytest.mark.parametrize(("section", "field"), NUMBERS)
def test_no_number_field_takes_what_is_no_finite_number_in_range(section, field):
    for value in ("1", True, float("inf"), float("nan"), [0.5], -1.0):
        assert refused({section: {field: value}}).startswith(f"{section}.{field} must be")


def test_every_field_says_what_it_is():
    assert all(field.description for _, _, field in FIELDS)


@pytest.mark.parametrize(
    ("section", "field", "lowest", "below"),
    [
        ("training", "steps", 100, 0),
        ("training", "unroll", 1, 0),
        ("training", "sample_tokens", 0, -1),
        ("training", "validate_every", 0, -1),
        ("training", "seed", 0, -1),
        ("checkpoint", "every", 0, -1),
        ("checkpoint", "keep", 1, 0),
        ("optimizer", "warmup_steps", 0, -1),
        ("optimizer", "weight_decay", 0.0, -0.1),
        ("optimizer", "final_learning_rate_fraction", 0.0, -0.1),
        ("optimizer", "learning_rate", 1e-30, 0.0),
        ("optimizer", "clip_norm", 1e-30, 0.0),
        ("data", "validation_fraction", 1e-3, 0.0),
    ],
)
def test_a_range_begins_where_its_description_says(section, field, lowest, below):
    made = Config.from_dict({section: {field: lowest}})
    assert getattr(getattr(made, section), field) == lowest
    assert f"got {below!r}" in refused({section: {field: below}})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"trainig": {}}, "trainig is unknown; did you mean training?"),
        ({"steps": 5}, "steps is unknown; did you mean training.steps?"),
        (
            {"qqq": 1},
            "qqq is unknown; known are description, model, data, training, optimizer, checkpoint, logging, device, "
            "collectives",
        ),
        ({"optimizer": {"lerning_rate": 1}}, "optimizer.lerning_rate is unknown; did you mean learning_rate?"),
        ({"optimizer": {"name": "adam"}}, "got 'adam'; did you mean adamw?"),
        (
            {"training": {"unroll": "atuo"}},
            "training.unroll must be a valid integer or 'auto', got 'atuo'; did you mean auto?",
        ),
        ({"optimizer": {"clip_norm": "off"}}, "optimizer.clip_norm must be a valid number or null, got 'off'"),
        ({"device": None}, "device must be a section of keys and values, got None"),
        ({"device": [2, 4]}, "device must be a section of keys and values, got [2, 4]"),
        ({"data": {"source": ""}}, "data.source must have at least 1 character, got ''"),
        (
            {"data": {"tokenizer": "byte"}},
            "data.tokenizer must be 'bytes', 'bpe' or a tokenizer .json file, got 'byte'",
        ),
        ({1: {}}, "configuration must have text as keys, got 1"),
        ({"device": {2: 4}}, "device must have text as keys, got 2"),
        ([], "configuration must be a mapping of sections, got []"),
    ],
)
def test_an_error_names_key_path_fault_and_nearest_key(values, says):
    line = refused(values, source="run.json")
    assert line.startswith("run.json: ") and line.endswith(says)


def test_half_a_surrogate_pair_is_no_text():
    assert "valid string" in refused({"\ud800": 1})
    assert "data.source must be a valid string" in refused({"data": {"source": "\ud800"}})


def test_a_refused_assignment_names_the_field_and_changes_nothing():
    config = Config()
    for section, field, value in (
        ("optimizer", "learning_rate", -1.0),
        ("training", "steps", "9"),
        ("device", "fspd", 2),
    ):
        with pytest.raises(ConfigError, match=rf"^{field} "):
            setattr(getattr(config, section), field, value)
    with pytest.raises(ConfigError, match=r"^device must be a section"):
        config.device = OptimizerConfig()  # pyright: ignore[reportAttributeAccessIssue]
    assert config == Config()


def test_sections_of_one_configuration_are_not_those_of_another():
    first, second = Config(), Config()
    first.training.steps = 9_000
    assert second.training.steps == TrainingConfig().steps != 9_000


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data": {"sequence_length": 257}}, "data.sequence_length must be at most model.sequence_length 256, got 257"),
        ({"training": {"steps": 30}}, "optimizer.warmup_steps must be at most training.steps 30, got 40"),
        (
            {"training": {"batch_size": 16, "gradient_accumulation": 3}},
            "training.gradient_accumulation must divide training.batch_size 16, got 3",
        ),
    ],
)
def test_contradictions_between_sections_are_found_when_made_and_when_checked(values, says):
    assert refused(values) == says
    config = Config()
    for section, fields in values.items():
        for field, value in fields.items():
            setattr(getattr(config, section), field, value)  # one may be changed after the other
    with pytest.raises(ConfigError) as caught:
        config.check()
    assert str(caught.value) == says


# The model


def test_overrides_replace_the_presets_fields():
    config = Config.from_dict({"model": {"name": "minigpt-linear", "embed_dim": 1024, "num_heads": 16}})
    assert config.model.spec() == dataclasses.replace(models.PRESETS["minigpt-linear"], embed_dim=1024, num_heads=16)
    assert config.model.embed_dim == 1024 and config.model.vocab_size == 50_257
    config.model.dropout = 0
    assert config.model.spec().dropout == 0.0 and isinstance(config.model.dropout, float)
    assert config.to_dict()["model"] == {"name": "minigpt-linear", "embed_dim": 1024, "num_heads": 16, "dropout": 0.0}


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"name": "minigpt-liner"}, "model.name 'minigpt-liner' is unknown; did you mean minigpt-linear?"),
        ({"name": 3}, "model.name must be a valid string, got 3"),
        ({"embd_dim": 3}, "model.embd_dim is not a field of 'llama-nano'; did you mean embed_dim?"),
        ({"embed_dim": "3"}, "model.embed_dim must be a valid integer, got '3'"),
        ({"embed_dim": 128.0}, "model.embed_dim must be a valid integer, got 128.0"),
        ({"embed_dim": True}, "model.embed_dim must be a valid integer, got True"),
        ({"embed_dim": [128]}, "model.embed_dim must be a valid integer, got (128,)"),
        ({"embed_dim": 2**31}, "model.embed_dim must be at most 2147483647, got 2147483648"),
        ({"mlp_dim": "big"}, "model.mlp_dim must be a valid integer or null, got 'big'"),
        ({"bias": 1}, "model.bias must be a valid boolean, got 1"),
        ({"norm": "rms"}, "model.norm must be 'rmsnorm' or 'layernorm', got 'rms'; did you mean rmsnorm?"),
        ({"norm_eps": float("nan")}, "model.norm_eps must be a finite number, got nan"),
        ({"num_layers": -1}, "model.num_layers is -1; it must be at least 1"),
        ({"num_kv_heads": 3}, "each key head serves the same number of query heads"),
    ],
)
def test_overrides_are_checked_against_the_family(section, says):
    assert refused({"model": section}).endswith(says) and refused({"model": section}).startswith("model.")


def test_a_models_assignments_are_checked_and_a_refused_one_changes_nothing():
    model = ModelConfig(name="gpt2-nano", num_kv_heads=2)
    for field, value in (("name", "gpt3"), ("name", "gpt2-xl"), ("num_heads", 3), ("num_layers", 2.0), ("layers", 2)):
        with pytest.raises(ConfigError):  # gpt2-xl has 25 heads, which 2 key heads cannot serve
            setattr(model, field, value)
        assert model == ModelConfig(name="gpt2-nano", num_kv_heads=2)
    model.name = "llama-mini"
    assert model.spec() == dataclasses.replace(models.PRESETS["llama-mini"], num_kv_heads=2)
    with pytest.raises(AttributeError, match="no field 'num_layer'; did you mean num_layers"):
        model.num_layer  # noqa: B018


def test_a_family_may_hold_tuples(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Pyramid:
        channels: tuple[int, ...] = (1, 2)

    monkeypatch.setitem(models.PRESETS, "pyramid", Pyramid())
    assert ModelConfig.model_validate({"name": "pyramid", "channels": [3, 4, 5]}).spec() == Pyramid((3, 4, 5))
    with pytest.raises(ConfigError, match="channels must be a valid integer, got 'x'"):
        ModelConfig(**{"name": "pyramid", "channels": [3, "x"]})


# Round trips


WRITTEN = [
    {},
    {"device": {"mesh_shape": [2, 4], "auto_detect_mesh": False}},
    {"device": {"data": 2, "fsdp": -1, "fsdp_min_weight_size": 4096}},
    {"model": {"name": "minigpt-linear", "embed_dim": 1024, "num_heads": 16, "mlp_dim": None, "dropout": 0}},
    {"optimizer": {"learning_rate": 1e-20, "eps": 1.2345678901234567e-8, "clip_norm": None}, "training": {"unroll": 2}},
]
TEXTS = [
    "1e-3",
    "3",
    "no",
    "null",
    "~",
    ".inf",
    "0o17",
    "2001-01-01",
    "- a",
    "a: b",
    "x # y",
    "!tag",
    "*a",
    "<<",
    " pad ",
]
TEXTS += ["two\nlines\n", "tab\t", "\u00fc \u4e2d \U0001f600", "\x07\x85\u2028", "%d", "'\"\\", "word " * 60]


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("values", [*WRITTEN, *({"description": text, "data": {"source": text}} for text in TEXTS)])
def test_nothing_is_lost_in_a_dict_or_a_file(values, suffix, tmp_path):
    config = Config.from_dict(values)
    assert Config.from_dict(config.to_dict()) == config
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    config.save(tmp_path / f"config.{suffix}")
    again = Config.from_file(tmp_path / f"config.{suffix}")
    assert again == config and type(again.device.mesh_shape) is type(config.device.mesh_shape)


@pytest.mark.parametrize("text", TEXTS)
def test_saved_files_mean_the_same_to_other_readers(text, tmp_path):
    config = Config.from_dict({"description": text, "device": {"mesh_shape": [2, 4]}})
    config.save(tmp_path / "a.yaml")
    config.save(tmp_path / "a.json")
    read = yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8"))
    assert read == json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert read["description"] == text and read["device"]["mesh_shape"] == [2, 4]


def test_a_file_of_another_kind_is_neither_read_nor_written(tmp_path):
    for suffix in ("toml", "txt", ""):
        with pytest.raises(ConfigError, match=r"a configuration file ends in \.json, \.yaml, \.yml"):
            Config().save(tmp_path / f"config.{suffix}")
        with pytest.raises(ConfigError, match="a configuration file ends in"):
            Config.from_file(tmp_path / f"config.{suffix}")
    assert not list(tmp_path.iterdir())
