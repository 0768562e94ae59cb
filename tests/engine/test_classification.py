"""The trainer of classifiers, step by step against plain PyTorch, and what it leaves."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import build_network
from sssd.engine import (
    Checkpointer,
    CheckpointError,
    ClassificationTrainer,
    ConfigError,
    TrainingStep,
    plan_stages,
    run_stages,
)
from tests.classifiers import (
    KEYS,
    TINY,
    assert_same,
    registered,
    state_of,
    tiny_config,
    tiny_records,
)

SOLVER = (
    "SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", 0.05, "SOLVER.WEIGHT_DECAY", 0.01,
    "SOLVER.WEIGHT_DECAY_NORM", 0.01, KEYS + "AUGMENTATION", "none",
)  # fmt: skip


def batches(cfg):
    """The images, normalised, and labels of the training's batches, in its order."""
    images_of = {r["image_id"]: r["image"] for r in DatasetCatalog.get(TINY)}
    loader = iter(ClassificationTrainer.build_train_loader(cfg))
    for _ in range(cfg.SOLVER.MAX_ITER):
        samples = next(loader)
        images = np.stack([images_of[x["image_id"]].transpose(2, 0, 1) for x in samples])
        labels = torch.tensor([x["label"] for x in samples])
        yield (torch.from_numpy(np.ascontiguousarray(images)) - 78.1) / 96.0, labels


def sgd(network):
    return torch.optim.SGD(
        network.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01
    )


