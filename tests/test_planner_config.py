"""What the planner is asked: the options of nnScaler's document by name, type and default, and errors of one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from artifex.config_device import SIZES
from artifex.config_io import ConfigError, ConfigTypeError
from artifex.scaling.autodist.config import AutoDistConfig, bytes_of, optimizer_coefficients
from artifex.scaling.autodist.constraints import AXES

DOCUMENT = [
    ("task_name", str, "default"),
    ("consider_mem", bool, True),
    ("memory_constraint", float, 32),
    ("memory_granularity", int, 1),
    ("transient_mem_coef", float, 2),
    ("opt_resident_coef", int, 2),
    ("opt_transient_coef", int, 0),
    ("recompute_modules", str, ""),
    ("zero_stage", int, 0),
    ("zero_ngroups", int, 1),
    ("pipeline_pivots", str, ""),
    ("pipeline_nstages", int, "auto"),
    ("pipeline_scheduler", str, "1f1b"),
    ("max_pipeline_bubble_ratio", float, 0.2),
    ("max_pipeline_unbalance_ratio", float, 0.5),
    ("mesh_row", int, 1),
    ("mesh_col", int, 1),
    ("world_size", int, 1),
    ("micro_batch_size", int, 1),
    ("update_freq", int, 1),
    ("profile_dir", str, "~/.cache/nnscaler/autodist/1.0/get_node_arch()"),
    ("parallel_profile", bool, True),
    ("re_profile", bool, False),
    ("topk", int, 20),
    ("solver", str, "dp"),
    ("nproc", int, 1),
    ("load_plan_path", str, ""),
    ("save_plan_path", str, ""),
    ("partition_constraints_path", str, ""),
    ("is_train", bool, True),
    ("verbose", bool, False),
    ("ignore_small_tensor_threshold", int, 1),
]
"""Option, type and default, in the order of the document."""

EXAMPLES = {
    "high memory": {
        "task_name": "large_model_training",
        "memory_constraint": 80,
        "recompute_modules": "transformer.layer",
        "zero_stage": 1,
        "zero_ngroups": 4,
        "opt_resident_coef": 6,
        "opt_transient_coef": 2,
        "topk": 50,
    },
    "pipeline": {
        "task_name": "pipeline_training",
        "pipeline_pivots": "encoder,decoder",
        "pipeline_nstages": 4,
        "pipeline_scheduler": "1f1b",
        "max_pipeline_bubble_ratio": 0.1,
        "mesh_row": 2,
        "mesh_col": 4,
        "micro_batch_size": 2,
        "update_freq": 4,
    },
    "memory-efficient": {
        "task_name": "efficient_training",
        "is_train": True,
        "consider_mem": True,
        "memory_constraint": 24,
        "recompute_modules": "attention,mlp",
        "solver": "ilp",
        "topk": 10,
    },
}
"""Those of the document."""

WITHOUT = {
    # what the document writes 2 and 0, and is float32 Adam's there, follows the run's optimizer and precision
    "opt_resident_coef": None,
    "opt_transient_coef": None,
    "profile_dir": "",  # the same place under our own name
}


def refused(**options) -> str:
    """The error's line."""
    with pytest.raises(ConfigError) as caught:
        AutoDistConfig(**options)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(("name", "kind", "default"), DOCUMENT)
def test_an_option_has_the_default_and_type_of_the_document(name, kind, default):
    config = AutoDistConfig()
    assert getattr(config, name) == WITHOUT.get(name, default)
    sample = {str: "1f1b" if name == "pipeline_scheduler" else "dp", bool: not default, float: 0.75, int: 1}[kind]
    setattr(config, name, sample)
    assert getattr(config, name) == sample and type(getattr(config, name)) is kind
    assert f"{name} must" in refused(**{name: [sample]})
    if kind in (int, float):
        assert f"{name} must" in refused(**{name: True})


def test_the_document_has_every_option_but_ours_and_each_says_what_it_is():
    fields = AutoDistConfig.model_fields
    ours = ["recompute", "objective", "search_space", "max_all_reduce_size", "device"]
    assert sorted(fields) == sorted([*(name for name, _, _ in DOCUMENT), *ours])
    assert all(field.description for field in fields.values())


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_document_are_configurations(name):
    config = AutoDistConfig(**EXAMPLES[name])
    assert {key: getattr(config, key) for key in EXAMPLES[name]} == EXAMPLES[name]
    assert AutoDistConfig(**config.model_dump()) == config


