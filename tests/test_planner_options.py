"""Every option of the planner has an effect: each field of `AutoDistConfig` and the test that shows it."""

import dataclasses
import functools
import importlib

import pytest
from planned import (
    CLUSTER,
    GIB,
    Remembered,
    config_of,
    every,
    one_line,
    options,
    planned,
    predicted,
    spread_of,
    subject,
)

from artifex.config import Config
from artifex.scaling.autodist import AutoDistConfig, plan, profile
from artifex.scaling.autodist.look import Look, coefficients_of

SHOWN_BY = {
    "task_name": "search.test_the_documents_example_of_high_memory_plans_where_there_are_groups",
    "consider_mem": "options.test_memory_that_is_not_considered_limits_nothing",
    "memory_constraint": "search.test_tighter_memory_changes_the_plan_and_all_that_is_returned_fits_in_order_of_time",
    "memory_granularity": "options.test_memory_is_counted_in_grains",
    "transient_mem_coef": "options.test_the_two_largest_arrays_of_the_busiest_moment_count_as_often_as_it_is_said",
    "opt_resident_coef": "options.test_the_optimizers_state_is_so_many_times_the_weights",
    "opt_transient_coef": "options.test_an_update_needs_at_least_so_many_times_the_weights",
    "recompute_modules": "search.test_modules_that_are_named_are_computed_again",
    "recompute": "search.test_recomputation_is_as_asked",
    "zero_stage": "search.test_each_zero_stage_divides_what_it_says",
    "zero_ngroups": "search.test_zero_groups_hold_copies_of_what_is_divided_in_each",
    "pipeline_pivots": "options.test_stages_begin_at_pivots_alone",
    "pipeline_nstages": "search.test_a_pipeline_has_the_stages_and_the_schedule_that_are_asked_for",
    "pipeline_scheduler": "search.test_a_pipeline_has_the_stages_and_the_schedule_that_are_asked_for",
    "max_pipeline_bubble_ratio": "search.test_a_pipeline_is_idle_no_longer_than_allowed",
    "max_pipeline_unbalance_ratio": "options.test_stages_are_as_even_as_it_is_said",
    "mesh_row": "options.test_devices_of_other_nodes_are_farther_away",
    "mesh_col": "options.test_devices_of_other_nodes_are_farther_away",
    "world_size": "options.test_a_world_of_several_meshes_has_all_their_devices",
    "micro_batch_size": "search.test_an_update_has_the_microbatches_that_are_asked_for",
    "update_freq": "search.test_an_update_has_the_microbatches_that_are_asked_for",
    "profile_dir": "options.test_what_was_measured_on_the_devices_present_goes_before_what_is_published",
    "parallel_profile": "options.test_devices_are_measured_again_where_that_is_asked_for",
    "re_profile": "options.test_devices_are_measured_again_where_that_is_asked_for",
    "topk": "search.test_as_many_plans_are_kept_as_are_asked_for",
    "nproc": "options.test_several_processes_find_the_plan_that_one_does",
    "solver": "search.test_both_solvers_choose_alike",
    "load_plan_path": "file.test_a_plan_that_is_read_back_predicts_the_same",
    "save_plan_path": "file.test_a_plan_is_written_where_the_options_say",
    "partition_constraints_path": "search.test_partition_constraints_are_kept",
    "is_train": "search.test_without_training_there_is_a_forward_pass_alone",
    "verbose": "options.test_what_is_looked_at_is_told_where_that_is_asked_for",
    "ignore_small_tensor_threshold": "options.test_small_parameters_stay_whole",
    "objective": "search.test_the_least_memory_is_chosen_where_that_is_asked_for",
    "search_space": "search.test_the_search_space_bounds_the_axes",
    "max_all_reduce_size": "search.test_no_all_reduce_is_larger_than_allowed",
    "device": "options.test_devices_of_other_nodes_are_farther_away",
}


