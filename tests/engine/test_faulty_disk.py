"""Full disks, and folders and files without permission: one sentence, nothing damaged."""

import ctypes
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.coco_files import write_coco
from tests.conftest import REPOSITORY
from tests.engine.test_exact_resume import assert_equal, outcome

CONFIG = REPOSITORY / "configs/Demo/faster_rcnn_R_18_FPN_sssd.yaml"
# Checkpoints after iterations 4, 9 and 11, evaluations after 3, 7 and at the end, lines in
# metrics.json after every second one.
OPTIONS = [
    "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_HEADS.NUM_CLASSES", "3", "INPUT.MIN_SIZE_TRAIN", "(48,)",
    "INPUT.MIN_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "2",
    "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)", "SOLVER.MAX_ITER", "12",
    "SOLVER.CHECKPOINT_PERIOD", "5", "TEST.EVAL_PERIOD", "4", "SEED", "3",
]  # fmt: skip
FULL = "cannot be written (No space left on device): make room"
UNHARMED = "from the newest checkpoint, which is unharmed: this iteration cannot be saved either."
long = pytest.mark.long


def call(folder, *args, **fault):
    """A command line on the dataset in ``folder``, in a process that permissions bind."""
    options = json.dumps({"data": str(folder / "data"), **fault})
    return subprocess.run(
        [sys.executable, "-m", "tests.engine.faulty_run", options, *map(str, args)],
        cwd=REPOSITORY, capture_output=True, text=True, preexec_fn=_bound_by_permissions,
    )  # fmt: skip


def _bound_by_permissions():
    """Takes from root what lets it open everything; others never had it."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def train(folder, *args, config=CONFIG, output=None, workers=0, **fault):
    options = [*OPTIONS, "DATALOADER.NUM_WORKERS", workers]
    options += ["OUTPUT_DIR", output or folder / "output"]
    return call(folder, "tools/train_net.py", "--config-file", config, *args, *options, **fault)


def sentence(done):
    """The one line of an end in order."""
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    *others, last = done.stderr.strip().splitlines()
    assert last.startswith("error: ") and last.endswith("."), done.stderr[-3000:]
    assert not [line for line in others if line.startswith("error")], done.stderr[-3000:]
    return last


@pytest.fixture
def folder(tmp_path):
    write_coco(tmp_path / "data")
    yield tmp_path
    shutil.rmtree(tmp_path / "output", ignore_errors=True)  # half a gigabyte


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run leaves; it runs beside the first test."""
    folder = tmp_path_factory.mktemp("whole")
    write_coco(folder / "data")
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, folder)

        def folder_when_done():
            assert run.result().returncode == 0, run.result().stderr
            return folder

        yield folder_when_done
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("fault", "iteration", "what", "saved"),
    [
        pytest.param(
            "files",
            5,
            "metrics.json cannot be written (File too large): make room",
            False,
            marks=long,
        ),
        pytest.param("metrics", 5, f"metrics.json {FULL}", True, marks=long),
        pytest.param("tensorboard", 5, f" (TensorboardXWriter) {FULL}", True, marks=long),
        pytest.param("predictions", 7, f"inference {FULL}", True, marks=long),
        pytest.param("results", 7, f"inference {FULL}", True, marks=long),
    ],
)
def test_a_resume_after_what_could_not_be_written_ends_as_if_nothing_had_been(
    folder, whole, fault, iteration, what, saved
):
    output = folder / "output"
    done = train(folder, fault=fault, iteration=iteration)
    said = sentence(done)
    assert said.startswith(f"error: {output}") and what in said and "go on with --resume" in said
    ends = f"One of the logs ends: {output}/log.txt cannot be written" in done.stdout
    assert ends == (fault == "files")
    if saved:
        # TensorBoard's thread may fail after its write has returned; the next one says so.
        last = int(re.search(r"from iteration (\d+), which is saved\.$", said)[1])
        assert last == iteration or (fault == "tensorboard" and last > iteration)
    else:
        assert said.endswith(UNHARMED)
        last = 4
    after_fault(output, last, "model_interrupted.pth" if saved else "model_0000004.pth")
    for path in [*output.rglob("*")]:
        if path.is_symlink():
            path.unlink()
    resume(folder, last + 1)
    assert_equal(outcome(folder), outcome(whole()))


def after_fault(output, iteration, name):
    """The newest checkpoint is whole, and so are the logged lines."""
    assert (output / "last_checkpoint").read_text() == name
    assert torch.load(output / name, weights_only=True)["iteration"] == iteration
    assert not list(output.rglob("*.part"))
    lines = (output / "metrics.json").read_text().splitlines(keepends=True)
    assert all(line.endswith("}\n") for line in lines)
    assert {1, 3} <= {json.loads(line)["iteration"] for line in lines}


def resume(folder, iteration, output=None):
    resumed = train(folder, "--resume", output=output)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Starting training from iteration {iteration}" in resumed.stdout


