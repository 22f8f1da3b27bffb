"""Start the vLLM servers of a recipe on this machine, for a run with vllm.placement "separate".

    MEGATRON_CPPO_VLLM_KEY=... python tools/serve_rollouts.py RECIPE [--section.field VALUE ...] --servers 4 --images 1

Prints the addresses for --vllm.addresses, and starts a server again that ends, until it is told to end itself. The key
is the one that the run has in MEGATRON_CPPO_VLLM_KEY. Servers listen on vllm.host, from vllm.port on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from megatron_cppo.config import UserError
from megatron_cppo.rollout.build import server_plan
from megatron_cppo.rollout.server import ServerProcess
from megatron_cppo.train import VLLM_KEY, read_config

LOG = logging.getLogger("megatron_cppo")
LOOK_SECONDS = 2.0


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the run's recipe, .py or .json")
    parser.add_argument("--servers", type=int, default=1, help="servers to start (default 1)")
    parser.add_argument("--images", type=int, default=1, help="the most images that a prompt has (default 1)")
    chosen, flags = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    key = os.environ.get(VLLM_KEY)
    if not key:
        sys.stderr.write(f"{VLLM_KEY} is not set; give the servers and the run the same key\n")
        return 2
    servers: list[ServerProcess] = []
    try:
        config = read_config(chosen.recipe, flags)
        if not config.vllm.port:
            raise UserError("vllm.port: 0 would give each start another port; choose the first one")
        plan = server_plan(config, max_images=chosen.images)
        parallel = config.vllm.tensor_parallel

        def start(index: int) -> ServerProcess:
            gpus = range(index * parallel, (index + 1) * parallel)
            log = Path(config.trainer.run_dir) / "logs" / f"vllm{index}.log"
            return ServerProcess(plan, index=index, seed=config.trainer.seed + index, key=key, gpus=gpus, log=log)

        servers += [start(index) for index in range(chosen.servers)]
        print(" ".join(f"http://{config.vllm.host}:{server.port}" for server in servers), flush=True)
        while True:
            for index, server in enumerate(servers):
                if why := server.ended():
                    LOG.warning("server %d: %s", index, why)
                    servers[index] = start(index)
            time.sleep(LOOK_SECONDS)
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
