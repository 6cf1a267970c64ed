"""A real SLURM of one node on this machine, from Debian's packages slurm-wlm and munge.

``with SlurmCluster(folder) as cluster``: munged, slurmctld and slurmd on the loopback device, with
their own keys, state and logs in the folder, independent of anything else on the machine.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from w2f_torchrl.utils.closing import Closing

PROGRAMS = ("slurmctld", "slurmd", "munged", "sinfo", "srun", "scontrol", "runuser")
PACKAGES = "apt-get install slurm-wlm munge"


def missing_requirement() -> str | None:
    """Say why no SLURM can be started here, or None when one can."""
    os.environ["PATH"] += ":/usr/sbin"
    if lacking := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"needs a SLURM to start ({PACKAGES}): no {', '.join(lacking)}"
    if os.getuid() != 0:
        return "starting munged and slurmctld needs root"
    return None


class SlurmCluster(Closing):
    """One node, one partition ``main``, CPUs as resources, no containers and no accounting.

    Args:
        folder: An empty directory for configuration, state and logs.
        cpus: Tasks of one CPU that run at a time.
    """

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.cpus = folder, cpus
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        """Start the daemons and wait until the node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        try:
            self._start_munge()
            self._start_slurm()
            self._wait_for("idle", 60)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Cancel what runs and end the daemons."""
        if len(self.processes) > 1:
            subprocess.run(["scancel", "--user=root", "--full"], env=self.environment, timeout=60)
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.processes.clear()

    @property
    def environment(self) -> dict[str, str]:
        """Environment in which SLURM's commands find this cluster."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Run a command of SLURM's and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def queue(self) -> dict[str, str]:
        """State of each job that has not ended, by job id (``17_0`` in an array)."""
        rows = self.call("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(row.split() for row in rows)

    def _start_munge(self) -> None:
        folder, user = self.folder / "munge", pwd.getpwnam("munge")
        folder.mkdir()
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for path in (folder, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        folder.chmod(0o755)
        self._start(
            "munge",
            [
                *("runuser", "-u", "munge", "--", "munged", "--foreground", "--force"),
                "--num-threads=1",
                f"--key-file={key}",
                f"--socket={folder / 'socket'}",
                f"--pid-file={folder / 'pid'}",
                f"--log-file={folder / 'log'}",
                f"--seed-file={folder / 'seed'}",
            ],
        )
        end = time.monotonic() + 30
        while not (folder / "socket").exists():
            if time.monotonic() > end:
                raise RuntimeError(f"munged doesn't start: {self.log('munge')}")
            time.sleep(0.2)

    def _start_slurm(self) -> None:
        (self.folder / "slurm.conf").write_text(self._configuration())
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        self._start("slurmctld", ["slurmctld", "-D", "-i"])
        self._start("slurmd", ["slurmd", "-D", "-N", _host()])

    def _configuration(self) -> str:
        folder, host = self.folder, _host()
        port, node_port = _free_port(), _free_port()
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": port,
            "SlurmdPort": node_port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={folder / 'munge' / 'socket'}",
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "slurmctld.pid",
            "SlurmdPidFile": folder / "slurmd.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 30,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        node = f"NodeName={host} NodeAddr=127.0.0.1 CPUs={self.cpus} RealMemory={_memory()}"
        lines.append(node)
        lines.append(f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as stream:
            self.processes.append(
                subprocess.Popen(command, env=self.environment, stdout=stream, stderr=stream)
            )

    def log(self, name: str) -> str:
        """The last lines of a daemon."""
        return "\n".join((self.folder / f"{name}.out").read_text().splitlines()[-20:])

    def _wait_for(self, state: str, seconds: float) -> None:
        end, found = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            try:
                found = self.call("sinfo", "--noheader", "--format=%T")
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                found = str(error)
            if found == state:
                return
            time.sleep(1)
        logs = "\n".join(self.log(name) for name in ("slurmctld", "slurmd"))
        raise RuntimeError(f"the node is {found!r} and not {state}:\n{logs}")


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _memory() -> int:
    """MiB that jobs may ask for."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 1024


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
