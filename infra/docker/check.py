"""Tries the composition of docker-compose.yml on this host's docker engine, from up to down.

`python -m infra.docker.check` brings everything up in a project of its own with ports of its own, asks through the
`openai` client, replays a slice of a real trace, scales the decode workers to three and replays again, looks at what
Prometheus scrapes and what the workers say, takes everything down and looks for leftovers. It builds Baton's images
where they are missing and then takes a few minutes on two cores. Exit status 0 means that all of it went well.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from infra.demo import QUESTION, REPLAY_ARGUMENTS
from infra.local.model import MODEL_NAME, smollm2_folder
from shared.errors import StartupError

ROOT = Path(__file__).parents[2]
PROJECT = "baton-check"
PORTS = {"EDGE_PORT": 18000, "PROMETHEUS_PORT": 19090, "GRAFANA_PORT": 13000}
EDGE = f"http://127.0.0.1:{PORTS['EDGE_PORT']}"
PROMETHEUS = f"http://127.0.0.1:{PORTS['PROMETHEUS_PORT']}"

NUM_DECODE = 3
ROLES = {"ingest": 1, "edge": 1, "prefill": 1, "decode": NUM_DECODE}
BUILD_WITHIN_S = 3600
UP_WITHIN_S = 600
HEALTHY_WITHIN_S = 300
SCRAPED_WITHIN_S = 90
FREE_WITHIN_S = 60
DOWN_WITHIN_S = 180
REQUEST_TIMEOUT_S = 120.0
ANSWER_TOKENS = 40


class CheckFailed(Exception):
    """Something of the composition is not as it should be."""


@dataclass(frozen=True, slots=True)
class Composition:
    """A compose project on this host.

    Attributes:
        program: docker-compose, or docker with its plugin.
        env: environment of every command.
    """

    program: tuple[str, ...]
    env: Mapping[str, str]

    def run(self, *arguments: str, within_s: float) -> None:
        """Runs a compose command, its output going to this process's. Raises CheckFailed."""
        say(f"$ {' '.join((*self.program, *arguments))}")
        _run((*self.program, *arguments), self.env, within_s, capture=False)

    def containers(self) -> list[dict[str, Any]]:
        """What docker knows of each container of the project."""
        ids = self._ids("ps", "--all")
        return json.loads(_run(("docker", "inspect", *ids), self.env, 30)) if ids else []

    def leftovers(self) -> list[str]:
        """Containers, networks and volumes that the project has still."""
        commands = {"container": ("ps", "--all"), "network": ("network", "ls"), "volume": ("volume", "ls")}
        return [f"{kind} {name}" for kind, command in commands.items() for name in self._ids(*command)]

    def _ids(self, *command: str) -> list[str]:
        filtered = ("docker", *command, "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}")
        return _run(filtered, self.env, 30).split()


def compose_program() -> tuple[str, ...]:
    """docker's compose plugin if there is one, else docker-compose. Raises StartupError."""
    docker = shutil.which("docker")
    if docker is None:
        raise StartupError("docker is missing")
    if subprocess.run((docker, "compose", "version"), capture_output=True, check=False).returncode == 0:
        return (docker, "compose")
    standalone = shutil.which("docker-compose")
    if standalone is None:
        raise StartupError("neither docker-compose nor docker's compose plugin is installed")
    return (standalone,)


def check(composition: Composition) -> None:
    """All parts but the end. Raises CheckFailed."""
    say("1. Up")
    began_s = time.monotonic()
    composition.run("up", "-d", "--build", within_s=BUILD_WITHIN_S)
    until_healthy(composition)
    say(f"all healthy after {time.monotonic() - began_s:.0f} s")
    composition.run("ps", within_s=30)
    check_users(composition.containers())

    say("2. Ask through the openai client")
    chat()

    say("3. Replay a slice of a real trace")
    replay()

    say(f"4. {NUM_DECODE} decode workers")
    began_s = time.monotonic()
    composition.run("up", "-d", "--no-recreate", "--scale", f"decode={NUM_DECODE}", within_s=UP_WITHIN_S)
    until_healthy(composition)
    say(f"all healthy after {time.monotonic() - began_s:.0f} s")
    replay()

    say("5. What Prometheus scrapes")
    check_targets()
    check_workers()


def until_healthy(composition: Composition) -> None:
    """Returns when every container runs and is healthy, or has ended well if it was to end. Raises CheckFailed."""
    deadline_s = time.monotonic() + HEALTHY_WITHIN_S
    while waiting := {
        container["Name"]: state for container in composition.containers() if (state := unready(container["State"]))
    }:
        if time.monotonic() > deadline_s:
            raise CheckFailed(f"after {HEALTHY_WITHIN_S} s not ready: {waiting}")
        time.sleep(1)


