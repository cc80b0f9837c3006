"""The training loop, one for every kind of task.

A `Task` says what is trained, on what, and how it is drawn and exported; the loop does the rest: devices,
mixed precision, gradient accumulation and processes (accelerate), learning rate, EMA, logs, pictures,
checkpoints.

Every random number is a function of (seed, step, micro-step, process), and nothing is carried from step to
step but what a checkpoint holds: a run that is killed and resumed ends with the same bits as one that was
not.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from fastldm import io
from fastldm.errors import CheckpointError, ConfigError, TrainingError
from fastldm.memory import keep_freed_memory
from fastldm.models.captions import cutting_quietly
from fastldm.pictures import png_bytes
from fastldm.training.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    remove_leftovers,
    save_checkpoint,
)
from fastldm.training.config import TrainingConfig, differing_keys, to_mapping, to_yaml
from fastldm.training.data import StreamSampler, batches, derive_seed
from fastldm.training.ema import EMA
from fastldm.training.extras import require

# Keys that may change when a run is resumed: no finished step depended on them, except for max_steps, the
# length of the cosine, which may be moved to train for longer.
_FREE_ON_RESUME = {
    "output_dir",
    "name",
    "max_steps",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "sample_every",
    "export_dtype",
    "data.num_workers",
}


class Task(Protocol):
    """What the loop trains."""

    module: nn.Module
    """All that is trained; forward(batch, step=..., generator=...) returns the loss (float32 scalar) and a
    dictionary of scalars to log. Frozen networks are not part of it."""
    averaged: nn.Module
    """The part of `module` that is averaged (EMA), drawn and exported."""
    adversary: nn.Module | None
    """The part of `module` that has a loss of its own, a discriminator: its gradients are clipped apart."""
    dataset: Any
    """Map-style data set of dictionaries. One that can change between two runs of a configuration has a
    `fingerprint()`, JSON values with the number of "pictures", when the task is made."""
    every_step_trains_all: bool
    """Whether each step gives every trained parameter a gradient; else processes look for those without."""

    def to(self, device: torch.device) -> None:
        """Move the frozen networks (the loop moves `module`)."""

    def start(self, batch: dict) -> None:
        """Measure on the first batch what a fresh run needs (latent scaling, codebook)."""

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with (what `start` measured) or must find again, as JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with `state`; raises ConfigError where the task cannot. Called before `to`."""

    def prepare(self, batch: dict, generator: torch.Generator) -> dict:
        """What frozen networks do to a batch before `module` gets it."""

    def picture(self, seed: int) -> Any:
        """A PIL picture of what the module makes now."""

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the folder that from_pretrained loads."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training; the message says where the run can be resumed."""


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of optimiser step `step` (from 0): linear warmup, then constant or a half cosine to final_lr."""
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, config.max_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optimizer.final_lr + (optimizer.lr - optimizer.final_lr) * cosine


def train(
    config: TrainingConfig, build_task: Callable[[], Task], *, resume: bool = False, progress: bool = True
) -> Path:
    """Train to `config.max_steps` and export.

    Args:
        config: the run; it writes to config.output_dir/config.name.
        build_task: makes the task; called once, after the random seed is set.
        resume: go on from the newest checkpoint of the run, if there is one.
        progress: show a progress bar (terminals) or one line per `log_every` (elsewhere).

    Returns:
        The exported folder, output_dir/name/model.

    Raises:
        ConfigError: the run exists and `resume` is not set, or its configuration, its data, its first
            stage or its number of processes differs.
        CheckpointError: a checkpoint cannot be written or read.
        TrainingError: the loss, or something that a checkpoint would hold, is not finite.
        TrainingInterrupted: Ctrl-C; a checkpoint of the last finished step is written first.
    """
    return _Run(config, build_task, resume=resume, progress=progress).run()


def _leave_the_others() -> None:
    """Ends what joins the processes: its threads would now and then abort this one as it exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Run:
    def __init__(
        self, config: TrainingConfig, build_task: Callable[[], Task], *, resume: bool, progress: bool
    ) -> None:
        self.config = config
        self.folder = Path(config.output_dir) / config.name
        self.checkpoints = self.folder / "checkpoints"
        accelerate = require("accelerate")
        if config.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError("mixed_precision=fp16 needs a GPU; use bf16 or no")
        try:
            self.accelerator = accelerate.Accelerator(
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            )
        except ValueError as error:
            raise ConfigError(
                f"mixed_precision={config.mixed_precision} after a run with another one in the same process: "
                "accelerate fixes it once; start a new process"
            ) from error
        atexit.unregister(_leave_the_others)
        atexit.register(_leave_the_others)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        self.main = self.accelerator.is_main_process
        self.progress = progress and self.main
        latest = self._latest(resume)
        checkpoint = None if latest is None else self._load(latest)
        made = self._claim_folder() if self.main else []
        try:
            self._set_up(build_task, checkpoint, latest)
        except BaseException:
            _remove_empty(made)
            raise

    def _set_up(
        self, build_task: Callable[[], Task], checkpoint: Checkpoint | None, latest: Path | None
    ) -> None:
        """Everything from the task to the optimiser, as it was in the checkpoint if there is one."""
        config = self.config
        torch.manual_seed(config.seed)
        self.task = build_task()
        # Before `to`, which may put cached latents in the place of the pictures.
        fingerprint = getattr(self.task.dataset, "fingerprint", None)
        self.data = None if fingerprint is None else fingerprint()
        if checkpoint is not None:
            self._check_data(checkpoint, latest)
            self.task.load_state(checkpoint.task)
        if not self.task.every_step_trains_all:
            self.accelerator.ddp_handler = require("accelerate").DistributedDataParallelKwargs(
                find_unused_parameters=True
            )
        self.module = self.task.module
        with cutting_quietly():
            self.task.to(self.accelerator.device)
        self.module.to(self.accelerator.device)
        self.step = 0
        if checkpoint is None:
            # Every process measures on the first batch of process 0, so all of them start alike.
            self.task.start(self._to_device(next(self._batches(process=0))))
        else:
            load_weights(self.module, checkpoint, latest)
            self.step = checkpoint.step
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.clipped = {"grad_norm": self.parameters}
        if self.task.adversary is not None:
            # By one norm over both networks, the gradient of one would set the step of the other.
            others = [p for p in self.task.adversary.parameters() if p.requires_grad]
            theirs = {id(p) for p in others}
            ours = [p for p in self.parameters if id(p) not in theirs]
            self.clipped = {"grad_norm": ours, "discriminator_grad_norm": others}
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.ema = EMA(self.task.averaged, config.ema.decay) if config.ema.enabled else None
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint.optimizer)
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint.ema, checkpoint.ema_updates)
        self.forward, self.optimizer = self.accelerator.prepare(self.module, optimizer)
        if checkpoint is not None and checkpoint.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.scaler)
        self.pending: list[tuple[int, dict[str, torch.Tensor]]] = []

    def run(self) -> Path:
        config = self.config
        self._write_config()
        stop = threading.Event()
        bar = tqdm(
            total=config.max_steps,
            initial=self.step,
            desc=config.name,
            unit="step",
            disable=None if self.progress else True,
        )
        with bar, self._writer() as writer, _on_interrupt(stop), cutting_quietly():
            stream = self._batches(start=self.step)
            while self.step < config.max_steps:
                try:
                    self._one_step(stream)
                except ValueError as error:
                    # An op refuses weights that have diverged before `_log` sees the loss of the step.
                    if (what := self._divergence()) is not None:
                        self._fail(what, error)
                    raise
                bar.update()
                last = self.step == config.max_steps
                interrupted = self._anywhere(stop.is_set())
                save = last or interrupted or self.step % config.checkpoint_every == 0
                if save or self.step % config.log_every == 0:
                    self._log(writer, bar)
                if save:
                    self._save()
                if interrupted and not last:
                    raise TrainingInterrupted(
                        f"stopped at step {self.step} with a checkpoint in {self.checkpoints}; "
                        "go on with --resume"
                    )
                if last or (config.sample_every and self.step % config.sample_every == 0):
                    self._draw(writer)
        return self._export()

    def _one_step(self, stream: Iterator[dict]) -> None:
        config, accelerator = self.config, self.accelerator
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        sums: dict[str, torch.Tensor] = {}
        for micro in range(config.gradient_accumulation_steps):
            seed = derive_seed(config.seed, self.step, micro, accelerator.process_index)
            torch.manual_seed(seed)  # dropout and whatever else draws from the global generator
            generator = torch.Generator(accelerator.device).manual_seed(seed)
            batch = self.task.prepare(self._to_device(next(stream)), generator)
            with accelerator.accumulate(self.forward):
                loss, logs = self.forward(batch, step=self.step, generator=generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients and config.optimizer.max_grad_norm is not None:
                    logs.update(self._clip(config.optimizer.max_grad_norm))
                self.optimizer.step()
                self.optimizer.zero_grad()
            for key, value in {"loss": loss, **logs}.items():
                sums[key] = sums.get(key, 0) + value.detach().float()
        micro_steps = config.gradient_accumulation_steps
        means = {k: v if k in self.clipped else v / micro_steps for k, v in sums.items()}
        self.step += 1
        if self.ema is not None:
            self.ema.update()
        self.pending.append((self.step, means))

    def _clip(self, max_norm: float) -> dict[str, torch.Tensor]:
        """Clip each network's gradients by their own norm; the norms before that."""
        self.accelerator.unscale_gradients()
        norms = {k: nn.utils.clip_grad_norm_(group, max_norm) for k, group in self.clipped.items()}
        # A network without gradients (a discriminator that has not started) has a norm on the CPU.
        return {key: norm.to(self.accelerator.device) for key, norm in norms.items()}

    def _log(self, writer: Any, bar: tqdm) -> None:
        """Average the steps since the last call over steps and processes; stop on a loss that is not finite.

        Losses stay on the device until here, so that no step waits for the device.
        """
        if not self.pending:
            return
        steps = [step for step, _ in self.pending]
        keys = list(self.pending[0][1])
        table = torch.stack([torch.stack([means[key] for key in keys]) for _, means in self.pending])
        table = self.accelerator.reduce(table, reduction="mean").cpu()
        self.pending.clear()
        finite = torch.isfinite(table[:, keys.index("loss")])
        if not finite.all():
            self._fail(f"the loss of step {steps[int(finite.int().argmin())]} is not finite")
        if not self.main:
            return
        means = dict(zip(keys, table.mean(dim=0).tolist()))
        means["lr"] = learning_rate(self.step - 1, self.config)
        for key, value in means.items():
            writer.add_scalar(key, value, self.step)
        bar.set_postfix(loss=f"{means['loss']:.4g}")
        if self.progress and bar.disable:
            line = "  ".join(f"{key} {value:.4g}" for key, value in means.items())
            print(f"step {self.step}/{self.config.max_steps}  {line}", file=sys.stderr, flush=True)

    def _divergence(self) -> str | None:
        """What in this process is not finite in the middle of a step: an unlogged loss or a weight."""
        for step, means in self.pending:
            if not torch.isfinite(means["loss"]):
                return f"the loss of step {step} is not finite"
        name = _not_finite(self.module.state_dict().items())
        return None if name is None else f"{name} is not finite in step {self.step + 1}"

    def _saved_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of a checkpoint, with a name for a person; buffers that no optimiser trains too."""
        yield from self.module.state_dict().items()
        if self.ema is not None:
            yield from ((f"the average of {name}", value) for name, value in self.ema.average.items())
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            yield from ((f"{key} of {names[parameter]}", value) for key, value in state.items())

    def _fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        found = list_checkpoints(self.checkpoints)
        kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        raise TrainingError(f"{what}; {kept}; lower optimizer.lr or use mixed_precision=no") from cause

    def _save(self) -> None:
        self.accelerator.wait_for_everyone()
        if (name := _not_finite(self._saved_tensors())) is not None:
            self._fail(f"{name} is not finite after step {self.step}")
        if self.main:
            scaler = self.accelerator.scaler
            checkpoint = Checkpoint(
                step=self.step,
                model=self.module.state_dict(),
                ema=None if self.ema is None else self.ema.state_dict(),
                ema_updates=0 if self.ema is None else self.ema.updates,
                processes=self.accelerator.num_processes,
                optimizer=self.optimizer.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
                task=self.task.state(),
                config=to_mapping(self.config),
                data=self.data,
            )
            save_checkpoint(self.checkpoints, checkpoint, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _draw(self, writer: Any) -> None:
        if not self.main:
            return
        with self._averaged():
            picture = self.task.picture(self.config.seed)
        path = self.folder / "samples" / f"step-{self.step:06d}.png"
        self._write(path, png_bytes(picture))
        writer.add_image("samples", np.asarray(picture), self.step, dataformats="HWC")

    def _export(self) -> Path:
        target = self.folder / "model"
        if self.main:
            try:
                with self._averaged(), io.atomic_folder(target) as temporary:
                    self.task.export(temporary, getattr(torch, self.config.export_dtype))
            except OSError as error:
                raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
        self.accelerator.wait_for_everyone()
        return target

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Evaluation mode, with the moving average in place of the trained weights."""
        self.module.eval()
        with torch.no_grad(), nullcontext() if self.ema is None else self.ema.applied():
            yield
        self.module.train()

    def _latest(self, resume: bool) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        if found and not resume:
            raise ConfigError(
                f"{self.folder} already holds a run up to {found[-1].name}; "
                "go on with --resume or choose another name"
            )
        return found[-1] if found else None

    def _load(self, path: Path) -> Checkpoint:
        checkpoint = load_checkpoint(path)
        changed = differing_keys(checkpoint.config, to_mapping(self.config))
        changed = [key for key in changed if key not in _FREE_ON_RESUME]
        if changed:
            raise ConfigError(
                f"cannot resume {path} with another configuration; these keys differ: {', '.join(changed)}"
            )
        if checkpoint.processes != self.accelerator.num_processes:
            raise ConfigError(
                f"cannot resume {path} with {self.accelerator.num_processes} processes: they would see other "
                f"pictures and noise than before; launch {checkpoint.processes}, as the run had"
            )
        return checkpoint

    def _check_data(self, checkpoint: Checkpoint, path: Path) -> None:
        """Another folder would give words other tokens, and show its pictures in another order."""
        if checkpoint.data in (None, self.data):
            return
        had, has = checkpoint.data["pictures"], 0 if self.data is None else self.data["pictures"]
        what = "other names, captions or classes" if had == has else f"{has} pictures instead of {had}"
        raise ConfigError(
            f"cannot resume {path}: the folder data.path={self.config.data.path} has changed since that "
            f"checkpoint ({what}); put it back as it was, or begin a run with another name"
        )

    def _claim_folder(self) -> list[Path]:
        """Find out now, not at the first checkpoint, that the run has nowhere to write.

        Returns the folders that were made for that, the innermost first.
        """
        made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        if not os.access(self.folder, os.W_OK):
            raise CheckpointError(f"cannot write to {self.folder}: permission denied")
        remove_leftovers(self.checkpoints)
        return made

    def _batches(self, *, start: int = 0, process: int | None = None) -> Iterator[dict]:
        config = self.config
        sampler = StreamSampler(
            len(self.task.dataset),
            config.batch_size,
            seed=config.seed,
            process=self.accelerator.process_index if process is None else process,
            processes=self.accelerator.num_processes,
            start=start * config.gradient_accumulation_steps,
        )
        return batches(self.task.dataset, sampler, num_workers=config.data.num_workers)

    def _to_device(self, batch: dict) -> dict:
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def _anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process: they must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)).item())

    @contextmanager
    def _writer(self) -> Iterator[Any]:
        """TensorBoard writer of the main process; resuming drops what was logged after the checkpoint."""
        if not self.main:
            yield None
            return
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        try:
            writer = SummaryWriter(str(self.folder / "logs"), purge_step=self.step + 1)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        with writer:
            yield writer

    def _write_config(self) -> None:
        if self.main:
            self._write(self.folder / "config.yaml", to_yaml(self.config).encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            io.atomic_write(path, data)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove each of the folders that holds nothing; after one that does, stop."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity."""
    for name, value in tensors:
        if value.is_floating_point() and not torch.isfinite(value).all():
            return name
    return None


@contextmanager
def _on_interrupt(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C lets the step end and sets `stop`; the second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
