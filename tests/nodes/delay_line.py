"""A cable between two hosts that delays frames and loses some, for kernels without netem: a network
device `wan0` in each, and this process between them.

delay_line.py PID PID SECONDS SHARE_LOST: process ids in the two hosts. It prints a line when both
devices are there, and ends at the end of its input; the devices end with it.
"""

import ctypes
import fcntl
import os
import random
import selectors
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
CLONE_NEWNET = 0x40000000
# Larger than a frame.
MOST = 1 << 17


def tap_in(pid: int) -> int:
    """The file of a new device wan0 in the network namespace of the process."""
    libc = ctypes.CDLL(None, use_errno=True)
    own, theirs = (os.open(f"/proc/{where}/ns/net", os.O_RDONLY) for where in ("self", pid))
    if libc.setns(theirs, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"wan0", IFF_TAP | IFF_NO_PI))
    if libc.setns(own, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(own)
    os.close(theirs)
    return tap


def main() -> None:
    first, second = (tap_in(int(pid)) for pid in sys.argv[1:3])
    seconds, lost = float(sys.argv[3]), float(sys.argv[4])
    other = {first: second, second: first}
    # (time at which it arrives, where, frame), in the order of time: all are delayed equally.
    flying: deque[tuple[float, int, bytes]] = deque()
    draw = random.Random(0)
    chosen = selectors.DefaultSelector()
    for file in (first, second, sys.stdin.fileno()):
        chosen.register(file, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        wait = max(0.0, flying[0][0] - time.monotonic()) if flying else None
        for key, _ in chosen.select(wait):
            if key.fd == sys.stdin.fileno():
                return
            frame = os.read(key.fd, MOST)
            if draw.random() >= lost:
                flying.append((time.monotonic() + seconds, other[key.fd], frame))
        while flying and flying[0][0] <= time.monotonic():
            _, where, frame = flying.popleft()
            try:
                os.write(where, frame)
            except OSError:
                continue  # the device is down


if __name__ == "__main__":
    main()
