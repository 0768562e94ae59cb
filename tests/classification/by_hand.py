"""The loss of each term, written out with the functions of sssd.losses."""

import math

import torch
import torch.nn.functional as F

from sssd import losses

BEFORE_RELU = ["layer1.0.act2:input", ["layer2.0.act2:input", "layer2.1.act2:input"]]


def layer(batch, name, of_teacher=None):
    return batch.features[name], batch.teacher_features[of_teacher or name]


def boundaries(term, batch, factors, **options):
    pairs = [("layer1.0.act2:input",) * 2, ("layer2.0.act2:input", "layer2.1.act2:input")]
    return sum(
        factor * losses.activation_boundary_loss(*layer(batch, *pair), **options)
        for factor, pair in zip(factors, pairs, strict=True)
    )


def flow(batch, pool="max", norm="frobenius"):
    names = ["act1", "layer1", "layer2"]
    both = (batch.features, batch.teacher_features)
    student, teacher = ([features[name] for name in names] for features in both)
    return sum(
        losses.fsp_loss(
            losses.fsp_matrix(student[i], student[i + 1], pool=pool),
            losses.fsp_matrix(teacher[i], teacher[i + 1], pool=pool),
            norm=norm,
        )
        for i in range(2)
    )


def own_teacher(term, batch, feature_weight=0.03, reduction="norm", **options):
    heads = [head(batch.features[f"layer{i + 1}"]) for i, head in enumerate(term.heads)]
    deepest = batch.features["layer3"].mean((2, 3)).detach()
    parts = losses.own_teacher_loss(
        [logits for logits, _ in heads] + [batch.logits], batch.labels, **options
    )
    distances = [losses.self_feature_loss(x, deepest, reduction=reduction) for _, x in heads]
    return {**parts, "feature": feature_weight * sum(distances)}


def native_ensemble(term, batch, temperature=3.0, weight=1.0):
    trunk = batch.features[term.trunk]
    branches = torch.stack([batch.logits, *(branch(trunk) for branch in term.branches)], 1)
    return losses.one_loss(
        branches,
        term.gate(trunk),
        batch.labels,
        temperature=temperature,
        distill_weight=weight,
    )


def slope(network, images, labels):
    """J of a further pass: in training mode the statistics are the batch's, as in the first."""
    images = images.detach().requires_grad_()
    loss = F.cross_entropy(network(images), labels, reduction="sum")
    return torch.autograd.grad(loss, images, create_graph=True)[0]


def slope_from_teacher(term, batch):
    own = slope(batch.student, batch.images, batch.labels)
    teacher = slope(batch.teacher, batch.images, batch.labels)
    return (own - teacher.detach()).flatten(1).norm(dim=1).mean() / 2


def slope_from_mirror_image(term, batch):
    own = slope(batch.student, batch.images, batch.labels)
    mirrored = slope(batch.student, batch.images.flip(-1), batch.labels)
    return (own - mirrored.flip(-1)).flatten(1).norm(dim=1).mean() / 2


def pair(term, batch, temperature=4.0):
    target = batch.student(batch.pair).detach()
    return losses.kd_loss(batch.logits, target, temperature=temperature)


def permuted(term, batch):
    torch.manual_seed(5)
    teacher = losses.permute_dark_knowledge(batch.teacher_logits)
    return losses.kd_loss(batch.logits, teacher, temperature=1.0)


def hint(term, batch, reduction="half_channel_sum"):
    own, teacher = layer(batch, "layer1", "layer2")
    return losses.hint_loss(term.regressor(own), teacher, reduction=reduction)


def factor(term, batch, p=1):
    own, teacher = layer(batch, "layer3")
    return losses.factor_loss(term.translator(own), term.paraphraser(teacher), p=p)


def reconstruction(term, batch, error=F.mse_loss):
    features = batch.teacher_features["layer3"]
    return error(term.decoder(term.encoder(features)), features)


def each(function, *names, **options):
    """The sum of a function over layers."""
    return lambda term, batch: sum(function(*layer(batch, name), **options) for name in names)


def of_predictions(function, **options):
    return lambda term, batch: function(batch.logits, batch.teacher_logits, **options)


def tolerant(**options):
    return lambda term, batch: losses.tolerant_teacher_loss(batch.logits, batch.labels, **options)


TWO = {"layers": ["layer1", "layer3"]}
HINT = {"student_layer": "layer1", "teacher_layer": "layer2"}
FACTOR = {"student_layer": "layer3", "teacher_layer": "layer3"}
SECTIONS = {"layers": ["layer1", "layer2"], "deepest": "layer3"}
SCHEDULED = {"layer": "layer3", "ramp_up": 0.25}