def test_every_option_has_a_test_that_shows_its_effect():
    assert SHOWN_BY.keys() == AutoDistConfig.model_fields.keys()
    for test in SHOWN_BY.values():
        module, name = test.split(".")
        assert callable(getattr(importlib.import_module(f"test_planner_{module}"), name))


LITTLE = {"search_space": "data", "recompute": "none"}


def estimated(**given):
    """What plain data parallelism is estimated to take with these options."""
    look = Look(subject(), CLUSTER, "cpu", coefficients_of(options(**given)))
    return look(spread_of("data 8"))


def refused(what, **given) -> str:
    with pytest.raises(ValueError) as caught:
        plan(what, options(**given))
    return one_line(caught.value)


def test_memory_that_is_not_considered_limits_nothing():
    assert "nothing fits 10.49 KiB a device" in refused(subject(), **LITTLE, memory_constraint=1e-5)
    found = planned(**LITTLE, memory_constraint=1e-5, consider_mem=False)
    assert found.limit is None and found.estimate.whole > 1e-5 * GIB


def test_memory_is_counted_in_grains():
    memory = 2 * estimated().whole / GIB
    assert planned(**LITTLE, memory_constraint=memory, memory_granularity=1).limit == int(memory * GIB)
    said = refused(subject(), **LITTLE, memory_constraint=memory, memory_granularity=GIB)
    assert "no spread of 'llama-nano'" in said  # one grain is more than there is


def test_the_two_largest_arrays_of_the_busiest_moment_count_as_often_as_it_is_said():
    plain, one, two, three = (estimated(**how).own for how in ({}, *({"transient_mem_coef": n} for n in (1, 2, 3))))
    assert one == plain
    assert three - two == two - one > 0
    assert two - one < plain  # two arrays of those that there are


def test_the_optimizers_state_is_so_many_times_the_weights():
    weights = estimated().held["parameters"]
    for times in (2, 4, 6):
        assert estimated(opt_resident_coef=times).held["optimizer state"] == times * weights
    assert estimated().held["optimizer state"] == pytest.approx(2 * weights, rel=1e-4)  # Adam's, and its count


def test_an_update_needs_at_least_so_many_times_the_weights():
    plain, weights = estimated(), estimated().held["parameters"]
    assert estimated(opt_transient_coef=0).own == plain.own
    times = 2 + int(plain.own / weights)
    assert estimated(opt_transient_coef=times).own == times * weights


@functools.cache
def three_blocks() -> Remembered:
    values = config_of("decoder").to_dict()
    values["model"]["num_layers"] = 3
    return Remembered(Config.from_dict(values))


STAGES = {"search_space": ("data", "pipeline"), "recompute": "full", "pipeline_nstages": 2}
STAGES |= {"max_pipeline_bubble_ratio": 1.0, "max_pipeline_unbalance_ratio": 0.0, "topk": 1}


def test_stages_begin_at_pivots_alone():
    assert planned(**STAGES, pipeline_pivots="layers.1").spread.of("pipeline") == 2
    said = refused(subject(), **STAGES, pipeline_pivots="layers.0")
    assert "a stage would begin at layers/1, pipeline_pivots allow layers/0" in said


def test_pivots_that_would_cut_unevenly_are_refused():
    """The first of two stages of three blocks has two: a run cuts as evenly as can be."""
    assert plan(three_blocks(), options(**STAGES, pipeline_pivots="layers.2")).spread.of("pipeline") == 2
    said = refused(three_blocks(), **STAGES, pipeline_pivots="layers.1")
    assert "a stage would begin at layers/2, pipeline_pivots allow layers/1; stages are as even as can be" in said


def test_stages_are_as_even_as_it_is_said():
    """Of three blocks one stage has two, so that the other is done in half the time."""
    found = plan(three_blocks(), options(**{**STAGES, "max_pipeline_unbalance_ratio": 0.5}))
    assert found.spread.of("pipeline") == 2
    said = refused(three_blocks(), **{**STAGES, "max_pipeline_unbalance_ratio": 0.6})
    assert "the shortest stage would take 0.500 of the longest's time" in said


