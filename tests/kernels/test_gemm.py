"""The GEMMs by bf16 products (native/gemm.cpp) against float64."""

from __future__ import annotations

import pytest
import torch
from cases import error
from torch import Tensor

from dudi_kernels import linear_distill_loss
from dudi_kernels.backends.native import gemm
from dudi_kernels.head import LMHead

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [  # R, K, V
    (1, 1, 1),
    (1, 896, 4097),
    (15, 31, 17),
    (17, 33, 1000),
    (16, 896, 15),
    (171, 576, 4097),
    (400, 64, 1000),  # two blocks of rows
    (384, 1100, 700),  # hidden states in several chunks
]
RTOL = {"highest": 5e-7, "high": 2e-5}  # a single product may be off by 2^-16 with two terms


@pytest.fixture(autouse=True)
def _machine(_steps: None) -> None:
    if gemm.library() is None:
        pytest.skip("no AMX, its GEMMs are not built, or the steps are plain")


@pytest.fixture(params=RTOL)
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def problem(shape, hidden_dtype=torch.float32, weight_dtype=torch.float32, scale=1e-6):
    rows, width, columns = shape
    hidden = torch.randn(rows, width).to(hidden_dtype)
    weight = torch.randn(columns, width).to(weight_dtype)
    return hidden, weight, torch.randn(rows, columns) * scale


def products(hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    out = torch.full_like(grad, torch.nan)
    of_hidden = torch.zeros(hidden.shape)
    of_weight = torch.full(weight.shape, torch.nan)
    gemm.project(hidden, weight, out)
    gemm.hidden_gradient(grad, weight, of_hidden)
    gemm.weight_gradient(grad, hidden, of_weight, False)
    return [out, of_hidden, of_weight]


def textbook(hidden: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    h, w, g = hidden.double(), weight.double(), grad.double()
    return [h @ w.T, g @ w, g.T @ h]


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, hidden_dtype, weight_dtype, precision):
    operands = problem(shape, hidden_dtype, weight_dtype)
    for got, want in zip(products(*operands), textbook(*operands), strict=True):
        assert error(got, want) < RTOL[precision]


@pytest.mark.parametrize("scale", [1e-24, 1e12])
def test_small_and_large_gradients_keep_their_bits(scale):
    operands = problem((64, 100, 1000), scale=scale)
    for got, want in zip(products(*operands), textbook(*operands), strict=True):
        assert error(got, want) < RTOL["highest"]


def test_gradients_are_added():
    hidden, weight, grad = problem((40, 70, 500))
    _, of_hidden, of_weight = (t.float() for t in textbook(hidden, weight, grad))
    got_hidden, got_weight = torch.ones(40, 70), torch.ones(500, 70)
    gemm.hidden_gradient(grad, weight, got_hidden)
    gemm.weight_gradient(grad, hidden, got_weight, True)
    torch.testing.assert_close(got_hidden, 1 + of_hidden, rtol=2e-7, atol=0)
    torch.testing.assert_close(got_weight, 1 + of_weight, rtol=2e-7, atol=0)


def test_strides():
    """Operands and results may be columns of something wider; what is beside them stays."""
    hidden, weight, grad = problem((40, 70, 500))
    wide = [torch.nn.functional.pad(t, (3, 5), value=7.0) for t in (hidden, weight, grad)]
    inner = [t[:, 3:-5] for t in wide]
    assert gemm.takes(*inner)
    out, of_hidden, of_weight = (t.clone() for t in (wide[2], wide[0], wide[1]))
    views = [t[:, 3:-5] for t in (out, of_hidden, of_weight)]
    views[1].zero_()
    gemm.project(inner[0], inner[1], views[0])
    gemm.hidden_gradient(inner[2], inner[1], views[1])
    gemm.weight_gradient(inner[2], inner[0], views[2], False)
    for whole, view, want in zip(
        (out, of_hidden, of_weight), views, products(hidden, weight, grad), strict=True
    ):
        assert torch.equal(view, want)
        assert (whole[:, :3] == 7).all() and (whole[:, -5:] == 7).all()


def test_no_rows():
    hidden, weight, grad = problem((0, 30, 100))
    assert not products(hidden, weight, grad)[2].any()


def test_what_is_not_finite_stays_so():
    for bad in (torch.inf, -torch.inf, torch.nan):
        hidden, weight, grad = problem((20, 40, 300))
        weight[7, 3] = grad[5, 9] = bad
        out, of_hidden, of_weight = products(hidden, weight, grad)
        assert not out[:, 7].isfinite().any() and out[:, 8].isfinite().all()
        assert not of_hidden[:, 3].isfinite().any() and not of_hidden[5].isfinite().any()
        assert of_hidden[4, 4].isfinite()
        assert not of_weight[9].isfinite().any() and of_weight[8].isfinite().all()


def test_results_do_not_depend_on_threads(precision):
    operands = problem((171, 320, 4097))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = products(*operands)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for got, want in zip(products(*operands), one, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_served():
    hidden, weight, _ = problem((4, 6, 8))
    assert gemm.takes(hidden, weight)
    assert not gemm.takes(hidden.half(), weight)
    assert not gemm.takes(hidden, weight.t().contiguous().t())
    assert not gemm.takes(hidden.to("meta"), weight.to("meta"))


def test_the_losses_use_them(monkeypatch):
    calls, run = [], gemm._run

    def counted(role, *arguments):
        calls.append(role)
        run(role, *arguments)

    monkeypatch.setattr(gemm, "_run", counted)
    hidden, weight, _ = problem((20, 24, 300), torch.bfloat16, torch.bfloat16)
    head = LMHead(weight.requires_grad_())
    linear_distill_loss(hidden.requires_grad_(), head, hidden.detach(), head).loss.backward()
    assert set(calls) == {gemm.PROJECT, gemm.HIDDEN_GRADIENT, gemm.WEIGHT_GRADIENT}


def test_switched_off(monkeypatch):
    monkeypatch.setenv("DUDI_NATIVE", "0")
    gemm.library.cache_clear()
    try:
        assert gemm.library() is None
    finally:
        monkeypatch.undo()
        gemm.library.cache_clear()
