# SPDX-License-Identifier: Apache-2.0
"""What `quantvla doctor FOLDER` says of whole, spoilt and ill-fitting folders."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from quantvla_ros.bench.parity_case import CASES
from quantvla_ros.cli import main
from quantvla_ros.doctor_model import describe_model

BAD = 'BAD'


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of a folder that a test may spoil."""
    return lambda name: shutil.copytree(folders(name), tmp_path / name)


def lines(folder, contract=None, level=None):
    return [text for found, text in describe_model(folder, contract)
            if level in (None, found)]


@pytest.mark.parametrize('name', CASES)
def test_a_whole_folder_has_nothing_bad(name, folders):
    said = lines(folders(name), CASES[name].contract())
    assert not lines(folders(name), CASES[name].contract(), BAD)
    for part in (f'is {CASES[name].policy} in the', 'complete: every tensor', 'sizes:',
                 'M parameters', 'would hold float', 'w4a8', 'tokenizer: found',
                 'artifacts: none', 'integer layers on the CPU',
                 'says all that this model needs' if CASES[name].model else 'no `model` section'):
        assert any(part in line for line in said), part


def test_a_missing_tensor_is_bad_and_named(copy):
    folder = copy('pi05_lerobot')
    path = str(folder / 'model.safetensors')
    tensors = load_file(path)
    tensors.pop('model.action_out_proj.bias')
    save_file(tensors, path)
    assert any('incomplete' in line and 'action_out.bias' in line
               for line in lines(folder, level=BAD))


def test_missing_statistics_are_bad(copy):
    folder = copy('pi05_lerobot')
    next(folder.glob('*unnormalizer_processor.safetensors')).unlink()
    assert any('unnormalizer_processor' in line
               for line in lines(folder, CASES['pi05_lerobot'].contract(), BAD))


def test_a_contract_of_other_joints_is_bad(folders):
    contract = CASES['openvla_hf'].contract()  # seven joints; the statistics have eight
    assert any('statistics of the checkpoint have 8 numbers' in line
               for line in lines(folders('pi05_lerobot'), contract, BAD))


def test_a_contract_of_another_family_is_told(folders):
    said = lines(folders('pi05_lerobot'), CASES['smolvla_lerobot'].contract())
    assert any(line.startswith("contract: policy is 'smolvla'") for line in said)


def test_artifacts_are_listed_with_whether_they_belong_to_the_weights(copy, capsys):
    folder = copy('smolvla_lerobot')
    main(['quantize', str(folder), '--recipe', 'rtn', '--precision', 'w8a8'])
    capsys.readouterr()
    assert any('artifact rtn-w8a8: rtn w8a8' in line and 'belongs to these weights' in line
               for line in lines(folder))
    path = folder / 'model.safetensors'
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert any('artifact rtn-w8a8' in line and 'quantize this model again' in line
               for line in lines(folder, level=BAD))


def test_a_folder_of_nothing_makes_the_command_fail(tmp_path, capsys):
    assert main(['doctor', str(tmp_path)]) == 1
    assert 'not a model that can be served' in capsys.readouterr().out
