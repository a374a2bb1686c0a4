"""Where a server may be that a deployment names by its URL: what the operator lists (`serving.backend_hosts`).

Who deploys makes this process ask an address and show what it says, which reaches what they may not reach themselves
(https://owasp.org/www-community/attacks/Server_Side_Request_Forgery). Names are compared as names and addresses as
addresses: nothing is resolved, so a name cannot mean another address between the check and the connection than its
owner says, and a network in the list admits no names. What is not understood is not in the list.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

import httpx

from sihe.core.errors import ConfigError

KEY = "serving.backend_hosts"
_PORTS = {"http": 80, "https": 443}
_FORM = re.compile(r"(?P<host>\[[0-9a-f:.]+(?:/[0-9]+)?\]|[^\[\]:]+)(?::(?P<port>[0-9]{1,5}))?")
_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class _Place:
    """One entry: a network or a name, at one port or any."""

    network: _Network | None
    name: str
    port: int | None

    def holds(self, host: str, port: int) -> bool:
        if self.port not in (None, port):
            return False
        if self.network is not None:
            address = _address(host)
            return address is not None and address.version == self.network.version and address in self.network
        return host == self.name or (self.name.startswith("*.") and host.endswith(self.name[1:]))


class BackendPlaces:
    """The places of a list. Raises `ConfigError` for an entry that is none."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._places = tuple(_place(entry) for entry in entries)

    @property
    def is_open(self) -> bool:
        """Whether nothing is listed, and a server may be anywhere."""
        return not self._places

    def check(self, url: str) -> None:
        """Raises `ConfigError` for a URL that is not in the list, where there is one."""
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").lower()
            port = _PORTS[parsed.scheme] if parsed.port is None else parsed.port
            if not host or not 0 < port < 65536:
                raise ValueError(f"no host, or no port that exists, in {url!r}")
        except (httpx.InvalidURL, KeyError, ValueError) as error:
            raise ConfigError(f"backend.url must be a URL, got {url!r}", key="backend.url") from error
        if not self.is_open and not any(place.holds(host, port) for place in self._places):
            raise ConfigError(
                f"backend.url is at {host} port {port}, and {KEY} does not list that: use a server that it lists, or "
                "have it listed",
                key="backend.url",
            )


def _place(entry: str) -> _Place:
    text = entry.strip().lower()
    whole = _network(text)
    if whole is not None:
        return _Place(whole, "", None)
    found = _FORM.fullmatch(text)
    if found is not None:
        host, port = found["host"].strip("[]"), None if found["port"] is None else int(found["port"])
        network = _network(host)
        if (network is not None or _NAME.fullmatch(host)) and (port is None or 0 < port < 65536):
            return _Place(network, host, port)
    raise ConfigError(
        f"{KEY} has names, addresses and networks such as gpu-1, *.gpu.example, 10.0.0.0/8 or [::1]:8000, got "
        f"{entry!r}",
        key=KEY,
    )


def _network(text: str) -> _Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
