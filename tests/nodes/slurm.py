"""A Slurm cluster on hosts of namespaces: munged and slurmd on each, slurmctld on the first."""

import json
import os
import subprocess
import time
from pathlib import Path

from hosts import ROOT, START_TIMEOUT, Host, Hosts, which

PROGRAMS = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
}
# Seconds after which the controller gives up a node that does not answer.
NODE_TIMEOUT = 10
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=host0
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout={timeout}
ReturnToService=2
MpiDefault=none
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


def missing() -> str:
    """Why there is no Slurm, in one line; empty if there is."""
    absent = [name for name in PROGRAMS if which(name) is None]
    packages = sorted({PROGRAMS[name] for name in absent})
    return f"no {', '.join(absent)}: apt-get install {' '.join(packages)}" if absent else ""


class Slurm:
    """Runs on `hosts` until they are closed."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.folder = hosts, hosts.folder / "slurm"
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        etc = self.folder / "etc"
        etc.mkdir()
        # All cores of the machine, on each host.
        shape = self._hardware(hosts.hosts[0])
        nodes = [f"NodeName={host.name} {shape}" for host in hosts.hosts]
        (etc / "slurm.conf").write_text(
            CONFIGURATION.format(folder=self.folder, timeout=NODE_TIMEOUT, nodes="\n".join(nodes))
        )
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for host in hosts.hosts:
            self._start_munge(host, key)
            host.mount(etc, Path("/etc/slurm"))
        self._daemon(hosts.hosts[0], "slurmctld", "-D")
        for host in hosts.hosts:
            (self.folder / f"spool_{host.name}").mkdir()
            self._daemon(host, "slurmd", "-D", "-N", host.name)
        deadline = time.monotonic() + START_TIMEOUT
        while self.states() != ["idle"] * len(hosts.hosts):
            assert time.monotonic() < deadline, f"{self.states()}\n{self.logs()}"
            time.sleep(0.2)

    def run(self, *command: str) -> str:
        """On the first host, in the root of the checkout."""
        return self.hosts.hosts[0].run(*command)

    def submit(self, *flags: str) -> str:
        """The number of a job for a run on every node, with one task on each, with `flags` before
        the script. The script's own demands of GPUs are overruled."""
        one_task = ("--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=0")
        submitted = self.hosts.start("sbatch", "--parsable", *one_task, *flags, log="sbatch.log")
        return submitted.succeed(START_TIMEOUT).split()[-1]

    def states(self) -> list[str]:
        """Of the nodes, or empty as long as the controller does not answer."""
        try:
            lines = self.run("sinfo", "-h", "-N", "-p", "all", "-o", "%T").split()
        except AssertionError:
            return []
        return lines

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        words = self.run("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, key: str, value: str, timeout: float) -> dict[str, str]:
        """Until `key` of the job is `value`."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number)).get(key) != value:
            assert time.monotonic() < deadline, f"{json.dumps(job, indent=1)}\n{self.logs()}"
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def _hardware(self, host: Host) -> str:
        """As slurmd sees the machine: `CPUs=2 Boards=1 ...`."""
        (line,) = (line for line in host.run("slurmd", "-C").splitlines() if "CPUs=" in line)
        return line.partition(" ")[2]

    def _start_munge(self, host: Host, key: Path) -> None:
        host.run("mkdir", "-m", "755", "/run/munge")
        log = host.folder / "munged.log"
        host.run(
            "munged",
            "--force",
            f"--key-file={key}",
            "--socket=/run/munge/munge.socket.2",
            "--pid-file=/run/munge/munged.pid",
            "--seed-file=/run/munge/munged.seed",
            f"--log-file={log}",
        )
        host.run("munge", "-n")

    def _daemon(self, host: Host, *command: str) -> None:
        """Ends with its host."""
        with (self.folder / f"{command[0]}_{host.name}.out.log").open("w") as output:
            subprocess.Popen(
                host.command(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
