from __future__ import annotations

import re
from pathlib import Path

import pytest

import puna.serve
from puna.core.errors import PunaError
from puna.options import named_paths
from puna.serve.run import bind, named_models, warn
from puna.serve.settings import ServerSettings


def test_every_setting_is_read_somewhere() -> None:
    folder = Path(puna.serve.__file__).parent
    code = "\n".join(file.read_text() for file in folder.glob("*.py") if file.name != "settings.py")
    code += "\n".join(re.findall(r"self\.\w+", (folder / "settings.py").read_text()))
    unread = [name for name in ServerSettings.model_fields if not re.search(rf"\.{name}\b", code)]
    assert not unread


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_wrong_settings_are_told_by_name() -> None:
    with pytest.raises(PunaError, match="'max_queue'"):
        ServerSettings.of(max_queue=0)
    with pytest.raises(PunaError, match="'max_qeue'") as caught:
        ServerSettings.of(max_qeue=5)
    assert "max_queue" in str(caught.value.expected)
    with pytest.raises(PunaError, match="'port'"):
        ServerSettings.of(port=99999)


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", (), {"127.0.0.1", "localhost", "::1"}),
        ("localhost", ("puna.test",), {"127.0.0.1", "localhost", "::1", "puna.test"}),
        ("127.0.0.1", ("*",), None),
        ("0.0.0.0", (), None),
        ("0.0.0.0", ("puna.test",), {"0.0.0.0", "127.0.0.1", "localhost", "::1", "puna.test"}),
    ],
)
def test_names_that_a_server_answers_under(
    host: str, allowed: tuple[str, ...], names: set[str] | None
) -> None:
    assert ServerSettings.of(host=host, allowed_hosts=allowed).hosts == names


def test_an_open_address_without_a_key_is_warned_of() -> None:
    said: list[str] = []
    warn(ServerSettings.of(host="0.0.0.0"), said.append)
    warn(ServerSettings.of(host="0.0.0.0", api_key="k"), said.append)
    warn(ServerSettings.of(), said.append)
    assert len(said) == 1
    assert "no API key" in said[0]


def test_a_port_that_is_taken_is_one_clear_error() -> None:
    with bind(ServerSettings.of(port=0)) as taken:
        taken.listen()
        with pytest.raises(PunaError, match="cannot listen"):
            bind(ServerSettings.of(port=taken.getsockname()[1]))
    with pytest.raises(PunaError, match="cannot listen"):
        bind(ServerSettings.of(host="no.such.host.invalid"))


def test_models_and_adapters_get_names(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    assert named_models([str(tmp_path / "one"), "smollm2-135m-instruct"]) == {
        "one": str(tmp_path / "one"),
        "smollm2-135m-instruct": "smollm2-135m-instruct",
    }
    assert named_models(["mine=smollm2-135m-instruct"]) == {"mine": "smollm2-135m-instruct"}
    with pytest.raises(PunaError, match="same name"):
        named_models(["a", "a"])
    assert named_paths(["x=a/b", "y=c=d"], "--adapter") == {"x": "a/b", "y": "c=d"}
    for wrong in (["a"], ["=a"], ["a="], ["a=b", "a=c"]):
        with pytest.raises(PunaError, match="--adapter"):
            named_paths(wrong, "--adapter")
