# SPDX-License-Identifier: Apache-2.0
"""PNG without an imaging library, for reports that must open anywhere."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def png_bytes(image: np.ndarray) -> bytes:
    """Encode (height, width, 3) uint8."""
    height, width, _ = image.shape
    pixels = image.reshape(height, width * 3)
    raw = np.concatenate([np.zeros((height, 1), np.uint8), pixels], 1).tobytes()
    chunks = (
        (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
        (b'IDAT', zlib.compress(raw, 9)),
        (b'IEND', b''),
    )
    data = b'\x89PNG\r\n\x1a\n'
    for kind, body in chunks:
        data += struct.pack('>I', len(body)) + kind + body
        data += struct.pack('>I', zlib.crc32(kind + body))
    return data
