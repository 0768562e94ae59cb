"""The tail of a network: fed with a layer's input, it gives the network's logits."""

import copy

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import Capture, build_network
from sssd.classification.branches import NetworkTail

CHAINS = [
    ("cifar_resnet8", "layer3", 8),
    ("cifar_resnet8", "layer1", 9),
    ("cifar_resnet8", "conv1", 8),
    ("cifar_resnet14", "layer2.1", 8),
    ("cifar_wrn_16_1", "layer3", 8),
    ("convnext_atto", "stages.2", 32),
    ("mobilenetv3_small_050", "blocks.4", 32),
]
LARGER_CHAINS = [
    ("resnet18", "layer4", 32),
    ("torchvision/resnet18", "layer3", 32),
    ("torchvision/densenet121", "features.denseblock4", 32),
]


def build(name, **options):
    torch.manual_seed(0)
    return build_network(name, num_classes=5, **options)


def random_images(size, seed=1):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "layer", "size"), CHAINS + LARGER_CHAINS)
def test_the_tail_is_the_network_from_the_layer_on(name, layer, size):
    network = build(name)
    images = random_images(size)
    network(images)  # the statistics are no longer those of a start
    tail = NetworkTail(copy.deepcopy(network), layer, (3, size, size))
    for mode in (True, False):
        network.train(mode), tail.train(mode)
        capture = Capture(network, [f"{layer}:input"])
        with capture:
            whole = network(images)
        assert torch.equal(tail(capture[f"{layer}:input"]), whole)


@pytest.mark.parametrize(("name", "layer", "size"), CHAINS)
def test_the_tail_keeps_what_follows_the_layer_and_nothing_else(name, layer, size):
    network = build(name)
    names = [key for key, _ in network.named_parameters()]
    first = next(i for i, key in enumerate(names) if key.startswith(f"{layer}."))
    tail = NetworkTail(network, layer, (3, size, size))
    assert [key for key, _ in tail.network.named_parameters()] == names[first:]
    # All of them learn.
    capture = Capture(build(name), [f"{layer}:input"])
    with capture:
        capture.network(random_images(size))
    tail(capture[f"{layer}:input"].detach()).square().sum().backward()
    assert all(p.grad is not None for p in tail.parameters())


def test_making_a_tail_moves_no_statistics_and_no_random_numbers():
    network = build("cifar_resnet8")
    network.train()
    expected = {key: x.clone() for key, x in network.layer3.state_dict().items()}
    random_state = torch.get_rng_state()
    tail = NetworkTail(network, "layer3", (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(x, expected[key]) for key, x in tail.network.layer3.state_dict().items())
    assert tail.training and tail.network.layer3[0].bn1.training
    assert not NetworkTail(build("cifar_resnet8").eval(), "layer3", (3, 8, 8)).network.training


def test_the_trunk_s_map_stays_as_it_is():
    # A tail that begins with an in-place ReLU: the other branches and the gate read the same map.
    network = build("cifar_resnet8")
    assert network.act1.inplace
    capture = Capture(network, ["act1:input"])
    with capture:
        whole = network(random_images(8))
    trunk = capture["act1:input"]
    kept = trunk.clone()
    tail = NetworkTail(copy.deepcopy(network), "act1", (3, 8, 8))
    assert torch.equal(tail(trunk), whole)
    assert (kept < 0).any() and torch.equal(trunk, kept)


@pytest.mark.parametrize(
    ("name", "layer", "size", "options"),
    [
        # The position embedding and the class token come in between.
        ("vit_tiny_patch16_224", "blocks.1", 32, {"img_size": 32, "depth": 2}),
        # The shortcuts pass by the layer.
        ("cifar_resnet8", "layer1.0.conv2", 8, {}),
        ("cifar_resnet8", "layer3.0.bn2", 8, {}),
        (
            "torchvision/googlenet",
            "inception4a.branch2",
            32,
            {"aux_logits": False, "init_weights": False},
        ),
    ],
)
def test_a_network_that_is_no_chain_before_the_layer_is_refused(name, layer, size, options):
    network = build(name, **options)
    message = f"{type(network).__name__} cannot branch off before {layer!r}, since it is no chain"
    with pytest.raises(ValueError, match=message):
        NetworkTail(network, layer, (3, size, size))


def test_a_layer_that_the_network_lacks_is_refused():
    with pytest.raises(ValueError, match="CifarResNet has no layer 'layer4': it has conv1, bn1"):
        NetworkTail(build("cifar_resnet8"), "layer4", (3, 8, 8))
