"""The page of all config keys, from the comments above them in sssd/config.py."""

import re
from pathlib import Path

__all__ = ["keys_of", "page", "write_page"]

_KEY = re.compile(r"    cfg\.(MODEL\.SSSD[\w.]+) = (.+)")
_SECTION = re.compile(r"    # ---- (.+?)(?: ----)?$")


def keys_of(source: str) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """(section, [(key, default, meaning)]) in the order of the source."""
    sections: list[tuple[str, list[tuple[str, str, str]]]] = [("The detector", [])]
    comment: list[str] = []
    heading: list[str] = []  # of a section, over its lines
    for line in source.splitlines():
        if heading or _SECTION.match(line):
            heading.append(line.strip(" #-"))
            if line.endswith("----"):
                sections.append((" ".join(heading), []))
                heading = []
            continue
        if line.startswith("    # "):
            comment.append(line[6:])
        elif found := _KEY.match(line):
            key, value = found.groups()
            if value == "CN()":
                comment = []
                continue
            if comment or not sections[-1][1]:
                sections[-1][1].append((key, value, " ".join(comment)))
            else:  # one comment for two keys
                sections[-1][1].append((key, value, sections[-1][1][-1][2]))
            comment = []
        elif not line.strip():
            comment = []
    return [section for section in sections if section[1]]


def page(source: str) -> str:
    """Markdown with a table for each section."""
    lines = [
        "# Every config key",
        "",
        "All are under `MODEL.SSSD`, added by `sssd.add_sssd_config(cfg)`. The defaults are the "
        "published recipe; where the paper gives no value, the text says whose choice it is. (This "
        "page is made from `sssd/config.py`.)",
    ]
    for title, keys in keys_of(source):
        lines += ["", f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        lines += [
            f"| `{key.removeprefix('MODEL.SSSD.')}` | `{value}` | {meaning} |"
            for key, value, meaning in keys
        ]
    return "\n".join(lines) + "\n"


def write_page(source: Path, target: Path) -> None:
    target.write_text(page(source.read_text()))
