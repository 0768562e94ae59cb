"""Writes small datasets in COCO format."""

import json
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image


def write_coco(folder: Path, num_images: int = 6, seed: int = 0) -> tuple[Path, Path]:
    """Pictures of 96x64 pixels with one to three coloured boxes of three classes.

    Returns:
        The annotation file and the image folder.
    """
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / "images").mkdir(parents=True)
    for i in range(num_images):
        picture = rng.integers(90, 120, (64, 96, 3), dtype=np.uint8)
        for _ in range(rng.integers(1, 4)):
            w, h = (int(v) for v in rng.integers(12, 30, 2))
            x, y = int(rng.integers(0, 96 - w)), int(rng.integers(0, 64 - h))
            category = int(rng.integers(3))
            picture[y : y + h, x : x + w, category] = 250
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": category + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        name = f"{i}.png"
        Image.fromarray(picture).save(folder / "images" / name)
        images.append({"id": i + 1, "file_name": name, "width": 96, "height": 64})
    categories = [{"id": c + 1, "name": name} for c, name in enumerate(("red", "green", "blue"))]
    path = folder / "annotations.json"
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path, folder / "images"


def register_coco(name: str, folder: Path, num_images: int = 6) -> str:
    """Writes a dataset, registers it anew under ``name`` and returns the name."""
    path, images = write_coco(folder, num_images)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(path), str(images))
    return name
