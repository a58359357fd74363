"""What a notebook stores is what it prints: cells tagged `compared` are held against a fresh run.

Tagged is what is the same on every machine and Python: names, shapes, layouts, messages. What was trained, or read of
Python's own library, is not. `pytest -n 0 --overwrite notebooks/NAME.ipynb` runs a notebook and stores what it printed.

Those that train for a minute or more are slow tests: `pytest -m slow notebooks` runs them, as `.ci/run` does.
"""

import dataclasses
import difflib
from typing import ClassVar

import nbformat
import nbmake.pytest_items
import pytest
from nbmake.nb_result import NotebookError, NotebookResult
from nbmake.nb_run import NB_VERSION, NotebookRun

EVERY_DAY = ("02_meshes_and_axes.ipynb",)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.suffix == ".ipynb" and item.path.name not in EVERY_DAY:
            item.add_marker(pytest.mark.slow)


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell printed, and the text of its last value."""
    outputs = (output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return "".join(outputs).rstrip("\n")


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs, what was printed piece by piece as one."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


class StoredRun(NotebookRun):
    """A run on as many devices as a reader has, which fails where a cell no longer prints what is stored."""

    overwrite: ClassVar[bool] = False

    def execute(self) -> NotebookResult:
        stored = nbformat.read(str(self.filename), NB_VERSION)
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("JAX_NUM_CPU_DEVICES", raising=False)  # of the tests
            fresh = super().execute()
        fresh.nb.metadata = stored.metadata
        for old, new in zip(stored.cells, fresh.nb.cells, strict=True):
            new.metadata = old.metadata  # without the seconds it took
            if new.cell_type == "code":
                new.execution_count = None
                new.outputs = joined(new.outputs)
                for output in new.outputs:
                    if "execution_count" in output:
                        output.execution_count = None
                    if "image/png" in output.get("data", {}):
                        output.data.pop("text/plain", None)  # the picture's size in words
        return fresh if fresh.error or self.overwrite else self.compared(stored, fresh)

    def compared(self, stored: nbformat.NotebookNode, fresh: NotebookResult) -> NotebookResult:
        """`fresh`, with an error where a tagged cell differs."""
        for index, (old, new) in enumerate(zip(stored.cells, fresh.nb.cells, strict=True)):
            if "compared" in old.metadata.get("tags", []) and printed(old) != printed(new):
                lines = difflib.unified_diff(
                    printed(old).split("\n"), printed(new).split("\n"), "stored", "now", lineterm="", n=0
                )
                remedy = f"store it by pytest -n 0 --overwrite notebooks/{self.filename.name}"
                summary = f"cell {index} of {self.filename.name} no longer prints what is stored; {remedy}"
                return dataclasses.replace(fresh, error=NotebookError(summary, "\n".join([summary, *lines]), index))
        return fresh


def pytest_configure(config: pytest.Config) -> None:
    StoredRun.overwrite = config.option.overwrite
    nbmake.pytest_items.NotebookRun = StoredRun