@long
def test_a_disk_without_room_for_anything(folder, whole, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800m", "tmpfs", small])
    if mounted.returncode:
        pytest.skip("a small disk: only root may mount one")
    try:
        output = small / "output"
        said = sentence(train(folder, output=output, fault="disk", iteration=5))
        # What a file's last block still holds is written.
        assert re.match(rf"error: {output}(/metrics.json| \(Tens\w+\)) {re.escape(FULL)}", said)
        assert said.endswith(UNHARMED)
        after_fault(output, 4, "model_0000004.pth")
        # Without room a resume is over before it has read anything, and changes nothing.
        assert f"error: {output} {FULL}" in sentence(train(folder, "--resume", output=output))
        after_fault(output, 4, "model_0000004.pth")
        assert (output / "config.yaml").read_text()
        (output / "filler").unlink()
        resume(folder, 5, output)
        shutil.copytree(output, folder / "output")
    finally:
        subprocess.run(["umount", small], check=True)
    assert_equal(outcome(folder), outcome(whole()))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("read-only", "cannot be opened (Permission denied): give the permission"),
        pytest.param("a file", "cannot be opened (Not a directory): correct the path", marks=long),
    ],
)
def test_an_output_folder_that_cannot_be_written_is_found_before_the_data_is_read(
    folder, fault, reason
):
    (folder / "data/annotations.json").write_text("{")  # would be an error as well
    output = folder / "output"
    if fault == "a file":
        output.write_text("")
        output = output / "below"
    else:
        output.mkdir(mode=0o555)
    said = sentence(train(folder, output=output))
    assert said == f"error: {output} {reason}, or set OUTPUT_DIR to a folder that can be written."


@long
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("data/images/{}.png", "Permission denied"),
        ("data/annotations.json", "(Permission denied): make it readable."),
        ("config.yaml", "(Permission denied): give the permission."),
        ("output/metrics.json", "(Permission denied): give the permission."),
        ("output/log.txt", "(Permission denied): give the permission."),
    ],
)
def test_a_file_without_permission_is_named(folder, path, reason):
    config = folder / "config.yaml"
    config.write_text(f"_BASE_: {CONFIG}")
    (folder / "output").mkdir()
    for number in range(6):
        (folder / path.format(number)).touch()
        (folder / path.format(number)).chmod(0)
    said = sentence(train(folder, config=config))
    assert re.search(str(folder / path.format("[0-5]")), said) and reason in said


@long
def test_an_image_without_permission_is_named_in_an_evaluation(folder, whole):
    (folder / "data/images/4.png").chmod(0)
    weights = whole() / "output/model_final.pth"
    said = sentence(train(folder, "--eval-only", "MODEL.WEIGHTS", weights, workers=2))
    assert str(folder / "data/images/4.png") in said and "Permission denied" in said


@long
def test_full_results_of_a_stage_cost_no_stage(tmp_path):
    """Of a classification; the first line that ``run_stages`` writes after the training."""

    def run(output, *args):
        options = ["SOLVER.MAX_ITER", 3, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "SEED", 1]
        config = REPOSITORY / "configs/Classification/ce_cifar_resnet8_digits.yaml"
        command = ["tools/train_net.py", "--config-file", config, *args, *options]
        return call(tmp_path, *command, "OUTPUT_DIR", output)

    whole, output = tmp_path / "whole", tmp_path / "output"
    assert run(whole).returncode == 0
    output.mkdir()
    (output / "stage_results.json.part").symlink_to("/dev/full")
    assert f"error: {output}/stage_results.json {FULL}." == sentence(run(output))
    done = run(output, "--resume")
    assert done.returncode == 0 and "Starting training from iteration 3" in done.stdout
    for name in ("results.json", "stage_results.json"):
        assert (output / name).read_text() == (whole / name).read_text()


TOOLS = {
    "train_net": "--config-file configs/Classification/kd_cifar_resnet8_digits.yaml OUTPUT_DIR {}",
    "lazyconfig_train_net": "--config-file configs/lazy/SSSD/retinanet_R_50_FPN_2x.py "
    "train.output_dir={}",
    "train_labelenc": "--config-file configs/LabelEnc/retinanet_R_50_FPN_1x.yaml OUTPUT_DIR {}",
    "export_student": "{whole}/output/model_final.pth --output {}",
    "benchmark": "--config-file configs/Classification/ce_cifar_resnet8_digits.yaml --json {}/x",
    "compare": "{plan} --scratch {}",
}


@long
@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_names_a_folder_that_cannot_be_written(tool, whole, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    values = {"whole": whole() if "{whole}" in TOOLS[tool] else "", "plan": tmp_path / "plan.yaml"}
    values["plan"].write_text(PLAN)
    said = sentence(
        call(tmp_path, f"tools/{tool}.py", *TOOLS[tool].format(locked, **values).split())
    )
    of_run = "digits/ce/trial0 has failed: " if tool == "compare" else ""
    assert f"error: {of_run}{locked}" in said
    assert "(Permission denied): give the permission" in said


PLAN = """
config: "configs/Classification/{method}_cifar_resnet8_{data}.yaml"
data: [digits]
validation: "{data}_val"
test: "{data}_test"
metric: "classification/top1"
trial_seed: 0
seeds: [1]
baseline: ce
shared: ce
teacher: {method: ce}
methods: {ce: {trials: [{SOLVER.BASE_LR: 0.05}]}}
"""
