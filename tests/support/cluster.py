"""A real SLURM on this machine: two nodes with two fake GPUs each, accounting and preemption.

Debian's packages, without systemd and cgroups, in a temporary folder:
apt-get install slurmctld slurmd slurm-client slurmdbd mariadb-server munge
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "munged", "mariadbd")
NODES = ("n1", "n2")
_START_S = 60
_NODE_VARIABLE = "TEST_NODE"
"""Names the node that a SLURM process belongs to."""


def missing_programs() -> list[str]:
    """The programs that the cluster needs and that are not installed."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@dataclass
class Cluster:
    """A running cluster.

    Args:
        root: Its folder.
        daemons: Its processes by name (`slurmctld`, `n1`, …), for tests that kill one.
    """

    root: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which SLURM's commands talk to this cluster."""
        return {"SLURM_CONF": str(self.root / "slurm.conf")}

    def command(self, *arguments: str, check: bool = True) -> str:
        """Run one of SLURM's commands and return its output."""
        finished = subprocess.run(
            arguments,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and finished.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: {finished.stderr.strip()}")
        return finished.stdout.strip()

    def start_node(self, name: str) -> None:
        """Start a node's daemon, also after it was killed."""
        configuration = "-f", str(self.root / "slurm.conf")
        mark = {_NODE_VARIABLE: f"{self.root}/{name}"}
        self._start(name, "slurmd", "-D", "-N", name, *configuration, variables=mark)

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and everything that runs on the node, at once."""
        # SLURM's processes first; otherwise they report the end of the job's processes.
        for pid in [
            self.daemons[name].pid,
            *_processes_of(f"{_NODE_VARIABLE}={self.root}/{name}"),
            *_processes_of(f"SLURMD_NODENAME={name}", f"SLURM_CONF={self.root}/slurm.conf"),
        ]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()

    def _start(
        self, name: str, program: str, *arguments: str, variables: dict[str, str] | None = None
    ) -> None:
        path = _program(program)
        assert path is not None, program
        with (self.root / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment | (variables or {}),
            )

    def _stop(self) -> None:
        for name in reversed(list(self.daemons)):
            process = self.daemons[name]
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def running(*, signal_on_preemption: bool = True, grace_s: int = 30) -> Iterator[Cluster]:
    """Start a cluster in a temporary folder and stop all of it at the end of the block.

    Args:
        signal_on_preemption: True if a preempted job gets the signal that it asked for; SLURM's default
            is only SIGTERM.
        grace_s: Seconds until a preempted job is killed.
    """
    # Not in a folder of pytest: munged refuses a socket that other users cannot reach.
    with TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)
        with _running_in(Path(folder), signal_on_preemption, grace_s) as cluster:
            yield cluster


@contextmanager
def _running_in(root: Path, signal_on_preemption: bool, grace_s: int) -> Iterator[Cluster]:
    cluster = Cluster(root)
    controller, database, accounting, *nodes = _free_ports(3 + len(NODES))
    _write_files(root, controller, database, accounting, nodes)
    with (root / "slurm.conf").open("a") as configuration:
        configuration.write(
            f"PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE "
            f"GraceTime={grace_s} MaxTime=INFINITE State=UP\n"
        )
        if signal_on_preemption:
            configuration.write("SlurmctldParameters=preempt_send_user_signal\n")
    with ExitStack() as stack:
        stack.callback(cluster._stop)
        cluster._start(
            "munged",
            "munged",
            "--foreground",
            *(f"--{name}-file={root}/munge.{name}" for name in ("key", "pid", "log", "seed")),
            f"--socket={root}/munge.socket",
        )
        _wait_for(lambda: (root / "munge.socket").exists(), "munged")
        cluster._start(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            f"--user={getpass.getuser()}",
            f"--datadir={root}/database",
            f"--socket={root}/database.socket",
            f"--pid-file={root}/database.pid",
            f"--port={database}",
            "--bind-address=127.0.0.1",
            "--innodb-buffer-pool-size=64M",
            "--innodb-log-file-size=16M",
        )
        _wait_for(lambda: _sql(root, "SELECT 1") is not None, "mariadbd")
        _sql(root, "CREATE DATABASE slurm; CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm';")
        _sql(root, "GRANT ALL ON slurm.* TO slurm@'127.0.0.1';")
        cluster._start("slurmdbd", "slurmdbd", "-D")
        _wait_for(lambda: _listens(accounting), "slurmdbd")
        _wait_for(lambda: _answers(cluster, "sacctmgr", "-i", "add", "cluster", "test"), "sacctmgr")
        cluster._start("slurmctld", "slurmctld", "-D", "-f", str(root / "slurm.conf"))
        for name in NODES:
            cluster.start_node(name)
        _wait_for(
            lambda: cluster.command("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2", "nodes"
        )
        try:
            yield cluster
        finally:
            cluster.command("scancel", "--user", getpass.getuser(), check=False)


def _write_files(root: Path, controller: int, database: int, accounting: int, nodes: list[int]) -> None:
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (root / name).mkdir()
    for number in range(2):
        (root / f"gpu{number}").symlink_to("/dev/null")
    install = shutil.which("mariadb-install-db") or "/usr/bin/mariadb-install-db"
    subprocess.run(
        [
            install,
            "--no-defaults",
            f"--datadir={root}/database",
            f"--user={getpass.getuser()}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--innodb-log-file-size=16M",
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    user, host = getpass.getuser(), socket.gethostname()
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={root}/gpu[0-1]\n")
    (root / "slurmdbd.conf").write_text(
        f"""AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={accounting}
SlurmUser={user}
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
PidFile={root}/slurmdbd.pid
"""
    )
    (root / "slurmdbd.conf").chmod(0o600)
    (root / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=10
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=5
SlurmdTimeout=20
MinJobAge=300
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={accounting}
AccountingStoragePass={root}/munge.socket
"""
        + "".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 RealMemory=8000 Gres=gpu:2 State=UNKNOWN\n"
            for name, port in zip(NODES, nodes, strict=True)
        )
        + "PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP\n"
    )


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def _wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _START_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} has not started in {_START_S} s")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(cluster: Cluster, *command: str) -> bool:
    try:
        cluster.command(*command)
    except RuntimeError:
        return False
    return True


def _sql(root: Path, statement: str) -> str | None:
    command = ["mariadb", "--no-defaults", "-u", "root", f"--socket={root}/database.socket"]
    finished = subprocess.run(
        [*command, "-e", statement], capture_output=True, text=True, timeout=30, check=False
    )
    return finished.stdout if finished.returncode == 0 else None


def _processes_of(*variables: str) -> list[int]:
    """Ids of the processes that were started with all of these variables in their environment."""
    required = {variable.encode() for variable in variables}
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if required <= set((entry / "environ").read_bytes().split(b"\0")):
                    pids.append(int(entry.name))
    return pids
