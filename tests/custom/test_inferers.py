from __future__ import annotations

import math
import threading
import time
from unittest.mock import Mock

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Lambdad
from torch import nn

from custom.inference import (
    FewWindowsInferer,
    SlidingWindowsInferer,
    SubjectDataset,
    SubjectEvaluator,
    SubjectLoader,
    WholeVolumeInferer,
    describe,
)


class NeedsSixteen(nn.Module):
    def forward(self, x):
        assert all(size % 16 == 0 for size in x.shape[2:])
        return x[:, :3] * 2


@pytest.mark.parametrize("shape", [(16, 32, 48), (17, 30, 1), (31, 16, 33)])
def test_whole_volume_pads_and_gives_every_voxel_back(shape):
    x = torch.rand(2, 4, *shape)
    assert torch.equal(WholeVolumeInferer()(x, NeedsSixteen()), x[:, :3] * 2)


def test_whole_volume_keeps_metadata():
    x = MetaTensor(torch.rand(1, 4, 17, 16, 16), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    out = WholeVolumeInferer()(x, NeedsSixteen())
    assert isinstance(out, MetaTensor) and torch.equal(out.affine, x.affine)


def evaluator(names, network=None, postprocessing=None, fail_reading=()):
    def read(name):
        if name in fail_reading:
            raise ValueError(f"{name}: cannot be read")
        return torch.full((4, 16, 16, 16), 1.0)

    data = [{"subject": name, "image": name} for name in names]
    loader = DataLoader(SubjectDataset(data, Lambdad("image", read)), batch_size=1, num_workers=0)
    return SubjectEvaluator(
        device=torch.device("cpu"),
        val_data_loader=loader,
        network=network or NeedsSixteen(),
        postprocessing=postprocessing,
    )


def outcomes(engine):
    seen = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: seen.append((engine.state.subject, engine.state.failure is None))
    )
    engine.run()
    return seen


def test_a_subject_that_cannot_be_read_does_not_stop_the_batch():
    engine = evaluator(["a", "b", "c"], fail_reading=["b"])
    assert outcomes(engine) == [("a", True), ("b", False), ("c", True)]
    assert engine.failures == {"b": "b: cannot be read"}


def test_a_subject_that_fails_while_written_does_not_stop_the_batch():
    calls = []

    def write(data):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        return data

    engine = evaluator(["a", "b", "c"], postprocessing=write)
    assert outcomes(engine) == [("a", True), ("b", False), ("c", True)]
    assert "disk full" in engine.failures["b"]


