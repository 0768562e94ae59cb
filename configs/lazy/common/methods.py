"""The methods around a detector: what MODEL.SSSD says in yacs configs.

Each takes the node of the student, the length of the run and the iterations at which the learning
rate decays, and LGD's two switches, which differ by detector.
"""

from detectron2.config import LazyCall as L

from sssd import Phases, distill
from sssd.losses import coefficient_schedule


def _method(student, max_iter, steps, distance, values, add_context_box, detach_appearance):
    step = len(values) > 1
    return L(distill)(
        student=student,
        teacher=dict(add_context_box=add_context_box, detach_appearance=detach_appearance),
        distance=distance,
        coefficient=L(coefficient_schedule)(
            name="step" if step else "constant",
            values=values,
            milestones=list(steps[:1]) if step else [],
        ),
        # LGD's; published for 180000 iterations
        phases=L(Phases.scaled)(
            max_iter=max_iter,
            no_distill_iters=30000,
            freeze_backbone_iters=20000,
            distill_off_iters=0,
        ),
    )


def sssd(student, max_iter, steps, add_context_box=False, detach_appearance=True):
    """SSSD: Jensen-Shannon distance, coefficient 75, then 100 (the second value is our choice)."""
    distance = dict(distance="js")
    values = [75.0, 100.0]
    return _method(student, max_iter, steps, distance, values, add_context_box, detach_appearance)


def sssd_efficient(student, max_iter, steps, activation_checkpoint=False, **switches):
    """SSSD at a fraction of its price (ours, docs/performance.md).

    What only training needs is computed in bfloat16, and is 128 channels wide inside. Faster R-CNN
    keeps none of its maps for its gradients.
    """
    model = sssd(student, max_iter, steps, **switches)
    model.teacher.refinement_dim = model.distance.adapter_dim = 128
    model.teacher_precision = "bfloat16"
    model.activation_checkpoint = activation_checkpoint
    return model


def sssd_fixed(student, max_iter, steps, add_context_box=False, detach_appearance=True):
    """SSSD with the best fixed coefficient of its paper."""
    distance = dict(distance="js")
    return _method(student, max_iter, steps, distance, [75.0], add_context_box, detach_appearance)


def lgd(student, max_iter, steps, add_context_box=False, detach_appearance=True):
    """LGD: mean squared error over all elements of all levels, coefficient 1."""
    distance = dict(distance="mse", level_reduction="elements", mask_padding=False)
    return _method(student, max_iter, steps, distance, [1.0], add_context_box, detach_appearance)


def lgd_stepwise(student, max_iter, steps, add_context_box=False, detach_appearance=True):
    """LGD with a step-wise coefficient, as SSSD's paper tests it.

    The paper does not print the two values: the second is our choice, with SSSD's ratio.
    """
    distance = dict(distance="mse", level_reduction="elements", mask_padding=False)
    values = [1.0, 4 / 3]
    return _method(student, max_iter, steps, distance, values, add_context_box, detach_appearance)


def labelenc_step1(student, train, lr_multiplier, warmup=30000):
    """LabelEnc's first step: the encoder learns through the heads, the distance after a warm-up.

    The warm-up is added to the schedule, so that this changes ``train`` and ``lr_multiplier``.
    """
    before, train.max_iter = train.max_iter, train.max_iter + warmup
    milestones = lr_multiplier.scheduler.milestones
    lr_multiplier.scheduler.milestones = [x + warmup for x in milestones]
    lr_multiplier.warmup_length *= before / train.max_iter
    return _labelenc(student, train, [0.0, 1.0], warmup, dict(augment_scales=True))


def labelenc_step2(student, train, lr_multiplier):
    """LabelEnc's second step: supervised by the encoder of step 1 until the last decay.

    Set train.first_step to the checkpoint of step 1.
    """
    last = lr_multiplier.scheduler.milestones[-2]
    return _labelenc(student, train, [1.0, 0.0], last, dict(frozen=True))


def _labelenc(student, train, values, milestone, teacher):
    return L(distill)(
        student=student,
        teacher=dict(name="label_map", **teacher),
        distance=dict(distance="mse", norm="layer", level_reduction="elements", mask_padding=False),
        coefficient=L(coefficient_schedule)(name="step", values=values, milestones=[milestone]),
        phases=L(Phases)(max_iter=train.max_iter),
    )
