"""What every loss of (student, teacher) must hold to."""

import torch
from torch.autograd import gradcheck


def random_tensor(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_logits(*shape, seed=0):
    return 2 * random_tensor(*shape, seed=seed)


def assert_gradient_reaches_the_student_alone(loss, student, teacher, numerically=True):
    student.requires_grad_()
    teacher.requires_grad_()
    of_student, of_teacher = torch.autograd.grad(
        loss(student, teacher), (student, teacher), allow_unused=True
    )
    assert of_student.abs().max() > 0
    assert of_teacher is None
    if numerically:
        assert gradcheck(lambda x: loss(x, teacher), student)


def assert_empty_batch_gives_zero_and_keeps_the_graph(loss, *shape):
    student = torch.zeros(0, *shape, requires_grad=True)
    value = loss(student, torch.zeros(0, *shape))
    value.backward()
    assert value.item() == 0
    assert student.grad.shape == student.shape
