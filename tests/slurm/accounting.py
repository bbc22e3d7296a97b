"""A cluster with an accounting database: slurmdbd over a MariaDB of its own."""

from __future__ import annotations

import secrets
import socket
import subprocess

from tests.slurm.cluster import Cluster, wait

CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={munge}
AccountingStorageEnforce=limits
"""

DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={munge}
CommunicationParameters=NoInAddrAny
DbdHost=controller
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={top}/slurmdbd.pid
LogFile={top}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database}
StorageLoc=slurm
StorageUser=slurm
StoragePass={password}
"""

LIMIT = 4
"""Jobs that a user may have in the queue."""


class AccountedCluster(Cluster):
    """Every job is written down; a user may submit ``LIMIT`` jobs under the account ``lab``."""

    def _configure(self) -> None:
        super()._configure()
        words = {
            "top": self.top,
            "munge": self.top / "munge.socket",
            "port": self.port + len(self.nodes) + 1,
            "database": self.port + len(self.nodes) + 2,
            "password": secrets.token_hex(16),
        }
        with (self.top / "slurm.conf").open("a") as file:
            file.write(CONF.format(**words))
        dbd = self.top / "slurmdbd.conf"
        dbd.touch(mode=0o600)
        dbd.write_text(DBD_CONF.format(**words))
        (self.top / "init.sql").write_text(
            "create database slurm;\n"
            f"create user slurm@'127.0.0.1' identified by '{words['password']}';\n"
            "grant all on slurm.* to slurm@'127.0.0.1';\n"
        )
        self.database = words["database"]

    def start_controller(self, *options: str) -> None:
        """After what it writes to."""
        if "slurmdbd" not in self.daemons:
            self._start_database()
        super().start_controller(*options)

    def _start_database(self) -> None:
        data, log = self.top / "database", self.top / "log"
        install = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}"]
        install += ["--skip-test-db", "--auth-root-authentication-method=socket"]
        with (log / "mariadb-install.log").open("wb") as file:
            subprocess.run(install, stdout=file, stderr=file, check=True)
        command = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}"]
        command += [f"--socket={self.top}/database.socket", f"--pid-file={self.top}/mariadbd.pid"]
        command += [f"--port={self.database}", "--bind-address=127.0.0.1", "--skip-name-resolve"]
        command += ["--innodb-lock-wait-timeout=900", "--innodb-flush-log-at-trx-commit=0"]
        self.launch("mariadbd", [*command, f"--init-file={self.top}/init.sql"])
        wait(lambda: _listens(int(self.database)), "MariaDB")
        self._start("slurmdbd", "slurmdbd", "-D", host="controller")
        wait(lambda: self._succeeds("sacctmgr", "-n", "show", "cluster"), "slurmdbd")
        self("sacctmgr", "-iQ", "add", "cluster", "btxtest")
        self("sacctmgr", "-iQ", "add", "account", "lab")
        limit = f"MaxSubmitJobs={LIMIT}"
        self("sacctmgr", "-iQ", "add", "user", "root", "account=lab", limit)

    def _succeeds(self, *command: str) -> bool:
        self.check_alive()
        done = subprocess.run(command, env=self.environment, capture_output=True, check=False)
        return done.returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
