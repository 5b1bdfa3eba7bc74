"""What a command needs, process by process and moment by moment."""

from __future__ import annotations

from dataclasses import dataclass, field

PROCESS = 450 << 20
"""Bytes of a process that has imported torch and transformers and holds no weights yet."""

Parts = dict[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Phase:
    """The fullest moment of one stage of the work.

    Attributes:
        name: of the stage, as progress reports have it.
        device: what lies where layers are computed: on the GPU where there is one, else in memory.
        host: what lies in memory in any case.
    """

    name: str
    device: Parts
    host: Parts = field(default_factory=dict)


@dataclass(frozen=True)
class Process:
    """A process, or several of the same kind.

    Attributes:
        name: what it is.
        count: how many of them there are at once.
        gpu: whether it computes on a GPU of its own.
        phases: its work in order.
        mapped: bytes of model files that it reads and the system takes back when it needs the memory; not counted.
    """

    name: str
    count: int
    gpu: bool
    phases: tuple[Phase, ...]
    mapped: int = 0

    def memory_of(self, phase: Phase) -> int:
        """Bytes of memory of one of these processes in a phase."""
        return PROCESS + sum(phase.host.values()) + (0 if self.gpu else sum(phase.device.values()))

    def gpu_memory_of(self, phase: Phase) -> int:
        """Bytes of its GPU in a phase."""
        return sum(phase.device.values()) if self.gpu else 0

    @property
    def fullest(self) -> Phase:
        """The phase that needs most memory."""
        return max(self.phases, key=self.memory_of)

    @property
    def memory(self) -> int:
        """Bytes of memory of one of these processes, at most."""
        return self.memory_of(self.fullest)

    @property
    def gpu_memory(self) -> int:
        """Bytes of its GPU, at most."""
        return max(self.gpu_memory_of(phase) for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """What a command needs, in bytes.

    Attributes:
        processes: that are there at once.
        object_store: Ray's shared memory; 0 without Ray.
        disk: everything that is written, at most.
        emulator: the emulator artefact.
    """

    processes: tuple[Process, ...]
    object_store: int
    disk: int
    emulator: int

    @property
    def memory(self) -> int:
        """Bytes of memory of all processes, were they on one machine."""
        return sum(process.count * process.memory for process in self.processes)

    @property
    def gpu_memory(self) -> int:
        """Bytes of the GPU that is used most."""
        return max(process.gpu_memory for process in self.processes)


@dataclass(frozen=True)
class Room:
    """What there is for it, in bytes; None where it is not to be looked at.

    Attributes:
        memory: free memory of one machine.
        gpu_memory: of each GPU.
        object_store: free shared memory.
        disk: free where results are written.
    """

    memory: int | None = None
    gpu_memory: int | None = None
    object_store: int | None = None
    disk: int | None = None


def shortages(plan: Plan, room: Room) -> dict[str, tuple[int, int]]:
    """What is needed and what there is, of everything that there is too little of."""
    have = {
        "memory": (plan.memory, room.memory),
        "GPU memory": (plan.gpu_memory, room.gpu_memory),
        "object store": (plan.object_store, room.object_store),
        "disk": (plan.disk, room.disk),
    }
    return {name: (needed, there) for name, (needed, there) in have.items() if there is not None and needed > there}
