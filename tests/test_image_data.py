"""Image sources: what each format is read as, what is held out, and what damaged and forged files end in."""

import builtins
import gzip
import io
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from artifex.data.images import load_images

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
    assert "skipped 1 that are no PNG or JPEG files (cats/readme.txt)" in corpus.describe()
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
        ("PIL", r"PNG and JPEG files need Pillow: pip install 'artifex\[images\]'"),
        ("sklearn", r"the digits need scikit-learn: pip install 'artifex\[images\]'"),
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


# Damage


def test_corrupt_files_are_refused_by_name_or_skipped_and_counted(tmp_path):
    pytest.importorskip("PIL.Image")
    for number, image in enumerate(pixels(10, 64)):
        picture(tmp_path / f"{number}.png", image)
        picture(tmp_path / f"{number}.jpg", image)
    whole = {name: (tmp_path / name).read_bytes() for name in ("1.png", "2.png", "3.jpg", "4.jpg")}
    (tmp_path / "1.png").write_bytes(whole["1.png"][:200])
    flipped = bytearray(whole["2.png"])
    flipped[len(flipped) // 2] ^= 255
    (tmp_path / "2.png").write_bytes(flipped)
    (tmp_path / "3.jpg").write_bytes(whole["3.jpg"][:-200])
    (tmp_path / "4.jpg").write_bytes(whole["4.jpg"] + bytes(10_000))  # whole, with something behind it
    (tmp_path / "5.png").write_bytes(b"")
    (tmp_path / "6.jpg").write_bytes(b"GIF89a")
    os.mkfifo(tmp_path / "pipe.png")
    bad = ("1.png", "2.png", "3.jpg", "5.png", "6.jpg", "pipe.png")
    with pytest.raises(ValueError, match=r"1\.png is corrupt: .* \(and 5 more are corrupt\); .* set corrupt to 'skip'"):
        load_images(tmp_path, **GREY)
    corpus = load_images(tmp_path, **GREY, corrupt="skip")
    assert corpus.skipped == bad
    assert "skipped 6 that are corrupt (1.png, 2.png, 3.jpg, ...)" in corpus.describe()
    assert len(drawn(corpus.train)) + len(drawn(corpus.validation)) == 15
    for name in bad:
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
        with pytest.raises(ValueError, match=rf"{name} is corrupt") as caught:
            load_images(tmp_path, **GREY)
        assert "\n" not in str(caught.value)
        (tmp_path / name).unlink()


def test_a_picture_that_declares_too_many_pixels_is_never_decoded(tmp_path):
    pytest.importorskip("PIL.Image")
    import zlib

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"bomb.png is corrupt: Image size \(3600000000 pixels\) exceeds limit"):
        load_images(tmp_path, **GREY)


