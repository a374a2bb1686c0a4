"""What only the launcher on Ray has: nodes that do not fit, actors that are lost, devices, addresses."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sihe.cluster.errors import FolderNotShared, JobStopped, NodeUnfit, NotEnoughSlots
from sihe.cluster.launchers.choice import chosen
from sihe.cluster.launchers.local import LocalLauncher
from sihe.cluster.launchers.ray.interface import interface_of
from sihe.cluster.launchers.ray.launcher import RayLauncher
from sihe.cluster.types import JobEvent, ProcessJob, RankFailed, RanksStarted, RestartPolicy
from sihe.core.errors import ConfigError, MissingExtra, Unreachable
from sihe.core.settings import ClusterSettings
from support.ray_cluster import RayNodes, ray_nodes
from support.training_runs import python_path

AT_ONCE = RestartPolicy(max_restarts=2, first_delay_s=0, capacity_timeout_s=0)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """Two nodes with one CPU each, and one with two CPUs and two GPUs that exist in Ray's books only."""
    with ray_nodes(2) as running:
        running.add(num_cpus=2, num_gpus=2)
        yield running


def job_of(fate: str, folder: Path, world_size: int = 2, **changes: object) -> ProcessJob:
    values = {"args": (fate, str(folder)), "env": {"PYTHONPATH": python_path()}, "log_dir": folder / "logs"} | changes
    return ProcessJob(name=fate, module="support.ranks", world_size=world_size, **values)  # type: ignore[arg-type]


# ---- choice and connection ------------------------------------------------------------------------------------------


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python sees a package that is not there
    launcher = chosen(ClusterSettings(launcher="ray"))
    with pytest.raises(MissingExtra, match=r"pip install 'sihe\[ray\]'"):
        launcher.run(job_of("ends", tmp_path), AT_ONCE)


def test_the_settings_choose() -> None:
    assert isinstance(chosen(ClusterSettings()), LocalLauncher)
    assert isinstance(chosen(ClusterSettings(launcher="ray", ray_placement="spread")), RayLauncher)


def test_an_address_of_the_client_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="client protocol"):
        RayLauncher(address="ray://10.0.0.1:10001").run(job_of("ends", tmp_path), AT_ONCE)


def test_the_interface_that_has_an_address() -> None:
    assert interface_of("127.0.0.1") == ("lo" if sys.platform == "linux" else None)
    assert interface_of("203.0.113.1") is None, "an address of documents, which no machine has"


@pytest.mark.ray
def test_nobody_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    for address in ("127.0.0.1:1", "auto"):
        with pytest.raises(Unreachable, match=r":1 does not answer \(Connection refused\)"):
            RayLauncher(address=address).run(job_of("ends", tmp_path), AT_ONCE)


@pytest.mark.ray
@pytest.mark.parametrize("address", ["local", "nowhere"])
def test_what_is_no_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.ray_address.*must be host:port"):
        RayLauncher(address=address).run(job_of("ends", tmp_path), AT_ONCE)


@pytest.mark.ray
def test_the_handler_of_sigterm_is_what_it_was(nodes: RayNodes, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    RayLauncher(address=nodes.address).run(job_of("ends", tmp_path, 1), AT_ONCE)
    assert signal.getsignal(signal.SIGTERM) is before


# ---- slots ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_jobs_that_do_not_fit(nodes: RayNodes, tmp_path: Path) -> None:
    launcher = RayLauncher(address=nodes.address)
    with pytest.raises(NotEnoughSlots, match=r"at least 5 workers.*room for 4"):
        launcher.run(job_of("ends", tmp_path, 5), AT_ONCE)
    with pytest.raises(NotEnoughSlots, match="room for 1"):  # three CPUs are free, but not on one node
        launcher.run(job_of("ends", tmp_path, 2, threads_per_rank=2), AT_ONCE)
    with pytest.raises(NotEnoughSlots, match="room for 2"):
        launcher.run(job_of("ends", tmp_path, 3, gpus_per_rank=1), AT_ONCE)
    assert not list((tmp_path / "logs").glob("attempt-*")), "nothing was started"


@pytest.mark.ray
def test_ranks_on_one_node_see_all_their_devices(nodes: RayNodes, tmp_path: Path) -> None:
    RayLauncher(address=nodes.address).run(job_of("devices", tmp_path, 2, gpus_per_rank=1), AT_ONCE)
    said = [(tmp_path / "logs" / "attempt-001" / f"rank-{rank}" / "stdout.log").read_text() for rank in range(2)]
    assert said == ["0 of 0,1", "1 of 0,1"]


# ---- nodes that are not fit, actors that are lost -------------------------------------------------------------------


@pytest.mark.ray
def test_a_folder_that_a_node_does_not_see(nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that means another folder in every process stands for a disk that is not shared."""
    monkeypatch.chdir(tmp_path)
    events: list[JobEvent] = []
    with pytest.raises(FolderNotShared, match=r"does not see .*SIHE_HOME") as caught:
        job = job_of("ends", tmp_path, log_dir=Path("/proc/self/cwd/logs"))
        RayLauncher(address=nodes.address).run(job, AT_ONCE, on_event=events.append)
    assert caught.value.node
    assert events == []


@pytest.mark.ray
def test_a_node_without_sihe(tmp_path: Path) -> None:
    (tmp_path / "sihe").mkdir()
    (tmp_path / "sihe" / "__init__.py").write_text("")
    with ray_nodes(0) as alone:
        alone.add(env_vars={"PYTHONPATH": str(tmp_path)})
        with pytest.raises(NodeUnfit, match=r"cannot run ranks.*sihe"):
            RayLauncher(address=alone.address).run(job_of("ends", tmp_path, 1), AT_ONCE)


@pytest.mark.ray
def test_a_killed_actor_takes_its_rank_along_and_all_start_again(nodes: RayNodes, tmp_path: Path) -> None:
    launcher = RayLauncher(address=nodes.address, placement="spread")
    events: list[JobEvent] = []

    def on_event(event: JobEvent) -> None:
        events.append(event)
        if isinstance(event, RanksStarted):
            if event.attempt == 1:
                os.kill(parent_of(event.pids[1]), signal.SIGKILL)
            else:
                launcher.stop()

    with pytest.raises(JobStopped):
        launcher.run(job_of("waits", tmp_path), AT_ONCE, on_event=on_event)
    first, failed, _, second = events
    assert isinstance(first, RanksStarted)
    assert isinstance(failed, RankFailed)
    assert isinstance(second, RanksStarted)
    assert (failed.rank, failed.pid, failed.signal, failed.exit_code) == (1, first.pids[1], None, None)
    assert failed.reason == f"was lost when its actor died, on node {first.hosts[1]}"
    for pid in (*first.pids, *second.pids):  # one whose actor was killed dies by the kernel's hand, a moment later
        while Path(f"/proc/{pid}").exists():
            pass


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