CASES = [
    ("cross_entropy", {}, lambda t, b: F.cross_entropy(b.logits, b.labels)),
    (
        "cross_entropy",
        {"label_smoothing": 0.2},
        lambda t, b: F.cross_entropy(b.logits, b.labels, label_smoothing=0.2),
    ),
    ("confidence_penalty", {}, lambda t, b: losses.confidence_penalty(b.logits)),
    ("kd", {}, of_predictions(losses.kd_loss, temperature=4.0, t_square=True)),
    (
        "kd",
        {"temperature": 3.0, "t_square": False, "soft": "ce"},
        of_predictions(losses.soft_cross_entropy, temperature=3.0, t_square=False),
    ),
    ("hint", HINT, hint),
    (
        "hint",
        {**HINT, "regressor": "strided", "reduction": "mean"},
        lambda t, b: hint(t, b, reduction="mean"),
    ),
    ("attention", TWO, each(losses.attention_loss, "layer1", "layer3")),
    (
        "attention",
        {**TWO, "p": 1, "mode": "paper"},
        each(losses.attention_loss, "layer1", "layer3", p=1, mode="paper"),
    ),
    ("gradient_attention", {}, slope_from_teacher),
    ("gradient_symmetry", {}, slope_from_mirror_image),
    ("nst", TWO, each(losses.mmd_loss, "layer1", "layer3")),
    (
        "nst",
        {**TWO, "degree": 3, "offset": 1.0},
        each(losses.mmd_loss, "layer1", "layer3", degree=3, offset=1.0),
    ),
    (
        "nst",
        {**TWO, "kernel": "gaussian"},
        each(losses.mmd_loss, "layer1", "layer3", kernel="gaussian"),
    ),
    ("paraphraser", {"teacher_layer": "layer3"}, reconstruction),
    (
        "paraphraser",
        {"teacher_layer": "layer3", "norm": True, "error": "l1"},
        lambda t, b: reconstruction(t, b, F.l1_loss),
    ),
    ("factor", FACTOR, factor),
    ("factor", {**FACTOR, "p": 2, "norm": True, "rate": 1}, lambda t, b: factor(t, b, 2)),
    ("activation_boundaries", {"layers": BEFORE_RELU}, lambda t, b: boundaries(t, b, (1 / 2, 1))),
    (
        "activation_boundaries",
        {"layers": BEFORE_RELU, "margin": 2.0, "reduction": "element_mean"},
        lambda t, b: boundaries(t, b, (1 / 2, 1), margin=2.0, reduction="element_mean"),
    ),
    ("fsp", {"layers": ["act1", "layer1", "layer2"]}, lambda t, b: flow(b)),
    (
        "fsp",
        {"layers": ["act1", "layer1", "layer2"], "pool": "avg", "norm": "mean_square"},
        lambda t, b: flow(b, "avg", "mean_square"),
    ),
    ("rkd_distance", {}, each(losses.rkd_distance_loss, "embedding")),
    (
        "rkd_distance",
        {**TWO, "normalize": True},
        each(losses.rkd_distance_loss, "layer1", "layer3", normalize=True),
    ),
    ("rkd_angle", {}, each(losses.rkd_angle_loss, "embedding")),
    ("rkd_angle", {"normalize": True}, each(losses.rkd_angle_loss, "embedding", normalize=True)),
    (
        "cwtm",
        {},
        lambda t, b: losses.confidence_weighted_cross_entropy(b.logits, b.labels, b.teacher_logits),
    ),
    ("dkpp", {}, permuted),
    ("tolerant_teacher", {}, tolerant(k=5, eta=3 / 7)),
    ("tolerant_teacher", {"confidence": 0.7, "k": 3}, tolerant(k=3, eta=2.1 / 4.1)),
    ("tolerant_teacher", {"confidence": 1}, lambda t, b: F.cross_entropy(b.logits, b.labels)),
    (
        "mutual",
        {"target": "own"},
        lambda t, b: losses.mutual_learning_loss(b.logits, b.peers, target="own"),
    ),
    ("mutual", {}, lambda t, b: losses.mutual_learning_loss(b.logits, b.peers)),
    (
        "mutual",
        {"reduction": "sum"},
        lambda t, b: sum(losses.kd_loss(b.logits, peer, temperature=1.0) for peer in b.peers),
    ),
    ("one", SCHEDULED, lambda t, b: native_ensemble(t, b, weight=math.exp(-1.25))),
    (
        "one",
        {**SCHEDULED, "branches": 2, "ramp_up": 0, "temperature": 2.0},
        lambda t, b: native_ensemble(t, b, temperature=2.0),
    ),
    ("own_teacher", SECTIONS, own_teacher),
    (
        "own_teacher",
        {
            **SECTIONS,
            "alpha": 0.1,
            "temperature": 2.0,
            "t_square": False,
            "soft": "ce",
            "deepest_weight": 0.9,
            "feature_weight": 1e-6,
            "feature_reduction": "sum",
        },
        lambda t, b: own_teacher(
            t,
            b,
            1e-6,
            "sum",
            alpha=0.1,
            temperature=2.0,
            t_square=False,
            soft="ce",
            deepest_weight=0.9,
        ),
    ),
    ("class_pairs", {}, pair),
    ("class_pairs", {"temperature": 2.0}, lambda t, b: pair(t, b, 2.0)),
]
"""Name, options, and the loss by hand, of the term and the batch."""

FIRST = {name: options for name, options, _ in reversed(CASES)}
"""Of each term the first case."""