def unready(state: Mapping[str, Any]) -> str:
    """What a container is that is not as it should be; "" for one that is."""
    if state["Status"] == "exited" and state["ExitCode"] == 0:
        return ""
    if state["Status"] != "running":
        return f"{state['Status']} with {state['ExitCode']}"
    health = state["Health"]["Status"] if "Health" in state else "healthy"
    return "" if health == "healthy" else health


def check_users(containers: Sequence[Mapping[str, Any]]) -> None:
    """Raises CheckFailed if one runs as root."""
    roots = [container["Name"] for container in containers if container["Config"]["User"] in ("", "0", "root")]
    if roots:
        raise CheckFailed(f"these run as root: {', '.join(roots)}")


def chat() -> None:
    """Streams one chat answer. Raises CheckFailed."""
    client = OpenAI(base_url=f"{EDGE}/v1", api_key="unused", timeout=REQUEST_TIMEOUT_S, max_retries=0)
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=ANSWER_TOKENS,
        stream=True,
    )
    answer = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    say(answer)
    if "Paris" not in answer:
        raise CheckFailed("the answer does not name Paris")


def replay() -> None:
    """Replays the demo's slice of a trace. Raises CheckFailed."""
    command = (sys.executable, "-m", "loadgen", "replay", "--base-url", EDGE, *REPLAY_ARGUMENTS)
    say(f"$ {' '.join(('python', *command[1:]))}")
    _run((*command, "--tokenizer", str(smollm2_folder())), os.environ | {"COLUMNS": "110"}, 600, capture=False)


def check_targets() -> None:
    """Waits until Prometheus reaches all that it scrapes, and that is every process. Raises CheckFailed."""
    deadline_s = time.monotonic() + SCRAPED_WITHIN_S
    while True:
        targets = _get(f"{PROMETHEUS}/api/v1/targets")["data"]["activeTargets"]
        down = [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]
        roles = [role for target in targets if (role := target["labels"].get("role"))]
        wrong = {role: roles.count(role) for role, count in ROLES.items() if roles.count(role) != count}
        if not down and not wrong:
            say(f"{len(targets)} targets are up: Prometheus itself and {', '.join(sorted(roles))}")
            return
        if time.monotonic() > deadline_s:
            raise CheckFailed(f"targets that are down: {down}; roles with another number of targets: {wrong}")
        time.sleep(2)


def check_workers() -> None:
    """Whether KV travelled and nothing is held still, by the workers' own metrics. Raises CheckFailed."""
    deadline_s = time.monotonic() + FREE_WITHIN_S
    while _sum("baton_kv_pages") != _sum("baton_kv_pages_free") or _sum("baton_kv_held_requests"):
        if time.monotonic() > deadline_s:
            raise CheckFailed("workers hold pages still")
        time.sleep(2)
    pulled_mib = _sum("baton_kv_pull_bytes_total") / 2**20
    local_prefills = _sum('baton_local_prefills_total{cause="pull failed"}')
    idle = NUM_DECODE - _sum('vllm:generation_tokens_total{role="decode"} > bool 0')
    say(f"KV pulled by UCX: {pulled_mib:.0f} MiB; prompts whose pull failed: {local_prefills:.0f}; pages: all free")
    if not pulled_mib or local_prefills:
        raise CheckFailed("KV did not travel from worker to worker")
    if idle:
        raise CheckFailed(f"{idle:.0f} decode workers generated nothing")


def _sum(expression: str) -> float:
    result = _get(f"{PROMETHEUS}/api/v1/query", query=f"sum({expression})")["data"]["result"]
    return float(result[0]["value"][1]) if result else 0.0


def _get(url: str, **parameters: str) -> Any:
    answer = httpx.get(url, params=parameters, timeout=10)
    answer.raise_for_status()
    return answer.json()


def _run(command: Sequence[str], env: Mapping[str, str], within_s: float, *, capture: bool = True) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=within_s, stdout=subprocess.PIPE if capture else None, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise CheckFailed(str(error)) from error
    return done.stdout.decode() if capture else ""


def say(line: str) -> None:
    """One line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)  # noqa: T201 (this is the command's output)


def main() -> int:
    """Command line."""
    env = os.environ | {"COMPOSE_PROJECT_NAME": PROJECT} | {name: str(port) for name, port in PORTS.items()}
    composition = Composition(compose_program(), env)
    failed = ""
    try:
        check(composition)
    except (CheckFailed, httpx.HTTPError) as error:
        failed = str(error)
        composition.run("logs", "--tail", "50", within_s=60)
    say("6. Down")
    composition.run("down", "-v", within_s=DOWN_WITHIN_S)
    leftovers = composition.leftovers()
    if leftovers:
        failed = f"{failed}; left over: {', '.join(leftovers)}".removeprefix("; ")
    say(f"not well: {failed}" if failed else "all went well; nothing is left over")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
