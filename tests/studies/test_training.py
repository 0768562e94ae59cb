"""Runs of a plan as processes: records, stops that cost nothing, failures that say why."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import yaml

from sssd.engine.config_file import ConfigError
from sssd.studies import detection
from sssd.studies.detection import run_studies, write_studies
from sssd.studies.plan import Training, load_plan
from sssd.studies.records import public_log, write_record
from sssd.studies.training import (
    Processes,
    TrainingFailed,
    TrainingStopped,
    _settings,
    check,
    final_figures,
    read_record,
    shares,
    train,
)
from tests.coco_files import write_coco
from tests.conftest import REPOSITORY

TOOLS = REPOSITORY / "tools"
OPTIONS = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", [], "TEST.EVAL_PERIOD", 2,
    "SOLVER.CHECKPOINT_PERIOD", 100,
]  # fmt: skip


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plain and self-distilled detectors on a BCCD of six pictures."""
    root = tmp_path / "datasets"
    annotations, _ = write_coco(root / "bccd")
    (root / "bccd/annotations").mkdir()
    for split in ("train", "val", "test"):
        (root / f"bccd/annotations/instances_{split}.json").write_text(annotations.read_text())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    config = REPOSITORY / "configs/BCCD/faster_rcnn_R_18_FPN{recipe}.yaml"
    content = {
        "task": "detection", "validation": "bccd_val", "test": "bccd_test", "metric": "bbox/AP",
        "early": 2, "seeds": [1], "opts": OPTIONS, "detectors": {"faster_rcnn": str(config)},
        "methods": {"plain": None, "sssd": {"recipe": "_sssd"}},
        "studies": {"methods": {"methods": ["plain", "sssd"], "baseline": "plain", "test": True}},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    return load_plan(tmp_path / "plan.yaml")


PLACE = {"OMP_NUM_THREADS": "1"}


def test_a_run_leaves_its_record_metrics_and_log(plan, tmp_path, capsys):
    assert run_studies(plan, tmp_path, tmp_path / "scratch", TOOLS, places=[PLACE] * 2) == []
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("; ")[2].split(",")[0] for line in said] == ["1/2", "2/2"]
    plain, sssd = plan.trainings()
    record = read_record(tmp_path, sssd)
    assert record == json.loads((tmp_path / "faster_rcnn/sssd/seed1.json").read_text())
    assert record["iterations"] == 4 and set(record["share"]) == {"end"}  # logged at the end only
    assert read_record(tmp_path, plain)["share"] is None
    packed = (tmp_path / "faster_rcnn/sssd/seed1_metrics.json.gz").read_bytes()
    lines = json.loads(gzip.decompress(packed))
    evaluated = [line for line in lines if "bccd_val/bbox/AP" in line]
    assert [line["iteration"] for line in evaluated] == [1, 4]
    assert record["validation"]["bbox/AP"] == round(evaluated[-1]["bccd_val/bbox/AP"], 4)
    assert record["test"].keys() == record["validation"].keys()
    log = gzip.decompress((tmp_path / "faster_rcnn/sssd/seed1_log.txt.gz").read_bytes()).decode()
    assert "Self-distillation of GeneralizedRCNN" in log
    # No folder of this machine is in it.
    assert "Saving checkpoint to $OUTPUT_DIR/model_final.pth" in log
    assert "from $DETECTRON2_DATASETS/bccd/annotations/instances_val.json" in log
    assert str(tmp_path) not in log and sys.prefix not in log and "\x1b" not in log

    # What has a record is not run again, and the tables are there.
    assert run_studies(plan, tmp_path, tmp_path / "scratch", TOOLS, places=[PLACE]) == []
    assert capsys.readouterr().out == ""
    text = write_studies(plan, tmp_path)
    assert "## faster_rcnn, `bccd_test`" in text and "still missing" not in text
    assert (tmp_path / "methods_curves.png").is_file() and (tmp_path / "methods.md").is_file()


