"""What the compatibility layer changes, and that it changes nothing where nothing is needed.

Each case runs in a process of its own: shims are global to the process, and the one that runs
the tests has them applied already.
"""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# A Detectron2 as main writes it: nothing here is unconditional or removed.
MAIN = {
    "__init__.py": "",
    "layers/__init__.py": "",
    "layers/ops.py": "def call():\n    from detectron2 import _C\n    return _C.f()\n",
    "evaluation/fast_eval_api.py": "from detectron2 import _C\n",  # its importer guards this
    "data/common.py": "import random\nrng.sample(list(self._fallback_candidates), k=1)\n",
    "data/transforms/transform.py": "interp = Image.BILINEAR\n",
    "data/build.py": "histogram = np.zeros(3, dtype=int)  # np.integer, np.float32\n",
    "modeling/meta_arch/retinanet.py": "norm_name = str(type(get_norm(norm, 32)))\n",
    "modeling/meta_arch/fcos.py": "quality = self._match_anchors(inst.gt_boxes, anchors)\n",
}
# The same places as v0.6 writes them.
V06 = {
    "__init__.py": "",
    "layers/__init__.py": "",
    "layers/ops.py": "from detectron2 import _C\n\ndef call():\n    return _C.f()\n",
    "data/__init__.py": "",
    "data/common.py": """
import random
class MapDataset:
    def __init__(self):
        self._rng = random.Random(42)
        self._fallback_candidates = {7}
    def draw(self):
        return self._rng.sample(self._fallback_candidates, k=1)[0], random.choice([1])
""",
    "data/transforms/transform.py": "interp = Image.LINEAR\n",
    "data/build.py": "histogram = np.zeros(3, dtype=np.int)\n",
    "modeling/meta_arch/retinanet.py": "norm_name = str(type(get_norm(norm, 1)))\n",
    "modeling/meta_arch/fcos.py": "indices = self.match_anchors(anchors, gt_instances)\n",
    "layers/deform_conv.py": "from detectron2 import _C\n\ndeform_conv = _C.deform_conv\n",
}
# What the shims may touch, as text that can be compared.
SNAPSHOT = """
import json, random, sys
import numpy, PIL.Image, torch
import sssd_compat
def snapshot():
    return [
        sorted(vars(numpy)), sorted(vars(PIL.Image)), sorted(sys.modules), str(sys.meta_path),
        repr(random.Random.sample), sorted(vars(torch.ops)),
    ]
"""


