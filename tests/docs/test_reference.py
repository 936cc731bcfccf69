"""docs/configuration.md and the man page say what the model and config.example.toml say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.config import KEYS, LIVE_KEYS, SECTIONS
from agent.sandbox.__main__ import COMMANDS as SANDBOX
from docs import reference

MAN = reference.ROOT / "docs/man/wg-agent.toml.5"
needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="not installed: groff-base")


@pytest.mark.parametrize("path", reference.FILES, ids=lambda path: path.name)
def test_the_reference_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == reference.FILES[path](), "run `make docs`"


def test_every_key_has_a_row_with_its_variable_its_reload_and_its_credential() -> None:
    rows: dict[str, list[str]] = {}
    section = ""
    for line in reference.configuration_md().splitlines():
        if header := re.fullmatch(r"## \[(\w+)\]", line):
            section = header[1]
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[f"{section}.{cells[0].strip('`')}"] = cells

    assert tuple(rows) == KEYS
    for dotted, (_, takes, _, variable, credential, reload, why) in rows.items():
        assert variable == f"`WG_AGENT_{dotted.replace('.', '__').upper()}`"
        assert credential == (f"`{dotted.removesuffix('_file')}`" if dotted.endswith("_file") else "")
        assert reload == ("reload" if dotted in LIVE_KEYS else "restart")
        assert takes
        assert why
        assert "; live" not in why


def test_ranges_are_the_models() -> None:
    keys = {f"{key.section}.{key.name}": key for part in reference.sections() for key in part.keys}

    assert keys["interface.mtu"].takes == "576 to 65535"
    assert keys["sessions.agent_lease"].takes == "seconds, 0 (off) or 30 to 10 years"
    assert keys["sessions.idle_timeout"].takes == "seconds, 1 to 10 years"
    assert keys["log.level"].takes == r'`"debug"` \| `"info"` \| `"warning"` \| `"error"`'
    assert keys["firewall.priority"].takes == "-400 to 400"
    assert keys["http.listen"].takes == "`ADDRESS:PORT`"
    assert (keys["core.token_file"].default, keys["stats.interval"].default) == ("", "`30`")


def test_a_key_that_the_example_does_not_explain_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = reference.EXAMPLE.read_text(encoding="utf-8")
    example = tmp_path / "config.example.toml"
    example.write_text(re.sub(r"(?m)^mtu.*\n|^#mtu.*\n", "", text))
    monkeypatch.setattr(reference, "EXAMPLE", example)

    with pytest.raises(ValueError, match=r"does not say in one line what interface\.mtu is for"):
        reference.sections()


def test_a_key_marked_live_that_is_not_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = reference.EXAMPLE.read_text(encoding="utf-8")
    example = tmp_path / "config.example.toml"
    example.write_text(re.sub(r"(?m)^(listen_port .*)$", r"\1; live", text))
    monkeypatch.setattr(reference, "EXAMPLE", example)

    with pytest.raises(ValueError, match=r"interface\.listen_port is not live"):
        reference.sections()


def test_what_the_example_says_of_a_section_stands_above_its_keys() -> None:
    said = {part.name: part.about for part in reference.sections()}

    assert set(said) == set(SECTIONS)
    assert said["sessions"] == ["Ceilings: of core's and these the stricter wins, for running sessions too."]
    assert "".join(said["hooks"]).startswith("Commands in their order, each a list of words")


def printed_page(path: Path) -> str:
    """What man shows of a page that troff has nothing to say about."""
    done = subprocess.run(
        ["groff", "-ww", "-man", "-Kutf8", "-Tutf8", str(path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return re.sub(r".\x08|\x1b\[[\d;]*m", "", done.stdout)


@needs_groff
@pytest.mark.parametrize("path", sorted(MAN.parent.glob("*.[1-8]")), ids=lambda path: path.name)
def test_a_man_page_is_set_without_a_warning(path: Path) -> None:
    name, _, chapter = path.name.rpartition(".")

    assert printed_page(path).lstrip().startswith(f"{name.upper()}({chapter})")


@needs_groff
def test_the_configurations_page_has_every_key() -> None:
    printed = printed_page(MAN)

    for dotted in KEYS:
        assert dotted.partition(".")[2] in printed


@needs_groff
def test_the_sandboxs_page_has_every_command_and_what_it_takes() -> None:
    printed = " ".join(printed_page(MAN.with_name("wg-agent-sandbox.1")).split())

    for command in SANDBOX:
        assert f"wg-agent-sandbox {command}" in printed
    for command in ("key", "connect", "disconnect"):
        assert f"wg-agent-sandbox client {command}" in printed


def test_the_man_page_has_no_line_that_troff_would_take_for_a_request() -> None:
    requests = {"TH", "SH", "TP", "PP", "ad", "br", "I", "BR", '\\"'}
    for line in MAN.read_text(encoding="utf-8").splitlines():
        if line.startswith((".", "'")):
            assert line.removeprefix(".").split()[0] in requests, line
