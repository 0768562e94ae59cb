"""Every recipe of configs/Classification can be trained, and is what its name says."""

import re

import pytest

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import ClassificationTrainer, load_config, plan_stages
from sssd.engine.stage_runs import rehearse_stages
from tests.classifiers import CONFIGS

DATASETS = {  # name -> classes, channels, size
    "digits": (10, 1, 8),
    "cifar10_small": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "imagenet": (1000, 3, 224),
}
EVERYWHERE = {"digits", "cifar10_small", "cifar100"}  # where each method has a recipe
PATHS = sorted(CONFIGS.glob("*.yaml"))


def parts(path):
    """Method, network and dataset that a file name tells."""
    match = re.fullmatch(rf"(\w+?)_((?:cifar_)?resnet\w+?)_({'|'.join(DATASETS)})", path.stem)
    assert match, f"{path.name} is not <method>_<network>_<dataset>.yaml"
    return match.groups()


METHODS = sorted({parts(path)[0] for path in PATHS})


def shape(path):
    """Names of the stages and of their terms, and which networks are in it beside the student."""
    planned = plan_stages(load_config(str(path)))
    keys = [stage.cfg.MODEL.SSSD.CLASSIFIER for stage in planned]
    return [
        (s.name, s.teacher, s.previous, len(k.PEERS), [term["name"] for term in k.TERMS])
        for s, k in zip(planned, keys, strict=True)
    ]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_names_say_method_network_and_dataset(path):
    method, network, dataset = parts(path)
    cfg = load_config(str(path))
    keys = cfg.MODEL.SSSD.CLASSIFIER
    assert cfg.MODEL.META_ARCHITECTURE == "ClassificationDistiller"
    assert network == keys.NETWORK
    assert f"output/Classification/{method}_{dataset}" == cfg.OUTPUT_DIR
    assert {name.rsplit("_", 1)[0] for name in cfg.DATASETS.TRAIN} == {dataset}
    assert {name.rsplit("_", 1)[0] for name in cfg.DATASETS.TEST} == {dataset}
    assert not set(cfg.DATASETS.TRAIN) & set(cfg.DATASETS.TEST)
    own = (keys.NUM_CLASSES, len(cfg.MODEL.PIXEL_MEAN), keys.SIZE)
    assert own == DATASETS[dataset]
    assert len(cfg.MODEL.PIXEL_STD) == len(cfg.MODEL.PIXEL_MEAN)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_the_same_on_every_dataset(method):
    found = {parts(path)[2]: path for path in PATHS if parts(path)[0] == method}
    # Mirrored digits are no digits.
    expected = EVERYWHERE - ({"digits"} if method == "at_symmetry" else set())
    assert expected <= set(found)
    first, *others = (shape(path) for path in found.values())
    assert all(other == first for other in others)


def test_the_methods_are_those_of_the_issue():
    names = {"kd", "fitnets", "at", "at_gradient", "at_symmetry", "nst", "ft", "ab", "fsp", "rkd",
             "born_again", "tsd", "dml", "one", "byot", "cs_kd", "ce"}  # fmt: skip
    variants = {"at_paper", "nst_linear", "nst_gaussian", "born_again_cwtm", "born_again_dkpp",
                "label_smoothing", "confidence_penalty", "kd_at_cs_kd"}  # fmt: skip
    assert names | variants == set(METHODS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_schedule_fits_every_stage(path):
    for stage in plan_stages(load_config(str(path))):
        solver = stage.cfg.SOLVER
        assert list(solver.STEPS) == sorted(set(solver.STEPS))
        assert solver.STEPS[0] >= solver.WARMUP_ITERS and solver.STEPS[-1] < solver.MAX_ITER


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if parts(path)[2] == "digits" else pytest.mark.long)
        for path in PATHS
    ],
    ids=lambda path: path.stem,
)
def test_every_stage_takes_a_step_without_any_data(path, monkeypatch):
    monkeypatch.setattr(ClassificationTrainer, "build_train_loader", lambda cfg: None)
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    rehearse_stages(plan_stages(cfg), resume=False)
