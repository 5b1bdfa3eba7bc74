"""The registry's file: durable, fenced, refused where it cannot be one."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from scaleot_ray.errors import ConfigError, ResourcesMissing, RunFailed
from scaleot_ray.federation.rounds.registry import Registry
from scaleot_ray.federation.rounds.registry.local_volume import filesystem_of, shared_by_machines
from tests.federation.rounds.registry.filled import EMULATOR, delta_of, filled


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    with filled(tmp_path / "r.sqlite") as registry:
        registry.rounds.open(EMULATOR.digest(), ["ann", "ben"], 1, deadline=5000.0)
        first = registry.submissions.add(delta_of("ann"))
    with Registry(tmp_path / "r.sqlite") as registry:
        current = registry.rounds.current()
        assert current is not None
        assert (current.number, current.quorum, current.deadline) == (1, 1, 5000.0)
        assert registry.submissions.of_round(1) == [first]
        assert [part.state for part in registry.rounds.parts(1)] == ["submitted", "waiting"]


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with filled(tmp_path / "r.sqlite") as registry:
        with pytest.raises(ConfigError, match="There is no data owner 'zoe'"):
            registry.rounds.open(EMULATOR.digest(), ["ann", "zoe"], 1)
        assert registry.rounds.all() == []
        assert registry.rounds.open(EMULATOR.digest(), ["ann"], 1).number == 1


def test_the_one_before_can_change_nothing_any_more(tmp_path: Path) -> None:
    old = filled(tmp_path / "r.sqlite")
    old.rounds.open(EMULATOR.digest(), ["ann", "ben"], 1)
    new = Registry(tmp_path / "r.sqlite")
    with pytest.raises(RunFailed, match="another coordinator has taken this run over"):
        old.submissions.add(delta_of("ann"))
    assert new.submissions.of_round(1) == []
    new.submissions.add(delta_of("ben"))
    assert [one.tenant for one in old.submissions.of_round(1)] == ["ben"]  # it may still look
    old.close()
    new.close()


def test_looking_changes_nothing_and_fences_nobody(tmp_path: Path) -> None:
    with filled(tmp_path / "r.sqlite") as writer, Registry(tmp_path / "r.sqlite", write=False) as reader:
        with pytest.raises(RuntimeError, match="to look only"):
            reader.tenants.set_state("ann", "paused")
        writer.tenants.set_state("ann", "paused", "asked to")
        assert reader.tenants.get("ann").reason == "asked to"


def test_there_must_be_one_to_look_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no registry"):
        Registry(tmp_path / "none.sqlite", write=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"hello, this is a text\n" * 100])
def test_another_file_is_no_registry(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.sqlite"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"r\.sqlite: is no registry"):
        Registry(path, write=False)
    if content:
        with pytest.raises(ConfigError, match=r"r\.sqlite: is no registry"):
            Registry(path)
        assert path.read_bytes() == content


def as_version_1(path: Path) -> None:
    """Makes of a registry what the version before would have written."""
    connection = sqlite3.connect(path)
    connection.executescript(
        "ALTER TABLE parts DROP COLUMN start_id; ALTER TABLE submissions DROP COLUMN settings;"
        "ALTER TABLE submissions DROP COLUMN code_version; DROP TABLE withdrawals;"
        "UPDATE meta SET value = '1' WHERE key = 'version';"
    )
    connection.close()


def test_an_earlier_version_is_read_and_then_brought_up_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with filled(path) as registry:
        registry.rounds.open(EMULATOR.digest(), ["ann", "ben"], 1)
        first = registry.submissions.add(delta_of("ann"))
    as_version_1(path)
    with Registry(path, write=False) as registry:
        assert registry.submissions.of_round(1) == [first]
        assert [part.state for part in registry.rounds.parts(1)] == ["submitted", "waiting"]
    with Registry(path) as registry:
        assert registry.submissions.of_round(1) == [first]
        second = registry.submissions.add(replace(delta_of("ben"), settings={"method": "lora"}, code_version="0.1"))
        assert registry.submissions.of_round(1) == [first, second]
        assert registry.submissions.withdraw(second, "so") in registry.submissions.withdrawals()
    with Registry(path):  # once is enough
        pass


def test_another_version_is_refused(tmp_path: Path) -> None:
    with filled(tmp_path / "r.sqlite") as registry, registry._database.writing():
        registry._database.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
    with pytest.raises(ConfigError, match="is a registry of version 99"):
        Registry(tmp_path / "r.sqlite")


def test_whoever_refuses_another_version_takes_nothing_over(tmp_path: Path) -> None:
    with filled(tmp_path / "r.sqlite") as registry:
        with registry._database.writing():
            registry._database.execute("UPDATE meta SET value = '99' WHERE key = 'version'")
        with pytest.raises(ConfigError, match="is a registry of version 99"):
            Registry(tmp_path / "r.sqlite")
        registry.tenants.set_state("ann", "paused")
        assert registry.tenants.get("ann").state == "paused"


def test_a_damaged_file_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "r.sqlite"
    with filled(path, " ".join(f"owner{number}" for number in range(300))):
        pass
    data = bytearray(path.read_bytes())
    for place in range(8192, len(data), 4096):
        data[place : place + 2000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(ResourcesMissing, match="damaged"), Registry(path) as registry:
        registry.tenants.all()


def test_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _ = filesystem_of(tmp_path)
    assert kind not in ("unknown", "nfs4")
    mounts = [
        SimpleNamespace(fstype="ext4", mountpoint="/"),
        SimpleNamespace(fstype="ext4", mountpoint=str(tmp_path)),
        SimpleNamespace(fstype="nfs4", mountpoint=str(tmp_path / "share")),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(ConfigError, match=r"registry: .*shared\.sqlite is on a network file system \(nfs4") as refused:
        Registry(tmp_path / "share" / "deep" / "shared.sqlite")
    assert "disk of the machine" in refused.value.remedy
    assert not (tmp_path / "share").exists()
    Registry(tmp_path / "share-not.sqlite").close()


def test_what_is_not_known_to_be_of_one_machine_alone_is_refused() -> None:
    assert all(shared_by_machines(kind) for kind in ("nfs", "CIFS", "fuse.blobfuse2", "fuse.mfs", "fuse", "virtiofs"))
    assert not any(shared_by_machines(kind) for kind in ("ext4", "xfs", "overlay", "tmpfs", "fuse.mergerfs", "fuseblk"))


def test_threads_share_it(tmp_path: Path) -> None:
    names = [f"owner{number}" for number in range(24)]
    with filled(tmp_path / "r.sqlite", " ".join(names)) as registry:
        registry.rounds.open(EMULATOR.digest(), names, 1)
        problems: list[BaseException] = []

        def submit(name: str) -> None:
            try:
                for _ in range(3):
                    registry.submissions.add(delta_of(name))
                    registry.tenants.refuse(name, "again")
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=submit, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert [one.tenant for one in registry.submissions.of_round(1)] == sorted(names)
        assert all(registry.tenants.refusals(name) == [("again", 3)] for name in names)


_SUBMIT = """
import sys
from pathlib import Path
from scaleot_ray.federation.rounds.registry import NewSubmission, Registry
registry = Registry(Path(sys.argv[1]))
for tenant in registry.tenants.all():
    registry.submissions.add(NewSubmission(tenant.name, 1, tenant.name, "delta", 1000, 0.5, 1.0, {}, None))
    print(tenant.name, flush=True)  # the acknowledgement
"""


def test_nothing_acknowledged_is_lost_when_its_process_is_killed(tmp_path: Path) -> None:
    path, count, order = tmp_path / "r.sqlite", 3000, random.Random(0)
    with filled(path, "") as registry:
        with registry._database.writing():
            for number in range(count):
                registry._database.execute(
                    "INSERT INTO tenants VALUES (?, 'admitted', NULL, '{}', '', 0)", f"owner{number:04}"
                )
        registry.rounds.open(EMULATOR.digest(), [tenant.name for tenant in registry.tenants.all()], 1)
    acknowledged: set[str] = set()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _SUBMIT, str(path)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(order.uniform(0.02, 0.3))
        process.send_signal(signal.SIGKILL)
        acknowledged |= {line.strip() for line in [first, *process.stdout] if line.endswith("\n")}
        process.wait()
        assert process.returncode == -signal.SIGKILL
        with Registry(path, write=False) as registry:
            counted = [one.tenant for one in registry.submissions.of_round(1)]
        assert acknowledged <= set(counted)
        assert len(counted) == len(set(counted))
        assert len(counted) <= len(acknowledged) + 4  # at most the one that each kill caught before it could say so
    assert 10 < len(acknowledged) < count
