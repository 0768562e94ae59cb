"""What the terms see of a step, made of small networks; even the constants carry a graph here."""

import torch

from sssd.classification import Batch, Capture, Surroundings, Terms, build_network, build_terms

CLASSES = 10
SHAPE = (3, 8, 8)
LABELS = torch.tensor([2, 0, 9, 2])


def make_network(name="cifar_resnet8", seed=0):
    torch.manual_seed(seed)
    return build_network(name, num_classes=CLASSES)


def make_surroundings(student="cifar_resnet8", teacher="cifar_resnet14", num_peers=0):
    return Surroundings(
        student=make_network(student),
        teacher=make_network(teacher, seed=1).eval() if teacher else None,
        num_classes=CLASSES,
        image_shape=SHAPE,
        num_peers=num_peers,
        new_network=lambda: build_network(student, num_classes=CLASSES),
    )


def make_terms(surroundings, *specs, max_iter=100):
    torch.manual_seed(2)
    return build_terms(list(specs), surroundings, max_iter)


def build_term(name, options, surroundings):
    return make_terms(surroundings, {"name": name, **options})[name].train()


def total(value):
    return sum(value.values()) if isinstance(value, dict) else value


def make_batch(terms, surroundings, progress=0.0):
    """The student's pass, and all that ``terms`` may ask for.

    Teacher, peers and pair require gradients, so that one which reaches them shows.
    """
    terms = terms if isinstance(terms, Terms) else Terms({"term": terms}, {})
    dtype = next(surroundings.student.parameters()).dtype
    generator = torch.Generator().manual_seed(3)
    images, pair = torch.randn(2, len(LABELS), *SHAPE, generator=generator, dtype=dtype).unbind()
    batch = Batch(images.requires_grad_(), LABELS, surroundings.student, progress=progress)
    batch.pair = pair.requires_grad_()
    batch.features = Capture(batch.student, terms.layers("student"))
    with batch.features:
        batch.logits = batch.student(batch.images)
    batch.teacher = surroundings.teacher
    if batch.teacher is not None:
        batch.teacher_features = Capture(batch.teacher, terms.layers("teacher"))
        with batch.teacher_features:
            batch.teacher_logits = batch.teacher(batch.images)
    batch.peers = [
        torch.randn(len(LABELS), CLASSES, generator=generator, dtype=dtype).requires_grad_()
        for _ in range(surroundings.num_peers)
    ]
    return batch


def gradients(loss, inputs):
    """Gradients by tensors or by the parameters of a module; None where there is none."""
    inputs = list(inputs.parameters()) if isinstance(inputs, torch.nn.Module) else list(inputs)
    return torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=True)
