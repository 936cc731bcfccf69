"""What is in the Debian package, without installing it."""

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import __version__
from agent.__main__ import _parser
from agent.sandbox import client, demo, exercise, mail
from agent.sandbox.__main__ import core_parser
from tests.docs.markdown import parse
from tests.support import package
from tests.support.package import LIB, ROOT

# The first of them builds it, unless that was done before.
pytestmark = pytest.mark.timeout(900)

DIST = str(LIB / "dist").lstrip("/")
SYSTEM = "/usr/bin/python3"
UNCHECKED = 1  # PEP 552: by hash, and not compared with the source
ASK = """
import json, sys
import agent.daemon, agent.core.defguard.connection, agent.sandbox.demo, agent.sandbox.__main__
from importlib.metadata import distributions
print(json.dumps({
    "path": sys.path,
    "files": [m.__file__ for m in list(sys.modules.values()) if getattr(m, "__file__", None)],
    "found": {d.name: d.version for d in distributions()},
}))
"""


def pins(name: str) -> dict[str, str]:
    """What a lock file pins, by the normalised name."""
    text = (ROOT / "requirements" / name).read_text()
    found = re.findall(r"(?m)^([\w.-]+)==([^ ;]+)(?: ; ([^\\]*))?", text)
    return {normal(one): version for one, version, marker in found if "win32" not in marker}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def scripts() -> list[Path]:
    return [ROOT / ".ci" / name for name in ("deb", "debian/wg-agent", "debian/postinst")] + [
        ROOT / ".ci/debian" / name for name in ("prerm", "postrm")
    ]


def test_its_control_fields_name_what_it_was_built_for(deb: Path) -> None:
    minor = int(subprocess.check_output([SYSTEM, "-c", "import sys; print(sys.version_info.minor)"]))
    depends = package.field(deb, "Depends").split(", ")
    architecture = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    version = package.field(deb, "Version")

    assert {f"python3 (>= 3.{minor}~)", f"python3 (<< 3.{minor + 1})", "libnftables1"} <= set(depends)
    assert any(one.startswith("libc6 (>= ") for one in depends)
    assert "wireguard-tools" in package.field(deb, "Recommends").split(", ")
    assert "wireguard-go" in package.field(deb, "Suggests").split(", ")
    assert version.startswith(f"{__version__}-1~")
    assert deb.name == f"wg-agent_{version}_{architecture}.deb"


def test_everything_is_roots_nobody_else_writes_and_the_configurations_folder_is_not_listed(
    deb: Path,
) -> None:
    modes = {}
    for line in subprocess.check_output(["dpkg-deb", "-c", deb], text=True).splitlines():
        mode, owner, _, _, _, name = line.split(maxsplit=5)
        modes[name] = mode
        assert owner == "root/root"
        assert mode[0] == "l" or (mode[5], mode[8], "s" in mode) == ("-", "-", False), line
    assert modes["./etc/wg-agent/"] == "drwx--x--x"
    for command in ("wg-agent", "wg-agent-sandbox"):
        assert modes[f"./usr/bin/{command}"] == "-rwxr-xr-x"
    assert {f"./usr/lib/systemd/system/{unit.name}" for unit in (ROOT / "systemd").iterdir()} <= modes.keys()
    assert f"./{LIB}/live/".replace("//", "/") not in modes


def test_nothing_in_it_knows_where_it_was_built(tree: Path) -> None:
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    places = [str(ROOT).encode(), b"build/deb"]

    assert len(files) > 1000
    assert [str(path) for path in files for place in places if place in path.read_bytes()] == []
    links = {str(path.readlink()) for path in tree.rglob("*") if path.is_symlink()}
    assert {link for link in links if not re.fullmatch(r"/usr/bin/python3\.\d+", link)} == set()
    leftovers = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
    assert {path.name for path in files} & leftovers == set()
    assert [path.name for path in (tree / DIST / "bin").iterdir()] == ["python3"]


