"""infra/: what its files promise, as far as it can be seen without Docker, cluster or cloud."""

from __future__ import annotations

import configparser
import functools
import http.server
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tasks.environment import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
INFRA = ROOT / "infra"
IMAGE = INFRA / "image"
OURS = "genarena"


def text(name: str) -> str:
    return (INFRA / name).read_text()


@functools.cache
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(text("compose.yaml"))["services"])


@functools.cache
def objects() -> list[dict[str, Any]]:
    """What stands in the Kubernetes files themselves (kustomize is tested on its own)."""
    folder = INFRA / "kubernetes"
    named = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    files = {p.name for p in folder.glob("*.yaml")} - {"kustomization.yaml", "kustomize-ray.yaml"}
    assert set(named) == files
    return [o for name in named for o in yaml.safe_load_all((folder / name).read_text())]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's specification, by the name of what makes it."""
    for entry in objects():
        name, spec = entry["metadata"]["name"], entry.get("spec", {})
        if entry["kind"] in ("Deployment", "StatefulSet"):
            yield name, spec["template"]["spec"]
        if entry["kind"] == "RayCluster":
            yield "ray-head", spec["headGroupSpec"]["template"]["spec"]
            for group in spec["workerGroupSpecs"]:
                yield f"ray-{group['groupName']}", group["template"]["spec"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, spec in pods():
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            yield f"{name}/{container['name']}", container


@functools.cache
def secrets() -> dict[str, str]:
    done = subprocess.run(
        ["sh", INFRA / "secrets.example"], capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@functools.cache
def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(re.split("==", line.lower()) for line in lines if "==" in line)


def every_file() -> list[Path]:
    skipped = ("__pycache__", "local")  # infra/local is Python, and has tests of its own
    return [p for p in sorted(INFRA.rglob("*")) if p.is_file() and not {*skipped} & {*p.parts}]


def test_versions_are_those_of_constraints() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    packages = "|".join(map(re.escape, sorted(constraints(), key=len, reverse=True)))
    found = 0
    for path in every_file():
        content = path.read_text()
        for package, given in re.findall(rf"(?i)\b({packages})==([\w.]+)", content):
            assert given == constraints()[package.lower()], path
        for given in re.findall(r"rayVersion: (\S+)", content):
            assert given == constraints()["ray"], path
            found += 1
        for given in re.findall(rf"{OURS}:(\d\S*)|newTag: (\S+)", content):
            assert "".join(given) == version, path
            found += 1
    assert found >= 4  # the cluster's Ray, the image in compose, in its build, in Kubernetes
    assert "-c constraints.txt -e '.[infra]'" in text("image/Dockerfile")
    assert "-c /project/constraints.txt -e '/project[infra]'" in text("ray-cluster.yaml")


def test_other_images_are_pinned_by_a_full_tag_and_are_the_same_everywhere() -> None:
    images = [s["image"] for s in services().values()]
    images += [c["image"] for _, c in containers()]
    images += re.findall(r"^FROM (\S+)", text("image/Dockerfile"), re.M)
    others = {i for i in images if i.partition(":")[0] != OURS}
    by_name: dict[str, set[str]] = {}
    for image in others:
        name, _, tag = image.partition(":")
        by_name.setdefault(name, set()).add(tag)
        assert re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", tag), image
    assert set(by_name) == {"postgres", "minio/minio", "python"}
    assert all(len(tags) == 1 for tags in by_name.values())
    (python,) = by_name["python"]
    assert python.startswith("3.11.")


def test_secrets_are_made_anew_and_long() -> None:
    again = subprocess.run(
        ["sh", INFRA / "secrets.example"], capture_output=True, text=True, check=True
    ).stdout
    for name, value in secrets().items():
        assert re.fullmatch(r"(genarena:)?[0-9a-f]{48}", value), name
        assert value not in again


def test_no_file_holds_a_secret_and_git_would_not_take_one() -> None:
    for path in every_file():
        for name in secrets():
            for given in re.findall(rf"\b{name}\b\s*[:=](?!\?)\s*(.*)", path.read_text()):
                assert not given or given.startswith(("${", '"$', "genarena:$(")), (path, given)
        assert not re.search(r"[0-9a-f]{32}|AKIA[0-9A-Z]{16}|://\w+:[^@/\s]+@", path.read_text())
    for ignore in (".gitignore", ".dockerignore"):
        assert "infra/secrets.env" in (ROOT / ignore).read_text(), ignore


SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|AUTH_STRING|ACCESS_KEY|_KEY$")


def test_compose_takes_every_secret_from_the_environment_and_stops_without() -> None:
    used = set(re.findall(r"\$\{(\w+)", text("compose.yaml")))
    assert used - {"GENARENA_REPOSITORY"} == set(secrets())
    for name, service in services().items():
        words = " ".join(map(str, service.get("command", [])))
        assert "${" not in words, f"{name}: arguments can be read by everybody"
        for key, value in service["environment"].items():
            if SECRET.search(key):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), (name, key)


def test_kubernetes_takes_every_secret_from_keys_that_are_made() -> None:
    keys = {"genarena": set(secrets()), "genarena-ray": {"auth_token"}}
    used = set()
    for name, container in containers():
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            assert bool(reference) == bool(SECRET.search(entry["name"])), (name, entry)
            if reference:
                assert reference["key"] in keys[reference["name"]], (name, entry)
                used.add(reference["key"])
    assert used == (keys["genarena"] | {"auth_token"}) - {"RAY_AUTH_TOKEN"}
    assert not [o for o in objects() if o["kind"] == "Secret"]
    settings = text("kubernetes/settings.env")
    assert not [line for line in settings.splitlines() if SECRET.search(line.split("=")[0])]
    known = {line.split("=")[0] for line in settings.splitlines()}
    for _, container in containers():
        for entry in container.get("env", []):
            reference = entry.get("valueFrom", {}).get("configMapKeyRef")
            assert reference is None or reference["key"] in known


def test_everything_asks_who_is_there() -> None:
    mlflow, prefect = services()["mlflow"], services()["prefect"]
    pods_ = dict(containers())
    for command in (mlflow["command"], pods_["mlflow/mlflow"]["args"]):
        assert "--app-name=basic-auth" in command
        assert any(word.startswith("--allowed-hosts=mlflow:5000") for word in command)
    for name, container in {n: c for n, c in pods_.items() if "postgres" not in n}.items():
        given = {entry["name"] for entry in container["env"]}
        if name.startswith(("ray", "worker")):
            assert "RAY_AUTH_TOKEN" in given, name
    assert "RAY_AUTH_MODE=token" in text("kubernetes/settings.env")
    (cluster,) = (o for o in objects() if o["kind"] == "RayCluster")
    auth = cluster["spec"]["authOptions"]
    assert auth == {"mode": "token", "secretName": cluster["metadata"]["name"]}
    for name in ("ray-head", "ray-worker", "ray-gpu", "worker", "project"):
        environment = services()[name]["environment"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert {"RAY_AUTH_TOKEN", "MLFLOW_TRACKING_PASSWORD", "PREFECT_API_AUTH_STRING"} <= {
            *environment
        }
    for environment in (
        prefect["environment"],
        {e["name"] for e in pods_["prefect/prefect"]["env"]},
    ):
        assert "PREFECT_SERVER_API_AUTH_STRING" in environment
    starts = re.findall(r"ulimit.*ray start.*", text("ray-cluster.yaml"))
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


def test_ports_are_bound_to_this_machine() -> None:
    published = [port for s in services().values() for port in s.get("ports", [])]
    assert len(published) == 5
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)
    kinds = {o["spec"].get("type", "ClusterIP") for o in objects() if o["kind"] == "Service"}
    assert kinds == {"ClusterIP"}
    assert not [o for o in objects() if o["kind"] == "Ingress"]
    refusing = [o for o in objects() if o["metadata"]["name"] == "nobody"]
    assert refusing[0]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_every_service_has_a_health_check_limits_and_waits_for_the_healthy() -> None:
    waited_to_end = set()
    for name, service in services().items():
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        for other, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_completed_successfully":
                waited_to_end.add(other)
            else:
                assert how["condition"] == "service_healthy"
                assert "healthcheck" in services()[other]
    for name, service in services().items():
        assert ("healthcheck" in service) != (name in waited_to_end), name
    assert waited_to_end == {"project"}
    used = {v.split(":")[0] for s in services().values() for v in s.get("volumes", [])}
    declared = yaml.safe_load(text("compose.yaml"))["volumes"]
    assert {v for v in used if not v.startswith(".")} == set(declared)
    assert all((INFRA / v).is_file() for v in used if v.startswith("."))


def test_every_container_has_resources_probes_and_no_privileges() -> None:
    for name, spec in pods():
        person = spec["securityContext"]
        # a service `mlflow` would set MLFLOW_PORT, which MLflow takes for its own
        assert spec["enableServiceLinks"] is False, name
        assert person["runAsNonRoot"], name
        assert person["runAsUser"] > 0, name
        assert person["seccompProfile"] == {"type": "RuntimeDefault"}, name
    for name, container in containers():
        for which in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][which]), name
        locked = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == locked, name
        if name != "worker/project":  # an initial container ends
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name


