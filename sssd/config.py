"""The config keys of sssd, all under MODEL.SSSD."""

from . import _detectron2  # noqa: F401

# isort: split
from detectron2.config import CfgNode as CN

__all__ = ["add_sssd_config"]


def add_sssd_config(cfg: CN) -> None:
    """Adds the keys of sssd to a Detectron2 config; call it right after ``get_cfg()``.

    The defaults are the published recipe for Faster R-CNN; where RetinaNet and FCOS differ,
    docs/method.md says so, and the configs have it. Where the paper does not give a value, the
    comment says whose choice it is.
    """
    cfg.MODEL.SSSD = CN()

    # Registered name of the stock meta-architecture that is trained (the student). Use it with
    # MODEL.META_ARCHITECTURE: "SelfDistiller".
    cfg.MODEL.SSSD.STUDENT = "GeneralizedRCNN"
    # Number of classes of the ground truth; 0 takes the student's own.
    cfg.MODEL.SSSD.NUM_CLASSES = 0
    # Names of the pyramid levels to distill, such as ["p3", "p4"]; empty for all.
    cfg.MODEL.SSSD.LEVELS = []
    # Your own data in COCO format, for DATASETS.TRAIN and TEST: [name, annotation file, image
    # folder] of each set. They are registered when the config is read; by tools/*.py, that is.
    cfg.MODEL.SSSD.COCO_DATASETS = []

    # ---- The training-only branch that turns labels and maps into the second pyramid ----
    cfg.MODEL.SSSD.TEACHER = CN()
    # Registered name of the teacher: "label_encoding" (LGD, SSSD; its options follow) or
    # "label_map" (LabelEnc; options under MODEL.SSSD.LABEL_MAP).
    cfg.MODEL.SSSD.TEACHER.NAME = "label_encoding"
    # Leave the teacher as it is, without a pass of its own through the heads (LabelEnc's step 2).
    cfg.MODEL.SSSD.TEACHER.FROZEN = False
    # Checkpoint of LabelEnc's step 1, from which step 2 takes teacher, FPN and heads.
    cfg.MODEL.SSSD.TEACHER.WEIGHTS = ""
    # Factor on the detection losses of the teacher's pass.
    cfg.MODEL.SSSD.TEACHER.LOSS_WEIGHT = 1.0
    # Whether these losses train the student's heads as well (LGD), or pass through them to the
    # teacher alone (ours). With False and DETACH_APPEARANCE, the distance is all that the student
    # gets from the teacher.
    cfg.MODEL.SSSD.TEACHER.TRAINS_HEADS = True
    # "float32", or "bfloat16" for what only training needs: the teacher, its pass through the heads
    # and the student's adapter. The student's own pass keeps its precision. With SOLVER.AMP all has
    # that of SOLVER.AMP_PRECISION.
    cfg.MODEL.SSSD.TEACHER.PRECISION = "float32"
    # Activation checkpointing: the maps inside teacher and adapter are not kept, but computed a
    # second time for their gradients. The same function in less memory and more time.
    cfg.MODEL.SSSD.TEACHER.ACTIVATION_CHECKPOINT = False
    # Width of the object embeddings; 0 for the pyramid's width.
    cfg.MODEL.SSSD.TEACHER.EMBED_DIM = 0
    # Width of the maps that the teacher refines, before the last convolution; 0 for the pyramid's
    # width (LGD).
    cfg.MODEL.SSSD.TEACHER.REFINEMENT_DIM = 0
    # Attention heads among the objects of an image.
    cfg.MODEL.SSSD.TEACHER.NUM_HEADS = 8
    # Add an object without class that covers the whole image (LGD: not for Faster R-CNN).
    cfg.MODEL.SSSD.TEACHER.ADD_CONTEXT_BOX = False
    # Keep the teacher's detection loss from reaching the student's backbone through the
    # appearance embeddings (LGD: for Faster R-CNN only).
    cfg.MODEL.SSSD.TEACHER.DETACH_APPEARANCE = True
    # Add each object's own label embedding to what its appearance attends to. Not in LGD, whose
    # objects find their labels by attention alone; that takes longer than a short schedule has.
    cfg.MODEL.SSSD.TEACHER.LABEL_RESIDUAL = False
    # What is painted for an object: "student_guided" (its appearance attends to the labels of its
    # image: LGD's default), "label_guided" (its label attends to their appearance), "label_fill"
    # (its own label) or "student_fill" (its own appearance; no labels).
    cfg.MODEL.SSSD.TEACHER.INTERACTION = "student_guided"
    # Where an object is, for pooling its appearance and painting: "box" or "mask". For masks the
    # mapper must keep them: MODEL.MASK_ON True with Detectron2's own.
    cfg.MODEL.SSSD.TEACHER.REGIONS = "box"

    cfg.MODEL.SSSD.LABEL_MAP = CN()
    # Draw half of the objects paler in training (LabelEnc's step 1).
    cfg.MODEL.SSSD.LABEL_MAP.AUGMENT_SCALES = False

    # ---- The distance between the two pyramids ----
    cfg.MODEL.SSSD.DISTANCE = CN()
    # "js" (Jensen-Shannon distance: SSSD), "mse" (LGD) or "kl".
    cfg.MODEL.SSSD.DISTANCE.NAME = "js"
    # What one distribution is: "channel" (the values at a position), "spatial" (the positions of
    # a channel) or "flatten" (all values of a level). The paper does not say; with "channel" and
    # "element_mean" its coefficients have the effect that it reports.
    cfg.MODEL.SSSD.DISTANCE.AXIS = "channel"
    # "element_mean" (divergence averaged over all elements of a level, then its root) or
    # "per_distribution" (root of each distribution's divergence, then the mean).
    cfg.MODEL.SSSD.DISTANCE.REDUCTION = "element_mean"
    # Over levels: "mean", "sum", or "elements" (weighted by size, as LGD's mean squared error).
    cfg.MODEL.SSSD.DISTANCE.LEVEL_REDUCTION = "mean"
    # A factor for each level, from fine to coarse; empty for equal ones.
    cfg.MODEL.SSSD.DISTANCE.LEVEL_WEIGHTS = []
    # Temperature of the softmax.
    cfg.MODEL.SSSD.DISTANCE.TEMPERATURE = 1.0
    # Base of the logarithm; 2 bounds the Jensen-Shannon distance by 1.
    cfg.MODEL.SSSD.DISTANCE.LOG_BASE = 2.0
    # Normalisation of both pyramids before the distance: "instance" (LGD; the published
    # coefficients assume it) or "layer" (LabelEnc).
    cfg.MODEL.SSSD.DISTANCE.NORM = "instance"
    # Width of the maps inside the student's adapter; 0 for the pyramid's width (LGD).
    cfg.MODEL.SSSD.DISTANCE.ADAPTER_DIM = 0
    # Leave the padded cells of a batch out of the distance (LGD counts them).
    cfg.MODEL.SSSD.DISTANCE.MASK_PADDING = True

    # ---- The weight of the distance in the total loss ----
    cfg.MODEL.SSSD.COEFFICIENT = CN()
    # "constant", "step" (SSSD), "linear", "cosine", or "share" (holds the term's share of the
    # total loss at SHARE).
    cfg.MODEL.SSSD.COEFFICIENT.SCHEDULE = "step"
    # Values of the schedule: one for "constant", one more than milestones for "step", first and
    # last for "linear" and "cosine"; bounds (lowest, highest) for "share". 75 is the paper's best
    # fixed value; it raises it slightly at the step but does not print to what: 100 is our choice.
    cfg.MODEL.SSSD.COEFFICIENT.VALUES = [75.0, 100.0]
    # Iterations at which "step" goes to its next value; empty for the first of SOLVER.STEPS.
    cfg.MODEL.SSSD.COEFFICIENT.MILESTONES = []
    # Target of "share": 0.45 is what the paper measures for LGD after 1000 iterations.
    cfg.MODEL.SSSD.COEFFICIENT.SHARE = 0.45

    # ---- Phases, in iterations (LGD's; SSSD's paper does not restate them) ----
    cfg.MODEL.SSSD.PHASES = CN()
    # First iterations in which the distance trains the adapter alone, not the student.
    cfg.MODEL.SSSD.PHASES.NO_DISTILL_ITERS = 30000
    # First iterations in which the student's bottom-up backbone is frozen.
    cfg.MODEL.SSSD.PHASES.FREEZE_BACKBONE_ITERS = 20000
    # Last iterations in which the distance does not train the student.
    cfg.MODEL.SSSD.PHASES.DISTILL_OFF_ITERS = 0
    # Read the three numbers above as for a run of 180000 iterations and scale them to
    # SOLVER.MAX_ITER.
    cfg.MODEL.SSSD.PHASES.SCALE_TO_MAX_ITER = False

    # ---- Where the teacher's optimizer settings differ (LGD trains it with an optimizer of its
    # own, with the same values in its ResNet configs) ----
    cfg.MODEL.SSSD.SOLVER = CN()
    # Learning rate of the teacher; negative for SOLVER.BASE_LR. It follows the same schedule.
    cfg.MODEL.SSSD.SOLVER.TEACHER_BASE_LR = -1.0
    # Weight decay of the teacher; negative for SOLVER.WEIGHT_DECAY.
    cfg.MODEL.SSSD.SOLVER.TEACHER_WEIGHT_DECAY = -1.0
    # With SOLVER.AMP.ENABLED: "float16" (with a loss scale) or "bfloat16"; on the CPU as well.
    cfg.MODEL.SSSD.SOLVER.AMP_PRECISION = "float16"
    # Parts in which the images of a batch (SOLVER.IMS_PER_BATCH) go through the model, one after
    # the other, where memory does not hold them at once; gradients are averaged. Batch
    # normalisation sees a part.
    cfg.MODEL.SSSD.SOLVER.BATCH_PARTS = 1
    # Iterations with a loss or gradient that is not finite which are skipped before one stops the
    # run.
    cfg.MODEL.SSSD.SOLVER.MAX_SKIPPED = 0

    # ---- Exponential moving average of the student's weights ----
    cfg.MODEL.SSSD.AVERAGING = CN()
    # Weight of the past in each iteration, such as 0.999; 0 for no average. It is evaluated beside
    # the weights (averaged/...), and in checkpoints beside "model".
    cfg.MODEL.SSSD.AVERAGING.DECAY = 0.0

    cfg.MODEL.SSSD.TEST = CN()
    # Evaluate the teacher's pyramid, too: the same heads with the ground truth in hand. It is a
    # diagnostic, takes as long again, and is reported as teacher_with_ground_truth/...
    cfg.MODEL.SSSD.TEST.TEACHER_WITH_GROUND_TRUTH = False

    # ---- LabelEnc's two steps (tools/train_labelenc.py) ----
    cfg.MODEL.SSSD.LABELENC = CN()
    # Which of the two this training is; set by the script.
    cfg.MODEL.SSSD.LABELENC.STEP = 0
    # Iterations of step 1 before the distance sets in; they are added to the schedule.
    cfg.MODEL.SSSD.LABELENC.WARMUP_ITERS = 30000
    # Iteration of step 2 at which the distance is cut off; 0 for the last of SOLVER.STEPS.
    cfg.MODEL.SSSD.LABELENC.AUXILIARY_ITERS = 0
    # Keys and values in which step 1 differs, such as a shallower backbone whose stages are as wide
    # (ResNet-50 for a ResNet-101).
    cfg.MODEL.SSSD.LABELENC.STEP1_OPTS = []

    # ---- Detectron2's FCOS, built by META_ARCHITECTURE or STUDENT "Detectron2FCOS" ----
    # (Other packages own MODEL.FCOS. The defaults are those of Detectron2's own FCOS config.)
    cfg.MODEL.SSSD.FCOS = CN()
    # Number of foreground classes.
    cfg.MODEL.SSSD.FCOS.NUM_CLASSES = 80
    # Pyramid levels that the head looks at.
    cfg.MODEL.SSSD.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Map from which the two coarsest levels are computed, with
    # build_retinanet_resnet_fpn_backbone; empty to take the backbone as it is built ("res5").
    cfg.MODEL.SSSD.FCOS.TOP_BLOCK_IN_FEATURE = "p5"
    # Convolutions in each of the two towers.
    cfg.MODEL.SSSD.FCOS.NUM_CONVS = 4
    # Their normalisation; "" for none.
    cfg.MODEL.SSSD.FCOS.NORM = "GN"
    # Probability of a class before training, for the bias of the classifier.
    cfg.MODEL.SSSD.FCOS.PRIOR_PROB = 0.01
    # Radius, in cells, around an object's centre within which a cell is positive.
    cfg.MODEL.SSSD.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # Weight of the positive cells in the focal loss, and its exponent.
    cfg.MODEL.SSSD.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.SSSD.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # Detection: least root of class score times centreness, candidates kept for the
    # non-maximum suppression, and its IoU threshold.
    cfg.MODEL.SSSD.FCOS.SCORE_THRESH_TEST = 0.2
    cfg.MODEL.SSSD.FCOS.TOPK_CANDIDATES_TEST = 1000
    cfg.MODEL.SSSD.FCOS.NMS_THRESH_TEST = 0.6

    # ---- Image classification: META_ARCHITECTURE "ClassificationDistiller" ----
    # (MODEL.PIXEL_MEAN and PIXEL_STD count as many values as the images have channels.)
    cfg.MODEL.SSSD.CLASSIFIER = CN()
    # The student: a name of timm, or "torchvision/" and a name of torchvision.
    cfg.MODEL.SSSD.CLASSIFIER.NETWORK = ""
    # Further arguments of that network, such as drop_rate.
    cfg.MODEL.SSSD.CLASSIFIER.NETWORK_OPTIONS = CN(new_allowed=True)
    # Number of classes.
    cfg.MODEL.SSSD.CLASSIFIER.NUM_CLASSES = 10
    # Height and width of the images in pixels, and how they are augmented: "none", "crop",
    # "crop_flip" or "resized_crop".
    cfg.MODEL.SSSD.CLASSIFIER.SIZE = 32
    cfg.MODEL.SSSD.CLASSIFIER.AUGMENTATION = "crop_flip"
    # Keep maps and convolutions with the channels last in memory, which is faster on CPUs and, in
    # half precision, on GPUs; results differ by rounding.
    cfg.MODEL.SSSD.CLASSIFIER.CHANNELS_LAST = False
    # The loss: a list of terms, each a dict with its name, weight and options (docs/methods).
    cfg.MODEL.SSSD.CLASSIFIER.TERMS = [{"name": "cross_entropy"}]
    # Names of networks that learn beside the student, for mutual learning.
    cfg.MODEL.SSSD.CLASSIFIER.PEERS = []

    cfg.MODEL.SSSD.CLASSIFIER.TEACHER = CN()
    # Name of the teacher's network; "" for none.
    cfg.MODEL.SSSD.CLASSIFIER.TEACHER.NETWORK = ""
    # Its checkpoint; "" to train it in a first stage, by TEACHER.TERMS.
    cfg.MODEL.SSSD.CLASSIFIER.TEACHER.WEIGHTS = ""
    # The loss of that stage.
    cfg.MODEL.SSSD.CLASSIFIER.TEACHER.TERMS = [{"name": "cross_entropy"}]

    # Stages before that of TERMS, each of which hands its student and its terms to the next: dicts
    # with "name" (its folder), "terms", "length" (share of the schedule, default 1) and "opts"
    # (keys and values of the config in which it differs).
    cfg.MODEL.SSSD.CLASSIFIER.STAGES = []
    # Instead: a list of terms for each generation. Every generation starts anew, with the one
    # before as its teacher.
    cfg.MODEL.SSSD.CLASSIFIER.GENERATIONS = []
    # What the ensemble of the generations averages: "probabilities" or "logits".
    cfg.MODEL.SSSD.CLASSIFIER.ENSEMBLE = "probabilities"
    # Images of a batch in evaluation, for each process.
    cfg.MODEL.SSSD.CLASSIFIER.TEST_BATCH = 256
