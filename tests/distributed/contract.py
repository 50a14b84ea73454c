"""What every communicator must do. A backend joins by calling each of `CHECKS` on all its ranks.

@pytest.mark.parametrize("check", contract.CHECKS, ids=contract.name)
def test_contract(check):
    check(communicator)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from orchestrator.communicators.base import Communicator

SHAPES = [(), (1,), (0,), (7,), (3, 5), (2, 0, 3), (4, 3, 2, 1)]
DTYPES = ["float32", "float64", "int64"]
FOLDS: dict[Any, Any] = {"sum": np.sum, "min": np.min, "max": np.max}

Check = Callable[[Communicator], None]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


def name(function: Any) -> str:
    return function.__name__


def _same_everywhere(communicator: Communicator, array: np.ndarray) -> bool:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return len(set(communicator.allgather_object(digest))) == 1


def _values(shape: tuple[int, ...], dtype: str, rank: int) -> np.ndarray:
    """Small whole numbers that differ by rank and place, so that every sum is exact."""
    flat = np.arange(int(np.prod(shape)), dtype="int64") * (rank + 1) - 3 * rank
    return flat.reshape(shape).astype(dtype)


@check
def ranks_and_sizes(communicator: Communicator) -> None:
    assert isinstance(communicator.name, str)
    assert communicator.size >= 1
    assert 0 <= communicator.rank < communicator.size
    assert communicator.allgather_object(communicator.rank) == list(range(communicator.size))
    assert set(communicator.allgather_object(communicator.size)) == {communicator.size}
    assert set(communicator.allgather_object(communicator.name)) == {communicator.name}


@check
def local_ranks_are_consistent(communicator: Communicator) -> None:
    import socket

    entry = (socket.gethostname(), communicator.local_rank, communicator.local_size)
    everyone = communicator.allgather_object(entry)
    for host in {host for host, _, _ in everyone}:
        here = [(rank, size) for h, rank, size in everyone if h == host]
        assert [rank for rank, _ in here] == list(range(len(here)))
        assert {size for _, size in here} == {len(here)}


@check
def allreduce_gives_the_right_values(communicator: Communicator) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            mine = _values(shape, dtype, communicator.rank)
            kept = mine.copy()
            everyone = np.stack([_values(shape, dtype, r) for r in range(communicator.size)])
            for op, fold in FOLDS.items():
                result = communicator.allreduce(mine, op)  # pyright: ignore[reportArgumentType]
                where = f"{op} of {dtype}{shape}"
                assert isinstance(result, np.ndarray), where
                assert result.dtype == np.dtype(dtype), where
                assert result.shape == shape, where
                np.testing.assert_array_equal(result, fold(everyone, axis=0), err_msg=where)
                np.testing.assert_array_equal(mine, kept, err_msg=f"{where}: argument changed")


@check
def allreduce_sums_by_default(communicator: Communicator) -> None:
    total = communicator.allreduce(np.array([communicator.rank + 1.0]))
    assert total.tolist() == [communicator.size * (communicator.size + 1) / 2]


@check
def allreduce_gives_the_same_bytes_everywhere(communicator: Communicator) -> None:
    # Not exact in any order of addition: only one and the same order gives the same bytes.
    for dtype in ("float32", "float64"):
        for length in (3, 1000, 100_003):
            generator = np.random.default_rng(communicator.rank)
            mine = (
                generator.standard_normal(length) * 10.0 ** generator.integers(-6, 6, length)
            ).astype(dtype)
            first = communicator.allreduce(mine)
            assert _same_everywhere(communicator, first), (dtype, length)
            again = communicator.allreduce(mine)
            assert first.tobytes() == again.tobytes(), (dtype, length)
            everyone = np.stack(communicator.allgather_object(mine)).astype("float64")
            bound = np.finfo(dtype).eps * communicator.size * np.abs(everyone).sum(0)
            assert (np.abs(first - everyone.sum(0)) <= bound).all(), (dtype, length)


@check
def allreduce_takes_views(communicator: Communicator) -> None:
    whole = np.arange(24, dtype="float64").reshape(4, 6) + communicator.rank
    view = whole.T[::2]
    expected = communicator.size * np.arange(24).reshape(4, 6).T[::2] + sum(
        range(communicator.size)
    )
    np.testing.assert_array_equal(communicator.allreduce(view), expected)


@check
def allreduce_returns_a_new_writable_array(communicator: Communicator) -> None:
    mine = np.zeros(3)
    mine.flags.writeable = False
    result = communicator.allreduce(mine)
    result += 1
    assert mine.tolist() == [0, 0, 0]


@check
def non_finite_values_reach_every_rank(communicator: Communicator) -> None:
    last = communicator.size - 1
    mine = np.array([np.nan if communicator.rank == last else 1.0, np.inf, 1.0])
    result = communicator.allreduce(mine)
    assert np.isnan(result[0])
    assert np.isposinf(result[1])
    assert result[2] == communicator.size


@check
def broadcast_takes_the_roots_values(communicator: Communicator) -> None:
    dtypes = ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"]
    for root in {0, communicator.size - 1}:
        for dtype in dtypes:
            for shape in SHAPES:
                mine = np.full(shape, (communicator.rank + 1) % 120).astype(dtype)
                kept = mine.copy()
                result = communicator.broadcast(mine, root)
                expected = np.full(shape, (root + 1) % 120).astype(dtype)
                where = f"{dtype}{shape} from {root}"
                assert result.dtype == np.dtype(dtype), where
                assert result.shape == shape, where
                np.testing.assert_array_equal(result, expected, err_msg=where)
                np.testing.assert_array_equal(mine, kept, err_msg=f"{where}: argument changed")


@check
def broadcast_keeps_every_bit(communicator: Communicator) -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 1000, dtype="uint32")
    mine = bits.view("float32") if communicator.rank == 0 else np.zeros(1000, "float32")
    result = communicator.broadcast(mine)
    # Signalling NaNs, infinities, denormals and negative zeros are among them.
    np.testing.assert_array_equal(result.view("uint32"), bits)


@check
def objects_come_from_the_root(communicator: Communicator) -> None:
    for root in {0, communicator.size - 1}:
        obj = {"rank": communicator.rank, "text": "π", "none": None, "nested": [(1, b"\0")]}
        assert communicator.broadcast_object(obj, root) == {**obj, "rank": root}
    big = "x" * 300_000 if communicator.rank == 0 else None
    assert communicator.broadcast_object(big) == "x" * 300_000
    assert communicator.broadcast_object(None) is None


@check
def objects_are_gathered_in_rank_order(communicator: Communicator) -> None:
    # Of different sizes and types, one of them nothing at all.
    mine = None if communicator.rank == 1 else ["r" * 1000 * communicator.rank, communicator.rank]
    everyone = communicator.allgather_object(mine)
    assert everyone == [
        None if rank == 1 else ["r" * 1000 * rank, rank] for rank in range(communicator.size)
    ]


@check
def barrier_waits_for_all(communicator: Communicator) -> None:
    import time

    if communicator.rank == communicator.size - 1:
        time.sleep(0.05)  # not synchronisation: the delay that the others must wait out
    arrived = time.time()
    communicator.barrier()
    left = time.time()
    everyone = communicator.allgather_object((arrived, left, communicator.local_size))
    if communicator.local_size == communicator.size:  # one clock
        assert min(left for _, left, _ in everyone) >= max(arrived for arrived, _, _ in everyone)


@check
def different_collectives_in_a_row_do_not_mix(communicator: Communicator) -> None:
    for turn in range(20):
        total = communicator.allreduce(np.array([turn + communicator.rank], "int64"))
        assert total[0] == turn * communicator.size + sum(range(communicator.size))
        assert communicator.broadcast(np.array([turn + communicator.rank]))[0] == turn
        assert communicator.allgather_object(turn) == [turn] * communicator.size


def _buckets(count: int, rank: int) -> list[list[Any]]:
    import tensorflow as tf

    tensors = [
        tf.fill([3, 2], tf.constant(rank + 1.0, tf.float32)),
        tf.fill([5], tf.constant(rank + 2.0, tf.float16)),
        tf.constant(rank + 0.5, tf.float32),
        tf.fill([0, 4], tf.constant(1.0, tf.float32)),
        tf.fill([1, 1, 7], tf.constant(10.0 * rank, tf.float32)),
    ]
    return [tensors] if count == 1 else [tensors[:1], tensors[1:3], tensors[3:]]


def _check_sums(communicator: Communicator, buckets: int, sums: Any) -> None:
    ranks = range(communicator.size)
    total = sum(ranks)
    expected = [total + communicator.size, total + 2 * communicator.size]
    expected += [total + 0.5 * communicator.size, communicator.size, 10 * total]
    inputs = _buckets(buckets, communicator.rank)
    assert [len(bucket) for bucket in sums] == [len(bucket) for bucket in inputs]
    flat = [
        (s, t)
        for out, bucket in zip(sums, inputs, strict=True)
        for s, t in zip(out, bucket, strict=True)
    ]
    for (result, tensor), value in zip(flat, expected, strict=True):
        assert result.dtype == tensor.dtype
        assert tuple(result.shape) == tuple(tensor.shape)
        np.testing.assert_array_equal(result.numpy(), np.full(tensor.shape, value))


def _sum_in_graph(communicator: Communicator, buckets: int) -> None:
    import tensorflow as tf

    @tf.function
    def step(rank: Any) -> Any:
        del rank
        return communicator.sum_gradients(_buckets(buckets, communicator.rank), "contract")

    for turn in range(3):
        _check_sums(communicator, buckets, step(tf.constant(turn)))


@check
def gradients_sum_in_a_graph_in_one_bucket(communicator: Communicator) -> None:
    _sum_in_graph(communicator, 1)


@check
def gradients_sum_in_a_graph_in_three_buckets(communicator: Communicator) -> None:
    _sum_in_graph(communicator, 3)


@check
def gradients_sum_eagerly(communicator: Communicator) -> None:
    for buckets in (1, 3):
        sums = communicator.sum_gradients(_buckets(buckets, communicator.rank), "contract")
        _check_sums(communicator, buckets, sums)


@check
def gradients_keep_their_static_shapes(communicator: Communicator) -> None:
    import tensorflow as tf

    shapes: list[Any] = []

    @tf.function
    def step() -> Any:
        (sums,) = communicator.sum_gradients(_buckets(1, communicator.rank), "shapes")
        shapes.append([s.shape.as_list() for s in sums])
        return sums

    step()
    assert shapes[0] == [[3, 2], [5], [], [0, 4], [1, 1, 7]]


@check
def gradients_are_the_same_bytes_everywhere(communicator: Communicator) -> None:
    import tensorflow as tf

    generator = np.random.default_rng(communicator.rank)
    tensors = [tf.constant(generator.standard_normal(n).astype("float32")) for n in (5, 1001, 64)]
    step = tf.function(lambda: communicator.sum_gradients([tensors], "bytes"))
    first = [t.numpy() for t in step()[0]]
    for array in first:
        assert _same_everywhere(communicator, array)
    for _ in range(3):
        assert [t.numpy().tobytes() for t in step()[0]] == [a.tobytes() for a in first]


def _half(communicator: Communicator, wire: Any, precision: float) -> None:
    import tensorflow as tf

    size, shapes = communicator.size, ((5,), (1001,), (), (3, 4))
    everyone = [np.random.default_rng(rank) for rank in range(size)]
    arrays = [[g.standard_normal(shape).astype("float32") for shape in shapes] for g in everyone]
    mine = [tf.constant(array) for array in arrays[communicator.rank]]
    step = tf.function(lambda: communicator.sum_gradients([mine[:2], mine[2:]], "half", wire))
    sums = [t.numpy() for bucket in step() for t in bucket]
    for index, result in enumerate(sums):
        parts = [rank[index] for rank in arrays]
        assert result.dtype == np.float32
        assert result.shape == shapes[index]
        error = np.abs(result - sum(parts))
        assert (error <= precision * size * sum(np.abs(part) for part in parts)).all()
        assert _same_everywhere(communicator, result)
    if size > 1:
        assert np.abs(sums[1] - sum(rank[1] for rank in arrays)).max() > 1e-5, "not sent in half"


@check
def gradients_travel_as_fp16(communicator: Communicator) -> None:
    _half(communicator, "fp16", 2.0**-11)


@check
def gradients_travel_as_bf16(communicator: Communicator) -> None:
    _half(communicator, "bf16", 2.0**-8)


@check
def rows_are_laid_end_to_end(communicator: Communicator) -> None:
    import tensorflow as tf

    def rows(rank: int, dtype: Any) -> np.ndarray:
        return np.full((rank * 2, 3), rank, dtype)  # none on rank 0

    step = tf.function(
        lambda a, b: (communicator.concat_rows(a, "a"), communicator.concat_rows(b, "b"))
    )
    for _ in range(2):
        results = step(*(tf.constant(rows(communicator.rank, t)) for t in ("float32", "int32")))
        for result, dtype in zip(results, ("float32", "int32"), strict=True):
            expected = [rows(rank, dtype) for rank in range(communicator.size)]
            np.testing.assert_array_equal(result.numpy(), np.concatenate(expected))
            assert result.dtype == dtype


@check
def lengths_are_laid_end_to_end(communicator: Communicator) -> None:
    import tensorflow as tf

    mine = tf.range(communicator.rank + 1, dtype=tf.int64)
    result = communicator.concat_rows(mine, "lengths").numpy()
    assert result.tolist() == [n for rank in range(communicator.size) for n in range(rank + 1)]
