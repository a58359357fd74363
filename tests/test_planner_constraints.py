"""What may divide which weight: constraints are read strictly and honoured, unused and contradictory ones are named."""

import pytest

from artifex.config_io import ConfigError
from artifex.scaling.autodist.constraints import Constraint, Limit, matching, module_matches, module_patterns, read

PARAMETERS = {
    "embed/table": ("vocab", "embed"),
    "blocks/attention/query": ("layers", "embed", "heads", "head_dim"),
    "blocks/attention/out": ("layers", "heads", "head_dim", "embed"),
    "blocks/mlp/up": ("layers", "embed", "mlp"),
    "blocks/norm/scale": ("layers", "embed"),
    "temperature": (),
}
"""Those of a small decoder."""


def written(path, text):
    path = path / "constraints.yaml"
    path.write_text(text)
    return path


def test_a_file_says_what_may_divide_modules_parameters_and_axes(tmp_path):
    path = written(
        tmp_path,
        "# of a small decoder\n"
        "- module: attention\n"
        "  allowed_axes: [tensor, fsdp]\n"
        '- {parameter: "embed/*", replicate: true}\n'
        "- {axis: experts, allowed_axes: [expert], replicate: false}\n"
        "- {axis: mlp, replicate: false}\n",
    )
    assert read(path) == (
        Constraint("module", "attention", ("tensor", "fsdp"), False, 2, str(path)),
        Constraint("parameter", "embed/*", (), False, 4, str(path)),
        Constraint("axis", "experts", ("expert",), True, 5, str(path)),
        Constraint("axis", "mlp", None, True, 6, str(path)),
    )
    assert read(written(tmp_path, "[]")) == ()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": is empty"),
        ("module: mlp\n", ": must hold a list of constraints, such as '- {module: attention, allowed_axes: [tensor]}'"),
        ("- {module: mlp\n", ": is not valid YAML: expected ',' or '}'"),
        ("- &a {module: mlp}\n- *a\n", ": 0 has a YAML anchor or alias ('a') at line 1"),
        ("- {module: mlp, module: norm}\n", ": 0.module is given twice"),
        ("- mlp\n", ", line 1: a constraint must be keys and values, such as {module: mlp}, got 'mlp'"),
        (
            "- module: mlp\n  allowed_axis: [tensor]\n",
            ", line 2: allowed_axis is unknown; did you mean allowed_axes?",
        ),
        (
            "- {module: mlp, replicate: true}\n- {replicate: true}\n",
            ", line 2: a constraint is about one of module, parameter and axis, got none of them",
        ),
        (
            "- {module: mlp, axis: mlp, replicate: true}\n",
            ", line 1: a constraint is about one of module, parameter and",
        ),
        ("- {module: mlp}\n", ", line 1: the constraint on module says nothing; give allowed_axes or replicate"),
        ("- module: mlp\n  replicate: yes\n", ", line 2: replicate must be a valid boolean or null, got 'yes'"),
        (
            "- module: mlp\n  allowed_axes: [data]\n  replicate: true\n",
            ", line 3: replicate is true beside allowed_axes ['data']; leave one of them out",
        ),
        (
            "- {module: mlp, allowed_axes: [], replicate: false}\n",
            ", line 1: replicate is false beside allowed_axes []",
        ),
        (
            "- {module: mlp, allowed_axes: tensor}\n",
            ", line 1: allowed_axes must be a valid list or null, got 'tensor'",
        ),
        (
            "- module: mlp\n  allowed_axes: [data, tensr]\n",
            ", line 2: allowed_axes lists 'tensr', no mesh axis; did you mean tensor?",
        ),
        (
            "- {module: mlp, allowed_axes: [tp]}\n",
            ", line 1: allowed_axes lists 'tp', no mesh axis; did you mean tensor?",
        ),
        ("- {axis: head, replicate: true}\n", ", line 1: axis 'head' is no logical axis; did you mean heads?"),
        ("- {module: 3, replicate: true}\n", ", line 1: module must be a valid string or null, got 3"),
        ("- {module: '', replicate: true}\n", ", line 1: module must have at least 1 character"),
        ("- {module: a..b, replicate: true}\n", ", line 1: module must be module names"),
        ("- {module: 'a,b', replicate: true}\n", ", line 1: module must be one module, got 'a,b'"),
        ("- " * 40 + "a\n", ": 0.0.0 is nested deeper than 16 levels"),
    ],
)
def test_a_malformed_file_is_answered_with_its_line_and_key(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}{says}") and line.isprintable()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("layer", "transformer.layer", True),
        ("layer", "encoder/layer", True),
        ("transformer.layer", "model/transformer/layer", True),
        ("transformer/layer", "transformer.layer", True),
        ("layer", "transformer.my_layer", False),  # parts are whole
        ("layer", "transformer.layer.0", False),  # the end of it is 0
        ("transformer.layer", "layer", False),
        ("Layer", "transformer.layer", False),
        ("encoder.*.mlp", "encoder.blocks.mlp", True),
        ("encoder.*.mlp", "encoder.blocks.more.mlp", False),
        ("block_?", "unet/block_3", True),
        ("ROOT", "transformer.layer", True),
        ("ROOT", "", True),
        ("*", "", False),
        ("*", "transformer", True),
    ],
)
def test_a_module_is_named_by_the_end_of_its_path(pattern, path, matches):
    assert module_matches(pattern, path) is matches


def test_modules_are_listed_with_commas():
    assert module_patterns("encoder.layer, mlp") == ("encoder.layer", "mlp")
    assert module_patterns("") == ()


