"""A real Slurm on this machine, for a test session: munged, slurmctld and several slurmd.

Every node is a slurmd in namespaces of its own, with a host name of its own and a hosts file in
which all nodes are the loopback address: to a job they are different hosts. All files lie in one
directory, all daemons are children of this process and end with it. Needs root (namespaces, device
files) and Debian's packages: ``python -m tests.slurm.cluster --install``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "munge", "shellcheck", "charliecloud-runtime")
PACKAGES += ("slurmdbd", "mariadb-server-core", "mariadb-client-core")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "shellcheck", "unshare", "setpriv")
COMMANDS += ("ch-run", "slurmdbd", "mariadbd", "my_print_defaults")
os.environ["PATH"] += os.pathsep + "/usr/sbin"  # where Debian puts the daemons

_CLUSTERS = itertools.count()

CONF = """\
ClusterName=btxtest
SlurmctldHost=controller(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# also how long a requeued job is held back; two minutes by default
AuthInfo=socket={munge},cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={top}/state
SlurmctldPidFile={top}/slurmctld.pid
SlurmctldLogFile={top}/log/slurmctld.log
SlurmdSpoolDir={top}/spool/%n
SlurmdPidFile={top}/slurmd.%n.pid
SlurmdLogFile={top}/log/slurmd.%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
Prolog={top}/prolog
Epilog={top}/epilog
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=10
MinJobAge=86400
FirstJobId={first_job}
EnforcePartLimits=ALL
MailProg=/bin/true
GresTypes=gpu
NodeName={nodes} NodeAddr=127.0.0.1 Port={first}-{last} Sockets=1 CoresPerSocket=16 \
ThreadsPerCore=1 RealMemory=64000 Gres=gpu:4 State=UNKNOWN
PartitionName=test Nodes={nodes} Default=YES MaxTime=120 State=UP
PartitionName=small Nodes=n1 MaxTime=10 State=UP
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=urgent Nodes={nodes} MaxTime=10 PriorityTier=10 State=UP
"""

# A node that cannot launch jobs, for as long as there is such a file.
PROLOG = """\
#!/bin/bash
[ ! -e "{top}/prolog-fails" ]
"""

# proctrack/linuxproc loses what has left its process group; it carries the job's number with it.
EPILOG = """\
#!/bin/bash
for entry in $(grep -lzxF "SLURM_JOB_ID=$SLURM_JOB_ID" /proc/[0-9]*/environ 2>/dev/null); do
  pid=${entry//[!0-9]/}
  grep -qzxF "SLURMD_NODENAME=$SLURMD_NODENAME" "$entry" 2>/dev/null || continue
  grep -qzxF "SLURM_CONF=$SLURM_CONF" "$entry" 2>/dev/null || continue
  grep -qzF "SLURM_SCRIPT_CONTEXT=" "$entry" 2>/dev/null && continue
  case $(readlink "/proc/$pid/exe") in */slurmd*|*/slurmstepd*) continue ;; esac
  kill -KILL "$pid" 2>/dev/null
done
exit 0
"""


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): `make test-slurm` installs it"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    probe = ["unshare", "--mount", "--uts", "mount", "--bind", "/etc/hosts", "/etc/hosts"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        return "namespaces are not allowed here"
    return ""


class Cluster:
    """Nodes ``n1``, ``n2``, ... of 16 cores and 4 GPUs that exist as device files only."""

    def __init__(
        self, top: Path, nodes: int = 4, unshared: Path | None = None, extra: str = ""
    ) -> None:
        """``unshared``: a directory that every node sees empty, as one that is not shared.
        ``extra``: lines of slurm.conf."""
        self.top, self.unshared, self.extra = top, unshared, extra
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{k: v for k, v in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN)", k)},
            "SLURM_CONF": str(top / "slurm.conf"),
        }

    def __enter__(self) -> Cluster:
        for name in ("log", "state", "spool", "dev"):
            (self.top / name).mkdir(parents=True)
        try:
            self._configure()
            self._start_munge()
            self.start_controller()
            for node in self.nodes:
                (self.top / "spool" / node).mkdir()
                self.start_node(node)
            wait(self.ready, "the nodes to come up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            self.clear()
        for name in reversed(list(self.daemons)):
            self.stop(name)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _configure(self) -> None:
        count = len(self.nodes)
        self.port = port = _free_ports(count + 3)
        conf = CONF.format(
            top=self.top,
            port=port,
            first=port + 1,
            last=port + count,
            nodes=f"n[1-{count}]",
            munge=self.top / "munge.socket",
            # Ranks meet at a port by the job's number (batch.sh): no two clusters have the same.
            first_job=1 + 600 * (next(_CLUSTERS) % 10),
        )
        (self.top / "slurm.conf").write_text(conf + self.extra)
        for number in range(4):
            os.mknod(self.top / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))
        gres = f"AutoDetect=off\nNodeName=n[1-{count}] Name=gpu File={self.top}/dev/gpu[0-3]\n"
        (self.top / "gres.conf").write_text(gres)
        hosts = "".join(f"127.0.0.1 {name}\n" for name in ["localhost", "controller", *self.nodes])
        (self.top / "hosts").write_text(hosts)
        for name, text in (("prolog", PROLOG.format(top=self.top)), ("epilog", EPILOG)):
            (self.top / name).write_text(text)
            (self.top / name).chmod(0o755)

    def _start_munge(self) -> None:
        key, munge = self.top / "munge.key", self.top / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}"]
        command += [f"--pid-file={self.top}/munged.pid", f"--seed-file={self.top}/munged.seed"]
        self.launch("munged", [*command, f"--log-file={self.top}/log/munged.log"])
        wait(munge.exists, "munged")

    def start_controller(self, *options: str) -> None:
        """slurmctld; ``-c``: it has forgotten every job. It answers when this returns."""
        self._start("controller", "slurmctld", "-D", *options)
        wait(self._answers, "the controller to answer")

    def _answers(self) -> bool:
        self.check_alive()
        command = ["scontrol", "ping"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )
        return " is UP" in done.stdout

    def start_node(self, node: str) -> None:
        """The slurmd of a node."""
        self._start(node, "slurmd", "-D", "-N", node)

    def kill(self, name: str) -> None:
        """End a daemon at once (SIGKILL); jobs on a node live on."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def _start(self, name: str, *command: str, host: str | None = None) -> None:
        """A daemon that is host ``host`` (else ``name``) to itself and its jobs."""
        unshared = "" if self.unshared is None else f"mount -t tmpfs none '{self.unshared}' &&"
        setup = (
            f"echo {host or name} >/proc/sys/kernel/hostname "
            f"&& mount --bind '{self.top}/hosts' /etc/hosts "
            f'&& {unshared if name in self.nodes else ""} exec "$@"'
        )
        spaces = ["unshare", "--mount", "--uts", "--propagation", "slave", "sh", "-c", setup, "sh"]
        self.launch(name, [*spaces, *command])

    def launch(self, name: str, command: list[str]) -> None:
        """A daemon that ends with this process."""
        with (self.top / "log" / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                env=self.environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self, name: str) -> None:
        """End a daemon."""
        daemon = self.daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def __call__(self, *command: str, text: str | None = None) -> str:
        """Output of a Slurm command. One that only asks may ask again: on a crowded machine squeue
        has ended without a word."""
        for _ in range(3 if command[0] in ("squeue", "sinfo") else 1):
            done = subprocess.run(
                command, env=self.environment, input=text, capture_output=True, text=True,
                timeout=600, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return done.stdout
        raise AssertionError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr}")

    def check_alive(self) -> None:
        """That no daemon has ended."""
        for name, daemon in self.daemons.items():
            code = daemon.poll()
            assert code is None, f"{name} ended: {(self.top / 'log' / f'{name}.out').read_text()}"

    def ready(self) -> bool:
        """Whether every node is idle."""
        self.check_alive()
        command = ["sinfo", "-h", "-N", "-p", "test", "-o", "%T"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=600, check=False
        )
        return done.stdout.split() == ["idle"] * len(self.nodes)

    def queue(self) -> list[str]:
        """Jobs that are not over."""
        return self("squeue", "-h", "-o", "%A %j %T").splitlines()

    def state(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says."""
        line = self("scontrol", "-o", "show", "job", job)
        found: dict[str, str] = {}
        for name, value in re.findall(r"(?:^| )(\w+)=(\S*)", line):
            found.setdefault(name, value)
        return found

    def clear(self) -> None:
        """Cancel everything and wait until it is gone."""
        jobs = [line.split()[0] for line in self.queue()]
        if jobs:
            self("scancel", *jobs)
            wait(lambda: not self.queue(), "the queue to be empty")

    def processes(self) -> list[int]:
        """Everything alive that a job of this cluster has started."""
        mark = f"SLURM_CONF={self.top / 'slurm.conf'}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().split(b"\0")
                job = any(word.startswith(b"SLURM_JOB_ID=") for word in words)
                name = os.path.basename(os.readlink(entry / "exe"))
                if mark in words and (job or name == "slurmstepd"):
                    found.append(int(entry.name))
        return found


def wait(condition: Callable[[], object], what: str = "it", timeout: float = 600) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{timeout} s have not been enough for {what}"
        time.sleep(0.1)


_given: set[int] = set()
_giving = threading.Lock()


def _free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row; no other cluster of this process has them."""
    with _giving:
        first = next(port for port in _free_blocks(count) if port not in _given)
        _given.add(first)
    return first


def _free_blocks(count: int) -> Iterator[int]:
    for first in range(26800, 30000, 50):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                listener = stack.enter_context(socket.socket())
                listener.bind(("127.0.0.1", port))
            yield first


@contextlib.contextmanager
def _services_down() -> Iterator[None]:
    """Packages may not start their own services while they are installed."""
    policy = Path("/usr/sbin/policy-rc.d")
    made = not policy.exists()
    if made:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if made:
            policy.unlink()


def install() -> int:
    """Install what is missing, with apt-get, as root."""
    if all(map(shutil.which, COMMANDS)):
        return 0
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.stderr.write(f"install these, as root: {' '.join(PACKAGES)}\n")
        return 1
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    with _services_down():
        if subprocess.run(command, env=environment, check=False).returncode:
            subprocess.run(["apt-get", "update", "-qq"], env=environment, check=True)
            subprocess.run(command, env=environment, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(install())
