"""What Capture records, and that it leaves the network as it was."""

import copy
import io
import pickle
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import Capture, build_network


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_network("cifar_resnet8", num_classes=10)


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hooks(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_outputs_inputs_and_embedding(network, images):
    network.eval()
    with Capture(network, ["layer1", "layer2.0.bn2", "layer3:input", "embedding"]) as capture:
        logits = network(images)
    stem = network.act1(network.bn1(network.conv1(images)))
    first = network.layer1(stem)
    second = network.layer2(first)
    block = network.layer2[0]
    assert torch.equal(capture["layer1"], first)
    assert torch.equal(capture["layer3:input"], second)
    # These two are written over in place by what follows: the shortcut and the ReLU.
    inner = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(first)))))
    assert torch.equal(capture["layer2.0.bn2"], inner) and (inner < 0).any()
    assert torch.equal(capture["embedding"], network.layer3(second).mean((2, 3)))
    assert torch.equal(network.fc(capture["embedding"]), logits)
    assert set(capture) == set(capture.layers) and len(capture) == 4


def test_input_of_an_inplace_relu(network, images):
    network.eval()
    assert network.layer1[0].act2.inplace
    names = ["layer1.0.act2:input", "layer1", "act1", "bn1", "act1:input"]
    with Capture(network, names) as capture:
        network(images)
    before = capture["layer1.0.act2:input"]
    assert (before < 0).any()
    assert torch.equal(before.relu(), capture["layer1"])
    block = network.layer1[0]
    residual = block.bn2(block.conv2(block.act1(block.bn1(block.conv1(capture["act1"])))))
    assert torch.equal(before, residual + capture["act1"])
    assert torch.equal(capture["bn1"], capture["act1:input"])
    assert torch.equal(capture["bn1"].relu(), capture["act1"])


def test_gradient_through_an_inplace_relu():
    network = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(inplace=True))
    network[0].weight.data = torch.tensor([[-2.0], [1.0], [3.0]])
    with Capture(network, ["0", "1:input", "1"]) as capture:
        network(torch.tensor([[1.0]]))
    assert capture["0"].tolist() == capture["1:input"].tolist() == [[-2.0, 1.0, 3.0]]
    # Squares: twice the value, the negative one included. After the ReLU it gets no gradient.
    for name, expected in (("0", [-4, 2, 6]), ("1:input", [-4, 2, 6]), ("1", [0, 2, 6])):
        (gradient,) = torch.autograd.grad(
            capture[name].square().sum(), network[0].weight, retain_graph=True
        )
        assert gradient.flatten().tolist() == expected


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cifar_resnet8", ["conv1", "bn1", "layer1.0.act2:input", "layer2", "embedding"]),
        ("cifar_wrn_16_1", ["conv1", "layer2.0.norm1.act:input", "layer3", "norm", "embedding"]),
        ("torchvision/resnet18", ["layer1.0.relu:input", "layer2.0.bn2", "layer4", "embedding"]),
    ],
)
def test_captured_networks_are_equal_in_every_bit(name, layers, images):
    torch.manual_seed(0)
    plain = build_network(name, num_classes=10)
    captured = copy.deepcopy(plain)
    names = list(captured.state_dict())
    expected = plain(images)
    expected.square().sum().backward()
    with Capture(captured, layers) as capture:
        logits = captured(images)
        assert list(captured.state_dict()) == names
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    for one, other in zip(plain.parameters(), captured.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    states = plain.state_dict(), captured.state_dict()  # with BatchNorm's statistics, moved once
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert len(capture) == len(layers) and hooks(captured) == 0


def test_no_grad_and_inference_mode(network, images):
    network.eval()
    with torch.no_grad(), Capture(network, ["layer1", "act1:input"]) as capture:
        network(images)
    assert not capture["layer1"].requires_grad
    with torch.inference_mode(), Capture(network, ["layer1", "act1:input"]) as other:
        network(images)
    assert torch.equal(capture["act1:input"], other["act1:input"])


def test_hooks_live_in_the_block_only(network, images):
    capture = Capture(network, ["layer1", "embedding"])
    assert hooks(network) == 0
    with capture:
        assert hooks(network) == 2
        network(images)
    assert hooks(network) == 0
    recorded = capture["layer1"]
    network(2 * images)
    assert capture["layer1"] is recorded
    with pytest.raises(ZeroDivisionError), capture:
        network(images)
        _ = 1 / 0
    assert hooks(network) == 0


def test_the_last_call_counts_and_clear_forgets(network, images):
    network.eval()
    capture = Capture(network, ["layer1", "layer1"])
    assert capture.layers == ("layer1",)
    with capture:
        network(images)
        first = dict(capture)
        network(2 * images)
        assert not torch.equal(first["layer1"], capture["layer1"])
        capture.clear()
        assert len(capture) == 0
        network(images)
    assert torch.equal(first["layer1"], capture["layer1"])
    capture.clear()
    with pytest.raises(KeyError, match="'layer1' has not run: call the network"):
        capture["layer1"]
    with capture:
        network(images)
    with capture:  # a new block starts empty, so that nothing of the last step is taken for new
        pass
    assert "layer1" not in capture
    with pytest.raises(KeyError, match="'layer2' is not captured.*which has layer1"):
        capture["layer2"]


def test_a_module_that_runs_twice(images):
    network = build_network("torchvision/resnet18", num_classes=10).eval()
    with Capture(network, ["layer1.0.relu:input", "layer1.0", "layer1.0.bn2"]) as capture:
        network(images)
    assert torch.equal(capture["layer1.0.relu:input"].relu(), capture["layer1.0"])


def test_nested_captures(network, images):
    outer, inner = Capture(network, ["layer1", "layer2"]), Capture(network, ["layer1"])
    with outer:
        with inner:
            network(images)
        assert hooks(network) == 2
        network(2 * images)
        with pytest.raises(RuntimeError, match="already recording"), outer:
            pass
        assert hooks(network) == 2
    assert hooks(network) == 0
    assert outer["layer1"].sum() > inner["layer1"].sum()


def test_copies_of_a_network_that_was_captured(network, images):
    with Capture(network, ["layer1", "embedding"]):
        network(images)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        torch.load(file, weights_only=False),
    ):
        assert hooks(other) == 0 and hooks(network) == 0
        assert list(other.state_dict()) == list(network.state_dict())


