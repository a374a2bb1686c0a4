"""The ranks of one attempt on Ray: a placement group, an actor in each of its bundles, a rank under each actor."""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sihe.cluster.errors import FolderNotShared, NodeUnfit
from sihe.cluster.heartbeats import Pulse
from sihe.cluster.launchers.attempt import Pause, SlotsTaken
from sihe.cluster.launchers.environment import arguments, variables
from sihe.cluster.launchers.folder import AttemptFolder
from sihe.cluster.launchers.ray.actor import Look, Place, RankActor, RankFiles
from sihe.cluster.types import ProcessJob
from sihe.core.files import disk_errors
from sihe.version import __version__

if TYPE_CHECKING:
    from sihe.cluster.launchers.ray.slots import RaySlots

_PLACED_S = 10.0  # for a placement group that fits; milliseconds when its nodes are there
_ACTOR_S = 120.0  # for a worker process to start and import Sihe; about 2 s on an idle machine
_LOOK_S = 0.25  # how long an actor waits for its rank's end before it answers
_PAUSE_S = 0.05
_OVERDUE_S = 3.0  # an answer that takes so much longer: the node is asked whether it is there
_SILENT_S = 30.0  # after which an actor whose node answers, and that does not answer itself, is given up
_STACKS_S = 5.0
_END_S = 10.0  # for the actors to say that their ranks are gone, on top of the grace
_NODE_LABEL = "ray.io/node-id"  # every node has it
_THREADS = 4  # of an actor: looks, stacks, the wish to leave, the end


class RayRanks:
    """`size` running ranks of `job` (`sihe.cluster.launchers.attempt.Attempt`); `close` must be called.

    Ranks on one node have consecutive numbers. Raises `SlotsTaken`, `NodeUnfit`, `FolderNotShared`, `NoSpace`.
    """

    def __init__(self, job: ProcessJob, size: int, pause: Pause, slots: RaySlots, placement: str) -> None:
        self._slots = slots
        self._actors: list[Any] = []
        self._group = _placed(size, slots, placement, pause)
        try:
            self.folder = AttemptFolder(job.log_dir)
            found = self._occupy(size, slots.need, pause)
            self._actors = [actor for actor, _ in found]
            self._places = [place for _, place in found]
            slots.hold(place.node for place in self._places)
            self.hosts = tuple(place.address for place in self._places)
            self.pids = self._begin(job, pause)
        except BaseException:
            self._free(self._actors, signal.SIGKILL, 0.0)
            raise
        self._codes: dict[int, int | str | None] = dict.fromkeys(range(size))
        self._looks: dict[int, Look] = {}
        self._asked: dict[Any, int] = {}
        self._asked_s: dict[int, float] = {}
        self._silent_since_s: dict[int, float] = {}
        self._wants_leave = False
        for rank in range(size):
            self._ask(rank)

    # ---- while they run -------------------------------------------------------------------------------------------

    def codes(self) -> dict[int, int | str | None]:
        """How each rank ended, `None` for one that runs, words for one that was lost."""
        for reference in _answered(list(self._asked), 0):
            self._take(self._asked.pop(reference), reference)
        now_s = time.monotonic()
        for rank, code in self._codes.items():
            if code is None and now_s - self._asked_s[rank] > _OVERDUE_S:
                self._silent_since_s.setdefault(rank, now_s)
            if code is None and rank in self._silent_since_s:
                self._judge_silence(rank, now_s)
        return dict(self._codes)

    def pulses(self) -> tuple[Pulse, ...]:
        """The newest heartbeats, by rank."""
        return tuple(self._looks[rank].pulse if rank in self._looks else Pulse() for rank in self._codes)

    def want_leave(self, wanted: bool) -> None:
        """Asks the ranks to leave after the next checkpoint, or takes that back."""
        if wanted != self._wants_leave:
            self._wants_leave = wanted
            for actor in self._actors:
                actor.want_leave.remote(wanted)

    def stopped(self) -> set[int]:
        """The ranks whose process a signal has stopped."""
        return {rank for rank, look in self._looks.items() if look.is_stopped}

    def state(self, rank: int) -> str:
        """The state of a rank's process as its actor saw it last."""
        return self._looks[rank].state if rank in self._looks else "unknown"

    def show_stacks(self, wait: Callable[[float], object]) -> None:
        """Has every rank that can write its stacks into the folder."""
        asked = [actor.show_stacks.remote() for actor in self._there()]
        left_s = _STACKS_S
        while left_s > 0 and len(_answered(asked, 0)) < len(asked):
            wait(_PAUSE_S)
            left_s -= _PAUSE_S

    def close(self, signum: signal.Signals, grace_s: float) -> None:
        """Ends the ranks that still run, their actors and the placement group."""
        self._free(self._there(), signum, grace_s)

    def _there(self) -> list[Any]:
        """The actors that were not lost."""
        return [actor for rank, actor in enumerate(self._actors) if not isinstance(self._codes[rank], str)]

    def _ask(self, rank: int) -> None:
        self._asked[self._actors[rank].look.remote(_LOOK_S)] = rank
        self._asked_s[rank] = time.monotonic()

    def _take(self, rank: int, reference: Any) -> None:
        """Takes in an actor's answer, or that there will be none."""
        try:
            look: Look = ray.get(reference)
        except ActorUnavailableError:  # its process is gone or unreachable; Ray itself takes its time to say which
            self._silent_since_s.setdefault(rank, time.monotonic())
            self._ask(rank)
        except RayActorError:
            place = self._places[rank]
            how = "with its node" if self._slots.is_lost(place.node) else "when its actor died, on node"
            self._codes[rank] = f"was lost {how} {place.address}"
        else:
            self._silent_since_s.pop(rank, None)
            self._looks[rank], self._codes[rank] = look, look.code
            if look.code is None:
                self._ask(rank)

    def _judge_silence(self, rank: int, now_s: float) -> None:
        place = self._places[rank]
        if self._slots.is_lost(place.node):
            self._codes[rank] = f"was lost with its node {place.address}"
        elif now_s - self._silent_since_s[rank] > _SILENT_S:
            self._codes[rank] = f"was lost: its actor on node {place.address} does not answer"

    # ---- start and end --------------------------------------------------------------------------------------------

    def _occupy(self, size: int, need: Mapping[str, float], pause: Pause) -> list[tuple[Any, Place]]:
        """Starts the actors; each with its place, in the order of their ranks."""
        token, text = self.folder.path / "token", secrets.token_hex(16)
        with disk_errors(token):
            token.write_text(text, encoding="utf-8")
        kind = ray.remote(RankActor)
        self._actors = [
            kind.options(
                num_cpus=need["CPU"],
                num_gpus=need["GPU"],
                max_concurrency=_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle),
            ).remote()
            for bundle in range(size)
        ]
        places: list[Place] = _results([actor.place.remote(token) for actor in self._actors], pause)
        for place in places:
            if place.token != text:
                raise FolderNotShared(self.folder.path, place.address)
            if place.version != __version__:
                raise NodeUnfit(place.address, f"it has Sihe {place.version}, this machine has {__version__}")
        token.unlink()
        found = zip(self._actors, places, strict=True)
        return sorted(found, key=lambda pair: (pair[1].address, pair[1].node, pair[1].devices))

    def _begin(self, job: ProcessJob, pause: Pause) -> tuple[int, ...]:
        """Opens the store on the node of rank 0 and starts the ranks; their processes."""
        address, size = self._places[0].address, len(self._places)
        (port,) = _results([self._actors[0].open_store.remote(address)], pause)
        begun = []
        for rank, place in enumerate(self._places):
            near = [other for other, its in enumerate(self._places) if its.node == place.node]
            env = variables(
                job,
                attempt=self.folder.number,
                world_size=size,
                address=address,
                port=port,
                interface=place.interface,
            )
            env |= {"RANK": str(rank), "LOCAL_RANK": str(near.index(rank)), "LOCAL_WORLD_SIZE": str(len(near))}
            if place.devices:  # those of all ranks on the node, so that a rank's own has the number LOCAL_RANK
                env["CUDA_VISIBLE_DEVICES"] = ",".join(one for other in near for one in self._places[other].devices)
            env |= self.folder.prepare(rank)
            files = RankFiles(self.folder.output(rank), self.folder.log(rank), self.folder.stacks(rank))
            begun.append(self._actors[rank].begin.remote(arguments(job), env, files))
        return tuple(_results(begun, pause))

    def _free(self, there: Sequence[Any], signum: signal.Signals, grace_s: float) -> None:
        ended = [actor.end.remote(int(signum), grace_s) for actor in there]
        _answered(ended, grace_s + _END_S)
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)
        self._slots.release()


