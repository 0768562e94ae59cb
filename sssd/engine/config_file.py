"""Configs from files and command lines: YAML that is data, and Python."""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import torch
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ..config import add_sssd_config
from ..data import register_coco_datasets

__all__ = [
    "ConfigError",
    "changed_keys",
    "default_config",
    "flat_keys",
    "load_config",
    "load_lazy_config",
    "read_keys",
]


class ConfigError(ValueError):
    """A config that cannot be used; the message is one sentence that names the key and the fix."""


def default_config() -> CfgNode:
    """Detectron2's defaults and sssd's."""
    cfg = get_cfg()
    add_sssd_config(cfg)
    return cfg


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults, sssd's keys, a config file (safe YAML) and overrides, in this order.

    Also registers the datasets of MODEL.SSSD.COCO_DATASETS.

    Args:
        config_file: path; "" for none.
        opts: alternating keys and values, as on Detectron2's command lines.

    Raises:
        ConfigError: the file is no YAML of plain values, a key or the type of a value is none of
            Detectron2's and sssd's, or a dataset cannot be registered.
        OSError: the file cannot be read.
    """
    cfg = default_config()
    if config_file:
        with PathManager.open(config_file) as file, _errors_of(f"The config {config_file}", cfg):
            _read_yaml(file, yaml.SafeLoader, cfg)
            cfg.merge_from_file(config_file, allow_unsafe=False)
    with _errors_of("The command line", cfg):
        cfg.merge_from_list(list(opts))
    with _errors_of("MODEL.SSSD.COCO_DATASETS"):
        register_coco_datasets(cfg.MODEL.SSSD.COCO_DATASETS)
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        log_first_n(
            logging.WARNING, "No GPU is available: MODEL.DEVICE is set to cpu.", name="sssd"
        )
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def read_keys(config_file: str) -> dict[str, Any]:
    """The keys that a config file (safe YAML) and its bases set, without anybody's defaults.

    Args:
        config_file: path.

    Raises:
        ConfigError: the file is no YAML of plain values.
        OSError: it, or a base of it, cannot be read.
    """
    with PathManager.open(config_file) as file, _errors_of(f"The config {config_file}"):
        _read_yaml(file, yaml.SafeLoader)
        return CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)


def load_lazy_config(config_file: str, opts: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig and its overrides.

    A ``.py`` file is a program, which runs. Of a ``.yaml``, as Detectron2 writes it, plain values
    are read; but what its ``_target_`` entries name is called when it is instantiated.

    Args:
        config_file: path.
        opts: "key=value", as ``LazyConfig.apply_overrides`` takes them.

    Raises:
        ConfigError: of a YAML with more than plain values, and of overrides that do not fit.
        OSError: the file cannot be read.
    """
    if config_file.endswith((".yaml", ".yml")):
        with open(config_file) as file, _errors_of(f"The config {config_file}"):
            content = _read_yaml(file, _LazyLoader)
            cfg = OmegaConf.create(content, flags={"allow_objects": True})
    else:
        cfg = LazyConfig.load(config_file)
    with _errors_of("The command line"):
        return LazyConfig.apply_overrides(cfg, list(opts))


_MOST_VALUES = 100_000
# Their keys are free, so that they are compared as a whole.
_FREE_SECTIONS = ("NETWORK_OPTIONS",)
_MISFITS = (
    AssertionError,
    AttributeError,
    HydraException,
    KeyError,
    MemoryError,  # of Python's parser, where a text is nested deeply
    NotImplementedError,
    TypeError,
    ValueError,
)


class _LazyLoader(yaml.SafeLoader):
    """Safe YAML, and the one class of which Detectron2 writes objects into its own configs."""


def _shape_spec(loader: yaml.SafeLoader, node: yaml.Node) -> ShapeSpec:
    if isinstance(node, yaml.SequenceNode):  # v0.6's is a tuple
        return ShapeSpec(*loader.construct_sequence(node))
    return ShapeSpec(**loader.construct_mapping(node))


for _way in ("object", "object/new"):
    _LazyLoader.add_constructor(
        f"tag:yaml.org,2002:python/{_way}:detectron2.layers.shape_spec.ShapeSpec", _shape_spec
    )


