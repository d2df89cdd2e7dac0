"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all of their state in one folder.

Needs Debian's packages slurm-wlm and munge (a slurmd that was built to run several times on one machine) and root.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from grpo.rollout.serve import free_port

BINARIES = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "sinfo", "runuser")
CONF = """\
ClusterName=mini
SlurmctldHost={host}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/state/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout=60
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=64 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=64 RealMemory=4000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why the cluster cannot be started here, or None."""
    lacking = [name for name in BINARIES if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install --no-install-recommends slurm-wlm munge"
    if os.geteuid():
        return "a SLURM of one's own is started by root"
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "there is no user munge: apt-get install munge"
    return None


PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    def __init__(self):
        self.folder = folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's, which root alone enters
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        user, munge = pwd.getpwnam("munge"), folder / "munge"
        for name in ("state/n1", "state/n2", "log", "run", "munge"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)  # munged is not root, and wants to reach its socket
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        for path in (munge, munge / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
        self.run("runuser", "-u", "munge", "--", "munged", f"--key-file={munge}/key", f"--socket={munge}/socket",
                 f"--pid-file={munge}/munged.pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed")  # fmt: skip
        ports = [free_port() for _ in range(3)]
        values = {"host": socket.gethostname().split(".")[0], "munge": munge, "folder": folder, "port": ports[0],
                  "first": ports[1], "second": ports[2]}  # fmt: skip
        (folder / "slurm.conf").write_text(CONF.format(**values))
        gres = []
        for node in ("n1", "n2"):
            for i in range(8):  # SLURM wants a device file for each GPU: another name of /dev/null will do
                device = folder / "run" / f"gpu{i}"
                if not device.exists():
                    os.mknod(device, 0o600 | 0o020000, os.makedev(1, 3))
            gres.append(f"NodeName={node} Name=gpu File={folder}/run/gpu[0-7]\n")
        (folder / "gres.conf").write_text("".join(gres))
        self.run("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.start(node)
        idle = ("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        self.until(lambda: self.run(*idle).split() == ["n1", "n2"], 120, "two idle nodes")

    def start(self, node: str) -> None:
        self.run("slurmd", "-N", node, "-c")

    def kill(self, node: str) -> None:
        """What a node that loses power does: its slurmd and all of its jobs' processes are gone, none tells of another.

        The daemons are frozen first, and go last: a slurmstepd that saw its job end would tell the controller that it
        has failed.
        """
        daemons = self.daemons(node)
        self.send(signal.SIGSTOP, daemons)
        self.until(lambda: not self.send(signal.SIGKILL, self.processes(node)), 60, f"end of all that {node} ran")
        self.send(signal.SIGKILL, daemons)

    def send(self, number: int, processes: list[int]) -> list[int]:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return processes

    def daemons(self, node: str) -> list[int]:
        """A node's slurmd and the slurmstepd of each step of a job, which is the parent of the step's processes.

        (They write their titles over their environment, so that it does not show the node.)
        """
        found = {int((self.folder / "run" / f"{node}.pid").read_text())}
        for pid in self.processes(node):
            with contextlib.suppress(OSError):
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/cmdline").read_bytes().startswith(b"slurmstepd"):
                    found.add(parent)
        return sorted(found)

    def processes(self, node: str) -> list[int]:
        """Of a node's jobs: whatever was started with the node's name in its environment."""
        found, marks = [], {f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={node}".encode()}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if marks <= set((path / "environ").read_bytes().split(b"\0")):
                    found.append(int(path.name))
        return found

    def run(self, *command: str, ok: bool = True, **more) -> str:
        done = subprocess.run(command, env=self.env | more.pop("env", {}), capture_output=True, text=True, timeout=120,
                              **more)  # fmt: skip
        assert not ok or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", number, "-o").splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def ended(self, number: str, seconds: float = 180) -> dict[str, str]:
        """Wait for the end of a job, however often it is queued again.

        That takes SLURM some seconds (cred_expire). To hurry it with StartTime=now kills the job: credential revoked.
        """
        end = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.state(number) in end, seconds, f"the end of job {number}")
        return self.job(number)

    def until(self, true, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                log = (self.folder / "log" / "slurmctld.log").read_text()[-2000:]
                raise AssertionError(f"no {what} within {seconds:g} s\n{self.run('squeue', ok=False)}{log}")
            time.sleep(0.2)

    def stop(self) -> None:
        self.run("scancel", "--user=root", "--full", "--signal=KILL", ok=False)
        self.run("scancel", "--user=root", ok=False)
        with contextlib.suppress(AssertionError):  # a slurmd waits for its jobs
            self.until(lambda: not self.run("squeue", "-h", ok=False), 30, "end of all jobs")
        for name in ("run/n1.pid", "run/n2.pid", "run/slurmctld.pid", "munge/munged.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int((self.folder / name).read_text())
                os.kill(pid, signal.SIGTERM)
                end = time.monotonic() + 10
                while time.monotonic() < end and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                    time.sleep(0.1)
        shutil.rmtree(self.folder, ignore_errors=True)
