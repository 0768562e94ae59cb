"""Detectron2's dataset mapper with errors that name the image and the fix."""

from typing import Any

from detectron2.data import DatasetMapper, detection_utils

from .errors import DataError


class ImageError(DataError):
    """An image of the dataset is missing, damaged, or of another size than annotated."""


class CheckedDatasetMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper``, saying in one sentence what is wrong with a bad image.

    Built and called like its parent, and for good images the same in every bit. The image is
    looked at a second time only after a failure.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps one record of a dataset to the input of a model.

        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            What ``DatasetMapper`` returns.

        Raises:
            ImageError: the image cannot be read, or its size is not the annotated one.
        """
        try:
            return super().__call__(dataset_dict)
        except Exception as error:
            complaint = _complaint(dataset_dict, self.image_format)
            if complaint is None:  # the image is fine, so the error is about something else
                raise
            raise ImageError(complaint) from error


def _complaint(dataset_dict: dict[str, Any], image_format: str) -> str | None:
    """What is wrong with the image of a record and what to do about it; None if it is fine."""
    path = dataset_dict["file_name"]
    try:
        image = detection_utils.read_image(path, format=image_format)
    except FileNotFoundError:
        return (
            f"The image {path} does not exist: put it there, or take its entry out of the "
            "annotation file."
        )
    except Exception as error:  # Pillow's decoders raise all kinds
        return (
            f"The image {path} cannot be read ({error}): fetch it again, or take its entry out of "
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
