"""Which trainings a plan of detectors has, and what is said of one that cannot be used."""

import pytest
import yaml

from sssd.studies.plan import load_plan
from tests.conftest import REPOSITORY

PLAN = """
task: detection
validation: bccd_val
test: bccd_test
metric: averaged/bbox/AP
early: 100
seeds: [1, 2]
opts: [SOLVER.MAX_ITER, 600]
detectors:
  faster_rcnn: "configs/BCCD/faster_rcnn_R_18_FPN{recipe}.yaml"
  fcos: "configs/BCCD/fcos_R_18_FPN{recipe}.yaml"
methods:
  plain:
  sssd: {recipe: _sssd}
  fixed:
    recipe: _sssd
    opts: [MODEL.SSSD.COEFFICIENT.SCHEDULE, constant, MODEL.SSSD.COEFFICIENT.VALUES, [50]]
  slow:
    opts: {fcos: [SOLVER.BASE_LR, 0.005]}
  fixed_longer:
    like: fixed
    opts: [SOLVER.MAX_ITER, 1200]
studies:
  methods: {methods: [plain, sssd], baseline: plain, test: true, detectors: [faster_rcnn]}
  coefficient:
    detectors: [faster_rcnn]
    methods: [fixed, sssd]
    seeds: [1]
    sweep: {key: MODEL.SSSD.COEFFICIENT.VALUES, values: [[10.0], [37.5, 50]]}
  all: {methods: [plain, slow], figure_from: 0.67}
"""


def write(tmp_path, **changes):
    content = yaml.safe_load(PLAN)
    for key, value in changes.items():
        *way, last = key.split("__")
        place = content
        for part in way:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_seeds_come_one_after_the_other_so_that_stopping_early_leaves_pairs(tmp_path):
    plan = load_plan(write(tmp_path))
    methods, coefficient, everything = plan.studies
    assert [t.name for t in methods.trainings] == [
        "faster_rcnn/plain/seed1",
        "faster_rcnn/sssd/seed1",
        "faster_rcnn/plain/seed2",
        "faster_rcnn/sssd/seed2",
    ]
    assert [t.name for t in coefficient.trainings] == [
        "faster_rcnn/fixed@10/seed1",
        "faster_rcnn/fixed@37.5-50/seed1",
        "faster_rcnn/sssd@10/seed1",
        "faster_rcnn/sssd@37.5-50/seed1",
    ]
    assert (methods.baseline, methods.test, coefficient.test) == ("plain", True, False)
    assert everything.figure_from == 0.67


def test_options_are_everybodys_then_the_methods_then_the_settings(tmp_path):
    plan = load_plan(write(tmp_path))
    options = {t.name: t.options for t in plan.trainings()}
    assert options["faster_rcnn/fixed@10/seed1"] == (
        "SOLVER.MAX_ITER", 600,
        "MODEL.SSSD.COEFFICIENT.SCHEDULE", "constant", "MODEL.SSSD.COEFFICIENT.VALUES", [50],
        "MODEL.SSSD.COEFFICIENT.VALUES", [10.0],
        "DATASETS.TEST", ("bccd_val", "bccd_test"),
    )  # fmt: skip
    assert "SOLVER.BASE_LR" in options["fcos/slow/seed1"]
    assert "SOLVER.BASE_LR" not in options["faster_rcnn/slow/seed1"]
    configs = {t.name: t.config for t in plan.trainings()}
    assert configs["faster_rcnn/plain/seed1"] == "configs/BCCD/faster_rcnn_R_18_FPN.yaml"
    assert configs["faster_rcnn/sssd/seed1"] == "configs/BCCD/faster_rcnn_R_18_FPN_sssd.yaml"


def test_a_method_that_is_like_another_has_its_recipe_and_options_first(tmp_path):
    plan = load_plan(write(tmp_path, studies__all__methods=["fixed", "fixed_longer"]))
    fixed, longer = (plan.studies[2].trainings[i] for i in (0, 1))
    assert longer.config == fixed.config
    without_datasets = fixed.options[:-2]
    assert longer.options[: len(without_datasets)] == without_datasets
    assert longer.options[len(without_datasets) :] == (
        "SOLVER.MAX_ITER", 1200, *fixed.options[-2:]
    )  # fmt: skip


def test_a_training_of_two_studies_is_made_once(tmp_path):
    plan = load_plan(write(tmp_path))
    names = [t.name for t in plan.trainings()]
    assert len(names) == len(set(names)) == 4 + 4 + 6  # plain of Faster R-CNN is in two
    assert [t.name for t in plan.trainings(["coefficient"])] == [
        t.name for t in plan.studies[1].trainings
    ]
    with pytest.raises(ValueError, match="no study 'nothing'; it has 'methods', 'coefficient'"):
        plan.trainings(["nothing"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"early": None}, "lacks the key 'early'"),
        ({"validation": None}, "lacks the key 'validation'"),
        ({"seed": [1]}, "the plan has the key 'seed', which is none of detectors, early"),
        ({"methods__sssd__option": []}, "the method 'sssd' has the key 'option'"),
        ({"methods__sssd__like": "lgd"}, "'sssd' is like 'lgd', which is none"),
        ({"methods__sssd__like": "fixed_longer"}, "'fixed_longer', .* or itself like another"),
        (
            {"studies__all__methods": ["kl"]},
            "'all' names 'kl', which is none of the methods: plain",
        ),
        ({"studies__all__detectors": ["yolo"]}, "names 'yolo', which is none of the detectors"),
        ({"studies__methods__baseline": "lgd"}, "the baseline 'lgd' of .* none of its own: plain"),
        ({"studies__coefficient__sweep": {"key": "A"}}, "needs the keys 'key' and 'values'"),
        ({"studies__variation": {"methods": ["plain"]}}, "'variation' needs another name"),
        ({"metric": "segm/AP"}, "metric is 'segm/AP', and has to be bbox/AP"),
        ({"studies": [1]}, "has another form than it should"),
    ],
)
def test_a_plan_that_cannot_be_used_is_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_plan(write(tmp_path, **changes))


def test_two_trainings_do_not_share_a_name(tmp_path):
    # 10 and 10.0 read the same in a file name, but 1e-7 more does too.
    values = [[10.0], [10.0000001]]
    sweep = {"key": "MODEL.SSSD.COEFFICIENT.VALUES", "values": values}
    with pytest.raises(ValueError, match="'faster_rcnn/fixed@10/seed1' stands for two trainings"):
        load_plan(write(tmp_path, studies__coefficient__sweep=sweep))


def test_a_file_that_is_no_plan_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="plan .*none.yaml cannot be read"):
        load_plan(tmp_path / "none.yaml")


def test_the_plans_of_the_results_can_be_used():
    for path in (REPOSITORY / "docs/results").glob("*/plan.yaml"):
        if "task: detection" in path.read_text():
            assert load_plan(path).trainings()
