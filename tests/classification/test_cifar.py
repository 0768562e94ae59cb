"""The CIFAR networks: parameter counts of the literature, a second implementation, timm's tools."""

import math

import pytest
import torch
from torch.nn import functional as F

timm = pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import cifar  # noqa: E402, F401  (registers the networks)

# For 100 classes, as RepDistiller counts them; papers print these in millions (0.28, 7.43, 2.26).
PARAMETERS = {
    "cifar_resnet8": 83_892,
    "cifar_resnet14": 181_108,
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet44": 667_188,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_wrn_16_1": 180_916,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_1": 569_780,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_wrn_28_10": 36_536_884,
}


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def test_these_and_no_others_are_registered():
    assert set(timm.list_models("cifar_*")) == set(PARAMETERS)
    assert set(timm.list_models(module="cifar")) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    with torch.device("meta"):
        assert count(timm.create_model(name)) == PARAMETERS[name]


def test_parameters_of_resnet20_by_hand():
    def block(width_in, width):
        convolutions = 9 * width_in * width + 9 * width * width
        shortcut = width_in * width + 2 * width if width_in != width else 0
        return convolutions + 2 * 2 * width + shortcut

    stem = 9 * 3 * 16 + 2 * 16
    stages = 3 * block(16, 16) + block(16, 32) + 2 * block(32, 32) + block(32, 64)
    total = stem + stages + 2 * block(64, 64) + 64 * 10 + 10
    assert total == 272_474
    network = timm.create_model("cifar_resnet20", num_classes=10)
    assert count(network) == total
    # He et al.'s own shortcut has no parameters; this is the difference.
    shortcuts = [network.layer2[0].downsample, network.layer3[0].downsample]
    assert sum(map(count, shortcuts)) == 2_752 and total - 2_752 == 269_722
    assert all(block.downsample is None for block in network.layer1)


def batch_norm(x, state, name):
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


def resnet_by_hand(x, state, blocks):
    """He et al.: relu(F(x) + shortcut), the shortcut a strided 1x1 convolution and BatchNorm."""
    x = F.relu(batch_norm(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1"))
    for stage in (1, 2, 3):
        for i in range(blocks):
            at = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(batch_norm(y, state, f"{at}.bn1"))
            y = batch_norm(F.conv2d(y, state[f"{at}.conv2.weight"], padding=1), state, f"{at}.bn2")
            if f"{at}.downsample.0.weight" in state:
                x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = batch_norm(x, state, f"{at}.downsample.1")
            x = F.relu(x + y)
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def wide_resnet_by_hand(x, state, blocks):
    """Zagoruyko: x + F(relu(bn(x))); where the width changes, x is a convolution of relu(bn(x))."""
    x = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for i in range(blocks):
            at = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            active = F.relu(batch_norm(x, state, f"{at}.norm1"))
            y = F.conv2d(active, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(batch_norm(y, state, f"{at}.norm2"))
            if f"{at}.downsample.conv.weight" in state:
                x = F.conv2d(active, state[f"{at}.downsample.conv.weight"], stride=stride)
            x = x + F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
    x = F.relu(batch_norm(x, state, "norm")).mean((2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize(
    ("name", "by_hand", "blocks"),
    [
        ("cifar_resnet20", resnet_by_hand, 3),
        ("cifar_resnet8x4", resnet_by_hand, 1),
        ("cifar_wrn_16_1", wide_resnet_by_hand, 2),
        ("cifar_wrn_16_2", wide_resnet_by_hand, 2),
    ],
)
def test_against_the_papers_by_hand(name, by_hand, blocks):
    torch.manual_seed(0)
    network = timm.create_model(name).double().eval()
    for value in network.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:  # all that BatchNorm has
            value.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = by_hand(images, network.state_dict(), blocks)
    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["cifar_resnet8x4", "cifar_wrn_40_2"])
def test_initialisation(name):
    torch.manual_seed(0)
    network = timm.create_model(name)
    weight = network.layer3[0].conv2.weight
    width = weight.shape[0]
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * width)), rel=0.02)
    # timm's own ResNets start with the last BatchNorm of each block at 0; the literature's do not.
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)
    assert network.fc.bias.any() == (name == "cifar_resnet8x4")


@pytest.mark.parametrize(
    ("name", "chans", "size", "last"),
    [
        ("cifar_resnet8", 1, 8, 2),  # scikit-learn's digits
        ("cifar_resnet20", 3, 32, 8),
        ("cifar_wrn_16_1", 1, 8, 2),
        ("cifar_wrn_16_2", 3, 30, 8),
    ],
)
def test_any_image(name, chans, size, last):
    network = timm.create_model(name, num_classes=10, in_chans=chans)
    images = torch.randn(3, chans, size, size)
    maps = network.forward_features(images)
    assert maps.shape == (3, network.num_features, last, last)
    logits = network(images)
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_wrn_16_2"])
def test_interface_of_timm(name):
    network = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    width = network.num_features
    assert (network.num_classes, network.in_chans, network.head_hidden_size) == (7, 3, width)
    assert network.get_classifier() is network.fc
    maps = network.forward_features(images)
    feature = network.forward_head(maps, pre_logits=True)
    torch.testing.assert_close(feature, maps.mean((2, 3)))
    assert torch.equal(network.fc(feature), network(images))
    assert torch.equal(network.forward_head(maps), network(images))
    assert network.default_cfg["classifier"] == "fc"
    assert network.default_cfg["input_size"] == (3, 32, 32)

    network.reset_classifier(4)
    assert network(images).shape == (2, 4) and network.num_classes == 4
    assert not network.fc.training
    network.reset_classifier(0)
    assert torch.equal(network(images), feature)
    network.double().reset_classifier(5, "avgmax")
    assert network.fc.weight.dtype == torch.float64
    network.reset_classifier(5, "catavgmax")
    assert network.head_hidden_size == 2 * width
    assert network(images.double()).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "channels"),
    [("cifar_resnet8x4", [32, 64, 128, 256]), ("cifar_wrn_16_2", [16, 32, 64, 128])],
)
def test_features_only(name, channels):
    network = timm.create_model(name, features_only=True).eval()
    maps = network(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == channels == network.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == [1, 1, 2, 4] == network.feature_info.reduction()


def test_state_dict_is_plain():
    torch.manual_seed(0)
    network = timm.create_model("cifar_wrn_16_1", num_classes=10).eval()
    other = timm.create_model("cifar_wrn_16_1", num_classes=10).eval()
    other.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(images), other(images))
    assert "fc.weight" in network.state_dict()


def test_dropout_of_the_feature_in_training_only():
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet8", drop_rate=0.5)
    maps = torch.ones(1, 64, 8, 8)
    dropped = network.forward_head(maps, pre_logits=True)
    assert set(dropped.flatten().tolist()) == {0.0, 2.0}
    assert (network.eval().forward_head(maps, pre_logits=True) == 1).all()
