"""A way to JAX's coordinator that stays open when the coordinator is lost.

JAX's client aborts its process, by a stack dump that names nobody, as soon as the connection to the coordinator breaks,
and takes no word about it from Python (jaxlib 0.10 cannot hand its status to a Python callback). So the client connects
to this process, which passes on what comes from either side, and not that the other side broke off: the client waits,
and the process ends in its own words. Importing this imports no JAX.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

AGAIN = 0.2  # seconds between two attempts to connect
PIECE = 2**16


def way_to(host: str, port: int) -> str:
    """ "host:port" on this machine that leads to `port` of `host` for as long as this process lives."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, host, port), name="coordinator", daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, host: str, port: int) -> None:
    while True:
        near, _ = listener.accept()
        threading.Thread(target=_join, args=(near, host, port), name="coordinator", daemon=True).start()


def _join(near: socket.socket, host: str, port: int) -> None:
    """Pass on between a client and the coordinator, until the client has enough."""
    while True:
        try:
            far = socket.create_connection((host, port))
            break
        except OSError:  # it does not listen yet
            time.sleep(AGAIN)
    for end in (near, far):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    threading.Thread(target=_pass_on, args=(far, near), name="coordinator", daemon=True).start()
    _pass_on(near, far)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_RDWR)


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := one.recv(PIECE):
            other.sendall(part)
