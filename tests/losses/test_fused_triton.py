"""The GPU version of normalisation and divergence in one, against one after the other.

On the CPU, the kernels run in Triton's interpreter; with a GPU, they also run compiled.
"""

import functools
import importlib.util
import math
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sssd.losses import fused_triton, triton_kernels
from sssd.losses.fused_triton import is_supported
from sssd.losses.fused_triton import normalised_js_divergence as divergence
from sssd.losses.normalisation import NORMS
from tests.losses.test_fused import maps as maps_on_the_cpu
from tests.losses.test_fused import one_after_the_other


def copy_of_the_kernels() -> ModuleType:
    """The kernels once more, as Triton decides when it decorates one what becomes of it."""
    spec = importlib.util.spec_from_file_location("triton_kernels_copy", triton_kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


interpreted_copy = functools.cache(copy_of_the_kernels)


@pytest.fixture(params=["cpu (interpreted)", "cuda"])
def device(request, monkeypatch):
    """Where the kernels run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        return torch.device("cuda")
    import triton.language as tl

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Triton decided about its own functions when it was imported, maybe without the variable, and
    # what its interpreter does when it calls one outlasts the call.
    for name, combine in (("sum", "_sum_combine"), ("max", "_elementwise_max")):
        combine = getattr(tl.standard, combine)
        monkeypatch.setattr(tl, name, lambda x, axis, by=combine: tl.reduce(x, axis, by))
    monkeypatch.setattr(fused_triton, "kernels", interpreted_copy())
    return torch.device("cpu")


@pytest.fixture(params=[16, 4096], ids=lambda size: f"blocks of {size}")
def block(request, monkeypatch):
    """Many blocks of four cells, and a program takes several; or one block for all."""
    monkeypatch.setattr(fused_triton, "_BLOCK", request.param)
    monkeypatch.setattr(fused_triton, "_PROGRAMS", 20)


@pytest.fixture
def maps(device):
    def on_the_device(*args, **kwargs):
        student, teacher, mask = (x.detach() for x in maps_on_the_cpu(*args, **kwargs))
        student, teacher, mask = (x.to(device) for x in (student, teacher, mask))
        return student.requires_grad_(), teacher, mask

    return on_the_device


def with_gradient(value, student):
    return value.detach(), *torch.autograd.grad(value, student)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_those_of_one_after_the_other(
    block, maps, norm, masked, temperature
):
    student, teacher, mask = maps()
    mask = mask if masked else None
    options = {"across_channels": norm == "layer", "temperature": temperature}
    value, gradient = with_gradient(3 * divergence(student, teacher, mask, **options), student)
    expected = one_after_the_other(student, teacher, mask, norm, temperature)
    expected, of_expected = with_gradient(3 * expected, student)
    torch.testing.assert_close(value, expected, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(gradient, of_expected, atol=1e-14, rtol=1e-11)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_differences(maps, norm):
    student, teacher, mask = maps((1, 3, 2, 2))
    mask[0, 0, 1] = False

    def of_student(x):
        return divergence(x, teacher, mask, across_channels=norm == "layer", temperature=0.7)

    assert torch.autograd.gradcheck(of_student, (student,))


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 1, 1), (2, 7, 5, 9), (1, 1, 3, 4), (0, 4, 3, 3), (2, 3, 0, 4)]
)
def test_odd_shapes(maps, shape):
    student, teacher, mask = maps(shape)
    for chosen in (None, mask, torch.zeros_like(mask)):
        value, gradient = with_gradient(divergence(student, teacher, chosen), student)
        expected = one_after_the_other(student, teacher, chosen, "instance", 1.0)
        expected, of_expected = with_gradient(expected, student)
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(gradient, of_expected, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("hidden", [math.nan, math.inf])
def test_padded_cells_change_nothing(block, maps, hidden):
    student, teacher, mask = maps()
    clean, expected = with_gradient(divergence(student, teacher, mask), student)
    padded = ~mask[:, None].expand_as(student)
    dirty = student.detach().masked_fill(padded, hidden).requires_grad_()
    teacher = teacher.masked_fill(padded, -hidden)
    value, gradient = with_gradient(divergence(dirty, teacher, mask), dirty)
    assert torch.equal(value, clean) and torch.equal(gradient, expected)
    assert not gradient[padded].any()


@pytest.mark.parametrize("norm", NORMS)
def test_equal_maps_have_no_distance_and_no_gradient(maps, norm):
    student, _, mask = maps((2, 6, 5, 7), dtype=torch.float32)
    teacher = student.detach().clone()
    value = divergence(10 * student, 10 * teacher, mask, across_channels=norm == "layer")
    value, gradient = with_gradient(value, student)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("far", [False, True])
def test_float32_keeps_its_digits(maps, far):
    """Of the variance of values far from 0; of the quotients of distributions that are close."""
    student, teacher, _ = maps((2, 8, 4, 9), dtype=torch.float32)
    if far:
        student, teacher = student + 1000, teacher - 1000
    else:
        teacher = (student + 0.001 * teacher).detach()
    student = student.detach().requires_grad_()
    value, gradient = with_gradient(divergence(student, teacher), student)
    wide = student.detach().double().requires_grad_()
    expected = one_after_the_other(wide, teacher.double(), None, "instance", 1.0)
    expected, of_expected = with_gradient(expected, wide)
    torch.testing.assert_close(value.double(), expected, atol=0, rtol=5e-4)
    largest = of_expected.abs().max().item()
    torch.testing.assert_close(gradient.double(), of_expected, atol=2e-3 * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(maps, dtype):
    student, teacher, mask = maps((2, 8, 5, 6), dtype=dtype)
    with torch.autocast(student.device.type, dtype=torch.bfloat16):
        value = divergence(student, teacher, mask)
    value, gradient = with_gradient(value, student)
    wide = student.detach().float().requires_grad_()
    expected, of_expected = with_gradient(divergence(wide, teacher.float(), mask), wide)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, expected)
    rtol = 1.1 * torch.finfo(dtype).eps  # the interpreter cuts off instead of rounding
    torch.testing.assert_close(gradient.float(), of_expected, atol=1e-6, rtol=rtol)


def test_the_largest_numbers_of_half_precision_stay_finite(device):
    limit = torch.full((1, 4, 2, 2), 65504, dtype=torch.float16, device=device)
    limit[:, ::2] *= -1
    limit[..., 0] = 0
    value, gradient = with_gradient(divergence(limit.requires_grad_(), -limit.detach()), limit)
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and value > 0


def test_logits_far_apart_stay_finite(maps):
    student, teacher, _ = maps((1, 4, 3, 3), dtype=torch.float32)
    value, gradient = with_gradient(divergence(student, teacher, temperature=1e-3), student)
    assert 0 < value < 9 * math.log(2) + 1e-4 and torch.isfinite(gradient).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's NumPy
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("of_teacher", [False, True])
def test_what_is_not_a_number_shows(maps, wrong, of_teacher):
    student, teacher, _ = maps(dtype=torch.float32)
    (teacher if of_teacher else student.data)[0, 0, 0, 0] = wrong
    assert divergence(student, teacher).isnan()


@pytest.mark.parametrize("teacher_too", [False, True])
def test_maps_are_read_in_the_format_they_have(block, maps, teacher_too):
    student, teacher, mask = maps((2, 5, 6, 7))
    expected, of_expected = with_gradient(divergence(student, teacher, mask), student)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    if teacher_too:
        teacher = teacher.to(memory_format=torch.channels_last)
    # A mask as Detectron2's padding leaves it, part of a larger one.
    larger = torch.zeros(2, 8, 9, dtype=torch.bool, device=mask.device)
    larger[:, :6, :7] = mask
    value, gradient = with_gradient(divergence(last, teacher, larger[:, :6, :7]), last)
    torch.testing.assert_close(value, expected, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(gradient, of_expected, atol=1e-14, rtol=1e-11)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_parts_and_turned_maps(maps):
    whole, teacher, mask = maps((2, 4, 6, 7))
    for view in (lambda x: x[:, ::2, 1:4, 2:6], lambda x: x.transpose(-1, -2)):
        y, of_mask = view(teacher), view(mask[:, None].expand_as(whole))[:, 0]
        value, gradient = with_gradient(divergence(view(whole), y, of_mask), whole)
        expected = one_after_the_other(view(whole), y, of_mask, "instance", 1.0)
        expected, of_expected = with_gradient(expected, whole)
        torch.testing.assert_close(value, expected, atol=1e-13, rtol=1e-12)
        torch.testing.assert_close(gradient, of_expected, atol=1e-14, rtol=1e-11)


def test_nothing_but_the_two_maps_is_kept_for_backward(maps):
    student, teacher, mask = maps((1, 4, 32, 32), dtype=torch.float32)
    kept = {}

    def keep(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        divergence(student, teacher, mask)
    large = {pointer for pointer, size in kept.items() if size > mask.numel()}
    assert large == {student.data_ptr(), teacher.data_ptr()}


def test_the_same_input_gives_the_same_bits(maps):
    student, teacher, mask = maps((2, 6, 5, 7), dtype=torch.float32)
    once, again = (with_gradient(divergence(student, teacher, mask), student) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_only_the_student_gets_a_gradient(maps):
    student, teacher, _ = maps()
    divergence(student, teacher.requires_grad_()).backward()
    assert student.grad.any() and teacher.grad is None


def test_what_is_supported(maps):
    student, _, _ = maps((1, 3, 2, 2), dtype=torch.float16)
    assert is_supported(student) and is_supported(student.double())
    assert not is_supported(student.int()) and not is_supported(student[0])
    assert is_supported(student.new_empty(1, 2048, 1, 1))
    assert not is_supported(student.new_empty(1, 2049, 1, 1))
    assert not is_supported(student.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_kernels_are_tried_out_before_they_are_used(device, dtype):
    fused_triton.works_on.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_triton.works_on(device, dtype)


@pytest.mark.parametrize("fault", ["fails", "computes something else"])
def test_kernels_that_do_not_work_are_left_out_with_the_reason(device, monkeypatch, fault):
    apply = fused_triton._NormalisedJS.apply

    def faulty(*args):
        if fault == "fails":
            raise RuntimeError("no kernel image is available")
        return 1.01 * apply(*args)

    fused_triton.works_on.cache_clear()
    monkeypatch.setattr(fused_triton._NormalisedJS, "apply", faulty)
    reason = "no kernel image" if fault == "fails" else "not close"
    with pytest.warns(UserWarning, match=rf"do not work on {device.type}.*float32 \(.*{reason}"):
        assert not fused_triton.works_on(device, torch.float32)
    fused_triton.works_on.cache_clear()


def test_without_triton_nothing_is_supported(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(fused_triton, "kernels", copy_of_the_kernels())
    assert not is_supported(torch.zeros(1, 2, 3, 3))


def test_nothing_waits_for_the_gpu(request, device, maps):
    if device.type != "cuda":
        pytest.skip("the interpreter waits for itself")
    student, teacher, mask = maps((2, 64, 30, 40), dtype=torch.float32)
    for chosen in (None, mask):  # loading a kernel may wait
        divergence(student, teacher, chosen, temperature=2.0).backward()
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    torch.cuda.set_sync_debug_mode("error")
    for chosen in (None, mask):
        divergence(student, teacher, chosen, temperature=2.0).backward()


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_kernels_compile_for_a_gpu(monkeypatch, tmp_path, dtype, masked):
    """For an A100 on whatever machine; the interpreter takes things that the compiler does not."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    if not isinstance(triton.language.sum, triton.JITFunction):
        pytest.skip("Triton itself was imported for interpreting")
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
    )
    compiled, run = {}, triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.jit, "driver", SimpleNamespace(active=gpu))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    student, teacher, mask = maps_on_the_cpu((1, 5, 3, 3), dtype=dtype)
    monkeypatch.setattr(fused_triton, "kernels", copy_of_the_kernels())
    assert not is_supported(student)
    divergence(student, teacher, mask if masked else None).backward()
    assert set(compiled) == {"moments", "forward", "backward"}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
