"""The coefficient that makes distillation a chosen share of the total loss."""

import math
import os
import runpy

import pytest
import torch

from sssd.engine import calibration
from sssd.engine.calibration import (
    ShortRun,
    binary_search,
    closed_form,
    coefficient_of_share,
    lgd_setting,
    measure,
)
from tests.coco_files import register_coco
from tests.conftest import REPOSITORY
from tests.detectors import build, tiny_config


@pytest.fixture
def cfg(tmp_path):
    name = register_coco("tiny_coco", tmp_path / "data")
    return tiny_config(
        "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), "DATALOADER.NUM_WORKERS", 0,
        "INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (), "SEED", 3,
        "OUTPUT_DIR", str(tmp_path / "output"),
    )  # fmt: skip


# ---- closed form ----


def test_one_pair_of_losses_has_the_coefficient_of_the_formula():
    run = ShortRun(1.0, [3.0], [0.25])
    assert run.share == pytest.approx(0.25 / 3.25)
    # 0.45 / 0.55 * 3 / 0.25
    assert coefficient_of_share(run, 0.45) == pytest.approx(9.8181818)


def test_the_share_is_the_mean_of_the_iterations_not_that_of_the_mean_losses():
    run = ShortRun(1.0, [1.0, 9.0], [1.0, 1.0])
    assert run.share == pytest.approx((1 / 2 + 1 / 10) / 2)
    coefficient = coefficient_of_share(run, 0.5)
    # c / (1 + c) + c / (9 + c) = 1 has the root 3; the mean losses would give 5.
    assert coefficient == pytest.approx(3.0)
    assert run.share_at(coefficient) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("share", "distance", "sentence"),
    [
        (0.0, 1.0, "A share lies between 0 and 1, and 0 does not"),
        (1.5, 1.0, "and 1.5 does not"),
        (0.5, 0.0, "No coefficient between .* gives the distance a share of 50%"),
    ],
)
def test_what_no_coefficient_gives_is_one_sentence(share, distance, sentence):
    with pytest.raises(ValueError, match=sentence):
        coefficient_of_share(ShortRun(1.0, [2.0], [distance]), share)


# ---- short runs ----


def test_a_short_run_is_the_beginning_of_the_training_and_leaves_nothing(cfg, tmp_path):
    short, longer = measure(cfg, 7.0, 3), measure(cfg, 7.0, 6)
    assert len(short.detection) == len(short.distance) == 3
    assert longer.detection[:3] == short.detection and longer.distance[:3] == short.distance
    assert not os.path.exists(cfg.OUTPUT_DIR)
    assert cfg.MODEL.SSSD.COEFFICIENT.VALUES == [10.0] and cfg.DATASETS.TEST == ("tiny_coco",)


def test_a_short_run_starts_from_the_weights_of_the_config(cfg, tmp_path):
    model = calibration.Trainer.build_model(cfg)
    with torch.no_grad():
        model.student.roi_heads.box_predictor.cls_score.bias += 100.0 * torch.eye(4)[3]
    path = str(tmp_path / "weights.pth")
    torch.save({"model": model.state_dict()}, path)
    random = measure(cfg, 7.0, 1)
    cfg.MODEL.WEIGHTS = path
    # Only background is right for most regions, and costs 100 each now... or nothing.
    assert not math.isclose(measure(cfg, 7.0, 1).detection[0], random.detection[0], rel_tol=0.1)


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_coefficient_found_has_the_share_within_a_point(cfg, target):
    *_, last = closed_form(cfg, target, 8, start=50.0, tolerance=0.005)
    again = measure(cfg, last.coefficient, 8)
    assert abs(again.share - target) < 0.01


def test_the_papers_search_halves_its_interval(cfg, monkeypatch):
    # Losses that do not depend on the coefficient: c D / (L + c D) with L = 4, D = 0.1.
    asked = []

    def run(cfg, coefficient, iterations):
        asked.append(coefficient)
        return ShortRun(coefficient, [4.0], [0.1])

    monkeypatch.setattr(calibration, "measure", run)
    *_, last = binary_search(cfg, 0.45, 8, tolerance=0.005)
    assert asked[:3] == pytest.approx([10.0, 31.6228, 56.2341])  # 32.7 is the root
    for root in (1.1, 9.3, 90.0):  # small and large ones alike
        loss = 0.1 * root * 0.55 / 0.45
        monkeypatch.setattr(
            calibration, "measure", lambda cfg, c, n, x=loss: ShortRun(c, [x], [0.1])
        )
        *_, found = binary_search(cfg, 0.45, 8, tolerance=0.005)
        assert abs(found.share - 0.45) <= 0.005
    monkeypatch.setattr(calibration, "measure", run)
    assert last.coefficient == pytest.approx(32.7, abs=0.7) and abs(last.share - 0.45) <= 0.005
    with pytest.raises(ValueError, match=r"share 80.0% is not to be had .* from 1 to 100"):
        list(binary_search(cfg, 0.8, 8, tolerance=0.005))


