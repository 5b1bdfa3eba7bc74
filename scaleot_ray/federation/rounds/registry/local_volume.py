"""Whether a folder is on a volume of this machine: SQLite's write-ahead log does not work on others.

Its readers and writers share memory through a mapped file, which two machines cannot.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from scaleot_ray.errors import ConfigError

NETWORK = {
    "9p",
    "acfs",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "drvfs",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
    "mmfs",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "panfs",
    "prl_fs",
    "pvfs2",
    "smb2",
    "smb3",
    "smbfs",
    "vboxsf",
    "virtiofs",
    "vmhgfs",
    "weka",
    "wekafs",
}
"""File systems that more than one machine, or a guest and its host, may have mounted, as the system calls them."""

LOCAL_FUSE = {
    "fuse.bindfs",
    "fuse.encfs",
    "fuse.fuse-overlayfs",
    "fuse.gocryptfs",
    "fuse.lxcfs",
    "fuse.mergerfs",
    "fuse.ntfs-3g",
    "fuse.unionfs",
}
"""Those in user space that are known to be of one machine; most others are of object stores and clusters."""


def shared_by_machines(kind: str) -> bool:
    """Whether several machines may have a file system of this type mounted, as far as its name says."""
    kind = kind.lower()
    return kind in NETWORK or kind == "fuse" or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


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
    if shared_by_machines(kind):
        raise ConfigError(
            f"{key}: {path} is on a network file system ({kind}, mounted at {mount}), which would damage a registry "
            "sooner or later.",
            f"Set {key} to a folder on a disk of the machine that the coordinator runs on; artefacts may stay on "
            "shared storage.",
        )
