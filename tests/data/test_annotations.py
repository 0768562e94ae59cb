import copy
import json

import pytest
from detectron2.data.datasets import load_coco_json

from sssd.data.annotations import AnnotationError, check_annotation_file, check_dataset


def content():
    """Two categories, three images of 100x80 (the last one empty) and four good boxes."""
    boxes = [(21, 1, 3, [0, 0, 100, 80]), (22, 1, 5, [10, 10, 5, 5.5])]
    boxes += [(23, 2, 5, [90.5, 70, 10, 10]), (24, 2, 3, [0, 0, 7, 0])]
    return {
        "images": [
            {"id": i, "file_name": f"{'abc'[i - 1]}.jpg", "width": 100, "height": 80}
            for i in (1, 2, 3)
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": 1, "iscrowd": 0}
            for n, i, c, b in boxes
        ],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def write(tmp_path, value):
    path = tmp_path / "instances.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def complaint(path, num_classes=2, **options):
    """The message of the error, which has to be one sentence that starts with or names the file."""
    with pytest.raises(AnnotationError) as caught:
        check_annotation_file(path, num_classes, **options)
    message = str(caught.value)
    assert path in message and "\n" not in message and message.endswith(".")
    return message


def test_report_counts_by_hand(tmp_path):
    value = content()
    value["annotations"][1]["iscrowd"] = 1
    report = check_annotation_file(write(tmp_path, value), 2)
    assert report.classes == ("cat", "dog")
    assert (report.images, report.boxes, report.crowd_boxes) == (3, 4, 1)
    assert report.images_without_boxes == 1
    assert report.clipped_boxes == 1  # the third ends at x = 100.5
    assert report.zero_size_boxes == 1  # the fourth has no height
    assert report.summary() == (
        f"{tmp_path}/instances.json: 3 images (1 without boxes), 4 boxes of 2 classes, 2 of them "
        "to train on (1 crowd, 1 of zero size, 0 without a polygon of three points; 1 clipped to "
        "the image)"
    )


def test_an_image_with_crowds_only_counts_as_without_boxes(tmp_path):
    value = content()
    for entry in value["annotations"][:2]:
        entry["iscrowd"] = 1
    assert check_annotation_file(write(tmp_path, value), 2).images_without_boxes == 2


@pytest.mark.parametrize(
    ("box", "clipped", "zero"),
    [
        ([-1, -1, 102, 82], 1, 0),  # exactly a pixel on every side
        ([0.1, 0.2, 99.9, 79.8], 0, 0),  # 0.1 + 99.9 and the like round to a bit more
        ([100.5, 10, 0.5, 10], 1, 1),  # in the margin: nothing is left after clipping
    ],
)
def test_sub_pixel_excess_is_counted_not_refused(tmp_path, box, clipped, zero):
    value = content()
    value["annotations"] = [{**value["annotations"][0], "bbox": box}]
    report = check_annotation_file(write(tmp_path, value), 2)
    assert (report.clipped_boxes, report.zero_size_boxes) == (clipped, zero)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([1, 2, 3], ["[1, 2, 3]", "four numbers"]),
        ([1, 2, 3, 4, 5], ["[1, 2, 3, 4, 5]", "four numbers"]),
        ([1, 2, "3", 4], ['[1, 2, "3", 4]', "four numbers"]),
        ([1, 2, True, 4], ["[1, 2, true, 4]", "four numbers"]),
        ([[1, 2, 3, 4]] * 4, ["four numbers"]),
        ([], ["[]", "four numbers"]),
        (None, ["null", "four numbers"]),
        ({"x": 1}, ['{"x": 1}', "four numbers"]),
        ([1, 2, float("nan"), 4], ["[1, 2, NaN, 4]", "not finite"]),
        ([1, 2, float("inf"), 4], ["[1, 2, Infinity, 4]", "not finite"]),
        ([1, 2, 10**400, 4], ["not finite"]),
        ([10, 10, -5, 5], ["[10, 10, -5, 5]", "negative size", "not as corners"]),
        ([10, 10, 5, -0.5], ["[10, 10, 5, -0.5]", "negative size"]),
        ([-1.5, 0, 5, 5], ["[-1.5, 0, 5, 5]", "sticks out of the 100x80 image"]),
        ([0, 0, 101.5, 5], ["sticks out of the 100x80 image", "clip it"]),
        ([0, 76.2, 5, 5], ["sticks out"]),
        ([500, 500, 5, 5], ["sticks out"]),
    ],
)
def test_bad_boxes(tmp_path, box, expected):
    value = content()
    value["annotations"][2]["bbox"] = box
    message = complaint(write(tmp_path, value))
    for part in ("annotation 23 of image 'b.jpg'", *expected):
        assert part in message
    assert "more bad" not in message


def test_first_bad_annotation_is_named_and_the_others_counted(tmp_path):
    value = content()
    value["annotations"][1]["bbox"] = [1, 2, -3, 4]
    value["annotations"][2]["bbox"] = [1, 2]
    value["annotations"][3]["category_id"] = 77
    message = complaint(write(tmp_path, value))
    assert "annotation 22 of image 'a.jpg' has the bbox [1, 2, -3, 4]" in message
    assert "(and 2 more bad annotations)" in message


