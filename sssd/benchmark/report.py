"""Tables and notes of what was measured, as Markdown, for the benchmark tools."""

from collections.abc import Sequence
from typing import Any

from .breakdown import BACKWARD, PARTS

__all__ = [
    "INFERENCE_NOTES",
    "MEMORY",
    "breakdown_table",
    "distance_notes",
    "distance_table",
    "inference_table",
    "markdown_table",
    "step_notes",
    "step_table",
]

MEMORY = {
    "cpu": "peak resident set of the process (Linux: VmHWM) while it is warmed up, without "
    "libraries and data, which were there before the first step: weights, activations, gradients "
    "and the optimizer's state. The allocator keeps no freed tensors in that time (GNU's malloc, "
    "mmap from 128 KiB on)",
    "cuda": "peak of what torch has allocated on the GPU, weights included",
}


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right.

    Args:
        rows: the headings, and as many cells in each further one.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    rule = "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def step_table(configs: Sequence[dict[str, Any]]) -> str:
    """Time and memory of a training step, a row for each config.

    Args:
        configs: of `sssd.benchmark.compare.measure`.
    """
    rows = [
        ["config", "step, ms", "time ratio", "quartiles", "images/s", "data, ms", "memory, MiB",
         "memory ratio", "student, parameters", "training only"]
    ]  # fmt: skip
    for config in configs:
        speed = config["images_per_second"]
        rows.append(
            [
                config["name"],
                f"{config['step_seconds'] * 1e3:.1f}",
                *ratio_cells(config["ratio"]),
                f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}",
                f"{config['data_seconds'] * 1e3:.1f}",
                *memory_cells(config),
                f"{config['student_parameters']:,}",
                f"{config['training_only_parameters']:,}",
            ]
        )
    return markdown_table(rows)


