"""The examples of the guides work as they stand there."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from PIL import Image

from sssd.classification.term import TERMS
from sssd.engine import load_config
from sssd.engine.export import stock_config
from sssd.losses import DISTANCES, pyramid_distance
from sssd.meta_arch.teachers import TEACHER_REGISTRY
from sssd.studies.plan import load_plan
from sssd.studies.training import check
from tests.coco_files import write_coco
from tests.conftest import REPOSITORY
from tests.detectors import build, losses_at, tiny_config, training_batch, training_input
from tests.losses.pyramids import pyramid

EXAMPLES = REPOSITORY / "docs" / "examples"


@pytest.fixture
def project(tmp_path):
    """A folder with pictures, annotations and a stock config."""
    write_coco(tmp_path)
    cfg = stock_config(
        tiny_config(
            "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (64,),
            distilled=False,
        )
    )  # fmt: skip
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    (tmp_path / "project.yaml").write_text(cfg.dump())
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Runs a script as from a command line, in this process: importing Detectron2 takes seconds."""

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        runpy.run_path(str(script), run_name="__main__")

    yield run
    for name in ("project_train", "loop_train", "cells_train", "cells_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def loads_into_stock_detectron2(path):
    saved = torch.load(path, weights_only=True)
    build_model(tiny_config(distilled=False)).load_state_dict(saved["model"], strict=True)
    return saved


def test_the_pages_show_every_example():
    names = ("your_project.md", "classification.md")
    page = "\n".join((REPOSITORY / "docs" / name).read_text() for name in names)
    shown = set(re.findall(r"examples/(\w+\.py)", page))
    assert shown == {path.name for path in EXAMPLES.glob("*.py")}
    for path in EXAMPLES.glob("*.py"):
        for block in re.findall(r"```python\n# " + path.name + r"\n(.*?)```", page, re.S):
            for part in block.split("...\n"):
                assert part.strip() in path.read_text(), part


def test_yacs_project(project, run):
    output = project / "output"
    folder = [project / "project.yaml", project / "annotations.json", project / "images"]
    run(EXAMPLES / "yacs_project.py", *folder, "OUTPUT_DIR", output)
    loads_into_stock_detectron2(output / "model_final.pth")
    line = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert line["iteration"] == 2 and line["loss_distill"] > 0
    # The lines that are marked are all that there is of sssd.
    source = (EXAMPLES / "yacs_project.py").read_text()
    marked = [x for x in source.splitlines() if "# <-" in x]
    others = [x for x in source.splitlines() if re.search("sssd|SSSD", x) and x not in marked]
    assert len(marked) == 5 and not others


def test_own_coco(tmp_path, run, monkeypatch):
    annotations, _ = write_coco(tmp_path / "cells")
    for name in ("train", "val"):
        shutil.copy(annotations, tmp_path / f"cells/{name}.json")
    monkeypatch.chdir(tmp_path)
    options = {
        "MODEL.DEVICE": "cpu", "MODEL.ROI_HEADS.NUM_CLASSES": 3, "SOLVER.MAX_ITER": 1,
        "INPUT.MIN_SIZE_TRAIN": "(64,)", "INPUT.MIN_SIZE_TEST": 64, "DATALOADER.NUM_WORKERS": 0,
    }  # fmt: skip
    config = EXAMPLES / "own_coco.yaml"
    opts = [str(x) for pair in options.items() for x in pair]
    run(REPOSITORY / "tools/train_net.py", "--config-file", config, *opts)
    line = json.loads(Path("output/cells_sssd/metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP-green" in line
    assert config.read_text() in (REPOSITORY / "docs/own_data.md").read_text()


def test_plan_for_own_data(tmp_path, monkeypatch):
    annotations, _ = write_coco(tmp_path / "cells")
    for name in ("train", "val"):
        shutil.copy(annotations, tmp_path / f"cells/{name}.json")
    for name in ("docs", "configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    plan = load_plan("docs/examples/plan.yaml")
    by_method = {training.method: training for training in plan.trainings()}
    assert len(plan.trainings()) == 15 and list(by_method) == ["plain", "sssd", "lgd"]
    configs = {}
    for method, training in by_method.items():
        check(plan, training)
        configs[method] = load_config(training.config, list(map(str, training.options)))
    plain, sssd, lgd = configs.values()
    # Plain and self-distilled differ in one key, LGD and SSSD in what the recipes differ in.
    assert plain.MODEL.META_ARCHITECTURE == sssd.MODEL.SSSD.STUDENT == "GeneralizedRCNN"
    plain.MODEL.META_ARCHITECTURE = sssd.MODEL.META_ARCHITECTURE
    assert plain == sssd
    published = load_config(str(REPOSITORY / "configs/LGD/faster_rcnn_R_50_FPN_1x.yaml"))
    assert lgd.MODEL.SSSD.DISTANCE == published.MODEL.SSSD.DISTANCE


def test_own_loop(project, run, capsys):
    folder = [project / "project.yaml", project / "annotations.json", project / "images"]
    run(EXAMPLES / "own_loop.py", *folder, project / "output")
    out = capsys.readouterr().out
    assert [int(x.split()[0]) for x in out.splitlines() if "loss_distill" in x] == [0, 1, 2]
    saved = loads_into_stock_detectron2(project / "output" / "model_final.pth")
    assert {"sssd", "optimizer"} <= saved.keys()


def test_lazy_project(project, run):
    images, annotations = str(project / "images"), str(project / "annotations.json")
    register_coco_instances("project_train", {}, annotations, images)
    run(
        REPOSITORY / "tools" / "lazyconfig_train_net.py", "--config-file",
        EXAMPLES / "lazy_project.py", f"train.output_dir={project / 'output'}",
    )  # fmt: skip
    line = json.loads((project / "output" / "metrics.json").read_text().splitlines()[-1])
    assert line["loss_distill/coefficient"] == 100.0


@pytest.fixture
def hellinger():
    runpy.run_path(str(EXAMPLES / "new_distance.py"))
    yield
    del DISTANCES["hellinger"]


def test_new_distance(hellinger):
    # Disjoint distributions are 1 apart, equal ones 0.
    values = torch.tensor([[60.0, 0.0], [0.0, 60.0]])
    a, b = ({"p": x[None, :, None]} for x in (values, values.flip(1)))
    options = {"distance": "hellinger", "reduction": "per_distribution"}
    assert pyramid_distance(a, b, **options).item() == pytest.approx(1.0, abs=1e-3)
    assert pyramid_distance(a, a, **options).item() == pytest.approx(0.0, abs=1e-3)
    maps = [pyramid(seed=seed) for seed in (0, 1)]
    for x in maps[0].values():
        x.requires_grad_()
    pyramid_distance(*maps, **options).backward()
    assert all(x.grad.isfinite().all() for x in maps[0].values())
    losses, _ = losses_at(build(tiny_config("MODEL.SSSD.DISTANCE.NAME", "hellinger")))
    assert losses["loss_distill"].item() > 0


@pytest.fixture
def spots():
    runpy.run_path(str(EXAMPLES / "new_teacher.py"))
    yield
    del TEACHER_REGISTRY._obj_map["spots"]


@pytest.mark.parametrize("detector", ["faster_rcnn", "fcos"])
def test_new_teacher(spots, detector):
    cfg = tiny_config("MODEL.SSSD.TEACHER.NAME", "spots", detector=detector)
    cfg.MODEL.SSSD.SPOTS = CfgNode({"RADIUS": 0.5})
    model = build(cfg)
    assert model.teacher.radius == 0.5
    for batch in (training_batch(), [training_input(0)]):
        model.zero_grad()
        losses, _ = losses_at(model, batch=batch)
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    cfg.MODEL.SSSD.TEACHER.NAME = "spot"
    with pytest.raises(ValueError, match="'spot'.*use one of label_encoding, label_map, spots"):
        build(cfg)


def logged(folder):
    """The last value of all that a training has logged."""
    values = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        values.update(json.loads(line))
    return values


@pytest.fixture
def similarity():
    yield runpy.run_path(str(EXAMPLES / "new_term.py"))
    # It alone: those of sssd may have been registered since.
    TERMS.pop("similarity")


def test_new_term(similarity):
    loss = similarity["Similarity"].compare
    # Two images alike and one apart, to the teacher; all alike, to the student: rows of unit norm
    # (1, 1, 0) / sqrt 2 twice and (0, 0, 1), against (1, 1, 1) / sqrt 3.
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    student = torch.ones(3, 7, 2, 2, requires_grad=True)
    a, b = 2**-0.5, 3**-0.5
    expected = (2 * (2 * (a - b) ** 2 + b**2) + 2 * b**2 + (1 - b) ** 2) / 9
    value = loss(None, student, teacher)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert loss(None, 3 * teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    value.backward()
    assert student.grad.isfinite().all() and student.grad.abs().sum() > 0


def test_new_term_trains_from_its_config(similarity, tmp_path, run):
    # Registered already: running the script as well would be a second registration.
    TERMS.pop("similarity")
    run(
        EXAMPLES / "new_term.py", "--config-file", EXAMPLES / "new_term.yaml", "OUTPUT_DIR",
        tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "SEED", 1,
    )  # fmt: skip
    assert logged(tmp_path)["loss_similarity"] > 0
    assert {"teacher", "student"} == json.loads((tmp_path / "results.json").read_text()).keys()
    student = timm.create_model("cifar_resnet8", num_classes=10, in_chans=1)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    student.load_state_dict(saved["model"], strict=True)


def test_own_images(tmp_path, run):
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("cats", "dogs"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = random.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    output = tmp_path / "output"
    try:
        run(
            EXAMPLES / "own_images.py", tmp_path / "train", tmp_path / "val", "--config-file",
            EXAMPLES / "own_images.yaml", "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 2,
            "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", 4,
        )  # fmt: skip
    finally:
        for name in ("own_train", "own_val"):
            if name in DatasetCatalog:
                DatasetCatalog.remove(name)
                MetadataCatalog.remove(name)
    losses = logged(output)
    assert losses["loss_kd"] > 0 and losses["loss_attention"] > 0
    saved = torch.load(output / "model_final.pth", weights_only=True)["model"]
    # The width is NETWORK_OPTIONS', the class count the config's.
    assert saved["stage1.0.weight"].shape == (48, 3, 3, 3) and saved["fc.bias"].shape == (2,)
