# SPDX-License-Identifier: Apache-2.0
"""Which files a bag consists of: a rosbag2 directory, or one .mcap or .db3, packed or not.

Reads metadata.yaml of every version, trusts only the few fields it needs, and does without the
file where a killed recorder left none. Opens no storage and writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

METADATA = 'metadata.yaml'
PACKED = '.zstd'  # the ending that `ros2 bag record --compression-mode file` adds
STORAGES = {'.mcap': 'mcap', '.db3': 'sqlite3'}


class BagError(ValueError):
    """A bag that cannot be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class BagFiles:
    """The files of a bag in the order they were written.

    storage: mcap, sqlite3, or the name of a plugin that only the robot's own rosbag2 knows.
    compression: file, message, or nothing. closed: whether the recorder finished metadata.yaml;
    a single file counts as closed.
    """

    path: Path
    files: tuple[Path, ...]
    storage: str
    compression: str = ''
    closed: bool = True

    def fingerprint(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of change of every file. Raises BagError when one is gone."""
        try:
            found = [(file, file.stat()) for file in self.files]
        except OSError as error:
            raise gone(self.path, error) from error
        return tuple((file.name, stat.st_size, stat.st_mtime_ns) for file, stat in found)


def gone(path: Path, error: OSError) -> BagError:
    """Return the error for a bag that was there and no longer is."""
    return BagError(
        f'{path} cannot be read any more ({error.strerror or error}): was it removed, or its disk '
        'taken out, while it was read? Nothing of it was used'
    )


def find_files(path: str | Path) -> BagFiles:
    """Return what makes up the bag at path. Raises BagError."""
    path = Path(path)
    if path.is_dir():
        return _directory(path)
    if not path.exists():
        raise BagError(f'{path} does not exist; give a rosbag2 directory, an .mcap or a .db3')
    storage = _storage_of(path)
    if not storage:
        raise BagError(
            f'{path.name} is no bag: expected a rosbag2 directory, .mcap or .db3, or one of these '
            f'with {PACKED} behind; ROS 1 bags must be converted first (`rosbags-convert`)'
        )
    return BagFiles(path, (path,), storage)


def _storage_of(file: Path) -> str:
    return STORAGES.get(Path(file.name.removesuffix(PACKED)).suffix, '')


def _directory(path: Path) -> BagFiles:
    try:
        text = (path / METADATA).read_text()
    except FileNotFoundError:
        return _without_metadata(path)
    except (OSError, UnicodeDecodeError) as error:
        raise BagError(f'{path / METADATA} cannot be read: {error}') from error
    if not text.strip():  # a disk that was full, or a recorder that was killed at that moment
        return _without_metadata(path)
    try:
        data = yaml.safe_load(text)['rosbag2_bagfile_information']
        names = [PurePosixPath(str(name)).name for name in data['relative_file_paths']]
        storage, compression = str(data['storage_identifier']), _compression(path, data)
    except BagError:
        raise
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BagError(
            f'{path / METADATA} is damaged ({type(error).__name__}: {" ".join(str(error).split())}'
            '); without it the files beside it can still be read, so move it away, or run '
            '`ros2 bag reindex`'
        ) from error
    files = [_present(path, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing or not files:
        raise BagError(
            f'{path} lacks {", ".join(missing) or "any file"}, which its {METADATA} names; copy '
            'the whole directory'
        )
    return BagFiles(path, tuple(file for file in files if file is not None), storage, compression)


def _present(path: Path, name: str) -> Path | None:
    """Return the file, packed or not: metadata of some versions names the one for the other."""
    for found in (path / name, path / (name + PACKED), path / name.removesuffix(PACKED)):
        if found.is_file():
            return found
    return None


def _compression(path: Path, data: dict[str, Any]) -> str:
    mode = str(data.get('compression_mode') or '').lower()
    form = str(data.get('compression_format') or '')
    if mode not in ('file', 'message'):
        return ''
    if form != 'zstd':
        raise BagError(
            f'{path} is compressed by {form!r}; only zstd can be read. Convert it with '
            '`ros2 bag convert`'
        )
    return mode


def _without_metadata(path: Path) -> BagFiles:
    """Take the bag files that lie there, in the order of their numbers."""
    files = sorted((file for file in path.iterdir() if _storage_of(file)), key=_by_number)
    storages = {_storage_of(file) for file in files}
    if len(storages) != 1:
        seen = ', '.join(sorted(file.name for file in path.iterdir())[:5]) or 'nothing'
        raise BagError(
            f'{path} is no bag: it holds {seen}; expected {METADATA} and .mcap or .db3 files'
        )
    return BagFiles(path, tuple(files), storages.pop(), closed=False)


def _by_number(file: Path) -> list[Any]:
    """Sort bag_10 behind bag_9."""
    return [(1, int(p), '') if p.isdigit() else (0, 0, p) for p in re.split(r'(\d+)', file.name)]
