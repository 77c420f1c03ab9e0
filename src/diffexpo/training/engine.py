"""The optimiser loop of an iteration: exact means over any split, one synchronisation a step, resume by step.

    gradient of a step = sum over processes and micro-batches of factor * gradient(micro-batch's mean loss)

with factors that add up to the mean over the whole global batch. Nothing here knows diffusion: the loss is
the algorithm's, and its random numbers are keyed by (run seed, iteration, "train", step, pair), never by
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from diffexpo.config.schema import TrainingConfig
from diffexpo.data.sharing import ReadsRows
from diffexpo.errors import Interrupted, ResumeError, TrainingError
from diffexpo.phases import phase
from diffexpo.rng import keyed_seed
from diffexpo.training.background import Background
from diffexpo.training.batches import each_micro_batch, micro_batches, move_batch, process_share
from diffexpo.training.checkpoint import Checkpoint, load_latest, read_checkpoint, save_checkpoint
from diffexpo.training.distributed import World
from diffexpo.training.metrics import MetricsWriter
from diffexpo.training.optimizer import (
    Average,
    LossScale,
    OptimizerState,
    learning_rate,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
)
from diffexpo.training.progress import Progress, TrainReport, check_identity
from diffexpo.training.selfcheck import (
    CHECKED_ROWS,
    check_agreement,
    check_gradients,
    check_trainable,
    measure_against_itself,
)
from diffexpo.types import (
    Algorithm,
    Batch,
    FollowsSteps,
    LearnsInParts,
    LossOutput,
    MeasuresBatch,
    Policy,
)

OLD = "old"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Loader(Protocol):
    """Gives the global batch of any optimiser step, from 0, without replaying the ones before."""

    def batch(self, step: int) -> Batch: ...


class Share(NamedTuple):
    """A global batch, whose rows may be unread, and the micro-batches of this process with their factors."""

    whole: Batch
    parts: list[tuple[Batch, float]]


@dataclass(eq=False)
class Engine:
    """Trains a policy's "current" weights with an algorithm, one iteration at a time.

    The policy's "reference" is set by the caller; `metrics` gets each step's line (rank 0 only).
    `initial_loss` is the loss's value when current and reference agree, for the start-up check; None: not
    checked. `warn` gets lines that a person should see; default: the log.
    """

    policy: Policy
    algorithm: Algorithm
    settings: TrainingConfig
    metrics: MetricsWriter
    _: KW_ONLY
    world: World = field(default_factory=World)
    initial_loss: float | None = None
    warn: Callable[[str], None] | None = None
    _stopped: Interrupted | None = field(default=None, init=False)

    @property
    def micro_steps(self) -> int:
        """Micro-batches (calls of `tick`) of a step on this process; roughly so where groups stay whole."""
        first, last = process_share(self.settings.batch_size, self.world.rank, self.world.size)
        return math.ceil((last - first) / self.settings.micro_batch_size)

    # Many parameters because one engine trains every iteration, each with its own length, folder and seed.
    @phase("training")
    def train_iteration(
        self,
        iteration: int,
        loader: Loader,
        *,
        steps: int,
        checkpoint_dir: Path,
        run_seed: int,
        tick: Callable[[], None] = lambda: None,
        optimizer_state: OptimizerState | None = None,
        is_checked: bool = True,
        starts_apart: bool = False,
    ) -> TrainReport:
        """Train one iteration, from its newest valid checkpoint if there is one.

        Args:
            iteration: Its number; with `run_seed` part of every key.
            loader: Global batches of the iteration's `steps`; `checkpoint_dir` is for this iteration alone.
            tick: Called after every micro-batch; may raise Interrupted. Steps done before a resume are ticked
                too.
            optimizer_state: Of an earlier iteration's report, to go on with; default: a fresh optimiser.
            is_checked: Check the first step before it moves the weights. A loss that clips to the reference
                has no gradient left where the policy is far from it, so later iterations of such methods go
                without.
            starts_apart: "current" need not be what the loss measures it against. Else the first step shows
                that they agree; here a few rows run once more for that, with the policy as its own reference.
        Returns:
            The report; "current" holds the iterate (the average of the weights where `ema_decay` is set).
        Raises:
            Interrupted: `tick` raised it; the last whole step is saved.
            TrainingError: the start-up check failed, or too many steps in a row were not finite.
            ResumeError: the checkpoint is of another run.
        """
        self._stopped = None
        run = self._begin(iteration, steps, Path(checkpoint_dir), run_seed, optimizer_state)
        self.metrics.rewind(iteration, run.step)
        try:
            if run.step == 0 and is_checked:
                self._check_start(run, loader, starts_apart)
            for _ in range(run.step * self.micro_steps):
                self._tick(tick)
            ahead = self._read_ahead(loader, run.step)
            while run.step < steps:
                batch = ahead.result()
                if run.step + 1 < steps:
                    ahead = self._read_ahead(loader, run.step + 1)
                self._take_step(run, batch, tick)
                if self._stopped is not None:
                    raise self._stopped
                if run.step % self.settings.checkpoint_every == 0 and run.step < steps:
                    self._save(run, checkpoint_dir)
        except Interrupted as interrupted:
            if run.step > run.saved_at:
                self._save(run, checkpoint_dir)
            # No process may leave, and be missed by the launcher, while rank 0 is still saving.
            self.world.barrier()
            where = f"(iteration {iteration}, step {run.step} of {steps})"
            raise Interrupted(f"{interrupted} {where}") from interrupted
        finally:
            run.optimizer.zero_grad()
        if run.average is not None:
            averaged = {name: value.cpu() for name, value in run.average.tensors.items()}
            self.policy.weights.load("current", averaged)
        state = optimizer_tensors(run.optimizer, run.parameters)
        return TrainReport(steps, run.skipped, run.resumed_from, run.tail_means(), state)

    def _check_start(self, run: Progress, loader: Loader, starts_apart: bool) -> None:
        """Check what can be seen before the first step; the rest, that step shows (`_check_step`)."""
        check_trainable(run.parameters)
        run.awaits_check, run.shows_agreement = True, not starts_apart
        if not starts_apart or not self.algorithm.settings.shows_agreement:
            return
        values = None
        if self.world.rank == 0:
            rows = min(self.settings.micro_batch_size, CHECKED_ROWS)
            part, _ = next(each_micro_batch(_unread(loader, 0), rows))
            part, key = move_batch(part, self.policy.device), (run.run_seed, run.iteration, "train", 0)
            with self.autocast():
                values = measure_against_itself(self.policy, self.algorithm, part, key)
        self._check_agreement(self.world.broadcast_object(values))

    def _check_step(self, run: Progress, values: Mapping[str, float], largest: Sequence[float]) -> None:
        """Check the first finite step, before which nothing has moved: the same numbers in all processes."""
        check_gradients(dict(zip(run.parameters, largest, strict=True)))
        if run.shows_agreement and self.algorithm.settings.shows_agreement:
            self._check_agreement(values)
        run.awaits_check = False

    def _check_agreement(self, values: Mapping[str, float]) -> None:
        is_exact = self.policy.device.type == "cpu" and self.settings.mixed_precision == "no"
        check_agreement(values, self.initial_loss, is_exact)

    def _read_ahead(self, loader: Loader, step: int) -> Background[Share]:
        """This process's rows of a step, read while the step before is trained."""

        def read() -> Share:
            batch, size = _unread(loader, step), self.settings.micro_batch_size
            return Share(batch, micro_batches(batch, size, self.world.rank, self.world.size))

        return Background(read, name="batches")

    def _take_step(self, run: Progress, batch: Share, tick: Callable[[], None]) -> None:
        """One optimiser step: gradients of all processes, finite check, clip, update, metrics line."""
        noise_key = (run.run_seed, run.iteration, "train", run.step)
        # Losses are keyed; this is for networks that draw from torch's own generator all the same (dropout).
        torch.manual_seed(keyed_seed(*noise_key, "global", self.world.rank))
        sums = self._accumulate(run, batch, noise_key, tick)
        gradients = [_gradient(parameter) for parameter in run.parameters.values()]
        self.world.all_reduce_sum(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        seen = [gradient.abs().amax() for gradient in gradients] if run.awaits_check else []
        values, grad_norm, largest = self._merge(sums, norm, seen)
        grad_norm /= run.scale.value
        rate = learning_rate(run.step, run.steps, self.settings)
        is_finite = math.isfinite(grad_norm) and math.isfinite(values["train/loss"])
        loss_scale = run.scale.value
        if is_finite:
            if run.awaits_check:
                self._check_step(run, values, largest)
            clip = min(1.0, self.settings.max_grad_norm / (grad_norm + 1e-6)) / loss_scale
            if clip != 1.0:
                torch._foreach_mul_(gradients, clip)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.step()
            if isinstance(self.algorithm, FollowsSteps):
                with torch.no_grad():
                    self.algorithm.after_step(self.policy, run.step + 1)
            if run.average is not None:
                run.average.update()
            run.scale.accept()
            run.bad_in_a_row = 0
            run.tail.append(values)
        else:
            run.skipped += 1
            run.bad_in_a_row += 0 if run.scale.reject() else 1
        run.optimizer.zero_grad()
        run.step += 1
        if self.world.rank == 0:
            line = values | {"train/lr": rate, "train/grad_norm": grad_norm}
            line["train/skipped_steps"] = run.skipped
            if run.scale.is_dynamic:
                line["train/loss_scale"] = loss_scale
            self.metrics.write(run.iteration, run.step, "train", line)
        if run.bad_in_a_row >= self.settings.max_bad_steps:
            is_half = getattr(self.policy, "dtype", None) == torch.float16
            advice = "set model.dtype=bfloat16 or float32 (float16 overflows), " if is_half else ""
            raise TrainingError(
                f"iteration {run.iteration}, step {run.step}: {run.bad_in_a_row} steps in a row were not "
                f"finite (loss {values['train/loss']}, gradient norm {grad_norm}; rows "
                f"{', '.join(batch.whole.keys[:3])}, ...); lower training.learning_rate or algorithm.beta, "
                f"{advice}or look at these rows with `diffexpo data inspect`"
            )

    def _accumulate(
        self, run: Progress, batch: Share, noise_key: tuple[str | int, ...], tick: Callable[[], None]
    ) -> list[tuple[str, Tensor, float | Tensor]]:
        """Gradients of this process's micro-batches; (metric, sum, count) stay on the device: no waiting."""
        parts = batch.parts
        if self.algorithm.settings.measures_batch and isinstance(self.algorithm, MeasuresBatch):
            parts = self._measured(self.algorithm, batch, noise_key)
        sums: list[tuple[str, Tensor, float | Tensor]] = []
        for part, factor in parts:
            for output in self._losses(move_batch(part, self.policy.device), noise_key):
                (output.loss * (factor * run.scale.value)).backward()
                # The objective itself, so that its factors (which may differ from shares of pairs) are right
                # in the log too.
                sums.append(("train/loss", output.loss.detach() * factor, 0.0))
                sums.extend((name, *value) for name, value in output.metrics.items() if name != "train/loss")
            self._tick(tick)
        return sums

    def _losses(self, part: Batch, noise_key: tuple[str | int, ...]) -> Iterator[LossOutput]:
        """The loss of a micro-batch, or its parts: the graph of each is gone before the next is built."""
        if self.settings.pair_gradient == "joint" or not isinstance(self.algorithm, LearnsInParts):
            with self.autocast():
                output = self.algorithm.loss(self.policy, part, noise_key)
            yield output
            return
        outputs = self.algorithm.loss_in_parts(self.policy, part, noise_key)
        while True:
            with self.autocast():
                found = next(outputs, None)
            if found is None:
                return
            yield found

    def _measured(
        self, algorithm: MeasuresBatch, batch: Share, noise_key: tuple[str | int, ...]
    ) -> list[tuple[Batch, float]]:
        """The micro-batches with the number that their losses need of all rows of the batch, in whichever
        process they are."""
        found = []
        # A process without rows takes part in the sum all the same: it measures one row and adds nothing.
        for part, _ in batch.parts or islice(each_micro_batch(batch.whole, 1), 1):
            with self.autocast():
                measured = algorithm.measure(self.policy, move_batch(part, self.policy.device), noise_key)
            found.append(measured if batch.parts else torch.zeros_like(measured))
        total = torch.stack(found).sum(dim=0)
        self.world.all_reduce_sum([total])
        sums = total.cpu()
        return [(algorithm.with_measured(part, sums), factor) for part, factor in batch.parts]

    def _merge(
        self, sums: list[tuple[str, Tensor, float | Tensor]], norm: Tensor, others: list[Tensor]
    ) -> tuple[dict[str, float], float, list[float]]:
        """Means over all processes, the gradient norm and other numbers, with a single wait for the
        device."""
        below = [count for _, _, count in sums if isinstance(count, Tensor)]
        numbers = torch.stack([norm, *(value for _, value, _ in sums), *below, *others]).tolist()
        known = iter(numbers[1 + len(sums) :])
        counts = [next(known) if isinstance(count, Tensor) else count for _, _, count in sums]
        names = [name for name, _, _ in sums]
        rows = [list(row) for row in zip(names, numbers[1:], counts, strict=False)]
        if self.world.size > 1:
            stopped = None if self._stopped is None else str(self._stopped)
            gathered = self.world.gather_objects([{"rows": rows, "stopped": stopped}])
            rows = [row for part in gathered for row in part["rows"]]
            messages = [part["stopped"] for part in gathered if part["stopped"] is not None]
            self._stopped = Interrupted(messages[0]) if messages else None
        totals: dict[str, tuple[float, float]] = {}
        for name, number, count in rows:
            total, counted = totals.get(name, (0.0, 0.0))
            totals[name] = (total + number, counted + count)
        # train/loss comes as shares of the mean (count 0); everything else as sums with counts, which are 0
        # where no row of the step has the metric.
        occurs = {name: both for name, both in totals.items() if both[1] or name == "train/loss"}
        means = {name: total / (counted or 1.0) for name, (total, counted) in occurs.items()}
        return means, numbers[0], numbers[len(numbers) - len(others) :]

    def _tick(self, tick: Callable[[], None]) -> None:
        """With several processes a stop waits for the end of the step, where all agree on it."""
        try:
            tick()
        except Interrupted as interrupted:
            if self.world.size == 1:
                raise
            self._stopped = interrupted

    def autocast(self) -> AbstractContextManager[None]:
        """The precision in which the denoiser's forward is trained."""
        dtype = AUTOCAST.get(self.settings.mixed_precision)
        if dtype is None:
            return nullcontext()
        # No cache of cast weights: one made in the reference's no_grad pass would cut the gradient.
        return torch.autocast(self.policy.device.type, dtype=dtype, cache_enabled=False)

    def _begin(
        self, iteration: int, steps: int, folder: Path, run_seed: int, optimizer_state: OptimizerState | None
    ) -> Progress:
        """Fresh state, or the checkpoint's."""
        checkpoint = self._find_checkpoint(folder)
        if checkpoint is not None:
            check_identity(checkpoint, iteration, run_seed, steps)
            self.policy.weights.load("current", checkpoint.tensors["current"])
        self._check_same_start()
        self._set_moving_versions(checkpoint)
        parameters = self.policy.weights.trainable()
        settings = self.settings
        run = Progress(
            iteration=iteration,
            steps=steps,
            run_seed=run_seed,
            parameters=parameters,
            optimizer=make_optimizer(parameters.values(), settings),
            average=Average(parameters, settings.ema_decay) if settings.ema_decay > 0 else None,
            scale=LossScale(65536.0, True) if settings.mixed_precision == "fp16" else LossScale(),
        )
        run.optimizer.zero_grad()
        if checkpoint is not None:
            run.restore(checkpoint)
        elif optimizer_state:
            load_optimizer(run.optimizer, parameters, optimizer_state)
        return run

    def _set_moving_versions(self, checkpoint: Checkpoint | None) -> None:
        """Versions that change within an iteration are the checkpoint's. Without one the old policy starts as
        the current one, which drew the newest images; the reference is set."""
        card, weights = self.algorithm.settings, self.policy.weights
        if checkpoint is None:
            if card.needs_old_policy:
                weights.copy("current", OLD)
            return
        for name in card.moving_versions:
            if name not in checkpoint.tensors:
                missing = (
                    f"{checkpoint.path} has no version {name!r} of the weights, which the algorithm needs"
                )
                raise ResumeError(f"{missing}; resume with the configuration that wrote it")
            weights.load(name, checkpoint.tensors[name])

    def _find_checkpoint(self, folder: Path) -> Checkpoint | None:
        """Rank 0 chooses; the others read the same one."""
        checkpoint = load_latest(folder, self.warn) if self.world.rank == 0 else None
        name = self.world.broadcast_object(None if checkpoint is None else checkpoint.path.name)
        if name is None or self.world.rank == 0:
            return checkpoint
        return read_checkpoint(folder / name)

    def _check_same_start(self) -> None:
        """All processes must start from the same weights; else their updates would drift apart unseen."""
        if self.world.size == 1:
            return
        if len(set(self.world.gather_objects([self.policy.weights.fingerprint("current")]))) > 1:
            advice = "give all of them the same model and run folder"
            raise TrainingError(f"the processes start from different weights; {advice}")

    def _save(self, run: Progress, folder: Path) -> None:
        if self.world.rank == 0:
            self.metrics.sync()
            versions = ["current", *self.algorithm.settings.moving_versions]
            tensors = {name: self.policy.weights.state(name) for name in versions} | run.tensors()
            save_checkpoint(Path(folder), tensors, run.state())
        run.saved_at = run.step


def _unread(loader: Loader, step: int) -> Batch:
    return loader.unread_batch(step) if isinstance(loader, ReadsRows) else loader.batch(step)


def _gradient(parameter: Parameter) -> Tensor:
    """The parameter's gradient; zeros where no micro-batch of this process reached it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