def test_a_run_with_other_settings_is_another_run(plan, tmp_path):
    training = plan.trainings()[0]
    record = {"settings": {"config": training.config, "options": ["SOLVER.MAX_ITER", "5"]}}
    path = tmp_path / f"{training.name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    assert read_record(tmp_path, training) is None


def test_a_run_of_a_config_that_was_edited_is_another_run(tmp_path):
    base, config = tmp_path / "base.yaml", tmp_path / "fcos.yaml"
    base.write_text("SOLVER: {MAX_ITER: 5, BASE_LR: 0.1}\n")
    config.write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6}\n")
    training = Training("fcos", "plain", "", 1, str(config), ("SEED", 1))
    write_record(tmp_path / training.name, {"settings": _settings(training)}, [])
    assert read_record(tmp_path, training) is not None
    config.write_text("# Six.\n_BASE_: base.yaml\nSOLVER:\n  MAX_ITER: 6\n")
    assert read_record(tmp_path, training) is not None  # only its words are others
    base.write_text("SOLVER: {MAX_ITER: 5, BASE_LR: 0.2}\n")
    assert read_record(tmp_path, training) is None
    for broken in ("SOLVER: {", "- SOLVER", "_BASE_: other.yaml"):
        config.write_text(broken)
        with pytest.raises((ConfigError, OSError), match=r"(fcos|other).yaml"):
            read_record(tmp_path, training)
    config.unlink()
    assert read_record(tmp_path, training) is not None  # the results alone, without the project


def test_a_config_that_is_edited_while_it_trains_is_not_that_of_the_record(plan, tmp_path):
    config, output = tmp_path / "fcos.yaml", tmp_path / "scratch"
    config.write_text("SOLVER: {MAX_ITER: 6}\n")
    training = Training("fcos", "plain", "", 1, str(config), ())

    class Edited:
        """Processes in which somebody edits the config of a training."""

        def run(self, command, **options):
            (output / "metrics.json").write_text('{"iteration": 5, "total_loss": 1.0}\n')
            (output / "log.txt").write_text("")
            config.write_text("SOLVER: {MAX_ITER: 7}\n")
            return 0

    train(plan, training, tmp_path, output, TOOLS, PLACE, Edited())
    assert read_record(tmp_path, training) is None
    config.write_text("SOLVER: {MAX_ITER: 6}\n")
    assert read_record(tmp_path, training) is not None


def test_a_record_from_before_there_were_digests_counts(plan, tmp_path):
    training = plan.trainings()[0]
    settings = _settings(training)
    del settings["digest"]
    write_record(tmp_path / training.name, {"settings": settings}, [])
    assert read_record(tmp_path, training) is not None


def test_what_was_stopped_goes_on_where_it_was(plan, tmp_path):
    training = plan.trainings()[0]
    long = load_long(plan, tmp_path)
    output, processes = tmp_path / "scratch/run", Processes()

    def stop_soon():
        while not begun(output):
            time.sleep(0.05)
        processes.stop()

    thread = threading.Thread(target=stop_soon)
    thread.start()
    with pytest.raises(TrainingStopped, match=f"{training.name} was stopped"):
        train(plan, long, tmp_path, output, TOOLS, PLACE, processes)
    thread.join()
    assert (output / "model_interrupted.pth").is_file()
    with pytest.raises(TrainingStopped):  # none begins any more
        train(plan, long, tmp_path, output, TOOLS, PLACE, processes)
    record = train(plan, long, tmp_path, output, TOOLS, PLACE, Processes())
    log = (output / "log.txt").read_text()
    assert record["iterations"] == 60 and "--resume goes on" in log
    assert "Starting training from iteration 0" in log
    assert log.count("Starting training from iteration") == 2


def begun(output):
    """Whether the first 20 iterations are logged."""
    path = output / "metrics.json"
    return path.is_file() and path.stat().st_size > 0


