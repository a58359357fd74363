"""The house: imports run one way, files stay small and stand in the README's tree, start-up imports no JAX."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "artifex").rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(module: str) -> set[str]:
    """Every module that `module` imports, at its top, inside a function or for a type checker alone."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} imports relatively; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module or "" for name in names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def those_in(package: str) -> set[str]:
    return {module for module in FILES if within(module, package)}


def directions() -> dict[str, tuple[set[str], set[str]]]:
    """Rule -> the modules it is about, and the modules of this package that they may import."""
    everything, axes, models = set(FILES), {"artifex.scaling.axes"}, those_in("artifex.models")
    # what a model may know of scaling: names, how it is run, and which process writes its weights
    names = {f"artifex.scaling.{module}" for module in ("axes", "execution", "local", "processes", "remat")}
    families = [
        those_in(f"artifex.models.{path.parent.name}") for path in (ROOT / "artifex/models").glob("*/config.py")
    ]
    shared = models.difference(*families)
    sections = {f"artifex.config_{module}" for module in ("device", "io", "section")}
    # train, sample and what else runs as `python -m`
    programs = {module for module in FILES if '__name__ == "__main__"' in FILES[module].read_text(encoding="utf-8")}
    return {
        "names import nothing": ({"artifex.scaling.names"}, set()),
        "rules import names alone": ({"artifex.scaling.rules"}, {"artifex.scaling.names"}),
        "axes import names and rules alone": (axes, {"artifex.scaling.names", "artifex.scaling.rules"}),
        "layers import no other model": (
            {"artifex.models.layers"},
            names | {"artifex.models.cpu", "artifex.models.module"},
        ),
        **{f"{min(family)} imports no other family": (family, family | shared | names) for family in families},
        "only the list of models imports families": (shared - {"artifex.models"}, shared | names),
        "models import names and execution of all scaling": (models, models | names),
        "scaling imports no model, data or training": (
            those_in("artifex.scaling"),
            those_in("artifex.scaling") | {"artifex", "artifex.config", *sections},
        ),
        "profiles and pictures stand on top": (
            everything - those_in("artifex.profiling") - those_in("artifex.visualize") - programs - {"artifex"},
            everything - those_in("artifex.profiling") - those_in("artifex.visualize"),
        ),
        "tuning stands on top": (
            everything - those_in("artifex.tuning") - programs - {"artifex"},
            everything - those_in("artifex.tuning"),
        ),
        "nothing imports a program": (everything, everything - programs),
    }


@pytest.mark.parametrize("rule", directions())
def test_imports_run_one_way(rule):
    modules, allowed = directions()[rule]
    assert modules, "the rule is about no file"
    wrong = {
        module: sorted(name for name in imports(module) - allowed if within(name, "artifex"))
        for module in sorted(modules)
    }
    assert {module: names for module, names in wrong.items() if names} == {}


def test_the_axes_need_only_jax_flax_and_their_names():
    outside = {name.split(".")[0] for name in imports("artifex.scaling.axes")} - set(sys.stdlib_module_names)
    assert outside <= {"jax", "flax", "artifex"}


def test_only_checkpoints_import_orbax():
    assert [module for module in FILES if any(within(name, "orbax") for name in imports(module))] == [
        "artifex.scaling.checkpoints",
        "artifex.scaling.orbax_writer",
    ]


def test_models_name_no_mesh_device_or_partition_spec():
    words = re.compile(r"\b(PartitionSpec|NamedSharding|Mesh|jax\.devices|device_count|jax\.sharding)\b")
    models = sorted(those_in("artifex.models"))
    assert [module for module in models if words.search(FILES[module].read_text(encoding="utf-8"))] == []


def test_configuration_command_line_and_model_listing_import_no_jax():
    heavy = "{'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'grain', 'matplotlib', 'tokenizers', 'torch'}"
    program = f"import sys, artifex.config, artifex.cli, artifex.models; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", FILES)
def test_a_file_is_one_idea_read_in_one_sitting(module):
    lines = FILES[module].read_text(encoding="utf-8").splitlines()
    functions = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert len(lines) < 400
    assert {name: size for name, size in sizes.items() if size >= 70} == {}
    assert lines[0].startswith('"""'), "the first line says what the file is about"


def defines_something(module: str) -> bool:
    """False for an `__init__.py` that only says what its folder is for."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in TREES[module].body)


def readme_tree() -> dict[str, str]:
    """Path -> comment, from the README's drawing of the tree: names, indented by folder, then what they are for."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [
        block
        for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
        if re.search(r"^\W*artifex/", block, re.M)
    ]
    assert len(blocks) == 1, "README.md draws the tree of artifex/ in one code block"
    tree, folders = {}, []
    for line in re.sub("[│├└─]", " ", blocks[0]).splitlines():
        names, comment = re.fullmatch(r"((?:\s*[\w.\-*]+(?:/|\.\w+)(?=[\s:]|$))*)[\s#:]*(.*)", line).groups()
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        for name in names.split():
            path = "".join(name for _, name in folders) + name
            if name.endswith("/"):
                folders.append((indent, name))
            tree[path] = comment
    return tree


def test_the_readme_shows_every_file_with_a_comment():
    tree = readme_tree()
    there = {FILES[module].relative_to(ROOT).as_posix() for module in FILES if defines_something(module)}
    shown = {path: comment for path, comment in tree.items() if path.startswith("artifex/") and path.endswith(".py")}
    assert sorted(there - set(shown)) == []
    assert sorted(path for path in shown if not (ROOT / path).exists()) == []
    assert sorted(path for path, comment in shown.items() if not comment) == []


def test_the_api_reference_shows_every_module():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", pages, re.M))
    assert sorted({module for module in FILES if defines_something(module)} - shown) == []
    assert sorted(shown - set(FILES)) == []


def test_every_path_argument_takes_text_and_paths():
    paths_alone = {
        f"{module}.{node.name}({argument.arg})"
        for module in FILES
        for owner in ast.walk(TREES[module])
        if isinstance(owner, ast.Module | ast.ClassDef)
        for node in owner.body
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__")
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Path"
    }
    assert paths_alone == set()
