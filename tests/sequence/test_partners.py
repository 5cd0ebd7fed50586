"""Which rows of a pack are contrasted with which, by hand."""

import numpy as np
import pytest

from uno_ds.sequence.partners import partner_rows, partners


@pytest.mark.parametrize(
    "samples, expected",
    [
        ([], None),
        ([3], None),
        ([3, 3, 3], None),
        ([0, 1], [1, 0]),
        ([0, 1, 2], [1, 2, 0]),
        # Two images of one sample are not contrasted with each other.
        ([0, 0, 1], [2, 2, 0]),
        ([0, 1, 1, 0], [1, 3, 3, 1]),
    ],
)
def test_the_partner_is_the_next_image_of_another_sample(samples, expected):
    assert partners(samples) == expected


def test_images_of_one_size_are_compared_cell_by_cell():
    rows = partner_rows([(2, 3), (2, 3)], [0, 1])
    assert rows.tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]


def test_of_another_size_the_cell_in_the_same_place_is_taken():
    # 1 x 2 cells against 2 x 4: the middles lie in the second row, columns 1 and 3.
    rows = partner_rows([(1, 2), (2, 4)], [0, 1])
    assert rows.tolist() == [2 + 5, 2 + 7, 0, 0, 1, 1, 0, 0, 1, 1]


def test_a_pack_with_one_image_has_no_rows():
    assert partner_rows([(2, 2)], [0]).dtype == np.int64 and not len(partner_rows([(2, 2)], [0]))
    assert not len(partner_rows([], []))
