"""`fit`: a network is trained, and continues bit for bit where a kill or Ctrl-C stopped it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.errors import TrainingError
from fxq.quant.augment import augmented
from fxq.training.checkpoint import FILE, Checkpoint, Position, Row
from fxq.training.data import (
    Samples,
    check_labels,
    derived_seed,
    epoch_order,
    fetch,
    share_of,
    steps_per_epoch,
)
from fxq.training.distill import divergence, own_teacher, wanted_logits
from fxq.training.interrupts import Interrupts
from fxq.training.log import Log, alpha_columns, draw_curves
from fxq.training.network import compiler_trouble, device_of, evaluating, state_of
from fxq.training.optimizer import make_optimizer, momentum_of, restore_momentum, set_rates
from fxq.training.options import TrainingOptions
from fxq.training.schedule import rate_factor
from fxq.training.watch import Moment, Training, Watch
from fxq.training.widths import begin_training, draw_widths, width_columns
from fxq.workspace import digest
from fxq.world import World

FIRST_STEP = "torch.compile works for a minute or two in the first step; later steps are faster"

Evaluate = Callable[[nn.Module], float | None]
Columns = Callable[[nn.Module], Mapping[str, float]]


def fit(
    module: nn.Module,
    data: Samples,
    options: TrainingOptions | None = None,
    *,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    columns: Columns | None = None,
    folder: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    checkpoint_seconds: float = 60.0,
    watch: Watch | None = None,
) -> Training:
    """The network is trained by the cross entropy of its logits, or to follow a teacher's.

    With a folder it keeps a checkpoint there after every epoch, every so many seconds, and when it
    is interrupted; the same call then continues to the same bits, on as many threads. Where torch's
    process group is initialized, each process takes its share of every batch, and the first one
    writes the files and measures.

    Args:
        module: Any network that gives logits ``[N, classes, …]``; it is trained in place, on its
            device. One in eval mode is put into train mode; in one that is in train mode already,
            parts in eval mode stay so.
        data: A map-style data set of ``(input, …, label)``; an incomplete last batch is left out.
        options: How to train.
        teacher: A network of the same classes that ``options.distill`` asks to follow. A copy of it
            runs in eval mode.
        evaluate: Measures the network after every epoch; it is in eval mode then.
        columns: Gives more columns of the log after every epoch, by name.
        folder: Where checkpoint, log and curves are kept.
        identity: What else a checkpoint must agree with, by name.
        checkpoint_seconds: Time between checkpoints within an epoch.
        watch: What to call meanwhile.

    Raises:
        SpecError: The options ask for a teacher, and there is none.
        TrainingError: The data or the teacher does not fit, the loss is no longer finite, or the
            checkpoint in the folder is damaged or belongs to another training.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(64, 4)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
        >>> training = fit(nn.Linear(4, 2), data, TrainingOptions(batch_size=16, lr=0.5))
        >>> len(training.losses), training.losses[-1] < training.losses[0] / 2
        (40, True)
    """
    chosen = options or TrainingOptions()
    guide = own_teacher(teacher, chosen, device_of(module))
    known = {**(identity or {}), "teacher": None if guide is None else digest(state_of(guide))}
    run = _Run(module, data, chosen, known, folder, watch or Watch())
    run.teacher = guide
    run.evaluate, run.columns, run.interval = evaluate, columns, checkpoint_seconds
    if not module.training:
        module.train()
    begin_training(module, run.per_epoch)
    with run.deterministic(), Interrupts() as interrupts:
        run.interrupts = interrupts
        run.resume()
        run.train()
    return run.result()


class _Run:
    """A training under way."""

    teacher: nn.Module | None = None
    evaluate: Evaluate | None = None
    columns: Columns | None = None
    interval = math.inf

    def __init__(
        self,
        module: nn.Module,
        data: Samples,
        options: TrainingOptions,
        identity: dict[str, Any],
        folder: str | Path | None,
        watch: Watch,
    ) -> None:
        self.module, self.data, self.options = module, data, options
        self.world = World.current()
        self.watch = watch if self.world.is_first else Watch()
        self.per_epoch = steps_per_epoch(data, options.batch_size, self.world.processes)
        self.device = device_of(module)
        self.folder = None if folder is None else Path(folder)
        self.identity = identity | self._own_identity()
        self.optimizer = make_optimizer(module, options)
        self.position = Position()
        self.continued_at = 0
        self.interrupts = Interrupts()
        self._is_whole = True  # no step is half made
        self._order = torch.empty(0, dtype=torch.int64)
        self._log: Log | None = None

    def _own_identity(self) -> dict[str, Any]:
        state = [(n, v.dtype, list(v.shape)) for n, v in state_of(self.module).items()]
        return {
            "network": digest(state),
            "number_of_samples": len(self.data),
            "number_of_processes": self.world.processes,
            "device": self.device.type,
            **self.options.to_json(),
        }

    @contextlib.contextmanager
    def deterministic(self) -> Iterator[None]:
        """What torch draws in the body leaves its generators as they were."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            yield

    # ---- continuing ----------------------------------------------------------------------------

    def resume(self) -> None:
        """The training is where its checkpoint was, or at the beginning."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE
        if self.world.is_first:
            for half in self.folder.glob(f"{FILE}.*"):  # what a kill left
                half.unlink()
        if path.exists():
            found = Checkpoint.load(path)
            found.check_identity(self.identity, path)
            self.module.load_state_dict(found.model)
            restore_momentum(self.module, self.optimizer, found.momentum)
            self.position = found.position
            self.continued_at = found.position.step
            total = self.options.epochs * self.per_epoch
            self.watch.tell(f"continued at step {self.continued_at} of {total}")
        self.world.wait()  # nobody writes before all have read

    def save(self) -> None:
        """The checkpoint is what was trained until now; one that is not finite is not kept."""
        if self.folder is None or not self.world.is_first:
            return
        if not all(bool(p.isfinite().all()) for p in self.module.parameters()):
            raise self._diverged("the weights are")
        momentum = momentum_of(self.module, self.optimizer)
        state = state_of(self.module)
        Checkpoint(self.identity, self.position, state, momentum).save(self.folder / FILE)

    # ---- training ------------------------------------------------------------------------------

    def train(self) -> None:
        """Every epoch that is left has been trained, measured and kept."""
        network = self._prepared()
        with contextlib.ExitStack() as stack:
            if self.folder is not None and self.world.is_first:
                rows, losses = self.position.rows, self.position.losses
                self._log = stack.enter_context(
                    Log(self.folder, self.per_epoch, self._rate, losses, rows)
                )
            try:
                while len(self.position.rows) < self.options.epochs:
                    self._epoch(network)
            except KeyboardInterrupt:
                if self._is_whole:
                    self.save()
                raise
        if self.folder is not None and self.world.is_first:
            draw_curves(self.folder, self.position.losses, self.position.rows)
            draw_widths(self.folder)

    def _prepared(self) -> Callable[..., Any]:
        """The network as it is called: shared between processes, and compiled where asked for."""
        network = self.world.wrapped(self.module, self.device)
        if not self.options.compile:
            return network
        trouble = compiler_trouble(self.device)
        if trouble:
            self.watch.tell(f"torch.compile does not work here and is left out: {trouble}")
            return network
        self.watch.tell(FIRST_STEP)
        return torch.compile(network)

    def _epoch(self, network: Callable[..., Any]) -> None:
        epoch = len(self.position.rows)
        start, due = time.monotonic(), time.monotonic() + self.interval
        before = self.position.seconds
        self._order = epoch_order(len(self.data), self.options.seed, epoch)
        while self.position.step < (epoch + 1) * self.per_epoch:
            self._step(network, epoch)
            self.position.seconds = before + time.monotonic() - start
            self.watch.on_step(self._moment(epoch))
            if time.monotonic() >= due:
                self.save()
                due = time.monotonic() + self.interval
        self._finish(epoch)
        if self._is_asked():
            raise KeyboardInterrupt

    def _step(self, network: Callable[..., Any], epoch: int) -> None:
        step = self.position.step
        inputs, labels = self._batch(epoch, step)
        set_rates(self.optimizer, rate_factor(step, self.per_epoch, self.options))
        torch.manual_seed(derived_seed(self.options.seed, epoch, step, self.world.rank))
        self._is_whole = False
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp):
            logits = network(*inputs)
        check_labels(logits, labels)
        loss = self._loss(inputs, logits.float(), labels)
        hits = int((logits.argmax(1) == labels).sum()) / (labels.numel() / len(labels))
        shares = [loss.item() / self.world.processes, hits, float(self.interrupts.asked)]
        mean_loss, correct, is_asked = self.world.summed(shares, self.device)
        if not math.isfinite(mean_loss):
            raise self._diverged(f"the loss is {mean_loss},")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.options.clip_gradients is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.options.clip_gradients)
        self.optimizer.step()
        self.position.losses.append(mean_loss)
        self.position.correct += correct
        self._is_whole = True
        if self._log is not None:
            self._log.add(step, mean_loss)
        if is_asked:  # in every process after the same step
            raise KeyboardInterrupt

    def _loss(self, inputs: list[Tensor], logits: Tensor, labels: Tensor) -> Tensor:
        smoothing, share = self.options.label_smoothing, self.options.distill
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        wanted = wanted_logits(self.teacher, inputs, logits)
        return (1 - share) * loss + share * divergence(logits, wanted, self.options.temperature)

    def _batch(self, epoch: int, step: int) -> tuple[list[Tensor], Tensor]:
        """This process's share of the batch of a step, on the network's device."""
        start = (step % self.per_epoch) * self.options.batch_size
        chosen = self._order[start : start + self.options.batch_size]
        inputs, labels = fetch(self.data, share_of(chosen, self.world.rank, self.world.processes))
        generator = torch.Generator()
        generator.manual_seed(derived_seed(self.options.seed, epoch, step, self.world.rank, 1))
        moved = [value.to(self.device) for value in inputs]
        changed = [augmented(value, self.options.augmentation, generator) for value in moved]
        return changed, labels.to(self.device)

    def _finish(self, epoch: int) -> None:
        """The epoch has been measured, logged and kept."""
        losses = self.position.losses[epoch * self.per_epoch :]
        row: Row = {
            "epoch": epoch + 1,
            "step": self.position.step,
            "lr": self._rate(self.position.step - 1),
            "train_loss": math.fsum(losses) / len(losses),
            "train_accuracy": self.position.correct / (len(losses) * self.options.batch_size),
            "test_accuracy": self._measured(),
            "seconds": round(self.position.seconds, 3),
            **alpha_columns(self.module),
            **width_columns(self.module),
        }
        if self.columns is not None:
            with torch.no_grad():
                row |= self.columns(self.module)
        self.position.rows.append(row)
        self.position.correct = self.position.seconds = 0.0
        self.save()
        if self._log is not None:
            self._log.write_rows(self.position.rows)
            self._log.write_widths(self.module, epoch + 1)
        self.watch.on_epoch(row)

    def _measured(self) -> float | None:
        if self.evaluate is None:
            return None
        value = None
        if self.world.is_first:
            with torch.no_grad(), evaluating(self.module):
                value = self.evaluate(self.module)
        return self.world.of_first(value, self.device)

    # ---- telling -------------------------------------------------------------------------------

    def result(self) -> Training:
        """What came out."""
        position = self.position
        return Training(
            self.module, tuple(position.rows), tuple(position.losses), self.continued_at
        )

    def _rate(self, step: int) -> float:
        return self.options.lr * rate_factor(step, self.per_epoch, self.options)

    def _is_asked(self) -> bool:
        """Whether somebody pressed Ctrl-C, in any process."""
        (asked,) = self.world.summed([float(self.interrupts.asked)], self.device)
        return bool(asked)

    def _moment(self, epoch: int) -> Moment:
        losses = self.position.losses[epoch * self.per_epoch :]
        return Moment(
            epoch + 1,
            self.options.epochs,
            len(losses),
            self.per_epoch,
            math.fsum(losses) / len(losses),
            self.position.correct / (len(losses) * self.options.batch_size),
            self._rate(self.position.step - 1),
        )

    def _diverged(self, what: str) -> TrainingError:
        epoch, step = divmod(self.position.step, self.per_epoch)
        kept = ""
        if self.folder is not None and (self.folder / FILE).exists():
            last = Checkpoint.load(self.folder / FILE).position.step
            kept = f"; the last good checkpoint, of step {last}, is kept in {self.folder / FILE}"
        return TrainingError(
            f"{what} not finite any more{kept}",
            where=f"epoch {epoch + 1}, step {step + 1} of {self.per_epoch}",
            hint="begin anew with a smaller learning rate, with warm-up, or with gradient clipping",
        )
