"""The tensors inside a network: outputs and inputs of its layers, by name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .networks import classifier_of

__all__ = ["EMBEDDING", "Capture"]

EMBEDDING = "embedding"

_INPUT = "input"
_LISTED = 12  # so many children an error message names


class Capture(Mapping[str, Tensor]):
    """Records what chosen layers of a network compute::

        capture = Capture(network, ["layer1", "layer2.0.act2:input", "embedding"])
        with capture:
            logits = network(images)
        loss = distance(capture["layer1"], ...)
        capture.clear()

    Three kinds of name:

    - a module's path, as in ``network.named_modules()``: the output of that module;
    - a path and ``:input``: the module's first argument. ``:input`` of a ReLU is the map before it;
    - ``embedding``: the pooled and flattened feature (N, C) that enters the classifier, in training
      after its dropout.

    A value is a copy of what the layer computed, so an in-place operation that follows (timm's and
    torchvision's ReLUs) does not change it. Gradients flow from it into the layers before it; the
    logits are computed past it, so their gradient with respect to it does not exist.

    The hooks exist inside the ``with`` block only. Outside it the network, and every copy or pickle
    of it, is as if it had never been captured, and so are its state dict and its outputs always (a
    copy made inside the block has hooks that do nothing).
    The tensors stay readable after the block, and keep their graph alive, until `clear` or the next
    block. Of a module that runs several times (a second call of the network, or torchvision's ReLU,
    which a block uses twice) the last run counts. Several Captures of one network may be nested. A
    Capture has no parameters, and its copies and pickles carry no tensors.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        """
        Args:
            network: what will be called; it may be, or later be wrapped, in
                DistributedDataParallel. Names are those inside the wrapper.
            layers: the names; one that is given twice counts once.

        Raises:
            ValueError: the network has no such layer, or no classifier for "embedding".
        """
        if isinstance(network, DistributedDataParallel):
            network = network.module
        self.network = network
        self.layers = tuple(dict.fromkeys(layers))
        self._tensors: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for name in self.layers:
            self._find(name)

    def __enter__(self) -> "Capture":
        if self._handles:
            raise RuntimeError(
                "This Capture is already recording: leave its `with` block before the next one, or "
                "make a second Capture."
            )
        self.clear()
        # Found anew each time: the network may have got another classifier since.
        for name in self.layers:
            module, of_input = self._find(name)
            if of_input:
                handle = module.register_forward_pre_hook(
                    _Hook(self._record_input, name), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(_Hook(self._record_output, name))
            self._handles.append(handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name in self._tensors:
            return self._tensors[name]
        if name in self.layers:
            raise KeyError(
                f"The layer {name!r} has not run: call the network, in a way that reaches this "
                "layer, inside the `with` block of the Capture."
            )
        raise KeyError(
            f"The layer {name!r} is not captured: give its name to the Capture, which has "
            f"{', '.join(self.layers) or 'none'}."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def clear(self) -> None:
        """Lets the recorded tensors go, and with them their part of the graph."""
        self._tensors.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tensors": {}, "_handles": []}

    def _find(self, name: str) -> tuple[nn.Module, bool]:
        """The module of a name, and whether its input is meant."""
        if name == EMBEDDING:
            return classifier_of(self.network), True
        path, colon, suffix = name.partition(":")
        if colon and suffix != _INPUT:
            raise ValueError(
                f"The layer name {name!r} ends in {colon + suffix!r}: write {path!r} for the "
                f"output of the layer, or '{path}:{_INPUT}' for its input."
            )
        try:
            # The empty path would be the network itself.
            return self.network.get_submodule(path or " "), bool(colon)
        except AttributeError:
            raise ValueError(_unknown(self.network, path)) from None

    def _record_output(self, name: str, args: tuple, output: Any) -> None:
        self._record(name, "returns", output)

    def _record_input(self, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
        self._record(name, "is given", next(iter((*args, *kwargs.values())), None))

    def _record(self, name: str, verb: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            layer = f"classifier ({name!r})" if name == EMBEDDING else f"layer {name!r}"
            raise TypeError(
                f"The {layer} of the network {type(self.network).__name__} {verb} a "
                f"{type(value).__name__}, not a tensor: capture a layer inside it or another one."
            )
        if name == EMBEDDING:
            if value.flatten(1).shape[1] != value.shape[1]:  # a convolution before the pooling
                raise ValueError(
                    f"The classifier of the network {type(self.network).__name__} is given a map "
                    f"of shape {tuple(value.shape)}, not a pooled feature, so it has no "
                    f"{EMBEDDING!r}: capture a layer by its path."
                )
            value = value.flatten(1)
        self._tensors[name] = value.clone()


class _Hook:
    """A hook of which deepcopy and pickle take along only something that does nothing."""

    def __init__(self, record: Callable, name: str) -> None:
        self.record, self.name = record, name

    def __call__(self, module: nn.Module, *details: Any) -> None:
        self.record(self.name, *details)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return _inert_hook, ()


def _inert_hook() -> Callable:
    return _do_nothing


def _do_nothing(*details: Any) -> None:
    pass


def _unknown(network: nn.Module, path: str) -> str:
    """The sentence about a path that does not exist: what there is where it leaves the network."""
    parent, prefix = network, ""
    for part in path.split("."):
        child = getattr(parent, part, None) if part else None
        if not isinstance(child, nn.Module):
            break
        parent, prefix = child, f"{prefix}.{part}" if prefix else part
    where = f"its {prefix!r}" if prefix else "it"
    children = [name for name, _ in parent.named_children()]
    listed = ", ".join(children[:_LISTED])
    if len(children) > _LISTED:
        listed += f" and {len(children) - _LISTED} more"
    has = f"{where} has {listed}" if children else f"{where} has nothing inside"
    return (
        f"The network {type(network).__name__} has no layer {path!r}: {has}; {EMBEDDING!r} means "
        "the input of the classifier."
    )
