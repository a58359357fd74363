"""Image sources: what each format is read as, what is held out, and which fingerprint comes of it."""

import builtins
import gzip
import os
import re
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from artifex.data.images import load_images, only_classes

GREY = {"image_size": 6, "channels": 1}
RNG = np.random.default_rng(3)


def pixels(count=20, size=6, channels=1):
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def drawn(split):
    return np.stack([split.image(index) for index in range(len(split))])


def put_together(corpus):
    """All images and labels of a corpus whose held out images were chosen by index, in their first order."""
    order = np.argsort(np.concatenate([corpus.train.chosen, corpus.validation.chosen]))
    images = np.concatenate([drawn(corpus.train), drawn(corpus.validation)])[order]
    if corpus.train.labels is None:
        return images, None
    return images, np.concatenate([corpus.train.labels, corpus.validation.labels])[order]


def check(corpus, images, labels=None):
    """The corpus is these images and labels, each on one side."""
    got, got_labels = put_together(corpus)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, images)
    if labels is None:
        assert got_labels is None
        assert corpus.num_classes == 0
    else:
        assert got_labels.dtype == np.int32
        np.testing.assert_array_equal(got_labels, labels)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def picture(path, array, **how):
    pillow = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    pillow.fromarray(array.squeeze()).save(path, **how)


# Formats


def test_the_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    corpus = load_images("digits", image_size=8, channels=1, validation_fraction=0.3)
    theirs = datasets.load_digits()
    check(corpus, theirs.images[..., None], theirs.target)
    assert (corpus.levels, corpus.num_classes, corpus.class_names) == (17, 10, tuple("0123456789"))
    assert 0.25 < len(corpus.validation) / 1797 < 0.35
    assert corpus.describe() == (
        f"digits: {len(corpus.train):,} training and {len(corpus.validation)} validation images of 8x8x1, "
        "10 classes, 17 levels"
    )


def test_some_classes_are_numbered_anew_and_what_was_held_out_stays_held_out():
    pytest.importorskip("sklearn")
    whole = load_images("digits", image_size=8, channels=1, validation_fraction=0.3)
    some = only_classes(whole, (7, 2))
    assert (some.class_names, some.num_classes) == (("7", "2"), 2) and some.fingerprint != whole.fingerprint
    assert some.source == whole.source and some.changes[-1] == "classes 0, 1, 3, 4, 5, 6, 8, 9 left out (data.classes)"
    for part, of in ((some.train, whole.train), (some.validation, whole.validation)):
        kept = [i for i in range(len(of)) if of.labels[i] in (7, 2)]
        np.testing.assert_array_equal(part.labels, [(7, 2).index(of.labels[i]) for i in kept])
        for here, there in zip(range(len(part)), kept, strict=True):
            np.testing.assert_array_equal(part.image(here), of.image(there))
    with pytest.raises(ValueError, match="names 10, but the classes of digits are 0 to 9"):
        only_classes(whole, (3, 10))
    bare = load_images("digits", image_size=8, channels=1, labels=False)
    with pytest.raises(ValueError, match="digits has no labels; leave it out"):
        only_classes(bare, (3,))


@pytest.mark.parametrize("shape", [(20, 6, 6), (20, 6, 6, 1), (20, 6, 6, 3)])
def test_a_npy_is_mapped(tmp_path, shape):
    images = pixels(channels=3)[..., : 3 if shape[-1] == 3 else 1].reshape(shape)
    np.save(tmp_path / "images.npy", images)
    corpus = load_images(tmp_path / "images.npy", image_size=6, channels=3 if shape[-1] == 3 else 1)
    assert isinstance(corpus.train.pixels, np.memmap)
    check(corpus, images.reshape(20, 6, 6, -1))
    assert corpus.levels == 256