def test_every_module_is_compiled_so_that_nothing_is_ever_written_beside_it(tree: Path) -> None:
    magic = subprocess.check_output(
        [SYSTEM, "-c", "import importlib.util as u; print(u.MAGIC_NUMBER.hex(), end='')"], text=True
    )
    tag = subprocess.check_output([SYSTEM, "-c", "import sys; print(sys.implementation.cache_tag, end='')"])
    modules = list((tree / DIST).rglob("*.py"))

    assert modules
    for module in modules:
        compiled = module.parent / "__pycache__" / f"{module.stem}.{tag.decode()}.pyc"
        head = compiled.read_bytes()[:8]
        assert (head[:4].hex(), int.from_bytes(head[4:], "little")) == (magic, UNCHECKED), module


def test_it_runs_from_wherever_its_tree_is_with_the_libraries_that_are_locked(
    tree: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "live"
    shutil.copytree(tree / DIST, copy, symlinks=True)

    told = json.loads(subprocess.check_output([copy / "bin/python3", "-I", "-c", ASK], cwd="/"))

    assert [path for path in told["path"] if not path.startswith(("/usr/lib/python3", str(copy)))] == []
    ours = [file for file in told["files"] if f"{copy}/" in file]
    assert len(ours) > 300
    assert [
        file for file in told["files"] if file not in ours and not file.startswith("/usr/lib/python3")
    ] == []
    found = {normal(name): version for name, version in told["found"].items()}
    assert found.pop("wg-agent") == __version__
    assert found.items() <= pins("package.txt").items()
    assert {"grpcio", "cryptography", "pyotp", "pydantic-core"} <= found.keys()
    written = [
        str(path) for path in copy.rglob("*") if not os.path.lexists(tree / DIST / path.relative_to(copy))
    ]
    assert written == []


def test_it_pins_what_the_tests_run_with() -> None:
    assert pins("package.txt").items() <= pins("dev.txt").items()
    assert pins("runtime.txt").keys() <= pins("package.txt").keys()


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.name)
def test_its_scripts_are_sound(script: Path) -> None:
    subprocess.run(["shellcheck", script], check=True)
    subprocess.run(["bash" if script.name == "deb" else "sh", "-n", script], check=True)


def test_its_documents_are_there(tree: Path) -> None:
    doc = tree / "usr/share/doc/wg-agent"

    assert (doc / "config.example.toml").read_bytes() == (ROOT / "config.example.toml").read_bytes()
    assert gzip.decompress((doc / "changelog.gz").read_bytes()) == (ROOT / "CHANGELOG.md").read_bytes()
    copyright_of = (doc / "copyright").read_text()
    assert "Apache License" in copyright_of
    named = {
        normal(line.split()[0]) for line in copyright_of.splitlines() if re.match(r"[\w.-]+ \d[^:]*: ", line)
    }
    assert len(named) > 20
    assert named <= pins("package.txt").keys()


def test_no_link_of_its_documents_is_dead(tree: Path) -> None:
    doc = tree / "usr/share/doc/wg-agent"
    pages = {path.relative_to(doc).as_posix(): parse("", path.read_text()) for path in doc.rglob("*.md")}

    sources = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert pages.keys() == {path.relative_to(ROOT).as_posix() for path in sources}
    links = [(name, target) for name, page in pages.items() for _, target in page.links]
    assert len(links) > 100
    for name, target in links:
        if re.match(r"[a-z+]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((doc / name).parent / path if path else doc / name).resolve()
        assert file.is_file(), f"{name}: there is no {target}"
        if anchor:
            page = pages[file.relative_to(doc.resolve()).as_posix()]
            assert anchor in page.anchors, f"{name}: there is no {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/man").glob("*.[1-8]")), ids=lambda path: path.name)
def test_its_man_pages_render_without_a_warning(page: Path, tree: Path) -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-rLL=78n", "-z", page], capture_output=True, text=True, check=True
    )
    packed = tree / f"usr/share/man/man{page.suffix[1:]}/{page.name}.gz"

    assert done.stderr == ""
    assert gzip.decompress(packed.read_bytes()) == page.read_bytes()