def test_loops_of_links_end(tmp_path):
    for number, image in enumerate(pixels(4)):
        picture(tmp_path / "a" / f"{number}.png", image)
    (tmp_path / "a" / "round").symlink_to(tmp_path, target_is_directory=True)
    corpus = load_images(tmp_path, **GREY)
    assert len(corpus.train) + len(corpus.validation) == 4
    assert corpus.ignored == ("a/round",)
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    with pytest.raises(
        ValueError, match=r"self\.png cannot be read: Too many levels of symbolic links; mend or remove"
    ):
        load_images(tmp_path, **GREY, corrupt="skip")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def forged(shape, body=b""):
    """A .npy that declares uint8 of `shape` and holds `body`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + body


def zipped(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def damaged(content, find, change):
    place = content.index(find)
    return content[:place] + change + content[place + len(change) :]


IMAGES = np.arange(720, dtype=np.uint8).reshape(20, 6, 6)
HOSTILE = {
    "empty.npy": (b"", "is not an array"),
    "text.npy": (b"not an array", "is not an array"),
    "pickle.npy": (npy(np.array([{}] * 3)), "holds pickled Python objects"),
    "short.npy": (npy(IMAGES)[:-1], r"declares uint8 of shape \(20, 6, 6\), 720 bytes, but holds 719"),
    "long.npy": (npy(IMAGES) + b"x", "720 bytes, but holds 721"),
    "huge.npy": (forged((2**40, 2**40, 2**40)), r"shape \(1099511627776, .* but holds 0"),
    "negative.npy": (forged((-1, -36, 20), bytes(720)), "declares uint8 of shape"),
    "flat.npy": (npy(IMAGES[0]), r"holds uint8 of shape \(6, 6\); expected images \(N, H, W\)"),
    "alpha.npy": (npy(np.zeros((4, 6, 6, 4), np.uint8)), "channels last and without alpha"),
    "first.npy": (npy(np.zeros((4, 3, 6, 6), np.uint8)), "channels last and without alpha"),
    "integers.npy": (npy(IMAGES.astype(np.int64)), "holds images of int64; expected uint8, or floats"),
    "range.npy": (npy(IMAGES.astype(np.float32)), r"holds values from 0.0 to 255.0; expected \[0, 1\] or \[-1, 1\]"),
    "nan.npy": (npy(np.full((4, 6, 6), np.nan)), "holds values from nan to nan"),
    "one.npy": (npy(IMAGES[:1]), "has 1 images, too few to hold some out"),
    "none.npy": (npy(IMAGES[:0]), "has 0 images, too few"),
    "size.npy": (npy(np.zeros((4, 7, 7), np.uint8)), "images of 7x7, but image_size is 6: set image_size to 7"),
    "oblong.npy": (npy(np.zeros((4, 7, 6), np.uint8)), "images of 7x6, but image_size is 6: store squares"),
    "text.npz": (b"not an archive", "is damaged or no such file"),
    "short.npz": (zipped(images=npy(IMAGES))[:-30], "is damaged or no such file"),
    "bits.npz": (damaged(zipped(images=npy(IMAGES)), b"PK\x01\x02", b"PK\x01\x03"), "is damaged or no such file"),
    "pickle.npz": (zipped(images=npy(np.array([{}] * 3))), "images.npy holds pickled Python objects"),
    "labels.npz": (zipped(x=npy(IMAGES), y=npy(np.array([{}] * 20))), "y.npy holds pickled Python objects"),
    "huge.npz": (zipped(images=forged((2**40, 6, 6))), r"images.npy declares uint8 of shape \(1099511627776, 6, 6\)"),
    "keys.npz": (zipped(pictures=npy(IMAGES)), "holds pictures; expected one array of images, named as one of image, "),
    "twice.npz": (zipped(x=npy(IMAGES), images=npy(IMAGES)), "holds x, images; expected one array of images"),
    "count.npz": (zipped(x=npy(IMAGES), y=npy(np.arange(19))), r"labels int64 of shape \(19,\); expected integers"),
    "float.npz": (zipped(x=npy(IMAGES), y=npy(np.zeros(20))), "has labels float64"),
    "minus.npz": (zipped(x=npy(IMAGES), y=npy(np.arange(20) - 1)), r"has label -1, outside \[0, 65536\)"),
    "many.npz": (
        zipped(x=npy(IMAGES), y=npy(np.arange(20) * 2**40)),
        r"has label 20890720927744, outside \[0, 65536\)",
    ),
    "half.npz": (
        zipped(x=npy(IMAGES), y=npy(np.arange(20)), x_test=npy(IMAGES)),
        "labels for one of training and test",
    ),
    "magic": (b"\x00\x00\x09\x03" + idx(IMAGES)[4:], "begins with 00 00 09 03; expected 00 00 08 03, an IDX file"),
    "empty": (b"", "begins with nothing; expected 00 00 08 03"),
    "cut": (idx(IMAGES)[:9], "begins with 00 00 08 03"),
    "short": (idx(IMAGES)[:-1], r"declares shape \(20, 6, 6\), but holds 719 bytes"),
    "long": (idx(IMAGES) + b"x", "but holds 721 bytes"),
    "huge": (bytes([0, 0, 8, 3]) + b"\xff" * 12, r"declares shape \(4294967295, 4294967295, 4294967295\)"),
    "short.gz": (gzip.compress(idx(IMAGES))[:-20], "is damaged or no such file"),
    "sum.gz": (gzip.compress(idx(IMAGES))[:-8] + bytes(8), "is damaged or no such file"),
    "huge.gz": (gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12), "would grow from .* more than 200 times"),
    "more.gz": (gzip.compress(idx(IMAGES) + b"x"), "holds other than 720 bytes"),
    "less.gz": (gzip.compress(idx(IMAGES)[:-1]), "holds other than 720 bytes"),
    "picture.png": (b"\x89PNG", "begins with 89 50 4e 47; expected .* an IDX file .* or a folder"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_forged_file_is_refused_in_one_line(tmp_path, name):
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_images(tmp_path / name, **GREY)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_that_would_fill_the_memory_is_refused_before_it_is_unpacked(tmp_path):
    shape = (2**26 // 36 + 1, 6, 6)
    (tmp_path / "bomb.npz").write_bytes(zipped(images=forged(shape, bytes(shape[0] * 36))))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"images.npy would grow from \d+ bytes to \d+, more than 200 times"):
        load_images(tmp_path / "bomb.npz", **GREY)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("data_batch_1.bin", 3072, "has 3072 bytes, no multiple of the 3073 of a CIFAR-10 record"),
        ("data_batch_1.bin", 0, "has 0 bytes"),
        ("data_batch_1.bin", 3073 * 2, "holds label 255, but CIFAR-10 has 10 classes"),
        ("train.bin", 3074 * 2, "holds label 255, but CIFAR-100 has 100 classes"),
        ("test.bin", 3073, "no multiple of the 3074 of a CIFAR-100 record"),
    ],
)
def test_damaged_cifar_files_are_refused(tmp_path, name, size, message):
    if name in ("train.bin", "test.bin"):
        for other in ("train.bin", "test.bin"):
            (tmp_path / other).write_bytes(bytes(3074 * 2))
    (tmp_path / name).write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, image_size=32, channels=3)


def test_what_is_missing_or_holds_no_images_is_refused(tmp_path):
    for name in ("gone", "gone.npy", "gone.npz"):
        with pytest.raises(ValueError, match=rf"{name} cannot be read: No such file or directory"):
            load_images(tmp_path / name, **GREY)
    with pytest.raises(ValueError, match=r"has no PNG or JPEG files \(there are no other files\), IDX or CIFAR"):
        load_images(tmp_path, **GREY)
    (tmp_path / "data_batch_1").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match=r"there are 1 others, e.g. data_batch_1.*versions get the binary one"):
        load_images(tmp_path, **GREY)
    for change, message in (
        ({"image_size": 0}, "image_size is 0"),
        ({"channels": 2}, "channels is 2"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; it must be between 0 and 1"),
        ({"corrupt": "ignore"}, "corrupt is 'ignore'; expected 'refuse' or 'skip'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(tmp_path, **GREY | change)
