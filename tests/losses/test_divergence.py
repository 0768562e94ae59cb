import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon

from sssd.losses import js_distance, js_divergence, kl_divergence, log_probabilities, mse
from sssd.losses.divergence import stable_root

DIVERGENCES = [kl_divergence, js_divergence, js_distance]

# The worked example: p = (1/2, 1/2), q = (1/4, 3/4), so m = (3/8, 5/8). In bits,
#   KL(p || q) = 1/2 log2(2) + 1/2 log2(2/3)                      = 0.20752
#   KL(q || p) = 1/4 log2(1/2) + 3/4 log2(3/2)                    = 0.18872
#   KL(p || m) = 1/2 log2(4/3) + 1/2 log2(4/5)                    = 0.04655
#   KL(q || m) = 1/4 log2(2/3) + 3/4 log2(6/5)                    = 0.05104
#   JS = (0.04655 + 0.05104) / 2                                  = 0.04879
#   JS distance = sqrt(0.04879)                                   = 0.22090
P = torch.tensor([[1 / 2, 1 / 2]], dtype=torch.float64).log()
Q = torch.tensor([[1 / 4, 3 / 4]], dtype=torch.float64).log()
KL_PQ, KL_QP, JS, JS_DISTANCE = 0.20752, 0.18872, 0.04879, 0.22090


