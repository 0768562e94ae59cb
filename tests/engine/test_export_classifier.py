"""A trained classifier works in timm and torchvision, without sssd."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model

from sssd.engine import Checkpointer, export_student, load_config
from tests.conftest import REPOSITORY

# What each network needs besides its name: the size of images, their channels, options.
NETWORKS = {
    "test_resnet": (32, 1, {"drop_rate": 0.1}),
    "torchvision/shufflenet_v2_x0_5": (32, 3, {}),
    "cifar_resnet8": (8, 1, {"global_pool": "max"}),  # last: it imports sssd
}

SECTIONS = {
    "test_resnet": ("layer1", "layer4"),
    "torchvision/shufflenet_v2_x0_5": ("stage2", "conv5"),
    "cifar_resnet8": ("layer1", "layer3"),
}

# Runs the "usage" of config.json in each exported folder, then loads the training's own file.
CLASSIFY = """
import json, os, sys, torch
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    os.chdir(folder)
    described = json.load(open("config.json"))
    exec(described["usage"])
    images = torch.load("../images.pth")
    with torch.no_grad():
        torch.save(network.eval()(images), "../exported.pth")
        for value in network.state_dict().values():
            value.zero_()
        trained = torch.load("../run/model_final.pth", weights_only=True)
        network.load_state_dict(trained["model"], strict=True)
        torch.save(network(images), "../trained.pth")
    assert ("sssd" in sys.modules) == described["network"].startswith("cifar_"), folder
"""


def train(folder, network, terms=({"name": "cross_entropy"},)):
    """What a training leaves: a checkpoint with moved weights and statistics, and its config."""
    torch.manual_seed(0)
    size, channels, options = NETWORKS[network]
    cfg = load_config(str(REPOSITORY / "configs/Base-Classification-digits.yaml"))
    keys = cfg.MODEL.SSSD.CLASSIFIER
    keys.NETWORK, keys.SIZE, keys.TERMS = network, size, list(terms)
    keys.NETWORK_OPTIONS.update(options)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [51.0] * channels, [102.0] * channels
    cfg.OUTPUT_DIR = str(folder / "run")
    model = build_model(cfg)
    for value in model.student.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    os.makedirs(cfg.OUTPUT_DIR)
    Checkpointer(model, cfg.OUTPUT_DIR).save("model_final")
    (folder / "run" / "config.yaml").write_text(cfg.dump())
    return model.eval(), cfg


def pictures(size, channels):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (4, channels, size, size), dtype=torch.uint8, generator=generator)


def test_export_and_training_file_classify_as_in_training_without_sssd(tmp_path):
    expected, folders = {}, []
    for name, (size, channels, options) in NETWORKS.items():
        folder = tmp_path / name.rpartition("/")[2]
        # A head of BYOT lies beside the student in the training's file, and is not exported.
        section, deepest = SECTIONS[name]
        term = {"name": "own_teacher", "layers": [section], "deepest": deepest}
        model, _ = train(folder, name, [term])
        files = [str(folder / "run" / x) for x in ("model_final.pth", "config.yaml")]
        written = export_student(*files, str(folder / "student"))
        assert written == str(folder / "student" / "config.json")
        names = sorted(path.name for path in (folder / "student").iterdir())
        assert names == ["config.json", "model.pth"]

        described = json.loads((folder / "student" / "config.json").read_text())
        assert described["options"] == options
        assert described["class_names"] == [str(i) for i in range(10)]
        assert (described["image_size"], described["resize"]) == (size, size)
        assert described["center_crop"] == [size, size]
        assert described["pixel_mean_of_0_to_1"] == [0.2] * channels
        assert described["pixel_std_of_0_to_1"] == [0.4] * channels
        registered_by = "import sssd.classification.cifar" if "cifar_" in name else None
        assert described.get("registered_by") == registered_by

        images = pictures(size, channels)
        mean, std = (
            torch.tensor(described[f"pixel_{what}_of_0_to_255"]).view(-1, 1, 1)
            for what in ("mean", "std")
        )
        torch.save((images - mean) / std, folder / "images.pth")
        with torch.no_grad():
            logits = [x["logits"]["student"] for x in model([{"image": x} for x in images])]
        expected[folder] = torch.stack(logits)
        folders.append(str(folder / "student"))

    # sssd is importable there: what can do without it must not import it.
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", CLASSIFY, *folders],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for folder, logits in expected.items():
        assert torch.equal(torch.load(folder / "exported.pth"), logits), folder
        assert torch.equal(torch.load(folder / "trained.pth"), logits), folder


def test_without_the_data_the_classes_have_no_names(tmp_path, monkeypatch):
    _, cfg = train(tmp_path, "cifar_resnet8")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    checkpoint, config = (str(tmp_path / "run" / x) for x in ("model_final.pth", "config.yaml"))
    for dataset in ("cifar10_small_train", "not_registered"):
        cfg.DATASETS.TRAIN = (dataset,)
        (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
        with open(export_student(checkpoint, config, str(tmp_path / "student"))) as f:
            assert json.load(f)["class_names"] is None


def test_the_tool_finds_the_config_of_a_stage_and_exports_again_what_it_exported(
    tmp_path, monkeypatch, capsys
):
    train(tmp_path, "test_resnet")
    config = tmp_path / "run" / "stage_config.yaml"
    (tmp_path / "run" / "config.yaml").rename(config)
    first, second = tmp_path / "first", tmp_path / "second"
    tool = str(REPOSITORY / "tools" / "export_student.py")
    for args in (
        [tmp_path / "run" / "model_final.pth", "--output", first],
        [first / "model.pth", "--output", second, "--config-file", config],
    ):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, args)])
        runpy.run_path(tool, run_name="__main__")
    assert f"wrote {second}/model.pth and {second}/config.json" in capsys.readouterr().out
    one, other = (torch.load(folder / "model.pth") for folder in (first, second))
    assert list(one) == list(other)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path):
    _, cfg = train(tmp_path, "cifar_resnet8")
    checkpoint, config = (str(tmp_path / "run" / x) for x in ("model_final.pth", "config.yaml"))
    output = tmp_path / "student"
    with pytest.raises(ValueError, match=r"weights .*other\.pth .*'cifar_resnet8' do not exist"):
        export_student(str(tmp_path / "other.pth"), config, str(output))
    for key, value, message in (
        # More layers than the file has, and fewer: Detectron2's own loader would take the latter.
        ("NETWORK", "cifar_resnet14", "do not fit the network 'cifar_resnet14' (it lacks"),
        ("NUM_CLASSES", 7, "'fc.weight' is (10, 64) there and (7, 64) here"),
    ):
        other = cfg.clone()
        other.MODEL.SSSD.CLASSIFIER[key] = value
        (tmp_path / "other.yaml").write_text(other.dump())
        with pytest.raises(ValueError, match=re.escape(message)):
            export_student(checkpoint, str(tmp_path / "other.yaml"), str(output))
    assert not output.exists()
