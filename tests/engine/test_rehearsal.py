"""What does not fit is said before anything is trained, and the rehearsal leaves no trace."""

import os

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import TERMS, Term, build_network, register_term
from sssd.engine import CheckpointError, ClassificationTrainer, run_stages
from sssd.engine.rehearsal import rehearse
from tests.classifiers import (
    KEYS,
    assert_same,
    registered,
    state_of,
    tiny_config,
    tiny_records,
)


def build(tmp_path, recipe, *opts):
    torch.manual_seed(1)
    return build_model(tiny_config(recipe, tmp_path, *opts))


@pytest.mark.parametrize("recipe", ["kd_at_cs_kd", "dml", "one", "byot", "at_gradient", "ft"])
@pytest.mark.parametrize("training", [True, False])
def test_the_rehearsal_leaves_everything_as_it_was(tmp_path, recipe, training):
    model = build(tmp_path, recipe).train(training)
    modes = {name: module.training for name, module in model.named_modules()}
    state, random_state = state_of(model), torch.get_rng_state()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = rehearse(model, 8)
    assert_same(state, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    assert (model.learner, model.teacher_is_trained) == (0, False)
    assert not frozen
    assert learns == {name for name, p in model.named_parameters() if p.requires_grad}


HINT = [{"name": "hint", "student_layer": "layer2", "teacher_layer": "layer2"}]
PARAPHRASER = [{"name": "paraphraser", "teacher_layer": "layer3"}]


def test_what_a_hint_does_not_reach_is_frozen(tmp_path):
    model = build(tmp_path, "kd", KEYS + "TERMS", HINT)
    frozen = rehearse(model, 8)
    after = ("student.layer3.", "student.fc.")
    own = [name for name, _ in model.named_parameters() if not name.startswith("teacher.")]
    assert frozen == [name for name in own if name.startswith(after)]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in own and not name.startswith(after)), name


def test_a_stage_that_trains_its_term_alone_freezes_the_whole_student(tmp_path):
    model = build(tmp_path, "kd", KEYS + "TERMS", PARAPHRASER)
    frozen = rehearse(model, 8)
    assert set(frozen) == {f"student.{name}" for name, _ in model.student.named_parameters()}


def test_frozen_layers_are_not_moved_by_weight_decay(tmp_path):
    opts = (KEYS + "TERMS", HINT, KEYS + "TEACHER.WEIGHTS", teacher_file(tmp_path))
    cfg = tiny_config("kd", tmp_path / "output", "SOLVER.WEIGHT_DECAY", 0.5, *opts)
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = ClassificationTrainer(cfg)
    model = trainer.checkpointer.model
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    trainer.train()
    for name, parameter in model.student.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved != name.startswith(("layer3", "fc")), name


@pytest.fixture
def constant():
    """A term whose loss depends on no parameter."""

    @register_term("constant")
    class Constant(Term):
        def __init__(self, surroundings):
            super().__init__()

        def forward(self, batch):
            return batch.logits.detach().sum()

    yield
    del TERMS["constant"]


def test_a_loss_that_reaches_no_parameter_is_an_error(tmp_path, constant):
    model = build(tmp_path, "ce", KEYS + "TERMS", [{"name": "constant"}])
    with pytest.raises(ValueError, match=r"No term .* reaches a parameter.*add a term"):
        rehearse(model, 8)


def test_images_that_a_network_cannot_take_are_named(tmp_path):
    model = build(tmp_path, "ce")
    model.student.conv1 = nn.Conv2d(1, 16, 9)
    sentence = r"CifarResNet cannot take images of the shape \(1, 8, 8\).*CLASSIFIER\.SIZE"
    with pytest.raises(ValueError, match=sentence):
        rehearse(model, 8)


