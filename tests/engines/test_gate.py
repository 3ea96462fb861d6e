"""The gate: steps one at a time, changes first, and what drain means."""

from __future__ import annotations

import threading
import time

import pytest

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
    while gate.changes_waiting == 0:
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
    while gate.changes_waiting == 0:
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
    assert gate.changes_waiting == 0


def test_steps_are_taken_in_the_order_in_which_they_came() -> None:
    gate, order = Gate(), list[int]()
    threads = []

    def step(number: int) -> None:
        with gate.step():
            order.append(number)

    with gate.step():
        for number in range(6):
            threads.append(threading.Thread(target=step, args=(number,)))
            threads[-1].start()
            while sum(share.waits > 0 for share in gate._shares.values()) <= number:
                pass
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_change_that_drains_goes_ahead_once_its_patience_is_over() -> None:
    gate = Gate("drain", patience=0.02)
    assert gate.begin_generation()
    with gate.change():  # the generation never ends
        pass
    gate.end_generation()


def test_a_generation_that_may_not_wait_is_told_that_a_change_is_coming() -> None:
    gate = Gate("drain")
    gate.begin_generation()

    def change() -> None:
        with gate.change():
            pass

    changer = threading.Thread(target=change)
    changer.start()
    while not gate.changes_waiting:
        pass
    assert not gate.begin_generation(wait=False)
    gate.end_generation()
    changer.join(10)
    assert gate.begin_generation(wait=False)
    gate.end_generation()


def test_a_thread_that_is_interrupted_stops_before_its_next_step_and_others_go_on() -> None:
    gate, asked = Gate(), list[str]()

    def check() -> None:
        asked.append("asked")
        if len(asked) == 2:
            raise KeyboardInterrupt

    with gate.interruptible(check):
        with gate.step():
            pass
        try:
            with gate.step():
                raise AssertionError("it should not have come here")
        except KeyboardInterrupt:
            pass
        other = threading.Thread(target=lambda: gate.step().__enter__())
        other.start()
        other.join(10)
    assert len(asked) == 2


def test_a_thread_with_long_steps_leaves_half_of_the_time_to_one_with_short_steps() -> None:
    gate, end = Gate(), threading.Event()
    used = {"long": 0.0, "short": 0.0}

    def work(name: str, seconds: float) -> None:
        while not end.is_set():
            with gate.step():
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    pass
                used[name] += time.monotonic() - began

    threads = [threading.Thread(target=work, args=("long", 0.05)), threading.Thread(target=work, args=("short", 0.002))]
    for thread in threads:
        thread.start()
    while used["long"] + used["short"] < 1.0:
        pass
    end.set()
    for thread in threads:
        thread.join(10)
    assert 0.3 < used["short"] / (used["short"] + used["long"]) < 0.7


def test_a_thread_that_was_away_has_no_claim_to_the_time_that_it_did_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, now = Gate(), [0.0]
    monkeypatch.setattr("liveweight.engines.gate.time.monotonic", lambda: now[0])

    def step(seconds: float) -> None:
        with gate.step():
            now[0] += seconds

    other = threading.Thread(target=step, args=(100.0,))
    other.start()
    other.join(10)
    step(1.0)
    assert [share.used for share in gate._shares.values()] == [100.0, 101.0]
