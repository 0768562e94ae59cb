"""Reads images with class labels: scikit-learn's digits, ``.npz`` files, CIFAR, image folders.

Letters: N: images, H: height, W: width, C: channels (1, or 3 for RGB), K: classes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from .coco_file import listed
from .errors import DataError

# Every machine and every version of NumPy gives the same splits: RandomState's streams are frozen.
SPLIT_SEED = 0
DIGITS_TEST_FRACTION = 0.2


class DatasetError(DataError):
    """Classification data that cannot be used; the message names it and the fix."""


@dataclass(frozen=True)
class LabelledImages:
    """Images with one class each.

    Attributes:
        images: (N, H, W, C) uint8, or N paths.
        labels: (N,) int64, from 0 to K - 1.
        ids: (N,) int64, the position of each image in the source it was read from.
        classes: the K names.
    """

    images: np.ndarray | Sequence[str]
    labels: np.ndarray
    ids: np.ndarray
    classes: tuple[str, ...]

    def take(self, positions: np.ndarray) -> "LabelledImages":
        """The images at some positions, in their order."""
        if isinstance(self.images, np.ndarray):
            images = self.images[positions]
        else:
            images = [self.images[position] for position in positions]
        return LabelledImages(images, self.labels[positions], self.ids[positions], self.classes)


# What reads the "train" or the "test" part of a source.
Reader = Callable[[str], LabelledImages]


def hold_out(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits positions in two, with (nearly) the same share of every class in each.

    Args:
        labels: (N,) whole numbers.
        fraction: how much of each class is held out, rounded to whole images. A class of two or
            more images has at least one on either side, a class of one image stays.

    Returns:
        The positions that stay and those that are held out, each ascending.
    """
    random = np.random.RandomState(SPLIT_SEED)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        count = min(max(1, int(fraction * len(members) + 0.5)), len(members) - 1)
        held[members[:count]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def read_split(read: Reader, split: str, val_fraction: float) -> LabelledImages:
    """One split of a source that has two parts.

    Args:
        read: reads a part.
        split: "test" is the test part, "trainval" the training part; "val" is held out from the
            training part, and "train" is the rest of it.
        val_fraction: how much of each class of the training part is held out.
    """
    part = read("test" if split == "test" else "train")
    if split in ("test", "trainval"):
        return part
    train, val = hold_out(part.labels, val_fraction)
    return part.take({"train": train, "val": val}[split])


def read_digits(part: str) -> LabelledImages:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (UCI's test set of optdigits).

    Their values 0..16 become round(255 / 16 x value). The source has no parts of its own: 20 % of
    each class are held out for "test".

    Raises:
        DatasetError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "The dataset 'digits' is a part of scikit-learn, which is not installed: run "
            "`pip install scikit-learn`."
        ) from error
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    everything = LabelledImages(
        images=np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None],
        labels=labels,
        ids=np.arange(len(labels)),
        classes=tuple(str(name) for name in digits.target_names),
    )
    train, test = hold_out(labels, DIGITS_TEST_FRACTION)
    return everything.take({"train": train, "test": test}[part])


def read_npz(path: str, part: str) -> LabelledImages:
    """The training or the test part of an ``.npz`` file.

    Args:
        path: a file with ``train_x`` and ``test_x`` (N, H, W, C) uint8, ``train_y`` and ``test_y``
            (N,) whole numbers from 0 to K - 1, and ``class_names`` (K,) text.
        part: "train" or "test".

    Raises:
        DatasetError: the file is missing, cannot be read, lacks an array, or has one of another
            type, shape or range.
    """
    names = (f"{part}_x", f"{part}_y", "class_names")
    images, labels, classes = _npz_arrays(path, names)
    count = len(images) if images.ndim else 0
    image_like = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3)
    for name, array, good, wanted in (
        (names[0], images, image_like, "uint8 (images, height, width, channels), 1 or 3 channels"),
        (names[0], images, count > 0, "one or more images"),
        (
            names[1],
            labels,
            labels.dtype.kind in "iu" and labels.shape == (count,),
            f"whole numbers of the shape ({count},), a label for each image of {names[0]!r}",
        ),
        (
            names[2],
            classes,
            classes.dtype.kind == "U" and classes.ndim == 1,
            "text of the shape (classes,)",
        ),
    ):
        if not good:
            raise DatasetError(
                f"The array {name!r} of {path} is {array.dtype} of the shape {array.shape}: store "
                f"{wanted} in it."
            )
    bad = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(bad):
        raise DatasetError(
            f"The label {labels[bad[0]]} at position {bad[0]} of {names[1]!r} in {path} is outside "
            f"0..{len(classes) - 1} ({len(bad)} of {count} labels are): correct it, or add to "
            "'class_names'."
        )
    return LabelledImages(
        images, labels.astype(np.int64), np.arange(count), tuple(classes.tolist())
    )