@pytest.mark.parametrize("names", [("image", "label"), ("x_train", "y_train"), ("train_images", "train_labels")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_has_images_and_labels_by_name(tmp_path, names, save):
    images, labels = pixels(), RNG.integers(0, 5, 20)
    save(tmp_path / "some.npz", **dict(zip(names, (np.asfortranarray(images), labels), strict=True)))
    check(load_images(tmp_path / "some.npz", **GREY), images, labels)
    check(load_images(tmp_path / "some.npz", **GREY, labels=False), images)


def test_a_published_test_set_is_what_is_held_out(tmp_path):
    train, test = pixels(20), pixels(7)
    np.savez(tmp_path / "a.npz", x_train=train, y_train=np.arange(20), x_test=test, y_test=np.arange(7))
    corpus = load_images(tmp_path / "a.npz", **GREY)
    for split, images in ((corpus.train, train), (corpus.validation, test)):
        np.testing.assert_array_equal(drawn(split), images)
        np.testing.assert_array_equal(split.labels, np.arange(len(images)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("low", [0, -1])
def test_floats_become_the_levels_they_were_made_of(tmp_path, dtype, low):
    images = np.arange(256, dtype=np.uint8).repeat(36).reshape(256, 6, 6, 1)
    values = images / 255 if low == 0 else images / 127.5 - 1
    np.save(tmp_path / "floats.npy", values.astype(dtype))
    check(load_images(tmp_path / "floats.npy", **GREY), images)


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("dot", ["-", "."])
def test_a_folder_or_file_in_mnists_format_is_read_with_its_test_set(tmp_path, gz, dot):
    wrap = gzip.compress if gz else bytes
    sets = {"train": (pixels(20), RNG.integers(0, 10, 20)), "t10k": (pixels(5), RNG.integers(0, 10, 5))}
    for name, (images, labels) in sets.items():
        (tmp_path / f"{name}-images{dot}idx3-ubyte{gz}").write_bytes(wrap(idx(images[..., 0])))
        (tmp_path / f"{name}-labels{dot}idx1-ubyte{gz}").write_bytes(wrap(idx(labels.astype(np.uint8))))
    for source in (tmp_path, tmp_path / f"train-images{dot}idx3-ubyte{gz}"):
        corpus = load_images(source, **GREY)
        for split, (images, labels) in zip((corpus.train, corpus.validation), sets.values(), strict=True):
            np.testing.assert_array_equal(drawn(split), images)
            np.testing.assert_array_equal(split.labels, labels)
            assert isinstance(split.pixels, np.memmap) == (not gz)
    (tmp_path / f"alone{gz}").write_bytes(wrap(idx(sets["train"][0][..., 0])))
    check(load_images(tmp_path / f"alone{gz}", **GREY), sets["train"][0])


@pytest.mark.parametrize("classes", [10, 100])
def test_cifars_records_are_planes_behind_their_labels(tmp_path, classes):
    images, labels = pixels(10, 32, 3), RNG.integers(0, classes, 10).astype(np.uint8)
    head = labels[:, None] if classes == 10 else np.stack([labels // 5, labels], axis=1)
    records = np.concatenate([head, images.transpose(0, 3, 1, 2).reshape(10, -1)], axis=1)
    files = ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin"] if classes == 10 else ["train.bin", "test.bin"]
    parts = [records[:3], records[3:8], records[8:]] if classes == 10 else [records[:8], records[8:]]
    for name, part in zip(files, parts, strict=True):
        (tmp_path / name).write_bytes(part.tobytes())
    corpus = load_images(tmp_path, image_size=32, channels=3)
    np.testing.assert_array_equal(drawn(corpus.train), images[:8])
    np.testing.assert_array_equal(drawn(corpus.validation), images[8:])
    np.testing.assert_array_equal(corpus.train.labels, labels[:8])
    assert corpus.class_names == tuple(map(str, range(classes)))
    named = [f"class{number}" for number in range(classes)]
    names = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
    (tmp_path / names).write_text("\n".join(named) + "\n\n")
    assert load_images(tmp_path, image_size=32, channels=3).class_names == tuple(named)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_files_is_its_classes(tmp_path, channels):
    images = {}
    for number, image in enumerate(pixels(12, 6, channels)):
        name = f"{('cats', 'dogs', 'emus')[number % 3]}/deep/{number}.{'png' if number % 2 else 'PNG'}"
        picture(tmp_path / name, image)
        images[name] = image
    (tmp_path / "cats" / "readme.txt").write_text("about cats")
    (tmp_path / "cats" / ".hidden.png").write_bytes(b"")
    corpus = load_images(tmp_path, image_size=6, channels=channels)
    assert corpus.class_names == ("cats", "dogs", "emus")
    assert len(corpus.train) + len(corpus.validation) == 12
    assert corpus.ignored == ("cats/readme.txt",)
    assert corpus.changes == ("1 of 13 files left out, neither PNG nor JPEG: cats/readme.txt",)
    seen = set()
    for split in (corpus.train, corpus.validation):
        for index, place in enumerate(split.chosen):
            name = split.pixels.names[place]
            np.testing.assert_array_equal(split.image(index), images[name])
            assert corpus.class_names[split.labels[index]] == name.split("/")[0]
            seen.add(name)
    assert seen == set(images)
    assert load_images(tmp_path, image_size=6, channels=channels, labels=False).train.labels is None


def test_files_directly_in_a_folder_have_no_labels_and_both_at_once_are_refused(tmp_path):
    for number, image in enumerate(pixels(4)):
        picture(tmp_path / f"{number}.png", image)
    assert load_images(tmp_path, **GREY).num_classes == 0
    picture(tmp_path / "cats" / "one.png", pixels(1)[0])
    with pytest.raises(ValueError, match=r"both in folders of classes \(cats, ...\) and outside them \(0.png, ...\)"):
        load_images(tmp_path, **GREY)
    corpus = load_images(tmp_path, **GREY, labels=False)
    assert len(corpus.train) + len(corpus.validation) == 5


def test_a_dataset_saved_on_disk_is_read_by_its_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    pillow = pytest.importorskip("PIL.Image")
    images, labels = pixels(10, 6, 3), RNG.integers(0, 2, 10)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"img": [pillow.fromarray(image) for image in images], "label": labels.tolist()}
    whole = datasets.Dataset.from_dict(rows, features)
    whole.save_to_disk(tmp_path / "one")
    corpus = load_images(tmp_path / "one", image_size=6, channels=3)
    check(corpus, images, labels)
    assert corpus.class_names == ("cat", "dog")
    parts = datasets.DatasetDict({"train": whole.select(range(8)), "test": whole.select(range(8, 10))})
    parts.save_to_disk(tmp_path / "two")
    corpus = load_images(tmp_path / "two", image_size=6, channels=3)
    np.testing.assert_array_equal(drawn(corpus.validation), images[8:])
    np.testing.assert_array_equal(corpus.train.labels, labels[:8])


@pytest.mark.parametrize(
    ("missing", "needs"),
    [
        ("datasets", "saved by Hugging Face datasets: pip install datasets pillow"),
        ("PIL", r"PNG and JPEG files need Pillow: pip install pillow"),
        ("sklearn", r"the digits need scikit-learn: pip install 'artifex\[images\]', or scikit-learn alone"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_command(tmp_path, monkeypatch, missing, needs):
    source = "digits" if missing == "sklearn" else tmp_path
    if missing == "datasets":
        for name in ("dataset_info.json", "state.json"):
            (tmp_path / name).write_text("{}")
    elif missing == "PIL":
        for number, image in enumerate(pixels(3)):
            picture(tmp_path / f"{number}.png", image)
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *rest, **how):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named {name}")
        return real(name, *rest, **how)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=needs):
        load_images(source, **GREY)


@pytest.mark.parametrize(
    ("extra", "packages"), [("datasets", {"datasets", "pillow"}), ("images", {"pillow", "scikit-learn"})]
)
def test_an_extra_brings_all_that_its_sources_import(extra, packages):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w-]+", package)[0] for package in project["optional-dependencies"][extra]} == packages


# Sizes, colours, splits, fingerprints


@pytest.mark.parametrize(("width", "height"), [(80, 40), (40, 80), (120, 40), (40, 40), (20, 10), (8, 12)])
def test_a_file_is_cut_to_its_middle_square_without_being_stretched(tmp_path, width, height):
    y, x = np.mgrid[:height, :width]
    side = min(width, height)
    radius = np.hypot(x - (width - 1) / 2, y - (height - 1) / 2)
    disc = np.where(radius < side * 0.35, 255, 0).astype(np.uint8)
    for number in range(2):
        picture(tmp_path / f"{number}.png", disc)
    image = load_images(tmp_path, image_size=20, channels=1).train.image(0)[..., 0].astype(float)
    covered = image.sum(axis=1).max() / 255, image.sum(axis=0).max() / 255
    assert abs(covered[0] - covered[1]) < 0.5  # a disc, as wide as high
    assert abs(covered[0] - 14) < 20 / side + 0.5  # 0.7 of 20 pixels, as far as the file's own pixels tell
    np.testing.assert_allclose(image, image[::-1, ::-1], atol=2)  # and in the middle


def test_a_shrunken_file_keeps_its_mean_and_has_no_moire(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    for number in range(2):
        picture(tmp_path / f"{number}.png", stripes)
    image = load_images(tmp_path, image_size=8, channels=1).train.image(0).astype(int)
    assert abs(image - 127.5).max() < 12


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_colours_become_grey_by_luma_and_grey_is_repeated(tmp_path, kind):
    pillow = pytest.importorskip("PIL.Image")
    colours, greys = pixels(40, 6, 3), pixels(40)
    for name, images in (("colours", colours), ("greys", greys)):
        np.save(tmp_path / f"{name}.npy", images)
        for number, image in enumerate(images):
            picture(tmp_path / name / f"{number:02}.png", image)
    suffix = "" if kind == "files" else ".npy"
    luma = np.stack([np.asarray(pillow.fromarray(image).convert("L")) for image in colours])
    check(load_images(tmp_path / f"colours{suffix}", image_size=6, channels=1), luma[..., None])
    check(load_images(tmp_path / f"greys{suffix}", image_size=6, channels=3), greys.repeat(3, axis=-1))


def test_transparency_16_bits_and_a_cameras_rotation_are_what_one_sees(tmp_path):
    pillow = pytest.importorskip("PIL.Image")

    def only(name, channels):
        return load_images(tmp_path / name, image_size=6, channels=channels, labels=False).train.image(0)

    for number in range(2):
        picture(tmp_path / "clear" / f"{number}.png", np.full((6, 6, 4), [9, 9, 9, 0], np.uint8))
        picture(tmp_path / "deep" / f"{number}.png", np.full((6, 6), 0x80FF, np.uint16))
        exif = pillow.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees to the right
        lower = np.zeros((48, 48), np.uint8)
        lower[24:] = 255
        picture(tmp_path / "turned" / f"{number}.jpg", lower, exif=exif)
    assert (only("clear", 3) == 255).all()
    assert (only("deep", 1) == 0x80).all()
    assert only("turned", 1)[3, :, 0].tolist() == pytest.approx([255] * 3 + [0] * 3, abs=20)


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_more_images_move_no_other_between_the_splits(tmp_path, kind):
    def held_out(images, fraction):
        if kind == "arrays":
            np.save(tmp_path / "some.npy", images)
        for number, image in enumerate(images if kind == "files" else ()):
            picture(tmp_path / f"{number}.png", image)
        source = tmp_path if kind == "files" else tmp_path / "some.npy"
        corpus = load_images(source, **GREY, validation_fraction=fraction)
        every = [*corpus.train.chosen, *corpus.validation.chosen]
        assert sorted(every) == list(range(len(images)))
        names = corpus.train.pixels.names if kind == "files" else range(len(images))
        return {names[place] for place in corpus.validation.chosen}

    images = pixels(80)
    before, after = held_out(images[:60], 0.2), held_out(images, 0.2)
    added = {f"{number}.png" if kind == "files" else number for number in range(60, 80)}
    assert before == after - added
    assert 5 < len(after) < 30
    for fraction in (1e-9, 1 - 1e-9):  # neither side is empty
        assert len(held_out(images, fraction)) in (1, 79)


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_the_fingerprint_changes_with_the_data_and_with_nothing_else(tmp_path, kind):
    images, labels = pixels(), np.arange(20) % 3

    def fingerprint(images, classes, **how):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        root.mkdir()
        if kind == "arrays":
            np.savez(root / "some.npz", x=images, y=classes)
        for number, image in enumerate(images if kind == "files" else ()):
            picture(root / str(classes[number]) / f"{number}.png", image)
        return load_images(root / "some.npz" if kind == "arrays" else root, **GREY | how).fingerprint

    changed, moved = images.copy(), labels.copy()
    changed[7, 3, 3, 0] ^= 1
    moved[7] = (moved[7] + 1) % 3
    assert fingerprint(images, labels) == fingerprint(images, labels)
    prints = [
        fingerprint(images, labels),
        fingerprint(changed, labels),
        fingerprint(images, moved),
        fingerprint(images[:-1], labels[:-1]),
        fingerprint(images, labels, validation_fraction=0.4),
        fingerprint(images, labels, channels=3),
        fingerprint(images, labels, labels=False),
    ]
    assert len(set(prints)) == len(prints)


def test_the_split_does_not_depend_on_the_process_and_needs_no_jax(tmp_path):
    np.save(tmp_path / "some.npy", pixels(100))
    program = (
        "import sys; from artifex.data.images import load_images; "
        "chosen = load_images(sys.argv[1], image_size=6, channels=1).validation.chosen; "
        "print(chosen, {'jax', 'grain'} & set(sys.modules))"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "some.npy")],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].endswith(b"set()\n")