def random_logits(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def gradient(value, *inputs):
    return torch.autograd.grad(value, inputs)


def test_worked_example():
    assert kl_divergence(P, Q, log_base=2).item() == pytest.approx(KL_PQ, abs=5e-6)
    assert kl_divergence(Q, P, log_base=2).item() == pytest.approx(KL_QP, abs=5e-6)
    assert js_divergence(P, Q).item() == pytest.approx(JS, abs=5e-6)
    assert js_distance(P, Q).item() == pytest.approx(JS_DISTANCE, abs=1e-5)


def test_base_of_the_logarithm_scales_the_divergence_and_not_its_root():
    bits = js_divergence(P, Q, log_base=2)
    nats = js_divergence(P, Q, log_base=math.e)
    torch.testing.assert_close(nats, bits * math.log(2))
    distance = js_distance(P, Q, log_base=math.e)
    torch.testing.assert_close(distance, nats.sqrt(), atol=1e-6, rtol=0)
    torch.testing.assert_close(kl_divergence(P, Q), kl_divergence(P, Q, log_base=2) * math.log(2))


def test_temperature_divides_the_logits():
    # Logits (0, ln 9): 1/10 and 9/10 at temperature 1; (0, ln 3), so 1/4 and 3/4, at 2.
    logits = torch.tensor([0.0, math.log(9)])
    torch.testing.assert_close(log_probabilities(logits, dim=0).exp(), torch.tensor([0.1, 0.9]))
    softened = log_probabilities(logits, dim=0, temperature=2.0).exp()
    torch.testing.assert_close(softened, torch.tensor([0.25, 0.75]))
    p, q = random_logits(3, 5), random_logits(3, 5, seed=1)
    for function in DIVERGENCES:
        torch.testing.assert_close(function(p, q, temperature=4.0), function(p / 4, q / 4))


def test_disjoint_distributions_are_one_bit_apart():
    p = torch.tensor([[1000.0, -1000.0]])
    assert js_divergence(p, -p).item() == pytest.approx(1, abs=1e-6)
    assert js_divergence(p, -p, log_base=math.e).item() == pytest.approx(math.log(2), abs=1e-6)
    assert js_distance(p, -p).item() == pytest.approx(1, abs=2e-6)
    # KL has no bound: the log-probability of what q excludes is -2000.
    assert kl_divergence(p, -p).item() == pytest.approx(2000)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_js_distance_equals_scipy(dim):
    p, q = random_logits(4, 5, 6), random_logits(4, 5, 6, seed=1)
    expected = jensenshannon(
        torch.softmax(p, dim).numpy(), torch.softmax(q, dim).numpy(), base=2, axis=dim
    )
    exact = js_distance(p, q, dim=dim, eps=0.0).numpy()
    np.testing.assert_allclose(exact, expected, rtol=1e-12)
    # By default the slope at 0 is limited, which moves a value by less than sqrt(eps) = 1e-6.
    np.testing.assert_allclose(js_distance(p, q, dim=dim).numpy(), expected, atol=1e-6, rtol=0)
    single = js_distance(p.float(), q.float(), dim=dim)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_divergence_equals_torch(temperature):
    p, q = random_logits(4, 5, 6), random_logits(4, 5, 6, seed=1)
    pointwise = F.kl_div(
        torch.log_softmax(q / temperature, 1), torch.softmax(p / temperature, 1), reduction="none"
    )

    def ours(reduction):
        return kl_divergence(p, q, temperature=temperature, reduction=reduction)

    torch.testing.assert_close(ours("none"), pointwise.sum(1))
    torch.testing.assert_close(ours("sum"), pointwise.sum())
    torch.testing.assert_close(ours("mean"), pointwise.sum(1).mean())
    torch.testing.assert_close(ours("element_mean"), pointwise.mean())


@pytest.mark.parametrize("function", DIVERGENCES)
def test_reductions_by_hand(function):
    # Two distributions of two elements each: the worked example, and p against itself (0).
    p, q = torch.cat([P, P]), torch.cat([Q, P])
    value = function(P, Q).item()
    torch.testing.assert_close(function(p, q), p.new_tensor([value, 0]))
    assert function(p, q, reduction="sum").item() == pytest.approx(value)
    assert function(p, q, reduction="mean").item() == pytest.approx(value / 2)
    assert function(p, q, reduction="element_mean").item() == pytest.approx(value / 4)


def test_mse_by_hand():
    # The squared differences are 0, 4, 9, 16.
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert mse(a, b).item() == 29 / 4
    assert mse(a, b, reduction="none").tolist() == [[0, 4], [9, 16]]
    assert mse(a, b, dim=1, reduction="none").tolist() == [4, 25]
    assert mse(a, b, dim=1).item() == 29 / 2
    assert mse(a, b, dim=1, reduction="element_mean").item() == 29 / 4
    assert mse(a, b, dim=(0, 1), reduction="sum").item() == 29


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_js_is_symmetric_and_bounded(scale):
    p = random_logits(50, 7, dtype=torch.float32, scale=scale)
    q = random_logits(50, 7, dtype=torch.float32, scale=scale, seed=1)
    for function in (js_divergence, js_distance):
        value = function(p, q)
        assert torch.equal(value, function(q, p))
        assert value.min() >= 0
        assert value.max() <= 1 + 1e-6
    assert js_divergence(p, q, log_base=math.e).max() <= math.log(2) + 1e-6


def test_js_distance_is_a_metric():
    p, q, r = (random_logits(500, 4, seed=seed, scale=4) for seed in range(3))
    direct = js_distance(p, r, eps=0.0)
    assert (direct <= js_distance(p, q, eps=0.0) + js_distance(q, r, eps=0.0) + 1e-12).all()


def test_adding_a_constant_along_the_axis_changes_nothing():
    p, q = random_logits(4, 5), random_logits(4, 5, seed=1)
    for function in DIVERGENCES:
        torch.testing.assert_close(function(p + 3, q - 2), function(p, q))


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("channels", "scale"), [(256, 1.0), (256, 5.0), (7, 30.0), (2, 0.0)])
def test_equal_inputs_give_zero_and_a_zero_gradient(function, dtype, channels, scale):
    p = random_logits(20, channels, dtype=dtype, scale=scale).requires_grad_()
    q = p.detach().clone().requires_grad_()
    value = function(p, q)
    assert value.abs().max() == 0
    for grad in gradient(value.sum(), p, q):
        # KL's is p - q, which rounding leaves near 0; the root must not have to multiply that.
        assert grad.abs().max() <= (1e-6 if function is kl_divergence else 0)


@pytest.mark.parametrize("noise", [1e-6, 1e-5, 1e-4, 1e-3])
def test_rounding_of_nearly_equal_inputs_never_goes_below_zero(noise):
    p = random_logits(2000, 16, dtype=torch.float32).requires_grad_()
    q = p.detach() + random_logits(2000, 16, dtype=torch.float32, scale=noise, seed=1)
    assert js_divergence(p, q).min() >= 0
    distance = js_distance(p, q)
    assert distance.min() >= 0
    (grad,) = gradient(distance.sum(), p)
    assert grad.isfinite().all()


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "element_mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(function, reduction, masked):
    p = random_logits(2, 4, 3).requires_grad_()
    q = random_logits(2, 4, 3, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, False, True], [True, False, True, True]])[:, :, None]
    options = {"temperature": 1.5, "reduction": reduction, "mask": mask if masked else None}
    assert torch.autograd.gradcheck(lambda p, q: function(p, q, **options), (p, q))


