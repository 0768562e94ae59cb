"""README and docs name what exists, with the defaults that the code has."""

import inspect
import re
import runpy
import shlex
import string
import textwrap

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from sssd import add_sssd_config
from sssd.classification import terms as _terms  # noqa: F401  (registers them)
from sssd.classification.term import TERMS
from sssd.engine import argument_parser, load_config
from sssd.losses import coefficient_schedule
from tests.conftest import REPOSITORY

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in (DOCS / "methods").glob("*.md") if path.name != "README.md")
CLASSIFICATION = [DOCS / "classification.md", DOCS / "methods" / "README.md", *PAGES]
GUIDES = [
    DOCS / f"{page}.md"
    for page in ("own_data", "coefficient", "curves", "studies", "deploy", "index")
]
CONFIGS = REPOSITORY / "configs" / "Classification"
OWN_TERMS = {name: cls for name, cls in TERMS.items() if cls.__module__.startswith("sssd.")}
REQUIRED = "required"


def name(path):
    return str(path.relative_to(REPOSITORY))


def blocks(path, language):
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.S | re.M)


def rows(text):
    """The cells of the rows of all tables of a text, without heads and rules."""
    lines = [x for x in text.splitlines() if x.startswith("| `")]
    return [[cell.strip() for cell in x.strip("| \n").split(" | ")] for x in lines]


def sections(path):
    """(heading, text up to the next heading of its level) of a page."""
    parts = re.split(r"^## (.+)$", path.read_text(), flags=re.M)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def documented_options():
    """Term -> option -> its default as the page has it."""
    found = {}
    for page in PAGES:
        for heading, text in sections(page):
            if heading.startswith("Arguments of"):
                for term in re.findall(r"`(\w+)`", heading):
                    assert term not in found, f"{term} has two tables, one in {page.name}"
                    found[term] = {cells[0].strip("`"): cells[1] for cells in rows(text)}
    return found


def options_of(term):
    """Option -> default of a term's __init__, without the surroundings."""
    parameters = list(inspect.signature(TERMS[term].__init__).parameters.values())[2:]
    return {p.name: p.default for p in parameters}


def test_every_term_is_documented_on_one_page_and_no_page_documents_another():
    assert documented_options().keys() == OWN_TERMS.keys()


@pytest.mark.parametrize("term", sorted(OWN_TERMS))
def test_a_table_of_arguments_has_every_option_of_the_term_with_its_default(term):
    table, options = documented_options()[term], options_of(term)
    assert list(table) == list(options)
    for option, default in options.items():
        if default is inspect.Parameter.empty:
            assert table[option] == REQUIRED, option
        else:
            expected = list(default) if isinstance(default, tuple) else default
            assert yaml.safe_load(table[option]) == expected, option


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_method_page_shows_parts_of_configs_as_they_are(page):
    shown = [block.split("\n", 1) for block in blocks(page, "yaml")]
    assert shown
    for first, excerpt in shown:
        config = REPOSITORY / first.removeprefix("# ")
        assert textwrap.indent(excerpt, 6 * " ") in config.read_text(), first


def terms_in(node):
    """All terms in a piece of a config."""
    if isinstance(node, list):
        for entry in node:
            yield from terms_in(entry)
    elif isinstance(node, dict) and "name" in node and "terms" not in node:
        yield node
    elif isinstance(node, dict):
        for key, value in node.items():
            if key != "opts":
                yield from terms_in(value)


@pytest.mark.parametrize("page", [README, *CLASSIFICATION], ids=name)
def test_terms_in_examples_exist_and_have_the_options_and_weights_they_are_given(page):
    inline = re.findall(r"`TERMS: (\[.*?\])`", page.read_text(), re.S)
    for text in [*blocks(page, "yaml"), *inline]:
        for spec in terms_in(yaml.safe_load(text)):
            options = dict(spec)
            term, weight = options.pop("name"), options.pop("weight", 1.0)
            assert term in TERMS, spec
            assert options.keys() <= options_of(term).keys(), spec
            if isinstance(weight, dict):
                assert coefficient_schedule(**{"max_iter": 10, **weight})(0) >= 0
            else:
                assert float(weight) > 0


@pytest.mark.parametrize("page", [README, *CLASSIFICATION, *GUIDES], ids=name)
def test_commands_name_scripts_configs_and_keys_that_exist(page):
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] != ["python"]:
                continue
            assert (REPOSITORY / words[1]).is_file(), line
            if "--config-file" in words and "..." not in words:
                flags = words[words.index("--config-file") :]
                args, own = argument_parser().parse_known_args(flags)
                opts = [] if own else args.opts  # which a script with flags of its own reads
                load_config(str(REPOSITORY / args.config_file), opts)


@pytest.mark.parametrize("page", [README, *sorted(DOCS.rglob("*.md"))], ids=name)
def test_config_files_of_classification_that_a_page_names_exist(page):
    for path in re.findall(r"configs/Classification/\w+\.yaml", page.read_text()):
        assert (REPOSITORY / path).is_file(), path


def test_the_index_lists_every_page_and_every_config():
    index = (DOCS / "methods" / "README.md").read_text()
    table = [x for x in index.splitlines() if x.startswith("| [")]
    linked = {link for line in table for link in re.findall(r"\]\((\w+\.md)", line)}
    assert linked == {page.name for page in PAGES}
    prefixes = {p for line in table for p in re.findall(r"`(\w+)`", line.rsplit(" | ", 1)[1])}
    there = {re.split(r"_(?:cifar_)?resnet\d", path.stem)[0] for path in CONFIGS.glob("*.yaml")}
    assert prefixes == there - {"kd_at_cs_kd"}
    assert "docs/methods/README.md" in README.read_text()


def flatten(node, prefix):
    if isinstance(node, CfgNode) and node:
        return {k: v for key in node for k, v in flatten(node[key], f"{prefix}.{key}").items()}
    return {prefix: node}


def test_the_page_of_keys_has_every_one_with_its_default_and_a_meaning():
    config_keys = runpy.run_path(str(DOCS / "config_keys.py"))
    source = (REPOSITORY / "sssd/config.py").read_text()
    sections = config_keys["keys_of"](source)
    table = {key: (value, text) for _, keys in sections for key, value, text in keys}
    cfg = get_cfg()
    add_sssd_config(cfg)
    keys = flatten(cfg.MODEL.SSSD, "MODEL.SSSD")
    assert table.keys() == keys.keys()
    for key, default in keys.items():
        value, text = table[key]
        assert eval(value, {"CN": CfgNode}) == default, key
        assert text.endswith(".") and text[0] in string.ascii_uppercase + '("', (key, text)
    assert len({text for _, text in table.values()}) > 0.85 * len(table)
    page = config_keys["page"](source)
    assert "| `COEFFICIENT.VALUES` | `[75.0, 100.0]` | Values of the schedule" in page
    assert "## Image classification: META_ARCHITECTURE" in page
    # Where the teacher's optimizer differs: a heading of two lines is one.
    assert len(sections) == 10, [title for title, _ in sections]


def anchors(path):
    """What GitHub calls the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", x).lower() for x in headings]
    return {re.sub(r"[^\w\- ]", "", x).strip().replace(" ", "-") for x in plain}


@pytest.mark.parametrize("page", [README, *sorted(DOCS.rglob("*.md"))], ids=name)
def test_relative_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_losses_alone_are_used_as_the_page_shows():
    (block,) = (x for x in blocks(DOCS / "classification.md", "python") if "sssd.losses" in x)
    found = {}
    exec(block, found)
    assert found["loss"].shape == torch.Size([]) and found["loss"] > 0
