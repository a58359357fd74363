"""Nothing that is read is run: no pickle, no eval, no import by a name from data, no YAML constructor, no shell."""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "artifex"
MODULES = (
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch",
    "code",
    "runpy",
)
BUILTINS = ("eval", "exec", "compile", "__import__")
PROGRAMS = ("system", "popen", "exec", "spawn", "posix_spawn", "startfile")  # how functions of os begin
PICKLED = ("load", "read_array")  # of NumPy, whose arrays of objects are pickles
YAML = ("parse", "compose", "dump", "SafeLoader", "SafeDumper", "YAMLError", "MarkedYAMLError")  # and events and nodes
ALLOWED = {
    # its own two names of JAX's plugin for CUDA
    ("scaling/targets.py", "importlib.import_module(name)"),
    ("scaling/targets.py", "importlib.util.find_spec(name)"),
    # of data.source "package:NAME": an identifier, so that no parent package is imported; found, never run
    ("data/text.py", "importlib.util.find_spec(name)"),
    # this very command once more, as it was given
    ("host_memory.py", "os.execve"),
    # names of meshes and placements, none of which reads a file: `torch.load` would be another import
    ("interop/torch.py", "from torch.distributed.device_mesh import"),
    ("interop/torch.py", "from torch.distributed.tensor import"),
    ("interop/torch.py", "from torch.distributed.tensor.placement_types import"),
}


def dotted(node: ast.AST) -> str:
    """ "numpy.load" of that expression, by the usual short names; "" for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return {"np": "numpy"}.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def is_constant(call: ast.Call, keyword: str, value: object) -> bool:
    given = [word.value for word in call.keywords if word.arg == keyword]
    return bool(given) and all(isinstance(word, ast.Constant) and word.value is value for word in given)


def wrong_call(call: ast.Call) -> str | None:
    name = dotted(call.func)
    first, _, last = name.rpartition(".")
    if name in BUILTINS or first == "builtins":
        return name
    if first.startswith("importlib") and last in ("import_module", "find_spec", "reload", "spec_from_file_location"):
        return None if call.args and isinstance(call.args[0], ast.Constant) else ast.unparse(call)
    if first.startswith("numpy") and last in PICKLED and not is_constant(call, "allow_pickle", False):
        return f"{name} without allow_pickle=False"
    if first == "os" and last.startswith(PROGRAMS):
        return name
    for keyword in ("shell", "allow_pickle"):
        if any(word.arg == keyword for word in call.keywords) and not is_constant(call, keyword, False):
            return f"{name} with {keyword}"
    return None


def wrong(tree: ast.AST) -> Iterator[str]:
    """What in some code runs, or could run, what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.split(".")[0]
            if top in (*MODULES, "builtins", "yaml", "importlib", "subprocess", "os"):
                yield f"from {node.module} import"  # by its full name it is seen here
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("yaml."):
            part = dotted(node).split(".")[1]
            if part not in YAML and not part.endswith(("Event", "Node")):
                yield f"yaml.{part}"
        elif isinstance(node, ast.Call) and (found := wrong_call(node)):
            yield found


def test_nothing_that_is_read_is_run():
    found = {
        (file.relative_to(PACKAGE).as_posix(), what)
        for file in sorted(PACKAGE.rglob("*.py"))
        for what in wrong(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import torch.serialization",
        "from marshal import loads",
        "from yaml import load",
        "from importlib import import_module",
        "from subprocess import run",
        "eval(text)",
        "exec(text)",
        "compile(text, name, 'exec')",
        "__import__(name)",
        "builtins.eval(text)",
        "importlib.import_module(said['module'])",
        "importlib.util.find_spec(name)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=trusted)",
        "np.lib.format.read_array(file)",
        "np.save(file, x, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.safe_load(text)",
        "yaml.parse(text, Loader=yaml.UnsafeLoader)",
        "yaml.add_constructor(tag, call)",
        "os.system(line)",
        "os.execv(path, words)",
        "subprocess.run(line, shell=True)",
        "subprocess.Popen(line, shell=fast)",
    ],
)
def test_each_way_of_running_what_is_read_would_be_seen(code):
    assert list(wrong(ast.parse(f"def read():\n{textwrap.indent(code, '    ')}")))


@pytest.mark.parametrize(
    "code",
    [
        "re.compile(pattern)",
        "lowered.compile(compiler_options=options)",
        "np.load(file, allow_pickle=False)",
        "importlib.import_module('jax._src.lib')",
        "yaml.parse(text, Loader=yaml.SafeLoader)",
        "subprocess.run(words)",
    ],
)
def test_what_is_harmless_is_not_taken_for_it(code):
    assert not list(wrong(ast.parse(code)))
