"""A plan as a file: read back it predicts the same, edited or for another model anew, and a run follows it."""

import dataclasses
import fnmatch
import json
import subprocess
import sys
from pathlib import Path

import planned
import pytest
import yaml
from planned import CLUSTER, GIB, Remembered, config_of, one_line, options, predicted, spread_of, subject

from artifex import train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.config_io import ConfigError
from artifex.scaling.autodist import plan
from artifex.scaling.autodist.cluster import Cluster
from artifex.scaling.autodist.plan_file import SCHEMA, read
from artifex.scaling.autodist.planned import shortest
from artifex.scaling.autodist.planner import predict

HOW = {"search_space": ["data", "fsdp"], "zero_stage": 3, "zero_ngroups": 2, "recompute": "full", "update_freq": 2}


@pytest.fixture(scope="module")
def found():
    return planned.planned(**HOW)


@pytest.fixture
def path(found, tmp_path):
    found.save(tmp_path / "plan.yaml")
    return tmp_path / "plan.yaml"


def load(path, of=None, cluster=CLUSTER, **given):
    return plan(of or subject(), options(load_plan_path=path, **given), cluster=cluster)


def edit(path, **sections):
    """The file with sections changed; None leaves one out."""
    values = yaml.safe_load(path.read_text(encoding="utf-8")) | sections
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def refused(path, **given) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, **given)
    said = one_line(caught.value)
    assert said.startswith(f"{path}: "), said
    return said.removeprefix(f"{path}: ")


def test_a_plan_that_is_read_back_predicts_the_same(found, path):
    again = load(path)
    assert again.spread == found.spread
    assert again.estimate == found.estimate
    assert again.searched == f"read from {path}" and again.notes == found.notes
    assert again.task == found.task


def test_a_plan_is_small_and_speaks_of_modules_axes_and_bytes(found, path):
    text = path.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    assert len(text.splitlines()) < 120
    assert values["schema"] == SCHEMA and values["about"]["model"] == "llama-nano"
    assert values["mesh"] == found.spread.mesh
    assert {name: size for name, size in values["device"].items() if name in ("data", "fsdp")} == found.spread.mesh
    assert values["predicted"]["bytes_in_all"] == sum(values["predicted"]["bytes"].values())
    assert sum(values["predicted"]["seconds"].values()) == pytest.approx(found.estimate.seconds, rel=1e-3)
    assert sum(values["predicted"]["sent_bytes"].values()) == pytest.approx(found.estimate.sent(), rel=1e-3)
    assert set(values["rules"]) <= {"weights", "gradients", "optimizer", "activations"}
    assert len(values.get("runners_up", ())) == len(found.runners)
    assert set(values["versions"]) == {"artifex", "jax", "jaxlib"}


def test_a_plan_is_written_where_the_options_say(tmp_path):
    answer = planned.planned(search_space="data", recompute="full", save_plan_path=tmp_path / "plan.yaml")
    assert read(tmp_path / "plan.yaml")[1] == answer.spread


def test_a_plan_that_was_edited_is_predicted_anew(path):
    device = {"fsdp": 8}
    load(edit(path, device=device, mesh=None, training={"remat": "none"}))
    again = load(path)
    assert again.estimate == predicted(spread_of("fsdp 8")).estimate
    assert again.spread == spread_of("fsdp 8")


def test_what_follows_from_the_device_section_is_not_edited_alone(found, path):
    said = refused(edit(path, mesh={"fsdp": 8}))
    assert said.startswith("mesh is {'fsdp': 8}, but device says {") and "edit device, and leave mesh out" in said


@pytest.mark.parametrize("change", ["depth", "batch"])
def test_a_plan_for_another_depth_or_batch_is_predicted_as_one_made_for_it(path, change):
    values = config_of("decoder").to_dict()
    if change == "depth":
        values["model"]["num_layers"] = 3
    else:
        values["training"]["batch_size"] = 32
    other = Remembered(Config.from_dict(values))
    again = load(path, other)
    (note,) = again.notes
    assert "predicted anew" in note and ("rows 16, this is 32" in note if change == "batch" else "fingerprint" in note)
    fresh = plan(other, options(**HOW))
    (same,) = (one for one in planned.every(fresh) if one.spread == again.spread)
    assert again.estimate.whole == pytest.approx(same.estimate.whole, rel=0.01)
    assert again.estimate.seconds == pytest.approx(same.estimate.seconds, rel=0.01)


