# SPDX-License-Identifier: Apache-2.0
"""Train the policy on rendered demonstrations: one process per GPU, or one CPU process.

bf16 autocast, AdamW, an exponential moving average, a cosine schedule by wall clock (or by steps,
for tests), checkpoints that resume to the same state. What is exported is the average.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quantvla_ros.policies import flow
from quantvla_ros.policies.libero_checkpoint import Checkpoint, Statistics, write_checkpoint
from quantvla_ros.policies.libero_vla import LiberoVlaNet, VlaConfig
from quantvla_ros.policies.vocabulary import Vocabulary
from quantvla_ros.training.dataset import (
    JOINTS,
    Demonstrations,
)
from quantvla_ros.training.objective import augment, flow_loss, to_network
from quantvla_ros.training.processes import Say

STATE = 'training.pt'
CLOCK_EVERY = 8  # steps between two looks at the first process's clock
STATE_NOISE = (0.003,) * JOINTS + (0.0003,) * 2  # rad and m added to the measured joints
FLOOR = 0.02  # of the learning rate at the end


@dataclass(frozen=True)
class FitSettings:
    """How to train. seconds: of the schedule; steps > 0 replaces it. batch: per process.

    ema 0 exports the last weights themselves; augment and state_noise False leave the frames and
    the measured joints as they were: to see what each is worth.
    """

    seconds: float = 300.0
    steps: int = 0
    batch: int = 512
    draws: int = 4
    rate: float = 6e-4
    weight_decay: float = 0.05
    warm_up: int = 200
    seed: int = 0
    later_weight: float = 1.0
    log_every: int = 100
    checkpoint_s: float = 120.0
    compiled: bool = False
    bfloat16: bool = True
    ema: float = 0.999
    augment: bool = True
    state_noise: bool = True


class Trainer:
    """Everything that changes while training; save and load bring it back exactly."""

    def __init__(
        self,
        config: VlaConfig,
        data: Demonstrations,
        statistics: Statistics,
        settings: FitSettings,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.settings, self.data, self.device = settings, data, device
        self.rank, self.ranks, self.statistics = rank, ranks, statistics
        torch.manual_seed(settings.seed)
        self.net = LiberoVlaNet(config).to(device)
        self.average = LiberoVlaNet(config).to(device).requires_grad_(False)
        self.average.load_state_dict(self.net.state_dict())
        self.optimizer = self._optimizer()
        self.random = torch.Generator(device).manual_seed(settings.seed * 1000 + rank)
        torch.manual_seed(settings.seed * 1000 + rank + 1)
        self.step, self.spent_s = 0, 0.0
        self.loss = torch.compile(flow_loss) if settings.compiled else flow_loss
        self.train_frames = (~data.held_out).nonzero()[:, 0]
        self.held_out = data.held_out.nonzero()[:, 0]
        self.chances = data.weight[self.train_frames].cumsum(0)
        tensors = {k: torch.from_numpy(v).float().to(device)
                   for k, v in asdict(statistics).items()}
        self.scale = tensors
        self.noise = torch.tensor(STATE_NOISE, device=device)
        self.skipped = torch.zeros((), dtype=torch.long, device=device)

    def _optimizer(self) -> torch.optim.AdamW:
        matrices = [p for p in self.net.parameters() if p.ndim >= 2]
        others = [p for p in self.net.parameters() if p.ndim < 2]
        groups = [{'params': matrices, 'weight_decay': self.settings.weight_decay},
                  {'params': others, 'weight_decay': 0.0}]
        return torch.optim.AdamW(
            groups, lr=self.settings.rate, betas=(0.9, 0.95), fused=self.device.type == 'cuda')

    # -- one step --------------------------------------------------------------------------------

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw a batch: augmented images, words, state and action in the network's units."""
        at = torch.rand(self.settings.batch, device=self.device, generator=self.random)
        rows = torch.searchsorted(self.chances, at * self.chances[-1])
        frames = self.train_frames[rows.clamp_max(len(self.train_frames) - 1)]
        state, action = self.data.labels(frames, self.net.config.chunk)
        seen = state
        if self.settings.state_noise:
            seen = state + torch.randn_like(state) * self.noise
        # the target stays where it is: the label is relative to the reading that is given
        action[..., :JOINTS] += (state - seen)[:, None, :JOINTS]
        images = self.data.images[frames]
        images = augment(images) if self.settings.augment else to_network(images)
        return (images, self.data.words[frames],
                *self.normalize(seen, action))

    def normalize(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """SI -> the network's units."""
        s = self.scale
        return ((state - s['state_mean']) / s['state_std'],
                (action - s['action_mean']) / s['action_std'])

    def learn(self, part: float) -> Tensor:
        """Take one step at this part of the schedule; return the loss."""
        warm = min(1.0, (self.step + 1) / self.settings.warm_up)
        cosine = 0.5 * (1 + math.cos(math.pi * min(part, 1.0)))
        for group in self.optimizer.param_groups:
            group['lr'] = self.settings.rate * warm * (FLOOR + (1 - FLOOR) * cosine)
        batch = self.draw()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            loss = self.loss(self.net, *batch, self.settings.draws)
        loss.backward()
        self._share_gradients()
        self._limit_gradients()
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
        return loss.detach()

    def _limit_gradients(self) -> None:
        """Clip; a gradient that is not finite counts as none, or one step would end it all."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        wrong = ~torch.isfinite(norm)
        self.skipped += wrong
        for gradient in gradients:
            gradient.masked_fill_(wrong, 0.0)

    def _share_gradients(self) -> None:
        if self.ranks == 1:
            return
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([g.view(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.ranks
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    # -- how good --------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self, most: int = 2048) -> dict[str, float]:
        """Mean joint error in rad and share of wrong gripper steps on held-out episodes."""
        chosen = self.held_out[torch.linspace(
            0, len(self.held_out) - 1, min(most, len(self.held_out)), device=self.device).long()]
        joint, grip, seen = 0.0, 0.0, 0
        for frames in chosen.split(512):
            state, action = self.data.labels(frames, self.net.config.chunk)
            found = self.sample(self.average, frames, state)
            joint += (found - action)[..., :JOINTS].abs().mean((1, 2)).sum().item()
            wrong = (found[..., JOINTS] > 0) != (action[..., JOINTS] > 0)
            grip += wrong.float().mean(1).sum().item()
            seen += len(frames)
        return {'joint_rad': joint / max(seen, 1), 'gripper': grip / max(seen, 1)}

    def sample(self, net: LiberoVlaNet, frames: Tensor, state: Tensor, steps: int = 10) -> Tensor:
        """Return the chunks (B, chunk, 8) a network gives for some frames, SI, relative."""
        shape = (len(frames), net.config.chunk, net.config.action)
        noise = torch.from_numpy(flow.noise(0, shape)).to(self.device)
        normal = (state - self.scale['state_mean']) / self.scale['state_std']
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            context = net.prefix(to_network(self.data.images[frames]), self.data.words[frames],
                                 normal)
            table = net.modulation(torch.tensor(flow.flow_times(steps), device=self.device))
            x = flow.denoise(
                lambda x, i: net.velocity(context, x, table[i : i + 1]).float(), noise, steps)
        return x * self.scale['action_std'] + self.scale['action_mean']

    # -- disk ------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write everything that changes, so that load goes on from here."""
        state = {
            'net': self.net.state_dict(), 'average': self.average.state_dict(),
            'optimizer': self.optimizer.state_dict(), 'step': self.step, 'spent_s': self.spent_s,
            'random': self.random.get_state(), 'torch': torch.get_rng_state(),
        }
        if self.device.type == 'cuda':
            state['cuda'] = torch.cuda.get_rng_state(self.device)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / (STATE + '.part')
        torch.save(state, temporary)
        os.replace(temporary, folder / STATE)

    def load(self, folder: Path) -> None:
        """Go on from a saved state."""
        state: dict[str, Any] = torch.load(
            folder / STATE, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state['net'])
        self.average.load_state_dict(state['average'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.step, self.spent_s = state['step'], state['spent_s']
        if self.ranks == 1:  # the other processes of several draw afresh
            self.random.set_state(state['random'].cpu())
            torch.set_rng_state(state['torch'].cpu())
            if 'cuda' in state:
                torch.cuda.set_rng_state(state['cuda'].cpu(), self.device)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begin with trained weights and a fresh optimizer: fine-tuning."""
        self.net.load_state_dict(weights)
        self.average.load_state_dict(weights)


def schedule(trainer: Trainer) -> Iterator[float]:
    """Yield the part of the schedule that is over, until it is; all processes agree."""
    settings, started = trainer.settings, time.monotonic() - trainer.spent_s
    part = 0.0
    while True:
        if settings.steps:
            part = trainer.step / settings.steps
        elif trainer.step % CLOCK_EVERY == 0:
            if trainer.device.type == 'cuda':
                torch.cuda.synchronize(trainer.device)
            trainer.spent_s = time.monotonic() - started
            clock = torch.tensor([trainer.spent_s], device=trainer.device)
            if trainer.ranks > 1:
                dist.broadcast(clock, 0)
            part = float(clock) / settings.seconds
        if part >= 1.0:
            return
        yield part


def fit(
    trainer: Trainer, out: Path, say: Say, about: Mapping[str, Any] | None = None
) -> list[dict[str, float]]:
    """Train to the end of the schedule; the first process logs, validates and saves.

    about: what log.json shall also say, such as where the data came from.
    """
    log: list[dict[str, float]] = []
    total, since, saved = torch.zeros((), device=trainer.device), 0, time.monotonic()
    told = time.monotonic()
    for part in schedule(trainer):
        total += trainer.learn(part)
        since += 1
        if trainer.rank or trainer.step % trainer.settings.log_every:
            continue
        now = time.monotonic()
        rate = since * trainer.settings.batch * trainer.ranks / (now - told)
        entry = {'step': trainer.step, 'seconds': round(trainer.spent_s, 1), 'part': part,
                 'loss': total.item() / since, 'samples_per_s': round(rate),
                 'skipped': int(trainer.skipped)}
        total.zero_()
        since, told = 0, now
        if now - saved > trainer.settings.checkpoint_s:
            saved = now
            entry.update(trainer.validate())
            trainer.save(out)
        log.append(entry)
        say(' '.join(f'{k} {v:.4g}' for k, v in entry.items()))
    if not trainer.rank:
        last = {'step': trainer.step, 'seconds': round(trainer.spent_s, 1), **trainer.validate()}
        log.append(last)
        trainer.save(out)
        (out / 'log.json').write_text(json.dumps(
            {**(about or {}), 'settings': asdict(trainer.settings), 'ranks': trainer.ranks,
             'device': device_name(trainer.device), 'torch': torch.__version__, 'log': log},
            indent=1))
        say('end: ' + ' '.join(f'{k} {v:.4g}' for k, v in last.items()))
    return log


def device_name(device: torch.device) -> str:
    """Name what the training runs on."""
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'


def export(trainer: Trainer, vocabulary: Vocabulary, contract: str, folder: Path) -> str:
    """Write policy.json and the averaged weights in float16; return their sha256."""
    checkpoint = Checkpoint(
        config=trainer.net.config, contract=contract, vocabulary=vocabulary,
        statistics=trainer.statistics, steps=10)
    return write_checkpoint(folder, trainer.average, checkpoint)


def statistics_to_json(statistics: Statistics) -> dict[str, Any]:
    """Return lists, for a file that other processes and later runs read."""
    return {name: np.asarray(value).tolist() for name, value in asdict(statistics).items()}


def statistics_from_json(document: dict[str, Any]) -> Statistics:
    """Read what statistics_to_json wrote."""
    return Statistics(**{name: np.asarray(value) for name, value in document.items()})


def warm_up_compilation(trainer: Trainer) -> None:
    """Pay for torch.compile now: two steps, then everything as it was."""
    kept = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    rate, trainer.settings = trainer.settings, replace(trainer.settings, rate=0.0)
    for _ in range(2):
        trainer.learn(0.0)
    trainer.settings = rate
    trainer.net.load_state_dict(kept)
    trainer.average.load_state_dict(kept)
    trainer.optimizer = trainer._optimizer()
    trainer.step, trainer.spent_s = 0, 0.0


