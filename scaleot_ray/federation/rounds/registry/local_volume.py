"""Whether a folder is on a volume of this machine: SQLite's write-ahead log does not work on others.

Its readers and writers share memory through a mapped file, which two machines cannot.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from scaleot_ray.errors import ConfigError

NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "fuse.ceph",
    "fuse.cephfs",
    "fuse.gcsfuse",
    "fuse.glusterfs",
    "fuse.goofys",
    "fuse.juicefs",
    "fuse.rclone",
    "fuse.s3fs",
    "fuse.sshfs",
    "fuse.mount-s3",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "panfs",
    "smb3",
    "smbfs",
    "virtiofs",
    "weka",
    "wekafs",
}
"""File systems that more than one machine may have mounted, as the system calls them."""


def filesystem_of(path: Path) -> tuple[str, str]:
    """Type and mount point of the file system that ``path`` is on; the path need not exist yet."""
    place = path.expanduser().resolve()
    best = ("unknown", "/")
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        # The last one of those mounted at the same point is what one sees there.
        if (place == point or point in place.parents) and len(mount.mountpoint) >= len(best[1]):
            best = (mount.fstype, mount.mountpoint)
    return best


def check_local(path: Path, key: str) -> None:
    """Refuses a place on a network file system.

    Args:
        path: where the registry shall be.
        key: the setting that says so, for the message.

    Raises:
        ConfigError: names the file system and the setting.
    """
    kind, mount = filesystem_of(path)
    if kind.lower() in NETWORK:
        raise ConfigError(
            f"{key}: {path} is on a network file system ({kind}, mounted at {mount}), which would damage a registry "
            "sooner or later.",
            f"Set {key} to a folder on a disk of the machine that the coordinator runs on; artefacts may stay on "
            "shared storage.",
        )
