"""The trainer of classifiers under DistributedDataParallel: two CPU processes, each on a disk of
its own, on which the second one finds no teacher, no results and no checkpoint."""

import sssd  # noqa: F401  (spawned processes import this first: the compatibility layer)

# isort: split
import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("timm", reason="timm is not installed")

from sssd.engine import (
    ClassificationTrainer,
    run_stages,
)
from tests.classifiers import (
    KEYS,
    TINY,
    assert_same,
    tiny_config,
    tiny_records,
)
from tests.ranks import join, run_two_ranks

TEACHER = KEYS + "TEACHER.WEIGHTS"
RUNS = {
    "kd and pairs": ("kd", KEYS + "TERMS", [{"name": "cross_entropy"}, {"name": "kd"},
                                            {"name": "class_pairs"}]),
    "mutual learning": ("dml",),
    "hint": ("fitnets",),
    "given teacher": ("kd", TEACHER, "kd and pairs/student/teacher/model_final.pth"),
}  # fmt: skip


def train_one_rank(rank, port, folder):
    join(rank, port)
    disk = os.path.join(folder, f"disk{rank}")
    os.mkdir(disk)
    os.chdir(disk)
    label_of = {r["image"].tobytes(): r["label"] for r in tiny_records()}
    seen, weights, results = [], {}, {}
    train = ClassificationTrainer.train

    def watched(self):
        model = self.checkpointer.model
        assert isinstance(self._trainer.model, DistributedDataParallel)

        def note(module, args):
            if module.training:
                seen[-1].append([
                    (x["image_id"], x["label"],
                     label_of[x["pair"].permute(1, 2, 0).numpy().tobytes()] if "pair" in x else -1,
                     "pair" in x and torch.equal(x["pair"], x["image"]))
                    for x in args[0]
                ])  # fmt: skip

        seen.append([])
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.register_forward_pre_hook(note)
        train(self)
        parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
        weights[run, os.path.basename(self.cfg.OUTPUT_DIR)] = (start, parameters)

    ClassificationTrainer.train = watched
    for run, (recipe, *opts) in RUNS.items():
        cfg = tiny_config(
            recipe, os.path.join(run, "student"), KEYS + "AUGMENTATION", "none",
            "SOLVER.MAX_ITER", 4, "DATASETS.TEST", (TINY,), *opts,
        )  # fmt: skip
        results[run] = run_stages(cfg), run_stages(cfg, resume=True)
    torch.save(
        {"weights": weights, "seen": seen, "results": results}, os.path.join(folder, f"{rank}.pth")
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_two_ranks(train_one_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.long
def test_both_processes_hold_the_same_weights_after_every_stage(ranks):
    first, second = (rank["weights"] for rank in ranks)
    assert list(first) == [
        ("kd and pairs", "teacher"), ("kd and pairs", "student"), ("mutual learning", "student"),
        ("hint", "teacher"), ("hint", "hint"), ("hint", "student"), ("given teacher", "student"),
    ]  # fmt: skip
    for key in first:
        assert_same(first[key][1], second[key][1])
        start, end = first[key]
        moved = {name for name in end if not torch.equal(start[name], end[name])}
        expected = {name for name in end if not name.startswith("teacher.")}
        if key == ("hint", "hint"):  # which leaves what comes after the hinted layer alone
            expected = {n for n in expected if not n.startswith(("student.layer3", "student.fc"))}
        assert moved == expected, key


@pytest.mark.long
def test_the_main_process_has_the_results_and_both_find_them_complete(ranks):
    first, second = (rank["results"] for rank in ranks)
    for run in RUNS:
        results, resumed = first[run]
        assert results["student"]["classification"] and resumed == results
        assert not any(second[run][0].values()) and second[run][1] == results


@pytest.mark.long
def test_the_labels_of_pairs_match_over_both_processes(ranks):
    # The second training is the one with pairs; a step of both processes has no image twice.
    first, second = (rank["seen"][1] for rank in ranks)
    assert len(first) == len(second) == 4
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == len(theirs) == 4
        for _, label, pair_label, is_same in ours + theirs:
            assert label == pair_label and not is_same
        assert not {x[0] for x in ours} & {x[0] for x in theirs}
