"""`python -m artifex.plan`: what it writes and prints, how it proves a plan, and one line for every mistake."""

import dataclasses
import math
import shlex
import subprocess
import sys

import pytest
import yaml
from planned import TEXT, config_of, number, spread_of

from artifex import plan as command
from artifex import train
from artifex.cli import parse_train
from artifex.config import Config
from artifex.scaling.autodist import AutoDistConfig
from artifex.scaling.autodist.cluster import HARDWARE
from artifex.scaling.autodist.errors import remedies
from artifex.scaling.autodist.pictures import frontier
from artifex.scaling.autodist.plan_file import read
from artifex.scaling.autodist.planned import Proof, share_text
from artifex.scaling.autodist.profile import FILE

PNG = b"\x89PNG\r\n\x1a\n"
FAST = ["--search-space", "data", "--recompute", "full", "--update-freq", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The configuration of a tiny run, as a file."""
    path = tmp_path_factory.mktemp("run") / "tiny.yaml"
    path.write_text(config_of("decoder").to_yaml(), encoding="utf-8")
    return str(path)


def lines_of(capsys, *words: str) -> list[str]:
    command.main([*words])
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words: str, code: int = 2) -> str:
    """The line on stderr, and the exit code."""
    with pytest.raises(SystemExit) as caught:
        command.main([*words])
    said = capsys.readouterr().err.splitlines()
    assert caught.value.code == code and len(said) == 1, said
    assert said[0].startswith("error: ")
    return said[0].removeprefix("error: ")


def test_a_plan_its_table_and_its_picture_are_written_for_a_cluster_that_is_not_there(run, tmp_path, capsys):
    folder = tmp_path / "plans"
    words = (run, "--cluster", "gpu:h100:2x4", "--memory", "40", "--top", "2", "--no-verify", "--out", str(folder))
    said = lines_of(capsys, *words, *FAST)
    assert said[-1] == f"train by it:   python -m artifex.train {run} --device.plan {folder / 'plan.yaml'}"
    assert said[-4:-1] == [str(folder / name) for name in ("plan.yaml", "plan.txt", "frontier.png")]
    table = (folder / "plan.txt").read_text(encoding="utf-8")
    assert table.strip() in "\n".join(said)
    assert table.startswith("plan 'default' for llama-nano on gpu:h100:2x4, 8 devices of 40 GiB each")
    values, spread = read(folder / "plan.yaml")
    assert spread.devices == 8 and values["cluster"]["name"] == "gpu:h100:2x4"
    assert len(values["runners_up"]) == 1  # two in all
    assert (folder / "frontier.png").read_bytes().startswith(PNG)
    assert (folder / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "on cpu:8, 8 devices of 32 GiB each"),
        (["--memory", "2"], "on cpu:8, 8 devices of 2 GiB each"),
        (["--mesh-col", "4"], "on cpu:4, 4 devices of 32 GiB each"),
        (["--mesh-row", "2"], "on cpu:2, 2 devices of 32 GiB each"),
        (["--mesh-col", "1"], "on cpu:1, 1 device of 32 GiB"),
        (["--device", "gpu:h100", "--mesh-col", "2", "--no-verify"], "on gpu:h100:1x2, 2 devices of 32 GiB each"),
    ],
    ids=str,
)
def test_without_a_cluster_the_devices_present_are_planned_for_or_those_that_are_said(run, tmp_path, words, says):
    asked = command.parse([run, "--profile-dir", str(tmp_path / "none"), *words, *FAST])
    assert f"{command.planned(asked)}\n".splitlines()[0].endswith(says)


def test_what_a_device_reports_goes_before_what_such_a_one_has():
    assert command.memory_of("gpu:h100", 60 * 2**30) == command.memory_of("cpu", 60 * 2**30) == 60
    assert command.memory_of("cpu", None) is None
    for name in ("gpu:h100", "gpu:a100", "tpu:v5e", "tpu:tpu7x"):
        memory = command.memory_of(name, None)
        assert memory is not None and 0.5 < memory / (HARDWARE[name].memory / 2**30) <= 1
    assert command.memory_of("tpu:v5e", None) < 16 < command.memory_of("gpu:h100", None) < 80


def test_the_run_that_is_trained_by_the_plan_is_the_one_that_was_planned_for(run, tmp_path, capsys):
    words = ("--training.batch-size=32", "--training.remat", "none", "--model.num-layers", "3", "--device.data", "8")
    said = lines_of(capsys, run, *words, "--cluster", "cpu:8", "--out", str(tmp_path / "my plans"), *FAST)
    assert said[-1].startswith("train by it:   python -m artifex.train ")
    typed = shlex.split(said[-1].partition("artifex.train ")[2])
    config = parse_train(typed).config
    assert (config.training.batch_size, config.model.spec().num_layers, config.device.data) == (32, 3, 8)
    assert config.training.remat == "full"  # the plan's, by FAST
    alone = lines_of(capsys, "--cluster", "cpu:8", "--out", str(tmp_path / "none"), *FAST)
    assert alone[-1] == f"train by it:   python -m artifex.train --device.plan {tmp_path / 'none' / 'plan.yaml'}"


def test_without_training_nothing_is_compiled(run, tmp_path, capsys):
    said = refused(capsys, run, "--cluster", "cpu:8", "--is-train", "false", "--verify", *FAST)
    assert said == "command line: --verify compiles steps of training, but is_train is false; leave one of them out"
    words = ("--cluster", "gpu:h100:1x8", "--is-train", "false", "--search-space", "data", "--top", "1")
    lines = lines_of(capsys, run, *words, "--out", str(tmp_path))
    assert "not compiled: is_train is false, and only steps of training are" in lines
    assert not any(line.startswith(("compiling", "train by it")) for line in lines)


def test_options_of_the_run_go_with_those_of_the_planner(run):
    asked = command.parse([run, "--training.batch-size", "32", "--model.num-layers=3", "--memory", "2", *FAST])
    assert (asked.config.training.batch_size, asked.config.model.spec().num_layers) == (32, 3)
    assert (asked.options.memory_constraint, asked.options.search_space) == (2, "data")


def test_zero_is_the_planners_choice_unless_it_is_said(run):
    for words, expected in (((), "auto"), (("--zero-stage", "1"), 1)):
        asked = command.parse([run, "--cluster", "cpu:8", *words])
        assert asked.options.zero_stage == expected


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clustre", "cpu:8"], "command line: --clustre is unknown; did you mean --cluster?"),
        (["--memroy", "3"], "--memroy is unknown; did you mean --memory?"),
        (["--xyzzy", "3"], "--xyzzy is unknown; python -m artifex.plan --help lists the options"),
        (["--cluster", "gpu:h10:2x8"], "cluster 'gpu:h10:2x8' is of no hardware that is known; did you mean gpu:h100"),
        (["--cluster", "tpu:v5e:4"], "cluster 'tpu:v5e:4' has the shape '4'; expected 2 sizes of a slice"),
        (["--top", "0"], "topk must be greater than or equal to 1, got 0"),
        (["--top", "many"], "must be a valid integer, got 'many'"),
        (["--zero-stage", "4"], "zero_stage must"),
        (["--objective", "speed"], "objective must be"),
        (["--search-space", "data,tensors"], "search_space must be"),
        (["--time-limit", "soon"], "--time-limit is 'soon'; expected seconds above 0"),
        (["--verify", "--no-verify"], "--verify and --no-verify are both given; give one"),
        (["--training.batchsize", "8"], "training.batchsize is unknown; did you mean"),
        (["--cluster", "gpu:a100:1x8", "--verify", *FAST], "--verify: no compiler knows gpu:a100:1x8; leave it out"),
        (["other.yaml"], "there can be one CONFIG, got"),
        (["--load-plan-path", "no.yaml"], "no.yaml"),
        (["--cluster", "cpu:8", "--zero-ngroups", "3", "--zero-stage", "1"], "zero_ngroups must divide the 8 devices"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_line_and_code_2(run, capsys, words, says):
    assert says in refused(capsys, run, *words)


def test_where_nothing_fits_the_code_is_1_and_nothing_is_written(run, tmp_path, capsys):
    words = (run, "--cluster", "cpu:8", "--memory", "0.00001", "--out", str(tmp_path / "plans"), *FAST)
    said = refused(capsys, *words, code=1)
    assert said.startswith("nothing fits 10.49 KiB a device: 'llama-nano' on 8 devices needs at least ")
    assert not (tmp_path / "plans").exists()


def test_help_has_every_option_and_comes_without_jax():
    code = "import sys; from artifex import plan; sys.argv = ['plan', '--help']\ntry:\n plan.main()\nfinally:\n"
    code += " print('jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, jax = ended.stdout.splitlines()
    assert jax == "False"
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    from artifex.scaling.autodist.config import AutoDistConfig

    assert {f"--{name.replace('_', '-')}" for name in AutoDistConfig.model_fields} <= set(flags)
    assert {"--cluster", "--memory", "--top", "--out", "--verify", "--no-verify", "--time-limit"} <= set(flags)
    assert len(flags) == len(set(flags))


def test_the_devices_present_are_measured_into_a_folder(tmp_path, capsys, monkeypatch):
    from artifex.scaling.autodist import profile

    small = profile.Sizes(products=(8,), dtypes=("float32",), elementwise=(64,), collectives=(64,), turns=1, repeats=1)
    whole = profile.measure
    monkeypatch.setattr(profile, "measure", lambda **given: whole(sizes=small, **given))
    folder = tmp_path / "measured"
    said = lines_of(capsys, "profile", "--profile-dir", str(folder), "--parallel-profile", "false")
    assert (folder / "cpu" / FILE).exists() and said[-1] == str(folder / "cpu" / FILE)
    asked = command.parse(["--profile-dir", str(folder), "--model.num-layers", "1", *FAST])
    assert command.planned(asked).cluster.hardware.source.startswith("measured on cpu")
    assert "--topp is unknown" in refused(capsys, "profile", "--topp", "1")
    assert "profile takes no file, got x.yaml" in refused(capsys, "profile", "x.yaml")


def test_a_plan_that_is_proved_was_compiled_and_says_what_it_takes(run, tmp_path, capsys):
    words = (run, "--cluster", "cpu:8", "--verify", "--top", "1", "--out", str(tmp_path), *FAST)
    said = lines_of(capsys, *words)
    assert "compiling the first 1 for cpu:8" in said
    values = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))
    predicted, proof = values["predicted"], values["proof"]
    assert proof["bytes"] > sum(size for part, size in predicted["bytes"].items() if part != "step")
    assert sum(proof["sent_bytes"].values()) == pytest.approx(sum(predicted["sent_bytes"].values()), rel=0.05)
    (compiled,) = (line for line in said if line.startswith("  compiled: "))
    off = number(compiled, r"predicted ([+-][\d.]+)%")
    assert predicted["bytes_in_all"] / proof["bytes"] - 1 == pytest.approx(off / 100, abs=1e-3)


def test_a_runner_up_that_was_compiled_says_what_came_of_it(answer):
    """A faster one that does not fit would else look better than the choice."""
    one, two, *_ = answer.runners
    proofs = {one.spread: Proof(answer.limit + 1, {}, "XLA", 1.0), two.spread: Proof(None, {}, "XLA", 1.0, "aborted")}
    found = dataclasses.replace(answer, proofs=proofs)
    assert found.lost(one).startswith(answer.lost(one)) and found.lost(one).endswith("which does not fit")
    assert found.lost(two) == f"{answer.lost(two)}, not compiled: aborted"
    points = {name: some.get_offsets().tolist() for some in drawn(found)[0].collections if (name := some.get_label())}
    assert len(points["did not fit"]) == len(answer.over) + 2


@pytest.mark.slow
def test_a_plan_whose_step_does_not_fit_when_compiled_is_no_answer(run, tmp_path, capsys):
    """XLA needs more than is predicted for a limit just above the prediction, or the plan fits."""
    words = (run, "--cluster", "cpu:8", "--out", str(tmp_path), "--top", "2", *FAST)
    lines_of(capsys, *words)
    whole = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))["predicted"]["bytes_in_all"]
    memory = str(1.001 * whole / 2**30)
    try:
        lines_of(capsys, *words, "--memory", memory, "--verify")
    except SystemExit as ended:
        assert ended.code == 1
        said = capsys.readouterr().err
        assert "no candidate fits when it is compiled for cpu:8" in said and "needs " in said
    else:
        values = yaml.safe_load((tmp_path / "plan.yaml").read_text(encoding="utf-8"))
        assert values["proof"]["bytes"] <= values["cluster"]["limit_bytes"]


@pytest.fixture(scope="module")
def answer(run):
    """A plan among several, of which some do not fit."""
    asked = command.parse([run, "--cluster", "cpu:8", "--top", "4", "--search-space", "data,fsdp"])
    found = command.planned(asked)
    assert len(found.runners) > 2
    return dataclasses.replace(found, runners=found.runners[:-1], over=found.runners[-1:])


def drawn(found):
    """(axes, labels of what is drawn, the other texts)."""
    figure = frontier(found)
    (axes,) = figure.axes
    beside = [text.get_text() for text in axes.texts if not (text.get_gid() or "").startswith("strategy")]
    return axes, axes.get_legend_handles_labels()[1], beside


@pytest.mark.parametrize(("times", "near"), [(1.05, True), (20.0, False), (4000.0, False), (0.01, False)])
def test_a_limit_that_is_far_is_an_arrow_at_the_edge_and_squeezes_nothing(answer, times, near):
    limit = int(times * answer.estimate.whole)
    axes, labels, texts = drawn(dataclasses.replace(answer, limit=limit))
    every = [answer.best, *answer.runners, *answer.over]
    unit = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[axes.get_xlabel().split(", ")[1]]
    (left, right), sizes = axes.get_xlim(), [one.estimate.whole / unit for one in every]
    assert left < min(sizes) <= max(sizes) < right
    assert any(label.startswith("limit ") for label in labels) == near and (texts == []) == near
    assert (left < limit / unit < right) == near
    if not near:
        assert max(sizes) - min(sizes) > (right - left) / 5
        assert texts[0].endswith("\N{RIGHTWARDS ARROW}") == (times > 1)
        assert texts[0].startswith("\N{LEFTWARDS ARROW}") == (times < 1)


def test_figures_of_the_picture_have_units_that_suit_them(answer):
    assert drawn(answer)[0].get_xlabel() == "memory of a device, MiB"
    great = dataclasses.replace(answer.estimate, own=300 * 2**30)
    axes, _, texts = drawn(dataclasses.replace(answer, best=dataclasses.replace(answer.best, estimate=great)))
    assert axes.get_xlabel() == "memory of a device, GiB" and 300 < axes.get_xlim()[1] < 400
    assert texts == []  # 32 GiB are near


@pytest.mark.parametrize("alone", [True, False])
def test_the_frontier_goes_through_the_plan_that_beats_all_others(answer, alone):
    found = dataclasses.replace(answer, runners=() if alone else answer.runners, over=() if alone else answer.over)
    if not alone:  # the least memory as well as the least time
        best = dataclasses.replace(answer.estimate, own=0.0)
        found = dataclasses.replace(found, best=dataclasses.replace(answer.best, estimate=best))
    axes, labels, _ = drawn(found)
    assert "frontier" in labels
    line = next(line for line in axes.get_lines() if line.get_label() == "frontier")
    (star,) = (one for one in axes.collections if one.get_label().startswith("chosen"))
    at = star.get_offsets()[0]
    corners = [*zip(line.get_xdata(), line.get_ydata(), strict=True)]
    assert corners == [(at[0], axes.get_ylim()[1]), (at[0], at[1]), (axes.get_xlim()[1], at[1])]


def test_parts_under_a_hundredth_and_single_things_are_said_as_one_would(answer):
    assert [share_text(share) for share in (0, 0.004, 0.0099, 0.01, 0.5, 1)] == [
        "0%", "under 1%", "under 1%", "1%", "50%", "100%"]  # fmt: skip
    lines = str(dataclasses.replace(answer, limit=2**60)).splitlines()
    assert any(line.startswith("  in all") and "under 1% of" in line for line in lines)
    assert "  rows        16 in 1 microbatch" in lines
    same = dataclasses.replace(answer, runners=(answer.best,))
    assert f"  {answer.spread}: as fast, as much memory" in str(same).splitlines()


@pytest.mark.parametrize(("times", "part"), [(1.5, "half"), (3, "a quarter"), (7, "an eighth"), (15, "1/16")])
def test_the_part_of_the_rows_that_would_fit_is_said_in_words(answer, times, part):
    limit = answer.estimate.state + math.ceil(answer.estimate.own / times)
    least = dataclasses.replace(answer.best, spread=spread_of("data 8"))
    (said,) = (line for line in remedies(least, limit, AutoDistConfig(mesh_col=8)) if line.startswith("batches"))
    assert said.startswith(f"batches of {part} of the rows would need about ")


def tiny(tmp_path, **device) -> Config:
    """Two steps of the tiny decoder."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "text.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    return Config.from_dict(
        {
            "model": {"name": "llama-nano", **TEXT},
            "data": {"source": str(source), "sequence_length": 64},
            "training": {"batch_size": 16, "steps": 2, "validation_batches": 1, "sample_tokens": 1},
            "optimizer": {"name": "adamw", "warmup_steps": 0},
            "logging": {"progress": False},
            "device": device,
        }
    )


def test_a_run_that_partitions_itself_prints_the_plan_first_and_follows_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # whatever was measured on this machine
    config = tiny(tmp_path, auto_partition=True, partition_search_space="data")
    folder = train.train(config, tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("plan 'default' for llama-nano on cpu:8, 8 devices of ")
    followed = Config.from_file(next(folder.glob("config.*")))
    mesh = next(line.split(maxsplit=1)[1] for line in said if line.startswith("  mesh"))
    for part in mesh.split(" x "):
        axis, size = part.split()
        assert getattr(followed.device, axis) == int(size)
    assert not followed.device.auto_partition
    assert any("step" in line or "training" in line for line in said)


def test_wrong_wishes_of_a_run_that_partitions_itself_are_one_line(tmp_path):
    from artifex.config_io import ConfigError

    with pytest.raises(ConfigError, match="auto_partition"):
        tiny(tmp_path, auto_partition=True, data=8)
    with pytest.raises(ConfigError, match="but auto_partition is false; set it, or leave this out"):
        tiny(tmp_path, partition_objective="memory")
    wrong = tiny(tmp_path, auto_partition=True, partition_constraints="max_memory=1GB")
    with pytest.raises(ConfigError) as caught:
        train.dry_run(wrong)
    assert str(caught.value).isprintable() and "did you mean max_memory_per_device?" in str(caught.value)
    little = tiny(
        tmp_path,
        auto_partition=True,
        partition_search_space="data",
        partition_constraints={"max_memory_per_device": "10KB"},
    )
    with pytest.raises(ValueError, match=r"nothing fits 10 KiB a device: 'llama-nano' on 8 devices needs at least"):
        train.dry_run(little)
