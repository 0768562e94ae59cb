"""Errors of Detectron2 about a config, as sentences."""

import os

import pytest

from sssd.data import AnnotationError
from sssd.data.annotations import check_annotation_file
from sssd.engine import CheckpointError, ConfigError, Trainer
from sssd.engine.explained import explained
from tests.coco_files import register_coco
from tests.detectors import tiny_config


@pytest.fixture
def config(tmp_path):
    name = register_coco("explained_coco", tmp_path / "data")

    def make(*opts, detector="faster_rcnn"):
        cfg = tiny_config(
            "DATASETS.TRAIN", (name,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0,
            "INPUT.MIN_SIZE_TRAIN", (64,), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
            "OUTPUT_DIR", str(tmp_path / "output"), *opts, detector=detector,
        )  # fmt: skip
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return cfg

    return make


@pytest.mark.parametrize(
    ("opts", "detector", "expected", "keys"),
    [
        (["MODEL.FPN.IN_FEATURES", ["res9"]], "faster_rcnn", "KeyError in backbone/fpn.py",
         "MODEL.FPN"),
        (["MODEL.RESNETS.DEPTH", 19], "faster_rcnn", "KeyError in backbone/resnet.py",
         "MODEL.RESNETS"),
        (["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]]], "faster_rcnn", "Got sizes of length 2",
         "MODEL.ANCHOR_GENERATOR"),
        (["MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0)], "faster_rcnn", "not enough values to unpack",
         "MODEL.RPN"),
        (["MODEL.RETINANET.NORM", "XX"], "retinanet", "KeyError", "MODEL.RETINANET"),
        (["SOLVER.LR_SCHEDULER_NAME", "Never"], "retinanet", "Unknown LR scheduler: Never",
         "SOLVER"),
        (["DATALOADER.SAMPLER_TRAIN", "Never"], "fcos", "Unknown training sampler: Never",
         "DATALOADER and DATASETS"),
        (["INPUT.RANDOM_FLIP", "never"], "fcos", "", "INPUT"),
    ],
)  # fmt: skip
def test_the_sentence_names_the_error_its_place_and_the_keys(
    config, opts, detector, expected, keys
):
    cfg = config(*opts, detector=detector)
    if keys == "INPUT":
        cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "never"
    with pytest.raises(ConfigError) as caught:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
    message = str(caught.value)
    path = os.path.join(cfg.OUTPUT_DIR, "traceback.txt")
    assert message.startswith(
        ("No training can be built from this config (", "The first iteration fails (")
    )
    assert expected in message
    assert message.endswith(f": check {keys} in the config; {path} has the traceback.")
    with open(path) as file:
        text = file.read()
    assert text.startswith("Traceback") and type(caught.value.__cause__).__name__ in text


def test_later_iterations_keep_their_tracebacks(config):
    """By then the config has shown that it runs."""
    trainer = Trainer(config())

    def fail():
        if trainer.iter:
            raise KeyError("later")
        return run_step()

    run_step, trainer._trainer.run_step = trainer._trainer.run_step, fail
    with pytest.raises(KeyError, match="later"):
        trainer.train()


@pytest.mark.parametrize("error", [CheckpointError, FloatingPointError, OSError])
def test_sentences_pass(tmp_path, error):
    with pytest.raises(error, match="A sentence"), explained("What", str(tmp_path)):
        raise error("A sentence.")
    assert not os.listdir(tmp_path)


def test_sentences_of_the_package_pass_and_others_do_not(tmp_path):
    with pytest.raises(AnnotationError), explained("What", str(tmp_path)):
        check_annotation_file(str(tmp_path / "nowhere.json"), 3)
    with (
        pytest.raises(ConfigError, match=r"What \(ValueError in engine/test_explained\.py, line"),
        explained("What", str(tmp_path)),
    ):
        raise ValueError("something")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (MemoryError(), "set MODEL.SSSD.SOLVER.BATCH_PARTS, or lower SOLVER.IMS_PER_BATCH"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower SOLVER.IMS_PER_BATCH"),
        (RuntimeError("you tried to allocate 9 bytes: not enough memory"), "or sizes in INPUT"),
        (KeyError("something"), "compare the config with one that runs"),
    ],
)
def test_advice_where_no_key_is_known(tmp_path, error, advice):
    with pytest.raises(ConfigError, match=advice), explained("What", str(tmp_path)):
        raise error


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path):
    with pytest.raises(ConfigError, match="What"), explained("What", str(tmp_path / "nowhere")):
        raise KeyError
