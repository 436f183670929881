# SPDX-License-Identifier: Apache-2.0
"""Finished episodes of an evaluation, each under a hash of everything that decides its outcome."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from quantvla_ros.contract import load_contract
from quantvla_ros.quant import calibrated
from quantvla_ros.resources import share_path
from quantvla_ros.sim import report
from quantvla_ros.sim.episodes import Episode, Outcome, Settings, Variant
from quantvla_ros.sim.scenes import Scene, load_scene

DECIDING_PACKAGES = ('mujoco', 'torch', 'numpy')


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(folder: Path, variant: Variant) -> list[Path]:
    """Every file of a folder but prose, and but calibrations where the variant has none."""
    return [p for p in sorted(folder.rglob('*')) if p.is_file() and p.suffix != '.md'
            and (variant.calibration or calibrated.FOLDER not in p.relative_to(folder).parts)]


def model_hash(settings: Settings, variant: Variant) -> str:
    """Hash what the variant is loaded from: settings, weights, its precision and calibration."""
    if settings.policy == 'hold':
        return ''
    folder = Path(settings.model) if settings.model else share_path(f'models/{settings.policy}')
    files = _files(folder, variant)
    own = [p for p in files if variant.precision in str(p.relative_to(folder))]
    deciding = [p for p in files if p.parent == folder or p in own]
    # an artifact or calibration that does not lie beside the checkpoint
    for elsewhere in filter(None, (variant.precision, variant.calibration)):
        deciding += _files(Path(elsewhere), variant)
    return _hash_files(deciding)


def scene_hash(scene: Scene) -> str:
    """Hash what a world is made of; the files named in scene.xml carry their own hashes."""
    return _hash_files(scene.folder / name for name in ('scene.xml', 'task.json', 'states.npz'))


class Keys:
    """The key of each episode: a hash of everything that decides its outcome."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        shared = {item.name: getattr(settings, item.name) for item in fields(settings)}
        del shared['model']  # the content counts, not the place
        if not settings.through_ros:  # so that logs from before it was a setting stay valid
            del shared['through_ros']
        self._shared = {
            **shared,
            'contract': repr(load_contract(settings.contract)),
            'versions': {name: importlib.metadata.version(name) for name in DECIDING_PACKAGES},
        }
        self._models: dict[Variant, str] = {}
        self._scenes: dict[str, str] = {}

    def __getitem__(self, episode: Episode) -> str:
        if episode.variant not in self._models:
            self._models[episode.variant] = model_hash(self.settings, episode.variant)
        if episode.task_name not in self._scenes:
            scene = load_scene(episode.suite, episode.task, self.settings.max_texture)
            self._scenes[episode.task_name] = scene_hash(scene)
        parts = {
            **self._shared,
            **asdict(episode),
            'weights': self._models[episode.variant],
            'scene': self._scenes[episode.task_name],
        }
        if not episode.variant.calibration:  # as above
            del parts['variant']['calibration']
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Log:
    """Append-only file of finished episodes, one JSON object a line, and the last frames."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / 'episodes.jsonl'
        self.lines: dict[str, dict[str, Any]] = {}
        whole = b''
        for raw in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if not raw.endswith(b'\n'):
                break  # cut off in the middle of a line
            line = json.loads(raw)
            self.lines[line['key']] = line
            whole += raw
        if self.path.exists() and whole != self.path.read_bytes():
            self.path.write_bytes(whole)

    def add(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome for good."""
        line = {'key': key, **outcome.line()}
        if outcome.frame is not None:
            report.write_png(self.frame_path(key), outcome.frame)
        with self.path.open('a') as file:
            file.write(json.dumps(line) + '\n')
        self.lines[key] = line

    def frame_path(self, key: str) -> Path:
        """Where the last frame of an episode is."""
        return self.folder / 'frames' / f'{key}.png'

    def finished(self, key: str) -> bool:
        """Whether an episode need not be played again."""
        return key in self.lines and self.lines[key]['status'] != 'crashed'
