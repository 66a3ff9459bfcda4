"""Layers of a device are announced when it has done them, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from shared.engine.layer_events import LayerEvents
from shared.engine.model_files import resolve_model
from shared.engine.model_runner import ModelRunner
from shared.engine.step import StepItem


class FakeEvent:
    """Of a device that does what it has been asked for when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def synchronize(self) -> None:
        assert self.done.wait(30)


class Device:
    def __init__(self) -> None:
        self.recorded: list[FakeEvent] = []

    def record(self) -> FakeEvent:
        self.recorded.append(FakeEvent())
        return self.recorded[-1]


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def events(device: Device) -> Iterator[LayerEvents]:
    events = LayerEvents(device.record)
    yield events
    events.close()
    assert not events._thread.is_alive()


def test_a_layer_is_announced_when_the_device_has_done_it(device: Device, events: LayerEvents) -> None:
    announced: list[int] = []
    seen = [threading.Event() for _ in range(3)]
    for layer in range(3):
        events.announce(lambda layer=layer: (announced.append(layer), seen[layer].set()))
    assert announced == []
    device.recorded[2].done.set()  # order is kept whatever the device says
    device.recorded[0].done.set()
    assert seen[0].wait(30)
    assert announced == [0]
    device.recorded[1].done.set()
    events.wait()
    assert announced == [0, 1, 2]


def test_what_an_announcement_raises_reaches_the_forward_thread(device: Device, events: LayerEvents) -> None:
    announced: list[int] = []
    events.announce(lambda: 1 // 0)
    events.announce(lambda: announced.append(1))
    for event in device.recorded:
        event.done.set()
    with pytest.raises(ZeroDivisionError):
        events.wait()
    assert announced == [1]
    events.wait()


def test_a_step_returns_when_the_device_has_done_all_of_it() -> None:
    """With sampled tokens or without: who is told that a step is over may read its KV."""
    device = Device()
    events = LayerEvents(device.record)
    runner = ModelRunner.load(resolve_model("tiny-random"), dtype="float32", num_blocks=4)
    runner._events = events
    announced: list[int] = []
    stepping = threading.Thread(
        target=runner.step, args=([StepItem([5, 6, 7], 0, [1], None, on_layer=announced.append)],)
    )
    stepping.start()
    num_events = runner.layout.num_layers + 1  # the last one: of everything
    for index in range(num_events):
        while len(device.recorded) <= index:
            assert stepping.is_alive()
        assert announced == list(range(index))
        assert stepping.is_alive()
        device.recorded[index].done.set()
        while index < num_events - 1 and len(announced) <= index:
            assert stepping.is_alive()
    stepping.join(30)
    assert not stepping.is_alive()
    assert announced == list(range(runner.layout.num_layers))
    runner.close()
    assert not events._thread.is_alive()