def load_long(plan, tmp_path):
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    content["opts"] = [*OPTIONS, "SOLVER.MAX_ITER", 60, "TEST.EVAL_PERIOD", 0]
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_plan(path).trainings()[0]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_command_and_its_runs(plan, tmp_path, number):
    load_long(plan, tmp_path)
    scratch = tmp_path / "scratch"
    command = [sys.executable, TOOLS / "compare.py", tmp_path / "long.yaml", "--jobs", "2",
               "--scratch", scratch]  # fmt: skip
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    outputs = [scratch / t.name for t in plan.trainings()]
    while not all(map(begun, outputs)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert "compare: stopped; the same command goes on with what is left" in errors
    assert all((output / "model_interrupted.pth").is_file() for output in outputs)


@pytest.mark.long
def test_labelenc_is_its_two_steps_and_the_second_counts(plan, tmp_path):
    content = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    published = yaml.safe_load((REPOSITORY / "docs/results/bccd/plan.yaml").read_text())
    content["methods"] = {name: published["methods"][name] for name in ("lgd", "labelenc")}
    options = content["methods"]["labelenc"]["opts"]
    options[options.index("MODEL.SSSD.LABELENC.WARMUP_ITERS") + 1] = 1
    content["studies"] = {"others": {"methods": ["labelenc"]}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    plan = load_plan(tmp_path / "plan.yaml")
    scratch = tmp_path / "scratch"
    assert run_studies(plan, tmp_path, scratch, TOOLS, places=[PLACE]) == []
    (training,) = plan.trainings()
    record = read_record(tmp_path, training)
    assert record["iterations"] == 4  # of step 2; step 1 has 5
    assert (scratch / training.name / "step1/model_final.pth").is_file()
    last = json.loads((scratch / training.name / "step2/metrics.json").read_text().splitlines()[-1])
    assert record["validation"]["bbox/AP"] == round(last["bccd_val/bbox/AP"], 4)


def test_a_failure_is_named_and_the_others_go_on(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    plain, sssd = plan.trainings()
    failures = run_studies(plan, tmp_path, tmp_path / "scratch", TOOLS, places=[PLACE] * 2)
    assert [f.partition(" ")[0] for f in sorted(failures)] == [plain.name, sssd.name]
    assert "has failed (error: " in failures[0] and "nowhere" in failures[0]
    with pytest.raises(TrainingFailed):
        train(plan, plain, tmp_path, tmp_path / "scratch/x", TOOLS, PLACE, Processes())


def test_a_config_that_cannot_be_used_is_found_before_any_run(plan, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(path.read_text().replace("_sssd", "_missing"))
    with pytest.raises(ValueError, match=r"faster_rcnn/sssd/seed1 cannot be run: .*_missing.yaml"):
        plan = load_plan(path)
        check(plan, plan.trainings()[1])


def test_a_figure_that_no_run_will_have_is_found_before_any_run(plan):
    averaged = replace(plan, metric="averaged/bbox/AP")
    with pytest.raises(ValueError, match=r"plain/seed1 will have no averaged/bbox/AP, .*DECAY"):
        check(averaged, plan.trainings()[0])
    training = plan.trainings()[0]
    options = (*training.options, "MODEL.SSSD.AVERAGING.DECAY", 0.9)
    check(averaged, replace(training, options=options))


class Fake:
    """Processes of which every one ends at once, with a status."""

    def __init__(self, status=0, begin=lambda: None):
        self.status, self.begin, self.begun = status, begin, 0

    def run(self, command, *, pass_fds, **options):
        self.begun += 1
        self.begin()
        return self.status


def test_a_folder_in_which_another_process_trains_is_left_alone(plan, tmp_path):
    training, output = plan.trainings()[0], tmp_path / "scratch/run"
    arguments = (plan, training, tmp_path, output, TOOLS, PLACE)

    def second():
        with pytest.raises(TrainingFailed, match="another process trains in .*scratch/run"):
            train(*arguments, other)

    first, other = Fake(-signal.SIGTERM, begin=second), Fake()
    with pytest.raises(TrainingStopped):
        train(*arguments, first)
    assert (first.begun, other.begun) == (1, 0)
    # The folder belongs to the training itself: it may outlive the command that began it.
    lock = output.with_name("run.lock")
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(file.fileno(),))
    with pytest.raises(TrainingFailed, match="another process"):
        train(*arguments, Fake())
    orphan.kill()
    orphan.wait()
    with pytest.raises(TrainingStopped):
        train(*arguments, Fake(-signal.SIGTERM))


def test_what_is_no_run_of_a_comparison_is_not_deleted(plan, tmp_path):
    output = tmp_path / "scratch/run"
    output.mkdir(parents=True)
    (output / "model_final.pth").touch()
    with pytest.raises(TrainingFailed, match="run holds something else than a run of compare.py"):
        train(plan, plan.trainings()[0], tmp_path, output, TOOLS, PLACE, Fake())
    assert (output / "model_final.pth").is_file()


def test_a_run_that_the_system_kills_has_failed(plan, tmp_path):
    arguments = (plan, plan.trainings()[0], tmp_path, tmp_path / "run", TOOLS, PLACE)
    with pytest.raises(TrainingFailed, match=r"has failed \(ended by SIGKILL\); see .*console.txt"):
        train(*arguments, Fake(-signal.SIGKILL))


def test_a_disk_that_refuses_a_record_ends_one_run_alone(plan, tmp_path, monkeypatch):
    def full(plan, training, *args):
        if training.method == "plain":
            raise OSError(28, "No space left on device")
        return {"validation": {"bbox/AP": 1.0}}

    monkeypatch.setattr(detection, "train", full)
    failures = run_studies(plan, tmp_path, tmp_path / "scratch", TOOLS, places=[PLACE])
    plain = plan.trainings()[0].name
    assert failures == [
        f"{plain} has failed: A file cannot be written (No space left on device): make room"
    ]


def test_a_log_names_folders_by_what_they_are(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    (tmp_path / "log.txt").write_text(
        f"\x1b[32mSaving\x1b[0m to {tmp_path}/link/out/m.pth, '{tmp_path}/real/out', "
        f"{tmp_path}/real/outer; {tmp_path}/link/configs/a.yaml; torch @{sys.prefix}/lib; "
        "out of 5 datasets"
    )
    places = {"$OUTPUT_DIR": "out", "$DETECTRON2_DATASETS": "datasets"}
    assert public_log(tmp_path / "log.txt", places) == (
        f"Saving to {tmp_path}/link/out/m.pth, '$OUTPUT_DIR', ./outer; "
        f"{tmp_path}/link/configs/a.yaml; torch @$PREFIX/lib; out of 5 datasets"
    )
    places = {"$OUTPUT_DIR": tmp_path / "link/out"}
    assert "to $OUTPUT_DIR/m.pth, '$OUTPUT_DIR', ./outer" in public_log(
        tmp_path / "log.txt", places
    )


def test_the_last_evaluation_counts_and_of_each_dataset_its_own():
    lines = [
        {"iteration": 9, "bccd_val/bbox/AP": 1.0, "bccd_val/averaged/bbox/AP": 2.0},
        {"iteration": 19, "bccd_val/bbox/AP": 3.00004, "bccd_test/bbox/AP": 5.0},
        {"iteration": 19, "loss": 1.0},
    ]
    assert final_figures(lines, "bccd_val", alone=False) == {"bbox/AP": 3.0}
    assert final_figures(lines, "bccd_test", alone=False) == {"bbox/AP": 5.0}
    assert final_figures([{"bbox/AP": 1.0, "bbox/AP-red": 2.0}], "x", alone=True) == {
        "bbox/AP": 1.0, "bbox/AP-red": 2.0
    }  # fmt: skip


def test_shares_are_those_of_the_first_iterations_and_of_the_last_tenth():
    lines = [{"iteration": i, "loss_distill/share": i / 100} for i in range(9, 100, 10)]
    # iterations 9 and 19 are below 20; 99 is the last, and above 89.1
    assert shares(lines, 20) == {"early": 0.14, "end": 0.99}
    assert shares([{"iteration": 3}], 20) is None
