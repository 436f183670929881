# SPDX-License-Identifier: Apache-2.0
"""The goals of the integer kernels, as a table of conditions on measured rows.

Each goal says what it asks, the worst case that was seen and where. A goal for which nothing was
measured is not met. Ours is the recorded form (kernels/program.py), which is how a policy runs it;
the call from Python stands beside it in the table and costs about four microseconds more.
"""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def _worst(rows: Rows, value: Any) -> tuple[float, str]:
    """Smallest value over the rows for which there is one, and where it was."""
    seen = [(v, f'K {r["k"]} N {r["n"]} tokens {r["m"]}') for r in rows
            if (v := value(r)) is not None]
    return min(seen, default=(0.0, 'nothing measured'))


def _goal(text: str, rows: Rows, value: Any, least: float, unit: str = 'x') -> dict[str, Any]:
    found, where = _worst(rows, value)
    shown = f'{100 * found:.1f} %' if unit == '%' else f'{found:.2f}x'
    return {'text': text, 'least': least, 'worst': found, 'met': found >= least,
            'seen': f'worst {shown} ({where})'}


def _share(path: str, scheme: str) -> Any:
    return lambda row: (row['gops'][f'{path} {scheme}'] / row['peak_gops'][path]
                        if path in row['peak_gops'] else None)


def _one_token(rows: Rows, path: str, scheme: str) -> dict[str, Any]:
    """60 % of the peak; where the weight lies in a slow cache, how near its reading comes to the
    rate at which this core reads as many bytes."""
    goal = _goal(f'{scheme} at one token: 60 % of peak', rows, _share(path, scheme), 0.60, '%')
    reads = [f'{100 * row["read_share"]:.0f} % at {row["read_mib"]:.1f} MiB' for row in rows
             if row.get('read_share')]
    if scheme == 'w4a8' and reads:
        goal['seen'] += '; of the rate at which the core reads such a weight: ' + ', '.join(reads)
    return goal


def _against(ours: str, *others: str) -> Any:
    """Time of the fastest of the others over ours: above 1, ours is faster."""
    def ratio(row: dict[str, Any]) -> float | None:
        times = [row['seconds'][name] for name in others if name in row['seconds']]
        return min(times) / row['seconds'][ours] if times else None
    return ratio


def judge(
    rows: Rows, path: str, vector: str, chunk: dict[str, Any], cores: float = 0.0
) -> list[dict[str, Any]]:
    """Hold the rows of a run (bench/kernels.py) and the chunk times against every goal.

    path: the fastest path, which meets the peers. vector: the fastest path of vector instructions,
    whose shares of its own peak are judged; the peak of AMX is beyond what any memory feeds.
    cores: what two threads reach together in registers, in peaks of one.
    """
    large = [row for row in rows if min(row['k'], row['n']) >= 1024]
    many = [row for row in large if row['m'] >= 50]
    one = [row for row in large if row['m'] == 1]
    goals = []
    for scheme in ('w4a8', 'w4a8 g128'):
        goals += [
            _goal(f'{scheme} at 50 tokens and more: 88 % of peak', many,
                  _share(vector, scheme), 0.88, '%'),
            _one_token(one, vector, scheme),
        ]
    goals += [
        _goal('w8a8 at 50 tokens and more: 90 % of peak', many, _share(vector, 'w8a8'), 0.90, '%'),
        # the two run the same instructions; 3 % is the noise of a minimum
        _goal('w4a4 never slower than w4a8', large,
              _against(f'{path} w4a4', f'{path} w4a8'), 0.97),
        _goal('w4a8 on avx2 without VNNI: 80 % of its own peak', many,
              _share('avx2', 'w4a8'), 0.80, '%'),
        _goal('w4a8 g128 against onnxruntime 4 bits, 50 tokens and more', many,
              _against(f'{path} w4a8 g128', 'onnxruntime 4 bits'), 2.1),
        _goal('w4a8 g128 against onnxruntime 4 bits, one token', one,
              _against(f'{path} w4a8 g128', 'onnxruntime 4 bits'), 1.7),
        _goal('w4a8 against torch float32, 50 tokens and more', many,
              _against(f'{path} w4a8', 'torch float32'), 4.0),
        _goal('w4a8 against torch bfloat16, 50 tokens and more', many,
              _against(f'{path} w4a8', 'torch bfloat16'), 1.9),
        _goal('w4a8 against torch float32, one token', one,
              _against(f'{path} w4a8', 'torch float32'), 12.0),
        _goal('w4a8 against torch bfloat16, one token', one,
              _against(f'{path} w4a8', 'torch bfloat16'), 11.0),
        _goal('w8a8 against the best of oneDNN, fbgemm, onnxruntime, floats in and out', large,
              _against(f'{path} w8a8', 'onednn per token', 'fbgemm dynamic',
                       'onnxruntime 8 bits'), 1.0),
        _goal("w8a8 against oneDNN's bare product, its tokens quantized before", large,
              _against(f'{path} w8a8', 'onednn bare'), 1.0),
        _goal('two threads against one, 50 tokens and more', many,
              lambda row: row.get('two_threads') or None, 1.8),
    ]
    if cores:
        goals[-1]['seen'] += f'; in registers two threads reach {cores:.2f}x'
    return goals + _chunk_goals(chunk)


def _chunk_goals(chunk: dict[str, Any]) -> list[dict[str, Any]]:
    if not chunk.get('ms'):
        return []
    times = chunk['ms']
    name, best = min(((n, t) for n, t in times.items() if n.startswith('torch')),
                     key=lambda item: item[1])
    goals = []
    for scheme in ('w4a8', 'w8a8'):
        took, share = times[scheme], chunk['weight_share'][scheme]
        goals += [
            {'text': f'whole chunk at {scheme}: twice as fast as {name}', 'least': 2.0,
             'worst': best / took, 'met': best / took >= 2.0,
             'seen': f'{took:.1f} ms against {best:.1f} ms, {best / took:.2f}x'},
            {'text': f'whole chunk at {scheme} under 60 ms', 'least': 60.0, 'worst': took,
             'met': took < 60, 'seen': f'{took:.1f} ms'},
        ]
        if scheme == 'w4a8':
            goals.append({'text': 'weights at w4a8: at most 0.14x of float32', 'least': 0.14,
                          'worst': share, 'met': share <= 0.14, 'seen': f'{share:.3f}x'})
    return goals