def test_the_ray_cluster_scales_and_its_gpus_are_chosen() -> None:
    (cluster,) = (o["spec"] for o in objects() if o["kind"] == "RayCluster")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for group in groups.values():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert groups["cpu"]["minReplicas"] >= 1
    assert groups["gpu"]["minReplicas"] == 0
    spec = groups["gpu"]["template"]["spec"]
    assert spec["nodeSelector"]
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def in_bytes(amount: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]+)", amount).groups()  # type: ignore[union-attr]
    return int(number) * 2 ** {"m": 20, "g": 30}[unit[0].lower()]


def test_ray_has_shared_memory_for_its_objects() -> None:
    """Three tenths of a node's memory; where /dev/shm is less, objects go to the disk, slowly."""
    for name, service in services().items():
        if name.startswith("ray-"):
            memory = in_bytes(service["deploy"]["resources"]["limits"]["memory"])
            assert in_bytes(service["shm_size"]) >= 0.3 * memory, name
    for name, spec in pods():
        if name.startswith("ray-"):
            (shm,) = (v["emptyDir"]["sizeLimit"] for v in spec["volumes"] if v["name"] == "shm")
            memory = in_bytes(spec["containers"][0]["resources"]["limits"]["memory"])
            assert in_bytes(shm) >= 0.3 * memory, name


