"""LGD's patterns of the relation adapter: what each is made of, and that nothing is left over."""

import pytest
import torch
import torch.nn.functional as F

from sssd.teacher.fusion import INTERACTIONS, RelationAdapter
from tests.teacher.scenes import NUM_CLASSES, STRIDES, pyramid, scene, small_teacher

ATTENDING = ("student_guided", "label_guided")
FILLING = ("label_fill", "student_fill")
VALID = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])


def adapter(interaction, **options):
    torch.manual_seed(0)
    module = RelationAdapter(embed_dim=8, num_heads=2, interaction=interaction, **options)
    if module.attention is not None:
        torch.nn.init.normal_(module.attention.in_proj_bias, std=0.5)
    return module


def embeddings(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def modules_of(teacher):
    """The modules with parameters, two names deep: "relation_adapter.attention" and the like."""
    return {".".join(name.split(".")[:2]) for name, _ in teacher.named_parameters()}


# ---- The adapter ----


def test_label_guided_is_attention_of_labels_to_the_appearance_of_their_image_and_level():
    module = adapter("label_guided")
    appearance, labels = embeddings(4, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    fused = module(appearance, labels, VALID)
    assert fused.shape == (4, 3, 3, 8)
    for level in range(4):
        for image in range(2):
            queries = module.label_projection(labels[image, VALID[image]])
            keys = appearance[level, image, VALID[image]]
            expected, _ = module.attention(queries[None], keys[None], keys[None])
            torch.testing.assert_close(fused[level, image, VALID[image]], expected[0])
    assert fused.isfinite().all()


@pytest.mark.parametrize("interaction", ATTENDING)
def test_what_is_painted_is_made_of_the_keys(interaction):
    # The softmax over a single key is 1, whatever the query: only the key's value remains.
    module = adapter(interaction)
    appearance, labels = embeddings(2, 1, 1, 8), embeddings(1, 1, 8, seed=2)
    fused = module(appearance, labels, torch.tensor([[True]]))
    projected = module.label_projection(labels)
    keys = projected.expand(2, 1, 1, 8) if interaction == "student_guided" else appearance
    weight, bias = module.attention.in_proj_weight[16:], module.attention.in_proj_bias[16:]
    expected = module.attention.out_proj(F.linear(keys, weight, bias))
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("interaction", ATTENDING)
def test_label_residual_adds_the_objects_own_projected_label(interaction):
    plain, residual = adapter(interaction), adapter(interaction, label_residual=True)
    appearance, labels = embeddings(4, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    expected = plain(appearance, labels, VALID) + plain.label_projection(labels)
    torch.testing.assert_close(residual(appearance, labels, VALID), expected)


def test_label_fill_is_the_projected_label_on_all_levels():
    module, labels = adapter("label_fill"), embeddings(3, 3, 8, seed=2)
    linear = module.label_projection[0]
    x = labels @ linear.weight.T + linear.bias
    centred = x - x.mean(-1, keepdim=True)
    expected = (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(module(None, labels, VALID), expected[None])


def test_student_fill_is_the_appearance():
    module, appearance = adapter("student_fill"), embeddings(4, 3, 3, 8)
    assert torch.equal(module(appearance, None, VALID), appearance)
    assert not list(module.parameters())


@pytest.mark.parametrize("interaction", ATTENDING)
def test_attention_sees_neither_padding_nor_other_images(interaction):
    module = adapter(interaction)
    appearance, labels = embeddings(2, 3, 3, 8), embeddings(3, 3, 8, seed=2)
    before = module(appearance, labels, VALID)
    appearance[:, ~VALID] = 50.0
    labels[~VALID] = -50.0
    appearance[:, 1] += 1
    labels[1] -= 2
    after = module(appearance, labels, VALID)
    assert torch.equal(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1, :2], before[:, 1, :2])


# ---- Options ----


def test_an_unknown_pattern_is_an_error_that_lists_the_known_ones():
    message = (
        r"MODEL.SSSD.TEACHER.INTERACTION is 'stuGuided'; use one of student_guided, label_guided, "
        "label_fill, student_fill"
    )
    with pytest.raises(ValueError, match=message):
        small_teacher(interaction="stuGuided")


@pytest.mark.parametrize("interaction", FILLING)
def test_a_residual_needs_attention(interaction):
    message = f"LABEL_RESIDUAL .* INTERACTION '{interaction}' has no attention; set LABEL_RESIDUAL"
    with pytest.raises(ValueError, match=message):
        small_teacher(interaction=interaction, label_residual=True)


def test_the_number_of_heads_matters_to_attention_alone():
    for interaction in FILLING:
        RelationAdapter(embed_dim=100, num_heads=8, interaction=interaction)
    with pytest.raises(ValueError, match="not a multiple of its 8 attention heads"):
        RelationAdapter(embed_dim=100, num_heads=8, interaction="label_guided")


# ---- The teacher ----


def test_what_a_pattern_does_not_use_does_not_exist():
    full = modules_of(small_teacher())
    assert {"relation_adapter.attention", "relation_adapter.label_projection"} < full
    assert modules_of(small_teacher(interaction="label_guided")) == full
    assert modules_of(small_teacher(interaction="label_fill")) == {
        name
        for name in full
        if name != "relation_adapter.attention" and not name.startswith("appearance_encoder")
    }
    assert modules_of(small_teacher(interaction="student_fill")) == {
        name for name in full if not name.startswith(("relation_adapter", "label_encoder"))
    }


@pytest.mark.parametrize("counts", [(3, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_parameter_gets_a_finite_gradient(counts, context, interaction):
    # DistributedDataParallel waits for a gradient of each parameter in each iteration.
    teacher = small_teacher(interaction=interaction, add_context_box=context)
    maps = teacher(pyramid(2), scene(*counts))
    weight = embeddings(16, 1, 1)  # not the plain sum, which the last normalisation keeps constant
    sum((x * weight).sum() for x in maps.values()).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # With objects, each also learns: nothing hangs on by a factor of 0.
        assert counts != (3, 1) or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("detach", [False, True])
def test_the_student_gets_a_gradient_through_appearance_alone(interaction, detach):
    teacher = small_teacher(interaction=interaction, detach_appearance=detach)
    features = {level: x.requires_grad_() for level, x in pyramid(2).items()}
    maps = teacher(features, scene(3, 2))
    sum((x * embeddings(16, 1, 1)).sum() for x in maps.values()).backward()
    for x in features.values():
        reached = x.grad is not None and bool(x.grad.abs().max() > 0)
        assert reached == (interaction != "label_fill" and not detach)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_what_the_maps_depend_on(interaction):
    teacher, features, objects = small_teacher(interaction=interaction), pyramid(2), scene(4, 2)
    before = teacher(features, objects)
    others = teacher(features, objects._replace(classes=(objects.classes + 1) % NUM_CLASSES))
    elsewhere = teacher({level: x.flip(1) for level, x in features.items()}, objects)
    moved = teacher(features, objects._replace(boxes=objects.boxes / 2))
    # Differences on the finest level: on the coarsest, all objects may own the same cell.
    assert not torch.allclose(moved["lateral0"], before["lateral0"])
    for changed, without in [(others, "student_fill"), (elsewhere, "label_fill")]:
        if interaction == without:
            assert all(torch.equal(changed[level], before[level]) for level in STRIDES)
        else:
            assert not torch.allclose(changed["lateral0"], before["lateral0"])


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_an_image_without_objects_shows_nothing_of_its_slots(interaction):
    # Nor of the student's map: no object, nothing that it would be pooled for.
    teacher, features, objects = small_teacher(interaction=interaction), pyramid(2), scene(3, 0)
    before = teacher(features, objects)
    classes, boxes = objects.classes.clone(), objects.boxes.clone()
    classes[1], boxes[1] = 2, 30
    features = {level: torch.stack([x[0], -x[1]]) for level, x in features.items()}
    after = teacher(features, objects._replace(classes=classes, boxes=boxes))
    for level in STRIDES:
        assert torch.equal(after[level], before[level])
