"""Detectron2's dataset mapper with errors that name the image and the fix."""

from typing import Any

from detectron2.data import DatasetMapper, detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from .errors import DataError, in_words


class ImageError(DataError):
    """An image of the dataset is missing, damaged, or of another size than annotated."""


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, saying in one sentence what is wrong with a bad image.

    Built and called like its parent, and for good images the same in every bit. Of these the header
    is read a second time, and all of it only after a failure.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps one record of a dataset to the input of a model.

        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            What ``DatasetMapper`` returns.

        Raises:
            ImageError: the image cannot be read, its size is not the annotated one, its values do
                not fit 8 bits, or the augmentations of the config fail on it.
        """
        try:
            mapped = super().__call__(dataset_dict)
        except Exception as error:
            complaint = _complaint(dataset_dict)
            if complaint is None:
                complaint = (
                    f"The image {dataset_dict['file_name']} can be read, but not be prepared "
                    f"({in_words(error)}): check its annotations, and INPUT in the config."
                )
            raise ImageError(complaint) from error
        check_depth(dataset_dict["file_name"])
        return mapped


def _complaint(dataset_dict: dict[str, Any]) -> str | None:
    """What is wrong with the image of a record and what to do about it; None if it is fine."""
    path = dataset_dict["file_name"]
    try:
        image = detection_utils.read_image(path)
    except FileNotFoundError:
        return (
            f"The image {path} does not exist: put it there, or take its entry out of the "
            "annotation file."
        )
    except Image.DecompressionBombError as error:
        return (
            f"The image {path} is too large ({str(error).strip('.')}): scale it down together with "
            "its annotations, or set PIL.Image.MAX_IMAGE_PIXELS in your own script."
        )
    except Exception as error:  # Pillow's decoders raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"The image {path} cannot be read ({reason}): fetch it again, or take its entry out of "
            "the annotation file."
        )
    height, width = image.shape[:2]
    wanted = dataset_dict.get("width", width), dataset_dict.get("height", height)
    if wanted != (width, height):
        return (
            f"The image {path} is {width}x{height} pixels (width x height) but its annotation "
            f"says {wanted[0]}x{wanted[1]}: correct width and height in the annotation file, or "
            "put the right image there."
        )
    return None


def check_depth(path: str) -> None:
    """Detectron2 cuts the values of an image of 16 or 32 bits off at 255, and most become white."""
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ImageError(
                f"The image {path} has more than 8 bits a channel (mode {image.mode}), and all "
                "above 255 would be read as white: convert it to 8 bits."
            )
