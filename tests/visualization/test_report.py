"""The report is one file that needs nothing else, and shows what it says."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from matplotlib.colors import to_rgb
from PIL import Image

from sssd.visualization.pyramids import LevelView, PyramidView
from sssd.visualization.report import (
    Picture,
    PictureReport,
    draw_boxes,
    draw_levels,
    draw_overview,
    write_report,
)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.addresses, self.open, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.addresses += [v for k, v in attributes.items() if k in ("src", "href")]
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pixels(address):
    kind, data = address.split(",", 1)
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_holds_every_picture_and_asks_for_nothing(tmp_path):
    red, blue = (np.full((4, 6, 3), c, np.uint8) for c in ([255, 0, 0], [0, 0, 255]))
    curves = tmp_path / "c.png"
    Image.fromarray(blue).save(curves)
    reports = [
        PictureReport("cells <1>", [Picture("ground truth", red)], {"p3": [Picture("p3", blue)]}),
        PictureReport("cells 2", [Picture("ground truth", blue)]),
    ]
    path = write_report(
        tmp_path / "out", "A & B", reports, summary=["x < y"], curves={"AP": curves}
    )
    text = path.read_text()
    page = Page(text)
    assert page.open == []
    assert page.addresses and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert "script" not in page.tags and not re.search(r"https?://|url\(", text)
    assert "A &amp; B" in text and "x &lt; y" in text and "cells &lt;1&gt;" in text
    assert 'name="viewport"' in text
    shown = {image["alt"]: pixels(image["src"]) for image in page.images}
    assert (shown["cells <1>: ground truth"] == red).all()
    assert (shown["cells <1>: p3"] == blue).all() and (shown["cells 2: ground truth"] == blue).all()
    assert (shown["AP over the iterations"] == blue).all()
    assert page.tags.count("details") == 1
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert names == {"cells__1__ground_truth.png", "cells__1__p3.png", "cells_2_ground_truth.png"}


def test_the_overview_has_a_row_for_each_image_and_of_levels_the_finest(tmp_path):
    red, green, blue, black = (
        np.full((4, 6, 3), color, np.uint8)
        for color in ([255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0])
    )
    first = [Picture("ground truth", red)], {"p2": [Picture("p2", green)], "p3": [Picture("", red)]}
    second = [Picture("ground truth", black)], {"p2": [Picture("p2", blue)]}
    reports = [PictureReport("1", *first), PictureReport("2", *second)]
    draw_overview(tmp_path / "overview.png", reports)
    drawn = np.asarray(Image.open(tmp_path / "overview.png").convert("RGB"))
    height, width = drawn.shape[0], drawn.shape[1]
    # A line through the middle of each row; the title takes some of the height.
    rows = [[tuple(drawn[int(y * height), int(x * width)]) for x in (0.25, 0.75)]
            for y in (0.35, 0.75)]  # fmt: skip
    assert rows == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 0), (0, 0, 255)]]


def test_boxes_are_where_they_are_in_the_picture():
    image = np.full((300, 480, 3), 200, np.uint8)
    instances = Instances((300, 480))
    instances.gt_boxes = Boxes(torch.tensor([[100.0, 50.0, 300.0, 250.0]]))
    instances.gt_classes = torch.tensor([1])
    drawn = draw_boxes("", image, instances, ["a", "b"]).pixels.astype(int)
    assert drawn.shape == image.shape
    changed = (abs(drawn - 200) > 20).any(2)
    assert changed[150, 98:103].any() and changed[150, 298:303].any()
    assert changed[48:53, 200].any() and changed[248:253, 200].any()
    assert not changed[100:200, 150:250].any() and not changed[:, 320:].any()


def test_small_pictures_are_enlarged_so_that_labels_can_be_read():
    instances = Instances((48, 64))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 10.0, 30.0, 30.0]]))
    instances.pred_classes, instances.scores = torch.tensor([0]), torch.tensor([0.9])
    black = np.zeros((48, 64, 3), np.uint8)
    assert draw_boxes("", black, instances, ["a"]).pixels.shape == (360, 480, 3)
    assert draw_boxes("", black, instances[:0], ["a"]).pixels.max() == 0


def test_large_pictures_are_made_smaller_and_their_boxes_with_them():
    image = np.full((1500, 2000, 3), 200, np.uint8)
    instances = Instances((1500, 2000))
    instances.gt_boxes = Boxes(torch.tensor([[500.0, 300.0, 1500.0, 1200.0]]))
    instances.gt_classes = torch.tensor([0])
    picture = draw_boxes("", image, instances, ["a"])
    assert picture.pixels.shape == picture.boxes.image.shape == (720, 960, 3)
    assert picture.boxes.corners.tolist() == [[240.0, 144.0, 720.0, 576.0]]
    changed = (abs(picture.pixels.astype(int) - 200) > 20).any(2)
    assert changed[300, 237:244].any() and changed[300, 717:724].any()
    assert not changed[200:500, 300:700].any()


def test_more_than_ten_classes_have_colours_of_their_own():
    instances = Instances((48, 64), gt_boxes=Boxes(torch.tensor([[1.0, 1.0, 9.0, 9.0]] * 80)))
    instances.gt_classes = torch.arange(80)
    boxes = draw_boxes("", np.zeros((48, 64, 3), np.uint8), instances, [*"abcdefgh"] * 10).boxes
    assert len({to_rgb(color) for color in boxes.colors}) == 80


def test_the_overview_has_boxes_in_the_colours_that_it_names(tmp_path):
    image = np.full((48, 64, 3), 255, np.uint8)
    corners = torch.tensor([[10.0, 10.0, 30.0, 30.0], [35.0, 10.0, 55.0, 30.0]])
    instances = Instances((48, 64), gt_boxes=Boxes(corners), gt_classes=torch.tensor([1, 3]))
    picture = draw_boxes("ground truth", image, instances, ["a", "b", "c", "d"])
    assert picture.boxes.classes == ["b", "d"] and (picture.boxes.corners == corners.numpy()).all()
    draw_overview(tmp_path / "overview.png", [PictureReport("1", [picture])])
    drawn = np.asarray(Image.open(tmp_path / "overview.png").convert("RGB")).astype(int)
    for color in picture.boxes.colors:
        hits = abs(drawn - [round(255 * x) for x in to_rgb(color)]).max(2) < 40
        rows = np.flatnonzero(hits.any(1)) / len(drawn)
        # In the picture, and in the legend below it.
        assert rows.min() < 0.5 and rows.max() > 0.75
    unused = abs(drawn - [round(255 * x) for x in to_rgb("C0")]).max(2) < 40
    assert not unused.any()


def test_maps_of_a_level_share_a_scale_and_distances_that_of_the_report():
    level = LevelView(
        np.array([[0.0, 1.0]], np.float32), np.array([[2.0, 4.0]], np.float32),
        np.array([[0.0, 0.5]], np.float32),
    )  # fmt: skip
    pictures = draw_levels(PyramidView({"p3": level}, None, None, None), highest=0.5)["p3"]
    student, teacher, distance = (p.pixels.astype(int) for p in pictures)
    lowest, highest = [68, 1, 84], [253, 231, 36]  # of viridis
    assert student[0, 0].tolist() == lowest and teacher[0, 1].tolist() == highest
    assert student[0, 1].tolist() not in (lowest, highest)
    assert distance[0, 0].tolist() == [0, 0, 3] and distance[0, 1].sum() > 600
    assert [p.title for p in pictures] == ["p3, student", "p3, teacher", "p3, distance"]


def test_a_map_of_zeros_is_no_division_by_zero():
    level = LevelView(*[np.zeros((2, 2), np.float32)] * 3)
    with np.errstate(all="raise"):
        for highest in (0.0, 1.0):
            draw_levels(PyramidView({"p3": level}, None, None, None), highest=highest)


@pytest.mark.parametrize("count", [1, 3])
def test_curves_are_left_out_where_there_are_none(tmp_path, count):
    report = PictureReport("x", [Picture("y", np.zeros((2, 2, 3), np.uint8))] * count)
    assert "Curves" not in write_report(tmp_path, "t", [report]).read_text()