def test_what_is_mounted_is_there() -> None:
    claims = {o["metadata"]["name"]: o["spec"] for o in objects() if "Claim" in o["kind"]}
    assert claims["project"]["accessModes"] == ["ReadWriteMany"]
    for name, spec in pods():
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims, name
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for mount in container["volumeMounts"]:
                assert mount["name"] in volumes or name == "postgres", name
    mentioned = set(re.findall(r"/opt/genarena/(infra/\S+?\.\w+)", "".join(
        path.read_text() for path in every_file()
    )))  # fmt: skip
    assert len(mentioned) >= 4
    assert all((ROOT / name).is_file() for name in mentioned)


def test_kustomize_renders_with_the_names_it_made() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    done = subprocess.run(
        ["kubectl", "kustomize", INFRA / "kubernetes"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    assert {o["metadata"].get("namespace", o["metadata"]["name"]) for o in rendered} == {OURS}
    kinds = [o["kind"] for o in rendered]
    assert kinds.count("Deployment") == 3
    assert kinds.count("RayCluster") == 1
    config = {o["metadata"]["name"] for o in rendered if o["kind"] == "ConfigMap"}
    wanted = set(re.findall(r"name: (genarena-(?:settings|config)\S*)", done.stdout))
    assert wanted == config  # those of the RayCluster too
    assert all("-" in name.removeprefix("genarena-") for name in config)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    used = set(re.findall(r"image: (genarena\S*)", done.stdout))
    assert used == {f"genarena:{version}"}


def test_ray_accepts_the_cluster_of_the_launcher() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text("ray-cluster.yaml")))  # as `ray up` does
    validate_config(config)
    assert config["head_node_type"] == "head"
    assert config["available_node_types"]["gpu"]["min_workers"] == 0


def test_settings_are_known_to_the_installed_versions() -> None:
    import mlflow.environment_variables as known_to_mlflow
    from mlflow.cli import server
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_valid_setting_names

    named = re.findall(
        r"(?:^|[\s{,])(?:name: )?((?:PREFECT|MLFLOW)_[A-Z_]+)(?=[:=,}]|$)",
        text("compose.yaml") + "".join(p.read_text() for p in (INFRA / "kubernetes").glob("*.*"))
        + text("image/Dockerfile"), re.M,
    )  # fmt: skip
    named = {name for name in named if name not in secrets()}
    prefect = _get_valid_setting_names(Settings)
    options = {o.envvar for o in server.params if isinstance(o, click.Option) and o.envvar}
    assert len(named) > 20
    for name in named:
        if name.startswith("PREFECT_"):
            assert name in prefect, name
        else:
            assert name in options or hasattr(known_to_mlflow, name), name
    words = [w for w in services()["mlflow"]["command"] if w.startswith("--")]
    flags = {flag for option in server.params for flag in option.opts}
    assert all(word.split("=")[0] in flags for word in words)


