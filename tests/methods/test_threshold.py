"""The threshold below which entries of a fused matrix are dropped."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vit_explain_callback.methods.heads import _smallest_of_row


@settings(deadline=None)
@given(
    count=st.integers(1, 9000),
    share=st.floats(0, 0.9999),
    kind=st.sampled_from(["spread", "half zeros", "few values", "one value", "in order", "some not a number"]),
    seed=st.integers(0, 9),
)
def test_the_threshold_is_that_of_the_sorted_entries(count: int, share: float, kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    spread = random.normal(size=count)
    row = {
        "spread": spread,
        "half zeros": np.maximum(spread, 0),
        "few values": spread.round(),
        "one value": np.ones(count),
        "in order": np.sort(spread),
        "some not a number": np.where(spread > 1, np.nan, spread),
    }[kind].astype(np.float32)
    dropped = int(share * count)
    np.testing.assert_array_equal(_smallest_of_row(dropped, row), np.sort(row)[dropped])
