import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad, gradcheck

from sssd.losses.gradients import (
    gradient_attention_loss,
    gradient_symmetry_loss,
    input_gradient,
    input_gradient_of_logits,
)

LABELS = torch.tensor([2, 0, 1])


def random_images(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def conv_net(seed=0, norm=nn.Identity):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        norm(5) if norm is not nn.Identity else norm(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).double()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x):  # (B, cells, 4)
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v).mean((1, 2))


def test_closed_form_of_a_linear_network():
    # d CE / dx = W^T (softmax(W x + b) - y), of each image.
    network = nn.Linear(4, 3).double()
    images = random_images(3, 4)
    logits, gradient = input_gradient(network, images, LABELS)
    error = torch.softmax(network(images), 1) - F.one_hot(LABELS, 3)
    torch.testing.assert_close(gradient, error @ network.weight)
    torch.testing.assert_close(logits, network(images))


def test_the_gradient_of_an_image_does_not_depend_on_the_batch():
    network, images = conv_net(), random_images(3, 2, 4, 6)
    _, together = input_gradient(network, images, LABELS)
    alone = [input_gradient(network, images[i : i + 1], LABELS[i : i + 1])[1] for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    # Nor with fixed statistics of a batch normalisation; its own couple the images, and the
    # gradient is of the sum of the losses.
    network = conv_net(norm=nn.BatchNorm2d).eval()
    _, together = input_gradient(network, images, LABELS)
    _, alone = input_gradient(network, images[:1], LABELS[:1])
    torch.testing.assert_close(together[:1], alone)
    network.train()
    _, coupled = input_gradient(network, images, LABELS)
    images.requires_grad_()
    (mean,) = grad(F.cross_entropy(network(images), LABELS), images)
    torch.testing.assert_close(coupled, 3 * mean)
    assert (coupled - together).abs().max() > 1e-3


def test_second_derivatives():
    network = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3)).double()
    images = random_images(3, 4).requires_grad_()
    teacher = random_images(3, 4, seed=1)

    def run(images, *parameters):
        names = [name for name, _ in network.named_parameters()]
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(network, state, images)

    def gradient(images, *parameters):
        return input_gradient_of_logits(run(images, *parameters), images, LABELS, create_graph=True)

    inputs = (images, *network.parameters())
    # The derivative of J is the second of the cross-entropy.
    assert gradcheck(gradient, inputs)
    assert gradcheck(lambda *x: gradient_attention_loss(gradient(*x), teacher), inputs)


@pytest.mark.parametrize("norm", [nn.Identity, nn.BatchNorm2d])
@pytest.mark.parametrize("training", [False, True])
def test_the_student_learns_and_the_teacher_does_not(norm, training):
    student, teacher = conv_net(norm=norm).train(training), conv_net(seed=1, norm=norm).eval()
    images = random_images(3, 2, 4, 6)
    with torch.no_grad():  # as the caller runs a teacher
        teacher_logits, target = input_gradient(teacher, images, LABELS)
    logits, gradient = input_gradient(student, images, LABELS, create_graph=True)
    assert not (teacher_logits.requires_grad or target.requires_grad or images.requires_grad)
    modules = (student, teacher)
    assert all(p.grad is None for module in modules for p in module.parameters())

    # As a weight takes a small step, the loss goes where its derivative says.
    weight = student[0].weight
    loss = gradient_attention_loss(gradient, target)
    (slope,) = grad(loss, weight, retain_graph=True)
    step = 1e-6 * slope / slope.norm()
    values = []
    for sign in (1, -1):
        weight.data += sign * step
        _, moved = input_gradient(student, images, LABELS)
        values.append(gradient_attention_loss(moved, target).item())
        weight.data -= sign * step
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope.norm().item(), rel=1e-5)

    # One pass of the student is enough: its logits have the graph of the cross-entropy.
    (F.cross_entropy(logits, LABELS) + loss).backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_target_is_a_constant_and_the_mirror_image_is_not():
    a, b = (random_images(2, 3, 4, 4, seed=i).requires_grad_() for i in range(2))
    of_a, of_b = grad(gradient_attention_loss(a, b), (a, b), allow_unused=True)
    assert of_a.abs().max() > 0
    assert of_b is None
    of_a, of_b = grad(gradient_symmetry_loss(a, b), (a, b))
    torch.testing.assert_close(of_b, -of_a.flip(-1))


