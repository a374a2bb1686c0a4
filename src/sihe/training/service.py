"""Training runs: opened, supervised, continued after an interruption, registered as model versions with lineage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sihe.cluster.errors import JobStopped
from sihe.cluster.launchers.choice import chosen
from sihe.cluster.types import ProcessJob, RestartPolicy, WatchPolicy
from sihe.core.errors import Busy, CorruptData, NotFound, SiheError
from sihe.core.files import exclusive
from sihe.core.telemetry import logger
from sihe.training import layout
from sihe.training.config import TrainConfig
from sihe.training.ledger import Follower, Ledger
from sihe.training.plan import TrainPlan, make_plan
from sihe.training.types import RunOpened, TrainEvent, TrainResult, TrainRun

if TYPE_CHECKING:
    from sihe.cluster.ports import Launcher
    from sihe.core.tracking import ModelVersion, Run, RunStatus
    from sihe.core.workspace import Workspace

EXPERIMENT = "pretraining"
_IDENTITY_TAG = "sihe.identity"
_log = logger(__name__)


class TrainingService:
    """Trains models in a workspace. `launcher` starts the ranks: by default the one that the settings name."""

    def __init__(self, workspace: Workspace, *, launcher: Launcher | None = None) -> None:
        self._workspace = workspace
        self._launcher = launcher

    def plan(self, config: TrainConfig) -> TrainPlan:
        """Checks `config` against its data set. Raises what `sihe.training.plan.make_plan` does."""
        return make_plan(config, self._workspace.path("datasets"))

    def train(
        self,
        config: TrainConfig,
        *,
        resume: Literal["auto", "never"] = "auto",
        on_event: Callable[[TrainEvent], None] | None = None,
    ) -> TrainResult:
        """Trains to the end and registers the model.

        With `resume="auto"` the newest unfinished run that computes the same (configuration and data set) is
        continued from its newest valid checkpoint, under its old id; "never" starts a new run. `on_event` is called in
        this thread.

        Raises `UserError`s of the input (nothing is lost: the same call continues), `RanksLost`, `JobStopped`.
        """
        plan = self.plan(config)
        with self._claim(plan, resume) as (run_id, folder, resumed):
            try:
                result = self._run(plan, run_id, folder, on_event or _ignore, resumed=resumed)
            except BaseException as error:
                self._close(run_id, "KILLED" if isinstance(error, JobStopped | KeyboardInterrupt) else "FAILED")
                raise
            self._workspace.tracking.end_run(run_id, "FINISHED")
        return result

    def runs(self, *, limit: int = 50) -> list[TrainRun]:
        """The newest runs, newest first."""
        return [self._describe(run) for run in self._workspace.tracking.runs(EXPERIMENT, limit=limit)]

    def run(self, run_id: str) -> TrainRun:
        """One run. Raises `NotFound`."""
        found = self._workspace.tracking.run(run_id)
        if found.experiment != EXPERIMENT:
            raise NotFound("training run", run_id, hint=f"it is a run of {found.experiment!r}")
        return self._describe(found)

    def folder(self, run_id: str) -> Path:
        """Where a run keeps its log, checkpoints and model."""
        return self._workspace.path("runs", run_id)

    def register_checkpoint(self, run_id: str, step: int) -> ModelVersion:
        """Makes the checkpoint of `step` a version of the run's model, such as an early one to compare with.

        Raises `NotFound` for a step without a checkpoint.
        """
        from sihe.training.export import export_checkpoint

        self.run(run_id)
        folder = self.folder(run_id)
        plan = TrainPlan.read(folder / layout.PLAN)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            target = Path(scratch) / layout.MODEL
            export_checkpoint(folder, step, target)
            name, tags = plan.config.model_name, _version_tags(plan, step)
            return self._workspace.tracking.register_model(name, target, run_id=run_id, tags=tags)

    # ---- opening --------------------------------------------------------------------------------------------------

    @contextmanager
    def _claim(self, plan: TrainPlan, resume: str) -> Iterator[tuple[str, Path, bool]]:
        """A run for `plan` that no other supervisor has: an unfinished one, or a new one. Held until the exit."""
        if resume == "auto":
            for run_id in self._unfinished(plan):
                folder = self.folder(run_id)
                with suppress(_Taken):
                    with _held(folder):
                        self._workspace.tracking.end_run(run_id, "RUNNING")
                        plan.write(folder / layout.PLAN)  # ranks and intervals may have changed
                        yield run_id, folder, True
                    return
        plan.check_space(self._workspace.home)
        run_id = self._open(plan)
        folder = self.folder(run_id)
        with _held(folder):
            plan.write(folder / layout.PLAN)
            yield run_id, folder, False

    def _open(self, plan: TrainPlan) -> str:
        params = {**plan.config.public(), "num_parameters": plan.model.num_parameters}
        params["settings"] = self._workspace.settings.public()
        run_id = self._workspace.tracking.start_run(
            EXPERIMENT,
            plan.config.model_name,
            params=params,
            tags={_IDENTITY_TAG: plan.identity_digest, "dataset": plan.dataset_key},
        )
        self._workspace.tracking.link(f"run:{run_id}", [plan.dataset_key])
        return run_id

    def _unfinished(self, plan: TrainPlan) -> list[str]:
        """Runs that compute the same as `plan` and did not finish, newest first."""
        return [
            run.id
            for run in self._workspace.tracking.runs(EXPERIMENT, limit=1000)
            if run.tags.get(_IDENTITY_TAG) == plan.identity_digest and run.status != "FINISHED"
        ]

    # ---- running --------------------------------------------------------------------------------------------------

    def _run(
        self, plan: TrainPlan, run_id: str, folder: Path, on_event: Callable[[TrainEvent], None], *, resumed: bool
    ) -> TrainResult:
        config, tracking = plan.config, self._workspace.tracking
        ledger = Ledger(folder / layout.EVENTS)
        follower = Follower(
            ledger,
            tracking,
            self._workspace.clock,
            run_id,
            log_every=config.log_every,
            max_steps=config.max_steps,
            on_event=on_event,
        )
        follower.replay()
        size = plan.model.num_parameters
        on_event(RunOpened(run_id, folder, config.max_steps, size, config.tokens_per_step, resumed))
        job, policy = _job(plan, run_id, folder), _policy(config)
        try:
            restarts = self._launch(job, policy, on_event, follower.tick)
        except BaseException:
            with _also("curves_not_logged"):
                follower.finish()
            raise
        follower.finish()
        last = ledger.last
        if last is None or last.step != config.max_steps:
            raise CorruptData(folder / layout.EVENTS, f"the log of the run ends before step {config.max_steps}")
        version = self._register(plan, run_id, folder)
        return TrainResult(run_id, version, folder, last.step, last.loss, ledger.tokens_per_s, restarts)

    def _launch(
        self,
        job: ProcessJob,
        policy: RestartPolicy,
        on_event: Callable[[TrainEvent], None],
        on_tick: Callable[[], None],
    ) -> int:
        if self._launcher is None:
            self._launcher = chosen(self._workspace.settings.cluster)
        return self._launcher.run(job, policy, on_event=on_event, on_tick=on_tick)

    def _register(self, plan: TrainPlan, run_id: str, folder: Path) -> ModelVersion:
        """The run's model version; made once, also when the supervisor died right after."""
        config, tracking = plan.config, self._workspace.tracking
        made_before = tracking.model_versions(config.model_name)  # those with a step are checkpoints
        version = next((made for made in made_before if made.run_id == run_id and "step" not in made.tags), None)
        if version is None:
            version = tracking.register_model(
                config.model_name,
                folder / layout.MODEL,
                run_id=run_id,
                tags={"parameters": str(plan.model.num_parameters), "precision": config.precision},
            )
        tracking.link(version.key, [f"run:{run_id}"])
        if config.alias:
            tracking.set_alias(config.model_name, config.alias, version.version)
        return version

    def _close(self, run_id: str, status: RunStatus) -> None:
        """Notes how the run ended. On a full disk that cannot be noted; the listing then finds no supervisor."""
        with _also("run_status_not_written"):
            self._workspace.tracking.end_run(run_id, status)

    # ---- listing --------------------------------------------------------------------------------------------------

    def _describe(self, run: Run) -> TrainRun:
        folder = self.folder(run.id)
        ledger = Ledger(folder / layout.EVENTS)
        ledger.read()
        try:
            config = json.loads((folder / layout.PLAN).read_bytes())["config"]
        except (OSError, ValueError, KeyError):  # trained elsewhere, or its folder was removed
            config = dict(run.params)
        status: str = run.status
        if status == "RUNNING" and not _is_held(folder):
            status = "INTERRUPTED"
        return TrainRun(
            id=run.id,
            name=run.name,
            status=status,
            started_at=run.started_at,
            step=ledger.last.step if ledger.last else 0,
            max_steps=int(config.get("max_steps", 0)),
            loss=ledger.last.loss if ledger.last else None,
            tokens_per_s=ledger.tokens_per_s if ledger.last else None,
            config=config,
        )


