"""Processes that meet in a work that may fail on one: in whatever order they look, all hear of it and none waits on."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from artifex.scaling import meeting, processes


class Store:
    """The coordination service's store for two processes, of which 1 looks for words only when 0 has said some."""

    def __init__(self):
        self.words, self.said = {}, threading.Event()
        self.barriers, self.lock = {}, threading.Lock()

    def wait_at_barrier(self, name, milliseconds):
        with self.lock:
            barrier = self.barriers.setdefault(name, threading.Barrier(2))
        try:
            barrier.wait(milliseconds / 1000)
        except threading.BrokenBarrierError as error:
            raise RuntimeError(name) from error

    def key_value_set(self, key, value):
        self.words[key] = value
        self.said.set()

    def key_value_try_get(self, key):
        if threading.current_thread().name.startswith("1"):
            self.said.wait(2)
        if key not in self.words:
            raise RuntimeError(key)
        return self.words[key]


@pytest.fixture
def two(monkeypatch):
    store = Store()
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "index", lambda: int(threading.current_thread().name[0]))
    monkeypatch.setattr(processes, "key_value_store", lambda: store)


def run(number, function):
    pool = ThreadPoolExecutor(1, thread_name_prefix=str(number))
    return pool.submit(function, meeting.Meetings("work"))


def test_one_that_fails_right_after_a_meeting_is_heard_by_one_that_looks_late(two):
    def fails(meetings):
        meetings.come(5)
        meetings.fails("no space", 5)
        return "left"

    def works(meetings):
        meetings.come(5)
        meetings.come(5)

    zero, one = run(0, fails), run(1, works)
    assert zero.result(timeout=4) == "left"  # it did not wait for one that had heard of it before
    with pytest.raises(meeting.OtherFailed, match="process 0: no space"):
        one.result(timeout=4)


def test_a_meeting_to_which_one_does_not_come_ends_in_time(two):
    with pytest.raises(TimeoutError, match=r"within 0\.1 s"):
        run(0, lambda meetings: meetings.come(0.1)).result(timeout=4)
