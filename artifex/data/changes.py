"""What reading does to data, in lines: resized, cut, made grey, left out; and the argument that changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Header(NamedTuple):
    """What the head of an image file says of the image."""

    size: int  # bytes of the file
    width: int
    height: int
    colour: bool
    deep: bool  # 16 bits a channel
    transparent: bool
    turned: bool  # by its EXIF orientation


def file_changes(headers: Sequence[Header], image_size: int, channels: int, settings: Mapping[str, str]) -> list[str]:
    """A line for each thing that makes pictures of files differ from what was stored.

    `settings`: what a line calls the arguments `image_size` and `channels`, where a configuration has other names.
    """
    lines = []
    resized = [header for header in headers if (header.width, header.height) != (image_size, image_size)]
    if resized:
        smallest, largest = (choose(resized, key=lambda h: h.width * h.height) for choose in (min, max))
        sizes = list(dict.fromkeys(f"{header.width} x {header.height}" for header in (smallest, largest)))
        setting = f"{settings.get('image_size', 'image_size')} is {image_size}"
        lines.append(f"{_images(len(resized))} of {' to '.join(sizes)} became {image_size} x {image_size} ({setting})")
    cut = [header for header in headers if header.width != header.height]
    if cut:
        lines.append(f"{_images(len(cut))} cut to the middle square (store squares to keep what lies outside)")
    lines += channel_changes(
        sum(header.colour for header in headers), sum(not header.colour for header in headers), channels, settings
    )
    for chosen, what in (
        ([header for header in headers if header.transparent], "with transparency laid on white"),
        ([header for header in headers if header.deep], "of 16 bits became 8 bits"),
        ([header for header in headers if header.turned], "turned upright, as the EXIF orientation says"),
    ):
        if chosen:
            lines.append(f"{_images(len(chosen))} {what}")
    return lines


def channel_changes(coloured: int, grey: int, channels: int, settings: Mapping[str, str]) -> list[str]:
    """The line on colours that became grey, or grey that was repeated."""
    setting = settings.get("channels", "channels")
    if channels == 1 and coloured:
        return [f"{_images(coloured)} in colour became grey ({setting}=3 keeps the colour)"]
    if channels == 3 and grey:
        return [f"{_images(grey)} in grey got three equal channels ({setting}=1 where all are grey)"]
    return []


def left_out(names: Sequence[str], total: int, why: str, setting: str = "") -> list[str]:
    """The line on those of `total` files that were not read, the first of them by name."""
    if not names:
        return []
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    line = f"{len(names):,} of {total:,} files left out, {why}: {some}"
    return [f"{line} ({setting})" if setting else line]


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"
