"""A real slurmctld with several slurmd on this one host, on loopback, without systemd; the tests start and stop it.

Debian's slurmd is built with support for several daemons on a host (-N NAME). GPUs are character devices that behave
like /dev/null: SLURM hands them out, nobody computes on them.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge")
CPUS, GPUS = 16, 8  # of each virtual node, whatever the host has
CREDENTIAL_SECONDS = 5  # SLURM waits this long before a requeued job starts again; 120 by default


def why_unavailable() -> str | None:
    """Installs SLURM where it may; otherwise one line saying why the tests cannot run."""
    if shutil.which("slurmctld", path=_PATH) and shutil.which("munged", path=_PATH):
        return None
    wanted = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if os.geteuid() != 0:
        return f"no slurmctld here, and no root to install it. Ask for: sudo {wanted}"
    if not shutil.which("apt-get"):
        return "no slurmctld and no apt-get here; install SLURM and munge with this system's package manager"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=environment, capture_output=True, timeout=300)
    done = subprocess.run(wanted.split(), env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode or not shutil.which("slurmctld", path=_PATH):
        return f"slurmctld could not be installed: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    return None


_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


class VirtualCluster:
    """Use as a context manager. Only processes whose pids were recorded here are ever signalled."""

    def __init__(self, directory: Path, nodes: int = 4):
        self.directory, self.nodes = directory, [f"n{i + 1}" for i in range(nodes)]
        self.config = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "PATH": _PATH}
        for variable in [v for v in self.environment if v.startswith(("SLURM_", "SBATCH_")) and v != "SLURM_CONF"]:
            del self.environment[variable]

    def __enter__(self) -> VirtualCluster:
        for name in ("state", "pids", "log", "dev", "munge", *(f"spool.{n}" for n in self.nodes)):
            (self.directory / name).mkdir(parents=True)
        self._write_configuration()
        try:
            self._start_munge()
            self._start([_tool("slurmctld"), "-f", str(self.config), "-c"], "slurmctld")
            for node in self.nodes:
                self.start_node(node)
            self.wait(lambda: self.run("sinfo -h -p gpu -t idle -o %D") == str(len(self.nodes)), 60, "nodes to be idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---- what tests do with it -------------------------------------------------------------------------------------

    def run(self, command: str | list[str], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        words = command.split() if isinstance(command, str) else command
        done = subprocess.run(
            words, cwd=cwd, env=self.environment | (env or {}), capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.job(job).get("JobState", "?")

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`; works without accounting, for five minutes after the job's end."""
        text = self.run(["scontrol", "show", "job", "-o", job])
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, condition, seconds: float, what: str):
        deadline = time.monotonic() + seconds
        while not (result := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:.0f} s for {what}")
            time.sleep(0.2)
        return result

    def wait_for_end(self, job: str, seconds: float) -> str:
        """The job's last state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
        return self.wait(lambda: (s := self.state(job)) in ended and s, seconds, f"job {job} to end")

    def start_node(self, node: str) -> None:
        self._start([_tool("slurmd"), "-f", str(self.config), "-N", node], f"slurmd.{node}")

    def kill_node(self, node: str) -> None:
        """What a power failure looks like: the daemon and everything it has started are gone without a word."""
        daemon = int((self.directory / "pids" / f"slurmd.{node}.pid").read_text())
        steps = [p for p in _children_of_steps(node, self.directory)]
        os.kill(daemon, signal.SIGKILL)
        for pid in steps:
            _kill(pid)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        if (self.directory / "pids" / "slurmctld.pid").exists():
            _quietly([_tool("scancel"), f"--user={getpass.getuser()}", "--full"], self.environment)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and _quietly([_tool("squeue"), "-h"], self.environment):
                time.sleep(0.2)
        pids = [pid for f in (self.directory / "pids").glob("*.pid") if _is_ours(pid := int(f.read_text() or 0))]
        for pid in pids:
            _kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and any(_alive(p) for p in pids):
            time.sleep(0.1)
        for pid in filter(_alive, pids):
            _kill(pid)

    def _start(self, command: list[str], name: str) -> None:
        with open(self.directory / "log" / f"{name}.start", "a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env=self.environment, timeout=30)

    def _start_munge(self) -> None:
        munge = self.directory / "munge"
        munge.chmod(0o711)
        key = munge / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        options = {
            "key-file": key,
            "socket": munge / "socket",
            "pid-file": self.directory / "pids" / "munged.pid",
            "log-file": self.directory / "log" / "munged.log",
            "seed-file": munge / "seed",
            "num-threads": 2,
        }
        self._start([_tool("munged"), "--force", *(f"--{k}={v}" for k, v in options.items())], "munged")

    def _write_configuration(self) -> None:
        d, host = self.directory, socket.gethostname().split(".")[0]
        d.chmod(0o755)
        for gpu in range(GPUS):
            try:
                os.mknod(d / "dev" / f"nvidia{gpu}", 0o666 | 0o020000, os.makedev(1, 3))
            except PermissionError:  # a plain file serves too
                (d / "dev" / f"nvidia{gpu}").touch()
        controller, *ports = _free_ports(1 + len(self.nodes))
        names = f"n[1-{len(self.nodes)}]"
        (d / "gres.conf").write_text(f"NodeName={names} Name=gpu Type=a100 File={d}/dev/nvidia[0-{GPUS - 1}]\n")
        (d / "plugstack.conf").touch()
        (d / "cgroup.conf").touch()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=500000 "
            f"Gres=gpu:a100:{GPUS} State=UNKNOWN"
            for name, port in zip(self.nodes, ports)
        )
        self.config.write_text(f"""
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={d}/munge/socket,cred_expire={CREDENTIAL_SECONDS}
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool.%n
SlurmctldPidFile={d}/pids/slurmctld.pid
SlurmdPidFile={d}/pids/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
PlugStackConfig={d}/plugstack.conf
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=2,bf_yield_interval=100000
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
OverTimeLimit=0
MinJobAge=600
InactiveLimit=0
CompleteWait=0
UnkillableStepTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF
""")


def _tool(name: str) -> str:
    path = shutil.which(name, path=_PATH)
    assert path is not None, name
    return path


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _is_ours(pid: int) -> bool:
    """A pid may have been given to another process since it was written down."""
    return pid > 1 and any(name in _command_line(pid) for name in ("slurmctld", "slurmd", "munged"))


def _alive(pid: int) -> bool:
    """A zombie that waits for its parent counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _children_of_steps(node: str, directory: Path) -> list[int]:
    """Processes of job steps on `node`: they carry the node's name and our configuration in their environment."""
    wanted = (f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={directory}/slurm.conf".encode())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if all(w in variables for w in wanted):
                found.append(int(entry.name))
    return found


def _quietly(command: list[str], environment: dict[str, str]) -> str:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""
