"""tools/visualize.py on trainings of its own."""

import gzip
import json
import runpy
import shutil
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from sssd.engine import Trainer
from tests.coco_files import register_coco
from tests.conftest import REPOSITORY
from tests.detectors import tiny_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Config file and weights of a plain and of a self-distilled detector."""
    tmp_path = tmp_path_factory.mktemp("trained")
    name = register_coco("tiny_coco", tmp_path / "data")
    made = {}
    for kind in ("plain", "sssd"):
        cfg = tiny_config(
            "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0,
            "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.MAX_ITER", 1,
            "SOLVER.STEPS", (), "OUTPUT_DIR", str(tmp_path / kind), distilled=kind == "sssd",
        )  # fmt: skip
        (tmp_path / kind).mkdir()
        Trainer(cfg).train()
        (tmp_path / f"{kind}.yaml").write_text(cfg.dump())
        made[kind] = tmp_path / f"{kind}.yaml", tmp_path / kind / "model_final.pth"
    return made


@pytest.fixture
def call(monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, args)])
        runpy.run_path(str(REPOSITORY / "tools/visualize.py"), run_name="__main__")

    return call


def test_the_report_has_all_sides_of_each_picture(trained, call, tmp_path):
    output = tmp_path / "out"
    config, weights = trained["sssd"]
    plain_config, plain_weights = trained["plain"]
    call("report", "--config-file", config, "--weights", weights, "--baseline-config",
         plain_config, "--baseline-weights", plain_weights, "--ids", 3, 5, "--threshold", 0,
         "--runs", plain_weights.parent, weights.parent, "--output", output)  # fmt: skip
    text = (output / "index.html").read_text()
    for image in ("2", "4"):  # the files of the images 3 and 5
        for title in ("ground truth", "baseline", "student", "teacher, with the ground truth",
                      "p2, student", "p6, distance"):  # fmt: skip
            assert f'alt="{image}: {title}"' in text, title
    assert text.count("<h2>") == 3 and "AP over the iterations" in text
    assert (output / "2_p3__distance.png").is_file()
    with Image.open(output / "overview.png") as overview:  # two rows of seven
        assert overview.width > 2 * overview.height


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda args, trained: args | {"--weights": trained["exported"]}, "without the parts"),
        (lambda args, trained: args | {"--config-file": trained["plain"][0]}, "trains no teacher"),
        (lambda args, trained: args | {"--ids": "77"}, "tiny_coco has no image with the id 77"),
        (lambda args, trained: args | {"--baseline-config": "x.yaml"}, "needs both"),
        (lambda args, trained: args | {"--dataset": "tiny_cocoo"}, "no dataset 'tiny_cocoo'"),
        (lambda args, trained: args | {"--images": "0"}, "0 images of tiny_coco, .* show nothing"),
        (lambda args, trained: {**args, "DATASETS.TEST": "()"}, "no dataset ''"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(trained, call, tmp_path, change, sentence):
    config, weights = trained["sssd"]
    model = torch.load(weights, weights_only=True)["model"]
    trained = {**trained, "exported": tmp_path / "student.pth"}
    torch.save({"model": model}, trained["exported"])
    args = {"--config-file": config, "--weights": weights, "--output": tmp_path / "out"}
    with pytest.raises(SystemExit, match=f"^error: .*{sentence}"):
        call("report", *[x for pair in change(args, trained).items() for x in pair])


def test_pictures_of_one_name_in_two_folders_are_two(trained, call, tmp_path):
    records = DatasetCatalog.get("tiny_coco")[:2]
    copies = []
    for number, record in enumerate(records):
        path = tmp_path / str(number) / "x.png"
        path.parent.mkdir()
        shutil.copy(record["file_name"], path)
        copies.append({**record, "file_name": str(path)})
    DatasetCatalog.register("twins", lambda: copies)
    MetadataCatalog.get("twins").set(thing_classes=MetadataCatalog.get("tiny_coco").thing_classes)
    config, weights = trained["sssd"]
    try:
        call("report", "--config-file", config, "--weights", weights, "--dataset", "twins",
             "--output", tmp_path / "out")  # fmt: skip
    finally:
        DatasetCatalog.remove("twins")
        MetadataCatalog.remove("twins")
    names = [f"x_{record['image_id']}" for record in records]
    text = (tmp_path / "out/index.html").read_text()
    assert all(f'alt="{name}: ground truth"' in text for name in names)
    assert all((tmp_path / "out" / f"{name}_ground_truth.png").is_file() for name in names)


def test_a_run_of_classifiers_has_the_curves_of_each_stage(tmp_path):
    path = tmp_path / "kd/seed1_metrics.json.gz"
    path.parent.mkdir()
    stages = {"teacher": [{"iteration": 1, "lr": 0.1}], "student": [{"iteration": 1, "lr": 0.2}]}
    path.write_bytes(gzip.compress(json.dumps(stages).encode()))
    tool = runpy.run_path(str(REPOSITORY / "tools/visualize.py"))
    assert tool["runs_of"]([path]) == {
        "seed1/teacher": stages["teacher"], "seed1/student": stages["student"]
    }  # fmt: skip


def test_curves_name_runs_by_the_parts_in_which_they_differ(tmp_path, call, capsys):
    for name in ("a/seed1", "b/seed1"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({"iteration": 1, "lr": 0.1}))
    tool = runpy.run_path(str(REPOSITORY / "tools/visualize.py"))
    assert list(tool["runs_of"]([tmp_path / "a/seed1", tmp_path / "b/seed1"])) == [
        "a/seed1", "b/seed1"
    ]  # fmt: skip
    assert list(tool["runs_of"]([tmp_path / "a/seed1"])) == ["seed1"]
    call("curves", tmp_path / "a/seed1", tmp_path / "b/seed1", "--output", tmp_path / "out")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out/curves.png")
    assert (tmp_path / "out/curves.png").is_file()


# ---- tools/gradient_cosine.py, on the same trainings ----


def run_gradient_cosine(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["gradient_cosine.py", *map(str, args)])
    runpy.run_path(str(REPOSITORY / "tools/gradient_cosine.py"), run_name="__main__")


def test_gradients_are_compared_by_part(trained, monkeypatch, capsys):
    config, weights = trained["sssd"]
    run_gradient_cosine(
        monkeypatch, "--config-file", config, "--batches", 2, "MODEL.WEIGHTS", weights
    )
    lines = capsys.readouterr().out.splitlines()
    parts = [line.partition(": cosine ")[0] for line in lines if ": cosine " in line]
    assert parts == ["bottom_up", "pyramid"]
    assert all(line.endswith("(2 batches)") for line in lines if ": cosine " in line)


def test_a_plain_training_has_no_gradients_to_compare(trained, monkeypatch):
    config, _ = trained["plain"]
    with pytest.raises(SystemExit, match="^error: .*plain.yaml distills nothing"):
        run_gradient_cosine(monkeypatch, "--config-file", config)