def test_losses_by_hand():
    # Norms 5 and 0 (root of 3^2 + 4^2): the mean is 5/2, and half of it 5/4.
    student = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]], [[[1.0, 2.0]], [[3.0, 4.0]]]])
    teacher = torch.stack([torch.zeros(2, 1, 2), student[1]])
    assert gradient_attention_loss(student, teacher).item() == pytest.approx(5 / 4, rel=1e-6)
    # The mirror image of the second: the rows (1, 2) and (3, 4) are (2, 1) and (4, 3).
    mirrored = torch.stack([teacher[0], student[1].flip(-1)])
    assert gradient_symmetry_loss(student, mirrored).item() == pytest.approx(5 / 4, rel=1e-6)
    assert gradient_symmetry_loss(student[1:], student[1:]).item() == pytest.approx(1)


def test_a_network_that_does_not_see_mirror_images_is_symmetric():
    images = random_images(3, 2, 4, 6)

    class Symmetric(nn.Module):
        def forward(self, x):
            return network(x) + network(x.flip(-1))

    network = conv_net()
    for module, symmetric in ((Symmetric(), True), (network, False)):
        _, gradient = input_gradient(module, images, LABELS)
        _, flipped = input_gradient(module, images.flip(-1), LABELS)
        value = gradient_symmetry_loss(gradient, flipped).item()
        assert value < 1e-15 if symmetric else value > 1e-3


@pytest.mark.parametrize("loss", [gradient_attention_loss, gradient_symmetry_loss])
def test_equal_gradients_and_empty_batches_have_a_gradient_of_zero(loss):
    for size in (2, 0):
        gradient = random_images(size, 3, 4, 4).requires_grad_()
        other = gradient.detach().flip(-1) if loss is gradient_symmetry_loss else gradient.detach()
        value = loss(gradient, other)
        assert value.item() == 0
        (slope,) = grad(value, gradient)
        assert slope.shape == gradient.shape
        assert not slope.any()


def test_an_empty_batch_of_images():
    network = conv_net()
    logits, gradient = input_gradient(
        network, random_images(0, 2, 4, 6), LABELS[:0], create_graph=True
    )
    assert (logits.shape, gradient.shape) == ((0, 3), (0, 2, 4, 6))
    gradient_attention_loss(gradient, gradient.detach()).backward()


def test_autocast_is_off_and_half_precision_is_computed_in_float32():
    network, images = conv_net().float(), random_images(3, 2, 4, 6).half()
    expected = input_gradient(network, images.float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for x in (images, images.float()):
            for result, reference in zip(input_gradient(network, x, LABELS), expected, strict=True):
                assert result.dtype == torch.float32
                assert torch.equal(result, reference)


def test_attention_can_be_differentiated_twice():
    network = Attention()
    images, labels = random_images(3, 5, 4, dtype=torch.float32), LABELS
    _, gradient = input_gradient(network, images, labels, create_graph=True)
    gradient_attention_loss(gradient, torch.zeros_like(gradient)).backward()
    assert network.project.weight.grad.abs().max() > 0
    # Its fused kernels cannot: the reason for the other path.
    images.requires_grad_()
    gradient = input_gradient_of_logits(network(images), images, labels, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        gradient_attention_loss(gradient, torch.zeros_like(gradient)).backward()


def test_errors_name_the_fix():
    network, images = conv_net(), random_images(3, 2, 4, 6)
    with pytest.raises(ValueError, match=r"set images\.requires_grad_\(\)"):
        input_gradient_of_logits(network(images), images, LABELS)
    with pytest.raises(ValueError, match="there is no input gradient"):
        input_gradient(torch.no_grad()(network), images, LABELS)
    with pytest.raises(ValueError, match="there is no input gradient"):
        input_gradient(lambda x: network(x.detach()), images, LABELS)
    for loss in (gradient_attention_loss, gradient_symmetry_loss):
        with pytest.raises(
            ValueError, match=r"equal shapes, got \(3, 2, 4, 6\) and \(1, 2, 4, 6\)"
        ):
            loss(images, images[:1])