@pytest.mark.parametrize("dim", [None, 1, (0, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "element_mean"])
def test_mse_gradients(dim, reduction):
    a = random_logits(2, 3, 2).requires_grad_()
    b = random_logits(2, 3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mse(a, b, dim=dim, reduction=reduction), (a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_limits_of_the_range(dtype, masked):
    limit = torch.finfo(dtype).max
    p = torch.tensor([[limit, -limit, 0], [limit, limit, -limit]], dtype=dtype)
    q = torch.tensor([[-limit, limit, 0], [limit, limit, -limit]], dtype=dtype)
    p.requires_grad_()
    q.requires_grad_()
    mask = torch.tensor([True, True, False]) if masked else None
    for function in DIVERGENCES:
        value = function(p, q, mask=mask)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        for grad in gradient(value.sum(), p, q):
            assert grad.isfinite().all()
    # The first row: disjoint; the second: equal.
    expected = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(js_divergence(p, q, mask=mask), expected, atol=1e-6, rtol=0)


def test_excluded_elements_lose_against_the_least_finite_logit():
    least = -torch.finfo(torch.bfloat16).max
    logits = torch.tensor([least, least, 0.0], dtype=torch.bfloat16)
    mask = torch.tensor([True, True, False])
    probabilities = log_probabilities(logits, dim=0, mask=mask).exp()
    assert probabilities.tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_features_show_in_the_value(bad):
    p, q = torch.tensor([[bad, 0.0, 1.0]]), torch.zeros(1, 3)
    for function in DIVERGENCES:
        assert not function(p, q).isfinite().any()
    assert not mse(p, q).isfinite()


def test_mse_of_half_precision():
    a = torch.tensor([65504.0], dtype=torch.float16)
    assert mse(a, -a).item() == 131008.0**2
    b = torch.tensor([3e38], dtype=torch.bfloat16)
    assert mse(b, -b).item() == math.inf  # documented: the square does not fit into float32


@pytest.mark.parametrize("function", DIVERGENCES)
@pytest.mark.parametrize("hidden", [0.0, 1e4, math.nan, math.inf])
def test_masked_elements_take_no_part(function, hidden):
    p, q = random_logits(3, 5), random_logits(3, 5, seed=1)
    mask = torch.tensor([True, False, True, True, False])
    expected = function(p[:, mask], q[:, mask])
    p[:, ~mask] = hidden
    q[:, ~mask] = -hidden
    p.requires_grad_()
    value = function(p, q, mask=mask)
    torch.testing.assert_close(value, expected)
    (grad,) = gradient(value.sum(), p)
    assert grad[:, ~mask].abs().max() == 0
    assert grad.isfinite().all()


def test_a_distribution_without_elements_is_uniform():
    log_p = log_probabilities(torch.randn(2, 4), mask=torch.zeros(2, 4, dtype=torch.bool))
    torch.testing.assert_close(log_p, torch.full((2, 4), math.log(1 / 4)))


@pytest.mark.parametrize("function", [*DIVERGENCES, mse])
@pytest.mark.parametrize("reduction", ["mean", "sum", "element_mean"])
def test_empty_input_gives_zero_and_keeps_the_graph(function, reduction):
    p = torch.zeros(0, 4, requires_grad=True)
    value = function(p, torch.zeros(0, 4), reduction=reduction)
    value.backward()
    assert value.item() == 0
    assert p.grad.shape == (0, 4)


def test_root():
    # sqrt(9e-12 + 16e-12) - sqrt(16e-12) = 5e-6 - 4e-6
    assert stable_root(torch.tensor(9e-12), eps=16e-12).item() == pytest.approx(1e-6, rel=1e-6)
    x = torch.zeros((), requires_grad=True)
    value = stable_root(x)
    assert value.item() == 0
    (slope,) = gradient(value, x)
    assert slope.item() == pytest.approx(1 / (2 * 1e-6))
    assert stable_root(torch.tensor(4.0)).item() == pytest.approx(2, abs=1e-6)


def test_errors_name_the_value():
    p, q = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"temperature must be positive, got -1\.0"):
        kl_divergence(p, q, temperature=-1.0)
    with pytest.raises(ValueError, match=r"greater than 1, got 1\.0"):
        js_distance(p, q, log_base=1.0)
    with pytest.raises(ValueError, match="Unknown reduction 'average'"):
        js_divergence(p, q, reduction="average")
    for function in [*DIVERGENCES, mse]:
        with pytest.raises(ValueError, match=r"equal shapes, got \(2, 3\) and \(1, 3\)"):
            function(p, q[:1])
