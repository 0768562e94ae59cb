"""The trainer in two processes that see different disks: phases, checkpoints, evaluation."""

import sssd  # noqa: F401  (spawned processes import this first: the compatibility layer)

# isort: split
import hashlib
import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from torch import nn

from sssd.engine import (
    AveragedWeights,
    CheckpointError,
    Trainer,
    evaluate_with_average,
    setup,
)
from sssd.engine.processes import file_of_main
from sssd.meta_arch.build import build_phases
from tests.coco_files import register_coco
from tests.detectors import tiny_config, training_input
from tests.ranks import join, run_two_ranks

pytestmark = pytest.mark.long

STEPS, LONGER = 6, 8
FROZEN, UNDISTILLED, OFF = 2, 3, 1
# Objects of the two processes in each iteration: on one of them only, on none, differently many.
OBJECTS = [(3, 1), (2, 0), (0, 0), (0, 4), (1, 3), (2, 2), (0, 1), (1, 0)]
IMAGES = 7  # that are evaluated: an odd number


def configure(*opts):
    """Paths are those of the folder that the process is in."""
    return tiny_config(
        "SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", (), "SOLVER.CHECKPOINT_PERIOD", 2, "SEED", 3,
        "DATASETS.TEST", ("seven_images",), "INPUT.MIN_SIZE_TEST", 64, "OUTPUT_DIR", "output",
        "MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS", FROZEN,
        "MODEL.SSSD.PHASES.NO_DISTILL_ITERS", UNDISTILLED,
        "MODEL.SSSD.PHASES.DISTILL_OFF_ITERS", OFF, "MODEL.SSSD.AVERAGING.DECAY", 0.9,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "share", "MODEL.SSSD.COEFFICIENT.VALUES", [0.3, 100.0],
        *opts,
    )  # fmt: skip


class OwnTrainer(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        rank = dist.get_rank()
        return [
            [training_input(counts[rank], 64 + 16 * rank, seed=10 * iteration + rank)]
            for iteration, counts in enumerate(OBJECTS)
        ]


class Guesser(nn.Module):
    """Finds the objects of an image with an error of its own, and some with a wrong class."""

    def __init__(self, annotations):
        super().__init__()
        self.objects = {}
        for number, record in enumerate(annotations):
            (x, y, w, h), image = record["bbox"], record["image_id"]
            box = [x + image, y, x + w + image, y + h]
            wrong = number % 4 == 0
            guess = box, (record["category_id"] - 1 + wrong) % 3, 0.99 - 0.03 * number
            self.objects.setdefault(image, []).append(guess)

    def forward(self, inputs):
        found = []
        for record in inputs:
            boxes, classes, scores = zip(*self.objects[record["image_id"]], strict=True)
            guesses = Instances((record["height"], record["width"]))
            guesses.pred_boxes = Boxes(torch.tensor(boxes))
            guesses.pred_classes, guesses.scores = torch.tensor(classes), torch.tensor(scores)
            found.append({"instances": guesses})
        return found


def register_datasets(folder):
    """The same in every process; returns their annotations."""
    annotations = {}
    for name, count in (("seven_images", IMAGES), ("one_image", 1)):
        register_coco(name, folder / name, count)
        annotations[name] = json.loads((folder / name / "annotations.json").read_text())
    return {name: content["annotations"] for name, content in annotations.items()}


def predictions(folder="output"):
    path = Path(folder) / "inference" / "coco_instances_results.json"
    return json.loads(path.read_text()) if path.is_file() else None


def evaluate_guesses(annotations):
    found = {}
    for name, records in annotations.items():
        cfg = configure("DATASETS.TEST", (name,), "OUTPUT_DIR", "guesses")
        found[name] = Trainer.test(cfg, Guesser(records)), predictions("guesses")
    return found


def digests(trainer):
    """Of all that has to be the same in every process."""
    model, optimizer = trainer.checkpointer.model, trainer._trainer.optimizer
    parameters = dict(model.named_parameters())
    backbone = {k: p for k, p in parameters.items() if ".bottom_up." in k}
    distillation = {k: p for k, p in parameters.items() if k.startswith("training_parts.")}
    student = {k: p for k, p in parameters.items() if k not in {**backbone, **distillation}}
    states = optimizer.state_dict()["state"]
    return {
        "backbone": digest(backbone),
        "student": digest(student),
        "teacher and adapter": digest(distillation),
        "controller": digest(dict(model.training_parts["coefficient"].named_buffers())),
        "average": digest(trainer.averaged._average),
        "momentum": digest({str(k): v["momentum_buffer"] for k, v in states.items()}),
    }


def digest(tensors):
    content = hashlib.blake2b()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].detach().numpy().tobytes())
    return content.hexdigest()


