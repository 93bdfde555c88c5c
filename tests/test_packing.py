"""Packed rows by hand, and the packer's promises."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dpo_cli.data.loader import plan_steps
from dpo_cli.packing import fill_bins, pack, pack_all, pack_sorted
from dpo_cli.records import EncodedExample, Segment


def example(prompt, *responses, row=0):
    ids = lambda x: np.asarray(x, dtype=np.int32)  # noqa: E731
    return EncodedExample(ids(prompt), tuple(ids(r) for r in responses), row)


def test_a_row_by_hand():
    batch = pack([example([1, 2], [3, 4, 9], [5, 9]), example([6], [9], [7, 8, 9])], [10, 20])
    # [p p|c c|r][p||r r]: the last token of each branch is only a target
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert batch.targets.tolist() == [3, 4, 9, 5, 9, 9, 7, 8, 9]
    assert batch.source_index.tolist() == [1, 2, 3, 1, 4, 5, 5, 6, 7]
    assert batch.sequence_index.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3]
    assert batch.sequence_lengths.tolist() == [3, 2, 1, 3]
    assert batch.example_ids.tolist() == [10, 20]
    assert batch.layout == (Segment(0, 2, (2, 1)), Segment(5, 1, (0, 2)))
    assert batch.branches == 2


def test_keep_last_for_stages_that_read_it():
    batch = pack([example([1, 2], [3, 9], [4, 9])], [0], keep_last=True)
    assert batch.input_ids.tolist() == [1, 2, 3, 9, 4, 9]
    assert batch.source_index.tolist() == [1, 2, 1, 4]
    assert batch.last_index.tolist() == [3, 5]
    assert batch.to("cpu").last_index.tolist() == [3, 5]
    assert pack([example([1, 2], [3, 9], [4, 9])], [0]).last_index is None


def test_an_empty_branch_is_read_at_its_prompts_end():
    batch = pack([example([1, 2], [], [4, 9]), example([5], [6], [])], [0, 1], keep_last=True)
    # [p p||r r][p|c|]
    assert batch.input_ids.tolist() == [1, 2, 4, 9, 5, 6]
    assert batch.last_index.tolist() == [1, 3, 5, 4]
    assert batch.source_index.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [4, 9, 6]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(4, 40))
def test_the_budget_counts_kept_tokens(lengths, budget):
    examples = [example([1], [2] * n, [3], row=i) for i, n in enumerate(lengths)]
    rows = pack_all(examples, range(len(examples)), budget, keep_last=True)
    for b in (*rows, *pack_sorted(examples, budget, keep_last=True)):
        assert len(b.example_ids) == 1 or len(b.input_ids) <= budget
        assert b.input_ids[b.last_index].tolist() == [2, 3] * len(b.example_ids)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_bins_hold_everything_once_within_budget(sizes, budget):
    bins = fill_bins(sizes, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(len(b) == 1 or sum(sizes[i] for i in b) <= budget for b in bins)
    assert bins == fill_bins(sizes, budget)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(4, 40))
def test_pack_all_and_sorted_cover_the_examples(lengths, budget):
    examples = [example([1], [2] * n, row=i) for i, n in enumerate(lengths)]
    everything = list(range(len(examples)))
    for batches in (pack_all(examples, everything, budget), list(pack_sorted(examples, budget))):
        assert sorted(i for b in batches for i in b.example_ids.tolist()) == everything
        for b in batches:
            assert len(b.example_ids) == 1 or len(b.input_ids) <= budget


@given(st.integers(1, 30), st.integers(1, 12), st.floats(0.1, 3.0), st.integers(0, 5))
def test_an_epoch_is_every_row_once(rows, batch_size, epochs, seed):
    plan = plan_steps(rows, batch_size, epochs, None, True, seed)
    steps = [plan.indices(step) for step in range(plan.steps)]
    seen = [i for step in steps for i in step]
    total = max(1, round(rows * epochs))
    assert {len(step) for step in steps} == {min(batch_size, total)}
    assert 0 <= total - len(seen) < batch_size
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


def test_max_steps_wins_and_wraps_epochs():
    plan = plan_steps(5, 4, 1.0, 10, True, 0)
    seen = [i for step in range(10) for i in plan.indices(step)]
    assert len(seen) == 40
    assert np.bincount(seen).tolist() == [8] * 5


def test_order_depends_on_seed_and_epoch_alone():
    a, b = (plan_steps(50, 7, 2.0, None, True, s) for s in (1, 2))
    assert a.indices(3) == plan_steps(50, 7, 2.0, None, True, 1).indices(3)
    assert a.indices(0) != b.indices(0)
    assert plan_steps(50, 10, 1.0, None, False, 0).indices(1) == list(range(10, 20))
