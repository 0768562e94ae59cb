"""Configs from files: what is refused, and how it is said."""

import pytest
import yaml
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf

from sssd.engine import ConfigError, load_config, load_lazy_config
from sssd.engine.config_check import check_values
from tests.coco_files import write_coco
from tests.conftest import REPOSITORY
from tests.detectors import tiny_config

LAZY = str(REPOSITORY / "configs/lazy/SSSD/faster_rcnn_R_50_FPN_1x.py")


def complaint(load, *args):
    """The message of the error, which has to be one sentence."""
    with pytest.raises(ConfigError) as caught:
        load(*args)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


BAD = {
    "": "it is empty, and has to be keys and values",
    "- a\n- b": "it is a list, and has to be keys and values",
    "SOLVER:\n  BASE_LR: 1": "SOLVER.BASE_LR is 1, and has to be a float (such as 0.001)",
    "SOLVER:\n  BASE_L: 0.1": "there is no key SOLVER.BASE_L (the nearest is SOLVER.BASE_LR)",
    "SOLVER: 3": "SOLVER is a int, and has to be keys and values",
    "MODEL:": "MODEL is empty, and has to be keys and values",
    "MODEL: {1: 2}": "MODEL has the key 1, which has to be a text",
    "MODEL:\n  SSSD: []": "MODEL.SSSD is a list",
    "VERSION: 7": "Cannot merge a v7 config",
    "_BASE_: 3": "_BASE_ is 3, and has to be the path of a config",
    "_BASE_: config.yaml": "a _BASE_ comes back to itself",
    "a: [": "is no YAML (while parsing a flow node",
    "\x00": "is no YAML (unacceptable character",
    "a: " + "[" * 5000: "it is nested without end",
    "SOLVER: {STEPS: 2020-01-01}": "SOLVER.STEPS with value <class 'datetime.date'>",
    "MODEL: {PIXEL_MEAN: &a [*a]}": "holds more than 100000 values",
    # Ten times ten times ... as many: it fits into memory only while nobody writes it out.
    "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 10)}]\n" for x, y in zip("abcdef", "bcdefg",
                                                                       strict=True)):
        "holds more than 100000 values",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_what_is_no_config_is_one_sentence(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = complaint(load_config, str(path))
    assert message.startswith(f"The config {path} ") and BAD[text] in message


def test_a_config_registers_its_datasets(tmp_path):
    annotations, images = write_coco(tmp_path)
    path = tmp_path / "config.yaml"
    entries = [["config_cells", str(annotations), str(images)]]
    path.write_text(yaml.safe_dump({"MODEL": {"SSSD": {"COCO_DATASETS": entries}}}))
    try:
        for _ in range(2):  # as each tool does, and each process of a training
            load_config(str(path))
        assert len(DatasetCatalog.get("config_cells")) == 6
        assert MetadataCatalog.get("config_cells").thing_classes == ["red", "green", "blue"]
        other = ["MODEL.SSSD.COCO_DATASETS", "[['config_cells', 'other.json', 'x']]"]
        message = complaint(load_config, str(path), other)
        assert "the name 'config_cells' is registered already and means other data" in message
    finally:
        DatasetCatalog.remove("config_cells")
        MetadataCatalog.remove("config_cells")


@pytest.mark.parametrize(
    "entries", ["['a', 'b', 'c']", "[['a', 'b']]", "[['a', 'b', 3]]", "[['', 'b', 'c']]", "[3]"]
)
def test_a_dataset_is_a_name_a_file_and_a_folder(entries):
    message = complaint(load_config, "", ["MODEL.SSSD.COCO_DATASETS", entries])
    assert message.startswith("MODEL.SSSD.COCO_DATASETS does not fit: it has the entry ")


def test_names_of_built_in_datasets_keep_their_meaning():
    for name in ("bccd_train", "coco_2017_train"):
        message = complaint(
            load_config, "", ["MODEL.SSSD.COCO_DATASETS", f"[['{name}', 'a', 'b']]"]
        )
        assert f"the name '{name}' is registered already" in message


ATTACKS = (
    "!!python/object/new:detectron2.layers.shape_spec.os.system ['touch {ran}']",
    "!!python/object/new:detectron2.layers.shape_spec.ShapeSpec [!!python/name:os.system , 1]",
    "!!python/object/apply:os.system ['touch {ran}']",
    "!!python/object/new:os.system ['touch {ran}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:builtins.exec [\"open('{ran}', 'w')\"]",
    "!!python/object/new:type {{args: [z, !!python/tuple [], {{}}], state: {{a: 1}}}}",
)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("load", [load_config, load_lazy_config])
def test_a_yaml_with_code_is_refused(tmp_path, load, attack):
    ran, path = tmp_path / "ran", tmp_path / "config.yaml"
    path.write_text(f"MODEL:\n  WEIGHTS: {attack.format(ran=ran)}\n")
    message = complaint(load, str(path))
    assert message.startswith(f"The config {path} is refused: it holds more than plain values")
    (tmp_path / "outer.yaml").write_text("_BASE_: config.yaml\n")
    if load is load_config:
        assert "is refused" in complaint(load, str(tmp_path / "outer.yaml"))
    assert not ran.exists()


def test_an_attack_works_without_care(tmp_path):
    """Else the test above would prove nothing."""
    ran = tmp_path / "ran"
    yaml.unsafe_load(ATTACKS[2].format(ran=ran))
    assert ran.exists()


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["SOLVER.BASE_LR"], "odd length"),
        (["SOLVER.BASE_L", "1.0"], "there is no key SOLVER.BASE_L (the nearest is SOLVER.BASE_LR)"),
        (["SOLVER.BASE_LR", "1"], "SOLVER.BASE_LR is 1, and has to be a float"),
        (["SOLVER", "1"], "SOLVER is 1, and has to be keys and values"),
        (["SOLVER.BASE_LR.A", "1"], "The command line does not fit"),
    ],
)
def test_a_command_line_that_does_not_fit(opts, expected):
    assert expected in complaint(load_config, "", opts)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_iter", "missing EQUAL"),
        ("train.max_iter.a=1", "train.max_iter is not a config"),
        ("~train", "deletion is not yet"),
    ],
)
def test_an_override_of_a_lazyconfig_that_does_not_fit(override, expected):
    assert expected in complaint(load_lazy_config, LAZY, [override])


