"""The gate: steps one at a time, changes first, and what drain means."""

from __future__ import annotations

import threading

from liveweight.engines.gate import Gate


def test_a_waiting_change_goes_before_a_waiting_step() -> None:
    gate, order = Gate(), []
    inside, release = threading.Event(), threading.Event()

    def hold() -> None:
        with gate.step():
            inside.set()
            release.wait(10)

    def step() -> None:
        with gate.step():
            order.append("step")

    def change() -> None:
        with gate.change():
            order.append("change")

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(10)
    changer = threading.Thread(target=change)
    changer.start()
    while gate._changes_waiting == 0:
        pass
    stepper = threading.Thread(target=step)
    stepper.start()
    release.set()
    for thread in (holder, changer, stepper):
        thread.join(10)
    assert order == ["change", "step"]


def test_a_thread_that_is_inside_may_enter_again() -> None:
    gate = Gate()
    with gate.change(), gate.step(), gate.step():
        pass
    with gate.step():
        pass


def test_draining_makes_a_change_wait_for_the_generation_and_the_next_generation_wait_for_the_change() -> None:
    gate, order = Gate("drain"), []
    gate.begin_generation()

    def change() -> None:
        with gate.change():
            order.append("change")

    def generate() -> None:
        gate.begin_generation()
        order.append("second generation")
        gate.end_generation()

    changer = threading.Thread(target=change)
    changer.start()
    while gate._changes_waiting == 0:
        pass
    second = threading.Thread(target=generate)
    second.start()
    with gate.step():
        order.append("step of the first")
    gate.end_generation()
    changer.join(10)
    second.join(10)
    assert order == ["step of the first", "change", "second generation"]


def test_an_error_inside_leaves_the_gate_open() -> None:
    gate = Gate()
    for door in (gate.step, gate.change):
        try:
            with door():
                raise RuntimeError("inside")
        except RuntimeError:
            pass
    with gate.change():
        pass
    assert gate._changes_waiting == 0
