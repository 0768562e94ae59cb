"""Run-length encodings, with pycocotools as the oracle."""

import numpy as np
import pytest
from pycocotools import mask as mask_api

from sssd.data.coco_shapes import _uncompressed, bad_segmentations


def masks():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 5), (90, 70), (300, 400)):
        for share in (0, 0.01, 0.5, 1):
            yield np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
        block = np.zeros((height, width), np.uint8, order="F")
        block[: height // 2 + 1, width // 3 :] = 1
        yield block


@pytest.mark.parametrize("mask", masks())
def test_compressed_counts_are_what_pycocotools_wrote(mask):
    height, width = mask.shape
    encoding = mask_api.encode(mask)
    counts = _uncompressed(encoding["counts"].decode())
    values = np.repeat(np.arange(len(counts)) % 2, counts)
    np.testing.assert_array_equal(values.reshape(width, height).T, mask)
    encoding["counts"] = encoding["counts"].decode()
    entries = [{"segmentation": encoding}, {"segmentation": {**encoding, "size": [width, height]}}]
    bad = bad_segmentations(entries, np.array([[width, height]] * 2))
    assert bad.tolist() == [False, width != height]


@pytest.mark.parametrize("text", ["", "0" * 50, "zzzz", "\x00", "o" * 3000, "OOOO~~~~", "1o"])
def test_counts_that_do_not_add_up_are_bad(text):
    """Some of these pycocotools decodes to whatever is in memory."""
    segmentation = {"size": [2, 2], "counts": text}
    assert bad_segmentations([{"segmentation": segmentation}], np.array([[2, 2]])).all()
