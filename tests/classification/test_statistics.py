"""Passes beside the batch's: normalised as always, and without a trace."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification.statistics import statistics_held
from tests.classification.steps import make_network

# One with torch's BatchNorm2d, one with timm's BatchNormAct2d.
NETWORKS = pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_1"])


@pytest.fixture
def images():
    return 3 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1


def buffers(network):
    return {key: value.clone() for key, value in network.named_buffers()}


def assert_same_buffers(network, kept):
    assert [key for key, _ in network.named_buffers()] == list(kept)
    assert all(torch.equal(value, kept[key]) for key, value in network.named_buffers())


@NETWORKS
def test_in_training_mode_the_batch_normalises_and_the_statistics_stay(name, images):
    network = make_network(name)
    kept, objects = buffers(network), dict(network.named_buffers())
    with statistics_held(network):
        held = network(images)
    assert_same_buffers(network, kept)
    # The very same tensors, which an exponential average or DistributedDataParallel may hold.
    assert all(value is objects[key] for key, value in network.named_buffers())
    assert torch.equal(held, network(images))
    # That last pass was an ordinary one.
    assert all(not torch.equal(value, kept[key]) for key, value in network.named_buffers())
    assert not torch.allclose(held, network.eval()(images), rtol=0.1)


@NETWORKS
def test_in_evaluation_mode_the_statistics_normalise(name, images):
    network = make_network(name)
    for _ in range(3):
        network(images)
    network.eval()
    kept, expected = buffers(network), network(images[:2])
    with statistics_held(network):
        assert torch.equal(network(images[:2]), expected)
    assert_same_buffers(network, kept)


def test_a_frozen_layer_normalises_by_its_statistics(images):
    network = make_network()
    network(images)
    network.layer2.eval()
    kept = buffers(network)
    with statistics_held(network):
        held = network(images)
    assert_same_buffers(network, kept)
    assert torch.equal(held, network(images))
    for key, value in network.named_buffers():
        assert torch.equal(value, kept[key]) == key.startswith("layer2")


def test_gradients_are_those_of_an_ordinary_pass(images):
    network = make_network()
    with statistics_held(network):
        held = network(images)
    # The backward pass comes when the statistics are back.
    ours = torch.autograd.grad(held.square().sum(), list(network.parameters()))
    theirs = torch.autograd.grad(network(images).square().sum(), list(network.parameters()))
    assert all(map(torch.equal, ours, theirs))


def test_an_exception_inside_leaves_the_statistics_as_they_were(images):
    network = make_network()
    network(images)
    kept = buffers(network)
    with pytest.raises(RuntimeError, match="channels"), statistics_held(network):
        network(images[:, :1])
    assert_same_buffers(network, kept)


def test_blocks_may_be_nested(images):
    network = make_network()
    kept = buffers(network)
    with statistics_held(network):
        with statistics_held(network.layer1):
            network(images)
        network(images)
    assert_same_buffers(network, kept)


def test_layers_without_statistics_and_of_other_kinds_are_left_alone(images):
    network = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.GroupNorm(1, 3),
    )
    kept = buffers(network)
    with statistics_held(network):
        held = network(images)
    assert len(kept) == 3
    assert_same_buffers(network, kept)
    assert torch.equal(held, network(images))
    assert not torch.equal(network[1].running_mean, kept["1.running_mean"])


def test_a_layer_that_counts_in_any_case_counts_elsewhere(images):
    # SyncBatchNorm needs a counter to add to; without processes its forward is BatchNorm's.
    network = torch.nn.SyncBatchNorm(3)
    kept, objects = buffers(network), dict(network.named_buffers())
    with statistics_held(network):
        assert network.num_batches_tracked is not None
        network.num_batches_tracked.add_(1)
    assert_same_buffers(network, kept)
    assert all(value is objects[key] for key, value in network.named_buffers())
