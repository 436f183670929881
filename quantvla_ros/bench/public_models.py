# SPDX-License-Identifier: Apache-2.0
"""Small instances of the public implementations, with random weights, in their own file formats.

Needs the public packages (`NEEDS`), which the product never imports. Everything is built small
enough for a laptop; names, files and processors are exactly what the packages write.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from quantvla_ros.bench.parity_case import TASK
from quantvla_ros.policies.flow import noise

NEEDS = ('lerobot', 'transformers', 'tokenizers', 'diffusers', 'timm')
IMAGE = 28


class PackagesMissing(ValueError):  # noqa: N818  (the user mends it with pip)
    """The public packages are not installed here."""


def require_packages() -> None:
    """Raise PackagesMissing that names what to install."""
    absent = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if absent:
        raise PackagesMissing(
            f'this comparison runs the public implementations and lacks {", ".join(absent)}; '
            'install lerobot==0.5.1, transformers==5.3.0, diffusers and timm in an environment '
            'of their own (Python 3.12) and run the command there'
        )
    _forgive_torchvision()


def _forgive_torchvision() -> None:
    """Let torchvision import where its operators were built for another torch; none is used."""
    register = torch.library.register_fake

    def patched(op: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(op, str) and op.startswith('torchvision::'):
            return lambda function: function
        return register(op, *args, **kwargs)

    torch.library.register_fake = patched


def small_tokenizer(folder: Path, vocabulary: int, marks: Sequence[str] = ()) -> Any:
    """Train a byte-level tokenizer with a <bos> in front, as PaliGemma's puts one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=['<pad>', '<eos>', '<bos>', '<unk>', *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([TASK, 'Task: , State: 0 1 2 3 4 5 6 7 8 9;\nAction: '], trainer)
    core.post_processor = processors.TemplateProcessing(
        single='<bos> $A', special_tokens=[('<bos>', 2)]
    )
    core.save(str(folder / 'tokenizer.json'))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token='<pad>', eos_token='<eos>', bos_token='<bos>'
    )


def statistics(joints: int, seed: int) -> dict[str, Any]:
    """Made-up dataset statistics of one feature, all kinds."""
    generator = torch.Generator().manual_seed(seed)
    low = -1.5 - torch.rand(joints, generator=generator)
    high = 1.5 + torch.rand(joints, generator=generator)
    return {
        'min': low,
        'max': high,
        'q01': low * 0.9,
        'q99': high * 0.9,
        'mean': (low + high) / 2,
        'std': (high - low) / 5,
    }


def fix_noise(model: Any, seed: int) -> None:
    """Make a public model draw our noise."""
    model.sample_noise = lambda shape, device: torch.from_numpy(noise(seed, tuple(shape)))
