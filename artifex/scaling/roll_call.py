"""The processes of a run meet before JAX does: who came, who is missing, and whether all were asked for the same.

Process 0 listens where JAX's coordinator will; each of the others says who it is and what it was asked for; all get one
answer, and go on or end with the same line. Left to itself, JAX ends a process whose peers do not come by a stack dump
that names nobody. The connections stay, and by them processes know later that the others live. Importing this imports
no JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

HELLO = 5.0  # seconds that a process may take over its line once it is connected
LONGEST = 2**20  # bytes of a line
AGAIN = 0.2  # seconds between two attempts to connect
NAMED = 8  # processes, and settings, that an error lists


class RollCallError(ValueError):
    """Not all came, or they were not asked for the same."""


@dataclasses.dataclass(frozen=True)
class Met:
    """All have come: the connections of this process, by the process at their other end, and the host of each."""

    lines: dict[int, socket.socket]
    hosts: list[str]


def roll_call(coordinator: str, processes: int, process_id: int, asks: Mapping[str, Any], wait: float) -> Met:
    """Return when all `processes` have come to `coordinator`, "host:port" of process 0, with equal `asks`: JSON values
    by name. Process 0 then has a connection to each of the others.

    Raises `RollCallError`, on every process that came, with what is wrong: within `wait` seconds, and on process 0 also
    at once where its port is taken.
    """
    host, port = address(coordinator)
    me = {"process": process_id, "processes": processes, "asks": json.loads(json.dumps(asks))}
    me["host"] = socket.gethostname()
    return _call(host, port, me, wait) if process_id == 0 else _answer(host, port, me, wait)


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[::1]:port". Raises `ValueError` for anything else."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"coordinator {coordinator!r} is no address; expected host:port, as in 10.0.0.1:1234, a port at most 65535"
        )
    return host.strip("[]"), int(port)


def on_loopback(host: str) -> bool:
    """Whether only processes of this machine reach `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")


def _call(host: str, port: int, me: dict[str, Any], wait: float) -> Met:
    """Process 0: collect the others, then tell them all."""
    count, until, hosts = me["processes"], time.monotonic() + wait, {0: me["host"]}
    here: dict[int, socket.socket] = {}
    odd: list[socket.socket] = []  # the one that is none of them
    with contextlib.ExitStack() as closing:
        listener = closing.enter_context(_listening(host, port))
        problem = ""
        while not problem:
            _forget_those_who_left(here)
            missing = [process for process in range(1, count) if process not in here]
            left = until - time.monotonic()
            if not missing:
                break
            if left <= 0:
                came = f"{count - len(missing)} of {count} processes came to {host}:{port} within {wait:g} s"
                problem = f"{came}; missing: {_numbers(missing)}; see what became of them, or give a longer wait"
                break
            listener.settimeout(min(left, 1.0))
            with contextlib.suppress(TimeoutError):
                peer, _ = listener.accept()
                closing.enter_context(peer)
                if (hello := _read(peer, HELLO)) is not None:
                    _forget_those_who_left(here)  # one that was started again comes twice
                    if problem := _wrong(hello, me, here):
                        problem += f"; process {hello['process']} is on {hello['host']}"
                        odd.append(peer)
                    else:
                        here[hello["process"]] = peer
                        hosts[hello["process"]] = hello["host"]
        named = [] if problem else [hosts[process] for process in range(count)]
        for peer in (told := [*here.values(), *odd]):
            with contextlib.suppress(OSError):  # one that has left meanwhile, which its line will show
                peer.sendall(_line({"error": problem, "hosts": named}))
        if not problem:
            return Met({process: peer.dup() for process, peer in here.items()}, named)
        for peer in told:  # the side that closes first keeps the port for a while: let it be theirs
            _read(peer, 1.0)
    raise RollCallError(problem)


def _answer(host: str, port: int, me: dict[str, Any], wait: float) -> Met:
    """Another process: come to process 0, and hear what it found."""
    until, reason = time.monotonic() + wait, "no attempt"
    where = f"process 0 at {host}:{port}"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as peer:
                peer.sendall(_line(me))
                # it answers when all are there, or at its own end of the wait, which began before or after ours
                said = _read(peer, max(until - time.monotonic(), 0) + wait + HELLO)
                line = peer.dup()
        except OSError as error:  # not started yet, or not known to the name server yet
            reason = error.strerror or str(error)
            time.sleep(min(AGAIN, max(until - time.monotonic(), 0)))
            continue
        hosts = said.get("hosts") if said is not None and said.get("error") == "" else None
        if isinstance(hosts, list) and len(hosts) == me["processes"]:
            return Met({0: line}, [str(host) for host in hosts])
        line.close()
        if said is None or not said.get("error") or not isinstance(said["error"], str):
            raise RollCallError(
                f"{where} did not finish the roll call: it has ended, or what answers there is another program"
            )
        raise RollCallError(said["error"])
    raise RollCallError(
        f"{where} did not answer within {wait:g} s ({reason}); start it, or give its address as --device.coordinator"
    )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket where JAX will have its own: all addresses of this machine, or loopback where the host is that."""
    v6 = ":" in host
    try:
        if on_loopback(host):
            made = socket.create_server((host, port), family=socket.AF_INET6 if v6 else socket.AF_INET, backlog=1024)
        elif socket.has_dualstack_ipv6():
            made = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            made = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "is in use on this machine, perhaps by a run that has not ended; choose another"
        else:
            why = f"cannot be listened at: {error.strerror or error}"
        raise RollCallError(f"port {port} of --device.coordinator {host}:{port} {why}") from None
    with made:
        yield made


def _wrong(hello: dict[str, Any], me: dict[str, Any], here: Mapping[int, Any]) -> str:
    """Why a process that came cannot be one of the run; empty where it can."""
    process, count = hello["process"], me["processes"]
    if hello["processes"] != count:
        return (
            f"process {process} was started as one of {hello['processes']}, process 0 as one of {count}; give all the "
            "same --device.processes"
        )
    if not 0 < process < count or process in here:
        ids = f"0 to {count - 1}, each once"
        return f"two processes say that they are process {process}; give --device.process-id {ids}"
    mine, its = me["asks"], hello["asks"]
    differing = [key for key in sorted(mine.keys() | its.keys()) if mine.get(key) != its.get(key)]
    if not differing:
        return ""
    listed = [f"{key} is {json.dumps(its.get(key))} there and {json.dumps(mine.get(key))} here" for key in differing]
    more = f"; and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return (
        f"process {process} was asked for something else than process 0: {'; '.join(listed[:NAMED])}{more}; start all "
        "with the same configuration, options and versions"
    )


def _forget_those_who_left(here: dict[int, socket.socket]) -> None:
    for process in [process for process, peer in here.items() if _has_left(peer)]:
        del here[process]


def _numbers(processes: list[int]) -> str:
    shown = ", ".join(map(str, processes[:NAMED]))
    return shown + (f" and {len(processes) - NAMED} more" if len(processes) > NAMED else "")


def _has_left(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return peer.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        peer.setblocking(True)


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _read(peer: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The line that a peer says within so many seconds; None where it is none of ours."""
    until, got = time.monotonic() + seconds, b""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        while not got.endswith(b"\n"):
            peer.settimeout(max(until - time.monotonic(), 0.001))
            seen = peer.recv(2**16, socket.MSG_PEEK)  # what follows the line is for whoever reads then
            part = peer.recv(seen.find(b"\n") + 1 or len(seen))
            got += part
            if not part or len(got) > LONGEST:
                return None
        content = json.loads(got)
        if isinstance(content, dict) and _is_ours(content):
            return content
    return None


def _is_ours(content: dict[str, Any]) -> bool:
    if "error" in content:
        return True
    numbers, kinds = (content.get("process"), content.get("processes")), {"asks": dict, "host": str}
    return all(type(number) is int for number in numbers) and all(
        isinstance(content.get(key), kind) for key, kind in kinds.items()
    )
