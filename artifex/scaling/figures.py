"""A figure without pyplot: it shows itself in a notebook, and is written as PNG, as SVG, or as SVG text for a page."""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
DPI = 110
HATCHES = ("", "////", "....", "\\\\\\\\", "xx", "--", "oo", "||", "++", "**")
LINES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (10, 3)))
# light to dark in greyscale too, each with dark text readable on it
FILLS = ("#9ecae1", "#fdd0a2", "#a1d99b", "#dadaeb", "#fcbba1", "#d9d9d9", "#c7e9c0", "#fee391", "#bcbddc", "#f1b6da")
INKS = ("#1f4e9c", "#c2410c", "#166534", "#7e22ce", "#8a6d00", "#0e7490")


class Picture(Figure):
    """A matplotlib figure that a notebook shows when a cell ends with it, whether or not pyplot was ever imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
        return file.getvalue()


def picture(width: float, height: float) -> Picture:
    """An empty figure of so many inches, drawn by Agg, whose parts are kept apart from each other."""
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_path(path: str | os.PathLike[str] | None) -> None:
    """Raise `ValueError` for a file that is neither PNG nor SVG; called before anything is drawn."""
    if path is not None and Path(path).suffix.lower() not in ENDINGS:
        raise ValueError(f"picture {Path(path).name!r} ends with neither .png nor .svg; give it one of these endings")


def finish(figure: Picture, path: str | os.PathLike[str] | None) -> Picture:
    """The figure, laid out for good, written to `path` where one is given. Folders on the way are made."""
    for _ in range(2):  # what has been laid out once has other margins than what has not
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".svg":
            path.write_text(svg(figure), encoding="utf-8")
        else:
            figure.savefig(path, format="png", dpi=DPI, bbox_inches="tight")
    return figure


def svg(figure: Figure) -> str:
    """A figure as the text of one `<svg>` element, for a file or inside HTML; the same figure gives the same text.

    Words stay words, which can be searched and read aloud. Identifiers are unlike those of any other figure, so that
    several stand on one page.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "artifex"}):
        figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    own = f"a{hashlib.sha256(text.encode()).hexdigest()[:10]}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{own}", text)
    title = html.escape(" ".join(_title(figure).split()))
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _title(figure: Figure) -> str:
    """The first heading of a figure."""
    titles = [figure.get_suptitle(), *(axes.get_title(loc) for axes in figure.axes for loc in ("left", "center"))]
    return next((title for title in titles if title), "a figure")
