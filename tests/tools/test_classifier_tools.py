"""The command lines that look at trained classifiers, run in this process."""

import os
import re
import runpy
import sys

import pytest
import torch
from detectron2.modeling import build_model

from sssd.engine import Checkpointer, ClassificationTrainer, load_config
from sssd.engine.trained_network import load_trained_network, titles_of
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "Classification"


def save(folder, config="ce_cifar_resnet8_digits.yaml", seed=3):
    """What a training of no iterations leaves."""
    torch.manual_seed(seed)
    cfg = load_config(str(CONFIGS / config), ["OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    os.makedirs(folder)
    Checkpointer(model, str(folder)).save("model_final")
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "model_final.pth")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a tool and returns what it printed; the error's sentence if it ends in one."""

    def run(tool, *args):
        path = str(REPOSITORY / "tools" / tool)
        monkeypatch.setattr(sys, "argv", [path, *map(str, args)])
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert str(end).startswith("error: ")
            return str(end)
        return capsys.readouterr().out

    return run


def cells(line):
    return [cell.strip() for cell in line.strip("| \n").split("|")]


def test_linear_probe_prints_each_checkpoint_and_random_weights_of_its_architecture(tmp_path, call):
    first = save(tmp_path / "first", seed=0)
    # A checkpoint that holds the very weights that the row of random weights has.
    network = load_trained_network(first, random_seed=0).network
    torch.save({"model": network.state_dict()}, first)
    second = save(tmp_path / "second")
    with torch.no_grad():  # features that are all the same: the probe can only guess
        state = torch.load(second, weights_only=True)
        state["model"]["conv1.weight"].zero_()
        torch.save(state, second)
    printed = call(
        "linear_probe.py", first, second, "--train", "digits_val", "--test", "digits_test"
    )
    rows = [cells(line) for line in printed.splitlines()]
    assert rows[0] == ["network", "top-1 %", "validation %", "C"]
    titles = ["first", "second", "cifar_resnet8, random weights"]
    assert [row[0] for row in rows[2:]] == titles
    of_first, of_second, random = (row[1:] for row in rows[2:])
    assert of_first == random
    assert float(of_first[0]) > 60 > 20 > float(of_second[0])


def test_plot_embeddings_draws_the_checkpoints_side_by_side(tmp_path, call):
    paths = [save(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    output = tmp_path / "picture.png"
    options = ["--dataset", "digits_val", "--output", output, "--max-images", 60]
    assert call("plot_embeddings.py", *paths, *options) == f"wrote {output}\n"
    single = tmp_path / "single.png"
    call("plot_embeddings.py", paths[0], *options[:3], single, *options[4:])
    widths = [
        int.from_bytes(path.read_bytes()[16:20], "big") for path in (output, single)
    ]  # of the PNG's header
    assert widths[0] == 2 * widths[1]


def test_early_exit_prints_the_cost_beside_the_accuracy_that_evaluation_finds(tmp_path, call):
    config = CONFIGS / "byot_cifar_resnet8_digits.yaml"
    checkpoint = save(tmp_path / "byot", config.name)
    printed = call("early_exit.py", "--config-file", config, "MODEL.WEIGHTS", checkpoint)
    rows = [cells(line) for line in printed.splitlines() if line.startswith("|")][2:]
    assert [row[:2] for row in rows] == [
        [name, "digits_val"] for name in ("head1", "head2", "network", "ensemble")
    ]
    cfg = load_config(str(config), ["MODEL.WEIGHTS", checkpoint, "MODEL.DEVICE", "cpu"])
    results = ClassificationTrainer.test(cfg, ClassificationTrainer.load_for_evaluation(cfg))
    names = ("head1", "head2", "classification", "ensemble")
    assert [row[2] for row in rows] == [f"{results[name]['top1']:.2f}" for name in names]
    multiply_adds = [int(row[3].replace(",", "")) for row in rows]
    # The stem, the first stage and its head (1x1, 4x4 with stride 4, 1x1), for 8x8 grey images.
    stem, stage = 1 * 16 * 9 * 64, 2 * 16 * 16 * 9 * 64
    head = 16 * 16 * 64 + 16 * 16 * 16 * 4 + 16 * 64 * 4 + 64 * 10
    assert multiply_adds[0] == stem + stage + head
    assert multiply_adds == sorted(multiply_adds) and len(set(multiply_adds)) == 4
    assert rows[2][4] == rows[2][6] == "100.0%"
    assert int(rows[2][5].replace(",", "")) == sum(
        p.numel() for p in load_trained_network(checkpoint).network.parameters()
    )


def test_what_the_tools_cannot_use_is_said_in_a_sentence(tmp_path, call):
    checkpoint = save(tmp_path / "run")
    config = CONFIGS / "ce_cifar_resnet8_digits.yaml"
    nowhere = tmp_path / "nowhere" / "model_final.pth"
    both = ["--train", "digits_val", "--test"]
    drawn = ["--dataset", "digits_val", "--output", tmp_path / "picture.png"]
    for arguments, message in (
        (["linear_probe.py", checkpoint, *both, "digits_val"], "--train and --test are both"),
        (["linear_probe.py", nowhere, *both, "digits_test"], r"nowhere/config\.yaml .* not exist"),
        (["plot_embeddings.py", checkpoint, *drawn, "--titles", "a", "b"], "1 checkpoints have"),
        (["plot_embeddings.py", checkpoint, *drawn, "--max-images", 3], "picture of 3 images"),
        (
            ["plot_embeddings.py", checkpoint, "--dataset", "no", *drawn[2:]],
            "'no' is not registered",
        ),
        (["early_exit.py", "--config-file", config], "set MODEL.WEIGHTS to a checkpoint"),
        (
            ["early_exit.py", "--config-file", config, "MODEL.WEIGHTS", checkpoint],
            "has no term 'own_teacher', so its network has no exits",
        ),
    ):
        error = call(*arguments)
        assert re.search(message, error) and "\n" not in error, error
    assert not (tmp_path / "picture.png").exists()


def test_titles_are_the_folders_unless_two_are_alike():
    assert titles_of(["a/b/x.pth", "a/c/x.pth"]) == ["b", "c"]
    assert titles_of(["a/b/x.pth", "c/b/x.pth"]) == ["a/b/x.pth", "c/b/x.pth"]
    assert titles_of(["a/b/x.pth"], ["BYOT"]) == ["BYOT"]
    with pytest.raises(ValueError, match="2 checkpoints have the titles y, y: give each"):
        titles_of(["a/b/x.pth", "a/c/x.pth"], ["y", "y"])


def test_only_configs_of_classification_have_a_network(tmp_path):
    checkpoint = save(tmp_path / "run")
    detector = str(REPOSITORY / "configs/Demo/faster_rcnn_R_18_FPN.yaml")
    with pytest.raises(ValueError, match="name a config of image classification"):
        load_trained_network(checkpoint, detector)
    with pytest.raises(ValueError, match="weights .*gone.pth .* do not exist"):
        load_trained_network(str(tmp_path / "run" / "gone.pth"))


def test_random_weights_are_those_of_the_seed_and_leave_the_random_stream_alone(tmp_path):
    checkpoint = save(tmp_path / "run")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (load_trained_network(checkpoint, random_seed=s).network for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert not one.training