def test_copies_made_inside_the_block_record_nothing(network, images):
    network.eval()
    with Capture(network, ["layer1", "embedding"]) as capture:
        copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
        logits = network(images)
        recorded = capture["layer1"]
        for other in copies:
            assert torch.equal(other(images), logits)
            other(2 * images)
        assert capture["layer1"] is recorded
        assert b"Capture" not in pickle.dumps(network)


def test_copies_of_the_capture_belong_to_the_copied_network(images):
    model = nn.Module()
    model.network = build_network("cifar_resnet8", num_classes=10)
    model.capture = Capture(model.network, ["layer1"])
    with model.capture:
        model.network(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.capture.network is other.network is not model.network
        assert len(other.capture) == 0 and len(model.capture) == 1
        with other.capture:
            other.network(images)
        assert len(other.capture) == 1
    assert list(model.state_dict()) == [f"network.{key}" for key in model.network.state_dict()]


def test_a_replaced_classifier_is_followed(network, images):
    capture = Capture(network, ["embedding"])
    network.reset_classifier(3)
    with capture:
        network(images)
    assert capture["embedding"].shape == (4, 64)


def test_embedding_of_a_convolutional_classifier(images):
    network = build_network("resnetv2_18", num_classes=5).eval()
    with Capture(network, ["embedding"]) as capture:
        network(images)
    assert capture["embedding"].shape == (4, 512)


@pytest.fixture
def process_group():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_under_distributed_data_parallel(network, images):
    plain = copy.deepcopy(network)
    with Capture(plain, ["layer2"]) as capture:
        expected = plain(images)
    (expected.square().sum() + capture["layer2"].square().sum()).backward()

    earlier = Capture(network, ["layer2"])
    wrapped = DistributedDataParallel(network)
    for capture in (earlier, Capture(wrapped, ["layer2"])):
        wrapped.zero_grad()
        with capture:
            logits = wrapped(images)
        (logits.square().sum() + capture["layer2"].square().sum()).backward()
        for one, other in zip(plain.parameters(), network.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("layer5", "no layer 'layer5': it has conv1, bn1, act1, layer1, layer2, layer3, global_"),
        ("layer1.1.bn1", "no layer 'layer1.1.bn1': its 'layer1' has 0; 'embedding' means the"),
        ("layer1.0.downsample", "its 'layer1.0' has conv1, bn1, drop_block, act1, aa, conv2, bn2"),
        ("layer1.0.conv1.x", "its 'layer1.0.conv1' has nothing inside;"),
        ("num_classes", "no layer 'num_classes': it has conv1"),
        ("", "no layer '': it has conv1"),
        (":input", "no layer '': it has conv1"),
        ("layer1..bn1", "its 'layer1' has 0"),
        ("layer1:output", "ends in ':output': write 'layer1' for the output of the layer, or"),
    ],
)
def test_names_the_network_does_not_have(network, layer, sentence):
    with pytest.raises(ValueError) as caught:
        Capture(network, ["layer1", layer])
    assert sentence in str(caught.value) and str(caught.value).endswith(".")


def test_a_long_list_of_layers_is_cut():
    network = build_network("cifar_resnet110", num_classes=10)
    with pytest.raises(ValueError, match=r"its 'layer1' has 0, 1, .*, 11 and 6 more; "):
        Capture(network, ["layer1.18"])


class Two(nn.Module):
    def forward(self, x):
        return x, x


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.two, self.last = Two(), nn.Linear(2, 2)
        self.sum = nn.Module()
        self.sum.forward = sum

    def get_classifier(self):
        return self.last

    def forward(self, x):
        return self.last(self.sum(self.two(x)))


def test_what_is_no_tensor_is_named():
    network = Summed()
    for layer, sentence in (
        ("two", "The layer 'two' of the network Summed returns a tuple, not a tensor"),
        ("sum:input", "The layer 'sum:input' of the network Summed is given a tuple, not a"),
    ):
        with pytest.raises(TypeError, match=sentence), Capture(network, [layer]):
            network(torch.ones(3, 2))
        assert hooks(network) == 0
    with (
        pytest.raises(ValueError, match=r"given a map of shape \(3, 5, 2\), not a pooled"),
        Capture(network, ["embedding"]),
    ):
        network(torch.ones(3, 5, 2))


def test_an_argument_by_name(images):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(input=x)

    network = ByName()
    with Capture(network, ["inner:input"]) as capture:
        network(images)
    assert torch.equal(capture["inner:input"], images)