def test_annotation_without_a_box(tmp_path):
    value = content()
    del value["annotations"][0]["bbox"]
    assert "annotation 21 of image 'a.jpg' has the bbox null" in complaint(write(tmp_path, value))


ENCODING = {"size": [80, 100], "counts": [10, 20, 7970]}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("iscrowd", 2, "has the iscrowd 2: write 0 or 1"),
        ("iscrowd", None, "has the iscrowd null"),
        ("iscrowd", "yes", 'has the iscrowd "yes"'),
        ("area", "large", 'has the area "large"'),
        ("area", float("nan"), "has the area NaN"),
        ("ignore", 1, "has the ignore 1, which Detectron2 cannot train on"),
        ("segmentation", 7, "has the segmentation 7: write polygons"),
        ("segmentation", [7], "has the segmentation [7]"),
        ("segmentation", [[1, 2, 3, 4, 5, "6"]], 'segmentation [[1, 2, 3, 4, 5, "6"]]'),
        ("segmentation", [[1, 2, 3, 4, 5, float("inf")]], "5, Infinity]]"),
        ("segmentation", {"size": [80, 100]}, "or a run-length encoding of the whole image"),
        ("segmentation", {**ENCODING, "size": [100, 80]}, "has the segmentation"),
        ("segmentation", {**ENCODING, "counts": [10, 20, 30]}, "has the segmentation"),
        ("segmentation", {**ENCODING, "counts": [10, -20, 8010]}, "has the segmentation"),
        ("segmentation", {**ENCODING, "counts": "zzzz"}, "has the segmentation"),
        ("segmentation", {**ENCODING, "counts": "\u0000é"}, "has the segmentation"),
        ("keypoints", [1, 2], "has the keypoints [1, 2]: write numbers"),
        ("keypoints", [1, 2, None], "has the keypoints [1, 2, null]"),
        ("keypoints", {"x": 1}, 'has the keypoints {"x": 1}'),
    ],
)
def test_other_entries_of_an_annotation(tmp_path, key, value, expected):
    content_ = content()
    content_["annotations"][2][key] = value
    message = complaint(write(tmp_path, content_))
    assert "annotation 23 of image 'b.jpg' has the " in message and expected in message


def test_what_detectron2_drops_is_counted(tmp_path):
    """Of polygons with less than three points, or half a point, it drops the box as well."""
    value = content()
    good = [[0, 0, 9, 0, 9, 9]]
    segmentations = [[[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2], *good], ENCODING, [], None]
    first = value["annotations"][0]
    value["annotations"] = [
        {**first, "id": n, "segmentation": s} for n, s in enumerate(segmentations)
    ]
    path = write(tmp_path, value)
    report = check_annotation_file(path, 2)
    assert (report.boxes, report.without_polygon, report.usable_boxes) == (6, 2, 4)
    records = load_coco_json(path, str(tmp_path), None)
    assert sum(len(record["annotations"]) for record in records) == 4


def test_unknown_references(tmp_path):
    value = content()
    value["annotations"][3]["category_id"] = 4
    message = complaint(write(tmp_path, value))
    assert "annotation 24 of image 'b.jpg' has the category_id 4" in message
    assert "'categories' (3, 5)" in message
    value["annotations"][3]["image_id"] = 9
    message = complaint(write(tmp_path, value))
    assert "annotation 24 refers to image_id 9, which is not in 'images'" in message


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("images", "the image id 1 is used 2 times (a.jpg, b.jpg)"),
        ("annotations", "the annotation id 21 is used 2 times (of image_id 1)"),
        ("categories", "the category id 5 is used 2 times"),
    ],
)
def test_duplicated_ids(tmp_path, section, expected):
    value = content()
    value[section][1]["id"] = value[section][0]["id"]
    assert expected in complaint(write(tmp_path, value))


def test_class_count(tmp_path):
    message = complaint(write(tmp_path, content()), num_classes=80)
    assert "has 2 classes (dog, cat) but the config asks for 80" in message
    for key in ("MODEL.ROI_HEADS", "MODEL.RETINANET", "MODEL.SSSD"):
        assert f"{key}.NUM_CLASSES" in message
    value = content()
    value["categories"] = [{"id": i, "name": f"c{i}"} for i in range(30)]
    message = complaint(write(tmp_path, value))
    assert "has 30 classes (c0, c1," in message and "and 18 more" in message


@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
@pytest.mark.parametrize(
    ("bad", "said"), [(None, "is missing"), ({}, "is a dict"), (3, "is a int")]
)
def test_sections_of_the_wrong_kind(tmp_path, section, bad, said):
    value = content()
    value[section] = bad
    if bad is None:
        del value[section]
    assert f"not in COCO format ('{section}' {said})" in complaint(write(tmp_path, value))