def _read_yaml(file: IO[str], loader: type, cfg: CfgNode | None = None) -> dict[str, Any]:
    """Keys and values, as many as fit; in sections where ``cfg`` has them."""
    content = yaml.load(file, Loader=loader)
    _check_size(content)
    _check_shape(content, cfg)
    return content


def _check_shape(content: Any, cfg: CfgNode | None = None, name: str = "it") -> None:
    """Whether what was read is keys and values, wherever the config has a section of them."""
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise TypeError(f"{name} is {kind}, and has to be keys and values")
    for key, value in content.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} has the key {key!r}, which has to be a text")
        if isinstance(cfg, CfgNode) and isinstance(cfg.get(key), CfgNode):
            _check_shape(value, cfg[key], key if name == "it" else f"{name}.{key}")
    base = content.get("_BASE_", "")
    if not all(isinstance(path, str) for path in (base if isinstance(base, list) else [base])):
        raise TypeError(f"_BASE_ is {base!r}, and has to be the path of a config")


def _check_size(content: Any) -> None:
    """A YAML of a few lines can name itself over and over, and be endless written out."""
    left, count = [content], 0
    while left:
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES} values, written out")
        node = left.pop()
        if isinstance(node, dict | list | tuple):
            left.extend(node.values() if isinstance(node, dict) else node)


@contextmanager
def _errors_of(what: str, cfg: CfgNode | None = None) -> Iterator[None]:
    """What reading and merging raise, as one sentence about ``what``."""
    try:
        yield
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(
            f"{what} is refused: it holds more than plain values ({_in_a_line(error)}), which "
            "could run a program; write texts, numbers, lists and dicts only."
        ) from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise ConfigError(f"{what} is no YAML ({_in_a_line(error)}): correct it there.") from error
    except RecursionError as error:
        raise ConfigError(
            f"{what} cannot be read: it is nested without end, or a _BASE_ comes back to itself."
        ) from error
    except _MISFITS as error:
        raise ConfigError(f"{what} does not fit: {_misfit(error, cfg)}.") from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())


def _misfit(error: Exception, cfg: CfgNode | None) -> str:
    text = _in_a_line(error)
    if found := re.match(r"Non-existent (?:config )?key: (\S*)", text):
        key = found.group(1)
        close = difflib.get_close_matches(key, flat_keys(cfg), 1)
        return f"there is no key {key}" + (f" (the nearest is {close[0]})" if close else "")
    # yacs names both types and both values.
    mismatch = r"Type mismatch \(<class '(.+?)'> vs.* with values \((.*) vs\. (.*)\) .* key: (\S+)"
    if found := re.match(mismatch, text):
        wanted, before, value, key = found.groups()
        value = value if len(value) < 100 else f"{value[:97]}..."
        if wanted.endswith("CfgNode"):
            return f"{key} is {value}, and has to be keys and values"
        return f"{key} is {value}, and has to be a {wanted} (such as {before or repr(before)})"
    return text.rstrip(".") or type(error).__name__


def changed_keys(config_file: str, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between a config that was written and the one of now.

    Two versions of Detectron2 have different keys: of interest are those of both.

    Args:
        config_file: what ``cfg.dump()`` wrote.

    Returns:
        Key -> its value before, and now.
    """
    with open(config_file) as file:
        before = flat_keys(yaml.safe_load(file), whole=_FREE_SECTIONS)
    now = flat_keys(yaml.safe_load(cfg.dump()), whole=_FREE_SECTIONS)
    common = before.keys() & now.keys()
    return {key: (before[key], now[key]) for key in common if before[key] != now[key]}


def flat_keys(node: Any, prefix: str = "", whole: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a config by their full keys, such as "SOLVER.BASE_LR".

    Args:
        node: the config, or what is read from its file.
        prefix: its own key.
        whole: names of sections that are kept as one value.
    """
    if not isinstance(node, dict) or prefix.rpartition(".")[2] in whole:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(flat_keys(value, f"{prefix}.{key}" if prefix else str(key), whole))
    return flat