def test_a_constraint_holds_for_what_it_matches_alone():
    attention = Constraint("module", "attention", ("tensor", "fsdp"))
    norms = Constraint("parameter", "blocks.norm.*", ())
    divided = Constraint("axis", "mlp", None, must_divide=True)
    limits = matching([attention, norms, divided], PARAMETERS)
    assert limits.parameters == {
        "blocks/attention/query": Limit(("tensor", "fsdp")),
        "blocks/attention/out": Limit(("tensor", "fsdp")),
        "blocks/norm/scale": Limit(()),
    }
    assert limits.axes == {"mlp": Limit(None, must_divide=True)}
    assert limits.unused == []


def test_the_whole_model_is_a_module():
    assert set(matching([Constraint("module", "ROOT", ("fsdp",))], PARAMETERS).parameters) == set(PARAMETERS)


def test_several_constraints_on_one_parameter_all_hold():
    wide, narrow = (
        Constraint("module", "blocks", ("fsdp", "data", "tensor")),
        Constraint("module", "mlp", ("tensor", "fsdp")),
    )
    some = Constraint("parameter", "*/up", None, must_divide=True)
    assert matching([wide, narrow, some], PARAMETERS).parameters["blocks/mlp/up"] == Limit(("fsdp", "tensor"), True)
    apart = matching([Constraint("module", "mlp", ("data",)), Constraint("module", "blocks", ("tensor",))], PARAMETERS)
    assert apart.parameters["blocks/mlp/up"] == Limit(())  # nobody asked for it to be divided


def test_what_matches_nothing_is_reported():
    gone = [
        Constraint("module", "atention", ()),
        Constraint("parameter", "head/*", ()),
        Constraint("axis", "experts", ()),
        Constraint("module", "query", ()),  # a parameter, no module
    ]
    assert matching([*gone, Constraint("module", "mlp", ())], PARAMETERS).unused == gone
    assert [str(Constraint("module", "atention", (), line=3))] == ["module 'atention' (line 3)"]


def test_the_axes_of_activations_can_be_constrained():
    logits = Constraint("axis", "act_vocab", ("tensor",))
    assert matching([logits], PARAMETERS).unused == [logits]
    limits = matching([logits], PARAMETERS, ["batch", "act_vocab"])
    assert (limits.axes, limits.unused) == ({"act_vocab": Limit(("tensor",))}, [])


@pytest.mark.parametrize(
    ("limit", "allowed", "refused"),
    [
        (Limit(), [(), ("data", "tensor")], []),
        (Limit(()), [()], [("fsdp",)]),
        (Limit(("tensor", "fsdp")), [(), ("fsdp",), ("fsdp", "tensor")], [("data",), ("data", "fsdp")]),
        (Limit(("tensor",), must_divide=True), [("tensor",)], [(), ("data",)]),
        (Limit(None, must_divide=True), [("data",)], [()]),
    ],
)
def test_a_limit_allows_what_it_says(limit, allowed, refused):
    assert all(limit.allows(axes) for axes in allowed) and not any(limit.allows(axes) for axes in refused)


CONTRADICTIONS = {
    "whole and divided": (
        "- {module: mlp, replicate: true}\n- {parameter: blocks/*, replicate: false}\n",
        "contradictory for parameter 'blocks/mlp/up': parameter 'blocks/*' (line 2) must be divided, "
        "module 'mlp' (line 1) stays whole; change one of them",
    ),
    "nothing in common": (
        "- {module: mlp, allowed_axes: [tensor]}\n- {module: blocks, allowed_axes: [data, fsdp], replicate: false}\n",
        "contradictory for parameter 'blocks/mlp/up': module 'blocks' (line 2) must be divided by data or fsdp alone, "
        "module 'mlp' (line 1) may be divided by tensor alone; change one of them",
    ),
    "nothing in common of three": (
        "- {module: mlp, allowed_axes: [tensor, data]}\n"
        "- {module: blocks, allowed_axes: [data, fsdp], replicate: false}\n"
        "- {parameter: '*/up', allowed_axes: [tensor, fsdp]}\n",
        "contradictory for parameter 'blocks/mlp/up': module 'blocks' (line 2) must be divided by data or fsdp alone, "
        "module 'mlp' (line 1) may be divided by tensor or data alone, "
        "parameter '*/up' (line 3) may be divided by tensor or fsdp alone; change one of them",
    ),
    "an axis twice": (
        "- {axis: mlp, replicate: true}\n- {axis: mlp, replicate: false}\n",
        "contradictory for axis 'mlp': axis 'mlp' (line 2) must be divided, axis 'mlp' (line 1) stays whole; change",
    ),
    "an axis of a whole parameter": (
        "- {parameter: embed/table, replicate: true}\n- {axis: vocab, replicate: false}\n",
        "contradictory for parameter 'embed/table': axis 'vocab' (line 2) must be divided, "
        "parameter 'embed/table' (line 1) stays whole; change",
    ),
    "every axis of a divided parameter": (
        "- {parameter: embed/table, replicate: false}\n"
        "- {axis: vocab, replicate: true}\n"
        "- {axis: embed, replicate: true}\n",
        "contradictory for parameter 'embed/table': parameter 'embed/table' (line 1) must be divided, "
        "axis 'vocab' (line 2) stays whole, axis 'embed' (line 3) stays whole; change",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictory_constraints_are_named_with_their_lines(tmp_path, case):
    text, says = CONTRADICTIONS[case]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        matching(read(path), PARAMETERS)
    assert str(caught.value).startswith(f"{path}: {says}")


def test_constraints_that_meet_on_no_parameter_do_not_contradict():
    whole, divided = Constraint("module", "mlp", ()), Constraint("module", "attention", None, must_divide=True)
    one_axis = Constraint("axis", "vocab", ()), Constraint("parameter", "embed/table", None, must_divide=True)
    assert matching([whole, divided, *one_axis], PARAMETERS).unused == []
