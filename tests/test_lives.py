"""Processes hear of each other that they live: what is lost is named to all, and nothing else is."""

import contextlib
import queue
import socket
import threading
import time

import pytest

from artifex.scaling import lives, processes
from artifex.scaling.lives import Lives, place_of
from artifex.scaling.processes import Start

HOSTS = ["a", "b", "c", "d"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lives, "BEAT", 0.05)
    monkeypatch.setattr(lives, "TOGETHER", 0.2)


@pytest.fixture
def lines():
    """Process -> the connection between it and process 0: the end of 0, and its own."""
    made = {process: socket.socketpair() for process in range(1, 4)}
    yield made
    for pair in made.values():
        for end in pair:
            end.close()


def zero(lines, said, limit=1.0, patience=60.0):
    return Lives(0, {process: pair[0] for process, pair in lines.items()}, HOSTS, limit, said.put, patience)


def other(process, lines, said, limit=1.0):
    return Lives(process, {0: lines[process][1]}, HOSTS, limit, said.put)


def closed(line):
    line.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def living(line, says=b"\n"):
    """Something at the other end that says it lives, and nothing more."""
    end = threading.Event()

    def say():
        while not end.wait(0.05):
            with contextlib.suppress(OSError):
                line.send(says)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_line_that_breaks_is_named_on_all_that_are_left(lines):
    said, heard = queue.Queue(), queue.Queue()
    zero(lines, said)
    other(1, lines, heard)
    with living(lines[3][1]):
        closed(lines[2][1])
        sentence = "process 2 of 4, on c, is lost: its connection broke, as when a process is killed"
        assert said.get(timeout=2) == heard.get(timeout=2) == sentence


def test_processes_lost_together_are_named_together(lines):
    said = queue.Queue()
    with living(lines[2][1]):
        zero(lines, said)
        closed(lines[3][1])
        time.sleep(0.05)
        closed(lines[1][1])
        sentence = said.get(timeout=2)
    assert "process 1 of 4, on b, is lost" in sentence and "process 3 of 4, on d, is lost" in sentence


def test_silence_is_a_loss_after_the_limit_and_not_before(lines):
    said, its, began = queue.Queue(), queue.Queue(), time.monotonic()
    with living(lines[2][1]), living(lines[3][1]):
        zero(lines, said)
        assert said.get(timeout=3) == "process 1 of 4, on b, is lost: it said nothing for 1 s"
    assert 0.9 < time.monotonic() - began < 2.5
    # and the one that stood still, once it goes on, hears what it was taken for
    other(1, lines, its)
    assert its.get(timeout=2) == "this process, 1 of 4, was taken for lost by the others: it said nothing for 1 s"


@pytest.mark.parametrize("how", ["broke", "silent"])
def test_process_0_is_named_by_the_others(how, lines):
    said = queue.Queue()
    other(1, lines, said)
    if how == "broke":
        closed(lines[1][0])
    assert said.get(timeout=3).startswith("process 0 of 4, on a, is lost: it")


def test_who_says_that_it_leaves_is_not_lost_but_nobody_waits_for_it_forever(lines):
    said, its = queue.Queue(), queue.Queue()
    one = other(1, lines, its)
    with living(lines[2][1]), living(lines[3][1]):
        zero(lines, said)
        one.leave()
        closed(lines[1][1])
        with pytest.raises(queue.Empty):
            said.get(timeout=0.5)
        assert said.get(timeout=3) == "process 1 of 4, on b, is lost: it has ended"


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\n", b"[" * 50_000 + b"\n", b'{"lost": [[9, "x"], ["a"]]}\n'])
def test_what_is_no_word_of_ours_is_no_loss(noise, lines):
    said = queue.Queue()
    zero(lines, said)
    with living(lines[2][1]), living(lines[3][1]):
        lines[1][1].sendall(noise)
        with pytest.raises(queue.Empty):
            said.get(timeout=0.5)


def test_a_line_without_end_is_broken_off(lines, monkeypatch):
    monkeypatch.setattr(lives, "LONGEST", 1000)
    said = queue.Queue()
    zero(lines, said)
    with living(lines[2][1]), living(lines[3][1]):
        for _ in range(3):
            lines[1][1].sendall(b"x" * 900)
        assert "process 1 of 4, on b, is lost: its connection broke" in said.get(timeout=2)


READS, COMPUTES = (place_of(what, 41, waits=False) for what in lives.STEP)
SAVES, WAITS = (place_of("saves after step", 41, waits=waits) for waits in (False, True))


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ((COMPUTES, COMPUTES, READS, COMPUTES), "process 2 of 4, on c, is lost: it lives, but reads the batch of step"),
        ((COMPUTES,) * 4, "process 3 of 4, on d, is lost: it lives, but computes step"),
        ((0, COMPUTES, READS, COMPUTES), None),
        ((COMPUTES, COMPUTES, 0, COMPUTES), None),
        # all save, and that takes as long as it takes
        ((SAVES,) * 4, None),
        # one saves, and the others wait for it, or have gone on
        ((WAITS, WAITS, SAVES, WAITS), "process 2 of 4, on c, is lost: it lives, but saves after step"),
        ((SAVES, SAVES, SAVES, WAITS), "process 2 of 4, on c, is lost: it lives, but saves after step"),
        (
            (SAVES, place_of("validates after step", 41, waits=False), SAVES, SAVES),
            "process 1 of 4, on b, is lost: it lives, but validates after step",
        ),
    ],
)
def test_who_is_behind_for_too_long_is_lost_though_it_lives(places, says, lines):
    said = queue.Queue()
    with contextlib.ExitStack() as stack:
        for process in (1, 2, 3):
            stack.enter_context(living(lines[process][1], b"%d\n" % places[process]))
        zero(lines, said, patience=0.3).place = places[0]
        if says is None:
            with pytest.raises(queue.Empty):
                said.get(timeout=0.8)
        else:
            assert (sentence := said.get(timeout=2)).endswith(f"{says} 41 for more than 0.3 s")
            assert sentence.count("is lost") == places.count(min(places)) - (places[0] == min(places))


def test_steps_that_go_on_are_not_stuck(lines):
    said = queue.Queue()
    with contextlib.ExitStack() as stack:
        for process in (1, 2, 3):
            stack.enter_context(living(lines[process][1], b"9000\n"))
        own = zero(lines, said, patience=0.5)
        for place in range(2, 12):  # behind all others, and going on
            own.place = place
            time.sleep(0.1)
        assert said.empty()


def test_a_process_alone_has_no_thread_and_nothing_to_do_at_its_end():
    threads, before = threading.active_count(), [*processes.before_exit]
    processes.start(Start(), {})
    processes.start(Start("off"), {})
    assert threading.active_count() == threads and processes.before_exit == before and processes._lives is None