def test_ray_start_knows_its_options() -> None:
    from ray.scripts.scripts import start

    flags = {flag for option in start.params for flag in option.opts}
    lines = [" ".join(s["command"]) for s in services().values() if "ray" in s.get("command", [])]
    lines += re.findall(r"ray start.*", text("image/worker.sh") + text("ray-cluster.yaml"))
    assert len(lines) == 6
    for line in lines:
        assert {w.split("=")[0] for w in line.split() if w.startswith("--")} <= flags, line
    from ray.dashboard import http_server_agent, http_server_head

    paths = re.findall(r"52365(/\S+?)[\"\s]", text("compose.yaml"))
    assert paths
    assert set(paths) <= set(http_server_agent.PUBLIC_EXACT_PATHS)  # no token is asked for there
    head = Path(http_server_head.__file__).read_text()
    for path in re.findall(
        r"8265(/\S+?)[\"\s]", text("compose.yaml") + text("kubernetes/ray.yaml")
    ):
        assert f'"{path}",' in head


def test_the_auth_configuration_is_what_mlflow_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.server.auth.config import read_auth_config

    path = INFRA / "kubernetes/config/mlflow-auth.ini"
    configparser.ConfigParser().read(path)
    monkeypatch.setenv("MLFLOW_AUTH_CONFIG_PATH", str(path))
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_PASSWORD", "x")
    monkeypatch.setenv("MLFLOW_AUTH_ADMIN_USERNAME", "admin")
    found = read_auth_config()
    assert found.database_uri == "postgresql:///mlflow_auth"
    assert found.default_permission == "READ"
    databases = text("kubernetes/config/databases.sh")
    assert os.access(INFRA / "kubernetes/config/databases.sh", os.X_OK)  # else it is sourced
    assert "defaultMode: 0555" in text("kubernetes/postgres.yaml")
    assert "CREATE DATABASE mlflow_auth OWNER mlflow;" in databases
    assert set(re.findall(r"\\getenv \w+ (\w+)", databases)) <= set(secrets())


def test_the_image_has_telemetry_off_and_no_root() -> None:
    content = text("image/Dockerfile")
    off = ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "MLFLOW_DISABLE_TELEMETRY",
           "DVC_NO_ANALYTICS", "RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness")  # fmt: skip
    for name in off:
        assert f"{name}={DEFAULTS[name]}" in content
    assert "USER 1000:1000" in content
    copied = {line.strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {".git", ".venv", ".genarena", "infra/secrets.env", "mlflow.db*"} <= copied


@pytest.mark.parametrize("script", sorted([*INFRA.rglob("*.sh"), INFRA / "secrets.example"]))
def test_scripts_are_valid_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True, timeout=10)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--shell=sh", script], check=True, timeout=30)


def test_buckets_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    store = types.SimpleNamespace(
        list_buckets=lambda: {"Buckets": [{"Name": "dvc"}]},
        create_bucket=lambda **words: made.append(words),
        meta=types.SimpleNamespace(region_name="us-east-1"),
    )
    boto3 = types.SimpleNamespace(client=lambda name: store)
    monkeypatch.setitem(sys.modules, "boto3", boto3)
    make = runpy.run_path(str(IMAGE / "buckets.py"))["make"]
    make(["mlflow", "dvc"])
    store.meta.region_name = "eu-central-1"  # the one region that need not be named is another
    make(["x"])
    there = {"CreateBucketConfiguration": {"LocationConstraint": "eu-central-1"}}
    assert made == [{"Bucket": "mlflow"}, {"Bucket": "x", **there}]


def test_health_is_a_200_and_nothing_else() -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/good" else 503)
            self.end_headers()

        def log_message(self, *words: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        good, bad = (f"http://127.0.0.1:{server.server_port}/{p}" for p in ("good", "bad"))
        check = [sys.executable, IMAGE / "healthy.py"]
        asked = ([good], [good, bad], [bad, good], ["http://127.0.0.1:9/"])
        codes = [subprocess.run([*check, *urls], timeout=30).returncode for urls in asked]
        server.shutdown()
    assert codes == [0, 1, 1, 1]
