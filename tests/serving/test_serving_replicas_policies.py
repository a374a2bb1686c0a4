"""What decides about replicas: the balancer, the order of a replacement, the settings. All pure."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.core.errors import ConfigError
from sihe.serving.engine.types import ChatMessage, GenerationRequest
from sihe.serving.gateway.replicas.balancer import Candidate, choose, prefix_of, work_of
from sihe.serving.gateway.replicas.config import (
    LocalBackend,
    OpenAiBackend,
    RayBackend,
    ReplicaConfig,
    ScalingConfig,
)
from sihe.serving.gateway.replicas.replacement import Member, next_moves

# ---- the balancer ---------------------------------------------------------------------------------------------------


def test_the_same_prefix_finds_the_same_replica_and_a_new_one_moves_only_its_share() -> None:
    draw = random.Random(0)
    prefixes = [f"prefix {number}".encode() for number in range(3000)]
    four = [Candidate(id, 0.0) for id in range(4)]
    before = {prefix: choose(four, prefix, draw) for prefix in prefixes}
    assert before == {prefix: choose(four[::-1], prefix, draw) for prefix in prefixes}
    assert all(600 < count < 900 for count in Counter(before.values()).values())
    after = {prefix: choose([*four, Candidate(4, 0.0)], prefix, draw) for prefix in prefixes}
    moved = [prefix for prefix in prefixes if before[prefix] != after[prefix]]
    assert {after[prefix] for prefix in moved} == {4}
    assert 450 < len(moved) < 750


def test_an_overloaded_home_is_left() -> None:
    draw, work = random.Random(0), 10.0
    loads = {0: 0.0, 1: 0.0, 2: 0.0}
    for _ in range(3000):
        chosen = choose([Candidate(id, load) for id, load in loads.items()], b"one prefix for all", draw, work=work)
        assert chosen is not None
        loads[chosen] += work
    mean = sum(loads.values()) / 3
    assert max(loads.values()) <= 1.25 * mean + 5 * work
    assert max(loads.values()) > mean, "the home has more than the others"


def test_two_choices_keep_the_load_even() -> None:
    draw, loads = random.Random(0), dict.fromkeys(range(10), 0.0)
    for _ in range(10_000):
        chosen = choose([Candidate(id, load) for id, load in loads.items()], None, draw)
        assert chosen is not None
        loads[chosen] += 1.0
    assert max(loads.values()) - min(loads.values()) < 10


def test_open_breakers_are_avoided_unless_all_are_open() -> None:
    draw = random.Random(0)
    some = [Candidate(0, 0.0, is_allowed=False), Candidate(1, 99.0)]
    assert {choose(some, prefix, draw) for prefix in (None, b"a", b"b")} == {1}
    none = [Candidate(0, 0.0, is_allowed=False), Candidate(1, 0.0, is_allowed=False)]
    assert {choose(none, str(n).encode(), draw) for n in range(50)} == {0, 1}
    assert choose([], None, draw) is None


def test_prefixes_are_those_that_a_cache_can_share() -> None:
    system = ChatMessage("system", "You answer briefly. " * 20)
    ask = [GenerationRequest(messages=(system, ChatMessage("user", text))) for text in ("one", "two")]
    assert prefix_of(ask[0]) == prefix_of(ask[1]) is not None
    assert prefix_of(GenerationRequest(prompt="short")) is None
    tokens = tuple(range(100))
    assert prefix_of(GenerationRequest(prompt=tokens)) == prefix_of(GenerationRequest(prompt=(*tokens[:64], 5)))
    assert work_of(GenerationRequest(prompt=tokens, max_tokens=10)) == 111.0


# ---- replacement ----------------------------------------------------------------------------------------------------


@dataclass
class Floor:
    """Replicas that do what they are told, in memory for `room` of them."""

    room: int
    members: dict[int, Member] = field(default_factory=dict)
    has_room: bool = True
    fewest: int = 99
    versions_seen: list[set[bool]] = field(default_factory=list)

    def step(self, wanted: int, minimum: int) -> bool:
        moves = next_moves(
            list(self.members.values()),
            wanted=wanted,
            minimum=minimum,
            loads_at_once=1,
            may_load=True,
            has_room=self.has_room,
        )
        for id in moves.open:
            self.members[id] = Member(id, True, "ready")
        for id in (*moves.drain, *moves.discard):
            del self.members[id]
        for _ in range(moves.load):
            if len(self.members) >= self.room:
                self.has_room = False
            else:
                id = max(self.members, default=0) + 1
                self.members[id] = Member(id, True, "warm")
        ready = [member for member in self.members.values() if member.stage == "ready"]
        self.fewest = min(self.fewest, len(ready))
        self.versions_seen.append({member.is_current for member in ready})
        return bool(moves)

    def replace_all(self, count: int, minimum: int) -> None:
        self.members = {id: Member(id, False, "ready") for id in range(1, count + 1)}
        for _ in range(50):
            self.step(count, minimum)

    @property
    def ready(self) -> list[bool]:
        return [member.is_current for member in self.members.values() if member.stage == "ready"]


def test_with_room_all_come_up_beside_and_the_route_flips_once() -> None:
    floor = Floor(room=6)
    floor.replace_all(3, minimum=3)
    assert floor.ready == [True] * 3
    assert floor.fewest == 3
    assert {True, False} not in floor.versions_seen, "never two versions at once"


def test_with_room_for_one_more_they_are_exchanged_at_full_strength() -> None:
    floor = Floor(room=4)
    floor.replace_all(3, minimum=3)
    assert floor.ready == [True] * 3
    assert floor.fewest == 3


def test_without_room_one_leaves_first_as_far_as_the_minimum_allows() -> None:
    floor = Floor(room=3)
    floor.replace_all(3, minimum=2)
    assert floor.ready == [True] * 3
    assert floor.fewest == 2


def test_without_room_and_at_the_minimum_nothing_is_touched() -> None:
    for count in (1, 2, 3):
        floor = Floor(room=count)
        floor.replace_all(count, minimum=count)
        assert floor.ready == [False] * count
        assert floor.fewest == count


@given(room=st.integers(1, 8), count=st.integers(1, 4), minimum=st.integers(0, 4), wanted=st.integers(0, 5))
def test_it_settles_where_it_can_and_keeps_the_minimum(room: int, count: int, minimum: int, wanted: int) -> None:
    floor = Floor(room=max(room, count))
    minimum = min(minimum, count, wanted)
    floor.members = {id: Member(id, False, "ready") for id in range(1, count + 1)}
    moved = [floor.step(wanted, minimum) for _ in range(60)]
    assert floor.fewest >= min(minimum, count)
    if floor.room >= wanted + count or (wanted and count > max(1, minimum)):
        assert all(floor.ready)
        assert len(floor.ready) == min(wanted, floor.room)
    if wanted <= floor.room:
        assert not moved[-1] or not floor.has_room, "nothing moves any more, but what is tried for want of room"


def test_dead_ones_are_discarded_and_replaced_and_old_streams_bound_what_piles_up() -> None:
    dead = [Member(1, True, "dead"), Member(2, True, "ready")]
    moves = next_moves(dead, wanted=2, minimum=1, loads_at_once=4, may_load=True, has_room=True)
    assert (moves.discard, moves.load, moves.drain) == ((1,), 1, ())
    piled = [Member(1, False, "ready"), Member(2, False, "draining"), Member(3, False, "draining")]
    assert not next_moves(piled, wanted=1, minimum=1, loads_at_once=1, may_load=True, has_room=True)


def test_the_idlest_leave_first() -> None:
    members = [Member(1, True, "ready", 5), Member(2, True, "ready", 0), Member(3, True, "ready", 2)]
    assert next_moves(members, wanted=1, minimum=1, loads_at_once=1, may_load=True, has_room=True).drain == (2, 3)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ReplicaConfig(),
        ReplicaConfig(0, 4, scaling=ScalingConfig(target_ttft_s=0.5), hedge=0.02, timeout_s=30.0),
        ReplicaConfig(backend=RayBackend(cpus=2, gpus=0.5, resources=(("highmem", 1.0),), placement="pack")),
        ReplicaConfig(backend=OpenAiBackend(url="http://10.0.0.1:8000/v1", model="llama")),
        ReplicaConfig(backend=OpenAiBackend(command="vllm serve {model} --port {port}")),
    ],
)
def test_settings_survive_being_stored(config: ReplicaConfig) -> None:
    assert ReplicaConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"min_replicas": -1}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"max_replicas": True}, "max_replicas"),
        ({"hedge": 0.5}, "hedge"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"surprise": 1}, "surprise"),
        ({"scaling": {"target_kv": 2}}, "scaling.target_kv"),
        ({"scaling": []}, "scaling"),
        ({"backend": "cloud"}, "backend"),
        ({"backend": {"kind": "local", "cpus": 1}}, "backend.cpus"),
        ({"backend": {"kind": "ray", "gpus": -1}}, "backend.gpus"),
        ({"backend": {"kind": "openai"}}, "backend.url"),
        ({"backend": {"kind": "openai", "url": "ftp://x", "model": "m"}}, "backend.url"),
        ({"backend": {"kind": "openai", "command": "vllm serve {model}"}}, "backend.command"),
        ({"backend": {"kind": "openai", "command": "x '{port}"}}, "backend.command"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReplicaConfig.from_mapping(values)
    assert caught.value.key == key
    assert ReplicaConfig.from_mapping({"backend": "local"}).backend == LocalBackend()