def spoken(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Each command with each of its options, long if it has a long one."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield name, ""
                yield from ((name, option) for _, option in spoken(command))
        elif action.option_strings:
            yield "", max(action.option_strings, key=len)


def test_its_man_page_has_every_command_and_option() -> None:
    text = (ROOT / "docs/man/wg-agent.1").read_text().replace("\\-", "-")
    commands, _, _ = text.partition(".SH COMMANDS")[2].partition("\n.SH ")
    headings = re.findall(r"(?m)^\.TP\n\.B ([\w-]+)", commands)

    # The demo's are known to the sandbox only.
    wanted = [*spoken(_parser()), *(("demo", option) for _, option in spoken(demo.parser()))]
    assert sorted(headings) == sorted({name for name, _ in wanted if name})
    assert {option for _, option in wanted if not re.search(rf"{option}\b", text)} == set()


def test_the_sandboxs_man_page_has_every_option() -> None:
    text = (ROOT / "docs/man/wg-agent-sandbox.1").read_text().replace("\\-", "-")
    parsers = [core_parser(), client.parser(), mail.parser(), exercise.parser(), demo.parser()]

    options = {option for parser in parsers for _, option in spoken(parser) if option}
    assert {"--ca-file", "--keep", "--wait", "--listen"} <= options
    assert {option for option in options if not re.search(rf"{option}\b", text)} - {"--help"} == set()


def test_the_sandbox_calls_itself_what_it_was_called(tree: Path) -> None:
    command = (tree / "usr/bin/wg-agent-sandbox").read_text().splitlines()[-1]
    python = [str(tree / DIST / "bin/python3")]
    called = subprocess.run(
        ["sh", "-c", command.replace("exec ", "tree=$0; exec ", 1), tree / DIST, "exercise", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    module = subprocess.run(
        [*python, "-I", "-m", "agent.sandbox", "--help"], capture_output=True, text=True, check=True, cwd="/"
    )

    assert called.stdout.startswith("usage: wg-agent-sandbox exercise ")
    assert module.stdout.startswith("usage: python -m agent.sandbox ")


def complete(tree: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    script = """
        source "$1"; shift
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
        $(complete -p wg-agent | sed -E 's/.*-F ([^ ]+).*/\\1/')
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    file = tree / "usr/share/bash-completion/completions/wg-agent"
    argv = ["bash", "--norc", "-c", script, "bash", str(file), *words]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()


def interfaces() -> set[str]:
    """What there is to offer for ``-i``."""
    links = {link.name for link in Path("/sys/class/net").iterdir()}
    return {path.stem for path in Path("/etc/wg-agent").glob("*.toml")} or links


def test_bash_completes_commands_options_and_interfaces(tree: Path) -> None:
    assert complete(tree, "wg-agent", "pu") == ["purge"]
    assert "--key" in complete(tree, "wg-agent", "purge", "--")
    assert set(complete(tree, "wg-agent", "status", "-i", "")) == interfaces()


def test_fish_completes_commands_options_and_interfaces(tree: Path, tmp_path: Path) -> None:
    file = tree / "usr/share/fish/vendor_completions.d/wg-agent.fish"
    # A command of that name that fish finds, or it offers nothing.
    (tmp_path / "wg-agent").touch(0o755)
    env = os.environ | {"HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def offered(line: str) -> set[str]:
        argv = ["fish", "--no-config", "-c", "source $argv[1]; complete -C $argv[2]", "--", str(file), line]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return {row.split("\t")[0] for row in done.stdout.splitlines()}

    assert offered("wg-agent pu") == {"purge"}
    assert "--key" in offered("wg-agent purge --")
    assert offered("wg-agent status -i ") == interfaces()


def test_zsh_loads_the_completion(tree: Path) -> None:
    folder = tree / "usr/share/zsh/vendor-completions"
    script = (
        "fpath=($1 $fpath); autoload -U compinit; compinit -D; print $_comps[wg-agent]; autoload +X _wg-agent"
    )

    done = subprocess.run(["zsh", "-fc", script, "zsh", folder], capture_output=True, text=True, check=True)

    assert (done.stdout.strip(), done.stderr) == ("_wg-agent", "")
    subprocess.run(["zsh", "-n", folder / "_wg-agent"], check=True)


def test_no_interpreter_but_the_systems_own_is_named(tree: Path) -> None:
    first = (tree / "usr/bin/wg-agent").read_text().splitlines()[0]

    assert first == "#!/bin/sh"
    assert sys.prefix not in (tree / DIST / "pyvenv.cfg").read_text()