def _placed(size: int, slots: RaySlots, placement: str, pause: Pause) -> Any:
    """A placement group with a bundle for each rank, on nodes that answer. Raises `SlotsTaken`."""
    bundle = {resource: amount for resource, amount in slots.need.items() if amount}
    elsewhere = {_NODE_LABEL: f"!in({','.join(slots.excluded)})"}
    group = placement_group(
        [bundle] * size,
        strategy=placement.upper(),
        bundle_label_selector=[elsewhere] * size if slots.excluded else None,
    )
    deadline_s = time.monotonic() + _PLACED_S
    try:
        while placement_group_table(group)["state"] != "CREATED":
            if time.monotonic() > deadline_s:
                raise SlotsTaken
            pause(_PAUSE_S)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _answered(references: list[Any], timeout_s: float) -> list[Any]:
    """Those of `references` that have a result or an error, after at most `timeout_s`."""
    if not references:
        return []
    ready, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s)
    return list(ready)


def _results(references: list[Any], pause: Pause) -> list[Any]:
    """What new actors answer. Raises `SlotsTaken` when one is lost on the way, `NodeUnfit` when it cannot work."""
    deadline_s = time.monotonic() + _ACTOR_S
    while len(_answered(references, 0)) < len(references):
        if time.monotonic() > deadline_s:
            raise SlotsTaken
        pause(_PAUSE_S)
    try:
        return list(ray.get(references))
    except RayTaskError as error:
        raise NodeUnfit(None, str(error.cause)) from error
    except RayActorError as error:
        # Ray has no class of its own for an actor that could not be made, such as where its module is missing.
        if "creation task" in str(error):
            raise NodeUnfit(None, str(error).strip().splitlines()[-1]) from error
        raise SlotsTaken from error
