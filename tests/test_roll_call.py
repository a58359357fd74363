"""Processes meet: all of them with equal settings, or an error on each that came, which names what is wrong."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from artifex.cli import parse_train
from artifex.scaling import processes
from artifex.scaling import roll_call as calls
from artifex.scaling.processes import Start
from artifex.scaling.roll_call import RollCallError, roll_call


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


def meet(port, *told, wait=5.0, host="127.0.0.1"):
    """What each of some processes, told (id, count, asks, seconds it comes late), gets: "" or its error."""

    def one(process, count, asks, late=0.0):
        time.sleep(late)
        try:
            met = roll_call(f"{host}:{port}", count, process, asks, wait)
        except RollCallError as error:
            return str(error)
        others = set(range(1, count)) if process == 0 else {0}
        assert met.lines.keys() == others and met.hosts == [socket.gethostname()] * count
        for line in met.lines.values():
            line.close()
        return ""

    with ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(lambda how: one(*how), told))


def beside_another_program(port, greeting, told):
    """What a process says where another program has the port and greets who comes."""
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(meet, port, told)
        if told[0]:
            peer, _ = server.accept()
            with peer:
                peer.recv(100)
                peer.sendall(greeting)
        return waiting.result()[0]


SEED = {"training.seed": 0, "run-dir": "runs/a"}


@pytest.mark.parametrize("first_comes_late", [0.0, 0.5])
def test_all_go_on_when_all_have_come_in_any_order(port, first_comes_late):
    assert meet(port, (0, 3, SEED, first_comes_late), (1, 3, SEED), (2, 3, SEED, 0.2)) == ["", "", ""]


def test_the_port_is_free_again_for_the_coordinator_at_once(port):
    assert meet(port, (0, 2, SEED), (1, 2, SEED)) == ["", ""]
    socket.create_server(("127.0.0.1", port)).close()
    assert meet(port, (0, 2, SEED), (1, 2, SEED)) == ["", ""]


def test_processes_that_do_not_come_are_named_on_each_that_came_and_within_the_wait(port):
    began = time.monotonic()
    said = meet(port, (0, 4, SEED), (2, 4, SEED), wait=1.0)
    assert time.monotonic() - began < 3
    assert said[0] == said[1]
    assert said[0].startswith(f"2 of 4 processes came to 127.0.0.1:{port} within 1 s; missing: 1, 3; ")


def test_without_process_0_the_others_say_where_they_looked(port):
    began = time.monotonic()
    (said,) = meet(port, (1, 2, SEED), wait=1.0)
    assert time.monotonic() - began < 2
    assert said.startswith(
        f"process 0 at 127.0.0.1:{port} did not answer within 1 s (Connection refused); start it, or"
    )
    (said,) = meet(port, (1, 2, SEED), wait=1.0, host="nowhere.invalid")
    assert said.startswith(f"process 0 at nowhere.invalid:{port} did not answer within 1 s (")


def test_a_port_that_is_taken_is_named_at_once(port):
    began = time.monotonic()
    said = beside_another_program(port, b"", (0, 2, SEED))
    assert time.monotonic() - began < 1
    assert said.startswith(f"port {port} of --device.coordinator 127.0.0.1:{port} is in use on this machine")


def test_another_program_at_the_address_is_no_process_0(port):
    said = beside_another_program(port, b"SSH-2.0-OpenSSH_9.6\r\n", (1, 2, SEED))
    assert "what answers there is another program" in said


def test_settings_that_differ_are_named_with_both_values_on_every_process(port):
    other = {**SEED, "training.seed": 1, "start-anew": True}
    said = meet(port, (0, 2, SEED), (1, 2, other))
    assert said[0] == said[1]
    assert said[0].startswith(
        "process 1 was asked for something else than process 0: start-anew is true there and null here; training.seed "
        "is 1 there and 0 here; "
    )


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ((0, 2, SEED), (1, 4, SEED), "process 1 was started as one of 4, process 0 as one of 2"),
        ((0, 3, SEED), (3, 3, SEED), "two processes say that they are process 3; give --device.process-id 0 to 2"),
    ],
)
def test_processes_that_are_counted_otherwise_are_named(port, one, other, says):
    said = meet(port, one, other)
    assert said[0] == said[1] and said[0].startswith(says)


def test_two_processes_of_one_number_are_refused_but_one_that_was_started_again_is_taken(port):
    said = meet(port, (0, 3, SEED), (1, 3, SEED), (1, 3, SEED, 0.3))
    assert said[0] == said[2] and said[0].startswith("two processes say that they are process 1")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, port, (0, 3, SEED))
        while True:  # a process that came and was killed
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as killed:
                killed.sendall(calls._line({"process": 1, "processes": 3, "asks": SEED, "host": "a"}))
                time.sleep(0.2)
                break
        assert meet(port, (1, 3, SEED), (2, 3, SEED)) == ["", ""] and first.result() == [""]


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[" * 100_000 + b"\n", b'{"process": "1"}\n', b"\xff\n", b"{}\n"]
)
def test_what_is_no_process_of_ours_is_passed_over(port, noise):
    def knock():
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(noise)
                return

    stranger = threading.Thread(target=knock)
    stranger.start()
    assert meet(port, (0, 2, SEED), (1, 2, SEED, 0.3)) == ["", ""]
    stranger.join()


# ---- the options


def test_how_processes_meet_is_no_part_of_the_run():
    words = ["--device.coordinator", "10.0.0.1:1234", "--device.processes", "4", "--device.wait=20"]
    first, third = (parse_train([*words, "--device.process-id", process]) for process in ("0", "2"))
    assert third.start == Start("auto", "10.0.0.1:1234", 4, 2, 20)
    assert first.config == third.config == parse_train([]).config
    assert first.asks() == third.asks()
    assert parse_train(["--training.seed", "1"]).asks() != parse_train([]).asks()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["coordinator=a:1"],
            "says only a part of how processes meet; give --device.processes and --device.process-id",
        ),
        (
            ["coordinator=a", "processes=2", "process-id=0"],
            "--device.coordinator 'a' is no address; expected host:port",
        ),
        (["coordinator=a:99999", "processes=2", "process-id=0"], "'a:99999' is no address"),
        (["coordinator=a:1", "processes=2", "process-id=2"], "--device.process-id is 2, but --device.processes is 2"),
        (["coordinator=a:1", "processes=2", "process-id=0", "distributed=off"], "is off beside --device.coordinator"),
        (["distributed=maybe"], "device.distributed must be 'auto', 'on' or 'off'"),
        (["processes=two"], "device.processes must be a valid integer or null, got 'two'"),
        (["lost-after=2"], "--device.lost-after is 2; give at least 3 seconds"),
        (["lost-after=90", "stuck-after=60"], "--device.stuck-after is 60, below --device.lost-after, 90; give more"),
        (["wait=0"], "--device.wait is 0; give at least 1 second"),
        (["procesid=0"], "--device.procesid is unknown; did you mean --device.process-id?"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(words, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_train([f"--device.{word}" for word in words])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and says in err and err.count("\n") == 1


SLURM = {"JOB_ID": "7", "STEP_NODELIST": "node[003-006]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}


def test_slurm_is_detected_unless_it_is_not_to_be(monkeypatch):
    met = []
    monkeypatch.setattr(processes, "roll_call", lambda *told: met.append(told) or exit())
    monkeypatch.setattr(processes, "_code", lambda: "c0de")
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    processes.start(Start("off"), {})
    assert met == []
    for how in ("auto", "on"):
        with pytest.raises(SystemExit):
            processes.start(Start(how, wait=9), {"seed": 0})
    assert met == [("node003:61447", 4, 2, {"seed": 0, "artifex-code": "c0de"}, 9)] * 2  # 65536 - 4096 + 7
    monkeypatch.setenv("SLURM_NTASKS", "1")
    processes.start(Start("on"), {})
    assert len(met) == 2


def test_without_a_cluster_a_process_is_alone_or_says_what_it_lacks(monkeypatch):
    processes.start(Start(), {})
    with pytest.raises(ValueError, match=r"--device\.distributed is on, but JAX detects neither SLURM, OpenMPI, Kube"):
        processes.start(Start("on"), {})
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is set, but JAX detects neither SLURM, OpenMPI, Ku"):
        processes.start(Start(), {})
