"""Memory that workers share with the training process, used again when that has let go of it.

A batch of videos is large, and new shared memory costs a page fault every 4 KB: on the machine of
docs/BENCHMARKS.md a fifth of the time that decoding takes.  DataLoader knows only new memory.
"""

from __future__ import annotations

import math
import multiprocessing

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import get_worker_info

FREE, TAKEN, RECEIVED = 0, 1, 2


class SharedRooms:
    """A few pieces of shared memory a worker; made in the training process and passed on to the workers.

    A room is taken by its worker, received by the training process in a batch, and free again when no tensor there
    uses its storage any more, be it a view.  Where all are in use, new memory is made as if there were no rooms.

    Args:
        num_workers: workers that share them.
        rooms: pieces a worker: two batches fetched ahead, one in the making, and two in use.
    """

    def __init__(self, num_workers: int, rooms: int = 5) -> None:
        self._rooms = rooms
        self._states = multiprocessing.get_context("spawn").RawArray("b", num_workers * rooms)
        self._memory: dict[int, torch.Tensor] = {}
        self._received: list[tuple[StorageWeakRef, int]] = []
        self._pass = 0

    def take(self, shape: tuple[int, ...], number: int) -> tuple[torch.Tensor, int | None]:
        """In a worker: uninitialised uint8 memory, and the room it is (None for new memory).

        Args:
            shape: of the memory.
            number: of the pass over the data.  What was taken in an earlier one and not received by now will not be:
                DataLoader has thrown it away.
        """
        info, size = get_worker_info(), math.prod(shape)
        assert info is not None
        own = range(info.id * self._rooms, (info.id + 1) * self._rooms)
        if number != self._pass:
            self._pass = number
            for room in own:
                if self._states[room] == TAKEN:
                    self._states[room] = FREE
        for room in own:
            if self._states[room] == FREE:
                if room not in self._memory or len(self._memory[room]) < size:
                    self._memory[room] = _new_shared(size)
                self._states[room] = TAKEN
                return self._memory[room][:size].view(shape), room
        return _new_shared(size).view(shape), None

    def receive(self, tensor: torch.Tensor, room: int) -> None:
        """In the training process: take note of what has come in a room."""
        self._states[room] = RECEIVED
        self._received.append((StorageWeakRef(tensor.untyped_storage()), room))

    def sweep(self) -> None:
        """In the training process: free the rooms that nobody uses any more."""
        held = []
        for storage, room in self._received:
            if storage.expired():
                self._states[room] = FREE
            else:
                held.append((storage, room))
        self._received = held


def _new_shared(size: int) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
