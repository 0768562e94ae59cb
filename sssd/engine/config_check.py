"""Values of a config that cannot be meant, found before anything is built."""

import math
import os
import re
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from .config_file import ConfigError, default_config, flat_keys

__all__ = ["check_values"]

_MANY = 10**6
# Pattern of keys -> lowest and highest value. The highest ones are far beyond what anybody trains
# with: they stop a slip of the pen before it takes hours, or all of the memory.
_RANGES: dict[str, tuple[float, float]] = {
    r"SOLVER\.(CHECKPOINT_PERIOD|MAX_ITER)": (1, math.inf),
    r"SOLVER\.IMS_PER_BATCH": (1, _MANY),
    r"SOLVER\.(BASE_LR|WEIGHT_DECAY|GAMMA|WARMUP_ITERS|BASE_LR_END)": (0, math.inf),
    r"SOLVER\.(MOMENTUM|WARMUP_FACTOR)": (0, 1),
    r"TEST\.EVAL_PERIOD": (0, math.inf),
    r"DATALOADER\.NUM_WORKERS": (0, max(64, 8 * (os.cpu_count() or 1))),
    r"INPUT\.M(IN|AX)_SIZE_(TRAIN|TEST)": (0, _MANY),
    r".*\.NUM_(CLASSES|GROUPS|HEADS|KEYPOINTS)": (0, _MANY),
    r".*\.NUM_(CONVS?|FC)": (0, 1000),
    r".*(_CHANNELS|_DIM|WIDTH_PER_GROUP)": (0, 10**5),
    r".*\.POOLER_RESOLUTION": (1, 10**4),
    r".*\.BATCH_SIZE_PER_IMAGE": (1, _MANY),
    r".*\.(POSITIVE_FRACTION|PRIOR_PROB|(NMS|SCORE)_THRESH(_TEST)?)": (0, 1),
    r".*\.P(RE|OST)_NMS_TOPK_(TRAIN|TEST)": (1, math.inf),
    r"MODEL\.ANCHOR_GENERATOR\.(SIZES|ASPECT_RATIOS)": (1e-6, _MANY),
    r"MODEL\.PIXEL_STD": (1e-6, math.inf),
}


def check_values(cfg: CfgNode) -> None:
    """Checks that there are values, that numbers are finite, and those with a range within it.

    Raises:
        ConfigError: names the first key with such a value, the value, and what it may be.
    """
    defaults = flat_keys(default_config())
    for key, value in flat_keys(cfg).items():
        default = defaults.get(key)
        # yacs lets nothing at all stand for any value; for a text, Detectron2 means the same by "".
        if value is None and default is not None and not isinstance(default, str):
            raise ConfigError(f"{key} is None: it has to be a value, such as {default!r}.")
        ranges = [limits for pattern, limits in _RANGES.items() if re.fullmatch(pattern, key)]
        for number in _numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{key} is {value}: it has to be finite.")
            for low, high in ranges:
                if number < low or number > high:
                    most = "" if high == math.inf else f" and at most {high:g}"
                    raise ConfigError(f"{key} is {value}: it has to be at least {low:g}{most}.")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, and in lists of lists."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
