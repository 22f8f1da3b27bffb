"""A Slurm of its own on this machine: munged, slurmctld, and one slurmd for each node, as root, for one test session.

A node is a network, UTS, PID and mount namespace: it has an address, a host name, processes and a folder `local` of its
own, and can be killed whole or be slow. Nothing of the machine's own Slurm, if it has one, is touched, and nothing is
left, however the session ends. One at a time: a second session waits. Knows nothing of what is submitted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_cppo.ranks import die_with_parent

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "tc", "nsenter", "unshare", "gcc")
SUBNET = "10.83.7"
BRIDGE = "cppo-slurm"
DEAD_AFTER_SECONDS = 5
WAIT_SECONDS = 400.0
GOING = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED")

CONF = """
ClusterName=test
SlurmctldHost={host}({subnet}.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for its credential to expire; 120 s otherwise.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
# Nodes claim more than this machine has.
SlurmdParameters=config_overrides
SlurmdTimeout={dead}
MessageTimeout={dead}
KillWait=5
UnkillableStepTimeout=20
PropagateResourceLimits=NONE
PlugStackConfig={folder}/plugstack.conf
GresTypes=gpu
# Nodes that are only declared make the real shape known to `sbatch --test-only`.
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
ResumeTimeout=60
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr={address} Port=6818 CPUs=96 Boards=1 SocketsPerBoard=2 "
    "CoresPerSocket=48 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:8 State={state}\n"
)
# The first process of a node; with it, all of them end.
INIT = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs "$2/local"
slurmd -D -N "$1" & trap 'kill $!' TERM; wait
"""


def missing() -> str:
    """Why no cluster can be started here; "" if one can."""
    if os.geteuid() != 0:
        return "a Slurm needs root, to make nodes of namespaces"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}; tests/integration/slurm/install.sh does it"
    # A container's root may not be allowed what a cluster is made of.
    made = f"ip link add {BRIDGE}x type bridge && mount -t tmpfs tmpfs /mnt && mknod /mnt/x c 1 3"
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", made]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else ""


@dataclass(slots=True)
class Cluster:
    """A context manager; nodes are node01, node02, ..., behind them `cloud` that are only declared."""

    folder: Path
    nodes: int
    cloud: int = 0
    plugin: Path | None = None
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _turn: TextIO | None = None

    def __enter__(self) -> Cluster:
        if len(str(self.folder)) > 80:
            raise ValueError(f"{self.folder} is too long for the path of a socket: choose one of 80 characters at most")
        # Networks, addresses and ports have fixed names. The kernel opens the lock of a session that was killed.
        self._turn = (Path(tempfile.gettempdir()) / f"{BRIDGE}.lock").open("w")
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        self._clean()
        try:
            self._configure()
            self._start("munged", ["munged", "--foreground", "--force", *self._munge_options()])
            self._until(lambda: (self.folder / "munge.sock").exists(), "munged does not start")
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            self._start("slurmctld", ["slurmctld", "-D"])
            for number in range(1, self.nodes + 1):
                self.start_node(name(number))
            self._until(lambda: self._up() >= self.nodes, "the nodes do not come up")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type | None, raised: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need, and of this process's environment what a job may see."""
        kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "LANG", "USER")}
        return kept | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str, variables: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a command as a user of the cluster; its output. Raises CalledProcessError with both streams in it."""
        done = subprocess.run(
            command,
            env=self.environment | dict(variables or {}),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        return done.stdout

    def shown(self, job: str, what: str) -> str:
        """A field of a job, such as JobState; "" when there is none yet."""
        found = re.search(rf"\b{what}=(\S*)", self.call("scontrol", "-o", "show", "job", job))
        return found[1] if found else ""

    def wait(self, job: str, seconds: float = WAIT_SECONDS) -> tuple[str, int]:
        """(state, exit status) of a job, at its end."""
        self._until(lambda: self.shown(job, "JobState") not in GOING, f"job {job} does not end", seconds)
        return self.shown(job, "JobState"), int(self.shown(job, "ExitCode").split(":")[0])

    def start_node(self, node: str) -> None:
        """Start a node, or one that was killed again."""
        space = f"{BRIDGE}-{node}"
        if not Path("/run/netns", space).exists():
            number = int(node.removeprefix("node"))
            _run("ip", "netns", "add", space)
            _run("ip", "link", "add", f"{BRIDGE}{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "link", "set", f"{BRIDGE}{number}", "master", BRIDGE, "up")
            _run("ip", "-n", space, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", link, "up")
        inside = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{space}", *inside, "bash", "-c", INIT, "init", node, str(self.folder)]
        self._start(node, command)

    def kill_node(self, node: str) -> None:
        """The sudden death of a node and of all that runs on it."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()

    @contextlib.contextmanager
    def slow_node(self, node: str, megabits: int) -> Iterator[None]:
        """Let a node send no more than so many megabits a second."""
        link = ["nsenter", f"--net=/run/netns/{BRIDGE}-{node}", "tc", "qdisc"]
        shape = ["tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
        _run(*link, "add", "dev", "eth0", "root", *shape)
        try:
            yield
        finally:
            _run(*link, "del", "dev", "eth0", "root")

    def log(self, daemon: str) -> str:
        """What a daemon wrote."""
        return (self.folder / f"{daemon}.log").read_text(errors="replace")

    def _munge_options(self) -> list[str]:
        names = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        return [f"--{option}={self.folder / file}" for option, file in names.items()]

    def _configure(self) -> None:
        for part in ("state", "spool", "local", "dev"):
            (self.folder / part).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        every = range(1, self.nodes + self.cloud + 1)
        conf = CONF.format(
            host=os.uname().nodename.split(".")[0], subnet=SUBNET, folder=self.folder, dead=DEAD_AFTER_SECONDS
        )
        conf += "".join(
            NODE.format(
                name=name(number), address=address(number), state="UNKNOWN" if number <= self.nodes else "CLOUD"
            )
            for number in every
        )
        (self.folder / "slurm.conf").write_text(conf)
        for gpu in range(8):  # only a character device counts as one
            os.mknod(self.folder / "dev" / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
        gpus = f"Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-7]\n"
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(map(name, every))} {gpus}")
        (self.folder / "plugstack.conf").write_text(f"required {self.plugin}\n" if self.plugin else "")
        hosts = "".join(f"{address(number)} {name(number)}\n" for number in range(1, self.nodes + 1))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)

    def _start(self, daemon: str, command: list[str]) -> None:
        with (self.folder / f"{daemon}.log").open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _up(self) -> int:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-o", "%N %t"], env=self.environment, capture_output=True, text=True
        )
        return sum(line.endswith(" idle") for line in set(done.stdout.splitlines()))

    def _until(self, condition: Callable[[], bool], otherwise: str, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{otherwise}; slurmctld says:\n{self.log('slurmctld')[-3000:]}")
            time.sleep(0.1)

    def _end(self) -> None:
        for daemon in reversed(list(self._daemons)):
            process = self._daemons.pop(daemon)
            process.send_signal(signal.SIGKILL if daemon.startswith("node") else signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._clean()
        if self._turn is not None:
            self._turn.close()

    def _clean(self) -> None:
        """Take the networks away: this session's, or those of one that was killed."""
        for number in range(1, self.nodes + 1):
            subprocess.run(["ip", "link", "del", f"{BRIDGE}{number}"], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", f"{BRIDGE}-{name(number)}"], stderr=subprocess.DEVNULL)
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL)


def name(number: int) -> str:
    """A node's name."""
    return f"node{number:02d}"


def address(number: int) -> str:
    """A node's address; those of declared nodes lead nowhere."""
    return f"{SUBNET}.{10 + number}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
