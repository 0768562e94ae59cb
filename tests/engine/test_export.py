"""What training leaves behind works without sssd."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model

import sssd_compat
from sssd.engine import Checkpointer, CheckpointError, export_student
from tests.conftest import REPOSITORY
from tests.detectors import tiny_config

# On unbuilt v0.6 even stock Detectron2 needs the compatibility layer; elsewhere nothing is used.
PREAMBLE = "import sssd_compat; sssd_compat.apply()\n" if "extension" in sssd_compat.apply() else ""

LOAD_STRICTLY = """
import sys, torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg).eval()
checkpoint = torch.load(sys.argv[2], weights_only=True)
model.load_state_dict(checkpoint["model"], strict=True)
torch.set_num_threads(1)
image = torch.load(sys.argv[3])
with torch.no_grad():
    fields = model([{"image": image}])[0]["instances"].get_fields()
fields["pred_boxes"] = fields["pred_boxes"].tensor
torch.save(dict(fields), sys.argv[4])
assert "sssd" not in sys.modules
"""

LOAD_LAZILY = """
import sys, torch
from detectron2.config import LazyConfig, instantiate
model = instantiate(LazyConfig.load(sys.argv[1]).model).eval()
model.load_state_dict(torch.load(sys.argv[2], weights_only=True)["model"], strict=True)
torch.set_num_threads(1)
with torch.no_grad():
    fields = model([{"image": torch.load(sys.argv[3])}])[0]["instances"].get_fields()
fields["pred_boxes"] = fields["pred_boxes"].tensor
torch.save(dict(fields), sys.argv[4])
assert "sssd" not in sys.modules
"""

PREDICT = """
import sys, numpy, torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
torch.set_num_threads(1)
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
fields = DefaultPredictor(cfg)(numpy.load(sys.argv[2]))["instances"].get_fields()
fields["pred_boxes"] = fields["pred_boxes"].tensor
torch.save(dict(fields), sys.argv[3])
assert "sssd" not in sys.modules
"""


def run_stock(script, *args):
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def trained(tmp_path):
    return train_and_save(tmp_path, tiny_config())


def train_and_save(tmp_path, cfg):
    """A checkpoint of a SelfDistiller with moved weights, and its config beside it."""
    torch.manual_seed(0)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    model = build_model(cfg)
    for parameter in model.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    os.makedirs(cfg.OUTPUT_DIR)
    Checkpointer(model, cfg.OUTPUT_DIR).save("model_final")
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    return model.eval(), tmp_path


def detections(model, image):
    with torch.no_grad():
        fields = model([{"image": image}])[0]["instances"].get_fields()
    return {**fields, "pred_boxes": fields["pred_boxes"].tensor}


def assert_same(found, expected):
    assert len(expected["scores"]) > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_training_checkpoint_loads_strictly_into_stock_detectron2(trained):
    model, folder = trained
    stock = tiny_config(distilled=False)
    del stock.MODEL["SSSD"]
    (folder / "stock.yaml").write_text(stock.dump())
    image = torch.rand(3, 64, 96) * 255
    torch.save(image, folder / "image.pth")
    checkpoint = folder / "run" / "model_final.pth"
    run_stock(
        LOAD_STRICTLY, folder / "stock.yaml", checkpoint, folder / "image.pth", folder / "out.pth"
    )
    assert_same(torch.load(folder / "out.pth"), detections(model, image))


def test_the_exported_folder_is_enough_for_the_stock_predictor(trained):
    model, folder = trained
    output = folder / "student"
    run = folder / "run"
    export_student(str(run / "model_final.pth"), str(run / "config.yaml"), str(output))
    assert "SSSD" not in (output / "config.yaml").read_text()
    assert set(torch.load(output / "model.pth", weights_only=True)) == {"model"}

    # 800 pixels high, which is the short side of the config: the predictor resizes nothing
    picture = np.random.default_rng(0).integers(0, 256, (800, 1000, 3), dtype=np.uint8)
    np.save(folder / "picture.npy", picture)
    run_stock(PREDICT, output / "config.yaml", folder / "picture.npy", folder / "out.pth")
    image = torch.as_tensor(picture.astype("float32").transpose(2, 0, 1))
    assert_same(torch.load(folder / "out.pth"), detections(model, image))


def test_export_refuses_what_does_not_fit(trained):
    _, folder = trained
    run = folder / "run"
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml does not exist.*--config-file"):
        export_student(str(run / "model_final.pth"), str(run / "nowhere.yaml"), str(folder / "o"))
    other = tiny_config("MODEL.FPN.OUT_CHANNELS", 32)
    (run / "other.yaml").write_text(other.dump())
    with pytest.raises(CheckpointError, match="belongs to another architecture"):
        export_student(str(run / "model_final.pth"), str(run / "other.yaml"), str(folder / "o"))
    assert not (folder / "o" / "model.pth").exists()


@pytest.mark.parametrize(("block", "distilled"), [("p5", True), ("", False)])
def test_fcos_is_exported_as_a_lazy_config(tmp_path, block, distilled):
    model, _ = train_and_save(
        tmp_path,
        tiny_config(
            "MODEL.SSSD.FCOS.SCORE_THRESH_TEST", 0.0, "MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE", block,
            detector="fcos", distilled=distilled,
        ),
    )  # fmt: skip
    run, output = tmp_path / "run", tmp_path / "student"
    path = export_student(str(run / "model_final.pth"), str(run / "config.yaml"), str(output))
    assert path == str(output / "lazy_config.yaml")
    assert sorted(p.name for p in output.iterdir()) == ["lazy_config.yaml", "model.pth"]
    image = torch.rand(3, 64, 96) * 255
    torch.save(image, tmp_path / "image.pth")
    out = tmp_path / "out.pth"
    run_stock(LOAD_LAZILY, path, output / "model.pth", tmp_path / "image.pth", out)
    assert_same(torch.load(out), detections(model, image))

    # What is exported can be exported again: a LazyConfig is read as well.
    again = export_student(str(output / "model.pth"), path, str(tmp_path / "again"))
    assert (tmp_path / "again" / "lazy_config.yaml").read_text() == (
        output / "lazy_config.yaml"
    ).read_text()
    assert again.endswith("lazy_config.yaml")


def test_the_device_is_that_of_the_training_and_not_of_the_machine_that_exports(tmp_path):
    cfg = tiny_config()
    train_and_save(tmp_path, cfg)
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("DEVICE: cpu", "DEVICE: cuda"))
    path = export_student(
        str(tmp_path / "run/model_final.pth"), str(config), str(tmp_path / "student")
    )
    with open(path) as file:
        assert yaml.safe_load(file)["MODEL"]["DEVICE"] == "cuda"
