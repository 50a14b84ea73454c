"""Checks of what the ranks are started by and made of: launcher, versions, libraries, devices."""

from __future__ import annotations

from orchestrator.doctor.report import Facts, Finding, Library, Seen, Severity
from orchestrator.doctor.wording import all_have, by_rank, count, finding, of_each

_BUILD = (
    "Build it with `python tools/build_horovod` and install the wheel it prints, or use mpiexec."
)
_BUILD_GPU = "`python tools/build_horovod --gpu`"
_ALONE = (
    "Start it as you start a training: `orchestrator launch -np 2 -- orchestrator doctor`, "
    "`horovodrun -np 2 orchestrator doctor` or `mpiexec -n 2 orchestrator doctor`."
)
_ON_CPU = "or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU."


def launch(seen: Seen) -> Finding:
    """Whether the ranks have found each other."""
    expected = "all that were started"
    if seen.apart:
        todo = "Do what the message says. Nothing between ranks was measured, and no storage tried."
        return finding("launch", "problem", seen.apart, expected, todo)
    if seen.size == 1:
        found, expected = "one process: no collectives measured", "a launcher"
        return Finding(check="launch", severity="ok", found=found, expected=expected, todo=_ALONE)
    found = f"{count(seen.size, 'rank')} on {count(len(seen.hosts), 'host')}, {seen.backend}"
    return finding("launch", "ok", found, expected, "")


def versions(seen: Seen) -> Finding:
    """Other versions compute other things; `train` refuses them."""
    ranks = seen.ranks
    names = list(dict.fromkeys(name for facts in ranks for name in facts.versions))
    unlike = [n for n in names if len({facts.versions.get(n) for facts in ranks}) > 1]
    told = [f"{n}: {by_rank([(f.rank, f.versions.get(n, 'none')) for f in ranks])}" for n in unlike]
    alike = [f"{name} {version}" for name, version in ranks[0].versions.items()]
    return finding(
        "versions",
        "problem" if unlike else "ok",
        "; ".join(told) or ", ".join(alike),
        "alike on all ranks",
        "Install the same packages everywhere, from one lock file or image, and look at PATH and "
        "PYTHONPATH of the rank that differs.",
    )


def horovod(seen: Seen) -> Finding:
    """Whether it is there and loads, where it is used or could be."""
    used = seen.backend == "horovod"
    bad = [f for f in seen.ranks if f.horovod is None or f.horovod.error]
    is_choice = not used and all(f.horovod is None and f.mpi is not None for f in bad)
    return finding(
        "horovod",
        _graveness(bool(bad), used, is_choice),
        of_each(bad, lambda f: _horovod(f.horovod)) or _horovod(seen.ranks[0].horovod),
        "built for this TensorFlow" if used else "for horovodrun",
        _BUILD,
    )


def mpi(seen: Seen) -> Finding | None:
    """Whether mpi4py and its library are there, where they are used or could be."""
    if seen.backend == "horovod":
        return None
    used = seen.backend == "mpi"
    bad = [f for f in seen.ranks if f.mpi is None or f.mpi.error]
    is_choice = not used and all(f.mpi is None and f.horovod is not None for f in bad)
    return finding(
        "mpi",
        _graveness(bool(bad), used, is_choice),
        of_each(bad, lambda f: _mpi(f.mpi)) or _mpi(seen.ranks[0].mpi),
        "mpi4py and a library" if used else "for mpiexec",
        "Install them: pip install 'keras-orchestrator[mpi]'.",
    )


def gpus(seen: Seen) -> Finding:
    """A GPU that TensorFlow does not use, too few for the ranks of a host, or not everywhere."""
    blind = [f for f in seen.ranks if len(f.gpu_names) < f.gpus]
    few = [f for f in seen.ranks if f.gpus and f.local_size > f.gpus]
    unlike = len({bool(f.gpus) for f in seen.ranks}) > 1
    todo = ""
    if blind:
        todo = (
            "TensorFlow finds no driver or not its CUDA libraries: install 'tensorflow[and-cuda]' "
            f"and a driver that is new enough, {_ON_CPU}"
        )
    elif few:
        todo = f"Start at most one rank a GPU, {_ON_CPU}"
    elif unlike:
        todo = "Ranks without a GPU hold up the others: give every rank one, or none."
    return finding(
        "gpus",
        "problem" if blind or few else "warning" if unlike else "ok",
        (of_each(blind or few, _gpus) or all_have(seen.ranks, _gpus)),
        "one a rank, or none",
        todo,
    )


def nccl(seen: Seen) -> Finding | None:
    """Without NCCL gradients leave the GPU to be summed."""
    if seen.size == 1 or not any(f.gpus for f in seen.ranks):
        return None
    expected = "Horovod with NCCL"
    if seen.backend == "mpi":
        found, todo = "MPI sums in host memory", f"Build Horovod: {_BUILD_GPU}, and use horovodrun."
        return finding("nccl", "warning", found, expected, todo)
    without = [f for f in seen.ranks if f.horovod and not f.horovod.parts.get("nccl")]
    return finding(
        "nccl",
        "problem" if without else "ok",
        of_each(without, lambda f: "Horovod without NCCL") or "Horovod with NCCL",
        expected,
        f"Gradients leave the GPU to be summed. Build Horovod with it: {_BUILD_GPU}.",
    )


def _graveness(is_bad: bool, used: bool, is_choice: bool) -> Severity:
    """Grave where the ranks use it; nothing where another way to start ranks was installed."""
    if not is_bad or is_choice:
        return "ok"
    return "problem" if used else "warning"


def _horovod(library: Library | None) -> str:
    if library is None:
        return "not installed"
    if library.error:
        built_for = library.built_for or "an unknown one"
        return (
            f"{library.version}, built for TensorFlow {built_for}, does not load: {library.error}"
        )
    parts = [name for name, built in library.parts.items() if built]
    return f"{library.version}{f', built with {_and(parts)}' if parts else ''}"


def _mpi(library: Library | None) -> str:
    if library is None:
        return "not installed"
    loads = library.error or library.parts.get("library", "")
    return f"mpi4py {library.version}{f', {loads}' if loads else ''}"


def _and(names: list[str]) -> str:
    shown = {"gloo": "Gloo", "cuda": "CUDA", "rocm": "ROCm"}
    return ", ".join(shown.get(name, name.upper()) for name in names)


def _gpus(facts: Facts) -> str:
    if not facts.gpus:
        return "none"
    if len(facts.gpu_names) < facts.gpus:
        return f"TensorFlow uses {len(facts.gpu_names)} of {facts.gpus}"
    names = " and ".join(dict.fromkeys(facts.gpu_names))
    return f"{facts.gpus} x {names} for {count(facts.local_size, 'rank')}"
