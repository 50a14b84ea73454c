"""How far global metrics are from one process, and how far the average of the ranks' results is.

Starts its own ranks by `mpiexec` and writes the table of docs/exactness.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1, 2, 3, 4)
DEADLINE = 300
SHAPES = ("even", "uneven", "empty")
Errors = dict[str, dict[str, list[float]]]

PAGE = """# How exact global metrics are

Each rank sends the state of its metrics; the sum is made in float64, and Keras's own `result()` is
called on it. What comes out is compared with one process that is given all samples: the worst
relative difference over even parts, uneven ones ({uneven}) and parts some of which are empty
({empty}), on real ranks. 0 says that every bit is the same.

Beside it stands Horovod's way, that of its `MetricAverageCallback`: the unweighted mean of the
ranks' results, on the uneven parts. The fourth rank has no samples there and contributes the
`result()` of a fresh metric, which is 0 for most, and not a number for `R2Score`: `nan`.

    {command}

The worst of ours: {worst:.1e} ({worst_case}). It is what rounding float32 in another order leaves:
weights and errors are summed by Keras in float32, in a process and on a rank. Counts of samples
are whole numbers, and lose nothing. `R2Score` is shown on targets around 0, since it subtracts two
sums of squares: of targets far from 0 it multiplies the rounding of any process, one or many.

Two numbers are means of batches by definition, and then so is what Keras reports for one process:
a function given to `compile` that returns one number a batch, and the losses of single outputs.
They count by the samples of each batch here. Keras counts a smaller last batch as much as a full
one, so they agree with it to rounding where the global batches are of one size.

| metric | {ours} | {theirs} |
|---|{rules}|
"""


def measure() -> dict[str, tuple[float, float]]:
    """The worst errors of every case, ours and the average's; called by all ranks."""
    import keras

    import orchestrator
    from orchestrator import metrics
    from tests import metric_cases

    runtime = orchestrator.init("mpi", seed=7)
    model = metric_cases.AllMetrics()
    worst = {case.name: (0.0, 0.0) for case in metric_cases.CASES}
    for shape in SHAPES:
        counts = metric_cases.PARTS[shape][runtime.size]
        begin = sum(counts[: runtime.rank])
        model.update(begin, begin + counts[runtime.rank])
        (state,) = metrics.global_states(runtime.communicator, model, [metrics.snapshot(model)])
        ours = metrics.results(model, state)
        for case, metric in zip(model.cases, model.members, strict=True):
            own = np.asarray(keras.ops.convert_to_numpy(metric.result()), np.float64)
            mean = runtime.communicator.allreduce(own) / runtime.size
            whole = metric_cases.alone(case, sum(counts))
            mean = mean if shape == "uneven" else whole
            errors = [
                metric_cases.relative_error(value, whole) for value in (ours[case.name], mean)
            ]
            worst[case.name] = tuple(np.maximum(worst[case.name], errors).tolist())  # keeps nan
    return worst if runtime.is_root else {}


def launch(size: int) -> dict[str, tuple[float, float]]:
    """`measure` on `size` ranks."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    environment |= {"TF_ENABLE_ONEDNN_OPTS": "0", "TF_NUM_INTRAOP_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "errors.json"
        script = [sys.executable, str(Path(__file__).resolve()), "--out", str(out)]
        subprocess.run(
            [str(mpiexec), "-n", str(size), *script],
            env=environment,
            cwd=ROOT,
            check=True,
            timeout=DEADLINE,
        )
        return json.loads(out.read_text(encoding="utf-8"))


def page(errors: dict[int, dict[str, tuple[float, float]]]) -> str:
    """The whole of docs/exactness.md."""
    from tests import metric_cases

    names = list(errors[1])
    worst, worst_case = max((errors[size][name][0], name) for size in SIZES for name in names)
    described = {
        shape: ", ".join("/".join(map(str, metric_cases.PARTS[shape][size])) for size in SIZES[1:])
        for shape in SHAPES
    }
    columns = len(SIZES) + len(SIZES) - 1
    text = PAGE.format(
        command="python benchmarks/metric_errors.py --write docs/exactness.md",
        worst=worst,
        worst_case=f"`{worst_case}`",
        ours=" | ".join(f"{size} rank{'s' * (size > 1)}" for size in SIZES),
        theirs=" | ".join(f"averaged, {size}" for size in SIZES[1:]),
        rules="|".join(["---:"] * columns),
        **described,
    )
    for name in names:
        ours = [_shown(errors[size][name][0]) for size in SIZES]
        theirs = [_shown(errors[size][name][1]) for size in SIZES[1:]]
        text += f"| `{name}` | {' | '.join([*ours, *theirs])} |\n"
    return text


def _shown(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page; the terminal by default")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of one launch
    arguments = parser.parse_args()
    if arguments.out:
        warnings.simplefilter("ignore")
        errors: Any = measure()
        if errors:
            arguments.out.write_text(json.dumps(errors), encoding="utf-8")
        return
    sys.path.insert(0, str(ROOT))
    text = page({size: launch(size) for size in SIZES})
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
