"""Start the vLLM servers of a recipe on this machine, for a run with vllm.addresses.

    MEGATRON_CPPO_VLLM_KEY=... python tools/serve_rollouts.py RECIPE [--section.field VALUE ...] --port 8000 --servers 4

Prints the addresses, and starts a server again that ends, until it is told to end itself. The key is the one that the
run has in MEGATRON_CPPO_VLLM_KEY. Servers listen on vllm.host (127.0.0.1 unless told otherwise), from --port on.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from pathlib import Path

from megatron_cppo.config import UserError
from megatron_cppo.rollout.build import server_plan
from megatron_cppo.rollout.engine import EngineError
from megatron_cppo.rollout.server import ServerProcess
from megatron_cppo.serving import SERVER_KEY
from megatron_cppo.train import read_config

LOG = logging.getLogger("megatron_cppo")
LOOK_SECONDS = 2.0
SHORTEST_LIFE_SECONDS = 60.0
"""A server that ends sooner is started again only after as long: its arguments may be wrong."""


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the run's recipe, .py or .json")
    parser.add_argument("--port", type=int, required=True, help="of the first server; the next ones follow")
    parser.add_argument("--servers", type=int, default=1, help="servers to start (default 1)")
    parser.add_argument("--images", type=int, default=1, help="the most images that a prompt has (default 1)")
    chosen, flags = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    key = os.environ.get(SERVER_KEY)
    if not key:
        sys.stderr.write(f"{SERVER_KEY} is not set; give the servers and the run the same key\n")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # a scheduler's word to the trainer, which a whole job may get
    servers: list[ServerProcess] = []
    try:
        config = read_config(chosen.recipe, flags)
        plan = server_plan(config, max_images=chosen.images)
        parallel = config.vllm.tensor_parallel

        born: dict[int, float] = {}

        def start(index: int) -> ServerProcess:
            born[index] = time.monotonic()
            return ServerProcess(
                plan,
                seed=config.trainer.seed + index,
                key=key,
                gpus=range(index * parallel, (index + 1) * parallel),
                environment=os.environ,
                log=Path(config.trainer.run_dir) / "logs" / f"vllm{index}.log",
                port=chosen.port + index,
            )

        for index in range(chosen.servers):
            servers.append(start(index))
        print(" ".join(f"http://{config.vllm.host}:{server.port}" for server in servers), flush=True)
        while True:
            time.sleep(LOOK_SECONDS)
            for index, server in enumerate(servers):
                if not (why := server.ended()) or time.monotonic() < born[index] + SHORTEST_LIFE_SECONDS:
                    continue
                LOG.warning("server %d is started again: %s", index, why)
                server.end()  # what is left of it holds its GPUs and its port
                try:
                    servers[index] = start(index)
                except EngineError as error:  # the others serve on
                    LOG.warning("server %d: %s; tried again in %.0f s", index, error, SHORTEST_LIFE_SECONDS)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        for server in servers:
            server.end()


if __name__ == "__main__":
    sys.exit(main())
