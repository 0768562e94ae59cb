"""What an installed Detectron2 needs to run on today's torch, NumPy, Pillow and Python.

This module stands alone: it is one file, imports nothing of sssd, and may be copied next to a
deployment. Call `apply()` before importing `detectron2.layers` or `detectron2.data`:

    import sssd_compat

    sssd_compat.apply()

A script whose data-loader workers are *spawned* calls it at module level, so that the workers
run it too. Every shim is decided by feature, never by version: it is applied when the sources of
the installed Detectron2 use something and this environment lacks it. On a compiled Detectron2
main only the GIoU loss is changed, in mixed precision; on an unbuilt one, deformable convolutions
as well. On a compiled v0.6 with libraries of its time, that and FCOS. The shims, by the names that
`apply()` returns:

- ``extension``: stands in for the compiled ``detectron2._C`` that v0.6 imports at the top of its
  layers. Box detection never calls it; an operator that is called says what is missing.
- ``pillow-linear``: ``PIL.Image.LINEAR``, which Pillow removed (it is ``BILINEAR``).
- ``numpy-aliases``: ``np.int``, ``np.float``, ``np.bool``, ``np.str``, ``np.object``, as used.
- ``sample-from-set``: ``MapDataset`` draws a replacement sample from a set, which Python 3.11
  refuses.
- ``retinanet-groupnorm``: the heads of RetinaNet and FCOS ask for a GroupNorm of one channel to
  learn its type, which torch refuses.
- ``fcos-empty-images``: v0.6's FCOS fails in training on an image without objects.
- ``giou-mixed-precision``: under autocast the GIoU loss of FCOS compares boxes of two precisions,
  which fvcore's refuses.
- ``deformable-convolution``: ``DeformConv`` and ``ModulatedDeformConv`` without the compiled
  kernels, through torchvision's operator.
"""

from __future__ import annotations

import builtins
import functools
import importlib.machinery
import importlib.util
import random
import re
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

__all__ = ["apply", "require_detectron2"]

_EXTENSION = "detectron2._C"
_REMOVED_NUMPY_ALIASES = ("int", "float", "bool", "str", "object")


def apply() -> list[str]:
    """Apply the shims this environment needs; calling it again changes nothing.

    Returns:
        The names of the shims now in force, in the order of this module's description. Empty
        where nothing is needed, and where Detectron2 is not installed.
    """
    folder = _detectron2_folder()
    if folder is None:
        return []
    for name, shim in _SHIMS.items():
        if name not in _in_force and shim(folder):
            _in_force.append(name)
    return [name for name in _SHIMS if name in _in_force]


def require_detectron2() -> None:
    """Raise a sentence that says how to get Detectron2, if it is not installed.

    Raises:
        ImportError: Detectron2 cannot be found.
    """
    if _detectron2_folder() is None:
        raise ImportError(
            "sssd needs Detectron2 for this, and it is not installed here: either run `make` in a "
            "checkout of sssd (requirements/install.sh takes Detectron2 v0.6, unbuilt, from the "
            "package registry), or build the official source as Detectron2's INSTALL.md says."
        )


# --- what is installed ---------------------------------------------------------------------


def _detectron2_folder() -> Path | None:
    """Folder of the installed package, found without importing it; None if there is none."""
    spec = importlib.util.find_spec("detectron2")
    # A folder that happens to be called detectron2 (a clone in the working directory) is found
    # as a namespace package, which has no origin.
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _source(folder: Path, *parts: str) -> str:
    """Text of one source file, empty if this Detectron2 has no such file."""
    file = folder.joinpath(*parts)
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _has_extension(folder: Path) -> bool:
    """Whether Detectron2 is compiled. Whatever else stands in for the extension counts too."""
    if importlib.machinery.PathFinder.find_spec(_EXTENSION, [str(folder)]) is not None:
        return True
    return not isinstance(sys.modules.get(_EXTENSION), _MissingExtension | None)


# --- patching modules of Detectron2 once they are imported ---------------------------------


class _PatchingLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        _patches[module.__name__](module)


