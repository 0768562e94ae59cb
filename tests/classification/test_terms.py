"""Each term: its loss is the function of sssd.losses of the tensors that it names, and no more."""

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")

from sssd.classification import TERMS
from sssd.classification.term import term_class
from tests.classification.by_hand import CASES, FIRST
from tests.classification.steps import build_term, gradients, make_batch, make_surroundings, total

EVERY_TERM = pytest.mark.parametrize("name", FIRST)


def name_of(case):
    if isinstance(case, dict):
        return "-".join(key for key in case if "layer" not in key) or "plain"
    return case if isinstance(case, str) else ""


@pytest.fixture
def surroundings():
    return make_surroundings(num_peers=2)


def test_every_term_of_the_package_is_tested_here():
    term_class({"name": "kd"})
    package = {name for name, cls in TERMS.items() if cls.__module__.startswith("sssd.")}
    assert package == set(FIRST)


@pytest.mark.parametrize(("name", "options", "by_hand"), CASES, ids=name_of)
def test_the_value_is_that_of_the_loss_function(surroundings, name, options, by_hand):
    term = build_term(name, options, surroundings)
    batch = make_batch(term, surroundings, progress=0.125)
    torch.manual_seed(5)  # for the permutation
    value = term(batch)
    expected = by_hand(term, batch)
    assert total(value) != 0
    torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-7)
    network = term if name == "paraphraser" else surroundings.student
    for ours, theirs in zip(
        gradients(total(value), network), gradients(total(expected), network), strict=True
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@EVERY_TERM
def test_gradients_reach_the_student_and_no_constant(surroundings, name):
    term = build_term(name, FIRST[name], surroundings)
    batch = make_batch(term, surroundings, progress=1.0)
    loss = total(term(batch))
    learns = term if name == "paraphraser" else surroundings.student
    assert any(grad is not None and grad.any() for grad in gradients(loss, learns))
    # The paraphraser learns to rebuild what the teacher, which runs without a graph, has made.
    constants = [batch.pair, *batch.peers]
    constants += [] if name == "paraphraser" else list(surroundings.teacher.parameters())
    assert gradients(loss, constants) == (None,) * len(constants)
    # Every parameter of the term's own trains, but for the frozen ones.
    own = [p for p in term.parameters() if p.requires_grad]
    assert not own or all(grad is not None for grad in gradients(loss, own))


@EVERY_TERM
def test_a_step_leaves_all_networks_as_they_were(surroundings, name):
    term = build_term(name, FIRST[name], surroundings)
    batch = make_batch(term, surroundings)
    networks = [surroundings.student, surroundings.teacher]
    before = [{key: x.clone() for key, x in n.state_dict().items()} for n in networks]
    modes = [[m.training for m in n.modules()] for n in networks]
    features = dict(batch.features)
    total(term(batch)).backward()
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())
    assert [[m.training for m in n.modules()] for n in networks] == modes
    assert all(batch.features[key] is value for key, value in features.items())


@EVERY_TERM
def test_what_a_term_trains_is_no_part_of_the_networks(surroundings, name):
    term = build_term(name, FIRST[name], surroundings)
    networks = [*surroundings.student.parameters(), *surroundings.teacher.parameters()]
    assert not {id(p) for p in term.parameters()} & {id(p) for p in networks}
    kinds = {"hint", "paraphraser", "factor", "one", "own_teacher"}
    assert bool(list(term.parameters())) == (name in kinds)
