"""Blocks by timing, with a clock of the test's own: the choice, where it is kept, its results."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from cases import error, make_side, make_targets

pytest.importorskip("triton", reason="triton is not installed")

from dudi_kernels import devices, linear_distill, linear_distill_loss, prepare
from dudi_kernels.aot.targets import GPUS
from dudi_kernels.backends.triton import launch, tune
from dudi_kernels.backends.triton.launch import Blocks, Target

ROWS, VOCAB, WIDTH = 20, 300, 32
H100 = Target("cuda", 90, 132)


@pytest.fixture(autouse=True)
def _steps() -> None:
    """Neither the compiled steps nor the plain ones."""


class Clock:
    """Times the calls in the order in which they come; keeps the blocks of each."""

    def __init__(self, monkeypatch, times):
        self.times, self.timed = times, []
        monkeypatch.setattr(tune, "milliseconds", self.measure)

    def measure(self, function):
        arguments = function.keywords
        blocks = tuple(arguments[name] for name in (*tune.BLOCKS, "num_warps", "num_stages"))
        self.timed.append((function.args[1].fn.__name__, Blocks(*blocks)))
        function()
        return next(self.times)


@pytest.fixture
def on(monkeypatch, tmp_path):
    """Switched on, as in a new process, with a cache of its own."""

    def start(times=None):
        monkeypatch.setenv("DUDI_AUTOTUNE", "1")
        monkeypatch.setenv("DUDI_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(tune, "known", {})
        return Clock(monkeypatch, iter(times or itertools.count(1)))

    return start


@pytest.fixture
def launched(monkeypatch):
    """The blocks of what runs outside of the clock, too."""
    found, real = [], launch.run

    def record(device, kernel, grid, **arguments):
        if "BLOCK_N" in arguments:
            found.append((kernel.fn.__name__, arguments["BLOCK_N"], arguments["BLOCK_V"]))
        real(device, kernel, grid, **arguments)

    monkeypatch.setattr(launch, "run", record)
    return found


def per_row(divergence="forward_kl", dtype=torch.float32):
    """Values and gradients by *recompute*."""
    student, teacher = make_side(ROWS, VOCAB, WIDTH, dtype), make_side(ROWS, VOCAB, 16, dtype)
    sides = student.hidden, student.head, teacher.hidden, teacher.head
    targets = make_targets(ROWS, VOCAB)
    got = linear_distill(*sides, targets=targets, divergence=divergence, backend="triton")
    (got.divergence.sum() + got.log_prob.sum() + got.entropy.sum()).backward()
    return [*got, *(t.grad for t in student.inputs)]


def forward(divergence="forward_kl", dtype=torch.float32):
    """One kernel alone."""
    with torch.no_grad():
        student, teacher = make_side(ROWS, VOCAB, WIDTH, dtype), make_side(ROWS, VOCAB, 16, dtype)
        sides = student.hidden, student.head, teacher.hidden, teacher.head
        return list(linear_distill(*sides, divergence=divergence, backend="triton"))


def retained(divergence):
    """By *retain*, whose gradient is written over the logits."""
    student, teacher = make_side(ROWS, VOCAB, WIDTH), make_side(ROWS, VOCAB, 16)
    got = linear_distill_loss(
        student.hidden,
        student.head,
        teacher.hidden,
        teacher.head,
        targets=make_targets(ROWS, VOCAB),
        ce_weight=0.3,
        divergence=divergence,
        backend="triton",
    )
    got.loss.backward()
    return [*got, *(t.grad for t in student.inputs)]


def test_off_by_default(monkeypatch, tmp_path, launched):
    monkeypatch.delenv("DUDI_AUTOTUNE", raising=False)
    monkeypatch.setenv("DUDI_CACHE_DIR", str(tmp_path))
    clock = Clock(monkeypatch, iter([]))
    per_row()
    default = launch.fused_blocks(launch.target_of(torch.device("cpu")), torch.float32)
    assert {found[1:] for found in launched} == {(default.rows, default.columns)}
    assert not clock.timed and not list(tmp_path.iterdir())


def test_the_fastest_is_chosen_and_kept(on, launched, tmp_path):
    clock = on([5, 4, 1, 9, *[9] * 100])
    plain = per_row()
    kernels = [name for name, _ in clock.timed]
    assert set(kernels) == {"statistics", "gradient"}
    best = clock.timed[2]
    assert launched[kernels.count("statistics")] == (best[0], best[1].rows, best[1].columns)
    count = len(clock.timed)
    again = per_row()
    assert len(clock.timed) == count  # from memory
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))

    stored = json.loads((tmp_path / "autotune.json").read_text())["choices"]
    (key,) = [key for key in stored if "kernel=statistics" in key]
    assert Blocks(*stored[key]) == best[1]
    assert [file.name for file in tmp_path.iterdir()] == ["autotune.json"]
    fresh = on([])  # another process
    other = per_row()
    assert not fresh.timed
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_keys_tell_apart_what_matters(on):
    on()
    forward()
    forward("reverse_kl")
    forward(dtype=torch.bfloat16)
    assert len(tune.known) == 3
    one = next(iter(tune.known))
    assert " kernel=statistics " in one and " s_width=32 " in one and " CHAIN=1" in one


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": "another", "choices": {}}', "\0", "[" * 200_000]
)
@pytest.mark.filterwarnings("ignore:.*autotune.json is ignored")
def test_a_bad_file_is_ignored_and_replaced(text, on, tmp_path):
    file = tmp_path / "autotune.json"
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match="autotune.json is ignored"):
        assert tune._read(file) == {}
    clock = on()
    forward()
    assert clock.timed and json.loads(file.read_text())["format"] == tune.FORMAT


def test_a_stored_choice_that_is_no_candidate_is_not_taken(on, tmp_path):
    on()
    forward()
    file = tmp_path / "autotune.json"
    found = json.loads(file.read_text())
    found["choices"] = {key: [7, "x"] for key in found["choices"]} | {"other": "kept"}
    file.write_text(json.dumps(found))
    clock = on()
    forward()
    assert clock.timed
    assert json.loads(file.read_text())["choices"]["other"] == "kept"


@pytest.mark.filterwarnings("ignore:.*autotune.json")
def test_a_folder_that_cannot_be_written_is_not_fatal(on, monkeypatch, tmp_path):
    clock = on()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUDI_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="can't be written"):
        tune._write(
            tune.cache_file(),
            "key",
            launch.read_blocks(launch.target_of(torch.device("cpu")), True),
        )
    forward()
    count = len(clock.timed)
    forward()
    assert count and len(clock.timed) == count


def test_what_fails_is_dropped(on, monkeypatch):
    clock, real = on(), tune.milliseconds

    def measure(function):
        if len(clock.timed) != 3:
            clock.timed.append(None)
            raise RuntimeError("out of resources")
        return real(function)

    monkeypatch.setattr(tune, "milliseconds", measure)
    want = forward()
    assert clock.timed[3][1] in tune.known.values()

    def refuse(function):
        raise RuntimeError("no device")

    on()
    monkeypatch.setattr(tune, "milliseconds", refuse)
    monkeypatch.setattr(tune, "_read", lambda file: {})
    monkeypatch.setattr(tune, "_write", None)  # nothing to keep
    assert error(forward()[0], want[0]) <= 1e-6


def test_never_while_a_graph_is_captured(on, monkeypatch):
    clock = on()
    monkeypatch.setattr(devices, "capturing", lambda device: True)
    forward()
    assert not clock.timed and not tune.known
    monkeypatch.setattr(devices, "capturing", lambda device: False)
    forward()
    assert clock.timed


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("run", [per_row, retained])
def test_timing_disturbs_nothing(run, divergence, on, monkeypatch):
    monkeypatch.setattr(prepare, "prefers_recompute", lambda *arguments: False)
    monkeypatch.setenv("DUDI_AUTOTUNE", "0")
    want = run(divergence)
    clock = on()  # the first, which is the default, is the fastest
    got = run(divergence)
    assert len({name for name, _ in clock.timed}) >= 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("run", [per_row, retained])
def test_every_candidate_gives_the_same(run, monkeypatch):
    monkeypatch.setattr(prepare, "prefers_recompute", lambda *arguments: False)
    want = run("jsd")
    default = launch.read_blocks(launch.target_of(torch.device("cpu")), True)
    if run is per_row:
        default = launch.fused_blocks(H100, torch.float32)
    found = tune.candidates(default, None, 4, run is per_row)
    assert len(found) >= 8
    for blocks in found[1:]:
        monkeypatch.setattr(launch, "read_blocks", lambda *_, blocks=blocks: blocks)
        monkeypatch.setattr(launch, "fused_blocks", lambda *_, blocks=blocks, **__: blocks)
        assert all(error(a, b) <= 2e-6 for a, b in zip(run("jsd"), want, strict=True))


def test_candidates_fit_the_target(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for capability in (80, 86, 90, 100, 120):
        target = H100._replace(capability=capability)
        limits = tune.limits_of(target)
        assert limits is not None and limits.shared <= GPUS["sm_90"].shared
        for dtype in (torch.float32, torch.bfloat16):
            for load in (0, 2):
                default = launch.fused_blocks(target, dtype, load)
                found = tune.candidates(default, limits, dtype.itemsize, True)
                assert found[0] == default and 4 <= len(found) <= len(tune.MOVES) + 1
                assert len(set(found)) == len(found)
                for blocks in found[1:]:
                    operands = (blocks.rows + blocks.columns) * blocks.width * dtype.itemsize
                    assert operands * blocks.stages <= limits.shared
                    assert blocks.rows * blocks.columns / (32 * blocks.warps) < 255 / 2
                    assert min(blocks[:3]) >= 16 and blocks.warps <= 32
    read = tune.candidates(Blocks(1, 4096, 16, 8, 2), tune.limits_of(H100), 4, False)
    assert read[0] == Blocks(1, 4096, 16, 8, 2) and {b.width for b in read} == {16}
    assert tune.limits_of(Target("cuda", 86, 84)) == tune.Limits(99 * 1024, 255, 65536, 32)
    assert tune.limits_of(Target("hip", 0, 304)) == tune.Limits(64 * 1024, 512, 131072, 64)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("DUDI_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tune.cache_file() == tmp_path / "dudi" / "autotune.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tune.cache_file() == tmp_path / ".cache" / "dudi" / "autotune.json"