def test_interruption_is_not_swallowed():
    class Interrupted(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(["a"], network=Interrupted()).run()


def test_description_names_the_innermost_cause():
    try:
        try:
            raise ValueError("file is truncated")
        except ValueError as cause:
            raise RuntimeError("applying transform") from cause
    except RuntimeError as error:
        assert describe(error) == "file is truncated"
    assert "out of memory" in describe(MemoryError())


@pytest.mark.parametrize("shape", [(17, 30, 25), (40, 50, 33), (100, 31, 64), (64, 64, 64)])
def test_few_windows_give_every_voxel_back(shape):
    x = torch.rand(1, 4, *shape)
    torch.testing.assert_close(FewWindowsInferer((32, 48, 32))(x, NeedsSixteen()), x[:, :3] * 2)


@pytest.mark.parametrize("shape", [(137, 163, 135), (134, 177, 136), (240, 240, 155), (65, 16, 200)])
def test_few_windows_are_no_larger_than_the_patch_and_as_many_as_planned(shape):
    inferer, seen = FewWindowsInferer((128, 160, 112)), []

    def network(x):
        seen.append(tuple(x.shape[2:]))
        return x

    inferer(torch.zeros(1, 1, *shape), network)
    window, counts = inferer.plan(shape)
    assert math.prod(window) <= 128 * 160 * 112 and all(length % 16 == 0 for length in window)
    assert seen == [window] * math.prod(counts)
    assert all(n * one >= full + (n - 1) * 8 for n, one, full in zip(counts, window, shape, strict=True))


def test_a_brain_costs_no_more_in_few_windows_than_at_once():
    window, counts = FewWindowsInferer((128, 160, 112)).plan((134, 177, 136))
    assert math.prod(window) * math.prod(counts) == 144 * 192 * 144 and math.prod(counts) == 2


def test_what_fits_the_patch_is_one_pass():
    x = torch.rand(1, 4, 30, 40, 17)
    assert torch.equal(FewWindowsInferer((48, 48, 48))(x, NeedsSixteen()), WholeVolumeInferer()(x, NeedsSixteen()))


@pytest.mark.parametrize(
    "inferer",
    [
        WholeVolumeInferer,
        lambda **given: FewWindowsInferer((32, 32, 32), **given),
        lambda **given: SlidingWindowsInferer((32, 32, 32), **given),
    ],
)
def test_mirrored_passes_are_turned_back_and_averaged(inferer):
    x = torch.rand(1, 2, 48, 40, 16)

    def lopsided(part):
        return part * torch.linspace(0, 1, part.shape[2])[:, None, None]

    def once(image):
        return inferer()(image, lopsided)

    expected = (once(x) + once(x.flip(2)).flip(2) + once(x.flip(3)).flip(3)) / 3
    assert not torch.allclose(expected, once(x))
    torch.testing.assert_close(inferer(mirror_axes=[0, 1])(x, lopsided), expected)


def test_sliding_windows_are_monais_and_executed_as_the_others_are():
    x, network = torch.rand(1, 4, 50, 40, 33), NeedsSixteen()
    expected = SlidingWindowInferer((32, 32, 32), 1, 0.5, "gaussian")(x, network)
    assert torch.equal(SlidingWindowsInferer((32, 32, 32))(x, network), expected)
    doubled = SlidingWindowsInferer((32, 32, 32), execution=lambda network: lambda part: 2 * network(part))
    torch.testing.assert_close(doubled(x, network), 2 * expected)


def test_a_small_patch_makes_many_small_windows():
    window, counts = FewWindowsInferer((32, 16, 32)).plan((64, 64, 40))
    assert math.prod(window) <= 32 * 16 * 32 and math.prod(counts) > 8


def test_arguments_reach_the_network():
    x = torch.rand(1, 4, 64, 40, 30)
    out = FewWindowsInferer((32, 32, 32))(x, lambda part, factor, plus: part * factor + plus, 2.0, plus=1.0)
    torch.testing.assert_close(out, x * 2 + 1)


def test_a_patch_that_is_too_small_for_any_window():
    with pytest.raises(ValueError, match="patch_size"):
        FewWindowsInferer((8, 8, 8))(torch.rand(1, 4, 30, 40, 17), NeedsSixteen())


class Reads:
    """Notes what is read, in which thread; what is named so fails with a memory error."""

    def __init__(self):
        self.read = []

    def __call__(self, item):
        if item["subject"] == "huge":
            raise MemoryError
        self.read.append((item["subject"], threading.current_thread() is threading.main_thread()))
        return item


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_yields_each_subject_in_order_and_reads_one_ahead(num_workers):
    reads = Reads()
    names = ["a", "b", "huge", "c"]
    loader = SubjectLoader(SubjectDataset([{"subject": name} for name in names], reads), num_workers)
    seen, ahead = [], []
    for batch in loader:
        seen.append((batch["subject"][0], batch.get("failure")))
        time.sleep(0.05)
        ahead.append(len(reads.read))
    assert [name for name, _ in seen] == names and "out of memory" in seen[2][1][0]
    assert ahead == ([1, 2, 2, 3] if num_workers == 0 else [2, 2, 3, 3])
    assert {in_main for _, in_main in reads.read} == {num_workers == 0}


def test_a_loader_needs_neither_processes_nor_shared_memory(monkeypatch):
    none = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", none)
    local = SubjectDataset([{"subject": "a"}], lambda item: item)  # no start method but fork could pickle it
    assert [batch["subject"] for batch in SubjectLoader(local)] == [["a"]]


def test_warnings_about_images_reach_the_engine():
    data = [{"subject": "a", "image": torch.ones(4, 16, 16, 16), "warnings": ["one", "two"]}, {"subject": "b"}]
    data[1] |= {"image": data[0]["image"], "warnings": []}
    engine, seen = SubjectEvaluator(torch.device("cpu"), SubjectLoader(SubjectDataset(data)), NeedsSixteen()), []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.warnings))
    engine.run()
    assert seen == [["one", "two"], []]


def test_an_error_that_monai_tells_as_a_traceback_is_told_in_one_line():
    story = (
        "cannot find a suitable writer\nTraceback (most recent call last):\n  File x\ncustom.files.FileError: disk full"
    )
    assert describe(RuntimeError(story)) == "disk full"