class _PatchingFinder:
    """Finds only the modules that have a patch, and finds them where Python would."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _PatchingLoader(name, spec.origin)
        return spec


def _patch_module(name: str, patch: Callable[[types.ModuleType], None]) -> None:
    """Run `patch` on a module now if it is imported, otherwise right after its import.

    Importing it here instead would be simpler, but importing `detectron2.data` fixes the
    dataset paths from DETECTRON2_DATASETS, which the caller may not have set yet.
    """
    _patches[name] = patch
    if name in sys.modules:
        patch(sys.modules[name])
    if _PatchingFinder not in sys.meta_path:
        sys.meta_path.insert(0, _PatchingFinder)


# --- the shims: each returns whether it is needed, and then applies it ---------------------


class _MissingExtension(types.ModuleType):
    """Stands in for `detectron2._C`: any operator can be fetched, none can be called."""

    def __init__(self) -> None:
        super().__init__(_EXTENSION, "Stands in for an extension that was not compiled.")
        self.__spec__ = importlib.machinery.ModuleSpec(_EXTENSION, loader=None)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):  # hasattr, copy, pickle and inspect probe for these
            raise AttributeError(f"module {_EXTENSION!r} has no attribute {name!r}")
        return functools.partial(_missing_operator, name)

    # Detectron2's collect_env, which default_setup logs, asks for these three.
    @staticmethod
    def get_compiler_version() -> str:
        return "none (detectron2._C is not built; sssd_compat stands in for it)"

    @staticmethod
    def get_cuda_version() -> str:
        return "none (detectron2._C is not built)"

    @staticmethod
    def has_cuda() -> bool:
        return False


def _missing_operator(name: str, *args, **kwargs):
    remedy = "install a compiled Detectron2"
    if name.startswith("COCOeval") or name == "InstanceAnnotation":
        remedy = (
            "use sssd's COCO evaluator or COCOEvaluator(..., use_fast_impl=False), or " + remedy
        )
    raise NotImplementedError(
        f"The operator {name!r} is missing because this Detectron2 was installed without its "
        f"compiled extension (detectron2._C): {remedy}."
    )


def _shim_extension(folder: Path) -> bool:
    # Main imports the extension inside functions, or guards the import: only an unconditional
    # import of the layers keeps everything else from being imported.
    layers = "\n".join(_source(file) for file in sorted(folder.glob("layers/*.py")))
    if not re.search(r"^(from detectron2 import _C|import detectron2\._C)\b", layers, re.M):
        return False
    if _has_extension(folder):
        return False
    sys.modules[_EXTENSION] = _MissingExtension()

    import torch

    for name in re.findall(r"torch\.ops\.detectron2\.(\w+)", layers):
        setattr(torch.ops.detectron2, name, functools.partial(_missing_operator, name))
    return True


def _shim_pillow(folder: Path) -> bool:
    if not re.search(r"\bImage\.LINEAR\b", _source(folder, "data", "transforms", "transform.py")):
        return False
    from PIL import Image

    if hasattr(Image, "LINEAR"):
        return False
    Image.LINEAR = Image.BILINEAR
    return True


def _shim_numpy(folder: Path) -> bool:
    pattern = re.compile(rf"\bnp\.({'|'.join(_REMOVED_NUMPY_ALIASES)})\b")
    used = {name for file in folder.rglob("*.py") for name in pattern.findall(_source(file))}
    if not used:
        return False
    import numpy

    with warnings.catch_warnings():  # older NumPy still has them, and warns
        warnings.simplefilter("ignore")
        lacking = [name for name in sorted(used) if not hasattr(numpy, name)]
    for name in lacking:
        setattr(numpy, name, getattr(builtins, name))
    return bool(lacking)


class _SetRandom(random.Random):
    """`random.Random` that still samples from a set, as it did before Python 3.11.

    At module level because a MapDataset keeps one, and is pickled for spawned workers.
    """

    def sample(self, population, k, **kwargs):
        if isinstance(population, (set, frozenset)):
            population = tuple(population)
        return super().sample(population, k, **kwargs)


def _shim_sample(folder: Path) -> bool:
    if ".sample(self._fallback_candidates" not in _source(folder, "data", "common.py"):
        return False
    try:
        with warnings.catch_warnings():  # deprecated for two releases before it was removed
            warnings.simplefilter("ignore")
            random.Random(0).sample({1}, 1)
    except TypeError:
        pass
    else:
        return False

    def patch(module: types.ModuleType) -> None:
        module.random = types.SimpleNamespace(**{**vars(random), "Random": _SetRandom})

    _patch_module("detectron2.data.common", patch)
    return True


def _shim_groupnorm(folder: Path) -> bool:
    if "get_norm(norm, 1)" not in _source(folder, "modeling", "meta_arch", "retinanet.py"):
        return False
    import torch

    try:
        torch.nn.GroupNorm(32, 1)
    except ValueError:
        pass
    else:
        return False

    def patch(module: types.ModuleType) -> None:
        get_norm = module.get_norm
        # Only the type of this norm is looked at; main asks for 32 channels too.
        module.get_norm = lambda norm, channels: get_norm(norm, 32 if channels == 1 else channels)

    _patch_module("detectron2.modeling.meta_arch.retinanet", patch)
    return True


def _shim_fcos(folder: Path) -> bool:
    # Main labels image by image, and looks first whether an image has objects.
    matching = "self.match_anchors(anchors, gt_instances)"
    if matching not in _source(folder, "modeling", "meta_arch", "fcos.py"):
        return False
    import torch

    def patch(module: types.ModuleType) -> None:
        original = module.FCOS.label_anchors

        @functools.wraps(original)
        def label_anchors(self, anchors, gt_instances):
            # The original sees the images that have objects; it takes an empty list, too.
            labels, boxes = map(iter, original(self, anchors, [x for x in gt_instances if len(x)]))
            every = module.Boxes.cat(anchors).tensor
            matched_labels, matched_boxes = [], []
            for instances in gt_instances:
                if len(instances):
                    matched_labels.append(next(labels))
                    matched_boxes.append(next(boxes))
                else:  # all background, whose boxes no loss looks at
                    background = every.new_full((len(every),), self.num_classes, dtype=torch.long)
                    matched_labels.append(background)
                    matched_boxes.append(module.Boxes(torch.zeros_like(every)))
            return matched_labels, matched_boxes

        module.FCOS.label_anchors = label_anchors

    _patch_module("detectron2.modeling.meta_arch.fcos", patch)
    return True


def _shim_giou(folder: Path) -> bool:
    if "giou_loss(" not in _source(folder, "modeling", "box_regression.py"):
        return False
    import torch
    from fvcore.nn import giou_loss

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)  # a single value would be taken
    try:
        giou_loss(boxes.bfloat16(), boxes)
    except RuntimeError:
        pass
    else:
        return False

    def patch(module: types.ModuleType) -> None:
        original = module.giou_loss

        @functools.wraps(original)
        def in_one_precision(boxes1, boxes2, *args, **kwargs):
            dtype = torch.promote_types(boxes1.dtype, boxes2.dtype)
            return original(boxes1.to(dtype), boxes2.to(dtype), *args, **kwargs)

        module.giou_loss = in_one_precision

    _patch_module("detectron2.modeling.box_regression", patch)
    return True


def _modulated_deform_conv(
    input,
    offset,
    mask,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
):
    """Detectron2's `modulated_deform_conv`, and without a mask its `deform_conv`.

    torchvision's kernels order the channels of offset and mask as Detectron2's do: deformable
    group, kernel position, and for an offset y before x.
    """
    import torch

    try:
        from torchvision.ops import deform_conv2d

        _ = torch.ops.torchvision.deform_conv2d  # the function above exists without its operator
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotImplementedError(
            "Without Detectron2's compiled extension (detectron2._C), deformable convolutions need "
            "torchvision's operator 'deform_conv2d', which is missing here: install the "
            f"torchvision that was built for torch {torch.__version__}, or a compiled Detectron2."
        ) from error

    # torchvision takes both numbers of groups from the shapes, and would run with wrong ones.
    height, width = weight.shape[2:]
    for name, tensor, channels in (
        ("input", input, groups * weight.shape[1]),
        ("offset", offset, 2 * deformable_groups * height * width),
    ):
        if tensor.dim() != 4 or tensor.shape[1] != channels:
            raise ValueError(
                f"The {name} of a deformable convolution has shape {tuple(tensor.shape)}, but "
                f"groups={groups}, deformable_groups={deformable_groups} and a weight of shape "
                f"{tuple(weight.shape)} need 4 dimensions and {channels} channels."
            )
    # Autocast hands over operands of several types, torchvision has no kernel for bfloat16 on
    # the CPU, and in half precision a position in a large map is coarser than a cell.
    precision = torch.float64 if input.dtype == torch.float64 else torch.float32
    bias, mask = (x if x is None else x.to(precision) for x in (bias, mask))
    output = deform_conv2d(
        input.to(precision),
        offset.to(precision),
        weight.to(precision),
        bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        mask=mask,
    )
    return output.to(input.dtype)


def _deform_conv(
    input,
    offset,
    weight,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    deformable_groups=1,
    im2col_step=64,  # how many images Detectron2's kernel takes at a time; no result depends on it
):
    return _modulated_deform_conv(
        input, offset, None, weight, None, stride, padding, dilation, groups, deformable_groups
    )


_DEFORMABLE = ("DeformConv", "ModulatedDeformConv", "deform_conv", "modulated_deform_conv")


def _shim_deformable(folder: Path) -> bool:
    source = _source(folder, "layers", "deform_conv.py")
    uses_extension = "from detectron2 import _C" in source and "\ndeform_conv = " in source
    if not uses_extension or _has_extension(folder):
        return False

    def patch(module: types.ModuleType) -> None:
        before = {name: getattr(module, name) for name in _DEFORMABLE}
        if not hasattr(module, "_C"):
            # Main has replaced its classes by dummies that cannot be built. Executing the module
            # once more, with an extension to import, keeps them; nobody else may see this one.
            sys.modules[_EXTENSION] = _MissingExtension()
            try:
                loader = importlib.machinery.SourceFileLoader(module.__name__, module.__file__)
                loader.exec_module(module)
            finally:
                del sys.modules[_EXTENSION]
        module.deform_conv = _deform_conv
        module.modulated_deform_conv = _modulated_deform_conv
        # For whoever imported them from here before this was patched.
        for other in list(sys.modules.values()):
            for name, value in before.items():
                if getattr(other, "__dict__", {}).get(name) is value:
                    setattr(other, name, getattr(module, name))

    _patch_module("detectron2.layers.deform_conv", patch)
    return True


_SHIMS: dict[str, Callable[[Path], bool]] = {
    "extension": _shim_extension,
    "pillow-linear": _shim_pillow,
    "numpy-aliases": _shim_numpy,
    "sample-from-set": _shim_sample,
    "retinanet-groupnorm": _shim_groupnorm,
    "fcos-empty-images": _shim_fcos,
    "giou-mixed-precision": _shim_giou,
    "deformable-convolution": _shim_deformable,
}
_patches: dict[str, Callable[[types.ModuleType], None]] = {}
_in_force: list[str] = []