def teacher_file(tmp_path, name="cifar_resnet20", num_classes=10, cut=False):
    path = tmp_path / "teacher.pth"
    torch.save(build_network(name, num_classes=num_classes, in_chans=1).state_dict(), path)
    if cut:
        with open(path, "r+b") as f:
            f.truncate(path.stat().st_size // 2)
    return str(path)


FLOW = {"name": "fsp", "layers": ["layer1", "layer2"]}
BOUNDARIES = {"name": "activation_boundaries",
              "layers": [["layer1.0.act2:input", "layer2.0.act2:input"]]}  # fmt: skip


def as_first_stage(term):
    return [{"name": "first", "terms": [term]}]


BAD = {
    "FSP widths that differ": (
        "fsp", [KEYS + "TEACHER.NETWORK", "cifar_resnet8x4"],
        r"In the stage 'flow': .*equal width: the student's 'act1' has 16 .*'act1' has 32",
    ),
    "AB connector of other sizes": (
        "ab", [KEYS + "STAGES", as_first_stage(BOUNDARIES)],
        r"In the stage 'first': A connector .*layer1\.0\.act2:input.*\(16, 8, 8\).*\(32, 4, 4\)",
    ),
    "unknown layer": (
        "fsp", [KEYS + "STAGES", as_first_stage({**FLOW, "layers": ["layer1", "layer9"]})],
        r"In the stage 'first': .*no layer 'layer9': it has conv1, bn1, act1, layer1, layer2,",
    ),
    "a layer inside another that it does not have": (
        "kd", [KEYS + "TERMS", [{**HINT[0], "student_layer": "layer2.7"}]],
        r"In the stage 'student': .*no layer 'layer2\.7': its 'layer2' has 0",
    ),
    "k above the number of classes": (
        "tsd", [KEYS + "GENERATIONS", [[{"name": "tolerant_teacher", "k": 11}]]],
        r"The k of the term 'tolerant_teacher' is 11; .*classes, 10",
    ),
    "k of one": (
        "ce", [KEYS + "TERMS", [{"name": "tolerant_teacher", "k": 1}]], r"is 1; it must be from 2",
    ),
    "an option that the term lacks": (
        "kd", [KEYS + "TERMS", [{"name": "kd", "tau": 4.0}]],
        r"In the stage 'student': .*no option 'tau': it has weight, temperature",
    ),
    "an unknown term": (
        "kd", [KEYS + "TERMS", [{"name": "kdd"}]], r"'kdd'.*registered.*kd, mutual",
    ),
    "mutual learning without peers": (
        "kd", [KEYS + "TERMS", [{"name": "mutual"}]], r"In the stage 'student': .*SIFIER\.PEERS",
    ),
    "a teacher that is not there": (
        "ce", [KEYS + "TERMS", [{"name": "kd"}]], r"'kd' needs a teacher: .*TEACHER\.NETWORK",
    ),
    "factors without a paraphraser before": (
        "ft", [KEYS + "STAGES", as_first_stage(FLOW)],
        r"In the stage 'student': The term 'factor' needs a trained paraphraser",
    ),
    "a paraphraser of another width": (
        "ft", [KEYS + "STAGES", as_first_stage({**PARAPHRASER[0], "rate": 0.75})],
        r"In the stage 'student': The paraphraser .*same teacher_layer, rate and norm",
    ),
    "an unknown network": (
        "kd", [KEYS + "TEACHER.NETWORK", "resnet20"], r"no network 'resnet20': .*cifar_resnet20",
    ),
    "an unknown network of the student, with a teacher": (
        "kd", [KEYS + "NETWORK", "cifar_resnet9"], r"In the stage 'student': .*no network",
    ),
    "no network": ("ce", [KEYS + "NETWORK", ""], r"NETWORK is empty: name a network"),
    "a batch size of zero in a later stage": (
        "fitnets", [KEYS + "STAGES", [{"name": "first", "terms": HINT,
                                       "opts": ["SOLVER.IMS_PER_BATCH", 0]}]],
        r"In the stage 'first': A batch of 0 images",
    ),
    "an augmentation that does not exist": (
        "kd", [KEYS + "AUGMENTATION", "flip"], r"Unknown augmentation 'flip'",
    ),
    "images of more channels than pixel means": (
        "kd", ["MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]],
        r"'tiny_digits' has images of 1 channel\(s\), and MODEL\.PIXEL_MEAN has 3 value",
    ),
    "another number of classes than the data": (
        "kd", [KEYS + "NUM_CLASSES", 7], r"has 10 classes .*built for 7: set .*NUM_CLASSES to 10",
    ),
    "a dataset that is not registered": (
        "kd", ["DATASETS.TRAIN", ("nothing",)], r"'nothing' is not registered",
    ),
}  # fmt: skip


def refused(tmp_path, recipe, *opts, sentence, error=ValueError):
    """A run ends with that sentence, and has made no file."""
    cfg = tiny_config(recipe, tmp_path / "output", *opts)
    with pytest.raises(error, match=sentence) as caught:
        run_stages(cfg)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_sentence_before_anything_is_trained(tmp_path, case):
    recipe, opts, sentence = BAD[case]
    refused(tmp_path, recipe, *opts, sentence=sentence)


@pytest.mark.parametrize(
    ("name", "num_classes", "cut", "sentence"),
    [
        ("cifar_resnet8", 10, False, r"teacher\.pth do not fit the network 'cifar_resnet20'"),
        ("cifar_resnet20", 7, False, r"'fc\.weight' is \(7, 64\) there and \(10, 64\) here"),
        ("cifar_resnet20", 10, True, r"teacher\.pth .* cannot be read"),
    ],
)
@pytest.mark.parametrize("recipe", ["kd", "fitnets"])
def test_a_teacher_file_that_does_not_fit_is_named(tmp_path, recipe, name, num_classes, cut,
                                                   sentence):  # fmt: skip
    path = teacher_file(tmp_path, name, num_classes, cut)
    refused(tmp_path, recipe, KEYS + "TEACHER.WEIGHTS", path, sentence=sentence)


def test_a_missing_teacher_file_is_named(tmp_path):
    path = str(tmp_path / "nowhere.pth")
    sentence = r"nowhere\.pth of the network 'cifar_resnet20' do not exist"
    refused(tmp_path, "kd", KEYS + "TEACHER.WEIGHTS", path, sentence=sentence)


def test_missing_weights_of_the_student_are_named_before_the_teacher_is_trained(tmp_path):
    path = str(tmp_path / "nowhere.pth")
    sentence = r"nowhere\.pth does not exist"
    refused(tmp_path, "kd", "MODEL.WEIGHTS", path, sentence=sentence, error=CheckpointError)


def test_missing_data_names_the_path_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    opts = ("DATASETS.TRAIN", ("cifar10_small_train",))
    refused(tmp_path, "kd", *opts, sentence=r"cifar10_small\.npz .*DETECTRON2_DATASETS")


def test_missing_data_for_evaluation_stops_the_run_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    opts = ("DATASETS.TEST", ("cifar10_small_val",))
    refused(tmp_path, "kd", *opts, sentence=r"cifar10_small\.npz .*DETECTRON2_DATASETS")


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_named(tmp_path, label):
    records = tiny_records()
    records[5]["label"] = label
    with registered("bad_labels", records) as name:
        sentence = rf"Record 5 of the dataset 'bad_labels' has the label {label}: .*0\.\.9"
        refused(tmp_path, "kd", "DATASETS.TRAIN", (name,), sentence=sentence)


@pytest.mark.parametrize(
    ("recipe", "where"), [("cs_kd", ""), ("kd_at_cs_kd", r"In the stage 'student': ")]
)
def test_a_class_of_a_single_image_cannot_be_paired(tmp_path, recipe, where):
    records = [r for r in tiny_records() if r["label"] != 4 or r["image_id"] == 4]
    with registered("lonely_class", records) as name:
        sentence = where + r"1 of the 10 classes have a single image \(4\)"
        refused(tmp_path, recipe, "DATASETS.TRAIN", (name,), sentence=sentence)


def test_colour_images_for_a_grey_network_are_refused_in_evaluation_data_too(tmp_path):
    with registered("colour", tiny_records(channels=3)) as name:
        sentence = r"'colour' has images of 3 channel\(s\), and MODEL\.PIXEL_MEAN has 1"
        refused(tmp_path, "kd", "DATASETS.TEST", (name,), sentence=sentence)
