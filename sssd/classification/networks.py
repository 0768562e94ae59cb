"""Classification networks by name, and where they make their logits."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torchvision
from torch import nn

from ..weights_file import WeightsFileError, read_weights_file
from .options import explained_options

__all__ = ["build_network", "classifier_of", "load_network_weights"]

_TORCHVISION = "torchvision/"


def build_network(name: str, *, num_classes: int, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A classification network with random weights.

    Its state dict is plain: ``timm.create_model`` or torchvision's function of that name, called
    with the same arguments, loads it without sssd (``cifar_`` names are in timm's registry after
    ``import sssd.classification.cifar``).

    Args:
        name: a name of timm ("resnet18"; "cifar_resnet20" and others of `sssd.classification.cifar`
            are among them) or "torchvision/" and a name of ``torchvision.models``.
        num_classes: number of logits.
        in_chans: channels of the images; torchvision's networks take 3.
        **kwargs: further arguments of the network, such as ``drop_rate`` or ``img_size`` (timm) or
            ``aux_logits=False``, which torchvision's googlenet and inception_v3 need here.

    Returns:
        The network, in training mode: images (N, in_chans, H, W) -> logits (N, num_classes).

    Raises:
        ValueError: nothing has this name, the name asks for pretrained weights, num_classes is
            below 1, or a network of torchvision was asked for other than 3 channels.
        ImportError: timm is not installed.
    """
    fix = "correct MODEL.SSSD.CLASSIFIER.NETWORK_OPTIONS"
    with explained_options(f"The network {name!r}", kwargs, fix):
        return _build(name, num_classes, in_chans, kwargs)


def _build(name: str, num_classes: int, in_chans: int, kwargs: Mapping[str, Any]) -> nn.Module:
    if num_classes < 1:
        raise ValueError(
            f"The network {name!r} was asked for {num_classes} classes: give num_classes of at "
            "least 1."
        )
    if name.startswith(_TORCHVISION):
        short = name.removeprefix(_TORCHVISION)
        if short not in _torchvision_names():
            raise ValueError(_unknown(name))
        if in_chans != 3:
            raise ValueError(
                f"The network {name!r} takes images of 3 channels, not {in_chans}: choose one of "
                "timm's, which adapt their first layer, or give images of 3 channels."
            )
        return torchvision.models.get_model(short, weights=None, num_classes=num_classes, **kwargs)
    timm = _timm()
    architecture, _, tag = name.partition(".")
    # timm itself would take "hf-hub:..." and "local-dir:..." as well, and download.
    if ":" in name or not timm.is_model(architecture):
        raise ValueError(_unknown(name))
    if tag:
        raise ValueError(
            f"The network {name!r} names pretrained weights ({tag!r}), which are not loaded here: "
            f"write {architecture!r}."
        )
    return timm.create_model(
        name, pretrained=False, num_classes=num_classes, in_chans=in_chans, **kwargs
    )


def classifier_of(network: nn.Module) -> nn.Module:
    """The module that makes the logits out of the embedding.

    Args:
        network: a network of timm, any with timm's ``get_classifier``, or one of torchvision.

    Returns:
        What ``get_classifier`` says; of torchvision's networks the last linear layer of ``fc``,
        ``classifier``, ``heads`` or ``head``.

    Raises:
        ValueError: the network has no such module, or several.
    """
    kind = type(network).__name__
    if hasattr(network, "get_classifier"):
        classifier = network.get_classifier()
        if isinstance(classifier, nn.Identity):
            raise ValueError(
                f"The network {kind} has no classifier: build it with num_classes of at least 1."
            )
        # Two heads as a tuple (DeiT's distilled networks) or one for each branch (CrossViT).
        if not isinstance(classifier, nn.Module) or isinstance(
            classifier, nn.ModuleList | nn.ModuleDict
        ):
            raise ValueError(
                f"The get_classifier() of the network {kind} answers with a "
                f"{type(classifier).__name__}, not with one module: choose a network with a single "
                "classifier."
            )
        return classifier
    for name in ("fc", "classifier", "heads", "head"):
        linear = [m for m in getattr(network, name, nn.Identity()).modules() if _is_linear(m)]
        if linear:
            return linear[-1]
    raise ValueError(
        f"The network {kind} does not say which module makes its logits: give it a method "
        "get_classifier() that returns this module, or choose a network of timm."
    )


def load_network_weights(network: nn.Module, path: str, name: str, entry: str = "model") -> None:
    """Fills a network from a file: a state dict, or a checkpoint that has one in an entry.

    Args:
        network: what ``build_network`` gave.
        path: of the file.
        name: of the network, for the errors.
        entry: of the checkpoint; another one than "model" must be there.

    Raises:
        ValueError: the file is missing or damaged, or of another architecture or class count.
    """
    try:
        state = read_weights_file(path)
    except FileNotFoundError as error:
        raise ValueError(
            f"The weights {path} of the network {name!r} do not exist: correct the path, or train "
            "them first."
        ) from error
    except WeightsFileError as error:
        raise ValueError(
            f"The weights {path} of the network {name!r} cannot be read: {error}; use another file."
        ) from error
    if isinstance(state, dict):
        if entry != "model" and entry not in state:
            raise ValueError(f"The checkpoint {path} has no {entry} weights: use another one.")
        state = state.get(entry, state)
    state = state if isinstance(state, dict) else {}
    own = network.state_dict()
    strange = next((key for key in state if key not in own), None)
    lost = next((key for key in own if key not in state), None)
    other = next((key for key in own if key in state and own[key].shape != state[key].shape), None)
    if strange is None and lost is None and other is None:
        network.load_state_dict(state)
        return
    if strange is not None or lost is not None:
        found = f"it has {strange!r}" if strange is not None else f"it lacks {lost!r}"
        fix = "name the network that was trained"
    else:
        found = f"{other!r} is {tuple(state[other].shape)} there and {tuple(own[other].shape)} here"
        fix = "use weights of the same network and number of classes"
    raise ValueError(f"The weights {path} do not fit the network {name!r} ({found}): {fix}.")


def _timm() -> ModuleType:
    """timm, with our networks among its own; imported late, since detectors do without."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "Networks for classification come from timm, which is not installed: run "
            "pip install 'sssd[classification]'."
        ) from error
    from . import cifar  # noqa: F401  (registers them)

    return timm


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _torchvision_names() -> list[str]:
    # Of this module only: the detectors' functions download a backbone even without weights.
    return torchvision.models.list_models(module=torchvision.models)


def _unknown(name: str) -> str:
    """The sentence about a name that no network has, with the names it may have been meant as."""
    known = [*_timm().list_models(), *(_TORCHVISION + n for n in _torchvision_names())]
    bare = name.removeprefix(_TORCHVISION).partition(".")[0]
    # "resnet20" means cifar_resnet20, though resnet200 has fewer letters that differ.
    near = [n for n in known if n.removeprefix("cifar_").removeprefix(_TORCHVISION) == bare]
    near += [n for n in difflib.get_close_matches(name, known, n=5, cutoff=0.5) if n not in near]
    hint = f"did you mean {', '.join(near[:5])}" if near else "choose one of timm's"
    return (
        f"There is no network {name!r}: {hint} (timm.list_models() lists timm's and sssd's names; "
        "torchvision's are written 'torchvision/resnet18')."
    )