def test_the_examples_mean_what_the_document_says():
    pipeline = AutoDistConfig(**EXAMPLES["pipeline"])
    assert (pipeline.devices, pipeline.scale_factor, pipeline.batch_size) == (8, 1, 8)
    assert pipeline.pivot_patterns == ("encoder", "decoder")
    pipeline.check_cluster()
    assert AutoDistConfig(**EXAMPLES["memory-efficient"]).recompute_patterns == ("attention", "mlp")
    assert AutoDistConfig(**EXAMPLES["high memory"]).memory_bytes == 80 * 2**30


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory_contraint": 8}, "memory_contraint is unknown; did you mean memory_constraint?"),
        ({"task_name": ""}, "task_name must have at least 1 character, got ''"),
        ({"memory_constraint": 0}, "memory_constraint must be greater than 0, got 0"),
        ({"memory_constraint": float("inf")}, "memory_constraint must be a finite number, got inf"),
        ({"memory_constraint": 1e300}, "memory_constraint must be less than or equal to 1000000, got 1e+300"),
        ({"memory_constraint": "16"}, "memory_constraint must be a number with a unit of B, KB, MB, GB, TB, such as"),
        ({"memory_granularity": 0}, "memory_granularity must be greater than or equal to 1, got 0"),
        ({"transient_mem_coef": -1.0}, "transient_mem_coef must be greater than or equal to 0, got -1.0"),
        ({"opt_resident_coef": -1}, "opt_resident_coef must be greater than or equal to 0 or null, got -1"),
        ({"opt_transient_coef": -0.5}, "opt_transient_coef must be"),
        ({"recompute_modules": "mlp,,attention"}, "recompute_modules must be module names with commas between"),
        ({"recompute": "som"}, "recompute 'som' has 'som'; expected auto, none, dots, full, or pairs such as"),
        ({"recompute": "dots", "recompute_modules": "mlp"}, "recompute is 'dots' beside recompute_modules; leave one"),
        ({"zero_stage": 4}, "zero_stage must be less than or equal to 3 or 'auto', got 4"),
        ({"zero_stage": "atuo"}, "'auto', got 'atuo'; did you mean auto?"),
        ({"zero_ngroups": 0}, "zero_ngroups must be greater than or equal to 1, got 0"),
        ({"pipeline_pivots": "encoder..layer"}, "pipeline_pivots must be module names"),
        ({"pipeline_nstages": 0}, "pipeline_nstages must be greater than or equal to 1 or 'auto', got 0"),
        ({"pipeline_scheduler": "1f1"}, "must be '1f1b', 'gpipe' or 'interleaved', got '1f1'; did you mean 1f1b?"),
        ({"max_pipeline_bubble_ratio": 1.1}, "max_pipeline_bubble_ratio must be less than or equal to 1, got 1.1"),
        ({"max_pipeline_unbalance_ratio": -0.1}, "max_pipeline_unbalance_ratio must be greater than or equal to 0"),
        ({"mesh_row": 0}, "mesh_row must be greater than or equal to 1, got 0"),
        ({"mesh_col": 2**31}, "mesh_col must be less than or equal to 2147483647"),
        (
            {"mesh_row": 2, "mesh_col": 4, "world_size": 12},
            "world_size must be a multiple of mesh_row x mesh_col, 2 x 4 = 8, got 12; 8, 16 would",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size must be greater than or equal to 1, got 0"),
        ({"update_freq": 1.0}, "update_freq must be a valid integer, got 1.0"),
        ({"topk": 0}, "topk must be greater than or equal to 1, got 0"),
        ({"nproc": 0}, "nproc must be greater than or equal to 1, got 0"),
        ({"solver": "milp"}, "solver must be 'dp' or 'ilp', got 'milp'; did you mean ilp?"),
        ({"load_plan_path": 3}, "load_plan_path must be a valid string, got 3"),
        ({"ignore_small_tensor_threshold": -1}, "ignore_small_tensor_threshold must be greater than or equal to 0"),
        ({"objective": "troughput"}, "got 'troughput'; did you mean throughput?"),
        ({"search_space": "tensr"}, "got 'tensr'; did you mean tensor?"),
        ({"search_space": ["data", "mixed"]}, "search_space must be 'data', 'fsdp'"),
        ({"search_space": []}, "search_space must have at least 1 item"),
        ({"max_all_reduce_size": "1 GX"}, "max_all_reduce_size must be a number with a unit of B, KB, MB, GB, TB"),
        ({"device": "h100"}, "device must be 'cpu', 'gpu:CHIP' or 'tpu:CHIP', such as 'gpu:h100', got 'h100'"),
        ({"device": "gpu:h100:2x8"}, "device must be a kind alone, got 'gpu:h100:2x8'; mesh_row and mesh_col say how"),
    ],
)
def test_what_is_no_option_is_refused_in_one_line(options, says):
    assert says in refused(**options)