def ratio_cells(ratio: dict[str, float]) -> list[str]:
    """Median, and quartiles."""
    return [f"{ratio['median']:.2f}", f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"]


def memory_cells(config: dict[str, Any]) -> list[str]:
    """MiB above the start, and ratio; "-" where unknown."""
    above, ratio = config["memory"]["above"], config["memory_ratio"]
    return [
        "-" if above is None else f"{above / 2**20:.0f}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def step_notes(report: dict[str, Any]) -> str:
    """What the columns of `step_table` are.

    Args:
        report: with rounds, steps, warmup, memory_is, data and configs.
    """
    left_out = sorted({config["random_instead_of"] for config in report["configs"]} - {""})
    return (
        f"Interleaved in one run: {report['rounds']} rounds of {report['steps']} steps of each, "
        f"after {report['warmup']} for warming up. Step: median of all. Time ratio: to the "
        "first row, median and quartiles over the rounds of the ratio in the same round. Data: "
        f"loading a batch, no part of the step. Memory: {report['memory_is']}. Training only: "
        "parameters that the trained model does not have, a frozen teacher's among them."
        + _data_note(report["data"])
        + (
            f" Random weights, with calibrated batch normalisation, instead of the download "
            f"{', '.join(left_out)}."
            if left_out
            else ""
        )
        + _compile_note(report["configs"])
    )


def _compile_note(configs: Sequence[dict[str, Any]]) -> str:
    parts = sorted({part for config in configs for part in config["compiled"]})
    if not parts:
        return ""
    return (
        f" Compiled: {', '.join(parts)}; the memory holds what the compiler leaves in the process."
    )


def _data_note(data: dict[str, Any] | None) -> str:
    if data is None:
        return ""
    return (
        f" Images: random pixels, {data['height']} x {data['width']} (height, width), with "
        f"{data['objects']} random boxes each, {data['num_batches']} batches in turn, the same for "
        "every row."
    )


def breakdown_table(configs: Sequence[dict[str, Any]]) -> str:
    """Milliseconds and share of each part of the step, a column for each config.

    Args:
        configs: of `sssd.benchmark.compare.measure`, with a breakdown.
    """
    breakdowns = [config["breakdown"] for config in configs]
    rows = [["part of the step, ms", *(config["name"] for config in configs)]]

    def row(name: str, values: Sequence[float | None]) -> list[str]:
        cells = [
            "-" if x is None else f"{x * 1e3:.1f} ({x / b['step_seconds']:4.0%})"
            for x, b in zip(values, breakdowns, strict=True)
        ]
        return [name, *cells]

    for part in PARTS:
        if any(part in b["parts"] for b in breakdowns):
            rows.append(row(part, [b["parts"].get(part) for b in breakdowns]))
        if part == BACKWARD:
            rows += [
                row(f"... of the {of}", [b["backward_of"].get(of) for b in breakdowns])
                for of in PARTS
                if any(of in b["backward_of"] for b in breakdowns)
            ]
    rows.append(row("step, with the profiler", [b["step_seconds"] for b in breakdowns]))
    return markdown_table(rows)


def inference_table(configs: Sequence[dict[str, Any]]) -> str:
    """Time, memory, operators and outputs of the exported students, a row for each config.

    Args:
        configs: of `sssd.benchmark.compare.measure_inference`.
    """
    rows = [
        ["inference", "an image, ms", "time ratio", "quartiles", "images/s", "memory, MiB",
         "memory ratio", "operators", "outputs"]
    ]  # fmt: skip
    for config in configs:
        rows.append(
            [
                config["name"],
                f"{config['step_seconds'] * 1e3:.1f}",
                *ratio_cells(config["ratio"]),
                f"{config['images_per_second']:.1f}",
                *memory_cells(config),
                *_comparison_cells(config),
            ]
        )
    return markdown_table(rows)


def _comparison_cells(config: dict[str, Any]) -> list[str]:
    count = f"{config['operators']['count']:,}"
    if config["same_detector"] is None:
        return [count, "-"]
    difference, largest = config["first_difference"], config["largest_difference"]
    operators = f"the same {count}"
    if difference is not None:
        operators = (
            f"{difference['own'] or 'end'}, not {difference['reference'] or 'end'}, at number "
            f"{difference['index'] + 1} of {count}"
        )
    if largest is None:
        return [operators, "other weights"]
    return [operators, f"differ by {largest:.2g}" if largest else "identical"]


INFERENCE_NOTES = (
    "Inference: the exported student, built without sssd, in evaluation mode, one image at a time. "
    "Memory: as above, before the first pass. Operators (in the order of the calls) and outputs "
    "are those of the first image with the score threshold at 0, compared with the first row of "
    "the same detector."
)


def distance_table(result: dict[str, Any], dtype: str) -> str:
    """Time, saved memory and bandwidth of the distances between maps of one shape.

    Args:
        result: of `sssd.benchmark.distance.measure_distances`, and ``shape``.
        dtype: of the maps.
    """
    shape = " x ".join(map(str, result["shape"]))
    rows = [
        [f"{shape}, {dtype}", "forward, ms", "backward, ms", "both, ms", "ratio", "quartiles",
         "saved, MiB", "saved, maps", "GB/s", "of a copy"]
    ]  # fmt: skip
    for row in result["rows"]:
        speed = row["bytes_per_second"]
        rows.append(
            [
                row["name"],
                *(f"{row[key] * 1e3:.3g}" for key in ("forward", "backward", "both")),
                *ratio_cells(row["ratio"]),
                f"{row['saved_bytes'] / 2**20:.1f}",
                f"{row['saved_bytes'] / result['map_bytes']:.1f}",
                f"{speed / 1e9:.1f}",
                f"{speed / result['copy_bytes_per_second']:.0%}",
            ]
        )
    return markdown_table(rows)


def distance_notes(report: dict[str, Any]) -> str:
    """What the columns of `distance_table` are.

    Args:
        report: with rounds, repeats, mask, notes and results.
    """
    copies = ", ".join(f"{x['copy_bytes_per_second'] / 1e9:.1f}" for x in report["results"])
    mask = (
        "Some cells are padding, which all but the first row leave out. " if report["mask"] else ""
    )
    return (
        f"Interleaved in one run: {report['rounds']} rounds of {report['repeats']} calls of each. "
        "Ratio: of both passes to the first row, median and quartiles over the rounds of the ratio "
        "in the same round. Saved: what autograd keeps for the backward pass, the maps themselves "
        "included, also in units of one map. GB/s: the two maps read once and the gradient written "
        f"once, in the time of both passes; a copy of one map reads and writes at {copies} GB/s. "
        f"JS: root of the mean divergence over channels. {mask}" + " ".join(report["notes"])
    ).rstrip()
