"""The network interface that has an address: gloo wants its name, and machine names often resolve to loopback."""

from __future__ import annotations

import socket
import struct
import sys

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_NAME_BYTES, _REQUEST_BYTES = 15, 256  # IFNAMSIZ without its end; at least sizeof(struct ifreq)


def interface_of(address: str) -> str | None:
    """The name of this machine's interface whose first IPv4 address is `address`; `None` when there is none."""
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack(f"{_REQUEST_BYTES}s", name.encode()[:_NAME_BYTES])
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            # struct ifreq: 16 bytes of name, then a sockaddr_in with the address behind family and port
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