def decoder(**sections) -> Remembered:
    """The tiny decoder with fields of sections replaced."""
    values = config_of("decoder").to_dict()
    return Remembered(Config.from_dict(values | {key: values[key] | fields for key, fields in sections.items()}))


@pytest.mark.parametrize(
    "sections", [{"model": {"num_layers": 8}}, {"data": {"sequence_length": 128}}, {"training": {"batch_size": 48}}]
)
def test_a_plan_for_four_layers_predicts_any_other_run_as_its_spread_by_hand(sections, tmp_path):
    how = {"search_space": "fsdp", "zero_stage": 3, "recompute": "full", "update_freq": 2, "topk": 1}
    four, other = decoder(model={"num_layers": 4}), decoder(**{"model": {"num_layers": 4}, **sections})
    answer = plan(four, options(**how, ignore_small_tensor_threshold=65))
    assert answer.spread.whole and answer.spread.accumulation == 2
    answer.save(tmp_path / "plan.yaml")
    again = load(tmp_path / "plan.yaml", other)
    fresh = predict(other, CLUSTER, dataclasses.replace(spread_of("fsdp 8"), remat="full", accumulation=2,
                                                        whole=answer.spread.whole)).estimate  # fmt: skip
    assert again.estimate == fresh != answer.estimate
    assert any("predicted anew" in note for note in again.notes) or "data" in sections


def test_parameters_that_stay_whole_do_so_when_the_plan_is_read_back(tmp_path):
    answer = planned.planned(search_space="fsdp", zero_stage=3, recompute="full", ignore_small_tensor_threshold=10**9)
    answer.save(tmp_path / "plan.yaml")
    again = load(tmp_path / "plan.yaml")
    assert answer.spread.whole and again.spread == answer.spread
    assert again.estimate == answer.estimate != predicted(dataclasses.replace(answer.spread, whole=())).estimate


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("embed/*", "embed/table", "norm/*"), ("embed/*", "norm/*")),
        (("layers/attention/*", "layers/*", "layers/*/scale", "layers/mlp/up/kernel"), ("layers/*",)),
        (("norm/*", "norm/*"), ("norm/*",)),
        (("norm/*", "norm/**"), ("norm/**",)),
        (("layers/?lp/*", "layers/mlp/up/kernel"), ("layers/?lp/*",)),
        (("layers/m?p/*", "layers/[m]*"), ("layers/m?p/*", "layers/[m]*")),  # which covers which is not seen
        (("head/*", "embed/*"), ("head/*", "embed/*")),
    ],
)
def test_what_another_pattern_covers_is_not_said(patterns, expected, found, tmp_path):
    def matched(some):
        return {leaf.path for leaf in subject().leaves if any(fnmatch.fnmatchcase(leaf.path, one) for one in some)}

    long = dataclasses.replace(spread_of("fsdp 8"), whole=patterns)
    assert shortest(long).whole == expected
    assert matched(patterns) == matched(expected) != set()
    of = dataclasses.replace(found, best=dataclasses.replace(found.best, spread=long))
    of.save(tmp_path / "plan.yaml")
    assert read(tmp_path / "plan.yaml")[0]["device"]["whole"] == list(expected)
    assert f"  whole       {', '.join(expected)}" in str(of).splitlines()
    runner = dataclasses.replace(found, runners=(of.best,))
    assert f"whole: {','.join(expected)}: " in str(runner)


def test_a_plan_that_no_longer_fits_says_so(path):
    (note,) = load(path, memory_constraint=1e-4).notes
    assert "is predicted to need" in note and "more than the 104.9 KiB there are" in note