def _job(plan: TrainPlan, run_id: str, folder: Path) -> ProcessJob:
    config, recovery = plan.config, plan.config.recovery
    sizes = config.world_sizes
    return ProcessJob(
        name=run_id,
        module="sihe.training.worker",
        args=(str(folder),),
        world_size=config.plan.world_size,
        log_dir=folder / layout.LOGS,
        threads_per_rank=plan.threads_per_rank,
        world_sizes=sizes,
        capacity_file=folder / layout.WORKERS if len(sizes) > 1 else None,
        watch=WatchPolicy(
            hang_timeout_s=recovery.quiet_s(config.collective_timeout_s),
            startup_timeout_s=recovery.startup_timeout_s,
            straggler_factor=recovery.straggler_factor,
            straggler_window=recovery.straggler_window,
        ),
    )


def _policy(config: TrainConfig) -> RestartPolicy:
    recovery = config.recovery
    return RestartPolicy(
        max_restarts=config.max_restarts,
        seed=config.seed,
        window_s=recovery.restart_window_s,
        capacity_timeout_s=recovery.capacity_timeout_s,
    )


def _version_tags(plan: TrainPlan, step: int) -> dict[str, str]:
    parameters = str(plan.model.num_parameters)
    return {"parameters": parameters, "precision": plan.config.precision, "step": str(step)}


class _Taken(Exception):
    """Another supervisor has the run."""


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Marks the run as supervised by this process; freed by the system when it dies. Raises `_Taken`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder / layout.LOCK, timeout_s=0))
        except Busy as error:
            raise _Taken from error
        yield


def _is_held(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        with _held(folder):
            return False
    except _Taken:
        return True


@contextmanager
def _also(event: str) -> Iterator[None]:
    """Something that is also wanted while an error is on its way: it must not hide that error."""
    try:
        yield
    except SiheError as error:
        _log.warning(event, reason=str(error))


def _ignore(_event: TrainEvent) -> None:
    """Nobody listens."""
