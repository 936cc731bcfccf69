from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from agent import log
from agent.encoding import format_key
from agent.model import Endpoint, Grant, Prefix, PresharedKey

PSK = PresharedKey(bytes(range(32)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising
    log._hidden.clear()
    structlog.reset_defaults()


def logged(**values: Any) -> dict[str, Any]:
    stream = io.StringIO()
    log.configure("debug", "json", stream)
    structlog.get_logger("agent.test").info("something happened", **values)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1, lines
    document: dict[str, Any] = json.loads(lines[0])
    return document


def test_a_record_is_one_json_object_with_a_utc_time() -> None:
    document = logged(peer_count=3, ratio=0.5, on=True, nothing=None)

    assert document["timestamp"].endswith("Z")
    assert document["level"] == "info"
    assert document["logger"] == "agent.test"
    assert document["event"] == "something happened"
    assert (document["peer_count"], document["ratio"], document["on"], document["nothing"]) == (
        3,
        0.5,
        True,
        None,
    )


def test_records_of_libraries_take_the_same_form() -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)

    logging.getLogger("some.library").warning("%s\nforged", "text", extra={"token": "hunter2"})

    document = json.loads(stream.getvalue())
    assert document["event"] == "text\\nforged"
    assert document["logger"] == "some.library"
    assert document["token"] == log.REDACTED


@pytest.mark.parametrize(
    "value",
    ["a\nb", "\x1b[31mred", "\x07", "\u202egnp", "\u200b", "\u2028", "\x85", "\r", "\ud800"],
)
def test_control_characters_are_escaped_in_every_position(value: str) -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)

    structlog.get_logger().info(value, name=value, nested={value: [value]}, **{value: 1})

    assert value not in stream.getvalue().rstrip("\n")
    for text in json.loads(stream.getvalue()):
        assert text.isprintable()
    assert json.loads(stream.getvalue())["name"].isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "core_token",
        "push.secret",
        "psk",
        "preshared_key",
        "presharedkey",
        "private_key",
        "Authorization",
        "password",
    ],
)
def test_what_is_named_like_a_secret_is_redacted(name: str) -> None:
    document = logged(**{name: "hunter2"}, nested={name: ["hunter2"]})

    assert document[name] == log.REDACTED
    assert "hunter2" not in json.dumps(document)


@pytest.mark.parametrize("name", ["token_file", "public_key", "private_key_file", "secretary"])
def test_what_only_sounds_like_a_secret_is_shown(name: str) -> None:
    assert logged(**{name: "shown"})[name] == "shown"


def test_secret_values_are_redacted_under_any_name() -> None:
    grant = Grant("s-1", PSK, 0.0, 1.0)
    document = logged(
        a=PSK,
        b=SecretStr("hunter2"),
        c={"d": (PSK,)},
        e=grant,
        f="Authorization: Bearer hunter2",
        g="secret whsec_aHVudGVyMg==",
        h=PSK.raw,
    )

    text = json.dumps(document)
    assert "hunter2" not in text
    assert "aHVudGVyMg" not in text
    assert format_key(PSK.raw) not in text
    assert document["h"] == "(32 bytes)"


def test_hidden_strings_are_taken_out_of_text_and_tracebacks() -> None:
    stream = io.StringIO()
    log.configure("info", "json", stream)
    log.hide("hunter2", "")

    try:
        raise ValueError("it was hunter2")
    except ValueError:
        structlog.get_logger().exception("failed with hunter2")

    document = json.loads(stream.getvalue())
    assert "hunter2" not in stream.getvalue()
    assert document["event"] == f"failed with {log.REDACTED}"
    assert f"ValueError: it was {log.REDACTED}" in document["exception"]


def test_public_keys_and_addresses_are_shown_in_their_text_form() -> None:
    key = bytes(range(32))
    document = logged(
        public_key=key,
        allowed_ips=(Prefix(bytes([10, 0, 0, 1]), 32),),
        endpoint=Endpoint(bytes([192, 0, 2, 1]), 51820),
    )

    assert document["public_key"] == format_key(key)
    assert document["allowed_ips"] == ["10.0.0.1/32"]
    assert document["endpoint"] == "192.0.2.1:51820"


def test_a_long_text_is_cut() -> None:
    assert len(logged(body="x" * 1_000_000)["body"]) < 3_000


def test_the_level_changes_live() -> None:
    stream = io.StringIO()
    log.configure("warning", "json", stream)
    logger = structlog.get_logger("agent.test")

    logger.info("first")
    log.set_level("debug")
    logger.debug("second")
    logging.getLogger("httpx").info("GET https://core.example.com/?token=x")
    logging.getLogger("httpcore.http11").debug("send_request_headers")

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["second"]


def test_a_terminal_gets_the_console_form_and_a_pipe_json() -> None:
    terminal, pipe = Terminal(), io.StringIO()
    log.configure("info", "auto", terminal)
    structlog.get_logger().info("hello", name="\x1b[2J")
    log.configure("info", "auto", pipe)
    structlog.get_logger().info("hello")

    assert "hello" in terminal.getvalue()
    assert "{" not in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
    assert json.loads(pipe.getvalue())["event"] == "hello"


def test_a_console_traceback_shows_no_local_variables() -> None:
    stream = io.StringIO()
    log.configure("info", "console", stream)
    preshared = "hunter" + str(2)

    try:
        raise ValueError(len(preshared))
    except ValueError:
        structlog.get_logger().exception("failed")

    assert "ValueError: 7" in stream.getvalue()
    assert "hunter2" not in stream.getvalue()


def test_a_record_that_cannot_be_formatted_does_not_show_its_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log.configure("info", "json", io.StringIO())

    logging.getLogger("x").warning("%d", "hunter2")

    assert "hunter2" not in capsys.readouterr().err
