"""docs/operations.md: every command in it is one that its program would accept.

The integration test runs the section "One machine, all servers" for real.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from tests import operations
from tests.operations import ANY
from tests.test_infra import INFRA, secrets, services

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [
    words
    for heading in ["Operations: from a laptop to a cluster"]
    for block in operations.blocks(heading)
    for words in operations.commands(block)
]
MADE = ("infra/secrets.env", ".genarena/servers.env")  # by a command of the page


def of(program: str) -> list[list[str]]:
    found = [words[1:] for words in COMMANDS if words[0] == program]
    assert found, program
    return found


def parse(program: Any, words: list[str]) -> None:
    """Let a click program read the words, down to the last sub-command; nothing is run.

    Typer brings a click of its own, so types say nothing.
    """
    context = program.make_context(program.name, list(words))
    if hasattr(program, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        _, command, rest = program.resolve_command(context, rest)
        with context:
            parse(command, rest)


def test_every_block_is_shell_and_every_program_is_known() -> None:
    assert len(COMMANDS) > 80
    for heading in operations.headings():
        for block in operations.blocks(heading):
            done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True)
            assert done.returncode == 0, (heading, done.stderr)
    programs = Counter(words[0] for words in COMMANDS)
    ours = {"genarena", "dvc", "prefect", "mlflow", "ray", "make", "docker", "kubectl", "python"}
    shell = {"export", "set", ".", "sh", "umask", "head", "od", "tr", "sed", "mkdir"}
    assert set(programs) == ours | shell


def test_blocks_are_found_by_heading() -> None:
    whole = operations.blocks("One machine, all servers")
    assert whole[0].startswith("set -a; . .genarena/servers.env")
    assert whole[1:2] == operations.blocks("Deploy")
    assert "make servers\n" in operations.blocks("Start every server")
    assert not any("kubectl" in block for block in whole)
    with pytest.raises(KeyError, match="no heading 'Nowhere'"):
        operations.blocks("Nowhere")
    taken = operations.commands('A=1 b --c=$D > e < f | (g; h "$(i j | k)") && l "$M"')
    assert taken == [
        *(["i", "j"], ["k"]),
        *(["b", f"--c={ANY}"], ["g"], ["h", ANY], ["l", ANY]),
    ]


@pytest.mark.parametrize("words", of("genarena"), ids=" ".join)
def test_genarena(words: list[str]) -> None:
    from genarena.cli import app

    parse(typer.main.get_command(app), words)


@pytest.mark.parametrize("words", of("mlflow"), ids=" ".join)
def test_mlflow(words: list[str]) -> None:
    from mlflow.cli import cli

    parse(cli, words)


@pytest.mark.parametrize("words", of("ray"), ids=" ".join)
def test_ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    parse(cli, words)


@pytest.mark.parametrize("words", of("dvc"), ids=" ".join)
def test_dvc(words: list[str]) -> None:
    from dvc.cli import parse_args

    parse_args(words)


@pytest.mark.parametrize("words", of("prefect"), ids=" ".join)
def test_prefect(words: list[str]) -> None:
    from prefect.cli._app import _app

    _app.parse_args(words, exit_on_error=False, print_error=False)
    named = [word for word in words if re.fullmatch(r"[a-z]+/[a-z]+", word)]
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    flows = {f"{d['entrypoint'].split(':')[1]}/{d['name']}" for d in deployed}
    assert set(named) <= flows


def test_wrong_commands_would_be_found() -> None:
    from dvc.cli import DvcParserError, parse_args
    from mlflow.cli import cli
    from prefect.cli._app import _app
    from ray.scripts.scripts import cli as ray

    for program, line in (
        (cli, "models serve --env-manger local -m x"),
        (cli, "models serv -m x"),
        (ray, "start --hed"),
        (typer.main.get_command(__import__("genarena.cli").cli.app), "sampel vae"),
    ):
        with pytest.raises(Exception, match=r"No such (command|option)"):
            parse(program, line.split())
    with pytest.raises(DvcParserError):
        parse_args(["remote", "add", "--defualt", "store"])
    with pytest.raises(Exception, match="Unknown option"):
        _app.parse_args(["deploy", "--al"], exit_on_error=False, print_error=False)


def test_make_has_these_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    variables = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.M))
    for words in of("make"):
        target, *settings = words
        assert target in targets
        assert {setting.split("=")[0] for setting in settings} <= variables


def test_python_commands_compile_and_their_imports_are_there() -> None:
    for words in of("python"):
        assert words[0] == "-c"
        compile(words[1], "<page>", "exec")
        for line in re.findall(r"(?:from [\w.]+ )?import [\w, ]+", words[1]):
            exec(line, {})
    from mlflow.server.auth.client import AuthServiceClient

    assert AuthServiceClient.update_user_password.__code__.co_varnames[1:3] == (
        "username",
        "password",
    )


def test_files_that_are_named_are_there() -> None:
    page = operations.PAGE.read_text()
    every = " ".join(word for words in COMMANDS for word in words)
    named = set(re.findall(r"(?:infra|docs|\.genarena)/[\w./-]+", every))
    named |= set(re.findall(r"`(infra/[\w./-]+)`", page))
    assert len(named) >= 6
    for name in named - {*MADE}:
        assert (ROOT / name).exists(), name
    assert set(re.findall(r"\]\(#(\S+?)\)", page)) <= {h.lower() for h in operations.headings()}
    for path in set(re.findall(r"^export COMPOSE_FILE=(\S+) ", page, re.M)):
        assert (ROOT / path).is_file()


def test_compose_commands_name_services_volumes_and_images_that_are_there() -> None:
    known = {"build", "up", "ps", "logs", "exec", "down", "stop", "start"}
    images = {service["image"] for service in services().values()}
    volumes = yaml.safe_load((INFRA / "compose.yaml").read_text())["volumes"]
    for words in of("docker"):
        if words[0] == "compose":
            rest = words[3:] if words[1] == "--profile" else words[1:]
            assert rest[0] in known, words
            assert words[1] != "--profile" or words[2] in services()["ray-gpu"]["profiles"]
            if rest[0] == "exec":
                assert next(w for w in rest[1:] if not w.startswith("-")) in services(), words
            if rest[0] in ("stop", "start"):
                assert set(rest[1:]) <= set(services()), words
            for scaled in (w.split("=")[0] for w in rest if "=" in w and "scale" in " ".join(rest)):
                assert scaled in services()
        elif words[0] == "run":
            assert set(words) & images, words
            mounted = [w.split(":")[0] for w in words if re.match(r"genarena_\w+:", w)]
            assert mounted
            assert {name.removeprefix("genarena_") for name in mounted} <= set(volumes)
        else:
            assert words[0] in ("build", "push")


kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")


@kubectl
def test_kubectl_knows_every_command_and_option() -> None:
    shown: dict[tuple[str, ...], str] = {}

    def help_of(*words: str) -> str:
        if words not in shown:
            done = subprocess.run(
                ["kubectl", *words], capture_output=True, text=True, timeout=60, env=offline()
            )
            assert done.returncode == 0, (words, done.stderr)
            shown[words] = done.stdout
        return shown[words]

    for words in of("kubectl"):
        rest = words[2:] if words[0] == "--namespace" else words
        own = rest[: rest.index("--")] if "--" in rest else rest
        depth = {"create": 3, "rollout": 2}.get(own[0], 1)
        text = help_of(*own[:depth], "--help") + help_of("options")
        for option in (w.split("=")[0] for w in own if w.startswith("--")):
            assert re.search(rf"{option}\b[=\s\[]", text), (words, option)
        kinds = [w for w in own if re.fullmatch(r"(deployment|service)/\w+", w)]
        named = {f"{'deployment' if 'strategy' in o['spec'] else 'service'}/{o['metadata']['name']}"
                 for name in ("mlflow", "prefect", "worker")
                 for o in yaml.safe_load_all((INFRA / f"kubernetes/{name}.yaml").read_text())
                 if o["kind"] in ("Deployment", "Service")}  # fmt: skip
        assert set(kinds) <= named


@kubectl
def test_the_secrets_that_the_commands_make_are_those_that_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "infra").mkdir()
    shutil.copy(INFRA / "secrets.example", tmp_path / "infra")
    lines = [line for block in operations.blocks("Kubernetes") for line in block.splitlines()]
    for line in lines:
        if "create secret" in line or "umask" in line:
            line += " --dry-run=client --output yaml >> made.yaml" if "create" in line else ""
            line += "; echo --- >> made.yaml"
            subprocess.run(["sh", "-c", line], cwd=tmp_path, check=True, timeout=60, env=offline())
    assert (tmp_path / "infra/secrets.env").stat().st_mode & 0o077 == 0
    made = {
        o["metadata"]["name"]: o["data"]
        for o in yaml.safe_load_all((tmp_path / "made.yaml").read_text())
        if o
    }
    assert set(made["genarena"]) == set(secrets())
    assert set(made["genarena-ray"]) == {"auth_token"}
    assert made["genarena-ray"]["auth_token"] == made["genarena"]["RAY_AUTH_TOKEN"]


def offline() -> dict[str, str]:
    return {**os.environ, "KUBECONFIG": "/nonexistent"}


def test_every_variable_of_the_secrets_has_its_line_in_the_table() -> None:
    table = operations.PAGE.read_text().split("## Secrets")[1].split("```")[0]
    assert {n for n in re.findall(r"`([A-Z0-9_]+)`", table) if n in secrets()} == set(secrets())
