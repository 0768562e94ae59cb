"""Leaving a network early gives what its heads say in a full pass, and runs nothing after."""

import pytest
import torch
from torch import nn

from sssd.classification.early_exit import Cost, EarlyExit, EveryExit, cost_of, early_exits
from tests.classification.steps import (
    SHAPE,
    make_batch,
    make_network,
    make_surroundings,
    make_terms,
)

BYOT = {"name": "own_teacher", "layers": ["layer1", "layer2"], "deepest": "layer3"}


def trained(network="cifar_resnet8", spec=BYOT):
    """A network, its term, and statistics of BatchNorm that are not the first ones."""
    surroundings = make_surroundings(network, teacher=None)
    terms = make_terms(surroundings, spec)
    batch = make_batch(terms, surroundings)
    terms["own_teacher"].predict(batch)  # in training mode: the heads' statistics move as well
    surroundings.student.eval()
    terms.eval()
    return surroundings, terms


@pytest.mark.parametrize(
    ("network", "layers", "deepest"),
    [
        ("cifar_resnet8", ["layer1", "layer2"], "layer3"),
        ("cifar_wrn_16_1", ["layer1.1.conv2", "layer2"], "layer3"),  # one of them is deep inside
        ("mobilenetv3_small_050", ["blocks.0", "blocks.0.0.se"], "blocks.1"),
    ],
)
def test_exits_say_exactly_what_the_heads_say_in_a_full_pass(network, layers, deepest):
    spec = {"name": "own_teacher", "layers": layers, "deepest": deepest}
    surroundings, terms = trained(network, spec)
    batch = make_batch(terms, surroundings)
    expected = terms["own_teacher"].predict(batch)
    exits = early_exits(surroundings.student, terms["own_teacher"])
    assert list(exits) == ["head1", "head2"]
    for name, early_exit in exits.items():
        assert torch.equal(early_exit.eval()(batch.images), expected[name]), name
    # The network is not changed by being left: no hook stays, and its logits are as before.
    assert torch.equal(surroundings.student(batch.images), batch.logits)


def test_layers_after_the_exit_do_not_run():
    network = make_network().eval()
    ran = []
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    logits = EarlyExit(network, "layer2", head).eval()(torch.zeros(2, *SHAPE))
    assert logits.shape == (2, 5)
    assert ran[0] == "" and "layer1" in ran and "layer2.0.act2" in ran
    assert not any(name.startswith(("layer3", "fc", "global_pool")) for name in ran)


def test_gradients_of_an_exit_stop_where_it_does():
    network = make_network()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    EarlyExit(network, "layer1", head)(torch.ones(2, *SHAPE)).sum().backward()
    assert network.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.layer2.parameters())


def test_an_error_of_the_network_itself_passes_and_leaves_no_hook():
    network = make_network().eval()
    early_exit = EarlyExit(network, "layer2", nn.Identity())
    with pytest.raises(RuntimeError, match="channels"):
        early_exit(torch.zeros(1, 5, 8, 8))
    assert network(torch.zeros(1, *SHAPE)).shape == (1, 10)


def test_the_cost_of_a_small_network_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 10),
    )  # fmt: skip
    network.requires_grad_(False)  # frozen parameters count as well
    first = 4 * 3 * 9 * 8 * 8
    assert cost_of(network, (3, 8, 8)) == Cost(
        first + 6 * 2 * 9 * 3 * 3 + 6 * 10,
        (4 * 3 * 9 + 4) + (4 + 4) + (6 * 2 * 9 + 6) + (6 * 10 + 10),
    )
    # An exit after the first ReLU pays for what is before it, and for its head.
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    early_exit = EarlyExit(network, "2", head)
    assert cost_of(early_exit, (3, 8, 8)) == Cost(
        first + 4 * 10, (4 * 3 * 9 + 4) + (4 + 4) + (4 * 10 + 10)
    )
    whole = cost_of(network, (3, 8, 8))
    every = cost_of(EveryExit(network, {"head1": early_exit}), (3, 8, 8))
    assert every == Cost(whole.multiply_adds + 40, whole.parameters + 50)


def test_counting_changes_nothing():
    surroundings, terms = trained()
    early_exit = early_exits(surroundings.student, terms["own_teacher"])["head1"]
    early_exit.train()
    early_exit.head.bottleneck.eval()
    modes = [module.training for module in early_exit.modules()]
    before = {key: value.clone() for key, value in early_exit.state_dict().items()}
    cost_of(early_exit, SHAPE)
    assert [module.training for module in early_exit.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in early_exit.state_dict().items())
    assert all(parameter.grad is None for parameter in early_exit.parameters())


def test_errors_name_the_layer():
    network = make_network()
    for layer in ("layer9", "layer1:input", ""):
        with pytest.raises(ValueError, match=f"CifarResNet cannot be left after '{layer}': name"):
            EarlyExit(network, layer, nn.Identity())
    network.never = nn.ReLU()
    with pytest.raises(RuntimeError, match="The layer 'never' .* does not run"):
        EarlyExit(network, "never", nn.Identity())(torch.zeros(2, *SHAPE))