class Watcher(HookBase):
    def __init__(self):
        self.digests, self.coefficients = [], []

    def after_step(self):
        self.digests.append(digests(self.trainer))
        self.coefficients.append(float(self.trainer.checkpointer.model.last_coefficient))


def begin(*opts, resume=False):
    trainer = OwnTrainer(configure(*opts))
    trainer.resume_or_load(resume=resume)
    return trainer


def error_of(function):
    try:
        function()
    except CheckpointError as error:
        return str(error)


def on_one_machine(rank, port, folder):
    join(rank, port)
    machine = Path(folder) / f"machine{rank}"
    machine.mkdir()
    os.chdir(machine)
    found = {"folder": str(machine)}

    # Training.
    annotations = register_datasets(machine)
    args = Namespace(config_file="", opts=[], resume=True)
    setup(args, lambda _: configure())
    torch.manual_seed(rank)
    trainer, watcher = begin(), Watcher()
    trainer.register_hooks([watcher])
    trainer.train()
    found["steps"], found["coefficients"] = watcher.digests, watcher.coefficients
    found["guesses"] = evaluate_guesses(annotations)
    found["files"] = sorted(path.name for path in Path("output").glob("*.pth"))

    # What the second machine does not have.
    trainer = begin("SOLVER.MAX_ITER", LONGER, resume=True)
    found["resumed"] = trainer.start_iter, digests(trainer)
    watcher = Watcher()
    trainer.register_hooks([watcher])
    trainer.train()
    found["steps of the resumed"] = watcher.digests
    found["results"] = trainer._last_eval_results, predictions()
    found["end"] = digest(dict(trainer.checkpointer.model.student.named_parameters()))
    trainer = begin("MODEL.WEIGHTS", "output/model_0000003.pth", "OUTPUT_DIR", "other")
    found["weights"] = digests(trainer)["student"]
    evaluated = Trainer.load_for_evaluation(configure(), resume=True)
    found["evaluated"] = digest(dict(evaluated.student.named_parameters()))

    # What it has as well, with the same size and other content.
    weights = {k: v + rank for k, v in trainer.checkpointer.model.state_dict().items()}
    torch.save({"model": weights}, "same_name.pth")
    found["size"] = os.path.getsize("same_name.pth")
    trainer = begin("MODEL.WEIGHTS", "same_name.pth", "OUTPUT_DIR", "other")
    found["same name"] = digests(trainer)["student"], digest(weights)
    (Path("of the second") if rank else Path("of the first")).write_text(str(rank))
    with file_of_main("of the first") as first, file_of_main("of the second") as second:
        found["copies"] = Path(first).read_text(), os.path.exists(second)

    # Errors, that all processes have to see.
    if rank == 0:
        Path("damaged.pth").write_bytes(Path("same_name.pth").read_bytes()[:5000])
    else:
        shutil.copy("same_name.pth", "only_second.pth")
    found["errors"] = {
        name: error_of(lambda name=name: begin("MODEL.WEIGHTS", name, "OUTPUT_DIR", "other"))
        for name in ("nowhere.pth", "only_second.pth", "damaged.pth")
    }
    change = configure("MODEL.SSSD.DISTANCE.NAME", "mse")
    found["errors"]["other config"] = error_of(lambda: setup(args, lambda _: change))

    torch.save(found, Path(folder) / f"{rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machines")
    yield run_two_ranks(on_one_machine, folder)
    shutil.rmtree(folder)