def run(code: str, *first: Path, options: tuple[str, ...] = (), inherit: bool = True):
    """Result of `code`, which prints one JSON value; `first` leads the search path."""
    path = [*map(str, first), str(REPOSITORY)]
    if inherit and os.environ.get("PYTHONPATH"):
        path.append(os.environ["PYTHONPATH"])
    process = subprocess.run(
        [sys.executable, *options, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def write_package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "detectron2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


@pytest.fixture(scope="module")
def shims() -> list[str]:
    """The shims the installed Detectron2 needs."""
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed")
    return run("import json, sssd_compat; print(json.dumps(sssd_compat.apply()))")


def need(shims: list[str], name: str) -> None:
    if name not in shims:
        pytest.skip(f"the installed Detectron2 does not need the shim {name!r} here")


def test_nothing_changes_where_nothing_is_needed(tmp_path):
    before, applied, after = run(
        SNAPSHOT + "before = snapshot()\n"
        "print(json.dumps([before, sssd_compat.apply() + sssd_compat.apply(), snapshot()]))",
        write_package(tmp_path, MAIN),
    )
    assert applied == []
    assert before == after


def test_every_shim_where_all_are_needed(tmp_path):
    lacks, applied, again, outcome = run(
        SNAPSHOT + "lacks = [not hasattr(PIL.Image, 'LINEAR'), not hasattr(numpy, 'int')]\n"
        "applied = sssd_compat.apply()\n"
        "once = snapshot()\n"
        "again = sssd_compat.apply()\n"
        "assert snapshot() == once\n"
        "import detectron2.layers.ops, detectron2.data.common\n"
        "outcome = [PIL.Image.LINEAR == PIL.Image.BILINEAR, numpy.int is int,"
        " detectron2.data.common.MapDataset().draw(), 'float' in vars(numpy)]\n"
        "print(json.dumps([lacks, applied, again, outcome]))",
        write_package(tmp_path, V06),
    )
    expected = {
        "extension": True,
        "pillow-linear": lacks[0],
        "numpy-aliases": lacks[1],
        "sample-from-set": sys.version_info >= (3, 11),
        "retinanet-groupnorm": True,
        "fcos-empty-images": True,
        "deformable-convolution": True,
    }
    assert applied == again == [name for name, needed in expected.items() if needed]
    # The last: an alias that no source uses is not added.
    assert outcome == [True, True, [7, 1], False]


def test_compiled_extension_is_left_alone(tmp_path):
    folder = write_package(tmp_path, V06)
    (folder / "detectron2" / ("_C" + importlib.machinery.EXTENSION_SUFFIXES[0])).touch()
    applied, stub = run(
        "import json, sys, sssd_compat\n"
        "print(json.dumps([sssd_compat.apply(), 'detectron2._C' in sys.modules]))",
        folder,
    )
    assert "extension" not in applied and not stub


def test_module_imported_before_is_patched_too(tmp_path):
    drawn = run(
        "import json, detectron2.data.common as common, sssd_compat\n"
        "sssd_compat.apply()\n"
        "print(json.dumps(common.MapDataset().draw()))",
        write_package(tmp_path, V06),
    )
    assert drawn == [7, 1]


def test_without_detectron2(tmp_path):
    # -S: no installed packages at all, so this also shows that the standard library is enough.
    # The folder is a clone of the repository in the working directory: not an installation.
    (tmp_path / "detectron2" / "detectron2").mkdir(parents=True)
    applied, message = run(
        "import json, sssd_compat\n"
        "try:\n    sssd_compat.require_detectron2()\n"
        "except ImportError as error:\n    message = str(error)\n"
        "print(json.dumps([sssd_compat.apply(), message]))",
        tmp_path,
        options=("-S",),
        inherit=False,
    )
    assert applied == []
    assert "`make`" in message and "requirements/install.sh" in message
    assert "INSTALL.md" in message and message.count(". ") == 0


@pytest.fixture(scope="module")
def stock(shims) -> dict:
    """What the installed Detectron2 does after `apply()` and nothing else of ours.

    One process for several tests, because importing Detectron2 takes seconds.
    """
    return run("""
import json, pickle, sys
import sssd_compat
shims = sssd_compat.apply()
import torch
from detectron2.config import get_cfg
from detectron2.data import MapDataset
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.utils.collect_env import collect_env_info

cfg = get_cfg()
cfg.MODEL.DEVICE = "cpu"
cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
cfg.MODEL.RESNETS.NORM = "GN"  # frozen BatchNorm on random weights gives no finite box
cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
cfg.TEST.DETECTIONS_PER_IMAGE = 3
torch.manual_seed(0)
model = build_model(cfg).eval()
with torch.no_grad():
    boxes = model([{"image": torch.randint(0, 255, (3, 64, 64)).float()}])[0]["instances"]

dataset = MapDataset(list(range(10)), lambda x: None if x % 3 == 0 else x)
pickled = pickle.loads(pickle.dumps(dataset))

head = FCOSHead(input_shape=[ShapeSpec(channels=64)], num_classes=3, conv_dims=[64], norm="GN")
norms = [m for m in head.modules() if isinstance(m, torch.nn.GroupNorm)]

print(json.dumps({
    "unchanged": sssd_compat.apply() == shims,
    "sssd imported": "sssd" in sys.modules,
    "boxes": len(boxes),
    "environment": [x for x in collect_env_info().splitlines() if x.startswith("Compiler")],
    "drawn": [[d[i] for i in range(10)] for d in (dataset, pickled)],
    "norms": [[m.num_groups, m.num_channels] for m in norms],
}))
""")


def test_faster_rcnn_detects_with_this_module_alone(stock):
    assert stock["boxes"] == 3
    assert stock["unchanged"] and not stock["sssd imported"]


def test_environment_report_does_not_claim_an_extension(stock, shims):
    need(shims, "extension")
    assert len(stock["environment"]) == 1 and "not built" in stock["environment"][0]


def test_map_dataset_replaces_what_its_function_refuses(stock):
    """Also in a copy that was pickled, as for a spawned loader worker."""
    drawn, copied = stock["drawn"]
    assert drawn == copied
    for i, value in enumerate(drawn):
        assert value % 3 != 0
        assert i % 3 == 0 or value == i


def test_dense_heads_take_groupnorm(stock):
    assert stock["norms"] == [[32, 64], [32, 64]]  # one in each of the two subnets


def test_missing_operators_say_so_when_called(shims):
    need(shims, "extension")
    sentences, probes = run("""
import copy, importlib.util, json
import sssd_compat
sssd_compat.apply()
import torch
from detectron2 import _C
from detectron2.layers import ROIAlignRotated, nms_rotated
from detectron2.structures import RotatedBoxes, pairwise_iou_rotated
boxes = torch.rand(3, 5)
calls = {
    "roi_align_rotated_forward": lambda: ROIAlignRotated((2, 2), 1.0, 0)(
        torch.rand(1, 2, 8, 8), torch.rand(2, 6)),
    "nms_rotated": lambda: nms_rotated(boxes, boxes[:, 0], 0.5),
    "box_iou_rotated": lambda: pairwise_iou_rotated(RotatedBoxes(boxes), RotatedBoxes(boxes)),
    "COCOevalAccumulate": lambda: _C.COCOevalAccumulate(None, None),
    "InstanceAnnotation": lambda: _C.InstanceAnnotation(1, 0.5, iscrowd=False),
}
sentences = {}
for name, call in calls.items():
    try:
        call()
    except NotImplementedError as error:
        sentences[name] = str(error)
probes = [hasattr(_C, "__path__"), hasattr(_C, "__wrapped__"),
          importlib.util.find_spec("detectron2._C").name]
print(json.dumps([sentences, probes]))
""")
    assert len(sentences) == 5
    for name, sentence in sentences.items():
        assert repr(name) in sentence and "without its compiled extension" in sentence
        assert "install a compiled Detectron2" in sentence
        assert sentence.count(". ") == 0 and sentence.endswith(".")
        assert ("use_fast_impl=False" in sentence) == (name[0] in "CI")
    assert probes == [False, False, "detectron2._C"]