def test_a_share_that_moves_away_is_given_up(cfg, monkeypatch):
    monkeypatch.setattr(calibration, "measure", lambda cfg, c, n: ShortRun(c, [c], [0.1]))
    with pytest.raises(ValueError, match="8 short runs have not met the share 45.0%"):
        list(closed_form(cfg, 0.45, 8, start=0.01, tolerance=0.005))


def test_lgds_setting_is_that_of_its_configs(cfg):
    from sssd.engine import load_config

    published = load_config(str(REPOSITORY / "configs/LGD/faster_rcnn_R_50_FPN_2x.yaml"))
    ours = load_config(str(REPOSITORY / "configs/SSSD/faster_rcnn_R_50_FPN_2x.yaml"))
    changed = lgd_setting(ours).MODEL.SSSD
    assert published.MODEL.SSSD.DISTANCE == changed.DISTANCE
    for key in ("SCHEDULE", "VALUES"):
        assert published.MODEL.SSSD.COEFFICIENT[key] == changed.COEFFICIENT[key]


def test_what_cannot_be_measured_is_one_sentence(cfg):
    with pytest.raises(ValueError, match="11 iterations cannot be measured: .* the 10 of SOLVER"):
        measure(cfg, 7.0, 11)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="only a SelfDistiller has a coefficient to calibrate"):
        measure(cfg, 7.0, 3)


# ---- the tool ----


@pytest.fixture
def tool(cfg, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    tool = runpy.run_path(str(REPOSITORY / "tools/calibrate.py"))
    return lambda *args: tool["main"](
        tool["parser"]().parse_args(["--config-file", str(path), *args])
    )


def test_by_default_the_share_is_that_of_lgd(tool, cfg, capsys):
    tool("--iterations", "8", "MODEL.SSSD.COEFFICIENT.SCHEDULE", "step",
         "MODEL.SSSD.COEFFICIENT.VALUES", "[60.0, 80.0]", "SOLVER.STEPS", "(9,)")  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if line.startswith("LGD's distance"))
    target = measure(lgd_setting(cfg), 1.0, 8).share
    assert first == f"LGD's distance, coefficient 1: {target:.1%} of the total loss"
    assert any(line.startswith("coefficient 60: ") for line in lines)
    key, _, values = lines[-1].partition(" ")
    first, second = map(float, values.strip("[]").split(", "))
    assert key == "MODEL.SSSD.COEFFICIENT.VALUES"
    assert second / first == pytest.approx(80 / 60, rel=1e-3)
    assert abs(measure(cfg, first, 8).share - target) < 0.01


@pytest.mark.parametrize(("schedule", "values"), [("share", "[0, 1000]"), ("linear", "[0, 50]")])
def test_the_lines_are_those_of_a_config_that_can_be_trained(tool, cfg, capsys, schedule, values):
    before = ["MODEL.SSSD.COEFFICIENT.SCHEDULE", schedule, "MODEL.SSSD.COEFFICIENT.VALUES", values]
    tool("--iterations", "2", "--share", "0.4", *before)
    lines = capsys.readouterr().out.splitlines()
    printed = [x for line in lines[-2:] for x in line.split(" ", 1)]
    cfg.merge_from_list([*before, *printed])
    assert build(cfg).schedule(0) == pytest.approx(float(printed[3].strip("[]")))


def test_a_short_run_that_is_not_finite_saves_nothing(cfg):
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e12, "SOLVER.CLIP_GRADIENTS.ENABLED", False])
    with pytest.raises(FloatingPointError):
        measure(cfg, 7.0, 8)
    assert not os.path.exists(cfg.OUTPUT_DIR)
    cfg.MODEL.SSSD.SOLVER.MAX_SKIPPED = 100
    assert len(measure(cfg, 7.0, 8).detection) < 8  # of those that were not skipped
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.001, "MODEL.SSSD.TEACHER.LOSS_WEIGHT", 1e39])
    with pytest.raises(ValueError, match="No loss of the 3 iterations is finite"):
        measure(cfg, 7.0, 3)


def test_a_share_that_is_none_is_refused(tool, capsys):
    with pytest.raises(SystemExit):
        tool("--share", "45")
    assert "45 is no share: give one such as 0.45 or 45%" in capsys.readouterr().err