def test_a_wrong_type_is_a_type_error_too():
    with pytest.raises(TypeError, match="mesh_row must be a valid integer, got '2'"):
        AutoDistConfig(mesh_row="2")


def test_world_size_follows_the_mesh_until_it_is_given():
    config = AutoDistConfig(mesh_row=2, mesh_col=4)
    assert config.world_size == 8
    config.mesh_row = 4
    assert (config.world_size, config.devices, config.scale_factor) == (16, 16, 1)
    config.world_size = 48
    assert (config.devices, config.scale_factor) == (48, 3)
    with pytest.raises(ConfigError, match="3 x 4 = 12, got 40; 36, 48 would"):
        AutoDistConfig(mesh_row=3, mesh_col=4, world_size=40)
    with pytest.raises(ConfigError, match="world_size must be a multiple"):
        config.mesh_row = 5
    assert (config.mesh_row, config.world_size) == (4, 48)


def test_groups_that_devices_cannot_form_are_answered_with_those_they_can():
    asked = AutoDistConfig(**EXAMPLES["high memory"])
    with pytest.raises(ConfigError, match=r"zero_ngroups must divide the 1 device dividing the batch, got 4; 1 would$"):
        asked.check_cluster()
    with pytest.raises(ConfigError, match=r"the 2 devices dividing the batch, got 4; 1, 2 would$"):
        asked.check_devices(2)
    asked.check_devices(8)
    with pytest.raises(ConfigError, match="zero_ngroups is 2, but zero_stage is 0; give zero_stage 1, 2, 3 or 'auto'"):
        AutoDistConfig(zero_ngroups=2).check_devices(8)


def test_stages_that_devices_cannot_form_are_answered_with_those_they_can():
    with pytest.raises(ConfigError, match=r"pipeline_nstages must divide the 8 devices, got 3; 1, 2, 4, 8 would$"):
        AutoDistConfig(world_size=8, pipeline_nstages=3).check_cluster()
    with pytest.raises(ConfigError, match="the 2 devices dividing the batch, got 4"):
        AutoDistConfig(world_size=8, pipeline_nstages=4, zero_stage=1, zero_ngroups=4).check_cluster()
    with pytest.raises(ConfigError, match=r"got 11; 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, \.\.\. would$"):
        AutoDistConfig(world_size=5040, pipeline_nstages=11).check_cluster()


def test_mithrils_names_make_the_same_configuration():
    constraints = {"max_memory_per_device": "16GB", "max_all_reduce_size": "1GB"}
    config = AutoDistConfig.from_partition("throughput", "mixed", constraints, mesh_col=8)
    assert config == AutoDistConfig(memory_constraint=16, max_all_reduce_size=1, mesh_col=8)
    assert (config.memory_bytes, config.max_all_reduce_bytes) == (2**34, 2**30)
    assert AutoDistConfig.from_partition().max_all_reduce_bytes is None


@pytest.mark.parametrize(
    ("constraints", "says"),
    [
        ({"max_memory": "1GB"}, "constraints.max_memory is unknown; did you mean max_memory_per_device?"),
        ({"max_memory_per_device": 16}, "constraints.max_memory_per_device must be text with a unit, such as '16GB'"),
        ({"max_all_reduce_size": "GB"}, "constraints.max_all_reduce_size must be a number with a unit"),
    ],
)
def test_a_constraint_that_mithril_has_not_is_refused(constraints, says):
    with pytest.raises(ConfigError) as caught:
        AutoDistConfig.from_partition(constraints=constraints)
    assert str(caught.value).startswith(says)