def trained(cfg):
    return torch.load(os.path.join(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cross_entropy_trains_as_a_plain_loop_does_bit_for_bit(tmp_path, layout):
    last = layout == torch.channels_last
    cfg = tiny_config("ce", tmp_path, *SOLVER, KEYS + "CHANNELS_LAST", last)
    run_stages(cfg)

    torch.manual_seed(cfg.SEED)
    network = build_network("cifar_resnet8", num_classes=10, in_chans=1).to(memory_format=layout)
    assert network.layer2[0].conv2.weight.is_contiguous(memory_format=layout)
    optimizer = sgd(network)
    for images, labels in batches(cfg):
        loss = F.cross_entropy(network(images.contiguous(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_same(network.state_dict(), trained(cfg)["model"])


def probabilities(network, images):
    """Of a pass in training mode that leaves the running statistics as they are."""
    kept = {name: value.clone() for name, value in network.named_buffers()}
    with torch.no_grad():
        p = F.softmax(network(images), 1)
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])
    return p


def mutual_learning(tmp_path, alternate):
    """Two networks after a plain loop of deep mutual learning; False: both look, then both step."""
    cfg = tiny_config("dml", tmp_path / "twin", *SOLVER)
    torch.manual_seed(cfg.SEED)
    networks = build_model(cfg).networks
    optimizers = [sgd(network) for network in networks]
    for images, labels in batches(tiny_config("ce", tmp_path / "twin", *SOLVER)):
        before = [probabilities(network, images) for network in networks]
        for i, network in enumerate(networks):
            target = probabilities(networks[1 - i], images) if alternate else before[1 - i]
            log_p = F.log_softmax(network(images), 1)
            divergence = (target * (target.log() - log_p)).sum(1).mean()
            optimizers[i].zero_grad()
            (F.nll_loss(log_p, labels) + divergence).backward()
            optimizers[i].step()
    return [network.state_dict() for network in networks]


def test_each_of_two_mutual_learners_sees_what_the_other_has_just_become(tmp_path):
    run_stages(tiny_config("dml", tmp_path, *SOLVER))
    saved = trained(tiny_config("dml", tmp_path))
    peer = {k.removeprefix("peers.0."): v for k, v in saved["sssd"].items() if "peers" in k}

    def differences(expected):
        for ours, theirs in zip(expected, (saved["model"], peer), strict=True):
            assert ours.keys() == theirs.keys()
            yield max((ours[name] - theirs[name]).abs().max().item() for name in ours)

    assert max(differences(mutual_learning(tmp_path, alternate=True))) < 1e-5
    assert min(differences(mutual_learning(tmp_path, alternate=False))) > 1e-3


@pytest.mark.parametrize("peers", [1, 2])
def test_networks_that_do_not_learn_in_a_step_stay_bit_identical(tmp_path, monkeypatch, peers):
    cfg = tiny_config("dml", tmp_path, KEYS + "PEERS", ["cifar_resnet8"] * peers)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = ClassificationTrainer(cfg)
    model, optimizer = trainer.checkpointer.model, trainer._trainer.optimizer
    steps = []

    def snapshot(network):
        momentum = {
            f"{name}.momentum": optimizer.state[p]["momentum_buffer"].clone()
            for name, p in network.named_parameters()
            if "momentum_buffer" in optimizer.state[p]
        }
        return {**state_of(network), **momentum}

    run_step = TrainingStep.run_step

    def watched(self):
        before = [snapshot(network) for network in model.networks]
        run_step(self)
        after = [snapshot(network) for network in model.networks]
        steps.append(model.learner)
        for i in range(1 + peers):
            if i == model.learner:
                assert not torch.equal(before[i]["conv1.weight"], after[i]["conv1.weight"])
                assert after[i]["bn1.num_batches_tracked"] == 1 + self.iter
            else:
                assert_same(before[i], after[i])

    monkeypatch.setattr(TrainingStep, "run_step", watched)
    trainer.train()
    assert steps == list(range(1 + peers)) * 3
    assert all(group["params"] for group in optimizer.param_groups)


def test_all_mutual_learners_take_their_step_with_the_same_images(tmp_path):
    cfg = tiny_config("dml", tmp_path, KEYS + "PEERS", ["cifar_resnet8"] * 2)
    loader = iter(ClassificationTrainer.build_train_loader(cfg))
    ids = [[x["image_id"] for x in next(loader)] for _ in range(6)]
    assert ids[0] == ids[1] == ids[2] and ids[3] == ids[4] == ids[5]
    assert not set(ids[0]) & set(ids[3])


def test_a_failed_step_leaves_the_student_as_the_one_that_learns(tmp_path, monkeypatch):
    cfg = tiny_config("dml", tmp_path)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = ClassificationTrainer(cfg)
    model = trainer.checkpointer.model

    def fail(self):
        if model.learner == 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(TrainingStep, "run_step", fail)
    with pytest.raises(ConfigError, match=r"out of memory.*set MODEL\.SSSD\.SOLVER\.BATCH_PARTS"):
        trainer.train()
    assert model.learner == 0


@pytest.mark.parametrize("period", [0, 1])
def test_a_failure_in_the_last_iteration_saves_no_best_checkpoint_of_it(
    tmp_path, monkeypatch, period
):
    cfg = tiny_config("ce", tmp_path, "DATASETS.TEST", (TINY,), "TEST.EVAL_PERIOD", period)
    run_step = TrainingStep.run_step

    def fail(self):
        run_step(self)
        if self.iter == 2:
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "run_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_stages(cfg)
    best = tmp_path / "model_best.pth"
    assert best.exists() == bool(period)  # of the evaluations before
    if period:
        assert torch.load(best, weights_only=True)["iteration"] < 2
    results = run_stages(cfg, resume=True)
    assert trained(cfg)["iteration"] == 2 and results["student"]["classification"]


def test_each_mutual_learner_logs_a_total_loss_of_its_own(tmp_path):
    run_stages(tiny_config("dml", tmp_path, KEYS + "PEERS", ["cifar_resnet14"],
                           "SOLVER.MAX_ITER", 1))  # fmt: skip
    line = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    for prefix in ("", "peer1_"):
        losses = [v for k, v in line.items() if k.startswith(f"{prefix}loss_")]
        assert losses and f"{prefix}grad_norm" in line
        assert line[f"{prefix}total_loss"] == pytest.approx(sum(losses), rel=1e-4)


@pytest.mark.parametrize("recipe", ["byot", "one", "fitnets", "dml"])
def test_precise_bn_touches_what_runs_and_nothing_else(tmp_path, recipe):
    cfg = plan_stages(
        tiny_config(recipe, tmp_path, "TEST.PRECISE_BN.ENABLED", True,
                    "TEST.PRECISE_BN.NUM_ITER", 2)
    )[0].cfg  # fmt: skip
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = ClassificationTrainer(cfg)
    trainer.train()
    variances = {
        name: buffer
        for name, buffer in trainer.checkpointer.model.named_buffers(remove_duplicate=False)
        if name.endswith("running_var")
    }
    model = trainer.checkpointer.model
    for part in [*model.networks, *model.training_parts["terms"]]:
        variances |= {
            f"{id(part)}.{k}": v for k, v in part.named_buffers() if k.endswith("running_var")
        }
    assert variances and all((value > 0).all() for value in variances.values())


def test_a_label_that_means_something_else_in_the_test_set_is_refused(tmp_path):
    with registered("swapped", tiny_records()) as name:
        MetadataCatalog.remove(name)
        MetadataCatalog.get(name).classes = ["1", "0", *map(str, range(2, 10))]
        cfg = tiny_config("ce", tmp_path, "DATASETS.TEST", (name,))
        with pytest.raises(ValueError, match="label 0 is '0' in the dataset .* but '1' in"):
            run_stages(cfg)


def test_an_option_that_fails_in_the_first_step_is_one_sentence(tmp_path):
    cfg = tiny_config("cs_kd", tmp_path, KEYS + "TERMS", [{"name": "class_pairs",
                                                           "temperature": "4"}])  # fmt: skip
    with pytest.raises(ValueError, match="first step of .*TERMS fails .* types of their options"):
        run_stages(cfg)


def test_an_image_id_that_comes_twice_is_refused(tmp_path):
    records = [{**record, "image_id": i % 7} for i, record in enumerate(tiny_records())]
    with registered("twice", records) as name:
        cfg = tiny_config("ce", tmp_path, "DATASETS.TEST", (name,))
        with pytest.raises(ValueError, match="Record 7 of .* has the image_id 0 of record 0"):
            run_stages(cfg)


# ---- What is left for others ----

STOCK = """
import sys
import torch
path, name = sys.argv[1:3]
saved = torch.load(path + "/model_final.pth", weights_only=True)
if name.startswith("torchvision/"):
    import torchvision
    network = torchvision.models.get_model(name.split("/")[1], weights=None, num_classes=10)
else:
    import timm
    network = timm.create_model(name, num_classes=10)
network.load_state_dict(saved["model"], strict=True)
images = torch.load(path + "/images.pth", weights_only=True)
with torch.no_grad():
    torch.save(network.eval()(images), path + "/logits.pth")
assert not any(module.split(".")[0] == "sssd" for module in sys.modules)
"""


@pytest.mark.parametrize(
    "name", ["resnet10t", pytest.param("torchvision/resnet18", marks=pytest.mark.long)]
)
def test_the_trained_student_is_a_plain_state_dict_for_those_without_sssd(tmp_path, name):
    with registered("colour", tiny_records(channels=3, size=32)) as data:
        cfg = tiny_config(
            "byot", tmp_path, KEYS + "NETWORK", name, KEYS + "SIZE", 32, "SOLVER.MAX_ITER", 2,
            "MODEL.PIXEL_MEAN", [120.0] * 3, "MODEL.PIXEL_STD", [60.0] * 3,
            KEYS + "TERMS", [{"name": "own_teacher", "layers": ["layer1", "layer2", "layer3"],
                              "deepest": "layer4"}], "DATASETS.TRAIN", (data,),
        )  # fmt: skip
        run_stages(cfg)
    images = torch.randn(3, 3, 32, 32)
    torch.save(images, tmp_path / "images.pth")
    # An empty folder to start in, and no PYTHONPATH: the checkout is out of reach.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path), name],
        env={**env, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    model = build_model(plan_stages(cfg)[-1].cfg)
    Checkpointer(model).load(str(tmp_path / "model_final.pth"), checkpointables=["sssd"])
    with torch.no_grad():
        expected = model.eval().student(images)
    torch.set_num_threads(1)
    assert torch.equal(torch.load(tmp_path / "logits.pth", weights_only=True), expected)


def test_evaluation_alone_needs_the_heads_that_were_trained(tmp_path):
    cfg = tiny_config("byot", tmp_path)
    run_stages(cfg)
    path = str(tmp_path / "model_final.pth")
    cfg = tiny_config("byot", tmp_path, "MODEL.WEIGHTS", path)
    model = ClassificationTrainer.load_for_evaluation(cfg)
    assert_same(trained(cfg)["sssd"], model.training_parts.state_dict())

    # More heads than there were.
    layers = [{"name": "own_teacher", "layers": ["act1", "layer1", "layer2"], "deepest": "layer3"}]
    other = tiny_config("byot", tmp_path, "MODEL.WEIGHTS", path, KEYS + "TERMS", layers)
    sentence = r"beside the model in .*model_final\.pth is not what this config trains \(.*heads"
    with pytest.raises(CheckpointError, match=sentence) as caught:
        ClassificationTrainer.load_for_evaluation(other)
    assert "\n" not in str(caught.value)

    torch.save(trained(cfg)["model"], path)
    sentence = r"lacks sssd: it is a classifier without the heads, branches or peers"
    with pytest.raises(CheckpointError, match=sentence) as caught:
        ClassificationTrainer.load_for_evaluation(cfg)
    assert "detector" not in str(caught.value) and "GROUND_TRUTH" not in str(caught.value)
    ClassificationTrainer.load_for_evaluation(tiny_config("kd", tmp_path, "MODEL.WEIGHTS", path))


def test_evaluation_of_no_weights_is_one_sentence(tmp_path):
    with pytest.raises(CheckpointError, match="no weights to evaluate: set MODEL.WEIGHTS"):
        ClassificationTrainer.load_for_evaluation(tiny_config("ce", tmp_path))


def test_a_network_to_start_from_may_differ_in_its_logits_only(tmp_path):
    run_stages(tiny_config("ce", tmp_path / "first"))
    path = tmp_path / "first" / "model_final.pth"
    start = ("MODEL.WEIGHTS", str(path), "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 0.0)
    other = tiny_config("ce", tmp_path / "other", *start, KEYS + "NETWORK", "cifar_resnet14")
    with pytest.raises(CheckpointError, match="belongs to another architecture: 3. of the model"):
        run_stages(other)

    weights = trained(tiny_config("ce", tmp_path / "first"))["model"]
    replaced = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    torch.save(replaced | {"fc.weight": torch.zeros(4, 64), "fc.bias": torch.zeros(4)}, path)
    cfg = tiny_config("ce", tmp_path / "again", *start)
    run_stages(cfg)
    after = trained(cfg)["model"]
    learned = [k for k in replaced if k.endswith("weight")]
    assert learned and all(torch.equal(after[k], weights[k]) for k in learned)
    assert after["fc.weight"].shape == (10, 64)


def test_a_weight_that_follows_the_iteration_is_in_the_log(tmp_path):
    cfg = tiny_config("fitnets", tmp_path)
    run_stages(cfg)
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    assert last["loss_kd/weight"] == pytest.approx(4 - 3 * 2 / 3)  # iteration 2 of 3
    assert not [name for name in last if name.endswith("/weight") and "kd" not in name]
