"""The examples of docs/your_project.md work as they stand there."""

import json
import re
import runpy
import sys

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model

from sssd.engine.export import stock_config
from sssd.losses import DISTANCES, pyramid_distance
from sssd.meta_arch.teachers import TEACHER_REGISTRY
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
    for name in ("project_train", "loop_train"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def loads_into_stock_detectron2(path):
    saved = torch.load(path, weights_only=True)
    build_model(tiny_config(distilled=False)).load_state_dict(saved["model"], strict=True)
    return saved


def test_the_page_shows_every_example():
    page = (REPOSITORY / "docs" / "your_project.md").read_text()
    shown = set(re.findall(r"examples/(\w+\.py)", page))
    assert shown == {path.name for path in EXAMPLES.glob("*.py")}
    for path in EXAMPLES.glob("*.py"):
        for block in re.findall(r"```python\n# " + path.name + r"\n(.*?)```", page, re.S):
            for part in block.split("...\n"):
                assert part.strip() in path.read_text(), part


def test_yacs_project(project, run):
    output = project / "output"
    folder = [project / "project.yaml", project / "annotations.json", project / "images"]
    phases = ["MODEL.SSSD.PHASES.NO_DISTILL_ITERS", 1, "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", 1]
    run(EXAMPLES / "yacs_project.py", *folder, "OUTPUT_DIR", output, *phases)
    loads_into_stock_detectron2(output / "model_final.pth")
    line = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert line["iteration"] == 2 and line["loss_distill"] > 0
    # The lines that are marked are all that there is of sssd, but for naming the student.
    source = (EXAMPLES / "yacs_project.py").read_text()
    marked = [x for x in source.splitlines() if "# <-" in x]
    others = [x for x in source.splitlines() if re.search("sssd|SSSD", x) and x not in marked]
    assert len(marked) == 3 and len(others) == 1


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
