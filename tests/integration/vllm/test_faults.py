"""Servers that are killed, hang, answer garbage, are other servers than they should be, or are gone.

What was injected, what happened and what was lost is printed as a table (`pytest -rP`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cppo import config as configuration
from megatron_cppo.rollout import weight_push
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.health import LOOK_SECONDS
from megatron_cppo.rollout.server import ServerProcess
from megatron_cppo.rollout.vllm import VllmEngine
from megatron_cppo.serving import SERVER_KEY
from tests.integration.vllm import rig
from tests.integration.vllm.proxy import Proxy

ROOT = Path(__file__).parents[3]
KEY = "a key for the tests"
BOUND = 1e-4


def told(injected: str, seen: list[str], samples: list[rig.Sample], seconds: float) -> None:
    print(f"| {injected} | {'; '.join(seen)[:400]} | {len(samples)} of 32 answered, none twice | {seconds:.0f} s |")


def answered(engine: VllmEngine, world: rig.World, meanwhile: Callable[[], object]) -> list[rig.Sample]:
    """All answers, while something is done to the servers."""
    ticket = engine.submit(world.prompts, samples_per_prompt=4, temperature=1.0)
    meanwhile()
    return rig.samples_of(engine.collect(ticket))


def check(world: rig.World, samples: list[rig.Sample]) -> None:
    """Every sample of every prompt once, in order, and of the right weights."""
    assert [(sample.prompt.row, sample.index) for sample in samples] == [
        (prompt.row, index) for prompt in world.prompts for index in range(4)
    ]
    assert rig.Truth(world, world.sent).gaps(samples[::5]).max() <= BOUND


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[rig.World, VllmEngine]]:
    world = rig.make_world(tmp_path_factory.mktemp("pair"), num_on_cpu=2, limits={"hang_seconds": 6.0})
    with rig.engine(world) as engine:
        yield world, engine


@pytest.mark.parametrize(
    ("injected", "number", "seen"),
    [
        ("kill -9 amid the answers", signal.SIGKILL, "was killed by signal 9"),
        ("kill -STOP amid the answers", signal.SIGSTOP, "no token came from it for 6 s"),
    ],
)
def test_one_of_two_servers_fails(
    injected: str, number: int, seen: str, pair: tuple[rig.World, VllmEngine], caplog: pytest.LogCaptureFixture
) -> None:
    world, engine = pair
    before = answered(engine, world, lambda: None)
    caplog.clear()
    victim = engine._processes[0].pid
    start = time.monotonic()

    def strike() -> None:
        time.sleep(0.3)
        os.killpg(victim, number)
        assert engine.fleet.servers[0].asked > 0, "nothing is lost with it"  # type: ignore[union-attr]

    samples = answered(engine, world, strike)
    seconds = time.monotonic() - start
    check(world, samples)
    assert [sample.token_ids[:20] for sample in samples] == [sample.token_ids[:20] for sample in before]
    lines = [record.getMessage() for record in caplog.records if "is out" in record.getMessage()]
    assert len(lines) == 1, lines
    assert seen in lines[0] or "Server disconnected" in lines[0] or "Connection reset" in lines[0], lines
    told(injected, lines, samples, seconds)
    # It is started again, and the next sync of weights after it is up brings it back.
    deadline = time.monotonic() + 240
    while {server.state for server in engine.fleet.servers} != {"ready"}:  # type: ignore[union-attr]
        assert time.monotonic() < deadline, [server.why for server in engine.fleet.servers]  # type: ignore[union-attr]
        time.sleep(2)
        engine.load_weights(iter(world.sent.items()), version=0)
    check(world, answered(engine, world, lambda: None))
    assert engine._processes[0].pid != victim


@contextmanager
def found_server(world: rig.World, folder: Path) -> Iterator[ServerProcess]:
    """A server that somebody else has started."""
    plan = dataclasses.replace(world.servers, model_path=str(folder))
    log = world.folder / "found.log"
    server = ServerProcess(plan, seed=0, key=KEY, gpus=(), environment=os.environ, log=log)
    try:
        yield server
    finally:
        server.end()


def separate(world: rig.World, url: str, *, start_seconds: float) -> rig.World:
    """The same, with a server that is found at `url`."""
    config = dataclasses.replace(world.config, vllm=dataclasses.replace(world.config.vllm, addresses=(url,)))
    limits = dataclasses.replace(world.servers.limits, start_seconds=start_seconds)
    plan = dataclasses.replace(world.servers, vllm=config.vllm, transport="gloo", limits=limits)
    return dataclasses.replace(world, config=config, servers=plan)


def post(server: ServerProcess, path: str) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", headers={"Authorization": f"Bearer {KEY}"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.status == 200, path


def lose_a_bucket(engine: VllmEngine, world: rig.World, caplog: pytest.LogCaptureFixture) -> None:
    """A bucket never comes, and the server is found to be well before the others do: it must not count as loaded."""
    assert engine.fleet is not None
    connection, states = engine.fleet.connection, []
    call = connection.call

    async def losing(url: str, **how: Any) -> Any:
        if url.endswith("/update_weights") and how["body"]["update_info"]["number"] == 2 and not states:
            states.append("lost")
            raise EngineError("the connection was lost")
        if url.endswith("/update_weights") and len(states) == 1:
            states.append("late")
            await asyncio.sleep(3 * LOOK_SECONDS)
        return await call(url, **how)

    connection.call = losing  # type: ignore[method-assign]
    caplog.clear()
    start = time.monotonic()
    changed = world.weights(changed=0.2)
    world.sent.update(changed)
    with caplog.at_level(logging.INFO, "megatron_cppo"):
        engine.load_weights(iter(changed.items()), version=1)
        samples = answered(engine, world, lambda: None)
    check(world, samples)
    lines = [record.getMessage() for record in caplog.records]
    assert any("the connection was lost" in line for line in lines), lines
    assert any("weights of step 1 for servers [0]" in line for line in lines), "it was believed to have all weights"
    told("a bucket of weights is lost", [line for line in lines if "is out" in line], samples, time.monotonic() - start)


def test_a_server_that_answers_garbage_and_one_that_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a broadcast waits for a server that is well, and never came: two minutes.
    monkeypatch.setattr(weight_push, "TIMEOUT", timedelta(seconds=20))
    world = rig.make_world(tmp_path)
    with found_server(world, world.folder / "model") as server:
        proxy = Proxy(f"http://127.0.0.1:{server.port}")
        world = separate(world, proxy.url, start_seconds=120.0)
        spoiled: list[str] = []

        def spoil(how: Callable[[bytes], bytes], times: int) -> Callable[[str, bytes], bytes]:
            left = [times]

            def spoiling(path: str, body: bytes) -> bytes:
                if path != "/inference/v1/generate" or not left[0]:
                    return body
                left[0] -= 1
                spoiled.append(path)
                return how(body)

            return spoiling

        with pytest.raises(EngineError, match="refuses the run's key") as refused, rig.engine(world, key="another"):
            pass
        print(f"| another key | {refused.value} | the run ends before it begins | |")
        post(server, "/start_weight_update")  # as a driver leaves it that is killed while it sends weights
        with rig.engine(world, key=KEY) as engine:
            lose_a_bucket(engine, world, caplog)
            ways: dict[str, tuple[Callable[[bytes], bytes], int]] = {
                "half a reply, twice": (lambda body: body[: len(body) // 2], 2),
                "other tokens, twice": (lambda body: body.replace(b'"token_ids":[', b'"token_ids":[5,'), 2),
                "no JSON, five times: it is taken for broken, and is sent the weights again": (lambda _: b"<html>", 5),
            }
            for name, (how, times) in ways.items():
                proxy.spoil = spoil(how, times)
                caplog.clear()
                start = time.monotonic()
                samples = answered(engine, world, lambda: None)
                check(world, samples)
                lines = [record.getMessage() for record in caplog.records]
                assert any("gave no answer" in line for line in lines)
                assert any("is out" in line for line in lines) == (times > 3), lines
                told(name, lines, samples, time.monotonic() - start)
            assert len(spoiled) == 9
            engine.fleet.limits = dataclasses.replace(engine.fleet.limits, start_seconds=6.0)  # type: ignore[union-attr]
            server.end()
            with pytest.raises(EngineError, match="no vLLM server is left") as gone:
                answered(engine, world, lambda: None)
            print(f"| the only server is gone | {gone.value} | the run ends | |")
        proxy.close()


def test_a_server_of_another_model_is_refused(tmp_path: Path) -> None:
    world = rig.make_world(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(world.folder / "model", other)
    described = json.loads((other / "config.json").read_text())
    described["text_config"]["num_hidden_layers"] = 2
    described["text_config"]["layer_types"] = described["text_config"]["layer_types"][:2]
    (other / "config.json").write_text(json.dumps(described))
    weights = load_file(other / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if ".layers.2." not in n}, other / "model.safetensors", {"format": "pt"}
    )
    with found_server(world, other) as server:
        with (
            pytest.raises(EngineError) as refused,
            rig.engine(separate(world, f"http://127.0.0.1:{server.port}", start_seconds=90.0), key=KEY),
        ):
            pass
        assert "num_hidden_layers is 2, the run needs 3" in str(refused.value)
        print(f"| a server of another model | {refused.value} | the run ends before it begins | |")


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    world = rig.make_world(tmp_path)
    recipe = tmp_path / "recipe.json"
    configuration.save(world.config, recipe)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        served = subprocess.run(
            [sys.executable, "tools/serve_rollouts.py", str(recipe), "--port", str(port)],
            env=os.environ | {SERVER_KEY: KEY, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert served.returncode == 2, served.stderr
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in served.stderr
    print(f"| a port in use | {served.stderr.strip()} | tools/serve_rollouts.py ends with status 2 | |")


def test_a_server_that_does_not_come_up_is_given_up_with_its_log(tmp_path: Path) -> None:
    world = rig.make_world(tmp_path, limits={"max_restarts": 1})
    vllm = dataclasses.replace(world.config.vllm, arguments=("no-such-argument",))
    world = dataclasses.replace(world, servers=dataclasses.replace(world.servers, vllm=vllm))
    with pytest.raises(EngineError, match="no vLLM server is left") as refused, rig.engine(world):
        pass
    assert "--no-such-argument" in str(refused.value)
    print(f"| a wrong argument | {str(refused.value)[-200:]} | the run ends before it begins | |")


def test_a_broadcast_reaches_both_workers_of_a_server(tmp_path: Path) -> None:
    world = rig.make_world(tmp_path, tied=False, transport="gloo")
    vllm = dataclasses.replace(world.config.vllm, tensor_parallel=2)
    world = dataclasses.replace(world, servers=dataclasses.replace(world.servers, vllm=vllm))
    with rig.engine(world) as engine:
        for version, changed in enumerate((0.0, 0.2, -0.1), 1):
            weights = world.weights(changed=changed)
            world.sent.update(weights)
            engine.load_weights(iter(weights.items()), version=version)
            check(world, answered(engine, world, lambda: None))
        assert threading.active_count() < 30
        assert torch.is_tensor(weights["lm_head.weight"])