@pytest.mark.parametrize("name", ["artifex", "jax", "jaxlib"])
def test_a_plan_of_another_version_is_flagged(path, name):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))["versions"]
    (note,) = load(edit(path, versions=values | {name: "0.4.1"})).notes
    assert f"was made with {name} 0.4.1, this is {values[name]}" in note and "compiled memory may differ" in note


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"devise": {}}, "devise is unknown; did you mean device?"),
        ({"training": {"remaat": "full"}}, "training.remaat is unknown; did you mean remat?"),
        ({"device": {"fdsp": 8}}, "device.fdsp is unknown; did you mean fsdp?"),
        ({"device": {"fsdp": -1}}, "device has -1 for a size; a plan says each"),
        ({"device": [8]}, "device must be keys and values, got [8]"),
        ({"schema": 7}, "schema is 7, but this version reads 1; plan anew"),
        ({"schema": None}, "is no plan: it has no schema; python -m artifex.plan writes one"),
        ({"device": None}, "is no plan: it has no device; python -m artifex.plan writes one"),
        ({"device": {"fsdp": 8, "fsdp_min_weight_size": 64}}, "device.fsdp_min_weight_size is 64, which no plan says"),
        ({"device": {"mesh_shape": [4, 2]}}, "device.mesh_shape is (4, 2), which no plan says; leave it out"),
        ({"device": {"plan": "other.yaml"}}, "device.plan is 'other.yaml', which no plan says; leave it out"),
        ({"training": {"remat": "som"}, "mesh": None}, "remat 'som' has 'som'; expected none"),
        ({"training": {"gradient_accumulation": 0}, "mesh": None}, "training.gradient_accumulation must be greater"),
        (
            {"training": {"gradient_accumulation": "two"}},
            "training.gradient_accumulation must be a valid integer, got 'two'",
        ),
        ({"training": {"remat": 3}}, "training.remat must be"),
        ({"training": ["remat"]}, "training must be keys and values, got ['remat']"),
        ({"about": {"rows": "many"}}, "about.rows must be a valid integer, got 'many'"),
        ({"about": ["rows"]}, "about must be keys and values, got ['rows']"),
        ({"versions": [1]}, "versions must be keys and values, got [1]"),
        ({"notes": 3}, "notes must be a valid list, got 3"),
        ({"device": {"data": 4, "zero": 3}, "mesh": None}, "device.zero must be 0, 1 or 2, got 3"),
    ],
    ids=str,
)
def test_what_is_no_plan_is_refused_by_key_and_nearest(path, sections, says):
    assert says in refused(edit(path, **sections))


@pytest.mark.parametrize("text", ["- 1\n", "mesh: [", "", "data: {source: stdlib}\n"])
def test_a_file_that_is_none_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in one_line(caught.value)


def test_a_plan_that_is_not_there_is_refused_by_its_name(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "plan.yaml")
    assert str(tmp_path / "plan.yaml") in one_line(caught.value)


def test_a_plan_for_another_number_of_devices_is_refused(path):
    assert "device is for 8 devices, the cluster has 16; plan anew" in refused(path, cluster=Cluster.parse("cpu:16"))


def sections(found) -> dict:
    """What a run that follows a plan says by hand."""
    return {"device": found.device, "training": found.training}


def test_a_run_that_is_given_a_plan_is_the_run_with_its_settings(found, path, tmp_path):
    base = config_of("decoder").to_dict()
    by_plan = Config.from_dict({**base, "device": {"plan": str(path)}})
    training = base["training"] | found.training
    by_hand = Config.from_dict({**base, "training": training, "device": found.device})
    assert by_plan == by_hand
    assert by_plan.device.plan is None  # the run keeps what it follows
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"device": {"plan": str(path)}}))
    assert Config.from_file(file).device == by_hand.device
    typed = parse_train(["--device.plan", str(path)]).config
    assert (typed.device, typed.training.remat) == (by_hand.device, "full")
    assert typed.training.gradient_accumulation == 2
    assert train.plan_of(by_plan, 8) == found.plan


def test_settings_that_a_plan_decides_are_not_given_beside_it(found, path):
    def said(**sections) -> str:
        with pytest.raises(ConfigError) as caught:
            Config.from_dict({"device": {"plan": str(path)} | sections.pop("device", {}), **sections})
        return one_line(caught.value)

    other = "tensor" if "fsdp" in found.spread.mesh else "fsdp"
    assert f"device.{other} is 2, but the plan {path} says 1; leave one of them out" in said(device={other: 2})
    assert "device.fdsp is unknown; did you mean fsdp?" in said(device={"fdsp": 2})
    assert f"training.remat is 'dots', but the plan {path} says 'full'" in said(training={"remat": "dots"})
    assert "training.gradient_accumulation is 4, but the plan" in said(training={"gradient_accumulation": 4})
    Config.from_dict(
        {"device": {"plan": str(path), **found.device}, "training": found.training}
    )  # the same is no other
    with pytest.raises(ConfigError, match="training must be"):
        Config.from_dict({"device": {"plan": str(path)}, "training": ["remat"]})


