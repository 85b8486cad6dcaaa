"""delay-relay.py DELAY_MS LISTEN_PORT=HOST:PORT ...

Carries TCP connections on, every byte DELAY_MS later than it came, in both directions. For benchmarks between network namespaces, where the kernel has no netem.
select() rather than epoll: its timeouts are finer than a millisecond.
"""
import collections
import select
import socket
import sys
import time

PART = 1 << 16


class Direction:
    """What came from one socket and is to leave through another: (when, bytes), b'' for the end."""

    def __init__(self, source, target):
        self.source, self.target = source, target
        self.waiting = collections.deque()
        self.open = True


def main():
    delay = float(sys.argv[1]) / 1e3
    listeners = {}
    for route in sys.argv[2:]:
        port, _, target = route.partition("=")
        host, _, target_port = target.rpartition(":")
        listener = socket.create_server(("0.0.0.0", int(port)), backlog=64)
        listeners[listener] = (host, int(target_port))
    print("relay ready", flush=True)
    directions = {}  # by the socket that is read

    def accept(listener):
        near, _ = listener.accept()
        try:
            far = socket.create_connection(listeners[listener], timeout=5)
        except OSError:
            near.close()
            return
        for one in (near, far):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one.settimeout(None)
        directions[near] = Direction(near, far)
        directions[far] = Direction(far, near)

    def end(direction):
        for one in (direction.source, direction.target):
            directions.pop(one, None)
            one.close()

    while True:
        due = [d.waiting[0][0] for d in directions.values() if d.waiting]
        timeout = max(0.0, min(due) - time.monotonic()) if due else 1.0
        readable = [d.source for d in directions.values() if d.open] + list(listeners)
        ready, _, _ = select.select(readable, [], [], timeout)
        now = time.monotonic()
        for one in ready:
            if one in listeners:
                accept(one)
            elif one in directions:
                direction = directions[one]
                try:
                    data = one.recv(PART)
                except OSError:
                    data = b""
                direction.open = bool(data)
                direction.waiting.append((now + delay, data))
        for direction in list(directions.values()):
            while direction.waiting and direction.waiting[0][0] <= time.monotonic():
                _, data = direction.waiting.popleft()
                try:
                    if data:
                        direction.target.sendall(data)
                    else:
                        end(direction)
                        break
                except OSError:
                    end(direction)
                    break


main()
