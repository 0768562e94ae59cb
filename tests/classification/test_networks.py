"""Networks by name, and their classifiers."""

import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import build_network, classifier_of  # noqa: E402


@pytest.mark.parametrize(
    ("name", "chans", "kind"),
    [
        ("cifar_resnet8", 1, "CifarResNet"),
        ("resnet10t", 2, "ResNet"),
        ("torchvision/resnet18", 3, "ResNet"),
    ],
)
def test_build(name, chans, kind):
    network = build_network(name, num_classes=7, in_chans=chans)
    assert type(network).__name__ == kind
    assert network(torch.randn(2, chans, 64, 64)).shape == (2, 7)
    assert network.training


def test_state_dicts_are_those_of_the_libraries():
    ours = build_network("resnet18", num_classes=5).state_dict()
    timm.create_model("resnet18", num_classes=5).load_state_dict(ours)
    ours = build_network("torchvision/mobilenet_v2", num_classes=5).state_dict()
    torchvision.models.mobilenet_v2(num_classes=5).load_state_dict(ours)


def test_further_arguments():
    assert build_network("cifar_resnet8", num_classes=5, drop_rate=0.25).drop_rate == 0.25
    options = {"aux_logits": False, "init_weights": False}
    network = build_network("torchvision/googlenet", num_classes=5, **options)
    assert network.aux1 is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet20", "cifar_resnet20"),
        ("wrn_16_2", "cifar_wrn_16_2"),
        ("resnet-18", "resnet18"),
        ("torchvision/resnet17", "torchvision/resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", ""),  # its function would download a backbone
        ("hf-hub:timm/resnet18.a1_in1k", ""),  # timm would download it
        ("qqqqqqqqqqqq", "timm.list_models()"),
    ],
)
def test_unknown_names(name, nearest):
    with pytest.raises(ValueError) as caught:
        build_network(name, num_classes=5)
    message = str(caught.value)
    assert f"There is no network {name!r}" in message and nearest in message
    assert "\n" not in message and message.endswith(".")


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"pretrained weights \('a1_in1k'\).*write 'resnet18'"):
        build_network("resnet18.a1_in1k", num_classes=5)
    with pytest.raises(ValueError, match="'resnet18' was asked for 0 classes"):
        build_network("resnet18", num_classes=0)
    with pytest.raises(ValueError, match="'torchvision/resnet18' takes images of 3 channels, not"):
        build_network("torchvision/resnet18", num_classes=5, in_chans=1)


@pytest.mark.parametrize(
    "name",
    [
        "cifar_wrn_16_1",
        "resnetv2_18",
        "convnext_atto",
        "vit_tiny_patch16_224",
        "torchvision/resnet18",
        "torchvision/alexnet",
        "torchvision/mobilenet_v3_small",
        "torchvision/densenet121",
        "torchvision/vit_b_16",
        "torchvision/swin_t",
    ],
)
def test_classifier_makes_the_logits(name):
    made = []
    with torch.device("meta"):
        network = build_network(name, num_classes=7).eval()
        classifier_of(network).register_forward_hook(lambda *details: made.append(details[-1]))
        logits = network(torch.randn(1, 3, 224, 224))
    (output,) = made
    assert output.flatten(1).shape == logits.shape == (1, 7)
    # The same object, unless a 1x1 convolution makes them and its map is flattened.
    assert output is logits or name == "resnetv2_18"


def test_without_one_classifier():
    with pytest.raises(ValueError, match="CifarResNet has no classifier: build it with num_class"):
        classifier_of(timm.create_model("cifar_resnet8", num_classes=0))
    with pytest.raises(ValueError, match="Sequential does not say which.*get_classifier"):
        classifier_of(nn.Sequential(nn.Linear(2, 3)))
    with torch.device("meta"):
        distilled = build_network("deit_tiny_distilled_patch16_224", num_classes=5)
        branches = build_network("crossvit_tiny_240", num_classes=5)
    with pytest.raises(ValueError, match="answers with a tuple, not with one module"):
        classifier_of(distilled)
    with pytest.raises(ValueError, match="answers with a ModuleList, not with one module"):
        classifier_of(branches)


def test_timm_is_needed_only_to_build():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from sssd.classification import Capture, build_network\n"
        "try: build_network('resnet18', num_classes=2)\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert "timm, which is not installed: run pip install 'sssd[classification]'" in run.stdout


def test_an_option_that_a_network_does_not_take_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"'resnet10t' cannot be made with foo 1 .*NETWORK_OPTIONS"
    ):
        build_network("resnet10t", num_classes=3, foo=1)
