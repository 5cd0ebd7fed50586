"""The bounds that other tests derive hold for any order of summation, and are tight enough to find
a wrong number."""

import numpy as np
import pytest
import torch
from rounding import assert_as_near_as, assert_equal_up_to_rounding


@pytest.mark.parametrize("terms", [7, 100, 4608])
def test_any_order_of_a_sum_is_within_rounding_and_a_wrong_term_is_not(terms: int):
    rng = np.random.default_rng(terms)
    rows = torch.from_numpy(rng.standard_normal((200, terms)).astype(np.float32))
    one_by_one = torch.zeros(200)
    for column in rows.unbind(1):
        one_by_one = one_by_one + column
    exact = rows.double().sum(1)
    assert_equal_up_to_rounding(rows.sum(1), one_by_one, terms)
    assert_as_near_as(rows.sum(1), rows.flip(1).sum(1), exact)
    wrong = rows.sum(1) * 1.001
    with pytest.raises(AssertionError, match="and rounding by"):
        assert_equal_up_to_rounding(wrong, one_by_one, terms)
    with pytest.raises(AssertionError, match="is usual"):
        assert_as_near_as(wrong, rows.flip(1).sum(1), exact)
