"""What a source does to its data is said in lines, and the names of classes stay with what was trained on them."""

import numpy as np
import pytest

from artifex.data.classes import find_class, load_classes, save_classes
from artifex.data.images import load_images
from artifex.data.text import load_text

RNG = np.random.default_rng(5)
SETTINGS = {"image_size": "model.image_size", "channels": "model.channels", "corrupt": "data.corrupt"}


def picture(path, width, height, mode, **how):
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pillow.fromarray(RNG.integers(0, 256, (height, width, *depth), dtype=np.uint8), mode=None).save(path, **how)


def lines(folder, **how):
    return list(load_images(folder, **({"image_size": 8, "channels": 3, "settings": SETTINGS} | how)).changes)


def test_pictures_that_are_taken_as_they_are_have_no_line(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png", 8, 8, "RGB")
    assert lines(tmp_path) == []
    assert load_images("digits", image_size=8, channels=1).changes == ()


def test_every_thing_that_is_done_to_pictures_is_a_line_with_the_setting_that_changes_it(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    for number in range(3):
        picture(tmp_path / f"{number}.png", 48, 32, "RGB")
    picture(tmp_path / "small.png", 8, 8, "L")
    picture(tmp_path / "large.jpg", 100, 100, "L")
    assert lines(tmp_path, channels=1) == [
        "4 images of 48 x 32 to 100 x 100 became 8 x 8 (model.image_size is 8)",
        "3 images cut to the middle square (store squares to keep what lies outside)",
        "3 images in colour became grey (model.channels=3 keeps the colour)",
    ]
    assert lines(tmp_path)[2] == "2 images in grey got three equal channels (model.channels=1 where all are grey)"
    assert lines(tmp_path, settings={})[0].endswith("(image_size is 8)")

    other = tmp_path / "other"
    picture(other / "clear.png", 8, 8, "RGBA")
    turned = pillow.Exif()
    turned[0x0112] = 6  # a quarter turn: what is stored as 16 x 8 is 8 x 16
    picture(other / "turned.jpg", 16, 8, "RGB", exif=turned)
    pillow.fromarray(RNG.integers(0, 2**16, (8, 8), dtype=np.uint16)).save(other / "deep.png")
    (other / "broken.png").write_bytes(b"nothing")
    (other / "notes.txt").write_text("notes")
    assert lines(other, corrupt="skip") == [
        "1 image of 8 x 16 became 8 x 8 (model.image_size is 8)",
        "1 image cut to the middle square (store squares to keep what lies outside)",
        "1 image in grey got three equal channels (model.channels=1 where all are grey)",
        "1 image with transparency laid on white",
        "1 image of 16 bits became 8 bits",
        "1 image turned upright, as the EXIF orientation says",
        "1 of 4 files left out, unreadable as images: broken.png (data.corrupt=refuse stops at them)",
        "1 of 5 files left out, neither PNG nor JPEG: notes.txt",
    ]


@pytest.mark.parametrize(
    ("colours", "line"), [(1, []), (3, ["2 images in colour became grey (model.channels=3 keeps the colour)"])]
)
def test_a_palette_counts_by_its_colours(tmp_path, colours, line):
    pillow = pytest.importorskip("PIL.Image")
    for number in range(2):
        grey = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8).repeat(3, axis=-1)
        grey[0, 0] = (255, 0, 0) if colours == 3 else (9, 9, 9)
        pillow.fromarray(grey).quantize(16).save(tmp_path / f"{number}.png")
    assert lines(tmp_path, channels=1) == line


def test_arrays_say_what_was_rounded_turned_grey_or_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=RNG.random((4, 8, 8, 3), np.float32), x_val=np.zeros(3))
    assert lines(tmp_path / "a.npz", channels=1) == [
        "4 images of float32 rounded to 256 levels",
        "array x_val of a.npz was not read",
        "4 images in colour became grey (model.channels=3 keeps the colour)",
    ]
    np.save(tmp_path / "b.npy", np.zeros((4, 8, 8), np.uint8))
    assert lines(tmp_path / "b.npy", channels=1) == []
    with pytest.raises(ValueError, match=r"holds images of 8x8, but model.image_size is 6: set model.image_size to 8"):
        lines(tmp_path / "b.npy", image_size=6)


def test_a_text_that_is_read_whole_has_no_line(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 20)
    assert load_text(tmp_path).changes == load_text(tmp_path / "a.txt").changes == ()


def test_class_names_are_read_back_as_they_were_written(tmp_path):
    names = ("circle", "square", "Grün 🙂", 'with "quotes"')
    save_classes(names, tmp_path / "weights")
    assert load_classes(tmp_path / "weights", 4) == names
    assert load_classes(tmp_path, 3) == ("0", "1", "2"), "numbers, where nobody wrote names"


@pytest.mark.parametrize("content", ["", "{}", '["a"]', '["a", 1]', "[" * 100_000])
def test_a_file_that_holds_no_names_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json is no") as caught:
        load_classes(tmp_path, 2)
    assert "\n" not in str(caught.value)


def test_a_class_is_found_by_its_name_and_else_by_its_number():
    names = ("circle", "square", "0")
    assert [find_class(word, names) for word in ("circle", "square", "0", "1", "2")] == [0, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cirlce", r"label 'cirlce' is no class of the model: did you mean 'circle'\?"),
        ("xyz", "label 'xyz' is no class of the model: known are circle, square"),
        ("2", "label 2 is out of range; the model's classes are 0 to 1"),
        ("-1", "label -1 is out of range"),
    ],
)
def test_an_unknown_class_is_answered_with_what_there_is(word, message):
    with pytest.raises(ValueError, match=message):
        find_class(word, ("circle", "square"))
