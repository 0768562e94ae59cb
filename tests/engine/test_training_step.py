"""One iteration on a model whose numbers can be worked out by hand."""

import itertools
import math
import os

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from sssd.engine import CheckpointError, Trainer, TrainingStep
from sssd.losses import ShareController
from tests.coco_files import register_coco
from tests.detectors import tiny_config


class Line(nn.Module):
    """loss = mean over samples of (w x - y)^2 / 2, and what a test adds."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0))
        self.norm = nn.BatchNorm1d(1)
        self.controller = ShareController(share=0.5)
        self.dtypes = []

    def forward(self, batch):
        x, y = (torch.tensor([sample[key] for sample in batch]) for key in ("x", "y"))
        self.norm(x[:, None])
        loss = ((self.w * x - y) ** 2 / 2).mean()
        self.controller(loss, loss)
        self.dtypes.append((self.w[None, None] @ torch.ones(1, 1)).dtype)
        extra = {k: sum(sample[k] for sample in batch) for k in ("factor",) if k in batch[0]}
        return {"loss_a": loss, "loss_b": loss * extra.get("factor", 1.0)}


def sample(x, y, **others):
    return {"x": float(x), "y": float(y), "image_id": int(x), **others}


FOUR = [sample(1, 1), sample(2, 1), sample(3, 1), sample(4, 3)]
# d/dw of one loss at w = 2 is the mean of (w x - y) x: (1 + 6 + 15 + 20) / 4 = 10.5, of both 21.
GRADIENT = 21.0


def make(batches, **options):
    model = Line()
    optimizer = torch.optim.SGD([model.w], lr=0.01, momentum=0.9)
    step = TrainingStep(model, itertools.cycle(batches), optimizer, **options)
    step.storage = EventStorage()
    return step


def run(step, count=1):
    """Runs iterations; returns the last values that were logged."""
    with step.storage as storage:
        for _ in range(count):
            step.iter = storage.iter
            step.run_step()
            storage.step()
        return {name: value for name, (value, _) in storage.latest().items()}


def state(step):
    values = {**step.model.state_dict(), "lr": torch.tensor(step.optimizer.param_groups[0]["lr"])}
    values.update(step.optimizer.state.get(step.model.w, {}))
    return {name: value.clone() for name, value in values.items()}


def assert_same(before, after):
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_update_the_losses_and_the_norm_by_hand():
    step = make([FOUR])
    logged = run(step)
    assert step.model.w.item() == pytest.approx(2 - 0.01 * GRADIENT)
    loss = (1 + 9 + 25 + 25) / 8
    assert logged["loss_a"] == logged["loss_b"] == loss and logged["total_loss"] == 2 * loss
    assert logged["grad_norm"] == GRADIENT
    assert logged["max_memory_mb"] > 50 and logged["data_time"] >= 0
    assert "loss_scale" not in logged


def test_the_parts_of_a_batch_make_the_update_of_the_whole():
    parts = make([FOUR[:2], FOUR[2:]], num_batches=2)
    whole = make([FOUR])
    for _ in range(3):
        logged, expected = run(parts), run(whole)
        assert parts.model.w.item() == pytest.approx(whole.model.w.item(), rel=1e-6)
        for name in ("loss_a", "total_loss", "grad_norm"):
            assert logged[name] == pytest.approx(expected[name], rel=1e-6)


NAN, INF = math.nan, math.inf


def bad(value):
    return [sample(1, 1, factor=0.0), sample(5, 1, factor=value)]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_with_its_name_and_images(precision):
    step = make([FOUR, bad(INF)], precision=precision)
    run(step)
    before = state(step)
    sentence = r"^Training stops, not finite in iteration 1: loss_b, grad_norm \(images 1, 5\)\.$"
    with pytest.raises(FloatingPointError, match=sentence):
        run(step)
    assert_same(before, state(step))


@pytest.mark.parametrize("full", ["the state", "the images"])
def test_a_full_disk_does_not_hide_what_is_not_finite(full, tmp_path):
    def save_last_good():
        if full == "the state":
            raise CheckpointError("The checkpoint x.pth cannot be written (full).")
        (tmp_path / "not_finite.pth.part").symlink_to("/dev/full")
        return str(tmp_path / "model_last_good.pth")

    step = make([bad(INF)])
    step.save_last_good = save_last_good
    reason = {
        "the state": r"x\.pth cannot be written \(full\)\. Lower",
        "the images": r"last_good\.pth, but not the images \(.*not_finite\.pth cannot be written",
    }
    with pytest.raises(FloatingPointError, match=rf"in iteration 0: loss_b.*{reason[full]}"):
        run(step)
    assert not os.listdir(tmp_path)


def test_a_gradient_that_is_not_finite_stops_although_the_loss_is():
    step = make([FOUR])
    step.model.w.register_hook(lambda grad: grad * NAN)
    before = state(step)
    with pytest.raises(FloatingPointError, match="iteration 0: grad_norm "):
        run(step)
    assert_same(before, state(step))


def test_a_model_that_gives_up_by_itself_is_caught_too():
    def give_up(model, inputs):
        raise FloatingPointError("Predicted boxes contain Inf/NaN. Training has diverged.\nMore.")

    step = make([FOUR], max_skipped=1)
    step.model.register_forward_pre_hook(give_up)
    run(step)  # skipped
    with pytest.raises(FloatingPointError, match=r"iteration 1: Predicted boxes .* diverged\. \("):
        run(step)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_so_many_iterations_are_skipped_and_leave_nothing(caplog, precision):
    step = make([FOUR, bad(NAN), bad(INF), FOUR, bad(INF)], precision=precision, max_skipped=2)
    run(step)
    before = state(step)
    run(step, 2)
    assert_same(before, state(step))
    assert (
        "Skipped, 2 of 2: not finite in iteration 2: loss_b, grad_norm (images 1, 5)" in caplog.text
    )
    run(step)
    assert step.model.w != before["w"]
    with pytest.raises(FloatingPointError, match="iteration 4"):
        run(step)


def test_an_overflow_of_float16_makes_the_scale_smaller_and_counts_for_nothing(caplog):
    caplog.set_level("INFO", "sssd")
    step = make([FOUR], precision="float16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = state(step)
    run(step)
    assert_same(before, state(step))  # nor have the controller's averages moved
    assert step.scaler.get_scale() == 2.0**126 and step.num_skipped == 0
    assert "overflows in iteration 0 at the loss scale" in caplog.text
    logged = run(step, 5)
    assert logged["grad_norm"] < INF and logged["loss_scale"] == step.scaler.get_scale()
    assert step.model.w != before["w"]
    # Averages have moved once in each iteration that counted.
    assert step.model.controller.averages[0] > 0


def test_an_overflow_that_no_scale_cures_stops():
    step = make([FOUR], precision="float16")
    step.model.w.register_hook(lambda grad: grad * INF)
    with pytest.raises(FloatingPointError, match="grad_norm"):
        run(step, 200)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_products_have_the_precision(precision, dtype):
    step = make([FOUR], precision=precision)
    run(step)
    assert step.model.dtypes == [dtype] and step.model.w.dtype == torch.float32
    assert step.model.w.item() == pytest.approx(2 - 0.01 * GRADIENT, rel=1e-3)


def test_an_unknown_precision_is_a_sentence():
    with pytest.raises(ValueError, match="'half' is unknown: give one of float32, float16, bfl"):
        make([FOUR], precision="half")


def test_scale_and_count_are_saved():
    step = make([FOUR, bad(NAN)], precision="float16", max_skipped=5)
    run(step, 4)
    other = make([FOUR], precision="float16", max_skipped=5)
    other.load_state_dict(step.state_dict())
    assert other.num_skipped == 2
    assert other.scaler.state_dict() == step.scaler.state_dict()
    plain = make([FOUR])
    plain.load_state_dict(step.state_dict())  # another precision than before
    plain.load_state_dict({"iteration": 3, "optimizer": step.optimizer.state_dict()})


def test_what_a_failed_iteration_leaves_repeats_it(tmp_path):
    name = register_coco("failing_coco", tmp_path / "data")
    cfg = tiny_config(
        "DATASETS.TRAIN", (name,), "DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", (48, 64),
        "SOLVER.MAX_ITER", 6, "SEED", 3, "OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", (),
    )  # fmt: skip

    def fail(resume):
        torch.manual_seed(3)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume)
        seen = []

        def poison(module, inputs, losses):
            seen.append({name: loss.item() for name, loss in losses.items()})
            return {**losses, "loss_cls": losses["loss_cls"] * (NAN if trainer.iter == 3 else 1)}

        trainer._trainer.model.register_forward_hook(poison)
        with pytest.raises(
            FloatingPointError, match="not finite in iteration 3: loss_cls"
        ) as error:
            trainer.train()
        return seen, str(error.value), torch.load(tmp_path / "not_finite.pth", weights_only=True)

    losses, message, dump = fail(resume=False)
    assert dump["iteration"] == 3 and math.isnan(dump["values"]["loss_cls"])
    (batch,) = dump["batches"]
    ids = [image["image_id"] for image in batch]
    assert f"(images {ids[0]}, {ids[1]})" in message
    assert batch[0]["image"].dtype == torch.uint8
    assert batch[0]["instances"]["gt_boxes"].shape == (len(batch[0]["instances"]["gt_classes"]), 4)
    again, message_again, dump_again = fail(resume=True)
    assert again == losses[3:] and message_again == message
    assert torch.equal(dump_again["batches"][0][0]["image"], batch[0]["image"])
    assert not os.path.exists(tmp_path / "model_0000003.pth")


def test_statistics_that_precise_bn_has_replaced_are_put_back_too():
    step = make([FOUR])
    step.model.norm.running_mean = torch.tensor([5.0])  # as fvcore's update_bn_stats does
    step._forward_state.keep()
    step.model.norm(torch.ones(4, 1))
    assert step.model.norm.running_mean.item() != 5.0
    step._forward_state.put_back()
    assert step.model.norm.running_mean.item() == 5.0
