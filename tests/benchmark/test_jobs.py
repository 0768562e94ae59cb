"""Configs, variants and settings become the rows of a comparison."""

import re
import runpy

import pytest

import sssd  # noqa: F401  (before Detectron2: it applies the compatibility layer)
from sssd.benchmark.data import GeneratedData
from sssd.benchmark.jobs import BenchmarkError, Setting, Variant, plan_jobs
from tests.conftest import REPOSITORY


def path(name):
    return str(REPOSITORY / "configs" / f"{name}.yaml")


PLAIN, SSSD = path("Plain/faster_rcnn_R_50_FPN_1x"), path("SSSD/faster_rcnn_R_50_FPN_1x")
DIGITS = path("Classification/ce_cifar_resnet8_digits")
GENERATED = Setting(data=GeneratedData())


def parse(*arguments):
    tool = runpy.run_path(str(REPOSITORY / "tools/benchmark.py"))
    args = tool["parse"](list(arguments))
    return args, tool["setting_of"](args)


def test_rows_have_names_that_tell_them_apart():
    mask = path("SSSD/mask_rcnn_R_50_FPN_1x")
    assert [x.name for x in plan_jobs([PLAIN, SSSD, mask, SSSD])] == [
        "Plain/faster_rcnn_R_50_FPN_1x",
        "SSSD/faster_rcnn_R_50_FPN_1x",
        "mask_rcnn_R_50_FPN_1x",
        "SSSD/faster_rcnn_R_50_FPN_1x (2)",
    ]


def test_variants_are_the_last_config_with_keys_of_their_own():
    variants = [
        Variant("one", ("MODEL.SSSD.DISTANCE.NAME", "mse")),
        Variant("two", ("SEED", "7", "MODEL.SSSD.DISTANCE.MASK_PADDING", "False")),
    ]
    jobs = plan_jobs([PLAIN, SSSD], ["SEED", "3"], variants=variants)
    assert [x.name for x in jobs][2:] == ["one", "two"]
    assert [x.config_file for x in jobs] == [PLAIN, SSSD, SSSD, SSSD]
    assert [x.cfg.SEED for x in jobs] == [3, 3, 3, 7]
    assert [x.cfg.MODEL.SSSD.DISTANCE.NAME for x in jobs] == ["js", "js", "mse", "js"]
    assert [x.cfg.MODEL.SSSD.DISTANCE.MASK_PADDING for x in jobs] == [True] * 3 + [False]


def test_a_setting_is_one_for_all_rows_and_leaves_the_rest_to_the_configs():
    setting = Setting(batch=2, classes=5, precision="bfloat16")
    for job in plan_jobs([PLAIN, SSSD], ["MODEL.SSSD.NUM_CLASSES", "80"], setting=setting):
        keys = job.cfg.MODEL
        assert job.cfg.SOLVER.IMS_PER_BATCH == 2
        assert keys.ROI_HEADS.NUM_CLASSES == keys.RETINANET.NUM_CLASSES == 5
        assert keys.SSSD.FCOS.NUM_CLASSES == 5 and keys.SSSD.NUM_CLASSES == 0
        assert job.cfg.SOLVER.AMP.ENABLED and keys.SSSD.SOLVER.AMP_PRECISION == "bfloat16"
        assert job.download == "" and keys.WEIGHTS.startswith("detectron2://")
    (job,) = plan_jobs([PLAIN], ["SOLVER.AMP.ENABLED", "True"])
    assert job.cfg.SOLVER.IMS_PER_BATCH == 16 and job.cfg.SOLVER.AMP.ENABLED


def test_generated_batches_go_without_a_download():
    (job,) = plan_jobs([PLAIN], setting=GENERATED)
    assert job.cfg.MODEL.WEIGHTS == "" and job.download.startswith("detectron2://ImageNet")
    (job,) = plan_jobs([PLAIN], ["MODEL.WEIGHTS", "own.pth"], setting=GENERATED)
    assert job.cfg.MODEL.WEIGHTS == "own.pth" and job.download == ""


@pytest.mark.parametrize(
    ("file", "options", "sentence"),
    [
        (DIGITS, {"setting": GENERATED}, "trains a classifier, and --image-size, --objects and"),
        (DIGITS, {"setting": Setting(classes=3)}, "--classes are for detectors: leave them out."),
        (DIGITS, {"setting": Setting(compiled=True)}, "--compile is for detectors: leave it out."),
        (
            PLAIN,
            {"opts": ["DATASETS.TRAIN", "()"]},
            "names no dataset: set DATASETS.TRAIN, or give",
        ),
        (
            PLAIN,
            {"opts": ["MODEL.KEYPOINT_ON", "True"], "setting": GENERATED},
            "Generated batches have no keypoints, which the config",
        ),
        (PLAIN, {"variants": [Variant("x", ("SEED",))]}, "The overrides SEED are no pairs"),
    ],
)
def test_what_a_config_cannot_have_is_said_before_anything_starts(file, options, sentence):
    with pytest.raises(BenchmarkError, match=re.escape(sentence)):
        plan_jobs([file], **options)


def test_the_command_line_of_variants_and_generated_batches():
    args, setting = parse(
        "--config-file", "A.yaml", "B.yaml", "SEED", "3",
        "--variant", "one", "K", "V", "--variant", "two", "K", "V", "L", "W",
        "--image-size", "64", "96", "--rounds", "2", "SEED", "4",
    )  # fmt: skip
    assert args.config_file == ["A.yaml", "B.yaml"] and args.opts == ["SEED", "3", "SEED", "4"]
    assert args.variant == [["one", "K", "V"], ["two", "K", "V", "L", "W"]]
    assert setting.data == GeneratedData(height=64, width=96, objects=10)
    assert parse("--config-file", "A.yaml", "--image-size", "64")[1].data.width == 64
    args, setting = parse("--config-file", "A.yaml", "--objects", "7", "300")
    assert args.objects == [7, 300] and setting.data == GeneratedData()
    assert parse("--config-file", "A.yaml", "--batch", "2")[1] == Setting(batch=2)


def test_each_number_of_objects_has_rows_of_its_own():
    tool = runpy.run_path(str(REPOSITORY / "tools/benchmark.py"))
    args = tool["parse"](
        ["--config-file", PLAIN, SSSD, "--variant", "mse", "MODEL.SSSD.DISTANCE.NAME", "mse",
         "--objects", "3", "20"]
    )  # fmt: skip
    jobs = tool["jobs_of"](args, tool["setting_of"](args), "cpu")
    assert [job.name.split(", ")[1] for job in jobs] == ["3 objects"] * 3 + ["20 objects"] * 3
    assert [job.setting.data.objects for job in jobs] == [3] * 3 + [20] * 3
    assert jobs[2].name == "mse, 3 objects" and jobs[5].cfg.MODEL.SSSD.DISTANCE.NAME == "mse"