@pytest.mark.parametrize(
    ("section", "key", "bad", "expected"),
    [
        ("images", "file_name", None, "(id 2) has the 'file_name' null: it has to be a text"),
        ("images", "id", "7", "has the 'id' \"7\": it has to be a whole number"),
        ("annotations", "image_id", 1.5, "(id 22) has the 'image_id' 1.5"),
        ("annotations", "id", True, "has the 'id' true"),
        ("annotations", "category_id", "cat", "(id 22) has the 'category_id' \"cat\""),
        ("categories", "name", 4, "(id 3) has the 'name' 4: it has to be a text"),
    ],
)
def test_values_of_the_wrong_type(tmp_path, section, key, bad, expected):
    value = content()
    value[section][1][key] = bad
    message = complaint(write(tmp_path, value))
    assert f"entry number 1 of '{section}'" in message and expected in message
    del value[section][1][key]
    assert f"lacks '{key}'" in complaint(write(tmp_path, value))


def test_entries_that_are_no_objects(tmp_path):
    value = content()
    value["annotations"][1:3] = [[1, 2], "x"]
    message = complaint(write(tmp_path, value))
    assert "entry number 1 of 'annotations' is [1, 2], not an object" in message
    assert "(and 1 more bad entry)" in message


@pytest.mark.parametrize("width", [0, -3, None, "100", 99.5])
def test_image_sizes(tmp_path, width):
    value = content()
    value["images"][1]["width"] = width
    message = complaint(write(tmp_path, value))
    assert f"image 2 ('b.jpg') has width {json.dumps(width)} and height 80" in message


def test_files_that_are_not_json(tmp_path):
    text = json.dumps(content())
    message = complaint(write(tmp_path, text[:-100]))
    size = len(text) - 100
    assert "is truncated or not JSON" in message and f" of {size})" in message
    assert "line 1, column " in message
    assert "character 0 of 0" in complaint(write(tmp_path, ""))
    assert "its top level is a list" in complaint(write(tmp_path, "[1]"))
    (tmp_path / "instances.json").write_bytes(b'{"images": "\xff\xfe"}')
    assert "is not JSON text" in complaint(str(tmp_path / "instances.json"))
    assert "does not exist" in complaint(str(tmp_path / "none.json"))
    assert "cannot be read (Is a directory)" in complaint(str(tmp_path))


def test_nothing_to_train_on(tmp_path):
    value = content()
    crowds = copy.deepcopy(value)
    for entry in crowds["annotations"]:
        entry["iscrowd"] = 1
    assert "(all its 4 annotations are crowds)" in complaint(write(tmp_path, crowds))
    value["annotations"] = []
    path = write(tmp_path, value)
    assert "nothing to train on (it lists no boxes)" in complaint(path)
    report = check_annotation_file(path, 2, training=False)
    assert (report.images_without_boxes, report.boxes) == (3, 0)
    del value["annotations"]  # COCO's test sets look like this
    assert check_annotation_file(write(tmp_path, value), 2, training=False) == report
    value["images"] = []
    assert "lists no images" in complaint(write(tmp_path, value), training=False)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_evaluation_needs_area_and_iscrowd(tmp_path, key):
    value = content()
    del value["annotations"][2][key]
    path = write(tmp_path, value)
    assert check_annotation_file(path, 2).boxes == 4
    message = complaint(path, training=False)
    assert "annotation 23 of image 'b.jpg' lacks 'area' or 'iscrowd'" in message


def test_demo_set_by_name(demo_root, monkeypatch):
    monkeypatch.setenv("SSSD_DEMO_ROOT", str(demo_root))
    for name, images in (("sssd_demo_train", 320), ("sssd_demo_val", 96)):
        report = check_dataset(name, 5, training=name.endswith("train"))
        assert report.images == images
        assert (report.crowd_boxes, report.zero_size_boxes, report.clipped_boxes) == (0, 0, 0)
        assert report.images_without_boxes > 0


def test_missing_dataset_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(AnnotationError, match=r"'bccd_train' was looked for at .*instances_train"):
        check_dataset("bccd_train", 3)


@pytest.mark.usefixtures("datasets_root")
@pytest.mark.parametrize(
    ("name", "num_classes", "images", "boxes"),
    [
        ("bccd_train", 3, 205, 2804),
        ("bccd_val", 3, 87, 1137),
        ("bccd_test", 3, 72, 945),
        ("coco_2017_train", 80, 80, 705),
        ("coco_2017_val", 80, 80, 815),
    ],
)
def test_real_datasets(name, num_classes, images, boxes):
    for training in (True, False):
        report = check_dataset(name, num_classes, training=training)
        assert (report.images, report.boxes) == (images, boxes)
    with pytest.raises(AnnotationError, match=rf"has {num_classes} classes"):
        check_dataset(name, num_classes + 1)


def test_real_val2014_file(datasets_root):
    path = datasets_root / "cocoapi/instances_val2014_100.json"
    report = check_annotation_file(str(path), 80, training=False)
    assert (report.images, report.boxes, report.crowd_boxes) == (100, 839, 9)