def _npz_arrays(path: str, names: Sequence[str]) -> list[np.ndarray]:
    """Some arrays of a file, or a sentence about what is in the way."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DatasetError(
                    f"The file {path} lacks {listed(map(repr, missing))} (it has "
                    f"{listed(map(repr, archive.files))}): write it with train_x, train_y, test_x, "
                    "test_y and class_names."
                )
            return [archive[name] for name in names]
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(
            f"The file {path} does not exist: correct the path, or put the file there."
        ) from error
    except Exception as error:  # zip, zlib and NumPy raise all kinds
        raise DatasetError(
            f"The file {path} cannot be read as an .npz of plain arrays ({error}): write it again "
            "with numpy.savez, without arrays of objects."
        ) from error


def read_cifar10(folder: str, part: str) -> LabelledImages:
    """CIFAR-10 (Krizhevsky 2009) through torchvision, which verifies the files' checksums.

    Args:
        folder: the unpacked ``cifar-10-batches-py``.
        part: "train" or "test".

    Raises:
        DatasetError: a file is missing or differs from the original.
    """
    return _read_cifar(CIFAR10, folder, part)


def read_cifar100(folder: str, part: str) -> LabelledImages:
    """CIFAR-100 with its 100 fine labels; arguments and errors are those of ``read_cifar10``."""
    return _read_cifar(CIFAR100, folder, part)


def _read_cifar(dataset: type[CIFAR10], folder: str, part: str) -> LabelledImages:
    try:
        source = dataset(os.path.dirname(folder), train=part == "train", download=False)
    except RuntimeError as error:
        raise DatasetError(
            f"The files in {folder} are incomplete or damaged: unpack {dataset.filename} from "
            f"{dataset.url} there again."
        ) from error
    labels = np.asarray(source.targets, dtype=np.int64)
    return LabelledImages(source.data, labels, np.arange(len(labels)), tuple(source.classes))


def read_image_folder(root: str) -> LabelledImages:
    """A folder with a folder of images per class, as torchvision's ``ImageFolder`` reads it.

    The classes are the names of the folders in sorted order; images may lie in folders below.

    Raises:
        DatasetError: the folder is missing or has no folders, or a class has no image.
    """
    try:
        classes, _ = find_classes(root)
    except OSError as error:
        raise DatasetError(
            f"The folder {root} does not exist or holds no folders: give it one folder of images "
            "for each class."
        ) from error
    samples: list[tuple[str, int]] = []
    empty = []
    for label, name in enumerate(classes):
        try:
            samples += make_dataset(root, {name: label}, IMG_EXTENSIONS)
        except FileNotFoundError:
            empty.append(name)
    if empty:
        raise DatasetError(
            f"There is no image in {len(empty)} of the {len(classes)} class folders of {root} "
            f"({listed(empty)}): put images ({', '.join(IMG_EXTENSIONS)}) there, or remove the "
            "folders."
        )
    paths, labels = zip(*samples, strict=True)
    return LabelledImages(
        paths, np.asarray(labels, dtype=np.int64), np.arange(len(paths)), tuple(classes)
    )
