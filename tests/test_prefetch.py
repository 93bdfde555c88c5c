"""Steps made ahead of time: the same values in the same order, and no thread left behind."""

import threading
from contextlib import closing

import pytest
import torch

from dpo_cli.records import Batch
from dpo_cli.train.memory import TokenBudget
from dpo_cli.train.prefetch import Prefetch, prefetched
from small_models import examples, packed

WAIT = 10.0  # seconds until a thread that should do something is given up


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_values_are_those_of_the_function_in_order():
    asked = []

    def make(step):
        asked.append(step)
        return step * 10

    with closing(Prefetch(make, steps=5)) as ahead:
        assert [ahead(step) for step in range(5)] == [0, 10, 20, 30, 40]
    assert asked == [0, 1, 2, 3, 4]  # each once, none beyond the last


def test_a_resumed_run_starts_anywhere():
    with closing(Prefetch(str, steps=9)) as ahead:
        assert [ahead(step) for step in (7, 8)] == ["7", "8"]


def test_the_next_step_is_made_while_this_one_is_used():
    begun = {step: threading.Event() for step in range(3)}

    def make(step):
        begun[step].set()
        return step

    with closing(Prefetch(make, steps=3)) as ahead:
        assert ahead(0) == 0
        assert begun[1].wait(WAIT)
        assert not begun[2].is_set()


def test_an_error_is_raised_by_the_step_it_belongs_to():
    def make(step):
        if step == 1:
            raise ValueError("row 7 is broken")
        return step

    with closing(Prefetch(make, steps=3)) as ahead:
        assert ahead(0) == 0
        with pytest.raises(ValueError, match="row 7 is broken"):
            ahead(1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_when_the_loop_ends_early(error):
    working, go_on = threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            working.set()
            assert go_on.wait(WAIT)
        return step

    def loop():
        with closing(Prefetch(make, steps=3)) as ahead:
            ahead(0)
            assert working.wait(WAIT)
            threading.Timer(0.05, go_on.set).start()  # while `close` waits
            raise error

    with pytest.raises(error):
        loop()
    assert threads() == []


def test_a_cpu_gets_its_batches_from_the_function_itself():
    def batches(step):
        return []

    with prefetched(batches, 3, torch.device("cpu"), TokenBudget(9)) as made:
        assert made is batches
    assert threads() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gets_them_pinned():
    rows = examples(2)
    with prefetched(
        lambda step: [packed(rows)], 2, torch.device("cuda", 0), TokenBudget(99)
    ) as made:
        (batch,) = made(0)
    assert isinstance(batch, Batch)
    assert batch.input_ids.is_pinned()
    assert torch.equal(batch.to("cuda").input_ids.cpu(), packed(rows).input_ids)