def test_safe_yaml_loses_nothing_of_a_lazyconfig_that_detectron2_wrote(tmp_path):
    cfg, path = LazyConfig.load(LAZY), str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, path)
    with open(path) as file:
        assert "ShapeSpec" in file.read()
    ours, stock = load_lazy_config(path, ["train.max_iter=7"]), LazyConfig.load(path)
    stock.train.max_iter = 7
    assert OmegaConf.to_yaml(ours) == OmegaConf.to_yaml(stock)
    assert type(instantiate(ours.model.student.backbone)).__name__ == "FPN"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("SOLVER.IMS_PER_BATCH", 0, "at least 1 and at most 1e+06"),
        ("SOLVER.IMS_PER_BATCH", 10**9, "is 1000000000: it has to be at least 1 and at most 1e+06"),
        ("SOLVER.BASE_LR", -0.1, "is -0.1: it has to be at least 0."),
        ("SOLVER.BASE_LR", float("nan"), "is nan: it has to be finite"),
        ("SOLVER.MOMENTUM", 1.5, "at least 0 and at most 1"),
        ("SOLVER.STEPS", (10, float("inf")), "is (10, inf): it has to be finite"),
        ("DATALOADER.NUM_WORKERS", 10**9, "at most"),
        ("MODEL.RETINANET.NUM_CONVS", 10**9, "at most 1000"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [0]], "is [[8], [0]]: it has to be at least 1e-06"),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "at least 1e-06"),
        ("MODEL.SSSD.COEFFICIENT.VALUES", [float("inf")], "finite"),
        ("MODEL.MASK_ON", None, "MODEL.MASK_ON is None: it has to be a value, such as False"),
    ],
)
def test_values_that_cannot_be_meant(key, value, expected):
    cfg = tiny_config()
    check_values(cfg)
    *parents, last = key.split(".")
    node = cfg
    for parent in parents:
        node = node[parent]
    node[last] = value
    message = complaint(check_values, cfg)
    assert message.startswith(f"{key} is ") and expected in message


def test_keys_of_other_packages_are_not_judged():
    cfg = tiny_config()
    cfg.OTHER = CfgNode({"NOTHING": None, "LIMIT": 10**12})
    cfg.MODEL.WEIGHTS = None
    check_values(cfg)


@pytest.mark.parametrize(
    "path", sorted(REPOSITORY.glob("configs/[!l]*/*.yaml")), ids=lambda path: path.stem
)
def test_no_recipe_is_out_of_range(path):
    check_values(load_config(str(path)))
