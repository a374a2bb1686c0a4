"""Settings: precedence, and every wrong key or value an error that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core import settings
from sihe.core.errors import ConfigError
from sihe.core.workspace import Workspace


def _load(directory: Path, environ: dict[str, str] | None = None, **flags: object) -> settings.Settings:
    return settings.load(
        {key.replace("__", "."): value for key, value in flags.items()}, environ=environ or {}, directory=directory
    )


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    assert _load(tmp_path).server.port == 8484
    (tmp_path / "sihe.toml").write_text("[server]\nport = 1001\nhost = '0.0.0.0'\n")
    assert _load(tmp_path).server.port == 1001
    assert _load(tmp_path, {"SIHE_SERVER_PORT": "1002"}).server.port == 1002
    resolved = _load(tmp_path, {"SIHE_SERVER_PORT": "1002"}, server__port=1003)
    assert (resolved.server.port, resolved.server.host) == (1003, "0.0.0.0")


def test_the_file_in_the_home_folder_counts_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "sihe.toml").write_text("locale = 'zh'\n")
    assert _load(tmp_path, home=str(home)).locale == "zh"


@pytest.mark.parametrize(
    ("file", "environ", "flags", "named"),
    [
        ("serverr = 1", {}, {}, "serverr"),
        ("[server]\nprot = 1", {}, {}, "server.prot"),
        ("[server]\nport = 'x'", {}, {}, "server.port"),
        ("", {"SIHE_SERVER_PROT": "1"}, {}, "SIHE_SERVER_PROT"),
        ("", {"SIHE_SERVER_PORT": "99999"}, {}, "server.port"),
        ("", {"SIHE_LOCALE": "fr"}, {}, "locale"),
        ("", {"SIHE_SERVER_API_KEYS": "[broken"}, {}, "server.api_keys"),
        ("", {}, {"log.level": "loud"}, "log.level"),
        ("", {}, {"nothing": 1}, "nothing"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    tmp_path: Path, file: str, environ: dict[str, str], flags: dict[str, object], named: str
) -> None:
    (tmp_path / "sihe.toml").write_text(file)
    with pytest.raises(ConfigError) as caught:
        settings.load(flags, environ=environ, directory=tmp_path)
    assert named in str(caught.value)
    assert caught.value.key == named


def test_broken_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "sihe.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"sihe\.toml"):
        _load(tmp_path)


def test_keys_are_a_list_in_either_form(tmp_path: Path) -> None:
    assert _load(tmp_path, {"SIHE_SERVER_API_KEYS": "a, b"}).server.api_keys == ("a", "b")
    assert _load(tmp_path, {"SIHE_SERVER_API_KEYS": '["a,b"]'}).server.api_keys == ("a,b",)
    assert _load(tmp_path, {"SIHE_SERVING_BACKEND_HOSTS": "a, [::1]:8"}).serving.backend_hosts == ("a", "[::1]:8")


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("[::1]:8", ("[::1]:8",)),
        ("[::1]", ("[::1]",)),
        (" [FD00::1], a", ("[FD00::1]", "a")),
        ("[fd00::/8]:8000,[::ffff:10.0.0.1]:8", ("[fd00::/8]:8000", "[::ffff:10.0.0.1]:8")),
        ('["[::1]:8", "a"]', ("[::1]:8", "a")),
        ("[]", ()),
    ],
)
def test_a_list_of_hosts_may_begin_with_an_address_in_brackets(
    tmp_path: Path, text: str, hosts: tuple[str, ...]
) -> None:
    assert _load(tmp_path, {"SIHE_SERVING_BACKEND_HOSTS": text}).serving.backend_hosts == hosts
    assert _load(tmp_path, **{"serving.backend_hosts": text}).serving.backend_hosts == hosts


@pytest.mark.parametrize("text", ["[a, b]", "[::1", '["a"', "[1:x]"])
def test_what_begins_like_a_list_and_is_none_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    for key in ("serving.backend_hosts", "server.api_keys"):
        with pytest.raises(ConfigError, match=r"not a JSON list .* commas between") as caught:
            _load(tmp_path, **{key: text})
        assert caught.value.key == key


@given(secret=st.text("abcdefgh0123456789", min_size=12))
def test_no_secret_is_public(secret: str) -> None:
    resolved = settings.load(
        {
            "records.url": f"postgresql://u:{secret}@h/d",
            "server.api_keys": secret,
            "llm.api_key": secret,
            "tenants.redis_url": f"redis://h/0?password={secret}",
        },
        environ={},
    )
    assert secret not in str(resolved.public())
    assert secret not in repr(resolved.llm)


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be a folder"):
        Workspace(_load(tmp_path, home=str(tmp_path / "file")))