def test_a_run_whose_file_has_every_default_follows_a_plan(found, path):
    quickstart = str(Path(__file__).parents[1] / "configs/quickstart.yaml")
    config = parse_train([quickstart, "--device.plan", str(path)]).config
    assert config.device == Config.from_dict({"device": found.device}).device
    assert config.training.remat == found.spread.remat


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"schema": 7}, "schema is 7, but this version reads 1; plan anew"),
        ({"mesh": {"fsdp": 8}}, "mesh is {'fsdp': 8}, but device says {'data': 2, 'fsdp': 4}; edit device, and leave"),
        (
            {"device": {"fsdp": 8}},
            "mesh is {'data': 2, 'fsdp': 4}, but device says {'fsdp': 8}; edit device, and leave",
        ),
        ({"device": {"fdsp": 8}}, "device.fdsp is unknown; did you mean fsdp?"),
        ({"device": {"fsdp": "8"}}, "device.fsdp must be a valid integer, got '8'"),
        ({"training": {"remta": "full"}}, "training.remta is unknown; did you mean remat?"),
        ({"training": {"remat": "som"}}, "training.remat 'som' has 'som'; expected none"),
        ({"devise": {}}, "devise is unknown; did you mean device?"),
    ],
    ids=str,
)
def test_a_run_blames_the_plan_file_for_what_is_wrong_in_it(path, sections, says, capsys, tmp_path):
    edit(path, **sections)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"device": {"plan": str(path)}}))
    for words in (["--device.plan", str(path)], [str(config)]):
        with pytest.raises(SystemExit) as ended:
            parse_train(words)
        (said,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and said.startswith(f"error: {path}: {says}")


def test_a_run_by_a_plan_is_configured_without_jax(path):
    code = f"import sys; from artifex.config import Config; Config.from_dict({{'device': {{'plan': {str(path)!r}}}}})"
    ended = subprocess.run([sys.executable, "-c", f"{code}; print('jax' in sys.modules)"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    assert ended.stdout.strip() == "False"


def test_what_is_no_plan_is_refused_as_a_runs_plan(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("device: {data: 8}\n")
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"device": {"plan": str(path)}})
    said = one_line(caught.value)
    assert said == f"{path}: is no plan: it has no schema; python -m artifex.plan writes one"
    path.write_text("schema: 1\ndevice: {data: 8}\ntraining: {remta: full}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: training\.remta is unknown; did you mean remat\?"):
        Config.from_dict({"device": {"plan": str(path)}})
    with pytest.raises(ConfigError, match=r"device\.plan must be"):
        Config.from_dict({"device": {"plan": 3}})
    with pytest.raises(ConfigError, match=r"plan\.yaml"):
        Config.from_dict({"device": {"plan": str(tmp_path / "plan.yaml")}})


def losses(folder) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_by_a_plan_learns_what_the_run_by_its_settings_does(found, path, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "text.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    base = config_of("decoder").to_dict()
    base["data"] |= {"source": str(source)}
    base["training"] |= {"steps": 2, "validation_batches": 1, "final_validation_batches": 1, "sample_tokens": 1}
    base["optimizer"] |= {"warmup_steps": 0}
    base["logging"] = {"every": 1, "progress": False}
    del base["device"]
    by_hand = {**base, "training": base["training"] | found.training, "device": found.device}
    runs = {"plan": {**base, "device": {"plan": str(path)}}, "hand": by_hand}
    for name, values in runs.items():
        train.train(Config.from_dict(values), tmp_path / name)
    assert losses(tmp_path / "plan") == losses(tmp_path / "hand")
    assert len(losses(tmp_path / "plan")) >= 2


def test_a_dry_run_shows_the_plan_and_needs_the_state_that_it_predicts(found, path):
    base = config_of("decoder").to_dict()
    text = train.dry_run(Config.from_dict({**base, "device": {"plan": str(path)}}))
    assert f"plan: {found.plan}" in text
    kib = found.estimate.held["optimizer state"] / 1024
    assert f"{kib:.4g} KiB" in text
    assert " x ".join(f"{axis} {size}" for axis, size in found.spread.mesh.items()) in text.replace("=", " ")


def test_predictions_are_in_bytes_of_a_device(found, path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values["cluster"] == {"name": "cpu:8", "devices": 8, "limit_bytes": 32 * GIB}
    assert values["predicted"]["bytes"]["parameters"] == found.estimate.held["parameters"]
