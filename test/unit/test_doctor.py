# SPDX-License-Identifier: Apache-2.0
"""The doctor finds what is wrong and says what to do."""

import argparse

from quantvla_ros import doctor
from quantvla_ros.resources import share_path


def run(capsys, contract='libero_panda', model=''):
    status = doctor.run(argparse.Namespace(contract=contract, model=model))
    return status, capsys.readouterr().out


def test_healthy_machine_is_told_part_by_part(capsys):
    status, out = run(capsys)
    assert status == 0, out
    for name in ('python', 'ros', 'cv2', 'gl', 'torch', 'compiler', 'cpu', 'contract'):
        assert f' {name} ' in out


def test_broken_contract_fails_with_its_problems(capsys, tmp_path):
    (tmp_path / 'mine.yaml').write_text('contract: 1\nrobot: mine\n')
    status, out = run(capsys, contract=str(tmp_path / 'mine.yaml'))
    assert status == 1
    assert 'BAD' in out and 'cameras' in out


def test_two_providers_of_cv2_are_refused(capsys, monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, 'packages_distributions',
        lambda: {'cv2': ['opencv-python', 'opencv-python-headless']})
    status, out = run(capsys)
    assert status == 1
    assert 'opencv-python, opencv-python-headless overwrite each other' in out


def test_kernels_are_told_line_by_line(capsys):
    out = run(capsys)[1]
    assert 'kernel path scalar' in out and '{' not in out


def test_gpu_without_triton_is_bad(monkeypatch):
    cuda = doctor.importlib.import_module('torch').cuda
    monkeypatch.setattr(cuda, 'is_available', lambda: True)
    monkeypatch.setattr(cuda, 'get_device_name', lambda: 'a card')
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, 'find_spec',
                        lambda name: None if name == 'triton' else find(name))
    assert doctor.gpu() == doctor.Finding(
        doctor.BAD, 'gpu', 'a card, without Triton; pip install triton')
    monkeypatch.setattr(cuda, 'is_available', lambda: False)
    assert doctor.gpu().level == doctor.NOTE


def test_folder_without_weights_is_no_model(capsys, tmp_path):
    status, out = run(capsys, model=str(tmp_path))
    assert status == 1
    assert 'not a model that can be served' in out


def test_the_shipped_model_is_whole(capsys):
    status, out = run(capsys, model=str(share_path('models/libero_panda')))
    assert status == 0 and 'every key, shape and hash right' in out


def test_a_model_with_another_hash_is_refused(capsys, tmp_path):
    for name in ('policy.json', 'model.safetensors'):
        (tmp_path / name).write_bytes(share_path(f'models/libero_panda/{name}').read_bytes())
    with (tmp_path / 'model.safetensors').open('r+b') as file:
        file.seek(-1, 2)
        file.write(b'\x01')
    status, out = run(capsys, model=str(tmp_path))
    assert status == 1 and 'BAD' in out
