"""What the loop's tests run in a second process, to be interrupted or killed there."""

from __future__ import annotations

import random
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from liveweight.errors import LiveweightError
from liveweight.live_model import LiveModel
from tests.tiny_workspace import QUESTION, add_shout, tiny_settings


def change_without_end(pipe: Connection, root: Path, seed: int) -> None:
    """Make and move changes for ever, saying each one that is done."""
    torch.set_num_threads(1)
    add_shout()
    chance = random.Random(seed)
    with LiveModel.load(settings=tiny_settings(root)) as live:
        pipe.send("ready")
        while True:
            try:
                _one_step(live, chance)
            except LiveweightError:
                continue  # such as an `off` of what is off already
            pipe.send([(change.label, change.state) for change in live.changes()])


def interrupted(pipe: Connection, root: Path, seed: int) -> None:
    """Make changes, interrupted by Ctrl-C at some instant; send whether weights and ledger agree after each."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server of forks ignores it, and so do its children
    torch.set_num_threads(1)
    add_shout()
    chance = random.Random(seed)
    with LiveModel.load(settings=tiny_settings(root)) as live:
        live.chat(QUESTION)
        hits = 0
        for _ in range(12):
            caught = threading.Event()
            hand = threading.Thread(target=_press_ctrl_c, args=(caught, chance.random() * 0.35))
            try:
                hand.start()
                while True:
                    try:
                        _one_step(live, chance)
                    except LiveweightError:
                        continue
            except KeyboardInterrupt:
                caught.set()
                hits += 1
            hand.join()
            agrees = live.engine.state == live.ledger.state(live.engine.info.hash)
            half_made = live.ledger.changes(live.engine.info.hash, states=["intended"])
            now = live.fingerprints()
            live.engine.become(())
            live.engine.become(live.ledger.state(live.engine.info.hash))
            pipe.send((agrees, half_made == [], now == live.fingerprints()))
        live.engine.become(())
        pipe.send(("base", live.fingerprints(), hits))


def _press_ctrl_c(caught: threading.Event, delay: float) -> None:
    """Press it, and again where Python lost it: an interrupt inside a destructor is only printed."""
    while not caught.wait(delay):
        signal.raise_signal(signal.SIGINT)
        delay = 5.0


def _one_step(live: LiveModel, chance: random.Random) -> None:
    changes = [change for change in live.changes() if change.state in ("active", "off")]
    what = chance.choice(("fix", "fix", "off", "on", "undo", "strength"))
    if what == "fix" or not changes:
        live.fix(live.chat(QUESTION), chance.choice("abcdefgh"), keep_both=chance.random() < 0.5)
        return
    change = chance.choice(changes)
    if what == "strength":
        live.set_strength(change, chance.choice((0.25, 0.5, 2.0)))
    else:
        {"off": live.off, "on": live.on, "undo": live.undo}[what](change)