def test_devices_of_other_nodes_are_farther_away():
    near, far = ({"mesh_row": 1, "mesh_col": 8}, {"mesh_row": 8, "mesh_col": 1})
    times = [planned(**LITTLE, **mesh, device="gpu:h100") for mesh in (near, far)]
    assert [found.cluster_name for found in times] == ["gpu:h100:1x8", "gpu:h100:8x1"]
    assert times[0].estimate.seconds < times[1].estimate.seconds
    assert times[0].estimate.seconds < planned(**LITTLE).estimate.seconds  # of CPUs


def test_a_world_of_several_meshes_has_all_their_devices():
    found = planned(**LITTLE, mesh_row=1, mesh_col=4, world_size=8)
    assert found.spread == spread_of("data 8")
    assert (found.cluster.hosts, found.cluster.devices_per_host) == (2, 4)


SIZES = profile.Sizes(products=(8,), dtypes=("float32",), elementwise=(64,), collectives=(64,), turns=1, repeats=1)


def test_what_was_measured_on_the_devices_present_goes_before_what_is_published(tmp_path):
    import jax

    asked = options(**LITTLE, device=None, profile_dir=tmp_path)
    published = plan(subject(), asked)
    folder = asked.profile_folder(jax.devices()[0].device_kind)
    profile.measure(folder=folder, sizes=SIZES)
    measured = plan(subject(), asked)
    assert published.estimate.seconds == planned(**LITTLE).estimate.seconds
    assert measured.estimate.seconds != published.estimate.seconds
    assert measured.estimate.whole == published.estimate.whole
    assert measured.cluster.hardware.flops != published.cluster.hardware.flops


def test_devices_are_measured_again_where_that_is_asked_for(tmp_path, monkeypatch):
    asked, whole = [], profile.measure

    def measure(**given):
        asked.append(given)
        return whole(**given, sizes=SIZES)

    monkeypatch.setattr(profile, "measure", measure)
    for parallel in (True, False):
        how = {**LITTLE, "device": None, "profile_dir": tmp_path}
        plan(subject(), options(**how))
        plan(subject(), options(**how, re_profile=True, parallel_profile=parallel))
    assert [(given["again"], given["parallel"]) for given in asked] == [(True, True), (True, False)]


@pytest.mark.slow
def test_several_processes_find_the_plan_that_one_does():
    how = {"search_space": ("data", "fsdp"), "zero_stage": "auto", "recompute": "none", "topk": 3}
    one, two = (planned(**how, nproc=count) for count in (1, 2))
    assert [found.spread for found in every(one)] == [found.spread for found in every(two)]
    assert one.estimate == dataclasses.replace(two.estimate)


def test_what_is_looked_at_is_told_where_that_is_asked_for():
    told: dict[bool, list[str]] = {}
    for verbose in (False, True):
        told[verbose] = []
        plan(subject(), options(**LITTLE, verbose=verbose), say=told[verbose].append)
    assert len(told[True]) > len(told[False])
    assert any("data 8: " in line and " GiB, " in line for line in told[True])


def test_small_parameters_stay_whole():
    how = {"search_space": "fsdp", "zero_stage": 3, "recompute": "none", "topk": 1}
    largest = max(leaf.size for leaf in subject().leaves if leaf.path.split("/")[-1] == "scale")
    plain, some, all_ = (planned(**how, ignore_small_tensor_threshold=n).spread for n in (1, largest + 1, 10**9))
    assert plain.whole == ()
    assert some.whole and all(path.endswith("scale") for path in some.whole)
    assert set(all_.whole) == {leaf.path for leaf in subject().leaves}
    sizes = [predicted(spread).estimate.held["parameters"] for spread in (plain, some, all_)]
    assert sizes[0] < sizes[1] < sizes[2]