def test_one_limit_is_not_said_twice():
    with pytest.raises(ConfigError, match="max_memory_per_device says the same as memory_constraint; leave one"):
        AutoDistConfig.from_partition(constraints={"max_memory_per_device": "1GB"}, memory_constraint=2)


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 17_179_869_184), ("1.5 gb", 1_610_612_736), ("500MB", 524_288_000), ("3KB", 3_072), ("7B", 7)],
)
def test_sizes_are_powers_of_1024(text, count):
    assert bytes_of(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "16", "-1GB", "0GB", "0.5B", "nanGB", "1e400GB", "9" * 400 + "GB", "1G", "1GiB"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"must be .*got "):
        bytes_of(text)


def test_a_size_without_a_unit_is_a_wrong_type():
    with pytest.raises(ConfigTypeError, match="must be text with a unit, such as '16GB', got 16"):
        bytes_of(16)


@pytest.mark.parametrize(
    ("precision", "optimizer", "kept", "for_a_step"),
    [  # bytes: two moments, a float32 weight; the float32 weight and gradient that a step makes
        ("float32", "adam", 4 + 4, 0),
        ("bfloat16", "adam", 4 + 4 + 4, 4),
        ("bfloat16", "memory_efficient_adam", 4 + 4, 4 + 4),
    ],
)
def test_coefficients_are_bytes_of_the_optimizer_over_those_of_the_weight(precision, optimizer, kept, for_a_step):
    weight = {"float32": 4, "bfloat16": 2}[precision]
    assert optimizer_coefficients(precision, optimizer) == (kept / weight, for_a_step / weight)


def test_coefficients_of_what_nobody_measured_are_refused():
    with pytest.raises(ConfigError, match="precision must be 'float32' or 'bfloat16', got 'float16'"):
        optimizer_coefficients("float16", "adam")
    with pytest.raises(ConfigError, match=r"got 'adamw'; did you mean adam\?"):
        optimizer_coefficients("float32", "adamw")


def test_the_search_is_over_the_axes_that_are_named():
    assert set(AutoDistConfig().axes) == set(AXES) == set(SIZES) - {"replica"}  # which zero_ngroups says
    assert AutoDistConfig(search_space="tensor").axes == ("tensor",)
    assert AutoDistConfig(search_space=["data", "pipeline"]).axes == ("data", "pipeline")


def test_memory_that_is_not_considered_has_no_limit():
    assert AutoDistConfig(consider_mem=False).memory_bytes is None


def test_recomputation_is_named_as_in_training():
    assert AutoDistConfig(recompute={"hidden": "keep", "qkv": "offload"}).recompute == "qkv=offload,hidden=keep"
    assert AutoDistConfig(recompute_modules="ROOT").recompute_patterns == ("ROOT",)
    assert AutoDistConfig().recompute_patterns == ()


def test_measured_times_lie_by_device():
    assert AutoDistConfig().profile_folder("gpu:h100") == Path.home() / ".cache/artifex/autodist/1.0/gpu-h100"
    assert AutoDistConfig(profile_dir=Path("times")).profile_folder("cpu") == Path("times/cpu")


def test_a_file_holds_the_options(tmp_path):
    path = tmp_path / "planner.yaml"
    path.write_text("mesh_row: 2\nmesh_col: 4\nsearch_space: [data, fsdp]\nmax_all_reduce_size: 500MB\n")
    config = AutoDistConfig.from_file(path)
    assert (config.devices, config.axes, config.max_all_reduce_bytes) == (8, ("data", "fsdp"), 500 * 2**20)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mesh_rows: 2\n", "mesh_rows is unknown; did you mean mesh_row?"),
        ("mesh_row: two\n", "mesh_row must be a valid integer, got 'two'"),
        ("mesh_row: 2\nmesh_row: 3\n", "mesh_row is given twice"),
        ("mesh_row: [2\n", "is not valid YAML"),
    ],
)
def test_a_file_that_holds_none_is_named(tmp_path, text, says):
    path = tmp_path / "planner.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        AutoDistConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_asking_imports_no_jax():
    program = "import sys, artifex.scaling.autodist.config; print({'jax', 'flax', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