def test_every_phase_leaves_the_same_in_both_processes(machines):
    first, second = machines
    assert first["steps"] == second["steps"] and len(first["steps"]) == STEPS
    assert first["coefficients"] == second["coefficients"]
    assert len(set(first["coefficients"])) == STEPS  # the controller follows the losses
    backbones = [step["backbone"] for step in first["steps"]]
    assert len(set(backbones[:FROZEN])) == 1 and len(set(backbones)) == 1 + STEPS - FROZEN
    for part in ("student", "teacher and adapter", "controller", "average", "momentum"):
        assert len({step[part] for step in first["steps"]}) == STEPS, part
    phases = build_phases(configure())
    assert [phases.distills(i) for i in range(STEPS)] == [False] * 3 + [True] * 2 + [False]


def test_a_resume_reaches_the_machine_without_checkpoints(machines):
    first, second = machines
    assert "model_final.pth" in first["files"] and not second["files"]
    assert first["resumed"] == second["resumed"] == (STEPS, first["steps"][-1])
    assert first["steps of the resumed"] == second["steps of the resumed"]
    assert len(first["steps of the resumed"]) == LONGER - STEPS


def test_weights_reach_it_too(machines):
    first, second = machines
    assert first["weights"] == second["weights"] == first["steps"][3]["student"]
    assert first["evaluated"] == second["evaluated"] == first["end"]


def test_a_file_of_the_same_name_and_size_is_not_taken_for_that_of_the_main_process(machines):
    first, second = machines
    assert first["size"] == second["size"]
    assert first["same name"][0] == second["same name"][0]
    assert first["same name"][1] != second["same name"][1]
    assert first["copies"] == second["copies"] == ("0", False)


def test_errors_of_the_main_process_end_both(machines):
    first, second = (machine["errors"] for machine in machines)
    sentence = "The checkpoint {} does not exist; check MODEL.WEIGHTS."
    for name in ("nowhere.pth", "only_second.pth"):
        assert first[name] == second[name] == sentence.format(name)
    assert "damaged.pth cannot be read" in first["damaged.pth"]
    assert "damaged.pth cannot be read" in second["damaged.pth"]
    assert first["other config"] == second["other config"]
    assert "MODEL.SSSD.DISTANCE.NAME was js and is mse" in first["other config"]


def test_two_processes_evaluate_as_one_does(machines, tmp_path, monkeypatch):
    first, second = machines
    monkeypatch.chdir(tmp_path)
    annotations = register_datasets(tmp_path)
    for name, (results, detections) in evaluate_guesses(annotations).items():
        ours, our_detections = first["guesses"][name]
        assert 5 < results["bbox"]["AP"] < 95
        assert ours["bbox"] == pytest.approx(results["bbox"], nan_ok=True, abs=0, rel=0)
        assert our_detections == detections and len(detections) == len(annotations[name])
        assert second["guesses"][name] == ({}, None)


def test_the_trained_detector_and_its_average_too(machines, tmp_path, monkeypatch):
    results, detections = machines[0]["results"]
    weights = Path(machines[0]["folder"]) / "output" / "model_final.pth"
    monkeypatch.chdir(tmp_path)
    register_datasets(tmp_path)
    cfg = configure("MODEL.WEIGHTS", str(weights))
    model = Trainer.load_for_evaluation(cfg)
    averaged = AveragedWeights(model, 0.9)
    averaged.load_state_dict(torch.load(weights, weights_only=True)["averaged"])
    expected = evaluate_with_average(model, lambda: Trainer.test(cfg, model), averaged)
    assert {record["image_id"] for record in detections} == set(range(1, 1 + IMAGES))
    assert detections == predictions()
    assert results.keys() == expected.keys() == {"bbox", "averaged/bbox"}
    for task in results:
        assert results[task] == pytest.approx(expected[task], nan_ok=True, abs=0, rel=0)
    assert not machines[1]["results"][0]
