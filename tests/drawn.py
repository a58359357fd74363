"""What a test asks of a picture: its parts by gid, and that no words cover each other."""

import itertools
from typing import Any
from xml.etree import ElementTree

from matplotlib.text import Text

from artifex.visualize import svg


def gids(figure, start="") -> dict[str, Any]:
    """gid -> artist, of those whose gid starts so. No gid stands twice."""
    found = [artist for artist in figure.findobj() if (artist.get_gid() or "").startswith(start) and artist.get_gid()]
    named = {artist.get_gid(): artist for artist in found}
    assert len(named) == len(found), "a gid stands for one artist"
    return named


def words(figure):
    """Every text that is seen, in order."""
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def texts(figure):
    return [text.get_text() for text in words(figure)]


def overlapping(figure):
    """Pairs of texts of which one covers a part of the other."""
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in words(figure)]
    pairs = itertools.combinations(boxes, 2)
    return [(one, other) for (one, box), (other, there) in pairs if box.padded(-0.5).overlaps(there.padded(-0.5))]


def svg_words(figure):
    """The texts of a figure's SVG, read as XML."""
    root = ElementTree.fromstring(svg(figure))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(one.itertext()).strip() for one in root.iter("{http://www.w3.org/2000/svg}text")]
